"""Every published layout, as small random files: tables from our names to the foreign ones, and networks to fill them.

model/weights/names.py goes the other way, from tables of its own.
"""

import json
import re

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

from model.causal_wan import CausalWanModel

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


def random_wan() -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = WanTransformer3DModel(num_attention_heads=1, attention_head_dim=128, **SIZES).eval()
    for parameter in model.parameters():  # norms and biases start as ones and zeros, which hides what is swapped
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def causal_twin(wan: WanTransformer3DModel) -> CausalWanModel:
    """A causal student with the same weights."""
    model = CausalWanModel.from_config(dict(wan.config))
    model.load_state_dict(wan.state_dict())
    return model.eval()


def original(wan: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Its state dict under original Wan names."""
    return {foreign(name, TO_WAN): value.clone() for name, value in wan.state_dict().items()}


def random_t5() -> UMT5EncoderModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 4}
    model = UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu")).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.2
    return model


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
