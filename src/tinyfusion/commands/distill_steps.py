"""`distill-steps`: train a model to draw in few steps what its teacher draws in many, guidance included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinyfusion.config.recipe import Recipe
from tinyfusion.core.rundir import RunDirectory
from tinyfusion.jobs.assemble import RunOptions, batches_for, open_teacher
from tinyfusion.jobs.driving import drive
from tinyfusion.jobs.few_steps import check_few_steps, few_step_training, few_steps_of, guidance_of_steps
from tinyfusion.jobs.latent_facts import open_stated
from tinyfusion.jobs.origins import with_teacher
from tinyfusion.jobs.process_specs import noising_of
from tinyfusion.jobs.training import Training
from tinyfusion.jobs.transformer_few_steps import check_one_size
from tinyfusion.jobs.verbs import Inputs, TrainingVerb, known_inputs, save
from tinyfusion.models.transformer import TransformerModel
from tinyfusion.training.engine import Engine


class DistillSteps(TrainingVerb[Training]):
    """Train a student of few steps; writes `student/` (averaged weights) and `student-raw/`."""

    name = "distill-steps"
    sections = ("data", "distill_steps")

    def open(self, recipe: Recipe, options: RunOptions, source: str | Path, remarks: list[str]) -> Inputs:
        """The student, which starts as it is, and the teacher, whose steps it learns."""
        named, typed = str(source), (options.num_heads, options.family)
        recipe, _ = with_teacher(recipe, named, self.name, remarks)
        student = open_stated(recipe, named, *typed, options.num_classes, options.blocks)
        noising_of(student)  # raises
        family = student.family.name if isinstance(student, TransformerModel) else options.family
        teacher = open_teacher(
            recipe, options.num_heads, family, num_classes=options.num_classes, blocks=options.blocks
        )
        check_few_steps(recipe, student, teacher)
        recipe, student = known_inputs(recipe, student, [named, recipe.teacher], remarks)
        sources = {"model": named, "teacher": recipe.teacher}
        return Inputs(recipe, options, {"model": student, "teacher": teacher}, sources)

    def plain(self, inputs: Inputs) -> dict[str, Any]:
        """As of every verb; guidance may be that of the sections sample or pipeline."""
        recipe, channels = inputs.recipe, inputs.recipe.sample.guidance_channels
        guidance = guidance_of_steps(recipe, inputs.model("model"), inputs.model("teacher"))
        return {**super().plain(inputs), "guidance": guidance, "guidance_channels": channels}

    def work(self, inputs: Inputs, engine: Engine) -> Training:
        """The student on its guided teacher."""
        recipe, student, teacher = inputs.recipe, inputs.model("model"), inputs.model("teacher")
        source = batches_for(recipe, student, engine.device)
        if isinstance(student, TransformerModel) and isinstance(teacher, TransformerModel):
            check_one_size(student, source)
            teacher.share_data_of(student)
        return few_step_training(recipe, student, teacher, source, engine)

    def says(self, inputs: Inputs, work: Training) -> dict[str, str]:
        """The method, and the steps of a drawing."""
        few = few_steps_of(inputs.recipe, inputs.model("model"), inputs.model("teacher"))
        return {"method": f"{few.method}, {few.describe()}"}

    def perform(self, inputs: Inputs, work: Training, folder: RunDirectory) -> dict[str, Any]:
        """Train, and save averaged and raw weights."""
        seconds = drive(work, folder, inputs.options.resume)
        for name, model in (("student", work.averaged()), ("student-raw", work.raw())):
            save(folder, model, name)
        folder.mark("done", seconds=seconds, seen_images=work.state.seen_images)
        return {"seconds": seconds, "num_steps": inputs.recipe.distill_steps.num_steps}


distill_steps = DistillSteps()
