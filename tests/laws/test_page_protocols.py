"""What stands together on the page: one column and one curve hold scores of one protocol, and runs that belong together are one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_report import PROTOCOL, Page, make_prune, make_recover, make_run, write, write_lines

from tinyfusion.commands.report import render_run, report
from tinyfusion.core.rundir import stamp
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.report import charts, tables
from tinyfusion.report.diagnostic_charts import diagnostic_charts
from tinyfusion.report.load import join_runs, read_run
from tinyfusion.report.page import progress_of
from tinyfusion.report.tables import Table

OTHER = PROTOCOL.replace("seed 0", "seed 1")


def point(step: int, fid: float, protocol: str = PROTOCOL, method: str = "masked-kd") -> dict[str, Any]:
    return {
        "step": step, "images": 4 * step, "fid": fid, "inception_score": 2.0, "method": method, "reference": "digits",
        "protocol": protocol,
    }  # fmt: skip


def page_of(*runs: Path) -> str:
    out = runs[0].parent / "page.html"
    report(list(runs), RunOptions(out, overwrite=True))
    return out.read_text(encoding="utf-8")


def rows_of(table: Table) -> list[Any]:
    """The rows of a table without the headings between them."""
    return [row for row in table.rows if not isinstance(row, str)]


def rescore(path: Path, model: str, protocol: str, reference: str = "digits") -> None:
    """Give an evaluation another protocol."""
    file = path / "evaluations" / f"{model}-{reference}.json"
    write(file, {**json.loads(file.read_text()), "protocol": protocol})


# --------------------------------------------------------------------------------------------------------- FID over steps


def test_a_curve_and_its_table_hold_one_protocol(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    points = [point(0, 48.7), point(100, 9.0, OTHER), point(200, 8.0), point(300, 7.0, OTHER), point(400, 5.3)]
    write(run / "fid_steps.json", points)
    found = charts.fid_series(read_run(run))
    assert [(one.protocol, [p["step"] for p in one.points]) for one in found] == [
        (PROTOCOL, [0, 200, 400]),
        (OTHER, [100, 300]),
    ]
    drawn = charts.fid_charts([read_run(run)])
    assert [chart.protocol for chart in drawn] == [PROTOCOL, OTHER]
    assert [[row[1] for row in chart.table.rows] for chart in drawn if chart.table] == [
        ["0", "200", "400"],
        ["100", "300"],
    ]
    page = Page(render_run(run))
    assert f"Protocol: {OTHER}" in page.text and f"Protocol: {PROTOCOL}" in page.text
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_a_point_that_no_curve_can_hold_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write(run / "fid_steps.json", [point(0, 48.7, OTHER), point(100, 9.0), point(200, 8.0)])
    (chart,) = charts.fid_charts([read_run(run)])
    assert chart.table is not None
    assert [row[1] for row in chart.table.rows] == ["100", "200"]
    assert f"step 0: 48.7 by {OTHER}" in Page(render_run(run)).text


def test_the_teacher_stands_beside_a_curve_of_its_protocol_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write(run / "fid_steps.json", [point(0, 48.7), point(200, 5.31)])
    (series,) = charts.fid_series(read_run(run))
    assert series.teacher_fid == 3.12
    rescore(run, "teacher", OTHER)
    (series,) = charts.fid_series(read_run(run))
    assert series.teacher_fid is None


def test_recoveries_are_drawn_together_by_protocol(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in "abc"]
    for path, protocol, factor in zip(runs, (PROTOCOL, PROTOCOL, OTHER), (1.0, 1.1, 1.2), strict=True):
        write(path / "fid_steps.json", [point(0, 40 * factor, protocol), point(9, 9 * factor, protocol)])
    read = [read_run(path) for path in runs]
    (chart,) = charts.fid_charts(read, shared=True)
    assert chart.protocol == PROTOCOL
    labels = {shape.label for shape in chart.legend}
    assert {"a: masked-kd", "b: masked-kd"} <= labels and "c: masked-kd" not in labels
    write(runs[2] / "fid_steps.json", [point(0, 40), point(9, 9), point(10, 7, OTHER), point(20, 6, OTHER)])
    write(runs[1] / "fid_steps.json", [point(0, 40), point(9, 9), point(10, 7, OTHER), point(20, 6, OTHER)])
    both = charts.fid_charts([read_run(path) for path in runs], shared=True)
    assert [chart.protocol for chart in both] == [PROTOCOL, OTHER]


def test_small_fids_of_a_training_that_was_watched_otherwise_are_apart(tmp_path: Path) -> None:
    run = make_recover(tmp_path / "run")
    lines = [{"step": i, "seen_images": i, "seconds": 0.1 * i, "loss": 0.5} for i in range(4)]
    looks = [(1, 9.0, "few"), (2, 8.0, "few"), (3, 3.0, "many"), (4, 2.0, "many")]
    watched = [{"step": s - 1, "watch": {"made_steps": s, "fid": fid, "protocol": p}} for s, fid, p in looks]
    write_lines(run / "metrics.jsonl", [*lines, *watched])
    (run / "watch").mkdir()
    for step, *_ in looks:
        from PIL import Image

        Image.new("L", (8, 8)).save(run / "watch" / f"step-{step:07d}.png")
    drawn = [chart for chart in charts.training_charts(read_run(run)) if chart.title.startswith("FID of the previews")]
    assert [chart.protocol for chart in drawn] == ["few", "many"]
    text = Page(render_run(run)).text
    assert "FID 9.00, protocol 1" in text and "FID 2.00, protocol 2" in text
    ids = [value for _, name, value in Page(render_run(run)).attributes if name == "id"]
    assert len(ids) == len(set(ids))


# -------------------------------------------------------------------------------------------------------- side by side


def test_the_headline_and_the_grids_show_one_protocol(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    rescore(run, "teacher", OTHER)
    text = Page(render_run(run)).text
    assert "48.7 pruned → 5.31 student" in text and "3.12 teacher" not in text
    assert "The protocols differ: see the table for teacher." in text
    assert "8 blocks, FID" not in text and "4 blocks, FID 5.31" in text


def test_distances_of_dinov2_features_are_named(tmp_path: Path) -> None:
    """FD-DINOv2 in the headline, the tables, the samples and the curve; FID where the features are others."""
    run = make_run(tmp_path / "run")
    assert "FD-DINOv2" not in Page(render_run(run)).text
    protocol = PROTOCOL.replace("features", "dinov2")
    for model in ("teacher", "pruned", "student"):
        rescore(run, model, protocol)
    write(run / "fid_steps.json", [point(0, 48.7, protocol), point(100, 9.0, protocol)])
    text = Page(render_run(run)).text
    for words in ("FD-DINOv2 against digits, lower", "4 blocks, FD-DINOv2 5.31", "FD-DINOv2 during recovery"):
        assert words in text, words
    assert "against digits FD-DINOv2 ↓" in text and "against digits-heldout FID ↓" in text


def test_images_of_other_seeds_are_not_called_the_same(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for model in ("teacher", "pruned", "student"):
        write(run / "samples" / f"{model}.json", {"protocol": "40 images | ddim | seed 0"})
    assert "Samples of every model from the same seeds" in Page(render_run(run)).text
    write(run / "samples" / "student.json", {"protocol": "40 images | ddim | seed 1"})
    text = Page(render_run(run)).text
    assert "from the same seeds" not in text
    assert "40 images | ddim | seed 1" in text and "40 images | ddim | seed 0" in text


def test_runs_of_one_protocol_adjoin_in_the_comparison(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("one", "two", "three")]
    for model in ("teacher", "pruned", "student"):
        rescore(runs[1], model, OTHER)
    read = [read_run(path) for path in runs]
    found = tables.comparison(read)
    assert found is not None
    assert [row[:5] if isinstance(row, str) else Path(row[0]).name for row in found.rows] == [
        "one",
        "three",
        "other",
        "two",
    ]
    marks = [[cell.mark for cell in row[5:8]] for row in rows_of(found)]
    assert marks[0] == marks[1] != marks[2]
    assert {PROTOCOL, OTHER} <= set(found.protocols)
    assert "other protocols: compare with care" in Page(page_of(*runs)).text


# ---------------------------------------------------------------------------------------------------------------- pairs


def against(path: Path, name: str, psnr: float, **more: Any) -> None:
    """Write what `evaluate --against` leaves."""
    other = {
        "name": "t.npz",
        "hash": "ab" * 32,
        "psnr_db": psnr,
        "psnr_db_std": 2.0,
        "ssim": 0.81,
        "ssim_std": 0.05,
        **more,
    }
    values = {"fid": 5.0, "num_images": 40, "protocol": PROTOCOL, "reference": {"name": "digits"}, "against": other}
    write(path / "evaluations" / name, {**stamp("evaluate", {"samples": name}, "done"), **values})


def test_pairs_of_the_same_seeds_have_a_table(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert tables.pairs_table(read_run(run)) is None
    against(run, "student-digits.json", 23.4)
    against(run, "pruned-pairs.json", 11.7, protocol="40 images | ddim 50 steps | bfloat16 | seed 0")
    against(run, "halves.json", 19.1)
    found = tables.pairs_table(read_run(run))
    assert found is not None
    assert [(model.text, model.mark, *cells) for model, *cells in rows_of(found)] == [
        ("pruned, before recovery", 1, "t.npz", "11.7 ± 2.0", "0.810 ± 0.050", "40"),
        ("student, recovered", 2, "t.npz", "23.4 ± 2.0", "0.810 ± 0.050", "40"),
        ("halves", 2, "t.npz", "19.1 ± 2.0", "0.810 ± 0.050", "40"),
    ]
    assert "sampled by 40 images | ddim 50 steps | bfloat16" in found.protocols[0]
    assert found.protocols[1] == "40 images | ddim 50 steps | seed 0 | compared with t.npz abababab"
    text = Page(render_run(run)).text
    assert "Similarity to the samples of another model" in text and found.protocols[1] in text
    assert "against pairs" not in text, "no reference has that name"


def test_pairs_name_the_model_whose_images_they_are(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write(run / "samples" / "teacher.json", {"protocol": "p", "image_hash": "ab" * 32})
    against(run, "student-digits.json", 23.4)
    against(run, "student-digits-heldout.json", 23.4)
    found = tables.pairs_table(read_run(run))
    assert found is not None
    assert [row[1] for row in rows_of(found)] == ["teacher", "teacher"]
    write(
        run / "evaluations" / "student-digits-heldout.json",
        json.loads((run / "evaluations" / "student-digits.json").read_text()),
    )
    once = tables.pairs_table(read_run(run))
    assert once is not None and len(rows_of(once)) == 1, "the same images against two references are one comparison"


# -------------------------------------------------------------------------------------------------------------- stories


def pair_of_runs(folder: Path, given: str = "e0" * 32) -> tuple[Path, Path]:
    search = make_prune(folder / "cut")
    recovery = make_recover(
        folder / "back", {"seed": 7, "student": given, "teacher": "c5" * 32, "recover": {"method": "masked-kd"}}
    )
    return search, recovery


def test_a_recovery_is_joined_with_its_search(tmp_path: Path) -> None:
    runs = pair_of_runs(tmp_path)
    (run,) = join_runs([read_run(path) for path in runs])
    assert run.verb == "prune and recover" and [folder for folder, _ in run.sources] == [str(path) for path in runs]
    page = page_of(*runs)
    text = Page(page).text
    assert page.count('<article class="run"') == 1
    for fact in (
        f"prune and recover : {runs[0]} → {runs[1]}", "8 → 4", "Kept: 1, 2, 5, 6",
        "Loss of the mask search", "Loss of the recovery", "768 by the search and 12.8 k by the recovery", "12.0 s in all",
        f"Resolved settings of {runs[0]}", f"Resolved settings of {runs[1]}", "e0" * 32, "a1" * 32,
    ):  # fmt: skip
        assert fact in text, fact
    assert page_of(runs[1], runs[0]).count('<article class="run"') == 1, "in whatever order"


def test_unrelated_runs_are_not_joined(tmp_path: Path) -> None:
    runs = pair_of_runs(tmp_path, given="0f" * 32)
    read = [read_run(path) for path in runs]
    assert join_runs(read) == read
    assert page_of(*runs).count('<article class="run"') == 2


def test_a_search_with_two_recoveries_is_joined_with_both(tmp_path: Path) -> None:
    search, first = pair_of_runs(tmp_path)
    second = make_recover(tmp_path / "tuned", {"seed": 8, "student": "e0" * 32, "recover": {"method": "finetune"}})
    joined = join_runs([read_run(path) for path in (search, first, second)])
    assert [run.name for run in joined] == [f"{search} → {first}", f"{search} → {second}"]
    assert [tables.provenance(run)["seed"] for run in joined] == ["7", "7; 8"]


def test_of_two_searches_that_agree_the_named_one_is_joined(tmp_path: Path) -> None:
    search, recovery = pair_of_runs(tmp_path)
    twin = make_prune(tmp_path / "twin")
    record = json.loads((recovery / "run.json").read_text())
    write(recovery / "run.json", {**record, "job": {"student": str(twin)}})
    joined = join_runs([read_run(path) for path in (search, twin, recovery)])
    assert [run.name for run in joined] == [str(search), f"{twin} → {recovery}"]


def test_a_joined_run_in_progress_shows_its_recovery(tmp_path: Path) -> None:
    search, recovery = pair_of_runs(tmp_path)
    record = json.loads((recovery / "run.json").read_text())
    settings = {**record["recipe"], "recover": {"training": {"steps": 80}}}
    write(recovery / "run.json", {**record, "state": "running", "recipe": settings, "seconds": None})
    (run,) = join_runs([read_run(search), read_run(recovery)])
    found = progress_of(run)
    assert found is not None and found.share == 0.5
    assert "recovering the student" in found.headline
    assert "step 40 of 80" in Page(page_of(search, recovery)).text


# ------------------------------------------------------------------------------------------------------- several lists

LISTS = {"encoder_blocks": 4, "decoder_blocks": 6}
TWO_KEPT = {"encoder_blocks": [1, 2], "decoder_blocks": [0, 3, 4]}
SURE = {"encoder_blocks": [0.61, 0.62], "decoder_blocks": [0.91, 0.92, 0.93]}


def two_lists(path: Path, distribution: str = "categorical") -> Path:
    """A finished run of a teacher with two lists of blocks, every number of a list its own."""
    scores_of = {
        name: [[sure, 1 - sure] if 2 * i in TWO_KEPT[name] else [1 - sure, sure] for i, sure in enumerate(SURE[name])]
        for name in LISTS
    }
    marginals = {name: [p for group in groups for p in group] for name, groups in scores_of.items()}
    make_run(path, prune={"scheme": "1:2", "criterion": "learned", "distribution": distribution})
    plan = {
        "kept": TWO_KEPT, "depth": LISTS, "criterion": "learned", "scheme": "1:2", "distribution": distribution,
        "groups": {name: [[1, 2]] * (depth // 2) for name, depth in LISTS.items()}, "seed": 7, "version": 1,
        "scores": {"meaning": "probability", **scores_of},
    }  # fmt: skip
    write(path / "prune" / "plan.json", plan)
    arch = {"encoder_depth": 2, "decoder_depth": 3, "head_depth": 3}
    for folder in ("prune", "recover"):
        write(
            path / folder / "student" / "model.json", {"arch": arch, "plan": plan, "kept": TWO_KEPT, "hash": "a1" * 32}
        )
    more = {"marginals": marginals} if distribution == "subset" else {}
    confidence = SURE if not more else {n: [marginals[n][b] for b in TWO_KEPT[n]] for n in LISTS}
    lines = [
        {"step": 10 * i, "seen_images": 64 * i, "seconds": 0.1 * i, "loss": 0.5, "kept": TWO_KEPT, "confidence": confidence, **more}
        for i in range(8)
    ]  # fmt: skip
    write_lines(path / "prune" / "metrics.jsonl", lines)
    entries = [
        {"teacher_block": b, "min": -1.0 - b, "max": 1.0 + b, "mean": 0.0, "std": 0.5, "first": -20, "counts": [4] * 40}
        for b in range(10)
    ]
    kept = [1, 2, 4, 7, 8]
    record = {"protocol": "p", "bin_width": 0.05, "depth": 10, "lists": LISTS}
    write(path / "activations.json", {**record, "models": {"teacher": entries, "student": [entries[b] for b in kept]}})
    splits = {10: (4, 6), 7: (3, 4), 5: (2, 3), 2: (1, 1)}
    points = [
        {"depth": d, "latency_ms": 2.0 * d, "speedup": 10 / d, "speedup_spread": [9 / d, 11 / d],
         "lists": dict(zip(LISTS, split, strict=True))}
        for d, split in splits.items()
    ]  # fmt: skip
    write(path / "depth_speed.json", {"protocol": "p", "teacher_depth": 10, "points": points})
    speed = json.loads((path / "speed.json").read_text())
    speed["models"]["teacher"]["depth"], speed["models"]["student"]["depth"] = 10, 5
    write(path / "speed.json", speed)
    return path


@pytest.mark.parametrize("distribution", ["categorical", "subset"])
def test_every_list_of_blocks_has_its_own_numbers(tmp_path: Path, distribution: str) -> None:
    run = two_lists(tmp_path / "run", distribution)
    page = Page(render_run(run))
    titles = [value for tag, name, value in page.attributes if tag == "span" and name == "title"]
    assert titles == [
        f"block {i}: {'kept' if i in TWO_KEPT[name] else 'removed'}"
        for name, depth in LISTS.items()
        for i in range(depth)
    ]
    drawn = charts.decision_charts(read_run(run))
    assert [chart.title for chart in drawn] == list(LISTS)
    for chart, name in zip(drawn, LISTS, strict=True):
        assert chart.table is not None
        assert {row[1] for row in chart.table.rows} == {", ".join(map(str, TWO_KEPT[name]))}
        ticks = [int(t) for t in re.findall(r"<text [^>]*>(\d+)</text>", chart.narrow) if int(t) < 10]
        assert max(ticks) == LISTS[name] - 1, "rows for the blocks of this list alone"
        assert [row[3] for row in chart.table.rows][0] == f"{np.median(SURE[name]):.2f}"
    titles = [chart.title for chart in charts.training_charts(read_run(run))][:2]
    what = "Confidence of the decision" if distribution == "categorical" else "Probability of every block to be kept"
    assert titles == [f"{what}: {name}" for name in LISTS]
    for fact in ("10 → 5", "encoder_blocks 4 → 2, decoder_blocks 6 → 3", "encoder_blocks 1, 2; decoder_blocks 0, 3, 4"):
        assert fact in page.text, fact
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_pictures_number_the_blocks_of_every_list(tmp_path: Path) -> None:
    run = read_run(two_lists(tmp_path / "run"))
    found = {chart.title: chart for chart in diagnostic_charts(run)}
    activations, speed = found["Activations by block"], found["Speed-up by depth"]
    assert activations.table is not None and speed.table is not None
    assert [row[1:3] for row in activations.table.rows[:10]] == [
        [n, str(i)] for n, d in LISTS.items() for i in range(d)
    ]
    ticks = re.findall(r"<text [^>]*>\s*([^<]*?)\s*</text>", activations.narrow)
    assert ticks.count("3") == 2 and "9" not in ticks and {"encoder_blocks", "decoder_blocks"} <= set(ticks)
    assert speed.table.columns[:4] == ["blocks", "encoder_blocks", "decoder_blocks", "fewer"]
    assert [row[:4] for row in speed.table.rows] == [
        ["10", "4", "6", "0"],
        ["7", "3", "4", "3"],
        ["5", "2", "3", "5"],
        ["2", "1", "1", "8"],
    ]
    assert "depth of this student" in speed.wide
    other = {
        "depth": 5,
        "latency_ms": 9.0,
        "speedup": 2.2,
        "speedup_spread": [2.1, 2.3],
        "lists": {"encoder_blocks": 1, "decoder_blocks": 4},
    }
    points = [p if p["depth"] != 5 else other for p in run.measured["depth_speed"]["points"]]
    write(tmp_path / "run" / "depth_speed.json", {**run.measured["depth_speed"], "points": points})
    again = {chart.title: chart for chart in diagnostic_charts(read_run(tmp_path / "run"))}
    assert "this student" not in again["Speed-up by depth"].wide, "as many blocks, and not those of the student"


@pytest.mark.parametrize("distribution", ["categorical", "subset"])
def test_a_search_over_two_lists_that_goes_on_has_a_page(tmp_path: Path, distribution: str) -> None:
    run = two_lists(tmp_path / "run", distribution)
    for gone in ("prune/plan.json", "prune/student/model.json", "recover/student/model.json"):
        (run / gone).unlink()
    found = read_run(run)
    assert found.plan is not None and not found.decided
    assert found.plan.depth == LISTS and found.plan.kept == TWO_KEPT
    assert "The search has not ended" in Page(render_run(run)).text
