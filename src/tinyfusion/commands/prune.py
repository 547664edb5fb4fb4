"""`prune`: a teacher to a plan and a pruned, untuned student."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.commands.transformers import prune_transformer
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.progress import say
from tinyfusion.core.rundir import RunDirectory, read_json, write_json
from tinyfusion.data.latents import LATENTS
from tinyfusion.jobs.assemble import RunOptions, check_data_name, open_teacher
from tinyfusion.jobs.criteria import CriterionWork, criterion_work, looks_at_images, warning_of_loss
from tinyfusion.jobs.driving import drive
from tinyfusion.jobs.latent_facts import given_texts
from tinyfusion.jobs.recorded_training import check_masks, recorded_of, training_data
from tinyfusion.jobs.training import MaskTraining, before_search, mask_training, student_of
from tinyfusion.jobs.transformer_sources import transformer_of
from tinyfusion.jobs.verbs import Inputs, TrainingVerb, known_inputs, save
from tinyfusion.models.transformer import TransformerModel
from tinyfusion.prune.learn import plan_of
from tinyfusion.prune.sureness import sureness_lines
from tinyfusion.prune.width import width_stand_in
from tinyfusion.training.engine import Engine


class Prune(TrainingVerb[MaskTraining | CriterionWork]):
    """Decide which blocks of the teacher go; writes `plan.json` and `student/`."""

    name = "prune"
    sections = ("data", "prune")

    def __call__(self, recipe: Recipe, options: RunOptions, source: str | Path = "") -> dict[str, Any]:
        """Prune a model, or a transformer of diffusers on its files."""
        if recipe.prune.criterion == "learned" and options.inputs is None and recipe.data.name:
            check_data_name(recipe.data.name)  # before a teacher is fetched
        texts = given_texts(recipe, options.family or recipe.teacher_family, options.blocks)
        transformer = transformer_of(recipe.teacher, options.blocks, texts)
        if transformer is not None and recipe.prune.criterion != "learned":
            return prune_transformer(recipe, options, transformer)
        if options.inputs is not None and transformer is None:
            raise UserError(
                f"--inputs is for transformers of diffusers, and {recipe.teacher} is a model of a family: leave it out, its criteria "
                "look at --data"
            )
        return super().__call__(recipe, options, source)

    def open(self, recipe: Recipe, options: RunOptions, source: str | Path, remarks: list[str]) -> Inputs:
        """The teacher; data where the criterion looks at images."""
        learned = recipe.prune.criterion == "learned"
        on_data = (learned and options.inputs is None) or looks_at_images(recipe.prune.criterion)
        typed = options.num_heads, options.family, on_data, options.num_classes, options.blocks
        teacher = open_teacher(recipe, *typed)
        if isinstance(teacher, TransformerModel) and on_data and not recipe.data.name:
            raise UserError(
                f"criterion learned trains: for a {teacher.family.title} give --data {LATENTS}FOLDER, which `tinyfusion encode "
                "--pipeline` makes of pictures with captions, or --inputs FILE, which `tinyfusion record` makes of prompts"
            )
        recipe, teacher = known_inputs(recipe, teacher, [recipe.teacher], remarks, on_data)
        if options.inputs is None and (warning := warning_of_loss(teacher, recipe.prune)):
            remarks.append(f"warning: {warning}")
        if learned:  # refuse before anything is learned
            recipe = before_search(recipe, teacher)
        elif recipe.destination:
            narrower = recipe.prune.criterion == "width"
            student = teacher.cut(width_stand_in(teacher, recipe.prune)) if narrower else teacher
            student.made_for(recipe.destination)
        recorded = recorded_of(options.inputs, teacher)
        return Inputs(recipe, options, {"teacher": teacher}, {"teacher": recipe.teacher}, recorded=recorded)

    def work(self, inputs: Inputs, engine: Engine) -> MaskTraining | CriterionWork:
        """The learned criterion, or one without training with its calibration set."""
        recipe, teacher, settings = inputs.recipe, inputs.model("teacher"), inputs.recipe.prune
        if settings.criterion != "learned":
            return criterion_work(recipe, teacher)
        if settings.num_keep is not None:
            raise UserError(
                f"prune.num_keep {settings.num_keep} is for criteria without groups; learned keeps what its scheme says: "
                f"leave it out, or choose another criterion (--scheme is {settings.scheme} now)"
            )
        if settings.keep_deltas and settings.update == "frozen":
            raise UserError("prune.keep_deltas has nothing to keep with --update frozen: train lora or full deltas")
        check_masks(teacher, settings.training, engine)
        source, objective = training_data(recipe, inputs.recorded, teacher, settings.training, engine)
        # the outputs are recorded, so no pass of the whole model is needed
        if inputs.recorded and settings.target is None:
            recipe = dataclasses.replace(recipe, prune=dataclasses.replace(settings, target="data"))
        return mask_training(recipe, teacher, objective, source, engine)

    def says(self, inputs: Inputs, work: MaskTraining | CriterionWork) -> dict[str, str]:
        """How the blocks are chosen."""
        if isinstance(work, CriterionWork):
            return work.describe()
        settings = inputs.recipe.prune
        kept = ", which the student keeps" if settings.keep_deltas else ""
        how = settings.distribution if settings.distribution != "runs" else f"runs ({settings.runs} a group)"
        return {"criterion": f"learned: {settings.scheme}, {how}, {settings.update} weight deltas{kept}"}

    def perform(self, inputs: Inputs, work: MaskTraining | CriterionWork, folder: RunDirectory) -> dict[str, Any]:
        """Decide, prune, and save plan and student."""
        teacher, settings = inputs.model("teacher"), inputs.recipe.prune
        updates = None
        if isinstance(work, CriterionWork):
            plan = work.decide(folder)
        else:
            plan = _learn(inputs, work, folder)
            updates = work.state.averages() if settings.keep_deltas else None
        student = student_of(teacher, plan, settings, updates).made_for(inputs.recipe.destination)
        if folder.writes:
            write_json(folder.path / "plan.json", plan.to_json())
        save(folder, student, "student")
        folder.mark("done", seconds=plan.cost.get("seconds", 0.0), seen_images=plan.cost.get("images", 0))
        if folder.writes:
            print(f"{_decided(plan)}; {folder.path / 'plan.json'} says why", file=sys.stderr)
        return {"kept": plan.kept}

    def outcome(self, folder: RunDirectory) -> dict[str, Any]:
        """The blocks of the plan."""
        return {"kept": read_json(folder.path / "plan.json")["kept"]}


def _learn(inputs: Inputs, work: MaskTraining, folder: RunDirectory) -> PrunePlan:
    """Train the gates inside the run, and read off the plan."""
    settings, share = inputs.recipe.prune, f"{work.learner.trainable_share:.3%} of the teacher's parameters"
    folder.note(f"trainable weight deltas: {share}")
    if folder.writes:
        print(f"learning {settings.scheme} masks; {share} train along", file=sys.stderr)
    seconds = drive(work, folder, inputs.options.resume)
    cost = {"seconds": seconds, "images": float(work.state.seen_images)}
    decision = work.decision()
    say(sureness_lines(decision) if folder.writes else ())
    return plan_of(decision, inputs.model("teacher"), settings, inputs.recipe.seed, cost)


def _decided(plan: PrunePlan) -> str:
    """One line to print."""
    if plan.kept_widths is not None:
        return f"{plan.criterion}: all blocks kept, narrower"
    listed = [f"{' '.join(map(str, kept))} of {plan.depth[name]} {name}" for name, kept in plan.kept.items()]
    return f"{plan.criterion}: kept {', '.join(listed)}"


prune = Prune()
