"""Checks of the arguments of `DiagonalPipeline`, before anything is generated."""

import difflib
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from configs.errors import UserError, shown
from configs.schema import MAX_SEED
from utils.distributed import Ranks
from utils.logs import get_logger
from utils.prompts import check_prompt
from utils.seeds import LARGEST_DRAWN, RANDOM_SEED, resolve_seed, sample_seed

log = get_logger(__name__)

GUIDANCE = (
    "a distilled student has its teacher's guidance in its weights and makes one evaluation a step, without a second "
    "one to guide by; leave it out, and say in the prompt what is wanted"
)
STEPS = (
    "a distilled student is trained for the few steps of its schedule, which differ from chunk to chunk; give "
    'schedule="4322222", a preset, or timesteps'
)
# arguments of diffusers' Wan pipelines that do not exist here -> reason, and what to use
ABSENT = {
    "guidance_scale": GUIDANCE,
    "guidance_scale_2": GUIDANCE,
    "negative_prompt": GUIDANCE,
    "negative_prompt_embeds": GUIDANCE,
    "num_inference_steps": STEPS,
    "timesteps": STEPS,
    "sigmas": STEPS,
    "latents": "noise is a function of the seed, the chunk and the step; give seed or generator",
    "prompt_embeds": "the text encoder is part of the pipeline; give prompt",
    "max_sequence_length": "the student reads a fixed number of tokens; it is set as model.text_tokens",
    "callback_on_step_end": "a video is finished chunk by chunk; give callback_on_chunk_end",
    "callback_on_step_end_tensor_inputs": "callback_on_chunk_end gets latents and frames in any case; leave it out",
    "attention_kwargs": "attention takes no more arguments; kernels are chosen by inference.attention",
    "torch_dtype": "it is called dtype; give dtype=torch.bfloat16",
    "device_map": 'where networks are is a setting; give "device=cuda:1" after the folder',
    "variant": "a folder of ours holds one form of its weights; leave it out",
    "use_safetensors": "weights are safetensors in any case; leave it out",
    "return_dict": "the result is an object in any case; its frames are output.frames",
}


def refuse(given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise a UserError for unknown arguments. Arguments of diffusers may be None."""
    for name, value in given.items():
        if name in known or (name in ABSENT and value is None):
            continue
        if name in ABSENT:
            raise UserError(f"{name}={shown(value)} is not an argument here: {ABSENT[name]}")
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"{name} is not an argument; {hint}")


def whole(name: str, value: Any, low: int, high: int) -> int:
    """`value` as an integer in [low, high]."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise UserError(f"{name}={shown(value)} is {type(value).__name__}, not an integer; give one, {max(low, 1)}")
    if not low <= number <= high:
        raise UserError(f"{name}={shown(value)} is out of range; it must lie in [{low}, {high}]")
    return number


def as_prompts(prompt: Any) -> list[str]:
    """One prompt or several, as a list of at least one."""
    if isinstance(prompt, str):
        return [check_prompt(prompt)]
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        raise UserError(f"prompt={shown(prompt)} is {type(prompt).__name__}; give a text, or a list of texts")
    if not prompt:
        raise UserError("prompt=[] is an empty list; give one prompt at least")
    for one in prompt:
        if not isinstance(one, str):
            raise UserError(f"prompt={shown(prompt)} holds {shown(one)}, which is {type(one).__name__}; give texts")
    return [check_prompt(one) for one in prompt]


def as_seeds(seed: Any, generator: Any, prompts: int, samples: int, default: int) -> list[int]:
    """A seed for each video: `samples` of the first prompt, then those of the next.

    seed: of the first sample of all prompts, or a list of one a prompt; later samples have `sample_seed`. -1 draws one
    for each video. generator: draws the seeds, and advances; or a list of one a video. Without either: `default`.
    """
    if generator is not None:
        if seed is not None:
            raise UserError(f"seed={shown(seed)} and generator were both given; a video has one seed, so give one")
        return _drawn(generator, prompts * samples)
    several = isinstance(seed, list | tuple | range | np.ndarray)
    seeds = list(seed) if several else [default if seed is None else seed] * prompts
    if len(seeds) != prompts:
        raise UserError(f"{len(seeds)} seeds were given for {prompts} prompts; give one seed, or one a prompt")
    seeds = [whole("seed", one, RANDOM_SEED, MAX_SEED) for one in seeds]
    each = [one if one == RANDOM_SEED else sample_seed(one, i) for one in seeds for i in range(samples)]
    for i, one in enumerate(each):
        each[i] = resolve_seed(one, Ranks())
        if each[i] != one:
            log.info(f"seed {one}: drawn was {each[i]}")
    return each


def _drawn(generator: Any, videos: int) -> list[int]:
    generators = list(generator) if isinstance(generator, list | tuple) else [generator] * videos
    if not all(isinstance(one, torch.Generator) for one in generators):
        raise UserError(f"generator={shown(generator)} is none; give a torch.Generator, or a list of one a video")
    if len(generators) != videos:
        raise UserError(f"{len(generators)} generators were given for {videos} videos; give one, or one a video")
    return [int(torch.randint(LARGEST_DRAWN, (1,), generator=one, device=one.device)) for one in generators]


def as_lengths(num_frames: Any, prompts: int, samples: int, default: int) -> list[int]:
    """Pixel frames of each video; num_frames: one for all, one a prompt, or None for `default`."""
    if isinstance(num_frames, list | tuple):
        if len(num_frames) != prompts:
            raise UserError(f"{len(num_frames)} lengths were given for {prompts} prompts; give one, or one a prompt")
        return [n for one in num_frames for n in [whole("num_frames", one, 1, 400_000)] * samples]
    return [default if num_frames is None else whole("num_frames", num_frames, 1, 400_000)] * prompts * samples
