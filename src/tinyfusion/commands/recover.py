"""`recover`: train a pruned model on its teacher, or alone; or a whole one, whose blocks are chosen meanwhile."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.progress import say
from tinyfusion.core.rundir import RunDirectory, atomic_write, write_json
from tinyfusion.jobs.assemble import RunOptions, open_teacher, plain_recipe
from tinyfusion.jobs.driving import drive
from tinyfusion.jobs.folding import check_folding, folds, with_taught_target
from tinyfusion.jobs.latent_facts import open_stated
from tinyfusion.jobs.origins import with_teacher
from tinyfusion.jobs.process_specs import check_denoiser
from tinyfusion.jobs.recorded_training import check_masks, recorded_of, training_data
from tinyfusion.jobs.recovery import SearchedRecovery, recovery, with_method_of_search
from tinyfusion.jobs.training import Training, before_search
from tinyfusion.jobs.verbs import Inputs, TrainingVerb, known_inputs, save
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.transformer import TransformerModel
from tinyfusion.processes.base import FoldedGuidance
from tinyfusion.prune.sureness import sureness_lines
from tinyfusion.recover.sharing import lora_tensors
from tinyfusion.training.engine import Engine


class Recover(TrainingVerb[Training]):
    """Train the student; writes `student/` (averaged weights) and `student-raw/`, and `plan.json` of a search within."""

    name = "recover"
    sections = ("data", "recover")

    def plain(self, inputs: Inputs) -> dict[str, Any]:
        """As of every verb; a search also depends on the section prune, folded guidance on its channels."""
        own = super().plain(inputs)
        if folds(inputs.recipe.recover):
            own["guidance_channels"] = inputs.recipe.sample.guidance_channels
        if inputs.recipe.recover.search_share is None:
            return own
        return {**own, **plain_recipe(inputs.recipe, "prune")}

    def open(self, recipe: Recipe, options: RunOptions, source: str | Path | None, remarks: list[str]) -> Inputs:
        """The student and, where the method has one, the teacher; without a student the teacher twice, to be pruned meanwhile."""
        if not source:
            return self._open_whole(recipe, options, remarks)
        if recipe.recover.search_share is not None:
            remarks.append("recover.search_share is left out: --student is pruned already")
            recipe = dataclasses.replace(recipe, recover=dataclasses.replace(recipe.recover, search_share=None))
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
            check_denoiser(teacher, "teacher")
            if teacher.family.name != student.family.name:  # two families can have equal tensors, and equal hashes
                raise UserError(
                    f"the student {source} is of family {student.family.name} and the teacher {recipe.teacher} of "
                    f"{teacher.family.name}: give the teacher that it was pruned from"
                )
        recipe, student = known_inputs(recipe, student, [source, recipe.teacher], remarks, recorded is None)
        recipe = _as_taught(recipe, student, teacher, recorded is not None, remarks)
        had = student.facts.folded_guidance
        if had and teacher and not teacher.distilled_guidance and not folds(recipe.recover):
            remarks.append(
                f"the student has guidance {had.scale:g} folded in, and unlearns it from this teacher: --guidance {had.scale:g} keeps it"
            )
        models: dict[str, LoadedModel | None] = {"student": student, "teacher": teacher}
        return Inputs(recipe, options, models, {"student": source, "teacher": recipe.teacher}, recorded=recorded)

    def _open_whole(self, recipe: Recipe, options: RunOptions, remarks: list[str]) -> Inputs:
        """The teacher, and a copy of it that is pruned within the training."""
        recipe = with_method_of_search(recipe)
        settings = recipe.recover
        if settings.search_share is None:
            raise UserError(
                "recover needs --student, a pruned model or the run folder of `prune`; to choose the blocks of --teacher within the "
                "recovery, give --search-share (such as 0.1) in place of --student"
            )
        if not recipe.teacher:
            raise UserError("recover without --student prunes the teacher: give --teacher, such as --teacher digits")
        whole = open_teacher(recipe, options.num_heads, options.family, True, options.num_classes, options.blocks)
        recorded = recorded_of(options.inputs, whole)
        recipe, whole = known_inputs(recipe, whole, [recipe.teacher], remarks, recorded is None)
        recipe = before_search(recipe, whole)  # refuse before anything is learned
        taught = settings.method != "finetune" and not (recorded and settings.method == "logits-kd")
        recipe = _as_taught(recipe, whole, whole if taught else None, recorded is not None, remarks)
        models: dict[str, LoadedModel | None] = {"student": whole.copy(), "teacher": whole if taught else None}
        return Inputs(recipe, options, models, {"teacher": recipe.teacher}, recorded=recorded)

    def work(self, inputs: Inputs, engine: Engine) -> Training:
        """The student on its teacher, or alone."""
        recipe, student = inputs.recipe, inputs.model("student")
        if recipe.recover.search_share is not None:
            check_masks(student, recipe.recover.training, engine)
        source, objective = training_data(recipe, inputs.recorded, student, recipe.recover.training, engine)
        teacher = inputs.models["teacher"]
        if isinstance(teacher, TransformerModel) and isinstance(student, TransformerModel):
            teacher.share_data_of(student)
        return recovery(recipe, student, teacher, objective, source, engine)

    def says(self, inputs: Inputs, work: Training) -> dict[str, str]:
        """The method."""
        settings = inputs.recipe.recover
        how: list[str] = [settings.method]
        if settings.search_steps:
            how += [f"blocks chosen in the first {settings.search_steps:,} steps"]
            trials = f"up to {settings.search_candidates} choices tried for {settings.search_trial_steps} steps each if undecided"
            how += [trials] if settings.search_candidates > 1 else []
        how += [f"guidance {settings.guidance:g} folded in"] if folds(settings) else []
        how += ["low-rank updates"] if settings.update == "lora" else []
        how += [f"teacher {settings.teacher_storage}"] if settings.teacher_storage != "own" else []
        return {"method": ", ".join(how)}

    def perform(self, inputs: Inputs, work: Training, folder: RunDirectory) -> dict[str, Any]:
        """Train, and save averaged and raw weights."""
        seconds = drive(work, folder, inputs.options.resume)
        outcome: dict[str, Any] = {"seconds": seconds}
        seen_images = work.state.seen_images
        if isinstance(work, SearchedRecovery):
            plan, seen_images = work.plan(), work.seen_images
            outcome["kept"] = plan.kept
            say(sureness_lines(work.decision()) if folder.writes else ())
            if folder.writes:
                write_json(folder.path / "plan.json", plan.to_json())
        destination = inputs.recipe.destination if "kept" in outcome else None
        for name, model in (("student", work.averaged()), ("student-raw", work.raw())):
            save(folder, model.made_for(destination), name)
        if inputs.recipe.recover.lora_apart:
            save_lora(folder, work.state.averages(), inputs.recipe.recover.lora_scale, work.model.facts.folded_guidance)
        folder.mark("done", seconds=seconds, seen_images=seen_images)
        return outcome


def _as_taught(
    recipe: Recipe, student: LoadedModel, teacher: LoadedModel | None, recorded: bool, remarks: list[str]
) -> Recipe:
    """The recipe with the target that student and teacher can have; recorded outputs are one already.

    Without a teacher that runs, no guidance is folded in. remarks: gets lines to print. Raises UserError as `check_folding`.
    """
    if teacher is None and folds(recipe.recover):
        remarks.append("recover.guidance is left out: it is that of a teacher, and none runs in this recovery")
        recipe = dataclasses.replace(recipe, recover=dataclasses.replace(recipe.recover, guidance=None))
    check_folding(recipe, recipe.recover, teacher)
    return recipe if recorded else with_taught_target(recipe, teacher or student, remarks)


def save_lora(folder: RunDirectory, factors: Mapping[str, Tensor], scale: float, folded: FoldedGuidance | None) -> None:
    """Write lora.safetensors, the averaged updates alone, on the rank that writes. folded: guidance that they fold in."""
    if folder.writes:
        about = {"format": "pt"} | ({"folded_guidance": f"{folded.scale:g}"} if folded else {})
        if folded:
            say([f"lora.safetensors has guidance {folded.scale:g} folded in: draw with guidance 1"])
        with atomic_write(folder.path / "lora.safetensors") as temporary:
            save_file(lora_tensors(factors, scale), temporary, metadata=about)


def _opened_as_then(options: RunOptions, job: Mapping[str, Any]) -> RunOptions:
    """The options with those that opened the teacher in the run of this job, where they are not given now."""
    kinds = {"num_heads": int, "family": str, "num_classes": int}
    then = {name: job[name] for name, kind in kinds.items() if isinstance(job.get(name), kind)}
    return dataclasses.replace(options, **{name: getattr(options, name) or value for name, value in then.items()})


recover = Recover()
