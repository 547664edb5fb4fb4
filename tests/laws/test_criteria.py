"""Every criterion that trains nothing: exact counts, protection, determinism, and statistics against plain recomputation."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tiny_calibration import calibrated, loss_of

from tinyfusion.blocks.plan import PrunePlan, plan_from_json
from tinyfusion.blocks.scheme import BlockGroup
from tinyfusion.conditioning.condition import concat
from tinyfusion.config.recipe import PruneSection
from tinyfusion.core.errors import UserError
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.prune import mask_search
from tinyfusion.prune.calibrate import Calibration
from tinyfusion.prune.context import CriterionContext, bk_sdm_positions
from tinyfusion.prune.criteria import CRITERIA, decide, evenly_spaced, searched
from tinyfusion.prune.mask_search import Mask, all_masks, bits, plain_losses, shared_evaluations

ModelFactory = Callable[..., LoadedModel]
DEPTHS = [7, 14, 19, 28]
PUBLISHED = [0, 2, 4, 6, 8, 10, 12, 15, 17, 19, 21, 23, 25, 27]
COUNTED = [name for name in CRITERIA if name not in ("indices", "width", "bk-sdm")]


def criterion_context(
    model: LoadedModel, criterion: str, calibration: Calibration | None = None, **more: Any
) -> CriterionContext:
    settings = PruneSection(**{"criterion": criterion, "num_masks": 4, **more})
    return CriterionContext(model, settings, 0, calibration or calibrated(model))


def plan(model: LoadedModel, criterion: str, calibration: Calibration | None = None, **more: Any) -> PrunePlan:
    return decide(criterion_context(model, criterion, calibration, **more))


def without(model: LoadedModel, kept: list[int]) -> LoadedModel:
    return model.cut(PrunePlan(kept={"blocks": kept}, depth=model.stack.depths(), criterion="test"))


# ----------------------------------------------------------------------------------------------------- of every criterion


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("criterion", COUNTED)
def test_count_range_protection_and_record(tiny_model: ModelFactory, criterion: str, depth: int) -> None:
    teacher = tiny_model(depth=depth)
    calibration = calibrated(teacher)
    half = (depth + 1) // 2
    made = plan(teacher, criterion, calibration)
    assert len(made.kept["blocks"]) == half
    for num_keep, protect in ((2, (depth - 1, depth // 3)), (depth - 1, (3,))):
        made = plan(teacher, criterion, calibration, num_keep=num_keep, protect=protect)
        kept = made.kept["blocks"]
        assert len(kept) == num_keep
        assert kept == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < depth
        assert set(protect) <= set(kept)
    assert made.criterion == criterion and made.seed == 0 and made.teacher == teacher.hash()
    assert made.scores["meaning"] and made.cost["seconds"] > 0
    assert plan_from_json(json.loads(json.dumps(made.to_json(), allow_nan=False))) == made
    assert len(teacher.cut(made).stack) == depth - 1
    looks = CRITERIA[criterion].evaluations is not None
    assert (made.cost["images"] > 0) is looks is ("calibration" in made.scores)


@pytest.mark.parametrize("depth", DEPTHS)
def test_bk_sdm_follows_its_rule(tiny_model: ModelFactory, depth: int) -> None:
    teacher = tiny_model(depth=depth)
    made = plan(teacher, "bk-sdm")
    assert made.kept["blocks"] == bk_sdm_positions(depth)
    assert plan(teacher, "bk-sdm", num_keep=len(made.kept["blocks"])).kept == made.kept
    assert {1, depth - 2} <= set(plan(teacher, "bk-sdm", protect=(1, depth - 2)).kept["blocks"])


@pytest.mark.parametrize("criterion", [*COUNTED, "bk-sdm"])
def test_the_same_question_has_one_answer(tiny_model: ModelFactory, criterion: str) -> None:
    """Also where calibration images come in other batches; the scores then agree to rounding."""
    teacher = tiny_model(depth=7)
    first, again = (plan(teacher, criterion) for _ in range(2))
    assert first.kept == again.kept and first.scores == again.scores
    other = plan(teacher, criterion, calibrated(teacher, batch_size=2))
    assert other.kept == first.kept
    assert other.cost["images"] == first.cost["images"]


def test_random_depends_on_the_seed_alone(tiny_model: ModelFactory) -> None:
    settings = PruneSection(criterion="random")
    kept = [
        decide(CriterionContext(tiny_model(model, depth=14), settings, seed)).kept["blocks"]
        for model, seed in ((0, 0), (1, 0), (0, 1))
    ]
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize("criterion", ["bi", "flux-lite", "sensitivity", "min-loss"])
def test_progress_ends_where_it_was_announced(tiny_model: ModelFactory, criterion: str) -> None:
    teacher = tiny_model(depth=5)
    for order in ("one-shot", "greedy"):
        ticks: list[int] = []
        context = criterion_context(teacher, criterion, calibrated(teacher, 4, 2), sensitivity_order=order)
        announced = CRITERIA[criterion].evaluations
        assert announced is not None
        decide(CriterionContext(teacher, context.settings, 0, context.images, ticks.append))
        assert ticks == sorted(ticks) and ticks[-1] == 2 * announced(context)


def test_a_search_in_rounds_is_proved_once(tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    proofs: list[Mask] = []

    def plain(*args: Any) -> tuple[float, float]:
        proofs.append(args[2])
        return plain_losses(*args)

    monkeypatch.setattr(mask_search, "plain_losses", plain)
    plan(tiny_model(depth=5), "sensitivity", sensitivity_order="greedy", num_keep=2)
    assert proofs == [(0, 1, 2, 3), (1, 2, 3, 4)]  # the first and the last mask of the first round


@pytest.mark.parametrize(
    ("criterion", "more", "message"),
    [
        ("bi", {"num_keep": 8}, "1 to 7 of them can stay"),
        ("random", {"protect": (7,)}, r"--protect \[7\] out of range: the model has blocks 0 to 6"),
        ("first", {"protect": (-1,)}, r"--protect \[-1\] out of range"),
        ("last", {"num_keep": 1, "protect": (0, 1)}, "protect fewer, or give --num-keep 2"),
        ("bk-sdm", {"num_keep": 5}, "rule keeps 4 of the 7 blocks in list blocks, not 5"),
        ("bk-sdm", {"bk_sdm_list": "old"}, "a list for 28 blocks, and here are 7"),
        ("indices", {"keep": (0, 1), "protect": (2,)}, r"leaves out the protected blocks \[2\]"),
    ],
)
def test_questions_without_an_answer(
    tiny_model: ModelFactory, criterion: str, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan(tiny_model(depth=7), criterion, **more)


# --------------------------------------------------------------------------------------------------------- calibration set


def test_every_timestep_once_and_no_label_dropped(tiny_model: ModelFactory) -> None:
    """A thousand images have each of the thousand timesteps once; any number is spread as evenly."""
    model = tiny_model()
    t = torch.cat([n.t for n in calibrated(model, 1000, 300).batches])
    assert t.sort().values.equal(torch.arange(1000))
    few = torch.cat([n.t for n in calibrated(model, 8).batches]).sort().values
    assert (few // 125).tolist() == list(range(8))
    assert all(bool((n.condition["labels"] < model.arch.num_classes).all()) for n in calibrated(model, 300).batches)


def test_calibration_does_not_depend_on_batches(tiny_model: ModelFactory) -> None:
    one, many = (calibrated(tiny_model(), 7, size).batches for size in (7, 2))
    for name in ("x0", "xt", "noise", "t"):
        assert torch.cat([getattr(n, name) for n in many]).equal(getattr(one[0], name))
    assert concat([n.condition for n in many])["labels"].equal(one[0].condition["labels"])
    record = calibrated(tiny_model(), 7).record()
    assert (record["images"], record["distinct_images"]) == (7, 3)


# -------------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("clean", [False, True])
def test_block_statistics_are_what_they_say(tiny_model: ModelFactory, clean: bool) -> None:
    teacher = tiny_model(depth=5)
    calibration = calibrated(teacher, 6, 4)
    cosines: list[list[torch.Tensor]] = [[] for _ in range(5)]
    changes: list[list[torch.Tensor]] = [[] for _ in range(5)]
    with torch.no_grad():
        for noisy in calibration.batches:
            x, t = (noisy.x0, noisy.t // 4) if clean else (noisy.xt, noisy.t)
            module = teacher.module
            tokens, c = (
                module.x_embedder(x) + module.pos_embed,
                module.t_embedder(t) + module.y_embedder(noisy.condition["labels"]),
            )
            for i, block in enumerate(module.blocks):
                after = block(tokens, c)
                cosines[i].append(F.cosine_similarity(after, tokens, dim=-1).flatten())
                changes[i].append((after - tokens).square().flatten())
                tokens = after
    made = plan(teacher, "bi", calibration, bi_inputs="clean" if clean else "noised", num_keep=3)
    np.testing.assert_allclose(made.scores["blocks"], [1 - torch.cat(c).mean() for c in cosines], atol=1e-5)
    ranked = sorted(range(4 if clean else 5), key=lambda i: made.scores["blocks"][i])
    assert made.kept["blocks"] == sorted(set(range(5)) - set(ranked[:2]))
    if not clean:
        made = plan(teacher, "flux-lite", calibration, num_keep=3)
        np.testing.assert_allclose(made.scores["blocks"], [torch.cat(c).mean() for c in changes], rtol=1e-5)
        assert made.kept["blocks"] == sorted(np.argsort(made.scores["blocks"])[2:].tolist())


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_released_statistic_never_removes_the_last_block(tiny_model: ModelFactory, depth: int) -> None:
    """Even where it does nothing at all, which the corrected one finds out."""
    teacher = tiny_model(depth=depth)
    with torch.no_grad():
        for parameter in teacher.module.get_submodule(f"blocks.{depth - 1}.adaLN_modulation").parameters():
            parameter.zero_()
    calibration = calibrated(teacher)
    assert plan(teacher, "bi", calibration, bi_inputs="clean", num_keep=1).kept["blocks"] == [depth - 1]
    assert depth - 1 not in plan(teacher, "bi", calibration, num_keep=depth - 1).kept["blocks"]


def test_sensitivity_is_loss_added(tiny_model: ModelFactory) -> None:
    teacher = tiny_model(depth=5)
    calibration = calibrated(teacher, 6, 4)
    whole = loss_of(teacher, calibration)
    added = [loss_of(without(teacher, [i for i in range(5) if i != block]), calibration) - whole for block in range(5)]
    made = plan(teacher, "sensitivity", calibration, num_keep=2)
    np.testing.assert_allclose(made.scores["blocks"], added, rtol=1e-4, atol=1e-4)
    assert made.kept["blocks"] == sorted(np.argsort(added)[3:].tolist())


@pytest.mark.parametrize("protect", [(), (1, 4)])
def test_greedy_sensitivity_removes_the_best_block_each_time(
    tiny_model: ModelFactory, protect: tuple[int, ...]
) -> None:
    teacher = tiny_model(depth=6)
    calibration = calibrated(teacher)
    kept, removed = list(range(6)), []
    while len(kept) > 3:
        losses = {
            b: loss_of(without(teacher, [i for i in kept if i != b]), calibration) for b in kept if b not in protect
        }
        removed.append(min(losses, key=lambda block: losses[block]))
        kept.remove(removed[-1])
    made = plan(teacher, "sensitivity", calibration, num_keep=3, sensitivity_order="greedy", protect=protect)
    assert made.scores["removed_in_order"] == removed
    assert made.kept["blocks"] == kept
    assert made.scores["loss"] == pytest.approx(loss_of(without(teacher, kept), calibration), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------------- rules


def test_bk_sdm_at_28_is_the_published_list(tiny_model: ModelFactory) -> None:
    teacher = tiny_model(depth=28)
    assert plan(teacher, "bk-sdm").kept["blocks"] == PUBLISHED
    assert plan(teacher, "bk-sdm", bk_sdm_list="old").kept["blocks"] == sorted({*PUBLISHED, 14} - {15})
    assert evenly_spaced(28, 14) == PUBLISHED, "evenly spaced with both ends is the same list"


@pytest.mark.parametrize(
    ("depth", "wanted"),
    [(12, [0, 2, 4, 7, 9, 11]), (7, [0, 2, 4, 6]), (14, [0, 2, 4, 6, 7, 9, 11, 13]), (1, [0]), (2, [0, 1])],
)
def test_bk_sdm_at_other_depths(depth: int, wanted: list[int]) -> None:
    assert bk_sdm_positions(depth) == wanted


@given(depth=st.integers(1, 60), protected=st.sets(st.integers(0, 59)))
def test_bk_sdm_keeps_one_of_each_pair(depth: int, protected: set[int]) -> None:
    own = {i for i in protected if i < depth}
    kept = bk_sdm_positions(depth)
    assert {0, depth - 1} <= set(kept)
    half = depth // 2
    assert len(kept) == (half + 1) // 2 + (depth - half + 1) // 2
    assert max(np.diff(kept), default=0) <= 3, "two dropped neighbours at most, where the halves meet"
    assert own <= set(bk_sdm_positions(depth, protected=sorted(own)))


@given(size=st.integers(1, 60), share=st.floats(0, 1))
def test_evenly_spaced(size: int, share: float) -> None:
    num = max(1, round(share * size))
    places = evenly_spaced(size, num)
    assert len(set(places)) == num and places == sorted(places)
    assert all(0 <= place < size for place in places)
    if num > 1:
        assert places[0] == 0 and places[-1] == size - 1
        gaps = np.diff(places)
        assert gaps.max() - gaps.min() <= 1


def test_first_and_last(tiny_model: ModelFactory) -> None:
    teacher = tiny_model(depth=7)
    assert plan(teacher, "first").kept["blocks"] == [0, 1, 2, 3]
    assert plan(teacher, "last").kept["blocks"] == [3, 4, 5, 6]
    assert plan(teacher, "first", protect=(5,), num_keep=3).kept["blocks"] == [0, 1, 5]
    assert plan(teacher, "last", protect=(0,), num_keep=1).kept["blocks"] == [0]


# ------------------------------------------------------------------------------------------------------------------ search


def test_min_median_and_max_of_all_masks(tiny_model: ModelFactory) -> None:
    teacher = tiny_model(depth=6)
    calibration = calibrated(teacher)
    tables: list[dict[str, Any]] = []
    for criterion in ("min-loss", "median-loss", "max-loss"):
        settings = PruneSection(criterion=criterion, num_masks=20)  # type: ignore[arg-type]
        made = decide(CriterionContext(teacher, settings, 0, calibration, publish=tables.append))
        table = tables[-1]
        assert made.scores["exact"] and made.scores["num_masks"] == 20
        order = sorted(table["losses"])
        place = {"min-loss": 0, "median-loss": 9, "max-loss": 19}[criterion]
        assert made.scores["loss"] == order[place]
        mask: Mask = tuple(made.kept["blocks"])
        assert table["masks"][table["losses"].index(order[place])] == bits(mask, 6)
        assert made.scores["loss"] == pytest.approx(loss_of(without(teacher, list(mask)), calibration), rel=1e-5)
        assert made.cost["images"] == pytest.approx(
            shared_evaluations(searched(CriterionContext(teacher, settings))) / 6 * 3, abs=0.1
        )
        assert sum(made.scores["histogram"]["counts"]) == 20
    assert tables[0]["masks"] == [bits(mask, 6) for mask in all_masks([BlockGroup(0, 6, 3)])]
    for name, loss in tables[0]["marks"].items():
        place = tables[0]["masks"].index(tables[0]["mark_masks"][name])
        assert loss == pytest.approx(tables[0]["losses"][place], rel=1e-5)
    assert {"bi", "flux-lite", "sensitivity", "first", "last", "uniform"} <= set(tables[0]["marks"])


def test_plans_of_many_masks_have_a_summary(tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyfusion.prune.criteria.MAX_LISTED_MASKS", 5)
    tables: list[dict[str, Any]] = []
    context = CriterionContext(
        tiny_model(), PruneSection(criterion="min-loss"), 0, calibrated(tiny_model()), publish=tables.append
    )
    scores = decide(context).scores
    assert "losses" not in scores and "masks" not in scores
    assert scores["quantiles"]["min"] == scores["loss"] == min(tables[0]["losses"])
    assert len(tables[0]["losses"]) == len(tables[0]["mse"]) == len(tables[0]["masks"]) == 6


def test_losses_that_are_not_finite_are_never_taken(tiny_model: ModelFactory) -> None:
    """A block of huge weights makes every mask that keeps it overflow."""
    teacher = tiny_model()
    with torch.no_grad():
        for parameter in teacher.module.get_submodule("blocks.1").parameters():
            parameter.mul_(1e30)
    calibration = calibrated(teacher)
    for criterion in ("min-loss", "max-loss", "sensitivity"):
        tables: list[dict[str, Any]] = []
        settings = PruneSection(criterion=criterion)  # type: ignore[arg-type]
        made = decide(CriterionContext(teacher, settings, 0, calibration, publish=tables.append))
        json.dumps([made.to_json(), tables], allow_nan=False)
        if tables:
            assert 1 not in made.kept["blocks"]
            assert tables[0]["losses"].count(None) == 3
