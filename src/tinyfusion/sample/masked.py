"""Sampler of the masked process: in each round more tokens become known.

Shapes: B images, L tokens of E values, D width of the decoder; k tokens predicted in a round.
Source: Li et al., arXiv 2406.11838, section 3.4, and the released sampler; guidance grows from round to round as there.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tinyfusion.blocks.tokens import from_tokens, taken, to_tokens
from tinyfusion.conditioning.condition import Condition, concat
from tinyfusion.config.recipe import SampleSection
from tinyfusion.core.errors import UserError, prefixed
from tinyfusion.models.loaded import LoadedModel
from tinyfusion.processes.base import Denoiser, mix_guidance
from tinyfusion.processes.gaussian import Schedule, sample_ancestral
from tinyfusion.processes.masked import head_schedule
from tinyfusion.sample.drive import WHOLE, SampleDraws, Sampler, check_guidance

PUBLISHED_ROUNDS = 256


def hidden_after(num_tokens: int, rounds: int) -> list[int]:
    """Number of hidden tokens after every round: floor(L cos(pi/2 (s + 1) / N)), falling by at least one, and 0 at the end.

    Raises UserError if there are more rounds than tokens.
    """
    if not 1 <= rounds <= num_tokens:
        raise UserError(
            f"--num-steps {rounds}: {num_tokens} tokens can be revealed in 1 to {num_tokens} rounds; got {rounds}"
        )
    counts = [num_tokens]
    for s in range(rounds - 1):
        planned = math.floor(num_tokens * math.cos(math.pi / 2 * (s + 1) / rounds))
        counts.append(max(1, min(counts[-1] - 1, planned)))
    return [*counts[1:], 0]


@dataclass(frozen=True)
class MaskedSampler(Sampler):
    """Settings of a trajectory.

    num_steps: rounds N, at most one per token. head_steps: of the diffusion head for a token, respaced from 1000 as in
    ancestral sampling. temperature: factor of the head's step noise. guidance: scale, 1 or more; 1 runs the conditional model
    alone. guidance_schedule: "linear" is 1 + (scale - 1) (L - n) / L in a round that leaves n hidden, "constant" the scale.
    clip: clamp the head's clean tokens to [-1, 1], for models of pixels; published models of latents do not, and a head with
    little training needs it: its first step multiplies errors by several hundred. timed: for timing, run only so many
    rounds, spread evenly; the other tokens stay 0. Raises ValueError on anything else.
    """

    num_steps: int = PUBLISHED_ROUNDS
    head_steps: int = 100
    temperature: float = 1.0
    guidance: float = 1.0
    guidance_schedule: Literal["linear", "constant"] = "linear"
    clip: bool = False
    timed: int | None = None

    def __post_init__(self) -> None:
        check_guidance(self.guidance, WHOLE)
        if self.num_steps < 1:
            raise ValueError(f"there must be at least 1 round; got {self.num_steps}")
        if self.timed is not None and not 1 <= self.timed <= self.num_steps:
            raise ValueError(f"of {self.num_steps} rounds 1 to {self.num_steps} can be timed; got {self.timed}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be below 0; got {self.temperature:g}")
        Schedule(str(self.head_steps))

    @property
    def calls(self) -> int:
        return self.timed or self.num_steps

    def of_steps(self, num_steps: int) -> MaskedSampler:
        """So many of the same rounds: fewer rounds for all tokens would have more tokens each."""
        return dataclasses.replace(self, timed=min(num_steps, self.num_steps))

    def made_rounds(self) -> list[int]:
        """Numbers of the rounds that are run: all, or `timed` evenly spread ones."""
        calls = self.calls
        return [(2 * part + 1) * self.num_steps // (2 * calls) for part in range(calls)]

    def describe(self, model: LoadedModel) -> str:
        how = f", {self.guidance_schedule}" if self.guidance > 1 else ""
        temperature = "" if self.temperature == 1 else f", temperature {self.temperature:g}"
        steps = f"{self.head_steps} head steps{' clipped' if self.clip else ''}{temperature}"
        return f"masked {self.num_steps} rounds, {steps} | guidance {self.guidance:g}{how}"

    def scale(self, num_tokens: int, hidden: int) -> float:
        """Guidance of the round that leaves `hidden` tokens hidden."""
        if self.guidance_schedule == "constant":
            return self.guidance
        return 1 + (self.guidance - 1) * (num_tokens - hidden) / num_tokens

    def trajectory(self, model: LoadedModel, condition: Condition, draws: SampleDraws) -> Iterator[Tensor]:
        """x after every round, hidden tokens 0. Raises UserError if there are more rounds than tokens."""
        arch = model.arch
        counts = [arch.num_tokens, *hidden_after(arch.num_tokens, self.num_steps)]
        order = self._order(draws, arch.num_tokens)
        tokens = torch.zeros(len(condition), arch.num_tokens, arch.token_features, device=condition.device)
        for position in self.made_rounds():
            ends = (counts[position], counts[position + 1])
            tokens = self._round(model, condition, draws, tokens, order, ends, position)
            yield from_tokens(tokens, arch.patch_size)

    def one_step(self, model: LoadedModel, condition: Condition, draws: SampleDraws) -> Callable[[], Tensor]:
        """The round in the middle, with all steps of the head, from noise for tokens."""
        arch = model.arch
        counts = [arch.num_tokens, *hidden_after(arch.num_tokens, self.num_steps)]
        middle = self.num_steps // 2
        order = self._order(draws, arch.num_tokens)
        tokens = to_tokens(draws.images(model), arch.patch_size)
        ends = (counts[middle], counts[middle + 1])
        return lambda: self._round(model, condition, draws, tokens, order, ends, middle)

    def _order(self, draws: SampleDraws, num_tokens: int) -> Tensor:
        """(B, L) int64: tokens are revealed from the end of their image's permutation."""
        return torch.from_numpy(draws.at(-1).uniform("sample-order", (num_tokens,)).argsort(axis=1)).to(draws.device)

    def _round(
        self,
        model: LoadedModel,
        condition: Condition,
        draws: SampleDraws,
        tokens: Tensor,
        order: Tensor,
        ends: tuple[int, int],
        position: int,
    ) -> Tensor:
        """The tokens after those at positions `ends[1]` to `ends[0]` of the order are revealed."""
        before, after = ends
        places = order[:, after:before]
        num, k, features = len(condition), before - after, tokens.shape[2]
        if self.guidance == 1:
            z, scale = _conditions(model, tokens, condition, order, before, places), None
        else:
            both = [torch.cat([values, values]) for values in (tokens, order, places)]
            z = _conditions(model, both[0], concat([condition, condition.null()]), both[1], before, both[2])
            scale = self.scale(tokens.shape[1], after)
        denoiser = _denoiser(model.module, z.flatten(0, 1), scale)
        # noise of an image: the start of the head, then one tensor per step but the last
        noise = draws.normal(position, (self.head_steps, k, features))

        def step_noise(step: int) -> Tensor:
            return self.temperature * noise[:, step + 1].reshape(num * k, features, 1, 1)

        start = noise[:, 0].reshape(num * k, features, 1, 1)
        steps = sample_ancestral(denoiser, head_schedule(str(self.head_steps)), start, step_noise, self.clip)
        revealed = deque(steps, maxlen=1).pop().view(num, k, features)
        return tokens.scatter(1, places.unsqueeze(-1).expand(-1, -1, features), revealed)


def _conditions(
    model: LoadedModel, tokens: Tensor, condition: Condition, order: Tensor, hidden: int, places: Tensor
) -> Tensor:
    """(B, k, D) at `places`, from the known tokens."""
    module: Any = model.module  # has `condition`, `z_proj` and `head`
    dtype = module.z_proj.weight.dtype
    known = order[:, hidden:].sort(dim=1).values
    inputs = model.family.inputs(condition)
    return taken(module.condition(tokens.to(dtype), known=known, hidden=order[:, :hidden], **inputs), places)


def _denoiser(module: Any, z: Tensor, scale: float | None) -> Denoiser:
    """The head for the tokens of z (N, D), as images of one pixel: (x (N, E, 1, 1), t (N,)) -> (N, 2E, 1, 1).

    With a scale z has the conditional half first; only the noise prediction is guided.
    """
    head = module.head
    conditions = head.conditions(z)
    dtype = conditions.dtype

    def run(x: Tensor, t: Tensor) -> Tensor:
        rows = x.flatten(1).to(dtype)
        out: Tensor = head(rows, t[:1], conditions).float()  # all rows are at one timestep
        return out[:, :, None, None]

    if scale is None:
        return run

    return lambda x, t: mix_guidance(run(torch.cat([x, x]), t), scale, x.shape[1])


def from_section(settings: SampleSection, model: LoadedModel) -> MaskedSampler:
    """The sampler of a recipe, with published defaults. Raises UserError on invalid settings."""
    if settings.sampler not in (None, "masked"):
        raise UserError(
            f"--sampler {settings.sampler} is not for models of family {model.family.name}: they take masked alone"
        )
    if settings.eta:
        raise UserError("sample.eta is not for sampler masked: it is for ddim")
    if settings.guidance_interval != WHOLE:
        raise UserError(
            "sample.guidance_interval is not for sampler masked: guidance has a schedule: sample.masked.guidance_schedule"
        )
    masked, num_tokens = settings.masked, model.arch.num_tokens
    rounds = min(masked.most_rounds, num_tokens) if settings.num_steps is None else settings.num_steps
    hidden_after(num_tokens, rounds)
    with prefixed("sampler masked", ValueError):
        return MaskedSampler(
            rounds, masked.head_steps, masked.temperature, settings.guidance, masked.guidance_schedule, settings.clip
        )


def cheap(settings: SampleSection, most_steps: int) -> SampleSection:
    """The same settings with at most `most_steps` rounds (or one per token), and at most so many steps of the head."""
    masked = dataclasses.replace(settings.masked, head_steps=min(settings.masked.head_steps, most_steps))
    if settings.num_steps is not None and settings.num_steps <= most_steps:
        return dataclasses.replace(settings, masked=masked)
    masked = dataclasses.replace(masked, most_rounds=min(masked.most_rounds, most_steps))
    return dataclasses.replace(settings, num_steps=None, masked=masked)
