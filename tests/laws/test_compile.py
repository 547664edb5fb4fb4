"""Compiled blocks: the step of the plain model up to rounding, few compilations, and errors that say why."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinyfusion.blocks.forwards import Gain, measured_gain
from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.stack import BlockStack, frozen
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.core.compiler import check_compiler
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import Batch
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.recover.align import block_pairs
from tinyfusion.recover.distill import DistilledObjective

Factory = Callable[..., LoadedModel]
CPU = torch.device("cpu")
TRACED = "aot_eager"  # traces forward and backward as inductor does, without its minutes in the C++ compiler

# torch warns of what it does itself while it compiles
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """What other tests compiled, and which sizes they had, is forgotten."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()


def step(
    model: LoadedModel,
    stack: BlockStack,
    num: int,
    gates: Tensor | None = None,
    compiled: str | None = None,
    checkpointed: bool = False,
) -> list[Tensor]:
    """Output and gradients of a batch of `num` images."""
    draws = Randomness(0).at(0, 0, num)
    x = torch.from_numpy(draws.normal("x", (2, 4, 4)))
    t, y = torch.arange(num) * 50, torch.arange(num) % 5
    model.module.zero_grad(set_to_none=True)
    with ExitStack() as contexts:
        if compiled:
            contexts.enter_context(stack.compiled(compiled))
        if checkpointed:
            contexts.enter_context(stack.checkpointed())
        if gates is not None:
            contexts.enter_context(stack.gated(gates[:num], "skip"))
        out = model.module(x, t, y)
    out.square().mean().backward()
    return [out.detach(), *(p.grad for p in model.module.parameters() if p.grad is not None)]


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def num_graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def kept_by(*counts: int) -> Tensor:
    """Gates (8, blocks): the first `counts[i]` images keep block i."""
    return (torch.arange(8).unsqueeze(1) < torch.tensor(counts)).float().requires_grad_()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_any_number_of_images_after_the_second_compiles_nothing(tiny_model: Factory, checkpointed: bool) -> None:
    model = tiny_model()
    stack = model.stack
    for gates in (kept_by(8, 5, 6, 3), kept_by(3, 4, 8, 7)):  # full batches, parts with a graph, parts without one
        close(step(model, stack, 8, gates, TRACED, checkpointed), step(model, stack, 8, gates))
    before = num_graphs()
    assert 2 <= before <= 6, "blocks share compilations"
    with torch.compiler.set_stance("fail_on_recompile"):
        for num, gates in ((8, kept_by(2, 7, 4, 6)), (8, kept_by(0, 8, 5, 0)), (7, kept_by(6, 5, 4, 3)), (5, None)):
            close(step(model, stack, num, gates, TRACED, checkpointed), step(model, stack, num, gates))
    assert num_graphs() == before


def test_teacher_and_student_are_compiled_under_their_hooks(tiny_model: Factory) -> None:
    teacher = tiny_model()
    plan = PrunePlan({"blocks": [0, 3]}, {"blocks": 4}, "indices", groups={"blocks": [[1, 2], [1, 2]]})
    student = teacher.cut(plan)
    frozen(teacher.module)
    stacks = teacher.stack, student.stack
    objective = DistilledObjective(
        GaussianObjective(), teacher.module, *stacks, block_pairs(plan), steps=1, beta=(1.0, 1.0)
    )
    draws = Randomness(0).at(0, 0, 3)
    batch = Batch(torch.from_numpy(draws.normal("x", (2, 4, 4))), class_condition(torch.tensor([0, 1, 2]), 5))
    noisy = objective.draw(batch, draws)

    def run(*compiled: BlockStack) -> list[Tensor]:
        student.module.zero_grad(set_to_none=True)
        with ExitStack() as contexts:
            for stack in compiled:
                contexts.enter_context(stack.compiled(TRACED))
            prediction = objective.predict(student.module, noisy)
        losses = objective.losses(student.module, noisy, prediction)
        losses["loss"].mean().backward()
        return [*losses.values(), *(p.grad for p in student.module.parameters() if p.grad is not None)]

    before = num_graphs()
    close(run(*stacks), run())
    assert num_graphs() - before == 2, "one for the blocks of the teacher, one for the student's"


@pytest.fixture
def real_compiler() -> None:
    """Skips where there is none."""
    try:
        check_compiler(CPU)
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("real_compiler")
def test_the_real_compiler_gives_the_same_gradients(tiny_model: Factory) -> None:
    """The stream comes out of the patches channel by channel, which inductor of torch 2.13 gets wrong on the CPU."""
    model = tiny_model()
    stack = model.stack
    close(step(model, stack, 6, compiled="inductor"), step(model, stack, 6))


# --------------------------------------------------------------------------------------------------------------- errors


class Breaking(nn.Module):
    """A block whose path depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if float(x.sum()) > 0 else x - 1


class Misspelt(nn.Module):
    """A block that is wrong on its own."""

    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("misspelt")


def test_a_graph_break_names_the_block() -> None:
    model = nn.ModuleDict({"early": nn.ModuleList([nn.Identity()]), "late": nn.ModuleList([Breaking()])})
    with (
        BlockStack(model, ["late"]).compiled(TRACED),
        pytest.raises(UserError, match=r"block late\.0 cannot be compiled \(\S.*\): leave --compile away$"),
    ):
        model["late"][0](torch.ones(2, 3))  # type: ignore[index]


def test_a_replaced_forward_cannot_be_compiled(tiny_model: Factory) -> None:
    model = tiny_model()
    first = next(iter(model.stack))
    own = first.forward
    vars(first)["forward"] = lambda *args: own(*args)
    with pytest.raises(UserError, match=r"block blocks\.0 .*replaced"), model.stack.compiled(TRACED):
        pass
    assert "forward" not in vars(list(model.stack)[1])


def test_no_compiler_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor import config, cpp_builder

    monkeypatch.setenv("PATH", str(tmp_path))
    cpp_builder.get_cpp_compiler.cache_clear() if hasattr(cpp_builder.get_cpp_compiler, "cache_clear") else None
    assert shutil.which("g++") is None
    with (
        config.patch({"cpp.cxx": (None, "no-such-compiler")}),  # puts it back: monkeypatch would take it out for good
        pytest.raises(UserError, match=r"C\+\+ compiler.*install g\+\+.*leave --compile away"),
    ):
        check_compiler(CPU)


def test_errors_of_others_stay_what_they_are() -> None:
    def wrong() -> list[Tensor]:
        raise KeyError("wrong")

    with pytest.raises(KeyError, match="wrong"):
        measured_gain(lambda: [], wrong, CPU, repeats=1)


# ----------------------------------------------------------------------------------------------------------------- gain


def slow(seconds: float, value: float = 1.0) -> Callable[[], list[Tensor]]:
    def made() -> list[Tensor]:
        time.sleep(seconds)
        torch.rand(3)
        return [torch.full((2,), value), torch.zeros(1)]

    return made


def test_a_gain_is_measured_and_leaves_generators_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    gain = measured_gain(slow(0.02), slow(0.002), CPU, repeats=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert gain.eager_ms >= 20 and 2 <= gain.compiled_ms < gain.eager_ms and gain.apart == 0
    gain.require()


def test_no_gain_is_an_error_with_both_numbers() -> None:
    with pytest.raises(UserError, match="gains nothing here: 812 ms a step against 790 ms without; leave --compile"):
        Gain(790, 812, 30, 0.0).require()
    with pytest.raises(UserError, match="gains nothing"):
        measured_gain(slow(0.001), slow(0.02), CPU, repeats=3).require()


@pytest.mark.parametrize("value", [1.01, float("nan")])
def test_another_step_is_an_error_however_fast(value: float) -> None:
    gain = measured_gain(slow(0.02), slow(0.001, value), CPU, repeats=1)
    with pytest.raises(UserError, match="changes the step"):
        gain.require()
    if value == value:
        gain.require(tolerance=0.05)


def test_the_number_of_calls_is_fixed() -> None:
    calls: dict[str, int] = {"eager": 0, "compiled": 0}

    def counted(name: str) -> Any:
        def made() -> list[Tensor]:
            calls[name] += 1
            return []

        return made

    measured_gain(counted("eager"), counted("compiled"), CPU, repeats=4)
    assert calls == {"eager": 6, "compiled": 6}
