"""Texts of scikit-learn's digits: ten words in six phrasings, 60 prompts, for models that are conditioned on texts.

Prompt number p is phrasing p % 6 of digit p // 6.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from tinyfusion.core.rng import Randomness
from tinyfusion.data.batches import jitter
from tinyfusion.data.digits import ImageSet, load_digits
from tinyfusion.data.originals import Contents

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASINGS = ("a handwritten {}", "the digit {}", "{}", "a {} by hand", "number {} in grey", "small picture of {}")
DIGIT_PROMPTS = tuple(phrasing.format(word) for word in DIGIT_WORDS for phrasing in PHRASINGS)
CAPTION_SEED = 0
COPIES = 12  # of every training digit in the set of `encode`; half of them are moved a little


def digit_of(prompt: str) -> int | None:
    """The digit that a text names by its word; None where it names none or several."""
    named = [digit for digit, word in enumerate(DIGIT_WORDS) if word in prompt.lower().split()]
    return named[0] if len(named) == 1 else None


def captioned(images: ImageSet, copies: int) -> ImageSet:
    """The images `copies` times over, each copy of an image with the next phrasing; labels are numbers of prompts.

    The phrasing of the first copy is random, addressed by the image, so that a set of one copy has all phrasings.
    """
    first = (Randomness(CAPTION_SEED).at(0, 0, len(images)).uniform("phrasing") * len(PHRASINGS)).astype(np.int64)
    phrasings = [(first + copy) % len(PHRASINGS) for copy in range(copies)]
    labels = np.concatenate([images.y * len(PHRASINGS) + phrasing for phrasing in phrasings])
    return ImageSet(images.name, np.concatenate([images.x] * copies), labels, len(DIGIT_PROMPTS))


def jittered(images: ImageSet, copies: int) -> ImageSet:
    """`captioned`, a half of it turned, scaled and sheared a little."""
    made, randomness, num = captioned(images, copies), Randomness(CAPTION_SEED), len(images)
    parts = torch.from_numpy(made.x).split(num)
    moved = [jitter(part, randomness.at(copy, 0, num), 0.5) for copy, part in enumerate(parts)]
    return ImageSet(made.name, torch.cat(moved).numpy(), made.y, made.num_classes)


def captioned_pictures() -> tuple[list[str], Contents]:
    """Captions and PNGs of `COPIES` of the training digits, 8 x 8, grey."""
    images = jittered(load_digits(), COPIES)
    pixels = ((images.x[:, 0] + 1) * 127.5).round().clip(0, 255).astype(np.uint8)

    def contents(first: int, num: int) -> Iterator[tuple[str, bytes]]:
        for row in range(first, first + num):
            stream = io.BytesIO()
            Image.fromarray(pixels[row]).save(stream, format="PNG")
            yield f"digit {row}", stream.getvalue()

    return [DIGIT_PROMPTS[label] for label in images.y], contents
