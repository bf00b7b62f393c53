"""YAML files and `key.sub=value` overrides to the checked, frozen tree of configs/schema.py.

A YAML file may start from another one: `base: tiny.yaml` (relative to that file). The schema's defaults, the base, the
file and the overrides are merged in this order, later ones on top. Lists are replaced, sections are merged. A folder
that `DiagonalPipeline.save_pretrained` has written stands for its pipeline.json and its weights.

Scalars are interpreted by the type of their setting: `010` is ten for a number and the text 010 elsewhere, `on` is true
for a boolean. Tags, aliases and `${...}` are refused, so untrusted files can only state values.
"""

import dataclasses
import difflib
import logging
import re
import types
import typing
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

from configs.errors import UserError, shown
from configs.reading import ordinary_file
from configs.schema import CONTEXT_OF, DATED, Config

CHECKOUT = Path(__file__).resolve().parents[1]
STORED = {"preset", "steps", "first", "last", "shift", "timesteps"}  # every key of a stored schedule
log = logging.getLogger(f"diagonal.{__name__}")
HEADS = "motion is compared as it is, which was `difference`; a trained head: training.distill.motion_regression"
HEAD = "the head is that of diagdistill's commit 24ef1c9"
KERNELS = "our own kernels are used wherever they can be; for operators of torch: inference.compile=off"
REMOVED = {  # key -> what was stored by default, and what to do instead
    "model.teacher": (None, "set training.init.teacher"),
    "model.critic": (None, "set training.init.critic"),
    "schedule.warp": ("true", "set schedule.shift=1 for timesteps that are not shifted"),
    "stream.context_by_chunk": ({}, "stream.context holds for all chunks"),
    "stream.restart_every": (0, "a schedule starts once"),
    "inference.fused_gelu": ("true", KERNELS),
    "inference.fused_norms": ("true", KERNELS),
    "inference.fp8_scaling": ("row", "scales are by row, which is as fast as by tensor and more accurate"),
    "inference.fp8_attention": ("true", "to have linears alone in float8, set inference.precision=fp8_linears"),
    "training.flow.past_weight": ("0.5", "it is 0.5"),
    "training.flow.ode_clips": (
        4096, "stage ode_regression learns trajectories of scripts/generate_ode_pairs.py --causal"
    ),
    "training.distill.flow.head": ("difference", HEADS),
    "training.distill.flow.head_lr": ("0.0001", HEADS),
    "training.distill.flow.frame_weights": ("true", "frames are weighted in any case"),
    "training.distill.motion_regression.layers": (2, HEAD),
    "training.distill.motion_regression.hidden": (64, HEAD),
    "training.distill.motion_regression.kernel": (1, HEAD),
    "training.distill.long.rollout": ("inference", "chunks before the window are made as in inference"),
    "training.distill.long.reencode_first": ("true", "the window's first latent is re-encoded in any case"),
    "training.distill.long.decode_frames": (6, "it is 6"),
}
MOVED = {  # old key -> new key
    "inference.cpu_threads": "cpu_threads",
    "training.flow.own_share": "training.flow.self_rollout_ratio",
}
PIPELINE = "pipeline.json"  # settings of a folder with all weights, which are in these places
FOLDER_OF = {name: name for name in ("vae", "text_encoder", "tokenizer")}
FOLDER_OF |= {"student": "transformer", "tiny_decoder": "tiny_decoder.safetensors"}
# sections and settings that it may set: only those that decide what videos look like, since it may not be trusted
PIPELINE_SETTINGS = ("name", "seed", "cpu_threads", "video", "schedule", "stream")
PIPELINE_SETTINGS += ("model.codec", "model.text_tokens", "inference.precision", "inference.attention")
MAX_FILE = 1_000_000  # bytes of a YAML file
REFUSED = (OmegaConfBaseException, TypeError)  # a list where a mapping belongs is a TypeError inside OmegaConf


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The tree that `path` (a YAML file, or a folder of a whole pipeline) and `overrides` describe.

    UserError for anything unknown, mistyped or out of range.
    """
    files = [_check(moved(layer), Config, "") for layer in _layers(Path(path), ())]
    given = [_check(moved(_override(text)), Config, "", typed=True) for text in overrides]
    layers = [*files, *given]
    groups = [[layer] for layer in files] + [given]
    _check_context(groups)
    _check_schedule(groups)
    try:
        merged = OmegaConf.merge(_writable_schema(), *layers)
        return OmegaConf.to_object(merged)
    except REFUSED as error:
        raise UserError(_describe(error, layers)) from None


def _check_context(groups: list[list[dict[str, Any]]]) -> None:
    """Refuse a stream.context that a preset overrides; stored trees may have both.

    groups: lists of layers; within a list the order is irrelevant.
    """
    preset = context = None
    for group in groups:
        for schedule in (layer["schedule"] for layer in group if "schedule" in layer):
            if "preset" in schedule:
                preset, context = schedule["preset"], None
        for layer in group:
            if "context" in layer.get("stream", ()) and not STORED <= layer.get("schedule", {}).keys():
                context = layer["stream"]["context"]
    own = CONTEXT_OF.get(DATED.get(preset, preset)) if isinstance(preset, str) else None
    if own is not None and context not in (None, own):
        raise UserError(
            f"stream.context={shown(context)} has no effect beside schedule.preset={preset}, whose own is {own}; leave "
            f"it out, or write the schedule's steps in place of the preset"
        )


def _check_schedule(groups: list[list[dict[str, Any]]]) -> None:
    """Refuse numbers of steps, and what else timesteps are computed from, where a preset or a list of timesteps of the
    same layer or an earlier one decides; stored trees may have both. groups: as in `_check_context`."""
    decides: dict[str, Any] = {"preset": None, "timesteps": None}
    for group in groups:
        schedules = [layer["schedule"] for layer in group if "schedule" in layer]
        for schedule in schedules:
            decides |= {name: schedule[name] for name in decides.keys() & schedule.keys()}
        by = next((name for name, value in decides.items() if value is not None), None)
        for schedule in schedules:
            for name in sorted(schedule.keys() - decides.keys()):
                if by and not STORED <= schedule.keys():
                    raise UserError(
                        f"schedule.{name}={shown(schedule[name])} has no effect beside schedule.{by}="
                        f"{shown(decides[by])}; leave out one of the two (schedule.{by}=null)"
                    )


def to_dict(config: Config) -> dict[str, Any]:
    """The tree as plain dicts, lists and scalars; `Config` comes back from it through YAML or JSON."""
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    """The tree as YAML that `load_config` reads back to an equal tree."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def presets() -> list[str]:
    """The shipped YAML files, as paths relative to the checkout."""
    return sorted(f"configs/{file.name}" for file in (CHECKOUT / "configs").glob("*.yaml"))


def _layers(path: Path, seen: tuple[Path, ...]) -> list[dict]:
    """Contents of `path` and of its bases, the lowest base first. seen: files that led here."""
    file = path if path.exists() else CHECKOUT / path
    if file.is_dir():
        if not (file / PIPELINE).is_file():
            raise UserError(
                f"config_path={shown(path)} is a folder without {PIPELINE}; give a YAML file of settings, or a folder "
                f"that DiagonalPipeline.save_pretrained has written"
            )
        file /= PIPELINE
    if not file.is_file():
        near = difflib.get_close_matches(f"configs/{path.name}", presets(), 3, cutoff=0.0)
        raise UserError(f"config_path={shown(path)} does not exist; configs/ has presets such as {', '.join(near)}")
    folder, whole = file.parent.resolve(), file.name == PIPELINE  # of the folder's own entry, which may be a link
    file = file.resolve()
    if file in seen:
        chain = " -> ".join(base.name for base in (*seen, file))
        raise UserError(f"base={path} closes a circle ({chain}); remove one `base:` line")
    values = _read(file)
    if whole:
        _check_pipeline(path, values)
        return [{"model": {name: str(folder / place) for name, place in FOLDER_OF.items()}}, values]
    base = values.pop("base", None)
    if base is None:
        return [values]
    if not isinstance(base, str):
        raise UserError(f"base={shown(base)} in {path} is not a file name; write base: other.yaml")
    if not (file.parent / base).exists():
        raise UserError(
            f"base={shown(base)} of {shown(file)} does not exist; give the file relative to that one, or whole"
        )
    return [*_layers(file.parent / base, (*seen, file)), values]


def _check_pipeline(path: Path, values: dict) -> None:
    """Refuse settings of a pipeline.json that are not for it to make, such as paths."""
    for section, inner in values.items():
        keys = [f"{section}.{key}" for key in inner] if isinstance(inner, dict) else [section]
        for key in () if section in PIPELINE_SETTINGS or inner is None else keys:
            if key not in PIPELINE_SETTINGS:
                raise UserError(
                    f"config_path={shown(path)}: its {PIPELINE} sets {shown(key)}, which is not for a folder of "
                    "weights to decide; remove it there, and give it yourself where you want it"
                )


class _Loader(yaml.BaseLoader):
    """Scalars stay text except null and plain integers; aliases, tags and duplicate keys are refused."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.tag is not None:
            what = f"alias *{event.anchor}" if isinstance(event, yaml.AliasEvent) else f"tag {event.tag}"
            raise ComposerError(None, None, f"the {what} has no meaning here, write the value out", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str | int) or name in seen:
                problem = f"the key {shown(name)} is given twice" if isinstance(name, str | int) else "a key is no name"
                raise ConstructorError(None, None, problem, key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile("(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile("(?:0|-?[1-9][0-9]{0,17})$"), list("-0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def _parse(text: str, where: str) -> Any:
    """The value of a YAML text; UserError starting with `where` for invalid YAML."""
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {_yaml_problem(error)}; correct it there") from None
    except RecursionError:
        raise UserError(f"{where} is nested too deeply; settings have two or three levels") from None
    return value


def _read(path: Path) -> dict:
    """One YAML file as a dict; an empty file is an empty dict."""
    where = f"config_path={path}"
    ordinary_file("config_path", path, MAX_FILE, fix="give a YAML file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{where} is not UTF-8 text; save it as UTF-8") from None
    values = _parse(text, where)
    if values is not None and not isinstance(values, dict):
        raise UserError(f"{where} holds no settings; it must hold `key: value` lines")
    return values or {}


def _override(text: str) -> dict:
    """`a.b=c` as {"a": {"b": c}}, where c is read as YAML."""
    key, equals, value = text.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise UserError(f"override={shown(text)} is not of the form key.sub=value; try video.fps=16")
    if names == ["base"]:
        raise UserError(f"override={shown(text)} cannot change the base of a file; pass --config_path {shown(value)}")
    return _nested(".".join(names), _parse(value, f"override={shown(text)}"))


def _yaml_problem(error: yaml.YAMLError) -> str:
    """`line 3, column 7: ...` of a YAML error."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error).splitlines()[0]
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


def moved(values: dict) -> dict:
    """`values` with renamed settings under their new names, and a warning for each; a new name that is there wins."""
    for old, new in MOVED.items():
        *sections, key = old.split(".")
        inner: Any = values
        for name in sections:
            inner = inner[name] if isinstance(inner, dict) and name in inner else None
        if isinstance(inner, dict) and key in inner:
            log.warning("%s is called %s by now", old, new)
            values = _merged(_nested(new, inner[key]), _without(values, [*sections, key]))
    return values


def _nested(key: str, value: Any) -> dict:
    """`a.b` and a value as {"a": {"b": value}}."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _without(values: dict, path: list[str]) -> dict:
    name, *rest = path
    if rest:
        return values | {name: _without(values[name], rest)}
    return {key: value for key, value in values.items() if key != name}


def _merged(values: dict, over: dict) -> dict:
    """`values` with those of `over` on top, section by section."""
    both = [key for key in values.keys() & over.keys() if isinstance(values[key], dict) and isinstance(over[key], dict)]
    return values | over | {key: _merged(values[key], over[key]) for key in both}


def _check(values: dict, section: type, prefix: str, *, typed: bool = False) -> dict:
    """`values` with empty sections dropped; refuses keys that `section` lacks.

    Removed ones are left out with a warning, as old files have them; `typed` today they are mistakes, and refused.
    """
    hints = typing.get_type_hints(section)
    checked = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name in REMOVED:
            idle, instead = REMOVED[name]
            if typed:
                raise UserError(f"{name}={shown(value)} is no setting any more; leave it out: {instead}")
            if value is not None and value != idle:
                log.warning("%s=%s is not read any more: %s", name, shown(value), instead)
            continue
        if key not in hints:
            raise UserError(_unknown(name))
        if dataclasses.is_dataclass(hints[key]):
            if value is None:
                continue
            if not isinstance(value, dict):
                keys = ", ".join(typing.get_type_hints(hints[key]))
                raise UserError(f"{name}={shown(value)} is a section, not a value; set one of its keys: {keys}")
            value = _check(value, hints[key], f"{name}.", typed=typed)
        _check_text(name, value)
        if hints[key] is bool and isinstance(value, int) and value not in (0, 1):  # which OmegaConf takes for true
            raise UserError(f"{name}={value} has the wrong type; it must be true or false")
        checked[key] = value
    return checked


def _check_text(name: str, value: Any) -> None:
    """Refuse text that no setting can hold, in `value` and in everything nested in it, keys included."""
    for part in _texts(value):
        if "${" in part or part == "???":  # OmegaConf interpolation, whose resolvers read the environment
            raise UserError(f"{name}={shown(part)} is not filled in here; write the value out")
        if "\0" in part:
            raise UserError(f"{name} holds a NUL character; give plain text")
        try:
            part.encode()
        except UnicodeEncodeError:  # bytes of a command line that were not UTF-8
            raise UserError(f"{name}={shown(ascii(part))} is not valid UTF-8; type it as UTF-8") from None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def _unknown(name: str) -> str:
    """Message for an unknown key, with the nearest known key by full name or last part."""
    known = list(_fields(Config, ""))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if not near:
        by_last = {key.rpartition(".")[2]: key for key in reversed(known)}
        near = [by_last[key] for key in difflib.get_close_matches(name.rpartition(".")[2], by_last, n=1)]
    if not near:
        return f"{shown(name)} is not a setting; configs/schema.py lists them all"
    return f"{shown(name)} is not a setting; did you mean {near[0]}?"


@cache
def _fields(section: type, prefix: str) -> dict[str, Any]:
    """Full dotted key -> annotated type, sections included, for everything below `section`; do not change it."""
    fields = {}
    for key, hint in typing.get_type_hints(section).items():
        fields[f"{prefix}{key}"] = hint
        if dataclasses.is_dataclass(hint):
            fields |= _fields(hint, f"{prefix}{key}.")
    return fields


@cache
def _writable_schema():
    """The schema as an OmegaConf tree, which merges copy. Nodes of frozen dataclasses would be read-only."""
    schema = OmegaConf.structured(Config)
    OmegaConf.set_readonly(schema, False)
    for key, hint in _fields(Config, "").items():
        if dataclasses.is_dataclass(hint):
            OmegaConf.set_readonly(OmegaConf.select(schema, key), False)
    return schema


def _describe(error: Exception, layers: list[dict]) -> str:
    """One sentence naming field, value and expected type of the first value that OmegaConf refuses by itself."""
    fields = _fields(Config, "")
    for name, value in (leaf for layer in layers for leaf in _leaves(layer, fields, "")):
        try:
            OmegaConf.to_container(OmegaConf.merge(_writable_schema(), _nested(name, value)), resolve=True)
        except REFUSED:
            return f"{name}={shown(value)} has the wrong type; it must be {_type_name(fields[name])}"
    return f"the configuration cannot be built: {str(error).splitlines()[0]}; see configs/schema.py"


def _leaves(values: dict, fields: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """(full dotted key, value) of every setting in a checked layer."""
    for key, value in values.items():
        if dataclasses.is_dataclass(fields[f"{prefix}{key}"]):
            yield from _leaves(value, fields, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _type_name(hint: Any) -> str:
    """A type in words: `an integer`, `text or null`, `a list of lists of numbers`."""
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if hint in words:
        return words[hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_type_name(part) for part in typing.get_args(hint))
    plural = {int: "integers", float: "numbers", str: "texts", bool: "true or false"}
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        return f"a list of {plural[item] if item in plural else _type_name(item).replace('a list', 'lists', 1)}"
    if typing.get_origin(hint) is dict:
        key, item = typing.get_args(hint)
        return f"a mapping from {plural[key]} to {plural[item]}"
    return str(hint)
