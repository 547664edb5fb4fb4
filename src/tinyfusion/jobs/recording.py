"""Record the inputs of a transformer: around any call of a pipeline, or from the folder of a pipeline and prompts."""

from __future__ import annotations

import dataclasses
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tinyfusion.core.errors import UserError
from tinyfusion.core.records import stamp
from tinyfusion.core.rng import Randomness
from tinyfusion.data.recorded import Call, packed, recording, spread, write_recorded
from tinyfusion.families.diffusers_classes.folder import open_transformer
from tinyfusion.families.diffusers_classes.rows import rows_with
from tinyfusion.jobs.pipelines import call_arguments, refused
from tinyfusion.models.wrapped import wrap_module

_USUAL_STEPS, _MEASURED_STEPS = 50, 2


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
    """How a pipeline is called; None leaves what the pipeline has by default. calls: retained per prompt; None: all.

    wanted: arguments of the call that the model wants, such as guidance off where it has folded it in.
    """

    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    seed: int = 0
    calls: int | None = 4
    wanted: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self, kind: Any) -> dict[str, Any]:
        """The arguments of a call of this pipeline class. Raises UserError on one that it does not have, or the model has other."""
        given = {
            "num_inference_steps": self.steps, "guidance_scale": self.guidance_scale, "height": self.height,
            "width": self.width, "num_frames": self.frames,
        }  # fmt: skip
        own = ": record from a script of your own, tinyfusion.record_inputs(transformer, FILE)"
        called = call_arguments(kind, given, own)
        for name in called.keys() & self.wanted.keys():
            if called[name] != self.wanted[name]:
                raise UserError(
                    f"{name} is {called[name]!r}, and the model was trained to be drawn with {self.wanted[name]!r}: leave it out"
                )
        takes_form = "output_type" in inspect.signature(kind.__call__).parameters
        return called | dict(self.wanted) | ({"output_type": "latent"} if takes_form else {})


def recorded_calls(
    pipeline: Any,
    transformer: nn.Module,
    prompts: Sequence[str],
    drawing: Drawing,
    tick: Callable[[int], None],
    first: int = 0,
) -> list[Call]:
    """The calls of the transformer while the pipeline draws each prompt, `drawing.calls` of each, spread over its trajectory.

    first: number of the first prompt among all, by which its noise is addressed. Raises UserError where the pipeline cannot be
    called with a prompt alone.
    """
    calls = list[Call]()
    for number, prompt in enumerate(prompts, first):
        calls += spread(_drawn(pipeline, transformer, number, prompt, drawing), drawing.calls)
        tick(number - first + 1)
    return calls


def _drawn(pipeline: Any, transformer: nn.Module, number: int, prompt: str, drawing: Drawing) -> list[Call]:
    """All calls of the transformer while the pipeline draws a prompt."""
    generator = torch.Generator().manual_seed(Randomness(drawing.seed).generator_seed(f"record/{number}"))
    arguments = drawing.arguments(type(pipeline))
    problem = (
        f"a {type(pipeline).__name__} cannot be called with a prompt and these options; record from a script of your own, "
        "tinyfusion.record_inputs(transformer, FILE)"
    )
    with recording(transformer, outputs=True) as made, torch.no_grad(), refused(problem):
        pipeline(prompt=prompt, generator=generator, **arguments)
    if not made:
        raise UserError(
            f"the pipeline drew prompt {number + 1} without this transformer: give another --component or more --steps"
        )
    return made


@dataclass(frozen=True)
class PromptCost:
    """What a prompt takes. calls, num_bytes: that are written, at most; seconds; steps: that were drawn to measure it."""

    calls: int
    num_bytes: int
    seconds: float
    steps: int


def cost_of_prompt(pipeline: Any, transformer: nn.Module, prompt: str, drawing: Drawing) -> PromptCost:
    """The cost of a prompt, from drawing it in two steps."""
    default = getattr(inspect.signature(type(pipeline).__call__).parameters.get("num_inference_steps"), "default", None)
    fixed = drawing.wanted.get("num_inference_steps")
    steps = fixed or drawing.steps or (default if isinstance(default, int) else _USUAL_STEPS)
    few = fixed or min(_MEASURED_STEPS, steps)
    began = time.perf_counter()
    made = _drawn(pipeline, transformer, 0, prompt, dataclasses.replace(drawing, steps=few))
    seconds = (time.perf_counter() - began) * steps / few
    each = max(1, round(len(made) / few))  # calls of a step
    total = each * steps
    num = min(total, drawing.calls or total)
    first, whole = _unique_bytes(made[:each]), _unique_bytes(made)
    more = (whole - first) / max(len(made) - each, 1)  # of a call after the first step
    return PromptCost(num, round(first + more * max(num - each, 0)), seconds, few)


def _unique_bytes(calls: Sequence[Call]) -> int:
    tensors = packed(calls, {})[0]
    return sum(tensor.nbytes for tensor in tensors.values())
