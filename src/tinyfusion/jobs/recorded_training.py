"""Training on recorded calls: any transformer of diffusers learns the recorded model's outputs, without data or a teacher in memory.

The states are those of the recorded trajectories at the sampler's own noise levels, with the pipeline's own texts, guidance and
arguments, which is what few-step and guidance-distilled models need; the same files serve criteria (`prune/units.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tinyfusion.blocks.plan import first_blocks
from tinyfusion.blocks.replayed import BlockReplay
from tinyfusion.config.recipe import Recipe, TrainingSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.data.recorded import RecordedInputs, output_tensors, read_recorded, returning_tuples
from tinyfusion.data.recorded_batches import PLAIN, RecordedBatch, RecordedBatches, joined
from tinyfusion.families.diffusers_classes.call_rows import LAYOUTS
from tinyfusion.families.diffusers_classes.few_steps import FoldedDrawing, folded_drawing
from tinyfusion.families.diffusers_classes.folder import TransformerFolder
from tinyfusion.jobs.assemble import batches_for
from tinyfusion.jobs.process_specs import check_denoiser, objective_for
from tinyfusion.models.loaded import LoadedModel
from tinyfusion.models.transformer import TransformerModel
from tinyfusion.processes.base import Prediction, Process, mean_flat
from tinyfusion.prune.units import check_recorded_on
from tinyfusion.training.engine import Engine
from tinyfusion.training.loop import BatchSource

_AGREES = {torch.float32: 1e-3}  # relative difference of a batch to its calls alone
_AGREES_LOW = 5e-2  # in types of less precision
_TRIED = 16  # rows among which one with a text of another length is looked for


@dataclass(frozen=True)
class RecordedTask(Process):
    """The mean squared difference to the recorded outputs, per image."""

    def draw(self, batch: RecordedBatch, draws: Draws) -> RecordedBatch:
        """The batch as it is: it was drawn when it was recorded."""
        return dataclasses.replace(batch, step=draws.step)

    def predict(self, model: nn.Module, noisy: RecordedBatch) -> Prediction:
        """All values that the model returns, (B, N)."""
        return Prediction(_flat(call_outputs(model, noisy.call)))

    def losses(self, _model: nn.Module, noisy: RecordedBatch, prediction: Prediction) -> dict[str, Tensor]:
        """Per-image "loss", the mean squared difference to the recorded model's output."""
        return {"loss": mean_flat((prediction.output.float() - _flat(noisy.outputs).float()).square())}

    def kd_terms(self, _noisy: RecordedBatch, own: Prediction, taught: Prediction) -> dict[str, Tensor]:
        """Per-image "kd_loss", the mean squared difference to a teacher's output."""
        return {"kd_loss": mean_flat((own.output.float() - taught.output.detach().float()).square())}


def call_outputs(model: nn.Module, call: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """What a call returns, in the form that pipelines get, which some classes have in eval mode alone."""
    training = model.training
    model.training = False  # not that of its blocks
    try:
        return output_tensors(model(**returning_tuples(model, call)))
    finally:
        model.training = training


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
    check_denoiser(model)
    inputs = read_recorded(file)
    check_recorded_on(inputs, model.folder)
    _check_guidance(inputs, model.folder)
    return inputs


def _check_guidance(inputs: RecordedInputs, model: TransformerFolder) -> None:
    """Raise UserError where outputs were recorded of an ancestor that was drawn with other guidance than the model."""
    parents = [each for each in model.lineage if each["hash"] == inputs.hash]
    if inputs.hash == model.hash or not parents:
        return
    had = parents[-1].get(FoldedDrawing.key)
    then, own = None if had is None else folded_drawing(had).guidance, model.folded and model.folded.guidance
    if then == own:
        return
    said, now = (f"guidance {each.scale:g} folded in" if each else "no guidance folded in" for each in (then, own))
    raise UserError(
        f"{inputs.path} was recorded on {inputs.hash[:12]}, which has {said}, and {model.path} has {now}: record inputs of a "
        "model with the same, or recover it with --teacher and --data in place of --inputs"
    )


def training_data(
    recipe: Recipe, recorded: RecordedInputs | None, model: LoadedModel, settings: TrainingSection, engine: Engine
) -> tuple[BatchSource, Process]:
    """What a model is trained on, and its objective: recorded calls, else the data set of the recipe."""
    if recorded is not None and isinstance(model, TransformerModel):
        together = max(num for _, num in engine.slices(settings.batch_size))
        return recorded_batches(recorded, model, settings, recipe.seed, engine.device, together), RecordedTask()
    return batches_for(recipe, model, engine.device), objective_for(model, settings.label_drop, recipe)


def check_masks(model: LoadedModel, settings: TrainingSection, engine: Engine) -> None:
    """Raise UserError where images of one call would have masks of their own, and the blocks of the class do not see images."""
    if not isinstance(model, TransformerModel) or not model.folder.row.one_mask:
        return
    if max(num for _, num in engine.slices(settings.batch_size)) > 1:
        raise UserError(
            f"images of a call of a {model.folder.class_name} share their mask ({model.folder.row.one_mask}): learn on one at a time, "
            f"compute.gradient_accumulation_steps={settings.batch_size}"
        )


def recorded_batches(
    inputs: RecordedInputs,
    model: TransformerModel,
    settings: TrainingSection,
    seed: int,
    device: torch.device,
    together: int,
) -> RecordedBatches:
    """Training batches of recorded calls. together: rows of a microbatch.

    Raises UserError where rows of this class do not give alone, or together, what their calls give; checked by running some.
    """
    inputs.check_class(model.folder.class_name, model.folder.path)
    dtype = torch.float32 if settings.dtype == "float32" else inputs.dtype_then
    source = RecordedBatches(inputs, dtype, Randomness(seed), device, LAYOUTS.get(model.folder.class_name, PLAIN))
    model.example = source.rows(0, 1).to(torch.device("meta")).call
    check_rows(model, source, together)
    source.one_by_one = together == 1
    return source


@torch.no_grad()
def check_rows(model: TransformerModel, source: RecordedBatches, together: int) -> None:
    """Raise UserError unless rows of calls, alone and `together`, give what they give in their calls.

    Run without most blocks, which say nothing else about it.
    """
    if together == 1 and source.most_rows == 1:
        return
    inputs, module = source.inputs, model.module
    kept = _first_units(model)
    parameter = next(module.parameters())
    agrees = _AGREES.get(parameter.dtype, _AGREES_LOW)

    def run(given: RecordedBatch | Mapping[str, Any]) -> Tensor:
        call = given.call if isinstance(given, RecordedBatch) else given
        call = tree_map_only(Tensor, lambda tensor: tensor.to(parameter.device), call)
        with BlockReplay(model.stack, 0) as replay:
            return _flat(replay.run(kept, lambda: call_outputs(module, call))).float()

    def difference(made: Tensor, wanted: Tensor) -> str | None:
        if made.shape != wanted.shape:
            return f"outputs of {tuple(made.shape)} in place of {tuple(wanted.shape)}"
        relative = float((made - wanted).norm() / wanted.norm().clamp(min=1e-12))
        return None if relative <= agrees else f"other outputs (relative difference {relative:.2g})"

    rows = [source.row(0, place, inputs.dtype_then) for place in range(min(len(source.buckets[0]), _TRIED))]
    what = "rows of a call alone"
    try:
        alone = [run(rows[0])]
        number, image = (int(value) for value in source.buckets[0][0])
        why = None
        if source.most_rows > 1:
            whole = run(inputs.of_type(inputs.calls[number], inputs.dtype_then))
            why = difference(alone[0], whole[image : image + 1])
        if why is None and together > 1 and len(rows) > 1:
            what = "calls together"
            other = next((row for row in rows if _lengths(row) != _lengths(rows[0])), rows[-1])
            why = difference(run(joined([rows[0], other])), torch.cat([*alone, run(other)]))
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError) as error:
        if isinstance(error, UserError | torch.OutOfMemoryError):
            raise
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
    if why is None:
        return
    problem = f"calls of a {model.folder.class_name} in {inputs.path} cannot be run as one batch ({what}: {why})"
    if what == "calls together":
        raise UserError(
            f"{problem}; set the batch size to 1, or run one at a time, compute.gradient_accumulation_steps equal to the batch size"
        )
    raise UserError(
        f"{problem}; record calls of one image: a guidance scale of 1, or a script of your own with tinyfusion.record_inputs"
    )


def _first_units(model: TransformerModel) -> list[int]:
    """The blocks, by global index, of the first unit of each list, and those that always stay."""
    first = first_blocks(model.folder.depths)
    kept = [each.kept(sorted({0, *each.fixed})) for each in model.units]
    return sorted(first[path] + i for of_list in kept for path, positions in of_list.items() for i in positions)


def _lengths(row: RecordedBatch) -> list[Any]:
    """The shapes of what a row has of its own."""
    return [
        value.shape if isinstance(value, Tensor) else [each.shape for each in value if isinstance(each, Tensor)]
        for value in row.rows.values()
    ]
