"""A row for a class that the table lacks: guessed from its configuration and source, and tested before it is offered."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from typing import Any

from torch import nn

from tinyfusion.core.errors import UserError
from tinyfusion.families.diffusers_classes.cutting import Cut
from tinyfusion.families.diffusers_classes.folder import class_of
from tinyfusion.families.diffusers_classes.rows import BlockList, Row, row_text


def is_transformer(name: str) -> bool:
    """Whether diffusers has a transformer class of this name."""
    try:
        class_of(name)
    except UserError:
        return False
    return True


def guessed_row(config: Mapping[str, Any]) -> str | None:
    """The TOML row of the class that a config names, or None where no guess passes.

    Lists are those module lists of blocks of one class that become shorter by one when a whole number of the config does; their
    streams are the names that `forward` of the block returns. Such a row is offered if the config that it writes gives a model
    with exactly the tensors that it leaves. The order of two streams follows from the source alone: no block is run.
    """
    name = str(config["_class_name"])
    plain = {field: value for field, value in config.items() if not field.startswith("_")}
    model = _built(name, plain)
    if model is None:
        return None
    counts: dict[str, list[str]] = {}  # of every list that a count makes shorter
    for count, value in _sizes(name, plain).items():
        shorter = _built(name, {**plain, count: value - 1}) if value > 1 else None
        for path in _shortened(model, shorter) if shorter is not None else ():
            counts.setdefault(path, []).append(count)
    own = {path: fields[0] for path, fields in counts.items() if len(fields) == 1}
    streams = {path: _streams(next(model.get_submodule(path).children())) for path in own}
    if not own or None in streams.values():
        return None
    order = [path for path, _ in model.named_modules() if path in own]
    parallel = {
        path: [each for each in order if own[each] in fields] for path, fields in counts.items() if path not in own
    }
    lists = tuple(BlockList(path, own[path], streams[path] or ()) for path in order)
    row = Row(lists, parallel={path: tuple(each) for path, each in parallel.items()})
    return row_text(name, row) if _cuts(name, plain, model, row) else None


def _built(name: str, config: Mapping[str, Any]) -> nn.Module | None:
    """The model on the meta device; None where the class refuses the config."""
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            model: nn.Module = class_of(name).from_config(dict(config))
    except Exception:  # whatever a class of others raises on sizes that it was not made for
        return None
    return model


def _sizes(name: str, config: Mapping[str, Any]) -> dict[str, int]:
    """Whole numbers of the config, and defaults of the class where it has none."""
    parameters = inspect.signature(class_of(name).__init__).parameters
    values = {field: config.get(field, parameter.default) for field, parameter in parameters.items()}
    return {field: value for field, value in values.items() if type(value) is int and value > 0}


def _shortened(model: nn.Module, shorter: nn.Module) -> list[str]:
    """Paths of module lists of one class that have one entry less in `shorter`, and are otherwise there."""
    lists = dict(shorter.named_modules())
    return [
        path
        for path, part in model.named_modules()
        if isinstance(part, nn.ModuleList)
        and isinstance(other := lists.get(path), nn.ModuleList)
        and len(part) == len(other) + 1
        and len({type(block) for block in part}) == 1
        and "forward" in vars(type(part[0]))
    ]


def _streams(block: nn.Module) -> tuple[str, ...] | None:
    """Parameters of a block that its `forward` returns, by name; its first one where it returns something else alone."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(block).forward)))
    except (OSError, SyntaxError):
        return None
    parameters = list(inspect.signature(type(block).forward).parameters)[1:]
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return) and node.value is not None]
    longest = max((node.elts if isinstance(node, ast.Tuple) else [node] for node in returned), key=len, default=[])
    names = [node.id for node in longest if isinstance(node, ast.Name) and node.id in parameters]
    if len(longest) == 1 and parameters:
        return (names[0] if names else parameters[0],)
    return tuple(names) if names and len(names) == len(longest) else None


def _cuts(name: str, config: Mapping[str, Any], model: nn.Module, row: Row) -> bool:
    """Whether a block less of every list leaves exactly the tensors of the model that the rewritten config describes."""
    depths = {each.path: len(model.get_submodule(each.path)) for each in row.lists}  # type: ignore[arg-type]
    for gone in (0, -1):
        kept = {path: [i for i in range(depth) if i != gone % depth] for path, depth in depths.items()}
        try:
            cut = Cut(row, config, depths, kept)
        except UserError:
            return False
        student = _built(name, {**config, **cut.config_changes()})
        tensors = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        left = {new: tensors[old] for new, (old, _) in cut.source(list(tensors)).items()}
        if student is None or left != {key: tuple(tensor.shape) for key, tensor in student.state_dict().items()}:
            return False
    return True
