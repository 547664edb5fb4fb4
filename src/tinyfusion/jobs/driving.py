"""A training inside a run folder: resume, log lines, progress, previews, checkpoints, interruption."""

from __future__ import annotations

import contextlib
import math
import os
import time
from pathlib import Path
from typing import Any

from tinyfusion.config.recipe import TrainingSection
from tinyfusion.core.device import available_bytes
from tinyfusion.core.progress import Advance, progress, say
from tinyfusion.core.records import section_of
from tinyfusion.core.rundir import RunDirectory
from tinyfusion.core.signals import Interrupted, SignalWatch
from tinyfusion.jobs.estimate import GIB
from tinyfusion.jobs.previews import Previews
from tinyfusion.jobs.training import Training
from tinyfusion.training.checkpoints import CheckpointWriter, Written, load_checkpoint, load_latest
from tinyfusion.training.loop import StepRecord
from tinyfusion.training.state import TrainState, horizon_warning


def training_section(verb: str) -> str:
    """The section of the recipe that sets the training of a verb."""
    return "train" if verb == "train" else f"{section_of(verb)}.training"


def average_warning(verb: str, settings: TrainingSection) -> str | None:
    """A warning where the moving average would still contain much of the initial weights at the end; else None."""
    if settings.ema_decay == 0:
        return None
    return horizon_warning(settings.ema_decay, settings.made_steps, training_section(verb))


def drive(training: Training, run: RunDirectory, resume: Path | None = None) -> float:
    """Train to the end inside `run`, from its newest checkpoint (or `resume`) on. Returns the seconds of all sittings.

    Raises Interrupted after a signal to any process, also in the last step, with the state saved.
    """
    engine, state, settings = training.engine, training.state, training.settings
    engine.wait()  # until the main process has created the run folder
    load, place = (load_checkpoint, resume) if resume else (load_latest, run.checkpoints)
    start = load(place, state, first=engine.first)
    spent = float(engine.first(run.record).get("seconds", 0.0)) if start else 0.0
    run.truncate_metrics(start)
    run.note(f"{training.title}: {settings.made_steps} steps of {settings.batch_size} images, from step {start}")
    if resume is not None:
        run.note(f"resumed from {resume}")
    say([f"{training.title}: continues from step {start:,} of {settings.made_steps:,}"] if start else ())
    if jump := _jump(state, settings):
        _tell(run, f"{training.title}: {jump}")
    total = state.seen_images + (settings.made_steps - start) * settings.batch_size
    warning = average_warning(training.title, settings)
    if warning and not start:
        run.note(f"warning: {warning}")
    if engine.compute.compile and start < settings.made_steps:
        gain = training.compile_gain()
        tolerance = 1e-3 if settings.dtype == "float32" else 5e-2
        engine.first(lambda: gain.require(tolerance))
        run.note(
            f"compiled: {gain.compiled_ms:,.4g} ms a step, {gain.eager_ms:,.4g} ms without ({gain.compile_s:.0f} s once)"
        )
    watch = Previews(training.recipe, run, training.shown, training.title, start)
    needed, free = training.memory()[1].total / GIB, available_bytes(engine.device)
    of_free = "" if free is None else f" of {free / GIB:,.1f}"
    memory = f"{training.title}: needs about {needed:.2g}{of_free} GiB of memory (details: --dry-run)"
    _tell(run, memory)
    sitting = _Sitting(training, run, start, spent, watch)
    with (
        watch,
        SignalWatch() as signals,
        CheckpointWriter(
            run.checkpoints,
            settings.checkpoints_limit,
            settings.checkpoint_every_steps,
            rank=engine.rank,
            world=engine.world,
            main_pid=engine.first(os.getpid),
            timeout_s=engine.compute.timeout_s,
        ) as writer,
        progress(training.title, total, "images", state.seen_images, engine.is_main) as bar,
        training.in_place(),
        contextlib.closing(training.steps()) as steps,
    ):
        for record in steps:
            sitting.log(record, bar)
            if record.trial is None:
                watch.look(state.step, training.averaged)
            sitting.log_saved(writer)
            # once: a signal that comes while saving is for the next step, or the end of the watch
            stop, save = divmod(engine.agree(2 * (signals.stop or 0) + signals.save), 2)
            if stop:
                steps.close()  # in a trial the state is again that of the training
            due = save or state.step % settings.checkpoint_every_steps == 0 or state.step == settings.made_steps
            if stop or (due and record.trial is None):
                signals.save = False
                run.mark("running", seconds=sitting.seconds())  # first: it knows whether the folder is still there
                writer.save(state)
            if stop:
                writer.finish()
                run.mark("interrupted", seconds=sitting.seconds())
                raise Interrupted(stop, "saved, the same command continues")
        if sitting.trials:  # they were the end
            sitting.end_trials()
            writer.save(state)
    sitting.log_saved(writer)
    return sitting.seconds()


def _tell(run: RunDirectory, *lines: str) -> None:
    """Note lines, and print them."""
    for line in lines:
        run.note(line)
    say(lines)


def _jump(state: TrainState, settings: TrainingSection) -> str:
    """A message where earlier steps had another batch size: data are addressed by step and present batch size."""
    seen, position = state.seen_images, state.step * settings.batch_size
    if seen == position:
        return ""
    gap = f"{abs(position - seen):,} images are {'left out' if position > seen else 'seen again'}"
    return (
        f"{seen:,} images were seen in {state.step:,} steps, which had another batch size than {settings.batch_size}: the order of "
        f"the data goes on at image {position:,} ({gap}), and schedules at step {state.step:,}"
    )


class _Sitting:
    """Log lines and progress of one sitting of a training."""

    def __init__(self, training: Training, run: RunDirectory, start: int, spent: float, watch: Previews) -> None:
        self.training, self.run, self.start, self.spent, self.watch = training, run, start, spent, watch
        self.began = self.logged = time.perf_counter()
        self.waited_s = 0.0
        self.note = ""  # of the last logged step, for the progress line
        self.saved: Written | None = None
        self.images = training.state.seen_images  # of the last step of the training
        self.trials = False  # there were steps of trials since

    def seconds(self) -> float:
        """Seconds of all sittings, without those of previews."""
        return self.spent + time.perf_counter() - self.began - self.watch.seconds

    def end_trials(self) -> None:
        """Tell what trials have found, if there were any since the last call."""
        if self.trials:
            self.trials, self.logged = False, time.perf_counter()
            _tell(self.run, *self.training.tried_lines())

    def log_saved(self, writer: CheckpointWriter) -> None:
        """Note the checkpoint that has been written since the last call, if one has."""
        writer.check()
        if writer.written is None or writer.written is self.saved:
            return
        self.saved = writer.written
        size, times = self.saved.num_bytes / 2**20, f"{self.saved.held_s:.2f} s, written in {self.saved.write_s:.2f} s"
        self.run.note(f"checkpoint of step {self.saved.step}: {size:.1f} MiB, training paused {times}")

    def log(self, record: StepRecord, bar: Advance) -> None:
        """Log what is due after a step, and move the bar."""
        settings, step = self.training.settings, record.step + 1
        images = self.training.state.seen_images
        if record.trial is not None:
            self.trials = True
            bar(self.images, f"trial {record.trial + 1}, loss {float(record.terms['loss']):.4f}")
            return
        self.end_trials()
        self.images = images
        self.waited_s += record.waited_s
        if record.step % settings.log_every_steps and step != settings.made_steps and record.applied:
            bar(images, self.note)
            return
        values = record.values()
        now = time.perf_counter()
        waiting = self.waited_s / max(now - self.logged, 1e-9)
        self.logged, self.waited_s = now, 0.0
        bad = {} if record.applied else {"bad_samples": record.bad_samples}
        line: dict[str, Any] = {"step": record.step, "seen_images": images, "seconds": round(self.seconds(), 3)}
        line |= {**values, **self.training.extra(record)}
        line |= {"waiting": round(waiting, 4), "applied": record.applied, **bad}
        self.run.log(line)
        self.watch.log(record.step, line)
        loss, norm = (math.nan if (value := values[name]) is None else value for name in ("loss", "gradient_norm"))
        self.note = f"loss {loss:.4f}, gradient norm {norm:.3g}, learning rate {record.learning_rate:.2g}"
        bar(images, self.note)
