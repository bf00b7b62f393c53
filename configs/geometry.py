"""All arithmetic between pixels, latent frames, chunks and tokens.

    pixel frames   1 | 4 | 4 | 4 | ...      the first latent frame is one pixel frame, each later one is four
    latent frames  0   1   2 | 3   4   5    a chunk is `chunk_frames` latent frames
    tokens         one latent frame is (latent_height / patch) x (latent_width / patch) tokens, frame-major
"""

from dataclasses import dataclass, replace
from typing import Any

from configs.errors import UserError
from configs.schema import Config
from configs.validate import check_shares

SPATIAL_STRIDE = 8  # pixels to a latent cell, both ways (Wan2.1 VAE)
TEMPORAL_STRIDE = 4  # pixel frames to a latent frame, the first excepted (Wan2.1 VAE)


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of one stream. `window_frames` = 0 means that nothing is ever evicted."""

    height: int  # pixels
    width: int  # pixels
    chunk_frames: int = 3  # latent frames
    window_frames: int = 12  # latent frames, sink included
    sink_frames: int = 3  # latent frames
    position_frames: int = 1024  # latent frames that rotary positions span from the sink on; 0 = no bound
    latent_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)

    def __post_init__(self):
        for name, value, patch in (("height", self.height, self.patch[1]), ("width", self.width, self.patch[2])):
            unit = SPATIAL_STRIDE * patch
            if value % unit:
                raise UserError(
                    f"video.{name}={value} is not divisible by {unit} (codec stride x patch); "
                    f"try {max(unit, round(value / unit) * unit)}"
                )

    @classmethod
    def from_config(cls, config: Config) -> "Geometry":
        """Geometry of `config`, for a network with the latent channels and the patch of Wan 2.1."""
        return cls(
            height=config.video.height,
            width=config.video.width,
            chunk_frames=config.stream.chunk_frames,
            window_frames=config.stream.window_frames,
            sink_frames=config.stream.sink_frames,
            position_frames=config.stream.position_frames,
        )

    def for_network(self, sizes: Any) -> "Geometry":
        """The same with the latent channels and the patch of a transformer's configuration, as diffusers has it."""
        return replace(self, latent_channels=sizes.in_channels, patch=tuple(sizes.patch_size))

    @property
    def latent_height(self) -> int:
        return self.height // SPATIAL_STRIDE

    @property
    def latent_width(self) -> int:
        return self.width // SPATIAL_STRIDE

    @property
    def tokens_per_frame(self) -> int:
        return (self.latent_height // self.patch[1]) * (self.latent_width // self.patch[2])

    @property
    def tokens_per_chunk(self) -> int:
        return self.chunk_frames * self.tokens_per_frame

    def check_shares(self, setting: str, degree: int) -> None:
        """Refuse `setting`=degree where it does not divide the tokens of a chunk."""
        what = f"tokens of a chunk of {self.chunk_frames} latent frames of {self.width}x{self.height} pixels"
        check_shares(setting, degree, self.tokens_per_chunk, what)

    @property
    def sink_chunks(self) -> int:
        return self.sink_frames // self.chunk_frames

    @property
    def window_chunks(self) -> int:
        """Chunks that attention sees, the current one and the sink included; 0 = all."""
        return self.window_frames // self.chunk_frames

    def latent_shape(self, batch: int, frames: int) -> tuple[int, int, int, int, int]:
        """[B, F, C, H, W] of `frames` latent frames."""
        return (batch, frames, self.latent_channels, self.latent_height, self.latent_width)

    def num_chunks(self, latent_frames: int) -> int:
        """Chunks in `latent_frames`, which must be a whole number of them."""
        if latent_frames % self.chunk_frames:
            raise UserError(
                f"{latent_frames} latent frames are not a whole number of chunks (stream.chunk_frames="
                f"{self.chunk_frames}); try {max(1, round(latent_frames / self.chunk_frames)) * self.chunk_frames}"
            )
        return latent_frames // self.chunk_frames

    def chunk(self, k: int) -> slice:
        """Latent frames of chunk k: slice(6, 9) for k = 2 and chunks of 3."""
        return slice(k * self.chunk_frames, (k + 1) * self.chunk_frames)

    def visible_chunks(self, k: int) -> list[int]:
        """Chunks that chunk k attends to, itself last: the sink and the newest that fit the window."""
        if not self.window_chunks or k < self.window_chunks:
            return list(range(k + 1))
        recent = self.window_chunks - self.sink_chunks
        return list(range(self.sink_chunks)) + list(range(k + 1 - recent, k + 1))

    def kv_frames(self, k: int) -> int:
        """Latent frames whose keys chunk k sees, its own included."""
        return min(k + 1, self.window_chunks or k + 1) * self.chunk_frames


def pixel_frames(latent_frames: int) -> int:
    """Pixel frames that `latent_frames` decode to: 1 + 4 (F - 1), and 0 for none."""
    return 1 + TEMPORAL_STRIDE * (latent_frames - 1) if latent_frames else 0


def latent_frames(pixel_frames: int) -> int:
    """Latent frames that `pixel_frames` = 1 + 4 n encode to."""
    if pixel_frames % TEMPORAL_STRIDE != 1:
        raise UserError(
            f"{pixel_frames} pixel frames are not 1 + {TEMPORAL_STRIDE} n; "
            f"try {(pixel_frames - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1}"
        )
    return 1 + (pixel_frames - 1) // TEMPORAL_STRIDE
