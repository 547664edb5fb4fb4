"""TrainState: everything a training must remember between two steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tinyfusion.core.recipe import TrainingSection
from tinyfusion.training.ema import Ema
from tinyfusion.training.optim import ParameterGroup, adamw


class TrainState:
    """Everything a run must remember between two steps."""

    def __init__(self, model: nn.Module, groups: Sequence[ParameterGroup], settings: TrainingSection) -> None:
        self.model = model
        self.parameters = {name: p for group in groups for name, p in group.parameters.items()}
        self.optimizer = adamw(groups, settings)
        self.ema = Ema(self.parameters, settings.ema_decay)
        self.step = 0
        self.bad_steps = 0

    def tensors(self) -> dict[str, Tensor]:
        """Weights, averages and optimiser moments, by name."""
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            found[f"weight/{name}"] = parameter.detach()
            found[f"ema/{name}"] = self.ema.average[name]
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer/{key}/{name}"] = value
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], step: int, bad_steps: int) -> None:
        """Continue from `tensors()` of an earlier run. Raises ValueError where a tensor is missing or misshapen."""
        targets: dict[str, Tensor] = {f"weight/{name}": p for name, p in self.parameters.items()}
        targets |= {f"ema/{name}": average for name, average in self.ema.average.items()}
        for key, target in targets.items():  # all is checked before anything changes
            if key not in tensors or tensors[key].shape != target.shape:
                raise ValueError(f"checkpoint has no fitting {key}")
        for key, target in targets.items():
            target.copy_(tensors[key])
        for name, parameter in self.parameters.items():
            moments = {key: tensors.get(f"optimizer/{key}/{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if all(value is not None for value in moments.values()):
                self.optimizer.state[parameter] = {
                    key: value.to(parameter.device, copy=True) for key, value in moments.items() if value is not None
                }
        self.step, self.bad_steps = step, bad_steps
