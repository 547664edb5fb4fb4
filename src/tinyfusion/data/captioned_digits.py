"""Texts of scikit-learn's digits: ten words in six phrasings, 60 prompts, for models that are conditioned on texts.

Prompt number p is phrasing p % 6 of digit p // 6.
"""

from __future__ import annotations

import numpy as np

from tinyfusion.core.rng import Randomness
from tinyfusion.data.digits import ImageSet

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PHRASINGS = ("a handwritten {}", "the digit {}", "{}", "a {} by hand", "number {} in grey", "small picture of {}")
DIGIT_PROMPTS = tuple(phrasing.format(word) for word in DIGIT_WORDS for phrasing in PHRASINGS)
CAPTION_SEED = 0


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
