"""Student, teacher and critic as functions that predict v or x0 of a noisy sample.

Latents [B, F, C, H, W]. t in 0..1000 is a float or a tensor [B]; for the student also [B, F]. Results have the dtype of
x_t. The networks compute in the dtype of their weights, and v -> x0 in float32.
"""

from collections.abc import Callable

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from configs.geometry import Geometry
from model.cache import StreamCache, View
from model.causal_wan import CausalWanModel, TextKV
from model.flow import x0_from_v


class Student:
    """The causal few-step generator."""

    cache_dtype: torch.dtype | None = None  # of a stream's keys and values; None = the network's
    check: Callable[[], None] | None = None  # raises UserError where another rank's part of the work is lost

    def __init__(self, model: CausalWanModel):
        self.model = model

    def text_kv(self, text: Tensor) -> TextKV:
        """What steps take for a raw embedding [B, text tokens, text_dim]."""
        return self.model.text_kv(text)

    def new_cache(
        self, geometry: Geometry, batch: int, max_chunks: int | None = None, dtype: torch.dtype | None = None
    ) -> StreamCache:
        """An empty cache for `batch` streams of this network. dtype: by default as the network computes."""
        config, weight, ranks = self.model.config, self.model.patch_embedding.weight, self.model.sequence
        heads = config.num_attention_heads // (1 if ranks is None else ranks.size)
        return StreamCache(
            config.num_layers, batch, heads, config.attention_head_dim, geometry,
            device=weight.device, dtype=dtype or self.cache_dtype or weight.dtype, max_chunks=max_chunks,
        )  # fmt: skip

    def v(
        self, x_t: Tensor, t: float | Tensor, text: TextKV | Tensor, view: View | None = None, start_frame: int = 0
    ) -> Tensor:
        """v = eps - x0 of a chunk (view) or of a whole sequence, in the dtype of x_t."""
        return self.model(x_t, as_timestep(t, x_t), text, view=view, start_frame=start_frame).to(x_t.dtype)

    def x0(
        self, x_t: Tensor, t: float | Tensor, text: TextKV | Tensor, view: View | None = None, start_frame: int = 0
    ) -> Tensor:
        """x0 = x_t - sigma v."""
        t = as_timestep(t, x_t)
        return x0_from_v(x_t, self.model(x_t, t, text, view=view, start_frame=start_frame), t)


class ScoreModel:
    """A bidirectional Wan transformer over whole clips: teacher or critic. text: [B, text tokens, text_dim]."""

    def __init__(self, model: WanTransformer3DModel):
        self.model = model

    def v(self, x_t: Tensor, t: float | Tensor, text: Tensor) -> Tensor:
        """v = eps - x0, in the dtype of the weights."""
        t = as_timestep(t, x_t)
        assert t.ndim == 1, "one timestep a sample; only the student takes one a frame"
        dtype = self.model.patch_embedding.weight.dtype
        (v,) = self.model(x_t.transpose(1, 2).to(dtype), t, text.to(dtype), return_dict=False)
        return v.transpose(1, 2)

    def x0(self, x_t: Tensor, t: float | Tensor, text: Tensor) -> Tensor:
        """x0 = x_t - sigma v."""
        t = as_timestep(t, x_t)
        return x0_from_v(x_t, self.v(x_t, t, text), t)

    def guided_x0(self, x_t: Tensor, t: float | Tensor, text: Tensor, null_text: Tensor, scale: float) -> Tensor:
        """x0 of v = cond + scale (cond - uncond), in one batched forward pass.

        null_text: [B or 1, text tokens, text_dim].

        Scale 0 is no guidance; diffusers' guidance_scale w, in uncond + w (cond - uncond), is scale + 1.
        """
        t = as_timestep(t, x_t)
        both = torch.cat([text, null_text.expand_as(text)])
        v_cond, v_null = self.v(torch.cat([x_t, x_t]), torch.cat([t, t]), both).float().chunk(2)
        return x0_from_v(x_t, v_cond + scale * (v_cond - v_null), t)


def as_timestep(t: float | Tensor, x: Tensor) -> Tensor:
    """t as a float32 tensor on x's device, [B] if it was a number. Does not synchronize with the device."""
    if isinstance(t, Tensor):
        assert t.dtype not in (torch.bfloat16, torch.float16), f"timesteps in {t.dtype} are other timesteps"
        return t.to(device=x.device, dtype=torch.float32)
    return torch.full((x.shape[0],), t, device=x.device, dtype=torch.float32)
