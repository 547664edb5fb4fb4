"""Folders of the graph of a transformer of diffusers: the graph, sampler.json with its inputs and its process, card and record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyfusion.core.rundir import atomic_write
from tinyfusion.export.onnx_folder import FACTS, FILES, QUANTIZED, GraphForm, quantize_file, write_records
from tinyfusion.export.onnx_graph import EXAMPLES
from tinyfusion.export.onnx_transformer import Calls, constants_of, write_graph
from tinyfusion.export.transformer import write_card
from tinyfusion.families.diffusers_classes.call_examples import CallSizes
from tinyfusion.families.diffusers_classes.call_rows import CALLS
from tinyfusion.families.stage import Stage
from tinyfusion.models.transformer import TransformerModel

_GRAPH = "model.onnx"


@dataclass(frozen=True)
class TracedCalls:
    """Calls to trace. sizes: fields of `CallSizes` that `make` takes into account. source: where they come from, as a phrase."""

    make: Calls
    source: str
    sizes: tuple[str, ...] = field(default=("images",))


def process_facts(model: TransformerModel) -> dict[str, Any]:
    """What a sampler needs besides the graph: time, prediction, guidance, and the scheduler of the pipeline, where they are known."""
    call, scheduler = CALLS.get(model.folder.class_name), dict(model.scheduler)
    facts: dict[str, Any] = {"process": call.process if call else None}
    if call is not None and call.process == "flow":
        time = call.convention
        named = time.time if time.scale == 1 else f"{time.scale:g} * ({time.time})"
        facts |= {
            "timesteps": f"the time is {named}, where sigma is 1 at noise and 0 at data",
            "time_scale": time.scale,
            "prediction": f"velocity: {time.velocity}",
            "shift": scheduler.get("shift"),
        }
    elif call is not None:
        prediction = scheduler.get("prediction_type", "epsilon")
        facts |= {"timesteps": "the time is an original step, 0 (clean) to 999 (noise)", "prediction": prediction}
    if call is not None and model.arch.guided:
        facts["guidance"] = call.resolved(model.context).guidance
    facts |= {drawing.key: drawing.to_json() for drawing in (model.folder.few_steps, model.folder.folded) if drawing}
    return {**facts, "scheduler": scheduler or None}


def write_onnx_transformer(
    model: TransformerModel, module: nn.Module, out: Path, calls: TracedCalls, form: GraphForm, record: Mapping[str, Any]
) -> dict[str, Any]:  # fmt: skip
    """Write the folder, whole or not at all. module: of the model, in float32.

    Returns as `write_onnx`, and the shapes of the graph. Raises UserError as `write_graph` does.
    """
    folder = model.folder
    with atomic_write(out, FILES) as temporary:
        temporary.mkdir()
        path = temporary / _GRAPH
        stage, values, largest = write_graph(path, module, calls.make, calls.sizes)
        errors = [quantize_file(path, stage, form.quantize)] if form.quantize else []
        plain = calls.make(CallSizes(images=EXAMPLES), torch.Generator())
        facts = {
            "class": folder.class_name,
            "inputs": {name: value for name, value in values.items() if name not in stage.outputs},
            "outputs": {name: values[name] for name in stage.outputs},
            "constants": constants_of(plain),
            "traced": _traced(stage),
            "calls": calls.source,
            **process_facts(model),
            "model": folder.hash,
            "depth": dict(folder.depths),
            "kept": folder.record.get("kept"),
        }
        rounded = [QUANTIZED.format(form=form.quantize, share=error) for error in errors]
        write_card(folder, temporary, out.name, use=_use(facts, rounded))
        measured = write_records(temporary, form, facts, record, largest, errors)
    return measured | {"inputs": facts["inputs"], "outputs": facts["outputs"]}


def _traced(stage: Stage) -> dict[str, int]:
    """The length with which every free axis was traced."""
    example = stage.example(EXAMPLES, torch.Generator())
    return {
        name: example[tensor].shape[axis]
        for tensor, axes in stage.varying.items()
        if tensor in example
        for axis, name in axes.items()
    }


def _use(facts: Mapping[str, Any], rounded: list[str]) -> str:
    """The section of the card that says what the graph takes, and how onnxruntime runs it."""
    rows = [
        f"| `{name}` | {what} | {', '.join(map(str, value['shape']))} | {value['dtype']} |"
        for what, key in (("input", "inputs"), ("output", "outputs"))
        for name, value in facts[key].items()
    ]
    constants = [f"`{name}` = {value}" for name, value in facts["constants"].items()]
    sentences = [
        f"`{_GRAPH}` takes what `forward` of the class takes in its pipeline; axes with a name have any length.",
        f"Constants in the graph: {'; '.join(constants)}." if constants else "",
        f"Of the sampler: {facts['timesteps']}; the output is {facts['prediction']}." if facts["process"] else "",
        *(sentence[0].upper() + sentence[1:] for sentence in rounded),
    ]
    code = f"""import json

import numpy as np
import onnxruntime

facts = json.load(open("{FACTS}"))
sizes = {facts["traced"]}  # of the axes with a name
inputs = {{
    name: np.ones([sizes.get(axis, axis) for axis in value["shape"]], value["dtype"]) for name, value in facts["inputs"].items()
}}
session = onnxruntime.InferenceSession("{_GRAPH}")
outputs = session.run(None, inputs)"""
    table = "\n".join(["| tensor | | shape | type |", "|---|---|---|---|", *rows])
    return f"{' '.join(filter(None, sentences))}\n\n{table}\n\n```python\n{code}\n```"
