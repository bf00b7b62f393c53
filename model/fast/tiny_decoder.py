"""A fast tiny decoder for streaming: `FastTinyDecoder(decoder, compiler)` replaces its `forward`.

The last layers of a stage are linear: nearest-neighbour upsampling by 2, a 1x1 convolution that makes `s` frames of
one, and a 3x3 convolution. Several taps of the latter read the same pixel of the small frames, and which ones depends
only on the parity of the output's row and column. Therefore all three layers are equivalent to one 2x2 convolution of
the small frames, which computes the four kinds of pixel (polyphase components) of all `s` frames as separate channels:
4/9 of the operations, and no large frame is read.

    row of the large frame   r = 2 i + a,  a = 0, 1      sees rows r-1, r, r+1 of the large frame, that is
                             a = 0                       i-1, i, i    of the small one
                             a = 1                       i, i, i+1
    a 2x2 convolution with a border of one zero sees rows p-1, p at position p = 0 .. h, so kind `a` of row i is at
                                                         p = i + a

After the last stage there is one more 3x3 convolution, to 3 colours. It is a 2x2 convolution of the separate kinds: its
taps r-1, r, r+1 are at p = i or i + 1 of one kind or the other. Only its output is assembled to full-size frames.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, relu

from model.tiny_decoder import MemoryBlock, TemporalUpsample, TinyDecoder

Compiler = Callable[..., Callable]  # (function, dynamic=False)


class FastTinyDecoder:
    """The result of `decoder(latents, memory)`, up to rounding, without gradients.

    Frames are [N, H, W, C] and contiguous, which is channels last for a convolution. The merged weights are computed
    once, by the constructor: the decoder must not be moved, cast or loaded afterwards.
    """

    def __init__(self, decoder: TinyDecoder, compiler: Compiler):
        layers = list(decoder.decoder)
        self._first, self._last = layers[1], layers[-1]
        self._blocks = [layer for layer in layers if isinstance(layer, MemoryBlock)]
        self._strides = [layer.stride for layer in layers if isinstance(layer, TemporalUpsample)]
        ends = [i for i, layer in enumerate(layers) if isinstance(layer, TemporalUpsample)]
        self._ends = [_MergedConv2d(stage_end_weight(layers[i], layers[i + 1]), layers[i + 1].bias) for i in ends]
        self._rgb = _MergedConv2d(rgb_weight(self._last, self._strides[-1]), self._last.bias)
        self._stem, self._block = compiler(_stem), compiler(_block)
        self._spread, self._inside, self._to_rgb = compiler(_spread), compiler(_inside), compiler(_to_rgb)

    def __call__(self, latents: Tensor, memory: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Latents [B, F, C, h, w] -> frames [B, 4 F, 3, 8 h, 8 w] in about [0, 1], and the memory after them."""
        batch, after = latents.shape[0], []
        own, merged = self._first.weight, self._rgb.weight
        assert own.dtype == merged.dtype and own.device == merged.device, "the decoder was moved after it was made fast"
        x = self._stem(latents.flatten(0, 1), self._first.weight, self._first.bias)
        for stage, (end, stride) in enumerate(zip(self._ends, self._strides, strict=True)):
            for block in self._blocks[3 * stage : 3 * stage + 3]:
                frames = x.unflatten(0, (batch, -1))
                past = frames.new_zeros(frames[:, :1].shape) if memory is None else memory[len(after)].movedim(2, -1)
                last = frames[:, -1:].clone(memory_format=torch.contiguous_format)  # a view would keep all frames alive
                after.append(last.movedim(-1, 2))  # as the plain decoder has it
                x = self._block(frames, past, *_weights(block))
            kinds = end.convolve(x, padding=1)
            if stage < len(self._ends) - 1:
                x = self._spread(kinds, end.bias, stride)
        colours = self._rgb.convolve(self._inside(kinds, end.bias, stride), padding=0)
        return self._to_rgb(colours, self._rgb.bias, stride).unflatten(0, (batch, -1)), after


class _MergedConv2d:
    """A 2x2 convolution that is equivalent to several layers; the reader of its output adds `bias`."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias = weight.contiguous(memory_format=torch.channels_last), bias

    def convolve(self, x: Tensor, padding: int) -> Tensor:
        """[N, H, W, C] -> [N, H', W', C'], without the bias."""
        return conv2d(x.movedim(-1, 1), self.weight, padding=padding).movedim(1, -1).contiguous()


def stage_end_weight(growth: TemporalUpsample, convolution: nn.Conv2d) -> Tensor:
    """Weight [s 2 2 O, C, 2, 2] of a stage's last layers. Output channels: (frame, odd row, odd column, channel)."""
    sees = torch.zeros(2, 2, 3)  # (kind, tap of the 2x2 convolution, tap of the 3x3)
    sees[0, 0, 0] = sees[0, 1, 1] = sees[0, 1, 2] = 1
    sees[1, 0, 0] = sees[1, 0, 1] = sees[1, 1, 2] = 1
    grow = growth.conv.weight.double().flatten(1).unflatten(0, (growth.stride, -1))  # [s, C', C]
    sees, kernel = sees.to(grow), convolution.weight.double()
    both = torch.einsum("omyx,smc,aty,bux->saboctu", kernel, grow, sees, sees)
    return both.flatten(0, 3).to(convolution.weight.dtype)


def rgb_weight(convolution: nn.Conv2d, stride: int) -> Tensor:
    """Weight [s 2 2 3, s 2 2 O, 2, 2] of the last convolution; its input are the kinds of the last stage."""
    at = torch.zeros(2, 2, 2, 3)  # (kind of the output, kind of the input, tap of the 2x2, tap of the 3x3)
    for out in range(2):
        for tap in range(3):
            row = out + tap - 1
            kind = row % 2
            at[out, kind, (row + kind) // 2, tap] = 1
    kernel = convolution.weight.double()
    at = at.to(kernel)
    one = torch.einsum("koyx,caty,dbux->cdkabotu", kernel, at, at).flatten(3, 5).flatten(0, 2)  # of one frame
    weight = one.new_zeros(stride, one.shape[0], stride, *one.shape[1:])
    for frame in range(stride):
        weight[frame, :, frame] = one
    return weight.flatten(2, 3).flatten(0, 1).to(convolution.weight.dtype)


def _weights(block: MemoryBlock) -> list[Tensor]:
    return [tensor for i in (0, 2, 4) for tensor in (block.conv[i].weight, block.conv[i].bias)]


def _stem(latents: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    x = (torch.tanh(latents / 3) * 3).contiguous(memory_format=torch.channels_last)
    return relu(conv2d(x, weight, bias, padding=1)).movedim(1, -1)


def _block(
    frames: Tensor, past: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> Tensor:
    """[B, F, H, W, C] and the frame before them [B, 1, H, W, C] -> [B F, H, W, C]."""
    before = torch.cat([past, frames[:, :-1]], dim=1)
    x = torch.cat([frames, before], dim=-1).flatten(0, 1).movedim(-1, 1)
    residual = frames.flatten(0, 1).movedim(-1, 1)
    return _convolve_relu(_convolve_relu(_convolve_relu(x, w0, b0), w1, b1), w2, b2, residual).movedim(1, -1)


def _convolve_relu(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """ReLU of a 3x3 convolution plus `residual`; with cuDNN by one fused kernel."""
    if x.is_cuda and torch.version.cuda:
        how = [1, 1], [1, 1], [1, 1], 1  # stride, padding, dilation, groups
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *how)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *how)
    y = conv2d(x, weight, bias, padding=1)
    return relu(y if residual is None else y + residual)


def _kinds(x: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """[N, h+1, w+1, s 2 2 O] -> [N, h+1, w+1, s, 2, 2, O], with the bias."""
    x = x.unflatten(-1, (stride, 2, 2, -1))
    return x if bias is None else x + bias


def _spread(kinds: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Interleave the four kinds of pixel: -> [N s, 2 h, 2 w, O]."""
    x = _kinds(kinds, bias, stride).movedim(3, 1)  # [N, s, h+1, w+1, 2, 2, O]
    x = torch.stack([x[:, :, :-1, :, 0], x[:, :, 1:, :, 1]], dim=3)  # [N, s, h, 2, w+1, 2, O]
    x = torch.stack([x[..., :-1, 0, :], x[..., 1:, 1, :]], dim=-2)  # [N, s, h, 2, w, 2, O]
    return x.flatten(4, 5).flatten(2, 3).flatten(0, 1)


def _inside(kinds: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """ReLU of the kinds, with zeros at positions outside of the large frame: the next convolution's padding."""
    x = _kinds(kinds, bias, stride)
    h, w = kinds.shape[1] - 1, kinds.shape[2] - 1
    kind = torch.arange(2, device=x.device)
    row, column = (torch.arange(n + 1, device=x.device)[:, None] - kind for n in (h, w))  # (position, kind)
    rows, columns = (row >= 0) & (row < h), (column >= 0) & (column < w)
    there = rows[:, None, None, :, None, None] & columns[None, :, None, None, :, None]
    return x.relu().masked_fill_(~there, 0).flatten(3)  # not in place: compiled, it would write `kinds`


def _to_rgb(kinds: Tensor, bias: Tensor, stride: int) -> Tensor:
    """[N, h, w, s 2 2 3] -> pixels [N s, 3, 2 h, 2 w], in channels-last layout."""
    x = kinds.unflatten(-1, (stride, 2, 2, 3)) + bias
    x = x.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3).flatten(0, 1).contiguous()
    return x.movedim(-1, 1)
