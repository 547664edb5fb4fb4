"""`prune`: a teacher to a plan and a cut, untuned student."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.stack import num_parameters
from tinyfusion.commands.transformers import prune_transformer
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.progress import say
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import RunDirectory, read_json, write_json
from tinyfusion.jobs.assemble import (
    RunOptions,
    batches_for,
    engine_for,
    open_teacher,
    plain_recipe,
    training_plan,
)
from tinyfusion.jobs.criteria import criterion_context, criterion_estimate, describe_criterion, on_images, run_criterion
from tinyfusion.jobs.estimate import Estimate, announce, described, training_disk_bytes, training_estimate
from tinyfusion.jobs.latent_facts import with_facts_of
from tinyfusion.jobs.origins import with_data
from tinyfusion.jobs.previews import check_previews
from tinyfusion.jobs.process_specs import PROCESS_SECTIONS, objective_for
from tinyfusion.jobs.training import TrainedRun, Training, drive, save
from tinyfusion.jobs.transformers import transformer_of
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.prune.context import CriterionContext
from tinyfusion.prune.deltas import prune_with_weight_updates
from tinyfusion.prune.learn import MaskLearner, mask_learner, plan_of
from tinyfusion.training.engine import Engine, cut
from tinyfusion.training.loop import StepRecord
from tinyfusion.training.state import TrainState


@dataclass(frozen=True)
class Learning:
    """The learned criterion, ready to go."""

    learner: MaskLearner
    training: Training


def prune(recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """Decide which blocks of the teacher go; writes `plan.json` and `student/`. Returns what `--json` prints."""
    if transformer := transformer_of(recipe.teacher, options.blocks):
        return prune_transformer(recipe, options, transformer)
    engine = engine_for(recipe)  # first: who fails after the processes have met is missed at once
    on_data = recipe.prune.criterion == "learned" or on_images(recipe.prune.criterion)
    teacher = open_teacher(recipe, options.num_heads, options.family, on_data, options.num_classes)
    remarks: list[str] = []
    recipe = with_data(recipe, teacher, [recipe.teacher], remarks, on_data)
    teacher = with_facts_of(recipe, teacher)
    plain = plain_recipe(recipe, "data", "prune", *PROCESS_SECTIONS, teacher=teacher.hash())
    run = TrainedRun("prune", recipe, options, engine, plain, remarks)
    work = check_prune(recipe, teacher, engine)
    check_previews(recipe, None)
    settings = recipe.prune.training if isinstance(work, Learning) else None
    if run.settled(lambda: _disk_bytes(teacher, work), settings):
        return {"kept": read_json(run.folder.path / "plan.json")["kept"]}
    if options.dry_run:
        intent = {"teacher": described(teacher), **_intent(recipe, work, run.mode)}
        return announce("prune", intent, prune_estimate(work), engine.is_main)
    with run.writing(teacher=recipe.teacher) as folder:
        plan = (
            run_criterion(work, folder)
            if isinstance(work, CriterionContext)
            else _learn(recipe, teacher, work, folder, options.resume)
        )
        student = _student(recipe, teacher, plan, work)
        if folder.writes:
            write_json(folder.path / "plan.json", plan.to_json())
        save(folder, student, "student")
        folder.mark("done", seconds=plan.cost.get("seconds", 0.0), seen_images=plan.cost.get("images", 0))
    if isinstance(work, CriterionContext):  # it may refuse images once it sees them
        say(remarks)
    if engine.is_main:
        print(f"{_decided(plan)}; {folder.path / 'plan.json'} says why", file=sys.stderr)
    return {"kept": plan.kept}


def _decided(plan: PrunePlan) -> str:
    """One line for people."""
    if plan.kept_widths is not None:
        return f"{plan.criterion}: all blocks kept, narrower"
    listed = [f"{' '.join(map(str, kept))} of {plan.depth[name]} {name}" for name, kept in plan.kept.items()]
    return f"{plan.criterion}: kept {', '.join(listed)}"


def _student(recipe: Recipe, teacher: LoadedModel, plan: PrunePlan, work: Learning | CriterionContext) -> LoadedModel:
    """The cut teacher, with what was trained beside the gates where that is to stay."""
    if recipe.prune.keep_deltas and isinstance(work, Learning):
        return prune_with_weight_updates(teacher, plan, work.training.state.averages(), recipe.prune)
    return teacher.cut(plan)


def learning_of(recipe: Recipe, teacher: LoadedModel, engine: Engine) -> Learning:
    """Gates and deltas on a copy of the teacher. Raises UserError where scheme, data or device do not fit."""
    settings = recipe.prune
    seed = Randomness(recipe.seed).generator_seed("lora")
    source = batches_for(recipe, teacher, engine.device)
    objective = objective_for(teacher, settings.training.label_drop, recipe)
    learner = mask_learner(teacher, objective, settings, seed, engine.device, engine.place)
    if learner.objective.gates.paired:
        _check_pairs(settings.training.batch_size, engine)
    state = TrainState(learner.module, learner.parameter_groups, settings.training)

    def extra(record: StepRecord) -> dict[str, Any]:
        return learner.decision(state.ema, record.step).log(record.step, learner.objective)

    training = Training(
        "prune",
        recipe,
        settings.training,
        teacher,
        learner.objective.stack,
        state,
        learner.objective,
        source,
        engine,
        extra=extra,
    )
    return Learning(learner, training)


def _check_pairs(batch_size: int, engine: Engine) -> None:
    """Raise UserError where a microbatch would begin inside a pair of samples that the score estimator compares."""
    steps = engine.compute.gradient_accumulation_steps
    num_parts = engine.world * steps
    if all(first % 2 == 0 for first, _num in cut(batch_size, num_parts)):
        return
    below = 2 * num_parts * (batch_size // (2 * num_parts))
    sizes = " or ".join(str(size) for size in (below, below + 2 * num_parts) if size)
    raise UserError(
        f"prune.subset_estimator=score compares samples in pairs, and a batch of {batch_size} in {num_parts} microbatches "
        f"({engine.world} processes x {steps} accumulation steps) separates some: set prune.training.batch_size to {sizes}, "
        "or compute.gradient_accumulation_steps=1"
    )


def _disk_bytes(teacher: LoadedModel, work: Learning | CriterionContext) -> int:
    student = 4 * num_parameters(teacher.module)
    return student + (0 if isinstance(work, CriterionContext) else training_disk_bytes(work.training))


def _intent(recipe: Recipe, work: Learning | CriterionContext, mode: str) -> dict[str, str]:
    """What `--dry-run` says of the decision."""
    if isinstance(work, CriterionContext):
        return {**describe_criterion(work), "out": "a new run" if mode == "new" else "continues what is there"}
    settings = recipe.prune
    kept = ", which the student keeps" if settings.keep_deltas else ""
    decision = f"learned: {settings.scheme}, {settings.distribution}, {settings.update} weight deltas{kept}"
    return {"criterion": decision, **training_plan(recipe, settings.training, mode)}


def prune_estimate(work: Learning | CriterionContext) -> Estimate:
    """What a `prune` will take. Moves what learns: throw it away afterwards."""
    return criterion_estimate(work) if isinstance(work, CriterionContext) else training_estimate(work.training)


def check_prune(recipe: Recipe, teacher: LoadedModel, engine: Engine) -> Learning | CriterionContext:
    """Raises UserError on everything that a `prune` would refuse; what learns, or what another criterion is asked."""
    if recipe.prune.criterion != "learned":
        if recipe.prune.keep_deltas:
            raise UserError(
                f"prune.keep_deltas keeps what the learned criterion trains; {recipe.prune.criterion} trains nothing"
            )
        return criterion_context(recipe, teacher)
    if recipe.prune.num_keep is not None:
        raise UserError(
            f"prune.num_keep {recipe.prune.num_keep} is for criteria without groups; learned keeps what its scheme says: "
            f"leave it out, or choose another criterion (--scheme is {recipe.prune.scheme} now)"
        )
    if recipe.prune.keep_deltas and recipe.prune.update == "frozen":
        raise UserError("prune.keep_deltas has nothing to keep with --update frozen: train lora or full deltas")
    return learning_of(recipe, teacher, engine)


def _learn(
    recipe: Recipe, teacher: LoadedModel, learning: Learning, run: RunDirectory, resume: Path | None
) -> PrunePlan:
    """The learned criterion inside `run`."""
    settings, learner, state = recipe.prune, learning.learner, learning.training.state
    run.note(f"trainable beside the gates: {learner.trainable_share:.3%} of the teacher's parameters")
    if run.writes:
        print(
            f"learning {settings.scheme} masks; {learner.trainable_share:.3%} of the teacher's parameters train along",
            file=sys.stderr,
        )
    seconds = drive(learning.training, run, resume)
    cost = {"seconds": seconds, "images": float(state.seen_images)}
    decision = learner.decision(state.ema, settings.training.made_steps - 1)
    if not all(theta.isfinite().all() for theta in decision.logits):
        raise UserError("the gate logits are not finite; lower prune.gate_learning_rate")
    return plan_of(decision, teacher, settings, recipe.seed, cost)
