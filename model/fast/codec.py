"""Decoders made fast for streaming, from outside: `optimize_codec(codec, compile=...)`.

Channels last is the layout that the GPU's convolutions work in; in the other one each of them moves its input twice.
The rest of a decoder is arithmetic on whole frames at full resolution, which is bound by memory: compiled, a norm and
its activation, or a memory block's concatenation and additions, read and write once.
"""

from collections.abc import Callable

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanDecoder3d,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
)
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from model.codec import Codec, WanCodec
from model.fast.offload import SlicedDecodeCodec
from model.fast.tiny_decoder import Compiler, FastTinyDecoder
from model.tiny_decoder import TinyDecoderCodec
from utils.compiling import compile_function


def optimize_codec(codec: Codec, *, compiled: bool, backend: str = "inductor") -> Codec:
    """Do it in place, and return the codec; one of an unknown kind is left as it is."""

    def compiler(function: Callable, dynamic: bool = False) -> Callable:
        return compile_function(function, backend=backend, dynamic=dynamic) if compiled else function

    if compiled:
        torch.backends.cudnn.benchmark = True  # few shapes, each used for as long as the stream runs
    inner = codec.codec if isinstance(codec, SlicedDecodeCodec) else codec
    if isinstance(inner, TinyDecoderCodec):
        inner.decoder.to(memory_format=torch.channels_last)
        inner.decoder.forward = FastTinyDecoder(inner.decoder, compiler)
    elif isinstance(inner, WanCodec):
        _wan(inner, compiler)
    return codec


CACHED = 2  # frames that a causal convolution sees before the present one


def _wan(codec: WanCodec, compiler: Compiler) -> None:
    """Only the decoder: encoding is not on the way of a stream."""
    decoder = codec.vae.decoder
    for part in decoder.modules():
        if isinstance(part, WanCausalConv3d):
            part.padding = (0, *part._padding[3::-2])  # of height and width; time's is in the cache
        if isinstance(part, nn.Conv2d | nn.Conv3d):
            layout = torch.channels_last if isinstance(part, nn.Conv2d) else torch.channels_last_3d
            part.weight.data = part.weight.data.contiguous(memory_format=layout)
    decoder.forward = FastWanDecoder(decoder, compiler)


class FastWanDecoder:
    """What `decoder(x, feat_cache=..., feat_idx=[0])` gives, with less done between the convolutions.

        frames   [B, T, H, W, C]   contiguous: a convolution sees channels last
        rows     [B, T*H*W, C]     the same memory, for what is compiled

    What a convolution reads is written once, by the kernel that normalises it, behind the two frames that went before;
    the zeros around a frame are the convolution's own, and its bias is added by the kernel that reads its output. A
    sum (y, bias, residual) is therefore passed on before it is added up. diffusers' modules copy twice (concatenate,
    pad) and add in passes of their own.

    A clip's first frame finds zeros where later ones find frames, and not a missing cache, so the compiled functions
    see two things change: the width, of which there are three, and the number of rows, which is dynamic. For streams
    alone: no gradient is kept.
    """

    def __init__(self, decoder: WanDecoder3d, compiler: Compiler):
        self.decoder = decoder
        for part in decoder.modules():
            if isinstance(part, WanResidualBlock):
                assert isinstance(part.nonlinearity, nn.SiLU), f"{part.nonlinearity} is another activation"
        self._begin, self._inside = compiler(_begin, dynamic=True), compiler(_inside, dynamic=True)
        self._join, self._add = compiler(_join, dynamic=True), compiler(_add, dynamic=True)

    def __call__(self, x: Tensor, feat_cache: list[Tensor | None], feat_idx: list[int]) -> Tensor:
        """[B, C, F, h, w] -> pixels [B, 3, T, H, W]; `feat_cache` is read and refilled, with frames of our layout."""
        net, slots = self.decoder, _Slots(feat_cache)
        total = _convolve(net.conv_in, slots.after(x.movedim(1, -1))), net.conv_in.bias, None
        total = self._block(net.mid_block.resnets[0], total, slots)
        for attention, block in zip(net.mid_block.attentions, net.mid_block.resnets[1:], strict=True):
            total = self._block(block, _attend(attention, self._sum(*total)), slots)
        for stage in net.up_blocks:
            for block in stage.resnets:
                total = self._block(block, total, slots)
            for upsampler in stage.upsamplers or ():
                total = self._grow(upsampler, total, slots)
        _, inner = self._enter(net.norm_out, total, slots)
        return (_convolve(net.conv_out, inner) + net.conv_out.bias).movedim(-1, 1)

    def _enter(self, norm: WanRMS_norm, total: tuple, slots: "_Slots") -> tuple[Tensor, Tensor]:
        """The sum, and what the convolution after its norm and activation reads."""
        y, bias, residual = total
        inner, new = slots.room(y)
        if residual is None:
            x = self._begin(_rows(y), bias, norm.gamma, _rows(new))
        else:
            x = self._join(_rows(y), bias, _rows(residual), norm.gamma, _rows(new))
        slots.keep(inner)
        return x.view(y.shape), inner

    def _block(self, block: WanResidualBlock, total: tuple, slots: "_Slots") -> tuple:
        x, inner = self._enter(block.norm1, total, slots)
        short = block.conv_shortcut
        residual = x if isinstance(short, nn.Identity) else linear(x, short.weight.flatten(1), short.bias)
        y = _convolve(block.conv1, inner)
        inner, new = slots.room(y)
        self._inside(_rows(y), block.conv1.bias, block.norm2.gamma, _rows(new))
        slots.keep(inner)
        return _convolve(block.conv2, inner), block.conv2.bias, residual

    def _grow(self, upsampler: WanResample, total: tuple, slots: "_Slots") -> tuple:
        """Twice the height and width and, but for a clip's first frame, twice the frames."""
        in_time = upsampler.mode == "upsample3d"
        if in_time and not slots.empty():
            x = _convolve(upsampler.time_conv, slots.after(self._sum(*total))) + upsampler.time_conv.bias
            x = x.unflatten(-1, (2, -1)).movedim(-2, 2).flatten(1, 2)  # [B, T, H, W, (2 C)] -> [B, 2 T, H, W, C]
        else:
            x = self._sum(*total)
            if in_time:
                slots.keep(torch.zeros_like(x[:, :1]).expand(-1, CACHED, -1, -1, -1))
        convolution = upsampler.resample[1]
        images = nn.functional.interpolate(x.flatten(0, 1).movedim(-1, 1), scale_factor=2, mode="nearest-exact")
        y = convolution._conv_forward(images, convolution.weight, None).movedim(1, -1).contiguous()
        return y.unflatten(0, x.shape[:2]), convolution.bias, None

    def _sum(self, y: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return self._add(_rows(y), bias, _rows(residual)).view(y.shape)


class _Slots:
    """The cached frames of a decoder's convolutions, asked for in the order in which the convolutions come."""

    def __init__(self, caches: list[Tensor | None]):
        self._caches, self._next = caches, 0

    def empty(self) -> bool:
        """Whether the next convolution has seen no frame yet."""
        return self._caches[self._next] is None

    def room(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Frames for the next convolution to read, cached ones first, and the part of them to be filled in."""
        inner = like.new_empty(like.shape[0], CACHED + like.shape[1], *like.shape[2:])
        if self.empty():
            inner[:, :CACHED].zero_()
        else:
            inner[:, :CACHED].copy_(self._caches[self._next])
        return inner, inner[:, CACHED:]

    def keep(self, inner: Tensor) -> None:
        """Go on to the next convolution. A copy is kept: all of the frames would be 7 times as large."""
        self._caches[self._next] = inner[:, -CACHED:].clone(memory_format=torch.contiguous_format)
        self._next += 1

    def after(self, x: Tensor) -> Tensor:
        """The cached frames and then x."""
        inner, new = self.room(x)
        new.copy_(x)
        self.keep(inner)
        return inner


def _rows(x: Tensor) -> Tensor:
    """As a tensor of its own: of a view dynamo would guard the base too, whose shapes are many."""
    return x.flatten(1, 3).detach()


def _convolve(convolution: WanCausalConv3d, frames: Tensor) -> Tensor:
    """Without the bias, which is left to whoever reads the result."""
    y = convolution._conv_forward(frames.movedim(-1, 1), convolution.weight, None)
    return y.movedim(1, -1).contiguous()


def _normal(x: Tensor, gamma: Tensor) -> Tensor:
    """WanRMS_norm over the last axis, in float32: x sqrt(C) / |x| * gamma."""
    x = x.float()
    return x * x.square().sum(-1, keepdim=True).clamp_min(1e-24).rsqrt() * (gamma.flatten() * gamma.numel() ** 0.5)


def _begin(y: Tensor, bias: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
    """x = y + bias; `out` becomes SiLU(norm(x))."""
    x = y + bias
    out.copy_(silu(_normal(x, gamma)))
    return x


def _inside(y: Tensor, bias: Tensor, gamma: Tensor, out: Tensor) -> None:
    """The same, where nobody else reads x."""
    out.copy_(silu(_normal(y + bias, gamma)))


def _join(y: Tensor, bias: Tensor, residual: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
    """One block's end and the next one's beginning: x = y + bias + residual; `out` becomes SiLU(norm(x))."""
    x = y + bias + residual
    out.copy_(silu(_normal(x, gamma)))
    return x


def _add(y: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return y + bias + residual


def _attend(attention: WanAttentionBlock, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels of each frame attend to each other; a sum again."""
    pixels = _normal(x, attention.norm.gamma).to(x.dtype).flatten(0, 1).flatten(1, 2)
    mixed = linear(pixels, attention.to_qkv.weight.flatten(1), attention.to_qkv.bias)
    q, k, v = mixed.unsqueeze(1).chunk(3, dim=-1)
    seen = nn.functional.scaled_dot_product_attention(q, k, v)
    return linear(seen, attention.proj.weight.flatten(1)).view(x.shape), attention.proj.bias, x
