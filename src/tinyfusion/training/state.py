"""TrainState: everything a training must remember between two steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tinyfusion.config.recipe import TrainingSection
from tinyfusion.core.errors import UserError
from tinyfusion.training.ema import Ema
from tinyfusion.training.optim import ParameterGroup, adamw
from tinyfusion.training.scaling import LossScale
from tinyfusion.training.shards import first_row, is_sharded, like_part, local_part, whole


class SavedTensors(Protocol):
    """The tensors of a checkpoint by name, read when asked for."""

    def names(self) -> Iterable[str]:
        """All names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Type of its numbers."""
        ...

    def rows(self, name: str, first: int, num: int) -> Tensor:
        """`num` rows from row `first` on. A tensor without dimensions is one row, and comes without dimensions."""
        ...


@dataclass(frozen=True)
class Progress:
    """What of a training state is not a tensor.

    bad_steps: in a row, up to now. optimizer: the recipe's name of it. loss_scale: None without one; good_steps: since it
    last changed. optimizer_numbers: what the optimiser holds as plain numbers, by "KEY/PARAMETER".
    """

    step: int
    bad_steps: int
    seen_images: int
    optimizer: str
    loss_scale: float | None = None
    good_steps: int = 0
    optimizer_numbers: Mapping[str, int | float] = field(default_factory=dict)


class TrainState:
    """Everything a run must remember between two steps."""

    def __init__(self, model: nn.Module, groups: Sequence[ParameterGroup], settings: TrainingSection) -> None:
        self.model = model
        self.parameters = {name: p for group in groups for name, p in group.parameters.items()}
        self.optimizer: torch.optim.Optimizer = adamw(groups, settings)
        self.ema = Ema(self.parameters, settings.ema_decay)
        self.scale = LossScale(settings.dtype == "float16")
        self.step = 0
        self.seen_images = 0  # in all steps so far, whatever their batch sizes
        self.bad_steps = 0
        self._optimizer_name: str = settings.optimizer

    def weights(self) -> dict[str, Tensor]:
        """The trained parameters as they are, whole, by name. Every process must call."""
        return {name: whole(parameter) for name, parameter in self.parameters.items()}

    def averages(self) -> dict[str, Tensor]:
        """Their moving averages, whole, by name. Every process must call."""
        return {name: whole(average) for name, average in self.ema.average.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Weights, averages and what the optimiser keeps, by name, as the processes hold them."""
        tensors = self._fixed()
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer/{key}/{name}"] = value
        return tensors

    def progress(self) -> Progress:
        """What else a checkpoint must hold."""
        numbers = {
            f"{key}/{name}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, int | float)
        }
        return Progress(
            self.step,
            self.bad_steps,
            self.seen_images,
            self._optimizer_name,
            self.scale.value,
            self.scale.good_steps,
            numbers,
        )

    @torch.no_grad()
    def load(self, saved: SavedTensors, progress: Progress) -> None:
        """Continue from `tensors()` and `progress()` of an earlier run, on however many processes that was.

        Every process reads the rows that it holds. Raises UserError, and changes nothing, where a tensor is missing,
        too many, or of another shape or type.
        """
        targets = self._fixed()
        self._check(saved, progress, targets)
        for key, target in targets.items():
            own = local_part(target)
            own.copy_(saved.rows(key, first_row(target), own.shape[0] if own.ndim else 1))
        self.optimizer.state.clear()
        for key in saved.names():
            if key not in targets:
                _, slot, name = key.split("/", 2)
                parameter = self.parameters[name]
                self.optimizer.state[parameter][slot] = _placed(saved, key, parameter)
        for key, number in progress.optimizer_numbers.items():
            slot, name = key.split("/", 1)
            self.optimizer.state[self.parameters[name]][slot] = number
        if self.scale.value is not None and progress.loss_scale is not None:
            self.scale.value, self.scale.good_steps = progress.loss_scale, progress.good_steps
        self.step, self.seen_images, self.bad_steps = progress.step, progress.seen_images, progress.bad_steps

    def _fixed(self) -> dict[str, Tensor]:
        """The tensors that are there from the first step on."""
        tensors: dict[str, Tensor] = {f"weight/{name}": p.detach() for name, p in self.parameters.items()}
        return tensors | {f"ema/{name}": average for name, average in self.ema.average.items()}

    def _check(self, saved: SavedTensors, progress: Progress, targets: Mapping[str, Tensor]) -> None:
        """Raise UserError where a checkpoint is not one of this training."""
        if progress.optimizer != self._optimizer_name:
            raise UserError(
                f"it was made with optimizer {progress.optimizer}, this training has {self._optimizer_name}"
            )
        names = set(saved.names())
        for key, target in targets.items():
            wanted: tuple[Any, ...] = (tuple(target.shape), target.dtype)
            form = (saved.shape(key), saved.dtype(key)) if key in names else None
            if form != wanted:
                raise UserError(f"it has no fitting {key}: wanted {_words(wanted)}, got {_words(form)}")
        further = [key for key in names if key not in targets]
        for key in [*further, *(f"optimizer/{key}" for key in progress.optimizer_numbers)]:
            kind, _, rest = key.partition("/")
            name = rest.partition("/")[2]
            if kind != "optimizer" or name not in self.parameters:
                raise UserError(f"it holds {key}, which is no part of this training")
            if self._optimizer_name == "adamw" and key in names:
                allowed = ((), tuple(self.parameters[name].shape))
                if saved.shape(key) not in allowed:
                    raise UserError(f"it has no fitting {key}: wanted shape {allowed[1]}, got {saved.shape(key)}")


def _words(form: tuple[Any, ...] | None) -> str:
    return "none" if form is None else f"{form[1]} of shape {form[0]}"


def _placed(saved: SavedTensors, key: str, parameter: Tensor) -> Tensor:
    """A tensor of the optimiser, on the device of its parameter, sharded alike where it has the same shape."""
    shape = saved.shape(key)
    if is_sharded(parameter) and shape == tuple(parameter.shape):
        rows = saved.rows(key, first_row(parameter), local_part(parameter).shape[0])
        return like_part(rows.to(parameter.device, copy=True), parameter)
    return saved.rows(key, 0, shape[0] if shape else 1).to(parameter.device, copy=True)
