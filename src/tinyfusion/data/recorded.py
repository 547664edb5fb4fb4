"""Inputs of a model's calls as a file: recorded by a hook, written as safetensors, and read back to be run again.

A call is the arguments of `forward` by name: tensors, and None, booleans, numbers and texts, also inside of lists, tuples and
dicts. Tensors are those of the file; the structure around them is JSON in its header, with a record of whose calls they are.
Large sets are folders of such files, shards, with a manifest (`data/recorded_shards.py` writes them); all are mapped when read.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tinyfusion.config.loading import build_known
from tinyfusion.core.errors import UserError, prefixed
from tinyfusion.core.files import atomic_write, check_space, sha256_of
from tinyfusion.core.reading import parse_json, read_json_object
from tinyfusion.core.records import FORMAT_VERSION, is_ours, read_record
from tinyfusion.core.tensors import read_metadata, read_safetensors

T = TypeVar("T")
Call = dict[str, Any]
Outputs = tuple[Tensor, ...]
_HEADER = "tinyfusion"
_RECENT = 2  # calls with which a call shares equal tensors: guided pipelines call with two texts in turn
OUTPUT = "(output)"  # in a call: what it returned, no name of an argument
_ARGUMENTS = "calls"  # of the record: per call the arguments, with names of tensors in place of tensors
MANIFEST = "manifest.json"  # in a folder of shards
FACTS = ("class_name", "hash", "dtype")  # of the model, in the records of files, shards and folders
_OPEN = 256  # shards whose structure is retained; their tensors are mapped


class Lazy(Sequence[T], Generic[T]):
    """A sequence of `num` values that `get` makes on access."""

    def __init__(self, num: int, get: Callable[[int], T]) -> None:
        self.num, self.get = num, get

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.get(i) for i in range(self.num)[index]]
        return self.get(range(self.num)[index])


@dataclass(frozen=True)
class RecordedInputs:
    """Calls of one model. class_name, hash: of the model. dtype: type of its weights then. prompts: how many were drawn.

    outputs: the tensors that every call returned; None in files of earlier versions. shards: of a folder, opened when a call in
    them is read.
    """

    calls: Sequence[Call]
    class_name: str
    hash: str
    dtype: str
    prompts: int | None = None
    path: Path = field(default_factory=Path)
    outputs: Sequence[Outputs] | None = None
    shards: Shards | None = None

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the file, or of the manifest, which has those of the shards."""
        return fingerprint_of(self.path)

    def chunks(self) -> Iterator[tuple[int, Sequence[Call], Sequence[Outputs] | None]]:
        """All calls in order, a shard at a time: number of the first, the calls, and what they returned."""
        if self.shards is None:
            yield 0, self.calls, self.outputs
            return
        for number, first in enumerate(self.shards.firsts[:-1]):
            yield first, *self.shards.opened(number)

    def check_class(self, class_name: str, model: Path) -> None:
        """Raise UserError if the calls are of another class than that of `model`."""
        if self.class_name != class_name:
            raise UserError(
                f"{self.path} was recorded on a {self.class_name}, and {model} is a {class_name}: record inputs of its own, "
                "`tinyfusion record`"
            )

    def for_dtype(self, dtype: torch.dtype) -> Sequence[Call]:
        """The calls for weights of another type: tensors that had the type of the model then have the new one."""
        return (
            self.calls
            if self.dtype_then == dtype
            else Lazy(len(self.calls), lambda i: self.of_type(self.calls[i], dtype))
        )

    def of_type(self, value: Any, dtype: torch.dtype) -> Any:
        """A value with its tensors as `for_dtype` has them."""
        former = self.dtype_then
        return tree_map_only(Tensor, lambda t: t.to(dtype) if t.dtype == former else t, value)

    @property
    def dtype_then(self) -> Any:
        """The type of the model's weights when it was recorded."""
        return getattr(torch, self.dtype)


class Shards:
    """The shards of a folder. files: with the number of calls of each. facts: as in `FACTS`, of all of them."""

    def __init__(self, files: Sequence[tuple[Path, int]], facts: Mapping[str, Any]) -> None:
        self.files, self.facts = files, facts
        self.firsts = list(accumulate((num for _, num in files), initial=0))
        self.opened = lru_cache(maxsize=_OPEN)(self._opened)

    def at(self, index: int) -> tuple[Call, Outputs]:
        """A call and what it returned."""
        number = bisect_right(self.firsts, index) - 1
        calls, outputs = self.opened(number)
        return calls[index - self.firsts[number]], outputs[index - self.firsts[number]]

    def _opened(self, number: int) -> tuple[tuple[Call, ...], tuple[Outputs, ...]]:
        """The calls of a shard. Raises UserError where it is damaged, or of another model than its manifest says."""
        path, num = self.files[number]
        calls, outputs, record = _calls_in(path)
        if {name: record.get(name) for name in FACTS} != self.facts:
            raise UserError(f"{path} is of another model than {path.with_name(MANIFEST)} says: record the folder again")
        if len(calls) != num or outputs is None:
            raise UserError(
                f"{path} is damaged: {path.with_name(MANIFEST)} says {num:,} calls with outputs, it has {len(calls):,}"
            )
        return calls, outputs


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
        before = calls[: -_RECENT - 1 : -1]
        calls.append({name: _copied(value, [call.get(name) for call in before], name) for name, value in named.items()})

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


def returning_tuples(model: nn.Module, call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call that returns a tuple, also where the model returns another form by default."""
    takes = "return_dict" in inspect.signature(type(model).forward).parameters
    return {**call, "return_dict": False} if takes else dict(call)


def _copied(value: Any, before: Sequence[Any], name: str) -> Any:
    """The value with its tensors in memory of their own; one that is equal to that of a call `before` is shared with it."""
    if isinstance(value, Tensor):
        copy = value.detach().to("cpu", copy=True).contiguous()
        same = (each for each in before if isinstance(each, Tensor) and each.dtype == copy.dtype)
        return next((each for each in same if torch.equal(each, copy)), copy)
    if isinstance(value, list | tuple):
        others = [each for each in before if isinstance(each, list | tuple) and len(each) == len(value)]
        items = [_copied(item, [each[i] for each in others], name) for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        known = [each for each in before if isinstance(each, Mapping)]
        return {key: _copied(item, [each.get(key) for each in known], name) for key, item in value.items()}
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


# ------------------------------------------------------------------------------------------------------------------ files


def write_recorded(path: Path, calls: Sequence[Call], record: Mapping[str, Any]) -> None:
    """Write calls as one safetensors file, atomically. record: as of `stamp`, with class_name, hash and dtype of the model."""
    tensors, header = packed(calls, record)
    check_space(path, sum(tensor.nbytes for tensor in tensors.values()))
    with atomic_write(path) as new:
        save_file(tensors, new, {"format": "pt", **header})


def packed(calls: Sequence[Call], record: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of calls by name, equal ones once, and the header that says which call has which."""
    tensors: dict[str, Tensor] = {}
    names: dict[Any, str] = {}  # of tensors, by identity, which `calls` holds, and by content
    arguments = [_as_json(call, f"call-{number:04d}", tensors, names) for number, call in enumerate(calls)]
    return tensors, {_HEADER: json.dumps({**record, _ARGUMENTS: arguments})}


def _as_json(value: Any, name: str, tensors: dict[str, Tensor], names: dict[Any, str]) -> Any:
    """Plain values, {"tensor": name} for a tensor, which is put into `tensors` once. Tuples and dicts are marked as such."""
    if isinstance(value, Tensor):
        if id(value) not in names:
            names[id(value)] = names.setdefault((value.dtype, tuple(value.shape), digest_of(value)), name)
            tensors.setdefault(names[id(value)], value)
        return {"tensor": names[id(value)]}
    if isinstance(value, Mapping):
        return {"dict": {key: _as_json(item, f"{name}.{key}", tensors, names) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        items = [_as_json(item, f"{name}.{i}", tensors, names) for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    return value


def digest_of(tensor: Tensor) -> str:
    """A hash of the values of a tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.stride() != (1,):  # of one value, expanded
        flat = flat.clone(memory_format=torch.contiguous_format)
    content = flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy()
    return hashlib.sha256(content.data).hexdigest()[:32]


def recorded_in(path: Path) -> Any:
    """The record in the header of a file; None where it has none."""
    text = read_metadata(path).get(_HEADER)
    return None if text is None else parse_json(text, f"the header of {path}")


def fingerprint_of(path: Path) -> str:
    """What identifies recorded inputs: the SHA-256 of a file, or of the manifest of a folder."""
    return sha256_of(path / MANIFEST if path.is_dir() else path)


def read_recorded(path: Path) -> RecordedInputs:
    """The calls of a file, or of a folder of shards; tensors are mapped, so that they take no memory until they are used.

    Raises UserError on what `record` did not write, or did not finish: random inputs say nothing about blocks.
    """
    if path.is_dir():
        return _read_folder(path)
    calls, outputs, record = _calls_in(path)
    prompts, facts = record.get("prompts"), _facts(record, path)
    return RecordedInputs(
        calls, outputs=outputs, **facts, prompts=prompts if isinstance(prompts, int) else None, path=path
    )


def _facts(record: Mapping[str, Any], path: Path) -> dict[str, Any]:
    facts = {name: record.get(name) for name in FACTS}
    known = isinstance(getattr(torch, str(facts["dtype"]), None), torch.dtype)
    if not known or not all(isinstance(value, str) for value in facts.values()):
        raise UserError(f"{path} is damaged: its record lacks class, hash or type of the model: record it again")
    return {name: str(value) for name, value in facts.items()}


def _calls_in(path: Path) -> tuple[tuple[Call, ...], tuple[Outputs, ...] | None, dict[str, Any]]:
    """The calls of a file, what they returned (None where it does not say), and its record."""
    record = recorded_in(path)
    if not is_ours(record) or not isinstance(record.get(_ARGUMENTS), list):
        raise UserError(
            f"{path} holds no recorded inputs: wanted a file that `tinyfusion record` wrote from a pipeline and prompts (random "
            "tensors say nothing about blocks)"
        )
    _facts(record, path)
    tensors = read_safetensors(path)
    try:
        calls = tuple(_from_json(call, tensors) for call in record[_ARGUMENTS])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its record names what it does not hold ({error})") from error
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{path} is damaged: it holds no calls")
    outputs = tuple(tuple(call.pop(OUTPUT)) for call in calls) if all(OUTPUT in call for call in calls) else None
    if outputs is not None and not all(of_call and all(t.ndim for t in of_call) for of_call in outputs):
        raise UserError(f"{path} is damaged: it holds calls that returned nothing: record it again")
    return calls, outputs, record


@dataclass(frozen=True)
class _Shard:
    """An entry of the manifest."""

    file: str
    calls: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Manifest:
    """The fields of the manifest that are read."""

    class_name: str
    hash: str
    dtype: str
    prompts: int
    shards: list[_Shard]


def _read_folder(folder: Path) -> RecordedInputs:
    path = folder / MANIFEST
    if not path.is_file():
        record = read_record(folder / "run.json")
        unfinished = is_ours(record) and record.get("verb") == "record"
        what = "is unfinished: repeat its `record` command, which continues" if unfinished else "has no recorded inputs"
        raise UserError(f"{folder} {what} (there is no {MANIFEST})")
    values = read_json_object(path)
    if not is_ours(values) or "class_name" not in values:
        raise UserError(f"{folder} has no recorded inputs: {path} is of something else")
    if (version := values.get("format_version")) != FORMAT_VERSION:
        raise UserError(f"{path} has format_version {version}; this version reads {FORMAT_VERSION}: upgrade")
    with prefixed(f"{path} is damaged"):
        manifest = build_known(_Manifest, values, "")
    names = [shard.file for shard in manifest.shards]
    if (
        not names
        or len({*names}) < len(names)
        or not all(
            Path(shard.file).name == shard.file and shard.file.endswith(".safetensors") and shard.calls > 0
            for shard in manifest.shards
        )
    ):
        raise UserError(f"{path} is damaged: its shards are no list of different files with calls")
    for shard in manifest.shards:
        check_size(folder / shard.file, shard.bytes)
    facts = _facts(values, path)
    shards = Shards([(folder / shard.file, shard.calls) for shard in manifest.shards], facts)
    shards.opened(0)
    calls = Lazy(shards.firsts[-1], lambda i: shards.at(i)[0])
    outputs = Lazy(shards.firsts[-1], lambda i: shards.at(i)[1])
    return RecordedInputs(calls, outputs=outputs, **facts, prompts=manifest.prompts, path=folder, shards=shards)


def check_size(path: Path, num_bytes: int) -> None:
    """Raise UserError where a shard is missing, or has another size."""
    if not path.is_file():
        raise UserError(f"{path} is missing: repeat the `record` command of its folder with --overwrite")
    if path.stat().st_size != num_bytes:
        raise UserError(
            f"{path} is damaged: it has {path.stat().st_size:,} bytes, and its manifest says {num_bytes:,}; repeat the `record` "
            "command of its folder with --overwrite"
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
