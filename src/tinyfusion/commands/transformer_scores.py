"""The stages of a `run` of a transformer of diffusers after its trainings: prompts are drawn, images scored, steps timed."""

from __future__ import annotations

import dataclasses

import torch

from tinyfusion.commands.bench import BenchModels
from tinyfusion.commands.bench_prompts import bench_prompts
from tinyfusion.commands.evaluate import check_count
from tinyfusion.commands.sample_prompts import sample_prompts
from tinyfusion.commands.stages import write_comparison
from tinyfusion.commands.transformer_job import TransformerJob
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.progress import say
from tinyfusion.core.rundir import write_json
from tinyfusion.evaluate.clip import open_clip
from tinyfusion.evaluate.extractors import open_extractor
from tinyfusion.evaluate.features import FEATURE_CHOICES
from tinyfusion.jobs.assemble import RunOptions, device_for
from tinyfusion.jobs.pipelines import ModelPipeline, pipeline_of
from tinyfusion.jobs.prompt_drawing import drawing_steps
from tinyfusion.jobs.scoring import open_reference
from tinyfusion.jobs.text_encoding import takes_video
from tinyfusion.report.load import FURTHER

_COLUMNS = 8  # of the picture that compares models


def place_of(job: TransformerJob) -> tuple[str | None, str | None]:
    """The pipeline that draws, as the recipe names it, and the component in it."""
    return job.recipe.pipeline.folder, job.recipe.pipeline.component


def check_number(recipe: Recipe, num: int) -> None:
    """Raise UserError where so many images are too few for the scores against references."""
    if recipe.evaluate.references:
        check_count(num, f"a run that draws {num} images", recipe.evaluate)


def check_evaluation(job: TransformerJob, pipeline: ModelPipeline) -> None:
    """Raise UserError where drawn images, or a reference, cannot be evaluated."""
    recipe = job.scored
    settings, drawn = recipe.evaluate, recipe.pipeline
    if settings.references and takes_video(pipeline.kind):
        raise UserError(
            f"a {pipeline.kind.__name__} draws videos, and distances to references are of images: leave out evaluate.references, "
            "--set evaluate.clip=MODEL scores videos frame by frame"
        )
    if settings.references and not settings.features:
        raise UserError(
            f"no features are named to compare images with {', '.join(settings.references)}; {FEATURE_CHOICES}"
        )
    for name in settings.references:
        extractor = open_extractor(settings.features, str(device_for(recipe)))  # the same object for all
        real = open_reference(name, extractor, recipe.data)
        check_count(len(real), f"reference {name}", settings)
        size = real.source.shape[1:3] if real.source else None
        if size and drawn.height and drawn.width and size != (drawn.height, drawn.width):
            raise UserError(
                f"reference {name} has images of {size[0]} x {size[1]}, and {drawn.height} x {drawn.width} are drawn: a distance between "
                f"them would measure the size; give pipeline.height={size[0]} and pipeline.width={size[1]}, or data.size"
            )
    if settings.clip is not None:
        open_clip(settings.clip, "cpu")


def draw_prompts(job: TransformerJob, models: dict[str, str]) -> None:
    """Draw the prompts by every model from the same seeds, and a picture that compares them. models: by role."""
    samples = job.options.out / "samples"
    for name, source in models.items():
        where = RunOptions(samples / f"{name}.npz", blocks=job.options.blocks)
        sample_prompts(job.drawn, where, source, {"grid": samples / f"{name}.png"}, together=False)
    write_comparison(samples, list(models), _COLUMNS)


def time_steps(job: TransformerJob, models: dict[str, str]) -> None:
    """Write speed.json: the transformer's calls in a step of the pipeline, student and teacher in turns; "speedup" is the student's.

    drawing_speedup: of a whole drawing, where a model draws in fewer steps.
    """
    recipe = job.drawn
    recipe = dataclasses.replace(
        recipe, bench=dataclasses.replace(recipe.bench, repeats=recipe.speed.repeats, compile=False)
    )
    fewer = [name for name in models if name in FURTHER.values()]
    outcomes = {}
    try:
        for name in ("student", *fewer):
            outcomes[name] = bench_prompts(recipe, BenchModels(models[name], models["teacher"]), job.options.blocks)
    except torch.OutOfMemoryError:
        say(["speed is left out: student and teacher together do not fit the memory of the device"])
        return
    own = outcomes["student"]
    rows = {"teacher": own["models"]["vs"] | {"speedup": 1.0}}
    for name, outcome in outcomes.items():
        speed = {"speedup": outcome["speedup"]["ratio"], "speedup_spread": outcome["speedup"]["spread"]}
        if fewer:
            taken = {each: steps_of(models[each], job) for each in ("teacher", name)}
            speed["drawing_speedup"] = speed["speedup"] * taken["teacher"] / taken[name]
        rows[name] = outcome["models"]["model"] | speed
    student = {key: rows["student"][key] for key in ("speedup", "speedup_spread")}
    write_json(job.options.out / "speed.json", {
        "protocol": own["protocol"], "batch_size": recipe.pipeline.batch_size, "models": rows, **student,
        "macs_ratio": own["speedup"]["macs_ratio"],
    })  # fmt: skip


def steps_of(model: str, job: TransformerJob) -> int:
    """Denoising steps of a whole drawing by a model of a run."""
    pipeline = pipeline_of(model, job.options.blocks, *place_of(job))
    return drawing_steps(pipeline, job.recipe.pipeline)


def scores_said(recipe: Recipe) -> str:
    """What is scored, as printed."""
    settings = recipe.evaluate
    words = [f"against {', '.join(settings.references)} by {settings.features}"] if settings.references else []
    words += [f"CLIP score of {settings.clip}"] if settings.clip else []
    return "; ".join([*words, "distance to the teacher's images"])
