"""The student against diffusers' own Wan transformer at the depth of the 1.3B network, in float32 and in bfloat16.

Chunk-causal attention is given to diffusers as a mask, made here token by token from the rule in words: a token sees
the tokens of its own chunk, of the chunks before it in the window, and of the sink.
"""

import functools

import pytest
import torch
from diffusers import WanTransformer3DModel
from small_wan import by_chunk, masked_v, sizes, stream_cache

from model.causal_wan import CausalWanModel, chunk_causal_mask
from model.weights.load import load_student

SIZES = {"num_attention_heads": 2, "attention_head_dim": 16, "text_dim": 20, "freq_dim": 32, "ffn_dim": 64}
FRAMES, WINDOW, SINK = 12, 3, 1  # latent frames; chunks of 2 frames
GEO = sizes(WINDOW, SINK)
BF16 = torch.bfloat16


@functools.cache
def pair(layers: int) -> tuple[CausalWanModel, WanTransformer3DModel]:
    """Ours and diffusers' own, with the same weights, random in every parameter."""
    torch.manual_seed(layers)
    theirs = WanTransformer3DModel(**SIZES, num_layers=layers).eval().requires_grad_(False)
    for parameter in theirs.parameters():  # norms and biases start as ones and zeros
        parameter += 0.1 * parameter.std().nan_to_num(1).clamp_min(0.1) * torch.randn_like(parameter)
    ours = CausalWanModel.from_config(theirs.config).eval().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@functools.cache
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, a timestep for each frame (one a chunk), text."""
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(GEO.latent_shape(2, FRAMES), generator=g)
    t = (1000 * torch.rand(2, FRAMES // 2, generator=g)).repeat_interleave(2, 1)
    return latents, t, torch.randn(2, 5, SIZES["text_dim"], generator=g)


def rule() -> torch.Tensor:
    """Who may attend to whom, [tokens, tokens]."""
    chunk = torch.arange(FRAMES).repeat_interleave(GEO.tokens_per_frame) // 2
    query, key = chunk[:, None], chunk[None]
    return (key <= query) & ((key < SINK) | (key > query - (WINDOW - SINK)))


def our_v(model: CausalWanModel, way: str) -> torch.Tensor:
    x, t, text = inputs()
    if way == "stream":
        return by_chunk(model, stream_cache(model, GEO), GEO, x, t, text)
    return model(x, t, text, mask=chunk_causal_mask(GEO, FRAMES, "cpu") if way == "masked" else None)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a.double() - b.double()).norm() / b.double().norm())


WAYS = ("bidirectional", "masked", "stream")


@pytest.mark.parametrize("way", WAYS)
def test_float32_agrees_with_diffusers(monkeypatch, way):
    ours, theirs = pair(30)
    expected = masked_v(theirs, inputs(), GEO, rule() if way != "bidirectional" else None, monkeypatch)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(our_v(ours, way), expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Both as their loaders make them in bfloat16, by number of layers."""

    @functools.cache
    def load(layers: int) -> tuple[CausalWanModel, WanTransformer3DModel]:
        folder = tmp_path_factory.mktemp("wan")
        pair(layers)[1].save_pretrained(folder)
        theirs = WanTransformer3DModel.from_pretrained(folder, torch_dtype=BF16).eval().requires_grad_(False)
        return load_student(folder, dtype=BF16).requires_grad_(False), theirs

    return load


ROUNDING = (2**-14 / 12 / 2.164) ** 0.5  # RMS error of a number rounded to 8 bits, to its RMS: 0.0015
IN_BLOCK, OUTSIDE = 3, 20  # roundings of the residual stream in a block; those of its inputs, of the ends, of v


def bound(layers: int) -> float:
    """Relative error that bfloat16 may have after so many layers.

    The residual stream is written back in bfloat16 three times a block, after self-attention, cross-attention and
    feed-forward. Those errors are independent of one another, so that their squares add up and the sum grows with the
    root of the depth. Norms, modulation and rotation, where errors would not be independent, are in float32.
    """
    return ROUNDING * (OUTSIDE + IN_BLOCK * layers) ** 0.5


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16_is_no_further_from_float32_than_diffusers_is(monkeypatch, halves, way):
    """No further from float32 than the bound, nor than diffusers in bfloat16 is; the error grows as the bound does."""
    causal, errors = way != "bidirectional", {}
    for layers in (2, 8, 30):
        exact = masked_v(pair(layers)[1], inputs(), GEO, rule() if causal else None, monkeypatch)
        ours, theirs = halves(layers)
        kept = {name: value.dtype for name, value in theirs.named_parameters()}
        assert {name: value.dtype for name, value in ours.named_parameters()} == kept
        errors[layers] = relative(our_v(ours, way), exact)
        theirs = masked_v(theirs, inputs(), GEO, rule() if causal else None, monkeypatch)
        assert errors[layers] < 1.1 * relative(theirs, exact)
        assert errors[layers] < bound(layers), layers
    assert 1.5 < errors[30] / errors[2] < 1.5 * bound(30) / bound(2)


def test_the_bound_would_see_a_mistake(monkeypatch, halves):
    """A timestep rounded to bfloat16, the commonest one, is beyond it."""
    ours, _ = halves(30)
    exact, (x, t, text) = masked_v(pair(30)[1], inputs(), GEO, None, monkeypatch), inputs()
    assert relative(ours(x, t.bfloat16().float(), text), exact) > bound(30)
