"""Layouts of distillation on GPUs: parsing, settings, memory plans and projections.

KIND:GPUS[,OPTION=VALUE...]      full:2    hybrid:4    sequence:2    sequence2:4    none:1,teacher=1.3B,card=140

none       each GPU holds everything                       full       sharded over all GPUs (FSDP2)
hybrid     sharded within a machine, replicated between    sequenceN  full, and N GPUs share the tokens of a sample
           machines                                                   (without N: all GPUs)
options    student, teacher, critic: sizes; accumulate: micro-batches; card: limit of the allocator in GB;
           any setting, such as training.distill.lora.student_rank=64
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from configs.errors import UserError
from configs.load import load_config
from configs.schema import Config
from model.memory import CONTEXT, MemoryPlan, distill_plan
from model.sizes import TRANSFORMER_SIZES, WAN_1_3B, TransformerSize
from model.weights.parts import TRANSFORMERS
from scripts.bench.training_cost import ROLLOUT

KINDS = ("none", "full", "hybrid", "sequence")
WORDS = ("accumulate", "card")
MACHINE = 8  # GPUs in one
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One layout. `sizes` and `settings` replace those of the command line."""

    text: str
    kind: str
    gpus: int
    sequence: int = 1  # GPUs that share a sample
    accumulate: int = 1
    card_gb: float | None = None
    sizes: Mapping[str, str]
    settings: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """Parse `KIND:GPUS[,OPTION=VALUE...]`. Raises UserError if `text` is invalid."""
        head, *options = text.split(",")
        match = re.fullmatch(rf"({'|'.join(KINDS)})(\d*):(\d+)", head)
        if not match or (match[2] and match[1] != "sequence") or int(match[3]) < 1:
            raise UserError(f"--layouts {text} is not KIND:GPUS with a kind of {', '.join(KINDS)}; try full:2")
        kind, gpus = match[1], int(match[3])
        degree = int(match[2] or gpus) if kind == "sequence" else 1
        if degree < 1 or gpus % degree:
            raise UserError(f"--layouts {text}: {degree} GPUs per sample do not divide {gpus}; try sequence:{gpus}")
        values: dict[str, str] = {}
        for option in options:
            key, equals, value = option.partition("=")
            if not equals or not (key in (*TRANSFORMERS, *WORDS) or "." in key):
                raise UserError(f"--layouts {text}: unknown option {option}; use {', '.join((*TRANSFORMERS, *WORDS))}")
            values[key] = value
        try:
            accumulate, card = int(values.pop("accumulate", 1)), values.pop("card", None)
            card = None if card is None else float(card)
        except ValueError as error:
            raise UserError(f"--layouts {text}: accumulate and card are numbers; try accumulate=2") from error
        sizes = {role: values.pop(role) for role in TRANSFORMERS if role in values}
        settings = tuple(f"{key}={value}" for key, value in values.items())
        return cls(text=text, kind=kind, gpus=gpus, sequence=degree, accumulate=accumulate, card_gb=card,
                   sizes=sizes, settings=settings)  # fmt: skip

    def overrides(self, micro_batch: int, global_batch: int | None = None) -> list[str]:
        """Settings of the layout. The batch is `global_batch`, or one pass of all GPUs times `accumulate`."""
        sharding = "none" if self.gpus == 1 else "full" if self.kind == "sequence" else self.kind
        batch = global_batch or micro_batch * self.gpus // self.sequence * self.accumulate
        degree = f"training.sequence_parallel={self.sequence}"
        return [f"training.sharding={sharding}", f"training.global_batch={batch}", degree, *self.settings]


# --- planned from formulas --------------------------------------------------------------------------------------------


def sizes_of(names: Mapping[str, str], tiny: TransformerSize) -> dict[str, TransformerSize]:
    """Networks by role, from the names of model/weights/random.py; `1.3B/2` has two layers."""
    out = {}
    for role, text in names.items():
        name, _, layers = text.partition("/")
        network = tiny if name == "tiny" else TRANSFORMER_SIZES[name]
        out[role] = replace(network, layers=int(layers)) if layers else network
    return out


def planned(config: Config, networks: Mapping[str, TransformerSize], *, shards: int) -> MemoryPlan:
    """Memory plan of one GPU with weights sharded over `shards` and precomputed prompt embeddings."""
    distill = replace(config.training.distill, encoded_prompts="ahead")
    training = replace(config.training, sharding="full" if shards > 1 else "none", distill=distill)
    return distill_plan(replace(config, training=training), **networks, gpus=shards)


def layouts_for(world: int) -> list[Layout]:
    """Layouts to consider for this number of GPUs."""
    if world == 1:
        return [Layout.parse("none:1")]
    texts = [f"full:{world}"]
    if world > MACHINE and world % MACHINE == 0:
        texts.append(f"hybrid:{world}")
    texts += [f"sequence{degree}:{world}" for degree in (2, 4) if world % degree == 0]
    return [Layout.parse(text) for text in texts]


def plan_table(
    config_path: str, settings: Sequence[str], networks: Mapping[str, TransformerSize], world: int, global_batch: int,
    card_gb: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each layout on `world` GPUs: bytes by phase, and the number of accumulated micro-batches."""
    rows = []
    for layout in layouts_for(world):
        try:
            degree = f"training.sequence_parallel={layout.sequence}"
            config = load_config(config_path, [*settings, degree, *layout.settings])
        except UserError as error:
            rows.append({"layout": layout.text, "refused": str(error)})
            continue
        shards = min(world, MACHINE) if layout.kind == "hybrid" else world
        plan, micro = planned(config, networks, shards=shards), config.training.micro_batch
        rounds, rest = divmod(global_batch, micro * world // layout.sequence)
        rows.append({
            "layout": layout.text, "shards": shards, "accumulated": None if rest or not rounds else rounds,
            "phases": {phase.name: phase.total for phase in plan.phases}, "parts": dict(plan.peak.parts),
            "peak": plan.peak.total, "fits": plan.peak.total <= card_gb * GB,
        })  # fmt: skip
    return rows


OWN = "training.distill.fast_rollout=false"  # no copy of the student for rollouts
SHARED = "training.sequence_student=shared"  # no GPU holds the whole student
ADAPTERS = {  # by what is trained
    name: tuple(f"training.distill.lora.{role}_rank={rank}" for role in ("student", "critic"))
    for name, rank in (("all weights", 0), ("adapters", 64))
}
SMALLER_LAYOUTS: tuple[tuple[str, ...], ...] = (
    ("",),
    ("", OWN),
    ("full", SHARED, OWN),
    ("", "training.distill.teacher_fp8=true", OWN),
    ("", "teacher=1.3B"),
    ("sequence2", SHARED, OWN),
    ("sequence4", SHARED, OWN),
)


def advice(
    config_path: str, settings: Sequence[str], networks: Mapping[str, TransformerSize], world: int, card_gb: float,
    trained: str = "all weights",
) -> tuple[str, MemoryPlan] | None:  # fmt: skip
    """The smallest change of settings that fits GPUs with `card_gb` GB: a layout and its memory plan.

    trained: of ADAPTERS. Settings that are configured already are left out of the layout.
    """
    for kind, *rung in SMALLER_LAYOUTS:
        if kind and (world == 1 or world % int(kind.removeprefix("sequence") if kind != "full" else 1)):
            continue
        options, chosen = [option for option in rung if option.startswith(TRANSFORMERS)], list(settings)
        wanted = ((OWN,) if trained == "adapters" else ()) + ADAPTERS[trained] + tuple(rung)
        for option in (one for one in wanted if one not in options):
            if load_config(config_path, [*chosen, option]) != load_config(config_path, chosen):
                options.append(option)
                chosen.append(option)
        layout = Layout.parse(",".join([f"{kind or ('none' if world == 1 else 'full')}:{world}", *options]))
        degree = f"training.sequence_parallel={layout.sequence}"
        config = load_config(config_path, [*settings, degree, *layout.settings])
        sizes = {**networks, **({} if not layout.sizes else {"teacher": WAN_1_3B})}
        plan = planned(config, sizes, shards=world)
        if plan.peak.total <= card_gb * GB - CONTEXT:
            return layout.text, plan
    return None


# --- projected from measured phases -----------------------------------------------------------------------------------


def project(
    result: Mapping[str, Any], gpus: int, *, sequence: int, global_batch: int, steps: int, network_gb_s: float,
    trained: int,
) -> dict[str, Any] | None:  # fmt: skip
    """Projected hours of `steps` critic updates, with their generator updates, on `gpus`, from a measured layout.

    Phases of a micro-batch take the measured time, and the optimizer runs once per update. Exposed communication, if it
    was profiled, grows with (G - 1) / G. With rollout sharing, the number of the critic's rollouts per rank is rounded
    up. Machines of 8 GPUs shard internally and exchange the gradients of `trained` parameters once per micro-batch,
    4 bytes each, at `network_gb_s` per GPU, without overlap. None if the batch cannot be divided among so many GPUs.
    """
    at_once = gpus // sequence * result["micro_batch"]
    rounds, rest = divmod(global_batch, at_once) if at_once else (0, 1)
    if rest or not rounds:
        return None
    measured, machine = result["ranks"], min(gpus, MACHINE)
    updates = result["updates"]
    if result.get("turns"):
        share = [math.ceil(n * result["ratio"] / sequence) / n for n in (rounds, result["micro_batches"])]
        critic = updates["critic"]
        fewer = critic | {ROLLOUT: {"s": critic[ROLLOUT]["s"] * share[0] / share[1]}}
        updates = updates | {"critic": fewer}
    update = {who: _update_seconds(phases) for who, phases in updates.items()}
    talk = (result.get("communication") or {}).get("exposed_s", 0.0)
    both = sum(work for work, _ in update.values())
    growth = (1 - 1 / machine) / (1 - 1 / measured) if measured > 1 else 1.0
    machines = gpus // machine
    between = 0.0 if machines == 1 else 4 * trained / machine * 2 * (1 - 1 / machines) / (network_gb_s * GB)
    seconds = {}
    for who, (work, optimiser) in update.items():
        each = work / result["micro_batches"] + talk * (growth - 1) * work / both / result["micro_batches"] + between
        seconds[who] = rounds * each + optimiser
    ratio = result["ratio"]
    total = steps * seconds["critic"] + -(-steps // ratio) * seconds["generator"]
    return {
        "gpus": gpus, "from": result["layout"], "accumulated": rounds, "generator_s": seconds["generator"],
        "critic_s": seconds["critic"], "hours": total / 3600, "measured_gpus": gpus == measured,
    }  # fmt: skip


def _update_seconds(phases: Mapping[str, Mapping[str, float]]) -> tuple[float, float]:
    """Seconds of an update without the optimizer, and of the optimizer."""
    optimiser = phases.get("optimiser", {}).get("s", 0.0)
    return sum(phase["s"] for phase in phases.values()) - optimiser, optimiser
