"""The learned criterion: gates and temporary weight updates, trained together.

`GatedObjective` wraps any objective: it draws the gates' noise with the batch and runs the model under sampled gates.
Source: TinyFusion (arXiv 2412.01199), section 3. Differs from the released code: schedules end exactly, the decision is
saved and not only printed, groups must cover all blocks, and no second load discards the weight updates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.scheme import BlockGroup
from tinyfusion.blocks.stack import BlockStack, frozen, num_parameters
from tinyfusion.config.recipe import PruneSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Draws
from tinyfusion.models.checkpoint import LoadedModel, make_trainable
from tinyfusion.processes.base import Batch, NoisyBatch, Objective, Prediction, Process, StepMemory, Trials
from tinyfusion.prune.decision import Decision
from tinyfusion.prune.gates import CategoricalGates, GateDistribution, SubsetGates
from tinyfusion.prune.layout import GateLayout, gate_layout
from tinyfusion.training.lora import add_lora, cast_frozen_linears, delta_weights, without_lora
from tinyfusion.training.optim import ParameterGroup, linear, trainable
from tinyfusion.training.packed import pack
from tinyfusion.training.rounding import hold_weights
from tinyfusion.training.state import Ema

FIXED = "gates.fixed_at"  # of the state of a training that searches
UNLIKELY = 0.05  # share of the likeliest choice's probability below which no other is tried


@dataclass(frozen=True)
class Search:
    """A search that is the beginning of a training: when its blocks are fixed, and by what.

    After `steps` steps, or as soon as every decision has the probability `sure`, the blocks are fixed, and the training goes on
    with these alone. candidates, trial_steps, trial_batch_size, trial_rate: where nothing was sure after `steps`, so many of the
    likeliest choices are trained so long from there, at this share of the learning rate, on the same images and noise, and the one
    of the lowest mean loss in the second half is fixed.
    """

    steps: int
    sure: float
    candidates: int = 1
    trial_steps: int = 0
    trial_batch_size: int = 0
    trial_rate: float = 1.0

    @property
    def trial_images(self) -> int:
        """Most images of the trials."""
        return self.candidates * self.trial_steps * self.trial_batch_size if self.candidates > 1 else 0


@dataclass(frozen=True)
class GatedObjective(Objective):
    """An objective under sampled gates, one independent mask per sample; temperature and scaling follow the step.

    steps: of the search. layout: which gate each block has. taught: the loss is the distance to the output of the whole model
    instead of that on the data; inner is a `Process`. teacher: the whole model and its blocks; None: the trained model itself,
    without gates and LoRA updates. search: the gates are those of the beginning of a longer training; None: they are sampled to the end.
    """

    inner: Objective
    stack: BlockStack
    gates: GateDistribution
    temperature: tuple[float, float]
    scaling: tuple[float, float]
    steps: int
    layout: GateLayout
    dropped: Literal["dense", "skip"] = "skip"
    taught: bool = False
    teacher: tuple[nn.Module, BlockStack] | None = None
    search: Search | None = None

    def draw(self, batch: Batch, draws: Draws) -> NoisyBatch:
        noisy = self.inner.draw(batch, draws)
        noise = tuple(drawn.to(noisy.device) for drawn in self.gates.draw(draws))
        if self.gates.paired and not self.gates.is_fixed:
            check_pairs(draws.first)
        return dataclasses.replace(noisy, gate_noise=noise)

    def prepared(self, model: nn.Module, microbatches: Sequence[NoisyBatch]) -> Sequence[NoisyBatch]:
        """Fix the blocks where they are decided; before that, pair the samples of an estimator that compares neighbours."""
        step = microbatches[0].step
        if self.search and not self.gates.is_fixed and (step >= self.steps or self._is_sure(step, self.search.sure)):
            self.gates.fix(step)
        microbatches = self.inner.prepared(model, microbatches)
        if not self.gates.paired or self.gates.is_fixed:
            return microbatches
        return [in_pairs(noisy) for noisy in microbatches]

    def _is_sure(self, step: int, sure: float) -> bool:
        """Whether every decision of the logits has at least the probability `sure`."""
        scaling = linear(self.scaling, step, self.steps)
        logits = [theta.detach() for theta in self.gates.logits]
        levels = [level for i, theta in enumerate(logits) for level in self.gates.confidence(i, theta, scaling)]
        return min(levels, default=1.0) >= sure

    @property
    def trial_step(self) -> int | None:
        return self.steps if self.search and self.search.candidates > 1 else None

    def trials(self) -> Trials | None:
        """One per candidate; none where a single one has at least the share `UNLIKELY` of the likeliest's probability."""
        search, gates = self.search, self.gates
        if search is None or gates.is_fixed:
            return None
        if self._is_sure(self.steps, search.sure):
            return None
        choices = gates.likeliest(search.candidates, self.scaling[1], UNLIKELY)

        def enter(index: int) -> None:
            gates.fix(self.steps, choices[index])

        def decide(losses: Sequence[float]) -> None:
            known = [loss if math.isfinite(loss) else math.inf for loss in losses]
            gates.fix(self.steps, choices[known.index(min(known))])
            gates.tried = list(zip(choices, losses, strict=True))
            with torch.no_grad():
                gates.trial_images.fill_(len(choices) * search.trial_steps * search.trial_batch_size)

        trials = Trials(len(choices), search.trial_steps, search.trial_batch_size, search.trial_rate, enter, decide)
        return trials if trials.num > 1 else None

    def masks(self, noisy: NoisyBatch) -> Tensor:
        """Gates (B, blocks), sampled; (1, blocks) without a gradient once they are fixed."""
        if self.gates.is_fixed:
            return self.layout.of_blocks(self.gates.fixed_gates[None])
        temperature = linear(self.temperature, noisy.step, self.steps)
        scaling = linear(self.scaling, noisy.step, self.steps)
        return self.layout.of_blocks(self.gates.sample(noisy.gate_noise, temperature, scaling))

    def predict(self, model: nn.Module, noisy: NoisyBatch) -> Prediction:
        masks = self.masks(noisy)
        taught = self._taught(model, noisy) if self.taught else None
        with self.stack.gated(masks, self.dropped):
            own = self.inner.predict(model, noisy)
        return own if taught is None else dataclasses.replace(own, teacher=taught)

    @torch.no_grad()
    def _taught(self, model: nn.Module, noisy: NoisyBatch) -> Prediction:
        """The prediction of the whole model."""
        if self.teacher is not None:
            return self.inner.predict(self.teacher[0], noisy)
        with without_lora(model):
            return self.inner.predict(model, noisy)

    def losses(self, model: nn.Module, noisy: NoisyBatch, prediction: Prediction) -> dict[str, Tensor]:
        """The losses of the inner objective; for estimators with a surrogate, "loss" also carries its gradient."""
        if self.taught and prediction.teacher is not None:
            terms = cast(Process, self.inner).kd_terms(noisy, prediction, prediction.teacher)
            terms = {"loss": terms["kd_loss"], **terms}
        else:
            terms = self.inner.losses(model, noisy, prediction)
        if self.gates.is_fixed:  # every process reduces gradients of the same parameters at every step
            nothing = sum((0 * theta.sum() for theta in self.gates.logits), start=torch.zeros((), device=noisy.device))
            return {**terms, "loss": terms["loss"] + nothing}
        scaling = linear(self.scaling, noisy.step, self.steps)
        surrogate = self.gates.surrogate(noisy.gate_noise, scaling, terms["loss"])
        if surrogate is None:
            return terms
        return {**terms, "loss": terms["loss"] + (surrogate - surrogate.detach())}  # the same value

    def step_memory(self) -> StepMemory:
        """Memory of a step: with skipping, a graph is retained only for the blocks that an image keeps."""
        groups = self.gates.groups if self.dropped == "skip" else []
        share = sum(g.keep for g in groups) / sum(g.size for g in groups) if groups else 1.0
        inner = self.inner.step_memory()
        return dataclasses.replace(inner, teacher=self.teacher or inner.teacher, graph_share=share)


def check_pairs(first: int) -> None:
    """Raise ValueError if a microbatch begins with an odd sample, by its global index, because that would split a pair."""
    if first % 2:
        raise ValueError(f"samples come in pairs, so a microbatch begins with an even one; this one with {first}")


def in_pairs(noisy: NoisyBatch) -> NoisyBatch:
    """Replace sample 2k + 1 by sample 2k in image, timestep, noise and label, but not in the noise of the gates."""
    rows = torch.arange(len(noisy), device=noisy.device) // 2 * 2
    return dataclasses.replace(noisy.each(lambda value: value[rows]), gate_noise=noisy.gate_noise)


@dataclass(frozen=True)
class MaskLearner:
    """A copy of a teacher with gates and weight updates, its objective and its parameter groups."""

    module: nn.Module
    objective: GatedObjective
    groups: dict[str, list[BlockGroup]]  # of units
    parameter_groups: list[ParameterGroup]
    teacher_parameters: int

    @property
    def trainable_share(self) -> float:
        """Trained weights (without gates) as a share of the teacher's parameters."""
        return sum(p.numel() for p in self.parameter_groups[0].parameters.values()) / self.teacher_parameters

    def decision(self, ema: Ema, step: int) -> Decision:
        """The blocks that are fixed, else those that the averaged logits select at `step`, with their probabilities."""
        gates, choice = self.objective.gates, None
        logits = [ema.average[f"gates.logits.{i}"] for i in range(len(gates.logits))]
        if gates.fixed_step is not None:
            step, logits, choice = (
                gates.fixed_step,
                [theta.detach() for theta in gates.fixed_logits],
                gates.fixed_choice,
            )
        scaling = linear(self.objective.scaling, step, self.objective.steps)
        return Decision(self.groups, gates, logits, scaling, self.objective.layout, choice)

    def log(self, ema: Ema, step: int) -> dict[str, Any]:
        """Fields of a log line on the decision at `step`."""
        goal = self.objective
        fixed = {} if goal.search is None else {"fixed": goal.gates.is_fixed}
        return {"temperature": linear(goal.temperature, step, goal.steps), **self.decision(ema, step).fields(), **fixed}


def mask_learner(
    teacher: LoadedModel,
    objective: Process,
    settings: PruneSection,
    seed: int,
    device: torch.device | str = "cpu",
    place: Callable[[nn.Module, list[nn.Module]], nn.Module] | None = None,
) -> MaskLearner:
    """Attach gates and weight updates to a copy of `teacher`.

    seed: of the updates' initial values. place: moves the copy to the device, and may shard it (`Engine.place`).
    Raises UserError if the scheme does not fit.
    """
    layout = gate_layout(teacher)
    settings = layout.spelled(settings)
    groups = layout.groups(settings)
    module = teacher.copy().module.train()
    make_trainable(module, teacher.family)  # a frozen teacher's copy is frozen
    if settings.storage != "own":
        pack_frozen(module.requires_grad_(False), teacher.family.stack(module), settings, torch.device(device))
    deltas = _deltas(module, settings, seed, teacher.family.computed)
    if settings.update == "full":
        hold_weights(module, deltas, settings.training)
    elif settings.training.dtype != "float32":
        cast_frozen_linears(module, getattr(torch, settings.training.dtype))
    else:
        module.float()  # files may have other types
    stack = teacher.family.stack(module)
    if place is None:
        module.to(device)
    else:  # parameters are other objects afterwards
        place(module, list(stack))
        deltas = {name: p for name, p in module.named_parameters() if name in deltas}
    gates = gates_of(groups, settings).to(device)
    schedules = (settings.temperature, settings.scaling, settings.training.steps)
    taught = settings.target == "teacher" or (settings.target is None and teacher.distilled_guidance)
    whole = None
    if taught and settings.update == "full":
        copied = teacher.copy()
        if settings.training.dtype == "float32":
            copied.module.float()
        whole = frozen(copied.module.to(device)), copied.stack
    gated = GatedObjective(objective, stack, gates, *schedules, layout, settings.dropped, taught, whole)
    parameter_groups = [ParameterGroup(deltas), logit_group(gates, settings)]
    return MaskLearner(module, gated, groups, parameter_groups, num_parameters(teacher.module))


def search_within(
    whole: LoadedModel,
    objective: Objective,
    parameters: Sequence[ParameterGroup],
    settings: PruneSection,
    search: Search,
    device: torch.device,
) -> MaskLearner:
    """Gates on a model that is being trained, for a search that is the beginning of that training.

    whole: the model, placed. objective: of the training. parameters: what trains. Differs from the paper, which learns masks first,
    throws the weight updates away, and trains the student from the teacher's weights. Raises UserError if the scheme does not fit.
    """
    layout = gate_layout(whole)
    settings = layout.spelled(settings)
    groups = layout.groups(settings)
    gates = gates_of(groups, settings).to(device)
    schedules = (settings.temperature, settings.scaling, search.steps)
    gated = GatedObjective(objective, whole.stack, gates, *schedules, layout, settings.dropped, search=search)
    fixed = {f"gates.fixed_logits.{i}": theta for i, theta in enumerate(gates.fixed_logits)}
    fixed |= {FIXED: gates.fixed_at, "gates.fixed_gates": gates.fixed_gates, "gates.trial_images": gates.trial_images}
    listed = [*parameters, logit_group(gates, settings), ParameterGroup(fixed, constant=True, decayed=False)]
    return MaskLearner(whole.module, gated, groups, listed, num_parameters(whole.module))


def gates_of(groups: Mapping[str, Sequence[BlockGroup]], settings: PruneSection) -> GateDistribution:
    """The distribution of the gates that the settings name (`GateLayout.spelled`), over the groups of all lists."""
    listed = [group for of_list in groups.values() for group in of_list]
    if settings.distribution == "subset":
        return SubsetGates(listed, settings.logit_init, settings.subset_estimator)
    return CategoricalGates(listed, settings.logit_init)


def logit_group(gates: GateDistribution, settings: PruneSection) -> ParameterGroup:
    """The logits, with a constant learning rate of their own."""
    logits = {f"gates.logits.{i}": theta for i, theta in enumerate(gates.logits)}
    return ParameterGroup(logits, settings.gate_learning_rate, constant=True)


def pack_frozen(module: nn.Module, stack: BlockStack, settings: PruneSection, device: torch.device) -> None:
    """Store the blocks of a frozen module in 8 or 4 bits, in place. Raises UserError where all weights train."""
    if settings.update == "full":
        raise UserError(
            f"prune.storage {settings.storage} is for weights that do not train, and --update full trains them: use lora, or own"
        )
    pack(stack, settings.storage, device)


def _deltas(module: nn.Module, settings: PruneSection, seed: int, fixed: Collection[str]) -> dict[str, nn.Parameter]:
    if settings.update == "lora":
        return add_lora(module, settings.lora_rank, settings.lora_scale * settings.lora_rank, seed, fixed)
    if settings.update == "frozen":
        module.requires_grad_(False)
    return trainable(module)


def plan_of(
    decision: Decision, teacher: LoadedModel, settings: PruneSection, seed: int, cost: dict[str, float]
) -> PrunePlan:
    """The decision as a plan."""
    settings = decision.layout.spelled(settings)
    return PrunePlan(
        kept=decision.kept(),
        depth=teacher.stack.depths(),
        criterion="learned",
        scheme=settings.scheme,
        distribution=settings.distribution,
        groups={
            name: [[g.keep, g.size] for g in listed]
            for name, listed in decision.groups.items()
            if decision.layout.sizes[name] == decision.layout.depths.get(name)
        },
        scores={"meaning": decision.gates.meaning, **decision.probabilities()},
        seed=seed,
        teacher=teacher.hash(),
        cost=cost,
        runs=settings.runs if settings.distribution == "runs" else None,
    )


@torch.no_grad()
def prune_with_weight_updates(
    teacher: LoadedModel, plan: PrunePlan, averages: Mapping[str, Tensor], settings: PruneSection
) -> LoadedModel:
    """The student of `plan`, with the averaged weight updates of mask learning.

    Plan and lineage are those of `teacher.cut(plan)`. LoRA updates are added to the teacher's weights; fully trained
    weights replace them. Applying the plan to the teacher gives the blocks of this student, but not its weights. The
    paper discards the updates; docs/results/recovery-extras.md compares.
    """
    parameters = dict(teacher.module.named_parameters())
    changed = {name: value for name, value in averages.items() if name in parameters}
    for name, delta in delta_weights(averages, settings.lora_scale).items():
        own = parameters[name].detach()
        changed[name] = own.to(delta.dtype) + delta.to(own.device)
    return cut_with_weights(teacher, plan, teacher.with_changed(changed))


def cut_with_weights(teacher: LoadedModel, plan: PrunePlan, trained: LoadedModel) -> LoadedModel:
    """`teacher.cut(plan)` with the weights of `trained`, the same model after a training: its lineage is the teacher's."""
    return teacher.cut(plan).with_changed(trained.cut(dataclasses.replace(plan, teacher="")).module.state_dict())
