"""Distributions of gates: an independent categorical per group, or a subset of exact size with one logit per block.

A categorical is over all choices of a group, or over those that remove runs of consecutive blocks (`BlockGroup.runs`).

Shapes: B samples, K_g candidates and M_g blocks of group g, L = sum of M_g blocks. For subsets M counts the free blocks of a
group, of which K stay.
Sources: TinyFusion (arXiv 2412.01199), section 3, and Jang et al. arXiv 1611.01144 for the straight-through estimator of the
categorical; Chen & Liu, Statistica Sinica 7 (1997), for the distribution of subsets, Ahmed et al. arXiv 2210.01941 (SIMPLE) for
the gradient through its marginals, Xie & Ermon arXiv 1901.10517 and Kool et al. arXiv 1903.06059 for Gumbel top-K.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyfusion.blocks.scheme import BlockGroup
from tinyfusion.core.rng import Draws


class GateDistribution(nn.Module, ABC):
    """One independent distribution per group over the kept blocks, with learned logits theta_g."""

    meaning: str  # of `probabilities`, for the plan
    paired = False  # whether `surrogate` compares neighbours that differ in nothing but their masks

    def __init__(self, groups: Sequence[BlockGroup], sizes: Sequence[int], logit_init: float) -> None:
        super().__init__()
        self.groups = list(groups)
        self.logits = nn.ParameterList([nn.Parameter(torch.full((size,), logit_init)) for size in sizes])
        # the decision of a search within a training, as part of its state: the logits that were decided by, the gates of the
        # blocks that stay, 1 + the step, and the images of the trials that decided
        self.fixed_logits = nn.ParameterList([_constant(size) for size in sizes])
        self.fixed_gates = _constant(sum(g.size for g in groups))
        self.fixed_at = _constant(1)
        self.trial_images = _constant(1)
        self.tried: list[tuple[list[list[int]], float]] = []  # what the trials of this process compared, and the losses
        self._seen: tuple[int, int | None, list[list[int]]] | None = None

    @torch.no_grad()
    def fix(self, step: int, choice: Sequence[Sequence[int]] | None = None) -> None:
        """Fix the blocks from `step` on; what the optimiser's momentum does to logits later is ignored.

        choice: the kept blocks of every group. None: those that the logits select.
        """
        if choice is None:
            choice = [self.kept(index, theta) for index, theta in enumerate(self.logits)]
        for fixed, theta in zip(self.fixed_logits, self.logits, strict=True):
            fixed.copy_(theta)
        gates = [
            float(block in kept) for group, kept in zip(self.groups, choice, strict=True) for block in group.blocks
        ]
        self.fixed_gates.copy_(torch.tensor(gates))
        self.fixed_at.fill_(step + 1)

    @property
    def is_fixed(self) -> bool:
        """Whether the blocks are fixed."""
        return self.fixed_step is not None

    @property
    def fixed_step(self) -> int | None:
        """The step from which on the blocks are fixed; None if they are not."""
        return self._fixed()[0]

    @property
    def fixed_choice(self) -> list[list[int]]:
        """The fixed blocks of every group, ascending."""
        return self._fixed()[1]

    def _fixed(self) -> tuple[int | None, list[list[int]]]:
        """The step and the blocks; they are copied from the device only after a change."""
        version = self.fixed_at._version
        if self._seen is None or self._seen[0] != version:
            number, gates, blocks = int(self.fixed_at), self.fixed_gates.tolist(), []
            for group in self.groups:
                own, gates = gates[: group.size], gates[group.size :]
                blocks.append([block for block, gate in zip(group.blocks, own, strict=True) if gate])
            self._seen = version, number - 1 if number else None, blocks
        return self._seen[1:]

    def likeliest(self, num: int, scaling: float, share: float) -> list[list[list[int]]]:
        """Up to `num` joint choices by falling probability, each as the kept blocks of every group.

        share: choices less likely than this share of the likeliest are left out.
        """
        best: list[tuple[float, list[list[int]]]] = [(0.0, [])]
        for index, theta in enumerate(self.logits):
            own = self.ranked(index, theta.detach().float().cpu(), scaling, num)
            joint = [(total + level - own[0][0], [*before, kept]) for total, before in best for level, kept in own]
            best = sorted(joint, key=lambda each: -each[0])[:num]
        return [choice for level, choice in best if level >= math.log(share)]

    @abstractmethod
    def draw(self, draws: Draws) -> tuple[Tensor, ...]:
        """The noise that `sample` needs: one tensor (B, ...) per group."""

    @abstractmethod
    def sample(self, noise: Sequence[Tensor], temperature: float, scaling: float) -> Tensor:
        """Sampled gates (B, L): exactly 0 or 1 in the forward pass, with the estimator's gradient to the logits."""

    def surrogate(self, noise: Sequence[Tensor], scaling: float, losses: Tensor) -> Tensor | None:
        """Term (B,) whose gradient is added to that of the losses; None for estimators that differentiate the gates."""
        return None

    @abstractmethod
    def kept(self, index: int, theta: Tensor) -> list[int]:
        """The kept blocks of group `index` with logits `theta`, ascending."""

    @abstractmethod
    def ranked(self, index: int, theta: Tensor, scaling: float, num: int) -> list[tuple[float, list[int]]]:
        """The `num` likeliest choices of group `index`, with their log probabilities up to a constant, falling."""

    @abstractmethod
    def probabilities(self, index: int, theta: Tensor, scaling: float) -> list[float]:
        """Probabilities of group `index`, as `meaning` explains."""

    @abstractmethod
    def confidence(self, index: int, theta: Tensor, scaling: float, kept: Sequence[int] | None = None) -> list[float]:
        """Probability of the decision of group `index`: one number for the group, or one per kept block.

        kept: the decision. None: what the logits select.
        """


class CategoricalGates(GateDistribution):
    """p(candidate k of group g) = softmax(scaling * theta_g)_k, one independent categorical per group."""

    meaning = "probability of each candidate of each group, candidates in lexicographic order"

    def __init__(self, groups: Sequence[BlockGroup], logit_init: float = 0.02) -> None:
        super().__init__(groups, [g.num_candidates for g in groups], logit_init)
        if any(group.runs for group in groups):
            self.meaning = f"{self.meaning}; what a candidate removes are runs of consecutive blocks"
        for index, group in enumerate(self.groups):
            rows = torch.zeros(group.num_candidates, group.size)
            for row, kept in enumerate(group.candidates()):
                rows[row, [i - group.start for i in kept]] = 1.0
            self.register_buffer(f"candidates_{index}", rows, persistent=False)

    def candidates(self, group: int) -> Tensor:
        """(K_g, M_g) of 0 and 1, rows in lexicographic order of the kept positions."""
        return self.get_buffer(f"candidates_{group}")

    def draw(self, draws: Draws) -> tuple[Tensor, ...]:
        """Standard Gumbel noise (B, K_g) per group."""
        shapes = [tuple(theta.shape) for theta in self.logits]
        return tuple(torch.from_numpy(draws.gumbel(f"gumbel/{index}", shape)) for index, shape in enumerate(shapes))

    def sample(self, noise: Sequence[Tensor], temperature: float, scaling: float) -> Tensor:
        """Sampled gates (B, L) of all groups, by the straight-through Gumbel-softmax estimator.

        Gates of a group are y @ candidates, with y = onehot(argmax p) - sg(p) + p and
        p = softmax((scaling * theta + noise) / temperature); sg stops the gradient. Differs from the released code by
        staying in float32 under autocast.
        """
        gates = []
        for index, logits in enumerate(self.logits):
            relaxed = torch.softmax((scaling * logits + noise[index]) / temperature, dim=-1)
            hard = nn.functional.one_hot(relaxed.argmax(dim=-1), relaxed.shape[-1]).to(relaxed.dtype)
            with torch.autocast(relaxed.device.type, enabled=False):
                # (relaxed - relaxed.detach()) is exactly 0 forward, so the gates are exactly 0 or 1
                gates.append((hard + (relaxed - relaxed.detach())) @ self.candidates(index))
        return torch.cat(gates, dim=-1)

    def kept(self, index: int, theta: Tensor) -> list[int]:
        """The most probable candidate; the first of equals."""
        return list(self.groups[index].candidates()[int(torch.argmax(theta))])

    def probabilities(self, index: int, theta: Tensor, scaling: float) -> list[float]:
        """softmax(scaling * theta), (K_g), without temperature."""
        row: list[float] = torch.softmax(scaling * theta.detach().float(), dim=-1).tolist()
        return row

    def ranked(self, index: int, theta: Tensor, scaling: float, num: int) -> list[tuple[float, list[int]]]:
        """The candidates of the largest logits; the first of equals."""
        candidates, levels = self.groups[index].candidates(), (scaling * theta).tolist()
        rows = sorted(range(len(levels)), key=lambda row: -levels[row])[:num]
        return [(levels[row], list(candidates[row])) for row in rows]

    def confidence(self, index: int, theta: Tensor, scaling: float, kept: Sequence[int] | None = None) -> list[float]:
        """The probability of the decision; 1 / K_g is chance."""
        row = self.probabilities(index, theta, scaling)
        return [max(row) if kept is None else row[self.groups[index].candidates().index(tuple(kept))]]


# ---------------------------------------------------------------------------------------------------------------- subsets


def inclusion_table(z: Tensor, keep: int) -> Tensor:
    """(M, keep + 1): entry [i, k] is the probability that block i stays, given that k of the blocks 0 .. i do.

    z: (M,) scaled logits. Entries for an impossible k are never used.
    The recursion computes g_k = log e_k - log e_{k-1} from the elementary symmetric polynomials e_k of exp(z), instead
    of log e_k: g_k is of the magnitude of z and log e_k K times larger, too large for float32 at |z| = 100.
    """
    one, zero = z.new_ones(1), z.new_zeros(1)
    ratios = z.new_zeros(0)  # g_1 .. g_min(i, keep) of the blocks before i
    rows = []
    for i in range(len(z)):
        forced = one if i < keep else one[:0]
        row = torch.cat([zero, torch.sigmoid(z[i] - ratios), forced])
        rows.append(F.pad(row, (0, keep + 1 - len(row))))
        grown = torch.cat([torch.logaddexp(ratios, z[i]), z[i : i + 1] if i < keep else z[:0]])
        below = torch.cat([zero, -F.logsigmoid(ratios - z[i])])
        ratios = grown - below[: len(grown)]
    return torch.stack(rows)


def marginals(table: Tensor) -> Tensor:
    """(M,) probability that each block stays, from an `inclusion_table`; the sum is `keep`.

    The recursion goes from the last block to the first, over the distribution of the number of blocks that still have
    to stay. It only adds products of probabilities, so nothing over- or underflows, and the gradient is finite.
    """
    keep = table.shape[1] - 1
    reach = F.pad(table.new_ones(1), (keep, 0))
    kept = []
    for row in reversed(table.unbind()):
        taken = reach * row
        kept.append(taken.sum())
        reach = reach - taken + F.pad(taken[1:], (0, 1))
    return torch.stack(kept[::-1])


@torch.no_grad()
def draw_subsets(table: Tensor, uniforms: Tensor) -> Tensor:
    """(B, M) of 0 and 1, exact samples from the table; uniforms: (B, M) in (0, 1], one per sample and block."""
    left = torch.full(uniforms.shape[:1], table.shape[1] - 1, dtype=torch.int64, device=table.device)
    columns = []
    for i in reversed(range(table.shape[0])):
        taken = uniforms[:, i] <= table[i][left]  # uniforms are above 0 and at most 1, so the size is exact
        left = left - taken.long()
        columns.append(taken.to(table.dtype))
    return torch.stack(columns[::-1], dim=1)


def relaxed_top_k(keys: Tensor, keep: int, temperature: float) -> Tensor:
    """(B, M) relaxed top-K selection in [0, 1], rows summing to `keep`.

    It is the sum of `keep` softmaxes, each of which excludes what the earlier ones selected. keys: (B, M) perturbed
    logits. Source: arXiv 1901.10517, section 3.
    """
    total = 0 * keys
    for _ in range(keep):
        taken = torch.softmax(keys / temperature, dim=-1)
        total = total + taken
        keys = keys + torch.log((1 - taken).clamp(min=torch.finfo(keys.dtype).eps))
    return total


def largest_subsets(values: Sequence[float], keep: int, num: int) -> list[tuple[float, tuple[int, ...]]]:
    """The `num` subsets of `keep` positions with the largest sums, falling, as (sum, positions).

    One pass over the positions: of the subsets with equally many members only the best `num` can lead to one of the best, so at
    most `num` (keep + 1) are remembered.
    """
    best: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, ())], *([] for _ in range(keep))]
    for position, value in enumerate(values):
        for size in range(keep, 0, -1):
            grown = [(total + value, (*chosen, position)) for total, chosen in best[size - 1]]
            best[size] = sorted([*best[size], *grown], key=lambda each: -each[0])[:num]
    return best[keep]


class SubsetGates(GateDistribution):
    """One conditional Bernoulli per group: p(S) proportional to exp(sum of z_i for i in S) over the subsets S of K of M blocks.

    z = scaling * (theta - mean of theta). For budgets too large to enumerate: samples, marginals and their gradient are exact,
    in O(M K). Protected blocks have gate 1 and are not drawn.
    estimator "marginals": exact samples, and gates = sample + (pi - sg(pi)) with the marginals pi. "gumbel-top-k": the K
    largest of z + Gumbel noise, and the gradient of their relaxation; this samples without replacement in order of exp(z)
    (Plackett-Luce), with marginals close to pi but not equal, and the same mode. "score": the score function (REINFORCE,
    Williams 1992), unbiased: neighbours 2k and 2k + 1 differ in their masks alone, and each is the other's baseline. Gates then
    have no gradient, so dropped blocks are not run at all.
    """

    meaning = "marginal probability of each block of each group, of subsets with exactly N of its M blocks"

    def __init__(self, groups: Sequence[BlockGroup], logit_init: float = 0.02, estimator: str = "marginals") -> None:
        super().__init__(groups, [g.size for g in groups], logit_init)
        self.estimator = estimator
        self.paired = estimator == "score"

    def draw(self, draws: Draws) -> tuple[Tensor, ...]:
        """Uniform numbers or standard Gumbel noise (B, M_g) per group, float32."""
        draw, purpose = (draws.gumbel, "gumbel") if self.estimator == "gumbel-top-k" else (draws.uniform, "subset")
        noise = [torch.from_numpy(draw(f"{purpose}/{i}", (g.size,))) for i, g in enumerate(self.groups)]
        return tuple(drawn.float() for drawn in noise)

    def sample(self, noise: Sequence[Tensor], temperature: float, scaling: float) -> Tensor:
        """Sampled gates (B, L); `temperature` is that of the top-K relaxation, the other estimators ignore it."""
        columns = []
        for index, (group, theta) in enumerate(zip(self.groups, self.logits, strict=True)):
            free = _columns(group)
            drawn = noise[index][:, free]
            if not free:  # all protected: nothing to draw, and no gradient
                columns.append(drawn.new_ones(len(drawn), group.size) + 0 * theta.sum())
                continue
            z = scaled(group, theta, scaling)
            if self.estimator == "gumbel-top-k":
                relaxed = relaxed_top_k(z + drawn, group.keep_free, temperature)
                hard = torch.zeros_like(relaxed).scatter(1, (z + drawn).topk(group.keep_free).indices, 1.0)
            else:
                table, hard = _tabled_draw(group, z, noise[index])
                relaxed = hard if self.paired else marginals(table)
            gates = drawn.new_ones(len(drawn), group.size)
            gates[:, free] = hard + (relaxed - relaxed.detach())
            columns.append(gates)
        return torch.cat(columns, dim=-1)

    def surrogate(self, noise: Sequence[Tensor], scaling: float, losses: Tensor) -> Tensor | None:
        """For "score": (B,) (loss of n - loss of its neighbour) * log p(subset of n) up to a constant; else None."""
        if not self.paired:
            return None
        neighbour = torch.arange(len(losses), device=losses.device) ^ 1
        neighbour = neighbour.clamp(max=len(losses) - 1)  # the last may be alone
        advantage = (losses - losses[neighbour]).detach()
        total = torch.zeros_like(advantage)
        for group, theta, drawn in zip(self.groups, self.logits, noise, strict=True):
            if not group.free:
                continue
            z = scaled(group, theta, scaling)
            table, hard = _tabled_draw(group, z.detach(), drawn)
            total = total + (hard - marginals(table)) @ z  # the gradient of log p(S) to z is S - pi
        return advantage * total

    def kept(self, index: int, theta: Tensor) -> list[int]:
        """The most probable subset: the largest logits, the first of equals, and the protected blocks."""
        group = self.groups[index]
        values = theta.tolist()
        ranked = sorted(group.free, key=lambda block: -values[block - group.start])
        return list(group.first_of(ranked))

    @torch.no_grad()
    def probabilities(self, index: int, theta: Tensor, scaling: float) -> list[float]:
        """(M_g) marginals; 1 for protected blocks."""
        group = self.groups[index]
        row = torch.ones(group.size)
        if group.free:
            z = scaled(group, theta.cpu(), scaling)
            row[_columns(group)] = marginals(inclusion_table(z, group.keep_free))
        return [float(value) for value in row.tolist()]

    def ranked(self, index: int, theta: Tensor, scaling: float, num: int) -> list[tuple[float, list[int]]]:
        """The subsets of the largest sums of logits."""
        group = self.groups[index]
        if not group.free:
            return [(0.0, list(group.first_of([])))]
        best = largest_subsets(scaled(group, theta, scaling).tolist(), group.keep_free, num)
        return [(level, list(group.first_of([group.free[i] for i in chosen]))) for level, chosen in best]

    def confidence(self, index: int, theta: Tensor, scaling: float, kept: Sequence[int] | None = None) -> list[float]:
        """The marginal of every kept block, in their order; (N - P) / (M - P) is chance."""
        row, start = self.probabilities(index, theta, scaling), self.groups[index].start
        return [row[block - start] for block in (self.kept(index, theta) if kept is None else kept)]


def _constant(size: int) -> nn.Parameter:
    """Zeros that are saved with the state and not trained."""
    return nn.Parameter(torch.zeros(size), requires_grad=False)


def _columns(group: BlockGroup) -> list[int]:
    """Positions of the free blocks in a row of the group."""
    return [i - group.start for i in group.free]


def _tabled_draw(group: BlockGroup, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """`inclusion_table` of a group's free blocks, z (M,), and subsets of them (B, M) drawn with noise (B, M_g)."""
    table = inclusion_table(z, group.keep_free)
    return table, draw_subsets(table, noise[:, _columns(group)])


def scaled(group: BlockGroup, theta: Tensor, scaling: float) -> Tensor:
    """z (M,) of the free blocks of a group; centred, because p does not depend on the mean of theta."""
    free = theta[_columns(group)].float()
    return scaling * (free - free.mean())
