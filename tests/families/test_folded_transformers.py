# ruff: noqa: E501
"""Transformers of diffusers that fold guidance in: the training, the record, and drawing by plain pipelines with one pass per step."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_pipelines import PIPELINES

import tinyfusion as tf
from captioned_set import save_set
from prompt_pipelines import save_flux_pipeline
from tinyfusion import cli
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.families.diffusers_classes.few_steps import (
    GUIDED_PIPELINES,
    STEP_PIPELINES,
    FoldedDrawing,
    folded_drawing,
    guidance_off,
)
from tinyfusion.jobs.assemble import batches_for
from tinyfusion.jobs.latent_facts import open_stated
from tinyfusion.jobs.pipelines import _checked, pipeline_of
from tinyfusion.models.transformer import TransformerModel
from tinyfusion.processes.base import FoldedGuidance

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
Run = Callable[..., Any]
SIZE = ["--height", "8", "--width", "8"]  # of the training data
DRAWN = ["--prompts", "prompts.txt", *SIZE, "--num-steps", "3"]
SHORT = ["--method", "logits-kd", "--steps", "4", *("--set", "recover.training.batch_size=4"), *("--set", "recover.training.ema_decay=0.1"),
         *("--set", "recover.training.checkpoint_every_steps=2")]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder, made the present one: FLUX with guidance as an input and without, latents for it and digits-sd3."""
    folder = tmp_path_factory.mktemp("folded")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_flux_pipeline(Path("flux"))
        save_flux_pipeline(Path("plain"), guidance_embeds=False)
        save_set(Path("set"), pooled=32)
        save_set(Path("set-sd3"), channels=1, pooled=32)
        Path("prompts.txt").write_text("a cat\na red dog\n")
        yield folder


@pytest.mark.parametrize(
    ("pipeline", "data", "off", "field"),
    [("digits-sd3", "set-sd3", {"guidance_scale": 1.0}, "pipeline.guidance"),
     ("plain", "set", {"true_cfg_scale": 1.0}, "pipeline.true_guidance")],
)  # fmt: skip
def test_from_latents_to_images_of_plain_diffusers(
    place: Path, done: Run, run: Run, pipeline: str, data: str, off: dict[str, float], field: str
) -> None:
    name, guided = f"student-{pipeline}", ["--set", f"{field}=2", "--set", 'pipeline.negative_prompt=""']
    asked = [
        "recover",
        "--teacher",
        pipeline,
        "--data",
        f"latents:{data}",
        "--search-share",
        "0.5",
        "--guidance",
        "2",
        *SHORT,
    ]
    done(*asked, "--out", name)
    student = tf.open_model(name)
    assert isinstance(student, TransformerModel) and student.distilled_guidance
    assert student.latent_shape is None and student.facts.folded_guidance is not None
    assert student.facts.folded_guidance.scale == 2 and len(student.facts.lineage) == 1
    record = json.loads(Path(name, "student/config.json").read_text())["_tinyfusion"]
    assert record["folded_guidance"]["arguments"] == off == done("inspect", name)["folded_guidance"]["arguments"]
    trained = json.loads(Path(name, "run.json").read_text())["recipe"]["recover"]
    assert trained["alpha_kd"] == 1 and trained["training"]["label_drop"] == 0
    # drawn by itself without guidance, and by the exported folder
    done(
        "sample",
        "--model",
        name,
        *DRAWN,
        "--set",
        f"{field}=7",
        "--set",
        "pipeline.negative_prompt=grey",
        "--out",
        f"{name}.npz",
    )
    done("export", "--model", name, "--to", "diffusers", "--pipeline", "--out", f"{name}-exported")
    done("sample", "--model", f"{name}-exported", *DRAWN, "--out", f"{name}-other.npz")
    one, other = (np.load(f"{name}{end}.npz")["arr_0"].astype(int) for end in ("", "-other"))
    assert int(np.abs(one - other).max()) <= 1
    given = ", ".join(f"{argument}={value!r}" for argument, value in off.items())
    assert f"(PROMPT, {given}).images[0]" in Path(f"{name}-exported/README.md").read_text()
    # the protocol is that of its guided teacher but for the last words
    done("sample", "--model", pipeline, *DRAWN, *guided, "--out", f"{name}-teacher.npz")
    protocols = [json.loads(Path(f"{name}{end}.json").read_text())["protocol"] for end in ("", "-teacher")]
    assert protocols[0].replace(", folded in", "") == protocols[1] and protocols[0] != protocols[1]
    macs = ["--set", "bench.repeats=2", "--set", "bench.product_size=64"]
    sides = done("bench", name, "--vs", pipeline, "--prompts", "prompts.txt", *SIZE, *guided, *macs)["models"]
    assert sides["vs"]["macs"] > 3 * sides["model"]["macs"], "half of the blocks, and one pass in place of two"


def test_a_folded_student_goes_on(place: Path, done: Run, run: Run) -> None:
    asked = ["recover", "--teacher", "digits-sd3", "--data", "latents:set-sd3", "--search-share", "0.5", *SHORT]
    done(*asked, "--guidance", "2", "--out", "first")
    done("prune", "--teacher", "first", "--criterion", "first", "--num-keep", "3", "--out", "cut")
    cut = tf.open_model("cut")
    assert cut.facts.folded_guidance is not None and cut.facts.folded_guidance.scale == 2, "a cut keeps how it is drawn"
    more = ["--student", "cut", "--teacher", "first", "--data", "latents:set-sd3", *SHORT]
    done("recover", *more, "--out", "second")
    second = tf.open_model("second")
    assert second.facts.folded_guidance == cut.facts.folded_guidance, "its teacher has folded it in"
    assert json.loads(Path("second/run.json").read_text())["recipe"]["recover"]["alpha_kd"] == 1
    done(
        "recover", "--student", "cut", "--teacher", "digits-sd3", "--data", "latents:set-sd3", *SHORT, "--out", "third"
    )
    assert tf.open_model("third").facts.folded_guidance is None, "a plain teacher teaches plain outputs"
    few = [
        "--num-steps",
        "2",
        "--steps",
        "2",
        "--set",
        "distill_steps.training.ema_decay=0.1",
        "--set",
        "distill_steps.training.batch_size=4",
    ]
    done(
        "distill-steps",
        "--model",
        "first",
        "--teacher",
        "digits-sd3",
        "--data",
        "latents:set-sd3",
        *few,
        "--guidance",
        "3",
        "--out",
        "few",
    )
    steps = tf.open_model("few")
    assert steps.facts.folded_guidance is None and steps.facts.few_steps is not None
    assert steps.facts.few_steps.guidance == 3
    for model, option, message in (
        ("first", "--guidance", "--guidance is for models that are drawn under guidance"),
        ("few", "--guidance", "--guidance is for models that are drawn under guidance"),
        ("few", "--num-steps", "--num-steps is for models of many steps"),
    ):
        said = run("sample", "--model", model, "--prompts", "prompts.txt", *SIZE, option, "4", "--out", "refused.npz")
        assert message in said and not Path("refused.npz").exists()
    said = run("recover", *more, "--guidance", "3", "--out", "again")
    assert "the teacher has folded in 2" in said and not Path("again").exists()
    done("recover", *more, "--guidance", "2", "--out", "again")
    assert tf.open_model("again").hash() == second.hash(), "that is what its teacher has"


def test_recordings_of_other_guidance_are_refused(place: Path, done: Run, run: Run) -> None:
    """Outputs of a plain ancestor are not what a folded student learned; those of a folded one are, drawn without guidance."""
    asked = ["recover", "--teacher", "plain", "--data", "latents:set", "--search-share", "0.5", *SHORT]
    done(*asked, "--guidance", "2", "--out", "folded")
    done("export", "--model", "folded", "--to", "diffusers", "--pipeline", "--out", "folded-pipeline")
    done("prune", "--teacher", "folded", "--criterion", "first", "--num-keep", "1", "--out", "folded-cut")
    drawn = ["--prompts", "prompts.txt", "--height", "8", "--width", "8", "--steps", "2"]
    for pipeline in ("plain", "folded-pipeline"):
        done("record", pipeline, *drawn, "--out", f"{pipeline}.safetensors")
    taught = ["recover", "--method", "logits-kd", "--steps", "2", "--set", "recover.training.batch_size=1"]
    taught += ["--set", "recover.training.ema_decay=0.1", "--student", "folded-cut", "--inputs"]
    said = run(*taught, "plain.safetensors", "--out", "taught")
    assert "has no guidance folded in, and folded-cut/student has guidance 2 folded in" in said
    said = run(*taught, "folded-pipeline.safetensors", "--guidance", "2", "--out", "taught")
    assert "--guidance is for methods with a teacher" in said and not Path("taught").exists()
    done(*taught, "folded-pipeline.safetensors", "--out", "taught")
    made = tf.open_model("taught").facts.folded_guidance
    assert made is not None and made.scale == 2


def test_the_library_takes_the_channels_of_the_data(place: Path) -> None:
    """Two experts that are drawn unlike are refused, as their pipeline guides both."""
    model = tf.open_model("digits-sd3")
    assert isinstance(model, TransformerModel)
    training = dataclasses.replace(tf.RecoverSection().training, steps=1, batch_size=2, ema_decay=0.0)
    settings = tf.RecoverSection(method="logits-kd", guidance=2.0, training=training)
    recipe = Recipe(data=dataclasses.replace(Recipe().data, name="latents:set-sd3"))
    other = open_stated(recipe, "digits-sd3", None, None)
    source = batches_for(recipe, other, torch.device("cpu"))
    student = tf.prune_model(model, [0, 1, 2, 3])
    made = tf.recover_model(student, model, tf.objective_of(model), source, settings)
    assert made.facts.folded_guidance == FoldedGuidance(2.0, 1)


def test_two_experts_are_drawn_alike_or_not_at_all(place: Path, done: Run) -> None:
    asked = ["recover", "--teacher", "digits-sd3", "--data", "latents:set-sd3", "--search-share", "0.5", *SHORT]
    done(*asked, "--guidance", "2", "--out", "expert")
    folder, plain = pipeline_of("expert", None), pipeline_of("digits-sd3", None)
    models = {"transformer": folder.models["transformer"], "transformer_2": plain.models["transformer"]}
    with pytest.raises(UserError, match="transformer and transformer_2, are drawn unlike"):
        _checked(folder.folder, models)


def test_what_has_no_guidance_to_fold_in_is_refused(place: Path, run: Run) -> None:
    asked = ["recover", "--search-share", "0.5", *SHORT, "--guidance", "2", "--out", "refused"]
    for more, message in (
        (["--teacher", "flux", "--data", "latents:set"], "guidance is an input of the teacher"),
        (
            ["--teacher", "plain/transformer", "--data", "latents:set", "--method", "finetune"],
            "--guidance is for methods with a teacher",
        ),
    ):
        said = run(*asked, *more)
        assert message in said and not Path("refused").exists()


@pytest.mark.parametrize("name", sorted({*STEP_PIPELINES, *GUIDED_PIPELINES}))
def test_every_guided_pipeline_has_its_argument(name: str) -> None:
    import inspect

    import diffusers

    kind = getattr(diffusers, name)
    if name == "Flux2Pipeline":
        with pytest.raises(UserError, match="a Flux2Pipeline has no classifier-free guidance that is known here"):
            guidance_off(kind)
        return
    ((argument, off),) = guidance_off(kind).items()
    assert argument in inspect.signature(kind.__call__).parameters and off in (0, 1)


@pytest.mark.parametrize("name", [each.name for each in PIPELINES if each.name in GUIDED_PIPELINES])
@torch.no_grad()
def test_the_argument_turns_guidance_off(name: str) -> None:
    """One pass of one image per step."""
    from test_few_step_pipelines import counting

    tiny = next(each for each in PIPELINES if each.name == name)
    pipeline = tiny.build()
    for attribute, value in tiny.attributes.items():
        setattr(pipeline, attribute, value)
    pipeline.set_progress_bar_config(disable=True)
    given = dict(
        output_type="latent", return_dict=False, num_inference_steps=2, generator=torch.Generator().manual_seed(0)
    )
    with counting(pipeline.transformer) as rows:
        pipeline(**given | tiny.call() | guidance_off(type(pipeline)))
    assert set(rows) == {1}


def test_a_damaged_record_is_refused(place: Path) -> None:
    record = FoldedDrawing(FoldedGuidance(2.0, 4), {"guidance_scale": 1.0}).to_json()
    assert folded_drawing(record) == FoldedDrawing(FoldedGuidance(2.0, 4), {"guidance_scale": 1.0})
    for change in ({"arguments": None}, {"arguments": {}}, {"arguments": {"guidance_scale": 3.0}}, {"arguments": {"output_type": 1}},
                   {"arguments": {"guidance_scale": float("nan")}}, {"scale": 1.0}, {"scale": "2"}, {"channels": 0}):  # fmt: skip
        with pytest.raises(ValueError, match="guidance"):
            folded_drawing({**record, **change})


def test_the_plan_says_what_is_folded_in(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        "recover",
        "--teacher",
        "digits-sd3",
        "--data",
        "latents:set-sd3",
        "--search-share",
        "0.5",
        "--guidance",
        "2",
        *SHORT,
    ]
    assert cli.main([*asked, "--out", "dry", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "guidance 2 folded in" in said.out + said.err
