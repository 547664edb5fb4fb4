"""The learned criterion: gates and throw-away weight deltas trained together, by the one loop.

`GatedObjective` wraps any objective: it draws the gates' noise with the batch and runs the model under sampled gates.
Source: TinyFusion (arXiv 2412.01199), section 3. Defects of the released code that are not repeated: schedules that
overshoot, a decision that is only printed, groups that do not fill the depth, weight deltas lost to a second load.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.scheme import BlockGroup, parse_scheme
from tinyfusion.blocks.stack import BlockStack, num_parameters
from tinyfusion.config.recipe import PruneSection
from tinyfusion.core.rng import Draws
from tinyfusion.models.checkpoint import LoadedModel, make_trainable
from tinyfusion.processes.base import Batch, NoisyBatch, Objective, Prediction, StepMemory
from tinyfusion.prune.gates import CategoricalGates, GateDistribution
from tinyfusion.prune.subset import SubsetGates
from tinyfusion.training.lora import add_lora, cast_frozen_linears
from tinyfusion.training.optim import ParameterGroup, linear, trainable
from tinyfusion.training.state import Ema


@dataclass(frozen=True)
class GatedObjective(Objective):
    """An objective under sampled gates, one independent mask per sample; temperature and scaling follow the step."""

    inner: Objective
    stack: BlockStack
    gates: GateDistribution
    temperature: tuple[float, float]
    scaling: tuple[float, float]
    steps: int
    dropped: Literal["dense", "skip"] = "skip"

    def draw(self, batch: Batch, draws: Draws) -> NoisyBatch:
        """The inner draws, and the noise of every group's gates."""
        noisy = self.inner.draw(batch, draws)
        noise = tuple(drawn.to(noisy.device) for drawn in self.gates.draw(draws))
        if self.gates.paired:
            noisy = in_pairs(noisy, draws.first)
        return dataclasses.replace(noisy, gate_noise=noise)

    def predict(self, model: nn.Module, noisy: NoisyBatch) -> Prediction:
        """The model with every sample's own mask."""
        temperature = linear(self.temperature, noisy.step, self.steps)
        scaling = linear(self.scaling, noisy.step, self.steps)
        masks = self.gates.sample(noisy.gate_noise, temperature, scaling)
        with self.stack.gated(masks, self.dropped):
            return self.inner.predict(model, noisy)

    def losses(self, model: nn.Module, noisy: NoisyBatch, prediction: Prediction) -> dict[str, Tensor]:
        """The inner losses; "loss" also carries the gradient of estimators that do not go through the gates."""
        terms = self.inner.losses(model, noisy, prediction)
        scaling = linear(self.scaling, noisy.step, self.steps)
        surrogate = self.gates.surrogate(noisy.gate_noise, scaling, terms["loss"])
        if surrogate is None:
            return terms
        return {**terms, "loss": terms["loss"] + (surrogate - surrogate.detach())}  # the value stays what it was

    def step_memory(self) -> StepMemory:
        """An image that drops a block runs it without a graph, if dropped blocks are skipped."""
        groups = self.gates.groups if self.dropped == "skip" else []
        return StepMemory(graph_share=sum(g.keep for g in groups) / sum(g.size for g in groups) if groups else 1.0)


def in_pairs(noisy: NoisyBatch, first: int) -> NoisyBatch:
    """Sample 2k + 1 becomes sample 2k again: image, timestep, noise and label, all but the noise of the gates.

    first: global index of the first sample. Raises ValueError where a pair would be torn apart.
    """
    if first % 2:
        raise ValueError(f"samples come in pairs, so a part of a batch begins with an even one; this one with {first}")
    rows = torch.arange(len(noisy), device=noisy.device) // 2 * 2
    return dataclasses.replace(noisy.each(lambda value: value[rows]), gate_noise=noisy.gate_noise)


@dataclass(frozen=True)
class MaskLearner:
    """A gated copy of a teacher, ready for the loop: objective, parameter groups, and the decision at any moment."""

    module: nn.Module
    objective: GatedObjective
    groups: dict[str, list[BlockGroup]]
    parameter_groups: list[ParameterGroup]
    teacher_parameters: int

    @property
    def trainable_share(self) -> float:
        """Trained weights (without gates) as a share of the teacher's parameters."""
        return sum(p.numel() for p in self.parameter_groups[0].parameters.values()) / self.teacher_parameters

    def decision(self, ema: Ema, step: int) -> Decision:
        """What would be kept now, from the averaged logits."""
        logits = [ema.average[f"gates.logits.{i}"] for i in range(len(self.objective.gates.logits))]
        scaling = linear(self.objective.scaling, step, self.objective.steps)
        return Decision(self.groups, self.objective.gates, logits, scaling)


@dataclass(frozen=True)
class Decision:
    """The mode and the probabilities of averaged logits, split by list of blocks."""

    groups: Mapping[str, list[BlockGroup]]
    gates: GateDistribution
    logits: list[Tensor]
    scaling: float

    def _by_list(self, values: Iterable[list[Any]]) -> dict[str, list[list[Any]]]:
        """Values per group to per list."""
        rest = iter(values)
        return {name: [next(rest) for _ in listed] for name, listed in self.groups.items()}

    def kept(self) -> dict[str, list[int]]:
        """Kept blocks per list."""
        return _joined(self._by_list(self.gates.kept(i, theta) for i, theta in enumerate(self.logits)))

    def probabilities(self) -> dict[str, list[list[float]]]:
        """What the distribution says of every group, per list; its `meaning` explains."""
        rows = (self.gates.probabilities(i, theta, self.scaling) for i, theta in enumerate(self.logits))
        return self._by_list(rows)

    def confidence(self) -> dict[str, list[float]]:
        """Per list: one number per group of a categorical, one per kept block of a subset."""
        rows = (self.gates.confidence(i, theta, self.scaling) for i, theta in enumerate(self.logits))
        return _joined(self._by_list(rows))

    def log(self, step: int, objective: GatedObjective) -> dict[str, Any]:
        """Fields for a log line."""
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
    """The groups of every list, one after another."""
    return {name: [value for row in rows for value in row] for name, rows in per_group.items()}


def mask_learner(
    teacher: LoadedModel,
    objective: Objective,
    settings: PruneSection,
    seed: int,
    device: torch.device | str = "cpu",
    place: Callable[[nn.Module, list[nn.Module]], nn.Module] | None = None,
) -> MaskLearner:
    """Attach gates and weight deltas to a copy of `teacher`, which stays untouched.

    seed: of the deltas' initial values. place: moves the copy to the device, perhaps in parts (`Engine.place`).
    Raises UserError where the scheme does not fit.
    """
    groups = parse_scheme(settings.scheme, teacher.stack.depths(), settings.distribution, settings.protect)
    module = teacher.copy().module.train()
    make_trainable(module, teacher.family)  # a frozen teacher's copy is frozen
    deltas = _deltas(module, settings, seed)
    if settings.training.dtype != "float32" and settings.update != "full":
        cast_frozen_linears(module, getattr(torch, settings.training.dtype))
    stack = teacher.family.stack(module)
    if place is None:
        module.to(device)
    else:  # parameters are other objects afterwards
        place(module, list(stack))
        deltas = {name: p for name, p in module.named_parameters() if name in deltas}
    gates = _gates([g for listed in groups.values() for g in listed], settings).to(device)
    gated = GatedObjective(
        objective,
        stack,
        gates,
        settings.temperature,
        settings.scaling,
        settings.training.steps,
        settings.dropped,
    )
    logits = {f"gates.logits.{i}": theta for i, theta in enumerate(gates.logits)}
    return MaskLearner(
        module,
        gated,
        groups,
        [
            ParameterGroup(deltas),
            ParameterGroup(logits, settings.gate_learning_rate, constant=True),
        ],
        num_parameters(teacher.module),
    )


def _gates(groups: list[BlockGroup], settings: PruneSection) -> GateDistribution:
    """The distribution that the recipe names."""
    if settings.distribution == "subset":
        return SubsetGates(groups, settings.logit_init, settings.subset_estimator)
    return CategoricalGates(groups, settings.logit_init)


def _deltas(module: nn.Module, settings: PruneSection, seed: int) -> dict[str, nn.Parameter]:
    """The parameters that train beside the gates."""
    if settings.update == "lora":
        return add_lora(module, settings.lora_rank, settings.lora_scale * settings.lora_rank, seed)
    if settings.update == "frozen":
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        return {}
    return trainable(module)


def plan_of(
    decision: Decision, teacher: LoadedModel, settings: PruneSection, seed: int, cost: dict[str, float]
) -> PrunePlan:
    """The decision as a plan."""
    scores: dict[str, Any] = {"meaning": decision.gates.meaning}
    return PrunePlan(
        kept=decision.kept(),
        depth=teacher.stack.depths(),
        criterion="learned",
        scheme=settings.scheme,
        distribution=settings.distribution,
        groups={name: [[g.keep, g.size] for g in listed] for name, listed in decision.groups.items()},
        scores={**scores, **decision.probabilities()},
        seed=seed,
        teacher=teacher.hash(),
        cost=cost,
    )
