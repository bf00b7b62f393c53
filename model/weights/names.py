"""What other projects call their tensors. The only place that knows.

Each `*_names` function maps one foreign name to ours (those of diffusers and transformers), or None for a tensor that
we have no use for; a name that it does not know comes back unchanged, and is reported as unexpected later. Each
`*_config` function reads a network's sizes off the shapes. No tensor is transposed or reshaped.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Shapes = Mapping[str, tuple[int, ...]]
HEAD_DIM = 128  # of every published Wan; a file of tensors alone does not say it

# Segments that FSDP, activation checkpointing and torch.compile put into names.
WRAPPERS = re.compile(r"(?<![^.])(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|module)\.")
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")

# Parts of a training checkpoint that hold a whole network, best first.
NETWORK_PARTS = ("state_dict", "model", "module")
STUDENT_PARTS = ("generator", "model", "state_dict", "module")
STUDENT_EMA_PARTS = ("generator_ema", "ema", "model_ema", "ema_model", "module_ema")
SCORE_PARTS = ("critic", "model", "state_dict", "module", "generator")

WAN_RENAMES = (
    ("time_embedding.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedding.2.", "condition_embedder.time_embedder.linear_2."),
    ("time_projection.1.", "condition_embedder.time_proj."),
    ("text_embedding.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedding.2.", "condition_embedder.text_embedder.linear_2."),
    ("head.modulation", "scale_shift_table"),
    ("head.head.", "proj_out."),
)
WAN_BLOCK_RENAMES = (
    (".self_attn.", ".attn1."),
    (".cross_attn.", ".attn2."),
    (".norm3.", ".norm2."),  # the two projects swap these names; the other of the two has no parameters
    (".ffn.0.", ".ffn.net.0.proj."),
    (".ffn.2.", ".ffn.net.2."),
    (".modulation", ".scale_shift_table"),
)
T5_RENAMES = (
    ("norm1.", "layer.0.layer_norm."),
    ("attn.", "layer.0.SelfAttention."),
    ("pos_embedding.embedding.", "layer.0.SelfAttention.relative_attention_bias."),
    ("norm2.", "layer.1.layer_norm."),
    ("ffn.gate.0.", "layer.1.DenseReluDense.wi_0."),
    ("ffn.fc1.", "layer.1.DenseReluDense.wi_1."),
    ("ffn.fc2.", "layer.1.DenseReluDense.wo."),
)
VAE_RENAMES = (
    (".residual.0.", ".norm1."),
    (".residual.2.", ".conv1."),
    (".residual.3.", ".norm2."),
    (".residual.6.", ".conv2."),
    (".shortcut.", ".conv_shortcut."),
    (".middle.0.", ".mid_block.resnets.0."),
    (".middle.1.", ".mid_block.attentions.0."),
    (".middle.2.", ".mid_block.resnets.1."),
    (".head.0.", ".norm_out."),
    (".head.2.", ".conv_out."),
)


def unwrapped(name: str) -> str:
    """`name` without what wrappers and checkpoints put before or into it."""
    name = WRAPPERS.sub("", name)
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def _count(shapes: Shapes, pattern: str) -> int:
    """Number of distinct values that the group of `pattern` takes among the names."""
    matches = (re.match(pattern, name) for name in shapes)
    return len({match.group(1) for match in matches if match})


# --- transformer ------------------------------------------------------------------------------------------------------


def is_wan(shapes: Shapes) -> bool:
    """Original Wan names, unwrapped."""
    return "patch_embedding.weight" in shapes and "head.head.weight" in shapes


def is_diffusers_wan(shapes: Shapes) -> bool:
    return "patch_embedding.weight" in shapes and "proj_out.weight" in shapes


def wan_name(name: str) -> str:
    """One original Wan name -> diffusers."""
    if not name.startswith("blocks."):
        for theirs, ours in WAN_RENAMES:
            if name.startswith(theirs):
                return ours + name[len(theirs) :]
        return name
    for theirs, ours in WAN_BLOCK_RENAMES:
        name = name.replace(theirs, ours, 1)
    name = re.sub(r"(\.attn[12])\.([qkv])\.", r"\1.to_\2.", name)
    return re.sub(r"(\.attn[12])\.o\.", r"\1.to_out.0.", name)


def wan_config(shapes: Shapes, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of a network with original names; `stated` is its config.json, or empty."""
    dim, channels, *patch = shapes["patch_embedding.weight"]
    outputs = shapes["head.head.weight"][0]
    return {
        "patch_size": patch,
        "num_attention_heads": stated.get("num_heads", dim // HEAD_DIM),
        "attention_head_dim": dim // stated["num_heads"] if "num_heads" in stated else HEAD_DIM,
        "in_channels": channels,
        "out_channels": outputs // (patch[0] * patch[1] * patch[2]),
        "text_dim": shapes["text_embedding.0.weight"][1],
        "freq_dim": shapes["time_embedding.0.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.0.weight"][0],
        "num_layers": _count(shapes, r"blocks\.(\d+)\."),
        "cross_attn_norm": "blocks.0.norm3.weight" in shapes,
        "eps": stated.get("eps", 1e-6),
    }


def stated_sizes(stated: Mapping[str, Any]) -> dict[str, int]:
    """Sizes that an original config.json states, by our names, to be held against the shapes."""
    table = {"ffn_dim": "ffn_dim", "num_layers": "num_layers", "freq_dim": "freq_dim", "in_dim": "in_channels"}
    return {ours: stated[theirs] for theirs, ours in table.items() if theirs in stated}


def wan_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of a text-to-video network of these sizes, as diffusers' `WanTransformer3DModel` has them."""
    dim, wide = config["num_attention_heads"] * config["attention_head_dim"], config["ffn_dim"]
    patch = tuple(config["patch_size"])
    out: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (dim, config["in_channels"], *patch),
        "patch_embedding.bias": (dim,),
        "scale_shift_table": (1, 2, dim),
    }

    def linear(name: str, rows: int, columns: int) -> None:
        out[f"{name}.weight"], out[f"{name}.bias"] = (rows, columns), (rows,)

    linear("proj_out", config["out_channels"] * math.prod(patch), dim)
    for embedder, columns in (("time", config["freq_dim"]), ("text", config["text_dim"])):
        linear(f"condition_embedder.{embedder}_embedder.linear_1", dim, columns)
        linear(f"condition_embedder.{embedder}_embedder.linear_2", dim, dim)
    linear("condition_embedder.time_proj", 6 * dim, dim)
    for i in range(config["num_layers"]):
        block = f"blocks.{i}"
        out[f"{block}.scale_shift_table"] = (1, 6, dim)
        for attention in ("attn1", "attn2"):
            for projection in ("to_q", "to_k", "to_v", "to_out.0"):
                linear(f"{block}.{attention}.{projection}", dim, dim)
            out |= {f"{block}.{attention}.norm_{x}.weight": (dim,) for x in "qk"}
        if config["cross_attn_norm"]:
            out |= {f"{block}.norm2.{x}": (dim,) for x in ("weight", "bias")}
        linear(f"{block}.ffn.net.0.proj", wide, dim)
        linear(f"{block}.ffn.net.2", dim, wide)
    return out


def original_name(name: str) -> str:
    """One diffusers name -> original Wan: the inverse of `wan_name`."""
    if not name.startswith("blocks."):
        for theirs, ours in WAN_RENAMES:
            if name.startswith(ours):
                return theirs + name[len(ours) :]
        return name
    name = re.sub(r"(\.attn[12])\.to_out\.0\.", r"\1.o.", name)
    name = re.sub(r"(\.attn[12])\.to_([qkv])\.", r"\1.\2.", name)
    for theirs, ours in WAN_BLOCK_RENAMES:
        name = name.replace(ours, theirs, 1)
    return name


def original_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of a diffusers transformer, as the config.json of an original Wan folder states them."""
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": config["num_attention_heads"] * config["attention_head_dim"],
        "eps": config["eps"],
        "ffn_dim": config["ffn_dim"],
        "freq_dim": config["freq_dim"],
        "in_dim": config["in_channels"],
        "model_type": "t2v",
        "num_heads": config["num_attention_heads"],
        "num_layers": config["num_layers"],
        "out_dim": config["out_channels"],
        "text_len": 512,
    }


# --- LoRA -------------------------------------------------------------------------------------------------------------

LORA_PARTS = ("generator_lora", "state_dict")
LORA_VALUE = re.compile(r"(.+)\.lora[_.](A|B|down|up)(?:\.(?!(?:weight|bias)$)[^.]+)?\.(weight|bias)")
LORA_PREFIX = "base_model.model."  # of peft
LORA_PREFIXES = (LORA_PREFIX, *PREFIXES, "transformer.", "pipe.dit.", "dit.")
# Names of one word, as kohya and those after it write them, and the segments that have underscores of their own.
FLAT = re.compile(r"(?:lora_unet|lora_transformer|lycoris)[_.]+(.+)")
SEGMENT = re.compile(
    r"(?:self|cross)_attn|(?:patch|text|time)_embedding|time_projection|(?:add_)?[kv]_(?:img|proj)|img_emb|"
    r"norm_[qk](?:_img)?|condition_embedder|(?:time|text)_embedder|time_proj|linear_[12]|to_(?:[qkv]|out)|proj_out|"
    r"scale_shift_table|[^._]+"
)
TABLES = ("modulation", "scale_shift_table")  # parameters that belong to no layer
# Kinds of adapter that are no sum of W and B A, by what only their tensors are called.
OTHER_ADAPTERS = {"hada_w": "LoHa", "lokr_w": "LoKr", "lora_mid": "LoCon", "dora_scale": "DoRA"}
OTHER_ADAPTERS |= {"lora_magnitude": "DoRA"}


class LoraTensor(NamedTuple):
    """What a tensor of a LoRA is: a pair's half or its alpha, or what is added as it is to a parameter."""

    name: str  # ours, of the linear layer (A, B, alpha) or of the parameter (bias, diff)
    part: str  # A, B, alpha, bias (of B: scaled as B A is), diff
    trained: str = ""  # of A: what the layer was called in the network that was trained


def lora_tensor(name: str) -> LoraTensor | None:
    """What one tensor of a LoRA is, or None where it belongs to none.

    Knows peft's names, with or without the adapter's name in them, those of diffusers, down/up pairs with `alpha` under
    dotted names and kohya's flat ones, and the differences (`diff`, `diff_b`, `diff_m`) of extracted adapters.
    """
    if match := LORA_VALUE.fullmatch(name):
        layer, half, value = match.groups()
        half = "A" if half in ("A", "down") else "B"
        if value == "weight":
            return LoraTensor(_lora_layer(layer), half, layer.removeprefix(LORA_PREFIX))
        return LoraTensor(f"{_lora_layer(layer)}.bias", "bias") if half == "B" else None
    layer, _, part = name.rpartition(".")
    if not layer or part not in ("alpha", "diff", "diff_b", "diff_m"):
        return None
    if part == "alpha":
        return LoraTensor(_lora_layer(layer), part)
    if part == "diff_m":
        return LoraTensor(wan_name(f"{_lora_bare(layer)}.modulation"), "diff")
    if part == "diff_b":
        return LoraTensor(f"{_lora_layer(layer)}.bias", "diff")
    bare = _lora_bare(layer)
    return LoraTensor(wan_name(bare if bare.endswith(TABLES) else f"{bare}.weight"), "diff")


def _lora_bare(layer: str) -> str:
    """A layer's name without what trainers put before it, with dots between its segments."""
    if match := FLAT.fullmatch(layer):
        return ".".join(SEGMENT.findall(match.group(1)))
    layer = WRAPPERS.sub("", layer)
    while prefix := next((p for p in LORA_PREFIXES if layer.startswith(p)), ""):
        layer = layer[len(prefix) :]
    return layer


def _lora_layer(layer: str) -> str:
    """A layer's name in the file -> ours."""
    return wan_name(f"{_lora_bare(layer)}.weight").removesuffix(".weight")


def original_lora_name(layer: str, part: str) -> str:
    """Our name of a linear layer, A or B -> the name in LongLive's `lora.pt`."""
    return f"{LORA_PREFIX}{original_name(f'{layer}.weight').removesuffix('.weight')}.lora_{part}.weight"


def lora_difference_name(parameter: str) -> str:
    """A parameter's name -> the name of its difference in an adapter's file."""
    layer, _, key = parameter.rpartition(".")
    inner = {"weight": f"{layer}.diff", "bias": f"{layer}.diff_b"}.get(key, f"{parameter}.diff")
    return f"{LORA_PREFIX}{inner}"


# --- text encoder -----------------------------------------------------------------------------------------------------


def is_wan_t5(shapes: Shapes) -> bool:
    return "token_embedding.weight" in shapes and "blocks.0.ffn.gate.0.weight" in shapes


def t5_name(name: str) -> str:
    """One name of Wan's T5 encoder -> transformers' `UMT5EncoderModel`."""
    if name == "token_embedding.weight":
        return "shared.weight"
    if name == "norm.weight":
        return "encoder.final_layer_norm.weight"
    match = re.match(r"blocks\.(\d+)\.(.*)", name)
    if not match:
        return name
    inner = match.group(2)
    for theirs, ours in T5_RENAMES:
        if inner.startswith(theirs):
            return f"encoder.block.{match.group(1)}.{ours}{inner[len(theirs) :]}"
    return name


def is_hf_t5(shapes: Shapes) -> bool:
    return "encoder.block.0.layer.0.SelfAttention.q.weight" in shapes


def hf_t5_name(name: str, tied: bool = True) -> str | None:
    """One name of transformers' encoder, or of ComfyUI's file, which holds a tokenizer, too.

    The token embedding is stored once, though transformers lists it twice; untied: under the other of its names.
    """
    if name == "encoder.embed_tokens.weight":
        return None if tied else "shared.weight"
    return None if name == "spiece_model" else name


def t5_config(shapes: Shapes) -> dict[str, Any]:
    """Sizes of a T5 encoder under transformers' names, as `UMT5Config` takes them."""
    attention, wide = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense.wi_1.weight"
    vocabulary, dim = shapes["shared.weight"]
    buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
    return {
        "vocab_size": vocabulary,
        "d_model": dim,
        "d_kv": shapes[f"{attention}.q.weight"][0] // heads,
        "d_ff": shapes[wide][0],
        "num_layers": _count(shapes, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
    }


def t5_shapes(config: Mapping[str, Any]) -> Shapes:
    """Names and shapes of the encoder of these sizes, as transformers' `UMT5EncoderModel` has them."""
    dim, wide, heads = config["d_model"], config["d_ff"], config["num_heads"]
    inner = heads * config["d_kv"]
    out = {"shared.weight": (config["vocab_size"], dim), "encoder.final_layer_norm.weight": (dim,)}
    for i in range(config["num_layers"]):
        attention, forward = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        out |= {f"{attention}.SelfAttention.{x}.weight": (inner, dim) for x in "qkv"}
        out[f"{attention}.SelfAttention.o.weight"] = (dim, inner)
        buckets = config.get("relative_attention_num_buckets", 32)
        out[f"{attention}.SelfAttention.relative_attention_bias.weight"] = (buckets, heads)
        out |= {f"{forward}.DenseReluDense.{x}.weight": (wide, dim) for x in ("wi_0", "wi_1")}
        out[f"{forward}.DenseReluDense.wo.weight"] = (dim, wide)
        out |= {f"{layer}.layer_norm.weight": (dim,) for layer in (attention, forward)}
    return out


# --- VAE --------------------------------------------------------------------------------------------------------------


def is_wan_vae(shapes: Shapes) -> bool:
    return "decoder.upsamples.0.residual.0.gamma" in shapes and "conv2.weight" in shapes


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """Sizes of a VAE in the layout of `Wan2.1_VAE.pth`: four stages, temporal strides (1, 2, 2)."""
    blocks = (_count(shapes, r"decoder\.upsamples\.(\d+)\.") - 7) // 4  # 4 stages of n + 1 blocks, and 3 upsamplers
    base = shapes["encoder.conv1.weight"][0]
    firsts = [shapes.get(f"encoder.downsamples.{i * (blocks + 1)}.residual.2.weight", (base,)) for i in range(4)]
    return {
        "base_dim": base,
        "decoder_base_dim": shapes["decoder.head.0.gamma"][0],
        "z_dim": shapes["conv2.weight"][0],
        "dim_mult": [first[0] // base for first in firsts],
        "num_res_blocks": blocks,
    }


def vae_names(blocks: int) -> Callable[[str], str]:
    """Names of Wan's VAE with `blocks` residual blocks a stage -> `AutoencoderKLWan`."""
    stage = blocks + 2  # in the decoder: one block more than in the encoder, then the upsampler

    def upsample(match: re.Match) -> str:
        block, layer = divmod(int(match.group(1)), stage)
        inner = f"resnets.{layer}" if layer <= blocks else "upsamplers.0"
        return f"decoder.up_blocks.{block}.{inner}."

    def rename(name: str) -> str:
        if name.startswith(("conv1.", "conv2.")):
            return name.replace("conv1.", "quant_conv.").replace("conv2.", "post_quant_conv.")
        name = re.sub(r"^(encoder|decoder)\.conv1\.", r"\1.conv_in.", name)
        name = re.sub(r"^encoder\.downsamples\.", "encoder.down_blocks.", name)
        name = re.sub(r"^decoder\.upsamples\.(\d+)\.", upsample, name)
        for theirs, ours in VAE_RENAMES:
            name = name.replace(theirs, ours, 1)
        return name

    return rename


# --- tiny decoder -----------------------------------------------------------------------------------------------------


def is_taehv(shapes: Shapes) -> bool:
    return "decoder.1.weight" in shapes and "decoder.3.conv.0.weight" in shapes


def taehv_name(name: str) -> str | None:
    """The file also holds an encoder."""
    return name if name.startswith("decoder.") else None


def taehv_config(shapes: Shapes) -> dict[str, Any]:
    """Sizes of a file in the layout of `taew2_1`, as `TinyDecoderConfig` takes them."""
    return {
        "latent_channels": shapes["decoder.1.weight"][1],
        "widths": tuple(shapes.get(f"decoder.{i}.weight", (0,))[0] for i in (1, 8, 14, 20)),
        "bias": "decoder.8.bias" in shapes,
    }


# --- guessing ---------------------------------------------------------------------------------------------------------


def guess(shapes: Shapes) -> str:
    """What a set of tensors seems to be, in words for an error message."""
    shapes = {unwrapped(name): shape for name, shape in shapes.items()}
    if not shapes:
        return "a file without tensors"
    other = next((kind for part, kind in OTHER_ADAPTERS.items() if any(part in name for name in shapes)), None)
    if other:
        return f"an adapter of another kind ({other}), which has to be merged into weights where it was made"
    adapters = [s for n, s in shapes.items() if (tensor := lora_tensor(n)) and tensor.part == "A"]
    if adapters:
        rank, width = (*adapters[0], "?", "?")[:2]
        return f"a LoRA of rank {rank} and width {width}, which goes on top of a student: model.lora=[...]"
    if any(n.startswith("img_emb.") or ".k_img." in n or ".add_k_proj." in n for n in shapes):
        return "an image-to-video Wan transformer"
    if is_wan(shapes) or is_diffusers_wan(shapes):
        layers, dim = _count(shapes, r"blocks\.(\d+)\."), shapes["patch_embedding.weight"][0]
        return f"a Wan transformer of width {dim} with {layers} layers"
    if is_wan_t5(shapes) or is_hf_t5(shapes):
        return "a T5 text encoder"
    if is_taehv(shapes):
        return "a tiny decoder (TAEHV)"
    if any(n.startswith(("decoder.upsamples.", "decoder.up_blocks.")) for n in shapes):
        return "a video VAE"
    return f"unknown to us (its first tensor is {min(shapes)})"
