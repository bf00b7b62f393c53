"""Two layers of the student at the full width of 14B: against diffusers' own, and chunk by chunk against one pass."""

import functools

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from small_wan import by_chunk, masked_v, sizes, stream_cache
from test_agreement import relative

from model.causal_wan import CausalWanModel, chunk_causal_mask
from model.weights.random import transformer_sizes

GEO = sizes(window=2, sink=1, chunk_frames=1, height=16, width=32)  # 2 tokens a frame
FRAMES = 3


@functools.cache
def drawn() -> torch.Tensor:
    """What all weights are views of, 0.2 billion numbers in place of 0.9: some that are drawn, many times."""
    return (0.01 * torch.randn(4_000_037, generator=torch.Generator().manual_seed(0))).repeat(40)


def pair(dtype: torch.dtype) -> tuple[CausalWanModel, WanTransformer3DModel]:
    """Ours and diffusers' own, over the same numbers; in float32 what diffusers keeps in it."""
    config = transformer_sizes("14B/2")
    numbers, state = {kind: drawn().to(kind) for kind in {dtype, torch.float32}}, {}
    with torch.device("meta"):
        models = [kind.from_config(config).eval() for kind in (CausalWanModel, WanTransformer3DModel)]
    for i, (name, value) in enumerate(models[1].state_dict().items()):
        wide = any(part in name.split(".") for part in WanTransformer3DModel._keep_in_fp32_modules)
        at = 7919 * i  # each begins elsewhere
        flat = numbers[torch.float32 if wide else dtype][at : at + value.numel()].view(value.shape)
        state[name] = 1 + 10 * flat if "norm" in name and name.endswith("weight") else flat
    for model in models:
        model.load_state_dict(state, assign=True)
        model.requires_grad_(False)
    models[1].rope = WanRotaryPosEmbed(config["attention_head_dim"], (1, 2, 2), 1024)  # whose tables are not stored
    return models[0], models[1]


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(GEO.latent_shape(1, FRAMES), generator=g)
    return latents, 1000 * torch.rand(1, FRAMES, generator=g), torch.randn(1, 4, 4096, generator=g)


def test_two_layers_of_14b(monkeypatch):
    """Float32: 1e-5 of numbers of order one. Bfloat16: within 1% of float32, weights rounded too (0.84%;
    diffusers 0.80%)."""
    x, t, text = inputs()
    mask = chunk_causal_mask(GEO, FRAMES, "cpu")
    ours, theirs = pair(torch.float32)
    assert (ours.config.num_attention_heads, ours.config.ffn_dim, len(ours.blocks)) == (40, 13824, 2)
    exact = masked_v(theirs, inputs(), GEO, mask, monkeypatch)
    assert 0.3 < exact.std() < 3
    whole, chunks = ours(x, t, text, mask=mask), by_chunk(ours, stream_cache(ours, GEO, 1), GEO, x, t, text)
    for found in (whole, chunks):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)
    ours, theirs = pair(torch.bfloat16)
    assert ours.blocks[0].ffn.net[2].weight.dtype is torch.bfloat16 and ours.scale_shift_table.dtype is torch.float32
    error = relative(by_chunk(ours, stream_cache(ours, GEO, 1, dtype=torch.bfloat16), GEO, x, t, text), exact)
    theirs = relative(masked_v(theirs, inputs(), GEO, mask, monkeypatch), exact)
    assert error < 0.01 and error < 1.1 * theirs
