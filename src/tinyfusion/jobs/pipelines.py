"""Pipelines of diffusers: located for a model, checked, and opened with the model as their transformer."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from tinyfusion.core.device import available_bytes
from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import read_json_object
from tinyfusion.core.tensors import TYPES
from tinyfusion.families.diffusers_classes.few_steps import FewStepDrawing, FoldedDrawing
from tinyfusion.families.diffusers_classes.folder import (
    INDEX,
    TransformerFolder,
    component_folders,
    components,
    open_transformer,
)
from tinyfusion.families.diffusers_classes.rows import row_for, rows_with
from tinyfusion.families.registry import family_of_config
from tinyfusion.jobs.pipeline_components import strict_components
from tinyfusion.jobs.transformer_sources import (
    first_teacher,
    located,
    pipeline_folder,
    recorded_pipeline,
    transformer_of,
)
from tinyfusion.models.autoencoder import no_progress_bars
from tinyfusion.models.places import exists, is_shipped, transformer_in_run
from tinyfusion.models.transformer import TransformerModel

# of diffusers, transformers and safetensors on folders and arguments that do not fit
_REFUSALS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    NameError,
    RuntimeError,
    SafetensorError,
)

LENGTH = "max_sequence_length"  # argument of pipelines, in tokens


@contextmanager
def refused(problem: str) -> Iterator[None]:
    """Turn what pipelines raise within the block into UserError: the problem, and their message. A lack of memory is passed on."""
    try:
        yield
    except _REFUSALS as error:
        if isinstance(error, UserError | torch.OutOfMemoryError):
            raise
        raise UserError(f"{problem}: {' '.join(str(error).split())[:300] or type(error).__name__}") from error


def pipeline_class(folder: Path) -> Any:
    """The class of diffusers that a pipeline folder names. Raises UserError on code of its own, which is never run."""
    import diffusers  # late: it takes seconds
    from diffusers import DiffusionPipeline, pipelines

    index = read_json_object(folder / INDEX)
    name = index.get("_class_name")
    parts = {
        part: value[0]
        for part, value in index.items()
        if isinstance(value, list) and len(value) == 2 and part[0] != "_"
    }
    own = [part for part, library in parts.items() if library not in (None, "diffusers", "transformers")]
    own = [part for part in own if not hasattr(pipelines, str(parts[part]))]
    # what transformers' Auto classes would offer to run
    own += [
        part
        for part in parts
        if any("auto_map" in read_json_object(file) for file in (folder / part).glob("*config.json"))
    ]
    if isinstance(name, list) or own:
        what = "a pipeline class" if isinstance(name, list) else f"a class for {own[0]}"
        raise UserError(
            f"{folder} brings {what} of its own, and code of a model is never run: wanted classes of diffusers"
        )
    kind = getattr(diffusers, str(name), None)
    if not isinstance(kind, type) or not issubclass(kind, DiffusionPipeline):
        raise UserError(
            f"diffusers {diffusers.__version__} has no pipeline {name}, which {folder} names: a newer version may"
        )
    return kind


def transformer_in(pipeline: Path, component: str | None, blocks: Path | None) -> TransformerFolder:
    """The transformer of a pipeline folder. Raises UserError where it has none of that name, or several and none is named."""
    rows = rows_with(blocks)
    folders = {folder.name: folder for folder in component_folders(pipeline, rows)}
    if not folders:
        raise UserError(f"{pipeline} has no transformer whose class has a row of blocks: give --blocks FILE")
    if component is None and len(folders) > 1:
        raise UserError(
            f"{pipeline} has {len(folders)} transformers: give --component {' or --component '.join(folders)}"
        )
    name = component or next(iter(folders))
    if name not in folders:
        raise UserError(f"{pipeline} has no transformer {name}: --component is {' or '.join(folders)}")
    return open_transformer(folders[name], rows)


def shorter_texts(kind: Any, folder: Path) -> int | None:
    """Tokens of the longest text that a pipeline's last tokenizer takes, where they are fewer than its class has by default; else None."""
    default = getattr(inspect.signature(kind.__call__).parameters.get(LENGTH), "default", None)
    names = sorted(name for name, part in components(folder).items() if name.startswith("tokenizer") and part)
    file = folder / names[-1] / "tokenizer_config.json" if names else None
    if type(default) is not int or file is None or not file.is_file():
        return None
    limit = read_json_object(file).get("model_max_length")
    return limit if type(limit) is int and 0 < limit < default else None


def opened_pipeline(
    kind: Any,
    folder: Path,
    models: Mapping[str, TransformerFolder],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Any:
    """The pipeline with these models as its components, mapped from their files; other components in the type of the first one.

    dtype: of all weights; None leaves the models in the types of their files. On a device with less free memory than all
    weights take, components are there in turn, and where the largest does not fit, its layers. Nothing is fetched, and no code
    of a folder is run.
    """  # fmt: skip
    modules = {name: in_type(model.module(), dtype) for name, model in models.items()}
    wanted = dtype or next(iter(modules.values())).dtype
    with refused(f"diffusers does not open {folder} as a {kind.__name__}"), no_progress_bars():
        own = {"dtype": wanted, **strict_components(folder, modules, lambda _name: wanted), **modules}
        pipeline = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, **own
        )
    pipeline.set_progress_bar_config(disable=True)
    place_pipeline(pipeline, device)
    return pipeline


def place_pipeline(pipeline: Any, device: torch.device) -> None:
    """Move the components to the device: all, in turn, or layer by layer, as its memory allows."""
    free = available_bytes(device) if device.type == "cuda" else None
    sizes = [
        sum(tensor.nbytes for tensor in part.parameters())
        for part in pipeline.components.values()
        if isinstance(part, nn.Module)
    ]
    if free is not None and max(sizes, default=0) > 0.8 * free:
        pipeline.enable_sequential_cpu_offload(device=device)
    elif free is not None and sum(sizes) > 0.8 * free:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)


def in_type(module: Any, dtype: torch.dtype | None) -> Any:
    """The module with its floating-point tensors in this type, but for those that its class keeps in float32; None: as it is."""
    if dtype is None:
        return module
    kept = tuple(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and tensor.dtype != torch.float64:
            wanted = torch.float32 if any(part in kept for part in name.split(".")) else dtype
            tensor.data = tensor.data.to(wanted)
    return module


# ------------------------------------------------------------------------------------------------------- pipeline of a model


@dataclass(frozen=True)
class ModelPipeline:
    """A pipeline of diffusers that draws with a model. kind: its class. models: its transformers by component, as drawn with."""

    folder: Path
    kind: Any
    models: Mapping[str, TransformerFolder]

    @cached_property
    def model_hash(self) -> str:
        """The hash of the transformer; of several one over all."""
        hashes = [f"{name} {model.hash}" for name, model in sorted(self.models.items())]
        one = next(iter(self.models.values()))
        return one.hash if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    @property
    def few_steps(self) -> FewStepDrawing | None:
        """How it draws with a student of few steps; None with other models."""
        return next(filter(None, (model.few_steps for model in self.models.values())), None)

    @property
    def folded(self) -> FoldedDrawing | None:
        """How it draws with a student of folded guidance; None with other models."""
        return next(filter(None, (model.folded for model in self.models.values())), None)

    @property
    def drawn_with(self) -> dict[str, Any]:
        """Arguments of the call that its models want; empty where they take any."""
        return {name: value for model in self.models.values() for name, value in model.drawn_with.items()}

    @cached_property
    def rest_hash(self) -> str:
        """SHA-256 over everything but the transformers: index, configurations, and names and sizes of weights."""
        digest = hashlib.sha256()
        for name in ("", *sorted({*components(self.folder)} - {*self.models})):
            for file in sorted((self.folder / name).glob("*") if name else [self.folder / INDEX]):
                if file.is_file():
                    content = str(file.stat().st_size).encode()
                    if file.name == INDEX:  # an export writes it anew
                        content = json.dumps(read_json_object(file), sort_keys=True).encode()
                    elif file.suffix in (".json", ".txt"):
                        content = file.read_bytes()
                    digest.update(f"{name}/{file.name}\0{hashlib.sha256(content).hexdigest()}\0".encode())
        return digest.hexdigest()

    def component_bytes(self) -> dict[str, int]:
        """Bytes of the weights per component that has any, as stored: safetensors without those of variants."""
        sizes = {name: model.num_bytes for name, model in self.models.items()}
        for name in components(self.folder):
            files = [file for file in (self.folder / name).glob("*.safetensors") if file.name.count(".") == 1]
            if name not in sizes and files:
                sizes[name] = sum(file.stat().st_size for file in files)
        return sizes

    def opened(self, device: torch.device, dtype: str | None = None) -> Any:
        """The pipeline, as of `opened_pipeline`."""
        kind = None if dtype is None else getattr(torch, dtype)
        return opened_pipeline(self.kind, self.folder, self.models, device, kind)

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `given` that are not None, checked. Raises UserError where the pipeline has no prompt or not one of them."""
        return call_arguments(self.kind, given, ", so it draws nothing from --prompts")


def call_arguments(kind: Any, given: Mapping[str, Any], without_prompt: str) -> dict[str, Any]:
    """Those of `given` that are not None, for a call of a pipeline class.

    Raises UserError where it has not one of them, or no prompt (the end of that message).
    """
    known = inspect.signature(kind.__call__).parameters
    if "prompt" not in known:
        raise UserError(f"a {kind.__name__} takes no prompt{without_prompt}")
    wanted = {name: value for name, value in given.items() if value is not None}
    if odd := next((name for name in wanted if name not in known), None):
        raise UserError(f"a {kind.__name__} has no {odd}: leave that option out")
    return wanted


def pipeline_of(
    source: str, blocks: Path | None, folder: str | None = None, component: str | None = None
) -> ModelPipeline:
    """The pipeline that draws with a model.

    source: a pipeline (folder or hub id), a run of `prune` or `recover`, whose record names the teacher, or the folder of a
    transformer. folder: the pipeline, where neither says it. component: the transformer's name in it, where it has several.
    Raises UserError where there is none, and where the model does not fit.
    """
    path = located(source)
    if (path / INDEX).is_file() and folder is None:
        return _checked(path, _own_models(path, component, blocks))
    model = transformer_of(source, blocks)
    if model is None and not exists(path) and not is_shipped(source):
        raise UserError(f"no model at {source}: no such folder, and it is no hub id")
    if model is None:
        raise UserError(
            f"{source} is no transformer of diffusers, and --prompts FILE of texts is drawn by a pipeline of diffusers: give "
            "a pipeline's folder, or a run of `prune` or `recover` of its transformer"
        )
    if folder is None and model.pipeline is not None:
        place, component = model.pipeline, model.path.name
    else:
        place, component = _teachers(source, folder, component)
    own = _own_models(place, None, blocks)
    names = [name for name, each in own.items() if each.class_name == model.class_name]
    if component is None and len(names) > 1:
        raise UserError(f"{place} has {len(names)} of a {model.class_name}: give --component {' or '.join(names)}")
    name = component or next(iter(names), None)
    if name not in names:
        has = ", ".join(f"{name} {each.class_name}" for name, each in own.items()) or "none that has a row of blocks"
        raise UserError(f"{source} is a {model.class_name}, and {place} has as transformers: {has}")
    _check_fits(source, model, own[name])
    return _checked(place, {**own, name: model})


def pipeline_with(model: TransformerModel) -> ModelPipeline:
    """The pipeline of an opened transformer, with that in place of its own. Raises UserError where it is in none."""
    folder = model.own_pipeline(f"a {model.folder.class_name} is drawn by its pipeline")
    return _checked(folder, {**_own_models(folder, None, None), model.component: model.folder})


def transformer_class_in(path: Path) -> str | None:
    """The class of a transformer of diffusers in a folder, pipeline or run that no family of ours opens; else None."""
    if not path.is_dir() or (path / "model.json").is_file():
        return None
    rows = rows_with(None)
    inside = component_folders(path, rows) if (path / INDEX).is_file() else [transformer_in_run(path) or path]
    for folder in inside:
        if (folder / "config.json").is_file():
            config = read_json_object(folder / "config.json")
            if row_for(config, rows) is not None and family_of_config(config) is None:
                return str(config["_class_name"])
    return None


def _teachers(source: str, folder: str | None, component: str | None) -> tuple[Path, str | None]:
    """The pipeline as given, else that in the record of the run or of its teacher, and the component that the model is in it."""
    if folder is not None:
        return pipeline_folder(folder), component
    teacher = first_teacher(source)
    trained_for = recorded_pipeline(teacher or source)
    if trained_for is not None:
        return trained_for[0], component or trained_for[1]
    if teacher is None:
        raise UserError(
            f"{source} names no pipeline: give --pipeline FOLDER, that of the model that it was pruned from"
        )
    path = Path(teacher)
    if exists(path) and not (path / INDEX).is_file() and (path.parent / INDEX).is_file():
        return path.parent, component or path.name
    try:
        return pipeline_folder(teacher), component
    except UserError as error:
        raise UserError(f"{source} was pruned from {teacher}, and {error}: give --pipeline FOLDER") from error


def _own_models(folder: Path, component: str | None, blocks: Path | None) -> dict[str, TransformerFolder]:
    """The transformers of a pipeline folder by component. Raises UserError where it has none, or none of that name."""
    rows = rows_with(blocks)
    if component is not None:
        transformer_in(folder, component, blocks)  # raises on another name
    return {path.name: open_transformer(path, rows) for path in component_folders(folder, rows)}


def _checked(folder: Path, models: dict[str, TransformerFolder]) -> ModelPipeline:
    """Raise UserError where the pipeline brings code, has no transformer, or lacks a component that its index names."""
    kind = pipeline_class(folder)
    if not models:
        raise UserError(f"{folder} has no transformer whose class has a row of blocks: give --blocks FILE")
    for name, part in components(folder).items():
        if part is not None and name not in models and not (folder / name).is_dir():
            raise UserError(f"{folder} lacks its component {name}/, a {part}: the folder is incomplete")
    if len({str(model.drawn_with) for model in models.values()}) > 1:
        raise UserError(
            f"the transformers of {folder}, {' and '.join(models)}, are drawn unlike: guidance is folded into one and not into the other, "
            "and the pipeline guides both: recover all with the same --guidance"
        )
    return ModelPipeline(folder, kind, models)


def _check_fits(source: str, model: TransformerFolder, own: TransformerFolder) -> None:
    """Raise UserError unless the tensors outside of the blocks have the shapes of those of the pipeline's own transformer."""
    blocks = tuple(f"{path}." for path in own.depths)
    for name, stored in own.weights.items():
        other = model.weights.get(name)
        if name.startswith(blocks) or other is None or other.shape == stored.shape:
            continue
        raise UserError(
            f"{source} does not fit {own.pipeline}: its {name} is {list(other.shape)}, the pipeline's {list(stored.shape)}"
        )


def stored_type(model: ModelPipeline) -> str:
    """The type that most numbers of the transformers have in their files."""
    counts: dict[str, int] = {}
    for each in model.models.values():
        for stored in each.weights.values():
            counts[stored.dtype] = counts.get(stored.dtype, 0) + stored.numel
    most = max(counts, key=lambda name: counts[name])
    return str(TYPES[most]).removeprefix("torch.") if most in ("F32", "BF16", "F16") else most
