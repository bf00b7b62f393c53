"""Every file format, as small random files in exactly the published layouts (weight_layouts.py), loads.

Networks are compared by their outputs.
"""

import re

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel
from weight_layouts import TO_T5, foreign, foreign_vae, same_output, write_wan_folder

from configs.schema import ScheduleConfig, StreamConfig
from model.causal_wan import CausalWanModel
from model.schedule import Schedule
from model.text import word_tokenizer
from model.tiny_decoder import TinyDecoder, TinyDecoderCodec, TinyDecoderConfig
from model.weights import load as weights

# --- transformer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_original_wan_folder(tmp_path, wan, wan_state, count):
    folder = write_wan_folder(tmp_path / "wan", wan_state, count)
    student = weights.load_student(folder)
    assert isinstance(student, CausalWanModel) and student.card == {}
    same_output(student, wan)
    score = weights.load_score(folder)
    assert type(score) is WanTransformer3DModel
    same_output(score, wan)


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("size", ["10GB", "200KB"])
def test_a_folder_of_diffusers_loads(tmp_path, wan, root, size):
    wan.save_pretrained(tmp_path / "transformer" if root else tmp_path, max_shard_size=size)
    same_output(weights.load_student(tmp_path), wan)


@pytest.mark.parametrize("prefix", ["model.", "_orig_mod.model."])  # others: test_weights_family.py
def test_self_forcing_file(tmp_path, wan, wan_state, prefix):
    def wrapped(name):  # nested units put their segment into the middle
        return prefix + re.sub(r"^(blocks\.\d+\.)", r"\1_fsdp_wrapped_module._checkpoint_wrapped_module.", name)

    averaged = {name: value * 1.5 for name, value in wan_state.items()}
    payload = {
        "generator": {prefix + name: value for name, value in wan_state.items()},
        "generator_ema": {wrapped(name): value for name, value in averaged.items()},
        "critic": {prefix + name: value * 0.5 for name, value in wan_state.items()},
        "step": 600,
    }
    folder = tmp_path / "checkpoint_model_000600"
    folder.mkdir()
    torch.save(payload, folder / "model.pt")
    same_output(weights.load_student(folder / "model.pt"), wan)
    same_output(weights.load_student(folder), wan)
    ema = weights.load_student(folder, use_ema=True).state_dict()
    critic = weights.load_score(folder, name="model.critic").state_dict()
    for name, value in wan.state_dict().items():
        assert torch.equal(ema[name], value * 1.5) and torch.equal(critic[name], value * 0.5)


def test_files_of_old_torch(tmp_path, wan, wan_state):
    state = {f"model.{name}": value for name, value in wan_state.items()}
    torch.save({"model": state}, tmp_path / "ode_init.pt", _use_new_zipfile_serialization=False)
    same_output(weights.load_student(tmp_path / "ode_init.pt"), wan)


def test_lower_precision_is_diffusers(tmp_path, wan):
    wan.save_pretrained(tmp_path)
    ours = weights.load_score(tmp_path, dtype=torch.bfloat16)
    theirs = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert {p.dtype for p in ours.parameters()} == {torch.float32, torch.bfloat16}


# --- our own ----------------------------------------------------------------------------------------------------------


def test_own_folder_round_trip(tmp_path, wan, student):
    schedule = Schedule.from_config(ScheduleConfig(), StreamConfig()).to_dict()
    card = {"stage": "distilled", "step": 7, "schedule": schedule}
    ema = {name: value + 1 for name, value in student.state_dict().items()}
    weights.save_network(student, tmp_path / "s", card=card, dtype=None, ema=ema)
    again = weights.load_student(tmp_path / "s")
    assert again.card == card and not again.training
    same_output(again, wan)
    averaged = weights.load_student(tmp_path / "s", use_ema=True)
    assert torch.equal(averaged.proj_out.bias, wan.proj_out.bias + 1)
    same_output(WanTransformer3DModel.from_pretrained(tmp_path / "s"), wan)  # diffusers reads it too


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_on_disk_float32_in_memory(tmp_path, student, dtype):
    weights.save_network(student, tmp_path / "a", card={}, dtype=dtype)
    weights.save_network(student, tmp_path / "b", card={}, dtype=dtype)
    a, b = (tmp_path / x / "diffusion_pytorch_model.safetensors" for x in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert {value.dtype for value in load_file(a).values()} == {dtype}
    again = weights.load_student(tmp_path / "a")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    for name, value in student.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.to(dtype).float())


def test_values_beyond_half_precision_are_not_lost(tmp_path, student):
    student.proj_out.bias.data[0] = 1e6
    with pytest.raises(ValueError, match="bfloat16"):
        weights.save_network(student, tmp_path / "s", card={})
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "file, causal, cls",
    [
        ("tiny_transformer", False, WanTransformer3DModel),
        ("tiny_transformer", True, CausalWanModel),
        ("tiny_vae", False, AutoencoderKLWan),
        ("tiny_text_encoder", False, UMT5EncoderModel),
    ],
)
def test_a_new_network_is_of_the_class_of_its_file(file, causal, cls):
    network = weights.new_network(f"configs/networks/{file}.json", causal=causal)
    assert type(network) is cls and not any(p.is_meta for p in network.parameters())


# --- text encoder, VAE, tiny decoder ----------------------------------------------------------------------------------


def test_text_encoder_formats(tmp_path, t5):
    tokenizer = word_tokenizer(["a", "red", "circle"])
    own, original = tmp_path / "own", tmp_path / "Wan2.1-T2V-1.3B"
    weights.save_network(t5, own, dtype=None, tokenizer=tokenizer)
    tokenizer.save_pretrained(original / "google" / "umt5-xxl")
    state = {foreign(n, TO_T5): v for n, v in t5.state_dict().items() if n != "encoder.embed_tokens.weight"}
    torch.save(state, original / "models_t5_umt5-xxl-enc-bf16.pth")
    t5.save_pretrained(tmp_path / "hf")
    ids = torch.tensor([[3, 4, 5, 1]])
    with torch.no_grad():
        expected = t5(input_ids=ids).last_hidden_state[0]
    for path, words in ((own, own), (original, original), (tmp_path / "hf", own)):
        encoder = weights.load_text_encoder(path, words, 6)
        out = encoder(["A red circle"])
        torch.testing.assert_close(out[0, :4], expected, rtol=0, atol=1e-6)
        assert out.shape == (1, 6, 16) and (out[0, 4:] == 0).all()
        assert encoder.encoder.shared.weight is encoder.encoder.encoder.embed_tokens.weight


def test_each_format_of_a_vae_loads(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4).eval()  # widths 1/2/4/4, two blocks a stage, as published
    for parameter in vae.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    state = {foreign_vae(name): value for name, value in vae.state_dict().items()}
    assert len(state) == 194  # FACTS of the published file
    torch.save(state, tmp_path / "Wan2.1_VAE.pth")
    vae.save_pretrained(tmp_path / "vae")
    z, pixels = torch.randn(1, 16, 2, 2, 2), torch.rand(1, 3, 5, 16, 16)
    for path in (tmp_path / "Wan2.1_VAE.pth", tmp_path / "vae", tmp_path):
        again = weights.load_vae(path)
        with torch.no_grad():
            assert torch.equal(again.decode(z).sample, vae.decode(z).sample)
            assert torch.equal(again.encode(pixels).latent_dist.mean, vae.encode(pixels).latent_dist.mean)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_tiny_decoder_file(tmp_path, suffix):
    torch.manual_seed(0)
    decoder = TinyDecoder(TinyDecoderConfig(widths=(12, 8, 6, 6))).eval()
    state = decoder.state_dict()
    wide = torch.randn(24, 12, 1, 1)  # a growth of 2 where 1 is wanted: the last rows count
    state = state | {"decoder.7.conv.weight": wide, "encoder.0.weight": torch.randn(4, 3, 3, 3)}
    path = tmp_path / f"taew2_1{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    again = weights.load_tiny_decoder(path)
    decoder.decoder[7].conv.weight.data = wide[12:].clone()
    x = torch.randn(1, 3, 16, 2, 2)
    assert torch.equal(TinyDecoderCodec(again).decode(x), TinyDecoderCodec(decoder).decode(x))
