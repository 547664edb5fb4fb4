"""Prune width by importance, after Diff-Pruning (Fang et al., arXiv 2305.10924). Depth and number of heads stay.

Shapes: B calibration images. `blocks/widths.py` explains groups of channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.widths import ChannelGroup, WidthRules, channel_sums, nested
from tinyfusion.config.recipe import PruneSection
from tinyfusion.core.errors import UserError, prefixed
from tinyfusion.models.checkpoint import LoadedModel, make_trainable
from tinyfusion.processes.base import NoisyBatch, Process
from tinyfusion.prune.context import CriterionContext
from tinyfusion.prune.mask_search import short

_PASSES = 3  # of a step, in forward passes
_MEANING = (
    "per channel: sum over its weights of |w g|, g the gradient of the noise MSE summed over timesteps 0, 1, 2, ...; "
    "losses: that MSE per timestep"
)


def by_width(context: CriterionContext) -> PrunePlan:
    """Keep `prune.width_share` of the parameters: every block stays, with the most important channels of every group.

    All groups shrink by the same factor, heads by the same number of channels each. At equal importance the earlier
    channel stays. Cost: one calibration batch, the first, forward and backward at every timestep used. Raises UserError
    if the family's widths cannot be pruned, no width has that share, or the loss is not finite. Differs from the
    published scripts by ranking trained weights only, without the position table.
    """
    teacher, fixed = context.teacher, context.images.batches[0]
    wanted = check_width(teacher, context.settings)
    rules, model, losses = teacher.family.widths, teacher.copy(), []
    assert rules is not None
    make_trainable(model.module, teacher.family).eval()
    objective = context.images.objective
    if not objective.num_levels:
        raise UserError("criterion width sums gradients over levels of noise, and the process of this model has none")
    for loss in summed_gradients(model.module, objective, fixed, context.settings.width_threshold):
        losses.append(loss)
        context.tick(len(losses) * _PASSES * len(teacher.stack))
    scores = importance(model.module, rules, teacher.arch)
    kept = {name: most_important(scores[name], group) for name, group in wanted.items()}
    depths, images = teacher.stack.depths(), len(fixed)
    calibration = {
        **context.images.record(),
        "images": images,
        "distinct_images": min(images, context.images.distinct),
        "protocol": f"timesteps 0 to {len(losses) - 1}, one fixed noise per image, labels kept, float32",
    }
    return PrunePlan(
        kept={name: list(range(depth)) for name, depth in depths.items()},
        depth=depths,
        criterion="width",
        scores={
            "meaning": _MEANING,
            **nested({name: [short(value) for value in values.tolist()] for name, values in scores.items()}),
            "losses": [short(loss) for loss in losses],
            "calibration": calibration,
        },
        seed=context.seed,
        teacher=teacher.hash(),
        cost={"images": float(len(losses) * images)},
        kept_widths=nested(kept),
    )


def width_evaluations(context: CriterionContext) -> int:
    """Upper bound of block evaluations per calibration batch: all timesteps on one batch; a backward pass is two."""
    settings = context.settings
    batches = math.ceil(settings.calibration_images / settings.calibration_batch_size)
    return math.ceil(_PASSES * context.images.objective.num_levels * len(context.teacher.stack) / batches)


def check_width(teacher: LoadedModel, settings: PruneSection) -> dict[str, ChannelGroup]:
    """Channel groups of a student with `settings.width_share` of the parameters. Raises UserError if there is none."""
    rules = teacher.family.widths
    if settings.num_keep is not None:
        raise UserError(
            f"prune.num_keep {settings.num_keep} counts blocks, and criterion width keeps all: leave it out"
        )
    if rules is None:
        raise UserError(
            f"criterion width cannot prune models of family {teacher.family.name}: use one that removes blocks"
        )
    with prefixed("prune.width_share", ValueError):
        return rules.groups(rules.for_share(teacher.arch, settings.width_share))


def width_stand_in(teacher: LoadedModel, settings: PruneSection) -> PrunePlan:
    """A plan of the widths that criterion width will decide on, with other channels. Raises UserError as `check_width`."""
    wanted, rules, depths = check_width(teacher, settings), teacher.family.widths, teacher.stack.depths()
    assert rules is not None
    sizes = {name: group.size for name, group in rules.groups(teacher.arch).items()}
    kept = {name: most_important(torch.zeros(sizes[name]), group) for name, group in wanted.items()}
    return PrunePlan(
        kept={name: list(range(depth)) for name, depth in depths.items()},
        depth=depths,
        criterion="width",
        teacher=teacher.hash(),
        kept_widths=nested(kept),
    )


def summed_gradients(module: nn.Module, objective: Process, fixed: NoisyBatch, threshold: float) -> Iterator[float]:
    """Add up, in `.grad`, gradients of the noise MSE of `fixed` at timesteps 0, 1, 2, ...; yields each mean loss.

    Images, labels and noise are those of `fixed` (B), its timesteps are not used. Ends after the first loss below
    `threshold` times the largest so far; its gradient counts. Raises UserError if a loss is not finite.
    """
    module.zero_grad(set_to_none=True)
    largest = 0.0
    for t in range(objective.num_levels):
        noisy = objective.at_level(fixed, t)
        with torch.enable_grad():
            loss = objective.losses(module, noisy, objective.predict(module, noisy))["mse"].mean()
            loss.backward()
        mean = float(loss.detach())
        if not math.isfinite(mean):
            raise UserError(f"the teacher's loss at timestep {t} is {mean}: is it trained, and on such data?")
        yield mean
        largest = max(largest, mean)
        if mean < threshold * largest:
            return


def importance(module: nn.Module, rules: WidthRules, arch: object) -> dict[str, Tensor]:
    """Importance (channels,) per group: the sum of |w g| over the trained weights of a channel, g = `.grad`."""
    terms = {
        name: (parameter.detach() * parameter.grad).abs()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    return channel_sums(rules.axes(arch), rules.groups(arch), terms)


def most_important(scores: Tensor, group: ChannelGroup) -> list[int]:
    """Ascending indices of the `group.size` channels of greatest score, with equally many from every section."""
    by_section = scores.view(group.sections, -1)
    best = by_section.argsort(dim=1, descending=True, stable=True)[:, : group.size // group.sections]
    starts = by_section.shape[1] * torch.arange(group.sections).unsqueeze(1)
    return sorted(int(i) for i in (best + starts).flatten())
