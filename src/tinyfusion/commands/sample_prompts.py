"""`sample --prompts`: draw prompts with a transformer of diffusers in its own pipeline, in one process or several."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.files import sha256_of
from tinyfusion.core.progress import say
from tinyfusion.core.rundir import stamp
from tinyfusion.data.captions import read_prompts
from tinyfusion.jobs.assemble import RunOptions, drawing_engine, plain_recipe
from tinyfusion.jobs.drawn_output import DrawnOutput
from tinyfusion.jobs.pipelines import pipeline_of, stored_type, transformer_class_in
from tinyfusion.jobs.prompt_drawing import PromptDrawing, open_prompt_drawing, pipeline_protocol
from tinyfusion.jobs.typed import check_read

ENCODED = ".safetensors"  # files of prompts of another kind: encoded, for model families that take texts


def draws_prompts(recipe: Recipe) -> bool:
    """Whether `data.prompts` are texts, which a pipeline draws."""
    return bool(recipe.data.prompts) and Path(recipe.data.prompts).suffix != ENCODED


def sample_prompts(
    recipe: Recipe, options: RunOptions, source: str, pictures: Mapping[str, Path], together: bool
) -> dict[str, Any]:
    """Draw image i of prompt i modulo their number; write the npz at `options.out`, its record and pictures.

    Returns the outcome for `--json`. Raises UserError on a model without a pipeline, and on settings that the pipeline lacks.
    """
    settings = recipe.pipeline
    engine = drawing_engine(recipe, together)
    prompts, digest = read_prompts(Path(recipe.data.prompts)), sha256_of(Path(recipe.data.prompts))
    model = pipeline_of(source, options.blocks, settings.folder, settings.component)
    check_read("sample", recipe, *model.models.values())
    num = settings.num_images or len(prompts)
    protocol = pipeline_protocol(model, recipe, digest, num, settings.dtype or stored_type(model))
    if few := model.few_steps:
        steps = len(few.steps.levels)
        say([f"note: {source} draws in its own {steps} steps: steps, guidance and negative prompt are not used"])
    elif model.drawn_with:
        say([f"note: {source} has guidance folded in: guidance and negative prompt are not used"])
    plain = plain_recipe(recipe, "pipeline", model=model.model_hash, rest=model.rest_hash)
    for elsewhere in ("folder", "component", "batch_size", "frames_per_second"):  # of no effect, or in the hashes
        plain["pipeline"].pop(elsewhere)
    plain["pipeline"]["num_images"] = num
    labels = np.arange(num, dtype=np.int64) % len(prompts)
    output = DrawnOutput(
        options.out, options.overwrite, plain, pictures, labels, settings.batch_size, timeout_s=recipe.compute.timeout_s,
        frames_per_second=settings.frames_per_second,
    )  # fmt: skip
    outcome = {"num_images": num, "protocol": protocol}
    todo, of_a_shard = engine.first(lambda: output.check(engine))
    if options.dry_run:
        sizes = model.component_bytes()
        parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in sizes.items())
        lines = {
            "model": ", ".join(each.class_name for each in model.models.values()),
            "weights": f"{sum(sizes.values()) / 2**30:.2f} GiB: {parts}",
            "protocol": protocol,
        }
        if engine.is_main:
            print("sample would do this:" + "".join(f"\n  {name:12} {said}" for name, said in lines.items()))
        return outcome

    def opened() -> PromptDrawing:
        return open_prompt_drawing(model, recipe, prompts, engine.device)

    def record(report: Mapping[str, Any]) -> dict[str, Any]:
        about = {"model": model.model_hash, "pipeline": model.kind.__name__, "prompts": prompts}
        return stamp("sample", plain, "done", **outcome, **report, **about)

    output.draw(todo, of_a_shard, engine, f"sample {source}", opened, record)
    return outcome if engine.is_main else {}


def check_no_pipeline(recipe: Recipe, source: str) -> None:
    """Raise UserError on settings of a pipeline for a model that is drawn without one."""
    settings, default = recipe.pipeline, type(recipe.pipeline)()
    shared = {"num_images", "batch_size", "num_steps", "guidance", "dtype"}
    given = [f.name for f in dataclasses.fields(settings) if f.name not in shared]
    if odd := next((name for name in given if getattr(settings, name) != getattr(default, name)), None):
        raise UserError(
            f"{odd} is for prompts drawn by a pipeline of diffusers, and --prompts names no text file: leave it out, or give "
            "--prompts FILE with a prompt a line"
        )
    if name := transformer_class_in(Path(source)):
        raise UserError(
            f"{source} is a {name} of diffusers, which its pipeline draws: give --prompts FILE, a prompt a line"
        )
    if settings.guidance is not None and settings.guidance < 1:
        raise UserError(f"sample.guidance must be at least 1; got {settings.guidance:g}")
