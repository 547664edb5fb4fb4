"""Teachers in 8 and 4 bits or streamed, students on their tensors, low-rank recovery: values, memory, resume, files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import batches, save_checkpoint
from torch import Tensor, nn

from tinyfusion.blocks.stack import frozen
from tinyfusion.config.recipe import ComputeSection, PruneSection, Recipe, RecoverSection, TrainingSection
from tinyfusion.core.errors import UserError
from tinyfusion.jobs.estimate import memory_plan
from tinyfusion.jobs.footprint import LiveBytes
from tinyfusion.jobs.recovery import recovery
from tinyfusion.jobs.training import Training, mask_training
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.prune.criteria import by_indices
from tinyfusion.recover.sharing import borrowed, equal_tensors, lora_tensors, share
from tinyfusion.recover.storage import StreamedBlocks, stored
from tinyfusion.training.checkpoints import load_latest
from tinyfusion.training.engine import Engine
from tinyfusion.training.lora import add_lora
from tinyfusion.training.packed import Float8Linear, Nf4Linear, PackedLinear, linears, pack

CPU = torch.device("cpu")
MakeModel = Callable[..., LoadedModel]


def layer(rows: int = 96, columns: int = 64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows).requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------- packed layers


@pytest.mark.parametrize(("kind", "error", "bits"), [(Float8Linear, 2**-4, 8), (Nf4Linear, 0.35, 4)])
def test_a_packed_layer_is_near_its_layer_and_small(kind: type[PackedLinear], error: float, bits: int) -> None:
    plain = layer()
    packed = kind(plain)
    assert packed.weight.nbytes * 8 == plain.weight.numel() * bits
    expanded = packed.expanded(torch.float32)
    assert float((expanded - plain.weight).abs().max()) <= error * float(plain.weight.abs().max())
    x = torch.linspace(-1, 1, 3 * 64).view(3, 64)
    assert torch.equal(packed(x), nn.functional.linear(x, expanded, plain.bias))
    assert not any(p.requires_grad for p in packed.parameters())


def test_float8_numbers_are_exact_in_bfloat16_and_relative_to_the_largest() -> None:
    for factor in (1e-6, 1.0, 3e5):
        plain = layer()
        with torch.no_grad():
            plain.weight.mul_(factor)
        packed = Float8Linear(plain)
        low, high = packed.expanded(torch.bfloat16), packed.expanded(torch.float32)
        assert torch.equal(low.float(), high)
        large = plain.weight.abs() > plain.weight.abs().max() / 2**10
        assert float(((high - plain.weight) / plain.weight).abs()[large].max()) <= 2**-4
    zero = layer()
    with torch.no_grad():
        zero.weight.zero_()
    assert not Float8Linear(zero).expanded(torch.float32).any()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_pass_and_the_backward_pass_keeps_no_expanded_weight(dtype: torch.dtype | None) -> None:
    packed = Float8Linear(layer())
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None), LiveBytes() as meter:
        out = packed(x)
    assert out.dtype == (dtype or torch.float32)
    assert meter.now <= out.nbytes + x.nbytes, "input and output alone"
    (gradient,) = torch.autograd.grad(out.float().sum(), x)
    wanted = packed.expanded(torch.float32).sum(0).expand(5, -1)
    torch.testing.assert_close(gradient, wanted, rtol=2e-2, atol=2e-2 if dtype else 1e-5)


def test_low_rank_updates_go_on_packed_layers(tiny_model: MakeModel) -> None:
    model = tiny_model()
    frozen(model.module)
    pack(model.stack, "float8", CPU)
    assert all(
        isinstance(m, PackedLinear) for block in model.stack for m in block.modules() if isinstance(m, nn.Linear)
    )
    factors = add_lora(model.module, 2, 2.0, 0)
    assert {p.dtype for p in factors.values()} == {torch.float32}
    assert sum(".blocks." in f".{name}" for name in factors) > 0


# ------------------------------------------------------------------------------------------------------------ streaming


def outputs(model: LoadedModel) -> Tensor:
    x = torch.linspace(-1, 1, 3 * 32).view(3, 2, 4, 4)
    with torch.no_grad():
        return model.module(x, torch.tensor([1, 500, 900]), torch.tensor([0, 1, 2]))


def test_streamed_blocks_compute_the_same_and_hold_two_at_most(tiny_model: MakeModel) -> None:
    model = tiny_model(depth=5, hidden_size=32)
    wanted = outputs(model)
    frozen(model.module)
    hosted = [p.data_ptr() for p in model.module.parameters()]
    streamed = stored(model.module, model.stack, "streamed", CPU)
    assert streamed is not None
    alive = []

    def look(*_: Any) -> None:
        others = [p for block in model.stack for p in block.parameters() if p.data_ptr() not in hosted]
        alive.append(sum(p.nbytes for p in others))

    for block in model.stack:
        block.register_forward_hook(look)
    for _ in range(2):
        assert torch.equal(outputs(model), wanted)
    sizes = [sum(p.nbytes for p in block.parameters()) for block in model.stack]
    assert max(alive) == 0, "after a block its weights are on the host again"
    assert streamed.passing == max(a + b for a, b in zip(sizes, sizes[1:], strict=False))
    assert not streamed._coming, "nothing is held for the next step"
    assert [p.data_ptr() for p in model.module.parameters()] == hosted
    streamed.close()
    assert torch.equal(outputs(model), wanted)


def test_a_block_that_fails_gives_its_weights_back(tiny_model: MakeModel) -> None:
    model = tiny_model()
    streamed = StreamedBlocks(list(model.stack), CPU)
    hosted = {p.data_ptr() for weights in streamed.hosted for p in weights}

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory, say")

    with model.stack.watched([1], lambda *_: None):
        list(model.stack)[1].mlp.register_forward_pre_hook(fail)  # type: ignore[union-attr]
        with pytest.raises(RuntimeError, match="out of memory, say"):
            outputs(model)
    assert {p.data_ptr() for block in model.stack for p in block.parameters()} <= hosted
    streamed.close()


# -------------------------------------------------------------------------------------------------------------- sharing


def test_equal_tensors_are_those_of_the_kept_blocks(tiny_model: MakeModel) -> None:
    teacher = tiny_model(depth=6)
    student = teacher.cut(by_indices(teacher, [1, 4], 0))
    with torch.no_grad():
        next(student.stack.block_list("blocks")[1].parameters()).add_(1)
    names = {name for name, _ in student.module.named_parameters()}
    equal = equal_tensors(student.module, teacher.module, ["blocks"])
    changed = names - set(equal)
    assert len(changed) == 1 and next(iter(changed)).startswith("blocks.1.")
    for mine, theirs in equal.items():
        assert torch.equal(student.module.get_parameter(mine), teacher.module.get_parameter(theirs))
    work = borrowed(student.module)
    number = share(work, teacher.module, equal, CPU)
    assert number == sum(student.module.get_parameter(name).numel() for name in equal)
    kept = {p.data_ptr() for p in teacher.module.parameters()}
    assert sum(p.data_ptr() not in kept for p in work.parameters()) == 1
    before = {name: p.data_ptr() for name, p in student.module.named_parameters()}
    assert not kept & set(before.values()), "the student itself stays apart"


# ------------------------------------------------------------------------------------------------------------- recovery

TRAINING = TrainingSection(steps=4, batch_size=4, learning_rate=1e-2, ema_decay=0.5, label_drop=0.2)


def job(make: MakeModel, compute: ComputeSection | None = None, **changes: Any) -> tuple[Training, LoadedModel]:
    teacher = make(depth=4)
    student = teacher.cut(by_indices(teacher, [0, 2], 0))
    training = dataclasses.replace(TRAINING, **changes.pop("training", {}))
    settings = RecoverSection(**{"lora_rank": 2, "training": training, **changes})
    recipe = Recipe(seed=3, recover=settings)
    shown = student.copy()
    return recovery(recipe, student, teacher, GaussianObjective(0.2), batches, Engine(CPU, compute)), shown


def train(work: Training, until: int) -> None:
    for _ in work.steps():
        if work.state.step == until:
            break


@pytest.mark.parametrize("storage", ["own", "float8", "nf4", "streamed"])
@pytest.mark.parametrize("update", ["full", "lora"])
def test_a_recovery_resumes_bit_equal_under_every_storage(
    tiny_model: MakeModel, tmp_path: Path, update: Any, storage: Any
) -> None:
    (whole, _), (first, _), (second, _) = (job(tiny_model, update=update, teacher_storage=storage) for _ in range(3))
    train(whole, 4)
    train(first, 2)
    save_checkpoint(tmp_path, first.state, 1)
    assert load_latest(tmp_path, second.state) == 2
    train(second, 4)
    one, two = whole.state.tensors(), second.state.tensors()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_streamed_is_own_bit_for_bit_and_packed_is_near(tiny_model: MakeModel) -> None:
    losses = {}
    for storage in ("own", "streamed", "float8", "nf4"):
        work, _ = job(tiny_model, teacher_storage=storage)
        losses[storage] = [float(record.terms["loss"]) for record in work.steps()]
    assert losses["own"] == losses["streamed"]
    assert losses["float8"] != losses["own"] and losses["float8"] == pytest.approx(losses["own"], rel=0.1)
    if (
        torch.backends.cpu.get_cpu_capability() == "AVX2"
    ):  # another kernel of bitsandbytes: one of the steps is 0.57 apart
        assert losses["nf4"] != losses["own"] and sum(losses["nf4"]) == pytest.approx(sum(losses["own"]), rel=0.3)
    else:
        assert losses["nf4"] == pytest.approx(losses["own"], rel=0.3)


@pytest.mark.parametrize(
    ("storage", "dtype"), [("own", "float32"), ("own", "bfloat16"), ("float8", "bfloat16"), ("nf4", "bfloat16")]
)
def test_a_low_rank_student_stands_on_its_teacher(tiny_model: MakeModel, storage: Any, dtype: Any) -> None:
    work, student = job(tiny_model, update="lora", teacher_storage=storage, training={"dtype": dtype})
    assert work.teacher is not None
    theirs = {p.data_ptr() for p in work.teacher.module.parameters()}
    own = [p for p in work.state.model.parameters() if not p.requires_grad and p.data_ptr() not in theirs]
    shown = [n for n, p in work.state.model.named_parameters() if not p.requires_grad and p.data_ptr() not in theirs]
    assert own == [], shown
    footprint, plan = work.memory()
    assert footprint.frozen_linear == footprint.frozen_rest == 0
    inside = sum(p.nbytes for p in work.teacher.module.parameters())
    assert inside <= plan.sizes["teacher"] < 1.3 * inside
    assert plan.sizes["trained_weights"] == sum(p.nbytes for p in work.state.parameters.values())
    before = {name: value.clone() for name, value in student.module.state_dict().items()}
    start = work.averaged()
    assert all(torch.equal(value, before[name]) for name, value in start.module.state_dict().items()), "B is 0"
    train(work, 4)
    done = work.averaged().module.state_dict()
    changed = [name for name in done if not torch.equal(done[name], before[name])]
    assert set(changed) == {f"{name}.weight" for name, _ in linears(student.module)}
    assert {value.dtype for value in done.values()} == {torch.float32}


def test_merged_is_what_trained_and_the_lora_apart_gives_it_too(tiny_model: MakeModel) -> None:
    work, student = job(tiny_model, update="lora", lora_alpha=3.0, training={"ema_decay": 0.0})
    train(work, 4)
    merged = work.averaged()
    model = work.state.model.eval()
    x = torch.linspace(-1, 1, 32).view(1, 2, 4, 4)
    args = (x, torch.tensor([300]), torch.tensor([1]))
    with torch.no_grad():
        torch.testing.assert_close(merged.module.eval()(*args), model(*args), rtol=1e-4, atol=1e-5)
    apart = lora_tensors(work.state.averages(), work.recipe.recover.lora_scale)
    assert len(apart) == 2 * len(list(linears(student.module)))
    for name, _ in linears(student.module):
        a, b = (apart[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
        own = student.module.get_parameter(f"{name}.weight").detach()
        torch.testing.assert_close(own + b @ a, merged.module.get_parameter(f"{name}.weight").detach())


@pytest.mark.parametrize(
    ("changes", "compute", "message"),
    [
        ({"teacher_storage": "nf4", "method": "finetune"}, None, "--method finetune has none: leave it out"),
        ({"teacher_storage": "float8"}, ComputeSection(shard_teacher=True), "splits them: use ddp, or own"),
        ({"teacher_storage": "streamed"}, ComputeSection(compile=True), "cannot be compiled: leave --compile away"),
        ({"lora_apart": True}, None, "writes what update lora trains: set recover.update to lora"),
    ],
)
def test_settings_that_do_not_go_together_say_so(
    tiny_model: MakeModel, changes: dict[str, Any], compute: ComputeSection | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        job(tiny_model, compute, **changes)


def test_without_bitsandbytes_nf4_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name="bitsandbytes")

    monkeypatch.setattr("tinyfusion.training.optim.importlib.import_module", missing)
    with pytest.raises(
        UserError, match="bitsandbytes, which is not installed: pip install 'tinyfusion\\[8bit\\]', or store"
    ):
        Nf4Linear(layer())


def test_a_streamed_teacher_takes_two_blocks_of_the_plan(tiny_model: MakeModel) -> None:
    work, _ = job(tiny_model, teacher_storage="streamed")
    assert work.teacher is not None
    footprint, _ = work.memory()
    own = sum(p.nbytes for p in work.teacher.module.parameters())
    sizes = [sum(p.nbytes for p in block.parameters()) for block in work.teacher.stack]
    assert footprint.teacher == own, "on a CPU the host is the device"
    assert footprint.passing == sizes[0] + sizes[1]


@pytest.mark.parametrize("storage", ["float8", "nf4"])
@pytest.mark.parametrize("update", ["lora", "frozen"])
def test_masks_are_learned_on_packed_weights(tiny_model: MakeModel, update: Any, storage: Any) -> None:
    teacher = tiny_model(depth=4)
    before = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    section = PruneSection(scheme="1:2", update=update, lora_rank=2, storage=storage, training=TRAINING)
    work = mask_training(Recipe(prune=section), teacher, GaussianObjective(0.2), batches, Engine(CPU))
    packed = [m for m in work.state.model.modules() if isinstance(m, PackedLinear)]
    assert packed and work.memory()[0].frozen_rest > 0
    logits = work.learner.objective.gates.logits[0].detach().clone()
    losses = [float(record.terms["loss"]) for record in work.steps()]
    assert all(value == value for value in losses)
    assert not torch.equal(logits, work.learner.objective.gates.logits[0].detach())
    assert all(torch.equal(before[name], value) for name, value in teacher.module.state_dict().items())


def test_masks_with_all_weights_cannot_be_learned_on_packed_ones(tiny_model: MakeModel) -> None:
    section = PruneSection(scheme="1:2", update="full", storage="float8", training=TRAINING)
    with pytest.raises(UserError, match="--update full trains them: use lora, or own"):
        mask_training(Recipe(prune=section), tiny_model(depth=4), GaussianObjective(0.2), batches, Engine(CPU))


def test_what_a_card_holds_is_without_what_the_host_does(tiny_model: MakeModel) -> None:
    work, _ = job(tiny_model, teacher_storage="streamed", training={"ema_device": "cpu"})
    footprint, plan = work.memory()
    assert footprint.on_host and plan.sizes["moving_average"] > 0, "a CPU is its own host"
    elsewhere = dataclasses.replace(footprint, on_host=False)
    assert memory_plan(elsewhere, work.settings, ComputeSection()).sizes["moving_average"] == 0
    assert work.teacher is not None
    blocks = sum(p.nbytes for block in work.teacher.stack for p in block.parameters())
    assert footprint.hosted == blocks < footprint.teacher
