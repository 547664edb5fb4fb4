"""Transformers of diffusers as one ONNX graph each, whose inputs are the tensors that `forward` takes, by their names.

Which axes may have any length follows from calls of other sizes: an axis that differs between them is left to the exporter, and a
size that changes an argument which is no tensor (`img_shapes`, lists with a tensor per image) is fixed in the graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tinyfusion.core.errors import UserError
from tinyfusion.data.recorded import Call, output_tensors, returning_tuples
from tinyfusion.export.onnx_folder import check_graph, save_graph
from tinyfusion.export.onnx_graph import EXAMPLES, exported, onnx_module, reason_of
from tinyfusion.families.diffusers_classes.call_examples import CallSizes
from tinyfusion.families.stage import Stage

if TYPE_CHECKING:
    from onnx import ModelProto

Calls = Callable[[CallSizes, torch.Generator], Call]
_OTHER = CallSizes(images=3, frames=5, rows=6, columns=8, tokens=13)
_AXES = {"images": "batch", "frames": "frames", "rows": "height", "columns": "width", "tokens": "text_tokens"}


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a call by their path: `hidden_states`, `added_cond_kwargs.resolution`, `x.0`; in the order of torch's pytrees."""
    if isinstance(value, Tensor):
        yield name, value
    listed: Any = enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in value.items() if isinstance(value, Mapping) else listed:
        yield from named_tensors(item, f"{name}.{key}" if name else str(key))


def constants_of(call: Call) -> dict[str, Any]:
    """The arguments of a call that hold no tensors and are not None: a graph has them as they are."""
    held = {name: value for name, value in call.items() if value is not None and not dict(named_tensors(value))}
    return {name: value for name, value in held.items() if value not in ([], (), {})}


def structure_of(call: Call) -> Any:
    """A call without the values of its tensors; calls of one structure are calls of one graph."""
    return tree_map_only(Tensor, lambda _: ..., call)


def free_sizes(calls: Calls, names: Sequence[str]) -> tuple[str, ...]:
    """The sizes whose change leaves the structure of a call."""
    generator = torch.Generator()
    structure = structure_of(calls(CallSizes(), generator))

    def same(**sizes: int) -> bool:
        return bool(structure_of(calls(CallSizes(**sizes), generator)) == structure)

    free = [name for name in names if same(**{name: getattr(_OTHER, name)})]
    return tuple(name for name in free if name != "images" or same(images=1))


def transformer_stage(module: nn.Module, calls: Calls, free: Sequence[str]) -> Stage:
    """The forward pass as a function of its tensors. free: sizes that may differ from call to call; the others are fixed.

    Without free `images` a call is one image. Raises UserError where the module does not take a call of another size.
    """
    traced = CallSizes(images=EXAMPLES if "images" in free else 1)

    def of_sizes(generator: torch.Generator, **sizes: int) -> dict[str, Tensor]:
        return dict(named_tensors(calls(dataclasses.replace(traced, **sizes), generator)))

    def example(num: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Of one image and of three; those of three are of other sizes, too."""
        images = {"images": num} if "images" in free else {}
        others = {name: getattr(_OTHER, name) for name in free if name != "images"} if num > EXAMPLES else {}
        return of_sizes(generator, **images, **others)

    plain = calls(traced, torch.Generator())

    def outputs(**tensors: Tensor) -> tuple[Tensor, ...]:
        values = iter(tensors.values())
        return output_tensors(module(**returning_tuples(module, tree_map_only(Tensor, lambda _: next(values), plain))))

    @torch.no_grad()
    def shapes(**sizes: int) -> dict[str, tuple[int, ...]]:
        tensors = of_sizes(torch.Generator().manual_seed(0), **sizes)
        try:
            found = outputs(**tensors)
        except Exception as error:
            given = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
            raise UserError(f"a {type(module).__name__} does not take {given}: {reason_of(error)}") from error
        return {
            name: tuple(tensor.shape) for name, tensor in (*tensors.items(), *zip(_names(found), found, strict=True))
        }

    base = shapes()
    others = {name: shapes(**{name: getattr(_OTHER, name)}) for name in free}
    names = tuple(name for name in base if name not in dict(named_tensors(plain)))

    varying = _varying(base, others)

    def run(**tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        lengths: dict[str, int] = {}
        for tensor, axes in varying.items():
            for axis, name in axes.items() if tensor in tensors else ():
                length = tensors[tensor].shape[axis]  # without this check the exporter takes it for a size of its own
                torch._check(length == lengths.setdefault(name, length))
        found = outputs(**tensors)
        return found[0] if len(found) == 1 else found

    return Stage(module, run, example, varying, names)


def _names(outputs: Sequence[Tensor]) -> list[str]:
    return ["output", *(f"output_{number}" for number in range(1, len(outputs)))]


def _varying(
    base: Mapping[str, tuple[int, ...]], others: Mapping[str, Mapping[str, tuple[int, ...]]]
) -> dict[str, dict[int, str]]:
    """The axes that differ, named by the sizes that they depend on: axes of one name have one length."""
    named: dict[tuple[str, int], str] = {}
    varying: dict[str, dict[int, str]] = {}
    for tensor, shape in base.items():
        for axis, length in enumerate(shape):
            causes = [name for name, shapes in others.items() if shapes[tensor][axis] != length]
            if not causes:
                continue
            label = _label(causes)
            taken = [name for (known, _), name in named.items() if known == label]
            name = named.setdefault((label, length), label if not taken else f"{label}_{len(taken) + 1}")
            varying.setdefault(tensor, {})[axis] = name
    return varying


def _label(causes: Sequence[str]) -> str:
    if len(causes) > 1 and not {*causes} - {"frames", "rows", "columns"}:
        return "image_tokens"
    return "_".join(_AXES[name] for name in causes)


def write_graph(
    path: Path, module: nn.Module, calls: Calls, sizes: Sequence[str]
) -> tuple[Stage, dict[str, dict[str, Any]], float]:
    """Write the graph. sizes: that `calls` takes into account: all are free, or all but the number of images, which is one then.

    Returns its stage, whose axes are those that are free, its inputs and outputs (shape and dtype by name), and its largest
    difference from torch. Raises UserError, with the last reason, where no graph gives the numbers of the network.
    """
    free = free_sizes(calls, sizes)
    while True:
        try:
            _check_free(module, sizes, free)
            stage = transformer_stage(module, calls, free)
            graph = exported(stage, all_vary=False)
            described = _described(graph)
            taken = tuple(name for name in free if _is_free(calls, name, described))
            if taken == free:
                save_graph(graph, path)
                del graph  # a session is opened next
                return stage, described, _checked(path, stage)
            _check_free(module, sizes, taken)
        except UserError as error:
            path.unlink(missing_ok=True)
            path.with_name(f"{path.name}.data").unlink(missing_ok=True)
            if "images" not in free and {*sizes} <= {"images"}:
                raise
            if "images" not in free:
                hint = (
                    ""
                    if "--inputs" in str(error)
                    else "; a graph of the sizes of recorded calls, --inputs FILE, may do"
                )
                raise UserError(f"{error}{hint}") from error
        free = tuple(name for name in free if name != "images")


def _check_free(module: nn.Module, sizes: Sequence[str], free: Sequence[str]) -> None:
    """Raise UserError where another size than the number of images would be fixed: at which length is not known."""
    if fixed := [_AXES[name] for name in sizes if name not in free and name != "images"]:
        raise UserError(
            f"graphs of a {type(module).__name__} have one size of {', '.join(fixed)}: give recorded calls of that size, --inputs FILE, "
            "which `tinyfusion record` writes"
        )


def _described(graph: ModelProto) -> dict[str, dict[str, Any]]:
    """Shape and dtype of the inputs and outputs of a graph; an axis of any length has a name."""
    helper = onnx_module("onnx.helper")
    return {
        value.name: {
            "shape": [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim],
            "dtype": str(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)),
        }
        for value in (*graph.graph.input, *graph.graph.output)
    }


def _is_free(calls: Calls, name: str, described: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether every axis of the inputs that depends on a size has any length in the graph."""
    plain, other = (
        dict(named_tensors(calls(CallSizes(**sizes), torch.Generator())))
        for sizes in ({}, {name: getattr(_OTHER, name)})
    )
    return all(
        isinstance(described[tensor]["shape"][axis], str)
        for tensor, value in plain.items()
        for axis, length in enumerate(value.shape)
        if other[tensor].shape[axis] != length
    )


def _checked(path: Path, stage: Stage) -> float:
    """As `check_graph`. Raises UserError also where onnxruntime does not run the graph."""
    try:
        return check_graph(path, stage)
    except UserError:
        raise
    except Exception as error:  # of onnxruntime: of no common type
        raise UserError(f"onnxruntime does not run the graph of this network: {reason_of(error)}") from error
