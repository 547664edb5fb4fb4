"""`prune`: a teacher to a plan and a cut, untuned student."""

from __future__ import annotations

import sys
from typing import Any

from tinyfusion.core.errors import UserError
from tinyfusion.core.recipe import Recipe
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import RunDirectory, write_json
from tinyfusion.jobs.assemble import RunOptions, batches_for, device_for, objective_for, plain_recipe
from tinyfusion.jobs.training import drive
from tinyfusion.models.checkpoint import LoadedModel, open_model, save_model
from tinyfusion.models.plan import PrunePlan
from tinyfusion.prune.criteria import by_indices
from tinyfusion.prune.learn import mask_learner, plan_of
from tinyfusion.prune.scheme import parse_scheme
from tinyfusion.training.loop import StepRecord, TrainState


def prune(recipe: Recipe, options: RunOptions) -> None:
    """Decide which blocks of the teacher go; writes `plan.json` and `student/`."""
    teacher = open_model(recipe.teacher, recipe.sample.weights, options.num_heads, options.family)
    plain = plain_recipe(recipe, "data", "prune", teacher=teacher.hash())
    run = RunDirectory(options.out)
    mode = run.check("prune", plain, options.overwrite)
    settings = recipe.prune
    if settings.criterion == "indices":
        by_indices(teacher, settings.keep, recipe.seed)  # refuses bad indices before anything is written
    else:
        parse_scheme(settings.scheme, teacher.stack.depths())
        batches_for(recipe, teacher, device_for(recipe))
    if mode == "finished":
        print(f"{options.out} is finished; --overwrite starts anew", file=sys.stderr)
        return
    if options.dry_run:
        return
    run.begin("prune", plain, options.overwrite)
    plan = by_indices(teacher, settings.keep, recipe.seed) if settings.criterion == "indices" else _learn(recipe, teacher, run)
    student = teacher.cut(plan)
    write_json(run.path / "plan.json", plan.to_json())
    save_model(student, run.path / "student")
    run.mark("done", seconds=plan.cost.get("seconds", 0.0), seen_images=plan.cost.get("images", 0))


def _learn(recipe: Recipe, teacher: LoadedModel, run: RunDirectory) -> PrunePlan:
    """The learned criterion inside `run`."""
    settings, device = recipe.prune, device_for(recipe)
    seed = Randomness(recipe.seed).generator_seed("lora")
    learner = mask_learner(teacher, objective_for(teacher, settings.training.label_drop), settings, (seed, str(device)))
    run.note(f"trainable beside the gates: {learner.trainable_share:.3%} of the teacher's parameters")
    print(f"learning {settings.scheme} masks; {learner.trainable_share:.3%} of the teacher's parameters train along", file=sys.stderr)
    state = TrainState(learner.module, learner.parameter_groups, settings.training)

    def extra(record: StepRecord) -> dict[str, Any]:
        return learner.decision(state.ema, record.step).log(record.step, learner.objective)

    source = batches_for(recipe, teacher, device)
    seconds = drive(run, "prune", state, learner.objective, source, settings.training, recipe.seed, extra)
    cost = {"seconds": seconds, "images": float(settings.training.steps * settings.training.batch_size)}
    decision = learner.decision(state.ema, settings.training.steps - 1)
    if not all(theta.isfinite().all() for theta in decision.logits):
        raise UserError("the gate logits are not finite; lower prune.gate_learning_rate")
    return plan_of(decision, teacher, settings, recipe.seed, cost)
