"""MAR: sizes and numbers of the published models, what is hidden and revealed, and that nothing depends on the batch.

Source of the numbers: Li et al., arXiv 2406.11838, and its released code; TinyFusion, arXiv 2412.01199.
"""

from __future__ import annotations

import argparse
import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.stack import num_parameters
from tinyfusion.blocks.tokens import from_tokens, to_tokens
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.config.loading import load_recipe
from tinyfusion.config.process_sections import MaskedSampleSection, MaskedSection
from tinyfusion.config.recipe import SampleSection, TrainingSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.families.mar.block import BlockDropout, block_seeds, dropped_out
from tinyfusion.families.mar.model import (
    SIZES,
    Mar,
    MarArch,
    arch_of_state_dict,
    published_arch,
    undecayed,
    unfit_formats,
)
from tinyfusion.models.checkpoint import LoadedModel, new_model, open_model, save_model
from tinyfusion.processes.base import Batch, NoisyBatch, Prediction
from tinyfusion.processes.gaussian import Schedule
from tinyfusion.processes.masked import (
    MaskedBatch,
    MaskedObjective,
    cosine_betas,
    head_schedule,
    hidden_ratio,
    num_hidden,
)
from tinyfusion.recover.align import block_pairs
from tinyfusion.recover.distill import DistilledObjective
from tinyfusion.sample import masked
from tinyfusion.sample.drive import SampleDraws, sample
from tinyfusion.sample.masked import MaskedSampler, hidden_after
from tinyfusion.training.optim import decay_groups, optimizer_of, trainable

TINY = dict(
    input_size=4, patch_size=1, in_channels=3, hidden_size=16, depth=4, num_heads=2, num_classes=5, buffer_size=2,
    head_depth=2, head_width=16,
)  # fmt: skip
TOKENS = 16


def tiny(seed: int = 0, **sizes: Any) -> LoadedModel:
    """A MAR whose every weight is random, so that every block and branch matters."""
    model = new_model("mar", {**TINY, **sizes}, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.normal_(std=0.2, generator=generator)
    model.module.eval()
    return model


def objective(**settings: Any) -> MaskedObjective:
    return MaskedObjective(1, settings=MaskedSection(**settings))


def clean(num: int, seed: int = 0) -> Batch:
    draws = Randomness(seed).at(0, 0, num)
    return Batch(
        torch.from_numpy(draws.normal("x", (3, 4, 4))), class_condition(torch.from_numpy(draws.integers("y", 5)), 5)
    )


def drawn(num: int = 3, step: int = 1, **settings: Any) -> MaskedBatch:
    return objective(**settings).draw(clean(num), Randomness(0).at(step, 0, num))


# ----------------------------------------------------------------------------------------------------- published sizes


def on_meta(arch: MarArch) -> Mar:
    with torch.device("meta"):
        return Mar(arch)


@pytest.mark.parametrize(
    ("name", "parameters", "entries"),
    [("mar_base", 207_924_768, 364), ("mar_large", 478_326_304, 476), ("mar_huge", 942_403_104, 604)],
)
def test_published_models_to_the_unit(name: str, parameters: int, entries: int) -> None:
    model = on_meta(published_arch(name))
    assert num_parameters(model) == num_parameters(model, trainable_only=True) == parameters
    assert len(model.state_dict()) == entries
    assert arch_of_state_dict(model.state_dict(), None) == published_arch(name)


def test_parts_of_mar_large() -> None:
    large = published_arch("mar_large")
    model = on_meta(large)
    assert num_parameters(model.encoder_blocks) == num_parameters(model.decoder_blocks) == 201_539_584
    assert num_parameters(model.head) == 72_230_432
    tiny_mar = dataclasses.replace(large, encoder_depth=8, decoder_depth=8)
    assert num_parameters(on_meta(tiny_mar)) == 276_786_720
    small_head = on_meta(dataclasses.replace(large, head_depth=3, head_width=1024))
    large_head = on_meta(dataclasses.replace(large, head_depth=12, head_width=1536))
    assert round(num_parameters(small_head) / 1e6, 2) == 426.36
    assert round(num_parameters(large_head) / 1e6, 2) == 556.91


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="mar_base, mar_large, mar_huge"):
        published_arch("mar_giant")
    assert set(SIZES) == {"mar_base", "mar_large", "mar_huge"}


@pytest.mark.parametrize("change", [{"input_size": 5, "patch_size": 2}, {"num_heads": 3}, {"hidden_size": 0}, {"depth": 0},
                                    {"head_width": 0}, {"decoder_width": 9}])  # fmt: skip
def test_sizes_that_do_not_fit_together_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(UserError):
        new_model("mar", {**TINY, **change}, 0)


def test_a_decoder_of_its_own_width_and_heads() -> None:
    model = tiny(decoder_width=24, decoder_heads=4)
    noisy = drawn()
    assert objective().predict(model.module, noisy).output.shape == (*noisy.t.shape, 6)
    assert arch_of_state_dict(tiny(decoder_width=24).module.state_dict(), 2) == tiny(decoder_width=24).arch
    assert MarArch(4, 1, 3, 16, 1, 1, 2, 5, decoder_width=16, decoder_heads=2) == MarArch(4, 1, 3, 16, 1, 1, 2, 5)


def test_shapes_that_are_no_mar_are_refused() -> None:
    tensors = dict(tiny().module.state_dict())
    with pytest.raises(ValueError, match="--num-heads"):
        arch_of_state_dict(tensors, None)
    with pytest.raises(ValueError, match=r"decoder_block numbers have gaps: \[1\]"):
        arch_of_state_dict({k: v for k, v in tensors.items() if not k.startswith("decoder_blocks.1.")}, 2)
    with pytest.raises(ValueError, match="no square grid"):
        arch_of_state_dict({**tensors, "diffusion_pos_embed_learned": torch.zeros(1, 15, 16)}, 2)
    with pytest.raises(ValueError, match="no buffer"):
        arch_of_state_dict({**tensors, "encoder_pos_embed_learned": torch.zeros(1, 16, 16)}, 2)
    with pytest.raises(ValueError, match="class_emb.weight"):
        arch_of_state_dict({k: v for k, v in tensors.items() if k != "class_emb.weight"}, 2)


def test_formats_of_others() -> None:
    assert set(unfit_formats(tiny().arch, {})) == {"diffusers"}
    assert "4 cells" not in str(unfit_formats(tiny().arch, {}))
    assert "2 x 2 cells" in unfit_formats(tiny(patch_size=2).arch, {})["official"]
    wide = dataclasses.replace(published_arch("mar_base"), num_heads=8)
    assert "8 heads" in unfit_formats(wide, {})["official"]


@pytest.mark.parametrize("patch", [1, 2])
def test_tokens_are_patches_in_rows_channel_first(patch: int) -> None:
    x = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).float()
    tokens = to_tokens(x, patch)
    assert tokens.shape == (2, (4 // patch) ** 2, 3 * patch**2)
    assert torch.equal(from_tokens(tokens, patch), x)
    assert torch.equal(tokens[0, 1], x[0, :, :patch, patch : 2 * patch].flatten())


# ------------------------------------------------------------------------------------------------------------ official files


def test_official_files_open_to_the_same_hash(tmp_path: Path) -> None:
    model = tiny()
    plain = model.module.state_dict()
    half = {name: 0.5 * value for name, value in plain.items()}
    content = {"model": plain, "model_ema": half, "epoch": 3, "args": argparse.Namespace(model="mar_large"),
               "optimizer": {}, "scaler": {}}  # fmt: skip
    torch.save(content, tmp_path / "checkpoint-last.pth")
    torch.save(plain, tmp_path / "plain.pth")
    save_model(model, tmp_path / "ours")
    opened = open_model(tmp_path / "plain.pth", num_heads=2)
    raw = open_model(tmp_path / "checkpoint-last.pth", weights="raw", num_heads=2)
    averaged = open_model(tmp_path / "checkpoint-last.pth", num_heads=2)
    ours = open_model(tmp_path / "ours")
    assert opened.family.name == averaged.family.name == "mar"
    assert opened.hash() == raw.hash() == ours.hash() == model.hash() != averaged.hash()
    assert all(torch.equal(value, half[name]) for name, value in averaged.module.state_dict().items())
    assert opened.arch == ours.arch == model.arch


# ------------------------------------------------------------------------------------------------------ what is hidden


def test_shares_of_hidden_tokens_have_the_published_statistics() -> None:
    uniform = (np.arange(20_000) + 0.5) / 20_000
    ratios = np.array([hidden_ratio(u, 0.7) for u in uniform])
    counts = np.array([num_hidden(r, 256) for r in ratios])
    assert ratios.mean() == pytest.approx(0.8670, abs=1e-4) and np.median(ratios) == pytest.approx(0.8743, abs=1e-4)
    assert ratios.std() == pytest.approx(0.0835, abs=1e-4)
    assert counts.mean() == pytest.approx(222.5, abs=0.1) and (counts == 256).mean() == pytest.approx(0.016, abs=1e-3)
    assert counts.min() == 180 and counts.max() == 256


def test_all_images_of_a_step_hide_equally_many_whatever_the_slices() -> None:
    goal, batch = objective(mask_ratio_min=0.1), clean(8)
    counts = set()
    for step in range(12):
        whole = goal.draw(batch, Randomness(3).at(step, 0, 8))
        part = goal.draw(Batch(batch.x[5:], batch.condition.index(slice(5, None))), Randomness(3).at(step, 5, 3))
        counts.add(whole.hidden.shape[1])
        picked = whole.each(lambda value: value[5:])
        for name in ("xt", "noise", "t", "known", "hidden", "dropout_seeds"):
            assert torch.equal(getattr(picked, name), getattr(part, name)), name
        assert torch.equal(picked.condition["labels"], part.condition["labels"])
    assert len(counts) > 3


def test_known_and_hidden_places_are_all_places() -> None:
    noisy = drawn(6)
    both = torch.cat([noisy.known, noisy.hidden], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(TOKENS).expand(6, -1))
    assert torch.equal(noisy.known, noisy.known.sort(dim=1).values)
    assert len({tuple(row) for row in noisy.hidden.tolist()}) == 6


def test_only_known_tokens_are_read() -> None:
    model, noisy = tiny(), drawn(mask_ratio_min=0.3)
    places = torch.zeros(3, TOKENS).scatter(1, noisy.hidden, 1.0).view(3, 1, 4, 4)
    other = dataclasses.replace(noisy, x0=noisy.x0 + 5 * places)
    known_changed = dataclasses.replace(noisy, x0=noisy.x0 + 5 * (1 - places))
    predict = objective().predict
    assert torch.equal(predict(model.module, noisy).output, predict(model.module, other).output)
    assert not torch.equal(predict(model.module, noisy).output, predict(model.module, known_changed).output)


def test_order_in_the_batch_does_not_matter() -> None:
    model, noisy, goal = tiny(), drawn(5), objective()
    order = torch.tensor([3, 0, 4, 2, 1])
    straight = goal.losses(model.module, noisy, goal.predict(model.module, noisy))["loss"]
    mixed = noisy.each(lambda value: value[order])
    found = goal.losses(model.module, mixed, goal.predict(model.module, mixed))["loss"]
    torch.testing.assert_close(found, straight[order], rtol=1e-5, atol=1e-6)


def test_the_null_class_is_a_vector_of_its_own() -> None:
    model, noisy = tiny(), drawn()
    assert model.module.get_parameter("class_emb.weight").shape[0] == 5
    null = dataclasses.replace(noisy, condition=noisy.condition.null())
    before = objective().predict(model.module, null).output
    with torch.no_grad():
        model.module.get_parameter("class_emb.weight").add_(1.0)
    assert torch.equal(objective().predict(model.module, null).output, before)
    with torch.no_grad():
        model.module.get_parameter("fake_latent").add_(1.0)
    assert not torch.equal(objective().predict(model.module, null).output, before)


@pytest.mark.parametrize("label", [2, 5])
def test_every_parameter_has_a_gradient_whatever_the_labels(label: int) -> None:
    """DDP waits for all of them; with everything hidden too."""
    model, goal = tiny(), objective()
    noisy = drawn(step=0)
    everything = torch.cat([noisy.known, noisy.hidden], dim=1)
    extra = torch.zeros(3, TOKENS, 1, dtype=torch.int64)
    labels = class_condition(torch.full((len(noisy),), label), 5)
    hidden = goal.noised(Batch(noisy.x0, labels), everything[:, :0], everything, extra,
                         torch.zeros(3, TOKENS, 1, 3))  # fmt: skip
    goal.losses(model.module, hidden, goal.predict(model.module, hidden))["loss"].mean().backward()
    assert [name for name, p in model.module.named_parameters() if p.grad is None] == []


# ------------------------------------------------------------------------------------------------------------ the head


def test_betas_have_the_published_values() -> None:
    betas = cosine_betas()
    assert betas[:3] == pytest.approx([4.12842e-5, 4.61418e-5, 5.09995e-5], rel=1e-5) and betas[999] == 0.999
    assert head_schedule().alphas_cumprod[-1] == pytest.approx(2.43e-9, rel=1e-2)
    assert head_schedule("100").timesteps[[0, 1, 5, 6, 7, 99]].tolist() == [0, 10, 50, 61, 71, 999]
    assert not np.array_equal(Schedule().betas, head_schedule().betas)


def test_a_new_model_predicts_nothing_and_has_the_published_loss() -> None:
    model = new_model("mar", TINY, 0)
    noisy = drawn()
    assert not objective().predict(model.module, noisy).output.any()
    num = 50_000
    draws = Randomness(0).at(0, 0, num)
    rows, t = objective().rows, torch.arange(num) % 1000
    x, noise = (torch.from_numpy(draws.normal(name, (16, 1, 1))) for name in ("x", "noise"))
    batch = NoisyBatch(x, noise, rows.schedule.q_sample(x, t, noise), t, t)
    terms = rows.losses(nn.Identity(), batch, Prediction(torch.zeros(num, 32, 1, 1)))
    assert float(terms["mse"].mean()) == pytest.approx(1.00, abs=0.01)
    assert float(terms["vb"].mean()) == pytest.approx(0.74, abs=0.04)  # half of it is the last timestep


def test_losses_are_means_over_the_hidden_rows() -> None:
    model, noisy, goal = tiny(), drawn(), objective()
    prediction = goal.predict(model.module, noisy)
    noise = prediction.output[..., :3]
    terms = goal.losses(model.module, noisy, prediction)
    torch.testing.assert_close(terms["mse"], ((noise - noisy.noise) ** 2).mean((1, 2, 3)))
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"])


def test_a_model_taught_by_itself() -> None:
    """Nothing to learn but at t = 0, where the published distillation compares with the data."""
    model, noisy = tiny(), drawn(6)
    no_zero = dataclasses.replace(noisy, t=noisy.t.clamp(min=1))
    prediction = objective().predict(model.module, no_zero)
    terms = objective().kd_terms(no_zero, prediction, prediction)
    assert terms["kd_loss"].abs().max() < 1e-6
    at_zero = dataclasses.replace(noisy, t=torch.zeros_like(noisy.t))
    prediction = objective().predict(model.module, at_zero)
    assert objective().kd_terms(at_zero, prediction, prediction)["vb_kd"].min() > 0.01
    switched = objective(kl_at_zero="teacher").kd_terms(at_zero, prediction, prediction)
    assert switched["kd_loss"].abs().max() < 1e-6


def test_what_the_process_does_not_offer() -> None:
    noisy = drawn()
    assert objective().num_levels == 0
    with pytest.raises(UserError, match="bi_inputs"):
        objective().low_noise(noisy)
    with pytest.raises(UserError, match="level"):
        objective().at_level(noisy, 0)


# -------------------------------------------------------------------------------------------------------------- dropout


def test_dropout_is_addressed() -> None:
    model, goal = tiny(), objective(attention_dropout=0.2, projection_dropout=0.2)
    noisy = goal.draw(clean(6), Randomness(0).at(1, 0, 6))
    model.module.train()
    whole = goal.predict(model.module, noisy).output
    assert torch.equal(whole, goal.predict(model.module, noisy).output)
    part = goal.predict(model.module, noisy.each(lambda value: value[2:4])).output
    torch.testing.assert_close(part, whole[2:4], rtol=1e-5, atol=1e-5)
    other = dataclasses.replace(noisy, dropout_seeds=noisy.dropout_seeds + 1)
    assert not torch.allclose(goal.predict(model.module, other).output, whole)
    plain = objective().predict(model.module, noisy).output
    assert not torch.allclose(plain, whole)
    model.module.eval()
    torch.testing.assert_close(goal.predict(model.module, noisy).output, plain)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(rate: float) -> None:
    seeds = torch.from_numpy(Randomness(0).at(0, 0, 8).words("dropout", 1)[:, 0].view(np.int64))
    x = torch.ones(8, 64, 64)
    fates = [dropped_out(x, block_seeds(seeds, block), rate, place) for block in range(3) for place in range(4)]
    for fate in fates:
        assert fate.unique().tolist() == pytest.approx([0.0, 1 / (1 - rate)])
        assert float((fate == 0).float().mean()) == pytest.approx(rate, abs=0.01)
    kept = torch.stack([(fate != 0).flatten() for fate in fates]).double()
    correlation = torch.corrcoef(kept) - torch.eye(len(kept))
    assert correlation.abs().max() < 0.04, "blocks and places drop independently"
    images = torch.corrcoef((fates[0] != 0).flatten(1).double()) - torch.eye(8)
    assert images.abs().max() < 0.08, "images drop independently"


def test_attention_with_its_dropout_near_zero_is_the_fused_one() -> None:
    model, x = tiny(), torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    block = next(iter(model.stack))
    nearly = BlockDropout(torch.zeros(3, dtype=torch.int64), 1e-12, 0.0)
    torch.testing.assert_close(block(x, nearly), block(x))


# ------------------------------------------------------------------------------------------------- blocks, from outside


def test_gates_of_ones_equal_the_plain_model_and_zeros_the_cut_one() -> None:
    model, noisy, goal = tiny(), drawn(), objective(mask_ratio_min=0.3)
    with torch.no_grad():
        plain = goal.predict(model.module, noisy).output
        with model.stack.gated(torch.ones(1, 8)):
            assert torch.equal(goal.predict(model.module, noisy).output, plain)
        kept = {"encoder_blocks": [0, 3], "decoder_blocks": [1, 2]}
        gates = torch.tensor([[1.0, 0, 0, 1, 0, 1, 1, 0]])
        plan = PrunePlan(kept=kept, depth=model.stack.depths(), criterion="indices", teacher=model.hash())
        student = model.cut(plan)
        for dropped in ("dense", "skip"):
            with model.stack.gated(gates.expand(3, -1), dropped):
                assert torch.equal(goal.predict(model.module, noisy).output, goal.predict(student.module, noisy).output)
    assert (student.arch.encoder_depth, student.arch.decoder_depth) == (2, 2)


def test_blocks_are_watched_in_both_stacks() -> None:
    model, noisy = tiny(), drawn()
    with torch.no_grad(), model.stack.tap([0, 7]) as outputs:
        objective().predict(model.module, noisy)
    known = noisy.known.shape[1]
    assert outputs[0].shape == (3, 2 + known, 16) and outputs[7].shape == (3, 2 + TOKENS, 16)


def test_pairs_never_cross_the_stacks() -> None:
    depth = {"encoder_blocks": 16, "decoder_blocks": 16}
    kept = {"encoder_blocks": list(range(0, 16, 2)), "decoder_blocks": list(range(1, 16, 2))}
    groups = {name: [[1, 2]] * 8 for name in depth}
    plan = PrunePlan(kept=kept, depth=depth, criterion="learned", scheme="1:2", distribution="categorical",
                     groups=groups, teacher="")  # fmt: skip
    assert block_pairs(plan) == [(i, 2 * i + 1) for i in range(16)]
    lopsided = {"encoder_blocks": [2], "decoder_blocks": [0, 1, 9]}
    pairs = block_pairs(dataclasses.replace(plan, kept=lopsided, groups=None, scheme=None))
    assert pairs == [(0, 15), (1, 16), (2, 24), (3, 31)]


def test_teacher_and_student_see_the_same_draw() -> None:
    model = tiny()
    goal = objective(attention_dropout=0.1)
    own, taught = model.copy(), model.copy()
    taught.module.eval()
    own.module.train()
    pairs = [(i, i) for i in range(8)]
    distilled = DistilledObjective(goal, taught.module, taught.stack, own.stack, pairs, steps=1, beta=(1.0, 0.0))
    noisy = distilled.draw(clean(3), Randomness(0).at(0, 0, 3))
    terms = distilled.losses(own.module, noisy, distilled.predict(own.module, noisy))
    assert float(terms["feat_loss"].detach().min()) > 0, "dropout is the student's alone"
    own.module.eval()
    terms = distilled.losses(own.module, noisy, distilled.predict(own.module, noisy))
    assert float(terms["feat_loss"].detach().max()) == 0


# ------------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("rounds", "revealed"),
    [
        (8, [5, 15, 24, 31, 39, 45, 48, 49]),
        (16, [2, 3, 7, 8, 11, 13, 15, 16, 19, 20, 22, 23, 23, 25, 24, 25]),
        (256, [1] * 256),
    ],
)
def test_rounds_reveal_the_published_counts(rounds: int, revealed: list[int]) -> None:
    assert (-np.diff([256, *hidden_after(256, rounds)])).tolist() == revealed


@pytest.mark.parametrize("num_tokens", [1, 2, 9, 16, 64])
def test_any_number_of_rounds_up_to_the_tokens_reveals_some_each(num_tokens: int) -> None:
    for rounds in range(1, num_tokens + 1):
        counts = [num_tokens, *hidden_after(num_tokens, rounds)]
        assert len(counts) == rounds + 1 and counts[-1] == 0
        assert all(after < before for before, after in pairwise(counts))


def quick(**settings: Any) -> MaskedSampler:
    return MaskedSampler(**{**dict(num_steps=4, head_steps=3), **settings})


def draws_of(first: int, num: int) -> SampleDraws:
    return SampleDraws(Randomness(0), first, num, torch.device("cpu"))


@pytest.mark.parametrize("rounds", [1, 2, 5, 16])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@torch.no_grad()
def test_every_token_is_revealed_once_and_stays(rounds: int, guidance: float) -> None:
    model, y = tiny(), torch.tensor([0, 3, 4])
    states = list(quick(num_steps=rounds, guidance=guidance).trajectory(model, class_condition(y, 5), draws_of(0, 3)))
    assert len(states) == rounds
    before = torch.zeros(3, TOKENS, dtype=torch.bool)
    tokens = torch.zeros(3, TOKENS, 3)
    for state, hidden in zip(states, hidden_after(TOKENS, rounds), strict=True):
        now = to_tokens(state, 1)
        revealed = (now != 0).any(-1)
        assert torch.equal(now[before], tokens[before]), "what is known stays"
        assert (before <= revealed).all() and (revealed.sum(1) == TOKENS - hidden).all()
        before, tokens = revealed, now


@torch.no_grad()
def test_images_do_not_depend_on_the_batch() -> None:
    model, labels = tiny(), [0, 1, 2, 3, 4]
    whole = torch.cat([b.x for b in sample(model, labels, quick(guidance=1.7), seed=3, batch_size=5)])
    batches = torch.cat([b.x for b in sample(model, labels, quick(guidance=1.7), seed=3, batch_size=2)])
    torch.testing.assert_close(batches, whole, rtol=1e-4, atol=1e-4)
    assert torch.cdist(whole.flatten(1), whole.flatten(1)).add(10 * torch.eye(5)).min() > 0.1


class SigningHead(nn.Module):
    """Stands in for the head: noise prediction and variance logits are the sign of the condition."""

    def conditions(self, z: Tensor) -> Tensor:
        return z

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        assert t.shape == (1,), "all rows are at one timestep"
        return condition[:, :1].sign().expand(-1, 2 * x.shape[1])


def test_guidance_is_on_the_noise_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny().module
    assert isinstance(module, Mar)
    head = SigningHead()
    monkeypatch.setattr(Mar, "head", property(lambda _self: head))
    z = torch.cat([torch.ones(4, 16), -torch.ones(4, 16)])
    out = masked._denoiser(module, z, 3.0)(torch.zeros(4, 3, 1, 1), torch.zeros(4, dtype=torch.int64))
    assert torch.equal(out[:, :3], torch.full((4, 3, 1, 1), -1 + 3.0 * 2))
    assert torch.equal(out[:, 3:], torch.ones(4, 3, 1, 1))


def test_the_head_runs_for_revealed_tokens_alone_and_once_without_guidance() -> None:
    rows: list[int] = []
    model = tiny()
    assert isinstance(model.module, Mar)
    head = model.module.head
    hook = head.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
    counts = -np.diff([TOKENS, *hidden_after(TOKENS, 4)])
    for guidance, factor in ((1.0, 1), (2.0, 2)):
        rows.clear()
        with torch.no_grad():
            list(quick(guidance=guidance).trajectory(model, class_condition(torch.tensor([0, 1]), 5), draws_of(0, 2)))
        assert rows == [int(2 * factor * count) for count in counts for _ in range(3)]
    hook.remove()


def test_guidance_grows_with_what_is_known() -> None:
    linear, constant = MaskedSampler(guidance=3.0), MaskedSampler(guidance=3.0, guidance_schedule="constant")
    assert linear.scale(256, 255) == pytest.approx(1 + 2 / 256) and linear.scale(256, 1) == pytest.approx(
        1 + 2 * 255 / 256
    )
    assert constant.scale(256, 255) == 3.0


def test_temperature_scales_the_step_noise_alone() -> None:
    model, y = tiny(), torch.tensor([1, 2])

    def final(**settings: Any) -> Tensor:
        with torch.no_grad():
            return list(quick(**settings).trajectory(model, class_condition(y, 5), draws_of(0, 2)))[-1]

    assert not torch.allclose(final(temperature=0.5), final())
    assert torch.equal(final(temperature=0.0, head_steps=1), final(head_steps=1)), "the start is not scaled"
    assert final(clip=True).abs().max() < final().abs().max() or final().abs().max() < 1


def test_settings_that_cannot_be() -> None:
    model = tiny()
    for name, value, said in (
        ("num_steps", 0, "1 round"), ("guidance", 0.5, "guidance"), ("temperature", -1.0, "temperature"), ("head_steps", 1001, "1000"),
        ("timed", 5, "timed"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            quick(**{name: value})
    with pytest.raises(UserError, match="16 tokens can be revealed in 1 to 16 rounds; got 17"):
        masked.from_section(SampleSection(num_steps=17), model)
    with pytest.raises(UserError, match="17"):
        next(quick(num_steps=17).trajectory(model, class_condition(torch.tensor([0]), 5), draws_of(0, 1)))
    for settings in (
        SampleSection(sampler="ddim"),
        SampleSection(eta=0.5),
        SampleSection(guidance_interval=(0.1, 0.9)),
    ):
        with pytest.raises(UserError, match="masked"):
            masked.from_section(settings, model)
    with pytest.raises(UserError, match="1001"):
        masked.from_section(SampleSection(masked=MaskedSampleSection(head_steps=1001)), model)


def test_recipes_say_how_and_the_published_way_is_the_default() -> None:
    model = tiny()
    found = masked.from_section(SampleSection(guidance=3.0), model)
    assert found == MaskedSampler(16, 100, 1.0, 3.0, "linear")
    assert (found.calls, found.rows, found.of_steps(2).calls) == (16, 2, 2)
    assert found.made_rounds() == list(range(16)) and found.of_steps(2).made_rounds() == [4, 12]
    assert found.of_steps(99).made_rounds() == list(range(16))
    assert found.describe(model) == "masked 16 rounds, 100 head steps | guidance 3, linear"
    assert "clipped, temperature 0.9" in dataclasses.replace(found, clip=True, temperature=0.9).describe(model)
    for section in (SampleSection(), SampleSection(num_steps=256)):
        looked = masked.from_section(masked.cheap(section, 20), model)
        assert (looked.num_steps, looked.head_steps) == (16, 20)
        assert masked.from_section(masked.cheap(section, 5), model).calls == 5
    assert masked.from_section(masked.cheap(SampleSection(num_steps=3), 20), model).calls == 3
    step = quick(guidance=2.0).one_step(model, class_condition(torch.tensor([0, 1]), 5), draws_of(0, 2))
    with torch.no_grad():
        assert step().shape == (2, TOKENS, 3)


@pytest.mark.parametrize(
    "wrong",
    [{"mask_ratio_min": 1.0}, {"diffusion_batch_mul": 0}, {"attention_dropout": 1.0}, {"projection_dropout": -0.1}],
)
def test_training_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        load_recipe(None, [f"masked.{name}={value}" for name, value in wrong.items()])


# -------------------------------------------------------------------------------------------------------- weight decay


def test_weight_decay_leaves_biases_vectors_and_the_head_alone() -> None:
    model = tiny()
    names = {name for name, p in model.module.named_parameters() if not undecayed(name, p)}
    assert {"fake_latent", "mask_token", "class_emb.weight", "encoder_pos_embed_learned", "z_proj.weight"} <= names
    assert not any(name.startswith("diffloss") or name.endswith(".bias") or "norm" in name for name in names)
    settings = TrainingSection(weight_decay=0.02)
    groups = decay_groups(trainable(model.module), model.family.undecayed, settings)
    assert set(groups[0].parameters) == names
    optimizer = optimizer_of(groups, settings)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.02, 0.0]
    assert len(decay_groups(trainable(model.module), model.family.undecayed, TrainingSection())) == 1
    assert len(decay_groups(trainable(model.module), None, settings)) == 1
