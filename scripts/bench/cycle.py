"""Timing of distillation by phase in one layout; scripts/benchmark_training.py starts it on every rank.

The stage is the one of training; its methods are wrapped to time the phases. On a GPU a phase is the time between two
events of the compute stream, including waiting for data of other ranks. `communication` profiles a step for the share
of waiting.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from safetensors.torch import save_file
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from configs.schema import Config
from model.memory import CONTEXT
from model.sizes import TransformerSize
from scripts.bench.host_peak import HostPeak
from scripts.bench.phase_timer import PhaseTimer
from scripts.bench.roofline import machine_of, sustained_peak
from scripts.bench.training_cost import BACKWARD, CRITIC, ROLLOUT, SCORE, STUDENT, TEACHER, DistillCost
from trainer.distill.stage import Distill
from trainer.loop import freeze_garbage, save_checkpoint
from trainer.parallel.apply import mean_over_ranks, module_state
from trainer.parallel.control_group import ControlGroup
from utils.distributed import Ranks
from utils.files import write_json_atomic

TEXT, INPUTS, LOSSES, OPTIMISER, REST = "text", "noise", "losses", "optimiser", "rest"
GB = 1e9
CHECK_STEPS = 5


def cost_of(stage: Distill) -> DistillCost:
    """FLOPs of a stage's updates."""
    d, config = stage.settings, stage.config
    networks = {"student": stage.student.model, "teacher": stage.teacher.model, "critic": stage.critic.model}
    return DistillCost(
        **{name: TransformerSize.from_config(model.config) for name, model in networks.items()},
        geometry=stage.geometry,
        schedule=stage.schedule,
        frames=config.video.num_latent_frames,
        text_tokens=config.model.text_tokens,
        batch=config.training.micro_batch,
        guidance=bool(d.guidance),
        fake_guidance=bool(d.fake_guidance),
        release_context=d.rollout_context == "release",
        start_steps=len(d.motion_regression.timesteps) if d.regresses_motion else 0,
        frozen=bool(d.lora.student_rank),
    )


class PhaseWatch:
    """Times the phases of a stage's updates, for generator and critic separately."""

    def __init__(self, stage: Distill, device: torch.device):
        self.phases, self.who = PhaseTimer(device), "critic"
        wrap, graph = self.phases.wrap, torch.is_grad_enabled
        wrap(stage, "update", self._name(REST))
        wrap(stage, "_draw", self._name(INPUTS))
        wrap(stage.prompts, "batch", self._name(TEXT))
        wrap(stage, "_sample", self._name(ROLLOUT))
        wrap(stage, "_initial_student_sample", self._name(ROLLOUT))
        if stage.rollout_sharing is not None:
            wrap(stage.rollout_sharing, "take", self._name(ROLLOUT))
        wrap(stage.student, "x0", lambda: self._name(STUDENT if graph() else ROLLOUT)())
        wrap(stage.teacher, "v", self._name(TEACHER))
        wrap(stage.critic, "v", lambda: self._name(CRITIC if graph() else SCORE)())
        for family in (stage.generator_backward, stage.critic_backward):
            wrap(family, "loss", self._name(LOSSES))
            wrap(family, "once", self._name(BACKWARD))
        for train_state in stage.train_states.values():
            wrap(train_state, "step", self._name(OPTIMISER))
        inner = stage._generator_step

        def generator_step(*args):
            self.who = "generator"
            try:
                return inner(*args)
            finally:
                self.who = "critic"

        stage._generator_step = generator_step

    def _name(self, phase: str) -> Callable[[], str]:
        return lambda: f"{self.who}/{phase}"

    def run(self, update: Callable[[], Any]) -> dict[str, dict[str, float]]:
        """Seconds by phase of the generator update and of the critic update in one step."""
        self.phases.restart()
        update()
        seconds_by_role: dict[str, dict[str, float]] = {"generator": {}, "critic": {}}
        for name, seconds in self.phases.spans().items():
            who, slash, phase = name.partition("/")
            if slash:
                seconds_by_role[who][phase] = seconds
        return seconds_by_role


def cap_memory(card_gb: float, device: torch.device) -> None:
    """Limit torch's allocator to a GPU of `card_gb` GB (1e9 bytes), minus driver and kernels."""
    if device.type == "cuda" and card_gb:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (card_gb * GB - CONTEXT) / total), device)


def memory_of(device: torch.device, watch: PhaseWatch) -> dict[str, Any]:
    """Bytes on this rank's GPU: peak in use by phase, peak reserved, and in use by all programs."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    peaks = {name: peak for name, peak in watch.phases.peaks.items() if "/" in name}
    reserved = torch.cuda.max_memory_reserved(device)
    return {"peak": max(peaks.values()), "reserved": reserved, "taken": total - free, "phases": peaks}


def communication(stage: Distill, step: int, device: torch.device) -> dict[str, float] | None:
    """`exposed` for one step on this GPU; None on a CPU."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        stage.update(step)
        torch.cuda.synchronize(device)
    return exposed(seen.events())


def exposed(events: Iterable[FunctionEvent]) -> dict[str, float]:
    """From the events of torch's profiler: seconds of communication kernels, seconds of them during which nothing else
    ran, and seconds between the first and the last kernel during which nothing ran."""
    done = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    spans = [("nccl" in e.name.lower(), (e.time_range.start, e.time_range.end)) for e in done]
    talk, work = ([span for is_talk, span in spans if is_talk is wanted] for wanted in (True, False))
    busy = covered(talk + work)
    idle = max(end for _, end in talk + work) - min(start for start, _ in talk + work) - busy
    return {"kernels_s": covered(talk) / 1e6, "exposed_s": (busy - covered(work)) / 1e6, "idle_s": idle / 1e6}


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def saving(stage: Distill, folder: Path, device: torch.device, control: ControlGroup) -> dict[str, float]:
    """Seconds and memory of writing a checkpoint, with checksums and the export for inference.

    bytes: on disk. gpu_bytes, host_bytes: additional peak memory of this rank.
    """
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    with HostPeak() as host:
        save_checkpoint(stage, folder, 1, control)
        control.wait()
    took = time.perf_counter() - began
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    extra = torch.cuda.max_memory_allocated(device) - before if cuda else 0
    return {"s": took, "bytes": size, "gpu_bytes": extra, "host_bytes": host.own}


def measure(
    config: Config, device: torch.device, ranks: Ranks, out: Path, deadline: float, control: ControlGroup, *,
    save: Path | None = None,
) -> None:  # fmt: skip
    """Warm up, time a cycle and the first step of the next one, as far as `deadline` (of time.time()) allows, profile a
    step, and write the results to `out`.

    save: an empty folder, in which a checkpoint is timed. `out` is written after every step, so that an interrupted run
    leaves results.
    """
    peak = sustained_peak(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    began = time.perf_counter()
    stage = Distill(config, device, ranks)
    watch, ratio = PhaseWatch(stage, device), config.training.distill.dfake_gen_update_ratio
    cost = cost_of(stage)
    report: dict[str, Any] = {
        "machine": machine_of(device), "sustained_peak": peak, "build_s": time.perf_counter() - began,
        "ranks": ranks.world, "micro_batch": config.training.micro_batch, "micro_batches": stage.micro_batches,
        "global_batch": config.training.global_batch, "ratio": ratio, "checkpointing": config.training.checkpointing,
        "turns": stage.rollout_sharing is not None,
        "teacher_errors": {f"{t:.0f}": error for t, error in stage.teacher_errors.items()},
    }  # fmt: skip
    warm = time.perf_counter()
    watch.run(lambda: stage.update(0))
    report["warm_up_s"] = time.perf_counter() - warm
    freeze_garbage()  # as in the training loop
    watch.phases.peaks.clear()
    updates: dict[str, list[dict[str, float]]] = {"generator": [], "critic": []}
    for step in range(ratio, 2 * ratio + 1):
        if len(updates["critic"]) > 1 and control.any(time.time() > deadline):
            break
        for who, spans in watch.run(lambda step=step: stage.update(step)).items():
            if spans:
                updates[who].append(spans)
        prices = {
            "generator": cost.generator(stage.planner.draw("generator", ratio).exits),
            "critic": cost.critic_update(stage.planner.draw("critic", step).exits),
        }
        extra = {who: cost.recomputed(who, stage.planner.draw(who, step).exits) for who in prices}
        report["updates"] = {who: _phases(spans, prices[who], extra[who], stage) for who, spans in updates.items()}
        report["timed"] = {who: len(spans) for who, spans in updates.items()}
        memory = control.gather(memory_of(device, watch))
        if ranks.first:
            write_json_atomic(out, summary(report | {"memory": memory}))
    if not control.any(time.time() > deadline):
        report["communication"] = communication(stage, 3 * ratio, device)
        if ranks.first:
            write_json_atomic(out, summary(report | {"memory": memory}))
    if save is not None:
        in_time = not control.any(time.time() > deadline)
        report["saving"] = saving(stage, save, device, control) if in_time else {"why": "no time was left"}
        if ranks.first:
            write_json_atomic(out, summary(report | {"memory": memory}))


def _phases(spans: list[dict[str, float]], price: dict[str, int], again: int, stage: Distill) -> dict[str, Any]:
    """Median seconds of each phase, this GPU's share of its FLOPs, and the FLOPs of recomputation.

    What several GPUs compute redundantly counts once. Rollout sharing uses the mean, since some updates make none.
    """
    share = stage.micro_batches / stage.config.training.sequence_parallel
    out = {}
    for name in dict.fromkeys(phase for one in spans for phase in one):
        middle = mean if name in (ROLLOUT, INPUTS, TEXT) and stage.rollout_sharing is not None else median
        out[name] = {"s": middle([one.get(name, 0.0) for one in spans])}
        if name in price:
            out[name]["flops"] = price[name] * share
        if name == BACKWARD:
            out[name]["recomputed"] = again * share if stage.config.training.checkpointing else 0.0
    return out


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Adds sums: seconds and FLOPs of an update and of a cycle, MFU, samples per second."""
    peak, totals = report["sustained_peak"], {}
    for who, phases in report["updates"].items():
        for phase in phases.values():
            if "flops" in phase and phase["s"] > 0:
                phase["mfu"] = phase["flops"] / phase["s"] / peak
                phase["with_recomputation"] = (phase["flops"] + phase.get("recomputed", 0.0)) / phase["s"] / peak
        totals[who] = {key: sum(p.get(key, 0.0) for p in phases.values()) for key in ("s", "flops")}
    cycle = {key: totals["generator"][key] + report["ratio"] * totals["critic"][key] for key in ("s", "flops")}
    report |= {"totals": totals, "cycle_s": cycle["s"], "mfu": cycle["flops"] / cycle["s"] / peak}
    report["samples_per_s"] = report["ratio"] * report["global_batch"] / cycle["s"]
    report["peak_bytes"] = max((one.get("peak", 0) for one in report["memory"]), default=0)
    return report


def check(config: Config, device: torch.device, ranks: Ranks, out: Path) -> None:
    """Write losses, gradient norms and weights before and after five critic and three generator updates."""
    stage = Distill(config, device, ranks)

    def weights() -> dict[str, torch.Tensor]:
        states = {name: module_state(train_state.module) for name, train_state in stage.train_states.items()}
        return {f"{name}.{key}": x.detach().float().cpu().clone() for name, s in states.items() for key, x in s.items()}

    before, logs = weights(), []
    for step in range(CHECK_STEPS):
        values = stage.update(step)
        logs.append({name: float(value) for name, value in mean_over_ranks(values).items()})
    after = weights()
    if ranks.first:
        both = {f"before.{k}": x for k, x in before.items()} | {f"after.{k}": x for k, x in after.items()}
        save_file(both, out.with_suffix(".safetensors"))
        write_json_atomic(out, {"logs": logs, "bfloat16": stage.dtype == torch.bfloat16})
