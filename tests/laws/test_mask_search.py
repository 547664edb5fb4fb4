"""The mask search equals cutting and running, mask by mask, and does no more work than it says."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import tiny_calibration
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_calibration import loss_of
from torch import Tensor, nn

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.scheme import BlockGroup
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.config.recipe import PruneSection
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.families.registry import FAMILIES
from tinyfusion.models.checkpoint import LoadedModel, new_model
from tinyfusion.models.facts import ModelFacts
from tinyfusion.processes.base import Batch, NoisyBatch, Prediction
from tinyfusion.prune.calibrate import Calibration, calibration_set
from tinyfusion.prune.context import CriterionContext
from tinyfusion.prune.criteria import decide
from tinyfusion.prune.mask_search import (
    LossSums,
    Mask,
    all_masks,
    mask_losses,
    plain_losses,
    random_masks,
    separate_evaluations,
    shared_evaluations,
)

ModelFactory = Callable[..., LoadedModel]
masks_of = st.sets(st.sets(st.integers(0, 5), min_size=1).map(lambda s: tuple(sorted(s))), min_size=1, max_size=8)


def calibrated(model: LoadedModel, images: int = 5, batch_size: int = 2) -> Calibration:
    return tiny_calibration.calibrated(model, images, batch_size, available=100)


# ------------------------------------------------------------------------------------------------------------ the losses


@settings(max_examples=8)
@given(masks=masks_of)
def test_losses_are_those_of_the_cut_models(tiny_model: ModelFactory, masks: set[Mask]) -> None:
    teacher = tiny_model(depth=6)
    calibration = calibrated(teacher)
    sums = mask_losses(teacher, calibration, sorted(masks))
    for mask, loss in zip(sorted(masks), sums.loss / sums.images, strict=True):
        plan = PrunePlan(kept={"blocks": list(mask)}, depth={"blocks": 6}, criterion="test")
        assert loss == pytest.approx(loss_of(teacher.cut(plan), calibration), rel=1e-5)


def test_losses_do_not_depend_on_the_batch_size(tiny_model: ModelFactory) -> None:
    teacher, masks = tiny_model(depth=6), all_masks([BlockGroup(0, 6, 3)])
    wanted = mask_losses(teacher, calibrated(teacher, 6, 6), masks)
    for batch_size in (1, 4, 6):
        found = mask_losses(teacher, calibrated(teacher, 6, batch_size), masks)
        assert found.images == 6
        np.testing.assert_allclose(found.loss, wanted.loss, rtol=1e-5)
        np.testing.assert_allclose(found.mse, wanted.mse, rtol=1e-5)


def test_a_stopped_search_goes_on(tiny_model: ModelFactory) -> None:
    teacher, masks = tiny_model(depth=4), all_masks([BlockGroup(0, 4, 2)])
    calibration = calibrated(teacher)
    kept: list[LossSums] = []
    whole = mask_losses(
        teacher,
        calibration,
        masks,
        keep=lambda s: kept.append(LossSums(s.loss.copy(), s.mse.copy(), s.images, s.batches)),
    )
    assert [s.batches for s in kept] == [1, 2, 3]
    for begun in kept:
        again = mask_losses(teacher, calibration, masks, begun=begun)
        assert (again.loss == whole.loss).all() and (again.mse == whole.mse).all()
        assert (again.images, again.batches) == (5, 3)


def test_the_model_is_left_as_it_was(tiny_model: ModelFactory) -> None:
    teacher = tiny_model(depth=4)
    blocks, before = list(teacher.stack), teacher.hash()
    mask_losses(teacher, calibrated(teacher), [(0, 1), (2,)])
    plain_losses(teacher, calibrated(teacher), (0, 3))
    assert all(a is b for a, b in zip(teacher.stack, blocks, strict=True))
    assert teacher.hash() == before
    with pytest.raises(ValueError, match="distinct and in lexicographic order"):
        mask_losses(teacher, calibrated(teacher), [(2,), (0, 1)])


# --------------------------------------------------------------------------------------------------------- the work done


@given(masks=masks_of)
def test_sharing_counts_distinct_prefixes(masks: set[Mask]) -> None:
    prefixes = {mask[:length] for mask in masks for length in range(1, len(mask) + 1)}
    assert shared_evaluations(list(masks)) == len(prefixes)
    assert separate_evaluations(list(masks)) == sum(map(len, masks))


@pytest.mark.parametrize(("depth", "keep", "wanted"), [(12, 6, 1715), (6, 3, 34), (4, 4, 4)])
def test_sharing_of_all_masks_in_closed_form(depth: int, keep: int, wanted: int) -> None:
    """A prefix of length j leaves keep - j blocks to come: binom(depth - keep + j, j) of them."""
    assert shared_evaluations(all_masks([BlockGroup(0, depth, keep)])) == wanted


def test_blocks_run_once_per_prefix(tiny_model: ModelFactory) -> None:
    teacher, masks = tiny_model(depth=6).copy(), all_masks([BlockGroup(0, 6, 3)])
    runs: Counter[int] = Counter()
    for index, block in enumerate(teacher.stack):
        block.norm1.register_forward_hook(lambda *_, index=index: runs.update([index]))
    ticks: list[int] = []
    mask_losses(teacher, calibrated(teacher), masks, ticks.append, prove=False)
    assert sum(runs.values()) == 3 * shared_evaluations(masks) == ticks[-1]
    assert ticks == sorted(ticks)


# --------------------------------------------------------------------------------------------------------- choosing masks


@pytest.mark.parametrize("groups", [[BlockGroup(0, 4, 2)], [BlockGroup(0, 3, 2, (1,)), BlockGroup(3, 3, 2)]])
def test_all_masks_are_all_in_order(groups: list[BlockGroup]) -> None:
    masks = all_masks(groups)
    blocks = [i for group in groups for i in group.blocks]
    wanted = [
        kept
        for kept in itertools.chain.from_iterable(itertools.combinations(blocks, n) for n in range(len(blocks) + 1))
        if all(set(g.protected) <= set(kept) and len(set(g.blocks) & set(kept)) == g.keep for g in groups)
    ]
    assert masks == sorted(wanted)
    assert random_masks(groups, len(masks), 3) == masks


@pytest.mark.parametrize(("size", "keep", "num"), [(28, 14, 300), (9, 4, 40), (6, 3, 12)])
def test_random_masks_are_distinct_and_addressed(size: int, keep: int, num: int) -> None:
    groups = [BlockGroup(0, size, keep, (0,))]
    masks = random_masks(groups, num, 5)
    assert masks == sorted(set(masks)) == random_masks(groups, num, 5)
    assert (masks == random_masks(groups, num, 6)) == (groups[0].num_candidates <= num)
    assert len(masks) == min(num, groups[0].num_candidates)
    assert all(len(mask) == keep and mask[0] == 0 and mask == tuple(sorted(set(mask))) for mask in masks)
    assert all(isinstance(i, int) for i in masks[0])


def test_random_masks_favour_no_block() -> None:
    masks = random_masks([BlockGroup(0, 28, 14)], 4000, 0)
    counts = Counter(i for mask in masks for i in mask)
    assert all(abs(counts[i] / 4000 - 0.5) < 5 * 0.5 / 4000**0.5 for i in range(28))


# ------------------------------------------------------------------------------------------------- other kinds of models


class Mix(nn.Module):
    """x + tanh(W [x, c])."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        values = Randomness(seed).at(0, 0, 1).normal("weights", (width, 2 * width))[0]
        self.weight = nn.Parameter(torch.from_numpy(values) / width**0.5)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x + torch.tanh(torch.cat([x, c.expand_as(x)], dim=-1) @ self.weight.T)


class TwoLists(nn.Module):
    """An encoder, and a decoder that is given the encoder's end as its condition, and reads it backwards."""

    def __init__(self, twisted: bool = False) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([Mix(4, seed) for seed in range(3)])
        self.decoder = nn.ModuleList([Mix(4, 10 + seed) for seed in range(4)])
        self.twisted = twisted

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = t.view(-1, 1, 1) + y.view(-1, 1, 1)
        for number, block in enumerate(self.encoder):
            x = block(x, c * number if self.twisted else c)
        middle = x
        x = x.flip(1)
        for block in self.decoder:
            x = block(x, middle)
        return x + middle


class Square:
    """Squared outputs as losses; nothing is drawn."""

    def draw(self, batch: Batch, draws: Draws) -> NoisyBatch:
        t = torch.from_numpy(draws.uniform("timestep")).float()
        return NoisyBatch(batch.x, batch.x, batch.x, t, batch.condition)

    def predict(self, model: nn.Module, noisy: NoisyBatch) -> Prediction:
        return Prediction(model(noisy.xt, noisy.t, noisy.condition["labels"].float()))

    def losses(self, _model: nn.Module, _noisy: NoisyBatch, prediction: Prediction) -> dict[str, Tensor]:
        return {"loss": prediction.output.square().flatten(1).mean(1)}


def two_lists(twisted: bool = False) -> tuple[LoadedModel, Calibration]:
    lists = {"encoder": "depth", "decoder": "depth"}
    family = dataclasses.replace(FAMILIES["dit"], name="two", block_lists=lists, computed={})
    arch = new_model(
        "dit", dict(input_size=4, patch_size=2, in_channels=1, hidden_size=4, depth=1, num_heads=1, num_classes=2), 0
    ).arch
    model = LoadedModel(TwoLists(twisted), family, arch, ModelFacts(image_size=4))

    def source(_step: int, _size: int, draws: Draws) -> Batch:
        return Batch(
            torch.from_numpy(draws.normal("x", (3, 4))), class_condition(torch.from_numpy(draws.integers("y", 2)), 2)
        )

    return model, calibration_set(Square(), source, "random", 100, 5, 2, 0)


def test_several_lists_of_blocks() -> None:
    model, calibration = two_lists()
    masks = all_masks([BlockGroup(0, 3, 2), BlockGroup(3, 4, 2)])
    sums = mask_losses(model, calibration, masks)
    for mask, loss in zip(masks, sums.loss, strict=True):
        assert loss == pytest.approx(plain_losses(model, calibration, mask)[0], rel=1e-6)
    assert len(set(sums.loss)) == len(masks)


@pytest.mark.parametrize(
    "criterion", ["bi", "flux-lite", "sensitivity", "first", "last", "random", "uniform", "min-loss"]
)
def test_every_list_keeps_its_own_share(criterion: str) -> None:
    model, calibration = two_lists()
    section = PruneSection(criterion=criterion, num_keep=2, protect=(1, 6))  # type: ignore[arg-type]
    kept = decide(CriterionContext(model, section, 0, calibration)).kept
    assert {name: len(listed) for name, listed in kept.items()} == {"encoder": 2, "decoder": 2}
    assert 1 in kept["encoder"] and 3 in kept["decoder"]


def test_blocks_that_depend_on_their_position_are_refused() -> None:
    model, calibration = two_lists(twisted=True)
    with pytest.raises(RuntimeError, match="blocks of two depend on their position"):
        mask_losses(model, calibration, all_masks([BlockGroup(0, 3, 2), BlockGroup(3, 4, 2)]))
