"""Draw images or videos from prompts by a pipeline of diffusers, the noise of each addressed by the seed and its index."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinyfusion.config.recipe import PipelineSection, Recipe
from tinyfusion.core.errors import UserError, prefixed
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import FOLDED
from tinyfusion.jobs.pipelines import LENGTH, ModelPipeline, refused, shorter_texts

_DEFAULTS = ("num_inference_steps", "guidance_scale", "true_cfg_scale")  # of a pipeline, which the protocol states
_SAME_LEVEL = 1e-3


def pipeline_arguments(source: ModelPipeline, settings: PipelineSection) -> dict[str, Any]:
    """The arguments of a call that the settings name; of a student of few steps its own in place of steps and guidance, of folded
    guidance without.

    Raises UserError on those that the pipeline does not have.
    """
    how: Mapping[str, Any] = {
        "num_inference_steps": settings.num_steps, "guidance_scale": settings.guidance,
        "true_cfg_scale": settings.true_guidance, "negative_prompt": settings.negative_prompt,
    }  # fmt: skip
    return source.arguments(
        {
            **({} if source.few_steps else how),
            **({"negative_prompt": None, **source.drawn_with} if source.drawn_with else {}),
            "height": settings.height, "width": settings.width, "num_frames": settings.frames,
            LENGTH: settings.max_tokens or shorter_texts(source.kind, source.folder),
        }
    )  # fmt: skip


def drawing_steps(source: ModelPipeline, settings: PipelineSection) -> int:
    """Denoising steps of a call of a pipeline: its own of a student of few steps, else those of the settings or the default."""
    if source.few_steps:
        return len(source.few_steps.steps.levels)
    return int(settings.num_steps or inspect.signature(source.kind.__call__).parameters["num_inference_steps"].default)


def pipeline_protocol(source: ModelPipeline, recipe: Recipe, prompts_hash: str, num_images: int, dtype: str) -> str:
    """The sampling half of the protocol string. prompts_hash: SHA-256 of the prompts. dtype: of the weights."""
    settings, parameters = recipe.pipeline, inspect.signature(source.kind.__call__).parameters
    stated = {name: parameters[name].default for name in _DEFAULTS if name in parameters}
    stated |= pipeline_arguments(source, settings)
    negative = stated.pop("negative_prompt", None)
    stated.pop("sigmas", None)
    tokens = stated.pop(LENGTH, None)
    height, width, frames = (stated.pop(name, None) for name in ("height", "width", "num_frames"))
    size = f"{height or 'default height'} x {width or 'default width'}" + (f" x {frames} frames" if frames else "")
    steps, few = f"{stated.pop('num_inference_steps', 'default')} steps", source.few_steps
    steps = f"{few.steps.method}, {few.steps.describe()}" if few else steps
    if folded := source.folded:  # stated as of its guided teacher, but for `FOLDED`
        stated |= {name: folded.guidance.scale - 1 + off for name, off in folded.arguments.items()}
    guidance = "".join(f", {name} {value:g}" for name, value in stated.items() if isinstance(value, int | float))
    guidance += FOLDED if folded else ""
    how = f"{source.kind.__name__} {source.rest_hash[:8]}, {steps}{guidance}, {size}"
    how += f", texts of {tokens} tokens" if tokens else ""
    how += f", negative prompt {negative!r}" if negative else ""
    return f"{num_images} images | {how} | prompts {prompts_hash[:8]} in turn | {dtype} | seed {recipe.seed}"


@dataclass(frozen=True)
class PromptDrawing:
    """A pipeline on its device. arguments: of every call. Image i has prompt i modulo their number, and noise of its own.

    levels: noise levels that a student of few steps was trained at; None: any.
    """

    pipeline: Any
    prompts: Sequence[str]
    arguments: dict[str, Any]
    seed: int
    batch_size: int
    levels: tuple[float, ...] | None = None

    def images(self, first: int, last: int) -> Iterator[np.ndarray]:
        """Images first .. last - 1 in batches (B, H, W, 3) uint8, or videos (B, F, H, W, 3).

        Raises UserError where the pipeline refuses its arguments, draws at other levels, and on values that are not finite.
        """
        for begin in range(first, last, self.batch_size):
            yield self._batch(range(begin, min(begin + self.batch_size, last)))

    def report(self) -> dict[str, Any]:
        """Nothing: all is known before."""
        return {}

    def _batch(self, indices: range) -> np.ndarray:
        prompts = [self.prompts[i % len(self.prompts)] for i in indices]
        output = called(self.pipeline, prompts, generators(self.seed, indices), self.arguments, "np")
        if self.levels is not None:
            check_levels(self.pipeline.scheduler, self.levels)
        pixels = pixels_of(output[0] if isinstance(output, tuple) else output)
        where = f"images {indices[0]} to {indices[-1]}"
        if len(pixels) != len(indices):
            raise UserError(
                f"a {type(self.pipeline).__name__} drew {len(pixels)} of {len(indices)} prompts at once: give --batch-size 1"
            )
        for name, size in (("height", pixels.shape[-3]), ("width", pixels.shape[-2])):
            if self.arguments.get(name, size) != size:
                raise UserError(
                    f"a {type(self.pipeline).__name__} draws a {name} of {size} where --{name} is {self.arguments[name]}: give {size}"
                )
        if pixels.dtype == np.uint8:
            return pixels
        if not np.isfinite(pixels).all():
            raise UserError(f"{where} have values that are not finite: the model is broken or unrecovered")
        levels: np.ndarray = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
        return levels


def open_prompt_drawing(
    source: ModelPipeline, recipe: Recipe, prompts: Sequence[str], device: torch.device
) -> PromptDrawing:
    """The pipeline, opened to draw these prompts as the recipe says. Raises UserError on settings that it lacks."""
    settings, few = recipe.pipeline, source.few_steps
    arguments, levels = pipeline_arguments(source, settings), few.steps.levels if few else None
    pipeline = source.opened(device, settings.dtype)
    return PromptDrawing(pipeline, prompts, arguments, recipe.seed, settings.batch_size, levels)


def check_levels(scheduler: Any, levels: Sequence[float]) -> None:
    """Raise UserError where a pipeline has not drawn at these noise levels."""
    sigmas: Any = getattr(scheduler, "sigmas", None)
    found = [] if sigmas is None else [float(sigma) for sigma in sigmas[:-1]]
    if len(found) == len(levels) and np.allclose(found, levels, rtol=0, atol=_SAME_LEVEL):
        return
    own, there = (", ".join(f"{level:.4g}" for level in each) for each in (levels, found))
    raise UserError(
        f"the student was trained to draw at noise levels {own}, and this pipeline goes to {there or 'none'}: where its shift depends on "
        "the size, draw images of the size of the training data; else give the pipeline that the student was distilled for"
    )


def generators(seed: int, indices: range) -> list[torch.Generator]:
    """A generator on the CPU per image, seeded by its address."""
    randomness = Randomness(seed)
    return [torch.Generator().manual_seed(randomness.generator_seed(f"draw/{i}")) for i in indices]


def called(
    pipeline: Any, prompts: Sequence[str], noise: list[torch.Generator], arguments: Mapping[str, Any], output_type: str
) -> Any:
    """The output of a call, a prompt and a generator for each image. Raises UserError where the pipeline refuses it."""
    known, given = inspect.signature(type(pipeline).__call__).parameters, dict(arguments)
    if "negative_prompt" in given:
        given["negative_prompt"] = [given["negative_prompt"]] * len(prompts)
    given |= {name: value for name, value in (("output_type", output_type), ("return_dict", False)) if name in known}
    options = ", ".join(f"{name} {value}" for name, value in arguments.items())
    problem = f"a {type(pipeline).__name__} cannot be called with a prompt{' and ' if options else ''}{options}"
    with refused(problem), torch.no_grad(), precise_noise(pipeline):
        return pipeline(prompt=list(prompts), generator=noise, **given)


@contextmanager
def precise_noise(pipeline: Any) -> Iterator[None]:
    """Within the context the first noise of a pipeline is drawn in float32 and then rounded to the type that it wants.

    Generators give other numbers in other types where their count is no multiple of 16, and a student in bfloat16 has to start
    where a teacher in float32 does. A pipeline without `prepare_latents`, or whose latents begin with a picture, is left as it is.
    """
    prepare: Any = getattr(pipeline, "prepare_latents", None)
    if prepare is None or "dtype" not in inspect.signature(prepare).parameters:
        yield
        return
    signature = inspect.signature(prepare)

    def prepared(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = any(isinstance(value, Tensor) for value in bound.arguments.values())
        drawn = bound.arguments.get("generator")
        listed: list[Any] = drawn if isinstance(drawn, list) else [drawn]
        if given or bound.arguments.get("dtype") in (None, torch.float32) or None in listed:
            return prepare(*args, **kwargs)
        states = [each.get_state() for each in listed]
        plain = prepare(*args, **kwargs)
        for each, state in zip(listed, states, strict=True):
            each.set_state(state)
        bound.arguments["dtype"] = torch.float32
        return _rounded(prepare(*bound.args, **bound.kwargs), plain)

    pipeline.prepare_latents = prepared
    try:
        yield
    finally:
        del pipeline.prepare_latents


def _rounded(precise: Any, plain: Any) -> Any:
    """Tensors of `plain`, those of another type replaced by that of `precise` in the type of `plain`."""
    if isinstance(plain, Tensor):
        return plain if precise.dtype == plain.dtype else precise.to(plain.dtype)
    if isinstance(plain, list | tuple):
        return type(plain)(_rounded(*pair) for pair in zip(precise, plain, strict=True))
    return plain


def pixels_of(output: Any) -> np.ndarray:
    """Images (B, H, W, 3) or videos (B, F, H, W, 3) as a pipeline returns them: an array, or lists of pictures.

    Floats are in 0 to 1. Raises UserError on other outputs.
    """
    if isinstance(output, Tensor):
        output = output.float().cpu().numpy()
        output = output if output.shape[-1] == 3 else np.moveaxis(output, -3, -1)
    with prefixed("the pipeline returned no pictures of one size", TypeError, ValueError):
        pixels = np.asarray(output) if isinstance(output, np.ndarray) else np.stack([_stacked(each) for each in output])
    if pixels.ndim not in (4, 5) or pixels.shape[-1] != 3 or pixels.dtype.kind not in "fu":
        raise UserError(f"the pipeline returned {pixels.dtype} {pixels.shape}: wanted pictures of three channels")
    return pixels


def _stacked(image: Any) -> np.ndarray:
    """An array of a picture, or of the frames of a video."""
    return np.stack([np.asarray(each) for each in image]) if isinstance(image, list) else np.asarray(image)
