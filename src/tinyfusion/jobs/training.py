"""A training of any verb: what is put together before it, and the body around the one loop.

Resume, progress, log lines, checkpoints and interruption are here; `train`, `prune` and `recover` say what is trained.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tinyfusion.blocks.stack import BlockStack
from tinyfusion.config.recipe import Recipe, TrainingSection
from tinyfusion.core.device import available_bytes
from tinyfusion.core.errors import UserError
from tinyfusion.core.progress import Advance, progress, say
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import RunDirectory, check_space, say_finished
from tinyfusion.core.signals import Interrupted, SignalWatch
from tinyfusion.jobs.assemble import RunOptions, job_record
from tinyfusion.jobs.estimate import training_memory
from tinyfusion.jobs.memory import GIB
from tinyfusion.jobs.previews import Previews
from tinyfusion.models.checkpoint import LoadedModel, save_model
from tinyfusion.processes.base import Objective
from tinyfusion.training.checkpoints import CheckpointWriter, Written, checkpoint_folders, load_checkpoint, load_latest
from tinyfusion.training.compile import Gain, measured_gain
from tinyfusion.training.ema import horizon_warning
from tinyfusion.training.engine import Engine
from tinyfusion.training.loop import (
    BatchSource,
    ForwardPass,
    StepRecord,
    noisy_microbatches,
    train_steps,
)
from tinyfusion.training.shards import local_part, whole
from tinyfusion.training.state import TrainState

Extra = Callable[[StepRecord], dict[str, Any]]


@dataclass(frozen=True)
class Training:
    """One training, ready to go.

    stack: the blocks of the module that trains. extra: more fields for a log line.
    """

    title: str
    recipe: Recipe
    settings: TrainingSection
    model: LoadedModel
    stack: BlockStack
    state: TrainState
    objective: Objective
    source: BatchSource
    engine: Engine
    teacher: LoadedModel | None = None
    extra: Extra = field(default=lambda record: {})

    def steps(self) -> Iterator[StepRecord]:
        """The loop, from where the state is."""
        randomness = Randomness(self.recipe.seed)
        return train_steps(self.state, self.objective, self.source, self.settings, randomness, self.engine)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Blocks as the recipe's compute section wants them, until the end of the context."""
        with contextlib.ExitStack() as entered:
            if self.engine.compute.compile:
                for stack in (self.stack, *([self.teacher.stack] if self.teacher else [])):
                    entered.enter_context(stack.compiled())
            if self.engine.compute.gradient_checkpointing:
                entered.enter_context(self.stack.checkpointed())
            yield

    def compile_gain(self) -> Gain:
        """What compiling does for a step of this training, measured on the first part of a batch. Every process must call."""
        state, randomness = self.state, Randomness(self.recipe.seed)
        forward = ForwardPass(state, self.objective, self.settings)
        parts = noisy_microbatches(
            state.step, self.objective, self.source, self.settings.batch_size, randomness, self.engine
        )
        trained = list(state.parameters.values())
        compute = self.engine.compute

        def step() -> list[Tensor]:
            loss = forward(parts[0])["loss"].mean()
            loss.backward()
            found = [loss, *(local_part(p.grad) for p in trained if p.grad is not None)]
            state.optimizer.zero_grad(set_to_none=True)
            return found

        def compiled() -> list[Tensor]:
            with self.in_place():
                return step()

        def eager() -> list[Tensor]:
            with self.stack.checkpointed() if compute.gradient_checkpointing else contextlib.nullcontext():
                return step()

        return measured_gain(eager, compiled, self.engine.device)

    def averaged(self) -> LoadedModel:
        """The model with the moving average of its weights, whole and on the CPU. Every process must call."""
        return self._with(self.state.averages())

    def raw(self) -> LoadedModel:
        """The model with its weights as they are, whole and on the CPU. Every process must call."""
        return self._with(self.state.weights())

    def _with(self, trained: Mapping[str, Tensor]) -> LoadedModel:
        held = self.model.module.state_dict()
        return self.model.with_weights({name: trained[name] if name in trained else whole(held[name]) for name in held})


class TrainedRun:
    """The run folder of a verb that trains. plain: what "the same command" means; mode: as `RunDirectory.check` gives it.

    remarks: lines for people, printed before a training begins.
    """

    def __init__(
        self,
        verb: str,
        recipe: Recipe,
        options: RunOptions,
        engine: Engine,
        plain: dict[str, Any],
        remarks: Iterable[str] = (),
    ) -> None:
        self.verb, self.recipe, self.options, self.engine, self.plain = verb, recipe, options, engine, plain
        self.remarks = remarks
        self.folder = RunDirectory(options.out, engine.is_main)
        self.mode = engine.first(self._checked)

    def _checked(self) -> str:
        """The mode. Raises UserError on a folder that may not be used, with the way where only more steps are wanted."""
        try:
            return self.folder.check(self.verb, self.plain, self.options.overwrite)
        except UserError as error:
            raise UserError(f"{error}{self._way_to_more_steps(str(error))}") from error

    def _way_to_more_steps(self, refusal: str) -> str:
        """What to add to a refusal because of a number of steps that has grown; nothing to any other."""
        field = f"{training_section(self.verb)}.steps"
        number = re.search(rf"\({re.escape(field)}: (\d+) there, (\d+) now\)", refusal)
        saved = checkpoint_folders(self.folder.checkpoints)
        if number is None or int(number[1]) >= int(number[2]) or not saved:
            return ""
        return (
            f"; to train on to {int(number[2]):,} steps, continue from its checkpoint in another folder: --resume {saved[-1]} "
            "--out OTHER"
        )

    def settled(self, disk_bytes: Callable[[], int], settings: TrainingSection | None) -> bool:
        """Whether there is nothing left to do, which is then said. Raises UserError where a new run would not fit the disk.

        settings: of the training, whose average may be too long for it; None where nothing is trained.
        """
        if self.mode == "finished":
            finished(self.folder, self.options.dry_run)
            return True
        if self.mode == "new":
            self.engine.first(lambda: check_space(self.options.out, disk_bytes()))
        section = training_section(self.verb)
        warning = horizon_warning(settings.ema_decay, settings.made_steps, section) if settings else None
        say([f"warning: {warning}"] if warning else ())
        if settings or self.options.dry_run:
            say(self.remarks)
        return False

    @contextlib.contextmanager
    def writing(self, **paths: Any) -> Iterator[RunDirectory]:
        """Around everything that is written. paths: of models that were opened, for whoever repeats a step of it."""
        with self.folder.writing(self.verb, self.plain, self.options.overwrite):
            self.folder.mark("running", job=job_record(self.recipe, self.options, **paths))
            yield self.folder
        self.engine.wait()  # nobody reads what the main process has not written yet


def training_section(verb: str) -> str:
    """The section of the recipe that sets the training of a verb."""
    return "train" if verb == "train" else f"{verb}.training"


def drive(training: Training, run: RunDirectory, resume: Path | None = None) -> float:
    """Train to the end inside `run`, continuing from its newest checkpoint (or `resume`); seconds over all sittings.

    Raises Interrupted after a signal to any process, also one in the last step, with the state saved.
    """
    engine, state, settings = training.engine, training.state, training.settings
    engine.wait()  # until the main process has made the run folder
    if resume is None:
        start = load_latest(run.checkpoints, state, first=engine.first)
    else:
        start = load_checkpoint(resume, state, first=engine.first)
    spent = float(engine.first(run.record).get("seconds", 0.0)) if start else 0.0
    run.truncate_metrics(start)
    run.note(f"{training.title}: {settings.made_steps} steps of {settings.batch_size} images, from step {start}")
    if resume is not None:
        run.note(f"resumed from {resume}")
    say([f"{training.title}: continues from step {start:,} of {settings.made_steps:,}"] if start else ())
    if jump := _jump(state, settings):
        run.note(jump)
        say([f"{training.title}: {jump}"])
    total = state.seen_images + (settings.made_steps - start) * settings.batch_size
    warning = horizon_warning(settings.ema_decay, settings.made_steps, training_section(training.title))
    if warning and not start:
        run.note(f"warning: {warning}")
    if engine.compute.compile and start < settings.made_steps:
        gain = training.compile_gain()
        tolerance = 1e-3 if settings.dtype == "float32" else 5e-2
        engine.first(lambda: gain.require(tolerance))
        run.note(
            f"compiled: {gain.compiled_ms:,.4g} ms a step, {gain.eager_ms:,.4g} ms without ({gain.compile_s:.0f} s once)"
        )
    drawn = None if training.title == "prune" else training.model  # gates have nothing to show yet
    watch = Previews(training.recipe, run, drawn, training.title, start)
    _note_memory(training, run)
    sitting = _Sitting(training, run, start, spent, watch)
    main_pid = engine.first(os.getpid)
    with (
        watch,
        SignalWatch() as signals,
        CheckpointWriter(
            run.checkpoints,
            settings.checkpoints_limit,
            settings.checkpoint_every_steps,
            rank=engine.rank,
            world=engine.world,
            main_pid=main_pid,
            timeout_s=engine.compute.timeout_s,
        ) as writer,
        progress(training.title, total, "images", state.seen_images, engine.is_main) as bar,
        training.in_place(),
    ):
        for record in training.steps():
            sitting.tell(record, bar)
            watch.look(state.step, training.averaged)
            sitting.tell_saved(writer)
            # once: a signal that comes while saving is for the next step, or the end of the watch
            stop, save = divmod(engine.agree(2 * (signals.stop or 0) + signals.save), 2)
            last = state.step == settings.made_steps
            if state.step % settings.checkpoint_every_steps == 0 or save or stop or last:
                signals.save = False
                run.mark("running", seconds=sitting.seconds())  # first: it knows whether the folder is still there
                writer.save(state)
            if stop:
                writer.finish()
                run.mark("interrupted", seconds=sitting.seconds())
                raise Interrupted(stop, "saved, the same command continues")
    sitting.tell_saved(writer)
    return sitting.seconds()


def _jump(state: TrainState, settings: TrainingSection) -> str:
    """What to say where the steps before had another batch size: data are addressed by step and batch size of now."""
    seen, position = state.seen_images, state.step * settings.batch_size
    if seen == position:
        return ""
    gap = (
        f"{position - seen:,} images are left out" if position > seen else f"{seen - position:,} images are seen again"
    )
    return (
        f"{seen:,} images were seen in {state.step:,} steps, which had another batch size than {settings.batch_size}: the order of "
        f"the data goes on at image {position:,} ({gap}), and schedules at step {state.step:,}"
    )


def _note_memory(training: Training, run: RunDirectory) -> None:
    """Write the memory plan into the log, and its sum to stderr, before the first step."""
    plan, lines = training_memory(training)
    for line in lines:
        run.note(line)
    free = available_bytes(training.engine.device)
    of_free = "" if free is None else f" of {free / GIB:,.1f}"
    say([f"{training.title}: needs about {plan.total / GIB:.2g}{of_free} GiB of memory (its parts: --dry-run)"])


class _Sitting:
    """What one sitting of a training writes down: log lines and progress."""

    def __init__(self, training: Training, run: RunDirectory, start: int, spent: float, watch: Previews) -> None:
        self.training, self.run, self.start, self.spent, self.watch = training, run, start, spent, watch
        self.began = self.logged = time.perf_counter()
        self.waited_s = 0.0
        self.note = ""  # of the last logged step, for the progress line
        self.saved: Written | None = None

    def seconds(self) -> float:
        """Seconds over all sittings, without those spent on looks."""
        return self.spent + time.perf_counter() - self.began - self.watch.seconds

    def tell_saved(self, writer: CheckpointWriter) -> None:
        """Note the checkpoint that has been written since the last call, if one has."""
        writer.check()
        if writer.written is None or writer.written is self.saved:
            return
        self.saved = writer.written
        size, held, write = self.saved.num_bytes / 2**20, self.saved.held_s, self.saved.write_s
        self.run.note(
            f"checkpoint of step {self.saved.step}: {size:.1f} MiB, training held {held:.2f} s, written in {write:.2f} s"
        )

    def tell(self, record: StepRecord, bar: Advance) -> None:
        """Log what is due after a step, and move the bar."""
        settings, step = self.training.settings, record.step + 1
        images = self.training.state.seen_images
        self.waited_s += record.waited_s
        if record.step % settings.log_every_steps and step != settings.made_steps and record.applied:
            bar(images, self.note)
            return
        values = record.values()
        now = time.perf_counter()
        waiting = self.waited_s / max(now - self.logged, 1e-9)
        self.logged, self.waited_s = now, 0.0
        bad = {} if record.applied else {"bad_samples": record.bad_samples}
        line: dict[str, Any] = {
            "step": record.step,
            "seen_images": images,
            "seconds": round(self.seconds(), 3),
            **values,
        }
        line |= {**self.training.extra(record), "waiting": round(waiting, 4), "applied": record.applied, **bad}
        self.run.log(line)
        self.watch.log(record.step, line)
        loss, norm = (math.nan if (value := values[name]) is None else value for name in ("loss", "gradient_norm"))
        self.note = f"loss {loss:.4f}, gradient norm {norm:.3g}, learning rate {record.learning_rate:.2g}"
        bar(images, self.note)


def save(run: RunDirectory, model: LoadedModel, name: str) -> None:
    """Write a model folder of the run, where this process writes."""
    if run.writes:
        save_model(model, run.path / name)


def finished(run: RunDirectory, dry_run: bool) -> None:
    """Say that there is nothing to do."""
    if run.writes:
        say_finished(run.path, dry_run)
    if not dry_run:
        run.tidy()
