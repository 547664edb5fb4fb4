"""Folders of ONNX graphs: the graphs, sampler.json with all that a sampler needs, sample.py, which needs numpy and onnxruntime."""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tinyfusion.config.recipe import SampleSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rundir import atomic_write, write_json
from tinyfusion.export.card import CardNotes
from tinyfusion.export.folder import RECORD, write_notes
from tinyfusion.export.onnx_graph import OPSET, exported, onnx_module
from tinyfusion.export.onnx_int8 import Int8Form, outside_lists, quantized
from tinyfusion.families.stage import Stage
from tinyfusion.models.loaded import LoadedModel
from tinyfusion.processes.flow import Flow
from tinyfusion.processes.gaussian import Schedule
from tinyfusion.processes.masked import head_schedule
from tinyfusion.processes.noising import FewSteps, linear_steps, noising_of_process

if TYPE_CHECKING:
    from onnx import ModelProto

FACTS, SCRIPT, TEXTS = "sampler.json", "sample.py", "texts.npz"
FILES = rf"\w+\.onnx(?:\.data)?|README\.md|plan\.png|{FACTS}|{SCRIPT}|{TEXTS}|{RECORD}"  # that an export writes, as a regular expression
TOLERANCE = 1e-4  # between onnxruntime and torch, of the largest value, at least of 1
EXTERNAL_BYTES = 2**31 - 2**26  # of weights from which on they are in a file of their own: a graph has at most 2 GB
_STEPS = 50
QUANTIZED = (
    "its weights have 8 bits ({form}): on random inputs its output differs from float32 by {share:.1%} (root mean square). Numbers below, "
    "if any, are of float32."
)


def sampler_facts(model: LoadedModel, settings: SampleSection) -> dict[str, Any]:
    """The content of sampler.json but for the graphs: process, shapes, classes, and recommended settings.

    Raises UserError on settings that sample.py does not know.
    """
    arch, facts = model.arch, model.facts
    process = model.family.process
    recommended = _few_steps(model, facts.few_steps) if facts.few_steps else _RECOMMENDED[process](model, settings)
    guidance = settings.guidance if model.takes_guidance else 1.0
    folded = facts.few_steps.guidance if facts.few_steps else facts.folded_guidance and facts.folded_guidance.scale
    return {
        "process": process,
        "input_shape": [arch.in_channels, arch.input_size, arch.input_size],
        "image_size": facts.image_size,
        "latent_scale": facts.latent_scale,
        "latent_shift": facts.latent_shift,
        "vae": facts.vae,
        "num_classes": arch.num_classes,
        "null_label": arch.num_classes if model.null_class else None,
        "guided_channels": model.guided_channels,
        **recommended.pop("facts"),
        **({} if folded is None else {"folded_guidance": folded}),
        "recommended": {**recommended, "guidance": guidance},
        "model": model.hash(),
        "depth": model.stack.depths(),
        "kept": facts.kept,
    }


def _few_steps(model: LoadedModel, few: FewSteps) -> dict[str, Any]:
    noising = noising_of_process(model.family.process, model.facts.process_settings)
    assert noising is not None, "it was distilled"
    facts = {
        "timesteps": "t of every step of few_steps; x becomes x * x + out * (output) + noise * (fresh noise)",
        "few_steps": [step._asdict() for step in linear_steps(noising, few)],
    }
    return {"sampler": "few_steps", "num_steps": len(few.levels), "facts": facts}


def _gaussian(model: LoadedModel, settings: SampleSection) -> dict[str, Any]:
    if settings.sampler not in (None, "ddim") or settings.eta or settings.clip:
        raise UserError(
            "sample.py draws by ddim, without fresh noise and without clipping: leave out sample.sampler, eta and clip"
        )
    schedule = Schedule()
    tables = {"betas": schedule.betas.tolist(), "alphas_cumprod": schedule.alphas_cumprod.tolist()}
    facts = {"timesteps": "t is an original step, 0 (clean) to 999 (noise)", **tables}
    return {"sampler": "ddim", "num_steps": settings.num_steps or _STEPS, "facts": facts}


def _flow(model: LoadedModel, settings: SampleSection) -> dict[str, Any]:
    flow, method = Flow.of_settings(model.facts.process_settings), settings.flow.method or "heun2"
    if flow.prediction != "velocity":
        raise UserError(f"sample.py integrates velocities, and this flow predicts its {flow.prediction}")
    if settings.sampler not in (None, "ode") or method not in ("heun2", "euler"):
        raise UserError(
            f"sample.py integrates an ode by heun2 or euler; got {settings.sampler or 'ode'} {method}: --set sample.flow.method=euler"
        )
    facts = {
        "timesteps": "t is 0 at noise and 1 at data; the output is dx/dt",
        "path": flow.path,
        "times": flow.sampling_ends(settings.flow.sample_eps),
    }
    return {"sampler": "ode", "method": method, "num_steps": settings.num_steps or _STEPS, "facts": facts}


def _masked(model: LoadedModel, settings: SampleSection) -> dict[str, Any]:
    arch, masked = model.arch, settings.masked
    facts = {
        "timesteps": "t of the head is an original step, 0 (clean) to 999 (noise)",
        "alphas_cumprod": head_schedule().alphas_cumprod.tolist(),
        **{name: getattr(arch, name) for name in ("num_tokens", "token_features", "patch_size")},
        "condition_features": arch.head_width,
    }
    return {
        "sampler": "masked",
        "num_steps": settings.num_steps or min(masked.most_rounds, arch.num_tokens),
        "head_steps": masked.head_steps,
        "temperature": masked.temperature,
        "guidance_schedule": masked.guidance_schedule,
        "clip": settings.clip,
        "facts": facts,
    }


_RECOMMENDED: dict[str, Callable[[LoadedModel, SampleSection], dict[str, Any]]] = {
    "gaussian": _gaussian,
    "flow": _flow,
    "masked": _masked,
}


@dataclass(frozen=True)
class GraphForm:
    """guided: the graph is the guided denoiser, with the input `guidance`. quantize: a name of `FORMS`; None: float32."""

    guided: bool = False
    quantize: Int8Form | None = None


def write_onnx(
    model: LoadedModel, out: Path, facts: Mapping[str, Any], stages: Mapping[str, Stage], form: GraphForm, notes: CardNotes,
    record: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Write the folder, whole or not at all. facts, stages: of `sampler_facts` and `stages_of`.

    Returns bytes of the graphs, the largest difference of their float32 form from torch and, if quantized, the root mean square of
    theirs. Raises UserError where the exporter fails, and where a graph gives other numbers than the network.
    """
    with atomic_write(out, FILES) as temporary:
        temporary.mkdir()
        largest, errors = 0.0, list[float]()
        for name, stage in stages.items():
            path = temporary / f"{name}.onnx"
            save_graph(exported(stage), path)
            largest = max(largest, check_graph(path, stage))
            if form.quantize is not None:
                errors.append(quantize_file(path, stage, form.quantize))
        if model.family.texts is not None:
            np.savez(temporary / TEXTS, **_texts(model))  # type: ignore[arg-type]  # numpy fears the name allow_pickle
        script = "images.py" if set(stages) == {"model"} else f"{facts['process']}.py"
        source = importlib.resources.files("tinyfusion").joinpath("assets", "onnx", script)
        (temporary / SCRIPT).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
        if form.quantize is not None:
            notes = dataclasses.replace(notes, differences=[QUANTIZED.format(form=form.quantize, share=max(errors))])
        write_notes(model, temporary, dataclasses.replace(notes, target="onnx"))
        return write_records(temporary, form, facts, record, largest, errors)


def write_records(
    folder: Path, form: GraphForm, facts: Mapping[str, Any], record: Mapping[str, Any], largest: float, errors: Sequence[float]
) -> dict[str, Any]:  # fmt: skip
    """Write sampler.json, of `facts` and what every one has, and the record of the export with what was measured, which is returned.

    largest: difference of the graphs in `folder` from torch. errors: root mean squares of the differences of quantized ones.
    """
    files = sorted(folder.glob("*.onnx"))
    about = {"format_version": 1, "made_by": "tinyfusion", "opset": OPSET, "graphs": {f.stem: f.name for f in files}}
    write_json(folder / FACTS, {**about, **dataclasses.asdict(form), **facts})
    num_bytes = sum(file.stat().st_size for file in folder.glob("*.onnx*"))
    quantized = {"quantized_error": max(errors)} if errors else {}
    measured = {"bytes": num_bytes, "largest_difference": largest, **quantized}
    write_json(folder / RECORD, {**record, **measured})
    return measured


def _texts(model: LoadedModel) -> dict[str, np.ndarray]:
    """The texts of a model by label, the null text last, as its graph takes them."""
    table = model.conditions
    rows = (model.family.inputs(each) for each in (table, table.index(slice(1)).null()))
    own, null = ({name: tensor.float().numpy() for name, tensor in each.items() if tensor is not None} for each in rows)
    return {name: np.concatenate([values, null[name]]) for name, values in own.items()}


def read_graph(path: Path) -> ModelProto:
    """A graph with its weights, and without the file of their own, which is removed."""
    graph = onnx_module("onnx").load_model(path)
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    return graph


def quantize_file(path: Path, stage: Stage, form: Int8Form) -> float:
    """Quantize the graph in a file; returns the root mean square of its difference from torch. Raises UserError where it is not finite."""
    save_graph(quantized(read_graph(path), form, [outside_lists(stage.network)]), path)
    error = differences(path, stage)[1]
    if not np.isfinite(error):
        raise UserError(f"{path.name} has values that are not finite in {form}: leave out --quantize")
    return error


def save_graph(graph: ModelProto, path: Path) -> None:
    """Write a graph, its weights in NAME.onnx.data where both together were too large for one file."""
    onnx = onnx_module("onnx")
    weights = sum(len(tensor.raw_data) for tensor in graph.graph.initializer)
    external = {"save_as_external_data": True, "location": f"{path.name}.data"} if weights > EXTERNAL_BYTES else {}
    onnx.save_model(graph, path, **external)


def open_graph(path: Path) -> Any:
    """A session of onnxruntime on the CPU, with as many threads as torch uses."""
    runtime = onnx_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@torch.no_grad()
def differences(path: Path, stage: Stage) -> tuple[float, float]:
    """(largest, root mean square) difference between graph and torch on random arguments, as shares of torch's largest value
    (at least 1) and of its root mean square. One row and three are tried.
    """
    session = open_graph(path)
    largest, squares, size = 0.0, 0.0, 0.0
    was_training = stage.network.training
    stage.network.eval()
    try:
        for num in (1, 3):
            arguments = stage.example(num, torch.Generator().manual_seed(1))
            results = stage.run(**arguments)
            given = {name: tensor.numpy() for name, tensor in arguments.items()}
            every = session.run(list(stage.outputs), given)
            for result, found in zip((results,) if isinstance(results, Tensor) else results, every, strict=True):
                wanted = result.double().numpy()
                if found.shape != wanted.shape or not np.isfinite(found).all():
                    return float("inf"), float("inf")
                error = found - wanted
                largest = max(largest, float(np.abs(error).max()) / max(1.0, float(np.abs(wanted).max())))
                squares, size = squares + float(np.square(error).sum()), size + float(np.square(wanted).sum())
    finally:
        stage.network.train(was_training)
    return largest, (squares / size) ** 0.5 if size else 0.0


def check_graph(path: Path, stage: Stage) -> float:
    """The largest difference between a graph and torch. Raises UserError above `TOLERANCE`."""
    largest, _ = differences(path, stage)
    if not largest <= TOLERANCE:
        raise UserError(
            f"{path.name} gives other numbers than the network: they differ by {largest:.2g} of the largest one, wanted at most "
            f"{TOLERANCE:g}; nothing was written: try other versions of torch, onnxscript or onnxruntime"
        )
    return largest
