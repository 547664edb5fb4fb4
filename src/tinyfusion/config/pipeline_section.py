"""The section of a recipe about drawing by a pipeline of diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tinyfusion.config.constraints import BatchSize, Count, Ge, Le, Location, Side, SmallCount
from tinyfusion.config.training_sections import Dtype

Scale = Annotated[float, Ge(0), Le(10**6)]


@dataclass(frozen=True)
class PipelineSection:
    """Drawing from prompts by a pipeline of diffusers; None leaves what the pipeline has by default."""

    folder: Annotated[
        str | None, Location(), "folder or hub id of the pipeline; None: that of the model, or of its teacher as its run records"
    ] = None  # fmt: skip
    component: Annotated[
        str | None, "the pipeline's transformer that the model takes the place of, where there are several"
    ] = None
    num_images: Annotated[Count | None, "images to draw, of the prompts in turn; None: one of each"] = None
    batch_size: Annotated[BatchSize, "images at a time; the images do not depend on it"] = 1
    num_steps: Annotated[SmallCount | None, "denoising steps"] = None
    guidance: Annotated[Scale | None, "guidance_scale of the pipeline"] = None
    true_guidance: Annotated[
        Scale | None, "true_cfg_scale, the guidance with a second pass of pipelines that have both kinds"
    ] = None
    negative_prompt: Annotated[str | None, "negative prompt of every image, for pipelines with guidance"] = None
    max_tokens: Annotated[
        SmallCount | None,
        "longest prompt in tokens (max_sequence_length); None: the pipeline's, or that of its tokenizer if less",
    ] = None
    height: Annotated[Side | None, "height in pixels"] = None
    width: Annotated[Side | None, "width in pixels"] = None
    frames: Annotated[SmallCount | None, "frames of a video"] = None
    frames_per_second: Annotated[SmallCount, "of an mp4 file"] = 16
    dtype: Annotated[Dtype | None, "type of all weights; None: that of the transformer's files"] = None
