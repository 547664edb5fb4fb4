# ruff: noqa: E501
"""Transformers of diffusers distilled for few steps: laws of the training, and the verb from encoded latents to drawn images."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_video import VIDEO

import tinyfusion as tf
from captioned_set import save_set
from prompt_pipelines import save_flux_pipeline, save_wan_pipeline
from tinyfusion import cli
from tinyfusion.blocks.stack import frozen
from tinyfusion.conditioning.condition import Condition
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.families.diffusers_classes.calls import packed
from tinyfusion.few_steps.consistency import ConsistencyObjective
from tinyfusion.few_steps.guided import GuidedTeacher
from tinyfusion.jobs.assemble import batches_for
from tinyfusion.jobs.latent_facts import open_stated
from tinyfusion.jobs.pipelines import pipeline_of
from tinyfusion.jobs.process_specs import noising_of
from tinyfusion.jobs.prompt_drawing import check_levels
from tinyfusion.jobs.transformer_few_steps import guidance_of_pipeline, step_drawing
from tinyfusion.jobs.verbs import save_model
from tinyfusion.models.transformer import TransformerModel
from tinyfusion.prune.criteria import by_indices
from tinyfusion.training import loop

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
Run = Callable[..., Any]
SHORT = ["--num-steps", "2", "--steps", "4", *("--set", "distill_steps.training.batch_size=4"),
         *("--set", "distill_steps.training.ema_decay=0.1"), *("--set", "distill_steps.teacher_steps=4"),
         *("--set", "distill_steps.training.checkpoint_every_steps=2")]  # fmt: skip
DYNAMIC = dict(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)
SIZE = ["--height", "8", "--width", "8"]  # of the training data


def made(pipeline: str, *more: str) -> list[str]:
    """A distillation of a pipeline's own transformer."""
    data = ["--data", "latents:set-sd3" if "sd3" in pipeline else "latents:set"]
    return ["distill-steps", "--model", pipeline, "--teacher", pipeline, *data, *SHORT, *more]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder, made the present one: a FLUX with guidance as an input, one without, and sets of latents for them and digits-sd3."""
    folder = tmp_path_factory.mktemp("few")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_flux_pipeline(Path("flux"))
        save_flux_pipeline(Path("plain"), guidance_embeds=False)
        scheduler = Path("plain/scheduler/scheduler_config.json")
        scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | DYNAMIC))
        save_set(Path("set"), pooled=32)
        save_set(Path("set-sd3"), channels=1, pooled=32)
        Path("prompts.txt").write_text("a cat\na red dog\n")
        yield folder


def opened(pipeline: str, **few: Any) -> tuple[TransformerModel, Recipe, Any]:
    """The transformer, a recipe and its batches."""
    name = "latents:set-sd3" if "sd3" in pipeline else "latents:set"
    recipe = Recipe(data=dataclasses.replace(Recipe().data, name=name))
    recipe = dataclasses.replace(
        recipe, distill_steps=dataclasses.replace(recipe.distill_steps, **{"num_steps": 4, **few})
    )
    model = open_stated(recipe, pipeline, None, None)
    assert isinstance(model, TransformerModel)
    return model, recipe, batches_for(recipe, model, torch.device("cpu"))


@pytest.mark.parametrize("pipeline", ["digits-sd3", "flux", "plain"])
def test_a_teacher_of_as_many_steps_is_consistent_with_itself(place: Path, pipeline: str) -> None:
    model, recipe, source = opened(pipeline)
    assert model.latent_shape is not None
    levels, draws = (
        step_drawing(recipe, model, guidance_of_pipeline(recipe, model)).steps.levels,
        Randomness(0).at(0, 0, 8),
    )
    module = frozen(model.copy().module)
    for guidance, wanted in ((1.0, True), (3.0, False)):
        taught = GuidedTeacher(
            module, model.family.stack(module), noising_of(model), model.family.call, guidance, model.latent_shape[0]
        )
        goal = ConsistencyObjective(taught, levels, teacher_steps=4)
        noisy = goal.draw(source(0, 8, draws), draws)
        losses = goal.losses(model.module, noisy, goal.predict(model.module, noisy))["loss"].detach()
        assert (float(losses.max()) < 1e-7) == wanted and losses.shape == (8,)


@pytest.mark.parametrize(("pipeline", "channels"), [("digits-sd3", 1), ("flux", 4), ("plain", 4)])
def test_the_pipeline_draws_the_steps_that_are_trained(place: Path, pipeline: str, channels: int) -> None:
    """Called with what the record says, it gives the mixtures at the recorded levels one after the other."""
    model, recipe, _ = opened(pipeline)
    drawing, noising = step_drawing(recipe, model, guidance_of_pipeline(recipe, model)), noising_of(model)
    generator = torch.Generator().manual_seed(1)
    x = noise = torch.randn(2, channels, 8, 8, generator=generator)
    texts = {
        "embeddings": torch.randn(2, 6, 32, generator=generator),
        "pooled": torch.randn(2, 32, generator=generator),
    }
    times = noising.times(np.append(drawing.steps.levels, 0.0))
    with torch.no_grad():
        for t, after in zip(times[:-1], times[1:], strict=True):
            parts = noising.parts(model.family.call(model.module, x, t.expand(2), Condition(texts)), x, t.expand(2))
            x = noising.mixed(parts, after.expand(2))
    source = pipeline_of(pipeline, None)
    whole, flux = source.opened(torch.device("cpu")), pipeline != "digits-sd3"
    arguments = source.arguments({**drawing.arguments, "height": 8, "width": 8})
    with torch.no_grad():
        drawn = whole(
            prompt_embeds=texts["embeddings"], pooled_prompt_embeds=texts["pooled"], latents=packed(noise) if flux else noise,
            output_type="latent", return_dict=False, **arguments,
        )[0]  # fmt: skip
    torch.testing.assert_close(drawn, packed(x) if flux else x, rtol=1e-3, atol=1e-4)
    check_levels(whole.scheduler, drawing.steps.levels)
    with pytest.raises(UserError, match="was trained to draw at noise levels 1, 0.5, and this pipeline goes to"):
        check_levels(whole.scheduler, (1.0, 0.5))


def test_guidance_is_that_of_the_pipeline_unless_the_recipe_sets_it(place: Path) -> None:
    for pipeline, section, few, wanted in (
        ("digits-sd3", {}, {}, 7.0), ("digits-sd3", {"guidance": 1.5}, {}, 1.5), ("digits-sd3", {"guidance": 4.0}, {"guidance": 2.0}, 2.0),
        ("digits-sd3", {"guidance": 0.0}, {}, 1.0), ("plain", {}, {}, 1.0), ("plain", {"guidance": 4.0, "true_guidance": 1.5}, {}, 1.5),
        ("flux", {"guidance": 4.0}, {}, 3.5),
    ):  # fmt: skip
        model, recipe, _ = opened(pipeline, **few)
        recipe = dataclasses.replace(recipe, pipeline=dataclasses.replace(recipe.pipeline, **section))
        assert guidance_of_pipeline(recipe, model) == wanted, (pipeline, section)


def test_the_verb_from_latents_to_images(place: Path, done: Run) -> None:
    said = done(*made("digits-sd3"), "--guidance", "2", "--out", "sd3")
    assert said["num_steps"] == 2
    student = tf.open_model("sd3")
    assert isinstance(student, TransformerModel) and student.facts.few_steps is not None
    assert student.facts.few_steps.guidance == 2 and student.facts.few_steps.levels == pytest.approx((1.0, 0.6))
    record = done("inspect", "sd3")["few_steps"]
    assert record["arguments"] == {"num_inference_steps": 2, "sigmas": [1.0, 0.5], "guidance_scale": 1.0}
    before, after = (load_file(Path(where, "diffusion_pytorch_model.safetensors")) for where in (
        pipeline_of("digits-sd3", None).folder / "transformer", "sd3/student"))  # fmt: skip
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    drawn = ["--prompts", "prompts.txt", *SIZE]
    done(
        "sample",
        "--model",
        "sd3",
        *drawn,
        "--set",
        "pipeline.num_steps=30",
        "--set",
        "pipeline.guidance=5",
        "--out",
        "one.npz",
    )
    done("export", "--model", "sd3", "--to", "diffusers", "--pipeline", "--out", "exported")
    done("sample", "--model", "exported", *drawn, "--batch-size", "2", "--out", "other.npz")
    one, other = (np.load(name)["arr_0"].astype(int) for name in ("one.npz", "other.npz"))
    assert one.shape == (2, 8, 8, 3) and int(np.abs(one - other).max()) <= 1
    protocol = json.loads(Path("one.json").read_text())["protocol"]
    assert "consistency, 2 steps at noise levels 1, 0.6, guidance 2 folded in, guidance_scale 1" in protocol
    assert (
        "(PROMPT, num_inference_steps=2, sigmas=[1.0, 0.5], guidance_scale=1.0).images[0]"
        in Path("exported/README.md").read_text()
    )
    macs = ["--set", "bench.repeats=2", "--set", "bench.product_size=64"]
    sides = done("bench", "sd3", "--vs", "digits-sd3", *drawn, *macs)["models"]
    assert sides["vs"]["macs"] == 2 * sides["model"]["macs"], "a step is one pass, the teacher's are two"


def test_guidance_as_an_input_stays_one(place: Path, done: Run, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().iterdir())
    assert cli.main([*made("flux"), "--out", "guided", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "consistency, 2 steps at noise levels 1, 0.5, guidance 3.5 folded in" in said.out + said.err
    assert sorted(Path().iterdir()) == before
    done(*made("flux"), "--out", "guided")
    arguments = done("inspect", "guided")["few_steps"]["arguments"]
    assert arguments["guidance_scale"] == 3.5 and arguments["true_cfg_scale"] == 1
    assert cli.main(["sample", "--model", "guided", "--prompts", "prompts.txt", *SIZE, "--out", "guided.npz"]) == 0
    assert "guided draws in its own 2 steps" in capsys.readouterr().err


def test_the_levels_of_another_size_are_refused(place: Path, run: Run, done: Run) -> None:
    done(*made("plain"), "--method", "matching", "--set", "distill_steps.fresh_noise=false", "--out", "shifted")
    done("sample", "--model", "shifted", "--prompts", "prompts.txt", *SIZE, "--out", "shifted.npz")
    larger = ["--height", "16", "--width", "16", "--out", "larger.npz"]
    said = run("sample", "--model", "shifted", "--prompts", "prompts.txt", *larger)
    assert "draw images of the size of the training data" in said and not Path("larger.npz").exists()


def test_killed_and_continued_is_the_same(place: Path, done: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    done(*made("plain"), "--out", "whole")
    steps = loop.train_steps

    def stopping(*args: Any) -> Iterator[Any]:
        for record in steps(*args):
            if record.step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield record

    with monkeypatch.context() as patch:
        patch.setattr("tinyfusion.jobs.training.train_steps", stopping)
        assert cli.main([*made("plain"), "--out", "part"]) == 130
    assert not Path("part/student").exists()
    done(*made("plain"), "--out", "part")
    for name in ("student", "student-raw"):
        one, other = (
            load_file(Path(where, name, "diffusion_pytorch_model.safetensors")) for where in ("whole", "part")
        )
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert done("replay", "whole", "--step", "3")["step"] == 3


BAD: dict[str, tuple[list[str], str]] = {
    "matching": (made("flux", "--method", "matching"), "goes on along its own prediction in every step: set distill_steps.fresh_noise=false"),
    "gaussian": (["distill-steps", "--model", "cog", "--teacher", "cog"], "few steps of transformers of diffusers are for flows"),
    "alone": (["distill-steps", "--model", "alone", "--teacher", "alone"], "and alone is in none: give the folder of the pipeline"),
    "wan": (["distill-steps", "--model", "wan/transformer", "--teacher", "wan/transformer"], "a WanPipeline draws no student of few steps: it takes no sigmas"),
    "guidance": (made("flux", "--guidance", "2"), "the student keeps it: set flow.guidance"),
    "below one": (made("digits-sd3", "--guidance", "0.5"), "at least 1"),
    "first level": (made("flux", "--set", "distill_steps.first_level=0.8"), "others begin at noise alone"),
    "another class": (["distill-steps", "--model", "flux", "--teacher", "digits-sd3", "--data", "latents:set"], "does not take what the student takes"),
    "another size": (["distill-steps", "--model", "flux", "--teacher", "plain", "--data", "latents:set"], "does not take what the student takes"),
    "pictures": (["distill-steps", "--model", "flux", "--teacher", "flux", "--data", "digits"], "is trained on latents and encoded texts"),
    "a fast teacher": (["distill-steps", "--model", "flux", "--teacher", "fast", "--data", "latents:set"], "draws in few steps itself"),
    "a fast student": (["recover", "--student", "fast", "--teacher", "flux", "--data", "latents:set"], "is no denoiser of all noise levels"),
    "pruning by a rule": (["prune", "--teacher", "fast", "--criterion", "uniform"], "a model of few steps cannot be pruned"),
    "pruning by masks": (["prune", "--teacher", "fast", "--scheme", "2:3;1:2", "--data", "latents:set"], "a model of few steps cannot be pruned"),
    "damaged": (["inspect", "broken"], "has a damaged _tinyfusion: few_steps.arguments are not of 2 even steps"),
}  # fmt: skip


def test_what_does_not_fit_is_said_in_a_line(place: Path, run: Run) -> None:
    save_wan_pipeline(Path("wan"))
    os.symlink(Path("flux/transformer").absolute(), "alone")
    next(each for each in VIDEO if each.name.startswith("CogVideoX")).model().save_pretrained("cog")  # type: ignore[operator]
    model, recipe, _ = opened("flux", num_steps=2)
    model.draw_by(step_drawing(recipe, model, guidance_of_pipeline(recipe, model)))
    save_model(model, Path("fast"))
    save_model(model, Path("broken"))
    config = Path("broken/config.json")
    record = json.loads(config.read_text())
    record["_tinyfusion"]["few_steps"]["arguments"]["num_inference_steps"] = 3
    config.write_text(json.dumps(record))
    wrong = {}
    for cause, (line, message) in BAD.items():
        said = run(*line, *([] if line[0] == "inspect" else ["--out", "bad"]))
        if not (isinstance(said, str) and message in said):
            wrong[cause] = said
    assert wrong == {} and not Path("bad").exists()


def test_a_graph_says_how_a_student_of_few_steps_draws(place: Path, run: Run) -> None:
    model, recipe, _ = opened("flux", num_steps=2)
    drawing = step_drawing(recipe, model, guidance_of_pipeline(recipe, model))
    model = model.cut(by_indices(model, [0, 4], 0))  # a graph of few blocks is made sooner
    model.draw_by(drawing)
    save_model(model, Path("fast"))
    run("export", "--model", "fast", "--to", "onnx", "--out", "graph")
    assert json.loads(Path("graph/sampler.json").read_text())["few_steps"] == json.loads(json.dumps(drawing.to_json()))
    assert "Few steps" in Path("graph/README.md").read_text()
