"""Every file format, as small random files in exactly the published layouts.

The files are written by tables of their own, from our names to the foreign ones; model/weight_names.py goes the other
way. Networks are compared by their outputs.
"""

import json
import re
import struct

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

from configs.errors import UserError
from configs.schema import ModelConfig
from model import weights
from model.causal_wan import CausalWanModel
from model.text import word_tokenizer
from model.tiny_decoder import TinyDecoder, TinyDecoderCodec, TinyDecoderConfig

SIZES = {"num_layers": 2, "ffn_dim": 40, "text_dim": 12, "freq_dim": 16, "rope_max_seq_len": 64}
WAN_CONFIG = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": "t2v", "dim": 128, "eps": 1e-06}
WAN_CONFIG |= {
    "ffn_dim": 40,
    "freq_dim": 16,
    "in_dim": 16,
    "num_heads": 1,
    "num_layers": 2,
    "out_dim": 16,
    "text_len": 512,
}

# Our names as patterns, the foreign names that they come from.
TO_WAN = {
    r"condition_embedder\.time_embedder\.linear_1\.(.*)": r"time_embedding.0.\1",
    r"condition_embedder\.time_embedder\.linear_2\.(.*)": r"time_embedding.2.\1",
    r"condition_embedder\.time_proj\.(.*)": r"time_projection.1.\1",
    r"condition_embedder\.text_embedder\.linear_1\.(.*)": r"text_embedding.0.\1",
    r"condition_embedder\.text_embedder\.linear_2\.(.*)": r"text_embedding.2.\1",
    r"patch_embedding\.(.*)": r"patch_embedding.\1",
    r"proj_out\.(.*)": r"head.head.\1",
    r"scale_shift_table": r"head.modulation",
    r"blocks\.(\d+)\.scale_shift_table": r"blocks.\1.modulation",
    r"blocks\.(\d+)\.attn1\.to_([qkv])\.(.*)": r"blocks.\1.self_attn.\2.\3",
    r"blocks\.(\d+)\.attn1\.to_out\.0\.(.*)": r"blocks.\1.self_attn.o.\2",
    r"blocks\.(\d+)\.attn1\.norm_(.)\.weight": r"blocks.\1.self_attn.norm_\2.weight",
    r"blocks\.(\d+)\.attn2\.to_([qkv])\.(.*)": r"blocks.\1.cross_attn.\2.\3",
    r"blocks\.(\d+)\.attn2\.to_out\.0\.(.*)": r"blocks.\1.cross_attn.o.\2",
    r"blocks\.(\d+)\.attn2\.norm_(.)\.weight": r"blocks.\1.cross_attn.norm_\2.weight",
    r"blocks\.(\d+)\.norm2\.(.*)": r"blocks.\1.norm3.\2",
    r"blocks\.(\d+)\.ffn\.net\.0\.proj\.(.*)": r"blocks.\1.ffn.0.\2",
    r"blocks\.(\d+)\.ffn\.net\.2\.(.*)": r"blocks.\1.ffn.2.\2",
}
TO_T5 = {
    r"shared\.weight": "token_embedding.weight",
    r"encoder\.final_layer_norm\.weight": "norm.weight",
    r"encoder\.block\.(\d+)\.layer\.0\.layer_norm\.weight": r"blocks.\1.norm1.weight",
    r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])\.weight": r"blocks.\1.attn.\2.weight",
    r"encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.weight": (
        r"blocks.\1.pos_embedding.embedding.weight"
    ),
    r"encoder\.block\.(\d+)\.layer\.1\.layer_norm\.weight": r"blocks.\1.norm2.weight",
    r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.weight": r"blocks.\1.ffn.gate.0.weight",
    r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.weight": r"blocks.\1.ffn.fc1.weight",
    r"encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.weight": r"blocks.\1.ffn.fc2.weight",
}
VAE_INNER = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
VAE_INNER |= {"conv_shortcut": "shortcut"}


def foreign(name: str, table: dict[str, str]) -> str:
    found = [match.expand(new) for old, new in table.items() if (match := re.fullmatch(old, name))]
    assert len(found) == 1, (name, found)
    return found[0]


def foreign_vae(name: str) -> str:
    """The layout of Wan2.1_VAE.pth: 0-2 blocks, 3 up, 4-6 blocks, 7 up, ..."""
    top = {"quant_conv": "conv1", "post_quant_conv": "conv2", "conv_in": "conv1", "conv_out": "head.2"}
    top |= {"norm_out": "head.0", "mid_block.resnets.0": "middle.0", "mid_block.resnets.1": "middle.2"}
    top |= {"mid_block.attentions.0": "middle.1"}
    side, _, rest = name.partition(".")
    if side in top:
        return f"{top[side]}.{rest}"
    match = re.fullmatch(r"up_blocks\.(\d)\.(resnets|upsamplers)\.(\d)\.(.*)", rest)
    if match:
        place = int(match[1]) * 4 + (int(match[3]) if match[2] == "resnets" else 3)
        rest = f"upsamples.{place}.{match[4]}"
    rest = rest.replace("down_blocks", "downsamples")
    outer = [key for key in top if rest.startswith(f"{key}.")]
    if outer:
        rest = top[outer[0]] + rest[len(outer[0]) :]
    parts = rest.split(".")
    return ".".join(
        [side, *(VAE_INNER.get(p, p) if "middle.1" not in rest and i > 0 else p for i, p in enumerate(parts))]
    )


@pytest.fixture(scope="module")
def wan() -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(num_attention_heads=1, attention_head_dim=128, **SIZES).eval()
    for parameter in model.parameters():  # norms and biases start as ones and zeros, which hides what is swapped
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def wan_state(wan) -> dict[str, torch.Tensor]:
    return {foreign(name, TO_WAN): value.clone() for name, value in wan.state_dict().items()}


def same_output(a: torch.nn.Module, b: WanTransformer3DModel, atol: float = 0) -> None:
    x, t, text = torch.randn(1, 16, 3, 4, 6), torch.tensor([700.0]), torch.randn(1, 5, 12)
    with torch.no_grad():
        expected = b(x, t, text, return_dict=False)[0]
        if isinstance(a, CausalWanModel):
            got = a(x.transpose(1, 2), t, text).transpose(1, 2)
        else:
            got = a(x, t, text, return_dict=False)[0]
    assert expected.abs().mean() > 0.01
    torch.testing.assert_close(got, expected, rtol=0, atol=max(atol, 1e-5))


def write_wan_folder(folder, state, shards: int = 1):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(WAN_CONFIG))
    if shards == 1:
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
        return folder
    place = {
        name: f"diffusion_pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
        for i, name in enumerate(state)
    }
    for file in set(place.values()):
        save_file({n: v for n, v in state.items() if place[n] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": place}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


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
def test_diffusers_folder(tmp_path, wan, root, size):
    wan.save_pretrained(tmp_path / "transformer" if root else tmp_path, max_shard_size=size)
    same_output(weights.load_student(tmp_path), wan)


@pytest.mark.parametrize(
    "prefix",
    [
        "model.",
        "model._fsdp_wrapped_module.",
        "_orig_mod.model.",
        "model._orig_mod.",
        "model.diffusion_model.",
        "",
    ],
)
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


@pytest.mark.parametrize("layout", ["bare", "model", "state_dict", "ode", "legacy"])
def test_other_student_files(tmp_path, wan, wan_state, layout):
    state = {f"model.{name}": value for name, value in wan_state.items()}
    payload = {"bare": state, "ode": {"generator": state}, "legacy": state}.get(layout, {layout: state})
    path = tmp_path / "ode_init.pt"
    torch.save(payload, path, _use_new_zipfile_serialization=layout != "legacy")
    same_output(weights.load_student(path), wan)


def test_single_safetensors_file(tmp_path, wan, wan_state):
    save_file(wan_state, tmp_path / "student.safetensors")
    same_output(weights.load_student(tmp_path / "student.safetensors"), wan)


def test_lower_precision_is_diffusers(tmp_path, wan):
    wan.save_pretrained(tmp_path)
    ours = weights.load_score(tmp_path, dtype=torch.bfloat16)
    theirs = WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert {p.dtype for p in ours.parameters()} == {torch.float32, torch.bfloat16}


# --- our own ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def student(wan) -> CausalWanModel:
    model = CausalWanModel.from_config(dict(wan.config))
    model.load_state_dict(wan.state_dict())
    return model.eval()


def test_own_folder_round_trip(tmp_path, wan, student):
    card = {"stage": "distilled", "step": 7, "schedule": {"rows": [[1000.0]]}}
    ema = {name: value + 1 for name, value in student.state_dict().items()}
    weights.save_student(student, tmp_path / "s", card, dtype=None, ema=ema)
    again = weights.load_student(tmp_path / "s")
    assert again.card == card and not again.training
    same_output(again, wan)
    averaged = weights.load_student(tmp_path / "s", use_ema=True)
    assert torch.equal(averaged.proj_out.bias, wan.proj_out.bias + 1)
    same_output(WanTransformer3DModel.from_pretrained(tmp_path / "s"), wan)  # diffusers reads it too


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_on_disk_float32_in_memory(tmp_path, student, dtype):
    weights.save_student(student, tmp_path / "a", {}, dtype=dtype)
    weights.save_student(student, tmp_path / "b", {}, dtype=dtype)
    a, b = (tmp_path / x / "diffusion_pytorch_model.safetensors" for x in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert {value.dtype for value in load_file(a).values()} == {dtype}
    again = weights.load_student(tmp_path / "a")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    for name, value in student.state_dict().items():
        assert torch.equal(again.state_dict()[name], value.to(dtype).float())


def test_saving_replaces_a_folder_whole(tmp_path, student, monkeypatch):
    folder = tmp_path / "s"
    weights.save_student(student, folder, {"step": 1})
    (folder / "stale.txt").write_text("x")
    monkeypatch.setattr(weights, "save_file", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        weights.save_student(student, folder, {"step": 2})
    assert weights.load_student(folder).card == {"step": 1} and (folder / "stale.txt").exists()
    monkeypatch.undo()
    weights.save_student(student, folder, {"step": 2})
    assert weights.load_student(folder).card == {"step": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["s"] and not (folder / "stale.txt").exists()


def test_values_beyond_half_precision_are_not_lost(tmp_path, student):
    student.proj_out.bias.data[0] = 1e6
    with pytest.raises(ValueError, match="bfloat16"):
        weights.save_student(student, tmp_path / "s", {})
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
def test_new_network(file, causal, cls):
    network = weights.new_network(f"configs/networks/{file}.json", causal=causal)
    assert type(network) is cls and not any(p.is_meta for p in network.parameters())


# --- text encoder, VAE, tiny decoder ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t5() -> UMT5EncoderModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    model = UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu")).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    return model


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


def test_vae_formats(tmp_path):
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


# --- what is wrong is said in one sentence ----------------------------------------------------------------------------


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


def test_missing_pieces(tmp_path, wan_state):
    with pytest.raises(UserError, match=r"download\.py taew2\.1`"):
        weights.load_tiny_decoder(tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"download\.py vae`"):
        weights.load_vae(tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"tokenizer\.json.*download\.py umt5`"):
        weights.load_tokenizer(tmp_path)
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
@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_cut_short(tmp_path, wan_state, suffix, keep):
    path = tmp_path / f"student{suffix}"
    torch.save(wan_state, path) if suffix == ".pt" else save_file(wan_state, path)
    path.write_bytes(path.read_bytes()[:keep])
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


class Payload:
    """Stands for anything that a pickle could run."""


def test_pickles_with_code_are_refused(tmp_path):
    torch.save({"generator": {}, "config": Payload()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="can run code"):
        weights.load_student(tmp_path / "x.pt")


@pytest.mark.parametrize("layout", ["bare", "named"])
def test_lora_is_recognised(tmp_path, layout):
    lora = {"base_model.model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(8, 128)}
    torch.save(lora if layout == "bare" else {"generator_lora": lora, "critic_lora": lora}, tmp_path / "lora.pt")
    with pytest.raises(UserError, match="LoRA of rank 8 and width 128"):
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


def test_check_weights_reads_no_tensor(tmp_path, t5, student, monkeypatch):
    weights.save_student(student, tmp_path / "student", {})
    weights.save_network(t5, tmp_path / "text", tokenizer=word_tokenizer(["a"]))
    weights.save_network(AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1), tmp_path / "vae")
    paths = {"student": "student", "vae": "vae", "text_encoder": "text", "tokenizer": "text"}
    config = ModelConfig(**{role: str(tmp_path / name) for role, name in paths.items()})
    monkeypatch.setattr("model.weight_files.safe_open", None)
    checks = weights.check_weights(config)
    assert [c.role for c in checks] == list(paths)
    assert checks[0].kind == "our own" and checks[0].size > 100_000
    vae = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    vae.write_bytes(vae.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model\.vae: .* cut short"):
        weights.check_weights(config)
