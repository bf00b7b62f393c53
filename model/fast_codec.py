"""Decoders made fast for streaming, from outside: `optimise_codec(codec, compile=...)`.

Channels last is the layout that the GPU's convolutions work in; in the other one each of them moves its input twice.
The rest of a decoder is arithmetic on whole frames at full resolution, which is bound by memory: compiled, a norm and
its activation, or a memory block's concatenation and additions, read and write once.
"""

from collections.abc import Callable

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualBlock
from torch import Tensor, nn

from model.codec import Codec, WanCodec
from model.offload import SmallSteps
from model.tiny_decoder import MemoryBlock, TinyDecoder, TinyDecoderCodec

Compiler = Callable[..., Callable]  # (function, dynamic=False)


def optimise_codec(codec: Codec, *, compiled: bool, backend: str = "inductor") -> Codec:
    """Do it in place, and return the codec; one of an unknown kind is left as it is."""

    def compiler(function: Callable, dynamic: bool = False) -> Callable:
        return torch.compile(function, backend=backend, dynamic=dynamic) if compiled else function

    if compiled:
        torch.backends.cudnn.benchmark = True  # few shapes, each used for as long as the stream runs
    inner = codec.codec if isinstance(codec, SmallSteps) else codec
    if isinstance(inner, TinyDecoderCodec):
        _tiny(inner.decoder, compiler)
    elif isinstance(inner, WanCodec):
        _wan(inner, compiler)
    return codec


def _tiny(decoder: TinyDecoder, compiler: Compiler) -> None:
    """Three kinds of memory block, by width and resolution, are three kernels of one compiled function."""
    decoder.to(memory_format=torch.channels_last)
    for part in decoder.modules():
        if isinstance(part, MemoryBlock):
            part.forward = compiler(part.forward)


class NormSilu(nn.Module):
    """A residual block's norm and the activation after it, in one."""

    def __init__(self, norm: nn.Module, compiler: Compiler):
        super().__init__()
        self.norm = norm
        self._run = compiler(self._plain, dynamic=True)  # a kernel for each of some 20 sizes would be compiled long

    def _plain(self, x: Tensor) -> Tensor:
        return nn.functional.silu(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)


def _wan(codec: WanCodec, compiler: Compiler) -> None:
    """Only the decoder: encoding is not on the way of a stream."""
    decoder = codec.vae.decoder
    for block in decoder.modules():
        if isinstance(block, nn.Conv2d | nn.Conv3d):
            layout = torch.channels_last if isinstance(block, nn.Conv2d) else torch.channels_last_3d
            block.weight.data = block.weight.data.contiguous(memory_format=layout)
        if isinstance(block, WanResidualBlock):
            assert isinstance(block.nonlinearity, nn.SiLU), f"{block.nonlinearity} is another activation"
            block.norm1, block.norm2 = NormSilu(block.norm1, compiler), NormSilu(block.norm2, compiler)
            block.nonlinearity = nn.Identity()
    decoder.norm_out, decoder.nonlinearity = NormSilu(decoder.norm_out, compiler), nn.Identity()
