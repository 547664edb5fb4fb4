"""What each block does: removal, updates, activations and likeness against closed forms, gates, and the published table."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_calibration import calibrated

from families import ROWS, clean_batch, tiny
from tinyfusion.config.recipe import DataSection, ExplainSection, Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.explain.removal import losses_without, paired_mean, removal_evaluations
from tinyfusion.explain.similarity import block_outputs, cka_matrix
from tinyfusion.explain.updates import block_updates
from tinyfusion.jobs.explaining import Measured, block_records, check_similar, measured_on, similarity
from tinyfusion.jobs.process_specs import objective_for
from tinyfusion.models.checkpoint import LoadedModel, new_model, open_model
from tinyfusion.processes.base import Process
from tinyfusion.prune.calibrate import Calibration, block_statistics, calibration_set
from tinyfusion.prune.criteria import by_indices
from tinyfusion.prune.mask_search import mask_losses
from tinyfusion.recover.align import blocks_of_ancestor

TABLE = Path(__file__).parents[2] / "docs" / "results" / "digits-teacher.md"


def passes_of(model: LoadedModel, num: int = 2, images: int = 6) -> tuple[Process, list[Calibration]]:
    """The objective of a model, and `num` passes over the same random images."""
    objective, clean = objective_for(model, 0.0, Recipe()), clean_batch(model, images)
    rows = partial(
        calibration_set, objective, lambda _step, _size, draws: _part(clean, draws), "random", images, images, 4
    )
    return objective, [rows(seed=seed) for seed in range(num)]


def _part(clean: object, draws: object) -> object:
    rows = slice(draws.first, draws.first + draws.num)  # type: ignore[attr-defined]
    return dataclasses.replace(clean, x=clean.x[rows], condition=clean.condition.index(rows))  # type: ignore[attr-defined,type-var]


def measured(model: LoadedModel, num: int = 2, images: int = 6) -> Measured:
    objective, passes = passes_of(model, num, images)
    return Measured(model, objective, tuple(passes))


# ---------------------------------------------------------------------------------------------------------------- removal


@pytest.mark.parametrize("family", ROWS)
def test_a_removed_block_is_a_closed_gate(family: str) -> None:
    """Losses by replay equal those with the gates of blocks/stack.py, image by image."""
    model = tiny(family)
    objective, passes = passes_of(model)
    batches, depth = [noisy for each in passes for noisy in each.batches], len(model.stack)
    ticks: list[int] = []
    losses = losses_without(model, objective, batches, ticks.append)
    assert ticks[-1] == removal_evaluations(depth) * len(batches)
    gates = torch.ones(depth + 1, depth)
    gates[torch.arange(depth) + 1, torch.arange(depth)] = 0.0
    for row, gate in zip(losses, gates, strict=True):
        with torch.no_grad(), model.stack.gated(gate.unsqueeze(0)):
            plain = [objective.losses(model.module, n, objective.predict(model.module, n))["loss"] for n in batches]
        np.testing.assert_allclose(row, torch.cat(plain).double().numpy(), rtol=2e-4)


def test_mean_losses_are_those_of_the_criterion() -> None:
    model = tiny("dit")
    calibration = calibrated(model)
    losses = losses_without(model, calibration.objective, calibration.batches)
    masks = sorted([(0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)])
    sums = mask_losses(model, calibration, masks)
    expected = dict(zip(masks, sums.loss / sums.images, strict=True))
    for row, mask in zip(losses, [(0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)], strict=True):
        assert row.mean() == pytest.approx(expected[mask], rel=1e-5)


def test_a_block_that_adds_nothing_has_no_effect() -> None:
    """Initial weights of the published way: modulations of zero, so every block is the identity."""
    model = new_model("dit", ROWS["dit"], 0)
    for parameter in model.module.final_layer.parameters():
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    record = block_records(measured(model), num_bins=2)
    for block in record["blocks"]:
        assert block["added_loss"]["mean"] == block["added_loss"]["error"] == 0
        assert block["update_norm"]["mean"] == block["update_cosine"]["mean"] == 0
        assert block["influence"]["mean"] == pytest.approx(0, abs=1e-6)
        assert block["attention_share"]["mean"] is None, "no share of nothing"


def test_the_error_of_paired_means_is_that_of_independent_images() -> None:
    generator = np.random.default_rng(0)
    values = generator.standard_normal((4, 50)) + generator.standard_normal(50)  # four noised copies of 50 images
    found = paired_mean(values.ravel(), np.tile(np.arange(50), 4))
    means = values.mean(axis=0)
    assert found == pytest.approx((means.mean(), means.std(ddof=1) / np.sqrt(50)))
    repeated = paired_mean(np.tile(values[0], 4), np.tile(np.arange(50), 4))
    assert repeated == pytest.approx(paired_mean(values[0], np.arange(50))), "copies are no further evidence"
    assert paired_mean(np.zeros(0), np.zeros(0)) is None
    mean, error = paired_mean(np.ones(3), np.zeros(3)) or (0.0, 0.0)
    assert mean == 1 and np.isnan(error)


# --------------------------------------------------------------------------------------------------- updates, activations


@pytest.mark.parametrize("family", ROWS)
def test_updates_against_a_plain_computation(family: str) -> None:
    model = tiny(family)
    objective, (calibration, *_) = passes_of(model)
    updates, seen = block_updates(model, objective, calibration.batches), []
    with torch.no_grad(), model.stack.watched(range(len(model.stack)), lambda b, x, y: seen.append((b, x, y))):
        for noisy in calibration.batches:
            objective.predict(model.module, noisy)
    for block, update in enumerate(updates):
        own = [(x, y) for b, x, y in seen if b == block]
        sizes = torch.cat([((y - x).norm(dim=-1) / x.norm(dim=-1)).mean(1) for x, y in own])
        np.testing.assert_allclose(update.update_norm, sizes.double().numpy(), rtol=1e-5)
        ratios = torch.cat([y.abs().amax(1) / y.abs().flatten(1).median(1).values.unsqueeze(1) for _, y in own])
        np.testing.assert_allclose(update.activations.ratio, ratios.double().mean(0).numpy(), rtol=1e-5)
        assert ((update.attention_share > 0) & (update.attention_share < 1)).all()
    cosines = block_statistics(model, calibration, clean=False, tick=lambda done: None).cosine
    influence = [float(np.mean(update.influence)) for update in updates]
    if family != "mar":  # tokens of an image differ in number from batch to batch there
        np.testing.assert_allclose(influence, [1 - cosine for cosine in cosines], atol=1e-6)


def test_attention_alone_is_the_whole_update() -> None:
    model = tiny("dit")
    width = model.arch.hidden_size
    for block in model.stack:
        block.adaLN_modulation[1].weight.data[5 * width :] = 0.0  # the gate of the MLP
        block.adaLN_modulation[1].bias.data[5 * width :] = 0.0
    record = block_records(measured(model), num_bins=1)
    assert [block["attention_share"]["mean"] for block in record["blocks"]] == pytest.approx([1.0] * 4, abs=1e-5)


def test_a_family_that_names_no_place_has_no_share_of_attention() -> None:
    model = tiny("dit")
    unnamed = dataclasses.replace(model, family=dataclasses.replace(model.family, mlp_norm=None))
    record = block_records(measured(unnamed), num_bins=1)
    assert {block["attention_share"]["mean"] for block in record["blocks"]} == {None}


def test_a_large_channel_is_found_in_the_block_that_makes_it() -> None:
    model = tiny("dit", std=0.05)
    block = list(model.stack)[2]
    bias = block.mlp.fc2.bias.data
    bias[7] = 400.0
    block.adaLN_modulation[1].weight.data[-model.arch.hidden_size :] = 0.0
    block.adaLN_modulation[1].bias.data[-model.arch.hidden_size :] = 1.0  # a gate of one
    large = [b["activations"]["large"] for b in block_records(measured(model), num_bins=1)["blocks"]]
    assert 7 not in large[0] + large[1] and 7 in large[2] and 7 in large[3]
    activations = block_records(measured(model), 1)["blocks"][2]["activations"]
    assert activations["massive"] == ([7] if activations["ratios"][0] >= 1000 else [])


# ------------------------------------------------------------------------------------------------------- noise and classes


@pytest.mark.parametrize("family", ROWS)
def test_bins_go_from_noise_to_data(family: str) -> None:
    subject = measured(tiny(family), num=8)
    bins = subject.bins(3)
    assert sum(part.sum() for part in bins) == len(subject.images) == 48
    if family in ("dit", "pixart"):
        times = torch.cat([noisy.t for noisy in subject.batches]).numpy()
        assert times[bins[0]].min() > times[bins[1]].max() > times[bins[2]].max()
    elif family == "sit":
        times = torch.cat([noisy.t for noisy in subject.batches]).numpy()
        assert times[bins[0]].max() < times[bins[1]].min() < times[bins[2]].min()
    else:
        hidden = np.concatenate([np.full(len(n), n.hidden.shape[1]) for n in subject.batches])  # type: ignore[attr-defined]
        means = [hidden[part].mean() for part in bins if part.any()]
        assert means == sorted(means, reverse=True)


def test_classes_with_few_images_have_no_numbers_of_their_own() -> None:
    record = block_records(measured(tiny("dit"), images=6), num_bins=1)
    assert record["classes"] == []
    many = block_records(measured(tiny("dit"), images=60), num_bins=1)
    assert many["classes"] and len(many["loss"]["by_class"]) == len(many["classes"])
    assert measured(tiny("pixart")).labels is None


# --------------------------------------------------------------------------------------------------------------- likeness


def test_cka_of_a_model_with_itself() -> None:
    subject = measured(tiny("dit"))
    record = similarity(subject, subject.model, "itself")
    matrix = np.array(record["matrix"])
    assert np.diag(matrix) == pytest.approx(1.0, abs=1e-6)
    assert matrix == pytest.approx(matrix.T, abs=1e-6)
    assert record["with"] == "itself" and record["most_like"] == [0, 1, 2, 3] and record["origins"] is None


def test_cka_ignores_rotation_scale_and_offset() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    others = [3.0 * x @ rotation + 5.0, torch.randn(200, 6, generator=generator), torch.ones(200, 3)]
    same, random, constant = cka_matrix([x], others)[0]
    assert same == pytest.approx(1.0, abs=1e-6) and random < 0.2 and constant == 0.0
    assert np.isnan(cka_matrix([x], [x[:100]])[0, 0]), "other tokens are not compared"


def test_all_places_of_an_image_are_compared() -> None:
    """Few tokens per image still come from every place, and the same ones of every model."""
    model, other = tiny("dit"), tiny("dit", seed=1)
    objective, passes = passes_of(model, num=1, images=40)
    few = block_outputs(model, objective, passes[0].batches, rows=40)
    assert len(few[0]) >= 40 and {len(rows) for rows in block_outputs(other, objective, passes[0].batches, 40)} == {
        len(few[0])
    }


def test_stacks_of_different_tokens_are_not_compared() -> None:
    subject = measured(tiny("mar"))
    matrix = similarity(subject, subject.model, "itself")["matrix"]
    assert matrix[0][-1] is None and matrix[-1][-1] == pytest.approx(1.0)


def test_a_student_says_which_blocks_its_own_were() -> None:
    teacher = tiny("dit")
    student = teacher.cut(by_indices(teacher, [0, 2, 3]))
    grandchild = student.cut(by_indices(student, [1, 2]))
    assert similarity(measured(student), teacher, "teacher")["origins"] == [0, 2, 3]
    assert blocks_of_ancestor(grandchild.facts, teacher.hash()) == [2, 3]
    assert blocks_of_ancestor(grandchild.facts, student.hash()) == [1, 2]
    assert blocks_of_ancestor(grandchild.facts, tiny("dit", seed=1).hash()) is None
    assert blocks_of_ancestor(teacher.facts, teacher.hash()) is None


def test_a_teacher_of_other_inputs_is_refused() -> None:
    model = tiny("dit")
    check_similar(model, tiny("dit", seed=1), "other")
    with pytest.raises(UserError, match="of family sit"):
        check_similar(model, tiny("sit"), "other")
    larger = new_model("dit", {**ROWS["dit"], "input_size": 8}, 0)
    with pytest.raises(UserError, match="its input_size differs"):
        check_similar(model, larger, "other")


# ------------------------------------------------------------------------------------------------------------- the digits


def test_agrees_with_the_table_of_the_digits_teacher() -> None:
    """The single-block table of docs/results/digits-teacher.md: the same removals measured with other noise."""
    text = TABLE.read_text(encoding="utf-8")
    rows = [re.search(rf"^\| {name} \|(.*)\|$", text, re.MULTILINE) for name in ("added loss", "standard errors")]
    added, in_errors = (np.array([float(cell) for cell in row[1].split("|")]) for row in rows if row)
    recipe = Recipe(data=DataSection("digits:heldout"), explain=ExplainSection(passes=2, batch_size=360))
    subject = measured_on(recipe, open_model("digits"))
    losses = losses_without(subject.model, subject.objective, subject.batches)
    for block, expected in enumerate(added):
        mean, error = paired_mean(losses[block + 1] - losses[0], subject.images) or (0.0, 0.0)
        assert abs(mean - expected) < 4 * np.hypot(error, expected / in_errors[block]) + 5e-5, block
