"""`DiagonalPipeline`: text to video in one object, in the manner of diffusers (docs/python.md).

    pipe = DiagonalPipeline.from_config("configs/tiny.yaml")
    pipe("a red circle moves right", seed=0).videos[0].save("circle.mp4")
    for frames in pipe.stream("a red circle moves right", seed=0):  # uint8 [T, H, W, 3]: 9 frames, then 12 at a time
        ...
    pipe("a red circle moves right", image="first.png")  # or video="before.mp4": what it begins with
    print(pipe.schedule)
    pipe.save_pretrained("my_model")  # and DiagonalPipeline.from_pretrained("my_model")
"""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from configs.errors import UserError, shown
from configs.geometry import TEMPORAL_STRIDE, Geometry, pixel_frames
from configs.load import PIPELINE, load_config
from configs.schema import Config
from model.attention import set_attention
from model.causal_wan import CausalWanModel
from model.codec import Codec, WanCodec
from model.denoiser import Student
from model.fast.offload import BlockOffload
from model.fast.student import FastPlan
from model.schedule import Schedule, as_schedule
from model.text import TextEncoder
from model.tiny_decoder import TinyDecoderCodec, cast_to_best_dtype
from model.weights.load import load_student, load_text_encoder
from model.weights.lora import LoraAdapters
from model.weights.plain import plain
from pipeline.arguments import as_lengths, as_prompts, as_seeds, refuse, whole
from pipeline.async_decoder import prefetch
from pipeline.conditioning import conditioning_warnings, encode_conditioning, read_conditioning
from pipeline.model_warnings import prompt_warnings, size_warnings, warn_of_schedule
from pipeline.networks import (
    build_student,
    load_codec,
    load_device,
    load_loras,
    place_text,
    precision_of,
    text_load_device,
)
from pipeline.pretrained import save_folder, settings_of
from pipeline.sequence_parallel import ParallelStudent
from pipeline.story import Story, play_story
from pipeline.stream import ChunkResult, StreamSession
from pipeline.video import OUTPUT_TYPES, DiagonalPipelineOutput, Video
from utils.device import pick_device, pick_dtype, set_threads
from utils.logs import get_logger
from utils.pictures import Clip, Picture
from utils.progress import progress_bar
from utils.prompts import check_prompt

log = get_logger(__name__)
MAX_SIDE, MAX_VIDEOS = 8192, 1000  # pixels; videos of one prompt in one call
Frames = int | None | Sequence[int]  # pixel frames of a clip, None = as configured; one for all, or one each
Seeds = int | None | Sequence[int]
Generators = torch.Generator | Sequence[torch.Generator] | None
OnChunkEnd = Callable[["DiagonalPipeline", int, dict[str, Any]], Any]


@dataclass(frozen=True)
class Request:
    """The checked arguments of a call."""

    config: Config  # with the size that was asked for
    prompts: list[str]  # one a video
    seeds: list[int]
    lengths: list[int]  # chunks
    schedule: Schedule
    conditioning: np.ndarray | None  # uint8 [T, H, W, 3] that all of them begin with


class DiagonalPipeline:
    """A student, a codec, a text encoder, and the schedule that they run by."""

    def __init__(self, config: Config, student: Student, codec: Codec, text_encoder: TextEncoder):
        self.config = config
        self.session = StreamSession.from_config(config, student, codec, text_encoder)
        self.geometry, self._schedule = self.session.geometry, self.session.schedule
        self.card: Mapping[str, Any] = {}  # what is known of the student's training
        self._loras = LoraAdapters(student.model)
        self.conditioning_warnings: list[str] = []  # of the picture or clip that was encoded last
        self._resized: StreamSession | None = None  # of the last call that asked for another size
        self._progress_bar: dict[str, Any] = {}

    # --- from files, and into them ------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
        *overrides: str,
        dtype: torch.dtype | None = None,
        local_rank: int = 0,
        **absent: Any,
    ) -> "DiagonalPipeline":
        """A pipeline from a folder that `save_pretrained` has written; it is on the GPU at once where there is one.

        overrides: settings as on the command line, "device=cpu" or "inference.text_encoder=stream".
        dtype: of the networks; None = bfloat16 on a GPU that has it, else float32.
        UserError for a folder that is not whole, and as `from_config`. Nothing is fetched: folders only.
        """
        refuse(absent, ("dtype", "local_rank"))
        folder = Path(folder).expanduser()
        if not (folder / PIPELINE).is_file():
            what = f"has no {PIPELINE}" if folder.is_dir() else "is no folder here, and nothing is fetched"
            raise UserError(
                f"folder={shown(folder)} {what}; give one that save_pretrained has written, or use from_config"
            )
        if dtype is not None:
            overrides = (*overrides, f"inference.precision={precision_of(dtype)}")
        return cls.from_config(folder, *overrides, local_rank=local_rank)

    @classmethod
    def from_config(
        cls, config: str | os.PathLike | Config, *overrides: str, local_rank: int = 0
    ) -> "DiagonalPipeline":
        """The pipeline that `config` describes. overrides: as on the command line, "schedule.steps=5432222".

        local_rank: the GPU to use where there are several, or the group of as many as share a stream.
        Sets torch's number of CPU threads (`cpu_threads`). Raises UserError where a file is missing or does not fit,
        or a setting is wrong.
        """
        if not isinstance(config, Config):
            config = load_config(config, overrides)
        elif overrides:
            raise ValueError("overrides go with a path; use dataclasses.replace on a Config")
        device = pick_device(config.device, local_rank * config.inference.sequence_parallel)
        set_threads(config.cpu_threads)
        dtype = pick_dtype(config.inference.precision, device)
        FastPlan.from_config(config.inference, device)  # refuses what cannot be before anything is loaded
        names, places = config.model, config.inference
        student = load_student(names.student, load_device(places.student, device), dtype, use_ema=names.use_ema)
        loras = load_loras(student, names)
        text = load_text_encoder(
            names.text_encoder, names.tokenizer, names.text_tokens, text_load_device(places, device), dtype
        )
        codec = load_codec(names, device, dtype)
        pipe = cls.from_parts(config, student, codec, text, device)
        pipe._loras, pipe.card = loras, student.card
        warn_of_schedule(pipe.schedule, student.card)
        for text in size_warnings(config, student.card):
            log.warning(text)
        return pipe

    @classmethod
    def from_parts(
        cls, config: Config, student: CausalWanModel, codec: Codec, text: TextEncoder, device: torch.device
    ) -> "DiagonalPipeline":
        """A pipeline of loaded networks, placed and optimized as `inference` says."""
        places, plan = config.inference, FastPlan.from_config(config.inference, device)
        if places.attention != "auto":  # which leaves to torch what `plan` does not make fast
            set_attention(student, places.attention)
        if places.student == "stream":
            BlockOffload(student, device)
        codec.decode_frames = places.decode_frames
        return cls(config, *build_student(config, student, codec, plan, device), place_text(text, places, device))

    @property
    def loras(self) -> LoraAdapters:
        """Adapters that are not merged. Raises UserError if several GPUs share a stream, which need merged ones."""
        size = self.config.inference.sequence_parallel
        if size > 1:
            raise UserError(f"inference.sequence_parallel={size} keeps adapters as they are; name them in model.lora")
        return self._loras

    def close(self) -> None:
        """End the other processes where several GPUs share a stream; they end with this one, too."""
        if isinstance(self.session.student, ParallelStudent):
            self.session.student.close()

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write all that the pipeline is made of to a new or empty folder, which `from_pretrained` reads.

        Weights are those that the pipeline holds, adapters merged. Saved and loaded, it gives the same frames bit by
        bit. UserError where the folder holds anything, and where weights are held in 8 bits or under adapters.
        """
        names = self.config.model
        merged = [{"file": Path(path).name} for path in names.lora] if names.lora_merge else []
        card = dict(self.card) | ({"merged_lora": merged} if merged else {})
        networks = {name: plain(part) for name, part in self.components.items() if isinstance(part, nn.Module)}
        settings = settings_of(self.config, self.schedule)
        save_folder(folder, networks, self.session.text_encoder.tokenizer, settings, card)

    # --- components and devices ---------------------------------------------------------------------------------------

    @property
    def components(self) -> dict[str, Any]:
        """The networks (transformer, vae or tiny_decoder, text_encoder), the tokenizer and the schedule."""
        codec, text = self.session.codec, self.session.text_encoder
        pixels = {"vae": codec.vae} if isinstance(codec, WanCodec) else {"tiny_decoder": codec.decoder}
        words = {"text_encoder": text.encoder, "tokenizer": text.tokenizer}
        return {"transformer": self.session.student.model, **pixels, **words, "schedule": self.schedule}

    @property
    def schedule(self) -> Schedule:
        """The timesteps of each chunk. It can be set to anything that `schedule=` takes."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Any) -> None:
        self._schedule = self.session.schedule = as_schedule(schedule, self.config)
        warn_of_schedule(self.schedule, self.card)

    @property
    def scheduler(self) -> None:
        """Does not exist: a student is trained for its steps, which `schedule` holds."""
        raise AttributeError("a pipeline of this kind has no scheduler; use pipe.schedule")

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        raise UserError(
            f"scheduler={type(scheduler).__name__} has no effect: a student makes the steps that it was trained for; "
            f'set pipe.schedule = "4322222", a preset, or timesteps'
        )

    @property
    def device(self) -> torch.device:
        """The device of the student."""
        return self.session.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the student."""
        return self.session.dtype

    def to(
        self, device: str | torch.device | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> "DiagonalPipeline":
        """Move all networks, and return the pipeline itself.

        dtype: of the networks; None = what `inference.precision` means on that device.
        UserError for a device that does not exist here, and where weights are held in 8 bits or under adapters.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        there, precision = self.device if device is None else pick_device(str(device)), self.config.inference.precision
        if dtype is not None:
            precision = precision_of(dtype)
        if (there, pick_dtype(precision, there)) != (self.device, self.dtype):
            inference = replace(self.config.inference, precision=precision)
            self._place(replace(self.config, device=str(there), inference=inference))
        return self

    def enable_model_cpu_offload(self, device: str | torch.device | None = None) -> None:
        """Keep the text encoder on the host between prompts (inference.text_encoder=after_use).

        Student and codec stay on the GPU: they take turns at every chunk.
        device: None = the pipeline's GPU; of one on the CPU, the GPU if there is one.
        """
        self._offload(device, text_encoder="after_use")

    def enable_group_offload(self, onload_device: str | torch.device | None = None) -> None:
        """Keep student and text encoder on the host, a block at a time on the GPU (inference.student=stream).

        onload_device: as `device` of `enable_model_cpu_offload`.
        """
        self._offload(onload_device, student="stream", text_encoder="stream")

    def _offload(self, device: str | torch.device | None, **places: str) -> None:
        there = device or ("auto" if self.device.type == "cpu" else self.device)
        inference = replace(self.config.inference, **places)
        self._place(replace(self.config, device=str(there), inference=inference))

    def _place(self, config: Config) -> None:
        """Rebuild the pipeline for `config` with the existing weights."""
        if config.inference.sequence_parallel > 1:
            raise UserError(
                f"inference.sequence_parallel={config.inference.sequence_parallel} keeps networks where they are; "
                "load the pipeline with device and precision as settings"
            )
        device, places, parts = pick_device(config.device), config.inference, self.components
        dtype, words = pick_dtype(places.precision, device), self.session.text_encoder
        FastPlan.from_config(places, device)
        student = plain(parts["transformer"], load_device(places.student, device), dtype)
        encoder = plain(parts["text_encoder"], text_load_device(places, device), dtype)
        if "vae" in parts:
            codec = WanCodec(plain(parts["vae"], device, dtype))
        else:
            decoder = plain(parts["tiny_decoder"], device, torch.float32)
            codec = TinyDecoderCodec(cast_to_best_dtype(decoder, dtype))
        text = TextEncoder(encoder, words.tokenizer, words.text_tokens)
        self.config, self.session = config, self.from_parts(config, student, codec, text, device).session
        self.session.schedule = self.schedule
        self._resized, self._loras = None, LoraAdapters(self.session.student.model)

    # --- videos -------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: str | Sequence[str],
        seed: Seeds = None,
        num_frames: Frames = None,
        *,
        generator: Generators = None,
        height: int | None = None,
        width: int | None = None,
        num_videos_per_prompt: int = 1,
        image: Picture | None = None,
        video: Clip | None = None,
        schedule: Any = None,
        output_type: str = "np",
        callback_on_chunk_end: OnChunkEnd | None = None,
        **absent: Any,
    ) -> DiagonalPipelineOutput:
        """Videos of `prompt`, or of each in a list, made as one batch.

        Args:
            seed: of the first video of each prompt, or a list of one a prompt; None = as configured (0), -1 draws one.
            num_frames: pixel frames of a video (81, not 21), or a list of one a prompt; None = as configured.
            generator: draws the seeds instead; or a list of one a video.
            height, width: pixels; None = as configured.
            num_videos_per_prompt: each has a seed of its own, which `Video.seed` tells.
            image, video: what the videos begin with, a file or pixels; its frames count and come first.
            schedule: instead of the pipeline's: a preset, steps a chunk ("432", [4, 3, 2]), timesteps, or a Schedule.
            output_type: of `output.frames`: np, pil, pt, or latent, with which nothing is decoded.
            callback_on_chunk_end: called as callback(pipe, chunk, {"latents": Tensor [B, f, C, h, w], "frames": a list
                of uint8 [T, H, W, 3] of each video}); an exception in it ends the call.

        UserError for what is wrong, and for arguments of diffusers that a distilled student has no use for.
        """
        refuse(absent, list(inspect.signature(self.__call__).parameters)[:-1])
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type={shown(output_type)} is unknown; use one of {', '.join(OUTPUT_TYPES)}")
        if not (callback_on_chunk_end is None or callable(callback_on_chunk_end)):
            raise UserError(f"callback_on_chunk_end={shown(callback_on_chunk_end)} cannot be called; give a function")
        asked = self._request(
            prompt, seed, num_frames, generator, height, width, num_videos_per_prompt, image, video, schedule
        )
        parts: list[list[np.ndarray]] = [[] for _ in asked.prompts]
        latents: list[list[Tensor]] = [[] for _ in asked.prompts]
        timings, decode = [], output_type != "latent"
        with progress_bar(asked.prompts[0], max(asked.lengths), "chunk", **self._progress_bar) as bar:
            for result in self._results(asked, decode=decode):
                frames = self._frames(result)
                for i in (i for i, active in enumerate(result.active) if active):
                    parts[i].append(frames[i])
                    if not decode:
                        latents[i].append(result.latents[i])
                timings.append(result.timings)
                bar.update()
                if callback_on_chunk_end is not None:
                    callback_on_chunk_end(self, result.chunk, {"latents": result.latents, "frames": frames})
        if not decode:
            return DiagonalPipelineOutput([], output_type, [torch.cat(own).transpose(0, 1) for own in latents])
        videos = [
            Video(
                np.concatenate(own), self.config.video.fps, text, one_seed, timings, self.warnings([text], asked.config)
            )
            for own, text, one_seed in zip(parts, asked.prompts, asked.seeds, strict=True)
        ]
        return DiagonalPipelineOutput(videos, output_type)

    def stream(
        self,
        prompt: str | Sequence[str],
        seed: Seeds = None,
        num_frames: Frames = None,
        *,
        generator: Generators = None,
        height: int | None = None,
        width: int | None = None,
        image: Picture | None = None,
        video: Clip | None = None,
        schedule: Any = None,
        **absent: Any,
    ) -> Iterator[np.ndarray | list[np.ndarray]]:
        """Yield each chunk's frames as soon as they are decoded: uint8 `[T, H, W, 3]`, T = 9 and then 12 at a time.

        Arguments as for the call. A list of prompts runs as one batch and yields lists, in which a video that has
        ended gives no frames (T = 0).
        """
        refuse(absent, list(inspect.signature(self.stream).parameters)[:-1])
        asked = self._request(prompt, seed, num_frames, generator, height, width, 1, image, video, schedule)
        batches = (self._frames(result) for result in self._results(asked))
        return (frames[0] for frames in batches) if isinstance(prompt, str) else batches

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Arguments of tqdm for the bar that counts chunks: disable=True; disable=False where there is no terminal."""
        refuse(settings, list(inspect.signature(tqdm.__init__).parameters)[1:-1])
        self._progress_bar = settings

    def _request(
        self,
        prompt: Any,
        seed: Any,
        num_frames: Any,
        generator: Any,
        height: Any,
        width: Any,
        samples: Any,
        image: Picture | None,
        video: Clip | None,
        schedule: Any,
    ) -> Request:
        """The arguments of a call, checked."""
        prompts, samples = as_prompts(prompt), whole("num_videos_per_prompt", samples, 1, MAX_VIDEOS)
        sides = {
            name: whole(name, value, 1, MAX_SIDE)
            for name, value in (("height", height), ("width", width))
            if value is not None
        }
        config = replace(self.config, video=replace(self.config.video, **sides))
        Geometry.from_config(config)
        lengths = [self.num_chunks(n) for n in as_lengths(num_frames, len(prompts), samples, self.num_pixel_frames)]
        rows = self.schedule
        if schedule is not None:
            rows = as_schedule(schedule, self.config)
            warn_of_schedule(rows, self.card)
        seeds = as_seeds(seed, generator, len(prompts), samples, self.config.seed)
        length = min(lengths) * self.geometry.chunk_frames
        pixels = read_conditioning(config, image, video, length, names=("image", "video"))
        return Request(config, [text for text in prompts for _ in range(samples)], seeds, lengths, rows, pixels)

    def _session(self, config: Config) -> StreamSession:
        """A session with the size in `config`; the last one with another size than the pipeline's is kept."""
        size, networks = (config.video.height, config.video.width), self.session
        for session in (self.session, self._resized):
            if session is not None and (session.geometry.height, session.geometry.width) == size:
                return session
        self._resized = StreamSession.from_config(config, networks.student, networks.codec, networks.text_encoder)
        return self._resized

    def _results(self, asked: Request, *, decode: bool = True) -> Iterator[ChunkResult]:
        """Chunks as they arrive."""
        session, self.conditioning_warnings = self._session(asked.config), []
        conditioning = None if asked.conditioning is None else self.encode(asked.conditioning)
        self._warn(asked.prompts, size_warnings(asked.config, self.card) if asked.config != self.config else [])
        session.schedule = asked.schedule
        chunks = session.play(asked.prompts, asked.seeds, asked.lengths, conditioning, decode=decode)
        try:
            yield from self._arrived(chunks)
        finally:
            if session.schedule is asked.schedule:  # no later call has set its own
                session.schedule = self.schedule

    @property
    def num_pixel_frames(self) -> int:
        """Of a clip as configured."""
        return pixel_frames(self.config.video.num_latent_frames)

    def num_chunks(self, num_frames: int | None = None) -> int:
        """Chunks of a clip of `num_frames` pixel frames (None: as configured). UserError where they do not fit."""
        if num_frames is None:
            return self.geometry.num_chunks(self.config.video.num_latent_frames)
        chunk = self.geometry.chunk_frames
        more = TEMPORAL_STRIDE * chunk
        chunks = max(1, (num_frames + TEMPORAL_STRIDE - 1) // more)
        fits = pixel_frames(chunks * chunk)
        if fits != num_frames:
            raise UserError(
                f"num_frames={num_frames} is not a whole number of chunks, which have {pixel_frames(chunk)} frames and "
                f"then {more} each; try {fits} or {fits + more}"
            )
        return chunks

    def encode(self, pixels: np.ndarray) -> Tensor:
        """Latents [1, F, C, h, w] of what `read_conditioning` has read, uint8 [T, H, W, 3]."""
        codec, (height, width) = self.session.codec, pixels.shape[1:3]
        geometry = replace(self.geometry, height=height, width=width)
        latents = encode_conditioning(codec, pixels, geometry, self.session.device)
        tiny_codec = codec if self.session.text_encoder.known_words else None
        self.conditioning_warnings = conditioning_warnings(self.card, pixels[0], latents, tiny_codec)
        for text in self.conditioning_warnings:
            log.warning(text)
        return latents

    def prompt_warnings(self, prompt: str) -> list[str]:
        """Sentences that say which parts of `prompt` the model does not see; [] where it sees all."""
        return prompt_warnings(self.session.text_encoder, prompt)

    def warnings(self, prompts: Sequence[str], config: Config | None = None) -> list[str]:
        """Sentences that say what a video of these prompts, at the size of `config` (None: the pipeline's) and from
        the last start, may not do well."""
        seen = [text for prompt in prompts for text in self.prompt_warnings(prompt)]
        return [*size_warnings(config or self.config, self.card), *self.conditioning_warnings, *dict.fromkeys(seen)]

    def _warn(self, prompts: Sequence[str], more: Sequence[str] = ()) -> None:
        seen = [text for prompt in prompts for text in self.prompt_warnings(check_prompt(prompt))]
        for text in dict.fromkeys([*more, *seen]):
            log.warning(text)

    def stream_story(
        self, story: Story, seed: int, num_chunks: int | None, conditioning: Tensor | None = None
    ) -> Iterator[tuple[list[np.ndarray], dict[str, float]]]:
        """A chunk's frames and the seconds that its parts took, for one video of prompts that follow one another.

        num_chunks: None = without end. conditioning: latents that it begins with.
        """
        self._warn(story.prompts)
        self.session.schedule = self.schedule
        for result in self._arrived(play_story(self.session, story, seed, num_chunks, conditioning)):
            yield self._frames(result), result.timings

    def _arrived(self, results: Iterator[ChunkResult]) -> Iterator[ChunkResult]:
        ahead = int(self.session.async_decoder.overlap)  # one more chunk is queued than is waited for
        for result in prefetch(results, ahead):
            yield result.wait()

    @staticmethod
    def _frames(result: ChunkResult) -> list[np.ndarray]:
        """uint8 [T, H, W, 3] of each video; T = 0 of one that has ended."""
        frames = result.frames.numpy()
        return [own if active else own[:0] for own, active in zip(frames, result.active, strict=True)]
