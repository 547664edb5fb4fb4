"""`replay`: repeat one step of a training, sample by sample."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinyfusion.commands.distill_steps import distill_steps
from tinyfusion.commands.dynamic import dynamic
from tinyfusion.commands.prune import prune
from tinyfusion.commands.recover import recover
from tinyfusion.commands.train import train
from tinyfusion.conditioning.classes import LABELS
from tinyfusion.config.loading import build_known
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError, prefixed
from tinyfusion.core.progress import progress
from tinyfusion.core.records import renamed
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import RunDirectory, read_metrics
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.jobs.training import Training
from tinyfusion.jobs.verbs import TrainingVerb
from tinyfusion.training.checkpoints import checkpoint_folders, load_checkpoint
from tinyfusion.training.engine import Engine, open_engine
from tinyfusion.training.loop import ForwardPass, noisy_microbatches


def replay(path: Path, step: int, device: str | None = None) -> dict[str, Any]:
    """Repeat `step` of the training in the run folder `path` on one process, from the newest checkpoint before it.

    Prints every loss term of every sample; returns them with the gradient norm and the logged loss; None where not finite or
    not logged. Writes nothing. Raises UserError where the folder has no such step, or its models have changed.
    """
    run = RunDirectory(path)
    training = _training(run, device)
    if not 0 <= step < training.settings.made_steps:
        raise UserError(f"{path} has steps 0 to {training.settings.made_steps - 1}; got --step {step}")
    start = _load_before(run, training, step)
    until = dataclasses.replace(training, settings=dataclasses.replace(training.settings, stop_after=step))
    with progress("replay", step, "steps", start) as bar, until.in_place():
        for record in until.steps():
            if record.trial is None:
                bar(record.step + 1)
    rows, norm = _one_step(training, step)
    logged = next((line.get("loss") for line in read_metrics(path) if line.get("step") == step), None)
    _print(rows, norm, logged, step, start)
    samples = [{name: _finite(value) for name, value in row.items()} for row in rows]
    outcome = {"step": step, "from_checkpoint": start, "samples": samples}
    return {**outcome, "gradient_norm": _finite(norm), "logged_loss": logged}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has neither NaN nor infinity


_VERBS: dict[object, TrainingVerb[Any]] = {verb.name: verb for verb in (train, prune, recover, dynamic, distill_steps)}


@dataclass(frozen=True)
class _Job:
    """The fields of a `job_record`."""

    recipe: Recipe
    num_heads: int | None = None
    family: str | None = None
    num_classes: int | None = None
    student: str = ""
    model: str = ""


def _training(run: RunDirectory, device: str | None) -> Training:
    """The training of a run, rebuilt from its record."""
    record = run.record()
    verb, expected = _VERBS.get(record.get("verb")), record.get("recipe")
    if record.get("verb") == "run":
        raise UserError(
            f"{run.path} holds several trainings: name {run.path / 'prune'}, {run.path / 'recover'} or another"
        )
    if verb is None or not isinstance(expected, dict) or "job" not in record:
        raise UserError(
            f"{run.path} holds no training that can be repeated: wanted a run of train, prune (learned), recover, "
            "dynamic or distill-steps by this version"
        )
    saved = record["job"]
    if isinstance(saved, dict) and "recipe" in saved:
        saved = {**saved, "recipe": renamed(saved["recipe"])}
    with prefixed(f"{run.record_path} is damaged, or of another version"):
        job: _Job = build_known(_Job, saved, "job")
    recipe = job.recipe if device is None else dataclasses.replace(job.recipe, device=device)
    if verb is prune and recipe.prune.criterion != "learned":
        raise UserError(
            f"{run.path} was decided by {recipe.prune.criterion}, which trains nothing: there is no step to replay"
        )
    engine = open_engine(recipe.device, dataclasses.replace(recipe.compute, gradient_accumulation_steps=1))
    options = RunOptions(run.path, num_heads=job.num_heads, family=job.family, num_classes=job.num_classes)
    searched = verb is recover and recipe.recover.search_share is not None and not job.student
    inputs = verb.open(recipe, options, "" if searched else job.student or job.model or "(not recorded)", [])
    for role, now in verb.hashes(inputs).items():
        if now != expected.get(role):
            was = str(expected.get(role))[:12]
            raise UserError(f"the {role} of {run.path} was {was} and is now {str(now)[:12]}: restore the former")
    training: Training = verb.work(inputs, engine)
    return training


def _load_before(run: RunDirectory, training: Training, step: int) -> int:
    """Load the newest undamaged checkpoint of at most `step` steps. Returns its steps."""
    saved = {int(path.name.removeprefix("step-")): path for path in checkpoint_folders(run.checkpoints)}
    for number in sorted((n for n in saved if n <= step), reverse=True):
        try:
            return load_checkpoint(saved[number], training.state)
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
    return 0


def _one_step(training: Training, step: int) -> tuple[list[dict[str, Any]], float]:
    """Per sample: place in the batch, label, timestep, loss terms; and the joint gradient norm."""
    state, settings = training.state, training.settings
    engine = Engine(training.engine.device)
    forward = ForwardPass(state, training.objective, settings)
    randomness = Randomness(training.recipe.seed)
    drawn = noisy_microbatches(step, training.objective, training.source, settings.batch_size, randomness, engine)
    with torch.no_grad():
        (noisy,) = training.objective.prepared(state.model, drawn)
    state.optimizer.zero_grad(set_to_none=True)
    with training.in_place():
        terms = forward(noisy)
        terms["loss"].mean().backward()
    norm = float(engine.gradient_norm(list(state.parameters.values())))
    t = noisy.t if noisy.t.ndim == 1 else noisy.t.double().flatten(1).mean(1)  # of an image with several: their mean
    columns: dict[str, torch.Tensor] = {"timestep": t, **terms}
    if LABELS in noisy.condition.tensors:
        columns = {"label": noisy.condition[LABELS], **columns}
    values = {name: column.detach().tolist() for name, column in columns.items()}
    rows = [{"sample": i, **{name: column[i] for name, column in values.items()}} for i in range(len(noisy.condition))]
    return rows, norm


def _print(rows: list[dict[str, Any]], norm: float, logged: float | None, step: int, start: int) -> None:
    names = list(rows[0])
    print("".join(f"{name:>10}" for name in names))
    for row in rows:
        print("".join(f"{value:>10.4g}" if isinstance(value, float) else f"{value:>10}" for value in row.values()))
    mean = sum(row["loss"] for row in rows) / len(rows)
    then = "" if logged is None else f", logged {logged:.6g}"
    print(f"step {step} (from the checkpoint of {start} steps): loss {mean:.6g}{then}; gradient norm {norm:.6g}")
