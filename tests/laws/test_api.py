"""The library on a module of one's own and on a family's model: values in, values out, and what was given stays as it was."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tinyfusion as tf
from tinyfusion import api
from tinyfusion.blocks.streams import Streams
from tinyfusion.config.recipe import (
    ComputeSection,
    DistillStepsSection,
    PruneSection,
    RecoverSection,
    SampleSection,
    TrainingSection,
)
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.data.digits import load_digits
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.sample.drive import sample, to_uint8
from tinyfusion.sample.gaussian import GaussianSampler

TRAINING = TrainingSection(steps=12, batch_size=8, learning_rate=3e-3, ema_decay=0.5, learning_rate_end_share=1.0)
GATES = PruneSection(scheme="1:2")
LEARN = PruneSection(scheme="1:2", training=TRAINING, lora_rank=2)
KD = RecoverSection(method="masked-kd", training=dataclasses.replace(TRAINING, steps=40))


class Block(nn.Module):
    """Keyword arguments alone, and a table that all images share."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, *, hidden: Tensor, table: Tensor) -> Tensor:
        return hidden + self.outer(torch.tanh(self.inner(hidden + table)))


class Model(nn.Module):
    """Eight images, eight tokens: a table of tokens has as many rows as a batch has images."""

    def __init__(self, depth: int = 4, width: int = 6) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, width), nn.Linear(width, 3)
        self.trunk = nn.Module()
        self.trunk.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.table = nn.Parameter(torch.ones(8, width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.enter(x)
        for layer in self.trunk.layers:
            hidden = layer(hidden=hidden, table=self.table * 1.0)
        out: Tensor = self.leave(hidden)
        return out


TASK = tf.Task(lambda model, batch: model(batch["x"]), lambda out, batch: (out - batch["y"]).square().mean((1, 2)))
BLOCKS = {"trunk.layers": Streams(("hidden",), axes={"table": None})}


@pytest.fixture
def teacher() -> LoadedModel:
    torch.manual_seed(0)
    return tf.wrap_module(Model(), BLOCKS)


def batches(num: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(8, 8, 3, generator=generator) for _ in range(num)]
    return [{"x": x, "y": x.roll(1, 1)} for x in drawn]


def addressed(step: int, draws: Draws) -> dict[str, Tensor]:
    x = torch.from_numpy(draws.normal("x", (8, 3)))
    return {"x": x, "y": x.roll(1, 1)}


def weights(model: LoadedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@torch.no_grad()
def loss_of(model: LoadedModel) -> float:
    return float(np.mean([float(TASK.loss(model.module(b["x"]), b).mean()) for b in batches()]))


@torch.no_grad()
def apart(student: LoadedModel, teacher: LoadedModel) -> float:
    """Mean squared difference of the outputs."""
    return float(np.mean([float((student.module(b["x"]) - teacher.module(b["x"])).square().mean()) for b in batches()]))


@pytest.mark.parametrize("update", ["lora", "full", "frozen"])
@pytest.mark.parametrize("given", ["iterable", "function"])
def test_a_module_of_ones_own_is_pruned_and_recovered(teacher: LoadedModel, given: str, update: Any) -> None:
    data: Any = batches() if given == "iterable" else addressed
    before, steps = weights(teacher), list[int]()
    settings = dataclasses.replace(LEARN, update=update, lora_rank=2 if update == "lora" else 8)
    masks = tf.learn_masks(teacher, TASK, data, settings, on_step=lambda record: steps.append(record.step))
    assert steps == list(range(12))
    assert {name: len(kept) for name, kept in masks.plan.kept.items()} == {"trunk.layers": 2}
    cut = tf.prune_model(teacher, masks)
    student = tf.recover_model(cut, teacher, TASK, data, KD)
    assert len(student.module.trunk.layers) == 2
    assert apart(student, teacher) < 0.9 * apart(cut, teacher)
    assert same(weights(teacher), before), "the teacher is as it was"
    assert not any(block._forward_hooks or "forward" in vars(block) for block in teacher.stack)
    assert torch.equal(student.module.table, teacher.module.table) and not student.module.table.requires_grad
    again = tf.recover_model(cut, teacher, TASK, batches() if given == "iterable" else addressed, KD)
    assert same(weights(again), weights(student)), "the same call gives the same weights"


@pytest.mark.parametrize("update", ["full", "lora"])
def test_one_training_prunes_and_recovers_a_module_of_ones_own(teacher: LoadedModel, update: Any) -> None:
    before = weights(teacher)
    settings = dataclasses.replace(KD, method="logits-kd", search_share=0.25, update=update)
    settings = dataclasses.replace(settings, lora_rank=2) if update == "lora" else settings
    seen: list[int] = []
    student = tf.recover_model(
        teacher, teacher, TASK, batches(), settings, GATES, on_step=lambda record: seen.append(record.step)
    )
    plan = student.facts.plan
    assert plan is not None and len(plan.kept["trunk.layers"]) == 2 == len(student.stack)
    assert (plan.teacher, seen[-1]) == (teacher.hash(), 39)
    assert same(weights(teacher), before)
    assert apart(student, teacher) < 0.7 * apart(teacher.cut(plan), teacher), (
        "it has learned the outputs of the whole model"
    )
    with pytest.raises(UserError, match="search_share"):
        tf.recover_model(student, teacher, TASK, batches(), KD, GATES)


def test_updates_are_kept_or_thrown_away(teacher: LoadedModel) -> None:
    masks = tf.learn_masks(teacher, TASK, batches(), LEARN)
    plain, kept = (tf.prune_model(teacher, masks, keep_updates=keep) for keep in (False, True))
    assert same(weights(plain), weights(teacher.cut(masks.plan)))
    assert not same(weights(plain), weights(kept)) and plain.facts.kept == kept.facts.kept
    assert same(weights(tf.prune_model(teacher, masks.plan)), weights(plain))


def test_a_teacher_frozen_as_a_whole_learns_all_the_same(teacher: LoadedModel) -> None:
    frozen = tf.wrap_module(copy.deepcopy(teacher.module).requires_grad_(False), BLOCKS)
    masks = tf.learn_masks(frozen, TASK, batches(), dataclasses.replace(LEARN, update="full", lora_rank=8))
    assert any("inner" in name for name in masks.updates)


@pytest.mark.parametrize("how", ["bi", "sensitivity", "min-loss", "uniform", "last", (0, 3)])
def test_every_other_choice_of_blocks(teacher: LoadedModel, how: Any) -> None:
    data: dict[str, Any] = {"task": TASK, "batches": batches(), "num_batches": 2} if isinstance(how, str) else {}
    student = tf.prune_model(teacher, how, **data)
    assert len(student.stack) == 2
    assert how != (0, 3) or student.facts.kept == {"trunk.layers": [0, 3]}
    if how == "min-loss":
        others = [loss_of(tf.prune_model(teacher, [a, b])) for a in range(4) for b in range(a + 1, 4)]
        assert loss_of(tf.prune_model(teacher, how, task=TASK, batches=batches(), num_batches=3)) == pytest.approx(
            min(others)
        )


def test_a_family_model_learns_what_its_verb_would(tiny_model: Any) -> None:
    model = tiny_model(input_size=8, in_channels=1, num_classes=10)
    data = ShuffledBatches(load_digits(), Randomness(0), torch.device("cpu"))
    masks = tf.learn_masks(model, tf.objective_of(model), data, LEARN)
    student = tf.recover_model(tf.prune_model(model, masks), model, tf.objective_of(model), data, KD)
    assert len(student.stack) == 2 and student.facts.lineage[0]["hash"] == model.hash()


def test_samples_and_scores(tiny_model: Any) -> None:
    model = tiny_model(input_size=8, in_channels=1, num_classes=10)
    labels = np.arange(12) % 10
    images = tf.sample_images(model, labels, SampleSection(sampler="ddim", num_steps=4, guidance=1.5, batch_size=5))
    (wanted,) = sample(model, labels, GaussianSampler("ddim", 4, 1.5), 0)
    assert images.dtype == np.uint8 and images.shape == (12, 8, 8, 1)
    assert np.abs(images.astype(int) - to_uint8(wanted.x).astype(int)).max() <= 1
    real = to_uint8(torch.from_numpy(load_digits().x[:40]))
    scores = tf.evaluate_images(real, real)
    assert scores["fid"] == pytest.approx(0, abs=1e-3) and scores["num_images"] == 40
    assert tf.evaluate_images(images, real)["fid"] > 50


def test_a_student_of_few_steps(tiny_model: Any) -> None:
    teacher = tiny_model(input_size=8, in_channels=1, num_classes=10)
    data, seen = ShuffledBatches(load_digits(), Randomness(0), torch.device("cpu")), list[int]()
    settings = DistillStepsSection(num_steps=2, training=TRAINING)
    before = teacher.hash()
    student = tf.distill_model_steps(teacher, teacher, data, settings, on_step=lambda record: seen.append(record.step))
    assert student.facts.few_steps is not None and student.facts.few_steps.levels == (1.0, 0.5) and len(seen) == 12
    assert teacher.hash() == before and teacher.facts.few_steps is None and student.hash() != before
    assert tf.sample_images(student, [1, 2]).shape == (2, 8, 8, 1)


@pytest.mark.parametrize("method", ["masks", "recovery", "consistency", "matching"])
def test_blocks_are_checkpointed_where_compute_asks_for_it(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Those of every network that trains, and with the same weights in the end."""
    model = tiny_model(input_size=8, in_channels=1, num_classes=10)
    data, calls = ShuffledBatches(load_digits(), Randomness(0), torch.device("cpu")), list[Any]()
    short = dataclasses.replace(TRAINING, steps=2, ema_decay=0.2)

    def counted(function: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(function)
        return checkpoint(function, *args, **kwargs)

    def trained(compute: ComputeSection) -> dict[str, Tensor]:
        if method == "masks":
            settings = dataclasses.replace(LEARN, training=short)
            return dict(tf.learn_masks(model, tf.objective_of(model, 0.0), data, settings, compute=compute).updates)
        if method == "recovery":
            tuning = RecoverSection(method="finetune", training=short)
            return weights(tf.recover_model(model, None, tf.objective_of(model, 0.0), data, tuning, compute=compute))
        apart = dataclasses.replace(short, clip_groups="apart")
        few = DistillStepsSection(method=method, num_steps=2, training=apart)  # type: ignore[arg-type]
        return weights(tf.distill_model_steps(model, model, data, few, compute=compute))

    monkeypatch.setattr("tinyfusion.blocks.forwards.checkpoint", counted)
    plain = trained(ComputeSection())
    assert not calls
    checkpointed = trained(ComputeSection(gradient_checkpointing=True))
    assert same(plain, checkpointed)
    assert len(calls) == short.steps * len(model.stack) * (2 if method == "matching" else 1)


def test_a_model_of_latents_gives_latents_whether_their_scale_is_known_or_not(tiny_model: Any) -> None:
    model = tiny_model(in_channels=16)
    assert model.facts.latent_scale is None
    drawn = tf.sample_images(model, [0, 1], SampleSection(sampler="ddim", num_steps=2))
    assert (drawn.dtype, drawn.shape) == (np.float32, (2, 4, 4, 16))


def test_a_criterion_is_shown_images_one_after_another(tiny_model: Any) -> None:
    model = tiny_model(input_size=8, in_channels=1, num_classes=10)
    data, shown = ShuffledBatches(load_digits(), Randomness(0), torch.device("cpu")), list[int]()

    def recorded(step: int, size: int, draws: Draws) -> Any:
        shown.extend(range(step * size + draws.first, step * size + draws.first + draws.num))
        return data(step, size, draws)

    tf.prune_model(model, "bi", task=tf.objective_of(model, 0.0), batches=recorded, num_batches=3)  # type: ignore[arg-type]
    assert shown == list(range(3 * 64))


# --------------------------------------------------------------------------------------------------------- what is refused


OTHER = tf.wrap_module(Model(), BLOCKS)
UNEVEN = [*batches(1), {name: value[:3] for name, value in batches(1)[0].items()}]
AVERAGED = tf.Task(TASK.predict_output, lambda out, batch: out.mean())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: tf.wrap_module(t.module, ["layers"]), "no submodule 'layers'; its lists are trunk.layers"),
        (lambda t: tf.wrap_module(t.module, ["enter"]), "'enter' is a Linear, not an nn.ModuleList with blocks"),
        (lambda t: tf.wrap_module(t.module, []), "path of at least one list"),
        (lambda t: tf.distill_model_steps(t, t, lambda step, size, draws: {}), "few steps are for models whose process mixes"),
        (lambda t: tf.learn_masks(t, TASK, [], LEARN), "the batches have come to an end"),
        (lambda t: tf.learn_masks(t, TASK, iter(batches(2)), LEARN), "the batches have come to an end"),
        (lambda t: tf.learn_masks(t, TASK, ["text"], LEARN), "a nest of tensors; got a str"),
        (lambda t: tf.learn_masks(t, TASK, [{"x": torch.ones(2, 8, 3), "y": torch.ones(3, 8, 3)}], LEARN), "have 2, 3 rows"),
        (lambda t: tf.learn_masks(t, TASK, UNEVEN, LEARN), "a batch of 3 images where 8 are wanted"),
        (lambda t: tf.learn_masks(t, AVERAGED, batches(), LEARN), r"returns \(\) for 8 images"),
        (lambda t: tf.learn_masks(t, TASK, batches(), PruneSection(scheme="1:3")), "depth divisible by 3"),
        (lambda t: tf.prune_model(t, "guess"), "no criterion 'guess' without training"),
        (lambda t: tf.prune_model(t, "bi"), "criterion bi uses data: give task and batches"),
        (lambda t: tf.prune_model(t, [0, 9]), r"\[9\] out of range"),
        (lambda t: tf.recover_model(t, None, TASK, batches(), KD), "method masked-kd needs a teacher"),
        (lambda t: tf.recover_model(tf.prune_model(t, [0]), OTHER, TASK, batches(), KD), "the student was pruned from the model"),
        (lambda t: tf.evaluate_images(np.zeros((3, 8, 8, 1), np.uint8), np.zeros((9, 8, 8, 1), np.uint8)), "the images are 3"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(teacher: LoadedModel, call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(teacher)


def test_what_is_public() -> None:
    assert dir(tf) == sorted(tf.__all__) == sorted([*api.__all__, "__version__"])
    assert all(getattr(tf, name) is not None for name in tf.__all__)
    code = "import sys, tinyfusion; assert 'torch' not in sys.modules; tinyfusion.Task; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'prun'"):
        _ = tf.prun
