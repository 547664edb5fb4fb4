"""Processes by the name that families give: objective, sampler, and the settings that a new model stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tinyfusion.config.recipe import Recipe, SampleSection
from tinyfusion.core.errors import UserError, prefixed
from tinyfusion.jobs.transformer_few_steps import transformer_noising
from tinyfusion.jobs.transformer_training import transformer_objective
from tinyfusion.models.loaded import LoadedModel
from tinyfusion.models.transformer import TransformerModel
from tinyfusion.processes.base import Process
from tinyfusion.processes.flow import Flow, FlowObjective
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.processes.masked import MaskedObjective
from tinyfusion.processes.noising import Noising, noising_of_process
from tinyfusion.processes.time import TimeSampler
from tinyfusion.sample import flow, gaussian, masked
from tinyfusion.sample.drive import WHOLE, Sampler
from tinyfusion.sample.few_steps import FewStepSampler


@dataclass(frozen=True)
class ProcessSpec:
    """The functions of a process.

    objective: of (model, probability that a label is dropped, recipe). sampler: raises UserError on invalid settings. cheap:
    (settings, most steps) -> settings with at most so many steps, for previews. saved: the settings that a new model stores
    (`ModelFacts.process_settings`).
    """

    objective: Callable[[LoadedModel, float, Recipe], Process]
    sampler: Callable[[SampleSection, LoadedModel], Sampler]
    cheap: Callable[[SampleSection, int], SampleSection]
    saved: Callable[[Recipe], dict[str, Any]] = lambda _: {}


def _flow_objective(model: LoadedModel, label_drop: float, recipe: Recipe) -> Process:
    """Path and prediction are the model's; weight, distance from the ends and noise levels the recipe's."""
    settings, path = recipe.flow, flow.flow_of(model)
    with prefixed("flow", ValueError):
        times = TimeSampler.of_section(settings, model.arch.num_tokens)
        return FlowObjective(label_drop, path, settings.loss_weight, settings.train_eps, times, model.family.call)


PROCESS_SECTIONS = ("flow", "masked")  # of a recipe: what a training depends on, besides its own section
_OF_MODEL = ("flow", "call", "inputs", "patch_size", "prediction")  # fields of a process that the model sets

PROCESSES: dict[str, ProcessSpec] = {
    "gaussian": ProcessSpec(
        objective=lambda model, label_drop, _: GaussianObjective(label_drop, call=model.family.call),
        sampler=gaussian.from_section,
        cheap=gaussian.cheap,
    ),
    "flow": ProcessSpec(
        objective=_flow_objective,
        sampler=flow.from_section,
        cheap=flow.cheap,
        saved=lambda recipe: Flow(recipe.flow.path, recipe.flow.prediction).settings(),
    ),
    "masked": ProcessSpec(
        objective=lambda model, label_drop, recipe: MaskedObjective(
            model.arch.patch_size, label_drop, recipe.masked, model.family.inputs
        ),
        sampler=masked.from_section,
        cheap=masked.cheap,
    ),
}


def process_spec(model: LoadedModel) -> ProcessSpec:
    """The process of a model's family."""
    if isinstance(model, TransformerModel):
        raise UserError(f"a {model.folder.class_name} is drawn by its own pipeline: give --prompts FILE")
    if model.family.process not in PROCESSES:
        raise UserError(
            f"a {model.family.title} of your own has no process: a Task says how it is trained, and your own code how it draws"
        )
    return PROCESSES[model.family.process]


def check_denoiser(model: LoadedModel, role: str = "model") -> None:
    """Raise UserError for a model of few steps, which can neither be trained or pruned any more nor teach at all noise levels."""
    if model.facts.few_steps is not None:
        raise UserError(
            f"the {role} was distilled for {len(model.facts.few_steps.levels)} steps, and is no denoiser of all noise levels any more: "
            "give the model that it was distilled from"
        )


def check_process(process: Process, model: LoadedModel) -> None:
    """Raise UserError where a process of `PROCESSES` was made for another model; one of the caller's own is not known here."""
    if not isinstance(process, GaussianObjective | FlowObjective | MaskedObjective) or isinstance(
        model, TransformerModel
    ):
        return
    own = objective_for(model, 0.0, Recipe())
    fields = [name for name in _OF_MODEL if hasattr(own, name)]
    if type(own) is type(process) and all(getattr(own, name) == getattr(process, name, None) for name in fields):
        return
    raise UserError(
        f"the process is not that of the model, which is of family {model.family.name}: give objective_of(model) of this one, or of "
        "one of the same family and process settings"
    )


def objective_for(model: LoadedModel, label_drop: float, recipe: Recipe) -> Process:
    """The training objective of a model. label_drop: probability that a label is replaced by the null class.

    Raises UserError for a transformer of diffusers whose call is not known, and for a model of few steps.
    """
    check_denoiser(model)
    if isinstance(model, TransformerModel):
        return transformer_objective(model, label_drop_of(model, label_drop), recipe)
    return process_spec(model).objective(model, label_drop_of(model, label_drop), recipe)


def label_drop_of(model: LoadedModel, label_drop: float) -> float:
    """The probability that a label is dropped in training: 0 where the model has no null class."""
    return label_drop if model.null_class else 0.0


def noising_of(model: LoadedModel) -> Noising:
    """How the process of a model mixes image and noise. Raises UserError where none is known."""
    if isinstance(model, TransformerModel):
        return transformer_noising(model)
    with prefixed("the model's process_settings", ValueError, TypeError):
        noising = noising_of_process(model.family.process, model.facts.process_settings)
    if noising is None:
        raise UserError(
            f"few steps are for models whose process mixes image and noise (gaussian, flow); a {model.family.title} has none"
        )
    return noising


def sampler_of(settings: SampleSection, model: LoadedModel) -> Sampler:
    """The sampler of a recipe for a model; of a model of few steps its own, without guidance where the model has folded it in.

    Raises UserError on an invalid guidance or number of steps.
    """
    if model.facts.few_steps is not None:
        return FewStepSampler(noising_of(model), model.facts.few_steps)
    if model.facts.folded_guidance is not None:
        settings = dataclasses.replace(settings, guidance=1.0, guidance_interval=WHOLE)
    if settings.guidance < 1:
        raise UserError(
            f"--guidance must be at least 1 (1 runs the conditional model alone); got {settings.guidance:g}"
        )
    if settings.guidance > 1 and not model.null_class:
        raise UserError(
            f"--guidance {settings.guidance:g} compares with a class for no label, and the model has none: --set sample.guidance=1"
        )
    low, high = settings.guidance_interval
    if not 0 <= low <= high <= 1:
        raise UserError(
            f"sample.guidance_interval wants two shares of the timesteps, rising in [0, 1], as in 0.1,0.8; got {low:g} and {high:g}"
        )
    return process_spec(model).sampler(settings, model)


def default_sampling(model: LoadedModel) -> SampleSection:
    """The published sampling settings, without guidance for models without a null class."""
    return SampleSection() if model.null_class else SampleSection(guidance=1.0)


def fitting_sampling(settings: SampleSection, model: LoadedModel) -> SampleSection:
    """A recipe's sampling settings where they go with a model, else `default_sampling`, such as where they say DDIM for a flow."""
    try:
        sampler_of(settings, model)
    except UserError:
        return default_sampling(model)
    return settings
