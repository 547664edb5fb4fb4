"""Guidance that a student folds in: which, and how the student is drawn without it."""

from __future__ import annotations

import dataclasses
from typing import Any

from tinyfusion.config.recipe import DynamicSection, Recipe, RecoverSection
from tinyfusion.core.errors import UserError
from tinyfusion.families.diffusers_classes.few_steps import FoldedDrawing, guidance_off
from tinyfusion.jobs.pipelines import pipeline_class
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.transformer import TransformerModel
from tinyfusion.processes.base import FoldedGuidance
from tinyfusion.processes.flow import FlowObjective
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.sample.drive import WHOLE

Folding = RecoverSection | DynamicSection


def guided_channels(recipe: Recipe, model: LoadedModel) -> int:
    """Leading channels of the output that guidance mixes: of latents of a pipeline all, of families as their sampling does."""
    if isinstance(model, TransformerModel):
        if model.latent_shape is None:
            raise UserError(
                "guidance mixes the channels of the latents, which are known with the data: give --data latents:FOLDER"
            )
        return model.latent_shape[0]
    published = recipe.sample.guidance_channels == "published"
    return model.guided_channels if published else int(model.arch.in_channels)


def folds(section: Folding) -> bool:
    """Whether guidance is folded in by a training."""
    return section.guidance not in (None, 1)


def folded_by(recipe: Recipe, section: Folding, model: LoadedModel) -> FoldedGuidance | None:
    """The guidance that a section, `recover` or `dynamic`, folds into a student like `model`."""
    if section.guidance is None or not folds(section):
        return None
    return FoldedGuidance(section.guidance, guided_channels(recipe, model))


def check_folding(recipe: Recipe, section: Folding, teacher: LoadedModel | None) -> None:
    """Raise UserError where a section, `recover` or `dynamic`, folds in guidance that the teacher has not, or does not learn from it."""
    own = None if teacher is None else teacher.facts.folded_guidance
    if folds(section) or own:
        _check_weight(section)
    if not folds(section):
        return
    asked = f"{'recover' if isinstance(section, RecoverSection) else 'dynamic'}.guidance {section.guidance:g}"
    if teacher is None:
        how = "method=logits-kd" if isinstance(section, RecoverSection) else "auxiliary=teacher"
        raise UserError(
            f"{asked} folds in the guidance of a teacher, and here is none: set it to none, or set {asked.partition('.')[0]}.{how}"
        )
    if own is not None:
        if own.scale != section.guidance:
            raise UserError(
                f"{asked}: the teacher has folded in {own.scale:g}: set that, or none, or give a teacher without"
            )
        return
    if teacher.distilled_guidance:
        raise UserError(f"{asked}: guidance is an input of the teacher, and so of the student: set it to none")
    if isinstance(teacher, TransformerModel):
        _pipeline_arguments(teacher)
        return
    if teacher.family.process not in ("gaussian", "flow"):
        raise UserError(
            f"{asked} mixes predictions of noise or velocity, and a {teacher.family.title} predicts neither: set it to none"
        )
    if not teacher.null_class:
        raise UserError(f"{asked} compares with a class for no label, and the teacher has none: set it to none")
    if recipe.sample.guidance_interval != WHOLE:
        raise UserError("guidance is folded in at all noise levels: leave out sample.guidance_interval")


def _check_weight(section: Folding) -> None:
    """Raise UserError where the teacher's output, which alone is under guidance, has no weight."""
    if isinstance(section, RecoverSection):
        name, weight = "recover.alpha_kd", section.alpha_kd
    else:
        name, weight = "dynamic.auxiliary_weight", section.auxiliary_weight
    if not weight:
        raise UserError(
            f"the teacher's output is under guidance, the data are not, and {name} is 0: set it above 0, or leave it out"
        )


def check_routed(recipe: Recipe, model: LoadedModel, teacher: LoadedModel | None) -> None:
    """Raise UserError as `check_folding`, and where a model of folded guidance would get routers from a teacher without."""
    check_folding(recipe, recipe.dynamic, teacher)
    own = model.facts.folded_guidance
    if own and teacher and not folds(recipe.dynamic) and teacher.facts.folded_guidance != own:
        raise UserError(
            f"the model has guidance {own.scale:g} folded in, and its teacher predicts without: set dynamic.guidance={own.scale:g}, or "
            "give a teacher that has it too"
        )


def with_taught_target(recipe: Recipe, model: LoadedModel, remarks: list[str]) -> Recipe:
    """The recipe with the teacher's output as the only target where the data are none, unless it says otherwise.

    That is where guidance is folded in, and of a model that predicts under guidance by itself: the teacher, or the student
    without one. Labels are not dropped where nothing is predicted without them. remarks: gets a line to print.
    """
    settings = recipe.recover
    if not (folds(settings) or model.distilled_guidance):
        return recipe
    why = "the student predicts under guidance" if folds(settings) else "this model predicts under guidance by itself"
    wrong = f"{why}, so its output is not what the data say"
    if settings.method == "finetune":
        remarks.append(
            f"warning: {wrong}: finetune pulls the model off; --method logits-kd learns from the teacher alone"
        )
        return recipe
    changes: dict[str, Any] = {}
    if "recover.alpha_kd" not in recipe.assigned and settings.alpha_kd != 1:
        changes["alpha_kd"] = 1.0
        if not folds(settings):  # which is asked for
            remarks.append(f"recover.alpha_kd=1: {wrong}, and the teacher's is the only target")
    if (folds(settings) or model.facts.folded_guidance) and "recover.training.label_drop" not in recipe.assigned:
        changes["training"] = dataclasses.replace(settings.training, label_drop=0.0)
    return dataclasses.replace(recipe, recover=dataclasses.replace(settings, **changes))


def fold_guidance(
    recipe: Recipe, section: Folding, student: LoadedModel, teacher: LoadedModel | None, process: object
) -> FoldedGuidance | None:
    """The guidance of the teacher's outputs in a training, None without; writes into the student's facts how it will be drawn.

    A student of a teacher of folded guidance learns that. section: `recover` or `dynamic`. process: of the training. Raises
    UserError as `check_folding`, and where the process has no guidance.
    """
    check_folding(recipe, section, teacher)
    folded = None
    if folds(section) and not (teacher and teacher.distilled_guidance):
        if not isinstance(process, GaussianObjective | FlowObjective):
            raise UserError(
                f"guidance {section.guidance:g} is folded in where noised images are predicted, and here a task or recorded calls are "
                "learned: set it to none"
            )
        folded = folded_by(recipe, section, student)
    if isinstance(student, TransformerModel):
        of_teacher = teacher.folder.folded if isinstance(teacher, TransformerModel) else student.folder.folded
        student.draw_by(FoldedDrawing(folded, _pipeline_arguments(student)) if folded else of_teacher)
        return folded
    own = folded or (teacher or student).facts.folded_guidance
    student.facts = dataclasses.replace(student.facts, folded_guidance=own)
    return folded


def _pipeline_arguments(model: TransformerModel) -> dict[str, float]:
    """The arguments by which the pipeline of a model draws without guidance."""
    return guidance_off(pipeline_class(model.own_pipeline("a student of folded guidance is drawn by its pipeline")))
