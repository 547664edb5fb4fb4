"""The masked autoregressive process: some tokens are known, and a small diffusion head generates each hidden token.

Shapes: B images, L tokens of E values each, m hidden and u = L - m known ones, r noise levels of each hidden token.
`model(x, **condition, known, hidden, rows, t, dropout)` returns (B, m, r, 2E).
Source: Li et al., arXiv 2406.11838. Differs: the share of hidden tokens is drawn once for the whole batch of a step, so that
it does not depend on the number of ranks; everything random is drawn outside of the model; rows of known tokens, whose
weight is 0, are not computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from scipy.special import ndtr, ndtri
from torch import Tensor, nn

from tinyfusion.blocks.tokens import taken, to_tokens
from tinyfusion.conditioning.classes import class_inputs
from tinyfusion.conditioning.condition import ModelInputs
from tinyfusion.config.process_sections import MaskedSection
from tinyfusion.core.rng import Draws
from tinyfusion.processes.base import Batch, NoiseAxis, NoisyBatch, Prediction, Process
from tinyfusion.processes.gaussian import NUM_TIMESTEPS, GaussianObjective, Schedule

_COSINE_OFFSET = 0.008
_LARGEST_BETA = 0.999


def cosine_betas() -> np.ndarray:
    """(1000,) float64: the squared-cosine schedule, beta_i = 1 - abar((i + 1) / 1000) / abar(i / 1000), at most 0.999.

    Source: Nichol & Dhariwal, arXiv 2102.09672, equation 17.
    """
    shares = np.arange(NUM_TIMESTEPS + 1, dtype=np.float64) / NUM_TIMESTEPS
    kept = np.cos((shares + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * np.pi / 2) ** 2
    betas: np.ndarray = np.minimum(1 - kept[1:] / kept[:-1], _LARGEST_BETA)
    return betas


@lru_cache(maxsize=8)
def head_schedule(spacing: str = "") -> Schedule:
    """The noise schedule of the diffusion head; cached, because its tables are moved to devices."""
    return Schedule(spacing, cosine_betas())


def hidden_ratio(uniform: float, lowest: float, std: float = 0.25) -> float:
    """The share of hidden tokens: the quantile of a normal around 1, truncated to [lowest, 1]."""
    low = float(ndtr((lowest - 1) / std))
    return min(1.0, 1 + std * float(ndtri(low + uniform * (0.5 - low))))


def num_hidden(ratio: float, num_tokens: int) -> int:
    """Number m of hidden tokens, at least 1."""
    return max(1, math.ceil(ratio * num_tokens))


@dataclass(frozen=True, kw_only=True)
class MaskedBatch(NoisyBatch):
    """A batch with hidden, noised tokens. xt, noise (B, m, r, E) and t (B, m, r) are of the hidden tokens."""

    known: Tensor  # (B, u) int64 places, ascending
    hidden: Tensor  # (B, m) int64 places, in the order of the permutation
    dropout_seeds: Tensor  # (B,) int64


@dataclass(frozen=True)
class MaskedObjective(Process):
    """Diffusion loss of the hidden tokens, given the known tokens: per image, the mean over its m r rows.

    A row is a hidden token at one noise level. All images of a step hide equally many tokens, so the mean over images
    equals the published sum(mask * row) / sum(mask). The process has no levels of noise (`num_levels` is 0).
    patch_size: side of a token in the input. label_drop: probability that a condition becomes the null row. inputs: the
    model's arguments for a condition.
    """

    patch_size: int
    label_drop: float = 0.1
    settings: MaskedSection = field(default_factory=MaskedSection)
    inputs: ModelInputs = class_inputs
    rows: GaussianObjective = field(init=False)  # a row as an image of E channels and one pixel

    def __post_init__(self) -> None:
        inner = GaussianObjective(0.0, head_schedule(), teacher_at_zero=self.settings.kl_at_zero == "teacher")
        object.__setattr__(self, "rows", inner)

    def draw(self, batch: Batch, draws: Draws) -> MaskedBatch:
        """Draw orders, the step's share of hidden tokens, noise and timestep of every row, and dropped conditions."""
        _, length, features = to_tokens(batch.x, self.patch_size).shape
        repeats = self.settings.diffusion_batch_mul
        # addressed as the first sample's: the same for all slices of the batch and all ranks
        ratio = Draws(draws.seed, draws.step, 0, 1).uniform("mask-ratio")[0]
        share = hidden_ratio(float(ratio), self.settings.mask_ratio_min, self.settings.mask_ratio_std)
        m = num_hidden(share, length)
        order = np.argsort(draws.uniform("order", (length,)), axis=1, kind="stable")
        hidden, known = order[:, :m], np.sort(order[:, m:], axis=1)
        rest: dict[str, np.ndarray] = {
            "known": known,
            "hidden": hidden,
            "t": draws.integers("row-timestep", len(self.rows.schedule), (m, repeats)),
            "noise": draws.normal("noise", (m, repeats, features)),
            "dropout_seeds": draws.words("dropout", 1)[:, 0].view(np.int64),
        }
        placed = {n: torch.from_numpy(np.ascontiguousarray(value)).to(batch.x.device) for n, value in rest.items()}
        return self.noised(Batch(batch.x, batch.condition.drop(draws, self.label_drop)), step=draws.step, **placed)

    def noised(
        self,
        batch: Batch,
        known: Tensor,
        hidden: Tensor,
        t: Tensor,
        noise: Tensor,
        dropout_seeds: Tensor | None = None,
        step: int = 0,
    ) -> MaskedBatch:
        """The batch noised with the given draws; conditions are unchanged."""
        clean = self._hidden_tokens(batch.x, hidden).unsqueeze(2).expand_as(noise)
        xt = self.rows.schedule.q_sample(_as_images(clean), t.reshape(-1), _as_images(noise)).view_as(noise)
        seeds = hidden.new_zeros(len(hidden)) if dropout_seeds is None else dropout_seeds
        return MaskedBatch(
            batch.x, noise, xt, t, batch.condition, step, known=known, hidden=hidden, dropout_seeds=seeds
        )

    def _hidden_tokens(self, x: Tensor, hidden: Tensor) -> Tensor:
        return taken(to_tokens(x, self.patch_size), hidden)

    def predict(self, model: nn.Module, noisy: NoisyBatch) -> Prediction:
        assert isinstance(noisy, MaskedBatch)
        rates = (self.settings.attention_dropout, self.settings.projection_dropout)
        dropout: Any = (noisy.dropout_seeds, *rates) if model.training and any(rates) else None
        drawn = {"known": noisy.known, "hidden": noisy.hidden, "rows": noisy.xt, "t": noisy.t, "dropout": dropout}
        return Prediction(model(noisy.x0, **self.inputs(noisy.condition), **drawn))

    def losses(self, model: nn.Module, noisy: NoisyBatch, prediction: Prediction) -> dict[str, Tensor]:
        """Per-image "loss" = mse + vb (in bits) with its two terms, each the mean over the rows of an image."""
        rows = self.rows.losses(model, self._as_rows(noisy), _prediction_rows(prediction))
        return _per_image(rows, len(noisy))

    def kd_terms(self, noisy: NoisyBatch, own: Prediction, taught: Prediction) -> dict[str, Tensor]:
        """Distillation loss of the head's outputs as in the Gaussian process, as means over the rows of an image."""
        rows = self.rows.kd_terms(self._as_rows(noisy), _prediction_rows(own), _prediction_rows(taught))
        return _per_image(rows, len(noisy))

    @property
    def noise_axis(self) -> NoiseAxis:
        return NoiseAxis("share of hidden tokens", 1.0, self.settings.mask_ratio_min)

    def noise_places(self, noisy: NoisyBatch) -> Tensor:
        """Places on the axis: the share of hidden tokens, which a whole batch has in common."""
        assert isinstance(noisy, MaskedBatch)
        num = noisy.hidden.shape[1]
        return torch.full((len(noisy),), num / (num + noisy.known.shape[1]), device=noisy.device)

    def _as_rows(self, noisy: NoisyBatch) -> NoisyBatch:
        """Every row as an image of E channels and one pixel; the condition, which losses do not read, is unchanged."""
        assert isinstance(noisy, MaskedBatch)
        clean = self._hidden_tokens(noisy.x0, noisy.hidden).unsqueeze(2).expand_as(noisy.noise)
        images = (_as_images(clean), _as_images(noisy.noise), _as_images(noisy.xt))
        return NoisyBatch(*images, noisy.t.reshape(-1), noisy.condition, noisy.step)


def _as_images(rows: Tensor) -> Tensor:
    """(B, m, r, E) -> (B m r, E, 1, 1)."""
    return rows.reshape(-1, rows.shape[-1], 1, 1)


def _prediction_rows(prediction: Prediction) -> Prediction:
    return Prediction(_as_images(prediction.output))


def _per_image(rows: dict[str, Tensor], num: int) -> dict[str, Tensor]:
    """Terms (B m r,) to their means (B,)."""
    return {name: value.view(num, -1).mean(1) for name, value in rows.items()}
