"""A family from outside of the package: the one that docs/adding-a-family.md writes, registered by a call or an entry point."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tinyfusion
from families import clean_batch
from tinyfusion.commands.export import ExportOptions, export
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Draws
from tinyfusion.families import registry
from tinyfusion.families.registry import families, family_named, family_of_config
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.models.checkpoint import LoadedModel, new_model, open_model, save_model
from tinyfusion.processes.base import Batch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "adding-a-family.md"
SIZES = dict(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=4, num_heads=2, num_classes=5)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's code as a module `mixer_family`, and the known families as they were afterwards."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    (tmp_path / "mixer_family.py").write_text(code[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))
    registry._load_entry_points.cache_clear()
    yield tmp_path
    sys.modules.pop("mixer_family", None)
    registry._load_entry_points.cache_clear()


@pytest.fixture
def model(package: Path) -> LoadedModel:
    __import__("mixer_family")
    made = new_model("mixer", {**SIZES, "sizes": {"expansion": 3}}, 0)
    made.module.eval()
    return made


def images(model: LoadedModel) -> Batch:
    return clean_batch(model, 3)


def output(model: LoadedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.module.eval()(images(model).x, torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 3, 5]))


def test_a_registered_family_is_opened_pruned_saved_and_opened_again(model: LoadedModel, tmp_path: Path) -> None:
    assert model.arch.expansion == 3 and model.hash() == new_model("mixer", dataclasses.asdict(model.arch), 0).hash()
    save_model(model, tmp_path / "teacher")
    teacher = open_model(tmp_path / "teacher")
    assert torch.equal(output(teacher), output(model))
    student = tinyfusion.prune_model(teacher, [0, 2])
    save_model(student, tmp_path / "student")
    again = open_model(tmp_path / "student")
    assert (again.hash(), again.arch, again.facts) == (student.hash(), student.arch, student.facts)
    assert again.arch.depth == 2 and torch.equal(output(again), output(student))
    gates = torch.tensor([[1.0, 0.0, 1.0, 0.0]]).expand(3, -1)
    with teacher.stack.gated(gates):
        assert torch.equal(output(teacher), output(student))


def test_it_is_trained_recovered_and_drawn(model: LoadedModel) -> None:
    def batches(_step: int, _num: int, _draws: Draws) -> Batch:
        return images(model)

    objective = tinyfusion.objective_of(model)
    short = tinyfusion.TrainingSection(steps=2, batch_size=3, ema_decay=0.2)
    settings = tinyfusion.PruneSection(scheme="1:2", update="frozen", training=short)
    student = tinyfusion.prune_model(model, tinyfusion.learn_masks(model, objective, batches, settings))
    recovery = tinyfusion.RecoverSection(method="logits-kd", training=short)
    recovered = tinyfusion.recover_model(student, model, tinyfusion.objective_of(student), batches, recovery)
    sampling = tinyfusion.SampleSection(sampler="ode", guidance=1.5)
    drawn = tinyfusion.sample_images(recovered, [0, 4], sampling)
    assert drawn.shape[0] == 2


def test_what_nobody_published_is_refused_by_name(model: LoadedModel, tmp_path: Path) -> None:
    save_model(model, tmp_path / "teacher")
    for to, reason in (("official", "no published files"), ("diffusers", "no class of diffusers")):
        with pytest.raises(UserError, match=f"the family mixer .*{reason}|family mixer have {reason}"):
            export(RunOptions(tmp_path / f"{to}.pt"), ExportOptions(str(tmp_path / "teacher"), to))
    torch.save(model.module.state_dict(), tmp_path / "file.pt")
    with pytest.raises(UserError, match="files of the family mixer are not known"):
        open_model(tmp_path / "file.pt", family="mixer")
    with pytest.raises(UserError, match="'mixer' is registered already"):
        tinyfusion.register_family(dataclasses.replace(model.family))
    with pytest.raises(UserError, match="family mixer has no head_depth: leave it out; it has depth, expansion"):
        new_model("mixer", {**SIZES, "sizes": {"head_depth": 3}}, 0)
    with pytest.raises(UserError, match="expansion wants a whole number"):
        new_model("mixer", {**SIZES, "sizes": {"expansion": "wide"}}, 0)


def test_an_installed_package_is_found_by_its_entry_point(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    info = package / "mixer-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mixer\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[tinyfusion.families]\nbroken = nowhere_at_all:FAMILY\nmixer = mixer_family:FAMILY\n"
    )
    assert family_named("mixer").name == "mixer" and list(families())[:1] == ["dit"]
    assert "family broken (nowhere_at_all:FAMILY) cannot be loaded" in capsys.readouterr().err


def test_folders_of_diffusers_are_of_the_family_that_claims_their_class() -> None:
    """Old folders of `Transformer2DModel` are told apart by their norms; other classes with the same norms are not taken."""
    old = {"_class_name": "Transformer2DModel"}
    assert family_of_config({"_class_name": "DiTTransformer2DModel"}) is families()["dit"] is family_of_config(old)
    assert family_of_config({**old, "norm_type": "ada_norm_single"}) is families()["pixart"]
    for kind in ("LatteTransformer3DModel", "AllegroTransformer3DModel", "Net2DModel"):
        assert family_of_config({"_class_name": kind, "norm_type": "ada_norm_single"}) is None
