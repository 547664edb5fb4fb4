"""CLIP score of drawn images: their prompts, by the labels in their npz, and the mean over images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinyfusion.core.errors import UserError
from tinyfusion.core.progress import progress
from tinyfusion.core.records import read_record
from tinyfusion.data.captioned_digits import digit_of
from tinyfusion.data.captions import read_prompts
from tinyfusion.data.image_source import ImageSource, read_labels
from tinyfusion.evaluate.clip import ClipScorer, open_clip
from tinyfusion.evaluate.features import DIGITS_FEATURES, FeatureExtractor

_READ_BYTES = 2**26  # of images at a time


@dataclass(frozen=True)
class PromptScores:
    """A CLIP model, and the prompt of every image."""

    scorer: ClipScorer
    prompts: Sequence[str]

    @property
    def name(self) -> str:
        """The score in a protocol."""
        return f"CLIP {self.scorer.name} {self.scorer.hash[:8]}"

    @property
    def inputs(self) -> dict[str, str]:
        """What the score depends on besides the images, for the plain recipe."""
        digest = hashlib.sha256(json.dumps(list(self.prompts)).encode()).hexdigest()
        return {"clip": self.scorer.hash, "texts": digest}

    def score(self, images: ImageSource) -> dict[str, Any]:
        """Mean and standard deviation over images, and the model."""
        per_image = int(np.prod(images.shape[1:], dtype=np.int64))
        size, values = max(1, _READ_BYTES // per_image), list[np.ndarray]()
        with progress("CLIP score", len(images), "images") as bar:
            done = 0
            for batch in images.read(size):
                values.append(self.scorer.scores(batch, self.prompts[done : done + len(batch)]))
                done += len(batch)
                bar(done)
        scores = np.concatenate(values)
        about = {"name": self.scorer.name, "hash": self.scorer.hash, "std": float(scores.std())}
        return {"clip_score": float(scores.mean()), "clip": about}


def open_prompt_scores(clip: str, samples: Path, images: ImageSource, file: Path | None, device: str) -> PromptScores:
    """The CLIP model `clip` (folder or hub id) and the prompts of the images.

    file: of the prompts; None: those in the record of the npz. Image i has the prompt of its label (arr_1). Raises UserError
    where an image has none, and where the record says that other prompts were drawn.
    """
    drawn = _drawn_prompts(samples)
    prompts = drawn if file is None else read_prompts(file)
    if prompts is None:
        raise UserError(
            f"{samples} has no record of prompts, which a CLIP score compares images with: give --prompts FILE"
        )
    if drawn is not None and drawn != prompts:
        raise UserError(
            f"{samples} was drawn from other prompts than {file} holds: leave out --prompts, or give that file"
        )
    if images.dtype != np.uint8 or images.shape[-1] not in (1, 3):
        raise UserError(
            f"a CLIP score is of uint8 images with 1 or 3 channels; {samples} has {images.dtype} {images.shape}"
        )
    labels = read_labels(samples)
    if labels is None:
        raise UserError(
            f"{samples} has no labels (arr_1), which say the prompt of every image: sample it with --prompts"
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise UserError(f"{samples}: labels in arr_1 are ({len(images)},) integers; got {labels.shape} {labels.dtype}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(prompts):
        raise UserError(f"{samples} has labels {labels.min()} to {labels.max()}, and there are {len(prompts)} prompts")
    return PromptScores(open_clip(clip, device), [prompts[label] for label in labels.tolist()])


def _drawn_prompts(samples: Path) -> list[str] | None:
    """The prompts in the record of an npz; None where there are none."""
    record = read_record(samples.with_suffix(".json")) if samples.suffix == ".npz" else None
    drawn = record.get("prompts") if isinstance(record, dict) else None
    return drawn if isinstance(drawn, list) and all(isinstance(each, str) for each in drawn) else None


def prompt_accuracy(samples: Path, images: ImageSource, extractor: FeatureExtractor) -> dict[str, float]:
    """The share of drawn digits that the classifier takes for those of their prompts, as {"prompt_accuracy": share}.

    Empty where the features are not those of the digits, and where a prompt names no digit.
    """
    prompts, labels = _drawn_prompts(samples), read_labels(samples)
    if extractor.name != DIGITS_FEATURES or not prompts or labels is None or labels.shape != (len(images),):
        return {}
    wanted = [digit_of(prompt) for prompt in prompts]
    if None in wanted or labels.dtype.kind not in "iu" or not 0 <= labels.min() <= labels.max() < len(prompts):
        return {}
    logits = [extractor(batch).logits for batch in images.read(extractor.batch_size)]
    named = np.array(wanted)[labels]
    return {
        "prompt_accuracy": float(
            (np.concatenate([each for each in logits if each is not None]).argmax(1) == named).mean()
        )
    }
