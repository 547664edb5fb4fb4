"""Few steps: mixtures of image and noise, both distillations, and the sampler of their students."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import batches
from torch import Tensor

from tinyfusion.api import distill_model_steps
from tinyfusion.blocks.stack import frozen
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.config.recipe import DistillStepsSection, Recipe, SampleSection, TrainingSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.data.digits import load_digits
from tinyfusion.few_steps.consistency import ConsistencyObjective
from tinyfusion.few_steps.guided import GuidedTeacher
from tinyfusion.few_steps.matching import MatchingObjective
from tinyfusion.jobs.few_steps import check_few_steps, few_steps_of
from tinyfusion.jobs.process_specs import noising_of, objective_for, sampler_of
from tinyfusion.models.checkpoint import LoadedModel, new_model, open_model, save_model
from tinyfusion.processes.flow import Flow
from tinyfusion.processes.gaussian import Schedule
from tinyfusion.processes.noising import (
    FewSteps,
    FlowNoising,
    GaussianNoising,
    Mixture,
    Noising,
    even_levels,
    linear_steps,
)
from tinyfusion.prune.criteria import by_indices
from tinyfusion.sample.drive import SampleDraws, sample
from tinyfusion.sample.few_steps import FewStepSampler
from tinyfusion.sample.flow import FlowSampler

ModelFactory = Callable[..., LoadedModel]
RANDOMNESS = Randomness(3)
QUARTERS = (1.0, 0.75, 0.5, 0.25)
NOISINGS = {
    "gaussian": GaussianNoising(),
    "velocity": FlowNoising(),
    "noise of gvp": FlowNoising(Flow("gvp", "noise")),
    "score of vp": FlowNoising(Flow("vp", "score")),
}


def normal(purpose: str, num: int = 5) -> Tensor:
    return torch.from_numpy(RANDOMNESS.at(0, 0, num).normal(purpose, (2, 4, 4)))


def taught(model: LoadedModel, guidance: float = 1.5) -> GuidedTeacher:
    module = frozen(model.copy().module)
    stack, call = model.family.stack(module), model.family.call
    return GuidedTeacher(module, stack, noising_of(model), call, guidance, model.arch.in_channels)


# ---------------------------------------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize("name", NOISINGS)
def test_an_output_states_its_mixture(name: str) -> None:
    noising: Noising = NOISINGS[name]
    t = noising.times(np.array([0.9, 0.7, 0.5, 0.3, 0.1]))
    given = Mixture(normal("clean"), normal("noise"))
    x = noising.mixed(given, t)
    found = noising.parts(noising.target(given, t), x, t)
    torch.testing.assert_close(found.clean, given.clean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.noise, given.noise, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NOISINGS)
def test_the_line_between_two_points_goes_through_both(name: str) -> None:
    noising: Noising = NOISINGS[name]
    t, end = noising.times(np.full(5, 0.8)), noising.times(np.array([0.6, 0.4, 0.2, 0.1, 0.0]))
    x, after = normal("x"), normal("after")
    line = noising.between(x, t, after, end)
    torch.testing.assert_close(noising.mixed(line, t), x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(noising.mixed(line, end), after, rtol=1e-4, atol=1e-4)


def test_levels_of_a_gaussian_process_are_its_timesteps() -> None:
    noising = GaussianNoising()
    times = noising.times(np.array([1.0, 0.75, 0.25, 0.001, 0.0]))
    assert times.tolist() == [999, 749, 249, 0, -1]
    clean, noise = normal("clean"), normal("noise")
    wanted = Schedule().q_sample(clean[:4], times[:4], noise[:4])
    mixed = noising.mixed(Mixture(clean, noise), times)
    assert torch.equal(mixed[:4], wanted) and torch.equal(mixed[4], clean[4])


def test_levels_that_do_not_fall_are_refused() -> None:
    for levels in ((), (0.5, 0.5), (0.2, 0.4), (1.2, 0.5), (0.5, 0.0)):
        with pytest.raises(ValueError, match="levels of few steps fall"):
            FewSteps("consistency", levels, 1.0, False)


# ------------------------------------------------------------------------------------------------------------- distillation


def test_a_teacher_of_as_many_steps_is_consistent_with_itself(model: LoadedModel) -> None:
    """One step of the teacher ends the phase, so the teacher without guidance is the student that is wanted."""
    goal = ConsistencyObjective(taught(model, guidance=1.0), QUARTERS, teacher_steps=4)
    noisy = goal.draw(batches(0, 8, RANDOMNESS.at(0, 0, 8)), RANDOMNESS.at(0, 0, 8))
    assert set(map(float, noisy.end)) == set(map(float, goal.teacher.noising.times(np.array([0.75, 0.5, 0.25, 0]))))
    losses = goal.losses(model.module, noisy, goal.predict(model.module, noisy))["loss"].detach()
    assert losses.shape == (8,) and float(losses.max()) < 1e-5
    guided = ConsistencyObjective(taught(model, guidance=3.0), QUARTERS, teacher_steps=4)
    assert float(guided.losses(model.module, noisy, guided.predict(model.module, noisy))["loss"].detach().min()) > 1e-4


def test_the_target_of_a_phase_is_the_students_own_landing_point(model: LoadedModel) -> None:
    """Two steps of the teacher per phase: from the first point the student has to land where it lands from the second."""
    goal = ConsistencyObjective(taught(model), (1.0, 0.5), teacher_steps=4)
    noisy = goal.draw(batches(0, 16, RANDOMNESS.at(0, 0, 16)), RANDOMNESS.at(0, 0, 16))
    noising, student = goal.teacher.noising, model.cut(by_indices(model, [0, 2]))
    target = goal.predict(student.module, noisy).target
    landed = noising.mixed(noising.parts(target, noisy.xt, noisy.t), noisy.end)
    further = noising.mixed(goal.teacher.parts(noisy.xt, noisy.t, noisy.condition), noisy.after)
    last = noisy.after == noisy.end
    assert 0 < int(last.sum()) < 16
    torch.testing.assert_close(landed[last], further[last], rtol=1e-3, atol=1e-3)
    at = torch.where(last, noisy.t, noisy.after)
    own = noising.mixed(goal.teacher.own(student.module, further, at, noisy.condition), noisy.end)
    torch.testing.assert_close(landed[~last], own[~last].detach(), rtol=1e-3, atol=1e-3)


def test_a_generator_of_the_teachers_distribution_has_no_gradient(model: LoadedModel) -> None:
    """Critic and teacher agree, so nothing is to be gained; under guidance they do not."""
    critic = model.copy().module
    own = dict(critic=critic, levels=(0.8, 0.4))
    noisy = batches(0, 4, RANDOMNESS.at(0, 0, 4))
    for guidance, gains in ((1.0, False), (3.0, True)):
        goal = MatchingObjective(taught(model, guidance), **own)  # type: ignore[arg-type]
        drawn = goal.draw(noisy, RANDOMNESS.at(0, 0, 4))
        terms = {k: v.detach() for k, v in goal.losses(model.module, drawn, goal.predict(model.module, drawn)).items()}
        assert (float(terms["generator_loss"].max()) > 1e-6) == gains
        assert torch.equal(terms["loss"], terms["generator_loss"] + terms["critic_loss"])


def test_generator_and_critic_have_gradients_of_their_own_losses_alone(model: LoadedModel) -> None:
    student, critic = model.copy(), model.copy().module
    goal = MatchingObjective(taught(model, 3.0), critic, (0.8, 0.5, 0.2))
    drawn = goal.draw(batches(0, 6, RANDOMNESS.at(1, 0, 6)), RANDOMNESS.at(1, 0, 6))
    assert sorted(drawn.position.tolist()) == [0, 0, 1, 1, 2, 2]
    terms = goal.losses(student.module, drawn, goal.predict(student.module, drawn))
    weights = [p for p in student.module.parameters() if p.requires_grad]
    judges = [p for p in critic.parameters() if p.requires_grad]
    for name, trained, left in (("generator_loss", weights, judges), ("critic_loss", judges, weights)):
        loss = terms[name].mean()
        moved = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        still = torch.autograd.grad(loss, left, retain_graph=True, allow_unused=True)
        assert any(g is not None and float(g.detach().abs().max()) > 0 for g in moved) and all(g is None for g in still)


def test_generated_images_are_those_of_the_sampler(model: LoadedModel) -> None:
    """What trains is what is drawn: the last step of the rollout gives the sampler's image, for both kinds of noise."""
    for fresh in (True, False):
        steps = FewSteps("matching", (0.8, 0.5, 0.2), 1.0, fresh)
        goal = MatchingObjective(taught(model), model.module, steps.levels, fresh_noise=fresh)
        drawn = goal.draw(batches(0, 3, RANDOMNESS.at(0, 0, 3)), RANDOMNESS.at(0, 0, 3))
        drawn = dataclasses.replace(drawn, position=torch.full((3,), 2))

        class Draws(SampleDraws):
            def images(self, model: LoadedModel, position: int = -1, drawn: Any = drawn) -> Tensor:
                return drawn.noises[:, position + 1]

        draws = Draws(RANDOMNESS, 0, 3, torch.device("cpu"))
        with torch.no_grad():
            *_, image = FewStepSampler(noising_of(model), steps).trajectory(model, drawn.condition, draws)
            torch.testing.assert_close(goal.generated(model.module, drawn)[0], image, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["consistency", "matching"])
def test_draws_do_not_depend_on_the_slices_of_a_batch(model: LoadedModel, kind: str) -> None:
    goal: Any = ConsistencyObjective(taught(model), QUARTERS)
    if kind == "matching":
        goal = MatchingObjective(taught(model), model.module, QUARTERS)
    whole, part = ((first, RANDOMNESS.at(4, first, num)) for first, num in ((0, 8), (3, 5)))
    batch = batches(4, 8, whole[1])
    rest = type(batch)(batch.x[3:], batch.condition.index(slice(3, None)))
    one, other = goal.draw(batch, whole[1]), goal.draw(rest, part[1])
    for name, value in vars(other).items():
        if isinstance(value, Tensor):
            assert torch.equal(getattr(one, name)[3:], value), name


# ------------------------------------------------------------------------------------------------------------------ drawing


def few(model: LoadedModel, levels: tuple[float, ...] = QUARTERS) -> LoadedModel:
    return dataclasses.replace(
        model, facts=dataclasses.replace(model.facts, few_steps=FewSteps("consistency", levels, 1.5, False))
    )


def drawn(model: LoadedModel, sampler: Any, batch_size: int = 4) -> Tensor:
    return torch.cat([part.x for part in sample(model, [0, 1, 2, 3], sampler, 7, batch_size)])


def test_steps_along_the_predicted_noise_are_those_of_ddim(tiny_model: ModelFactory) -> None:
    """As DDIMScheduler of diffusers makes them with trailing timesteps: an export of such a student draws there what it draws here."""
    from diffusers import DDIMScheduler

    model = tiny_model()
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False, beta_start=1e-4, beta_end=0.02)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    draws = SampleDraws(Randomness(7), 0, 4, torch.device("cpu"))
    x, condition = draws.images(model), class_condition(torch.arange(4), 5)
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = model.module(x, t.expand(4), **model.family.inputs(condition))
            x = scheduler.step(output[:, :2], t, x).prev_sample
    torch.testing.assert_close(drawn(few(model), sampler_of(SampleSection(), few(model))), x, rtol=1e-3, atol=1e-3)


def test_steps_of_a_flow_are_those_of_euler(tiny_model: ModelFactory) -> None:
    made = new_model("sit", dataclasses.asdict(tiny_model().arch), 0)
    made.module.load_state_dict(tiny_model().module.state_dict(), strict=True)
    euler = FlowSampler(method="euler", num_points=5, guidance=1.0)
    own = sampler_of(SampleSection(guidance=4.0), few(made))
    torch.testing.assert_close(drawn(few(made), own), drawn(made, euler), rtol=1e-4, atol=1e-4)
    assert own.guidance == 1 and own.rows == 1 and own.calls == 4


def test_images_do_not_depend_on_the_batch(model: LoadedModel) -> None:
    fresh = FewSteps("matching", (0.8, 0.4), 1.5, True)
    student = dataclasses.replace(model, facts=dataclasses.replace(model.facts, few_steps=fresh))
    sampler = sampler_of(SampleSection(), student)
    torch.testing.assert_close(drawn(student, sampler, 4), drawn(student, sampler, 3), rtol=1e-3, atol=1e-3)
    assert "fresh noise" in sampler.describe(student) and "guidance 1.5 folded in" in sampler.describe(student)


@pytest.mark.parametrize("fresh", [True, False])
def test_steps_as_numbers_draw_the_same(model: LoadedModel, fresh: bool) -> None:
    steps = FewSteps("matching", (0.8, 0.5, 0.2), 1.5, fresh)
    noising, draws = noising_of(model), SampleDraws(Randomness(7), 0, 4, torch.device("cpu"))
    x, condition = draws.images(model), class_condition(torch.arange(4), 5)
    with torch.no_grad():
        for k, step in enumerate(linear_steps(noising, steps)):
            t = torch.full((4,), step.t).to(noising.times(np.array(0.5)).dtype)
            output = model.module(x, t, **model.family.inputs(condition))[:, :2]
            x = step.x * x + step.out * output + step.noise * draws.images(model, k)
    assert (step.noise == 0) and (step.t == float(noising.times(np.array(0.2))))
    torch.testing.assert_close(drawn(model, FewStepSampler(noising, steps)), x, rtol=1e-3, atol=1e-3)


def test_a_student_of_few_steps_is_saved_with_them_and_is_no_teacher(model: LoadedModel, tmp_path: Any) -> None:
    student = few(model)
    save_model(student, tmp_path / "student")
    opened = open_model(tmp_path / "student")
    assert opened.facts.few_steps == student.facts.few_steps
    with pytest.raises(UserError, match="distilled for 4 steps"):
        objective_for(opened, 0.1, Recipe())
    with pytest.raises(UserError, match="a model of few steps cannot be pruned"):
        opened.cut(by_indices(opened, [0, 2]))
    record = tmp_path / "student" / "model.json"
    record.write_text(record.read_text().replace("0.75", "7.5"))
    with pytest.raises(UserError, match="is damaged: .*levels of few steps fall"):
        open_model(tmp_path / "student")


def test_the_defaults_of_a_method(tiny_model: ModelFactory) -> None:
    gaussian, flow = tiny_model(), new_model("sit", dataclasses.asdict(tiny_model().arch), 0)
    recipe = Recipe(distill_steps=DistillStepsSection(num_steps=2), sample=SampleSection(guidance=4.0))
    assert few_steps_of(recipe, gaussian, gaussian) == FewSteps("consistency", (1.0, 0.5), 4.0, False)
    own = DistillStepsSection(method="matching", num_steps=4, guidance=2.0)
    recipe = Recipe(distill_steps=own)
    assert few_steps_of(recipe, gaussian, gaussian) == FewSteps("matching", (0.8, 0.6, 0.4, 0.2), 2.0, True)
    assert few_steps_of(recipe, flow, flow) == FewSteps("matching", (1.0, 0.75, 0.5, 0.25), 2.0, True)


def test_models_that_do_not_go_together_are_refused(tiny_model: ModelFactory) -> None:
    model = tiny_model()
    with pytest.raises(UserError, match="does not take what the student takes"):
        check_few_steps(Recipe(), model, tiny_model(num_classes=7))
    with pytest.raises(UserError, match="draws in few steps itself"):
        check_few_steps(Recipe(), model, few(model))
    section = DistillStepsSection
    for settings, message in (
        (section(within=(0.8, 0.2)), "two rising noise levels"),
        (section(within=(1e-4, 4e-4)), "at least one of 1000 timesteps"),
        (section(num_steps=1500), "no 1,500 different noise levels"),
        (section(guidance=0.5), "guidance must be at least 1"),
        (section(first_level=0.5), "is for method matching of models that predict noise"),
    ):
        with pytest.raises(UserError, match=message):
            check_few_steps(Recipe(distill_steps=settings), model, model)
    in_part = SampleSection(guidance_interval=(0.2, 0.8))
    with pytest.raises(UserError, match="folded in at all noise levels"):
        check_few_steps(Recipe(sample=in_part), model, model)
    flow = new_model("sit", dataclasses.asdict(model.arch), 0)
    other = dataclasses.replace(flow, facts=dataclasses.replace(flow.facts, process_settings={"prediction": "noise"}))
    with pytest.raises(UserError, match="does not take what the student takes"):
        check_few_steps(Recipe(), flow, other)
    with pytest.raises(UserError, match="a flow that predicts its noise states no image"):
        check_few_steps(Recipe(), other, other)
    check_few_steps(Recipe(), flow, flow)


@pytest.mark.parametrize("method", ["consistency", "matching"])
def test_weights_in_half_precision_train_in_float32(tiny_model: ModelFactory, method: str) -> None:
    teacher = tiny_model(input_size=8, in_channels=1, num_classes=10)
    half = dataclasses.replace(teacher, module=teacher.copy().module.to(torch.bfloat16))
    data = ShuffledBatches(load_digits(), Randomness(0), torch.device("cpu"))
    training = TrainingSection(steps=2, batch_size=4, ema_decay=0.2, clip_groups="apart")
    settings = DistillStepsSection(method=method, num_steps=2, training=training)  # type: ignore[arg-type]
    student = distill_model_steps(half, half, data, settings)
    assert {p.dtype for p in student.module.parameters()} == {torch.bfloat16} and student.hash() != half.hash()


@pytest.mark.parametrize("name", ["gaussian", "velocity", "noise of gvp", "score of vp"])
def test_how_far_a_later_point_moves_with_the_output(name: str) -> None:
    noising = NOISINGS[name]
    t, end = noising.times(np.array([0.9, 0.7, 0.5, 0.3, 0.1])), noising.times(np.array([0.5, 0.1, 0.0, 0.2, 0.0]))
    x, output = normal("x"), normal("output")
    moved = noising.mixed(noising.parts(output + 1, x, t), end) - noising.mixed(noising.parts(output, x, t), end)
    torch.testing.assert_close(moved.abs().mean((1, 2, 3)), noising.moved_per_output(t, end), rtol=1e-3, atol=1e-4)


def test_the_weight_makes_errors_of_the_output_errors_of_the_end(model: LoadedModel) -> None:
    randomness = RANDOMNESS.at(0, 0, 8)
    goals = {p: ConsistencyObjective(taught(model), QUARTERS, teacher_steps=8, end_power=p) for p in (0.0, 1.0, 2.0)}
    noisy = goals[0.0].draw(batches(0, 8, randomness), randomness)
    prediction = goals[0.0].predict(model.module, noisy)
    noising, own = goals[0.0].teacher.noising, prediction.output[:, : noisy.x0.shape[1]].float()
    landed, wanted = (
        noising.mixed(noising.parts(output, noisy.xt, noisy.t), noisy.end) for output in (own, prediction.target)
    )
    losses = {p: goal.losses(model.module, noisy, prediction)["loss"] for p, goal in goals.items()}
    of_end = ((landed - wanted) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(losses[2.0] * goals[2.0].mean_weight, of_end, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(losses[0.0], ((own - prediction.target) ** 2).mean((1, 2, 3)))
    balanced = (losses[0.0] * losses[2.0] * goals[2.0].mean_weight).sqrt() / goals[1.0].mean_weight
    torch.testing.assert_close(losses[1.0], balanced)


def test_steps_of_a_scheduler_are_those_of_divisors_of_a_thousand() -> None:
    for num, fits in ((1, True), (2, True), (3, False), (4, True), (7, False), (8, True)):
        assert FewSteps("consistency", even_levels(num), 1.0, fresh_noise=False).is_trailing == fits
