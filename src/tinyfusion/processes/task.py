"""A training task of your own as a process: prediction and loss on batches that already contain all random draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Draws
from tinyfusion.processes.base import Prediction, Process, mean_flat

Predict = Callable[[nn.Module, Any], Tensor]  # (model, batch) -> output, images along axis 0
Loss = Callable[[Tensor, Any], Tensor]  # (output, batch) -> (B,)


@dataclass(frozen=True)
class TaskBatch:
    """A batch of a task: tensors with the images along axis 0, in any nested structure of tuples, lists and dicts."""

    values: Any
    step: int = 0
    gate_noise: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(_tensors(self.values)[0])

    @property
    def device(self) -> torch.device:
        return _tensors(self.values)[0].device

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, self.values)
        return dataclasses.replace(self, values=values, gate_noise=tuple(map(change, self.gate_noise)))


@dataclass(frozen=True)
class Task(Process):
    """A training task, defined by two functions: prediction and loss.

    predict_output: (model, batch) -> output. loss: (output, batch) -> one loss per image, (B,). Put noise, timesteps
    and all other random draws into the batch, so that teacher and student see the same. distance: (student's output,
    teacher's output) -> (B,), the distillation loss; by default the mean squared difference.
    """

    predict_output: Predict
    loss: Loss
    distance: Loss = dataclasses.field(default=lambda own, taught: mean_flat((own - taught).square()))

    def draw(self, batch: TaskBatch, draws: Draws) -> TaskBatch:
        return dataclasses.replace(batch, step=draws.step)

    def predict(self, model: nn.Module, noisy: TaskBatch) -> Prediction:
        return Prediction(self.predict_output(model, noisy.values))

    def losses(self, _model: nn.Module, noisy: TaskBatch, prediction: Prediction) -> dict[str, Tensor]:
        """The task's loss as {"loss": (B,)}. Raises UserError unless the loss function returns one number per image."""
        loss = self.loss(prediction.output, noisy.values)
        if loss.shape != (len(noisy),):
            raise UserError(
                f"the loss function returns {tuple(loss.shape)} for {len(noisy)} images: wanted one loss per image, ({len(noisy)},), "
                "such as (output - target).square().flatten(1).mean(1)"
            )
        return {"loss": loss}

    def kd_terms(self, _noisy: TaskBatch, own: Prediction, taught: Prediction) -> dict[str, Tensor]:
        return {"kd_loss": self.distance(own.output, taught.output.detach())}


def task_source(
    batches: Iterable[Any] | Callable[[int, Draws], Any], device: torch.device
) -> tuple[Callable[[int, int, Draws], TaskBatch], int | None]:
    """Turn a user's batches into (batch source of the training loop, images per batch; None if the caller decides).

    batches: an iterable, such as a DataLoader, which is repeated; or a function (step, draws) -> batch of `draws.num`
    images that takes all random numbers from `draws`. Raises UserError on batches without tensors, and on batches of
    different sizes from an iterable.
    """
    if callable(batches):
        make = batches
        return lambda step, _size, draws: _checked(make(step, draws), device, draws.num), None
    stream = _endless(batches)
    first = _checked(next(stream), device)
    waiting = [first]

    def following(_step: int, _size: int, _draws: Draws) -> TaskBatch:
        return waiting.pop() if waiting else _checked(next(stream), device, len(first))

    return following, len(first)


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise UserError(
                "the batches have come to an end: give an iterable that can be repeated, such as a list or a DataLoader"
            )


def _checked(values: Any, device: torch.device, num: int | None = None) -> TaskBatch:
    """The batch on the device. Raises UserError if it has no tensor, or not `num` images."""
    if not _tensors(values):
        raise UserError(f"a batch is a nest of tensors; got a {type(values).__name__} without any")
    batch = TaskBatch(values).each(lambda tensor: tensor.to(device))
    sizes = sorted({len(tensor) if tensor.ndim else 0 for tensor in _tensors(batch.values)})
    if len(sizes) > 1 or sizes[0] == 0:
        raise UserError(
            f"the tensors of a batch have {', '.join(map(str, sizes))} rows: wanted the images along axis 0 of each"
        )
    if num is not None and sizes[0] != num:
        raise UserError(
            f"a batch of {sizes[0]} images where {num} are wanted: batches are of one size (of a DataLoader: drop_last=True)"
        )
    return batch


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
