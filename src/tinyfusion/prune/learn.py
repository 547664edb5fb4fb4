"""The learned criterion: gates and temporary weight updates, trained together.

`GatedObjective` wraps any objective: it draws the gates' noise with the batch and runs the model under sampled gates.
Source: TinyFusion (arXiv 2412.01199), section 3. Differs from the released code: schedules end exactly, the decision is
saved and not only printed, groups must cover all blocks, and no second load discards the weight updates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.scheme import BlockGroup
from tinyfusion.blocks.stack import BlockStack, frozen, num_parameters
from tinyfusion.config.recipe import PruneSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Draws
from tinyfusion.models.checkpoint import LoadedModel, make_trainable
from tinyfusion.processes.base import Batch, NoisyBatch, Objective, Prediction, Process, StepMemory
from tinyfusion.prune.gates import CategoricalGates, GateDistribution, SubsetGates
from tinyfusion.prune.layout import GateLayout, gate_layout
from tinyfusion.training.lora import add_lora, cast_frozen_linears, delta_weights, without_lora
from tinyfusion.training.optim import ParameterGroup, linear, trainable
from tinyfusion.training.packed import pack
from tinyfusion.training.rounding import hold_weights
from tinyfusion.training.state import Ema


@dataclass(frozen=True)
class GatedObjective(Objective):
    """An objective under sampled gates, one independent mask per sample; temperature and scaling follow the step.

    layout: which gate each block has. taught: the loss is the distance to the output of the whole model instead of that on
    the data. teacher: the whole model and its blocks; None: the trained model itself, without gates and LoRA updates.
    """

    inner: Process
    stack: BlockStack
    gates: GateDistribution
    temperature: tuple[float, float]
    scaling: tuple[float, float]
    steps: int
    layout: GateLayout
    dropped: Literal["dense", "skip"] = "skip"
    taught: bool = False
    teacher: tuple[nn.Module, BlockStack] | None = None

    def draw(self, batch: Batch, draws: Draws) -> NoisyBatch:
        noisy = self.inner.draw(batch, draws)
        noise = tuple(drawn.to(noisy.device) for drawn in self.gates.draw(draws))
        if self.gates.paired:
            noisy = in_pairs(noisy, draws.first)
        return dataclasses.replace(noisy, gate_noise=noise)

    def predict(self, model: nn.Module, noisy: NoisyBatch) -> Prediction:
        temperature = linear(self.temperature, noisy.step, self.steps)
        scaling = linear(self.scaling, noisy.step, self.steps)
        masks = self.layout.of_blocks(self.gates.sample(noisy.gate_noise, temperature, scaling))
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
        if prediction.teacher is None:
            terms = self.inner.losses(model, noisy, prediction)
        else:
            terms = self.inner.kd_terms(noisy, prediction, prediction.teacher)
            terms = {"loss": terms["kd_loss"], **terms}
        scaling = linear(self.scaling, noisy.step, self.steps)
        surrogate = self.gates.surrogate(noisy.gate_noise, scaling, terms["loss"])
        if surrogate is None:
            return terms
        return {**terms, "loss": terms["loss"] + (surrogate - surrogate.detach())}  # the same value

    def step_memory(self) -> StepMemory:
        """Memory of a step: with skipping, a graph is retained only for the blocks that an image keeps."""
        groups = self.gates.groups if self.dropped == "skip" else []
        return StepMemory(
            self.teacher, graph_share=sum(g.keep for g in groups) / sum(g.size for g in groups) if groups else 1.0
        )


def in_pairs(noisy: NoisyBatch, first: int) -> NoisyBatch:
    """Replace sample 2k + 1 by sample 2k in image, timestep, noise and label, but not in the noise of the gates.

    first: global index of the first sample. Raises ValueError if it is odd, because that would split a pair.
    """
    if first % 2:
        raise ValueError(f"samples come in pairs, so a microbatch begins with an even one; this one with {first}")
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
        """The blocks that the averaged logits select at `step`, with their probabilities."""
        logits = [ema.average[f"gates.logits.{i}"] for i in range(len(self.objective.gates.logits))]
        scaling = linear(self.objective.scaling, step, self.objective.steps)
        return Decision(self.groups, self.objective.gates, logits, scaling, self.objective.layout)


@dataclass(frozen=True)
class Decision:
    """The blocks that averaged logits select (the mode of the distribution), and their probabilities, per list."""

    groups: Mapping[str, list[BlockGroup]]
    gates: GateDistribution
    logits: list[Tensor]
    scaling: float
    layout: GateLayout

    def _per_list(self, function: Callable[..., list[Any]], *args: Any) -> dict[str, list[list[Any]]]:
        """The results of a function of (index of a group, its logits, *args), per list and group."""
        rows = iter([function(index, theta, *args) for index, theta in enumerate(self.logits)])
        return {name: [next(rows) for _ in listed] for name, listed in self.groups.items()}

    def kept(self) -> dict[str, list[int]]:
        """Blocks that stay, per list of the model."""
        return self.layout.in_blocks(_joined(self._per_list(self.gates.kept)))

    def probabilities(self) -> dict[str, list[list[float]]]:
        """Probabilities of every group, per list; see the `meaning` of the distribution."""
        return self._per_list(self.gates.probabilities, self.scaling)

    def confidence(self) -> dict[str, list[float]]:
        """Probability of the decision, per list: one number per group (categorical), or per kept block (subset)."""
        return _joined(self._per_list(self.gates.confidence, self.scaling))

    def log(self, step: int, objective: GatedObjective) -> dict[str, Any]:
        fields = {
            "temperature": linear(objective.temperature, step, objective.steps),
            "scaling": self.scaling,
            "kept": self.kept(),
            "confidence": self.confidence(),
        }
        if isinstance(self.gates, SubsetGates):
            fields["marginals"] = _joined(self.probabilities())
        return fields


def _joined(per_group: Mapping[str, list[list[Any]]]) -> dict[str, list[Any]]:
    return {name: [value for row in rows for value in row] for name, rows in per_group.items()}


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
    groups = layout.groups(settings)
    module = teacher.copy().module.train()
    make_trainable(module, teacher.family)  # a frozen teacher's copy is frozen
    if settings.storage != "own":
        pack_frozen(module.requires_grad_(False), teacher.family.stack(module), settings, torch.device(device))
    deltas = _deltas(module, settings, seed)
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
    all_groups = [group for listed in groups.values() for group in listed]
    if settings.distribution == "subset":
        gates: GateDistribution = SubsetGates(all_groups, settings.logit_init, settings.subset_estimator)
    else:
        gates = CategoricalGates(all_groups, settings.logit_init)
    gates.to(device)
    schedules = (settings.temperature, settings.scaling, settings.training.steps)
    taught = settings.target == "teacher" or (settings.target is None and teacher.distilled_guidance)
    whole = None
    if taught and settings.update == "full":
        copied = teacher.copy()
        if settings.training.dtype == "float32":
            copied.module.float()
        whole = frozen(copied.module.to(device)), copied.stack
    gated = GatedObjective(objective, stack, gates, *schedules, layout, settings.dropped, taught, whole)
    logits = {f"gates.logits.{i}": theta for i, theta in enumerate(gates.logits)}
    parameter_groups = [ParameterGroup(deltas), ParameterGroup(logits, settings.gate_learning_rate, constant=True)]
    return MaskLearner(module, gated, groups, parameter_groups, num_parameters(teacher.module))


def pack_frozen(module: nn.Module, stack: BlockStack, settings: PruneSection, device: torch.device) -> None:
    """Store the blocks of a frozen module in 8 or 4 bits, in place. Raises UserError where all weights train."""
    if settings.update == "full":
        raise UserError(
            f"prune.storage {settings.storage} is for weights that do not train, and --update full trains them: use lora, or own"
        )
    pack(stack, settings.storage, device)


def _deltas(module: nn.Module, settings: PruneSection, seed: int) -> dict[str, nn.Parameter]:
    if settings.update == "lora":
        return add_lora(module, settings.lora_rank, settings.lora_scale * settings.lora_rank, seed)
    if settings.update == "frozen":
        module.requires_grad_(False)
    return trainable(module)


def plan_of(
    decision: Decision, teacher: LoadedModel, settings: PruneSection, seed: int, cost: dict[str, float]
) -> PrunePlan:
    """The decision as a plan."""
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
    trained = teacher.with_changed(changed)
    return teacher.cut(plan).with_changed(trained.cut(dataclasses.replace(plan, teacher="")).module.state_dict())
