"""Laws of every family: a new one adds a row to tests/families.py, and nothing here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from families import ROWS, clean_batch, tiny
from tinyfusion.blocks.stack import frozen
from tinyfusion.commands.export import ExportOptions, export
from tinyfusion.commands.inspect import inspect
from tinyfusion.config.recipe import PruneSection, Recipe, RecoverSection, SampleSection, TrainingSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.jobs.process_specs import objective_for, process_spec, sampler_of
from tinyfusion.models.checkpoint import LoadedModel, open_model, save_model
from tinyfusion.models.macs import count_macs
from tinyfusion.processes.base import Batch, NoisyBatch, Process
from tinyfusion.prune.calibrate import calibration_set
from tinyfusion.prune.context import CriterionContext
from tinyfusion.prune.criteria import CRITERIA, by_indices, decide
from tinyfusion.prune.learn import mask_learner
from tinyfusion.recover.align import pairs_between
from tinyfusion.recover.distill import distilled
from tinyfusion.sample.drive import image_labels, sample

NUM = 5
METHODS = ("logits-kd", "rep-kd", "masked-kd")


@pytest.fixture(params=sorted(ROWS))
def model(request: pytest.FixtureRequest) -> LoadedModel:
    return tiny(request.param)


def objective_of(model: LoadedModel, label_drop: float = 0.1) -> Process:
    return objective_for(model, label_drop, Recipe())


def drawn(model: LoadedModel, num: int = NUM, first: int = 0, label_drop: float = 0.1) -> NoisyBatch:
    """Samples first .. first + num - 1 of step 3."""
    whole = clean_batch(model, first + num)
    batch = Batch(whole.x[first:], whole.condition.index(slice(first, None)))
    return objective_of(model, label_drop).draw(batch, Randomness(1).at(3, first, num))


def output(model: LoadedModel, noisy: NoisyBatch) -> Tensor:
    with torch.no_grad():
        return objective_of(model).predict(model.module, noisy).output


def losses(model: LoadedModel, noisy: NoisyBatch) -> dict[str, Tensor]:
    objective = objective_of(model)
    return objective.losses(model.module, noisy, objective.predict(model.module, noisy))


def half(model: LoadedModel) -> LoadedModel:
    """The student with every other block of every list."""
    return model.cut(by_indices(model, range(1, len(model.stack), 2)))


# --------------------------------------------------------------------------------------------------------------- blocks


def test_gates_of_ones_change_nothing_and_other_gates_are_cuts(model: LoadedModel) -> None:
    noisy, untouched = drawn(model), output(model, drawn(model))
    with model.stack.gated(torch.ones(NUM, len(model.stack))):
        assert torch.equal(output(model, noisy), untouched)
    kept = list(range(1, len(model.stack), 2))
    gates = torch.zeros(NUM, len(model.stack))
    gates[:, kept] = 1
    student = model.cut(by_indices(model, kept))
    student.module.eval()
    for dropped in ("dense", "skip"):
        with model.stack.gated(gates, dropped):  # type: ignore[arg-type]
            assert torch.equal(output(model, noisy), output(student, noisy))
    assert not torch.allclose(output(student, noisy), untouched)
    assert {name: len(kept) for name, kept in student.facts.kept.items()} == student.stack.depths()


def test_every_block_gets_a_gradient_and_checkpointing_leaves_it_alone(model: LoadedModel) -> None:
    found = []
    for recomputed in (False, True):
        model.module.zero_grad(set_to_none=True)
        if recomputed:
            with model.stack.checkpointed():
                losses(model, drawn(model))["loss"].mean().backward()
        else:
            losses(model, drawn(model))["loss"].mean().backward()
        found.append({name: p.grad.clone() for name, p in model.module.named_parameters() if p.grad is not None})
    for name in model.stack.names():
        assert any(key.startswith(f"{name}.") and bool(grad.abs().max() > 0) for key, grad in found[0].items()), name
    assert set(found[0]) == set(found[1])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# -------------------------------------------------------------------------------------------------------------- process


def test_draws_and_losses_of_a_sample_do_not_depend_on_the_batch(model: LoadedModel) -> None:
    whole, part = drawn(model, 5), drawn(model, 2, first=3)
    for field in dataclasses.fields(whole):
        value, other = getattr(whole, field.name), getattr(part, field.name)
        if isinstance(value, Tensor):
            torch.testing.assert_close(value[3:], other, rtol=0, atol=1e-6)
    together, alone = losses(model, whole), losses(model, part)
    assert set(together) == set(alone) and together["loss"].shape == (5,)
    for name, value in together.items():
        torch.testing.assert_close(value[3:], alone[name], rtol=1e-4, atol=1e-5)
    order = torch.tensor([3, 1, 4, 0, 2])
    shuffled = losses(model, whole.each(lambda value: value[order]))
    torch.testing.assert_close(shuffled["loss"], together["loss"][order], rtol=1e-4, atol=1e-5)


def test_a_label_counts_and_the_null_class_is_another(model: LoadedModel) -> None:
    noisy = drawn(model, label_drop=0.0)
    null = dataclasses.replace(noisy, condition=noisy.condition.null())
    assert not torch.allclose(output(model, noisy), output(model, null))
    dropped = drawn(model, label_drop=1.0).condition
    assert all(torch.equal(tensor, dropped.null()[name]) for name, tensor in dropped.tensors.items())


def test_a_model_distilled_from_itself_has_nothing_to_learn_of_its_output(model: LoadedModel) -> None:
    noisy, objective = drawn(model), objective_of(model)
    own = objective.predict(model.module, noisy)
    terms = objective.kd_terms(noisy, own, own)
    assert terms["kd_loss"].shape == (NUM,)
    error = {name: value for name, value in terms.items() if not name.startswith("vb")}
    vb = sum((value for name, value in terms.items() if name.startswith("vb")), torch.zeros(NUM))
    torch.testing.assert_close(error["kd_loss"] - vb, torch.zeros(NUM), rtol=0, atol=1e-6)


# -------------------------------------------------------------------------------------------------- choosing and learning


@pytest.mark.parametrize("criterion", sorted(CRITERIA))
@pytest.mark.parametrize("family", sorted(ROWS))
def test_every_criterion_gives_a_plan_or_says_why_not(family: str, criterion: str) -> None:
    model = tiny(family, std=0.05)  # where widths vary, the share of parameters must be within reach
    settings = PruneSection(criterion=criterion, keep=(0, len(model.stack) - 1), width_share=0.6, width_threshold=1.0)  # type: ignore[arg-type]

    def source(_step: int, num: int, draws: object) -> Batch:
        return clean_batch(model, 6)

    objective = objective_of(model, 0.0)
    calibration = calibration_set(objective, source, "random", 6, 6, 6, 0)
    context = CriterionContext(model, settings, 0, calibration)
    if criterion == "width" and (model.family.widths is None or not objective.num_levels):
        with pytest.raises(UserError, match="width"):
            decide(context)
        return
    plan = decide(context)
    student = model.cut(plan)
    student.module.eval()
    assert bool(torch.isfinite(losses(student, drawn(student))["loss"]).all())
    if criterion != "width":
        assert all(len(kept) < depth for kept, depth in zip(plan.kept.values(), plan.depth.values(), strict=True))


@pytest.mark.parametrize("distribution", ["categorical", "subset"])
@pytest.mark.parametrize("update", ["lora", "full", "frozen"])
def test_a_mask_is_learned(model: LoadedModel, distribution: str, update: str) -> None:
    settings = PruneSection(
        scheme="1:2",
        distribution=distribution,
        update=update,
        training=TrainingSection(steps=4, batch_size=NUM),  # type: ignore[arg-type]
    )
    learner = mask_learner(model, objective_of(model), settings, 0)
    batch = clean_batch(model, NUM)
    noisy = learner.objective.draw(batch, Randomness(1).at(0, 0, NUM))
    terms = learner.objective.losses(learner.module, noisy, learner.objective.predict(learner.module, noisy))
    terms["loss"].mean().backward()
    logits = learner.parameter_groups[1].parameters
    assert len(logits) == sum(len(groups) for groups in learner.groups.values())
    assert all(theta.grad is not None and bool(torch.isfinite(theta.grad).all()) for theta in logits.values())
    assert any(bool(theta.grad.abs().max() > 0) for theta in logits.values())
    assert set(learner.groups) == set(model.stack.depths()), "no group crosses from one list into another"


@pytest.mark.parametrize("method", METHODS)
def test_a_student_learns_from_its_teacher(model: LoadedModel, method: str) -> None:
    student = half(model)
    pairs = pairs_between(student.facts, model.facts, model.hash())
    starts = np.cumsum([0, *model.stack.depths().values()])
    own_starts = np.cumsum([0, *student.stack.depths().values()])
    for own, theirs in pairs:
        lists = [int(np.searchsorted(s, i, side="right")) for s, i in ((own_starts, own), (starts, theirs))]
        assert lists[0] == lists[1], "a pair crosses from one list into another"
    settings = RecoverSection(method=method, training=TrainingSection(steps=10, batch_size=NUM))  # type: ignore[arg-type]
    frozen(model.module)
    goal = distilled(settings, objective_of(student), model, student, pairs)
    noisy = drawn(model)
    terms = goal.losses(student.module, noisy, goal.predict(student.module, noisy))
    assert ("feat_loss" in terms) == (method != "logits-kd")
    terms["loss"].mean().backward()
    grads = [p.grad for p in student.module.parameters() if p.grad is not None]
    assert grads and all(bool(torch.isfinite(grad).all()) for grad in grads)
    assert all(p.grad is None for p in model.module.parameters())


# ------------------------------------------------------------------------------------------------------------- sampling


def test_image_i_is_the_same_at_any_batch_size(model: LoadedModel) -> None:
    settings = process_spec(model).cheap(SampleSection(guidance=1.5), 4)
    sampler = sampler_of(settings, model)
    labels = image_labels(5, len(model.conditions), 0)
    found = [
        torch.cat([batch.x for batch in sample(model, labels, sampler, 0, batch_size)]) for batch_size in (5, 2, 1)
    ]
    arch = model.arch
    assert found[0].shape == (5, arch.in_channels, arch.input_size, arch.input_size)
    assert bool(torch.isfinite(found[0]).all()) and float(found[0].std()) > 0
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-3, atol=1e-4)
    later = list(sample(model, labels, sampler, 0, 2, first=3))
    torch.testing.assert_close(later[0].x, found[0][3:], rtol=1e-3, atol=1e-4)
    alone = sampler_of(dataclasses.replace(settings, guidance=1.0), model)
    plain = torch.cat([batch.x for batch in sample(model, labels, alone, 0)])
    assert not torch.allclose(plain, found[0]), "guidance does something"
    assert str(settings.num_steps or sampler.calls) in sampler.describe(model)


def test_samplers_of_other_processes_are_refused(model: LoadedModel) -> None:
    own = {"gaussian": "ddpm", "flow": "ode", "masked": "masked"}
    for process, name in own.items():
        settings = SampleSection(sampler=name)  # type: ignore[arg-type]
        if process == model.family.process:
            sampler_of(settings, model)
        else:
            with pytest.raises(UserError, match=f"--sampler {name} is not for models of family {model.family.name}"):
                sampler_of(settings, model)


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_model_goes_to_disk_and_back(model: LoadedModel, tmp_path: Path) -> None:
    student = half(model)
    for name, one in (("whole", model), ("student", student)):
        save_model(one, tmp_path / name)
        again = open_model(tmp_path / name)
        assert (again.family.name, again.arch, again.facts) == (one.family.name, one.arch, one.facts)
        assert again.hash() == one.hash()
        one.module.eval()
        assert torch.equal(output(again, drawn(one)), output(one, drawn(one)))
        facts = inspect(again)
        assert facts["family"] == model.family.name and facts["depth"] == len(one.stack)
    assert student.macs() < model.macs()
    family, arch = model.family, model.arch
    assert model.macs() == count_macs(lambda: family.build(arch), lambda: family.example(arch, 1))


def test_the_official_layout_holds_it_or_says_why_not(model: LoadedModel, tmp_path: Path) -> None:
    save_model(model, tmp_path / "model")
    file = tmp_path / "official.safetensors"
    reason = model.unfit_formats().get("official")
    if reason:
        with pytest.raises(UserError, match="cannot be exported to official"):
            export(RunOptions(file), ExportOptions(str(tmp_path / "model"), "official"))
        return
    export(RunOptions(file), ExportOptions(str(tmp_path / "model"), "official"))
    again = open_model(file, num_heads=model.arch.num_heads, family=model.family.name)
    assert again.hash() == model.hash()
    assert torch.equal(output(again, drawn(model)), output(model, drawn(model)))
