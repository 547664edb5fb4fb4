"""The recipes of the paper say what the paper says, and run: two steps of search and recovery at the published depths."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinyfusion.blocks.plan import PrunePlan, plan_from_json
from tinyfusion.blocks.scheme import parse_scheme
from tinyfusion.cli import main
from tinyfusion.commands.prune import prune
from tinyfusion.commands.recover import recover
from tinyfusion.config.loading import flatten, load_recipe, shipped_recipes, to_plain
from tinyfusion.config.recipe import Recipe
from tinyfusion.families.dit.model import DiT, DiTArch
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.models.checkpoint import LoadedModel, open_model, save_model
from tinyfusion.models.macs import count_macs
from tinyfusion.recover.align import block_pairs

# name: scheme, teacher, depth of the teacher and of the student
RECIPES = {
    "dit-xl-d19": ("3:4x2+2:4+3:4+2:4+3:4x2", "dit-xl-2-256", 28, 19),
    "dit-xl-d14": ("1:2", "dit-xl-2-256", 28, 14),
    "dit-xl-d7": ("1:2", "runs/dit-xl-d14", 14, 7),
    "dit-xl-d16-hybrid": ("2:4x2+3:4+2:4+3:4+2:4x2", "dit-xl-2-256", 28, 16),
}
PUBLISHED = {
    "seed": 0,
    "prune.criterion": "learned",
    "prune.distribution": "categorical",
    "prune.update": "lora",
    "prune.lora_rank": 8,
    "prune.lora_alpha": 16.0,
    "prune.gate_learning_rate": 1e-3,
    "prune.logit_init": 0.02,
    "prune.temperature": [4.0, 0.1],
    "prune.scaling": [100.0, 100.0],
    "prune.training.steps": 10_009,
    "prune.training.stop_after": None,
    "prune.training.batch_size": 128,
    "prune.training.learning_rate": 1e-4,
    "prune.training.learning_rate_end_share": 1.0,
    "prune.training.ema_decay": 0.999,
    "recover.method": "masked-kd",
    "recover.alpha_kd": 0.9,
    "recover.beta": [1e-2, 0.0],
    "recover.mask": "own",
    "recover.mask_sigmas": 2.0,
    "recover.training.steps": 500_400,
    "recover.training.stop_after": None,
    "recover.training.batch_size": 256,
    "recover.training.learning_rate": 2e-4,
    "recover.training.learning_rate_end_share": 0.5,
    "recover.training.ema_decay": 0.9999,
    **{
        f"{stage}.training.{field}": value
        for stage in ("prune", "recover")
        for field, value in {
            "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 1.0, "label_drop": 0.1,
            "warmup_steps": 0, "dtype": "bfloat16", "log_every_steps": 100, "checkpoint_every_steps": 10_000,
        }.items()
    },
    "sample.num_images": 50_000,
    "sample.sampler": "ddpm",
    "sample.num_steps": 250,
    "sample.guidance": 1.5,
    "sample.guidance_channels": "published",
    "sample.clip": False,
    "sample.label_rule": "uniform",
    "sample.labels": [],
    "sample.weights": "ema",
    "sample.batch_size": 32,
    "evaluate.neighbours": 3,
    "evaluate.is_splits_size": 5000,
}  # fmt: skip
# (FID, Inception Score) of table 1
RESULTS = {
    "dit-xl-d19": {"teacher": (2.27, 278.24), "student": (2.55, 251.02), "step-100000": (2.90, 242.29)},
    "dit-xl-d14": {"teacher": (2.27, 278.24), "student": (2.86, 234.50), "step-100000": (3.73, 207.27)},
    "dit-xl-d7": {"teacher": (2.86, 234.50), "student": (5.87, 166.91)},
    "dit-xl-d16-hybrid": {"teacher": (2.27, 278.24)},
}
PAIRS = {
    "dit-xl-d19": [(2, 3), (5, 7), (7, 11), (10, 15), (12, 19), (15, 23), (18, 27)],
    "dit-xl-d14": [(i, 2 * i + 1) for i in range(14)],
    "dit-xl-d7": [(i, 2 * i + 1) for i in range(7)],
    "dit-xl-d16-hybrid": [(1, 3), (3, 7), (6, 11), (8, 15), (11, 19), (13, 23), (15, 27)],
}
TINY = dict(input_size=8, patch_size=4, in_channels=4, hidden_size=32, num_heads=2, num_classes=10)
NAMES = sorted(RECIPES)
SHORT = {
    f"{stage}.training.{field}": value
    for stage in ("prune", "recover")
    for field, value in (("stop_after", 2), ("batch_size", 4))
}


@pytest.mark.parametrize("name", NAMES)
def test_every_value_is_the_published_one(name: str) -> None:
    values = flatten(to_plain(load_recipe(name)))
    scheme, teacher, _, _ = RECIPES[name]
    assert (values["prune.scheme"], values["teacher"]) == (scheme, teacher)
    assert {path: values[path] for path in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("name", NAMES)
def test_the_scheme_gives_the_published_depth(name: str) -> None:
    scheme, _, depth, kept = RECIPES[name]
    groups = parse_scheme(scheme, {"blocks": depth})["blocks"]
    assert sum(group.keep for group in groups) == kept
    sizes = {"blocks": [[group.keep, group.size] for group in groups]}
    blocks = {"blocks": [group.start + i for group in groups for i in range(group.keep)]}
    plan = PrunePlan(blocks, {"blocks": depth}, "learned", scheme, groups=sizes)
    assert list(block_pairs(plan)) == PAIRS[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_published_numbers_stand_beside(name: str) -> None:
    expected = load_recipe(name).expected
    reference = load_recipe(name).evaluate.references[0]
    found: dict[str, dict[str, float]] = {}
    for item in expected:
        assert item.note.startswith("table 1")
        assert item.tolerance > 0
        model, _, rest = item.metric.partition(".")
        if rest:
            assert rest.rpartition(".")[0] == reference
            found.setdefault(model, {})[rest.rpartition(".")[2]] = item.value
    assert {m: (v["fid"], v["inception_score"]) for m, v in found.items()} == RESULTS[name]


def test_the_minutes_are_those_of_the_stated_machine() -> None:
    """Three passes of the trained model and one of the teacher, at 800 TFLOP/s."""

    def counted(depth: int) -> int:
        arch = DiTArch(32, 2, 4, 1152, depth, 16, 1000)
        return count_macs(lambda: DiT(arch), lambda: (torch.empty(1, 4, 32, 32), torch.zeros(1), torch.zeros(1).long()))

    one, two = counted(1), counted(2)
    macs = {depth: one + (two - one) * (depth - 1) for depth in (7, 14, 16, 19, 28)}
    assert macs[28] == pytest.approx(118.69e9, rel=1e-4)
    for name, (_, _, depth, kept) in RECIPES.items():
        search = 3 * macs[depth] * 128 * 10_009
        recovery = (3 * macs[kept] + macs[depth]) * 256 * 500_400
        assert load_recipe(name).minutes == pytest.approx(2 * (search + recovery) / 800e12 / 60, rel=0.01)


def settings_of(teacher: Path, data: Path) -> list[str]:
    values = {"teacher": teacher, "data.name": data, **SHORT}
    return [f"{path}={value}" for path, value in values.items()]


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latents") / "latents.npz"
    np.savez(path, np.random.default_rng(0).standard_normal((8, 8, 8, 4), dtype=np.float32), np.arange(8) % 10)
    return path


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def changed(folder: Path, recipe: Recipe) -> set[str]:
    """Fields whose value in the run's record is not the recipe's."""
    values = flatten(to_plain(recipe))
    record = flatten(json.loads((folder / "run.json").read_text())["recipe"])
    return {path for path, value in record.items() if path in values and values[path] != value}


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_of_search_and_recovery(
    name: str, tmp_path: Path, latents: Path, tiny_model: Callable[..., LoadedModel]
) -> None:
    scheme, _, depth, kept = RECIPES[name]
    save_model(tiny_model(**TINY, depth=depth), tmp_path / "teacher")
    recipe = load_recipe(name, settings_of(tmp_path / "teacher", latents))
    prune(recipe, RunOptions(tmp_path / "cut"))
    recover(recipe, RunOptions(tmp_path / "back"), tmp_path / "cut")
    untouched = load_recipe(name)
    assert changed(tmp_path / "cut", untouched) | changed(tmp_path / "back", untouched) <= {
        "teacher",
        "data.name",
        "data.orientation",  # of no meaning for an npz
        *SHORT,
    }

    plan = plan_from_json(json.loads((tmp_path / "cut" / "plan.json").read_text()))
    assert (len(plan.kept["blocks"]), plan.scheme) == (kept, scheme)
    assert list(block_pairs(plan)) == PAIRS[name]
    student = open_model(tmp_path / "back")
    assert len(student.stack) == kept
    assert student.facts.kept == plan.kept

    search, recovery = logged(tmp_path / "cut"), logged(tmp_path / "back")
    assert [line["step"] for line in search] == [line["step"] for line in recovery] == [0, 1]
    assert (search[0]["temperature"], search[0]["scaling"], search[1]["learning_rate"]) == (4.0, 100.0, 1e-4)
    assert (recovery[0]["beta"], recovery[0]["learning_rate"]) == (1e-2, 2e-4)
    assert all(line["applied"] for line in search + recovery)


def test_without_data_one_line_says_what_to_give(
    tmp_path: Path, tiny_model: Callable[..., LoadedModel], capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tiny_model(**TINY, depth=28), tmp_path / "teacher")
    for name in NAMES:
        code = main(["prune", "--recipe", name, "--teacher", str(tmp_path / "teacher"), "--out", str(tmp_path / "out")])
        error = capsys.readouterr().err.strip()
        assert code == 2
        assert error.startswith("error:") and "--data FILE.npz" in error and "\n" not in error
    assert not (tmp_path / "out").exists()


TEACHERS = {name: teacher for name, (_, teacher, _, _) in RECIPES.items() if name != "dit-xl-d7"} | {
    "sit-xl-d14": "sit-xl-2-256",
    "mar-l-d16": "mar-l",
}


@pytest.mark.parametrize(("name", "teacher"), TEACHERS.items(), ids=list(TEACHERS))
def test_a_dry_run_says_what_would_be_fetched(
    name: str,
    teacher: str,
    tmp_path: Path,
    latents: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tinyfusion.core.weights._size_of", lambda entry: 2**30)
    monkeypatch.setattr("tinyfusion.core.weights._fetch", lambda *_: pytest.fail("fetched"))
    command = ["prune", "--recipe", name, "--out", str(tmp_path / "out"), "--dry-run", "--json"]
    assert main([*command, "--data", str(latents)]) == 0
    said = capsys.readouterr()
    assert f"would fetch {teacher} from http" in said.err and "1,024.0 MiB" in said.err
    answer = json.loads(said.out.splitlines()[-1])
    assert (answer["state"], answer["would_fetch"]["bytes"]) == ("checked", 2**30)
    assert main(command) == 2  # without data nothing is fetched at all
    assert "--data" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists() and not (tmp_path / "out").exists()


def test_official_files_of_known_names_have_their_family(
    tmp_path: Path, latents: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tensors of a SiT are those of a DiT: its known name says which it is, and the recipe says so of a file."""
    arch = DiTArch(8, 4, 4, 384, 2, 6, 10)  # of the smallest published width, which determines the heads
    torch.save(DiT(arch).state_dict(), tmp_path / "weights.pt")
    monkeypatch.setattr("tinyfusion.models.places.fetch_weights", lambda name: tmp_path / "weights.pt")
    assert open_model("sit-xl-2-256").family.name == "sit"
    assert open_model("dit-xl-2-256", family="dit").family.name == "dit"
    command = ["prune", "--recipe", "sit-xl-d14", "--teacher", str(tmp_path / "weights.pt"), "--data", str(latents)]
    assert main([*command, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "sit, 2 blocks" in said.out + said.err
    assert "assuming family" not in said.err


def test_the_list_of_recipes_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(NAMES) <= set(shipped_recipes())
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{name} " in f"\n{shown}" for name in NAMES)
    assert "expected: FID 2.55" in shown
    assert main(["recipes", "dit-xl-d19"]) == 0
    assert "student.VIRTUAL_imagenet256_labeled.npz.fid 2.55" in capsys.readouterr().out
