"""Rows of the ablation: one base configuration, one start, and what each row changes."""

import gc
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.errors import UserError
from configs.load import load_config, to_yaml
from configs.schema import Config
from model.weights.files import resolve_path
from model.weights.run_folders import find_weights
from trainer.checkpoint.resume import check_export
from trainer.loop import run
from trainer.registry import build_stage
from utils.distributed import Ranks
from utils.files import atomic_path, sha256_of, short_hash


@dataclass(frozen=True)
class Row:
    """One line of the table. overrides: what is changed in the base configuration."""

    name: str
    title: str
    overrides: tuple[str, ...] = ()
    start: str | None = None  # evaluate these weights of `training.init` as they are; None = train


CUT = "training.distill.flow.gradient_cut=true"
ROWS = (
    Row("teacher", "teacher, 50 steps", start="teacher"),
    Row("start", "initialised student", start="student"),
    Row("self_forcing", "Self-Forcing: 4 steps, clean refresh, no flow loss",
        ("schedule.preset=self_forcing", "stream.context=clean", "training.distill.flow.weight=0")),
    Row("4322222", "ours as shipped: 4322222"),
    Row("5432222", "ours, 5432222", ("schedule.steps=5432222",)),
    Row("4222222", "ours, 4222222", ("schedule.steps=4222222",)),
    Row("5333333", "ours, 5333333", ("schedule.steps=5333333",)),
    Row("no_forcing", "ours without diagonal forcing (clean refresh)", ("stream.context=clean",)),
    Row("no_flow", "ours without the flow loss", ("training.distill.flow.weight=0",)),
    Row("cut_flow", "ours, gradient of the flow loss cut, as in diagdistill's 4ea418d", (CUT,)),
    Row("no_denoising", "ours without diagonal denoising (2 steps in every chunk)", ("schedule.steps=2",)),
    Row("guidance_1", "ours, teacher's guidance 1 in place of 0.5", ("training.distill.guidance=1",)),
    Row("hot", "ours, rate 1e-4 in place of 3e-5, critic not warmed up (140 updates, not 80)",
        ("training.optimizer.lr=1.0e-4", "training.distill.critic_warmup=0")),
)  # fmt: skip


def chosen(names: Sequence[str] | None) -> list[Row]:
    """The rows of these names, in the table's order; None = all."""
    known = [row.name for row in ROWS]
    for name in names or ():
        if name not in known:
            raise UserError(f"--rows {name} is unknown; use some of {', '.join(known)}")
    return [row for row in ROWS if not names or row.name in names]


def row_config(path: str, row: Row, settings: Sequence[str]) -> Config:
    """The base with the user's settings, then the row's."""
    return load_config(path, [*settings, *row.overrides])


def weights_of(config: Config, name: str) -> Path:
    """The folder or file that `training.init` names."""
    if name not in config.training.init:
        raise UserError(f"training.init.{name} is not set and the ablation needs it; give a folder of weights")
    return resolve_path(Path(config.training.init[name]))


def fingerprint(config: Config) -> str:
    """Eight digits that change with any setting of a run and with the weights that it starts from."""
    hashes = []
    for name in sorted(config.training.init):
        path = find_weights(weights_of(config, name), config.model.use_ema)
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        hashes += [sha256_of(file) for file in files if file.is_file()]
    return short_hash(to_yaml(config), *hashes)[:8]


def trained(row: Row, config: Config, folder: Path, device: torch.device, until: float = math.inf) -> Path | None:
    """The student of a row, trained in `folder` unless it is there already; None after a signal or the time `until`, of
    time.monotonic()."""
    if row.start is not None:
        return weights_of(config, row.start)
    export = folder / "export"
    card = export / "card.json"
    if card.is_file() and json.loads(card.read_text())["step"] == config.training.steps:
        return export
    check_export(config, folder)
    stage = build_stage(config, device, Ranks())
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "config.yaml") as aside:
        aside.write_text(to_yaml(config), encoding="utf-8")
    ended = run(stage, folder, until=until)
    del stage
    gc.collect()  # graphs and their memory, before the next row makes its own
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return export if ended else None
