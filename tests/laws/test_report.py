"""The page: what a run folder says is on it, whatever of the run there is, and nothing on it reaches outside."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from families import tiny
from tinyfusion.blocks.scheme import consecutive_groups
from tinyfusion.commands.report import render_run, report
from tinyfusion.core.errors import UserError
from tinyfusion.core.rundir import stamp
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.models.checkpoint import save_model
from tinyfusion.report import tables
from tinyfusion.report.canvas import NARROW_PX, Shape, svg
from tinyfusion.report.charts import curves
from tinyfusion.report.decisions import block_lists, decision_strengths
from tinyfusion.report.format import count, duration, percent, significant
from tinyfusion.report.images import EDGE_RGBA, sample_sheets, tiled
from tinyfusion.report.load import read_run
from tinyfusion.report.page import embedded_record

KEPT = [1, 2, 5, 6]
HOSTILE = "<script>alert('x')</script>&\"</script>"
FIDS = {"teacher": 3.12, "pruned": 48.7, "student": 5.31}
PROTOCOL = "features 8a8a8a8a | digits bbbbbbbb 1437 | 40 images | ddim 50 steps | seed 0"


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def recipe_values(**more: Any) -> dict[str, Any]:
    expected = [
        {"metric": "student.digits.fid", "value": 5.0, "tolerance": 0.5, "note": "three seeds"},
        {"metric": "speedup", "value": 1.5, "tolerance": 0.1, "note": ""},
        {"metric": "student.elsewhere.fid", "value": 1.0, "tolerance": 0.1, "note": ""},
    ]
    settings = {
        "prune": {"scheme": "1:2", "criterion": "learned"},
        "evaluate": {"references": ["digits", "digits:heldout"]},
    }
    return {
        "name": "digits",
        "description": "Half goes.",
        "seed": 7,
        "expected": expected,
        "teacher_hash": "c5" * 32,
        **settings,
        **more,
    }


def plan_values() -> dict[str, Any]:
    return {
        "kept": {"blocks": KEPT}, "depth": {"blocks": 8}, "criterion": "learned", "scheme": "1:2", "distribution": "categorical",
        "groups": {"blocks": [[1, 2]] * 4}, "seed": 7, "teacher": "c5" * 32, "cost": {"seconds": 3.0, "images": 640.0}, "version": 1,
        "scores": {"meaning": "probability of each candidate of each group", "blocks": [[0.12, 0.88], [0.7, 0.3], [0.1, 0.9], [0.8, 0.2]]},
    }  # fmt: skip


def prune_lines(num: int = 12) -> list[dict[str, Any]]:
    common = {"mse": 0.1, "kept": {"blocks": KEPT}}
    return [
        {"step": 10 * i, "seen_images": 64 * (i + 1), "seconds": 0.1 * i, "loss": 0.5 / (i + 1),
         "confidence": {"blocks": [0.45, 0.5, 0.5 + 0.04 * i, 0.9]}, **common}
        for i in range(num)
    ]  # fmt: skip


def make_prune(path: Path, recipe: dict[str, Any] | None = None) -> Path:
    """A finished `prune` run."""
    values = recipe or {"seed": 7, "teacher": "c5" * 32, "prune": {"scheme": "1:2", "criterion": "learned"}}
    write(path / "run.json", {**stamp("prune", values, "done"), "seconds": 3.0, "seen_images": 768})
    write(path / "plan.json", plan_values())
    write_lines(path / "metrics.jsonl", prune_lines())
    write(path / "student" / "model.json", {"arch": {"depth": 4}, "plan": plan_values(), "hash": "e0" * 32})
    return path


def make_recover(path: Path, recipe: dict[str, Any] | None = None) -> Path:
    """A finished `recover` run by masked distillation."""
    write(path / "run.json", {**stamp("recover", recipe or {"seed": 7}, "done"), "seconds": 9.0, "seen_images": 12_800})
    lines = [
        {
            "step": i,
            "seen_images": 128 * (i + 1),
            "seconds": 0.1 * i,
            "loss": 0.5 / (i + 1),
            "mse": 0.4,
            "kd_loss": 0.2,
            "feat_loss": 0.7,
        }
        for i in range(40)
    ]
    write_lines(path / "metrics.jsonl", lines)
    write(path / "student" / "model.json", {"arch": {"depth": 4}, "plan": plan_values(), "hash": "a1" * 32})
    return path


def make_run(path: Path, **recipe: Any) -> Path:
    """A finished `run` of an 8-block teacher cut to 4."""
    values = recipe_values(**recipe)
    times = {"prune": 61.5, "recover": 104.0, "sample": 44.0, "evaluate": 9.0, "speed": 12.0}
    record = {"seconds": 230.5, "stages": times, "command": f"tinyfusion run --recipe digits --out {path.name}"}
    write(path / "run.json", {**stamp("run", values, "done"), **record, "teacher_seen_images": 135_680})
    make_prune(path / "prune", values)
    make_recover(path / "recover", values)
    labels = np.arange(40, dtype=np.int64) % 10
    (path / "samples").mkdir()
    for i, (model, fid) in enumerate(FIDS.items()):
        images = np.random.default_rng(i).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
        np.savez(path / "samples" / f"{model}.npz", arr_0=images, arr_1=labels)
        for reference, add in (("digits", 0.0), ("digits-heldout", 1.5)):
            numbers = {"fid": fid + add, "sfid": 7.0, "inception_score": 9.0, "precision": 0.9, "recall": 0.8}
            protocol = PROTOCOL.replace("digits ", reference.replace("-", ":") + " ")
            write(
                path / "evaluations" / f"{model}-{reference}.json",
                {**stamp("evaluate", {}, "done"), **numbers, "num_images": 40, "protocol": protocol},
            )
    keys = ("depth", "num_parameters", "macs", "latency_ms", "latency_ms_spread")
    sizes = {
        "teacher": (8, 924_000, 13_800_000, 21.4, [21.0, 22.0]),
        "student": (4, 467_000, 7_000_000, 10.9, [10.0, 11.0]),
    }
    models = {name: dict(zip(keys, values, strict=True)) for name, values in sizes.items()}
    ratios = {"speedup": 1.963, "speedup_spread": [1.91, 2.03]}
    write(path / "speed.json", {"protocol": "9 interleaved", "batch_size": 64, "models": models, **ratios})
    return path


class Page(HTMLParser):
    """Text, attributes and balance of an HTML page."""

    VOID = frozenset({"meta", "img", "br", "link", "path", "use", "rect"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> str:
    return render_run(make_run(tmp_path_factory.mktemp("page") / "digits"))


def test_the_page_says_what_the_run_found(finished: str) -> None:
    text = Page(finished).text
    for fact in (
        "8 → 4", "924 k → 467 k", "13.8 M → 7.0 M", "1.96×", "1.91× to 2.03×", "21.4 → 10.9",
        "3.12 teacher → 48.7 pruned → 5.31 student", "Kept: 1, 2, 5, 6", "6.81", "50.2",
        "tinyfusion run --recipe digits --out digits", "1 min 44 s", "768 by the search and 12.8 k by the recovery",
        "10 % of the 136 k", "e0" * 32, "c5" * 32, PROTOCOL,
    ):  # fmt: skip
        assert fact in text, fact


def test_blocks_of_all_lists_are_counted(tmp_path: Path) -> None:
    """An uncut model states its blocks; folders from before 0.4.0 in one of its sizes."""
    model = tiny("mar")
    save_model(model, tmp_path / "run" / "model")
    write(tmp_path / "run" / "run.json", stamp("train", recipe_values(), "done"))
    run = read_run(tmp_path / "run")
    assert len(model.stack.depths()) == 2
    assert tables.depths(run) == {"model": len(model.stack)}
    assert f"blocks {len(model.stack)} " in Page(render_run(tmp_path / "run")).text
    former = {"model": {"arch": {"depth": 12}}}
    assert tables.depths(dataclasses.replace(run, models=former)) == {"model": 12}


def test_the_title_names_the_depths_once_they_are_decided(finished: str, tmp_path: Path) -> None:
    assert "<title>digits: 8 blocks to 4 · tinyfusion</title>" in finished
    write(tmp_path / "run.json", stamp("run", recipe_values(), "running"))
    assert "<title>digits · tinyfusion</title>" in render_run(tmp_path)


def test_small_losses_have_labels() -> None:
    steps = list(range(9))
    falling = Shape([list(zip(steps, np.geomspace(0.0048, 0.2, 9).tolist(), strict=True))], "ink", "total")
    drawn = svg(curves([falling, Shape([[(i, 0.1) for i in steps]], "teacher", "noise")]), NARROW_PX, "Loss")
    texts = re.findall(r"<text [^>]*>([^<]*)</text>", drawn)
    assert {"0.005", "0.01", "0.1"} <= set(texts) and "0.00" not in texts
    flat = svg(curves([Shape([[(0, 0.9972), (1, 0.998), (2, 0.9991)]], "ink")]), NARROW_PX, "Loss")
    labels = [float(text) for text in re.findall(r"<text [^>]*>(0\.99\d*)</text>", flat)]
    assert len(labels) >= 2, "a loss that hardly moves has its numbers too"
    assert "font-family" not in drawn


def test_expected_numbers_are_checked(finished: str) -> None:
    text = Page(finished).text
    assert re.search(r"student\.digits\.fid three seeds 5\.00 ± 0\.50 5\.31 ok", text)
    assert re.search(r"speedup 1\.50 ± 0\.10 1\.96 better", text)
    assert re.search(r"student\.elsewhere\.fid 1\.00 ± 0\.10 – not measured", text)


def test_every_block_is_drawn_once_as_kept_or_dropped(finished: str) -> None:
    titles = [value for tag, name, value in Page(finished).attributes if tag == "span" and name == "title"]
    assert titles == [f"block {i}: {'kept' if i in KEPT else 'removed'}" for i in range(8)]


def test_the_page_reaches_nothing_outside_itself(finished: str) -> None:
    page = Page(finished)
    assert page.open == []
    links = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "data", "action")]
    assert len([link for link in links if link.startswith("data:image/png;base64,")]) == 3
    assert all(link.startswith(("data:image/", "#")) for link in links)
    assert not re.search(r"https?://|@import|@font-face", finished)
    assert not re.search(r"url\((?!#)", finished)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert len(finished) < 1_000_000


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a&b<i>", name=HOSTILE, description=HOSTILE)
    page = render_run(path)
    assert "<script>alert" not in page
    assert "<i>" not in page.replace("<i>→</i>", "")
    assert HOSTILE in Page(page).text
    assert embedded_record(page)["recipe"] == {"runs": [str(path)]}


def test_rows_of_another_protocol_stand_apart(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    other = PROTOCOL.replace("seed 0", "seed 1")
    evaluation = json.loads((path / "evaluations" / "teacher-digits.json").read_text())
    write(path / "evaluations" / "teacher-digits.json", {**evaluation, "protocol": other})
    text = Page(render_run(path)).text
    assert "another protocol" in text
    assert PROTOCOL in text
    assert other in text
    assert "The protocols differ" in text


def test_several_runs_are_compared_and_their_drawings_do_not_collide(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("one", "two")]
    report([*runs, make_prune(tmp_path / "three")], RunOptions(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Comparison of the runs" in Page(page).text
    ids = [value for _, name, value in Page(page).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert page.count('<article class="run"') == 3


def test_one_stage_alone_has_a_page(tmp_path: Path) -> None:
    prune = Page(render_run(make_prune(tmp_path / "prune"))).text
    assert "Kept: 1, 2, 5, 6" in prune
    assert "Loss of the mask search" in prune
    recover = Page(render_run(make_recover(tmp_path / "recover"))).text
    assert "Loss of the recovery" in recover
    assert "8 → 4" in recover
    write(tmp_path / "train" / "run.json", stamp("train", {"seed": 1}, "running"))
    assert "running" in Page(render_run(tmp_path / "train")).text
    write_lines(tmp_path / "train" / "metrics.jsonl", [{"step": 0, "seen_images": 64, "seconds": 0.2, "loss": 0.987}])
    assert "0.987" in Page(render_run(tmp_path / "train")).text


def test_plans_without_groups_have_a_page(tmp_path: Path) -> None:
    plan = {"kept": {"blocks": KEPT}, "depth": {"blocks": 8}, "criterion": "indices", "version": 1}
    write(tmp_path / "run.json", stamp("prune", {"seed": 0}, "done"))
    write(tmp_path / "plan.json", plan)
    text = Page(render_run(tmp_path)).text
    assert "criterion indices" in text
    assert "Kept: 1, 2, 5, 6" in text


@pytest.mark.parametrize(
    "missing", ["speed.json", "evaluations", "samples", "recover", "prune", "prune/plan.json", "prune/metrics.jsonl"]
)
def test_an_unfinished_run_has_a_page(tmp_path: Path, missing: str) -> None:
    path = make_run(tmp_path / "run")
    gone = path / missing
    gone.rename(tmp_path / "gone")
    write(path / "run.json", stamp("run", recipe_values(), "running"))
    text = Page(render_run(path)).text
    assert re.search(r"digits(: 8 blocks to 4)? running", text)


def test_a_search_that_goes_on_shows_its_present_favourite(tmp_path: Path) -> None:
    path = make_prune(tmp_path / "prune")
    (path / "plan.json").unlink()
    (path / "student" / "model.json").unlink()
    with open(path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 120, "loss": 0.0')
    run = read_run(path)
    assert not run.decided
    assert run.plan is not None
    assert run.plan.depth == {"blocks": 8}
    assert len(run.metrics["prune"]) == 12
    text = Page(render_run(path)).text
    assert "Blocks that would be kept now" in text
    assert "The search has not ended" in text


def test_a_page_about_the_same_runs_is_written_anew(tmp_path: Path) -> None:
    path, options = make_prune(tmp_path / "prune"), RunOptions(tmp_path / "page.html")
    report([path], options)
    before = options.out.read_bytes()
    write_lines(path / "metrics.jsonl", prune_lines(20))
    report([path], RunOptions(options.out, dry_run=True))
    assert options.out.read_bytes() == before
    report([path], options)
    assert options.out.read_bytes() != before
    with pytest.raises(UserError, match="another recipe"):
        report([make_prune(tmp_path / "other")], options)


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    path, page = make_prune(tmp_path / "prune"), tmp_path / "page.html"
    for content in (b"<html>mine</html>", b"\xff\xfe\x00"):
        page.write_bytes(content)
        with pytest.raises(UserError, match="not made by tinyfusion"):
            report([path], RunOptions(page))
        assert page.read_bytes() == content


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no run\.json"):
        read_run(tmp_path)
    write(tmp_path / "file.json", {})
    with pytest.raises(UserError, match="is a file"):
        read_run(tmp_path / "file.json")
    write(tmp_path / "run.json", {"made_by": "something", "verb": "run"})
    with pytest.raises(UserError, match="something else"):
        read_run(tmp_path)
    write(tmp_path / "run.json", {**stamp("prune", {}, "done"), "format_version": 99})
    with pytest.raises(UserError, match="upgrade"):
        read_run(tmp_path)
    write(tmp_path / "run.json", stamp("prune", {}, "done"))
    (tmp_path / "metrics.jsonl").write_text('{"step": 0\n{"step": 1}\n')
    with pytest.raises(UserError, match="metrics.jsonl, line 1, is damaged: not valid JSON"):
        read_run(tmp_path)


def test_opacity_is_confidence_above_chance() -> None:
    sizes = [[1, 2], [2, 4], [1, 1]]
    record = {"step": 3, "kept": {"blocks": [1, 2, 5, 6]}, "confidence": {"blocks": [0.4, 1 / 6 + 5 / 12, 1.0]}}
    strengths = decision_strengths([record], consecutive_groups(sizes), "blocks")[:, 0]
    assert np.flatnonzero(~np.isnan(strengths)).tolist() == [1, 2, 5, 6]
    assert strengths[[1, 2, 5, 6]] == pytest.approx([0.0, 0.5, 0.5, 1.0])


def test_numbers_read_well() -> None:
    assert [significant(x) for x in (3.14159, 48.66, 118.2, 1234.5, 0.0, None, 0.00012)] == [
        "3.14",
        "48.7",
        "118",
        "1,234",
        "0",
        "–",
        "1.20e-04",
    ]
    assert [count(x) for x in (1_000, 25_600, 467_400, 675_129_632, 118.69e9)] == [
        "1,000",
        "25.6 k",
        "467 k",
        "675 M",
        "119 G",
    ]
    assert [duration(x) for x in (4.24, 192, 3840)] == ["4.2 s", "3 min 12 s", "1 h 4 min"]
    assert [percent(x) for x in (0.5, 0.06, 0.999, 1.0, 0.0)] == ["50 %", "6.0 %", "> 99 %", "100 %", "0 %"]


def test_the_page_is_made_without_torch(tmp_path: Path) -> None:
    path = make_prune(tmp_path / "prune")
    code = "import sys; from pathlib import Path; from tinyfusion.commands.report import render_run; "
    code += "page = render_run(Path(sys.argv[1])); assert '</html>' in page; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


# ------------------------------------------------------------------------------------------- what may mislead is marked


def timed(path: Path, speedup: float, spread: list[float]) -> Path:
    """A run whose speed was measured so; the MACs ratio is 13.8 / 7.0, or 1.97. spread: of the teacher's milliseconds."""
    folder = make_run(path)
    speed = json.loads((folder / "speed.json").read_text(encoding="utf-8"))
    speed["speedup"] = speedup
    speed["models"]["teacher"]["latency_ms_spread"] = spread
    write(folder / "speed.json", speed)
    return folder


STEADY, SCATTERED = [21.0, 22.0], [15.0, 40.0]


@pytest.mark.parametrize(
    ("speedup", "spread", "note", "state"),
    [
        (1.55, STEADY, "far from the ratio of MACs, 1.97×: work outside the blocks", "ok"),
        (1.96, STEADY, "middle half of the measured ratios: 1.91× to 2.03×", "better"),  # 1.5 ± 0.1 was expected
        (0.91, SCATTERED, "far from the ratio of MACs, 1.97×: the times scatter, so this machine was busy", "busy machine?"),
        (4.20, SCATTERED, "far from the ratio of MACs, 1.97×: the times scatter, so this machine was busy", "busy machine?"),
        (1.20, STEADY, "far from the ratio of MACs, 1.97×: work outside the blocks", "off"),
    ],
)  # fmt: skip
def test_a_speed_up_far_from_the_macs_is_marked(
    speedup: float, spread: list[float], note: str, state: str, tmp_path: Path
) -> None:
    text = Page(render_run(timed(tmp_path / "run", speedup, spread))).text
    assert note in text
    assert re.search(rf"speedup (far from.*? )?1\.50 ± 0\.10 {significant(speedup)} {re.escape(state)}", text)


@pytest.mark.parametrize(
    ("metric", "value", "state"),
    [
        ("student.digits.fid", 4.4, "better"), ("student.digits.fid", 5.6, "off"), ("student.digits.fid", 5.1, "ok"),
        ("student.digits.recall", 5.6, "better"), ("student.macs", 4.4, "off"), ("student.macs", None, "missing"),
    ],
)  # fmt: skip
def test_better_than_expected_is_not_red(metric: str, value: float | None, state: str) -> None:
    assert tables.check_state(metric, value, wanted=5.0, tolerance=0.5) == state


def test_the_page_has_one_speed_and_says_why_its_curve_is_another_measurement(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    points = [
        {"depth": depth, "latency_ms": 20.0 / ratio, "speedup": ratio, "speedup_spread": [ratio, ratio]}
        for depth, ratio in ((8, 1.0), (4, 2.22))
    ]
    write(folder / "depth_speed.json", {"teacher_depth": 8, "points": points, "protocol": "7 steps"})
    page = render_run(folder)
    assert "the speed-up of this student is the 1.96× above" in Page(page).text
    assert not re.search(r"student[^<]*2\.22×", page), "the curve's number stands in its table alone"


def test_white_images_have_an_edge() -> None:
    white = np.full((3, 4, 4, 1), 255, np.uint8)
    grid = tiled([*white, None], 2)
    assert grid.shape == (11, 11, 4)
    for top, left in ((0, 0), (0, 5), (5, 0)):
        tile = grid[top : top + 6, left : left + 6]
        assert (tile[1:-1, 1:-1] == 255).all()
        assert all(
            (tuple(pixel) == EDGE_RGBA) for edge in (tile[0], tile[-1], tile[:, 0], tile[:, -1]) for pixel in edge
        )
    assert (grid[6:, 6:, 3] == 0).all(), "a gap has none"


def test_decisions_at_chance_look_like_it(tmp_path: Path) -> None:
    """A choice of 0.517 between two is a coin toss; one of 0.9 is not."""
    folder = make_prune(tmp_path / "run")
    plan = plan_values()
    plan["scores"]["blocks"] = [[0.483, 0.517], [0.7, 0.3], [0.1, 0.9], [0.8, 0.2]]
    write(folder / "plan.json", plan)
    (group, *others) = block_lists(read_run(folder))["blocks"]
    assert group.is_undecided and group.undecided == {0, 1} and not any(other.undecided for other in others)
    page = render_run(folder)
    text = Page(page).text
    assert "1 of 2 undecided (52 %)" in text and "90 % confident" in text and "52 % confident" not in text
    assert "2 of 8 blocks were decided at chance level: another seed may choose others" in text
    assert len(re.findall(r'class="block (?:kept|removed) undecided" title', page)) == 2
    assert "at chance" not in Page(render_run(make_prune(tmp_path / "sure"))).text


def test_of_a_subset_every_block_has_its_own_chance(tmp_path: Path) -> None:
    folder = make_prune(tmp_path / "run")
    plan = plan_values() | {"distribution": "subset", "scheme": "4:8", "groups": {"blocks": [[4, 8]]}}
    plan["scores"] = {
        "meaning": "probability of each block to stay",
        "blocks": [[0.1, 0.9, 0.52, 0.2, 0.3, 0.8, 0.7, 0.48]],
    }
    write(folder / "plan.json", plan)
    (group,) = block_lists(read_run(folder))["blocks"]
    # kept is 1, 2, 5, 6: block 2 stays by 0.52 and block 7 goes by 0.48, chance being 4 of 8
    assert group.undecided == {2, 7} and not group.is_undecided


def test_tables_scroll_visibly(finished: str) -> None:
    """A table that is wider than a phone has a scroll bar and shadows, and the keyboard reaches it."""
    style = finished[finished.index(".scroll {") : finished.index(".scroll:focus-visible")]
    assert "overflow-x: auto" in style and "scrollbar-width: thin" in style and style.count("no-repeat scroll") == 2
    tables = re.findall(r"<(div|details)[^>]*>\s*<table", finished)
    assert tables and finished.count('<div class="scroll" tabindex="0">') >= len(tables)


def test_real_images_stand_last_with_labels_of_their_own(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    np.savez(
        folder / "samples" / "real.npz", arr_0=np.zeros((6, 8, 8, 1), np.uint8), arr_1=np.array([3, 3, 3, 7, 7, 7])
    )
    write(folder / "samples" / "real.json", {"protocol": "the first images of each class of own"})
    *drawn, real = sample_sheets(read_run(folder))
    assert (real.title, real.columns) == ("real images", ["3", "7"])
    assert real.caption == "the first images of each class of own"
    assert all(grid.columns == [str(i) for i in range(10)] for grid in drawn)
    text = Page(render_run(folder)).text
    assert "Samples of every model from the same seeds" in text, "real images have no seed that could differ"


# ---------------------------------------------------------------------------------------------------- mistyped records

HUGE = 10**40


@pytest.mark.parametrize(
    ("file", "field", "value", "message"),
    [
        ("run.json", "seconds", "long", "run.json is damaged: seconds: wanted a number, got 'long'"),
        ("run.json", "stages", [1], "run.json is damaged: stages: wanted an object, got [1]"),
        ("run.json", "stages.prune", True, "run.json is damaged: stages.prune: wanted a number from 0 on, got True"),
        ("run.json", "recipe.expected.0.value", None, "recipe.expected[0].value: wanted a number, got None"),
        ("run.json", "recipe.evaluate.references", "digits", "recipe.evaluate.references: wanted a list, got 'digits'"),
        ("run.json", "format_version", "new", "run.json is damaged: format_version: wanted a whole number, got 'new'"),
        ("prune/run.json", "seen_images", [], "prune/run.json is damaged: seen_images: wanted a number, got []"),
        ("prune/plan.json", "kept.blocks", [1, 2, 5, 60], "the plan is damaged: of the 8 blocks of blocks it keeps [1, 2, 5, 60]"),
        ("prune/plan.json", "groups.blocks", [[1, 2]], "plan.json is damaged: groups.blocks do not make up 8 blocks"),
        ("prune/plan.json", "kept.blocks", "all", "plan.json: the plan is incomplete or damaged"),
        ("recover/student/model.json", "arch", 7, "model.json is damaged: arch: wanted an object, got 7"),
        ("evaluations/student-digits.json", "fid", "low", "student-digits.json is damaged: fid: wanted a number, got 'low'"),
        ("evaluations/student-digits.json", "fid", HUGE, "student-digits.json is damaged: fid: wanted a number, got 1000000"),
        ("evaluations/student-digits.json", "fid", float("nan"), "student-digits.json is damaged: fid: wanted a number, got nan"),
        ("speed.json", "speedup", {}, "speed.json is damaged: speedup: wanted a number from 0 on, got {}"),
        ("speed.json", "models.teacher.macs", 0, "models.teacher.macs: wanted a number from 1 on, got 0"),
        ("speed.json", "speedup_spread", [1.0], "speedup_spread: wanted a list of 2, got [1.0]"),
        ("speed.json", "models.student.depth", ..., "models.student.depth is missing"),
        ("prune/metrics.jsonl", "3.step", "x", "metrics.jsonl, line 4, is damaged: step: wanted a whole number, got 'x'"),
        ("prune/metrics.jsonl", "3.loss", "x", "metrics.jsonl, line 4, is damaged: loss: wanted a number, got 'x'"),
        ("prune/metrics.jsonl", "3.kept.blocks", [-1], "line 4, is damaged: kept.blocks[0]: wanted a whole number from 0 on"),
        ("prune/metrics.jsonl", "3", "step", "metrics.jsonl, line 4, is damaged: the whole: wanted an object, got 'step'"),
        ("prune/metrics.jsonl", "3.confidence.blocks", [0.5], "the files of "),  # of the right type, and too few
    ],
)  # fmt: skip
def test_a_mistyped_record_is_named_with_its_field(
    file: str, field: str, value: Any, message: str, tmp_path: Path
) -> None:
    path = make_run(tmp_path / "run") / file
    lines = file.endswith(".jsonl")
    text = path.read_text(encoding="utf-8")
    record = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    *way, last = [int(name) if name.isdecimal() else name for name in field.split(".")]
    inner: Any = record
    for name in way:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    write_lines(path, record) if lines else write(path, record)
    with pytest.raises(UserError, match=re.escape(message)):
        render_run(tmp_path / "run")


def test_a_metrics_line_that_nobody_can_parse_is_one_error(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run") / "prune" / "metrics.jsonl"
    for text, reason in (("[" * 100_000, "nested too deeply"), ('{"step": ' + "1" * 5_000 + "}", "not valid JSON")):
        path.write_text(f'{text}\n{{"step": 1}}\n', encoding="utf-8")
        with pytest.raises(UserError, match=f"metrics.jsonl, line 1, is damaged: .*{reason}"):
            read_run(tmp_path / "run")
    path.write_bytes(b"\xff\xfe{}\n")
    with pytest.raises(UserError, match="metrics.jsonl is damaged: not UTF-8"):
        read_run(tmp_path / "run")


def test_names_that_are_no_utf_8_have_a_page(tmp_path: Path) -> None:
    folder = make_run(Path(os.fsdecode(os.fsencode(tmp_path) + b"/digits-\xff")))
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    write(folder / "run.json", record | {"command": f"tinyfusion run --out {folder}"})
    scores = folder / "evaluations"
    shutil.copy(scores / "student-digits.json", os.fsencode(scores) + b"/caf\xe9.json")
    report([folder], RunOptions(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "digits-\\udcff" in Page(page).text and "tinyfusion run --out" in page
    report([folder], RunOptions(tmp_path / "page.html"))  # the same runs: written anew
