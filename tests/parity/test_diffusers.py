"""The class of diffusers itself: it loads what we export and computes what we compute, with nothing of ours installed."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyfusion.commands.export import ExportOptions, export
from tinyfusion.commands.prune import prune
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.config.recipe import PruneSection, Recipe, SampleSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.families.dit import diffusers as ours
from tinyfusion.families.dit.model import SIZES, published_arch
from tinyfusion.families.registry import FAMILIES
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.jobs.process_specs import sampler_of
from tinyfusion.models.checkpoint import LoadedModel, new_model, open_model, save_model
from tinyfusion.processes.noising import FewSteps
from tinyfusion.prune.criteria import by_indices
from tinyfusion.sample.drive import SampleDraws

TINY = dict(input_size=4, patch_size=2, in_channels=4, hidden_size=16, depth=4, num_heads=2, num_classes=1000)
T, Y = [0, 250, 999], [0, 3, 1000]

# What another machine does: torch and diffusers, and a tinyfusion that cannot be imported. It works line by line, as
# importing diffusers takes seconds: {"folder", "code"} in, "" or a traceback out.
_STRANGER = """
import json, os, sys, traceback, warnings
from importlib.abc import MetaPathFinder
warnings.simplefilter("ignore")

class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tinyfusion":
            raise ImportError("not installed here")

sys.meta_path.insert(0, Absent())
import torch
torch.set_num_threads(1)
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file, save_file

def answer(folder):
    model = DiTTransformer2DModel.from_pretrained(folder)
    inputs = load_file("inputs.safetensors")
    with torch.no_grad():
        return model(inputs["x"], timestep=inputs["t"], class_labels=inputs["y"]).sample

for line in sys.stdin:
    task = json.loads(line)
    os.chdir(task["folder"])
    error = ""
    try:
        exec(task["code"], dict(globals()))
    except Exception:
        error = traceback.format_exc()
    sys.stderr.flush()
    print(json.dumps(error), flush=True)
"""
Stranger = Callable[[str, Path], str]


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stranger]:
    """stranger(code, folder): run code where diffusers is and nothing of ours; gives what stood on stderr."""
    log = tmp_path_factory.mktemp("stranger") / "stderr.txt"
    with open(log, "w", encoding="utf-8") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _STRANGER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
        )  # fmt: skip

    def run(code: str, folder: Path) -> str:
        said = log.stat().st_size
        process.stdin.write(json.dumps({"folder": str(folder), "code": code}) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        text = log.read_bytes()[said:].decode()
        assert answer, text
        assert json.loads(answer) == "", json.loads(answer)
        return text

    yield run
    process.stdin.close()
    process.wait(timeout=30)
    process.stdout.close()


def random_weights(model: LoadedModel, seed: int = 0) -> LoadedModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2, generator=generator)
    model.module.eval()
    return model


def outputs(model: LoadedModel, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.module(x, torch.tensor(T), torch.tensor(Y))


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory, stranger: Stranger) -> Path:
    """A tiny random autoencoder, as diffusers saves it."""
    folder = tmp_path_factory.mktemp("vae")
    stranger(
        """
torch.manual_seed(0)
AutoencoderKL(block_out_channels=[8, 8], down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=4,
              up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, sample_size=8).save_pretrained("vae")
""",
        folder,
    )
    return folder / "vae"


def test_outputs_are_those_of_diffusers(tmp_path: Path, stranger: Stranger) -> None:
    """Exported, and also cut before, block 0 included; float32, to 1e-5. Written by diffusers again, we read it bit for bit."""
    teacher = random_weights(new_model("dit", {**TINY, "frequency_shift": 1}, 0))
    loose = random_weights(
        new_model("dit", {**TINY, "frequency_shift": 1, "mlp_norm_eps": 1e-3, "learn_sigma": False}, 1), 1
    )
    x = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    models = {
        "whole": teacher,
        "cut": teacher.cut(by_indices(teacher, [0, 2], 0)),
        "headless": teacher.cut(by_indices(teacher, [1, 3], 0)),
        "one": teacher.cut(by_indices(teacher, [2], 0)),
        "loose": loose,
    }
    for name, model in models.items():
        save_model(model, tmp_path / f"own-{name}")
        export(RunOptions(tmp_path / name), ExportOptions(str(tmp_path / f"own-{name}"), "diffusers"))
    save_file({"x": x, "t": torch.tensor(T), "y": torch.tensor(Y)}, tmp_path / "inputs.safetensors")
    said = stranger(
        f"""
names = {list(models)!r}
save_file({{name: answer(name) for name in names}}, "outputs.safetensors")
DiTTransformer2DModel.from_pretrained("cut").save_pretrained("again")
DiTTransformer2DModel.from_pretrained("whole").to(torch.bfloat16).save_pretrained("shards", max_shard_size="200KB")
""",
        tmp_path,
    )
    assert "not expected" not in said and "not initialized" not in said
    found = load_file(tmp_path / "outputs.safetensors")
    for name, model in models.items():
        wanted = outputs(model, x)
        assert wanted.abs().max() > 0.5
        assert (found[name] - wanted).abs().max() <= 1e-5, name
        assert (found[name] - outputs(open_model(tmp_path / name), x)).abs().max() <= 1e-5
    again, cut = open_model(tmp_path / "again"), models["cut"]
    assert again.hash() == cut.hash() and again.arch.frequency_shift == 1
    half = open_model(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*-of-*.safetensors"))) > 1
    for key, value in teacher.module.state_dict().items():
        if key != "pos_embed":
            assert torch.equal(half.module.state_dict()[key], value.bfloat16().float())


def test_published_timesteps_are_what_differs(tmp_path: Path, stranger: Stranger) -> None:
    """A model with the published frequencies: diffusers computes it with its own, and that is the whole difference."""
    model = random_weights(new_model("dit", TINY, 0))
    save_model(model, tmp_path / "own")
    outcome = export(RunOptions(tmp_path / "out"), ExportOptions(str(tmp_path / "own"), "diffusers"))
    assert len(outcome["differences"]) == 1 and "10000^(-i/127)" in outcome["differences"][0]
    as_diffusers = open_model(tmp_path / "out")
    x = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    save_file({"x": x, "t": torch.tensor(T), "y": torch.tensor(Y)}, tmp_path / "inputs.safetensors")
    stranger('save_file({"out": answer("out")}, "outputs.safetensors")', tmp_path)
    found = load_file(tmp_path / "outputs.safetensors")["out"]
    assert (found - outputs(as_diffusers, x)).abs().max() <= 1e-5
    apart = (found - outputs(model, x)).abs().amax(dim=(1, 2, 3))
    assert apart[0] <= 1e-5 and apart[1] > 1e-3, "at t = 0 both have the same features, and not at 250"


def test_a_student_pruned_for_diffusers_is_exported_exactly(tmp_path: Path, stranger: Stranger) -> None:
    """From a teacher with the published frequencies; the student is still paired with it, and trained on as diffusers computes."""
    teacher = random_weights(new_model("dit", TINY, 0))
    save_model(teacher, tmp_path / "teacher")
    keep = PruneSection(criterion="indices", keep=(0, 2))
    recipe = Recipe(teacher=str(tmp_path / "teacher"), destination="diffusers", prune=keep)
    prune(recipe, RunOptions(tmp_path / "cut"))
    student = open_model(tmp_path / "cut")
    assert export(RunOptions(tmp_path / "out"), ExportOptions(str(tmp_path / "cut"), "diffusers"))["differences"] == []
    x = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    save_file({"x": x, "t": torch.tensor(T), "y": torch.tensor(Y)}, tmp_path / "inputs.safetensors")
    stranger('save_file({"out": answer("out")}, "outputs.safetensors")', tmp_path)
    assert (load_file(tmp_path / "outputs.safetensors")["out"] - outputs(student, x)).abs().max() <= 1e-5
    assert teacher.family.differ_in_size_alone(student.arch, teacher.arch, teacher.stack.depths()), "recover takes it"
    assert student.facts.lineage[-1]["hash"] == teacher.hash()
    with pytest.raises(UserError, match="other"):
        prune(dataclasses.replace(recipe, destination=None), RunOptions(tmp_path / "cut"))


def test_a_pipeline_draws_with_nothing_of_ours(tmp_path: Path, vae: Path, stranger: Stranger) -> None:
    teacher = random_weights(new_model("dit", TINY, 0))
    facts: dict[str, Any] = {"latent_scale": 0.18215, "license": "CC-BY-NC-4.0"}
    teacher.facts = dataclasses.replace(teacher.facts, image_size=8, **facts)
    save_model(teacher.cut(by_indices(teacher, [1, 3], 0)), tmp_path / "own")
    what = ExportOptions(str(tmp_path / "own"), "diffusers", pipeline=True, vae=str(vae))
    export(RunOptions(tmp_path / "student"), what)
    said = stranger(
        """
pipeline = DiTPipeline.from_pretrained("student")
pipeline.set_progress_bar_config(disable=True)
images = pipeline([1, 207], num_inference_steps=3, guidance_scale=2.0, output_type="np").images
assert images.shape == (2, 8, 8, 3) and images.std() > 1e-3, (images.shape, images.std())
assert pipeline.scheduler.config.clip_sample is False and len(pipeline.transformer.transformer_blocks) == 2
again = pipeline([1], num_inference_steps=3, guidance_scale=1.0).images[0]
again.save("image.png")
pipeline.save_pretrained("saved")
""",
        tmp_path,
    )
    assert "not expected" not in said and "not initialized" not in said
    assert (tmp_path / "image.png").is_file()
    card = (tmp_path / "student" / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card and "non-commercial" in card and "DiTPipeline.from_pretrained" in card
    assert (tmp_path / "student" / "plan.png").read_bytes().startswith(b"\x89PNG")
    for folder in ("student", "saved"):
        opened = open_model(tmp_path / folder)
        assert opened.hash() == open_model(tmp_path / "own").made_for("diffusers").hash()
        assert opened.origin["kind"] == "folder of diffusers in a DiTPipeline"
    assert open_model(tmp_path / "student").facts.license == "CC-BY-NC-4.0"


def test_a_pipeline_draws_a_student_of_few_steps(tmp_path: Path, vae: Path, stranger: Stranger) -> None:
    """Without guidance, at trailing timesteps: the latents are those of our own sampler."""
    model = random_weights(new_model("dit", TINY, 0))
    few = FewSteps("consistency", (1.0, 0.5), 4.0, fresh_noise=False)
    model.facts = dataclasses.replace(model.facts, image_size=8, latent_scale=0.18215, few_steps=few)
    save_model(model, tmp_path / "own")
    what = ExportOptions(str(tmp_path / "own"), "diffusers", pipeline=True, vae=str(vae))
    export(RunOptions(tmp_path / "student"), what)
    stranger(
        """
pipeline = DiTPipeline.from_pretrained("student")
pipeline.set_progress_bar_config(disable=True)
start, latents = [], []
scheduler = pipeline.scheduler
def watched(output, t, x, made=scheduler.step, **given):
    start.append(x[:2].clone())
    after = made(output, t, x, **given)
    latents.append(after.prev_sample[:2].clone())
    return after
scheduler.step = watched
pipeline([1, 207], num_inference_steps=2, guidance_scale=1.0)
assert scheduler.timesteps.tolist() == [999, 499], scheduler.timesteps
save_file({"start": start[0], "end": latents[-1]}, "drawn.safetensors")
""",
        tmp_path,
    )
    drawn = load_file(tmp_path / "drawn.safetensors")
    student = open_model(tmp_path / "student")
    assert student.facts.few_steps == few

    class Draws(SampleDraws):
        def images(self, model: LoadedModel, position: int = -1) -> torch.Tensor:
            return drawn["start"]

    draws = Draws(Randomness(0), 0, 2, torch.device("cpu"))
    with torch.no_grad():
        *_, own = sampler_of(SampleSection(), student).trajectory(
            student, class_condition(torch.tensor([1, 207]), 1000), draws
        )
    torch.testing.assert_close(own, drawn["end"], rtol=1e-3, atol=1e-3)
    assert "num_inference_steps=2, guidance_scale=1" in (tmp_path / "student" / "README.md").read_text()
    fresh = dataclasses.replace(model.facts, few_steps=FewSteps("matching", (0.8, 0.4), 4.0, fresh_noise=True))
    save_model(dataclasses.replace(model, facts=fresh), tmp_path / "other")
    with pytest.raises(UserError, match="which no scheduler of diffusers makes"):
        export(RunOptions(tmp_path / "refused"), dataclasses.replace(what, model=str(tmp_path / "other")))


def test_names_and_shapes_are_those_of_the_class(tmp_path: Path, stranger: Stranger) -> None:
    """DiT-S, B, L, XL and D7, D14, D19: every name and shape that diffusers' class has, and no other."""
    listed = {}
    for name in SIZES:
        arch = published_arch(f"{name}/2")
        shapes = ours.to_diffusers(FAMILIES["dit"].shapes(arch), arch.depth)
        listed[name] = [ours.config_of_arch(arch), {key: list(t.shape) for key, t in shapes.items()}]
    (tmp_path / "listed.json").write_text(json.dumps(listed))
    stranger(
        """
for name, (config, shapes) in json.load(open("listed.json")).items():
    with torch.device("meta"):
        model = DiTTransformer2DModel.from_config(config)
    found = {key: list(t.shape) for key, t in model.state_dict().items()}
    assert found == shapes, name
""",
        tmp_path,
    )
