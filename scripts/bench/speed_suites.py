"""Variants of the suites of `scripts/benchmark.py`, by importance; the last ones may be skipped for lack of time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

FULL = "configs/wan2.1_t2v_1.3b.yaml"
TINY = "configs/tiny.yaml"
FAST = ("model.codec=taehv",)
EAGER = ("inference.compile=off", "inference.cuda_graphs=off")
PLAIN_ATTENTION = ("inference.attention=sdpa",)


@dataclass(frozen=True)
class Variant:
    """One row. standard: the latents equal those of the reference up to rounding, so the difference is reported."""

    name: str
    settings: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of the command line, by name
    config: str = FULL
    standard: bool = True
    reference: bool = False
    against: str = ""  # variant whose latents are compared instead of those of the reference


def _full(
    name: str,
    *settings: str,
    standard: bool = True,
    reference: bool = False,
    against: str = "",
    **arguments: Any,
) -> Variant:
    arguments = {"random_weights": True, "network": "1.3B"} | arguments
    return Variant(name, (*FAST, *settings), arguments, standard=standard, reference=reference, against=against)


def _tiny(name: str, *settings: str, **rest: Any) -> Variant:
    arguments = {"random_weights": True, "network": "tiny", "repeats": 1}
    return Variant(name, ("video.num_latent_frames=6", *settings), arguments, TINY, **rest)


H100 = (
    _full("bf16"),  # first, so that the time since the start of the process is that of a cold start
    _full("eager", *EAGER, *PLAIN_ATTENTION, repeats=2, reference=True),
    _full("fp8 by row", "inference.precision=fp8"),
    _full("fp8 linears alone", "inference.precision=fp8_linears"),
    _full("bf16 with cuDNN", "inference.attention=cudnn"),
    _full("no graphs", "inference.cuda_graphs=off", repeats=3),
    _full("decode not beside", "inference.overlap=false", repeats=3),
    _full("Wan VAE", "model.codec=wan", repeats=3),
    _full("5432222", "schedule.steps=5432222", standard=False, repeats=3),
    Variant(
        "35 NFE",
        ("model.codec=taehv",),
        {"random_weights": True, "network": "1.3B", "repeats": 2},
        config="configs/self_forcing.yaml",
        standard=False,
    ),
    _full("2 streams", batch=2, standard=False, repeats=3),
    _full("4 streams", batch=4, standard=False, repeats=3),
    _full("720p", "video.height=720", "video.width=1280", standard=False, repeats=3),
    _full("Wan VAE eager", "model.codec=wan", *EAGER, *PLAIN_ATTENTION, repeats=2),
    _full("text encoding", text=True, repeats=1),
)
FP8, TWO = "inference.precision=fp8", "inference.sequence_parallel=2"


def _pair(network: str, name: str, *settings: str) -> tuple[Variant, Variant]:
    """One stream on one GPU and on two."""
    case = {"network": network, "repeats": 2, "standard": False}
    one, two = f"{network} {name}", f"{network} {name} on 2 GPUs"
    return _full(one, *settings, **case), _full(two, *settings, TWO, against=one, **case)


def _precisions(network: str) -> Iterator[Variant]:
    """bfloat16, and what can be float8; latents are compared with those of bfloat16."""
    case, plain = {"network": network, "repeats": 2, "standard": False}, f"{network} bf16"
    yield _full(plain, **case)
    for name in ("fp8", "fp8_attention", "fp8_linears"):
        yield _full(f"{network} {name}", f"inference.precision={name}", against=plain, **case)


# the difference that another kernel makes in bfloat16
OTHER_KERNEL = _full(
    "1.3B bf16 with cuDNN", "inference.attention=cudnn", standard=False, against="1.3B bf16", repeats=1
)
TWO_GPUS = (
    *_pair("14B", "fp8", FP8),
    *_pair("14B", "bf16"),
    *_pair("1.3B", "fp8", FP8),
    *_pair("1.3B", "bf16"),
    OTHER_KERNEL,
)
PRECISIONS = (*_precisions("14B"), *_precisions("1.3B"), OTHER_KERNEL)
CPU = (
    _tiny("plain", reference=True),
    _tiny("compiled", "inference.compile=blocks"),
    _tiny("5432222", "schedule.steps=5432222", standard=False),
    _tiny("fp8", "inference.precision=fp8"),
    _tiny("2 processes", "inference.sequence_parallel=2"),
)
SUITES: dict[str, tuple[Variant, ...]] = {"h100": H100, "two_gpus": TWO_GPUS, "precisions": PRECISIONS, "cpu": CPU}
