"""Guidance folded in by `recover` and `dynamic`, and what the other verbs do with such a student."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
from material import Cli
from safetensors import safe_open
from test_faults import SETTINGS, failed
from test_verbs import done

from tinyfusion.models.checkpoint import open_model

SECTION = " ".join(f"--set recover.training.{setting}" for setting in ["steps=12", *SETTINGS.split()])
MADE = f"recover --student student --teacher teacher --method logits-kd {SECTION} --guidance 2"


def test_a_student_is_drawn_with_one_pass_per_step(cli: Cli, work: Path) -> None:
    assert "guidance 2 folded in" in done(cli, f"{MADE} --out run --dry-run").out
    done(cli, f"{MADE} --out run")
    facts = open_model("run").facts
    assert facts.folded_guidance is not None and facts.folded_guidance.scale == 2
    section = json.loads(Path("run/run.json").read_text())["recipe"]["recover"]
    assert section["alpha_kd"] == 1 and section["training"]["label_drop"] == 0
    drawn = done(cli, "sample --model run --num-images 5 --num-steps 10 --out a.npz")
    assert "run has guidance 2 folded in: one pass of the network per step" in drawn.err
    done(cli, "sample --model teacher --num-images 5 --num-steps 10 --guidance 2 --out t.npz")
    one, other = (json.loads(Path(name).read_text())["protocol"] for name in ("a.json", "t.json"))
    assert one.replace(", folded in", "") == other != one
    done(cli, "sample --model run --num-images 5 --num-steps 10 --set sample.guidance=7 --out b.npz")
    assert np.array_equal(np.load("a.npz")["arr_0"], np.load("b.npz")["arr_0"])
    refused = cli(*shlex.split("sample --model run --guidance 7 --out c.npz"))
    assert refused.code == 2 and "this one has folded it in" in refused.err and not Path("c.npz").exists()
    bench = done(cli, "bench run --vs teacher --batch-size 2 --repeats 3 --set bench.product_size=64 --json").last_json
    sides = bench["models"]
    assert sides["vs"]["passes_per_image"] == 2 * sides["model"]["passes_per_image"]
    assert "1 (2 rows" not in bench["protocol"] and "of a model drawn without 1)" in bench["protocol"]
    assert done(cli, "inspect run --json").last_json["folded_guidance"] == {"scale": 2.0, "channels": 1}
    done(cli, "export --model run --to diffusers --out exported")
    card = Path("exported/README.md").read_text()
    assert "Classifier-free guidance of scale 2 is folded in" in card and "null class" not in card
    assert open_model("exported").facts.folded_guidance == facts.folded_guidance
    done(cli, "report run --out page.html")
    assert "guidance 2 folded in: one pass of the network per step" in Path("page.html").read_text()


def test_a_dynamic_model_folds_it_in(cli: Cli, work: Path) -> None:
    training = " ".join(f"--set dynamic.training.{setting}" for setting in ["steps=6", *SETTINGS.split()])
    routed = f"dynamic --model student --teacher teacher {training} --set dynamic.finish_steps=1 --set dynamic.ramp_steps=none"
    routed += " --set dynamic.width_bias=1 --set dynamic.token_bias=1 --target 0.9 --set dynamic.calibration_images=0"
    alone = routed.replace(" --teacher teacher", "")
    failed(cli(*shlex.split(f"{alone} --set dynamic.guidance=2 --out made")), "set dynamic.auxiliary=teacher")
    done(cli, f"{routed} --set dynamic.guidance=2 --set dynamic.auxiliary=teacher --out made")
    facts = open_model("made").facts
    assert facts.dynamic is not None and facts.folded_guidance is not None and facts.folded_guidance.scale == 2
    done(cli, f"{MADE} --out folded")
    on_folded = alone.replace("--model student", "--model folded")
    failed(cli(*shlex.split(f"{on_folded} --out again")), "has guidance folded in, so data are no target for it")
    taught = f"{on_folded} --teacher teacher --set dynamic.auxiliary=teacher"
    failed(cli(*shlex.split(f"{taught} --out again")), "its teacher predicts without: set dynamic.guidance=2")
    failed(
        cli(*shlex.split(f"{taught} --set dynamic.guidance=2 --set dynamic.auxiliary_weight=0 --out again")), "above 0"
    )
    assert not Path("again").exists()


def test_a_run_refuses_before_it_trains(cli: Cli, work: Path) -> None:
    routed = " ".join(f"--set dynamic.training.{setting}" for setting in ["steps=6", *SETTINGS.split()])
    asked = f"run --recipe digits-shallow-dynamic --set teacher=teacher {SECTION} {routed} --set dynamic.finish_steps=1 --out whole"
    for change, message in (
        ("dynamic.auxiliary=complete", "the student has guidance folded in, so data are no target"),
        ("dynamic.guidance=none", "its teacher predicts without: set dynamic.guidance=1.5"),
    ):
        for dry in ("--dry-run", ""):
            failed(cli(*shlex.split(f"{asked} --set {change} {dry}")), message)
            assert not Path("whole").exists()


def test_what_does_not_follow_says_so(cli: Cli, work: Path) -> None:
    done(cli, f"{MADE} --set recover.update=lora --set recover.lora_rank=2 --set recover.lora_apart=true --out run")
    with safe_open("run/lora.safetensors", "pt") as file:
        assert file.metadata()["folded_guidance"] == "2"
    said = done(cli, "export --model run --to official --out flat.safetensors")
    assert "guidance is folded in, which this format cannot say: draw with guidance 1" in said.err
    assert "draw with guidance 1" in Path("flat.json").read_text()
    warned = done(cli, "prune --teacher run --criterion sensitivity --data digits --num-keep 1 --out cut --dry-run")
    assert "the loss on data, which sensitivity compares, is not what it is for" in warned.err
    plain = f"recover --student run --teacher teacher --method logits-kd {SECTION}"
    assert "has guidance 2 folded in, and unlearns it" in done(cli, f"{plain} --out plain").err
    assert open_model("plain").facts.folded_guidance is None
    Path("own.toml").write_text('recover = { guidance = 2.0, method = "finetune" }\n')
    alone = done(cli, f"recover --recipe own.toml --student student {SECTION} --out alone")
    assert "recover.guidance is left out: it is that of a teacher" in alone.err
    assert open_model("alone").facts.folded_guidance is None


def test_the_loss_on_data_is_not_what_it_learned(cli: Cli, work: Path) -> None:
    done(cli, f"{MADE} --out run")
    asked = "explain run --data digits --num-images 8 --drawn 0 --set explain.passes=1"
    assert "predicts under guidance 2 by itself" in done(cli, f"{asked} --out explained").err
    record = json.loads(Path("explained/explain.json").read_text())
    assert "under guidance 2 by itself" in record["not_measured"]["learned_loss"]
    assert "Not measured: what the model learned" in Path("explained/report.html").read_text()
    plain = done(cli, f"{asked.replace('explain run', 'explain teacher')} --out other")
    assert "under guidance" not in plain.err and "learned_loss" not in Path("other/explain.json").read_text()
    masks = "prune --teacher run --data digits --scheme 1:2 --dry-run --out cut"
    assert "which prune.target=data compares" in done(cli, f"{masks} --set prune.target=data").err
    assert "under guidance" not in done(cli, masks).err


def test_a_checkpoint_of_other_guidance_is_refused(cli: Cli, work: Path) -> None:
    done(cli, f"{MADE} --out run")
    checkpoint = sorted(Path("run/checkpoints").iterdir())[0]
    again = f"{MADE} --resume {checkpoint} --out other"
    Path("link").symlink_to(checkpoint.absolute())
    for change, now in (("recover.guidance=none", "none"), ("recover.guidance=3", "3")):
        message = f"of a training with recover.guidance 2, and a model cannot learn other guidance halfway ({now} here): set it to 2"
        for place in (checkpoint, "link"):
            asked = again.replace("--guidance 2", f"--set {change}").replace(str(checkpoint), str(place))
            failed(cli(*shlex.split(asked)), message)
            assert not Path("other").exists()
    assert "of a training with other settings" not in done(cli, again).err


BAD = {
    "no teacher": (f"{MADE.replace('logits-kd', 'finetune')} --out run", "--guidance is for methods with a teacher"),
    "a guidance below 1": (f"{MADE} --guidance 0.5 --out run", "at least 1"),
    "no weight": (f"{MADE} --set recover.alpha_kd=0 --out run", "recover.alpha_kd is 0: set it above 0"),
    "an interval": (f"{MADE} --set sample.guidance_interval=0.1,0.8 --out run", "at all noise levels"),
    "a teacher of another": (f"{MADE.replace('--teacher teacher', '--teacher folded')} --guidance 3 --out run", "has folded in 2"),
}  # fmt: skip


@pytest.mark.parametrize("cause", BAD)
def test_bad_input(cli: Cli, work: Path, cause: str) -> None:
    arguments, message = BAD[cause]
    if "folded" in arguments:
        done(cli, f"{MADE} --out made")
        Path("made/student").rename("folded")
    failed(cli(*shlex.split(arguments)), message)
    assert not Path("run").exists()
