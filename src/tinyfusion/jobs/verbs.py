"""The frame of verbs that train: open models, complete the recipe, check, then estimate or train, and save.

A verb defines only its own steps: which models it opens, what it trains, and the files that it writes. `drive` runs a training
inside a run folder: resume, log lines, progress, previews, checkpoints, interruption.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from tinyfusion.config.recipe import Recipe, TrainingSection
from tinyfusion.core.device import available_bytes
from tinyfusion.core.errors import OtherRecipe, UserError
from tinyfusion.core.progress import Advance, progress, say
from tinyfusion.core.records import other_settings, section_of
from tinyfusion.core.rundir import RunDirectory, atomic_write, check_space, say_finished
from tinyfusion.core.signals import Interrupted, SignalWatch
from tinyfusion.data.batches import Batches
from tinyfusion.data.recorded import RecordedInputs
from tinyfusion.export.transformer import FILES, write_transformer
from tinyfusion.jobs.assemble import RunOptions, engine_for, job_record, plain_recipe, training_plan
from tinyfusion.jobs.estimate import GIB, Estimate, announce, described
from tinyfusion.jobs.latent_facts import with_facts_of
from tinyfusion.jobs.origins import drawn_shape, require_reference, with_data, with_evaluation
from tinyfusion.jobs.previews import Previews, check_previews
from tinyfusion.jobs.process_specs import PROCESS_SECTIONS
from tinyfusion.jobs.training import Training
from tinyfusion.jobs.typed import check_read
from tinyfusion.models import checkpoint
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.transformer import TransformerModel
from tinyfusion.training.checkpoints import CheckpointWriter, Written, checkpoint_folders, load_checkpoint, load_latest
from tinyfusion.training.engine import Engine
from tinyfusion.training.loop import StepRecord
from tinyfusion.training.state import TrainState, horizon_warning


@dataclass(frozen=True)
class Inputs:
    """Inputs of a verb: the completed recipe, and models by their role in the run's record.

    models: None where the recipe has no model in that role. sources: the models as they were named. batches: the training
    data, where they were opened for the sizes of a new model. recorded: calls of a transformer of diffusers, to train on.
    """

    recipe: Recipe
    options: RunOptions
    models: Mapping[str, LoadedModel | None] = field(default_factory=dict)
    sources: Mapping[str, str | Path] = field(default_factory=dict)
    batches: Batches | None = None
    recorded: RecordedInputs | None = None

    def model(self, role: str) -> LoadedModel:
        """The model of a role that is never None."""
        model = self.models[role]
        assert model is not None
        return model


class Work(Protocol):
    """The work of a verb between opening and saving."""

    @property
    def settings(self) -> TrainingSection | None:
        """Settings of the training; None where nothing is trained."""
        ...

    @property
    def shown(self) -> LoadedModel | None:
        """The model of the previews; None where there are none."""
        ...

    def disk_bytes(self) -> int:
        """Bytes that a run writes."""
        ...

    def estimate(self) -> Estimate:
        """Its cost. Changes the training: discard it afterwards. Every process must call."""
        ...


W = TypeVar("W", bound=Work)


class TrainingVerb(Generic[W]):
    """A verb that trains. sections: of the recipe, on which its result depends."""

    name: str
    sections: tuple[str, ...]

    def open(self, recipe: Recipe, options: RunOptions, source: str | Path, remarks: list[str]) -> Inputs:
        """Open models and complete the recipe. remarks: gets lines to print. Raises UserError on inputs that do not fit."""
        raise NotImplementedError

    def hashes(self, inputs: Inputs) -> dict[str, str | None]:
        """Hashes of the models by role."""
        return {role: model.hash() if model else None for role, model in inputs.models.items()}

    def plain(self, inputs: Inputs) -> dict[str, Any]:
        """The inputs as plain values, which identify the same command."""
        named = self.hashes(inputs) | ({"inputs": inputs.recorded.fingerprint} if inputs.recorded else {})
        return plain_recipe(inputs.recipe, *self.sections, *PROCESS_SECTIONS, **named)

    def work(self, inputs: Inputs, engine: Engine) -> W:
        """The work, ready to run. Changes and moves the models. Raises UserError on invalid settings."""
        raise NotImplementedError

    def says(self, inputs: Inputs, work: W) -> dict[str, str]:
        """Further rows of `--dry-run`."""
        return {}

    def perform(self, inputs: Inputs, work: W, folder: RunDirectory) -> dict[str, Any]:
        """Train and save inside the run folder. Returns the outcome for `--json`."""
        raise NotImplementedError

    def outcome(self, folder: RunDirectory) -> dict[str, Any]:
        """The outcome of a run that was already finished, for `--json`."""
        return {}

    def __call__(self, recipe: Recipe, options: RunOptions, source: str | Path = "") -> dict[str, Any]:
        """Execute the verb. Returns the outcome for `--json`."""
        engine = engine_for(recipe)  # first, so that a later failure on one rank is detected by the others
        remarks: list[str] = []
        inputs = self.open(recipe, options, source, remarks)
        recipe, options, plain = inputs.recipe, inputs.options, self.plain(inputs)
        check_read(self.name, recipe, *inputs.models.values())
        folder = RunDirectory(options.out, engine.is_main)
        mode = engine.first(lambda: self._mode(folder, plain, options.overwrite))
        models = {role: described(model) for role, model in inputs.models.items() if model} if options.dry_run else {}
        if options.resume:
            remarks += _changed_since(options.resume, plain)
        work = self.work(inputs, engine)
        check_previews(recipe, work.shown)
        if mode == "finished":
            finished(folder, options.dry_run)
            return self.outcome(folder)
        if mode == "new":
            engine.first(lambda: check_space(options.out, work.disk_bytes()))
        warning = average_warning(self.name, work.settings) if work.settings else None
        say([warning] if warning else ())
        late = work.settings is None and not options.dry_run  # a criterion may refuse images once it sees them
        say(() if late else remarks)
        if options.dry_run:
            rows = {**models, **self.says(inputs, work), **training_plan(recipe, work.settings, mode)}
            return announce(self.name, rows, work.estimate(), engine.is_main)
        with folder.writing(self.name, plain, options.overwrite):
            folder.mark("running", job=job_record(recipe, options, **inputs.sources, inputs=options.inputs))
            outcome = self.perform(inputs, work, folder)
        engine.wait()  # until the main process has written everything
        say(remarks if late else ())
        return outcome

    def _mode(self, folder: RunDirectory, plain: Mapping[str, Any], overwrite: bool) -> str:
        """`RunDirectory.check`; its error also says how to continue with more steps."""
        try:
            return folder.check(self.name, plain, overwrite)
        except OtherRecipe as error:
            field, there, now = error.difference
            saved, more = checkpoint_folders(folder.checkpoints), isinstance(there, int) and there < now
            if field != f"{training_section(self.name)}.steps" or not saved or not more:
                raise
            raise UserError(
                f"{error}; to train on to {now:,} steps, continue from its checkpoint in another folder: --resume {saved[-1]} "
                "--out OTHER"
            ) from error


_GUIDED = (
    "recover.guidance",
    "dynamic.guidance",
    "guidance",
    "guidance_channels",
)  # what the output that is learned depends on


def _changed_since(checkpoint: Path, plain: Mapping[str, Any]) -> list[str]:
    """A remark on the settings that the run of a checkpoint had otherwise. Raises UserError on other guidance to fold in."""
    try:
        changed = other_settings(RunDirectory(checkpoint.resolve().parents[1]).record(), plain)
    except (UserError, ValueError, TypeError, IndexError):  # of a run that is gone or damaged, nothing is known
        return []
    shown = {name: [_shown(value) for value in values] for name, values in changed.items()}
    if name := next((name for name in _GUIDED if name in changed), None):
        was, now = shown[name]
        raise UserError(
            f"{checkpoint} is of a training with {name} {was}, and a model cannot learn other guidance halfway ({now} here): set it to "
            f"{was}, or leave out --resume"
        )
    listed = ", ".join(f"{name} {now} instead of {was}" for name, (was, now) in shown.items())
    return [f"{checkpoint} is of a training with other settings; here {listed}"] if listed else []


def _shown(value: Any) -> str:
    """A setting as text; of a hash its begin."""
    text = "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text


def known_inputs(
    recipe: Recipe, model: LoadedModel, sources: Iterable[str | Path], remarks: list[str], needed: bool = True,
    evaluated: bool = False,
) -> tuple[Recipe, LoadedModel]:  # fmt: skip
    """The recipe completed with data, features and references, and the model with the facts of its latents.

    sources: models whose runs record their data. remarks: gets lines to print. needed: data are needed; evaluated: a
    reference too. Raises UserError where something needed is not known.
    """
    recipe = with_data(recipe, model, sources, remarks, needed)
    model = with_facts_of(recipe, model)
    if evaluated:
        recipe = with_evaluation(recipe, drawn_shape(model), remarks)
        require_reference(recipe)
    return recipe, model


def save(run: RunDirectory, model: LoadedModel, name: str) -> None:
    """Write a model folder of the run, on the rank that writes: ours, or one of diffusers."""
    if run.writes:
        save_model(model, run.path / name, run.path.name)


def save_model(model: LoadedModel, folder: Path, title: str | None = None) -> None:
    """Write a model folder, whole or not at all: ours, or for a transformer of diffusers one of diffusers.

    title: of the latter's model card. Raises UserError for a module of your own, which has no format of ours.
    """
    if isinstance(model, TransformerModel):
        with atomic_write(folder, FILES) as new:
            write_transformer(model.folder, new, title or folder.name)
    else:
        checkpoint.save_model(model, folder)


def finished(run: RunDirectory, dry_run: bool) -> None:
    """Report a run that was already finished."""
    if run.writes:
        say_finished(run.path, dry_run)
    if not dry_run:
        run.tidy()


def training_section(verb: str) -> str:
    """The section of the recipe that sets the training of a verb."""
    return "train" if verb == "train" else f"{section_of(verb)}.training"


def average_warning(verb: str, settings: TrainingSection) -> str | None:
    """A warning where the moving average would still contain much of the initial weights at the end; else None."""
    if settings.ema_decay == 0:
        return None
    warning = horizon_warning(settings.ema_decay, settings.made_steps, training_section(verb))
    return f"warning: {warning}" if warning else None


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
        run.note(jump)
        say([f"{training.title}: {jump}"])
    total = state.seen_images + (settings.made_steps - start) * settings.batch_size
    warning = average_warning(training.title, settings)
    if warning and not start:
        run.note(warning)
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
    run.note(memory)
    say([memory])
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
            sitting.log(record, bar)
            watch.look(state.step, training.averaged)
            sitting.log_saved(writer)
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
    sitting.log_saved(writer)
    return sitting.seconds()


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

    def seconds(self) -> float:
        """Seconds of all sittings, without those of previews."""
        return self.spent + time.perf_counter() - self.began - self.watch.seconds

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
