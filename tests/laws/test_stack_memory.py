"""Checkpointed blocks: the same losses and gradients bit for bit, less kept for the backward pass, and no trace left."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.stack import BlockStack, frozen
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.config.recipe import PruneSection, TrainingSection
from tinyfusion.core.rng import Randomness
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import Batch, NoisyBatch
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.prune.learn import mask_learner
from tinyfusion.recover.align import block_pairs
from tinyfusion.recover.distill import DistilledObjective

Factory = Callable[..., LoadedModel]


@dataclasses.dataclass
class Case:
    """One kind of step: what trains, its objective, its blocks, a batch."""

    module: nn.Module
    trained: list[Tensor]
    objective: Any
    stack: BlockStack
    noisy: NoisyBatch
    dtype: torch.dtype = torch.float32

    def run(self, around: AbstractContextManager[None]) -> tuple[list[Tensor], int]:
        """Losses and gradients, and the bytes of tensors other than parameters that were retained for the backward pass."""
        for parameter in self.trained:
            parameter.grad = None
        with kept_bytes(self.module) as kept:
            with around, torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                prediction = self.objective.predict(self.module, self.noisy)
            losses = self.objective.losses(self.module, self.noisy, prediction)
        total = sum(kept.values())
        losses["loss"].mean().backward()
        gradients = [p.grad for p in self.trained if p.grad is not None]
        assert len(gradients) == len(self.trained)
        return [*losses.values(), *gradients], total


@contextmanager
def kept_bytes(module: nn.Module) -> Iterator[dict[int, int]]:
    """{storage: its bytes} of the tensors that the graph retains, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}
    found: dict[int, int] = {}
    alive = []

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(value)  # an address identifies a storage only during its lifetime
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        yield found


def drawn(model: LoadedModel, objective: Any, num: int = 6) -> Any:
    arch, draws = model.arch, Randomness(3).at(0, 0, num)
    x = torch.from_numpy(draws.normal("x", (arch.in_channels, arch.input_size, arch.input_size)))
    return objective.draw(
        Batch(x, class_condition(torch.from_numpy(draws.integers("y", arch.num_classes)), arch.num_classes)), draws
    )


def plain_case(model: LoadedModel) -> Case:
    objective = GaussianObjective()
    trained = [p for p in model.module.parameters() if p.requires_grad]
    return Case(model.module, trained, objective, model.stack, drawn(model, objective))


def learning_case(model: LoadedModel, dtype: Any = "float32", **settings: Any) -> Case:
    training = TrainingSection(steps=10, dtype=dtype)
    section = dataclasses.replace(PruneSection(), scheme="1:2", lora_rank=2, training=training, **settings)
    learner = mask_learner(model, GaussianObjective(), section, seed=0)
    trained = [p for group in learner.parameter_groups for p in group.parameters.values()]
    noisy = drawn(model, learner.objective)
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    return Case(learner.module, trained, learner.objective, learner.objective.stack, noisy, kind)


def distilling_case(teacher: LoadedModel) -> Case:
    plan = PrunePlan({"blocks": [0, 3]}, {"blocks": 4}, "indices", groups={"blocks": [[1, 2], [1, 2]]})
    student = teacher.cut(plan)
    frozen(teacher.module)
    stacks = teacher.stack, student.stack
    objective = DistilledObjective(
        GaussianObjective(), teacher.module, *stacks, block_pairs(plan), steps=1, beta=(1.0, 1.0)
    )
    trained = [p for p in student.module.parameters() if p.requires_grad]
    return Case(student.module, trained, objective, student.stack, drawn(teacher, objective))


CASES: dict[str, Callable[[LoadedModel], Case]] = {
    "plain": plain_case,
    "categorical, skip, all weights": lambda model: learning_case(model, update="full"),
    "categorical, skip, low-rank": lambda model: learning_case(model, update="lora"),
    "categorical, skip, frozen blocks": lambda model: learning_case(model, update="frozen"),
    "categorical, dense": lambda model: learning_case(model, update="full", dropped="dense"),
    "subset, score pairs": lambda model: learning_case(
        model, update="full", distribution="subset", subset_estimator="score"
    ),
    "bfloat16": lambda model: learning_case(model, "bfloat16", update="lora"),
    "masked KD": distilling_case,
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_are_those_of_the_plain_step(name: str, tiny_model: Factory) -> None:
    case = CASES[name](tiny_model())
    wanted, _ = case.run(nullcontext())
    found, _ = case.run(case.stack.checkpointed())
    assert all(bool(torch.isfinite(value).all()) for value in wanted)
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))


def test_only_the_arguments_of_blocks_are_kept(tiny_model: Factory) -> None:
    """Another block costs one stream (B, T, D) more, where it cost all that is inside."""

    def more(around: Callable[[BlockStack], AbstractContextManager[None]]) -> int:
        cases = [plain_case(tiny_model(depth=depth)) for depth in (3, 4)]
        few, many = (case.run(around(case.stack))[1] for case in cases)
        return many - few

    stream = 6 * 4 * 16 * 4  # batch, tokens, width, bytes
    assert more(lambda stack: stack.checkpointed()) == stream
    assert more(lambda stack: nullcontext()) > 10 * stream


@pytest.mark.parametrize("name", ["categorical, skip, low-rank", "categorical, dense", "masked KD"])
def test_less_is_kept_under_gates_and_teachers(name: str, tiny_model: Factory) -> None:
    case = CASES[name](tiny_model())
    assert case.run(case.stack.checkpointed())[1] < 0.5 * case.run(nullcontext())[1]


def test_what_has_no_graph_runs_once(tiny_model: Factory) -> None:
    model = tiny_model()
    runs: list[int] = []
    handle = next(iter(model.stack)).attn.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))  # type: ignore[union-attr]
    gates = torch.tensor([[1.0, 1, 1, 1], [0.0, 1, 1, 1]], requires_grad=True)
    stream = torch.ones(2, 2, 4, 4)
    with model.stack.checkpointed(), model.stack.gated(gates, "skip"):
        out = model.module(stream, torch.tensor([3, 4]), torch.tensor([0, 1]))
    assert runs == [True, False], "the kept image with a graph, the dropped one without"
    out.sum().backward()
    assert runs == [True, False, True], "and only the kept one again"
    runs.clear()
    with torch.no_grad(), model.stack.checkpointed():
        model.module(stream, torch.tensor([3, 4]), torch.tensor([0, 1]))
    handle.remove()
    assert runs == [False]


def test_gates_and_checkpoints_nest_in_any_order(tiny_model: Factory) -> None:
    case = plain_case(tiny_model())
    gates = torch.tensor([[1.0, 0, 1, 1]]).expand(6, 4).clone()
    gates[0, 1], gates[0, 2] = 1, 0

    @contextmanager
    def nested(outer_gates: bool, checkpoints: bool) -> Iterator[None]:
        gated = case.stack.gated(gates, "skip")
        again = case.stack.checkpointed() if checkpoints else nullcontext()
        first, second = (gated, again) if outer_gates else (again, gated)
        with first, second, case.stack.checkpointed() if checkpoints else nullcontext():
            yield

    wanted, whole = case.run(nested(True, False))
    for outer_gates in (True, False):
        found, kept = case.run(nested(outer_gates, True))
        assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
        assert kept < 0.5 * whole


def test_blocks_are_as_before_afterwards_and_copies_are_plain(tiny_model: Factory) -> None:
    model = tiny_model()

    def copied_before_an_error() -> Any:
        with suppress(RuntimeError), model.stack.checkpointed(), model.stack.compiled("eager"):
            made = copy.deepcopy(model.module)
            assert all("forward" in vars(block) for block in model.stack)
            raise RuntimeError("an error within the contexts")
        return made

    made = copied_before_an_error()
    assert not any("forward" in vars(block) for block in model.stack)
    inputs = torch.ones(2, 2, 4, 4), torch.tensor([3, 4]), torch.tensor([0, 1])
    for other in (made, copy.deepcopy(model.module), pickle.loads(pickle.dumps(model.module))):
        assert torch.equal(other(*inputs), model.module(*inputs))
    for block, own in zip(made.blocks, model.stack, strict=True):
        assert block.forward.__self__ is block is not own and block.forward.__func__ is type(block).forward


def test_several_lists_of_blocks(tiny_model: Factory) -> None:
    model = tiny_model()
    two = nn.ModuleDict({"early": model.module.blocks[:2], "late": model.module.blocks[2:]})
    stack = BlockStack(two, ["early", "late"])
    assert stack.names() == ["early.0", "early.1", "late.0", "late.1"]
    case = dataclasses.replace(plain_case(model), stack=stack)
    wanted, whole = case.run(nullcontext())
    found, kept = case.run(stack.checkpointed())
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True)) and kept < 0.5 * whole
