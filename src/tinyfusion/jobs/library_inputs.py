"""Models, tasks, batches and images that the library is given: checked, and matched to each other."""

from __future__ import annotations

import dataclasses
import inspect
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyfusion.config.constraints import Index
from tinyfusion.config.loading import checked
from tinyfusion.config.recipe import ComputeSection
from tinyfusion.core.compiler import check_compiler
from tinyfusion.core.errors import UserError
from tinyfusion.jobs.library_settings import check_batch_size, check_compute, check_training
from tinyfusion.jobs.process_specs import check_denoiser, check_process
from tinyfusion.models.loaded import LoadedModel, make_trainable
from tinyfusion.processes.base import Process
from tinyfusion.processes.task import Task, task_source
from tinyfusion.training.engine import Engine
from tinyfusion.training.loop import BatchSource


def training_engine(model: LoadedModel, compute: ComputeSection | None) -> Engine:
    """A training in this process, on the device of the model. Raises UserError where gradients are off."""
    compute = check_compute(compute)
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise UserError("a training needs gradients: call it outside of torch.no_grad() and torch.inference_mode()")
    engine = Engine(next(model.module.parameters()).device, compute)
    if compute.compile:
        check_compiler(engine.device)
    return engine


def training_source(
    task: Process, batches: Any, owner: Any, model: LoadedModel, engine: Engine, reader: str
) -> tuple[BatchSource, Any]:
    """The source of batches for the loop, and the section `owner` whose training has their batch size.

    reader: the function, for messages. Raises UserError where task, batches, model and settings do not go together.
    """
    check_training(owner.training, owner, reader, getattr(task, "label_drop", None))
    source, num = task_batches(task, batches, model, engine)
    if num is None:
        return source, owner
    if engine.compute.gradient_accumulation_steps > 1:
        raise UserError(
            "microbatches of an iterable are not supported: give smaller batches, or a function (step, draws)"
        )
    if getattr(owner, "search_candidates", 1) > 1:
        raise UserError(
            "trials of an iterable are not supported, as they see the same batches again: leave out search_candidates, or give a "
            "function (step, draws)"
        )
    check_batch_size(owner, num)
    return source, dataclasses.replace(owner, training=dataclasses.replace(owner.training, batch_size=num))


def task_batches(task: Process, batches: Any, model: LoadedModel, engine: Engine) -> tuple[BatchSource, int | None]:
    """The source of batches for the loop, and the images of a batch; None where the settings decide.

    Raises UserError where task, batches and model do not go together.
    """
    if not all(callable(getattr(task, name, None)) for name in ("draw", "predict", "losses", "kd_terms")):
        raise UserError(f"task is a Task of two functions, or objective_of(model); got a {type(task).__name__}")
    check_denoiser(model)
    check_process(task, model)
    if isinstance(batches, Tensor | np.ndarray | str | bytes | Mapping) or not (
        callable(batches) or isinstance(batches, Iterable)
    ):
        raise UserError(f"batches are an iterable of batches, or a function; got a {type(batches).__name__}")
    if not isinstance(task, Task):
        check_data_set(batches)
        return batches, None
    if callable(batches) and not _takes(batches, 2):
        raise UserError(
            "a Task calls batches(step, draws), with 2 arguments; batches of a data set (step, batch_size, draws) are for "
            "objective_of(model)"
        )
    return task_source(batches, engine.device)


def check_data_set(batches: Any) -> None:
    """Raise UserError unless `batches` is what the process of a family takes."""
    got = type(batches).__name__
    if not callable(batches):
        raise UserError(
            f"the process of a family needs batches of a data set (tinyfusion.data.batches), got an iterable ({got})"
        )
    if not _takes(batches, 3):
        raise UserError(
            "the process of a family calls batches(step, batch_size, draws), with 3 arguments, for a batch with x and condition, such as "
            "tinyfusion.data.batches.ShuffledBatches; functions (step, draws) are for a Task"
        )


def _takes(function: Callable[..., Any], num: int) -> bool:
    """Whether a function can be called with so many arguments, as far as it says."""
    try:
        inspect.signature(function).bind(*range(num))
    except TypeError:
        return False
    except ValueError:  # of a builtin without a signature
        return True
    return True


def undropped(process: Process) -> Process:
    """The process without dropped labels, as criteria measure."""
    if dataclasses.is_dataclass(process) and getattr(process, "label_drop", 0):
        return dataclasses.replace(process, label_drop=0.0)
    return process


def trainable_copy(model: LoadedModel) -> LoadedModel:
    """A copy to train: of a model that is frozen as a whole, one in which everything trains."""
    copied = model.copy()
    if not any(parameter.requires_grad for parameter in copied.module.parameters()):
        make_trainable(copied.module, copied.family)
    return copied


@contextmanager
def mode_as_given(module: nn.Module) -> Iterator[None]:
    """Leave the module in train or eval mode, part by part, as it was before the context."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def block_indices(how: Any) -> list[int]:
    """Indices of blocks as Python's whole numbers, from a sequence, an array or a tensor. Raises UserError on anything else."""
    values = how.tolist() if isinstance(how, np.ndarray | Tensor) else how
    listed = isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping)
    indices = list(values) if listed else []
    if not indices or not all(isinstance(i, numbers.Integral) and not isinstance(i, bool) for i in indices):
        raise UserError(
            "prune_model takes learned masks, a PrunePlan, the name of a criterion, or the indices of the blocks to keep as whole numbers, "
            f"such as [0, 2, 4]; got {how!r}"
        )
    return [int(checked(Index, i, "index of a block")) for i in indices]


def image_labels(labels: Any, model: LoadedModel) -> np.ndarray:
    """(N,) int64: one label per image. Raises UserError unless they are whole numbers that the model knows."""
    values = labels.cpu().numpy() if isinstance(labels, Tensor) else labels
    try:
        array = np.asarray(values)
    except ValueError:  # rows of several lengths
        array = np.zeros(0)
    if array.ndim != 1 or not len(array) or array.dtype.kind not in "iu":
        raise UserError(f"labels are whole numbers, one per image, such as [3, 7]; got {labels!r}")
    known = len(model.conditions)
    if outside := sorted({int(label) for label in array if not 0 <= label < known}):
        what = "classes" if model.family.texts is None else "prompts"
        raise UserError(f"labels {outside} out of range: the model knows {what} 0 to {known - 1}")
    return array.astype(np.int64)


def checked_images(images: Any, what: str) -> np.ndarray:
    """The images. Raises UserError unless they are a NumPy array."""
    if not isinstance(images, np.ndarray):
        raise UserError(
            f"{what}: wanted a NumPy array, uint8 (N, H, W, C); got a {type(images).__name__}: give np.asarray(...)"
        )
    return images
