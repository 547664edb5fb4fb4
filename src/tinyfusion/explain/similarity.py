"""Linear CKA between the outputs of the blocks of two models on the same noised images.

Shapes: R rows (tokens of images), D1 and D2 widths, L1 and L2 blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tinyfusion.models.loaded import LoadedModel
from tinyfusion.processes.base import NoisyBatch, Process

LEAST_ROWS = 4096
ROWS_PER_CHANNEL = 8  # with few rows per channel, CKA is near 1 for any two outputs


def cka_matrix(own: Sequence[Tensor], others: Sequence[Tensor]) -> np.ndarray:
    """(L1, L2) linear CKA of every pair x (R, D1), y (R, D2): |Y'X|^2 / (|X'X| |Y'Y|) of centred columns, Frobenius norms.

    0 to 1; it does not change if columns are rotated or all scaled alike, so channels need not correspond. 0 where x or y is
    constant; NaN where the two have different numbers of rows, as those of different tokens.
    Source: Kornblith et al., arXiv 1905.00414, equation 3 with linear kernels.
    """
    sizes = [[_covariance(x, x) for x in side] for side in (own, others)]
    matrix = np.full((len(own), len(others)), math.nan)
    for i, x in enumerate(own):
        for j, y in enumerate(others):
            if len(x) == len(y):
                scale = sizes[0][i] * sizes[1][j]
                matrix[i, j] = _covariance(x, y) ** 2 / scale if scale > 0 else 0.0
    return matrix


def _covariance(x: Tensor, y: Tensor) -> float:
    """|Y'X| of centred columns, in float64: Frobenius norm."""
    x, y = (side.double() - side.double().mean(dim=0) for side in (x, y))
    return float((y.T @ x).norm())


@torch.no_grad()
def block_outputs(model: LoadedModel, objective: Process, batches: Sequence[NoisyBatch], rows: int) -> list[Tensor]:
    """Per block `rows` tokens of its outputs or a few more (R, D), float32 on the CPU, the same ones of every model.

    The tokens are evenly spread over all images and places; all of them where there are fewer.
    """
    outputs: list[list[Tensor]] = [[] for _ in range(len(model.stack))]
    model.module.eval()
    num_tokens = -(-rows // sum(map(len, batches)))  # of an image
    for noisy in batches:
        with model.stack.tap(range(len(outputs))) as tapped:
            objective.predict(model.module, noisy)
        for block, states in tapped.items():
            per_image = states.shape[1]
            every = max(1, per_image // num_tokens)
            while per_image > 1 and math.gcd(every, per_image) > 1:  # else some places of the images are never chosen
                every -= 1
            outputs[block].append(states.reshape(-1, states.shape[-1])[::every].float().cpu())
    return [torch.cat(listed) for listed in outputs]


def rows_for(width: int) -> int:
    """Rows that linear CKA of outputs of this width is computed from."""
    return max(LEAST_ROWS, ROWS_PER_CHANNEL * width)
