"""CLIP score: how well images fit their prompts, by a CLIP model saved by transformers.

Shapes: N images, H x W pixels, C channels, uint8, channels last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tinyfusion.core.device import choose_device
from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import explained, read_json_object
from tinyfusion.core.tensors import read_folder_weights
from tinyfusion.evaluate.features import full_float32, hash_state
from tinyfusion.families.tensor_checks import check_finite
from tinyfusion.models.autoencoder import check_loaded, quiet_libraries
from tinyfusion.models.hub import transformers_folder

SCALE = 100.0  # of a cosine
_BUFFERS = "embeddings.position_ids"  # numbers 0, 1, ... in files of older versions, computed since
_FILES = ("config.json", "preprocessor_config.json")
_VOCABULARY = ("vocab.json", "merges.txt")
_BATCH_SIZE = 32


@dataclass(frozen=True)
class ClipScorer:
    """A CLIP model with its preparation of images and texts. hash: SHA-256 of its weights."""

    name: str
    hash: str
    model: Any
    images: Any
    tokenizer: Any
    device: torch.device

    @torch.no_grad()
    def scores(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """(N,) 100 max(cos, 0) of image i and prompt i; of videos (N, F, H, W, C) the mean over frames.

        Source: Hessel, Holtzman, Forbes, Le Bras, Choi, 2021 (arXiv 2104.08718), with the factor 100 that libraries use, not 2.5.
        Prompts beyond the model's length are truncated. Raises UserError where tokenizer, preparation and model do not go together.
        """
        try:
            return self._scores(images, prompts)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(f"the CLIP model {self.name} and its configuration do not go together: {error}") from error

    def _scores(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        frames = images.reshape(-1, *images.shape[-3:])
        per_image = len(frames) // max(len(images), 1)
        texts = self._texts(prompts)
        values: list[np.ndarray] = []
        with full_float32():
            for first in range(0, len(frames), _BATCH_SIZE):
                batch = frames[first : first + _BATCH_SIZE]
                pictures = [Image.fromarray(each[..., 0] if each.shape[-1] == 1 else each) for each in batch]
                pixels = self.images(pictures, return_tensors="pt")["pixel_values"].to(self.device)
                embedded = _unit(self.model.get_image_features(pixel_values=pixels))
                rows = torch.arange(first, first + len(batch)) // per_image
                values.append((embedded * texts[rows]).sum(-1).double().cpu().numpy())
        cosines = np.concatenate(values).clip(0)
        scores: np.ndarray = SCALE * cosines.reshape(len(images), per_image).mean(1)
        return scores

    def _texts(self, prompts: Sequence[str]) -> torch.Tensor:
        """(N, D) unit vectors; equal prompts are encoded once."""
        length = self.model.config.text_config.max_position_embeddings
        once, encoded = list(dict.fromkeys(prompts)), []
        for first in range(0, len(once), _BATCH_SIZE):
            batch = once[first : first + _BATCH_SIZE]
            tokens = self.tokenizer(batch, padding=True, truncation=True, max_length=length, return_tensors="pt")
            given = {name: tokens[name].to(self.device) for name in ("input_ids", "attention_mask")}
            encoded.append(_unit(self.model.get_text_features(**given)))
        places = {prompt: i for i, prompt in enumerate(once)}
        return torch.cat(encoded)[[places[prompt] for prompt in prompts]]


def _unit(output: Any) -> torch.Tensor:
    """Features of either side, of length 1. output: a tensor, or in newer versions an output that holds it."""
    features: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    lengths = features.norm(dim=-1, keepdim=True)
    if not bool((torch.isfinite(lengths) & (lengths > 0)).all()):
        raise ValueError("its features are not finite, or zero")
    return features / lengths


def open_clip(name: str, device: str) -> ClipScorer:
    """A CLIP model from a folder saved by transformers, or of the hub. device: by name.

    Weights are safetensors and go exactly with their configuration; no code of the folder is run. Raises UserError else.
    """
    folder = transformers_folder(name, "a CLIP model")
    for file in _FILES:
        if not (folder / file).is_file():
            raise UserError(f"{folder} is no CLIP model as transformers saves it: it has no {file}")
    if not (folder / "tokenizer.json").is_file() and not all((folder / each).is_file() for each in _VOCABULARY):
        raise UserError(f"{folder} has no tokenizer: wanted tokenizer.json, or {' and '.join(_VOCABULARY)}")
    if (kind := read_json_object(folder / "config.json").get("model_type")) != "clip":
        raise UserError(f"{folder} is a {kind!r} model, wanted a CLIP model")
    if not any(folder.glob("model*.safetensors")):
        raise UserError(f"{folder} holds no safetensors: wanted model.safetensors, whole or with an index")
    tensors, _ = read_folder_weights(folder, "model")
    check_finite(tensors, f"the weights in {folder} are damaged")
    weights = {key: value for key, value in tensors.items() if not key.endswith(_BUFFERS)}
    digest = hash_state({k: v.float() if v.dtype == torch.bfloat16 else v for k, v in weights.items()})
    del tensors, weights
    # of transformers, tokenizers, safetensors or json
    with explained(f"{folder} is no readable CLIP model", Exception), quiet_libraries():
        from transformers import CLIPModel, CLIPTokenizer  # late: seconds
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        load: Any = CLIPModel.from_pretrained
        # reported below
        settings = {"local_files_only": True, "use_safetensors": True, "ignore_mismatched_sizes": True}
        model, report = load(folder, **settings, dtype=torch.float32, output_loading_info=True)
        processor: Any = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
        tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    unexpected = [key for key in report.get("unexpected_keys") or () if not str(key).endswith(_BUFFERS)]
    check_loaded({**report, "unexpected_keys": unexpected}, folder)
    placed = choose_device(device)
    model.eval().requires_grad_(False).to(placed)
    label = Path(name).name if folder == Path(name) else name
    return ClipScorer(label, digest, model, processor, tokenizer, placed)
