"""The memory plan: counted parts are exact, measured ones agree with what a step takes, and the arithmetic keeps its laws."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.stack import BlockStack, frozen
from tinyfusion.blocks.streams import BlockCall
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.config.recipe import ComputeSection, PruneSection, TrainingSection
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.jobs.estimate import GIB, MemoryPlan, fits, fitting_lines, images_at_once, memory_plan
from tinyfusion.jobs.footprint import BlockBytes, Footprint, LiveBytes, Measured, _run_block, footprint_of
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import Batch, Objective
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.prune.learn import mask_learner
from tinyfusion.recover.align import block_pairs
from tinyfusion.recover.distill import DistilledObjective
from tinyfusion.training.engine import Engine
from tinyfusion.training.loop import train_steps
from tinyfusion.training.optim import ParameterGroup, trainable
from tinyfusion.training.state import TrainState

IMAGES = 16
SIZES = dict(input_size=16, hidden_size=32, num_heads=4, depth=4)  # 64 tokens: activations outweigh weights
MakeModel = Callable[..., LoadedModel]


@dataclasses.dataclass(frozen=True)
class Trained:
    """A small training, and what it is weighed as."""

    state: TrainState
    stack: BlockStack
    objective: Objective
    settings: TrainingSection
    also_resident: list[torch.nn.Module]

    def footprint(self) -> Footprint:
        args = self.state.model, self.stack, self.state.parameters, self.objective, latents, self.settings
        return footprint_of(*args, self.also_resident, self.state.matrices())

    def noisy(self, images: int) -> Any:
        draws = Randomness(1).at(0, 0, images)
        return self.objective.draw(latents(0, images, draws), draws)

    def loss(self, noisy: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
            prediction = self.objective.predict(self.state.model, noisy)
        return self.objective.losses(self.state.model, noisy, prediction)["loss"].mean()


def latents(step: int, batch_size: int, draws: Draws) -> Batch:
    x = torch.from_numpy(draws.normal("x", (2, 16, 16)))
    return Batch(x, class_condition(torch.from_numpy(draws.integers("y", 5)), 5))


def training(make: MakeModel, kind: str, dtype: Any = "float32", optimizer: Any = "adamw", **sizes: Any) -> Trained:
    """kind: train, recover (half of the blocks, masked features) or learn (1:2 masks, low-rank deltas)."""
    settings = TrainingSection(steps=2, batch_size=IMAGES, dtype=dtype, optimizer=optimizer)
    model, inner = make(**{**SIZES, **sizes}), GaussianObjective()
    if kind == "learn":
        section = dataclasses.replace(PruneSection(), scheme="1:2", training=settings)
        learner = mask_learner(model, inner, section, seed=0)
        state = TrainState(learner.module, learner.parameter_groups, settings)
        return Trained(state, learner.objective.stack, learner.objective, settings, [model.module])
    if kind == "train":
        state = TrainState(model.module, [ParameterGroup(trainable(model.module))], settings, model.stack)
        return Trained(state, model.stack, inner, settings, [model.module])
    depth = len(model.stack)
    plan = PrunePlan(
        {"blocks": list(range(0, depth, 2))}, {"blocks": depth}, "indices", groups={"blocks": [[1, 2]] * (depth // 2)}
    )
    student = model.cut(plan)
    frozen(model.module)
    objective = DistilledObjective(inner, model.module, model.stack, student.stack, block_pairs(plan), settings.steps)
    groups = [ParameterGroup(trainable(student.module))]
    state = TrainState(student.module.train(), groups, settings, student.stack)
    return Trained(state, student.stack, objective, settings, [student.module, model.module])


def profiled_peak(given: Trained, images: int) -> int:
    """Bytes that forward and backward hold at most above what there was, from the allocator's own records."""
    noisy = given.noisy(images)
    given.state.optimizer.zero_grad(set_to_none=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        given.loss(noisy).backward()
    events: list[Any] = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    moves = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(max(np.cumsum([0, *moves])))


@contextlib.contextmanager
def checkpointed(given: Trained, wanted: bool) -> Iterator[None]:
    with given.stack.checkpointed() if wanted else contextlib.nullcontext():
        yield


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["train", "recover", "learn"])
def test_prediction_is_near_the_allocators_peak(
    tiny_model: MakeModel, kind: str, dtype: str, checkpointing: bool
) -> None:
    given = training(tiny_model, kind, dtype)
    plan = memory_plan(given.footprint(), given.settings, ComputeSection(gradient_checkpointing=checkpointing))
    predicted = sum(plan.sizes[name] for name in ("gradients", "activations", "casts_of_weights"))
    with checkpointed(given, checkpointing):
        measured = profiled_peak(given, IMAGES)
    assert predicted == pytest.approx(measured, rel=0.15)


@pytest.fixture
def measured_on(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Measure blocks of any size as large ones; filled with the types of tensors that they run on."""
    kinds: set[str] = set()

    def run(block: torch.nn.Module, call: BlockCall, *settings: Any) -> BlockBytes:
        kinds.add(type(call.tapped).__name__)
        return _run_block(block, call, *settings)

    monkeypatch.setattr("tinyfusion.jobs.footprint._FAKED", 0)
    monkeypatch.setattr("tinyfusion.jobs.footprint._run_block", run)
    return kinds


@pytest.mark.parametrize("kind", ["train", "recover", "learn"])
def test_large_blocks_are_measured_the_same_on_fake_tensors(
    tiny_model: MakeModel, kind: str, measured_on: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = training(tiny_model, kind, "bfloat16")
    faked = given.footprint().measured
    assert measured_on == {"FakeTensor"}
    monkeypatch.undo()
    for dtype, real in given.footprint().measured.items():
        assert (faked[dtype].blocks, faked[dtype].teacher) == (real.blocks, real.teacher)


def test_a_block_that_reads_values_is_measured_on_real_tensors(
    tiny_model: MakeModel, measured_on: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = training(tiny_model, "train")
    kind = type(next(iter(given.stack)))
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x, c: forward(self, x, c) * float(x.isfinite().all()))
    blocks = given.footprint().measured["float32"].blocks
    assert measured_on == {"FakeTensor", "Tensor"} and min(b.retained for b in blocks) > 0


@pytest.mark.parametrize("kind", ["train", "recover"])
def test_what_waits_for_the_backward_pass_is_exact(tiny_model: MakeModel, kind: str) -> None:
    given = training(tiny_model, kind)
    measured = given.footprint().measured["float32"]
    per_image = []
    for images in (3, 8):
        noisy = given.noisy(images)
        with LiveBytes() as meter:
            loss = given.loss(noisy)
        per_image.append(meter.now)
        del loss
    wanted = (per_image[1] - per_image[0]) / 5
    assert sum(b.retained for b in measured.blocks) + measured.before + measured.after == pytest.approx(
        wanted, rel=0.02
    )


def test_live_bytes_agree_with_saved_tensors(tiny_model: MakeModel) -> None:
    """Another way to count: what autograd packs, without the block's weights and arguments, and the output."""
    model = tiny_model(**SIZES)
    block, x, c = model.module.blocks[0], torch.ones(3, 64, 32, requires_grad=True), torch.ones(3, 32)
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.detach()
        return tensor.detach()  # a tensor that its own graph packed would never go

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), LiveBytes() as meter:
        output = block(x, c)
    given = {t.untyped_storage()._cdata for t in (x, c, output, *block.parameters())}
    inside = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in given)
    assert meter.now == inside + output.nbytes
    saved.clear()
    del output
    assert meter.now == 0


def test_casts_are_of_the_trained_weights(tiny_model: MakeModel) -> None:
    for kind in ("train", "learn"):
        given = training(tiny_model, kind, "bfloat16")
        block = next(iter(given.stack))
        trained = sum(
            p.numel() for p in block.parameters() if p.requires_grad and p.ndim == 2
        )  # no product saves a bias
        found = given.footprint().measured
        assert found["bfloat16"].blocks[0].casts == 2 * trained
        assert found["float32"].blocks[0].casts == 0


@pytest.mark.parametrize(("dtype", "optimizer"), [("float32", "adamw"), ("bfloat16", "adamw"), ("float32", "muon")])
def test_counted_parts_are_those_of_the_state(tiny_model: MakeModel, dtype: str, optimizer: str) -> None:
    for kind in ("train", "recover", *(["learn"] if optimizer == "adamw" else [])):
        given = training(tiny_model, kind, dtype, optimizer)
        plan = memory_plan(given.footprint(), given.settings, ComputeSection())
        for _ in train_steps(given.state, given.objective, latents, given.settings, Randomness(0)):
            pass
        state, model = given.state, given.state.model
        moments = [v for slots in state.optimizer.state.values() for v in slots.values()]
        assert plan.sizes["optimizer"] == sum(v.nbytes for v in moments)
        assert plan.sizes["trained_weights"] == sum(p.nbytes for p in state.parameters.values())
        assert plan.sizes["gradients"] == sum(p.grad.nbytes for p in state.parameters.values() if p.grad is not None)
        assert plan.sizes["moving_average"] == sum(v.nbytes for v in state.ema.average.values())
        assert plan.sizes["frozen_weights"] == sum(p.nbytes for p in model.parameters() if not p.requires_grad)
        others = sum(p.nbytes for m in given.also_resident if m is not model for p in m.parameters())
        assert plan.sizes["teacher"] + plan.sizes["model_also_resident"] == others


def test_fsdp2_gathers_what_is_in_no_block_and_two_blocks(tiny_model: MakeModel) -> None:
    given = training(tiny_model, "recover")
    model, inside = given.state.model, [sum(p.nbytes for p in block.parameters()) for block in given.stack]
    outside = sum(p.nbytes for p in model.parameters()) - sum(inside)
    assert given.footprint().gathered == outside + 2 * (max(inside) + max(inside))  # all of a block trains


def test_measuring_changes_nothing(tiny_model: MakeModel) -> None:
    given = training(tiny_model, "learn")
    before = {name: value.clone() for name, value in given.state.model.state_dict().items()}
    generator = torch.get_rng_state()
    noisy = given.noisy(4)
    loss = given.loss(noisy).detach()
    given.footprint()
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in given.state.model.state_dict().items())
    assert all(p.grad is None for p in given.state.parameters.values())
    assert torch.equal(given.loss(noisy).detach(), loss)
    assert not any("forward" in vars(block) for block in given.stack)


# ---------------------------------------------------------------------------------------------------------- arithmetic


def footprint(**changes: Any) -> Footprint:
    """Two blocks, even sizes, round numbers."""
    block = BlockBytes(retained=2000, output=100, transient=500, without_graph=900, casts=0)
    half = dataclasses.replace(block, retained=1200, casts=2_000)
    values: dict[str, Any] = dict(
        trained=(400, 600, 8192), frozen_linear=0, frozen_rest=64, gathered=8_100, teacher=8_000,
        teacher_gathered=4_100, also_resident=0, batch=10, graph_share=1.0, features=1,
        measured={
            "float32": Measured((block, block), (block,), 200, 100), "bfloat16": Measured((half, half), (block,), 200, 100),
        },
    )  # fmt: skip
    return Footprint(**{**values, **changes})


def plan_of(compute: ComputeSection | None = None, world: int = 1, images: int = 1000, **settings: Any) -> MemoryPlan:
    section = TrainingSection(batch_size=images, **settings)
    return memory_plan(footprint(), section, compute or ComputeSection(), world)


def test_parts_sum_to_the_total_and_none_is_negative() -> None:
    for world, parallel in ((1, "ddp"), (2, "ddp"), (2, "fsdp2")):
        for checkpointing in (False, True):
            for dtype in ("float32", "bfloat16"):
                for images in (2, 1000):
                    compute = ComputeSection(parallel=parallel, gradient_checkpointing=checkpointing)
                    plan = plan_of(compute, world, images, dtype=dtype)
                    assert plan.total == sum(plan.sizes.values())
                    assert min(plan.sizes.values()) >= 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_of_twice_the_batch_only_activations_and_batches_grow(accumulation: int) -> None:
    compute = ComputeSection(gradient_accumulation_steps=accumulation)
    once, twice = plan_of(compute, images=1000), plan_of(compute, images=2000)
    grown = {name for name in once.sizes if twice.sizes[name] != once.sizes[name]}
    assert grown == {"activations", "batches"}
    assert twice.images == 2 * once.images
    gone = once.sizes["gradients"] if accumulation == 1 else 0  # which take the place of activations
    assert twice.sizes["activations"] + gone == 2 * (once.sizes["activations"] + gone)


def test_gradients_take_the_place_of_activations_unless_they_stay() -> None:
    alone = plan_of()
    for compute, world, images in ((ComputeSection(gradient_accumulation_steps=2), 1, 2000), (None, 2, 2000)):
        lasting = plan_of(compute, world, images)
        assert lasting.images == alone.images
        assert lasting.sizes["activations"] - alone.sizes["activations"] == alone.sizes["gradients"]
    small = plan_of(images=1)  # the backward pass ends with all gradients and one block's inside
    assert small.sizes["activations"] == 2500


def test_fsdp2_halves_what_is_kept_and_gathers_blocks() -> None:
    whole, split = plan_of(images=1000), plan_of(ComputeSection(parallel="fsdp2"), 2, 2000)
    for name in ("trained_weights", "frozen_weights", "gradients", "moving_average"):
        assert 2 * split.sizes[name] == whole.sizes[name]
    assert split.sizes["teacher"] == whole.sizes["teacher"]
    assert split.sizes["gathered_from_processes"] == 8_100
    shared = plan_of(ComputeSection(parallel="fsdp2", shard_teacher=True), 2, 2000)
    assert 2 * shared.sizes["teacher"] == whole.sizes["teacher"]
    assert shared.sizes["gathered_from_processes"] == split.sizes["gathered_from_processes"] + 4_100


def test_checkpointing_keeps_block_outputs_and_one_inside() -> None:
    plain, less = plan_of(), plan_of(ComputeSection(gradient_checkpointing=True))
    gradients = plain.sizes["gradients"]
    assert plain.sizes["activations"] == 1000 * (2 * 2000 + 500 + 300) - gradients
    assert less.sizes["activations"] == 1000 * (2 * 100 + 2400 + 200) - gradients


def test_eight_bit_moments_spare_small_tensors() -> None:
    plan = plan_of(optimizer="adamw-8bit")
    assert plan.sizes["optimizer"] == (400 + 600) * 8 + 2 * 4 + 2 * (8192 + 4 * 32)


def test_images_at_once_is_the_engines_largest_part() -> None:
    for batch_size in (7, 10, 12, 64, 100):
        for world in (1, 2, 3):
            for accumulation in (1, 2):
                if batch_size < world * accumulation:
                    continue
                compute = ComputeSection(gradient_accumulation_steps=accumulation)
                largest = 0
                for rank in range(world):
                    engine = Engine("cpu", compute)
                    engine.world, engine.rank = world, rank
                    largest = max(largest, *(num for _, num in engine.slices(batch_size)))
                assert images_at_once(batch_size, world, compute) == largest


def test_fits_is_the_last_that_does() -> None:
    weighed, settings, compute = footprint(), TrainingSection(), ComputeSection()

    def plan(images: int) -> MemoryPlan:
        return memory_plan(weighed, settings, compute, images=images)

    gib = 0.001
    found = fits(plan, gib)
    assert found > 1
    assert plan(found).total <= 0.9 * gib * GIB < plan(found + 1).total
    assert fits(plan, 1e-6) == 0


# ---------------------------------------------------------------------------------------------------------------- text


def test_lines_name_what_there_is_and_its_share() -> None:
    text = MemoryPlan(
        {"trained_weights": 3 * GIB, "casts_of_weights": 0, "activations": GIB}, 1, "float32", False
    ).lines()
    assert text == [
        "memory of one process at its peak (1 image at once, float32):",
        "  trained weights    3.00 GiB    75 %",
        "  activations        1.00 GiB    25 %",
        "  sum                4.00 GiB   100 %",
    ]
    assert any("activations beyond gradients" in line for line in plan_of().lines())


def test_fitting_lines_say_what_does_not_fit() -> None:
    def cells(line: str) -> list[str]:
        return line[34:].split("  ")

    settings, compute = TrainingSection(), ComputeSection()
    huge = fitting_lines(footprint(trained=(3 * GIB,)), settings, compute)  # 48 GiB of weights and states
    rows = [line for line in huge if "float" in line]
    assert len(rows) == 4
    for line in rows:
        small, _, large = [cell.strip() for cell in cells(line) if cell.strip()]
        assert small == "does not fit"
        assert int(large.replace(",", "")) > 1
    assert rows[1].split(",")[1].strip().startswith("gradient checkpointing")
