"""A Wan transformer of a few thousand parameters, and inputs for it: shared by the tests of the causal student."""

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers import transformer_wan
from torch.utils._python_dispatch import TorchDispatchMode

from configs.geometry import Geometry
from model.cache import StreamCache
from model.causal_wan import CausalWanModel

NETWORK = dict(
    num_attention_heads=2, attention_head_dim=24, text_dim=20, freq_dim=32, ffn_dim=64, num_layers=3, in_channels=16
)
CLOSE = dict(atol=1e-5, rtol=0)


def build(**changes) -> tuple[CausalWanModel, WanTransformer3DModel]:
    """Student and diffusers' own, with the same random weights."""
    torch.manual_seed(0)
    theirs = WanTransformer3DModel(**{**NETWORK, **changes}).eval()
    ours = CausalWanModel.from_config(theirs.config).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def sizes(window: int, sink: int, chunk_frames: int = 2, height: int = 32, width: int = 48) -> Geometry:
    """Window and sink in chunks."""
    return Geometry(
        height=height,
        width=width,
        chunk_frames=chunk_frames,
        window_frames=window * chunk_frames,
        sink_frames=sink * chunk_frames,
    )


def inputs(geo: Geometry, frames: int, batch: int = 2, seed: int = 1):
    """Latents, a timestep for each frame (one a chunk), raw text."""
    g = torch.Generator().manual_seed(seed)
    latents = torch.randn(geo.latent_shape(batch, frames), generator=g)
    chunks = 1000 * torch.rand(batch, geo.num_chunks(frames), generator=g)
    text = torch.randn(batch, 5, NETWORK["text_dim"], generator=g)
    return latents, chunks.repeat_interleave(geo.chunk_frames, 1), text


def stream_cache(
    model: CausalWanModel, geo: Geometry, batch: int = 2, device: str = "cpu", dtype: torch.dtype | None = None
) -> StreamCache:
    c = model.config
    shape = (c.num_layers, batch, c.num_attention_heads, c.attention_head_dim)
    return StreamCache(*shape, geo, device=device, dtype=dtype or model.dtype)


def masked_v(model, inputs, geo: Geometry, mask: torch.Tensor | None, monkeypatch) -> torch.Tensor:
    """v of diffusers' own network for (latents, t [B, F], text), with `mask` [L, L] in self-attention.

    Each token gets the timestep of its frame, as diffusers has it for Wan 2.2.
    """
    x, t, text = inputs
    attend = transformer_wan.dispatch_attention_fn

    def masked(q, k, v, **kwargs):
        if k.shape[1] == len(mask):  # self-attention
            kwargs["attn_mask"] = mask[None, None]
        return attend(q, k, v, **kwargs)

    with monkeypatch.context() as patch:
        if mask is not None:
            patch.setattr(transformer_wan, "dispatch_attention_fn", masked)
        dtype = model.patch_embedding.weight.dtype
        tokens = t.repeat_interleave(geo.tokens_per_frame, 1)
        return model(x.transpose(1, 2).to(dtype), tokens, text.to(dtype), return_dict=False)[0].transpose(1, 2)


def by_chunk(model, cache, geo, latents, t, text) -> torch.Tensor:
    """v of a clip, chunk by chunk through a cache."""
    out = []
    for k in range(geo.num_chunks(latents.shape[1])):
        s = geo.chunk(k)
        out.append(model(latents[:, s], t[:, s], text, view=cache.begin(k), start_frame=s.start))
    return torch.cat(out, 1)


class KernelRuns(TorchDispatchMode):
    """Counts attention's kernel, forwards only, and products of linear layers, while they run on a CPU.

    The text is what has fewer keys than there are queries.
    """

    def __init__(self):
        super().__init__()
        self.past = self.text = self.linear = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # or torch would compile nothing while it counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func == torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            text = args[1].shape[2] < args[0].shape[2]
            self.past, self.text = self.past + (not text), self.text + text
        self.linear += func == torch.ops.aten.addmm.default
        return func(*args, **(kwargs or {}))
