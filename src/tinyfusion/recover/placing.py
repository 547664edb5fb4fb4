"""Student and teacher of a recovery on the device: what trains, what the two share, and where the teacher's weights are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinyfusion.blocks.stack import frozen
from tinyfusion.config.recipe import RecoverSection
from tinyfusion.core.errors import UserError
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.recover.sharing import MergedUpdates, borrowed, equal_tensors, share
from tinyfusion.recover.storage import StreamedBlocks, stored
from tinyfusion.training.engine import Engine
from tinyfusion.training.lora import add_lora, cast_frozen_linears
from tinyfusion.training.optim import trainable
from tinyfusion.training.rounding import as_float32, hold_weights


@dataclass(frozen=True)
class Placed:
    """A recovery's models, ready to train.

    student: the model that trains, with a module of its own where low-rank updates do. parameters: those that train. merged:
    {name in the student as it was: new values} of trained values by name. streamed: of a teacher whose blocks come one by one.
    """

    student: LoadedModel
    parameters: dict[str, nn.Parameter]
    merged: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    streamed: StreamedBlocks | None = None

    @property
    def passing(self) -> int:
        """Bytes of the teacher's weights in transit to the device."""
        return self.streamed.passing if self.streamed else 0


def check_placing(settings: RecoverSection, engine: Engine) -> None:
    """Raise UserError on settings of storage that do not go together."""
    storage, compute = settings.teacher_storage, engine.compute
    if storage != "own" and settings.method == "finetune":
        raise UserError(
            f"recover.teacher_storage {storage} stores a teacher, and --method finetune has none: leave it out"
        )
    if storage != "own" and (compute.shard_teacher or engine.splits):
        raise UserError(
            f"recover.teacher_storage {storage} is for whole models, and compute.parallel fsdp2 splits them: use ddp, or own"
        )
    if storage != "own" and compute.compile:
        raise UserError(f"recover.teacher_storage {storage} cannot be compiled: leave --compile away, or use own")
    if settings.lora_apart and settings.update != "lora":
        raise UserError(
            "recover.lora_apart writes what update lora trains: set recover.update to lora, or leave it out"
        )


def place_models(
    student: LoadedModel, teacher: LoadedModel | None, settings: RecoverSection, engine: Engine, seed: int
) -> Placed:
    """Move both models to the engine's device, for the recovery that `settings` describes.

    seed: of the low-rank updates' initial values. With `update` full the student's own module trains; with lora a module on the
    same memory does, which uses the teacher's tensors where they are equal. Raises UserError as `check_placing`.
    """
    check_placing(settings, engine)
    training = settings.training
    if settings.update == "full":
        module = student.module.train()
        hold_weights(module, trainable(module), training)
        engine.place(module, list(student.stack))
        streamed = _placed_teacher(teacher, settings, engine)
        return Placed(student, trainable(module), as_float32, streamed)
    work = dataclasses.replace(student, module=borrowed(student.module).train())
    of_float32 = [work.module, teacher.module] if teacher else [work.module]
    for module in of_float32 if training.dtype == "float32" else ():
        cast_half_precision(module)
    sharing = teacher is not None and not engine.splits
    equal = equal_tensors(work.module, teacher.module, student.stack.lists) if teacher and sharing else {}
    streamed = _placed_teacher(teacher, settings, engine)
    if teacher and equal:
        share(work.module, teacher.module, equal, engine.device)
    elif training.dtype != "float32":
        cast_frozen_linears(work.module, getattr(torch, training.dtype))
    scale = settings.lora_scale
    factors = add_lora(work.module, settings.lora_rank, scale * settings.lora_rank, seed, student.family.computed)
    engine.place(work.module, list(work.stack))
    parameters = {name: p for name, p in work.module.named_parameters() if name in factors}
    whole = dict(student.module.named_parameters())

    def merged(values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return MergedUpdates(whole, values, scale)

    return Placed(work, parameters, merged, streamed)


def _placed_teacher(teacher: LoadedModel | None, settings: RecoverSection, engine: Engine) -> StreamedBlocks | None:
    if teacher is None:
        return None
    module = frozen(teacher.module)
    if settings.training.dtype == "float32":
        cast_half_precision(module)
    if settings.teacher_storage == "own":
        engine.place_teacher(module, list(teacher.stack))
        return None
    return stored(module, teacher.stack, settings.teacher_storage, engine.device)


def cast_half_precision(module: nn.Module) -> None:
    """Cast half-precision parameters, which do not multiply float32; tables in buffers keep their types."""
    for parameter in module.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
