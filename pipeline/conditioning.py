"""Conditioning frames: the image or clip that a video begins with, checked and encoded to latents.

    image   1 pixel frame = latent frame 0; frames 1 and 2 are generated in the same chunk
    clip    its last 1 + 4 n pixel frames as whole chunks of latents; generation continues after its last frame

A clip is encoded by itself, so its first latent frame stands for a single pixel frame, as the decoder expects.
pipeline/chunk.py says how the student uses conditioning frames.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from configs.geometry import Geometry, latent_frames, pixel_frames
from configs.schema import Config
from model.codec import Codec
from utils.pictures import Clip, Picture, read_clip, read_picture

MOST_ERROR = 12  # of 255, root mean square; the tiny codec shows frames of its world 2 to 3 off, photos 24 and more


def read_conditioning(
    config: Config,
    image: Picture | None,
    video: Clip | None,
    num_latent_frames: int | None,
    names: tuple[str, str] = ("inference.image", "inference.video"),
) -> np.ndarray | None:
    """Pixels uint8 [T, H, W, 3] that a video begins with, T = 1 or 1 + 4 n; None without image and video.

    num_latent_frames: length of the video; None = endless. names: of image and video, for messages. Loads no weights.
    Raises UserError if a file is unreadable, too large or too short, or as long as the video.
    """
    if image is None and video is None:
        return None
    if image is not None and video is not None:
        raise UserError(f"{names[0]} and {names[1]} were both given; a video begins with one of them")
    if config.model.codec == "taehv":
        raise UserError("model.codec=taehv decodes only, and a start has to be encoded; set model.codec=wan")
    size = (config.video.height, config.video.width)
    if image is not None:
        return read_picture(image, size, names[0])[None]
    chunk, most = config.stream.chunk_frames, _most_latents(config)
    frames = read_clip(video, size, config.video.fps, pixel_frames(most), names[1])
    if len(frames) < pixel_frames(chunk):
        raise UserError(
            f"{names[1]} has {len(frames)} frame{'s' * (len(frames) != 1)} at {config.video.fps} a second, and a chunk "
            f"needs {pixel_frames(chunk)}; give a longer clip, or one picture of it as {names[0]}"
        )
    whole = ((len(frames) - 1) // 4 + 1) // chunk * chunk
    if config.inference.video_frames and whole < config.inference.video_frames:
        raise UserError(
            f"inference.video_frames={config.inference.video_frames} latent frames are {pixel_frames(most)} frames at "
            f"{config.video.fps} a second, and {names[1]} has {len(frames)}; try inference.video_frames={whole}"
        )
    if num_latent_frames is not None and whole >= num_latent_frames:
        raise UserError(
            f"{names[1]} gives {whole} latent frames and the video has {num_latent_frames}, so that nothing is left to "
            f"be made; make the video longer than {whole} latent frames, or inference.video_frames smaller"
        )
    return frames[-pixel_frames(whole) :]


def _most_latents(config: Config) -> int:
    """Number of latent frames of a clip that are used: `inference.video_frames`, or the window without a chunk."""
    chunk, asked = config.stream.chunk_frames, config.inference.video_frames
    if asked % chunk:
        raise UserError(
            f"inference.video_frames={asked} is not a whole number of chunks (stream.chunk_frames={chunk}); "
            f"try {max(1, round(asked / chunk)) * chunk}"
        )
    window = config.stream.window_frames or config.video.num_latent_frames
    return asked or max(chunk, window - chunk)


def encode_conditioning(codec: Codec, pixels: np.ndarray, geometry: Geometry, device: torch.device) -> Tensor:
    """Float32 latents [1, F, C, h, w] of pixels uint8 [T, H, W, 3]."""
    frames = torch.from_numpy(pixels.copy()).movedim(-1, 1)[None].to(device).float().div(127.5).sub(1)
    latents = codec.encode(frames).float()
    assert latents.shape == geometry.latent_shape(1, latent_frames(len(pixels))), latents.shape
    return latents


def conditioning_warnings(
    card: Mapping[str, Any], picture: np.ndarray, latents: Tensor, codec: Codec | None = None
) -> list[str]:
    """Warnings if the video may not continue its conditioning frames well: because the student was not trained with
    such frames, or because the codec, if given, reconstructs `picture` badly.

    picture: first conditioning frame, uint8 [H, W, 3]; latents: of the conditioning frames, [1, F, C, h, w].
    """
    warnings = []
    if not card.get("trained_image_start"):
        warnings.append(
            "this student was not trained to begin with an image or a clip (its card.json has no trained_image_start); "
            "what follows may not fit what is given"
        )
    if codec is not None:
        shown = codec.decode(latents[:, :1])[0, 0].float().add(1).mul(127.5).clamp(0, 255).permute(1, 2, 0)
        error = float(np.sqrt(np.mean((shown.cpu().numpy() - picture) ** 2)))
        if error > MOST_ERROR:
            warnings.append(
                f"the given picture is unlike what this model was trained on: its codec reconstructs it with an error "
                f"of {error:.0f} of 255, where {MOST_ERROR} is much; what follows may not fit it"
            )
    return warnings
