"""The learned criterion: gates and throw-away weight deltas trained together, by the one loop.

`GatedObjective` wraps any objective: it draws Gumbel noise with the batch and runs the model under sampled gates.
Source: TinyFusion (arXiv 2412.01199), section 3. Defects of the released code that are not repeated: schedules that
overshoot, a decision that is only printed, groups that do not fill the depth, weight deltas lost to a second load.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion.core.recipe import PruneSection
from tinyfusion.core.rng import Draws
from tinyfusion.models.checkpoint import LoadedModel, make_trainable
from tinyfusion.models.plan import PrunePlan
from tinyfusion.models.stack import BlockStack, num_parameters
from tinyfusion.processes.base import Batch, NoisyBatch, Objective, Prediction
from tinyfusion.prune.gates import CategoricalGates, mode, probabilities
from tinyfusion.prune.scheme import Group, parse_scheme
from tinyfusion.training.ema import Ema
from tinyfusion.training.lora import add_lora
from tinyfusion.training.optim import ParameterGroup, linear, trainable


@dataclass(frozen=True)
class GatedObjective:
    """An objective under sampled gates, one independent mask per sample; temperature and scaling follow the step."""

    inner: Objective
    stack: BlockStack
    gates: CategoricalGates
    temperature: tuple[float, float]
    scaling: tuple[float, float]
    steps: int

    def draw(self, batch: Batch, draws: Draws) -> NoisyBatch:
        """The inner draws, and Gumbel noise (B, K_g) for every group."""
        noisy = self.inner.draw(batch, draws)
        gumbel = tuple(
            torch.from_numpy(draws.gumbel(f"gumbel/{index}", tuple(theta.shape))).to(noisy.xt.device)
            for index, theta in enumerate(self.gates.logits)
        )
        return dataclasses.replace(noisy, gumbel=gumbel)

    def predict(self, model: nn.Module, noisy: NoisyBatch) -> Prediction:
        """The model with every sample's own mask."""
        temperature = linear(self.temperature, noisy.step, self.steps)
        scaling = linear(self.scaling, noisy.step, self.steps)
        masks = self.gates.sample(noisy.gumbel, temperature, scaling)
        with self.stack.gated(masks):
            return self.inner.predict(model, noisy)

    def losses(self, model: nn.Module, noisy: NoisyBatch, prediction: Prediction) -> dict[str, Tensor]:
        """The inner losses."""
        return self.inner.losses(model, noisy, prediction)


@dataclass(frozen=True)
class MaskLearner:
    """A gated copy of a teacher, ready for the loop: objective, parameter groups, and the decision at any moment."""

    module: nn.Module
    objective: GatedObjective
    groups: dict[str, list[Group]]
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
        return Decision(self.groups, logits, scaling)


@dataclass(frozen=True)
class Decision:
    """Argmax and probabilities of averaged logits, split by list of blocks."""

    groups: Mapping[str, list[Group]]
    logits: list[Tensor]
    scaling: float

    def _by_list(self, values: list[Any]) -> dict[str, list[Any]]:
        rest = iter(values)
        return {name: [next(rest) for _ in listed] for name, listed in self.groups.items()}

    def kept(self) -> dict[str, list[int]]:
        """Kept blocks per list."""
        return {name: mode(self.groups[name], part) for name, part in self._by_list(self.logits).items()}

    def probabilities(self) -> dict[str, list[list[float]]]:
        """softmax(scaling * theta) of every group, per list."""
        return self._by_list(probabilities(self.logits, self.scaling))

    def log(self, step: int, objective: GatedObjective) -> dict[str, Any]:
        """Fields for a log line."""
        confidence = {name: [max(p) for p in listed] for name, listed in self.probabilities().items()}
        return {
            "temperature": linear(objective.temperature, step, objective.steps),
            "scaling": self.scaling,
            "kept": self.kept(),
            "confidence": confidence,
        }


def mask_learner(
    teacher: LoadedModel, objective: Objective, settings: PruneSection, seed: int, device: str = "cpu"
) -> MaskLearner:
    """Attach gates and weight deltas to a copy of `teacher`, which stays untouched.

    seed: of the deltas' initial values. Raises UserError where the scheme does not fit.
    """
    groups = parse_scheme(settings.scheme, teacher.stack.depths())
    module = teacher.copy().module.to(device).train()
    make_trainable(module, teacher.family)  # a frozen teacher's copy is frozen
    deltas = _deltas(module, settings, seed)
    gates = CategoricalGates([g for listed in groups.values() for g in listed], settings.logit_init).to(device)
    gated = GatedObjective(
        objective, teacher.family.stack(module), gates, settings.temperature, settings.scaling, settings.training.steps
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


def _deltas(module: nn.Module, settings: PruneSection, seed: int) -> dict[str, nn.Parameter]:
    """The parameters that train beside the gates."""
    if settings.update == "lora":
        alpha = settings.lora_alpha if settings.lora_alpha is not None else 2.0 * settings.lora_rank
        return add_lora(module, settings.lora_rank, alpha, seed)
    if settings.update == "frozen":
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        return {}
    return trainable(module)


def plan_of(
    decision: Decision, teacher: LoadedModel, settings: PruneSection, seed: int, cost: dict[str, float]
) -> PrunePlan:
    """The decision as a plan."""
    scores: dict[str, Any] = {
        "meaning": "probability of each candidate of each group, candidates in lexicographic order"
    }
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
