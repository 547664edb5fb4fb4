"""Folded guidance: the guided teacher as target, the facts of the student, and drawing with one pass per step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tiny_training import batches

from tinyfusion.api import distill_model_steps, objective_of, prune_model, recover_model, sample_images
from tinyfusion.blocks.stack import frozen
from tinyfusion.conditioning.condition import Condition
from tinyfusion.config.recipe import (
    DistillStepsSection,
    DynamicSection,
    FlowSampleSection,
    Recipe,
    RecoverSection,
    SampleSection,
)
from tinyfusion.core.errors import UserError
from tinyfusion.jobs.few_steps import check_few_steps, few_step_training, few_steps_of
from tinyfusion.jobs.folding import check_folding, fold_guidance, with_taught_target
from tinyfusion.jobs.process_specs import objective_for, sampler_of
from tinyfusion.jobs.recording import Drawing
from tinyfusion.models.checkpoint import LoadedModel, open_model, save_model
from tinyfusion.processes.base import FoldedGuidance, NoisyBatch
from tinyfusion.prune.criteria import by_indices
from tinyfusion.recover.distill import DistilledObjective
from tinyfusion.sample.flow import FlowSampler
from tinyfusion.sample.gaussian import GaussianSampler
from tinyfusion.training.engine import Engine

ModelFactory = Callable[..., LoadedModel]
FOLDED = FoldedGuidance(2.5, 1)
DDIM: dict[str, Any] = {"sampler": "ddim"}
EULER: dict[str, Any] = {"flow": FlowSampleSection(method="euler")}


def folded(model: LoadedModel, guidance: FoldedGuidance = FOLDED) -> LoadedModel:
    return dataclasses.replace(model, facts=dataclasses.replace(model.facts, folded_guidance=guidance))


def of_digits(model: LoadedModel, steps: int = 3, **more: Any) -> RecoverSection:
    training = dataclasses.replace(RecoverSection().training, steps=steps, batch_size=4, ema_decay=0.1)
    return RecoverSection(method="logits-kd", training=training, **more)


# ---------------------------------------------------------------------------------------------------------------- target


@torch.no_grad()
def test_the_target_is_the_guided_output_of_the_teacher(
    model: LoadedModel, noisy_batch: Callable[..., NoisyBatch]
) -> None:
    process, noisy = objective_of(model), noisy_batch(model, 4)
    plain = process.predict(model.module, noisy).output
    null = process.predict(model.module, dataclasses.replace(noisy, condition=noisy.condition.null())).output
    taught = process.taught(model.module, noisy, FOLDED)
    wanted = torch.cat([null[:, :1] + 2.5 * (plain[:, :1] - null[:, :1]), plain[:, 1:]], 1)
    torch.testing.assert_close(taught.output, wanted, rtol=1e-5, atol=1e-5)
    assert float((taught.output - plain)[:, :1].abs().max()) > 1e-2, "guidance changes the output"
    assert torch.equal(process.taught(model.module, noisy, None).output, plain)


def test_a_student_that_guides_itself_has_no_loss(model: LoadedModel, noisy_batch: Callable[..., NoisyBatch]) -> None:
    """The distance to the guided teacher of its own guided output is 0, and that of its plain output is not."""
    noisy, stack = noisy_batch(model, 4), model.stack
    module = frozen(model.module)
    goal = DistilledObjective(objective_of(model), module, stack, stack, [], 1, 1.0, (0, 0), guidance=FOLDED)
    prediction = goal.predict(module, noisy)
    assert prediction.teacher is not None and not prediction.teacher.output.requires_grad
    guided = dataclasses.replace(prediction, output=prediction.teacher.output)
    assert float(goal.losses(module, noisy, guided)["loss"].abs().max()) < 1e-6
    assert float(goal.losses(module, noisy, prediction)["kd_loss"].min()) > 1e-4
    assert goal.step_memory().teacher_rows == 2


@torch.no_grad()
def test_features_are_those_with_the_condition(
    tiny_model: ModelFactory, noisy_batch: Callable[..., NoisyBatch]
) -> None:
    model = tiny_model()
    noisy, pairs = noisy_batch(model, 4), [(i, i) for i in range(len(model.stack))]
    copy = model.copy()
    how = (objective_of(model), frozen(model.module), model.stack, copy.stack, pairs, 1, 1.0, (1.0, 1.0), None)
    one, other = (
        DistilledObjective(*how, guidance=guidance).predict(copy.module, noisy) for guidance in (None, FOLDED)
    )
    for plain, guided in zip(one.feature_losses, other.feature_losses, strict=True):
        torch.testing.assert_close(plain, guided, atol=1e-6, rtol=0)


# ---------------------------------------------------------------------------------------------------------------- student


def test_a_student_is_saved_with_its_guidance_and_drawn_without(model: LoadedModel, tmp_path: Path) -> None:
    student = prune_model(model, [0, 2])
    process = objective_of(model)
    made = recover_model(student, model, process, batches, of_digits(model, guidance=2.5))
    channels = model.guided_channels
    assert made.facts.folded_guidance == FoldedGuidance(2.5, channels)
    assert model.facts.folded_guidance is None and student.facts.folded_guidance is None, "the given ones are unchanged"
    save_model(made, tmp_path / "student")
    again = open_model(tmp_path / "student")
    assert again.facts.folded_guidance == made.facts.folded_guidance and again.distilled_guidance
    assert not again.takes_guidance and model.takes_guidance
    for scale in (1.0, 4.0):
        sampler = sampler_of(SampleSection(guidance=scale, num_steps=None), again)
        assert isinstance(sampler, GaussianSampler | FlowSampler) and sampler.guidance == 1 and sampler.rows == 1
        words = f"guidance 2.5 on {channels} channel{'s' * (channels > 1)} (published)"
        assert sampler.describe(again).endswith(f"{words}, folded in")
        other = sampler_of(SampleSection(guidance=2.5, num_steps=None), model)
        assert sampler.describe(again) == other.describe(model) + ", folded in", "comparable but for the last words"
    how = SampleSection(num_steps=4, guidance=1.0, **(DDIM if model.family.name == "dit" else EULER))
    drawn = sample_images(again, [1, 2, 3], how)
    bare = dataclasses.replace(again, facts=dataclasses.replace(again.facts, folded_guidance=None))
    assert np.array_equal(drawn, sample_images(bare, [1, 2, 3], how))


def test_the_student_of_a_search_folds_too(tiny_model: ModelFactory) -> None:
    model = tiny_model()
    settings = of_digits(model, steps=4, guidance=2.0, search_share=0.5)
    made = recover_model(model, model, objective_of(model), batches, settings)
    assert len(made.stack) == 2 and made.facts.folded_guidance == FoldedGuidance(2.0, model.guided_channels)


def test_data_are_no_target_where_guidance_is_folded_in() -> None:
    recipe = Recipe(recover=RecoverSection(method="logits-kd", guidance=1.5))
    model = open_model("digits")
    remarks: list[str] = []
    made = with_taught_target(recipe, model, remarks).recover
    assert made.alpha_kd == 1 and made.training.label_drop == 0 and not remarks, "which was asked for"
    named = dataclasses.replace(recipe, assigned=frozenset({"recover.alpha_kd", "recover.training.label_drop"}))
    assert with_taught_target(named, model, remarks).recover == recipe.recover and not remarks
    free = Recipe(recover=RecoverSection(method="logits-kd", guidance=1.0))
    assert with_taught_target(free, model, remarks) == free
    again = with_taught_target(free, folded(model), remarks).recover
    assert again.alpha_kd == 1 and again.training.label_drop == 0, "nor for a model that has folded it in"
    assert "recover.alpha_kd=1: this model predicts under guidance by itself" in remarks[0]


def test_a_student_learns_what_its_teacher_has_folded_in(tiny_model: ModelFactory) -> None:
    teacher, student = folded(tiny_model()), tiny_model()
    process = objective_of(student)
    assert fold_guidance(Recipe(), RecoverSection(), student, teacher, process) is None
    assert student.facts.folded_guidance == FOLDED
    assert fold_guidance(Recipe(), RecoverSection(), student, tiny_model(), process) is None
    assert student.facts.folded_guidance is None, "a plain teacher teaches plain outputs"
    alone = folded(tiny_model())
    fold_guidance(Recipe(), RecoverSection(), alone, None, process)
    assert alone.facts.folded_guidance == FOLDED


def test_what_has_no_guidance_to_fold_in_is_refused(tiny_model: ModelFactory) -> None:
    model, section = tiny_model(), RecoverSection(guidance=1.5)
    masked = open_model("digits-mar")
    interval = Recipe(sample=SampleSection(guidance_interval=(0.1, 0.8)))
    for recipe, how, teacher, message in (
        (Recipe(), section, None, "recover.guidance 1.5 folds in the guidance of a teacher, and here is none"),
        (Recipe(), section, folded(model), r"the teacher has folded in 2\.5"),
        (Recipe(), section, masked, "mixes predictions of noise or velocity, and a"),
        (interval, section, model, "guidance is folded in at all noise levels: leave out sample.guidance_interval"),
        (Recipe(), DynamicSection(guidance=2.0), None, "dynamic.guidance 2 folds in .* set dynamic.auxiliary=teacher"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            check_folding(recipe, how, teacher)
        assert "\n" not in str(refused.value)
    for process in (objective_for(masked, 0.0, Recipe()), object()):
        with pytest.raises(UserError, match="where noised images are predicted"):
            fold_guidance(Recipe(), section, model.copy(), model, process)
    with pytest.raises(ValueError, match="a scale above 1"):
        FoldedGuidance(1.0, 3)


def test_a_damaged_record_is_refused(tiny_model: ModelFactory, tmp_path: Path) -> None:
    save_model(folded(tiny_model()), tmp_path / "model")
    place = tmp_path / "model" / "model.json"
    text = place.read_text()
    for value in ('"2.5"', "0.5", "1e400", "null"):
        place.write_text(text.replace('"scale": 2.5', f'"scale": {value}'))
        with pytest.raises(UserError, match=r"model\.json"):
            open_model(tmp_path / "model")


class Alone:
    """A process that is no `Process`: the calls that a recovery without folded guidance needs."""

    def __init__(self, process: Any) -> None:
        for name in ("draw", "predict", "losses", "kd_terms"):
            setattr(self, name, getattr(process, name))


def test_a_process_of_ones_own_needs_no_guidance(
    tiny_model: ModelFactory, noisy_batch: Callable[..., NoisyBatch]
) -> None:
    model = tiny_model()
    goal = DistilledObjective(Alone(objective_of(model)), frozen(model.module), model.stack, model.stack, [], 1)  # type: ignore[arg-type]
    prediction = goal.predict(model.module, noisy_batch(model, 2))
    assert prediction.teacher is not None and torch.equal(prediction.teacher.output, prediction.output)


def test_the_library_refuses_guidance_that_is_not_read(tiny_model: ModelFactory) -> None:
    model = folded(tiny_model())
    with pytest.raises(
        UserError, match="of a model that has guidance folded in does not read SampleSection.guidance=3"
    ):
        sample_images(model, [1], SampleSection(guidance=3.0, num_steps=2, **DDIM))
    with pytest.raises(UserError, match=r"guidance is 3, and the teacher has folded in 2\.5"):
        distill_model_steps(model, model, batches, guidance=3.0)


def test_no_label_is_dropped_where_guidance_is_folded_in(
    tiny_model: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, dropped = tiny_model(), list[float]()
    kept = Condition.drop
    monkeypatch.setattr(
        Condition, "drop", lambda self, draws, share, *p: (dropped.append(share), kept(self, draws, share, *p))[1]
    )
    for guidance, wanted in ((2.0, {0.0}), (None, {0.3})):
        recover_model(
            prune_model(model, [0, 2]), model, objective_of(model, 0.3), batches, of_digits(model, guidance=guidance)
        )
        assert {*dropped} == wanted
        dropped.clear()


def test_a_teacher_without_weight_is_refused(tiny_model: ModelFactory) -> None:
    for section, name in ((RecoverSection(alpha_kd=0.0), "alpha_kd"), (DynamicSection(auxiliary_weight=0.0), "weight")):
        with pytest.raises(UserError, match=f"{name} is 0: set it above 0"):
            check_folding(Recipe(), section, folded(tiny_model()))
        check_folding(Recipe(), section, tiny_model())


def test_the_library_warns_of_criteria_on_the_loss(tiny_model: ModelFactory) -> None:
    model = folded(tiny_model())
    given = {"num_keep": 2, "task": objective_of(model), "batches": batches, "num_batches": 1}
    with pytest.warns(UserWarning, match="which sensitivity compares, is not what it is for") as warned:
        prune_model(model, "sensitivity", **given)
    assert warned[0].filename == __file__
    prune_model(model, "bi", **given)  # warnings are errors
    prune_model(tiny_model(), "sensitivity", **given)


def test_recorded_drawings_are_those_that_the_model_wants() -> None:
    kind = diffusers.StableDiffusion3Pipeline
    off = {"guidance_scale": 1.0}
    assert Drawing(wanted=off).arguments(kind)["guidance_scale"] == 1
    assert Drawing(guidance_scale=1.0, wanted=off).arguments(kind) == Drawing(wanted=off).arguments(kind)
    with pytest.raises(UserError, match="guidance_scale is 5.0, and the model was trained to be drawn with 1.0"):
        Drawing(guidance_scale=5.0, wanted=off).arguments(kind)


# ------------------------------------------------------------------------------------------------------------- afterwards


def test_few_steps_of_a_folded_student_fold_the_guidance_of_their_teacher(tiny_model: ModelFactory) -> None:
    """A plain teacher is guided; one of folded guidance runs once, and leaves no scale to choose."""
    student, plain = folded(tiny_model()), tiny_model()
    recipe = Recipe(sample=SampleSection(guidance=3.0))
    assert few_steps_of(recipe, student, plain).guidance == 3.0
    assert few_steps_of(recipe, student, student).guidance == 2.5
    check_few_steps(recipe, student, student)
    other = dataclasses.replace(recipe, distill_steps=DistillStepsSection(guidance=4.0))
    with pytest.raises(UserError, match=r"guidance 2\.5 is folded into the teacher already"):
        check_few_steps(other, student, student)
    engine = Engine("cpu")
    for teacher, scale in ((plain, 3.0), (student, 1.0)):
        work = few_step_training(recipe, student.copy(), teacher.copy(), batches, engine)
        assert work.model.facts.folded_guidance is None and work.model.facts.few_steps is not None
        assert work.objective.teacher.guidance == scale  # type: ignore[attr-defined]


def test_a_folded_model_is_pruned_with_its_guidance(tiny_model: ModelFactory) -> None:
    model = folded(tiny_model())
    assert model.cut(by_indices(model, (0, 1), 0)).facts.folded_guidance == FOLDED
