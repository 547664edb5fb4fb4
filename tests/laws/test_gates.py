"""Learned pruning: gates are the model or its cut, bit for bit; the estimator is the closed form; schemes are kept."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tinyfusion.blocks.scheme import BlockGroup, consecutive_groups, parse_scheme, spelled_out
from tinyfusion.blocks.stack import BlockStack, frozen
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.config.recipe import PruneSection, TrainingSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import Batch, NoisyBatch
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.prune.gates import CategoricalGates
from tinyfusion.prune.learn import mask_learner
from tinyfusion.training.lora import add_lora, cast_frozen_linears
from tinyfusion.training.optim import linear

# ------------------------------------------------------------------------------------------- gates and the cut model


@torch.no_grad()
def gated_output(model: LoadedModel, noisy: NoisyBatch, gates: Tensor) -> Tensor:
    with model.stack.gated(gates):
        return model.module(noisy.xt, noisy.t, noisy.condition["labels"])


@torch.no_grad()
def cut_output(model: LoadedModel, noisy: NoisyBatch, kept: tuple[int, ...]) -> Tensor:
    student = model.copy()
    student.stack.keep({"blocks": list(kept)})
    assert len(student.stack) == len(kept)
    return student.module(noisy.xt, noisy.t, noisy.condition["labels"])


def as_gates(kept: tuple[int, ...], depth: int, num: int) -> Tensor:
    return torch.tensor([[1.0 if i in kept else 0.0 for i in range(depth)]] * num)


@pytest.mark.parametrize("seed", [0, 1, 2])
@torch.no_grad()
def test_gates_of_ones_are_the_teacher_bit_for_bit(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch], seed: int
) -> None:
    model = tiny_model(seed, depth=6)
    noisy = noisy_batch(model, 4, seed)
    untouched = model.module(noisy.xt, noisy.t, noisy.condition["labels"])
    assert torch.equal(gated_output(model, noisy, torch.ones(4, 6)), untouched)
    assert torch.equal(model.module(noisy.xt, noisy.t, noisy.condition["labels"]), untouched), "hooks are gone"


@pytest.mark.parametrize("kept", [kept for num in (1, 2, 3, 4) for kept in itertools.combinations(range(4), num)])
def test_every_mask_of_a_small_model_is_its_cut(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch], kept: tuple[int, ...]
) -> None:
    model = tiny_model()
    noisy = noisy_batch(model)
    assert torch.equal(gated_output(model, noisy, as_gates(kept, 4, 3)), cut_output(model, noisy, kept))


@given(kept=st.sets(st.integers(0, 11), min_size=1).map(lambda found: tuple(sorted(found))), seed=st.integers(0, 3))
def test_random_masks_of_a_deep_model_are_its_cut(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch], kept: tuple[int, ...], seed: int
) -> None:
    model = tiny_model(seed, depth=12)
    noisy = noisy_batch(model, 2, seed)
    assert torch.equal(gated_output(model, noisy, as_gates(kept, 12, 2)), cut_output(model, noisy, kept))


def test_every_sample_has_its_own_mask(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch]
) -> None:
    model = tiny_model()
    noisy = noisy_batch(model, 3)
    masks = [(0, 2), (1, 3), (0, 1, 2, 3)]
    mixed = gated_output(model, noisy, torch.cat([as_gates(kept, 4, 1) for kept in masks]))
    for row, kept in enumerate(masks):
        assert torch.equal(mixed[row], gated_output(model, noisy, as_gates(kept, 4, 3))[row])


def test_all_gates_closed_pass_the_stream_through(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch]
) -> None:
    model = tiny_model()
    noisy = noisy_batch(model)
    with torch.no_grad():
        tokens = model.module.x_embedder(noisy.xt) + model.module.pos_embed
        c = model.module.t_embedder(noisy.t) + model.module.y_embedder(noisy.condition["labels"])
        wanted = model.module.unpatchify(model.module.final_layer(tokens, c))
    assert torch.equal(gated_output(model, noisy, torch.zeros(3, 4)), wanted)


def test_hooks_are_removed_after_an_error(tiny_model: Callable[..., LoadedModel]) -> None:
    model = tiny_model()
    with pytest.raises(KeyError), model.stack.gated(torch.zeros(1, 4)), model.stack.tap([0]):
        raise KeyError
    assert all(not block._forward_hooks for block in model.stack)


@pytest.mark.parametrize("indices", [[0, 99], [-1], [4]])
def test_a_block_that_is_not_there_is_refused_and_leaves_no_hook(
    tiny_model: Callable[..., LoadedModel], indices: list[int]
) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="out of range, the model has blocks 0 to 3"), model.stack.tap(indices):
        pass
    assert all(not block._forward_hooks for block in model.stack)


@pytest.mark.parametrize("context", ["gated", "tap"])
def test_a_block_that_takes_no_hook_leaves_none_on_the_others(
    tiny_model: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch, context: str
) -> None:
    model = tiny_model()

    def refuse(_hook: object, **_options: object) -> None:
        raise RuntimeError("no hooks here")

    monkeypatch.setattr(list(model.stack)[2], "register_forward_hook", refuse)
    opened = model.stack.gated(torch.ones(1, 4)) if context == "gated" else model.stack.tap([0, 1, 2])
    with pytest.raises(RuntimeError, match="no hooks here"), opened:
        pass
    assert all(not block._forward_hooks for block in model.stack)


@pytest.mark.parametrize("shape", [(4,), (3, 3), (3, 4, 1)])
def test_gates_of_another_shape_are_refused(tiny_model: Callable[..., LoadedModel], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one column per block"), tiny_model().stack.gated(torch.ones(shape)):
        pass


# ---------------------------------------------------------------------------------------------------- gate gradient


def test_gradient_of_a_gate_is_the_branch_seen_by_the_loss(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch]
) -> None:
    """d loss / d m_j = <d loss / d x, block(x) - x>, for closed gates as well."""
    model = tiny_model()
    frozen(model.module)
    noisy, gates = noisy_batch(model), torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1]], requires_grad=True)
    streams: list[tuple[Tensor, Tensor]] = []

    def branch(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        streams.append((args[0], block.forward(*args)))

    outputs: list[Tensor] = []

    def after(_block: nn.Module, _args: Any, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    with model.stack.gated(gates):
        handles = [
            h for b in model.stack for h in (b.register_forward_pre_hook(branch), b.register_forward_hook(after))
        ]
        model.module(noisy.xt, noisy.t, noisy.condition["labels"]).square().sum().backward()
    for handle in handles:
        handle.remove()
    assert gates.grad is not None and len(streams) == len(outputs) == 4
    for j, ((x, through), output) in enumerate(zip(streams, outputs, strict=True)):
        assert output.grad is not None
        wanted = (output.grad * (through - x).detach()).flatten(1).sum(1)
        torch.testing.assert_close(gates.grad[:, j], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def closed_form(gates: CategoricalGates, gumbel: list[Tensor], s: float, tau: float, upstream: Tensor) -> list[Tensor]:
    """(s / tau) y_k (a_k - sum_i y_i a_i) summed over samples, a = candidates @ upstream, y the relaxed sample."""
    found = []
    for index, (group, theta) in enumerate(zip(gates.groups, gates.logits, strict=True)):
        y = torch.softmax((s * theta.detach() + gumbel[index]).double() / tau, dim=-1)
        a = upstream[:, group.start : group.start + group.size].double() @ gates.candidates(index).double().T
        found.append((s / tau * y * (a - (y * a).sum(-1, keepdim=True))).sum(0))
    return found


groups_of_any_kind = st.lists(
    st.integers(1, 5).flatmap(lambda size: st.tuples(st.integers(1, size), st.just(size))), min_size=1, max_size=4
)


def gates_for(pairs: list[tuple[int, int]], **more: Any) -> CategoricalGates:
    return CategoricalGates(consecutive_groups(pairs), **more)


def gumbel_for(gates: CategoricalGates, seed: int, num: int) -> list[Tensor]:
    draws = Randomness(seed).at(0, 0, num)
    return [torch.from_numpy(draws.gumbel(f"g{i}", tuple(theta.shape))) for i, theta in enumerate(gates.logits)]


@given(pairs=groups_of_any_kind, seed=st.integers(0, 99), s=st.sampled_from([1.0, 100.0]), tau=st.floats(0.1, 4.0))
def test_logit_gradient_is_the_closed_form(pairs: list[tuple[int, int]], seed: int, s: float, tau: float) -> None:
    gates = gates_for(pairs)
    with torch.no_grad():
        for index, theta in enumerate(gates.logits):
            theta.copy_(
                0.02 * torch.from_numpy(Randomness(seed).at(1, index, 1).normal("theta", tuple(theta.shape)))[0]
            )
    gumbel = gumbel_for(gates, seed, 3)
    upstream = torch.from_numpy(Randomness(seed).at(0, 0, 3).normal("upstream", (sum(size for _, size in pairs),)))
    (gates.sample(gumbel, tau, s) * upstream).sum().backward()
    for theta, wanted in zip(gates.logits, closed_form(gates, gumbel, s, tau, upstream), strict=True):
        assert theta.grad is not None
        torch.testing.assert_close(theta.grad.double(), wanted, rtol=1e-3, atol=1e-4 * s / tau)


def test_published_logit_gradient() -> None:
    gates = gates_for([(1, 2)])
    m = gates.sample([torch.tensor([[0.3, -0.5]])], temperature=4.0, scaling=100.0)
    (m * torch.tensor([[0.7, -0.2]])).sum().backward()
    assert m.tolist() == [[1.0, 0.0]]
    assert gates.logits[0].grad is not None
    assert gates.logits[0].grad.tolist() == pytest.approx([5.569123, -5.569122], rel=1e-6)


# ------------------------------------------------------------------------------------------ skipping what is dropped


Gradients = dict[str, Tensor]


def run_gated(
    model: LoadedModel,
    noisy: NoisyBatch,
    gates: Tensor,
    dropped: Literal["dense", "skip"],
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Gradients]:
    """Output and gradients, of gates and of every trained weight, of some loss that sees all outputs."""
    gates = gates.clone().requires_grad_(True)
    trained = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
    with model.stack.gated(gates, dropped), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        output = model.module(noisy.xt, noisy.t, noisy.condition["labels"])
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    (output.float() * weights).sum().backward()
    gradients: Gradients = {}
    for name, tensor in {"gates": gates, **trained}.items():
        assert tensor.grad is not None, f"{name} has no gradient"
        gradients[name], tensor.grad = tensor.grad.clone(), None
    return output.detach(), gradients


def with_update(model: LoadedModel, update: str) -> LoadedModel:
    """What the mask learner makes of a model, with deltas that are not zero."""
    if update == "lora":
        deltas = add_lora(model.module, rank=2, alpha=4.0, seed=0)
        with torch.no_grad():
            for index, delta in enumerate(deltas.values()):
                delta.add_(0.1 * torch.sin(torch.arange(delta.numel()) + index).view(delta.shape))
    elif update == "frozen":
        frozen(model.module)
    return model


def assert_same(found: tuple[Tensor, Gradients], wanted: tuple[Tensor, Gradients], relative: float = 1e-5) -> None:
    """Equal to `relative` of each tensor's largest value."""
    pairs = [(found[0], wanted[0]), *((found[1][name], gradient) for name, gradient in wanted[1].items())]
    assert found[1].keys() == wanted[1].keys()
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=relative * float(theirs.abs().max()))


masks_of_four_blocks = st.lists(st.tuples(*[st.sampled_from([0.0, 1.0])] * 4), min_size=1, max_size=4)


@pytest.mark.parametrize("update", ["full", "lora", "frozen"])
@settings(max_examples=10)
@given(masks=masks_of_four_blocks, seed=st.integers(0, 3))
@example(masks=[(1.0, 0.0, 1.0, 0.0)] * 3, seed=0)  # blocks that all keep, and that all drop
@example(masks=[(0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0)], seed=0)
@example(masks=[(0.0, 1.0, 1.0, 0.0)], seed=0)
def test_skipping_is_dense_gating(
    tiny_model: Callable[..., LoadedModel],
    noisy_batch: Callable[..., NoisyBatch],
    update: str,
    masks: list[tuple[float, ...]],
    seed: int,
) -> None:
    """The same values, gate gradients and weight gradients, zeros included."""
    model = with_update(tiny_model(seed), update)
    noisy, gates = noisy_batch(model, len(masks), seed), torch.tensor(masks)
    assert_same(run_gated(model, noisy, gates, "skip"), run_gated(model, noisy, gates, "dense"))


@pytest.mark.parametrize("update", ["full", "lora"])
def test_skipping_is_dense_gating_in_bfloat16(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch], update: str
) -> None:
    """Casts that autocast remembers from a pass without a graph must not cost a weight its gradient."""
    model = with_update(tiny_model(), update)
    noisy, gates = noisy_batch(model, 4), torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0], [1, 0, 1, 0]])
    found, wanted = (run_gated(model, noisy, gates, form, torch.bfloat16) for form in ("skip", "dense"))
    assert_same(found, wanted, relative=2e-2)
    assert found[0].dtype == wanted[0].dtype


@pytest.mark.parametrize("update", ["full", "lora", "frozen"])
@pytest.mark.parametrize("scheme", ["1:2", "1:4", "3:4"])
def test_the_learner_gets_the_same_gradients(
    tiny_model: Callable[..., LoadedModel], scheme: str, update: Literal["full", "lora", "frozen"]
) -> None:
    """From Gumbel noise to the logits."""
    found = {}
    for dropped in ("dense", "skip"):
        section = dataclasses.replace(PruneSection(), scheme=scheme, update=update, lora_rank=2, dropped=dropped)
        learner = mask_learner(tiny_model(), GaussianObjective(), section, seed=0)
        batch = Batch(torch.linspace(-1, 1, 8 * 32).view(8, 2, 4, 4), class_condition(torch.arange(8) % 5, 5))
        noisy = learner.objective.draw(batch, Randomness(0).at(0, 0, 8))
        prediction = learner.objective.predict(learner.module, noisy)
        loss = learner.objective.losses(learner.module, noisy, prediction)["loss"]
        loss.mean().backward()
        parameters = {n: p for group in learner.parameter_groups for n, p in group.parameters.items()}
        found[dropped] = loss.detach(), {name: p.grad for name, p in parameters.items() if p.grad is not None}
    assert any(name.startswith("gates") for name in found["skip"][1])
    assert_same(found["skip"], found["dense"])


def test_skipping_gives_a_closed_gate_its_branch_as_well(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch]
) -> None:
    """d loss / d m_j = <d loss / d x, block(x) - x>, from the streams that hooks on the blocks see."""
    model = tiny_model()
    gates = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0], [1, 1, 1, 0]], requires_grad=True)
    noisy = noisy_batch(model)
    seen: list[tuple[nn.Module, tuple[Tensor, ...], Tensor]] = []

    def after(block: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        seen.append((block, args, output))

    with ExitStack() as hooks:
        hooks.enter_context(model.stack.gated(gates, "skip"))
        for block in model.stack:
            hooks.enter_context(block.register_forward_hook(after))
        model.module(noisy.xt, noisy.t, noisy.condition["labels"]).square().sum().backward()
    assert gates.grad is not None and len(seen) == 4
    for j, (block, (x, c), output) in enumerate(seen):
        assert output.grad is not None
        wanted = (output.grad * (block(x, c) - x).detach()).flatten(1).sum(1)
        torch.testing.assert_close(gates.grad[:, j], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@torch.no_grad()
def test_skipping_alike_for_all_is_the_cut_bit_for_bit(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch]
) -> None:
    model = tiny_model()
    noisy = noisy_batch(model)
    for kept in ((0, 1, 2, 3), (1, 2), (3,)):
        for num in (1, 3):  # one row is for all images
            with model.stack.gated(as_gates(kept, 4, num), "skip"):
                found = model.module(noisy.xt, noisy.t, noisy.condition["labels"])
            assert torch.equal(found, cut_output(model, noisy, kept))


def test_one_row_of_gates_collects_the_gradient_of_all_images(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch]
) -> None:
    model = tiny_model()
    noisy, gates = noisy_batch(model), torch.tensor([[1.0, 0, 0, 1]])
    wanted = run_gated(model, noisy, gates, "dense")
    assert wanted[1]["gates"].shape == (1, 4)
    assert_same(run_gated(model, noisy, gates, "skip"), wanted)


def test_gates_between_0_and_1_are_mixed_densely(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch]
) -> None:
    model = tiny_model()
    noisy, gates = noisy_batch(model), torch.tensor([[0.5, 1, -1, 1], [1, 1, 0, 1], [1.0, 1, 1, 2]])
    found, wanted = (run_gated(model, noisy, gates, form) for form in ("skip", "dense"))
    assert torch.equal(found[0], wanted[0])
    assert all(torch.equal(found[1][name], gradient) for name, gradient in wanted[1].items() if name != "gates")
    assert_same(found, wanted)


def saved_bytes(
    model: LoadedModel, gates: Tensor, dropped: Literal["dense", "skip"], stream: Tensor, c: Tensor
) -> list[int]:
    """Bytes of every distinct storage that the graph of the gated blocks holds, without weights and the input."""
    own = {p.untyped_storage().data_ptr() for p in model.module.parameters()} | {stream.untyped_storage().data_ptr()}
    found: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)  # so that no address is used twice
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), model.stack.gated(gates, dropped):
        x = stream
        for block in model.stack:
            x = block(x, c)
    return list(found.values())


def test_dropped_images_hold_nothing_but_their_difference(tiny_model: Callable[..., LoadedModel]) -> None:
    model = tiny_model(input_size=8, hidden_size=32)
    stream, c = torch.linspace(-1, 1, 8 * 16 * 32).view(8, 16, 32), torch.linspace(-1, 1, 8 * 32).view(8, 32)
    closed = torch.zeros(8, 4, requires_grad=True)
    differences = [size for size in saved_bytes(model, closed, "skip", stream, c) if size >= stream.nbytes]
    assert differences == [stream.nbytes] * 4, "one per block"
    half = as_gates((0, 2), 4, 8)
    half[4:] = 1 - half[4:]
    half.requires_grad_(True)
    skipped, dense = (sum(saved_bytes(model, half, form, stream, c)) for form in ("skip", "dense"))
    assert skipped < 0.6 * dense


@pytest.mark.parametrize("watched", [False, True])
def test_without_gate_gradients_dropped_images_are_not_run(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch], watched: bool
) -> None:
    model = tiny_model()
    noisy, gates = noisy_batch(model), torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0], [1, 1, 1, 0]])
    images: list[int] = []
    with ExitStack() as hooks:
        for block in model.stack:
            attention = block.get_submodule("attn")
            hooks.enter_context(attention.register_forward_pre_hook(lambda _module, args: images.append(len(args[0]))))
        hooks.enter_context(model.stack.gated(gates.requires_grad_(watched), "skip"))
        model.module(noisy.xt, noisy.t, noisy.condition["labels"])
    assert images == ([2, 1, 2, 1, 3, 3] if watched else [2, 2, 3])


class Branch(NamedTuple):
    """Arguments as other families pass them."""

    scale: Tensor
    table: Tensor


class OddBlock(nn.Module):
    """Arguments of every kind: per image, shared, nested, by name, and a parameter as long as the batch."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(
        self,
        x: Tensor,
        branch: Branch,
        many: list[Tensor],
        *,
        bias: nn.Parameter,
        more: dict[str, Any],
        c: Tensor | None,
    ) -> Tensor:
        y = self.linear(x) * branch.scale[:, None, None] + branch.table + many[0][:, None] + bias.sum()
        return y + more["rows"] * more["number"] + (0 if c is None else c.unsqueeze(1))


class TwoLists(nn.Module):
    """Blocks in two lists."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList([OddBlock(3, 4), OddBlock(3, 4)])
        self.second = nn.ModuleList([OddBlock(3, 4)])
        self.bias = nn.Parameter(torch.linspace(0, 1, 5))
        for index, parameter in enumerate(self.parameters()):
            with torch.no_grad():
                parameter.copy_(torch.sin(torch.arange(parameter.numel()) + index).view(parameter.shape))

    def forward(self, x: Tensor) -> Tensor:
        num = len(x)
        per_image = torch.linspace(0.5, 1.5, num)
        for index, block in enumerate([*self.first, *self.second]):
            branch = Branch(per_image + index, torch.linspace(-1, 1, 3).view(1, 3, 1))
            more = {"rows": per_image.view(num, 1, 1), "number": 0.5}
            x = block(
                x,
                branch,
                [per_image.view(num, 1)],
                bias=self.bias,
                more=more,
                c=per_image.view(num, 1) if index else None,
            )
        return x


def test_arguments_of_every_kind_go_with_their_images() -> None:
    model = TwoLists()
    stack = BlockStack(model, ("first", "second"))
    x = torch.linspace(-1, 1, 5 * 3 * 4).view(5, 3, 4)
    masks = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 0, 0]])
    found = {}
    for dropped in ("dense", "skip"):
        gates = masks.clone().requires_grad_(True)
        with stack.gated(gates, dropped):
            output = model(x)
        names, parameters = zip(*model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(output.square().sum(), [gates, *parameters])
        found[dropped] = output.detach(), dict(zip(("gates", *names), gradients, strict=True))
    assert_same(found["skip"], found["dense"])


def test_taps_see_the_mixed_stream_from_inside_and_outside(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch]
) -> None:
    model = tiny_model()
    noisy, gates = noisy_batch(model), torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0], [1, 1, 1, 0]], requires_grad=True)
    with model.stack.gated(gates, "dense"), model.stack.tap(range(4)) as wanted:
        model.module(noisy.xt, noisy.t, noisy.condition["labels"])
    with model.stack.tap(range(4)) as outside, model.stack.gated(gates, "skip"), model.stack.tap(range(4)) as inside:
        model.module(noisy.xt, noisy.t, noisy.condition["labels"])
    for index, output in wanted.items():
        torch.testing.assert_close(inside[index], output)
        assert torch.equal(inside[index], outside[index])


@pytest.mark.parametrize("inner", ["dense", "skip"])
@pytest.mark.parametrize("outer", ["dense", "skip"])
def test_gates_within_gates_multiply(
    tiny_model: Callable[..., LoadedModel],
    noisy_batch: Callable[..., NoisyBatch],
    outer: Literal["dense", "skip"],
    inner: Literal["dense", "skip"],
) -> None:
    model = tiny_model()
    noisy = noisy_batch(model)
    first = torch.tensor([[1.0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]])
    second = torch.tensor([[1.0, 1, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]])
    with model.stack.gated(first, outer):
        found = run_gated(model, noisy, second, inner)
    with model.stack.gated(first, "dense"):
        wanted = run_gated(model, noisy, second, "dense")
    assert_same(found, wanted)


def test_skipping_leaves_nothing_behind(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch]
) -> None:
    model = tiny_model()
    noisy, ones = noisy_batch(model), torch.ones(3, 4)
    with model.stack.gated(ones, "skip"):
        before = [vars(block)["forward"] for block in model.stack]
        with pytest.raises(KeyError), model.stack.gated(ones, "skip"):
            raise KeyError
        assert [vars(block)["forward"] for block in model.stack] == before, "the outer gates are back"
        with pytest.raises(ValueError, match="gates are for 3 images, the block got 2"):
            model.module(noisy.xt[:2], noisy.t[:2], noisy.condition["labels"][:2])
    assert all("forward" not in vars(block) and not block._forward_hooks for block in model.stack)


@torch.no_grad()
def test_frozen_weights_in_bfloat16_change_nothing_under_autocast(
    tiny_model: Callable[..., LoadedModel], noisy_batch: Callable[..., NoisyBatch]
) -> None:
    """Autocast makes the same cast of the same values at every call."""
    model = with_update(tiny_model(), "lora")
    noisy = noisy_batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model.module(noisy.xt, noisy.t, noisy.condition["labels"])
        trained = {name: p.dtype for name, p in model.module.named_parameters() if p.requires_grad}
        cast_frozen_linears(model.module, torch.bfloat16)
        assert torch.equal(model.module(noisy.xt, noisy.t, noisy.condition["labels"]), wanted)
    assert set(trained.values()) == {torch.float32}
    dtypes = {name: p.dtype for name, p in model.module.named_parameters() if "base_layer" in name}
    assert set(dtypes.values()) == {torch.bfloat16}
    assert model.module.pos_embed.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("update", ["full", "lora", "frozen"])
def test_only_a_throw_away_copy_in_bfloat16_holds_bfloat16(
    tiny_model: Callable[..., LoadedModel],
    update: Literal["full", "lora", "frozen"],
    dtype: Literal["float32", "bfloat16"],
) -> None:
    teacher = tiny_model()
    section = dataclasses.replace(
        PruneSection(), update=update, lora_rank=2, training=TrainingSection(steps=2, batch_size=2, dtype=dtype)
    )
    learner = mask_learner(teacher, GaussianObjective(), section, seed=0)
    assert {p.dtype for p in teacher.module.parameters()} == {torch.float32}
    assert {p.dtype for p in learner.module.parameters() if p.requires_grad} <= {torch.float32}
    casts = any(p.dtype == torch.bfloat16 for p in learner.module.parameters())
    assert casts == (dtype == "bfloat16" and update != "full")


# ----------------------------------------------------------------------------------------------- samples and schemes


@given(pairs=groups_of_any_kind, seed=st.integers(0, 2**32), temperature=st.floats(0.1, 4.0))
def test_samples_keep_exactly_n_of_every_group(pairs: list[tuple[int, int]], seed: int, temperature: float) -> None:
    gates = gates_for(pairs)
    masks = gates.sample(gumbel_for(gates, seed, 8), temperature, 100.0).detach()
    assert masks.shape == (8, sum(size for _, size in pairs))
    assert bool(((masks == 0) | (masks == 1)).all()), "exactly 0 or 1"
    for group in gates.groups:
        assert masks[:, group.start : group.start + group.size].sum(1).tolist() == [group.keep] * 8


def test_samples_follow_the_softmax_of_scaled_logits() -> None:
    gates = gates_for([(1, 3)])
    with torch.no_grad():
        gates.logits[0].copy_(torch.tensor([0.02, 0.01, 0.0]))
    shares = gates.sample(gumbel_for(gates, 1, 20_000), 1.0, 100.0).detach().mean(0)
    torch.testing.assert_close(shares, torch.softmax(torch.tensor([2.0, 1.0, 0.0]), 0), atol=0.015, rtol=0)


def test_gates_stay_float32_under_autocast() -> None:
    gates = gates_for([(2, 4)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        masks = gates.sample(gumbel_for(gates, 0, 4), 4.0, 100.0)
    assert masks.dtype == torch.float32 and bool(((masks == 0) | (masks == 1)).all())


def test_candidates_are_in_lexicographic_order() -> None:
    assert BlockGroup(8, 4, 2).candidates() == [(8, 9), (8, 10), (8, 11), (9, 10), (9, 11), (10, 11)]
    rows = gates_for([(1, 2), (2, 4)]).candidates(1)
    assert rows.tolist() == [[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]]


@given(st.integers(1, 8).flatmap(lambda size: st.tuples(st.integers(1, size), st.just(size))))
def test_candidates_are_all_subsets_once(pair: tuple[int, int]) -> None:
    group = BlockGroup(0, pair[1], pair[0])
    found = group.candidates()
    assert len(set(found)) == len(found) == group.num_candidates == math.comb(pair[1], pair[0])
    assert found == sorted(found)


@pytest.mark.parametrize(
    ("scheme", "depth", "num_groups", "num_logits", "kept"),
    [
        ("1:2", 28, 14, 28, 14),
        ("2:4", 28, 7, 42, 14),
        ("7:14", 28, 2, 6864, 14),
        ("1:4", 28, 7, 28, 7),
        ("1:2", 14, 7, 14, 7),
        ("2:4x2+3:4+2:4+3:4+2:4x2", 28, 7, 38, 16),
        ("3:4x2+2:4+3:4+2:4+3:4x2", 28, 7, 32, 19),
        ("2:4x3+3:4x4", 28, 7, 34, 18),
        ("12:12", 12, 1, 1, 12),
        (" 1:2x3 + 1:6 ", 12, 4, 12, 4),
    ],
)
def test_published_and_hybrid_schemes(scheme: str, depth: int, num_groups: int, num_logits: int, kept: int) -> None:
    groups = parse_scheme(scheme, {"blocks": depth})["blocks"]
    assert (len(groups), sum(g.num_candidates for g in groups), sum(g.keep for g in groups)) == (
        num_groups,
        num_logits,
        kept,
    )
    assert [g.start for g in groups] == list(itertools.accumulate((g.size for g in groups[:-1]), initial=0))
    assert groups[-1].start + groups[-1].size == depth


def test_each_list_may_have_a_scheme_of_its_own() -> None:
    groups = parse_scheme("2:3;1:2", {"double": 3, "single": 4})
    sizes = {name: [(group.start, group.keep, group.size) for group in listed] for name, listed in groups.items()}
    assert sizes == {"double": [(0, 2, 3)], "single": [(0, 1, 2), (2, 1, 2)]}
    with pytest.raises(UserError, match=r"is for 3 lists of blocks, the model has 2: double, single"):
        parse_scheme("1:2;1:2;1:2", {"double": 3, "single": 4})
    with pytest.raises(
        UserError, match=r"needs a depth divisible by 2; the model has 3 blocks .* in double; one scheme per list"
    ):
        parse_scheme("1:2", {"double": 3, "single": 4})


@pytest.mark.parametrize(
    ("scheme", "depths", "spelled"),
    [
        ("50%", {"blocks": 28}, "14:28"),
        ("50%", {"double": 19, "single": 38}, "10:19;19:38"),
        ("50%", {"a": 6, "b": 6}, "3:6"),
        ("1%;100%", {"a": 6, "b": 6}, "1:6;6:6"),
        ("33.3%;1:2", {"a": 6, "b": 4}, "2:6;1:2"),
        ("2:4", {"blocks": 8}, "2:4"),
    ],
)
def test_a_share_is_one_group_of_a_list(scheme: str, depths: dict[str, int], spelled: str) -> None:
    assert spelled_out(scheme, depths) == spelled
    assert parse_scheme(scheme, depths, "subset") == parse_scheme(spelled, depths, "subset")


@pytest.mark.parametrize("scheme", ["0%", "101%", "50 %%", "-5%", "50%x2", "%"])
def test_shares_that_are_none(scheme: str) -> None:
    with pytest.raises(UserError, match=r"scheme '.*' (keeps a share of the blocks: wanted more than 0|is not N:M)"):
        parse_scheme(scheme, {"blocks": 4}, "subset")


def test_a_uniform_scheme_fills_every_list_without_crossing() -> None:
    groups = parse_scheme("1:2", {"encoder_blocks": 4, "decoder_blocks": 2})
    assert {name: [g.start for g in listed] for name, listed in groups.items()} == {
        "encoder_blocks": [0, 2],
        "decoder_blocks": [0],
    }


@pytest.mark.parametrize(
    ("scheme", "depth", "message"),
    [
        ("2:4", 14, r"divisible by 4; the model has 14.*try 1:2 or .*7.*2:4x3\+1:2"),
        ("1:2", 7, "divisible by 2; the model has 7"),
        ("5:14", 6, "divisible by 14; the model has 6"),
        ("2:4x3+3:4x4", 12, "covers 28 blocks; the model has 12"),
        ("1:2x2", 12, "covers 4 blocks; the model has 12"),
        ("3:2", 12, "3:2 must keep at least 1 and at most 2"),
        ("0:2", 12, "0:2 must keep at least 1"),
        ("0:0", 12, "0:0 must keep at least 1"),
        ("half", 12, "is not N:M"),
        ("1:2+", 12, "is not N:M"),
        ("", 12, "is not N:M"),
        ("-1:2", 12, "is not N:M"),
        ("14:28", 28, "40,116,600 candidates"),
    ],
)
def test_schemes_that_do_not_fit_say_why(scheme: str, depth: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_scheme(scheme, {"blocks": depth})


@pytest.mark.parametrize("depth", [1, 5, 6, 9, 14, 27, 29, 31])
@pytest.mark.parametrize("scheme", ["2:4", "1:3", "4:8", "7:14", "5:11", "1:40"])
def test_suggested_schemes_fit(scheme: str, depth: int) -> None:
    message = ""
    try:
        parse_scheme(scheme, {"blocks": depth})
    except UserError as error:
        message = str(error)
    suggestions = re.findall(r"(?:\(try | or )(\S+?)(?=\)| or )", message)
    assert bool(suggestions) == bool(message)
    for suggestion in suggestions:
        assert parse_scheme(suggestion, {"blocks": depth})["blocks"], suggestion


# ----------------------------------------------------------------------------------------------- decision, schedules


@pytest.mark.parametrize("steps", [1, 2, 3, 100, 10_009])
@pytest.mark.parametrize("ends", [(4.0, 0.1), (100.0, 100.0), (1e-2, 0.0), (0.3, 0.7)])
def test_schedules_are_exact_at_both_ends(ends: tuple[float, float], steps: int) -> None:
    values = [linear(ends, step, steps) for step in range(steps)]
    assert values[0] == ends[0]
    if steps > 1:
        assert values[-1] == ends[1]
    assert all(min(ends) <= value <= max(ends) for value in values)


def test_published_temperatures() -> None:
    assert linear((4.0, 0.1), 5000, 10_009) == pytest.approx(2.0516, abs=5e-5)
    assert linear((4.0, 0.1), 8000, 10_009) == pytest.approx(0.8825, abs=5e-5)


def test_equal_logits_decide_for_the_first_candidates() -> None:
    gates = gates_for([(2, 4)] * 7)
    for index, theta in enumerate(gates.logits):
        assert gates.kept(index, theta) == [4 * index, 4 * index + 1]
        assert gates.probabilities(index, theta, 100.0) == pytest.approx([1 / 6] * 6)


@given(pairs=groups_of_any_kind, seed=st.integers(0, 99))
def test_the_decision_is_the_most_probable_candidate_of_each_group(pairs: list[tuple[int, int]], seed: int) -> None:
    gates = gates_for(pairs)
    logits = [g[0] for g in gumbel_for(gates, seed, 1)]
    for index, (group, theta) in enumerate(zip(gates.groups, logits, strict=True)):
        row = gates.probabilities(index, theta, 2.0)
        best = group.candidates()[max(range(len(row)), key=row.__getitem__)]
        assert gates.kept(index, theta) == list(best)
        assert sum(row) == pytest.approx(1.0, abs=1e-5)
