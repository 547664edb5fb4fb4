"""The body around the one loop: resume, progress, log lines, checkpoints, interruption."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from tinyfusion.core.progress import progress
from tinyfusion.core.recipe import TrainingSection
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import RunDirectory
from tinyfusion.core.signals import Interrupted, SignalWatch
from tinyfusion.training.checkpoints import load_latest, save_checkpoint
from tinyfusion.training.ema import horizon_warning
from tinyfusion.training.loop import BatchSource, LoopObjective, StepRecord, train_steps
from tinyfusion.training.state import TrainState

Extra = Callable[[StepRecord], dict[str, Any]]


def drive(
    run: RunDirectory,
    title: str,
    state: TrainState,
    objective: LoopObjective,
    source: BatchSource,
    settings: TrainingSection,
    seed: int,
    extra: Extra = lambda record: {},
) -> float:
    """Train to the end inside `run`, continuing from its newest checkpoint; seconds spent over all sittings.

    extra: more fields for a log line. Raises Interrupted after a signal, also one in the last step, with the state
    saved.
    """
    start = load_latest(run.checkpoints, state)
    spent = float(run.record().get("seconds", 0.0)) if start else 0.0
    run.truncate_metrics(start)
    run.note(f"{title}: {settings.made_steps} steps of {settings.batch_size} images, from step {start}")
    began = time.perf_counter()
    warning = horizon_warning(settings.ema_decay, settings.made_steps)
    if warning and not start:
        run.note(f"warning: {warning}")

    def seconds() -> float:
        return spent + time.perf_counter() - began

    def save() -> None:
        save_checkpoint(run.checkpoints, state, settings.checkpoints_limit, settings.checkpoint_every_steps)
        run.mark("running", seconds=seconds())

    with (
        SignalWatch() as signals,
        progress(title, settings.made_images, "images", start * settings.batch_size) as bar,
    ):
        for record in train_steps(state, objective, source, settings, Randomness(seed)):
            last = state.step == settings.made_steps
            if record.step % settings.log_every_steps == 0 or last or not record.applied:
                values = record.values()
                images = state.step * settings.batch_size
                run.log(
                    {
                        "step": record.step,
                        "seen_images": images,
                        "seconds": round(seconds(), 3),
                        **values,
                        **extra(record),
                        "applied": record.applied,
                    }
                )
                bar(images, f"loss {values['loss'] or float('nan'):.4f}")
            else:
                bar(state.step * settings.batch_size)
            stop = signals.stop  # once: a signal that comes while saving is for the next step, or the end of the watch
            if state.step % settings.checkpoint_every_steps == 0 or signals.save or stop or last:
                signals.save = False
                save()
            if stop:
                run.mark("interrupted", seconds=seconds())
                raise Interrupted(stop, "saved, the same command continues")
    return seconds()
