"""`sample`: draw images from a model with one process or several, and continue an interrupted job."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion.commands.sample_prompts import check_no_pipeline, draws_prompts, sample_prompts
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.compiler import check_compiler
from tinyfusion.core.errors import UserError
from tinyfusion.core.rundir import stamp
from tinyfusion.jobs.assemble import RunOptions, drawing_engine, plain_recipe
from tinyfusion.jobs.drawn_output import DrawnOutput
from tinyfusion.jobs.estimate import announce, described, sampling_estimate
from tinyfusion.jobs.latent_facts import open_stated
from tinyfusion.jobs.process_specs import sampler_of
from tinyfusion.jobs.sampling_setup import (
    Drawing,
    autoencoder_for,
    check_quantized,
    check_sampling,
    image_shape_and_dtype,
    labels_of,
    open_drawing,
    protocol,
)
from tinyfusion.jobs.typed import check_read


@dataclass(frozen=True)
class _Drawn:
    """A drawing whose report is that of routers."""

    drawing: Drawing

    def images(self, first: int, last: int) -> Iterator[np.ndarray]:
        return self.drawing.images(first, last)

    def report(self) -> dict[str, Any]:
        skipping = self.drawing.skipped.report()
        return {"dynamic": skipping} if skipping else {}


def sample(
    recipe: Recipe, options: RunOptions, model_source: str, grid: Path | None = None, png: Path | None = None,
    together: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Draw images: write the npz at `options.out` and its record, and optional pictures. Returns the outcome for `--json`.

    together: all launched processes call this, and each draws a share; else this process draws alone.
    """
    if options.out.suffix != ".npz":
        raise UserError(f"--out of sample is an .npz file; got {options.out}")
    pictures = {name: path for name, path in (("grid", grid), ("png", png)) if path is not None}
    if draws_prompts(recipe):
        if recipe.sample.quantize is not None:
            raise UserError("--quantize is not for pipelines of diffusers: leave it away")
        return sample_prompts(recipe, options, model_source, pictures, together)
    check_no_pipeline(recipe, model_source)
    engine = drawing_engine(recipe, together)
    model = open_stated(recipe, model_source, options.num_heads, options.family, options.num_classes)
    check_read("sample", recipe, model)
    check_sampling(recipe.sample, model)
    autoencoder = autoencoder_for(recipe.sample, model)
    if autoencoder and model.facts.latent_scale is None and engine.is_main:
        numbers = f"scale {autoencoder.scale:g} and shift {autoencoder.shift:g} of {autoencoder.name}"
        print(f"note: {model_source} does not give its latents' numbers: assuming {numbers}", file=sys.stderr)
    if (few := model.facts.few_steps) and engine.is_main:
        print(
            f"note: {model_source} draws in its own {len(few.levels)} steps: sampler, steps and guidance are not used",
            file=sys.stderr,
        )
    if (folded := model.facts.folded_guidance) and engine.is_main:
        print(
            f"note: {model_source} has guidance {folded.scale:g} folded in: one pass of the network per step",
            file=sys.stderr,
        )
    s = recipe.sample
    check_quantized(model, s.quantize, s.dtype, s.compile, engine.device)
    inputs = {"model": model.hash()} | ({"autoencoder": autoencoder.hash()} if autoencoder else {})
    plain = plain_recipe(recipe, "sample", **inputs)
    shape, dtype = image_shape_and_dtype(model, autoencoder)
    labels, size, timeout_s = labels_of(recipe, model), recipe.sample.batch_size, recipe.compute.timeout_s
    output = DrawnOutput(options.out, options.overwrite, plain, pictures, labels, size, shape, dtype, timeout_s)
    conditions = protocol(recipe, model, autoencoder)
    outcome = {"num_images": recipe.sample.num_images, "protocol": conditions}

    def check() -> tuple[bool, int]:
        if recipe.sample.compile:
            check_compiler(engine.device)
        return output.check(engine)

    todo, num = engine.first(check)
    if options.dry_run:
        estimate = sampling_estimate(model, recipe.sample, sampler_of(recipe.sample, model), engine.device)
        return announce("sample", {"model": described(model), "protocol": conditions}, estimate, engine.is_main)

    def opened() -> _Drawn:
        return _Drawn(open_drawing(recipe, model, engine.device, autoencoder))

    def record(report: Mapping[str, Any]) -> dict[str, Any]:
        return stamp("sample", plain, "done", **outcome, **report, model=model.hash())

    report = output.draw(todo, num, engine, f"sample {model_source}", opened, record)
    return {**outcome, **report} if engine.is_main else {}
