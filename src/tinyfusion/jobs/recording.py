"""Record the inputs of a transformer: around any call of a pipeline, or from the folder of a pipeline and prompts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyfusion.core.errors import UserError
from tinyfusion.core.records import stamp
from tinyfusion.core.rng import Randomness
from tinyfusion.data.recorded import Call, recording, spread, write_recorded
from tinyfusion.families.diffusers_classes.folder import open_transformer
from tinyfusion.families.diffusers_classes.rows import rows_with
from tinyfusion.jobs.pipelines import REFUSALS
from tinyfusion.models.wrapped import wrap_module


@contextmanager
def record_inputs(
    transformer: nn.Module, path: str | Path, *, calls: int | None = None, source: str | Path | None = None
) -> Iterator[None]:
    """Within the context the inputs of `transformer` are recorded, for `tinyfusion prune --inputs`; the file is written at its end.

    Call a pipeline with this transformer within, as often as wanted. calls: written at most, evenly spaced among all; None writes
    each. source: folder of the transformer, where it was opened in another type than that of its files; None: the model is
    recognised by its tensors as they are. Nothing is written where the context ends by an exception. Raises UserError
    where no call was made.
    """
    facts = {"class_name": type(transformer).__name__, "dtype": dtype_name(transformer)}
    facts["hash"] = _hash(transformer) if source is None else open_transformer(Path(source), rows_with(None)).hash
    with recording(transformer, outputs=True) as made:
        yield
    if not made:
        raise UserError(
            f"the {facts['class_name']} was not called within record_inputs: call the pipeline that it is of"
        )
    write_recorded(Path(path), spread(made, calls), stamp("record", {}, "done", **facts))


def dtype_name(transformer: nn.Module) -> str:
    """The type of a model's weights, as torch names it."""
    dtype = getattr(transformer, "dtype", None) or next(transformer.parameters()).dtype
    return str(dtype).removeprefix("torch.")


def _hash(transformer: nn.Module) -> str:
    """The hash that a folder of these tensors has."""
    if any(tensor.is_meta for tensor in transformer.parameters()):
        raise UserError(
            "the transformer's weights are not in memory (sequential offload): give record_inputs its folder, source="
        )
    lists = [name for name, part in transformer.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    return wrap_module(transformer, lists[:1]).hash()


# -------------------------------------------------------------------------------------------------------- pipeline folders


@dataclass(frozen=True)
class Drawing:
    """How a pipeline is called; None leaves what the pipeline has by default. calls: retained per prompt."""

    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    seed: int = 0
    calls: int = 4

    def arguments(self, kind: Any) -> dict[str, Any]:
        """The arguments of a call of this pipeline class. Raises UserError on one that it does not have."""
        given = {
            "num_inference_steps": self.steps, "guidance_scale": self.guidance_scale, "height": self.height,
            "width": self.width, "num_frames": self.frames,
        }  # fmt: skip
        known = inspect.signature(kind.__call__).parameters
        if "prompt" not in known:
            raise UserError(
                f"a {kind.__name__} takes no prompt: record from a script of your own, tinyfusion.record_inputs(transformer, FILE)"
            )
        if odd := next((name for name, value in given.items() if value is not None and name not in known), None):
            raise UserError(f"a {kind.__name__} has no {odd}: leave that option out")
        return {name: value for name, value in given.items() if value is not None} | (
            {"output_type": "latent"} if "output_type" in known else {}
        )


def recorded_calls(
    pipeline: Any, transformer: nn.Module, prompts: Sequence[str], drawing: Drawing, tick: Callable[[int], None]
) -> list[Call]:
    """The calls of the transformer while the pipeline draws each prompt, `drawing.calls` of each, spread over its trajectory.

    Raises UserError where the pipeline cannot be called with a prompt alone.
    """
    arguments, calls = drawing.arguments(type(pipeline)), list[Call]()
    for number, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(Randomness(drawing.seed).generator_seed(f"record/{number}"))
        with recording(transformer, outputs=True) as made, torch.no_grad():
            try:
                pipeline(prompt=prompt, generator=generator, **arguments)
            except REFUSALS as error:
                if isinstance(error, UserError | torch.OutOfMemoryError):
                    raise
                raise UserError(
                    f"a {type(pipeline).__name__} cannot be called with a prompt and these options ({error}): record from a script of "
                    "your own, tinyfusion.record_inputs(transformer, FILE)"
                ) from error
        if not made:
            raise UserError(
                f"the pipeline drew prompt {number + 1} without this transformer: give another --component or more --steps"
            )
        calls += spread(made, drawing.calls)
        tick(number + 1)
    return calls
