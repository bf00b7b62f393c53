"""The causal student, as a subclass of diffusers' Wan transformer.

    latents   [B, F, C, H, W]     tokens  [B, L, D], L = F x tokens_per_frame, frame-major, then rows, then columns
    timestep  [B] or [B, F]       modulation  [B, 1 or F, 6, D], applied to tokens seen as [B, 1 or F, tokens, D]

Parameters, their names and the config are those of `WanTransformer3DModel`, so `from_pretrained`, LoRA and attention
backends work as in diffusers. Added are: a timestep for each latent frame, rotary positions that start at any frame,
self-attention that reads and writes a chunk cache (model/cache.py) or takes a mask over the whole sequence, and keys
and values of the text that are computed once per prompt.

Numerics are those of diffusers: layer norms, modulation and rotation in float32 whatever the dtype of the weights, and
the time embedding from float32 timesteps. A wrapper that casts a module's inputs must not cast `timestep`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from configs.errors import UserError
from configs.geometry import Geometry
from model.cache import KV, LayerView, View
from model.sequence import SequenceGroup

TextKV = list[KV]  # cross-attention keys and values of each layer, [B, text tokens, heads, head_dim]
RotaryEmb = tuple[Tensor, Tensor]  # cos and sin, [1, L, 1, head_dim / 2], float32


@dataclass(frozen=True)
class VisibleChunks:
    """A mask in chunks of `tokens` tokens each."""

    rows: tuple[tuple[int, ...], ...]  # of each chunk, the chunks that it attends to
    tokens: int


Mask = Tensor | BlockMask | VisibleChunks  # over self-attention; a Tensor: bool [L, L], True = may attend


class CausalWanModel(WanTransformer3DModel):
    """Wan2.1 text-to-video transformer over chunks of a stream; predicts v = eps - x0."""

    _no_split_modules = ["CausalWanBlock"]
    _repeated_blocks = ["CausalWanBlock"]
    _cp_plan = None  # the base class's plan splits tokens, which would separate frames from their modulation
    sequence: SequenceGroup | None = None  # ranks that share the tokens

    @functools.wraps(WanTransformer3DModel.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.config.image_dim or self.config.added_kv_proj_dim:
            raise UserError(
                f"image_dim={self.config.image_dim} in the student's config.json is an image-to-video network; "
                "use text-to-video weights"
            )
        assert self.config.patch_size[0] == 1, "a token must lie in one latent frame"
        for block in self.blocks:
            block.__class__ = CausalWanBlock  # the same parameters with another forward
        self.rope = FrameRotary(self.config.attention_head_dim)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: TextKV | Tensor,
        *,
        view: View | None = None,
        start_frame: int = 0,
        mask: Mask | None = None,
        frame_ids: Tensor | None = None,
    ) -> Tensor:
        """Predict v for latents [B, F, C, H, W] at timestep [B] or [B, F] in 0..1000: same shape, dtype of the weights.

        text: embedding [B, text tokens, text_dim], or the result of `text_kv`.
        view: the latents are one chunk; earlier chunks are read from the cache, and this one's keys are written to it.
        mask: without a view, the attention mask over the whole sequence; None = all to all.
        frame_ids: [F] integers on the latents' device, the rotary index of each frame; default: from start_frame on.
        """
        assert view is None or mask is None, "a chunk sees its cache; a mask is for whole sequences"
        frames, (_, ph, pw) = latents.shape[1], self.config.patch_size
        height, width = latents.shape[3] // ph, latents.shape[4] // pw
        if frame_ids is None:
            frame_ids = torch.arange(start_frame, start_frame + frames, device=latents.device)
        rotary_emb = self.rope(frame_ids, height, width)

        x = self.patch_embedding(latents.to(self.patch_embedding.weight.dtype).transpose(1, 2))
        x = rearrange(x, "b d f h w -> b (f h w) d").contiguous()
        temb, modulation = self._embed_time(timestep, x.dtype)
        if isinstance(text, Tensor):
            text = [self._embed_text(text)] * len(self.blocks)
        if self.sequence is not None:
            x, *rotary_emb = (self.sequence.split(y) for y in (x, *rotary_emb))
            temb, modulation = (self.sequence.split_frames(y, height * width) for y in (temb, modulation))

        for i, block in enumerate(self.blocks):
            layer_cache = None if view is None else view.layer(i)
            args = (x, modulation, rotary_emb, text[i], layer_cache, mask)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, new_kv = self._gradient_checkpointing_func(block, *args)
            else:
                x, new_kv = block(*args)
            if new_kv is not None:
                view.keep(i, new_kv)  # not in the block, which checkpointing may run again in the backward pass

        shift, scale = (self.scale_shift_table[:, None] + temb[:, :, None]).chunk(2, dim=2)
        x = _modulate(self.norm_out(x.float()), shift, scale).type_as(x)
        x = self.proj_out(x)
        if self.sequence is not None:
            x = self.sequence.gather(x)
        return rearrange(x, "b (f h w) (p q c) -> b f c (h p) (w q)", f=frames, h=height, w=width, p=ph, q=pw)

    def share_tokens(self, group: SequenceGroup) -> None:
        """Share the tokens out over `group` in passes from now on; a rank's cache holds its share of the heads."""
        for part in (self, *self.blocks):
            part.sequence = group

    def text_kv(self, text: Tensor) -> TextKV:
        """Cross-attention keys and values of every layer for an embedding [B, text tokens, text_dim]."""
        text = self._embed_text(text)
        return [block.text_kv(text) for block in self.blocks]

    def shift_keys(self, keys: Tensor, frames: int) -> Tensor:
        """Rotated self-attention keys [B, L, heads, head_dim] for positions that are `frames` latent frames later."""
        later = torch.full((1,), frames, device=keys.device)  # filled on the device: no synchronization
        return _rotate(keys, self.rope(later, 1, 1)).type_as(keys)

    def _embed_text(self, text: Tensor) -> Tensor:
        """[B, text tokens, text_dim] -> [B, text tokens, D]."""
        embedder = self.condition_embedder.text_embedder
        return embedder(text.to(embedder.linear_1.weight.dtype))

    def _embed_time(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Timestep [B] or [B, F] -> embedding [B, 1 or F, D] and modulation of the blocks [B, 1 or F, 6, D]."""
        assert timestep.dtype not in (torch.bfloat16, torch.float16), f"timesteps in {timestep.dtype} are others"
        embedder = self.condition_embedder
        timestep = timestep[:, None] if timestep.ndim == 1 else timestep
        with torch.autocast(timestep.device.type, enabled=False):
            wave = embedder.timesteps_proj(timestep.flatten()).unflatten(0, timestep.shape)
            temb = embedder.time_embedder(wave.to(embedder.time_embedder.linear_1.weight.dtype)).to(dtype)
            modulation = embedder.time_proj(embedder.act_fn(temb).to(embedder.time_proj.weight.dtype))
        return temb, modulation.unflatten(-1, (6, -1))


class CausalWanBlock(WanTransformerBlock):
    """Self-attention to the visible chunks, cross-attention to the text, feed-forward."""

    sequence: SequenceGroup | None = None  # as the model's

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        rotary_emb: RotaryEmb,
        text: Tensor | KV,
        layer_cache: LayerView | None = None,
        mask: Mask | None = None,
    ) -> tuple[Tensor, KV | None]:
        """x [B, L, D] -> x, and the chunk's keys and values if the cache does not store them itself (`View.keep`).

        modulation [B, 1 or F, 6, D]; text: embedded [B, text tokens, D], or its keys and values.
        """
        attn_output, new_kv = self._self_attention(*self.pre_attention(x, modulation, rotary_emb), layer_cache, mask)
        return self.post_attention(x, attn_output, modulation, text), new_kv

    def _self_attention(
        self, q: Tensor, k: Tensor, v: Tensor, layer_cache: LayerView | None, mask: Mask | None
    ) -> tuple[Tensor, KV | None]:
        if self.sequence is not None:
            q, k, v = self.sequence.to_heads(q, k, v)
        new_kv = None
        if layer_cache is not None:
            (k, v), new_kv = layer_cache.put(k, v)
        attn_output = attend(self.attn1, q, k, v, mask)
        return attn_output if self.sequence is None else self.sequence.to_tokens(attn_output), new_kv

    def pre_attention(self, x: Tensor, modulation: Tensor, rotary_emb: RotaryEmb) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, D] -> rotated queries and keys, and values, of self-attention, each [B, L, heads, head_dim]."""
        return project(self.attn1, self.attention_input(x, modulation), rotary_emb)

    def post_attention(self, x: Tensor, attn_output: Tensor, modulation: Tensor, text: Tensor | KV) -> Tensor:
        """x [B, L, D] and the result of self-attention [B, L, heads, head_dim] -> x after the feed-forward."""
        k, v = self.text_kv(text) if isinstance(text, Tensor) else text
        x, q = self.cross_attention_query(x, attn_output, modulation)
        x = self.add_cross_attention(x, attend(self.attn2, q.type_as(v), k, v, None))
        del q, k, v  # frees their memory before the feed-forward
        return self.feed_forward(x, modulation)

    def attention_input(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [B, L, D], normalized and modulated: the input of self-attention's projections."""
        shift, scale = self.adaln(modulation)[:2]
        return _modulate(self.norm1(x.float()), shift, scale).type_as(x)

    def cross_attention_query(self, x: Tensor, attn_output: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """x and the result of self-attention -> x with it added, and queries [B, L, heads, head_dim] of the text."""
        gate, attn = self.adaln(modulation)[2], self.attn2
        x = (x.float() + _gate(self.attn1.to_out[0](attn_output.flatten(2, 3)), gate)).type_as(x)
        y = self.norm2(x.float()).type_as(x)
        return x, attn.norm_q(attn.to_q(y)).unflatten(2, (attn.heads, -1))

    def add_cross_attention(self, x: Tensor, attn_output: Tensor) -> Tensor:
        """x and the result of cross-attention [B, L, heads, head_dim] -> x with it added."""
        return x + self.attn2.to_out[0](attn_output.flatten(2, 3))

    def feed_forward(self, x: Tensor, modulation: Tensor, ffn: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """x -> x with the feed-forward added. ffn: replaces that of the block."""
        shift, scale, gate = self.adaln(modulation)[3:]
        y = _modulate(self.norm3(x.float()), shift, scale).type_as(x)
        return (x.float() + _gate((ffn or self.ffn)(y).float(), gate)).type_as(x)

    def adaln(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of self-attention and of the feed-forward, each [B, 1 or F, 1, D], float32."""
        return (self.scale_shift_table + modulation.float()).unsqueeze(3).unbind(2)

    def text_kv(self, text: Tensor) -> KV:
        """Cross-attention keys and values of embedded text [B, text tokens, D]."""
        attn = self.attn2
        k, v = attn.to_kv(text).chunk(2, dim=-1) if attn.fused_projections else (attn.to_k(text), attn.to_v(text))
        return attn.norm_k(k).type_as(v).unflatten(2, (attn.heads, -1)), v.unflatten(2, (attn.heads, -1))


class FrameRotary(nn.Module):
    """Rotary embedding for any latent frame index, beyond the 1,024 positions of the base class's table too.

    A head's channels are split between frame, row and column (44/42/42 of 128), in pairs; angles are in float64.
    It has no buffers, since `model.to(torch.bfloat16)` would round them.
    """

    THETA = 10000.0

    def __init__(self, head_dim: int):
        super().__init__()
        space = 2 * (head_dim // 6)
        self.axes = (head_dim - 2 * space, space, space)

    def forward(self, frame_ids: Tensor, height: int, width: int) -> RotaryEmb:
        """cos and sin, float32 [1, F x height x width, 1, head_dim / 2], for integers frame_ids [F]."""
        sizes = (len(frame_ids), height, width)
        positions = (frame_ids, *(torch.arange(n, device=frame_ids.device) for n in sizes[1:]))
        parts = []
        for axis, (dim, position) in enumerate(zip(self.axes, positions, strict=True)):
            exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=position.device) / dim
            angle = torch.outer(position.double(), self.THETA**-exponent)
            shape = [n if i == axis else 1 for i, n in enumerate(sizes)]
            parts.append([part.float().view(*shape, -1).expand(*sizes, -1) for part in (angle.cos(), angle.sin())])
        cos, sin = (torch.cat(part, dim=-1).flatten(0, 2)[None, :, None] for part in zip(*parts, strict=True))
        return cos, sin


def chunk_causal_mask(
    geometry: Geometry,
    frames: int,
    device: torch.device | str,
    *,
    teacher_forcing: bool = False,
    kind: str = "dense",
) -> Mask:
    """The attention mask for a clip of `frames` latent frames as one sequence.

    Chunk b attends to `geometry.visible_chunks(b)`. With teacher forcing the sequence is [context ; noisy]: 2 x frames
    with the same frame_ids twice. Context chunk b attends to context chunks as above; noisy chunk b to the same context
    chunks except b, and to itself. kind "dense": bool [L, L]; "chunks": attention is computed chunk by chunk, from what
    it sees only; "flex": a BlockMask, for sequences of which no copy of the keys is to be made.
    """
    n, tokens = geometry.num_chunks(frames), geometry.tokens_per_chunk
    visible = torch.zeros(n, n, dtype=torch.bool)
    for b in range(n):
        visible[b, geometry.visible_chunks(b)] = True
    if teacher_forcing:
        own = torch.eye(n, dtype=torch.bool)
        context, noisy = torch.cat([visible, torch.zeros_like(visible)], 1), torch.cat([visible & ~own, own], 1)
        visible = torch.cat([context, noisy], 0)
    if kind == "chunks":
        return VisibleChunks(tuple(tuple(row.nonzero().flatten().tolist()) for row in visible), tokens)
    visible = visible.to(device)
    if kind == "dense":
        return visible.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
    assert kind == "flex", f"kind={kind}"

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible[query // tokens, key // tokens]

    length = len(visible) * tokens
    make = torch.compile(create_block_mask) if visible.is_cuda else create_block_mask  # eager would hold all L x L
    return make(rule, None, None, length, length, device=visible.device)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, L, D] with shift and scale [B, 1 or F, 1, D]."""
    return (x.unflatten(1, (shift.shape[1], -1)) * (1 + scale) + shift).flatten(1, 2)


def _gate(x: Tensor, gate: Tensor) -> Tensor:
    """x [B, L, D] with gate [B, 1 or F, 1, D]."""
    return (x.unflatten(1, (gate.shape[1], -1)) * gate).flatten(1, 2)


def _rotate(x: Tensor, rotary_emb: RotaryEmb) -> Tensor:
    """Rotate neighbouring channel pairs of x [B, L, heads, head_dim] in float32."""
    cos, sin = rotary_emb
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def project(attn: WanAttention, x: Tensor, rotary_emb: RotaryEmb) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries and keys, and values, of x [B, L, D]; each [B, L, heads, head_dim]."""
    if attn.fused_projections:
        q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
    else:
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
    return _rotate(q, rotary_emb).type_as(v), _rotate(k, rotary_emb).type_as(v), v  # autocast runs the norms in float32


def attend(attn: WanAttention, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None) -> Tensor:
    """Attention [B, L, heads, head_dim] by the backend that is set on the module."""
    if isinstance(mask, BlockMask):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return _flex(q.is_cuda)(q, k, v, block_mask=mask).transpose(1, 2)
    if isinstance(mask, VisibleChunks):
        q, k, v = (x.split(mask.tokens, dim=1) for x in (q, k, v))
        seen = [[torch.cat([x[i] for i in row], dim=1) for x in (k, v)] for row in mask.rows]
        return torch.cat([attend(attn, one, *kv, None) for one, kv in zip(q, seen, strict=True)], dim=1)
    if mask is not None:
        return dispatch_attention_fn(q, k, v, attn_mask=mask[None, None], backend="native")  # others take no mask
    return dispatch_attention_fn(q, k, v, backend=attn.processor._attention_backend)


@functools.cache
def _flex(compiled: bool):
    """Flex attention; it materializes all L x L scores unless it is compiled."""
    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
