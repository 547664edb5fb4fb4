"""Prompts to embeddings by the encoders of a pipeline of diffusers, through its own `encode_prompt`."""

from __future__ import annotations

import contextlib
import gc
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tinyfusion.conditioning.texts import EMBEDDINGS, MASK
from tinyfusion.core.errors import UserError, prefixed
from tinyfusion.core.files import sha256_of
from tinyfusion.core.reading import read_json_object
from tinyfusion.core.tensors import TYPES
from tinyfusion.families.diffusers_classes.folder import INDEX
from tinyfusion.jobs.pipeline_components import strict_components
from tinyfusion.jobs.pipelines import LENGTH, place_pipeline, refused, shorter_texts
from tinyfusion.models.autoencoder import quiet_libraries, quiet_logs

POOLED = "pooled"
_NULL = "null "  # before the name of what is encoded of a negative prompt
_E, _M, _P = EMBEDDINGS, MASK, POOLED
_NE, _NM, _NP = _NULL + _E, _NULL + _M, _NULL + _P
_GUIDED, _MASKED, _PLAIN = (_E, _NE), (_E, _M, _NE, _NM), (_E, None)

# what `encode_prompt` of a pipeline class returns, in order; None: not stored, since it is a formula of sizes
RESULTS: Mapping[str, tuple[str | None, ...]] = {
    **dict.fromkeys(("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxFillPipeline", "FluxControlPipeline",
                     "FluxKontextPipeline"), (_E, _P, None)),
    **dict.fromkeys(("Flux2Pipeline", "Flux2KleinPipeline", "LongCatImagePipeline"), _PLAIN),
    "OvisImagePipeline": (_E, _NE, None, None),
    "AuraFlowPipeline": (_E, None, _NE, None),  # a mask was multiplied into the embeddings
    **dict.fromkeys(("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
                    (_E, _NE, _P, _NP)),
    **dict.fromkeys(("PixArtAlphaPipeline", "PixArtSigmaPipeline", "SanaPipeline", "SanaPAGPipeline",
                     "SanaVideoPipeline", "LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline",
                     "LuminaPipeline", "Lumina2Pipeline", "AllegroPipeline", "PRXPipeline"), _MASKED),
    **dict.fromkeys(("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline", "Krea2Pipeline",
                     "SanaSprintPipeline"), (_E, _M)),
    **dict.fromkeys(("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline", "WanVACEPipeline", "SkyReelsV2Pipeline",
                     "CogVideoXPipeline", "CogVideoXImageToVideoPipeline", "CogVideoXVideoToVideoPipeline", "CogView3PlusPipeline",
                     "CogView4Pipeline", "ZImagePipeline", "ZImageImg2ImgPipeline", "CosmosTextToWorldPipeline"), _GUIDED),
    "HunyuanVideoPipeline": (_E, _P, _M),
    **dict.fromkeys(("ChromaPipeline", "ChromaImg2ImgPipeline"), (_E, None, _M, _NE, None, _NM)),
    "BriaPipeline": (_E, _NE, None),
    **dict.fromkeys(("HunyuanImagePipeline", "HunyuanVideo15Pipeline"), (_E, _M, "embeddings_2", "mask_2")),
    "HiDreamImagePipeline": (_E, _NE, "llama", "null llama", _P, _NP),
    "ErnieImagePipeline": (_E,),
}  # fmt: skip
_BATCH_AXES = {"llama": 1}  # where it is not the first
_ENCODERS = ("text_encoder", "tokenizer", "processor", "text_processor")  # beginnings of the names of components
_NOT_PASSED = {"self", "prompt", "device", "dtype", "num_images_per_prompt", "num_videos_per_prompt", "lora_scale",
               "do_classifier_free_guidance"}  # fmt: skip
_LARGEST_LENGTH = 10**6  # of a tokenizer without a limit transformers gives a larger number
MOST_AT_ONCE = 16  # prompts that are encoded at a time


def results_of(kind: Any) -> tuple[str | None, ...]:
    """What `encode_prompt` of a pipeline class returns. Raises UserError on classes that have no row."""
    row = RESULTS.get(kind.__name__)
    if row is None or not hasattr(kind, "encode_prompt"):
        raise UserError(
            f"what a {kind.__name__} encodes of prompts is not known here: there is {', '.join(sorted(RESULTS))}; write "
            "prompts.safetensors yourself, and give it as data.prompts"
        )
    return row


def takes_video(kind: Any) -> bool:
    """Whether a pipeline class draws videos."""
    return bool({"num_frames", "frames"} & set(inspect.signature(kind.__call__).parameters))


def encoding_arguments(kind: Any, max_tokens: int | None) -> dict[str, Any]:
    """The arguments of `encode_prompt` besides prompts: what a drawing passes by default, `max_tokens` in place of its length.

    Raises UserError where the class takes no length.
    """
    known, drawn = (inspect.signature(call).parameters for call in (kind.encode_prompt, kind.__call__))
    names = [name for name in known if name in drawn and name not in _NOT_PASSED and "prompt_" not in name]
    names = [name for name in names if not name.startswith("negative_") and not name.endswith("_embeds")]
    names += [name for name in ("prompt_template",) if name in known and name in drawn]
    given = {name: drawn[name].default for name in names}
    if not all(map(find_spec, ("bs4", "ftfy"))):  # by which pipelines clean captions
        given = {name: value for name, value in given.items() if name != "clean_caption"}
        given |= {"clean_caption": False} if "clean_caption" in known else {}
    if max_tokens is not None:
        if LENGTH not in known:
            raise UserError(f"a {kind.__name__} has no length of prompts to choose: leave encode.max_tokens out")
        given[LENGTH] = max_tokens
    elif LENGTH in known and LENGTH not in given:
        given[LENGTH] = known[LENGTH].default
    return {name: value for name, value in given.items() if value is not None and value is not inspect.Parameter.empty}


def encoder_parts(folder: Path) -> list[str]:
    """The components of a pipeline folder that encode prompts. Raises UserError where it has none."""
    index = read_json_object(folder / INDEX)
    parts = [
        name
        for name, value in index.items()
        if name.startswith(_ENCODERS) and isinstance(value, list) and len(value) == 2 and value[0] is not None
    ]
    if not any(name.startswith("text_encoder") for name in parts):
        raise UserError(f"{folder} has no text encoder: wanted a whole pipeline of diffusers")
    absent = [name for name in parts if not (folder / name).is_dir()]
    if absent:
        raise UserError(f"{folder / absent[0]} does not exist, and {INDEX} names it: the folder is incomplete")
    return parts


def encoders_hash(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of the components that encode prompts, by relative path."""
    files = [file for part in encoder_parts(folder) for file in sorted((folder / part).rglob("*")) if file.is_file()]
    return {file.relative_to(folder).as_posix(): sha256_of(file) for file in files}


@dataclass
class PromptEncoder:
    """The encoders of a pipeline, on a device; `encode` gives the tensors of prompts on the CPU."""

    pipeline: Any
    row: tuple[str | None, ...]
    arguments: Mapping[str, Any]
    device: torch.device

    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Tensors (n, ...) of n prompts by name, in the type of their encoder; masks are uint8."""
        return self._named(list(texts), negative=False)

    def null(self) -> dict[str, Tensor]:
        """Tensors (1, ...) of the null prompt: the empty prompt, as the pipeline encodes negative prompts where it does."""
        guided = any(name is not None and name.startswith(_NULL) for name in self.row)
        return self._named([""], negative=guided)

    def _named(self, texts: list[str], negative: bool) -> dict[str, Tensor]:
        known = inspect.signature(self.pipeline.encode_prompt).parameters
        switch: dict[str, Any] = (
            {"do_classifier_free_guidance": negative} if "do_classifier_free_guidance" in known else {}
        )
        switch |= {"device": self.device} if "device" in known else {}
        none = inspect.Parameter.empty
        switch |= {name: None for name, each in known.items() if name.startswith("prompt_") and each.default is none}
        problem = f"a {type(self.pipeline).__name__} does not encode prompts alone"
        with refused(problem), torch.no_grad(), quiet_logs():
            values = self.pipeline.encode_prompt(prompt=list(texts), **switch, **self.arguments)
        values = values if isinstance(values, tuple) and len(self.row) > 1 else (values,)
        if len(values) != len(self.row):
            raise UserError(
                f"encode_prompt of {type(self.pipeline).__name__} gives {len(values)} values, wanted {len(self.row)}: this version "
                "of diffusers differs"
            )
        wanted = {name: value for name, value in zip(self.row, values, strict=True) if name is not None}
        prefix = _NULL if negative else ""
        own = {name.removeprefix(_NULL): value for name, value in wanted.items() if name.startswith(_NULL) == negative}
        return _as_rows(own, len(texts), f"{prefix}prompts")

    def longer(self, texts: Sequence[str]) -> int:
        """Prompts of more tokens than the encoder of longest prompts reads; 0 where the limit is not known."""
        names = sorted(name for name in self.pipeline.components if name.startswith("tokenizer"))
        tokenizers = [each for name in names if (each := getattr(self.pipeline, name)) is not None]
        if not tokenizers:
            return 0
        others = [each for each in tokenizers if "CLIP" not in type(each).__name__]
        tokenizer = (others or tokenizers)[-1]
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # of a processor
        own = getattr(tokenizer, "model_max_length", _LARGEST_LENGTH)
        limit = self.arguments.get(LENGTH) if others else None
        limit = getattr(self.pipeline, "tokenizer_max_length", None) if limit is None and others else limit
        limit = own if limit is None else limit
        if not isinstance(limit, int) or limit >= _LARGEST_LENGTH:
            return 0
        with quiet_logs():
            return sum(len(ids) > limit for ids in tokenizer(list(texts), truncation=False)["input_ids"])


def _as_rows(values: Mapping[str, Any], num: int, what: str) -> dict[str, Tensor]:
    """Tensors with one row per prompt; a list of tensors is padded, with a mask; a mask that is None is of ones."""
    rows: dict[str, Tensor] = {}
    for name, value in values.items():
        if isinstance(value, list):
            longest = max(len(each) for each in value)
            mask = torch.zeros(len(value), longest, dtype=torch.uint8)
            for i, each in enumerate(value):
                mask[i, : len(each)] = 1
            rows[MASK] = mask
            value = torch.stack([torch.cat([e, e.new_zeros(longest - len(e), *e.shape[1:])]) for e in value])
        if isinstance(value, Tensor):
            value = value.movedim(_BATCH_AXES.get(name, 0), 0).detach().cpu()
            whole = not value.is_floating_point() or name.startswith(MASK)
            rows[name] = (value.to(torch.uint8) if whole else value).contiguous()
    for name, value in values.items():
        if value is None and name.startswith(MASK):
            rows[name] = torch.ones(rows[name.replace(MASK, EMBEDDINGS)].shape[:2], dtype=torch.uint8)
        elif name not in rows:
            raise UserError(f"the pipeline encodes no {name} of {what}: its folder lacks an encoder")
    for name, tensor in rows.items():
        if len(tensor) != num:
            raise UserError(f"the pipeline gives {name} {tuple(tensor.shape)} of {num} {what}: wanted a row of each")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).flatten(1).any(1).nonzero()[0])
            raise UserError(
                f"the {name} of {what} (number {bad} of a batch) are not finite: an encoder's weights or type are at fault"
            )
    return rows


@contextlib.contextmanager
def prompt_encoder(folder: Path, kind: Any, device: torch.device, max_tokens: int | None) -> Iterator[PromptEncoder]:
    """The encoders of a pipeline folder in the types of their files, on the device; freed at the end.

    A device that cannot hold all of them holds them in turn. Raises UserError where they cannot be opened.
    """
    if max_tokens is None and LENGTH in inspect.signature(kind.encode_prompt).parameters:
        max_tokens = shorter_texts(kind, folder)
    row, arguments = results_of(kind), encoding_arguments(kind, max_tokens)
    parts = encoder_parts(folder)
    index = read_json_object(folder / INDEX)
    others = [name for name, value in index.items() if isinstance(value, list) and name not in (*parts, "scheduler")]
    types = {part: dtype for part in parts if (dtype := _stored_type(folder / part)) is not None}
    skipped = {*index} - {*parts}
    with refused(f"diffusers does not open the text encoders of {folder} as of a {kind.__name__}"), quiet_libraries():
        networks = strict_components(folder, skipped, lambda part: types.get(part, torch.float32))
        pipeline = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False,
            dtype={**types, "default": torch.float32}, **dict.fromkeys(others), **networks,
        )  # fmt: skip
    place_pipeline(pipeline, device)
    try:
        yield PromptEncoder(pipeline, row, arguments, device)
    finally:
        for name in list(pipeline.components):
            setattr(pipeline, name, None)
        del pipeline
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _stored_type(folder: Path) -> torch.dtype | None:
    """The type of the first floating-point tensor in a component's files; None where it has no weights."""
    for file in sorted(folder.glob("*.safetensors")):
        unreadable = f"{file} is no readable safetensors file (truncated or foreign)"
        with prefixed(unreadable, Exception), safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # no mapping
                kind = TYPES.get(opened.get_slice(name).get_dtype())
                if kind is not None and kind.is_floating_point and kind.itemsize > 1:  # float8 needs scales
                    return kind
    return None


def header(kind: Any, encoder: PromptEncoder, files: Mapping[str, str], texts: int) -> dict[str, str]:
    """The strings in the header of a file of prompts: pipeline class, encoders, arguments, hash of every file."""
    parts = {
        name: type(part).__name__ for name, part in sorted(encoder.pipeline.components.items()) if part is not None
    }
    about = {
        "made_by": "tinyfusion", "pipeline": kind.__name__, "components": parts, "arguments": dict(sorted(encoder.arguments.items())),
        "num_prompts": texts, "null": "the empty prompt", "files": dict(files),
    }  # fmt: skip
    return {"tinyfusion": json.dumps(about, sort_keys=True, default=str)}
