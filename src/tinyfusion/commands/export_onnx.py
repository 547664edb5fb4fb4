"""`export --to onnx`: graphs of a model, with what is needed to draw with them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from tinyfusion.config.recipe import SampleSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.records import folder_output
from tinyfusion.core.rundir import check_space, say_finished, stamp
from tinyfusion.export.card import CardNotes
from tinyfusion.export.folder import RECORD, exported_tensors
from tinyfusion.export.onnx_folder import GraphForm, sampler_facts, write_onnx
from tinyfusion.export.onnx_graph import onnx_module, stages_of
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.jobs.process_specs import sampler_of
from tinyfusion.models.loaded import LoadedModel

GraphWriter = Callable[[dict[str, Any]], dict[str, Any]]  # record -> what was measured
_ROOM = 2  # a graph is written once, and in external data moved within the folder


def export_onnx(
    options: RunOptions, model: LoadedModel, settings: SampleSection, what: GraphForm, notes: Callable[[], CardNotes]
) -> dict[str, Any]:
    """Write the folder at `options.out`; returns what `--json` prints. Raises UserError where the model has no such graph."""
    check_packages()
    if what.guided and not model.takes_guidance:
        raise UserError(
            "--guided is for models that are drawn with guidance, and this one is drawn without: leave it out"
        )
    facts = sampler_facts(model, settings)
    _check_sampling(model, settings, facts["recommended"])
    stages = stages_of(model, guided=what.guided)
    plain = {"to": "onnx", "model": facts["model"], "guided": what.guided, "quantize": what.quantize}
    plain |= {"recommended": facts["recommended"]}
    num_bytes = sum(t.numel() * t.element_size() for t in exported_tensors(model, "onnx").values())

    def prepared() -> GraphWriter:
        card = notes()
        return lambda record: write_onnx(model, options.out, facts, stages, what, card, record)

    return graph_folder(options, plain, sorted(stages), num_bytes, prepared)


def check_packages() -> None:
    """Raise UserError where a package of the extra `onnx` is missing."""
    for name in ("onnx", "onnxruntime"):
        onnx_module(name)


def graph_folder(
    options: RunOptions,
    plain: Mapping[str, Any],
    graphs: list[str],
    num_bytes: int,
    prepared: Callable[[], GraphWriter],
) -> dict[str, Any]:
    """Write a folder of graphs at `options.out`, unless it is there; returns what `--json` prints.

    plain: identifies the same command. num_bytes: of the weights in the graphs. prepared: does what takes long, and returns what
    writes. Raises UserError on a folder of others and where there is no room.
    """
    to_do = partial(folder_output, options.out, RECORD, "export", plain, options.overwrite, "export --to onnx")
    todo = to_do()
    check_space(options.out, _ROOM * num_bytes)
    outcome = {"to": "onnx", "model": plain["model"], "graphs": graphs, "quantize": plain["quantize"]}
    if options.dry_run:
        return {**outcome, "bytes": num_bytes}
    if not todo:
        say_finished(options.out)
        return outcome
    write, record = prepared(), stamp("export", plain, "done", **outcome)
    to_do()  # again: what has come to be there meanwhile is not replaced
    measured = write(record)
    largest, taken = measured["largest_difference"], measured.get("inputs", {})
    shapes = "; ".join(f"{name} ({', '.join(map(str, each['shape']))})" for name, each in taken.items())
    takes = f"; takes {shapes}" if shapes else ""
    print(f"{options.out}: differs from torch by {largest:.1g} of the largest value at most{takes}", file=sys.stderr)
    return outcome | measured


def _check_sampling(model: LoadedModel, settings: SampleSection, recommended: Mapping[str, Any]) -> None:
    """Raise UserError where `sample` could not draw with the recommended settings either."""
    if model.facts.few_steps:  # its own settings alone
        return
    drawn = {name: recommended[name] for name in ("sampler", "num_steps", "guidance")}
    flow = dataclasses.replace(settings.flow, method=recommended.get("method"))
    sampler_of(dataclasses.replace(settings, **drawn, flow=flow), model)
