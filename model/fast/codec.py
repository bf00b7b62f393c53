"""Faster decoders for streaming: `optimize_codec(codec, compiled=...)`.

GPU convolutions work in channels-last layout; with any other layout each of them copies its input twice. The rest of a
decoder is elementwise arithmetic on frames at full resolution, which is memory-bound: compiled, a norm with its
activation, or the concatenation and additions of a memory block, read and write their data once.
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
from model.fast.tiny_decoder import Compiler, FastTinyDecoder
from model.tiny_decoder import TinyDecoderCodec
from utils.compiling import compile_function


def optimize_codec(codec: Codec, *, compiled: bool, backend: str = "inductor") -> Codec:
    """Optimize the codec's decoder in place and return the codec; codecs of other classes are returned unchanged.

    compiled: with torch.compile. backend: of torch.compile.
    """

    def compiler(function: Callable, dynamic: bool = False) -> Callable:
        return compile_function(function, backend=backend, dynamic=dynamic) if compiled else function

    if compiled:
        torch.backends.cudnn.benchmark = True  # there are few shapes
    if isinstance(codec, TinyDecoderCodec):
        codec.decoder.to(memory_format=torch.channels_last)
        codec.decoder.forward = FastTinyDecoder(codec.decoder, compiler)
    elif isinstance(codec, WanCodec):
        _optimize_wan(codec, compiler)
    return codec


CACHED = 2  # frames that a causal convolution sees before the present one


def _optimize_wan(codec: WanCodec, compiler: Compiler) -> None:
    """Optimize the VAE's decoder. The encoder is left unchanged, since streams do not need it."""
    decoder = codec.vae.decoder
    for part in decoder.modules():
        if isinstance(part, WanCausalConv3d):
            part.padding = (0, *part._padding[3::-2])  # height and width only; in time the cache is the padding
        if isinstance(part, nn.Conv2d | nn.Conv3d):
            layout = torch.channels_last if isinstance(part, nn.Conv2d) else torch.channels_last_3d
            part.weight.data = part.weight.data.contiguous(memory_format=layout)
    decoder.forward = FastWanDecoder(decoder, compiler)


class FastWanDecoder:
    """The result of `decoder(x, feat_cache=..., feat_idx=[0])` with fewer memory accesses between convolutions.

        frames   [B, T, H, W, C]   contiguous, which is channels last for a convolution
        rows     [B, T*H*W, C]     a view of the same memory, for the compiled functions

    The input of a convolution is written once, by the kernel that normalizes it, directly after the two cached frames.
    Spatial padding is left to the convolution, and the bias is added by the kernel that reads the convolution's output,
    so a sum (y, bias, residual) is passed on unevaluated. diffusers' modules copy twice (concatenation, padding) and
    add in separate kernels.

    The cache of a clip's first frame is zeros and not None. The compiled functions therefore see only two properties
    change: the number of channels, of which there are three, and the number of rows, which is dynamic. There are no
    gradients.
    """

    def __init__(self, decoder: WanDecoder3d, compiler: Compiler):
        self.decoder = decoder
        for part in decoder.modules():
            if isinstance(part, WanResidualBlock):
                assert isinstance(part.nonlinearity, nn.SiLU), f"{part.nonlinearity} is another activation"
        self._bias_norm_silu, self._inside = compiler(_bias_norm_silu, dynamic=True), compiler(_inside, dynamic=True)
        self._add_norm_silu, self._add = compiler(_add_norm_silu, dynamic=True), compiler(_add, dynamic=True)

    def __call__(self, x: Tensor, feat_cache: list[Tensor | None], feat_idx: list[int]) -> Tensor:
        """[B, C, F, h, w] -> pixels [B, 3, T, H, W]; reads and updates `feat_cache`, whose frames are channels last."""
        net, slots = self.decoder, _FeatureCache(feat_cache)
        pending_sum = _convolve(net.conv_in, slots.after(x.movedim(1, -1))), net.conv_in.bias, None
        pending_sum = self._block(net.mid_block.resnets[0], pending_sum, slots)
        for attention, block in zip(net.mid_block.attentions, net.mid_block.resnets[1:], strict=True):
            pending_sum = self._block(block, _attend(attention, self._sum(*pending_sum)), slots)
        for stage in net.up_blocks:
            for block in stage.resnets:
                pending_sum = self._block(block, pending_sum, slots)
            for upsampler in stage.upsamplers or ():
                pending_sum = self._upsample(upsampler, pending_sum, slots)
        _, inner = self._norm_silu(net.norm_out, pending_sum, slots)
        return (_convolve(net.conv_out, inner) + net.conv_out.bias).movedim(-1, 1)

    def _norm_silu(self, norm: WanRMS_norm, pending_sum: tuple, slots: "_FeatureCache") -> tuple[Tensor, Tensor]:
        """Evaluate the sum x = `pending_sum`; returns x and the input of the next convolution, SiLU(norm(x))."""
        y, bias, residual = pending_sum
        inner, new = slots.input_buffer(y)
        if residual is None:
            x = self._bias_norm_silu(_rows(y), bias, norm.gamma, _rows(new))
        else:
            x = self._add_norm_silu(_rows(y), bias, _rows(residual), norm.gamma, _rows(new))
        slots.keep(inner)
        return x.view(y.shape), inner

    def _block(self, block: WanResidualBlock, pending_sum: tuple, slots: "_FeatureCache") -> tuple:
        x, inner = self._norm_silu(block.norm1, pending_sum, slots)
        short = block.conv_shortcut
        residual = x if isinstance(short, nn.Identity) else linear(x, short.weight.flatten(1), short.bias)
        y = _convolve(block.conv1, inner)
        inner, new = slots.input_buffer(y)
        self._inside(_rows(y), block.conv1.bias, block.norm2.gamma, _rows(new))
        slots.keep(inner)
        return _convolve(block.conv2, inner), block.conv2.bias, residual

    def _upsample(self, upsampler: WanResample, pending_sum: tuple, slots: "_FeatureCache") -> tuple:
        """Double height, width and, except for a clip's first frame, the number of frames."""
        in_time = upsampler.mode == "upsample3d"
        if in_time and not slots.empty():
            x = _convolve(upsampler.time_conv, slots.after(self._sum(*pending_sum))) + upsampler.time_conv.bias
            x = x.unflatten(-1, (2, -1)).movedim(-2, 2).flatten(1, 2)  # [B, T, H, W, (2 C)] -> [B, 2 T, H, W, C]
        else:
            x = self._sum(*pending_sum)
            if in_time:
                slots.keep(torch.zeros_like(x[:, :1]).expand(-1, CACHED, -1, -1, -1))
        convolution = upsampler.resample[1]
        images = nn.functional.interpolate(x.flatten(0, 1).movedim(-1, 1), scale_factor=2, mode="nearest-exact")
        y = convolution._conv_forward(images, convolution.weight, None).movedim(1, -1).contiguous()
        return y.unflatten(0, x.shape[:2]), convolution.bias, None

    def _sum(self, y: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return self._add(_rows(y), bias, _rows(residual)).view(y.shape)


class _FeatureCache:
    """The cached frames of a decoder's convolutions, accessed in the order of the convolutions."""

    def __init__(self, caches: list[Tensor | None]):
        self._caches, self._next = caches, 0

    def empty(self) -> bool:
        """Whether nothing is cached yet for the next convolution."""
        return self._caches[self._next] is None

    def input_buffer(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Input of the next convolution, which begins with the cached frames, and a view of the rest, to be filled."""
        inner = like.new_empty(like.shape[0], CACHED + like.shape[1], *like.shape[2:])
        if self.empty():
            inner[:, :CACHED].zero_()
        else:
            inner[:, :CACHED].copy_(self._caches[self._next])
        return inner, inner[:, CACHED:]

    def keep(self, inner: Tensor) -> None:
        """Cache the last frames and go on to the next convolution. A view would keep 7 times as much in memory."""
        self._caches[self._next] = inner[:, -CACHED:].clone(memory_format=torch.contiguous_format)
        self._next += 1

    def after(self, x: Tensor) -> Tensor:
        """The cached frames followed by x."""
        inner, new = self.input_buffer(x)
        new.copy_(x)
        self.keep(inner)
        return inner


def _rows(x: Tensor) -> Tensor:
    """x [B, T, H, W, C] as rows. Detached, since dynamo would also guard on the shape of a view's base."""
    return x.flatten(1, 3).detach()


def _convolve(convolution: WanCausalConv3d, frames: Tensor) -> Tensor:
    """The convolution without its bias, which the reader of the result adds."""
    y = convolution._conv_forward(frames.movedim(-1, 1), convolution.weight, None)
    return y.movedim(1, -1).contiguous()


def _normal(x: Tensor, gamma: Tensor) -> Tensor:
    """WanRMS_norm over the last axis, in float32: x sqrt(C) / |x| * gamma."""
    x = x.float()
    unit = x * x.square().sum(-1, keepdim=True).clamp_min(1e-24).rsqrt()
    return unit.mul_(gamma.flatten() * gamma.numel() ** 0.5)  # in place, which counts where nothing is compiled


def _bias_norm_silu(y: Tensor, bias: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
    """x = y + bias; writes SiLU(norm(x)) to `out`."""
    x = y + bias
    out.copy_(silu(_normal(x, gamma), inplace=True))
    return x


def _inside(y: Tensor, bias: Tensor, gamma: Tensor, out: Tensor) -> None:
    """As `_bias_norm_silu`, where x itself is not needed."""
    out.copy_(silu(_normal(y + bias, gamma), inplace=True))


def _add_norm_silu(y: Tensor, bias: Tensor, residual: Tensor, gamma: Tensor, out: Tensor) -> Tensor:
    """End of a block and begin of the next: x = y + bias + residual; writes SiLU(norm(x)) to `out`."""
    x = (y + bias).add_(residual)
    out.copy_(silu(_normal(x, gamma), inplace=True))
    return x


def _add(y: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return (y + bias).add_(residual)


def _attend(attention: WanAttentionBlock, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Self-attention within each frame; returns an unevaluated sum (y, bias, residual)."""
    pixels = _normal(x, attention.norm.gamma).to(x.dtype).flatten(0, 1).flatten(1, 2)
    mixed = linear(pixels, attention.to_qkv.weight.flatten(1), attention.to_qkv.bias)
    q, k, v = mixed.unsqueeze(1).chunk(3, dim=-1)
    seen = nn.functional.scaled_dot_product_attention(q, k, v)
    return linear(seen, attention.proj.weight.flatten(1)).view(x.shape), attention.proj.bias, x
