"""The frame of verbs that train: open models, complete the recipe, check, then estimate or train, and save.

A verb defines only its own steps: which models it opens, what it trains, and the files that it writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from tinyfusion.config.recipe import Recipe, TrainingSection
from tinyfusion.core.errors import OtherRecipe, UserError
from tinyfusion.core.progress import say
from tinyfusion.core.records import other_settings
from tinyfusion.core.rundir import RunDirectory, atomic_write, check_space, say_finished
from tinyfusion.data.batches import Batches
from tinyfusion.data.recorded import RecordedInputs
from tinyfusion.export.transformer import FILES, write_transformer
from tinyfusion.jobs.assemble import RunOptions, engine_for, job_record, plain_recipe, training_plan
from tinyfusion.jobs.driving import average_warning, training_section
from tinyfusion.jobs.estimate import Estimate, announce, described
from tinyfusion.jobs.latent_facts import with_facts_of
from tinyfusion.jobs.origins import drawn_shape, require_reference, with_data, with_evaluation
from tinyfusion.jobs.previews import check_previews
from tinyfusion.jobs.process_specs import PROCESS_SECTIONS
from tinyfusion.jobs.typed import check_read
from tinyfusion.models import checkpoint
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.transformer import TransformerModel
from tinyfusion.training.checkpoints import checkpoint_folders
from tinyfusion.training.engine import Engine


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
        say([f"warning: {warning}"] if warning else ())
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
