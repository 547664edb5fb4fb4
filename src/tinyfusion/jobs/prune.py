"""`prune`: a teacher to a plan and a cut, untuned student."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from tinyfusion.core.errors import UserError
from tinyfusion.core.recipe import Recipe
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import RunDirectory, check_space, read_json, write_json
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.jobs.assemble import RunOptions, batches_for, device_for, objective_for, plain_recipe, training_plan
from tinyfusion.jobs.estimate import (
    Estimate,
    announce,
    copy_estimate,
    described,
    training_disk_bytes,
    training_estimate,
)
from tinyfusion.jobs.training import drive
from tinyfusion.models.checkpoint import LoadedModel, open_model, save_model
from tinyfusion.models.plan import PrunePlan
from tinyfusion.models.stack import num_parameters
from tinyfusion.prune.criteria import by_indices
from tinyfusion.prune.learn import MaskLearner, mask_learner, plan_of
from tinyfusion.training.loop import StepRecord, TrainState


@dataclass(frozen=True)
class _Learning:
    """The learned criterion, ready to go."""

    learner: MaskLearner
    state: TrainState
    source: ShuffledBatches


def prune(recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """Decide which blocks of the teacher go; writes `plan.json` and `student/`. Returns what `--json` prints."""
    teacher = open_model(recipe.teacher, recipe.sample.weights, options.num_heads, options.family)
    plain = plain_recipe(recipe, "data", "prune", teacher=teacher.hash())
    run = RunDirectory(options.out)
    mode = run.check("prune", plain, options.overwrite)
    learning = check_prune(recipe, teacher)
    if mode == "finished":
        print(f"{options.out} is finished; --overwrite starts anew", file=sys.stderr)
        return {"kept": read_json(run.path / "plan.json")["kept"]}
    if mode == "new":
        check_space(options.out, _disk_bytes(recipe, teacher, learning))
    if options.dry_run:
        return announce(
            "prune", {"teacher": described(teacher), **_intent(recipe, mode)}, _estimate(recipe, teacher, learning)
        )
    with run.writing("prune", plain, options.overwrite):
        plan = (
            _learn(recipe, teacher, learning, run) if learning else by_indices(teacher, recipe.prune.keep, recipe.seed)
        )
        write_json(run.path / "plan.json", plan.to_json())
        save_model(teacher.cut(plan), run.path / "student")
        run.mark("done", seconds=plan.cost.get("seconds", 0.0), seen_images=plan.cost.get("images", 0))
    return {"kept": plan.kept}


def _learning(recipe: Recipe, teacher: LoadedModel) -> _Learning:
    """Gates and deltas on a copy of the teacher. Raises UserError where scheme, data or device do not fit."""
    settings, device = recipe.prune, device_for(recipe)
    seed = Randomness(recipe.seed).generator_seed("lora")
    source = batches_for(recipe, teacher, device)
    learner = mask_learner(teacher, objective_for(teacher, settings.training.label_drop), settings, seed, str(device))
    return _Learning(learner, TrainState(learner.module, learner.parameter_groups, settings.training), source)


def _disk_bytes(recipe: Recipe, teacher: LoadedModel, learning: _Learning | None) -> int:
    student = 4 * num_parameters(teacher.module)
    return student + (training_disk_bytes(teacher, learning.state, recipe.prune.training) if learning else 0)


def _intent(recipe: Recipe, mode: str) -> dict[str, str]:
    """What `--dry-run` says of the decision."""
    settings = recipe.prune
    if settings.criterion == "indices":
        return {"criterion": f"indices: keep {', '.join(map(str, sorted(settings.keep)))}"}
    decision = f"learned: {settings.scheme}, {settings.update} weight deltas"
    return {"criterion": decision, **training_plan(recipe, settings.training, mode)}


def _estimate(recipe: Recipe, teacher: LoadedModel, learning: _Learning | None) -> Estimate:
    if learning is None:
        return copy_estimate(teacher)
    return training_estimate(
        teacher, learning.state, learning.learner.objective, learning.source, recipe.prune.training
    )


def check_prune(recipe: Recipe, teacher: LoadedModel) -> _Learning | None:
    """Raises UserError on everything that a `prune` would refuse; what learns, None for the other criteria."""
    if recipe.prune.criterion == "learned":
        return _learning(recipe, teacher)
    by_indices(teacher, recipe.prune.keep, recipe.seed)
    return None


def prune_estimate(recipe: Recipe, teacher: LoadedModel) -> Estimate:
    """What a `prune` will take."""
    return _estimate(recipe, teacher, check_prune(recipe, teacher))


def _learn(recipe: Recipe, teacher: LoadedModel, learning: _Learning, run: RunDirectory) -> PrunePlan:
    """The learned criterion inside `run`."""
    settings, learner, state = recipe.prune, learning.learner, learning.state
    run.note(f"trainable beside the gates: {learner.trainable_share:.3%} of the teacher's parameters")
    print(
        f"learning {settings.scheme} masks; {learner.trainable_share:.3%} of the teacher's parameters train along",
        file=sys.stderr,
    )

    def extra(record: StepRecord) -> dict[str, Any]:
        return learner.decision(state.ema, record.step).log(record.step, learner.objective)

    seconds = drive(run, "prune", state, learner.objective, learning.source, settings.training, recipe.seed, extra)
    cost = {"seconds": seconds, "images": float(settings.training.made_images)}
    decision = learner.decision(state.ema, settings.training.made_steps - 1)
    if not all(theta.isfinite().all() for theta in decision.logits):
        raise UserError("the gate logits are not finite; lower prune.gate_learning_rate")
    return plan_of(decision, teacher, settings, recipe.seed, cost)
