"""`bench`: the numbers it gives belong together, and it says what they depend on."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from material import Cli

from tinyfusion.commands import bench

BENCH = "bench teacher --batch-size 2 --repeats 3 --set bench.product_size=64"


def test_two_models_are_measured_in_turns(cli: Cli, work: Path) -> None:
    before = sorted(work.rglob("*"))
    outcome = cli(*shlex.split(BENCH), "--vs", "deeper", "--json")
    assert outcome.code == 0, outcome.err
    answer = outcome.last_json
    assert "2 images, guidance 1.5 (2 rows per image), float32, cpu" in answer["protocol"]
    assert "medians of 3, interleaved" in answer["protocol"] and answer["protocol"] in outcome.out
    model, other = answer["models"]["model"], answer["models"]["vs"]
    assert (model["depth"], other["depth"]) == (4, 5)
    for found in (model, other):
        seconds = found["latency_ms"] / 1000
        assert found["steps_per_s"] == pytest.approx(1 / seconds)
        assert found["image_steps_per_s"] == pytest.approx(2 / seconds)
        assert found["macs_per_s"] == pytest.approx(4 * found["macs"] / seconds), "two images, two rows each"
        assert found["share_of_product"] == pytest.approx(found["macs_per_s"] / answer["product_macs_per_s"])
        assert found["peak_bytes"] is None or found["peak_bytes"] >= 4 * found["num_parameters"]
        low, high = found["latency_ms_spread"]
        assert low <= found["latency_ms"] <= high
    ratio = answer["speedup"]
    assert ratio["ratio"] == pytest.approx(other["latency_ms"] / model["latency_ms"])
    assert ratio["macs_ratio"] == pytest.approx(other["macs"] / model["macs"])
    assert ratio["share"] == pytest.approx(ratio["ratio"] / ratio["macs_ratio"])
    assert sorted(work.rglob("*")) == before, "nothing is written"


@pytest.mark.parametrize(("spread", "busy"), [([9.0, 11.0], False), ([9.0, 12.0], True)])
def test_times_that_scatter_are_said(spread: list[float], busy: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model = {
        "source": "teacher", "depth": 4, "num_parameters": 9, "macs": 9, "latency_ms": 10.0, "latency_ms_spread": spread,
        "steps_per_s": 1.0, "macs_per_s": 9.0, "share_of_product": 0.5, "peak_bytes": None,
    }  # fmt: skip
    bench._print({"protocol": "p", "product_macs_per_s": 1e9, "models": {"model": model}})
    text = "the times of teacher scatter: this machine is busy, measure again when it is idle"
    assert (text in capsys.readouterr().out) == busy


def test_half_precision_and_no_guidance(cli: Cli, work: Path) -> None:
    outcome = cli(*shlex.split(BENCH), "--dtype", "bfloat16", "--guidance", "1", "--json")
    assert outcome.code == 0, outcome.err
    answer = outcome.last_json
    assert "guidance 1 (1 row per image), bfloat16" in answer["protocol"]
    model = answer["models"]["model"]
    assert model["macs_per_s"] == pytest.approx(2 * model["macs"] / (model["latency_ms"] / 1000))
    assert "speedup" not in answer


def test_a_dry_run_measures_nothing(cli: Cli, work: Path) -> None:
    outcome = cli(*shlex.split(BENCH), "--dry-run", "--json")
    assert outcome.code == 0 and "would measure teacher" in outcome.out
    assert "models" not in outcome.last_json


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("bench", "bench needs MODEL"),
        ("bench nowhere", "no model at nowhere"),
        (f"{BENCH} --vs nowhere", "no model at nowhere"),
        ("bench teacher --batch-size 0", "at least 1"),
        ("bench teacher --repeats 0", "at least 1"),
        ("bench teacher --dtype int4", "--dtype is one of"),
        ("bench teacher --guidance 0.3", "guidance must be at least 1"),
        ("bench teacher --set bench.product_size=8", "bench.product_size must be at least 64"),
    ],
)
def test_bad_input(cli: Cli, work: Path, arguments: str, wanted: str) -> None:
    outcome = cli(*shlex.split(arguments))
    assert outcome.code == 2
    assert [wanted in line for line in outcome.err.splitlines() if line.startswith("error: ")] == [True], outcome.err
