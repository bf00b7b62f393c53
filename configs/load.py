"""YAML files and `key.sub=value` overrides to the checked, frozen tree of configs/schema.py.

A YAML file may start from another one: `base: tiny.yaml` (relative to the file that says so). What is merged, later
over earlier: defaults of the schema, the base, the file, the overrides. Lists are replaced, sections are merged.
"""

import dataclasses
import difflib
import logging
import math
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.errors import UserError
from configs.schema import Config

CHECKOUT = Path(__file__).resolve().parents[1]
STORED = {"preset", "steps", "first", "last", "warp", "shift", "timesteps"}  # every key of a stored schedule
log = logging.getLogger(f"diagonal.{__name__}")
REFUSED = (OmegaConfBaseException, TypeError)  # a list where a mapping belongs is a TypeError inside OmegaConf


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The tree that `path` and `overrides` describe; UserError for anything unknown, mistyped or out of range."""
    layers = [*_layers(Path(path), ()), *(_override(text) for text in overrides)]
    layers = [as_meant(_check(layer, Config, "")) for layer in layers]
    try:
        merged = OmegaConf.merge(_writable_schema(), *layers)
        return OmegaConf.to_object(merged)
    except REFUSED as error:
        raise UserError(_describe(error, layers)) from None


def as_meant(values: dict[str, Any]) -> dict[str, Any]:
    """`values`, where a stored tree names a preset whose meaning has changed, with the name of what it meant then.

    What is stored has every key and, since presets are dated, a date: `release` there is from before and was the
    release of March 2026. In a file that somebody wrote it is today's.
    """
    schedule = values.get("schedule")
    if not isinstance(schedule, dict) or not STORED <= schedule.keys() or schedule["preset"] != "release":
        return values
    log.warning("schedule.preset=release was stored when it meant release_2026_03, and is read as that")
    return values | {"schedule": schedule | {"preset": "release_2026_03"}}


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
    """Contents of `path` and of the bases under it, the undermost first. `seen` are the files that led here."""
    found = path if path.is_file() else CHECKOUT / path
    if not found.is_file():
        near = difflib.get_close_matches(f"configs/{path.name}", presets(), 3, cutoff=0.0)
        raise UserError(f"config_path={path} does not exist; configs/ has presets such as {', '.join(near)}")
    found = found.resolve()
    if found in seen:
        chain = " -> ".join(file.name for file in (*seen, found))
        raise UserError(f"base={path} closes a circle ({chain}); remove one `base:` line")
    values = _read(found)
    base = values.pop("base", None)
    if base is None:
        return [values]
    if not isinstance(base, str):
        raise UserError(f"base={base} in {path} is not a file name; write base: other.yaml")
    return [*_layers(found.parent / base, (*seen, found)), values]


def _read(path: Path) -> dict:
    """One YAML file as a dict; an empty file is an empty dict."""
    try:
        loaded = OmegaConf.load(path)
    except UnicodeDecodeError:
        raise UserError(f"config_path={path} is not UTF-8 text; save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"config_path={path} is not valid YAML: {_yaml_problem(error)}; correct it there") from None
    except OSError as error:
        raise UserError(f"config_path={path} cannot be read: {error}; give a YAML file") from None
    values = OmegaConf.to_container(loaded, resolve=False)
    if not isinstance(values, dict):
        raise UserError(f"config_path={path} holds a list; it must hold `key: value` lines")
    return values


def _override(text: str) -> dict:
    """`a.b=c` as {"a": {"b": c}}, where c is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override={text} is not of the form key.sub=value; try video.fps=16")
    if key.strip() == "base":
        raise UserError(f"override={text} cannot change the base of a file; pass --config_path {value}")
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"{key.strip()}={value}"]), resolve=False)
    except yaml.YAMLError as error:
        raise UserError(f"override={text} is not valid YAML: {_yaml_problem(error)}; close its brackets") from None
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"override={text} cannot be read: {str(error).splitlines()[0]}; write key.sub=value") from None


def _yaml_problem(error: yaml.YAMLError) -> str:
    """`line 3, column 7: ...` of a YAML error."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return str(error).splitlines()[0]
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"


SWITCHED = ("compile", "cuda_graphs")  # keys that know the words `on` and `off`


def _check(values: dict, section: type, prefix: str) -> dict:
    """`values` with empty sections dropped and chunk numbers made integers; refuses keys that `section` lacks."""
    hints = typing.get_type_hints(section)
    checked = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in hints:
            raise UserError(_unknown(name))
        if dataclasses.is_dataclass(hints[key]):
            if value is None:
                continue
            if not isinstance(value, dict):
                keys = ", ".join(typing.get_type_hints(hints[key]))
                raise UserError(f"{name}={value} is a section, not a value; set one of its keys: {keys}")
            value = _check(value, hints[key], f"{name}.")
        elif isinstance(value, dict) and typing.get_args(hints[key])[:1] == (int,):
            value = {int(k) if str(k).isdecimal() else k: v for k, v in value.items()}
        elif isinstance(value, bool) and key in SWITCHED:
            value = "on" if value else "off"  # as it was written: YAML takes these words for truth values
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}={value} is not a finite number; give a finite one")
        checked[key] = value
    return checked


def _unknown(name: str) -> str:
    """What to say of a key that does not exist: the nearest one that does, by its whole name or by its last part."""
    known = list(_fields(Config, ""))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if not near:
        by_last = {key.rpartition(".")[2]: key for key in reversed(known)}
        near = [by_last[key] for key in difflib.get_close_matches(name.rpartition(".")[2], by_last, n=1)]
    if not near:
        return f"{name} is not a setting; configs/schema.py lists them all"
    return f"{name} is not a setting; did you mean {near[0]}?"


def _fields(section: type, prefix: str) -> dict[str, Any]:
    """Full dotted key -> annotated type, sections included, for everything below `section`."""
    found = {}
    for key, hint in typing.get_type_hints(section).items():
        found[f"{prefix}{key}"] = hint
        if dataclasses.is_dataclass(hint):
            found |= _fields(hint, f"{prefix}{key}.")
    return found


def _writable_schema():
    """The schema as an OmegaConf tree. Frozen dataclasses become read-only nodes, which a merge could not fill."""
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
        alone = value
        for key in reversed(name.split(".")):
            alone = {key: alone}
        try:
            OmegaConf.to_container(OmegaConf.merge(_writable_schema(), alone), resolve=True)
        except REFUSED:
            shown = "null" if value is None else value
            return f"{name}={shown} has the wrong type; it must be {_type_name(fields[name])}"
    return f"the configuration cannot be built: {str(error).splitlines()[0]}; see configs/schema.py"


def _leaves(values: dict, fields: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """(full dotted key, value) of every setting in a checked layer."""
    for key, value in values.items():
        if dataclasses.is_dataclass(fields[f"{prefix}{key}"]):
            yield from _leaves(value, fields, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _type_name(hint: Any) -> str:
    """A type as a person would say it: `an integer`, `text or null`, `a list of lists of numbers`."""
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
