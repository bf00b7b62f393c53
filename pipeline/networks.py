"""Loads the networks of a pipeline, places them as `inference` says, and optimizes them."""

import torch
from diffusers import WanTransformer3DModel

from configs.errors import UserError, shown
from configs.geometry import Geometry
from configs.schema import Config, InferenceConfig, ModelConfig
from model.causal_wan import CausalWanModel
from model.codec import Codec, WanCodec
from model.denoiser import Student
from model.fast.codec import optimize_codec
from model.fast.int8 import quantize_linears
from model.fast.offload import OffloadedTextEncoder
from model.fast.student import FastPlan, optimize_student
from model.text import TextEncoder
from model.tiny_decoder import TinyDecoderCodec, cast_to_best_dtype
from model.weights.load import load_tiny_decoder, load_vae
from model.weights.lora import LoraAdapters, plan_lora
from pipeline.sequence_parallel import SETTING, ParallelStudent, SequenceRanks, rank_devices
from utils.device import DTYPES


def precision_of(dtype: torch.dtype) -> str:
    """What `inference.precision` calls `dtype`."""
    names = [name for name, known in DTYPES.items() if known == dtype]
    if not names:
        raise UserError(f"dtype={shown(dtype)} is not a dtype of networks; use torch's {', '.join(DTYPES)}")
    return names[0]


def load_loras(student: WanTransformer3DModel, config: ModelConfig) -> LoraAdapters:
    """Put the adapters that `model.lora` names on `student`; with `model.lora_merge` they go into its weights."""
    loras = LoraAdapters(student)
    shapes = {name: tuple(value.shape) for name, value in student.state_dict().items()}
    scales = config.lora_scales or [1.0] * len(config.lora)
    for i, (path, scale) in enumerate(zip(config.lora, scales, strict=True)):
        # in float32 where they are added once, so that only their sum is rounded
        loras.add(plan_lora(path, shapes), scale, f"lora_{i}", torch.float32 if config.lora_merge else None)
    if config.lora and config.lora_merge:
        loras.merge_and_unload()
    return loras


def load_device(place: str, device: torch.device) -> torch.device:
    """The device that a network is loaded to, by its place in `inference`."""
    return device if place == "keep" else torch.device("cpu")


def text_load_device(config: InferenceConfig, device: torch.device) -> torch.device:
    """The device that the text encoder is loaded to: the host if it is to be quantized, a layer at a time."""
    return load_device("stream" if config.text_int8 else config.text_encoder, device)


def place_text(text: TextEncoder, config: InferenceConfig, device: torch.device) -> TextEncoder:
    """The text encoder, quantized and placed as `config` says."""
    place = config.text_encoder
    if config.text_int8:
        quantize_linears(text.encoder.encoder, device, load_device(place, device))
    return text.to(device) if place == "keep" else OffloadedTextEncoder(text, device, stream=place == "stream")


def load_codec(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Codec:
    """The codec that `model.codec` names, beside a student of `dtype`."""
    if config.codec == "taehv":
        return TinyDecoderCodec(cast_to_best_dtype(load_tiny_decoder(config.tiny_decoder, device), dtype))
    return WanCodec(load_vae(config.vae, device, dtype))


def build_student(
    config: Config, model: CausalWanModel, codec: Codec, plan: FastPlan, device: torch.device
) -> tuple[Student, Codec]:
    """Student and codec, optimized in place by `plan`; the student on all GPUs that share a stream."""
    size, attention = config.inference.sequence_parallel, config.inference.attention
    if size == 1:
        return apply_fast_plan(Student(model), codec, plan)
    Geometry.from_config(config).for_network(model.config).check_shares(SETTING, size)
    devices = rank_devices(device, size)
    ranks = SequenceRanks(model, devices, None if plan.is_noop else plan, None if attention == "auto" else attention)
    student, codec = apply_fast_plan(Student(model), codec, plan)
    return ParallelStudent(student, ranks), codec


def apply_fast_plan(student: Student, codec: Codec, plan: FastPlan) -> tuple[Student, Codec]:
    """Student and codec, optimized in place by `plan`; on a CPU the VAE's decoder in any case."""
    if plan.is_noop:
        vae = isinstance(codec, WanCodec) and codec.vae.device.type == "cpu"  # 1.4 times as fast: fewer copies
        return student, optimize_codec(codec, compiled=False) if vae else codec
    return optimize_student(student, plan), optimize_codec(codec, compiled=plan.compile)
