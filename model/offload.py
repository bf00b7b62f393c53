"""Less memory on the GPU, for the same result: a text encoder that lives on the host, a decoder in smaller steps."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor

from model.codec import Codec, DecoderStream
from model.text import TextEncoder


class HostTextEncoder(TextEncoder):
    """A text encoder on the host whose prompts are encoded on `device`.

    stream: its blocks go to the device one at a time (diffusers' group offloading) and back; the token embedding stays
    there while it runs. Otherwise all of it goes there for a call, and the host's copy takes its place again after it.
    """

    def __init__(self, text: TextEncoder, device: torch.device | str, *, stream: bool):
        super().__init__(text.encoder, text.tokenizer, text.text_tokens)
        assert text.encoder.device.type == "cpu", "load it on the host first"
        self.device, self.stream = torch.device(device), stream
        if stream:
            apply_group_offloading(
                self.encoder.encoder,
                onload_device=self.device,
                offload_device=torch.device("cpu"),
                offload_type="block_level",
                num_blocks_per_group=1,
                use_stream=self.device.type == "cuda",  # the next block comes while this one works
                low_cpu_mem_usage=True,  # pinned a block at a time: the weights stay a map of their file
            )

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """[B, text_tokens, dim] on the device, zeros after each prompt's end."""
        ids, mask = (x.to(self.device) for x in self.tokenize(prompts))
        if self.stream:
            return self.embed(ids, mask)
        tensors = [*self.encoder.parameters(), *self.encoder.buffers()]
        host = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device)
            return self.embed(ids, mask)
        finally:
            for tensor, kept in zip(tensors, host, strict=True):
                tensor.data = kept


class SmallSteps:
    """A codec that decodes at most `frames` latent frames at once; what it decodes is the same."""

    def __init__(self, codec: Codec, frames: int):
        self.codec, self.frames = codec, frames

    @property
    def latent_channels(self) -> int:
        return self.codec.latent_channels

    def to(self, *args: Any, **kwargs: Any) -> "SmallSteps":
        """As `torch.nn.Module.to`."""
        self.codec.to(*args, **kwargs)
        return self

    def encode(self, pixels: Tensor) -> Tensor:
        """As the codec does."""
        return self.codec.encode(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, F, C, h, w] -> pixels [B, 1 + 4 (F - 1), 3, H, W]."""
        return self.stream().decode(latents)

    def stream(self) -> "SmallStepsStream":
        return SmallStepsStream(self.codec.stream(), self.frames)


class SmallStepsStream:
    """A stream of such a codec."""

    def __init__(self, stream: DecoderStream, frames: int):
        self._stream, self._frames = stream, frames

    def decode(self, latents: Tensor) -> Tensor:
        """Next latents [B, f, C, h, w] -> pixels [B, T, 3, H, W]."""
        return torch.cat([self._stream.decode(part) for part in latents.split(self._frames, dim=1)], dim=1)

    def snapshot(self) -> Any:
        """State so far."""
        return self._stream.snapshot()

    def restore(self, snapshot: Any) -> None:
        """Go back to where `snapshot` was taken."""
        self._stream.restore(snapshot)
