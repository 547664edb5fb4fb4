"""`recover`: train a pruned model on its teacher, or alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.rundir import RunDirectory, atomic_write
from tinyfusion.jobs.assemble import RunOptions, open_teacher
from tinyfusion.jobs.latent_facts import open_stated
from tinyfusion.jobs.origins import with_teacher
from tinyfusion.jobs.recorded_training import recorded_of, training_data
from tinyfusion.jobs.training import Training, recovery
from tinyfusion.jobs.verbs import Inputs, TrainingVerb, drive, known_inputs, save
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.transformer import TransformerModel
from tinyfusion.recover.sharing import lora_tensors
from tinyfusion.training.engine import Engine


class Recover(TrainingVerb[Training]):
    """Train the student; writes `student/` (averaged weights) and `student-raw/`."""

    name = "recover"
    sections = ("data", "recover")

    def open(self, recipe: Recipe, options: RunOptions, source: str | Path, remarks: list[str]) -> Inputs:
        """The student and, where the method has one, the teacher."""
        if recipe.recover.method != "finetune":
            recipe, job = with_teacher(recipe, source, self.name, remarks)
            options = _opened_as_then(options, job)
        typed = options.num_heads, options.family, options.num_classes
        # a folder states its sizes, which may be smaller than its teacher's
        names = typed if Path(source).is_file() else (None, options.family, None)
        student, teacher = open_stated(recipe, source, *names, options.blocks), None
        recorded = recorded_of(options.inputs, student)
        if recorded and recipe.recover.method == "finetune":
            raise UserError(
                "--method finetune learns from data, and recorded inputs have none: --method logits-kd learns from the recorded outputs"
            )
        if recipe.recover.method != "finetune" and not (recorded and recipe.recover.method == "logits-kd"):
            family = student.family.name if isinstance(student, TransformerModel) else options.family
            teacher = open_teacher(
                recipe, options.num_heads, family, num_classes=options.num_classes, blocks=options.blocks
            )
            if teacher.family.name != student.family.name:  # two families can have equal tensors, and equal hashes
                raise UserError(
                    f"the student {source} is of family {student.family.name} and the teacher {recipe.teacher} of "
                    f"{teacher.family.name}: give the teacher that it was cut from"
                )
        recipe, student = known_inputs(recipe, student, [source, recipe.teacher], remarks, recorded is None)
        if not recorded:
            recipe = _with_taught_target(recipe, student, remarks)
        models: dict[str, LoadedModel | None] = {"student": student, "teacher": teacher}
        return Inputs(recipe, options, models, {"student": source, "teacher": recipe.teacher}, recorded=recorded)

    def work(self, inputs: Inputs, engine: Engine) -> Training:
        """The student on its teacher, or alone."""
        recipe, student = inputs.recipe, inputs.model("student")
        source, objective = training_data(recipe, inputs.recorded, student, recipe.recover.training, engine)
        teacher = inputs.models["teacher"]
        if isinstance(teacher, TransformerModel) and isinstance(student, TransformerModel):
            teacher.prompts, teacher.latent_shape, teacher.example = (
                student.prompts,
                student.latent_shape,
                student.example,
            )
        return recovery(recipe, student, teacher, objective, source, engine)

    def says(self, inputs: Inputs, work: Training) -> dict[str, str]:
        """The method."""
        settings = inputs.recipe.recover
        how: list[str] = [settings.method]
        how += ["low-rank updates"] if settings.update == "lora" else []
        how += [f"teacher {settings.teacher_storage}"] if settings.teacher_storage != "own" else []
        return {"method": ", ".join(how)}

    def perform(self, inputs: Inputs, work: Training, folder: RunDirectory) -> dict[str, Any]:
        """Train, and save averaged and raw weights."""
        seconds = drive(work, folder, inputs.options.resume)
        save(folder, work.averaged(), "student")
        save(folder, work.raw(), "student-raw")
        if inputs.recipe.recover.lora_apart:
            save_lora(folder, work.state.averages(), inputs.recipe.recover.lora_scale)
        folder.mark("done", seconds=seconds, seen_images=work.state.seen_images)
        return {"seconds": seconds}


def _with_taught_target(recipe: Recipe, student: LoadedModel, remarks: list[str]) -> Recipe:
    """The recipe with the teacher's output as the only target, for a student that has guidance as an input, unless it says otherwise.

    remarks: gets a line for people.
    """
    if not student.distilled_guidance:
        return recipe
    wrong = "guidance is an input of this model, so its output is not the velocity of the data"
    if recipe.recover.method == "finetune":
        remarks.append(
            f"warning: {wrong}: finetune pulls the model off; --method logits-kd learns from the teacher alone"
        )
    elif "recover.alpha_kd" not in recipe.assigned:
        remarks.append(f"recover.alpha_kd=1: {wrong}, and the teacher's is the only target")
        return dataclasses.replace(recipe, recover=dataclasses.replace(recipe.recover, alpha_kd=1.0))
    return recipe


def save_lora(folder: RunDirectory, factors: Mapping[str, Tensor], scale: float) -> None:
    """Write lora.safetensors, the averaged updates alone, on the rank that writes."""
    if folder.writes:
        with atomic_write(folder.path / "lora.safetensors") as temporary:
            save_file(lora_tensors(factors, scale), temporary, metadata={"format": "pt"})


def _opened_as_then(options: RunOptions, job: Mapping[str, Any]) -> RunOptions:
    """The options with those that opened the teacher in the run of this job, where they are not given now."""
    kinds = {"num_heads": int, "family": str, "num_classes": int}
    then = {name: job[name] for name, kind in kinds.items() if isinstance(job.get(name), kind)}
    return dataclasses.replace(options, **{name: getattr(options, name) or value for name, value in then.items()})


recover = Recover()
