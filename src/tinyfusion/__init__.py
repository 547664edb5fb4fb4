"""tinyfusion: prune diffusion transformers, recover them, measure and report."""
# ruff: noqa: F403, F405  # type checkers get the names of `__all__` from the library

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tinyfusion.core.version import __version__

if TYPE_CHECKING:
    from tinyfusion.api import *

__all__ = [
    "ComputeSection", "Condition", "DistillStepsSection", "LearnedMasks", "LoadedModel", "ModelFamily", "PrunePlan",
    "PruneSection", "RecoverSection", "SampleSection", "Streams", "Task", "TrainingSection", "__version__", "distill_model_steps",
    "evaluate_images", "learn_masks", "objective_of", "open_model", "prune_model", "record_inputs", "recover_model",
    "register_family", "sample_images", "save_model", "text_table", "wrap_module",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """The names of `tinyfusion.api`, without importing torch before one is used."""
    if name in __all__:
        return getattr(import_module("tinyfusion.api"), name)
    raise AttributeError(f"module 'tinyfusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
