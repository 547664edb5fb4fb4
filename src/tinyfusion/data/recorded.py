"""Inputs of a model's calls as a file: recorded by a hook, written as safetensors, and read back to be run again.

A call is the arguments of `forward` by name: tensors, and None, booleans, numbers and texts, also inside of lists, tuples and
dicts. Tensors are those of the file; the structure around them is JSON in its header, with a record of whose calls they are.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tinyfusion.core.errors import UserError
from tinyfusion.core.files import atomic_write, check_space
from tinyfusion.core.reading import check_memory, parse_json
from tinyfusion.core.records import is_ours
from tinyfusion.core.tensors import read_metadata, read_safetensors

Call = dict[str, Any]
_HEADER = "tinyfusion"
OUTPUT = "(output)"  # in a call: what it returned, no name of an argument
_ARGUMENTS = "calls"  # of the record: per call the arguments, with names of tensors in place of tensors


@dataclass(frozen=True)
class RecordedInputs:
    """Calls of one model. class_name, hash: of the model. dtype: type of its weights then. prompts: how many were drawn.

    outputs: the tensors that every call returned; None in files of earlier versions.
    """

    calls: tuple[Call, ...]
    class_name: str
    hash: str
    dtype: str
    prompts: int | None = None
    path: Path = field(default_factory=Path)
    outputs: tuple[tuple[Tensor, ...], ...] | None = None

    def check_class(self, class_name: str, model: Path) -> None:
        """Raise UserError if the calls are of another class than that of `model`."""
        if self.class_name != class_name:
            raise UserError(
                f"{self.path} was recorded on a {self.class_name}, and {model} is a {class_name}: record inputs of its own, "
                "`tinyfusion record`"
            )

    def for_dtype(self, dtype: torch.dtype) -> tuple[Call, ...]:
        """The calls for weights of another type: tensors that had the type of the model then have the new one."""
        former = getattr(torch, self.dtype)
        if former == dtype:
            return self.calls
        return tuple(changed(call, lambda t: t.to(dtype) if t.dtype == former else t) for call in self.calls)


@contextmanager
def recording(model: nn.Module, outputs: bool = False) -> Iterator[list[Call]]:
    """Within the context every call of `model` is added to the list, its arguments by name, tensors as copies in memory.

    outputs: what it returned is among them, as a list of tensors named `OUTPUT`.

    Raises UserError, inside of the call, on arguments that a file cannot hold.
    """
    calls: list[Call] = []
    signature = inspect.signature(type(model).forward)

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = signature.bind(module, *args, **kwargs).arguments
        named = dict(list(arguments.items())[1:])
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                named |= named.pop(parameter.name, {})
        before = calls[-1] if calls else {}
        calls.append({name: _copied(value, before.get(name), name) for name, value in named.items()})

    def returned(_module: nn.Module, _args: Any, output: Any) -> None:
        calls[-1][OUTPUT] = [tensor.detach().to("cpu", copy=True).contiguous() for tensor in output_tensors(output)]

    handles = [model.register_forward_pre_hook(hook, with_kwargs=True)]
    handles += [model.register_forward_hook(returned)] if outputs else []
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def output_tensors(output: Any) -> tuple[Tensor, ...]:
    """The tensors that a model returned, images along axis 0; a list with a tensor per image becomes one tensor."""
    if isinstance(output, Tensor):
        return (output,)
    if isinstance(output, list) and output and all(isinstance(item, Tensor) for item in output):
        return (torch.stack(output),)
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return tuple(tensor for value in values for tensor in output_tensors(value))


def _copied(value: Any, before: Any, name: str) -> Any:
    """The value with its tensors in memory of their own; one that is equal to that of the call before is shared with it."""
    if isinstance(value, Tensor):
        copy = value.detach().to("cpu", copy=True).contiguous()
        same = isinstance(before, Tensor) and before.dtype == copy.dtype and torch.equal(before, copy)
        return before if same else copy
    if isinstance(value, list | tuple):
        others = before if isinstance(before, list | tuple) and len(before) == len(value) else [None] * len(value)
        items = [_copied(*pair, name) for pair in zip(value, others, strict=True)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        known = before if isinstance(before, Mapping) else {}
        return {key: _copied(item, known.get(key), name) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(
        f"the argument {name} of the call holds a {type(value).__name__}, which no file holds: wanted tensors, numbers, texts, and "
        "lists and dicts of them"
    )


def spread(calls: Sequence[Call], num: int | None) -> list[Call]:
    """`num` of the calls, evenly spaced, first and last among them; all where there are no more, or `num` is None."""
    if num is None or len(calls) <= num:
        return list(calls)
    return [calls[round(i * (len(calls) - 1) / (num - 1)) if num > 1 else (len(calls) - 1) // 2] for i in range(num)]


def changed(value: Any, change: Any) -> Any:
    """A nest of lists, tuples and dicts with `change` applied to every tensor."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: changed(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [changed(item, change) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


# ------------------------------------------------------------------------------------------------------------------ files


def write_recorded(path: Path, calls: Sequence[Call], record: Mapping[str, Any]) -> None:
    """Write calls as one safetensors file, atomically. record: as of `stamp`, with class_name, hash and dtype of the model."""
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}  # by the identity of tensors, which `calls` holds
    arguments = [_as_json(call, f"call-{number:04d}", tensors, names) for number, call in enumerate(calls)]
    check_space(path, sum(tensor.nbytes for tensor in tensors.values()))
    header = {"format": "pt", _HEADER: json.dumps({**record, _ARGUMENTS: arguments})}
    with atomic_write(path) as new:
        save_file(tensors, new, header)


def _as_json(value: Any, name: str, tensors: dict[str, Tensor], names: dict[int, str]) -> Any:
    """Plain values, {"tensor": name} for a tensor, which is put into `tensors` once. Tuples and dicts are marked as such."""
    if isinstance(value, Tensor):
        stored = names.setdefault(id(value), name)
        tensors[stored] = value
        return {"tensor": stored}
    if isinstance(value, Mapping):
        return {"dict": {key: _as_json(item, f"{name}.{key}", tensors, names) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        items = [_as_json(item, f"{name}.{i}", tensors, names) for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    return value


def recorded_in(path: Path) -> Any:
    """The record in the header of a file; None where it has none."""
    text = read_metadata(path).get(_HEADER)
    return None if text is None else parse_json(text, f"the header of {path}")


def read_recorded(path: Path) -> RecordedInputs:
    """The calls of a file that `write_recorded` wrote; tensors are mapped from it.

    Raises UserError on other files: random inputs say nothing about blocks.
    """
    record = recorded_in(path)
    if not is_ours(record) or not isinstance(record.get(_ARGUMENTS), list):
        raise UserError(
            f"{path} holds no recorded inputs: wanted a file that `tinyfusion record` wrote from a pipeline and prompts (random "
            "tensors say nothing about blocks)"
        )
    facts = {name: record.get(name) for name in ("class_name", "hash", "dtype")}
    known = isinstance(getattr(torch, str(facts["dtype"]), None), torch.dtype)
    if not known or not all(isinstance(value, str) for value in facts.values()):
        raise UserError(f"{path} is damaged: its record lacks class, hash or type of the model: record it again")
    check_memory(path.stat().st_size, f"{path}")
    tensors = read_safetensors(path)
    try:
        calls = tuple(_from_json(call, tensors) for call in record[_ARGUMENTS])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its record names what it does not hold ({error})") from error
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{path} is damaged: it holds no calls")
    prompts = record.get("prompts")
    outputs = tuple(tuple(call.pop(OUTPUT)) for call in calls) if all(OUTPUT in call for call in calls) else None
    if outputs is not None and not all(of_call and all(t.ndim for t in of_call) for of_call in outputs):
        raise UserError(f"{path} is damaged: it holds calls that returned nothing: record it again")
    return RecordedInputs(
        calls, outputs=outputs, **facts, prompts=prompts if isinstance(prompts, int) else None, path=path
    )


def _from_json(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_from_json(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {key: _from_json(item, tensors) for key, item in inner.items()}
    if kind == "tuple":
        return tuple(_from_json(item, tensors) for item in inner)
    raise KeyError(kind)
