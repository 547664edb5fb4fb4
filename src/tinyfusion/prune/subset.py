"""SubsetGates: subsets of exact size per group, with one logit per block. For budgets too large to enumerate.

The distribution is the conditional Bernoulli: p(S) proportional to exp(sum of z_i for i in S) over the subsets S of K of
M blocks, z = scaling * (theta - mean of theta). Samples, marginals and their gradient are exact, in O(M K).

Shapes: B samples, M_g blocks of group g (M free ones, of which K stay), L = sum of M_g blocks.
Sources: Chen & Liu, Statistica Sinica 7 (1997), for the distribution; Ahmed et al. arXiv 2210.01941 (SIMPLE) for the
gradient through the marginals; Xie & Ermon arXiv 1901.10517 and Kool et al. arXiv 1903.06059 for Gumbel top-K.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyfusion.blocks.scheme import BlockGroup
from tinyfusion.core.rng import Draws
from tinyfusion.prune.gates import GateDistribution


def inclusion_table(z: Tensor, keep: int) -> Tensor:
    """(M, keep + 1): entry [i, k] is the probability that block i stays, given that k of the blocks 0 .. i do.

    z: (M,) scaled logits. Where k blocks of i + 1 cannot be, the entry is never reached.
    Carries g_k = log e_k - log e_{k-1}, the ratios of neighbouring elementary symmetric polynomials of exp(z), in place
    of log e_k: their size is that of z and not K times that, which is what float32 needs at |z| = 100.
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
    """(M,) probability of every block, from its `inclusion_table`; sums to `keep`.

    Walks the table from the last block, carrying the distribution over how many are still to stay: sums of products of
    probabilities, so nothing over- or underflows, and the gradient is finite.
    """
    keep = table.shape[1] - 1
    reach = F.pad(table.new_ones(1), (keep, 0))
    found = []
    for row in reversed(table.unbind()):
        taken = reach * row
        found.append(taken.sum())
        reach = reach - taken + F.pad(taken[1:], (0, 1))
    return torch.stack(found[::-1])


@torch.no_grad()
def draw_subsets(table: Tensor, uniforms: Tensor) -> Tensor:
    """(B, M) of 0 and 1, exact samples from the table; uniforms: (B, M) in (0, 1], one per sample and block."""
    left = torch.full(uniforms.shape[:1], table.shape[1] - 1, dtype=torch.int64, device=table.device)
    columns = []
    for i in reversed(range(table.shape[0])):
        taken = uniforms[:, i] <= table[i][left]  # 0 is never drawn and 1 always holds, so the size is exact
        left = left - taken.long()
        columns.append(taken.to(table.dtype))
    return torch.stack(columns[::-1], dim=1)


def relaxed_top_k(keys: Tensor, keep: int, temperature: float) -> Tensor:
    """(B, M) in [0, 1], rows summing to `keep`: the sum of `keep` softmaxes, each without what the ones before took.

    keys: (B, M) perturbed logits. Source: arXiv 1901.10517, section 3.
    """
    total = 0 * keys
    for _ in range(keep):
        taken = torch.softmax(keys / temperature, dim=-1)
        total = total + taken
        keys = keys + torch.log((1 - taken).clamp(min=torch.finfo(keys.dtype).eps))
    return total


class SubsetGates(GateDistribution):
    """One conditional Bernoulli per group. Protected blocks are gated with 1 and take no part in the draw.

    estimator "marginals": exact samples, and gates = sample + (pi - sg(pi)) with the marginals pi. "gumbel-top-k": the K
    largest of z + Gumbel noise, and the gradient of their relaxation; the sample is then one without replacement in
    order of exp(z) (Plackett-Luce), so its marginals are close to pi but not the same. The mode is the same. "score": the
    score function (REINFORCE, Williams 1992), unbiased: neighbours 2k and 2k + 1 differ in their masks alone, and each is the
    other's baseline. Gates then have no gradient, so what a mask drops is not run at all.
    """

    meaning = "marginal probability of each block of each group, of subsets with exactly N of its M blocks"

    def __init__(self, groups: Sequence[BlockGroup], logit_init: float = 0.02, estimator: str = "marginals") -> None:
        super().__init__(groups, [g.size for g in groups], logit_init)
        self.estimator = estimator
        self.paired = estimator == "score"

    def draw(self, draws: Draws) -> tuple[Tensor, ...]:
        """Uniform numbers or standard Gumbel noise (B, M_g) per group, float32."""
        if self.estimator == "gumbel-top-k":
            return tuple(torch.from_numpy(draws.gumbel(f"gumbel/{i}", (g.size,))) for i, g in enumerate(self.groups))
        return tuple(
            torch.from_numpy(draws.uniform(f"subset/{i}", (g.size,))).float() for i, g in enumerate(self.groups)
        )

    def sample(self, noise: Sequence[Tensor], temperature: float, scaling: float) -> Tensor:
        """Gates (B, L): 0/1 forward. The temperature is that of the relaxation; exact marginals have none."""
        parts = []
        for index, (group, theta) in enumerate(zip(self.groups, self.logits, strict=True)):
            free = _columns(group)
            drawn = noise[index][:, free]
            if not free:  # all protected: nothing to draw, and no gradient
                parts.append(drawn.new_ones(len(drawn), group.size) + 0 * theta.sum())
                continue
            z = scaled(group, theta, scaling)
            if self.estimator == "gumbel-top-k":
                relaxed = relaxed_top_k(z + drawn, group.keep_free, temperature)
                hard = torch.zeros_like(relaxed).scatter(1, (z + drawn).topk(group.keep_free).indices, 1.0)
            else:
                table, hard = _tabled_draw(group, z, noise[index])
                relaxed = hard if self.paired else marginals(table)
            gates = drawn.new_ones(len(drawn), group.size)
            # (relaxed - relaxed.detach()) is exactly 0 forward, so the gates are exactly 0 or 1.
            gates[:, free] = hard + (relaxed - relaxed.detach())
            parts.append(gates)
        return torch.cat(parts, dim=-1)

    def surrogate(self, noise: Sequence[Tensor], scaling: float, losses: Tensor) -> Tensor | None:
        """(B,): (loss of n - loss of its neighbour) * log p(subset of n) up to a constant, for "score"."""
        if not self.paired:
            return None
        neighbour = (torch.arange(len(losses), device=losses.device) ^ 1).clamp(
            max=len(losses) - 1
        )  # the last may be alone
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
        """The most probable subset: the largest logits, the first of equals, and what is protected."""
        group = self.groups[index]
        values = theta.tolist()
        ranked = sorted(group.free, key=lambda block: -values[block - group.start])
        return list(group.with_protected(ranked[: group.keep_free]))

    @torch.no_grad()
    def probabilities(self, index: int, theta: Tensor, scaling: float) -> list[float]:
        """(M_g) marginals; 1 for what is protected."""
        group = self.groups[index]
        found = torch.ones(group.size)
        if group.free:
            z = scaled(group, theta.cpu(), scaling)
            found[_columns(group)] = marginals(inclusion_table(z, group.keep_free))
        return [float(value) for value in found.tolist()]

    def confidence(self, index: int, theta: Tensor, scaling: float) -> list[float]:
        """The marginal of every kept block, in their order; (N - P) / (M - P) is chance."""
        row, start = self.probabilities(index, theta, scaling), self.groups[index].start
        return [row[block - start] for block in self.kept(index, theta)]


def _columns(group: BlockGroup) -> list[int]:
    """Where the free blocks stand in a row of the group."""
    return [i - group.start for i in group.free]


def _tabled_draw(group: BlockGroup, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """`inclusion_table` of a group's free blocks, z (M,), and the subsets of them (B, M) that its noise (B, M_g) draws."""
    table = inclusion_table(z, group.keep_free)
    return table, draw_subsets(table, noise[:, _columns(group)])


def scaled(group: BlockGroup, theta: Tensor, scaling: float) -> Tensor:
    """z (M,) of the free blocks of a group. Centred: p does not depend on the mean of theta, so nothing should drift."""
    free = theta[_columns(group)].float()
    return scaling * (free - free.mean())
