"""Checks before weights are loaded: machine, disk, weights, prompts, schedule, batch, memory. Needs no torch.

`scripts/doctor.py` prints them within a second; inference and training stop if one fails.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from configs.errors import UserError
from configs.geometry import Geometry
from configs.schema import FP8, Config
from model.encoded_manifest import read_manifest
from model.memory import GPU_SIZES_GIB, MemoryPlan, adapter_parameters, distill_plan, inference_plan
from model.schedule import Schedule
from model.sizes import WAN_14B, TransformerSize, size_in_name
from model.weights.files import read_json, resolve_path
from model.weights.inspection import WeightInfo, inspect_weights, required_weights
from model.weights.parts import TRANSFORMERS
from utils import machine
from utils.prompts import read_prompts

TORCH = ("2.11", "2.12", "2.13", "2.14")  # the range of setup.py
VIDEO_SPACE = 200_000_000  # bytes that must be free where videos go
ROLES_WITH_EMA = ("student",)
SIZED = ("student", "text_encoder")  # whose headers the memory plan needs

SMALL = (("inference", "text_encoder", "stream"), ("model", "codec", "taehv"))
# Settings of inference, each smaller than the one before it, by section and key.
SMALLER_SETTINGS: tuple[tuple[tuple[str, str, str | int], ...], ...] = (
    (),
    (("inference", "text_encoder", "after_use"),),
    (("inference", "text_encoder", "stream"),),
    (("inference", "text_encoder", "stream"), ("inference", "decode_frames", 2)),
    (("inference", "text_encoder", "stream"), ("inference", "decode_frames", 1)),
    SMALL,
    (*SMALL, ("inference", "student", "stream")),
    (*SMALL, ("inference", "student", "stream"), ("stream", "window_frames", 9)),
    (*SMALL, ("inference", "student", "stream"), ("stream", "window_frames", 6)),
)
GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class Report:
    """Lines (name, text) of the report, and the problems among them."""

    lines: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, text: str) -> None:
        self.lines.append((name, text))

    def add_problem(self, name: str, problem: str) -> None:
        self.lines.append((name, f"PROBLEM  {problem}"))
        self.problems.append(problem)

    def __str__(self) -> str:
        return "\n".join(f"{name:<14}{text}" for name, text in self.lines)


def check_environment(config: Config, *, training: bool = False, world: int | None = None) -> Report:
    """All checks. Problems are lines of the report. world: processes of a training run (None = number of GPUs)."""
    report, gpus = Report(), []
    try:
        gpus = machine.gpus()
    except UserError as error:
        report.add_problem("driver", str(error))
    _machine(report, gpus)
    if not training and config.inference.precision in FP8:
        _float8(report, config, gpus)
    _disk(report, Path(config.inference.output_folder), "videos")
    peeks = _weights(report, config, training)
    _prompts(report, config, training)
    _schedule(report, config)
    if training:
        _batch(report, config, world or max(1, len(gpus)))
    elif config.inference.sequence_parallel > 1:
        _sharing(report, config, len(gpus))
    _memory(report, config, peeks, training, gpus, world)
    return report


def _machine(report: Report, gpus: list[machine.Gpu]) -> None:
    version, cuda = machine.torch_build()
    built = f"CUDA {cuda}" if cuda else "CPU only"
    if not version:
        report.add_problem("torch", "torch is not installed; run `bash inference.sh` or install requirements.txt")
    elif not version.startswith(TORCH):
        report.add_problem("torch", f"torch {version} is not among those supported; install {', '.join(TORCH)}")
    else:
        report.add("torch", f"{version} ({built}), Python {machine.python_version()}")
    for i, gpu in enumerate(gpus):
        memory = "the host's memory"
        if gpu.memory is not None:
            memory = f"{machine.size_text(gpu.memory)} ({machine.size_text(gpu.free)} free)"
        report.add(f"GPU {i}", f"{gpu.name}, {memory}, sm {gpu.capability}, {gpu.driver}")
    if gpus and cuda and machine.driver_is_old(gpus[0].driver, cuda):
        report.add_problem(
            "driver", f"driver {gpus[0].driver} is too old for CUDA {cuda}; update it, or use another torch"
        )
    if gpus and version and not cuda:
        report.add_problem("driver", f"torch {version} is built for CPUs, so the GPU idles; install a build for CUDA")
    if not gpus and not report.problems:
        report.add("GPU", "none that a driver tells of; the CPU computes, which is for the tiny model only")
    report.add("attention", ", ".join(machine.kernels()))
    report.add("host memory", machine.size_text(machine.host_memory()))


def _float8(report: Report, config: Config, gpus: list[machine.Gpu]) -> None:
    """What is float8 on these GPUs."""
    precision = config.inference.precision
    if not gpus:
        report.add("float8", f"inference.precision={precision} needs a GPU of sm 8.9 or later; none is here")
        return
    known = [float(gpu.capability) for gpu in gpus if gpu.capability.replace(".", "", 1).isdecimal()]
    installed = "fa3" in machine.kernels() and config.inference.attention in ("auto", "fa3")
    flash3 = installed and all(9 <= capability < 10 for capability in known)
    if config.inference.fp8_linears and min(known, default=9.0) < 8.9:
        problem = f"inference.precision={precision} needs GPUs of sm 8.9 or later and one has {min(known)}"
        report.add_problem("float8", f"{problem}; use inference.precision=auto")
    elif precision == "fp8_attention" and not flash3:
        problem = f"inference.precision={precision} needs FlashAttention-3: a Hopper GPU and `pip install fa3-fwd`"
        report.add_problem("float8", f"{problem}; or use inference.precision=auto")
    else:
        both = "linears and self-attention" if flash3 else "linears, for want of FlashAttention-3 not self-attention"
        report.add("float8", {"fp8": both, "fp8_linears": "linears", "fp8_attention": "self-attention"}[precision])


def _disk(report: Report, folder: Path, what: str) -> None:
    free = machine.free_space(folder.expanduser())
    line = f"{machine.size_text(free)} free for {what} in {folder}"
    if free < VIDEO_SPACE:
        report.add_problem("disk", f"{line}, which is too little; make room or set inference.output_folder")
    else:
        report.add("disk", line)


def _weights(report: Report, config: Config, training: bool) -> dict[str, WeightInfo]:
    infos = {}
    for role, path, name in required_weights(config, training=training):
        try:
            use_ema = config.model.use_ema and role in ROLES_WITH_EMA and not training
            infos[role] = inspect_weights(role, path, use_ema=use_ema, name=name)
        except UserError as error:
            report.add_problem(role, str(error))
        else:
            report.add(role, f"{infos[role].path}, {machine.size_text(infos[role].size)}, {infos[role].kind}")
    return infos


def _prompts(report: Report, config: Config, training: bool) -> None:
    path, name = config.inference.prompts, "inference.prompts"
    if training:
        path, name = config.training.distill.prompts, "training.distill.prompts"
        if config.training.stage != "distill":
            return
        _encoded(report, config)
        if path is None:
            return
    try:
        prompts = read_prompts(resolve_path(path), name)
        report.add("prompts", f"{len(prompts):,} in {path}")
    except UserError as error:
        fetch = ", such as that of `python scripts/download.py prompts`" if training else ""
        report.add_problem("prompts", f"{error}{fetch}")


def _encoded(report: Report, config: Config) -> None:
    path = config.training.distill.encoded_prompts
    if path is None:
        return
    try:
        _, manifest = read_manifest(path, text_tokens=config.model.text_tokens)
        report.add("encoded", f"{sum(manifest.counts):,} prompts in {path}, {machine.size_text(sum(manifest.sizes))}")
    except UserError as error:
        report.add_problem("encoded", str(error))


def _schedule(report: Report, config: Config) -> None:
    try:
        geometry = Geometry.from_config(config)
        chunks = geometry.num_chunks(config.video.num_latent_frames)
        schedule = Schedule.from_config(config.schedule, config.stream)
    except UserError as error:
        report.add_problem("schedule", str(error))
        return
    for i, line in enumerate(schedule.table(chunks, geometry).splitlines()):
        report.add("schedule" if i == 0 else "", line)


def _batch(report: Report, config: Config, world: int) -> None:
    try:
        report.add("batch", config.training.accumulation(world)[1])
    except UserError as error:
        report.add_problem("batch", str(error))


def _sharing(report: Report, config: Config, gpus: int) -> None:
    """GPUs that share a stream."""
    degree = config.inference.sequence_parallel
    try:
        Geometry.from_config(config).check_shares("inference.sequence_parallel", degree)
        if 0 < gpus < degree:
            raise UserError(f"inference.sequence_parallel={degree} needs as many GPUs and there are {gpus}; lower it")
    except UserError as error:
        report.add_problem("one stream", str(error))
    else:
        report.add("one stream", f"its tokens are shared by {degree} GPUs")


# --- memory -----------------------------------------------------------------------------------------------------------


def memory_plan(
    config: Config, peeks: dict[str, WeightInfo], *, training: bool = False, world: int = 1
) -> MemoryPlan | None:
    """The memory plan of one GPU, with the sizes in the weights' headers, or Wan 2.1's if files are missing.

    None for a training stage for which there are no formulas.
    """

    def network(role: str, otherwise: TransformerSize) -> TransformerSize:
        fresh = config.training.init.get(role, "") if training else ""
        if fresh.endswith(".json"):
            return TransformerSize.from_config(read_json(f"training.init.{role}", resolve_path(fresh)))
        return peeks[role].network or otherwise if role in peeks else otherwise

    student = network("student", size_in_name(config.model.student))
    if not training:
        text = {"text_weights": peeks["text_encoder"].size} if "text_encoder" in peeks else {}
        return inference_plan(config, student, **text)
    if config.training.stage != "distill":
        return None
    teacher = network("teacher", WAN_14B)
    critic = network("critic", student if "critic" in config.training.init else teacher)  # where it starts from
    return distill_plan(config, student, teacher, critic, gpus=world)


def _memory(
    report: Report,
    config: Config,
    peeks: dict[str, WeightInfo],
    training: bool,
    gpus: list[machine.Gpu],
    world: int | None,
) -> None:
    world = world or max(1, len(gpus))
    plan = memory_plan(config, peeks, training=training, world=world)
    if plan is None:
        report.add("memory", f"no plan for stage {config.training.stage}")
        return
    head = f"by formulas, one GPU of {world}, bfloat16" if training else "by formulas, one GPU, bfloat16"
    if "student" not in peeks and not training:
        known = "14B" if size_in_name(config.model.student) is WAN_14B else "1.3B"
        head += f", in sizes of Wan2.1-{known} for want of files"
    report.add("memory", f"{head}: {machine.size_text(plan.peak.total)} at most ({plan.peak.name})")
    for line in plan.table().splitlines():
        report.add("", line)
    smallest = min((gpu.memory or machine.host_memory() for gpu in gpus), default=None)
    if smallest is not None and plan.peak.total > smallest:
        report.add_problem("memory", memory_problem(plan, smallest))
    fitting = largest_training if training else largest_inference
    for card in GPU_SIZES_GIB:
        report.add(f"{card} GiB card", fitting(config, peeks, card))


def memory_problem(plan: MemoryPlan, memory: int) -> str:
    """The error message for a plan that does not fit a GPU with `memory` bytes."""
    needed, there = machine.size_text(plan.peak.total), machine.size_text(memory)
    return f"{plan.peak.name} needs some {needed} and the GPU has {there}; `python scripts/doctor.py` says what fits"


def largest_inference(config: Config, peeks: dict[str, WeightInfo], card: int) -> str:
    """The settings with the smallest change from `config` that fit a GPU with `card` GiB."""
    for rung in SMALLER_SETTINGS:
        smaller = config
        for section, key, value in rung:
            smaller = replace(smaller, **{section: replace(vars(smaller)[section], **{key: value})})
        plan = memory_plan(smaller, peeks)
        if plan.fits(card):
            settings = " ".join(f"{section}.{key}={value}" for section, key, value in rung) or "as configured"
            return f"{settings} ({machine.size_text(plan.peak.total)})"
    return "too small"


def largest_training(config: Config, peeks: dict[str, WeightInfo], card: int) -> str:
    """The smallest number of GPUs with `card` GiB for the run, sharded and with precomputed prompt embeddings."""
    distill = replace(config.training.distill, encoded_prompts="ahead")
    sharded = replace(config, training=replace(config.training, sharding="full", distill=distill))
    for count in GPU_COUNTS:
        plan = memory_plan(sharded, peeks, training=True, world=count)
        if plan.fits(card):
            size = machine.size_text(plan.peak.total)
            return f"{count} or more, training.sharding=full, prompts encoded ahead ({size})"
    return f"not even {GPU_COUNTS[-1]} hold it"


# --- for inference.py and train.py ------------------------------------------------------------------------------------


def check_inference(config: Config, memory: int | None) -> None:
    """Raise a UserError if inference does not fit a GPU with `memory` bytes (None = no GPU).

    The formulas are accurate to a tenth, so the plan may exceed the memory by that. Weights: see `check_weights`.
    """
    if memory is None:
        return
    sized = [entry for entry in required_weights(config) if entry[0] in SIZED]
    plan = memory_plan(config, {role: inspect_weights(role, path, name=name) for role, path, name in sized})
    if plan.peak.total > 1.1 * memory:
        raise UserError(memory_problem(plan, memory))


def saved_bytes(config: Config, peeks: dict[str, WeightInfo]) -> tuple[int, int]:
    """Bytes of a checkpoint and of an export, from the sizes in the headers of the initial weights, as far as known.

    What is trained, a network or its adapters, is saved in float32 with AdamW's moments (one if the first beta is 0)
    and its EMA; an export has two bytes per parameter of the network.
    """
    t = config.training
    critic = peeks.get("critic", peeks.get("teacher"))
    trained = [(peeks.get("student"), t.distill.lora.student_rank if t.stage == "distill" else 0, t.optimizer, 1)]
    if t.stage == "distill":
        trained.append((critic, t.distill.lora.critic_rank, t.distill.critic_optimizer, 0))
    checkpoint = export = 0
    for info, rank, optimizer, averaged in trained:
        if info is not None and info.network is not None:
            moments = 2 if optimizer.betas[0] else 1
            count = adapter_parameters(info.network, rank) or info.network.parameters
            checkpoint += 4 * (1 + moments + averaged) * count
            export += averaged * 2 * info.network.parameters
    return checkpoint, export


def check_room(config: Config, logdir: Path, export: Path, there: int) -> None:
    """Raise a UserError if the disk is too small for the checkpoints and the export of a run.

    there: number of existing checkpoints. While one is written there is one more than `training.max_checkpoints`.
    """
    named = [entry for entry in required_weights(config, training=True) if entry[0] in TRANSFORMERS]
    peeks = {role: inspect_weights(role, path, name=name) for role, path, name in named}
    checkpoint, exported = saved_bytes(config, peeks)
    number = max(1, config.training.max_checkpoints + 1 - there)
    for folder, needed, what in (
        (logdir, number * checkpoint + exported, f"{number} checkpoints and an export"),
        (export, exported, "an export"),
    ):
        free = machine.free_space(folder)
        if free < needed:
            raise UserError(
                f"{folder} has {machine.size_text(free)} free and {what} take {machine.size_text(needed)}; make room, "
                f"choose another place, or set training.max_checkpoints lower"
            )


def check_training(config: Config, world: int, memory: int | None) -> None:
    """Raise a UserError, before weights are loaded, if files are missing, the batch cannot be divided among processes,
    or the run does not fit GPUs with `memory` bytes (None = no GPU)."""
    report = Report()
    peeks = {
        role: inspect_weights(role, path, name=name) for role, path, name in required_weights(config, training=True)
    }
    _batch(report, config, world)
    _prompts(report, config, training=True)
    plan = memory_plan(config, peeks, training=True, world=world)
    if plan is not None and memory is not None and plan.peak.total > 1.1 * memory:
        report.add_problem("memory", memory_problem(plan, memory))
    if report.problems:
        raise UserError(report.problems[0])
