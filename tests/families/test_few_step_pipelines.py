# ruff: noqa: E501
"""Every pipeline that draws students of few steps: its noise levels, its guidance, and what it is called with, by itself."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import GENERATOR, draw
from tiny_pipelines import PIPELINES, TinyPipeline, _guided, _size
from torch import Tensor, nn

from tinyfusion.core.errors import UserError
from tinyfusion.families.diffusers_classes.call_rows import CALLS
from tinyfusion.families.diffusers_classes.few_steps import (
    STEP_PIPELINES,
    Drawn,
    FewStepDrawing,
    few_step_drawing,
    step_levels,
    step_pipeline,
)
from tinyfusion.processes.noising import FewSteps

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself

EULER = "FlowMatchEulerDiscreteScheduler"
STATIC = {"_class_name": EULER, "shift": 3.0}
DYNAMIC = {
    "_class_name": EULER,
    "use_dynamic_shifting": True,
    "base_shift": 0.3,
    "base_image_seq_len": 8,
    "max_image_seq_len": 100,
}
# cells of the latents of 64 pixels, where they are not 8 x 8
CELLS = {"Flux2KleinPipeline": (4, 4), "ErnieImagePipeline": (4, 4), "SanaPipeline": (2, 2), "LTXPipeline": (2, 2, 2)}
MORE = [
    TinyPipeline("Flux2Pipeline", "Flux2Transformer2DModel", lambda: _size(prompt_embeds=draw(1, 10, 32)),
                 vae=PIPELINES[1].vae),
    TinyPipeline("OvisImagePipeline", "OvisImageTransformer2DModel", lambda: _size(**_guided(10, 32, negative_prompt=None))),
    TinyPipeline("LongCatImagePipeline", "LongCatImageTransformer2DModel",
                 lambda: _size(prompt=["a"], enable_prompt_rewrite=False, latents=draw(1, 16, 4)),
                 attributes={"_encode_prompt": lambda prompts: draw(len(prompts), 10, 32)}),
]  # fmt: skip
DRAWN = [each for each in (*PIPELINES, *MORE) if each.name in STEP_PIPELINES]


def test_every_row_is_tried() -> None:
    assert {each.name for each in DRAWN} == set(STEP_PIPELINES)


@contextlib.contextmanager
def counting(module: nn.Module) -> Iterator[list[int]]:
    """A list that gets the rows of every call."""
    rows: list[int] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next(value for value in [*args, *kwargs.values()] if isinstance(value, Tensor | list))
        rows.append(len(first))

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield rows
    finally:
        handle.remove()


def built(tiny: TinyPipeline, scheduler: dict[str, Any]) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipeline = tiny.build()
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler.from_config(scheduler))
    pipeline.set_progress_bar_config(disable=True)
    for name, value in tiny.attributes.items():
        setattr(pipeline, name, value)
    return pipeline


@torch.no_grad()
def run(tiny: TinyPipeline, pipeline: Any, **arguments: Any) -> Any:
    GENERATOR.manual_seed(5)
    given = dict(output_type="latent", return_dict=False, generator=torch.Generator().manual_seed(0)) | tiny.call()
    return pipeline(**given | arguments)[0]


@pytest.mark.parametrize("tiny", DRAWN, ids=lambda each: each.name)
def test_a_pipeline_draws_at_the_levels_that_are_trained_without_guidance(tiny: TinyPipeline) -> None:
    row = STEP_PIPELINES[tiny.name]
    for scheduler in (STATIC, DYNAMIC) if row.mu else (STATIC,):
        pipeline = built(tiny, scheduler)
        kind, config = type(pipeline), {"_class_name": tiny.model, **pipeline.transformer.config}
        assert step_pipeline(kind, {}, scheduler) == row
        cells = CELLS.get(tiny.name, CELLS["Flux2KleinPipeline"] if tiny.name == "Flux2Pipeline" else (8, 8))
        call = CALLS[tiny.model]
        channels = int(config["in_channels"]) // call.packed
        shape = (channels, *((2, *cells) if call.axes == 5 and len(cells) == 2 else cells))
        levels = step_levels(kind, scheduler, Drawn(shape, call.tokens(config, shape), 3))
        embedded = row.embeds and bool(config.get("guidance_embeds"))
        drawing = FewStepDrawing.of(FewSteps("consistency", levels, 2.5, False), row, embedded)
        assert set(drawing.arguments) <= set(inspect.signature(kind.__call__).parameters)
        assert few_step_drawing(drawing.to_json()) == drawing
        with counting(pipeline.transformer) as rows:
            run(tiny, pipeline, **drawing.arguments)
        assert rows == [1, 1, 1], "one pass of one image in a step"
        assert pipeline.scheduler.sigmas[:-1].tolist() == pytest.approx(levels, abs=1e-6)
        assert levels[0] == 1 and levels[-1] > 0.1, "the last step is not wasted"


@pytest.mark.parametrize("name", ["StableDiffusion3Pipeline", "ZImagePipeline", "OvisImagePipeline"])
def test_guidance_is_off_where_the_row_says(name: str) -> None:
    """The change by guidance grows as the argument does from there."""
    tiny = next(each for each in DRAWN if each.name == name)
    pipeline, off = built(tiny, STATIC), STEP_PIPELINES[name].off

    def drawn(scale: float) -> Tensor:
        made = run(tiny, pipeline, num_inference_steps=1, sigmas=[1.0], guidance_scale=scale)
        return torch.stack(list(made)) if isinstance(made, list) else made

    alone, two, four = drawn(off), drawn(off + 1.5), drawn(off + 3)
    assert float((two - alone).abs().max()) > 1e-3
    torch.testing.assert_close(four - alone, 2 * (two - alone), rtol=1e-3, atol=1e-4)


def test_pipelines_that_cannot_are_refused() -> None:
    import diffusers

    for kind, index, scheduler, message in (
        (
            diffusers.WanPipeline,
            {},
            STATIC,
            "a WanPipeline draws no student of few steps: it takes no sigmas; wanted AuraFlow",
        ),
        (diffusers.FluxFillPipeline, {}, STATIC, "at which noise levels it draws few steps is not known"),
        (diffusers.SanaPipeline, {}, {"_class_name": "DPMSolverMultistepScheduler"}, f"give a pipeline with {EULER}"),
        (diffusers.Krea2Pipeline, {"is_distilled": True}, STATIC, "of a model of few steps already"),
        (diffusers.AuraFlowPipeline, {}, DYNAMIC, "gives its scheduler no dynamic shift"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            step_pipeline(kind, index, scheduler)
        assert "\n" not in str(refused.value)
    for scheduler in (STATIC | {"invert_sigmas": True}, STATIC | {"shift": -1.0}, STATIC | {"shift": "two"}):
        with pytest.raises(UserError, match="scheduler_config.json gives no noise levels for 4 steps"):
            step_levels(diffusers.StableDiffusion3Pipeline, scheduler, Drawn((1, 8, 8), 16, 4))


def test_a_damaged_record_is_refused() -> None:
    good = FewStepDrawing.of(FewSteps("consistency", (1.0, 0.75), 2.0, False), STEP_PIPELINES["FluxPipeline"], True)
    assert good.arguments == {
        "num_inference_steps": 2, "sigmas": [1.0, 0.5], "true_cfg_scale": 1.0, "guidance_scale": 2.0,
    }  # fmt: skip
    record = good.to_json()
    for change in (
        {"arguments": None}, {"arguments": {**good.arguments, "output_type": "pil"}}, {"levels": [0.5, 1.0]}, {"levels": "1"},
        {"arguments": {**good.arguments, "num_inference_steps": 3}}, {"arguments": {**good.arguments, "sigmas": [1.0, 0.7]}},
        {"arguments": {**good.arguments, "guidance_scale": "3"}}, {"arguments": {**good.arguments, "guidance_scale": float("nan")}},
        {"arguments": {"sigmas": [1.0, 0.5]}},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="few.steps"):
            few_step_drawing({**record, **change})
    for other in (None, [], "none", 3):
        with pytest.raises(ValueError, match="few_steps"):
            few_step_drawing(other)
