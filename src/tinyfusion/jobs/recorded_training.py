"""Training on recorded calls: any transformer of diffusers learns the recorded model's outputs, without data or a teacher in memory.

The states are those of the recorded trajectories at the sampler's own noise levels, with the pipeline's own texts, guidance and
arguments, which is what few-step and guidance-distilled models need; the same files serve criteria (`prune/units.py`).
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion.config.recipe import Recipe, TrainingSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.data.recorded import RecordedInputs, output_tensors, read_recorded
from tinyfusion.data.recorded_batches import RecordedBatch, RecordedBatches, joined
from tinyfusion.jobs.assemble import batches_for
from tinyfusion.jobs.process_specs import objective_for
from tinyfusion.models.loaded import LoadedModel
from tinyfusion.models.transformer import TransformerModel
from tinyfusion.processes.base import Prediction, Process, mean_flat
from tinyfusion.prune.units import check_recorded_on
from tinyfusion.training.engine import Engine
from tinyfusion.training.loop import BatchSource

_AGREES = {torch.float32: 1e-3}  # relative difference of a batch to its calls alone
_AGREES_LOW = 5e-2  # in types of less precision


@dataclass(frozen=True)
class RecordedTask(Process):
    """The mean squared difference to the recorded outputs, per image."""

    def draw(self, batch: RecordedBatch, draws: Draws) -> RecordedBatch:
        """The batch as it is: it was drawn when it was recorded."""
        return dataclasses.replace(batch, step=draws.step)

    def predict(self, model: nn.Module, noisy: RecordedBatch) -> Prediction:
        """All values that the model returns, (B, N)."""
        return Prediction(_flat(_outputs(model, noisy)))

    def losses(self, _model: nn.Module, noisy: RecordedBatch, prediction: Prediction) -> dict[str, Tensor]:
        """Per-image "loss", the mean squared difference to the recorded model's output."""
        return {"loss": mean_flat((prediction.output.float() - _flat(noisy.outputs).float()).square())}

    def kd_terms(self, _noisy: RecordedBatch, own: Prediction, taught: Prediction) -> dict[str, Tensor]:
        """Per-image "kd_loss", the mean squared difference to a teacher's output."""
        return {"kd_loss": mean_flat((own.output.float() - taught.output.detach().float()).square())}


def _outputs(model: nn.Module, batch: RecordedBatch) -> tuple[Tensor, ...]:
    arguments: dict[str, Any] = dict(batch.call)
    if "return_dict" in inspect.signature(type(model).forward).parameters:
        arguments["return_dict"] = False
    return output_tensors(model(**arguments))


def _flat(outputs: tuple[Tensor, ...]) -> Tensor:
    """(B, N): all values of every image."""
    return torch.cat([tensor.flatten(1) for tensor in outputs], 1)


def recorded_of(file: Path | None, model: LoadedModel) -> RecordedInputs | None:
    """The recorded calls of a file, for a model or a student of it; None for no file.

    Raises UserError where they are of another model.
    """
    if file is None:
        return None
    if not isinstance(model, TransformerModel):
        raise UserError(
            f"--inputs is for transformers of diffusers, and the model is of the family {model.family.name}: leave it out, it is trained "
            "on --data"
        )
    inputs = read_recorded(file)
    check_recorded_on(inputs, model.folder)
    return inputs


def training_data(
    recipe: Recipe, recorded: RecordedInputs | None, model: LoadedModel, settings: TrainingSection, engine: Engine
) -> tuple[BatchSource, Process]:
    """What a model is trained on, and its objective: recorded calls, else the data set of the recipe."""
    if recorded is not None and isinstance(model, TransformerModel):
        return recorded_batches(recorded, model, settings, recipe.seed, engine.device), RecordedTask()
    return batches_for(recipe, model, engine.device), objective_for(model, settings.label_drop, recipe)


def recorded_batches(
    inputs: RecordedInputs, model: TransformerModel, settings: TrainingSection, seed: int, device: torch.device
) -> RecordedBatches:
    """Training batches of recorded calls. Raises UserError where calls of this class cannot be run together.

    Checked on two rows, by running them together and alone.
    """
    dtype = torch.float32 if settings.dtype == "float32" else getattr(torch, inputs.dtype)
    source = RecordedBatches(inputs, dtype, Randomness(seed), device)
    model.example = source.rows(0, 1).to(torch.device("meta")).call
    if settings.batch_size > 1 and len(source.buckets[0]) > 1:
        _check_together(model, source, inputs)
    return source


@torch.no_grad()
def _check_together(model: TransformerModel, source: RecordedBatches, inputs: RecordedInputs) -> None:
    parameter = next(model.module.parameters())
    device, dtype = parameter.device, parameter.dtype
    own = RecordedBatches(inputs, getattr(torch, inputs.dtype), source.randomness, device)
    rows = [own.rows(i, 1) for i in range(2)]
    alone = [_flat(_outputs(model.module, row)).float() for row in rows]
    try:
        difference = _flat(_outputs(model.module, joined(rows))).float() - torch.cat(alone)
        relative = float(difference.norm() / torch.cat(alone).norm().clamp(min=1e-12))
        if relative <= _AGREES.get(dtype, _AGREES_LOW):
            return
        why = f"together they give other outputs than alone (relative difference {relative:.2g})"
    except (RuntimeError, ValueError, TypeError) as error:
        why = str(error)
    raise UserError(
        f"calls of a {model.folder.class_name} in {inputs.path} cannot be run as one batch: {why}; set the batch size to 1, or run "
        "one at a time, compute.gradient_accumulation_steps equal to the batch size"
    )
