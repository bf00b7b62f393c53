"""Training of the tiny VAE: its loss, and its decoder alone."""

from pathlib import Path

import torch

from configs.load import load_config
from configs.train_schema import CodecLossConfig
from model.weights.files import read_json
from trainer.codec import codec_loss
from trainer.tiny.codec import TinyCodec
from utils.distributed import Ranks

CPU = torch.device("cpu")


def test_temporal_term_sees_flicker_and_no_still_error():
    weights = CodecLossConfig(gradient=0, temporal=2.0, mse=0, chroma=0, kl=0)
    x = torch.rand(2, 4, 3, 6, 6)
    still = codec_loss(x, x + 0.25, torch.zeros(2), weights)
    assert still["temporal"] < 1e-6 and torch.isclose(still["loss"], torch.tensor(0.25))
    flicker = codec_loss(x, x + torch.tensor([0.0, 0.5, 0.0, 0.5]).view(1, 4, 1, 1, 1), torch.zeros(2), weights)
    torch.testing.assert_close(flicker["loss"], torch.tensor(0.25 + 2.0 * 0.5))


def test_training_the_decoder_leaves_the_encoder_as_it_is(tmp_path):
    """What other networks have learnt stays: encoder and latent statistics, bit for bit."""
    small = ["training.bank_clips=4", "training.global_batch=2", "training.micro_batch=2", "training.codec.crop=0"]
    config = load_config(
        "configs/train_tiny_decoder.yaml",
        [*small, "training.codec.clip_frames=[5]", "training.precision=float32", "training.ema_decay=0.0"],
    )
    stage = TinyCodec(config, CPU, Ranks())
    before = {name: value.clone() for name, value in stage.module.state_dict().items()}
    for step in range(2):
        assert stage.update(step)["gradient_norm"] > 0
    after = stage.module.state_dict()
    changed = {name.partition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}
    stage.export(tmp_path / "vae", 2)
    assert read_json("new", tmp_path / "vae" / "config.json") == read_json("old", Path("assets/tiny/vae/config.json"))
