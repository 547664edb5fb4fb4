# ruff: noqa: E501
"""What pipelines of diffusers give their transformers, and the same latents, times and texts before the pipeline made that of them.

Packing, positions, times and masks are those of the pipelines' own code, run in this process on random models in small.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import tiny_pipelines
import torch
from tiny import Tiny, draw
from tiny_images import IMAGES
from tiny_pipelines import PIPELINES, TinyPipeline
from tiny_video import VIDEO
from torch import Tensor

from tinyfusion.conditioning.condition import Condition
from tinyfusion.families.diffusers_classes.call_rows import CALLS
from tinyfusion.families.diffusers_classes.calls import CallContext, TransformerCall

_KL, _size, _clip, _guided = (getattr(tiny_pipelines, name) for name in ("_KL", "_size", "_clip", "_guided"))
FLOAT = torch.float32
_COG_TALL = dict(use_rotary_positional_embeddings=True, attention_head_dim=16, sample_width=12, sample_height=10)


@dataclass(frozen=True)
class Golden:
    """A pipeline, changes to the config of its transformer, and what of it the context of a call has to say."""

    pipeline: TinyPipeline
    changes: Mapping[str, Any] = field(default_factory=dict)
    context: Mapping[str, Any] = field(default_factory=dict)
    tag: str = ""

    @property
    def title(self) -> str:
        return f"{self.pipeline.name}{f'-{self.tag}' if self.tag else ''}"

    @property
    def call(self) -> TransformerCall:
        return CALLS[self.pipeline.model]

    @property
    def tiny(self) -> Tiny:
        tiny = next(each for each in (*IMAGES, *VIDEO) if each.name == self.pipeline.model)
        return Tiny(tiny.name, {**tiny.config, **self.changes}, tiny.inputs, tiny.removed)

    def built(self) -> Any:
        """The pipeline with the changed transformer."""
        pipeline = self.pipeline.build()
        pipeline.transformer = self.tiny.model()
        return pipeline

    def context_of(self, pipeline: Any) -> CallContext:
        config = {**pipeline.transformer.config, "_class_name": self.pipeline.model}
        return self.call.resolved(CallContext(config, **self.context))


@dataclass(frozen=True)
class PipelineCall:
    """A call of the transformer: its arguments by name, what it returned, and x, t and condition as training has them."""

    arguments: Mapping[str, Any]
    output: Any
    x: Tensor
    t: Tensor
    condition: Condition


HEIGHT, WIDTH = 64, 96  # pixels: no axis is mistaken for another


def _unpacked(pipeline: Any, tokens: Tensor) -> Tensor:
    return pipeline._unpack_latents(tokens, HEIGHT, WIDTH, pipeline.vae_scale_factor)


def _scattered(pipeline: Any, tokens: Tensor) -> Tensor:
    rows, columns = HEIGHT // 16, WIDTH // 16
    ids = pipeline._prepare_latent_ids(torch.empty(len(tokens), 1, rows, columns))
    return torch.stack(list(pipeline._unpack_latents_with_ids(tokens, ids)))


def _frames(pipeline: Any, tokens: Tensor) -> Tensor:
    return pipeline._unpack_latents(tokens, 2, HEIGHT // 32, WIDTH // 32)


Latents = Callable[[Any, Any], Tensor]
LATENTS: dict[str, Latents] = {  # (pipeline, what its transformer gets or returns) -> latents; of the others: as they are
    "Flux2Transformer2DModel": _scattered,
    "LTXVideoTransformer3DModel": _frames,
    "ZImageTransformer2DModel": lambda _, images: torch.stack(list(images)).squeeze(2),
    "CogVideoXTransformer3DModel": lambda _, frames: frames.transpose(1, 2),
    "QwenImageTransformer2DModel": lambda pipeline, tokens: _unpacked(pipeline, tokens).squeeze(2),
    "Krea2Transformer2DModel": lambda pipeline, tokens: pipeline._unpack_latents(tokens, HEIGHT, WIDTH).squeeze(2),
} | dict.fromkeys(
    ("FluxTransformer2DModel", "OvisImageTransformer2DModel", "LongCatImageTransformer2DModel", "BriaTransformer2DModel"), _unpacked
)  # fmt: skip
TIME = {"ZImageTransformer2DModel": "t", "HiDreamImageTransformer2DModel": "timesteps"}
HIDDEN = {"ZImageTransformer2DModel": "x"}
MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask", "attention_mask")
EMBEDDINGS = ("encoder_hidden_states", "cap_feats", "encoder_hidden_states_t5", "text_bth")
POOLED = ("pooled_projections", "pooled_embeds")


def latents_of(name: str) -> Latents:
    return LATENTS.get(name, lambda _, value: value)


def _condition(arguments: Mapping[str, Any]) -> Condition:
    """The texts that a pipeline gave, as a table of prompts has them."""
    given = next(arguments[name] for name in EMBEDDINGS if arguments.get(name) is not None)
    tensors: dict[str, Tensor] = {"embeddings": given if isinstance(given, Tensor) else torch.stack(list(given))}
    mask = next((arguments[name] for name in MASKS if arguments.get(name) is not None), None)
    tensors["mask"] = torch.ones(tensors["embeddings"].shape[:2], dtype=torch.bool) if mask is None else mask
    for name in POOLED:
        if arguments.get(name) is not None:
            tensors["pooled"] = arguments[name]
    if "encoder_hidden_states_llama3" in arguments:
        tensors["llama"] = arguments["encoder_hidden_states_llama3"].transpose(0, 1)
    return Condition(tensors)


def pipeline_calls(golden: Golden, pipeline: Any) -> Iterator[PipelineCall]:
    """The calls of the transformer while the pipeline draws."""
    model, name, made = pipeline.transformer, golden.pipeline.model, list[tuple[dict[str, Any], Any]]()

    def record(_module: Any, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        made.append((dict(inspect.signature(model.forward).bind(*given, **named).arguments), output))

    handle = model.register_forward_hook(record, with_kwargs=True)
    with torch.no_grad():
        given = golden.pipeline.call
        replace(golden.pipeline, call=lambda: given() | {"height": HEIGHT, "width": WIDTH}).drawn(pipeline)
    handle.remove()
    steps = pipeline.scheduler.timesteps.float()
    if golden.pipeline.name == "SanaSprintPipeline":  # angles of noise against data
        steps = 1000 * steps.sin() / (steps.cos() + steps.sin())
    per_step = len(made) // tiny_pipelines.STEPS
    for number, (arguments, output) in enumerate(made):
        x, returned = (latents_of(name)(pipeline, v) for v in (arguments[HIDDEN.get(name, "hidden_states")], output[0]))
        condition = _condition(arguments)
        if golden.tag == "control":
            x, behind = x.split((returned.shape[1], x.shape[1] - returned.shape[1]), 1)
            condition = Condition({**condition.tensors, "concat": behind})
        step = steps[number // per_step]
        t = step.long() if golden.call.process == "gaussian" else golden.call.convention.at_sigma(step / 1000)
        yield PipelineCall(arguments, returned, x, t.expand(len(x)), condition)


def _of(name: str) -> TinyPipeline:
    return next(each for each in PIPELINES if each.name == name)


GOLDENS = [
    *(Golden(each, dict(guidance_embeds=False) if each.name == "Flux2KleinPipeline" else {}) for each in PIPELINES if each.model in CALLS),
    Golden(_of("FluxPipeline"), dict(guidance_embeds=False), tag="schnell"),
    Golden(TinyPipeline("FluxControlPipeline", "FluxTransformer2DModel",
                        lambda: _size(prompt_embeds=draw(1, 10, 32), pooled_prompt_embeds=draw(1, 32), control_image=draw(1, 3, HEIGHT, WIDTH).sigmoid()),
                        vae=("AutoencoderKL", _KL | dict(latent_channels=1, scaling_factor=0.5, shift_factor=0.1))),
           dict(in_channels=8, out_channels=4), tag="control"),
    Golden(TinyPipeline("PixArtAlphaPipeline", "PixArtTransformer2DModel", lambda: _size(**_guided(10, 16, FLOAT, negative_prompt=None), **tiny_pipelines._PLAIN),
                        ("DPMSolverMultistepScheduler", {}), ("AutoencoderKL", _KL), lora=False),
           dict(sample_size=128, use_additional_conditions=True, attention_head_dim=6, cross_attention_dim=12), tag="1024"),
    Golden(TinyPipeline("Flux2Pipeline", "Flux2Transformer2DModel", lambda: _size(prompt_embeds=draw(1, 10, 32), guidance_scale=2.5),
                        vae=("AutoencoderKLFlux2", _KL | dict(latent_channels=1))), context=dict(guidance=2.5)),
    Golden(TinyPipeline("OvisImagePipeline", "OvisImageTransformer2DModel", lambda: _size(prompt_embeds=draw(1, 10, 32), guidance_scale=1.0),
                        vae=("AutoencoderKL", _KL | dict(latent_channels=1, shift_factor=0.1)))),
    Golden(TinyPipeline("LongCatImagePipeline", "LongCatImageTransformer2DModel", lambda: _size(prompt="", prompt_embeds=draw(1, 512, 32), enable_prompt_rewrite=False, guidance_scale=1.0),
                        vae=("AutoencoderKL", _KL | dict(latent_channels=16, shift_factor=0.1)), attributes=dict(check_inputs=lambda *given, **named: None)),
           dict(in_channels=64)),
    Golden(TinyPipeline("SanaSprintPipeline", "SanaTransformer2DModel",
                        lambda: _size(prompt_embeds=draw(1, 10, 8), prompt_attention_mask=torch.ones(1, 10), guidance_scale=3.0, use_resolution_binning=False),
                        ("SCMScheduler", {})), dict(guidance_embeds=True, timestep_scale=0.001), dict(guidance=3.0)),
    Golden(_of("HiDreamImagePipeline"), dict(force_inference_output=False), tag="training"),
    Golden(_of("CogVideoXPipeline"), _COG_TALL, tag="5B"),
    Golden(_of("CogVideoXPipeline"), _COG_TALL | dict(patch_size_t=2, patch_bias=False), tag="1.5"),
    Golden(TinyPipeline("WanPipeline", "WanTransformer3DModel", lambda: _clip(**_guided(10, 16)), tiny_pipelines._UNIPC, attributes={}), {},
           dict(time_per_token=True), "2.2-5B"),
]  # fmt: skip
