"""Losses of very many masks under common noise; masks that share their first blocks share the work.

A dropped block does nothing, so the streams after some block are a function of the kept blocks so far: of a
prefix of the mask. Sorted masks are a walk through the tree of prefixes, and every distinct prefix is one block
evaluation. What a model does before its first block and after its last is not known here: it is run with stand-ins in
place of its blocks, once for many masks laid side by side. Nothing is approximated; results equal those of the cut
models to rounding.

Shapes: B samples of a calibration batch, M masks, T tokens, D width, L blocks of all lists together.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyfusion.blocks.scheme import BlockGroup
from tinyfusion.blocks.stack import BlockStack
from tinyfusion.blocks.streams import BlockCall, Streams
from tinyfusion.core.rng import Randomness
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import NoisyBatch
from tinyfusion.prune.calibrate import Calibration, Tick

States = tuple[Tensor | None, ...]  # the streams of a block
Mask = tuple[int, ...]  # kept blocks by global index, ascending
_SIDE_BY_SIDE_BYTES = (
    2**22
)  # residual streams that wait for the end of the model: more saves calls, fewer stay in cache
_ENUMERATED = 4  # where the space is not this many times as large as the sample, it is enumerated and shuffled
_HISTOGRAM_BINS = 60
_TOLERANCE = 1e-3  # relative, of the losses that a search checks itself on


def all_masks(groups: Sequence[BlockGroup]) -> list[Mask]:
    """Every mask, one choice per list, in lexicographic order."""
    return sorted(
        tuple(itertools.chain(*picked)) for picked in itertools.product(*(group.candidates() for group in groups))
    )


def random_masks(groups: Sequence[BlockGroup], num: int, seed: int) -> list[Mask]:
    """`num` distinct masks drawn uniformly, or all where there are no more, in lexicographic order."""
    total = math.prod(group.num_candidates for group in groups)
    if total <= _ENUMERATED * num:
        masks = all_masks(groups)
        order = Randomness(seed).permutation("masks", 0, total) if total > num else range(total)
        return sorted(masks[int(i)] for i in order[:num])
    found: dict[Mask, None] = {}
    for turn in itertools.count():
        draws = Randomness(seed).at(turn, 0, num)
        parts = []
        for index, group in enumerate(groups):
            order = np.argsort(draws.uniform(f"masks/{index}", (len(group.free),)), axis=1)[:, : group.keep_free]
            kept = np.array(group.free, dtype=np.int64)[order]
            fixed = np.tile(np.array(group.protected, dtype=np.int64), (num, 1))
            parts.append(np.sort(np.concatenate([kept, fixed], axis=1), axis=1))
        found.update(dict.fromkeys(map(tuple, np.concatenate(parts, axis=1).tolist())))
        if len(found) >= num:
            break
    return sorted(list(found)[:num])


def shared_evaluations(masks: Sequence[Mask]) -> int:
    """Block evaluations per batch with sharing: the distinct prefixes. The least there can be without approximation."""
    ordered = sorted(set(masks))
    previous = [(), *ordered[:-1]]
    return sum(len(mask) - shared_prefix(before, mask) for before, mask in zip(previous, ordered, strict=True))


def separate_evaluations(masks: Sequence[Mask]) -> int:
    """Block evaluations per batch where every mask is run on its own."""
    return sum(map(len, masks))


def shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


@dataclass
class LossSums:
    """Sums over the images of the first `batches` calibration batches, per mask: "loss" and "mse" (M,), float64."""

    loss: np.ndarray
    mse: np.ndarray
    images: int = 0
    batches: int = 0


@torch.inference_mode()
def mask_losses(
    model: LoadedModel,
    calibration: Calibration,
    masks: Sequence[Mask],
    tick: Tick = lambda done: None,
    begun: LossSums | None = None,
    keep: Callable[[LossSums], None] = lambda sums: None,
    prove: bool = True,
) -> LossSums:
    """Losses of `masks`, distinct and in lexicographic order, on the calibration set; the means are sums / images.

    begun: sums to go on from; keep: is given the sums after every batch. tick: is told of evaluated blocks. prove: compare two
    masks with the plain way first, on one batch; a caller with several rounds proves the first one.
    Raises ValueError on masks that are unsorted or named twice, and RuntimeError on a model whose blocks cannot be
    called one by one.
    """
    if any(a >= b for a, b in itertools.pairwise(masks)):
        raise ValueError("masks must be distinct and in lexicographic order")
    model.module.eval()
    sums = begun or LossSums(np.zeros(len(masks)), np.zeros(len(masks)))
    each = shared_evaluations(masks)
    if prove:
        _prove(model, calibration, masks)
    for number, noisy in enumerate(calibration.batches):
        if number < sums.batches:
            continue
        _SharedBatch(model, calibration, noisy).run(masks, sums, partial(tick_from, tick, number * each))
        sums.images += len(noisy)
        sums.batches += 1
        keep(sums)
    return sums


@torch.inference_mode()
def plain_losses(model: LoadedModel, calibration: Calibration, mask: Mask) -> tuple[float, float]:
    """Sums of "loss" and "mse" over the calibration set, with only the blocks of `mask` in place: the plain way."""
    loss = mse = 0.0
    model.module.eval()
    with _only(model.stack, mask):
        for noisy in calibration.batches:
            losses = calibration.objective.losses(
                model.module, noisy, calibration.objective.predict(model.module, noisy)
            )
            loss += float(losses["loss"].cpu().double().sum())
            mse += float(_mse(losses).cpu().double().sum())
    return loss, mse


def tick_from(tick: Tick, before: int, done: int) -> None:
    """`tick`, after `before` evaluations of earlier work."""
    tick(before + done)


def _mse(losses: Mapping[str, Tensor]) -> Tensor:
    """The squared error, the whole loss for processes that name none apart."""
    return losses.get("mse", losses["loss"])


def _prove(model: LoadedModel, calibration: Calibration, masks: Sequence[Mask]) -> None:
    """Two masks the plain way and this way, on one batch: a family may break what is assumed here."""
    tried = list(dict.fromkeys([masks[0], masks[-1]]))
    first = dataclasses.replace(calibration, batches=calibration.batches[:1])
    sums = LossSums(np.zeros(len(tried)), np.zeros(len(tried)))
    _SharedBatch(model, first, first.batches[0]).run(tried, sums, lambda done: None)
    plain = [plain_losses(model, first, mask)[0] for mask in tried]
    if not np.allclose(sums.loss, plain, rtol=_TOLERANCE, equal_nan=True):
        raise RuntimeError(f"blocks of {model.family.name} cannot be called one by one: {sums.loss} is not {plain}")


def loss_summary(losses: np.ndarray) -> dict[str, Any]:
    """Quantiles, and a histogram over the logarithm, of finite losses."""
    shares_below = {"min": 0.0, "q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95, "max": 1.0}
    low, high = float(losses.min()), float(losses.max())
    edges = np.geomspace(low, high, _HISTOGRAM_BINS + 1) if 0 < low < high else np.array([low, max(high, low + 1e-9)])
    edges[0], edges[-1] = low, max(high, edges[-1])
    counts = np.histogram(losses, edges)[0]
    return {
        "quantiles": {name: short(np.quantile(losses, share)) for name, share in shares_below.items()},
        "histogram": {"edges": [short(edge) for edge in edges], "counts": counts.tolist()},
    }


def bits(mask: Mask, depth: int) -> str:
    """A mask as text: one character per block, 1 for kept."""
    kept = set(mask)
    return "".join("1" if i in kept else "0" for i in range(depth))


def short(value: float) -> float | None:
    """Six digits; None where JSON has no number."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


# ------------------------------------------------------------------------------------------------- models with stand-ins


class _StandIn(nn.Module):
    """In place of a list of blocks like `block`: remembers the call that the model makes, and returns the streams `given`."""

    def __init__(self, block: nn.Module, streams: Streams) -> None:
        super().__init__()
        self.like = (block,)  # in a tuple: no submodule
        self.streams = streams
        self.given: States | None = None
        self.call: BlockCall | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.call = self.streams.call(self.like[0], args, kwargs)
        return self.streams.join(self.call.states if self.given is None else self.given)


@contextmanager
def _swapped(stack: BlockStack, blocks: Mapping[str, Sequence[nn.Module]]) -> Iterator[None]:
    """Other blocks in the lists of a model, which get their own back."""
    own = {name: stack.block_list(name) for name in stack.lists}

    def put(name: str, listed: nn.ModuleList) -> None:
        parent, _, attribute = name.rpartition(".")
        setattr(stack.model.get_submodule(parent), attribute, listed)

    try:
        for name in own:
            put(name, nn.ModuleList(blocks[name]))
        yield
    finally:
        for name, listed in own.items():
            put(name, listed)


@contextmanager
def _only(stack: BlockStack, mask: Mask) -> Iterator[None]:
    """Only the blocks of `mask`, without copying the model."""
    indices = iter(range(len(stack)))
    kept = {name: [b for b in stack.block_list(name) if next(indices) in mask] for name in stack.lists}
    with _swapped(stack, kept):
        yield


@dataclass(frozen=True)
class _State:
    """A node of the tree: the call of the next block, whose streams are those so far, and how earlier lists ended."""

    call: BlockCall
    ends: tuple[States, ...] = ()


class _SharedBatch:
    """The walk through the tree of prefixes for one calibration batch."""

    def __init__(self, model: LoadedModel, calibration: Calibration, noisy: NoisyBatch) -> None:
        self.module, self.stack, self.noisy = model.module, model.stack, noisy
        self.objective = calibration.objective
        self.blocks, self.streams = list(self.stack), self.stack.streams()
        depths = list(self.stack.depths().values())
        self.list_of = [number for number, depth in enumerate(depths) for _ in range(depth)]
        starts = [sum(depths[:number]) for number in range(len(depths))]
        self.stand_ins = [_StandIn(self.blocks[start], self.streams[start]) for start in starts]
        self.waiting: list[tuple[int, _State]] = []

    def run(self, masks: Sequence[Mask], sums: LossSums, tick: Tick) -> None:
        """Add the losses of sorted `masks` on this batch to `sums`."""
        with _swapped(self.stack, {n: [s] for n, s in zip(self.stack.lists, self.stand_ins, strict=True)}):
            states, done = [self._entered(0, ())], 0
            path: list[int] = []
            size = len(self.noisy)
            num_bytes = sum(state.nbytes for state in states[0].call.states if state is not None)
            together = max(1, _SIDE_BY_SIDE_BYTES // max(1, num_bytes))
            wide = _repeated(self.noisy, min(together, len(masks)))
            for position, mask in enumerate(masks):
                steps = self._steps(mask)
                shared = shared_prefix(path, steps)
                del states[shared + 1 :]
                for step in steps[shared:]:
                    states.append(self._after(states[-1], step))
                    done += step >= 0
                path = steps
                self.waiting.append((position, states[-1]))
                if len(self.waiting) == together or position == len(masks) - 1:
                    self._finish(first_samples(wide, len(self.waiting) * size), sums)
                    tick(done)

    def _steps(self, mask: Mask) -> list[int]:
        """Block by block; -k stands for going over into list k."""
        steps: list[int] = []
        for before, index in zip((mask[0], *mask[:-1]), mask, strict=True):
            if self.list_of[index] != self.list_of[before]:
                steps.append(-self.list_of[index])
            steps.append(index)
        return steps

    def _after(self, state: _State, step: int) -> _State:
        if step < 0:
            return self._entered(-step, (*state.ends, state.call.states))
        output = self.blocks[step](*state.call.args, **state.call.kwargs)
        return _State(state.call.with_states(self.streams[step].split(output)), state.ends)

    def _entered(self, number: int, ends: tuple[States, ...]) -> _State:
        """What list `number` is given where the lists before it ended with `ends`."""
        self._give(ends)
        self.objective.predict(self.module, self.noisy)
        call = self.stand_ins[number].call
        assert call is not None, "the model runs its lists of blocks"
        return _State(call, ends)

    def _finish(self, noisy: NoisyBatch, sums: LossSums) -> None:
        """The end of the model, and the losses, for all masks that wait, laid side by side along the batch axis."""
        positions = [position for position, _ in self.waiting]
        outputs = [(*state.ends, state.call.states) for _, state in self.waiting]
        self._give(
            [
                _side_by_side(listed, s.call)
                for listed, s in zip(zip(*outputs, strict=True), self.stand_ins, strict=True)
            ]
        )
        losses = self.objective.losses(self.module, noisy, self.objective.predict(self.module, noisy))
        for total, values in ((sums.loss, losses["loss"]), (sums.mse, _mse(losses))):
            total[positions] += values.view(len(positions), -1).cpu().double().sum(1).numpy()
        self.waiting.clear()

    def _give(self, outputs: Sequence[States]) -> None:
        for number, stand_in in enumerate(self.stand_ins):
            stand_in.given = outputs[number] if number < len(outputs) else None


def _side_by_side(listed: Sequence[States], call: BlockCall | None) -> States:
    """The streams of several masks, laid side by side along the axis of the images."""
    assert call is not None
    return tuple(
        None if any(part is None for part in parts) else torch.cat(parts, axis)
        for parts, axis in zip(zip(*listed, strict=True), call.axes, strict=True)
    )


def _repeated(noisy: NoisyBatch, times: int) -> NoisyBatch:
    """The batch `times` times over, side by side."""
    return noisy.each(lambda value: value.repeat(times, *[1] * (value.ndim - 1)))


def first_samples(noisy: NoisyBatch, num: int) -> NoisyBatch:
    """The first `num` samples of a batch."""
    return noisy.each(lambda value: value[:num])
