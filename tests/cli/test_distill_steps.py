"""The verb `distill-steps`, and what the other verbs do with a model of few steps."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from material import Cli, tiny_mar, tiny_sit
from test_faults import SETTINGS, failed
from test_verbs import done

from tinyfusion.models.checkpoint import open_model, save_model
from tinyfusion.report.format import significant
from tinyfusion.report.load import read_run
from tinyfusion.report.tables import comparable

SECTION = " ".join(f"--set distill_steps.training.{setting}" for setting in ["steps=12", *SETTINGS.split()])
MADE = f"distill-steps --model student --teacher teacher {SECTION} --set distill_steps.teacher_steps=8"


def made_by(method: str) -> str:
    command = MADE if method == "consistency" else re.sub("--set distill_steps.teacher_steps=[0-9]+", "", MADE)
    return f"{command} --method {method}"


@pytest.mark.parametrize("method", ["consistency", "matching"])
def test_a_model_learns_to_draw_in_few_steps_and_is_drawn_so(cli: Cli, work: Path, method: str) -> None:
    outcome = done(cli, f"{made_by(method)} --num-steps 2 --guidance 2 --out run --json").last_json
    assert outcome["num_steps"] == 2
    model = open_model("run")
    assert model.facts.few_steps is not None and model.facts.few_steps.method == method
    assert len(model.facts.few_steps.levels) == 2 and model.facts.few_steps.guidance == 2
    assert model.facts.kept == open_model("student").facts.kept
    refused = cli(*shlex.split("sample --model run --num-steps 50 --out a.npz"))
    assert refused.code == 2 and "--num-steps is for models of many steps" in refused.err
    drawn = done(cli, "sample --model run --num-images 5 --out a.npz")
    assert "draws in its own 2 steps" in drawn.err
    assert f"{method}, 2 steps" in json.loads(Path("a.json").read_text())["protocol"]
    done(cli, "sample --model run --num-images 5 --batch-size 2 --out b.npz")
    one, other = (np.load(name)["arr_0"].astype(int) for name in ("a.npz", "b.npz"))
    assert int(np.abs(one - other).max()) <= 1
    bench = done(cli, "bench run --vs teacher --batch-size 2 --repeats 3 --set bench.product_size=64 --json").last_json
    sides = bench["models"]
    assert (sides["model"]["passes_per_image"], sides["vs"]["passes_per_image"]) == (2, 500)
    assert bench["drawing_speedup"] > bench["speedup"]["ratio"]
    assert done(cli, "inspect run --json").last_json["few_steps"]["method"] == method
    done(cli, "report run --out page.html")
    assert "2 steps" in Path("page.html").read_text()


def test_the_teacher_is_that_of_the_students_run(cli: Cli, work: Path) -> None:
    done(cli, "prune --teacher teacher --criterion first --out cut")
    answer = done(cli, f"{MADE.replace('--teacher teacher', '').replace('--model student', '--model cut')} --out run")
    assert "teacher" in answer.err and open_model("run").facts.few_steps is not None


def test_flows_draw_in_few_steps_too(cli: Cli, work: Path) -> None:
    save_model(tiny_sit(), Path("sit"))
    done(cli, f"{MADE.replace('student', 'sit').replace('--teacher teacher', '--teacher sit')} --out run")
    done(cli, "sample --model run --num-images 3 --out a.npz")
    assert (
        "consistency, 4 steps at noise levels 1, 0.75, 0.5, 0.25" in json.loads(Path("a.json").read_text())["protocol"]
    )


def test_a_dry_run_writes_nothing(cli: Cli, work: Path) -> None:
    before = sorted(path.name for path in Path().iterdir())
    answer = done(cli, f"{MADE} --out run --dry-run")
    said = answer.out + answer.err
    assert "4 steps at noise levels 1, 0.75, 0.5, 0.25" in said and "minutes" in said
    assert sorted(path.name for path in Path().iterdir()) == before


BAD = {
    "a family without a mixture": ("distill-steps --model mar --teacher mar --out run", "few steps are for models whose process mixes"),
    "no teacher": ("distill-steps --model student --out run", "distill-steps needs --teacher"),
    "a teacher of other images": (f"{MADE.replace('--teacher teacher', '--teacher smaller-images')} --out run", "does not take what"),
    "a teacher of few steps": ("distill-steps --model student --teacher fast --out run", "draws in few steps itself"),
    "pruning what draws in few steps": ("prune --teacher fast --out run", "a model of few steps cannot be pruned"),
    "recovering it": ("recover --student fast --teacher teacher --out run", "no denoiser of all noise levels"),
    "a guidance below 1": (f"{MADE} --guidance 0.5 --out run", "at least 1"),
    "no steps": (f"{MADE} --num-steps 0 --out run", "at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("cause", BAD)
def test_bad_input(cli: Cli, work: Path, cause: str) -> None:
    save_model(tiny_mar(), Path("mar"))
    if "fast" in BAD[cause][0]:
        done(cli, f"{MADE} --out made")
        Path("made/student").rename("fast")
    arguments, message = BAD[cause]
    failed(cli(*shlex.split(arguments)), message)
    assert not Path("run").exists()


def test_a_run_prunes_recovers_and_distils_steps(cli: Cli, work: Path) -> None:
    trained = " ".join(
        f"--set {stage}.{setting}"
        for stage in ("recover.training", "distill_steps.training")
        for setting in ["steps=3", *SETTINGS.split()]
    )
    command = (
        f"run --recipe digits-4-steps --set teacher=teacher {trained} --set sample.num_images=8 --set sample.num_steps=10 "
        "--set sample.batch_size=8 --set speed.repeats=2 --set speed.batch_size=2 --set speed.depths=0 "
        '--set evaluate.references=["digits"] --out whole'
    )
    answer = done(cli, f"{command} --dry-run")
    assert "consistency, 4 steps" in answer.out + answer.err and not Path("whole").exists()
    outcome = done(cli, f"{command} --json").last_json
    speed = json.loads(Path("whole/speed.json").read_text())["models"]
    assert set(speed) == {"teacher", "student", "few-steps"}
    fast = speed["few-steps"]
    assert fast["drawing_speedup"] == pytest.approx(fast["speedup"] * 10 / 4) == outcome["speedup"]
    fid = json.loads(Path("whole/evaluations/few-steps-digits.json").read_text())["fid"]
    reference, compared, others, _ = comparable(read_run(Path("whole")))
    assert (reference, list(compared), others) == ("digits", ["teacher", "student", "few-steps"], [])
    assert compared["few-steps"]["fid"] == fid
    page = Path("whole/report.html").read_text()
    assert f'few-steps">{significant(fid)}<' in page, "in the headline"
    assert "4 steps at noise levels" in page and "speed-up of a drawing" in page and "distillation of steps" in page
    assert "is finished" in done(cli, command).err
