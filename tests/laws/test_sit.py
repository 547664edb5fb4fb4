"""SiT: DiT's network with real times and no variance; its sizes, its files, and a whole job in miniature."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tinyfusion.blocks.plan import plan_from_json
from tinyfusion.cli import main
from tinyfusion.commands.prune import prune
from tinyfusion.commands.recover import recover
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.config.loading import load_recipe
from tinyfusion.core.errors import UserError
from tinyfusion.families.dit.model import DiT, DiTArch, published_arch
from tinyfusion.families.sit import SiT
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.models.checkpoint import LoadedModel, new_model, open_model, save_model
from tinyfusion.processes.base import Batch
from tinyfusion.processes.flow import FlowObjective
from tinyfusion.sample.flow import flow_of

TINY = dict(input_size=8, patch_size=4, in_channels=4, hidden_size=32, num_heads=2, num_classes=10)
# name: parameters with and without the second half of the output, of one block, and tensors in the state dict
PUBLISHED = {
    "SiT-XL/2": (675_129_632, 675_111_184, 23_905_152, 292),
    "SiT-L/2": (458_102_816, 458_086_416, 18_889_728, 252),
    "SiT-B/2": (130_512_416, 130_500_112, 10_628_352, 132),
    "SiT-S/2": (32_963_360, 32_957_200, 2_659_968, 132),
}


def on_meta(arch: DiTArch) -> SiT:
    with torch.device("meta"):
        return SiT(arch)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def random_sit(seed: int = 0, **sizes: Any) -> LoadedModel:
    """Every weight random, so that every block and branch matters."""
    model = new_model("sit", {**TINY, "depth": 4, **sizes}, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=generator)
    model.module.eval()
    return model


def inputs(model: LoadedModel, num: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    arch, generator = model.arch, torch.Generator().manual_seed(1)
    x = torch.randn(num, arch.in_channels, arch.input_size, arch.input_size, generator=generator)
    return x, torch.rand(num, generator=generator), torch.arange(num) % (arch.num_classes + 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_to_the_unit(name: str) -> None:
    whole, without, block, entries = PUBLISHED[name]
    arch = published_arch(name.replace("SiT", "DiT"))
    model = on_meta(arch)
    assert (count(model), count(model.blocks[0]), len(model.state_dict())) == (whole, block, entries)
    assert arch.learn_sigma
    assert count(on_meta(DiTArch(**{**vars(arch), "learn_sigma": False}))) == without


def test_tinysit_has_its_published_size() -> None:
    assert count(on_meta(published_arch("DiT-D14/2"))) == 340_457_504
    assert on_meta(published_arch("DiT-XL/2")).pos_embed.numel() == 294_912


def test_it_is_the_network_of_dit_without_the_variance() -> None:
    """Key for key, and number for number but for the half that is dropped."""
    model = random_sit()
    with torch.device("meta"):
        twin = DiT(model.arch)
    assert list(twin.state_dict()) == list(model.module.state_dict())
    twin.load_state_dict(model.module.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(model.module(*inputs(model)), twin(*inputs(model))[:, :4])


def test_time_goes_in_as_it_is() -> None:
    """A thousandth of the way is no step of a thousand: times that differ little give outputs that differ little."""
    model = random_sit()
    x, t, y = inputs(model)
    with torch.no_grad():
        out, near, far = (model.module(x, time, y) for time in (t, t + 1e-4, t * 1000))
    assert 0 < float((out - near).abs().max()) < 1e-3 * float(out.abs().max())
    assert float((out - far).abs().max()) > 0.1 * float(out.abs().max())


def test_the_dropped_half_counts_for_nothing() -> None:
    """Rows r of the last layer with r mod 2C >= C get no gradient, and a model without them says the same."""
    model = random_sit()
    x, t, y = inputs(model)
    model.module(x, t, y).square().sum().backward()
    head = dict(model.module.named_parameters())["final_layer.linear.weight"]
    kept = torch.arange(len(head)) % 8 < 4
    assert head.grad is not None
    assert bool((head.grad[~kept] == 0).all()) and bool((head.grad[kept] != 0).any())
    tensors = dict(model.module.state_dict())
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        tensors[name] = tensors[name][kept]
    half = SiT(DiTArch(**{**vars(model.arch), "learn_sigma": False}))
    half.load_state_dict(tensors)
    with torch.no_grad():
        torch.testing.assert_close(half(x, t, y), model.module(x, t, y))


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("form", ["flat", "ema", "model", "trainer"])
def test_official_files_open_whatever_wraps_them(tmp_path: Path, form: str, learn_sigma: bool) -> None:
    """Flat, under `ema` or `model`, or all that the trainer writes; whether the variance is there is seen from the rows."""
    model = random_sit(learn_sigma=learn_sigma)
    tensors = dict(model.module.state_dict())
    other = {name: value + 1 for name, value in tensors.items()}
    wrapped: dict[str, Any] = {
        "flat": tensors,
        "ema": {"ema": tensors},
        "model": {"model": tensors},
        "trainer": {"model": other, "ema": tensors, "opt": {}, "args": argparse.Namespace(model="SiT-XL/2")},
    }[form]
    torch.save(wrapped, tmp_path / "official.pt")
    opened = open_model(tmp_path / "official.pt", num_heads=2, family="sit")
    assert (opened.family.name, opened.arch) == ("sit", model.arch)
    assert all(torch.equal(value, tensors[name]) for name, value in opened.module.state_dict().items())
    assert opened.facts.latent_scale == 0.18215
    assert flow_of(opened).settings() == {"path": "linear", "prediction": "velocity"}


def test_a_file_that_says_no_family_is_taken_for_a_dit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(dict(random_sit().module.state_dict()), tmp_path / "official.pt")
    assert open_model(tmp_path / "official.pt", num_heads=2).family.name == "dit"
    assert "assuming family dit (give --family" in capsys.readouterr().err


def test_a_folder_keeps_the_path_and_the_prediction(tmp_path: Path) -> None:
    model = random_sit()
    settings = {"path": "gvp", "prediction": "noise"}
    model.facts = type(model.facts)(**{**vars(model.facts), "process_settings": settings})
    save_model(model, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "model.json").read_text())["process_settings"] == settings
    assert flow_of(open_model(tmp_path / "model")).settings() == settings


def test_a_folder_with_no_such_path_is_refused_when_it_is_used(tmp_path: Path) -> None:
    save_model(random_sit(), tmp_path / "model")
    record = json.loads((tmp_path / "model" / "model.json").read_text())
    record["process_settings"] = {"path": "spiral"}
    (tmp_path / "model" / "model.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="spiral"):
        flow_of(open_model(tmp_path / "model"))


def test_diffusers_cannot_hold_it() -> None:
    reasons = random_sit().unfit_formats()
    assert "no class" in reasons["diffusers"] and "official" not in reasons


def test_gates_of_ones_and_cuts_are_those_of_any_family() -> None:
    model = random_sit()
    noisy_inputs = inputs(model)
    with torch.no_grad():
        plain = model.module(*noisy_inputs)
        with model.stack.gated(torch.ones(3, 4)):
            assert torch.equal(model.module(*noisy_inputs), plain)
        with model.stack.gated(torch.tensor([[1.0, 0.0, 1.0, 0.0]]).expand(3, 4)):
            gated = model.module(*noisy_inputs)
        cut = model.copy()
        cut.stack.keep({"blocks": [0, 2]})
        assert torch.equal(cut.module(*noisy_inputs), gated)


def test_the_average_error_of_a_fresh_model_is_that_of_its_target() -> None:
    """Fresh weights give 0, so the loss is the mean square of the velocity: noise and data, 2 for data of variance 1."""
    model = new_model("sit", {**TINY, "depth": 2}, 0)
    objective = FlowObjective()
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(512, 4, 8, 8, generator=generator) for _ in range(2))
    t, y = torch.rand(512, generator=generator), torch.zeros(512, dtype=torch.int64)
    noisy = objective.noised(Batch(x, class_condition(y, 10)), t, noise)
    with torch.no_grad():
        loss = objective.losses(model.module, noisy, objective.predict(model.module, noisy))["loss"]
    assert float(loss.mean()) == pytest.approx(2.0, abs=0.03)


# ---------------------------------------------------------------------------------------------------------------- recipe


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("latents") / "latents.npz"
    np.savez(path, np.random.default_rng(0).standard_normal((8, 8, 8, 4), dtype=np.float32), np.arange(8) % 10)
    return path


def test_the_recipe_of_the_paper_says_what_it_says() -> None:
    """Tables 2 and 6; with DiT's values where they state none."""
    recipe, dit = load_recipe("sit-xl-d14"), load_recipe("dit-xl-d14")
    assert recipe.prune == dit.prune
    assert recipe.recover.beta == (2e-4, 0.0)
    assert recipe.recover.training == dit.recover.training
    assert (recipe.recover.method, recipe.recover.alpha_kd, recipe.recover.mask) == ("masked-kd", 0.9, "own")
    assert (recipe.flow.path, recipe.flow.prediction, recipe.flow.loss_weight) == ("linear", "velocity", "none")
    sampling = recipe.sample
    assert (sampling.sampler, sampling.num_steps, sampling.guidance, sampling.num_images) == ("sde", 250, 1.5, 50_000)
    form = sampling.flow
    assert (form.method, form.diffusion_form, form.diffusion_norm) == ("euler", "sigma", 1.0)
    assert (form.last_step, form.last_step_size) == ("mean", 0.04)
    numbers = {
        item.metric.partition(".")[0] + "." + item.metric.rpartition(".")[2]: item.value for item in recipe.expected
    }
    assert numbers == {
        "student.fid": 3.02, "student.inception_score": 220.1, "teacher.fid": 2.06, "teacher.inception_score": 270.27,
    }  # fmt: skip
    assert recipe.minutes == dit.minutes, "the network and the steps are the same"


def test_two_steps_of_search_and_recovery_at_the_published_depth(tmp_path: Path, latents: Path) -> None:
    save_model(random_sit(depth=28), tmp_path / "teacher")
    short = [f"{stage}.training.{name}" for stage in ("prune", "recover") for name in ("stop_after=2", "batch_size=4")]
    recipe = load_recipe("sit-xl-d14", [f"teacher={tmp_path / 'teacher'}", f"data.name={latents}", *short])
    prune(recipe, RunOptions(tmp_path / "cut"))
    recover(recipe, RunOptions(tmp_path / "back"), tmp_path / "cut")
    plan = plan_from_json(json.loads((tmp_path / "cut" / "plan.json").read_text()))
    assert len(plan.kept["blocks"]) == 14
    student = open_model(tmp_path / "back")
    assert (student.family.name, len(student.stack)) == ("sit", 14)
    lines = [json.loads(line) for line in (tmp_path / "back" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["beta"] == 2e-4 and all(line["applied"] for line in lines)
    assert {"loss", "gt", "mse", "kd_loss", "feat_loss"} <= set(lines[0])


def test_dry_run_of_the_recipe_on_an_official_file(
    tmp_path: Path, latents: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(dict(random_sit(depth=28).module.state_dict()), tmp_path / "SiT-XL-2-256x256.pt")
    teacher = str(tmp_path / "SiT-XL-2-256x256.pt")
    command = ["prune", "--recipe", "sit-xl-d14", "--teacher", teacher, "--num-heads", "2"]
    assert main([*command, "--data", str(latents), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "sit, 28 blocks" in said.out + said.err
    assert "assuming family" not in said.err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def small_sit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sit") / "model"
    save_model(random_sit(input_size=8, patch_size=4, in_channels=1), folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        ["sample.flow.method=heun2", "sample.num_steps=4"],
        ["sample.sampler=sde", "sample.num_steps=4"],
        ["sample.sampler=sde", "sample.num_steps=4", "sample.flow.method=heun", "sample.flow.diffusion_form=sbdm"],
        ["sample.flow.rtol=1e-2", "sample.flow.atol=1e-2"],
    ],
)
def test_every_way_of_sampling_can_be_typed(small_sit: Path, tmp_path: Path, settings: list[str]) -> None:
    command = ["sample", "--model", str(small_sit), "--num-images", "5", "--out", str(tmp_path / "images.npz")]
    assert main([*command, *(part for setting in settings for part in ("--set", setting))]) == 0
    with np.load(tmp_path / "images.npz") as images:
        assert images["arr_0"].shape == (5, 8, 8, 1)
    record = json.loads((tmp_path / "images.json").read_text())
    assert "linear velocity" in record["protocol"]
