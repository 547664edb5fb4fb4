"""LPIPS of pairs of images, where the package `lpips` is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch

from tinyfusion.core.device import choose_device
from tinyfusion.core.fetching import fetching_forbidden
from tinyfusion.evaluate.features import full_float32

LEAST_PX = 64  # of a side: AlexNet's pools leave nothing of smaller images
Distances = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (N, H, W, C) uint8, twice, to (N,)


def open_lpips(device: str) -> Distances | str:
    """LPIPS of Zhang, Isola, Efros, Shechtman, Wang, 2018 (AlexNet, version 0.1), or why there is none."""
    if find_spec("lpips") is None:
        return "the package lpips is not installed"
    if fetching_forbidden():
        return "its network is not opened in a dry run"
    try:
        import lpips  # type: ignore[import-not-found]  # optional, and late: seconds

        network = lpips.LPIPS(net="alex", verbose=False)
    except Exception as error:  # of lpips, torchvision or the download of AlexNet
        return f"lpips does not open its AlexNet ({' '.join(str(error).split())[:200] or type(error).__name__})"
    place = choose_device(device)
    network.eval().requires_grad_(False).to(place)

    @torch.no_grad()
    def distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        sides = []
        for images in (left, right):
            pixels = torch.from_numpy(np.ascontiguousarray(images)).to(place).permute(0, 3, 1, 2).float()
            sides.append(pixels.expand(-1, 3, -1, -1) / 127.5 - 1)
        with full_float32():
            values: np.ndarray = network(*sides).flatten().double().cpu().numpy()
        return values

    return distances
