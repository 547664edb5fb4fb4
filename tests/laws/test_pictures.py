"""The pictures of the page: what is drawn is what was measured, and chance, extremes and ideals stand where they belong."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_report import Page, make_run, write, write_lines

from tinyfusion.blocks.scheme import above_chance, block_chance, choice_chance, consecutive_groups
from tinyfusion.commands.report import render_run, report
from tinyfusion.commands.run import run
from tinyfusion.config.loading import load_recipe
from tinyfusion.config.recipe import TrainingSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rundir import stamp
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.jobs.diagnostics import (
    BIN_WIDTH,
    activations,
    checkpoint_steps,
    depth_speed,
    shallow,
    symmetric_log,
    timed_depths,
)
from tinyfusion.models.checkpoint import LoadedModel, save_model
from tinyfusion.prune.criteria import by_indices
from tinyfusion.report import diagnostic_charts
from tinyfusion.report.charts import decision_table
from tinyfusion.report.decisions import decision_strengths, final_probabilities, with_protected
from tinyfusion.report.diagnostic_charts import Mark, calibration, label_rows
from tinyfusion.report.load import read_run
from tinyfusion.report.tables import Cell, expected_table

DIGITS = dict(input_size=8, patch_size=4, in_channels=1, hidden_size=16, depth=4, num_heads=2, num_classes=10)
ModelFactory = Callable[..., LoadedModel]
groups_strategy = st.lists(
    st.integers(1, 8).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))), min_size=1, max_size=6
)


# ------------------------------------------------------------------------------------------------------------ decisions


@given(groups_strategy)
def test_chance_is_no_colour_and_certainty_full(sizes: list[tuple[int, int]]) -> None:
    """At chance nothing is drawn, whatever the group; certain blocks have the full colour, on their side."""
    groups = consecutive_groups(sizes)
    depth = sum(size for _, size in sizes)
    chance = [block_chance(group) for group in groups for _ in group.blocks]
    assert sum(chance) == pytest.approx(sum(keep for keep, _ in sizes))
    free = [base < 1 for base in chance]
    lines = [{"marginals": {"b": values}} for values in (chance, [1.0] * depth, [0.0] * depth)]
    strengths = decision_strengths(lines, groups, "b")
    assert all(strength == 0 for strength, is_free in zip(strengths[:, 0], free, strict=True) if is_free)
    assert (strengths[:, 1] == 1).all() and (strengths[:, 2] == -1).all()
    line = {"kept": {"b": [g.start for g in groups]}, "confidence": {"b": [choice_chance(g) for g in groups]}}
    strengths = decision_strengths([line], groups, "b")[:, 0]
    assert [strengths[g.start] for g in groups] == [1.0 if choice_chance(g) == 1 else 0.0 for g in groups]
    assert np.isnan(strengths).sum() == depth - len(groups)


@given(st.floats(-1, 2), st.floats(0, 1))
def test_opacity_never_leaves_its_range(value: float, chance: float) -> None:
    assert 0 <= above_chance(value, chance) <= 1


def test_chance_levels_of_the_published_schemes_and_of_protected_blocks() -> None:
    groups = with_protected(consecutive_groups([[1, 2], [2, 4], [14, 28], [2, 4]]), {34, 99})
    half, two, subset, fixed = groups
    assert (choice_chance(half), choice_chance(two), block_chance(subset)) == (0.5, pytest.approx(1 / 6), 0.5)
    assert (choice_chance(fixed), block_chance(fixed)) == (pytest.approx(1 / 3), pytest.approx(1 / 3))


def subset_run(path: Path, sizes: list[list[int]], scheme: str, running: bool = False) -> Path:
    """A run with the distribution subset; the last block of every group becomes ever less likely."""
    marginals, kept, start = [], [], 0
    for keep, size in sizes:
        marginals += [1.0] * (keep - 1) + [0.75, 0.25] + [0.0] * (size - keep - 1)
        kept += range(start, start + keep)
        start += size
    make_run(path, prune={"scheme": scheme, "criterion": "learned", "distribution": "subset", "protect": []})
    sure = {"blocks": [marginals[block] for block in kept]}
    lines = [
        {"step": 10 * i, "seen_images": 64 * (i + 1), "seconds": 0.1 * i, "loss": 0.5, "kept": {"blocks": kept},
         "confidence": sure, "marginals": {"blocks": marginals}}
        for i in range(5)
    ]  # fmt: skip
    write_lines(path / "prune" / "metrics.jsonl", lines)
    rows, first = [], 0
    for _, size in sizes:
        rows.append(marginals[first : first + size])
        first += size
    plan = {
        "kept": {"blocks": kept}, "depth": {"blocks": start}, "criterion": "learned", "scheme": scheme, "distribution": "subset",
        "groups": {"blocks": sizes}, "seed": 7, "version": 1, "scores": {"meaning": "marginal probability", "blocks": rows},
    }  # fmt: skip
    write(path / "prune" / "plan.json", plan)
    for folder in ("prune", "recover"):
        write(path / folder / "student" / "model.json", {"arch": {"depth": len(kept)}, "plan": plan, "hash": "a1" * 32})
        if running:
            (path / folder / "student" / "model.json").unlink()
    if running:
        (path / "prune" / "plan.json").unlink()
    return path


@pytest.mark.parametrize(
    ("sizes", "scheme", "chances"),
    [
        ([[14, 28]], "14:28", "50 % for 14:28."),
        ([[2, 4], [4, 8]], "2:4+4:8", "50 % for 2:4, 50 % for 4:8."),
        ([[1, 2], [2, 6]], "1:2+2:6", "50 % for 1:2, 33 % for 2:6."),
    ],
)
def test_subsets_are_drawn_by_block(tmp_path: Path, sizes: list[list[int]], scheme: str, chances: str) -> None:
    page = render_run(subset_run(tmp_path / "run", sizes, scheme))
    text = Page(page).text
    assert f"no colour is chance: {chances}" in text
    assert "Probability of every block to be kept" in text
    means, _ = final_probabilities(read_run(tmp_path / "run"))
    assert means == {"blocks": [pytest.approx((keep - 0.25) / keep) for keep, _ in sizes]}


@pytest.mark.parametrize(
    ("sizes", "scheme"), [([[14, 28]], "14:28"), ([[2, 4]] * 3, "2:4"), ([[2, 4], [4, 8]], "2:4+4:8")]
)
def test_a_subset_that_is_still_learned_has_its_groups(tmp_path: Path, sizes: list[list[int]], scheme: str) -> None:
    found = read_run(subset_run(tmp_path / "run", sizes, scheme, running=True))
    assert found.plan is not None and not found.decided
    assert found.plan.groups == {"blocks": sizes}
    assert "The search has not ended" in Page(render_run(tmp_path / "run")).text


def test_the_table_of_decisions_has_every_change() -> None:
    kept = [[0, 2], [0, 2], [1, 2], [1, 2], [1, 3], [1, 3], [1, 3]]
    lines = [{"step": i, "kept": {"b": k}, "confidence": {"b": [0.5, 0.75]}} for i, k in enumerate(kept)]
    table = decision_table(lines, "b")
    assert [row[:2] for row in table.rows] == [["0", "0, 2"], ["2", "1, 2"], ["4", "1, 3"], ["6", "1, 3"]]
    assert table.rows[0][2:] == ["0.50", "0.62", "0.75"]


# ---------------------------------------------------------------------------------------------------- calibration losses


def calibrated(path: Path, losses: list[float | None], masks: list[str], marks: dict[str, float]) -> Path:
    make_run(path)
    write(path / "prune" / "calibration.json", {"losses": losses, "masks": masks, "marks": marks})
    return path


def test_the_masks_own_place_among_the_losses(tmp_path: Path) -> None:
    masks = ["10101010", "01100110", "11110000", "00001111", "11001100"]
    run = read_run(
        calibrated(tmp_path / "run", [0.2, 0.98, 37.7, None, 2.0], masks, {"bi": 0.2, "first": 37.7, "x": math.inf})
    )
    found = calibration(run)
    assert found is not None
    losses, marks, table = found
    assert losses == [0.2, 0.98, 2.0, 37.7]
    assert [(m.label, m.loss, m.below, m.is_own) for m in marks] == [
        ("bi", 0.2, 0.0, False), ("this run", 0.98, 0.25, True), ("first", 37.7, 0.75, False),
    ]  # fmt: skip
    assert "1 more have no finite loss" in table.note
    text = Page(render_run(tmp_path / "run")).text
    assert "25 % of them have a lower loss than the mask of this run" in text
    assert all(f"{label} " in text for label in ("bi", "this run", "first"))


def test_criteria_that_chose_one_mask_share_a_mark(tmp_path: Path) -> None:
    marks = {"sensitivity": 0.2, "bi": 0.2, "learned": 0.7}
    found = calibration(read_run(calibrated(tmp_path / "run", [0.2, 0.5, 0.9], ["a", "b", "c"], marks)))
    assert found is not None
    assert [(mark.label, mark.is_own) for mark in found[1]] == [
        ("sensitivity, bi", False),
        ("this run, learned", True),
    ]


def test_other_runs_of_the_page_are_marked_where_their_mask_was_tried(tmp_path: Path) -> None:
    """The learned decision has its mark on the histogram of a search of masks; a run of another teacher has none."""
    searched = calibrated(tmp_path / "search", [0.2, 0.98, 2.0], ["11110000", "01100110", "00001111"], {"bi": 0.3})
    plan = json.loads((searched / "prune" / "plan.json").read_text())
    write(searched / "prune" / "plan.json", {**plan, "kept": {"blocks": [0, 1, 2, 3]}, "criterion": "min-loss"})
    learned, stranger = make_run(tmp_path / "learned"), make_run(tmp_path / "stranger")
    write(stranger / "prune" / "plan.json", {**plan, "teacher": "d6" * 32})
    runs = [read_run(path) for path in (searched, learned, stranger)]
    found = calibration(runs[0], runs)
    assert found is not None
    assert [mark.label for mark in found[1]] == ["this run", "bi", "learned (learned)"]
    report([searched, learned], RunOptions(tmp_path / "page.html"))
    assert "learned (learned)" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_mask_that_a_criterion_chose_is_known_though_the_search_left_it_out(tmp_path: Path) -> None:
    searched = calibrated(tmp_path / "search", [0.2, 2.0], ["11110000", "00001111"], {"bi": 0.3})
    plan = json.loads((searched / "prune" / "plan.json").read_text())
    record = json.loads((searched / "prune" / "calibration.json").read_text())
    write(searched / "prune" / "calibration.json", {**record, "mark_masks": {"bi": "01010101"}})
    write(searched / "prune" / "plan.json", {**plan, "kept": {"blocks": [1, 3, 5, 7]}, "criterion": "indices"})
    found = calibration(read_run(searched))
    assert found is not None
    assert [(mark.label, mark.is_own) for mark in found[1]] == [("this run, bi", True)]


@given(
    st.lists(st.tuples(st.floats(0.1, 100), st.integers(2, 20)), min_size=1, max_size=12), st.sampled_from([290, 1000])
)
def test_labels_of_marks_neither_touch_nor_are_crossed(found: list[tuple[float, int]], width: int) -> None:
    marks = [Mark("m" * length, value) for value, length in found]
    low = min(value for value, _ in found) / 1.1
    placed, high = label_rows(marks, low, max(value for value, _ in found) * 1.03, width)

    def place(mark: Mark) -> float:
        return width * math.log(mark.loss / low) / math.log(high / low)

    boxes = [(place(mark), place(mark) + 6.2 * len(mark.label) + 8, row) for mark, row in placed]
    assert all(end <= width + 1e-6 for _, end, _ in boxes)
    for i, (begin, end, row) in enumerate(boxes):
        for other, _, other_row in boxes[i + 1 :]:
            assert begin <= other
            assert other >= end - 3 or other_row > row, "a later mark inside a label stands below it"


# ------------------------------------------------------------------------------------------------------------ activations


@given(st.floats(-1e6, 1e6, width=32))
def test_the_axis_of_activations_is_one_to_one(value: float) -> None:
    place = float(symmetric_log(torch.tensor(value, dtype=torch.float64)))
    assert place == pytest.approx(diagnostic_charts.symmetric_log(value))
    assert linear_of(place) == pytest.approx(value)


def linear_of(place: float) -> float:
    """The inverse of `symmetric_log`."""
    return place if abs(place) <= 1 else math.copysign(10 ** (abs(place) - 1), place)


def test_histograms_hold_every_activation(tiny_model: ModelFactory) -> None:
    """Counts, extremes and moments are those of the block outputs themselves; a student's blocks keep the teacher's numbers."""
    teacher = tiny_model(**DIGITS)
    student = teacher.cut(by_indices(teacher, [1, 3], 0))
    recipe = load_recipe(None, ["data.name=digits", "device=cpu"])
    record = activations(recipe, teacher, student)
    same = activations(recipe, teacher, teacher.copy())
    assert same["models"]["student"] == same["models"]["teacher"] == record["models"]["teacher"]
    assert [entry["teacher_block"] for entry in record["models"]["student"]] == [1, 3]
    for entries in record["models"].values():
        for entry in entries:
            assert sum(entry["counts"]) == 64 * 4 * 16
            edges = BIN_WIDTH * (entry["first"] + np.array([0, 1, len(entry["counts"]) - 1, len(entry["counts"])]))
            low, high = diagnostic_charts.symmetric_log(entry["min"]), diagnostic_charts.symmetric_log(entry["max"])
            assert edges[0] - 1e-6 <= low <= edges[1] + 1e-6
            assert edges[2] - 1e-6 <= high <= edges[3] + 1e-6
            centres = [linear_of(BIN_WIDTH * (entry["first"] + i + 0.5)) for i in range(len(entry["counts"]))]
            mean = np.average(centres, weights=entry["counts"])
            std = np.sqrt(np.average((centres - mean) ** 2, weights=entry["counts"]))
            assert entry["mean"] == pytest.approx(mean, abs=0.05 * entry["std"])
            assert entry["std"] == pytest.approx(std, rel=0.05)


# ------------------------------------------------------------------------------------------------------------------ speed


@given(st.integers(1, 60), st.integers(0, 20), st.data())
def test_timed_depths(depth: int, most: int, data: st.DataObject) -> None:
    also = data.draw(st.integers(1, depth))
    found = timed_depths(depth, most, also)
    if most == 0:
        assert found == []
        return
    assert found == sorted(set(found), reverse=True)
    assert found[0] == depth and also in found and min(found) >= 1
    assert len(set(found) - {also}) <= most
    assert timed_depths(28, 14, 14) == list(range(28, 0, -2))


def test_a_shallow_model_is_the_cut_one_without_a_copy(tiny_model: ModelFactory) -> None:
    teacher = tiny_model(**DIGITS)
    x, t, y = (
        torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([3, 900]),
        torch.tensor([1, 2]),
    )
    for num in (1, 3, 4):
        cut, copy = shallow(teacher, {"blocks": num}), teacher.cut(by_indices(teacher, list(range(num)), 0))
        assert torch.equal(cut.module(x, t, y), copy.module(x, t, y))
        shared = {p.data_ptr() for p in teacher.module.parameters()}
        assert {p.data_ptr() for p in cut.module.parameters()} <= shared
        assert cut.arch == copy.arch
    assert len(teacher.stack) == 4


def test_speed_over_depth_is_measured_against_the_whole(tiny_model: ModelFactory) -> None:
    teacher, timed = tiny_model(**DIGITS), []

    def step_of(model: LoadedModel, num: int) -> Callable[[], object]:
        return lambda: timed.append((len(model.stack), num))

    recipe = load_recipe(None, ["speed.depths=2", "device=cpu"])
    record = depth_speed(recipe, teacher, {"blocks": 3}, step_of)
    assert record is not None
    assert [point["depth"] for point in record["points"]] == [4, 3, 2]
    assert record["points"][0]["speedup"] == 1.0
    assert timed == [(depth, 128) for _ in range(8) for depth in (4, 3, 2)], "every depth in turn, after a warm-up"
    assert depth_speed(load_recipe(None, ["speed.depths=0"]), teacher, {"blocks": 3}, step_of) is None


# --------------------------------------------------------------------------------------------------- FID over the recovery


@given(st.integers(1, 400), st.integers(1, 120), st.integers(1, 12), st.integers(0, 8))
def test_checkpoints_of_the_curve_are_there_and_spread(made: int, every: int, limit: int, num: int) -> None:
    settings = TrainingSection(steps=made, checkpoint_every_steps=every, checkpoints_limit=limit)
    saved = sorted({*range(every, made + 1, every), made})[-limit:]
    near = [any(4 * abs(step * num - i * made) <= made for step in saved) for i in range(1, num + 1)]
    found = None
    with contextlib.suppress(UserError):
        found = checkpoint_steps(settings, num)
    if found is None:
        assert not all(near), "a checkpoint within a quarter of the spacing of every point is enough"
        return
    assert len(found) == num and found == sorted(set(found)) and set(found) <= set(saved)
    assert all(abs(step - i * made / num) <= made / num / 2 for i, step in enumerate(found, 1))
    assert not found or found[-1] == made


def test_what_the_message_advises_is_enough() -> None:
    with pytest.raises(UserError, match="checkpoint_every_steps to 100080 and checkpoints_limit to 5"):
        checkpoint_steps(TrainingSection(steps=500_400, checkpoint_every_steps=10_000, checkpoints_limit=2), 5)
    advised = TrainingSection(steps=500_400, checkpoint_every_steps=100_080, checkpoints_limit=5)
    assert checkpoint_steps(advised, 5) == [100_080, 200_160, 300_240, 400_320, 500_400]


SETTINGS = [
    "prune.scheme=1:2", "evaluate.checkpoints=2", "device=cpu",
    *(f"{stage}.training.{value}" for stage in ("prune", "recover")
      for value in ("steps=4", "batch_size=4", "ema_decay=0.5", "log_every_steps=1")),
    "recover.training.checkpoint_every_steps=2", "recover.training.learning_rate=1e-2",
    "sample.num_images=8", "sample.batch_size=8", "sample.sampler=ddim", "sample.num_steps=2",
    "speed.repeats=2", "speed.batch_size=2", "speed.steps_per_repeat=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: ModelFactory) -> Path:
    """A real, short run with every picture that a run makes by itself."""
    folder = tmp_path_factory.mktemp("whole")
    save_model(tiny_model(**DIGITS), folder / "teacher")
    run(load_recipe(None, [f"teacher={folder / 'teacher'}", *SETTINGS]), RunOptions(folder / "run"))
    return folder / "run"


def test_a_run_makes_its_pictures(whole: Path) -> None:
    points = json.loads((whole / "fid_steps.json").read_text())
    evaluated = {
        name: json.loads((whole / "evaluations" / f"{name}-digits.json").read_text()) for name in ("pruned", "student")
    }
    assert [point["step"] for point in points] == [0, 2, 4]
    assert [point["images"] for point in points] == [0, 8, 16]
    assert (points[0]["fid"], points[2]["fid"]) == (evaluated["pruned"]["fid"], evaluated["student"]["fid"])
    assert points[1]["fid"] not in (points[0]["fid"], points[2]["fid"])
    assert {point["protocol"] for point in points} == {evaluated["student"]["protocol"]}
    page = (whole / "report.html").read_text(encoding="utf-8")
    text = Page(page).text
    for title in (
        "FID during recovery",
        "Activations by block",
        "Speed-up by depth",
        "Decision over the steps of the search",
    ):
        assert title in text
    assert page.count("<summary>Table of the values</summary>") == 4
    assert {"activations.json", "depth_speed.json"} <= {path.name for path in whole.iterdir()}


def test_what_is_there_is_not_measured_again(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped in its pictures goes on with the point that is missing."""
    file = whole / "fid_steps.json"
    before = json.loads(file.read_text())
    kept = (whole / "activations.json").read_bytes()
    write(file, [point for point in before if point["step"] != 2])
    record = json.loads((whole / "run.json").read_text())
    write(whole / "run.json", {**record, "state": "interrupted"})
    monkeypatch.setattr("tinyfusion.jobs.diagnostics.activations", None)
    recipe = load_recipe(None, [f"teacher={whole.parent / 'teacher'}", *SETTINGS])
    run(recipe, RunOptions(whole))
    assert (whole / "activations.json").read_bytes() == kept
    assert json.loads(file.read_text()) == before


def test_a_curve_without_checkpoints_is_refused_before_anything_is_written(tmp_path: Path, whole: Path) -> None:
    recipe = load_recipe(
        None, [f"teacher={whole.parent / 'teacher'}", *SETTINGS, "recover.training.checkpoints_limit=1"]
    )
    with pytest.raises(UserError, match=r"evaluate\.checkpoints 2 wants"):
        run(recipe, RunOptions(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def with_points(path: Path, method: str, factor: float = 1.0, protocol: str = "p") -> Path:
    make_run(path, expected=[{"metric": "step-100.digits.fid", "value": 9.0, "tolerance": 0.5, "note": ""}])
    points = [
        {
            "step": step,
            "images": step * 4,
            "fid": fid * factor,
            "method": method,
            "reference": "digits",
            "protocol": protocol,
        }
        for step, fid in ((0, 48.7), (100, 9.1), (200, 5.31))
    ]
    write(path / "fid_steps.json", points)
    return path


def test_recoveries_of_one_protocol_are_drawn_together(tmp_path: Path) -> None:
    runs = [with_points(tmp_path / "a", "masked-kd"), with_points(tmp_path / "b", "finetune", 1.2)]
    report(runs, RunOptions(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    ids = [value for _, name, value in Page(page).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert page.count("<h2>FID during recovery") == 3
    report([runs[0], with_points(tmp_path / "c", "finetune", protocol="another")], RunOptions(tmp_path / "other.html"))
    assert (tmp_path / "other.html").read_text(encoding="utf-8").count("<h2>FID during recovery") == 2


def test_checkpoints_answer_to_expected_numbers(tmp_path: Path) -> None:
    table = expected_table(read_run(with_points(tmp_path / "run", "masked-kd")))
    assert table is not None and list(table.rows[0][2:]) == ["9.10", Cell("ok", "ok")]


def test_every_picture_is_left_out_where_nothing_was_measured(tmp_path: Path) -> None:
    write(tmp_path / "run.json", stamp("run", {"name": "bare"}, "running"))
    page = render_run(tmp_path)
    assert "Table of the values" not in page
    make_run(tmp_path / "more")
    assert render_run(tmp_path / "more").count("<summary>Table of the values</summary>") == 1
    record: dict[str, Any] = {"losses": [0.5], "masks": ["1"], "marks": {}}
    write(tmp_path / "more" / "prune" / "calibration.json", record)
    assert calibration(read_run(tmp_path / "more")) is None
