"""Grids of images on the page: which are chosen, and what stands where a class has too few."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from tinyfusion.report.images import choose_images
from tinyfusion.report.load import Run, Samples
from tinyfusion.report.page import render

LABELS = np.array([3, 1, 3, 3, 1, 0])  # classes of one, two and three images


def shown_grid(images: np.ndarray) -> tuple[str, Image.Image]:
    """(kind, picture) of the only grid of a page."""
    page = render([Run((("run", {"verb": "sample"}),), samples={"model": Samples(images, LABELS)})], {})
    found = re.findall(r"data:image/(png|jpeg);base64,([\w+/=]+)", page)
    assert len(found) == 1
    return found[0][0], Image.open(io.BytesIO(base64.b64decode(found[0][1])))


def test_grids_show_the_first_images_of_each_class() -> None:
    chosen, columns = choose_images(LABELS, 6)
    assert columns == ["0", "1", "3"]
    assert chosen == [5, 1, 0, -1, 4, 2, -1, -1, 3]
    assert choose_images(None, 3) == ([0, 1, 2], ["", "", ""])


@pytest.mark.parametrize("channels", [1, 3])
def test_gaps_and_lines_of_large_images_are_white(channels: int) -> None:
    levels = np.array([10, 40, 70, 100, 130, 160], dtype=np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (6, 48, 48, channels))
    kind, picture = shown_grid(images)
    assert (kind, picture.mode, picture.size) == ("jpeg", "RGB", (3 * 65 + 1, 3 * 65 + 1))
    pixels = np.asarray(picture).astype(int)
    centres = pixels[33::65, 33::65]
    wanted = np.array([[160, 40, 10], [255, 130, 70], [255, 255, 100]])
    assert np.abs(centres - wanted[..., None]).max() <= 4, "JPEG rounds"
    assert pixels[98, 130].min() > 200, "the line between two dark images"


def test_gaps_and_lines_of_small_images_are_see_through() -> None:
    images = np.broadcast_to(np.arange(10, 70, 10, dtype=np.uint8)[:, None, None, None], (6, 8, 8, 1))
    kind, picture = shown_grid(images)
    assert (kind, picture.mode, picture.size) == ("png", "RGBA", (3 * 9 + 1, 3 * 9 + 1))
    pixels = np.asarray(picture)
    centres = pixels[5::9, 5::9]
    assert (centres[..., 3] > 0).tolist() == [[True] * 3, [False, True, True], [False, False, True]]
    assert centres[..., 0].tolist() == [[60, 20, 10], [0, 50, 30], [0, 0, 40]]
    for line in (pixels[9, :, 3], pixels[:, 9, 3]):  # the edges of the images, over the page below
        assert 0 < line.max() < 128
