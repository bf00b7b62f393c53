"""Tiny random networks of our own shapes: nothing here needs the shipped weights."""

import gc
import json
import logging
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel
from weight_layouts import causal_twin, original, random_t5, random_wan

from configs.geometry import Geometry
from model.causal_wan import CausalWanModel
from model.denoiser import Student
from model.text import TextEncoder, word_tokenizer
from trainer import loop

ROOT = Path(__file__).resolve().parents[1]
# a test may take cases and fixtures from another folder's tests
sys.path += [str(folder) for folder in sorted((ROOT / "tests").rglob("*")) if list(folder.glob("test_*.py"))]
# the tests themselves may run where these are ignored, under nohup or in the background, and children inherit that
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)
WORDS = "a red green blue circle square triangle moves left right up down slowly quickly".split()
TEXT_TOKENS = 12
# About one run in 200 of two ranks over gloo ends with SIGABRT out of torch (2.13; glibc finds its heap damaged, or a
# thread outlives the interpreter). Such a run is repeated; whatever else goes wrong fails at once.
SEVERAL_RANKS = pytest.mark.flaky(reruns=2, only_rerun=["SIGABRT"])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first: of several processes each runs whole files, and none should begin a long one last."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def reserved_port() -> socket.socket:
    """A socket that keeps a free port, so that the system gives it to no other program until one that a test starts
    binds it with SO_REUSEADDR."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    return held


def alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether decoded videos [T, H, W, 3] have equal frames."""
    return np.array_equal(a, b)


def network_config(name: str) -> dict:
    return json.loads((ROOT / "configs" / "networks" / f"{name}.json").read_text())


def random_student(layers: int = 2, seed: int = 0) -> Student:
    torch.manual_seed(seed)
    config = network_config("tiny_transformer") | {"num_layers": layers, "ffn_dim": 128}
    return Student(CausalWanModel.from_config(config).eval().requires_grad_(False))


def random_vae() -> AutoencoderKLWan:
    torch.manual_seed(1)
    config = network_config("tiny_vae") | {"base_dim": 4, "decoder_base_dim": 4}
    return AutoencoderKLWan.from_config(config).eval().requires_grad_(False)


def random_text_encoder() -> TextEncoder:
    torch.manual_seed(2)
    encoder = UMT5EncoderModel(UMT5Config(**network_config("tiny_text_encoder"))).eval().requires_grad_(False)
    return TextEncoder(encoder, word_tokenizer(WORDS), TEXT_TOKENS)


@pytest.fixture(scope="session", autouse=True)
def short_trainings_begin_at_once():
    """Without the scan for garbage before their second step, which takes as long as several of their steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "freeze_garbage", gc.freeze)
        yield


@pytest.fixture(autouse=True)
def logging_as_it_was():
    """Our loggers as before the test, which may have called an entry point that sets them for the terminal."""
    root = logging.getLogger("diagonal")
    before = root.handlers, root.propagate, root.level
    yield
    root.handlers, root.propagate, level = before
    root.setLevel(level)


@pytest.fixture(scope="session")
def tiny_geometry() -> Geometry:
    """32x48 pixels: latents 4x6, 6 tokens a frame; chunks of 3 frames, a window of 4 chunks, one of them the sink."""
    return Geometry(height=32, width=48)


@pytest.fixture(scope="session")
def tiny_student() -> Student:
    """Two layers, random weights; do not change it."""
    return random_student()


@pytest.fixture(scope="session")
def tiny_vae() -> AutoencoderKLWan:
    return random_vae()


@pytest.fixture(scope="session")
def tiny_text_encoder() -> TextEncoder:
    return random_text_encoder()


@pytest.fixture(scope="session")
def tiny_assets(tmp_path_factory, tiny_student, tiny_vae, tiny_text_encoder) -> Path:
    """A folder of random weights in our format, with `tiny.yaml` that names them: student, vae, text_encoder."""
    folder = tmp_path_factory.mktemp("assets")
    tiny_student.model.save_pretrained(folder / "student")
    (folder / "student" / "card.json").write_text(json.dumps({"stage": "test", "step": 0}))
    tiny_vae.save_pretrained(folder / "vae")
    tiny_text_encoder.encoder.save_pretrained(folder / "text_encoder")
    tiny_text_encoder.tokenizer.save_pretrained(folder / "text_encoder")
    (folder / "prompts.txt").write_text("a red circle moves right\na blue square moves up\n")
    config = f"""
base: {ROOT / "configs" / "tiny.yaml"}
device: cpu
video: {{height: 32, width: 48, num_latent_frames: 6}}
model:
  student: {folder / "student"}
  vae: {folder / "vae"}
  text_encoder: {folder / "text_encoder"}
  tokenizer: {folder / "text_encoder"}
  text_tokens: {TEXT_TOKENS}
inference:
  prompts: {folder / "prompts.txt"}
"""
    (folder / "tiny.yaml").write_text(config)
    return folder


@pytest.fixture(scope="session")
def wan():
    """Two layers of width 128 in Wan's shapes, random in every parameter; do not change it."""
    return random_wan()


@pytest.fixture(scope="session")
def wan_state(wan) -> dict[str, torch.Tensor]:
    """Its tensors under original Wan names."""
    return original(wan)


@pytest.fixture
def student(wan) -> CausalWanModel:
    """A causal student with the weights of `wan`."""
    return causal_twin(wan)


@pytest.fixture(scope="session")
def t5() -> UMT5EncoderModel:
    return random_t5()
