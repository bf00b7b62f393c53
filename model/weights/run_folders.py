"""Folders of training runs: the files in them that hold a network.

    <run>/export/                       averaged weights, in our own format
    <run>/checkpoint_000200/state.pt    its newest state: train states with weights (module) and averages (average)
                           /manifest.json
                           /shards/             instead of state.pt, for a sharded run
    <run>/checkpoint_model_000600/model.pt    Self-Forcing's and its forks'
"""

import re
from pathlib import Path
from typing import Any

from configs.errors import UserError
from model.weights import names
from model.weights.files import StoredTensors, open_file, read_headers, read_json, resolve_path

STATE, MANIFEST, MODEL, EXPORT, SHARDS = "state.pt", "manifest.json", "model.pt", "export", "shards"
STUDENTS = ("generator", "student", "module")  # train states that can be the student, best first
CRITICS = ("critic", "fake_score", "module")


def find_weights(path: Path, skip_export: bool = False) -> Path:
    """`path` itself, or if it is the folder of a run, what to read instead: the export, model.pt, state.pt, or shards.

    skip_export: for a critic, which an export does not have, and for averages, which it has in place of the weights.
    """
    if not path.is_dir() or (path / "config.json").is_file():
        return path
    for file in (MODEL, STATE, SHARDS):
        if (path / file).exists():
            return path / file
    export = path / EXPORT
    if not skip_export and (export / "config.json").is_file():
        return export
    there = [folder for folder in checkpoints(path) if any((folder / file).exists() for file in (STATE, MODEL, SHARDS))]
    newest = ([folder for folder in there if is_complete(folder)] or there)[-1:]
    files = [folder / file for folder in newest for file in (STATE, MODEL, SHARDS) if (folder / file).exists()]
    return files[0] if files else path


def checkpoints(run: Path) -> list[Path]:
    """Checkpoints under `run`, ours and Self-Forcing's, by step number."""
    steps = {p: int(m[1]) for p in run.glob("checkpoint_*") if (m := re.fullmatch(r".*_([0-9]+)", p.name))}
    return sorted(steps, key=lambda path: (steps[path], path.name))


def is_complete(folder: Path) -> bool:
    """Whether all files in a checkpoint's manifest exist with their sizes. Self-Forcing's have no manifest."""
    if (folder / MODEL).is_file():
        return True
    try:
        manifest = read_json("run", folder / MANIFEST)
        sizes = manifest["sizes"] if "sizes" in manifest else dict.fromkeys(manifest.get("files", {STATE: None}))
        return all((folder / file).stat().st_size == size or size is None for file, size in sizes.items())
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def open_parts(name: str, path: Path, values: bool = True) -> dict[str, StoredTensors]:
    """Parts of a state: `generator.module`, `generator.average`, ...; values: whether they can be read."""
    if path.name != SHARDS:
        return (open_file if values else read_headers)(name, path)
    from model.weights.sharded_files import open_sharded  # imports torch, which finding files does not need

    return open_sharded(name, path)


def open_state(
    name: str, path: Path, critic: bool, averaged: bool, values: bool = True
) -> tuple[StoredTensors, dict[str, Any], dict[str, Any]]:
    """Tensors, config.json and card of a network in a `state.pt` or in shards.

    The state does not contain the sizes of the network; they are read from the export or the initial weights.
    """
    part = "average" if averaged else "module"
    parts = open_parts(name, path, values)
    train_states = [player for player in (CRITICS if critic else STUDENTS) if f"{player}.{part}" in parts]
    if not train_states:
        role = "critic" if critic else "student"
        raise UserError(f"{name}={path} holds no {role} with {part} weights; choose another checkpoint of the run")
    player, tensors = train_states[0], parts[f"{train_states[0]}.{part}"].renamed(names.unwrapped)
    manifest = read_json(name, path.parent / MANIFEST)
    card = {key: manifest[key] for key in ("stage", "step") if key in manifest}
    sources = [path.parent.parent / EXPORT / "config.json", *_beginnings(manifest, player, critic)]
    for source in sources:
        source = source / "config.json" if source.is_dir() else source
        if source.suffix == ".json" and source.is_file():
            return tensors, read_json(name, source), card
    raise UserError(
        f"{name}={path} does not say the sizes of its network, and what it started from is gone; "
        f"put the config.json of that into {path.parent.parent / EXPORT}"
    )


def _beginnings(manifest: dict[str, Any], player: str, critic: bool) -> list[Path]:
    """Weights or config.json that the configuration of a run names for the network, most likely first."""
    config = manifest.get("config")
    config = config if isinstance(config, dict) else {}
    training, model = (config[key] if isinstance(config.get(key), dict) else {} for key in ("training", "model"))
    init = training["init"] if isinstance(training.get("init"), dict) else {}
    places = [init.get(key) for key in (player, *(("critic", "teacher") if critic else ()), "student", "transformer")]
    places += [model.get(key) for key in (("critic", "teacher") if critic else ("student",))]
    return [resolve_path(name) for name in places if isinstance(name, str)]
