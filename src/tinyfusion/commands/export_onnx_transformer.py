"""`export --to onnx` of a transformer of diffusers: the graph of its forward pass."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from tinyfusion.commands.export_onnx import GraphWriter, check_packages, graph_folder
from tinyfusion.config.recipe import FlowSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import check_memory
from tinyfusion.core.rng import Randomness
from tinyfusion.data.recorded import Call, RecordedInputs, read_recorded, spread
from tinyfusion.data.recorded_batches import PLAIN, RecordedBatches
from tinyfusion.export.onnx_folder import GraphForm
from tinyfusion.export.onnx_transformer import constants_of, named_tensors
from tinyfusion.export.onnx_transformer_folder import TracedCalls, write_onnx_transformer
from tinyfusion.families.diffusers_classes.call_examples import CallSizes, random_call
from tinyfusion.families.diffusers_classes.call_rows import CALLS, LAYOUTS
from tinyfusion.families.diffusers_classes.folder import TransformerFolder
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.jobs.transformer_sources import open_transformer_model
from tinyfusion.models.transformer import TransformerModel

_COPIES = 3  # of the weights in memory: the module, the graph, onnxruntime
_COMPARED = 16  # recorded calls whose constants are compared


def export_onnx_transformer(
    options: RunOptions, source: str, folder: TransformerFolder, form: GraphForm
) -> dict[str, Any]:
    """Write the folder at `options.out`; returns what `--json` prints. Raises UserError where the model has no such graph."""
    check_packages()
    if form.guided:
        raise UserError(
            f"--guided is for models that `sample` draws by itself, and the pipeline of a {folder.class_name} mixes its guidance: leave "
            "it out"
        )
    inputs = None if options.inputs is None else read_recorded(options.inputs)
    _check_source(folder, inputs)
    plain = {"to": "onnx", "model": folder.hash, "quantize": form.quantize}
    plain |= {"inputs": inputs.fingerprint} if inputs else {}

    num_bytes = 4 * sum(stored.numel for stored in folder.weights.values())

    def prepared() -> GraphWriter:
        check_memory(_COPIES * num_bytes, f"the graph of {folder.path} in float32")
        model = open_transformer_model(source, folder, FlowSection(), options.blocks)
        module: Any = model.module.float().requires_grad_(False)
        calls = _random(model) if inputs is None else _recorded(folder, inputs)
        return lambda record: write_onnx_transformer(model, module, options.out, calls, form, record)

    return graph_folder(options, plain, ["model"], num_bytes, prepared)


def _check_source(folder: TransformerFolder, inputs: RecordedInputs | None) -> None:
    """Raise UserError where there are no calls to trace, or where a graph of those that are recorded would compute something else."""
    if inputs is None:
        if folder.class_name not in CALLS:
            raise UserError(
                f"it is not known how pipelines call a {folder.class_name}: give recorded calls, --inputs FILE, which `tinyfusion record` "
                "writes"
            )
        return
    inputs.check_class(folder.class_name, folder.path)
    first, *others = spread(inputs.calls, _COMPARED)
    for other in others:
        if _shapes(other) == _shapes(first) and (odd := _different(constants_of(first), constants_of(other))):
            raise UserError(
                f"the argument {odd} of a {folder.class_name} is no tensor and differs from call to call in {inputs.path}; in a graph it "
                "would be a constant: export to another format"
            )


def _shapes(call: Call) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(tensor.shape)) for name, tensor in named_tensors(call)]


def _different(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """An argument that is not the same in both."""
    return next((name for name in {**one, **other} if one.get(name) != other.get(name)), None)


def _random(model: TransformerModel) -> TracedCalls:
    """Calls as the pipeline of the class makes them, of any size, with random values."""
    call = CALLS[model.folder.class_name]
    config = {**dict(model.module.config), "_class_name": model.folder.class_name}  # type: ignore[arg-type]
    context = call.resolved(dataclasses.replace(model.context, config=config, trim=False))

    def make(sizes: CallSizes, generator: torch.Generator) -> Call:
        try:
            return random_call(call, context, sizes, generator)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"a {context.name} of this config has no random call ({error}): give recorded calls, --inputs FILE"
            ) from error

    return TracedCalls(make, "random", tuple(field.name for field in dataclasses.fields(CallSizes)))


def _recorded(folder: TransformerFolder, inputs: RecordedInputs) -> TracedCalls:
    """Recorded rows, as many as wanted; all other sizes are theirs."""
    layout = LAYOUTS.get(folder.class_name, PLAIN)
    batches = RecordedBatches(inputs, torch.float32, Randomness(0), torch.device("cpu"), layout)
    return TracedCalls(lambda sizes, _: batches.rows(0, sizes.images).call, f"recorded in {Path(inputs.path).name}")
