"""What is wrong with a weight file is said in one sentence, and checked without reading it."""

import json
import struct

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors import safe_open
from safetensors.torch import save_file
from weight_layouts import TO_T5, WAN_CONFIG, foreign, write_wan_folder

from configs.errors import UserError
from configs.schema import ModelConfig
from model.text import word_tokenizer
from model.weights import files
from model.weights import load as weights


@pytest.mark.parametrize(
    "path, download",
    [
        ("wan_models/Wan2.1-T2V-1.3B", "wan-1.3b"),
        ("wan_models/Wan2.1-T2V-14B", "wan-14b"),
        ("checkpoints/self_forcing_dmd.pt", "self-forcing"),
        ("longlive_models/models/longlive_base.pt", "longlive"),
    ],
)
def test_missing_student_names_the_download(tmp_path, path, download):
    with pytest.raises(UserError, match=rf"model\.student={tmp_path}/{path} .*download\.py {download}`"):
        weights.load_student(tmp_path / path)


def test_no_download_is_named_for_a_path_that_is_like_none(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist; set --checkpoint_path to another path$"):
        weights.load_student(tmp_path / "nowhere", name="--checkpoint_path")


def test_tiny_weights_that_are_missing(tmp_path, monkeypatch):
    """In a checkout git has them; the installed package has none, and says where they are."""
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"in assets/tiny of the repository.*`pip install -e \.`, or set model\."):
        weights.load_student("assets/tiny/student")
    (tmp_path / "assets").mkdir()
    with pytest.raises(UserError, match="`git checkout -- assets/tiny/student` .*train_tiny.py`$"):
        weights.load_student("assets/tiny/student")
    with pytest.raises(UserError, match="`python scripts/train_world.py`$"):
        weights.load_student("assets/world/student")


def test_missing_pieces_are_named(tmp_path, wan_state):
    with pytest.raises(UserError, match=r"download\.py taew2\.1`"):
        weights.load_tiny_decoder(tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"download\.py vae`"):
        weights.load_vae(tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"tokenizer\.json.*download\.py umt5`"):
        weights.load_tokenizer(tmp_path, 32)
    folder = write_wan_folder(tmp_path / "wan", wan_state, 3)
    (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="lacks 1 of 3 shards.*00002-of-00003"):
        weights.load_student(folder)
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(UserError, match="lacks 1 of 3 shards.*00002-of-00003"):
        weights.load_student(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        weights.load_student(folder)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_that_is_cut_short_is_to_be_fetched_again(tmp_path, wan_state, suffix):
    path = tmp_path / f"student{suffix}"
    torch.save(wan_state, path) if suffix == ".pt" else save_file(wan_state, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="fetch it again"):
        weights.load_student(path)


def test_not_a_weight_file(tmp_path):
    for name, content, message in (
        ("a.pt", b"<html>not found</html>", "not a PyTorch file"),
        ("b.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("c.safetensors", struct.pack("<Q", 4) + b"????", "not a safetensors file"),
        ("d.gguf", b"", "unknown type"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            weights.load_student(tmp_path / name)


@pytest.mark.parametrize("layout", ["bare", "named"])
def test_lora_is_recognised(tmp_path, layout):
    lora = {"base_model.model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(8, 128)}
    torch.save(lora if layout == "bare" else {"generator_lora": lora, "critic_lora": lora}, tmp_path / "lora.pt")
    with pytest.raises(UserError, match=r"LoRA of rank 8 and width 128, .* model\.lora="):
        weights.load_student(tmp_path / "lora.pt")


def test_wrong_networks_are_named(tmp_path, t5, wan, wan_state):
    torch.save(
        {foreign(n, TO_T5): v for n, v in t5.state_dict().items() if "embed_tokens" not in n}, tmp_path / "t5.pth"
    )
    with pytest.raises(UserError, match=r"model\.vae=.*seems to be a T5 text encoder.*Wan2\.1_VAE\.pth"):
        weights.load_vae(tmp_path / "t5.pth")
    with pytest.raises(UserError, match="is not a Wan transformer; it seems to be a T5 text encoder"):
        weights.load_student(tmp_path / "t5.pth")
    torch.save(wan_state | {"img_emb.proj.0.weight": torch.zeros(4)}, tmp_path / "i2v.pt")
    with pytest.raises(UserError, match="image-to-video"):
        weights.load_student(tmp_path / "i2v.pt")
    torch.save({"generator": wan_state}, tmp_path / "s.pt")
    with pytest.raises(UserError, match=r"no averaged weights; set model\.use_ema=false"):
        weights.load_student(tmp_path / "s.pt", use_ema=True)
    torch.save({"generator_ema": wan_state}, tmp_path / "e.pt")
    with pytest.raises(UserError, match=r"averaged weights only; set model\.use_ema=true"):
        weights.load_student(tmp_path / "e.pt")


def test_missing_unexpected_and_misshapen_tensors_are_listed(tmp_path, wan_state):
    broken = dict(wan_state)
    del broken["blocks.1.norm3.bias"]
    broken["blocks.1.extra"] = torch.zeros(1)
    broken["blocks.1.ffn.2.bias"] = torch.zeros(127)
    torch.save(broken, tmp_path / "s.pt")
    with pytest.raises(UserError) as caught:
        weights.load_student(tmp_path / "s.pt")
    message = str(caught.value)
    for part in ("1 tensors missing (blocks.1.norm2.bias)", "1 tensors unexpected (blocks.1.extra)",
                 "blocks.1.ffn.net.2.bias (127,) for (128,)", "width 128 with 2 layers"):  # fmt: skip
        assert part in message
    assert "\n" not in message


def test_config_json_that_contradicts_its_tensors(tmp_path, wan_state):
    folder = write_wan_folder(tmp_path / "wan", wan_state)
    (folder / "config.json").write_text(json.dumps(WAN_CONFIG | {"num_layers": 30}))
    with pytest.raises(UserError, match="num_layers=30 in config.json but its tensors have 2"):
        weights.load_student(folder)


class HeaderOnly:
    """A safetensors file that gives no values."""

    def __init__(self, *args, **kwargs):
        handle = safe_open(*args, **kwargs)
        self.keys, self.get_slice = handle.keys, handle.get_slice


def test_check_weights_reads_no_tensor(tmp_path, t5, student, monkeypatch):
    weights.save_network(student, tmp_path / "student", card={})
    weights.save_network(t5, tmp_path / "text", tokenizer=word_tokenizer(["a"]))
    weights.save_network(AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1), tmp_path / "vae")
    paths = {"student": "student", "vae": "vae", "text_encoder": "text", "tokenizer": "text"}
    config = ModelConfig(**{role: str(tmp_path / name) for role, name in paths.items()})
    monkeypatch.setattr("model.weights.files.safe_open", HeaderOnly)
    checks = weights.check_weights(config)
    assert [c.role for c in checks] == list(paths)
    assert checks[0].kind == "our own" and checks[0].size > 100_000
    vae = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    vae.write_bytes(vae.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model\.vae: .* cut short"):
        weights.check_weights(config)
