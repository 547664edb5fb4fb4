"""The frame of verbs that train: open models, fill in what is unnamed, check, then estimate or train, and save.

A verb states only what is its own: what it opens, what it trains, and what it leaves in the run folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from tinyfusion.config.recipe import Recipe, TrainingSection
from tinyfusion.core.errors import OtherRecipe, UserError
from tinyfusion.core.progress import say
from tinyfusion.core.rundir import RunDirectory, check_space, say_finished
from tinyfusion.data.batches import Batches
from tinyfusion.jobs.assemble import RunOptions, engine_for, job_record, plain_recipe, training_plan
from tinyfusion.jobs.driving import average_warning, training_section
from tinyfusion.jobs.estimate import Estimate, announce, described
from tinyfusion.jobs.latent_facts import with_facts_of
from tinyfusion.jobs.origins import drawn_shape, require_reference, with_data, with_evaluation
from tinyfusion.jobs.previews import check_previews
from tinyfusion.jobs.process_specs import PROCESS_SECTIONS
from tinyfusion.models.checkpoint import LoadedModel, save_model
from tinyfusion.training.checkpoints import checkpoint_folders
from tinyfusion.training.engine import Engine


@dataclass(frozen=True)
class Inputs:
    """What a verb starts from: the recipe with nothing left unnamed, and models by their role in the run's record.

    models: None where the recipe wants no model in that role. sources: the models as they were named. batches: the training
    data, where they were opened to know the sizes of a new model.
    """

    recipe: Recipe
    options: RunOptions
    models: Mapping[str, LoadedModel | None] = field(default_factory=dict)
    sources: Mapping[str, str | Path] = field(default_factory=dict)
    batches: Batches | None = None

    def model(self, role: str) -> LoadedModel:
        """The model in a role that always has one."""
        model = self.models[role]
        assert model is not None
        return model


class Work(Protocol):
    """What a verb does between opening and saving."""

    @property
    def settings(self) -> TrainingSection | None:
        """Of the training; None where nothing is trained."""
        ...

    @property
    def shown(self) -> LoadedModel | None:
        """The model that previews are drawn from; None where there is nothing to draw."""
        ...

    def disk_bytes(self) -> int:
        """Bytes that a run writes."""
        ...

    def estimate(self) -> Estimate:
        """What it will take. Moves what is trained: discard it afterwards. Every process must call."""
        ...


W = TypeVar("W", bound=Work)


class TrainingVerb(Generic[W]):
    """What is a verb's own. sections: of the recipe, that its result depends on."""

    name: str
    sections: tuple[str, ...]

    def open(self, recipe: Recipe, options: RunOptions, source: str | Path, remarks: list[str]) -> Inputs:
        """Open models and fill in what the recipe leaves unnamed. remarks: gets lines for people.

        Raises UserError on what does not go together.
        """
        raise NotImplementedError

    def hashes(self, inputs: Inputs) -> dict[str, str | None]:
        """The inputs by role, as hashes: another model is another command."""
        return {role: model.hash() if model else None for role, model in inputs.models.items()}

    def plain(self, inputs: Inputs) -> dict[str, Any]:
        """The inputs as plain values: what "the same command" means."""
        return plain_recipe(inputs.recipe, *self.sections, *PROCESS_SECTIONS, **self.hashes(inputs))

    def work(self, inputs: Inputs, engine: Engine) -> W:
        """What is trained, ready to go. Changes and moves the models. Raises UserError on everything the verb would refuse."""
        raise NotImplementedError

    def says(self, inputs: Inputs, work: W) -> dict[str, str]:
        """Rows of `--dry-run` that only this verb has."""
        return {}

    def perform(self, inputs: Inputs, work: W, folder: RunDirectory) -> dict[str, Any]:
        """Train and save inside the run folder; what `--json` prints."""
        raise NotImplementedError

    def outcome(self, folder: RunDirectory) -> dict[str, Any]:
        """What `--json` prints of a run that had finished before."""
        return {}

    def __call__(self, recipe: Recipe, options: RunOptions, source: str | Path = "") -> dict[str, Any]:
        """Do what the verb says; what `--json` prints."""
        engine = engine_for(recipe)  # first, so that a later failure on one rank is detected by the others
        remarks: list[str] = []
        inputs = self.open(recipe, options, source, remarks)
        recipe, options, plain = inputs.recipe, inputs.options, self.plain(inputs)
        folder = RunDirectory(options.out, engine.is_main)
        mode = engine.first(lambda: self._mode(folder, plain, options.overwrite))
        models = {role: described(model) for role, model in inputs.models.items() if model} if options.dry_run else {}
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
            folder.mark("running", job=job_record(recipe, options, **inputs.sources))
            outcome = self.perform(inputs, work, folder)
        engine.wait()  # until the main process has written everything
        say(remarks if late else ())
        return outcome

    def _mode(self, folder: RunDirectory, plain: Mapping[str, Any], overwrite: bool) -> str:
        """As `RunDirectory.check`, whose refusal also says what to type where only more steps are wanted."""
        try:
            return folder.check(self.name, plain, overwrite)
        except OtherRecipe as error:
            field, there, now = error.difference
            saved = checkpoint_folders(folder.checkpoints)
            if (
                field != f"{training_section(self.name)}.steps"
                or not saved
                or not isinstance(there, int)
                or there >= now
            ):
                raise
            raise UserError(
                f"{error}; to train on to {now:,} steps, continue from its checkpoint in another folder: --resume {saved[-1]} "
                "--out OTHER"
            ) from error


def known_inputs(
    recipe: Recipe,
    model: LoadedModel,
    sources: Iterable[str | Path],
    remarks: list[str],
    needed: bool = True,
    evaluated: bool = False,
) -> tuple[Recipe, LoadedModel]:
    """The recipe with data, features and references where it names none, and the model with the facts of its latents.

    sources: models whose runs tell their data. remarks: gets lines for people. needed: data are. evaluated: images of the model
    will be, so a reference is needed too. Raises UserError where something needed is not known.
    """
    recipe = with_data(recipe, model, sources, remarks, needed)
    model = with_facts_of(recipe, model)
    if evaluated:
        recipe = with_evaluation(recipe, drawn_shape(model), remarks)
        require_reference(recipe)
    return recipe, model


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
