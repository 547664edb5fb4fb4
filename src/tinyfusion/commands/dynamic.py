"""`dynamic`: train routers with a model under a compute budget, so that sampling runs only a part of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.rundir import RunDirectory, read_json, write_json
from tinyfusion.jobs.assemble import RunOptions, open_teacher, other_inputs
from tinyfusion.jobs.driving import drive
from tinyfusion.jobs.folding import check_routed, folds
from tinyfusion.jobs.latent_facts import open_stated
from tinyfusion.jobs.origins import with_teacher
from tinyfusion.jobs.process_specs import check_denoiser
from tinyfusion.jobs.routing import KEPT, check_dynamic, dynamic_record, dynamic_training, meet_budget
from tinyfusion.jobs.training import Training
from tinyfusion.jobs.verbs import Inputs, TrainingVerb, known_inputs, save
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.training.engine import Engine

OUTCOME = "dynamic.json"  # of a run: target, ratio reached and calibration of the routers


class Dynamic(TrainingVerb[Training]):
    """Train routers and weights; writes `student/` (averaged weights), `student-raw/` and `dynamic.json`."""

    name = "dynamic"
    sections = ("data", "dynamic")

    def open(self, recipe: Recipe, options: RunOptions, source: str | Path, remarks: list[str]) -> Inputs:
        """The model that gets routers and, if set, the teacher."""
        taught, named = recipe.dynamic.auxiliary == "teacher", str(source)
        if taught:
            recipe, _ = with_teacher(recipe, named, self.name, remarks)
        typed = options.num_heads, options.family
        model = open_stated(recipe, named, *typed, options.num_classes)
        check_dynamic(recipe, model, named)
        teacher = open_teacher(recipe, *typed, num_classes=options.num_classes) if taught else None
        if teacher and other_inputs(teacher, model):
            raise UserError(
                f"the teacher {recipe.teacher} does not take what {source} takes: wanted one of the same family, input and classes"
            )
        if teacher:
            check_denoiser(teacher, "teacher")
        check_routed(recipe, model, teacher)
        recipe, model = known_inputs(recipe, model, [named, *([recipe.teacher] if teacher else [])], remarks)
        models: dict[str, LoadedModel | None] = {"model": model, "teacher": teacher}
        return Inputs(recipe, options, models, {"model": named, "teacher": recipe.teacher if teacher else ""})

    def plain(self, inputs: Inputs) -> dict[str, Any]:
        """Without `in_run`, which does not change the result."""
        plain = super().plain(inputs)
        plain["dynamic"].pop("in_run")
        if folds(inputs.recipe.dynamic):
            plain["guidance_channels"] = inputs.recipe.sample.guidance_channels
        return plain

    def work(self, inputs: Inputs, engine: Engine) -> Training:
        """The model with routers, under its budget."""
        return dynamic_training(inputs.recipe, inputs.model("model"), inputs.models["teacher"], engine)

    def says(self, inputs: Inputs, work: Training) -> dict[str, str]:
        """What is decided."""
        settings = inputs.recipe.dynamic
        decided = ", ".join(name for name in ("width", "tokens", "depth") if getattr(settings, name))
        return {"decides on": f"{decided}, for {settings.target:.0%} of the multiply-accumulates of the blocks"}

    def perform(self, inputs: Inputs, work: Training, folder: RunDirectory) -> dict[str, Any]:
        """Train, meet the budget, and save averaged and raw weights."""
        seconds = drive(work, folder, inputs.options.resume)
        student, raw = work.averaged(), work.raw()
        reached = meet_budget(inputs.recipe, student)
        if folder.writes:
            write_json(folder.path / OUTCOME, reached)
        known = {name: reached[name] for name in ("target", "ratio", "offset")}
        facts = dataclasses.replace(student.facts, dynamic={**(student.facts.dynamic or {}), **known})
        save(folder, dataclasses.replace(student, facts=facts), "student")
        save(folder, raw, "student-raw")
        if folder.writes:
            write_json(folder.path / KEPT, dynamic_record(inputs.recipe, student))
        folder.mark("done", seconds=seconds, seen_images=work.state.seen_images)
        return {"seconds": seconds, "ratio": reached["ratio"], "target": reached["target"]}

    def outcome(self, folder: RunDirectory) -> dict[str, Any]:
        """Target and what was reached."""
        return {name: read_json(folder.path / OUTCOME)[name] for name in ("ratio", "target")}


dynamic = Dynamic()
