"""`bench --prompts`: measure denoising steps of a transformer of diffusers as its pipeline calls it, and of another in turns."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tinyfusion.commands.bench import BenchModels, BenchSide, measured, place_of
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.device import choose_device
from tinyfusion.core.errors import UserError
from tinyfusion.core.files import sha256_of
from tinyfusion.data.captions import read_prompts
from tinyfusion.data.recorded import Call, recording
from tinyfusion.families.diffusers_classes.folder import INDEX, TransformerFolder
from tinyfusion.jobs.pipelines import ModelPipeline, in_type, pipeline_of, stored_type
from tinyfusion.jobs.prompt_drawing import called, generators, pipeline_arguments
from tinyfusion.jobs.transformers import macs_of
from tinyfusion.jobs.typed import check_read

STEPS = 2  # of the drawing whose calls are timed
_STEPS = ("num_inference_steps", "sigmas")


def bench_prompts(recipe: Recipe, names: BenchModels, blocks: Path | None, dry_run: bool = False) -> dict[str, Any]:
    """Print and return what `bench` does, of the calls of the transformers in one denoising step, guidance included.

    The calls are those of a drawing of two steps of the first prompts by each model's pipeline. Raises UserError on models
    without a pipeline, and where a pipeline has not an argument that is set.
    """
    settings, device = recipe.pipeline, choose_device(recipe.device)
    if recipe.bench.compile:
        raise UserError("--compile is for models of classes: leave it out with --prompts")
    prompts = read_prompts(Path(recipe.data.prompts))
    sources = {"model": names.model} | ({"vs": names.vs} if names.vs else {})
    models = {}
    for side, source in sources.items():
        folder = None if (Path(source) / INDEX).is_file() else settings.folder
        models[side] = pipeline_of(source, blocks, folder, settings.component if folder else None)
        pipeline_arguments(models[side], settings)
    check_read("bench", recipe, *(each for model in models.values() for each in model.models.values()))
    dtype = settings.dtype or stored_type(models["model"])
    protocol = _protocol(recipe, models, dtype, device)
    if dry_run:
        print(f"bench would measure {' and '.join(sources.values())}: {protocol}")
        return {"state": "checked", "protocol": protocol}
    batch = [prompts[i % len(prompts)] for i in range(settings.batch_size)]
    steps = {name: _recorded(model, recipe, batch, device) for name, model in models.items()}
    sides = {name: _side(step, sources[name], models[name], device) for name, step in steps.items()}
    product = dtype if hasattr(torch, dtype) else "float32"
    return measured(sides, recipe, settings.batch_size, product, device, protocol)


def _protocol(recipe: Recipe, models: Mapping[str, ModelPipeline], dtype: str, device: torch.device) -> str:
    """Everything that the numbers depend on except the models and the machine."""
    settings, model = recipe.pipeline, models["model"]
    folded = any(each.drawn_with for each in models.values())
    model = next((each for each in models.values() if not each.drawn_with), model)
    arguments = {n: v for n, v in pipeline_arguments(model, settings).items() if n not in _STEPS}
    given = "".join(f", {name} {value}" for name, value in arguments.items())
    given += ", of a student of folded guidance without a pass for it" if folded else ""
    return (
        f"one denoising step of a {model.kind.__name__} (its calls of transformers, mean of {STEPS} steps{given}) of "
        f"{settings.batch_size} image{'s' * (settings.batch_size > 1)}, prompts "
        f"{sha256_of(Path(recipe.data.prompts))[:8]}, {dtype}, {place_of(device)}, torch {torch.__version__}; "
        f"medians of {recipe.bench.repeats}, interleaved with each other and a matrix product"
    )


@dataclass(frozen=True)
class _Steps:
    """The calls of every transformer, by component, in `STEPS` steps; those that were called."""

    calls: dict[str, list[Call]]
    dtype: torch.dtype | None
    batch_size: int


def _recorded(model: ModelPipeline, recipe: Recipe, prompts: Sequence[str], device: torch.device) -> _Steps:
    """The calls of a model's transformers while its pipeline draws these prompts at once; the pipeline is not retained."""
    settings = recipe.pipeline
    pipeline = model.opened(device, settings.dtype)
    few = model.few_steps.of_steps(STEPS) if model.few_steps else {}
    arguments = {**pipeline_arguments(model, settings), "num_inference_steps": STEPS, **few}
    with ExitStack() as around:
        made = {name: around.enter_context(recording(getattr(pipeline, name))) for name in model.models}
        noise = generators(recipe.seed, range(len(prompts)))
        called(pipeline, prompts, noise, arguments, "latent")
    del pipeline
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
    return _Steps({name: calls for name, calls in made.items() if calls}, dtype, len(prompts))


def _side(steps: _Steps, source: str, model: ModelPipeline, device: torch.device) -> BenchSide:
    modules: dict[str, Any] = {n: in_type(model.models[n].module(), steps.dtype).to(device) for n in steps.calls}
    calls = [
        (modules[name], tree_map_only(Tensor, lambda tensor: tensor.to(device), call))
        for name, listed in steps.calls.items()
        for call in listed
    ]

    @torch.inference_mode()
    def run() -> None:
        for module, call in calls:
            module(**call)

    folders = [model.models[name] for name in modules]
    counted = sum(_macs(model.models[name], modules[name], listed) for name, listed in steps.calls.items())
    macs = counted / STEPS / steps.batch_size
    num_bytes = sum(t.nbytes for module in modules.values() for t in module.parameters())
    return BenchSide(
        source, model.model_hash, sum(sum(folder.depths.values()) for folder in folders),
        sum(stored.numel for folder in folders for stored in folder.weights.values()),
        1, STEPS, run, lambda: macs, lambda: num_bytes,
    )  # fmt: skip


def _macs(model: TransformerFolder, module: nn.Module, calls: Sequence[Call]) -> int:
    """Multiply-accumulates of all calls, as `macs_of`; each shape is counted once."""
    alike: dict[str, list[Call]] = {}
    for call in calls:
        alike.setdefault(str(tree_map_only(Tensor, lambda tensor: tuple(tensor.shape), call)), []).append(call)

    def counted(call: Call) -> int:
        return macs_of(model, lambda _: call, lambda: module)[""]

    return sum(len(same) * counted(same[0]) for same in alike.values())
