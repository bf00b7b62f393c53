"""`DiagonalPipeline`: text to video in one object, in the manner of diffusers.

    pipe = DiagonalPipeline.from_config("configs/tiny.yaml")
    for frames in pipe.stream("a red circle moves right", seed=0):  # uint8 [T, H, W, 3]: 9 frames, then 12 at a time
        ...
    pipe("a red circle moves right", seed=0).save("circle.mp4")
    pipe("a red circle moves right", image="first.png")  # or video="before.mp4": what it begins with
    print(pipe.schedule)
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from configs.errors import UserError
from configs.geometry import latent_frames, pixel_frames
from configs.load import load_config
from configs.schema import Config, InferenceConfig, ModelConfig, ScheduleConfig, StreamConfig
from model.attention import set_attention
from model.causal_wan import CausalWanModel
from model.codec import Codec, WanCodec
from model.denoiser import Student
from model.fast.codec import optimise_codec
from model.fast.int8 import convert
from model.fast.offload import BlockStream, HostTextEncoder, SmallSteps
from model.fast.student import FastPlan, optimise
from model.schedule import Schedule
from model.text import TextEncoder
from model.tiny_decoder import TinyDecoderCodec, in_best_precision
from model.weights.load import load_student, load_text_encoder, load_tiny_decoder, load_vae
from model.weights.lora import Loras, plan_lora
from pipeline.async_decoder import prefetch
from pipeline.start import encode_start, read_start, start_warnings
from pipeline.story import Story, play_story
from pipeline.stream import ChunkResult, StreamSession
from utils.device import pick_device, pick_dtype, set_threads
from utils.distributed import Ranks
from utils.logs import get_logger
from utils.pictures import Clip, Picture
from utils.prompts import check_prompt
from utils.seeds import settled
from utils.video import VideoWriter

log = get_logger(__name__)
SELF_FORCING = Schedule.from_config(ScheduleConfig(preset="self_forcing"), StreamConfig())

FAR = 1.3  # times as high or as wide as what a student was trained for
Frames = int | None | Sequence[int]  # pixel frames of a clip, None = as configured; one for all, or one each


@dataclass(frozen=True, eq=False)
class Video:
    """One finished clip."""

    frames: np.ndarray = field(repr=False)  # uint8 [T, H, W, 3]
    fps: int
    prompt: str
    seed: int
    timings: list[dict[str, float]] = field(default_factory=list, repr=False)  # a chunk: seconds by their use
    warnings: list[str] = field(default_factory=list)  # sentences: what the model may not do well here

    def save(self, path: str | os.PathLike) -> None:
        """Write an H.264 .mp4, whole or not at all."""
        with VideoWriter(path, self.fps, self.frames.shape[1:3]) as video:
            video.write(self.frames)


class DiagonalPipeline:
    """A student, a codec, a text encoder, and the schedule that they run by."""

    def __init__(self, config: Config, student: Student, codec: Codec, text_encoder: TextEncoder):
        self.config = config
        self.session = StreamSession.from_config(config, student, codec, text_encoder)
        self.schedule, self.geometry = self.session.schedule, self.session.geometry
        self.card: Mapping[str, Any] = {}  # what is known of the student's training
        self.loras = Loras(student.model)  # adapters that are not merged for good
        self.start_warnings: list[str] = []  # of the picture or clip that was encoded last

    @classmethod
    def from_config(cls, config: str | os.PathLike | Config, *overrides: str, local_rank: int = 0):
        """A pipeline of what the configuration names; `overrides` as on the command line: "schedule.steps=5432222".

        local_rank: the GPU to use where there are several.
        Sets torch's number of CPU threads (`cpu_threads`). Raises UserError where a file is missing or does not fit,
        or a setting is wrong.
        """
        if not isinstance(config, Config):
            config = load_config(config, overrides)
        elif overrides:
            raise ValueError("overrides go with a path; use dataclasses.replace on a Config")
        device = pick_device(config.device, local_rank)
        set_threads(config.cpu_threads)
        dtype = pick_dtype(config.inference.precision, device)
        FastPlan.from_config(config.inference, device)  # refuses what cannot be before anything is loaded
        names, places = config.model, config.inference
        student = load_student(names.student, load_device(places.student, device), dtype, use_ema=names.use_ema)
        loras = load_loras(student, names)
        whole = load_device("stream" if places.text_int8 else places.text_encoder, device)
        text = load_text_encoder(names.text_encoder, names.tokenizer, names.text_tokens, whole, dtype)
        codec = load_codec(names, device, dtype)
        pipe = cls.from_parts(config, student, codec, text, device)
        pipe.loras, pipe.card = loras, student.card
        warn_of_schedule(pipe.schedule, student.card)
        for text in size_warnings(config, student.card):
            log.warning(text)
        return pipe

    @classmethod
    def from_parts(
        cls, config: Config, student: CausalWanModel, codec: Codec, text: TextEncoder, device: torch.device
    ) -> "DiagonalPipeline":
        """A pipeline of loaded networks, each put where `inference` wants it and made as fast as it says."""
        places, plan = config.inference, FastPlan.from_config(config.inference, device)
        if places.attention != "auto":  # which leaves to torch what `plan` does not make fast
            set_attention(student, places.attention)
        if places.student == "stream":
            BlockStream(student, device)
        if places.decode_frames:
            codec = SmallSteps(codec, places.decode_frames)
        return cls(config, *apply_fast_plan(Student(student), codec, plan), place_text(text, places, device))

    def stream(
        self,
        prompt: str | Sequence[str],
        seed: int | Sequence[int] = 0,
        num_frames: Frames = None,
        *,
        image: Picture | None = None,
        video: Clip | None = None,
    ) -> Iterator[np.ndarray | list[np.ndarray]]:
        """Yield each chunk's frames as soon as they are decoded: uint8 `[T, H, W, 3]`, T = 9 and then 12 at a time.

        A list of prompts runs as one batch and yields lists; `seed` and `num_frames` are then one for all, or lists,
        and a video that has ended gives no frames (T = 0).
        num_frames: pixel frames of the clip (81, not 21); None = what the configuration says.
        image, video: what the video begins with, a file or pixels (pipeline/start.py); its frames count and come first.
        """
        prompts, seeds = as_batch(prompt, seed)
        for frames, _ in self.chunks(prompts, seeds, num_frames, self.start(image, video, num_frames)):
            yield frames[0] if isinstance(prompt, str) else frames

    def __call__(
        self,
        prompt: str | Sequence[str],
        seed: int | Sequence[int] = 0,
        num_frames: Frames = None,
        *,
        image: Picture | None = None,
        video: Clip | None = None,
    ) -> Video | list[Video]:
        """The whole video of `prompt`; a list of them for a list of prompts. Arguments as for `stream`."""
        prompts, seeds = as_batch(prompt, seed)
        chunks = list(self.chunks(prompts, seeds, num_frames, self.start(image, video, num_frames)))
        timings = [spans for _, spans in chunks]
        videos = [
            Video(
                np.concatenate([frames[i] for frames, _ in chunks]), self.config.video.fps, text, one_seed, timings,
                self.warnings([text]),
            )
            for i, (text, one_seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        return videos[0] if isinstance(prompt, str) else videos

    @property
    def num_pixel_frames(self) -> int:
        """Of a clip as configured."""
        return pixel_frames(self.config.video.num_latent_frames)

    def num_chunks(self, num_frames: int | None = None) -> int:
        """Chunks of a clip of `num_frames` pixel frames (None: as configured). UserError where they do not fit."""
        latents = self.config.video.num_latent_frames if num_frames is None else latent_frames(num_frames)
        return self.geometry.num_chunks(latents)

    def start(
        self, image: Picture | None = None, video: Clip | None = None, num_frames: Frames = None
    ) -> Tensor | None:
        """Latents [1, F, C, h, w] that a video of `num_frames` pixel frames begins with; None without any."""
        lengths = [self.num_chunks(n) for n in (num_frames if isinstance(num_frames, Sequence) else [num_frames])]
        pixels = read_start(self.config, image, video, min(lengths) * self.geometry.chunk_frames)
        self.start_warnings = []
        return None if pixels is None else self.encode(pixels)

    def encode(self, pixels: np.ndarray) -> Tensor:
        """Latents [1, F, C, h, w] of what `read_start` has read, uint8 [T, H, W, 3]."""
        codec = self.session.codec
        latents = encode_start(codec, pixels, self.geometry, self.session.device)
        small_world = bool(self.session.text_encoder.known_words)
        self.start_warnings = start_warnings(self.card, pixels[0], latents, codec if small_world else None)
        for text in self.start_warnings:
            log.warning(text)
        return latents

    def prompt_warnings(self, prompt: str) -> list[str]:
        """Sentences that say which parts of `prompt` the model does not see; [] where it sees all."""
        return prompt_warnings(self.session.text_encoder, prompt)

    def warnings(self, prompts: Sequence[str]) -> list[str]:
        """Sentences that say what a video of these prompts, at this size and from the last start, may not do well."""
        seen = [text for prompt in prompts for text in self.prompt_warnings(prompt)]
        return [*size_warnings(self.config, self.card), *self.start_warnings, *dict.fromkeys(seen)]

    def _warn(self, prompts: Sequence[str]) -> None:
        for text in dict.fromkeys(text for prompt in prompts for text in self.prompt_warnings(check_prompt(prompt))):
            log.warning(text)

    def chunks(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        num_frames: Frames = None,
        start: Tensor | None = None,
    ) -> Iterator[tuple[list[np.ndarray], dict[str, float]]]:
        """As `stream`, for a batch: a chunk's frames of each video, and the seconds that its parts took.

        start: latents that all of them begin with.
        """
        self._warn(prompts)
        if isinstance(num_frames, Sequence):
            if len(num_frames) != len(prompts):
                raise UserError(f"{len(num_frames)} lengths were given for {len(prompts)} prompts; give one a prompt")
            lengths = [self.num_chunks(n) for n in num_frames]
        else:
            lengths = self.num_chunks(num_frames)
        yield from self._arrived(self.session.play(prompts, seeds, lengths, start))

    def tell(
        self, story: Story, seed: int, num_chunks: int | None, start: Tensor | None = None
    ) -> Iterator[tuple[list[np.ndarray], dict[str, float]]]:
        """As `chunks`, for one video of prompts that follow one another. num_chunks: None = without end."""
        self._warn(story.prompts)
        yield from self._arrived(play_story(self.session, story, seed, num_chunks, start))

    def _arrived(self, results: Iterator[ChunkResult]) -> Iterator[tuple[list[np.ndarray], dict[str, float]]]:
        beside = self.session.device.type == "cuda" and self.config.inference.overlap
        for result in prefetch(results, 1) if beside else results:  # one more chunk is queued than is waited for
            frames = result.wait().frames.numpy()
            yield [own if alive else own[:0] for own, alive in zip(frames, result.alive, strict=True)], result.timings


def as_batch(prompt: str | Sequence[str], seed: int | Sequence[int]) -> tuple[list[str], list[int]]:
    """Prompts and seeds as lists of one length; a single seed serves all prompts, and -1 draws one for each."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    if not prompts or len(seeds) != len(prompts):
        raise UserError(f"{len(seeds)} seeds were given for {len(prompts)} prompts; give one seed, or one a prompt")
    for i, given in enumerate(seeds):
        seeds[i] = settled(given, Ranks())
        if seeds[i] != given:
            log.info(f"seed {given}: drawn was {seeds[i]}")
    return prompts, seeds


def load_loras(student: WanTransformer3DModel, config: ModelConfig) -> Loras:
    """Put the adapters that `model.lora` names on `student`; with `model.lora_merge` they go into its weights."""
    loras = Loras(student)
    shapes = {name: tuple(value.shape) for name, value in student.state_dict().items()}
    scales = config.lora_scales or [1.0] * len(config.lora)
    for i, (path, scale) in enumerate(zip(config.lora, scales, strict=True)):
        # in float32 where they are added once, so that only their sum is rounded
        loras.add(plan_lora(path, shapes), scale, f"lora_{i}", torch.float32 if config.lora_merge else None)
    if config.lora and config.lora_merge:
        loras.fold()
    return loras


def load_device(place: str, device: torch.device) -> torch.device:
    """Where a network is loaded to that has this place."""
    return device if place == "keep" else torch.device("cpu")


def place_text(text: TextEncoder, config: InferenceConfig, device: torch.device) -> TextEncoder:
    """The text encoder as `config` wants it, where it wants it."""
    place = config.text_encoder
    if config.text_int8:
        convert(text.encoder.encoder, device, load_device(place, device))
    return text.to(device) if place == "keep" else HostTextEncoder(text, device, stream=place == "stream")


def load_codec(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Codec:
    """The codec that `model.codec` names, beside a student of `dtype`."""
    if config.codec == "taehv":
        return TinyDecoderCodec(in_best_precision(load_tiny_decoder(config.tiny_decoder, device), dtype))
    return WanCodec(load_vae(config.vae, device, dtype))


def apply_fast_plan(student: Student, codec: Codec, plan: FastPlan) -> tuple[Student, Codec]:
    """Student and codec as `plan` wants them, changed in place."""
    if plan.plain:
        return student, codec
    return optimise(student, plan), optimise_codec(codec, compiled=plan.compile)


def prompt_warnings(encoder: TextEncoder, prompt: str) -> list[str]:
    """What of `prompt` does not reach the model: what is too long, and words that it does not know."""
    found = []
    tokens = encoder.count_tokens(prompt)
    if tokens > encoder.text_tokens:
        found.append(
            f"the prompt is {tokens} tokens long and only the first {encoder.text_tokens} count "
            f"(model.text_tokens={encoder.text_tokens}): {prompt[:40]}..."
        )
    unknown = encoder.unknown_words(prompt)
    if unknown:
        named = ", ".join(word[:40] for word in unknown[:20]) + (", ..." if len(unknown) > 20 else "")
        known = encoder.known_words
        found.append(
            f"this model does not know, and leaves out of the prompt: {named}"
            + (f". It knows these words: {', '.join(known)}" if known else "")
        )
    return found


def size_warnings(config: Config, card: Mapping[str, Any]) -> list[str]:
    """Whether a video is far from the size that its student was trained for, as its card says."""
    if card.get("size") is None:
        return []
    size, trained = (config.video.height, config.video.width), card["size"]
    if all(1 / FAR <= ours / theirs <= FAR for ours, theirs in zip(size, trained, strict=True)):
        return []
    (height, width), (trained_height, trained_width) = size, trained
    return [
        f"this student was trained for {trained_height}x{trained_width} pixels (height x width) and makes "
        f"{height}x{width} now, which may look wrong; set video.height={trained_height} video.width={trained_width}"
    ]


def warn_of_schedule(schedule: Schedule, card: Mapping[str, Any]) -> None:
    """Say so where a checkpoint was trained with another schedule than the one it is to run by, or does not tell."""
    if not card and schedule.rows != SELF_FORCING.rows:  # a file of somebody else's
        log.warning(
            "this student's file does not say which schedule it was trained with; those that Self-Forcing and LongLive "
            "published were trained with schedule.preset=self_forcing, and with no other"
        )
    if card.get("schedule") is None:
        return
    trained = Schedule.from_dict(card["schedule"])
    if str(trained) != str(schedule):  # rows that only repeat the last one make no difference
        log.warning(f"this student was trained with another schedule\ntrained:\n{trained}\nused:\n{schedule}")
