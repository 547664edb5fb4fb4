"""Convert TOML and `--set` to the dataclasses of `recipe.py`, and back to plain values. Standard library only."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import numbers
import os
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any

from tinyfusion.config.constraints import Ge, Le, Limit, Location
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import parse_toml, read_text

_KINDS: dict[type, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
# the annotations of a dataclass, with limits and texts
_hints: Callable[[Any], dict[str, Any]] = cache(partial(typing.get_type_hints, include_extras=True))
_SHORT_NUMBER = re.compile(r"[+-]?(\d+\.|\.\d+)([eE][+-]?\d+)?")  # 5. and .5, which are numbers, and none of TOML
_LARGEST = 10**308  # of whole numbers that become floating point
_INT64 = (Ge(-(2**63) + 1), Le(2**63 - 1))  # whole numbers without limits of their own: what tensors and files can hold


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint "; did you mean 'X'?", or the list of what there is."""
    names = sorted(known)
    close = _closest(name, names, 0.5)
    return f"; did you mean {close!r}?" if close else f"; there is {', '.join(names)}" if names else ""


def nearest_choice(value: object, choices: Iterable[object]) -> str:
    """A hint "; did you mean X?", or nothing, for messages that list all choices."""
    close = _closest(str(value), map(str, choices))
    return f"; did you mean {close}?" if close else ""


def _closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The only one of `known` that begins with `name`, else the most similar with a ratio of `cutoff`; None if none has it."""
    names = list(known)
    longer = [other for other in names if other.startswith(name)] if name else []
    similar = longer if len(longer) == 1 else difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return next(iter(similar), None)


def shipped_recipes() -> dict[str, Path]:
    """Recipe files that come with the package, by name."""
    folder = Path(str(resources.files("tinyfusion"))) / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_recipe(
    name_or_file: str | None, settings: Sequence[str] = (), overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """A recipe by shipped name or TOML file (None: the published defaults), with `section.field=value` settings.

    overrides: {dotted field: value} of command-line options. Settings take precedence over overrides, these over the file; the
    fields in any of them are in `assigned`. In paths, `~` is the home folder; a relative path in a file is resolved in the
    folder of the file if it exists there. Raises UserError on unknown names, with the nearest one.
    """
    values, folder = ({}, None) if name_or_file is None else _read_toml(name_or_file)
    values = _located(Recipe, values, folder)
    for path, value in (overrides or {}).items():
        _assign(values, path.split("."), value, path)
    for setting in settings:
        path, separator, text = setting.partition("=")
        if not separator:
            raise UserError(f"--set wants section.field=value; got {_shown(setting)}")
        _assign(values, path.strip().split("."), _parse_scalar(text.strip()), path)
    recipe: Recipe = build(Recipe, _located(Recipe, values), "")
    return dataclasses.replace(recipe, assigned=frozenset(flatten(values)))


def _read_toml(name_or_file: str) -> tuple[dict[str, Any], Path | None]:
    """The values of a recipe, and the folder of its file; None of a shipped one."""
    recipes = shipped_recipes()
    path = recipes.get(name_or_file)
    if path is None:
        path = Path(os.path.expanduser(name_or_file))
        if path.suffix != ".toml":
            raise UserError(f"unknown recipe {name_or_file!r}{nearest(name_or_file, recipes)} (or give a .toml file)")
        if not path.is_file():
            raise UserError(f"recipe file {name_or_file} does not exist")
    values = parse_toml(read_text(path), f"recipe {path}")
    values.setdefault("name", path.stem)
    return values, None if name_or_file in recipes else path.parent


def _located(kind: Any, value: Any, folder: Path | None = None) -> Any:
    """A section with the paths in its fields expanded; see `Location`."""
    if not isinstance(value, Mapping) or not dataclasses.is_dataclass(kind):
        return value
    hints, expanded = _hints(kind), dict(value)
    for name, inner in value.items():
        markers = getattr(hints.get(name), "__metadata__", ())
        location = next((marker for marker in markers if isinstance(marker, Location)), None)
        if location is None:
            expanded[name] = _located(hints.get(name), inner, folder)
        elif isinstance(inner, str):
            expanded[name] = location.expanded(inner, folder)
        elif isinstance(inner, list):
            expanded[name] = [location.expanded(item, folder) if isinstance(item, str) else item for item in inner]
    return expanded


def _parse_scalar(text: str) -> Any:
    """A TOML value where the text is one, else the text itself."""
    if text.lower() in ("none", "null"):
        return None
    try:
        return parse_toml(f"value = {text}", text)["value"]
    except UserError:
        return float(text) if _SHORT_NUMBER.fullmatch(text) else text


def _assign(values: dict[str, Any], keys: list[str], value: Any, path: str) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise UserError(f"{path}: {key} is a value, not a section")
    values[keys[-1]] = value


def build(kind: Any, value: Any, path: str, limits: tuple[Limit, ...] = ()) -> Any:
    """`value` (from TOML or JSON) as `kind`: a dataclass, Literal, union with None, tuple, list, dict, scalar or Any.

    limits: of the number, in addition to those in `kind`. Raises UserError that names `path`.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return build(args[0], value, path, tuple(limit for limit in args[1:] if isinstance(limit, Limit)))
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, path)
    if origin is typing.Literal:
        if value not in args:
            text = _shown(value)
            near = nearest_choice(text.strip("'"), args)
            raise UserError(f"{path} must be one of {', '.join(map(str, args))}; got {text}{near}")
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else build(next(a for a in args if a is not type(None)), value, path, limits)
    if origin is tuple:
        return _build_tuple(args, value, path)
    if origin in (list, dict):
        return _build_container(origin, args, value, path)
    return value if kind is Any else _build_scalar(kind, value, path, limits)


def checked(kind: Any, value: Any, path: str) -> Any:
    """A value made in Python, a section or that of one field, as `kind` within the limits of a recipe.

    Whole and real numbers of other libraries become Python's. Raises UserError that names `path`, or the field below it.
    """
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and not isinstance(value, kind):
        raise UserError(f"wanted a {kind.__name__}; got {_shown(value)}")
    return build(kind, _spread(value), path)


def _spread(value: Any) -> Any:
    """Sections as fields with values, whose types and limits `build` checks again."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {name: _spread(getattr(value, name)) for name in _fields(value)}
    if isinstance(value, list | tuple):
        return [_spread(item) for item in value]
    if isinstance(value, bool | int | float):
        return value
    return (
        int(value)
        if isinstance(value, numbers.Integral)
        else float(value)
        if isinstance(value, numbers.Real)
        else value
    )


def build_known(kind: Any, values: Any, path: str) -> Any:
    """As `build` for a dataclass, without unknown fields, which a newer version may have written."""
    if isinstance(values, Mapping):
        values = {key: value for key, value in values.items() if key in _fields(kind)}
    return build(kind, values, path)


def _build_dataclass(kind: Any, value: Any, path: str) -> Any:
    if isinstance(value, kind):  # a default
        return value
    if not isinstance(value, Mapping):
        fields = ", ".join(_fields(kind))
        raise UserError(f"{path or 'the recipe'} is a section with the fields {fields}; got {_shown(value)}")
    hints, known, prefix = _hints(kind), _fields(kind), f"{path}." if path else ""
    if (unknown := next((key for key in value if key not in known), None)) is not None:
        raise UserError(f"unknown field {prefix + unknown!r}{_nearest_field(prefix + unknown, known)}")
    arguments: dict[str, Any] = {}
    for key, inner in value.items():
        factory = known[key].default_factory
        default = known[key].default if factory is dataclasses.MISSING else factory()
        if dataclasses.is_dataclass(default) and isinstance(inner, Mapping):
            inner = {**{f.name: getattr(default, f.name) for f in dataclasses.fields(default)}, **inner}
        arguments[key] = build(hints[key], inner, f"{prefix}{key}")
    required = (f.name for f in known.values() if f.default is f.default_factory is dataclasses.MISSING)
    if missing := next((name for name in required if name not in arguments), None):
        raise UserError(f"{prefix}{missing} is missing")
    return kind(**arguments)


def _fields(kind: Any) -> dict[str, dataclasses.Field[Any]]:
    """The compared fields of a dataclass or a value of one; others are never written."""
    return {f.name: f for f in dataclasses.fields(kind) if f.compare}


def _nearest_field(where: str, siblings: Iterable[str]) -> str:
    """A hint at a similar field: of the same section, or below it."""
    section, _, name = where.rpartition(".")
    below = {path for path in _documented() if path.startswith(section)}
    meant = {path.rpartition(".")[2]: path for path in sorted(below, key=len, reverse=True)}
    close = _closest(name, {*meant, *siblings})
    if not close:
        return f"{nearest(name, siblings)} (all fields: tinyfusion recipes --list-fields)"
    return f"; did you mean {meant.get(close, close)!r}?"


def _build_tuple(args: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = [_parse_scalar(part.strip()) for part in value.strip("[]()").split(",") if part.strip()]
    if not isinstance(value, list | tuple):
        value = [value]
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(build(args[0], item, path) for item in value)
    if len(value) != len(args):
        raise UserError(f"{path} wants {len(args)} values; got {_shown(value)}")
    return tuple(build(a, item, path) for a, item in zip(args, value, strict=True))


def _build_container(kind: Any, args: tuple[Any, ...], value: Any, path: str) -> Any:
    """A list or a dict, of one kind of items."""
    if not isinstance(value, kind):
        raise UserError(f"{path} wants {'a list' if kind is list else 'names with values'}; got {_shown(value)}")
    if kind is list:
        return [build(args[0], item, path) for item in value]
    return {name: build(args[1], item, f"{path}.{name}") for name, item in value.items()}


def _build_scalar(kind: Any, value: Any, path: str, limits: tuple[Limit, ...]) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(max(-_LARGEST, min(value, _LARGEST)))
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return _shown(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{path} wants {_KINDS.get(kind, kind.__name__)}; got {_shown(value)}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{path} wants a finite number; got {value}")
    if kind is int and not limits:
        limits = _INT64
    for place, limit in enumerate(limits):
        if not limit.holds(value, limit.bound):
            raise UserError(f"{path} must be {' and '.join(map(str, limits[: place + 1]))}; got {_shown(value)}")
    return value


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 120
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = 20


def _shown(value: Any) -> str:
    """A value for a message, shortened."""
    try:
        return _REPR.repr(value)
    except ValueError:  # whole numbers of more digits than Python writes
        return f"a number of {value.bit_length():,} bits" if isinstance(value, int) else f"a {type(value).__name__}"


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {name: getattr(value, name) for name in _fields(value)}
    return json.loads(json.dumps(value, default=lambda v: to_plain(v) if dataclasses.is_dataclass(v) else str(v)))


def first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """(field in dotted form, old value, new value) where two plain values first differ; None if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*new, *(k for k in old if k not in new)]
        below = (first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key) for key in keys)
        return next(filter(None, below), None)
    return None if old == new else (path, old, new)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """A plain tree as {dotted field: leaf}."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(flatten(inner, f"{prefix}.{key}" if prefix else key))
    return flat


def field_kind(path: str) -> Any:
    """The type of a field of a recipe, without its limits."""
    kind: Any = Recipe
    for name in path.split("."):
        kind = typing.get_type_hints(kind)[name]
    return kind


def field_help(path: str) -> str:
    """Meaning and default of a field of a recipe."""
    default, meaning = _documented()[path]
    return meaning if default is False or default in (None, "", []) else f"{meaning} (default {default})"


@cache
def _documented() -> dict[str, tuple[Any, str]]:
    """Default and meaning of every field of a recipe."""
    return {name: (default, meaning) for name, default, meaning in recipe_fields(Recipe())}


def recipe_fields(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted field, default as a plain value, meaning) of every field under a section, in order."""
    hints = _hints(type(section))
    for name in _fields(section):
        value, path = getattr(section, name), f"{prefix}{name}"
        if dataclasses.is_dataclass(value):
            yield from recipe_fields(value, f"{path}.")
        elif typing.get_origin(hints[name]) is typing.Annotated:
            kind = typing.get_args(hints[name])[0]
            choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
            one_of = f" (one of {', '.join(map(str, choices))})" if choices else ""
            yield path, to_plain(value), hints[name].__metadata__[-1] + one_of
