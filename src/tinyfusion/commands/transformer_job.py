"""What a `run` of a transformer of diffusers is about: its recipes, its prompts, and a stand-in of its student."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.commands.sample_prompts import draws_prompts
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.data.captions import read_prompts
from tinyfusion.data.latents import LATENTS
from tinyfusion.data.parquet import WHOLE
from tinyfusion.data.prompts import TEXTS, spread_texts
from tinyfusion.families.diffusers_classes.folder import TransformerFolder
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.jobs.transformers import planned
from tinyfusion.models.transformer import gate_units
from tinyfusion.prune.layout import layout_of

_MOST_CAPTIONS = 1000  # that are drawn where no prompts are named


@dataclass(frozen=True)
class TransformerJob:
    """What a run is about. recipe: as given; trained: as its trainings have it; encodes: whether its first stage is encoding."""

    recipe: Recipe
    trained: Recipe
    options: RunOptions
    teacher: TransformerFolder
    encodes: bool

    @property
    def latents(self) -> Path:
        """The folder of the latents; of a run on recorded inputs it does not exist."""
        return Path(self.trained.data.name.removeprefix(LATENTS)) if self.trained.data.name else Path()

    @property
    def drawn(self) -> Recipe:
        """The recipe whose prompts are those of the run."""
        return _with_data(self.recipe, prompts=str(self.options.out / TEXTS))

    @property
    def scored(self) -> Recipe:
        """The recipe of the evaluation: prompts are those in the records of the images, pictures have the size of the encoded ones."""
        return _with_data(self.recipe, name="", prompts="", size=self.recipe.data.size or self.recipe.encode.size)


def _with_data(recipe: Recipe, **changes: Any) -> Recipe:
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, **changes))


def transformer_job(recipe: Recipe, options: RunOptions, teacher: TransformerFolder) -> TransformerJob:
    """The job. Raises UserError on settings that are not for transformers of diffusers, and without data."""
    name = recipe.data.name
    if recipe.dynamic.in_run:
        raise UserError(
            f"dynamic.in_run trains routers of models of families, and {recipe.teacher} is a {teacher.class_name}: leave it out"
        )
    teacher.check_destination(recipe.destination)
    teacher.check_prunable()
    if teacher.row.unfit:
        raise UserError(
            f"a {teacher.class_name} is planned, and not pruned, so there is no student to recover: {teacher.row.unfit}"
        )
    if not name and options.inputs is None:
        raise UserError(
            f"run of a {teacher.class_name} trains: give --data, pictures with captions or {LATENTS}FOLDER, or --inputs FILE, which "
            "`tinyfusion record` makes of prompts"
        )
    if not name and recipe.recover.method == "finetune":
        raise UserError(
            "recover.method=finetune learns from data, and recorded inputs have none: logits-kd learns from the recorded outputs"
        )
    if not name and recipe.distill_steps.in_run:
        raise UserError(
            "distill_steps.in_run learns from encoded latents, and recorded inputs are none: give --data, or leave it out"
        )
    layout = layout_of(dict(teacher.depths), gate_units(teacher))
    recipe = dataclasses.replace(recipe, prune=layout.spelled(recipe.prune))
    encodes = bool(name) and not name.startswith(LATENTS)
    if (
        encodes
        and recipe.evaluate.features
        and not recipe.evaluate.references
        and (name.startswith(WHOLE) or Path(name).is_dir())
    ):
        recipe = dataclasses.replace(recipe, evaluate=dataclasses.replace(recipe.evaluate, references=(name,)))
    own = "" if draws_prompts(recipe) else recipe.data.prompts
    made = f"{LATENTS}{options.out / 'latents'}" if encodes else name
    trained = _with_data(recipe, name=made, prompts=own, size=None if encodes else recipe.data.size)
    if encodes and recipe.encode.pipeline is None:
        if teacher.pipeline is None:
            raise UserError(
                f"{name} are pictures, which a pipeline encodes, and {recipe.teacher} is in none: give --set encode.pipeline=FOLDER"
            )
        recipe = dataclasses.replace(recipe, encode=dataclasses.replace(recipe.encode, pipeline=str(teacher.pipeline)))
    return TransformerJob(recipe, trained, options, teacher, encodes)


def prompts_of(job: TransformerJob) -> list[str]:
    """The prompts to draw: those that are named, else captions of the data, evenly spread where there are many."""
    if draws_prompts(job.recipe):
        return read_prompts(Path(job.recipe.data.prompts))
    if not job.trained.data.name or not (job.latents / TEXTS).is_file():
        what = str(job.options.inputs) if not job.trained.data.name else f"{job.latents}, without {TEXTS},"
        raise UserError(f"{what} has no texts to draw: give --prompts FILE, one a line")
    return spread_texts(job.latents, job.recipe.pipeline.num_images or _MOST_CAPTIONS)


def stand_in(teacher: TransformerFolder, recipe: Recipe, inputs: Path | None) -> PrunePlan:
    """A plan of the size that pruning will decide on. Raises UserError on a scheme or a criterion that does not fit."""
    settings, depths = recipe.prune, dict(teacher.depths)
    if settings.criterion == "learned":
        return layout_of(depths, gate_units(teacher)).stand_in(settings)
    if inputs is not None and settings.criterion != "indices":  # as many blocks as a score will keep
        settings = dataclasses.replace(settings, criterion="uniform")
    plan = planned(teacher, settings, recipe.seed)
    return dataclasses.replace(plan, teacher="")
