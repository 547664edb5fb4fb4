"""The verb `dynamic`, and what the other verbs do with a model that has routers."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from material import Cli, tiny, tiny_mar, tiny_sit
from test_faults import SETTINGS, failed
from test_verbs import done

from tinyfusion.blocks.dynamics import Deciding
from tinyfusion.core.compiler import check_compiler
from tinyfusion.core.errors import UserError
from tinyfusion.models.attach import detached
from tinyfusion.models.checkpoint import open_model, save_model
from tinyfusion.prune.criteria import by_indices

STEPS = 16
_SECTION = " ".join(f"--set dynamic.training.{setting}" for setting in [f"steps={STEPS}", *SETTINGS.split()])
QUICK = (
    f"{_SECTION} --set dynamic.ramp_steps=4 --set dynamic.auxiliary_steps=8 --set dynamic.finish_steps=4 "
    "--set dynamic.width_bias=0.5 --set dynamic.token_bias=0.5 --set dynamic.block_bias=0.5 --set sample.num_steps=10"
)
# tiny blocks have few units, so that not every budget can be met to a hundredth
MADE = f"dynamic --model wide --target 0.6 {QUICK} --set dynamic.calibration_images=256 --out"


@pytest.fixture
def wide(work: Path) -> Path:
    """The material, and a model of eight heads."""
    save_model(tiny(num_heads=8), work / "wide")
    return work


def test_a_model_becomes_dynamic_and_is_sampled_in_sub_networks(cli: Cli, wide: Path) -> None:
    outcome = done(cli, f"{MADE} run --json").last_json
    answer = json.loads(Path("run/dynamic.json").read_text())
    assert outcome["ratio"] == answer["ratio"] and abs(answer["ratio"] - 0.6) <= 0.006
    model = open_model("run")
    assert model.dynamic is not None and model.facts.dynamic is not None
    assert (model.facts.dynamic["target"], model.facts.dynamic["ratio"]) == (0.6, answer["ratio"])
    done(cli, "sample --model run --num-images 6 --sampler ddim --num-steps 4 --batch-size 4 --out a.npz")
    done(cli, "sample --model run --num-images 6 --sampler ddim --num-steps 4 --batch-size 3 --out b.npz")
    one, other = np.load("a.npz")["arr_0"], np.load("b.npz")["arr_0"]
    assert int(np.abs(one.astype(int) - other.astype(int)).max()) <= 1
    ran = json.loads(Path("a.json").read_text())["dynamic"]
    assert ran["timesteps"] == 4 and 0 < ran["macs_ratio"] < 1
    facts = done(cli, "inspect run --json").last_json
    assert facts["dynamic"]["target"] == 0.6 and len(facts["dynamic"]["heads_per_block"]) == facts["depth"]
    assert facts["dynamic"]["macs"] < facts["macs"]
    bench = done(cli, "bench run --vs wide --batch-size 2 --repeats 3 --set bench.product_size=64 --json").last_json
    assert bench["models"]["model"]["macs"] < bench["models"]["vs"]["macs"]


@pytest.mark.parametrize("verb", ["prune", "recover --search-share 0.5"])
def test_a_dynamic_model_is_not_searched_in_vain(cli: Cli, wide: Path, verb: str) -> None:
    """It cannot be pruned: said before a step of 10,000, not after the last."""
    done(cli, f"{MADE} run")
    outcome = cli(*shlex.split(f"{verb} --teacher run --out searched --steps 10000"))
    assert outcome.code == 2 and "a model with routers cannot be pruned" in outcome.err.splitlines()[-1]
    assert not Path("searched").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_compiled_sub_networks(cli: Cli, wide: Path) -> None:
    try:
        check_compiler(torch.device("cpu"))
    except UserError as error:
        pytest.skip(str(error))
    done(cli, f"{MADE} run")
    drawn = "sample --model run --num-images 5 --sampler ddim --num-steps 4 --batch-size 4 --set sample.guidance_interval=[0.2,0.8]"
    done(cli, f"{drawn} --out plain.npz")
    done(cli, f"{drawn} --compile --out compiled.npz")
    one, other = (np.load(f"{name}.npz")["arr_0"].astype(int) for name in ("plain", "compiled"))
    assert int(np.abs(one - other).max()) <= 1
    assert json.loads(Path("compiled.json").read_text())["dynamic"]["macs_ratio"] < 1
    answer = done(cli, "bench run --compile --batch-size 2 --repeats 3 --set bench.product_size=64 --json").last_json
    assert answer["models"]["model"]["macs"] > 0


def test_skipping_gives_the_numbers_of_masks(cli: Cli, wide: Path) -> None:
    """What runs in sub-networks is what the routers decide, computed at full cost."""
    done(cli, f"{MADE} run")
    done(
        cli, "sample --model run --num-images 3 --sampler ddim --num-steps 4 --out skipped.npz --set sample.decode=true"
    )
    model = open_model("run")
    assert model.dynamic is not None
    from tinyfusion.config.recipe import SampleSection
    from tinyfusion.jobs.process_specs import sampler_of
    from tinyfusion.sample.drive import image_labels, sample, to_uint8

    sampler = sampler_of(SampleSection(sampler="ddim", num_steps=4), model)
    with model.dynamic.using(Deciding()):
        batches = list(sample(model, image_labels(3, 10, 0), sampler, 0))
    masked = np.concatenate([to_uint8(batch.x) for batch in batches])
    assert int(np.abs(masked.astype(int) - np.load("skipped.npz")["arr_0"].astype(int)).max()) <= 1


def test_parts_of_a_batch_make_no_difference(cli: Cli, wide: Path) -> None:
    done(cli, f"{MADE} one")
    done(cli, f"{MADE} four --gradient-accumulation-steps 4")
    one, four = (open_model(name).module.state_dict() for name in ("one", "four"))
    for name, value in one.items():
        torch.testing.assert_close(four[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["student", "sit"])
def test_cut_students_and_flows_become_dynamic_too(cli: Cli, work: Path, kind: str) -> None:
    teacher = tiny(num_heads=8) if kind == "student" else tiny_sit(num_heads=8)
    model = teacher.cut(by_indices(teacher, [1, 3])) if kind == "student" else teacher
    save_model(teacher, work / "teacher8")
    save_model(model, work / "model")
    learning = "--teacher teacher8 --set dynamic.auxiliary=teacher" if kind == "student" else ""
    done(cli, f"dynamic --model model --target 0.7 {learning} {QUICK} --out run")
    routed = open_model("run")
    assert routed.family.name == teacher.family.name and routed.facts.kept == model.facts.kept
    assert routed.dynamic is not None
    done(
        cli,
        f"sample --model run --num-images 2 --num-steps 5 {'' if kind == 'student' else '--sampler sde'} --out a.npz",
    )
    assert set(detached(routed.dynamic).module.state_dict()) == set(model.module.state_dict())


def test_a_dry_run_writes_nothing(cli: Cli, wide: Path) -> None:
    before = sorted(path.name for path in Path().iterdir())
    answer = done(cli, f"{MADE} run --dry-run")
    assert "width, tokens" in answer.out + answer.err and sorted(path.name for path in Path().iterdir()) == before


BAD = {
    "a family without rules": ("dynamic --model mar --out run", "models of the family mar cannot be made dynamic"),
    "no model": ("dynamic --out run", "dynamic needs --model"),
    "a target that is none": ("dynamic --model wide --target 1.5 --out run", "dynamic.target"),
    "nothing to decide": (
        "dynamic --model wide --set dynamic.width=false --set dynamic.tokens=false --out run",
        "nothing would be decided",
    ),
    "a finish as long as the training": ("dynamic --model wide --steps 4 --out run", "dynamic.finish_steps"),
    "a teacher of other images": (
        f"dynamic --model wide --teacher smaller-images --set dynamic.auxiliary=teacher {QUICK} --out run",
        "does not take what",
    ),
    "heads that hidden channels cannot follow": (f"dynamic --model odd {QUICK} --out run", "cannot be made dynamic"),
    "routers already": (f"dynamic --model routed {QUICK} --out run", "routers already"),
    "cutting a dynamic model": ("prune --teacher routed --keep 0,2 --out run", "prune first"),
}


@pytest.mark.parametrize("cause", BAD)
def test_bad_input(cli: Cli, wide: Path, cause: str) -> None:
    save_model(tiny_mar(), Path("mar"))
    save_model(tiny(num_heads=4, mlp_hidden=10), Path("odd"))
    if "routed" in BAD[cause][0]:
        done(cli, f"{MADE} made")
        Path("made/student").rename("routed")
    arguments, message = BAD[cause]
    failed(cli(*shlex.split(arguments)), message)
    assert not Path("run").exists()


def test_a_folder_whose_routers_are_damaged_is_refused(cli: Cli, wide: Path) -> None:
    done(cli, f"{MADE} run")
    record = Path("run/student/model.json")
    answer = json.loads(record.read_text())
    for change, message in (({"width": False}, "unexpected blocks.0.attn_rate"), ({"forced_first": 3}, "is damaged")):
        record.write_text(json.dumps({**answer, "dynamic": {**answer["dynamic"], **change}}))
        failed(cli("inspect", "run"), message)
