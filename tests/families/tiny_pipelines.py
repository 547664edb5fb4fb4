# ruff: noqa: E501
"""Pipelines of diffusers in small: a random transformer and a scheduler, no text encoder, prompts as random embeddings.

As a program, `python -I tiny_pipelines.py JOBS.json` draws with pipelines on disk, in a process that cannot import tinyfusion.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # isolated: neither the folder of this file nor PYTHONPATH is searched
    sys.modules["tinyfusion"] = None  # type: ignore[assignment]
    sys.path.insert(0, str(Path(__file__).parent))

import torch
from safetensors.torch import save_file
from tiny import GENERATOR, Tiny, draw
from tiny_images import IMAGES
from tiny_video import VIDEO
from torch import Tensor

STEPS = 2
FLOAT, BOOL = torch.float32, torch.bool
Made = tuple[str, Mapping[str, Any]]  # a class of diffusers and its configuration


@dataclass(frozen=True)
class TinyPipeline:
    """A pipeline in small.

    name: its class. model: its transformer, that of the classes in small. call: arguments of a drawing. vae: None where latents
    are drawn. attributes: set on the pipeline before it draws. lora: whether
    diffusers loads LoRAs into it.
    """

    name: str
    model: str
    call: Callable[[], dict[str, Any]]
    scheduler: Made = ("FlowMatchEulerDiscreteScheduler", {})
    vae: Made | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    lora: bool = True

    @property
    def tiny(self) -> Tiny:
        """Its transformer in small."""
        return next(each for each in (*IMAGES, *VIDEO) if each.name == self.model)

    @property
    def components(self) -> list[str]:
        """The components that its class takes: those that it has here, and those that are None."""
        import diffusers

        kind = getattr(diffusers, self.name)
        return sorted(kind._get_signature_keys(kind)[0])

    def build(self) -> Any:
        """The pipeline with random weights."""
        import diffusers

        parts: dict[str, Any] = dict.fromkeys(self.components)
        parts["scheduler"] = getattr(diffusers, self.scheduler[0])(**self.scheduler[1])
        parts["transformer"] = self.tiny.model()
        if self.vae is not None:
            torch.manual_seed(3)
            parts["vae"] = getattr(diffusers, self.vae[0])(**self.vae[1]).eval()
        return getattr(diffusers, self.name)(**parts)

    def drawn(self, pipeline: Any) -> Tensor:
        """What a pipeline of this class draws in two steps: the same at every call."""
        GENERATOR.manual_seed(5)
        pipeline.set_progress_bar_config(disable=True)
        for name, value in self.attributes.items():
            setattr(pipeline, name, value)
        for module in (pipeline.transformer, pipeline.vae):
            for tensor in [*module.parameters(), *module.buffers()] if module is not None else ():
                tensor.data = (
                    tensor.data.clone()
                )  # in memory of its own: kernels round by the alignment of a mapped file
        arguments = dict(output_type="latent" if self.vae is None else "pt", return_dict=False, num_inference_steps=STEPS,
                         generator=torch.Generator().manual_seed(0)) | self.call()  # fmt: skip
        image = pipeline(**arguments)[0]
        return torch.stack(list(image)) if isinstance(image, list) else image


def _size(**more: Any) -> dict[str, Any]:
    return dict(height=64, width=64) | more


def _clip(**more: Any) -> dict[str, Any]:
    return dict(height=64, width=64, num_frames=5) | more


def _guided(tokens: int, width: int, masks: torch.dtype | None = None, **more: Any) -> dict[str, Any]:
    """Embeddings of a prompt and a negative one, guidance between them, and attention masks of a type where there are any."""
    found = dict(
        prompt_embeds=draw(1, tokens, width), negative_prompt_embeds=draw(1, tokens, width), guidance_scale=3.0
    )
    if masks is not None:
        found |= dict.fromkeys(
            ("prompt_attention_mask", "negative_prompt_attention_mask"), torch.ones(1, tokens, dtype=masks)
        )
    return found | more


_KL = dict(latent_channels=4, block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
           up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=2)  # fmt: skip
_UNIPC = ("UniPCMultistepScheduler", dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0))
_DPM = ("DPMSolverMultistepScheduler", dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0))
_PLAIN = dict(use_resolution_binning=False)

PIPELINES = [
    TinyPipeline("FluxPipeline", "FluxTransformer2DModel",
                 lambda: _size(prompt_embeds=draw(1, 10, 32), pooled_prompt_embeds=draw(1, 32)),
                 vae=("AutoencoderKL", _KL | dict(latent_channels=1, scaling_factor=0.5, shift_factor=0.1))),
    TinyPipeline("Flux2KleinPipeline", "Flux2Transformer2DModel", lambda: _size(**_guided(10, 32)),
                 vae=("AutoencoderKLFlux2", _KL | dict(latent_channels=1))),
    TinyPipeline("StableDiffusion3Pipeline", "SD3Transformer2DModel",
                 lambda: _size(**_guided(10, 32), pooled_prompt_embeds=draw(1, 24), negative_pooled_prompt_embeds=draw(1, 24))),
    TinyPipeline("AuraFlowPipeline", "AuraFlowTransformer2DModel", lambda: _size(**_guided(10, 32, FLOAT))),
    TinyPipeline("QwenImagePipeline", "QwenImageTransformer2DModel",
                 lambda: _size(prompt_embeds=draw(1, 9, 16), negative_prompt_embeds=draw(1, 9, 16), true_cfg_scale=3.0,
                               prompt_embeds_mask=torch.ones(1, 9, dtype=torch.int64),
                               negative_prompt_embeds_mask=torch.ones(1, 9, dtype=torch.int64))),
    TinyPipeline("ZImagePipeline", "ZImageTransformer2DModel",
                 lambda: _size(prompt_embeds=list(draw(1, 20, 16)), negative_prompt_embeds=list(draw(1, 20, 16)), guidance_scale=3.0)),
    TinyPipeline("Lumina2Pipeline", "Lumina2Transformer2DModel", lambda: _size(**_guided(10, 16, BOOL))),
    TinyPipeline("SanaPipeline", "SanaTransformer2DModel", lambda: _size(**_guided(10, 8, FLOAT, negative_prompt=None), **_PLAIN), _DPM),
    TinyPipeline("PixArtSigmaPipeline", "PixArtTransformer2DModel", lambda: _size(**_guided(10, 16, FLOAT, negative_prompt=None), **_PLAIN),
                 ("DPMSolverMultistepScheduler", {}), ("AutoencoderKL", _KL), lora=False),
    TinyPipeline("CogView4Pipeline", "CogView4Transformer2DModel", lambda: _size(**_guided(16, 8))),
    TinyPipeline("HunyuanVideoPipeline", "HunyuanVideoTransformer3DModel",
                 lambda: _clip(prompt_embeds=draw(1, 10, 16), pooled_prompt_embeds=draw(1, 8), prompt_attention_mask=torch.ones(1, 10))),
    TinyPipeline("WanPipeline", "WanTransformer3DModel", lambda: _clip(**_guided(10, 16)), _UNIPC),
    TinyPipeline("LTXPipeline", "LTXVideoTransformer3DModel", lambda: _clip(**_guided(10, 16, FLOAT), num_frames=9)),
    TinyPipeline("MochiPipeline", "MochiTransformer3DModel", lambda: _clip(**_guided(16, 16, FLOAT), num_frames=7)),
    TinyPipeline("CogVideoXPipeline", "CogVideoXTransformer3DModel", lambda: _clip(**_guided(8, 8)), ("CogVideoXDDIMScheduler", {})),
    TinyPipeline("HiDreamImagePipeline", "HiDreamImageTransformer2DModel",
                 lambda: _size(prompt_embeds_t5=draw(1, 8, 8), prompt_embeds_llama3=draw(3, 1, 8, 4), negative_prompt_embeds_t5=draw(1, 8, 8),
                               negative_prompt_embeds_llama3=draw(3, 1, 8, 4), pooled_prompt_embeds=draw(1, 8),
                               negative_pooled_prompt_embeds=draw(1, 8), guidance_scale=3.0), attributes=dict(default_sample_size=8)),
    TinyPipeline("SkyReelsV2Pipeline", "SkyReelsV2Transformer3DModel", lambda: _clip(**_guided(10, 16)), _UNIPC),
    TinyPipeline("Kandinsky5T2VPipeline", "Kandinsky5Transformer3DModel",
                 lambda: _clip(prompt_embeds_qwen=draw(2, 16), prompt_embeds_clip=draw(1, 8), guidance_scale=1.0,
                               prompt_cu_seqlens=torch.tensor([0, 2], dtype=torch.int32))),
    TinyPipeline("Krea2Pipeline", "Krea2Transformer2DModel",
                 lambda: _size(prompt_embeds=draw(1, 6, 3, 16), prompt_embeds_mask=torch.ones(1, 6, dtype=torch.bool), guidance_scale=0.0)),
    TinyPipeline("ErnieImagePipeline", "ErnieImageTransformer2DModel",
                 lambda: _size(prompt_embeds=list(draw(1, 10, 16)), negative_prompt_embeds=list(draw(1, 10, 16)), guidance_scale=3.0)),
    TinyPipeline("PRXPipeline", "PRXTransformer2DModel", lambda: _size(**_guided(10, 16, BOOL), **_PLAIN), lora=False),
    TinyPipeline("SanaVideoPipeline", "SanaVideoTransformer3DModel",
                 lambda: dict(height=64, width=64, frames=5) | _guided(10, 16, FLOAT, negative_prompt=None) | _PLAIN, _DPM),
    TinyPipeline("BriaPipeline", "BriaTransformer2DModel", lambda: _size(**_guided(10, 32)),
                 vae=("AutoencoderKL", _KL | dict(latent_channels=1)), lora=False),
    TinyPipeline("HunyuanImagePipeline", "HunyuanImageTransformer2DModel",
                 lambda: _size(prompt_embeds=draw(1, 6, 16), prompt_embeds_mask=torch.ones(1, 6), prompt_embeds_2=draw(1, 4, 12),
                               prompt_embeds_mask_2=torch.ones(1, 4)), lora=False),
]  # fmt: skip


# ------------------------------------------------------------------------------------- a process that has diffusers alone


def _answer(job: Mapping[str, Any]) -> dict[str, Any]:
    """Draw with the pipeline of a folder, and with a LoRA loaded into it; tensors go to a file.

    The answer: names that the weights lack or have too many, and what was warned of while the LoRA was loaded.
    """
    import diffusers

    torch.set_num_threads(job["threads"])
    family = next(each for each in PIPELINES if each.name == job["name"])
    kind = getattr(diffusers, family.model)
    _, info = kind.from_pretrained(Path(job["folder"], "transformer"), output_loading_info=True)
    index = json.loads(Path(job["folder"], "model_index.json").read_text())
    absent = dict.fromkeys(name for name in family.components if index.get(name, [None])[0] is None)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(job["folder"], **absent)
    drawn, said = {"cut": family.drawn(pipeline)}, list[str]()
    if job["lora"] is not None:
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
        for name in ("diffusers", "peft"):
            logging.getLogger(name).addHandler(handler)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pipeline.load_lora_weights(job["lora"])
        said += [str(each.message) for each in caught]
        said = [
            each for each in said if "prefix='text_encoder" not in each
        ]  # said of every LoRA that changes the transformer alone
        drawn["lora"] = family.drawn(pipeline)
    save_file({name: tensor.contiguous() for name, tensor in drawn.items()}, job["out"])
    return {
        "class": type(pipeline).__name__,
        "loading": {name: list(value) for name, value in info.items()},
        "said": said,
    }


def _serve() -> None:
    """Answer the jobs of standard input, a line of JSON each."""
    for line in sys.stdin:
        try:
            answer = _answer(json.loads(line))
        except Exception as error:  # a fault of any library: the test shows it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
