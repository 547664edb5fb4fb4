"""Dynamic models: routers, the realisations of a block, what is counted, and files of the published layouts."""

from __future__ import annotations

import copy
import dataclasses
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from tinyfusion.blocks.dynamics import BlockMasks, BlockSizes, Deciding, block_ratio, bucket, model_ratio, total_macs
from tinyfusion.blocks.forwards import CompiledForwards
from tinyfusion.blocks.routers import DynamicSettings, is_router_key, settings_of, straight_through
from tinyfusion.blocks.streams import Streams
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.core.signals import Interrupted, SignalWatch
from tinyfusion.dynamic.subnetworks import KeepTables, SlicedWeights, SubNetworks, rehearsed, resolve
from tinyfusion.dynamic.train import calibrate, inference_ratio
from tinyfusion.families.dit.model import DiTArch, published_arch
from tinyfusion.families.registry import FAMILIES
from tinyfusion.models.attach import attach, detached, order_by_importance
from tinyfusion.models.checkpoint import LoadedModel, open_model
from tinyfusion.models.facts import ModelFacts
from tinyfusion.models.loaded import DynamicModel
from tinyfusion.models.macs import count_macs
from tinyfusion.sample.drive import SampleDraws, sample
from tinyfusion.sample.gaussian import GaussianSampler

DIT = FAMILIES["dit"]
LAYOUTS = {"layout 1": False, "layout 2": True}
PUBLISHED = [("DiT-S/2", 32_963_360, 157_380), ("DiT-B/2", 130_512_416, 646_548), ("DiT-XL/2", 675_129_632, 3_295_012)]
ModelFactory = Callable[..., LoadedModel]


def moved(dynamic: DynamicModel, seed: int = 1, width: float = 1.0) -> DynamicModel:
    """The model with routers that decide this way and that."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in dynamic.routers().items():
            parameter.normal_(std=width if "weight" in name else 0.3, generator=generator)
    return dynamic


@pytest.fixture
def routed(tiny_model: ModelFactory) -> Callable[..., DynamicModel]:
    """routed(heads=4, **settings): a tiny model whose routers keep some of everything."""

    def make(heads: int = 4, blocks: int = 3, **settings: Any) -> DynamicModel:
        model = tiny_model(num_heads=heads, hidden_size=32, depth=blocks)
        return moved(attach(model.copy(), DynamicSettings(**settings)))

    return make


def inputs(model: LoadedModel, num: int = 3, t: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num, model.arch.in_channels, model.arch.input_size, model.arch.input_size, generator=generator)
    times = torch.tensor([17, 900, 402, 3, 77, 650])[:num] if t is None else torch.full((num,), t)
    return x, times, torch.arange(num) % (model.arch.num_classes + 1)


# ------------------------------------------------------------------------------------------------------- attach, layout


@pytest.mark.parametrize(("name", "base", "routers"), PUBLISHED)
def test_published_sizes(name: str, base: int, routers: int) -> None:
    arch = published_arch(name)
    with torch.device("meta"):
        module = DIT.build(arch)
    plain = set(module.state_dict())
    assert sum(p.numel() for p in module.parameters()) == base
    dynamic = attach(LoadedModel(module, DIT, arch, ModelFacts(256)), DynamicSettings())
    assert sum(p.numel() for p in dynamic.routers().values()) == routers
    keys = set(dynamic.module.state_dict())
    assert {key for key in keys if not is_router_key(key)} == plain
    assert len(keys) - len(plain) == 8 * arch.depth
    if name == "DiT-XL/2":
        assert (len(keys), len(keys - plain)) == (516, 224)
        shapes = {key.removeprefix("blocks.3."): tuple(v.shape) for key, v in dynamic.module.state_dict().items()}
        assert shapes["attn_rate.router.weight"] == shapes["mlp_rate.router.weight"] == (15, 1152)
        assert shapes["token_selection.mlp_head.0.weight"] == (72, 1152)
        assert shapes["token_selection.mlp_head.2.bias"] == (1,)


@pytest.mark.parametrize("forced_first", LAYOUTS.values(), ids=LAYOUTS)
@torch.no_grad()
def test_everything_is_on_at_first_and_equals_the_static_model(tiny_model: ModelFactory, forced_first: bool) -> None:
    model = tiny_model(num_heads=4)
    expected = model.module(*inputs(model))
    dynamic = attach(model.copy(), DynamicSettings(forced_first=forced_first, depth=True, width_bias=99, token_bias=99))
    assert torch.equal(dynamic.module(*inputs(model)), expected)
    with dynamic.complete():
        assert torch.equal(dynamic.module(*inputs(model)), expected)
    plain = detached(dynamic)
    assert torch.equal(plain.module(*inputs(model)), expected)
    assert set(plain.module.state_dict()) == set(model.module.state_dict())


@torch.no_grad()
def test_complete_is_static_whatever_the_routers_say(routed: Callable[..., DynamicModel]) -> None:
    dynamic = routed()
    expected = detached(dynamic).module(*inputs(dynamic.loaded))
    assert not torch.equal(dynamic.module(*inputs(dynamic.loaded)), expected)
    with dynamic.complete():
        assert torch.equal(dynamic.module(*inputs(dynamic.loaded)), expected)


@torch.no_grad()
def test_copies_are_independent(routed: Callable[..., DynamicModel]) -> None:
    dynamic = routed()
    own = dynamic.module(*inputs(dynamic.loaded))
    bare = copy.deepcopy(dynamic.module)  # as the loop's callers copy, without knowing of routers
    other = dynamic.copy()
    for parameter in other.module.parameters():
        parameter.zero_()
    assert torch.equal(dynamic.module(*inputs(dynamic.loaded)), own)
    assert torch.equal(bare(*inputs(dynamic.loaded)), own)
    with other.complete():
        assert torch.equal(bare(*inputs(dynamic.loaded)), own)


def test_what_cannot_be_attached_says_why(tiny_model: ModelFactory, routed: Callable[..., DynamicModel]) -> None:
    with pytest.raises(UserError, match="has routers already"):
        attach(routed().loaded, DynamicSettings())
    with pytest.raises(ValueError, match="all three are off"):
        DynamicSettings(width=False, tokens=False)
    with pytest.raises(UserError, match="10 hidden channels of an MLP cannot be split into 4 equal groups"):
        attach(tiny_model(num_heads=4, mlp_hidden=10), DynamicSettings())
    with pytest.raises(UserError, match="with one head"):
        attach(tiny_model(num_heads=1), DynamicSettings())
    static = dataclasses.replace(tiny_model(), family=dataclasses.replace(DIT, dynamic=None))
    with pytest.raises(UserError, match="family dit cannot be made dynamic"):
        attach(static, DynamicSettings())


def test_blocks_are_called_by_position_and_by_keyword(routed: Callable[..., DynamicModel]) -> None:
    dynamic = routed()
    generator = torch.Generator().manual_seed(2)
    x, c = torch.randn(3, 4, 32, generator=generator), torch.randn(3, 32, generator=generator)
    with torch.inference_mode():
        for block in dynamic.stack:
            wanted = block(x, c)
            assert torch.equal(block(c=c, x=x), wanted) and torch.equal(block(x, c=c), wanted)


def test_routers_need_blocks_of_one_stream(tiny_model: ModelFactory) -> None:
    """Their declaration is read, as gates and taps do."""
    model = tiny_model(num_heads=4, hidden_size=32).copy()
    two = Streams(("x", "c"), returns=("c", "x"))
    model.family = dataclasses.replace(model.family, streams={"blocks": two})
    with pytest.raises(UserError, match="block blocks.0 has x, c"):
        attach(model, DynamicSettings())
    assert not any(hasattr(block, "attn_rate") for block in model.stack), "nothing is attached"
    model = tiny_model(num_heads=4, hidden_size=32).copy()
    model.family = dataclasses.replace(model.family, streams={"blocks": Streams(("x",), returns=("x",))})
    attach(model, DynamicSettings())
    out = model.stack.model.blocks[0](torch.zeros(1, 4, 32), torch.zeros(1, 32))  # type: ignore[index]
    assert isinstance(out, tuple) and out[0].shape == (1, 4, 32), "in the form of the declaration"


# ------------------------------------------------------------------------------------------------------------ decisions


@pytest.mark.parametrize("temperature", [0.5, 5.0, 50.0])
@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.1])
def test_probability_is_the_sigmoid_at_any_temperature(logit: float, temperature: float) -> None:
    num = 200_000
    u = torch.linspace(0.5 / num, 1 - 0.5 / num, num, dtype=torch.float64)
    noise = (u / (1 - u)).log().float()
    mask = straight_through(torch.full((num,), logit), noise, temperature)
    assert set(mask.tolist()) <= {0.0, 1.0}
    assert float(mask.mean()) == pytest.approx(torch.sigmoid(torch.tensor(logit)).item(), abs=1e-4)


def test_surrogate_gradient() -> None:
    logits = torch.tensor([15.0, 35.0], requires_grad=True)
    straight_through(logits, torch.zeros(2), 5.0).sum().backward()
    soft = torch.sigmoid(logits.detach() / 5)
    assert torch.allclose(logits.grad, soft * (1 - soft) / 5)
    assert logits.grad.tolist() == pytest.approx([9.0e-3, 1.8e-4], rel=0.1)


@torch.no_grad()
def test_routers_stay_in_float32_under_autocast(routed: Callable[..., DynamicModel]) -> None:
    dynamic = routed()
    block = next(iter(dynamic.stack))
    embedding, x = torch.randn(2, 32), torch.randn(2, 4, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(block.attn_rate.logits(embedding), copy.deepcopy(block.attn_rate).logits(embedding))
        under = block.token_selection.logits(x)
    assert under.dtype == torch.float32 and torch.equal(under, block.token_selection.logits(x))


@torch.no_grad()
def test_routers_stay_in_float32_when_a_model_is_cast(routed: Callable[..., DynamicModel]) -> None:
    dynamic = routed()
    before = {name: p.detach().clone() for name, p in dynamic.routers().items()}
    dynamic.module.to(torch.bfloat16)
    assert all(torch.equal(p, before[name]) for name, p in dynamic.routers().items())
    assert next(dynamic.module.parameters()).dtype == torch.bfloat16
    way = SubNetworks(dynamic, resolve(dynamic, [402.0]))
    x, t, y = inputs(dynamic.loaded, 3, 402)
    expected = dynamic.module(x.bfloat16(), t, y)
    with dynamic.using(way):
        found = dynamic.module(x.bfloat16(), t, y)
    assert torch.allclose(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


# ---------------------------------------------------------------------------------------------------- sub-networks


@pytest.mark.parametrize("mode", ["gathered", "bucketed", "masked"])
@pytest.mark.parametrize("forced_first", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kinds", [{}, {"tokens": False}, {"width": False}, {"depth": True}], ids=str)
@torch.no_grad()
def test_sliced_equals_masked(routed: Callable[..., DynamicModel], forced_first: bool, kinds: Any, mode: Any) -> None:
    dynamic = routed(forced_first=forced_first, **kinds)
    way = SubNetworks(dynamic, resolve(dynamic, [17.0, 402.0, 900.0]), mode)
    for t in (900, 17, 402, 17):
        batch, reference = inputs(dynamic.loaded, 5, t), Deciding()
        with dynamic.using(reference):
            expected = dynamic.module(*batch)
        before = way._done, way._rows_run
        with dynamic.using(way):
            ours = dynamic.module(*batch)
        assert torch.allclose(ours, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
        whole = dynamic.sizes.attention_macs + dynamic.sizes.mlp_macs
        ratio = float(model_ratio(reference.masks, dynamic.sizes, 5).mean())
        assert float(way._done - before[0]) / (5 * len(dynamic.stack) * whole) == pytest.approx(ratio, rel=1e-5)
    assert way.report()["timesteps"] == 3 and 0 < way.ratio < 1


@pytest.mark.parametrize("mode", ["gathered", "bucketed", "masked"])
@pytest.mark.parametrize("bias", [-1e4, 1e4], ids=["no token", "every token"])
@torch.no_grad()
def test_no_token_and_every_token(routed: Callable[..., DynamicModel], bias: float, mode: Any) -> None:
    dynamic = routed()
    for block in dynamic.stack:
        block.token_selection.mlp_head[2].bias.fill_(bias)
    batch = inputs(dynamic.loaded, 3, 402)
    expected = dynamic.module(*batch)
    with dynamic.using(SubNetworks(dynamic, resolve(dynamic, [402.0]), mode)):
        assert torch.allclose(dynamic.module(*batch), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("kinds", [{}, {"tokens": False}], ids=str)
@torch.no_grad()
def test_compiled_passes(routed: Callable[..., DynamicModel], kinds: Any) -> None:
    """Few graphs, whatever runs, and the same values."""
    torch._dynamo.reset()
    counters.clear()
    dynamic = routed(**kinds)
    way = SubNetworks(dynamic, resolve(dynamic, [17.0, 402.0, 900.0]), forms=CompiledForwards("aot_eager"))
    for t in (900, 17, 402, 900):
        batch = inputs(dynamic.loaded, 5, t)
        expected = dynamic.module(*batch)
        with dynamic.using(way):
            assert torch.allclose(dynamic.module(*batch), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert 0 < counters["stats"]["unique_graphs"] <= 8


@torch.no_grad()
def test_no_head_and_no_group_leave_the_output_biases(routed: Callable[..., DynamicModel]) -> None:
    dynamic = routed(forced_first=False, tokens=False)
    for block in dynamic.stack:
        block.attn_rate.router.bias.fill_(-1e4)
        block.mlp_rate.router.bias.fill_(-1e4)
    batch = inputs(dynamic.loaded, 3, 402)
    expected, way = dynamic.module(*batch), SubNetworks(dynamic, resolve(dynamic, [402.0]))
    with dynamic.using(way):
        assert torch.allclose(dynamic.module(*batch), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert way.ratio == 0


@torch.no_grad()
def test_times_that_were_not_resolved_and_batches_of_several(routed: Callable[..., DynamicModel]) -> None:
    dynamic = routed()
    way = SubNetworks(dynamic, resolve(dynamic, [1.0]))
    for t in (402, None):
        batch = inputs(dynamic.loaded, 3, t)
        expected = dynamic.module(*batch)
        with dynamic.using(way):
            assert torch.allclose(dynamic.module(*batch), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert way.tables.timesteps == (1.0, 402.0)


@torch.no_grad()
def test_announced_times_are_checked(routed: Callable[..., DynamicModel]) -> None:
    dynamic = routed(tokens=False)
    way = SubNetworks(dynamic, resolve(dynamic, [402.0, 17.0]), calls=[402.0, 17.0], reads_times=False)
    with dynamic.using(way):
        for t in (402, 17, 402, 17):
            dynamic.module(*inputs(dynamic.loaded, 2, t))
        way.check()
        dynamic.module(*inputs(dynamic.loaded, 2, 17))
    with pytest.raises(UserError, match="1 forward passes were at other times"):
        way.check()


@torch.no_grad()
def test_modulations_ahead(routed: Callable[..., DynamicModel]) -> None:
    """In the announced order each weight is read once for many passes; in any other order the values are right too."""
    dynamic = routed(tokens=False)
    announced = [900.0, 700.0, 402.0, 700.0, 17.0]
    way = SubNetworks(dynamic, resolve(dynamic, sorted(set(announced))), calls=announced)
    products = 0

    def counted(*_: object) -> None:
        nonlocal products
        products += 1

    hook = next(iter(dynamic.stack)).adaLN_modulation.register_forward_hook(counted)

    def agree(t: float, labels: Tensor) -> None:
        x, _, _ = inputs(dynamic.loaded, len(labels))
        batch = x, torch.full((len(labels),), int(t)), labels
        with dynamic.using(Deciding()):
            expected = dynamic.module(*batch)
        with dynamic.using(way):
            assert torch.allclose(dynamic.module(*batch), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))

    for _ in range(2):
        for t in announced:
            agree(t, torch.tensor([1, 2, 0]))
    assert products == 10 + 2  # the reference's, and one in each round
    for t, labels in [(900, [0, 1]), (700, [2, 1]), (17, [2, 1]), (3, [2, 1]), (402, [2]), (700, [2]), (17, [2])]:
        agree(t, torch.tensor(labels))
    hook.remove()


def tables(heads: list[list[int]], groups: list[list[int]], num: int = 4) -> KeepTables:
    """Of one block, from lists of units per timestep."""

    def masks(listed: list[list[int]]) -> Tensor:
        found = torch.zeros(len(listed), 1, num, dtype=torch.bool)
        for row, units in enumerate(listed):
            found[row, 0, units] = True
        return found

    times = tuple(float(i) for i in range(len(heads)))
    return KeepTables(times, masks(heads), masks(groups), torch.ones(len(heads), 1, dtype=torch.bool))


def weights_made(weights: SlicedWeights, masks: KeepTables, rows: Sequence[int]) -> int:
    """How often weights were sliced, while these sub-networks ran one after another."""
    plain, made = weights._taken, 0

    def counted(*args: Any) -> Any:
        nonlocal made
        made += 1
        return plain(*args)

    weights._taken = counted  # type: ignore[method-assign]
    for row in rows:
        found = weights.of(masks.heads[row, 0], masks.groups[row, 0])
        assert found.heads.number == int(masks.heads[row, 0].sum()) and found.groups.number == int(
            masks.groups[row, 0].sum()
        )
    return made


@torch.no_grad()
def test_nested_masks_are_views_and_others_are_copied_once(routed: Callable[..., DynamicModel]) -> None:
    dynamic = routed(blocks=1, tokens=False)
    nested = SubNetworks(dynamic, tables([[2], [2, 0], [2, 0, 3]], [[1], [1, 2], [1, 2]])).weights[0]
    for row, (heads, groups) in enumerate([(1, 1), (2, 2), (3, 2)]):
        found = nested.of(
            *(getattr(tables([[2], [2, 0], [2, 0, 3]], [[1], [1, 2], [1, 2]]), n)[row, 0] for n in ("heads", "groups"))
        )
        assert (found.heads.number, found.groups.into.out_features) == (heads, groups * 32)
        for own, whole in ((found.heads, nested.layout["heads"]), (found.groups, nested.layout["groups"])):
            assert own.into.weight.untyped_storage().data_ptr() == whole.into.weight.untyped_storage().data_ptr()
    assert not nested.copies
    assert [nested.layout[kind].into.out_features for kind in ("heads", "groups")] == [3 * 3 * 8, 2 * 32]
    crossed = tables([[0, 1], [2, 3], [0, 1]], [[0], [1], [0]])
    weights = SubNetworks(dynamic, crossed).weights[0]
    first = [weights.of(crossed.heads[row, 0], crossed.groups[row, 0]) for row in (0, 1, 1)]
    assert first[1].heads is first[2].heads and set(weights.copies) and len(weights.copies) <= 3
    tight = SubNetworks(dynamic, crossed, cache_bytes=1).weights[0]
    for row in (0, 1, 2):
        tight.of(crossed.heads[row, 0], crossed.groups[row, 0])
    assert len(tight.copies) == 2  # one of heads, one of groups
    room = weights.bytes * 2 // 3
    assert weights_made(SubNetworks(dynamic, crossed, cache_bytes=room).weights[0], crossed, (0, 1, 0, 1, 0, 1)) < 12
    assert nested.bytes < weights.bytes


def test_buckets() -> None:
    assert [bucket(k, 1000) for k in (1, 128, 129, 990)] == [128, 128, 256, 1000]


def test_report_of_tables() -> None:
    found = tables([[0, 1], [0, 1], [0]], [[0], [0], [0, 1, 2]]).report()
    assert found == {"timesteps": 3, "sub_networks": 2, "mean_heads": pytest.approx(5 / 12),
                     "mean_groups": pytest.approx(5 / 12), "mean_blocks": 1.0}  # fmt: skip


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize(("name", "steps"), [("ddpm", 4), ("ddim", 4), ("dpm-solver++", 4)])
def test_sampling_with_and_without_guidance(
    routed: Callable[..., DynamicModel], guidance: float, name: Any, steps: int
) -> None:
    """Sub-networks resolved before the first step give the images of the reference, and no time is a surprise."""
    dynamic = routed()
    sampler = GaussianSampler(sampler=name, num_steps=steps, guidance=guidance)
    labels = np.arange(3)
    expected = next(iter(sample(dynamic.loaded, labels, sampler, seed=0))).x
    one = SampleDraws(Randomness(0), 0, 1, torch.device("cpu"))
    calls = rehearsed(
        dynamic.loaded,
        lambda model: sampler.trajectory(model, class_condition(torch.zeros(1, dtype=torch.int64), 5), one),
    )
    assert len(calls) == sampler.calls
    way = SubNetworks(dynamic, resolve(dynamic, sorted(set(calls))), calls=calls)
    with dynamic.using(way):
        found = next(iter(sample(dynamic.loaded, labels, sampler, seed=0))).x
    way.check()
    assert way.passes == len(calls) and len(way.tables.timesteps) == len(set(calls))
    assert torch.allclose(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


# ------------------------------------------------------------------------------------------------------ what it costs


@pytest.mark.parametrize(
    ("name", "attention", "mlp", "total"),
    [
        ("DiT-S/2", 0.201326592, 0.301989888, 6.0655),
        ("DiT-B/2", 0.704643072, 1.207959552, 23.0248),
        ("DiT-XL/2", 1.50994944, 2.717908992, 118.6887),
    ],
)
def test_published_multiply_accumulates(name: str, attention: float, mlp: float, total: float) -> None:
    arch = published_arch(name)
    assert DIT.dynamic is not None
    sizes = DIT.dynamic.sizes(arch)
    assert sizes.attention_macs / 1e9 == pytest.approx(attention, rel=1e-9)
    assert sizes.mlp_macs / 1e9 == pytest.approx(mlp, rel=1e-9)
    static = count_macs(lambda: DIT.build(arch), lambda: DIT.example(arch, 1))
    assert static / 1e9 == pytest.approx(total, abs=5e-5)
    assert total_macs(static, sizes, arch.depth, 1.0, tokens=False) == static
    if name == "DiT-XL/2":
        assert total_macs(static, sizes, arch.depth, 0.5, tokens=True) / 1e9 == pytest.approx(60.09, abs=0.01)
        assert (total_macs(static, sizes, 28, 1.0, tokens=True) - static) / 1e9 == pytest.approx(0.5951, abs=1e-4)
        large = DIT.dynamic.sizes(published_arch(name, 512))
        assert (large.attention_macs, large.mlp_macs) == (7_851_737_088, 10_871_635_968)


def test_ratio_of_masks() -> None:
    sizes = BlockSizes(width=8, num_heads=2, head_width=4, mlp_width=32, num_tokens=4)
    on, off = torch.ones(1, 2), torch.tensor([[1.0, 0.0]])
    a, m = sizes.attention_macs, sizes.mlp_macs
    half = BlockMasks(heads=off, groups=off, tokens=torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert float(block_ratio(BlockMasks(heads=on), sizes, 1)) == 1
    assert float(block_ratio(half, sizes, 1)) == pytest.approx((a / 2 + m / 8) / (a + m))
    gone = dataclasses.replace(half, gate=torch.zeros(1))
    assert float(model_ratio({0: half, 1: gone}, sizes, 1)) == pytest.approx((a / 2 + m / 8) / (a + m) / 2)


# ------------------------------------------------------------------------------------------- order, budget, files


@torch.no_grad()
def test_order_by_importance_keeps_the_function(tiny_model: ModelFactory) -> None:
    model = tiny_model(num_heads=4, hidden_size=32).copy()
    expected = model.module(*inputs(model))
    before = copy.deepcopy(model.module)
    orders = order_by_importance(model)
    assert torch.allclose(model.module(*inputs(model)), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert DIT.dynamic is not None
    sizes = DIT.dynamic.sizes(model.arch)
    for i, block in enumerate(model.stack):
        for scores in DIT.dynamic.scores(block, sizes):
            assert torch.equal(scores, scores.sort(descending=True).values)
        assert torch.equal(block.mlp.fc1.weight, before.blocks[i].mlp.fc1.weight[orders[i][1]])
    heads = orders[0][0]
    assert sorted(heads) == [0, 1, 2, 3] and heads != [0, 1, 2, 3]


def passes(dynamic: DynamicModel, batches: Sequence[tuple[Tensor, ...]]) -> list[tuple[int, Callable[[], object]]]:
    """A forward pass per batch of inputs."""
    return [(len(batch[0]), partial(dynamic.module, *batch)) for batch in batches]


@pytest.mark.parametrize("target", [0.5, 0.7])
def test_calibration_meets_the_budget(routed: Callable[..., DynamicModel], target: float) -> None:
    dynamic = routed(blocks=4)
    batches = [inputs(dynamic.loaded, 6), inputs(dynamic.loaded, 6, 500), inputs(dynamic.loaded, 6, 50)]
    offset, reached = calibrate(dynamic, target, lambda: inference_ratio(dynamic, passes(dynamic, batches)))
    assert abs(reached - target) <= 0.01 * target
    assert inference_ratio(dynamic, passes(dynamic, batches)) == reached and offset != 0


def test_measuring_the_ratio_obeys_a_stop_that_was_dropped(
    routed: Callable[..., DynamicModel],
) -> None:
    dynamic = routed(blocks=4)

    def measure(watch: SignalWatch) -> None:
        watch.stop = signal.SIGTERM  # as a signal in a destructor leaves it
        inference_ratio(dynamic, passes(dynamic, [inputs(dynamic.loaded, 6)] * 3))
        raise AssertionError("went on")

    with pytest.raises(Interrupted), SignalWatch(patient=False) as watch:
        measure(watch)


def test_calibration_goes_on_within_its_tolerance(routed: Callable[..., DynamicModel]) -> None:
    """Other images differ by some of the tolerance; where the ratio moves smoothly the search leaves it to them."""
    dynamic = routed(tokens=False)
    bias = next(p for name, p in dynamic.routers().items() if name.endswith("attn_rate.router.bias"))
    measured = []

    def smooth() -> float:
        measured.append(float(torch.sigmoid(bias.detach().mean() + 1)))
        return measured[-1]

    _, reached = calibrate(dynamic, 0.6, smooth)
    assert abs(reached - 0.6) <= 0.0006 and len(measured) < 20
    measured.clear()
    _, again = calibrate(dynamic, 0.6, smooth)
    assert again == reached and len(measured) == 1, "a target that is met already changes nothing"


def test_calibration_refuses_what_cannot_be_reached(routed: Callable[..., DynamicModel]) -> None:
    dynamic = routed(width=False)  # attention always runs whole: more than 5 %
    before = {name: p.detach().clone() for name, p in dynamic.routers().items()}
    with pytest.raises(UserError, match=r"within 1%: the nearest is 0\.\d+"):
        calibrate(dynamic, 0.05, lambda: inference_ratio(dynamic, passes(dynamic, [inputs(dynamic.loaded, 6)])))
    assert all(torch.equal(p, before[name]) for name, p in dynamic.routers().items())


def opened(content: Any, path: Path, num_heads: int = 4, weights: str = "ema") -> DynamicModel:
    """The model of a file with this content."""
    torch.save(content, path)
    dynamic = open_model(path, weights, num_heads, "dit").dynamic
    assert dynamic is not None
    return dynamic


@pytest.mark.parametrize("forced_first", LAYOUTS.values(), ids=LAYOUTS)
@torch.no_grad()
def test_published_files_of_both_layouts(
    routed: Callable[..., DynamicModel], forced_first: bool, tmp_path: Path
) -> None:
    dynamic = routed(forced_first=forced_first)
    tensors = {f"module.{name}": value for name, value in dynamic.module.state_dict().items()}
    half = {name: value / 2 for name, value in tensors.items()}
    file = {"model": half, "ema": tensors, "opt": {}}
    found = opened(file, tmp_path / "file.pt")
    assert found.settings.forced_first is forced_first and found.loaded.hash() == dynamic.loaded.hash()
    assert torch.equal(found.module(*inputs(dynamic.loaded)), dynamic.module(*inputs(dynamic.loaded)))
    raw = opened(file, tmp_path / "file.pt", weights="raw").module.state_dict()
    assert torch.equal(raw["pos_embed"], dynamic.module.state_dict()["pos_embed"] / 2)
    assert {n for n in raw if not is_router_key(n)} == set(detached(found).module.state_dict())


def test_files_that_are_not_dynamic_models(routed: Callable[..., DynamicModel], tmp_path: Path) -> None:
    tensors, file = dict(routed().module.state_dict()), tmp_path / "file.pt"
    static = {name: v for name, v in tensors.items() if not is_router_key(name)}
    with pytest.raises(ValueError, match="no routers"):
        settings_of(static, 4)
    torch.save(static, file)
    assert open_model(file, num_heads=4, family="dit").dynamic is None
    with pytest.raises(UserError, match=r"8 outputs .* or 7 .*got 3"):
        opened(tensors, file, 8)
    for change, words in (
        ({"blocks.1.attn_rate.router.bias": None}, "missing blocks.1.attn_rate.router.bias"),
        ({"blocks.1.attn_rate.other": torch.zeros(1)}, "unexpected blocks.1.attn_rate.other"),
        ({"blocks.1.attn_rate.router.bias": torch.zeros(2)}, r"router.bias is \(2,\), wanted \(3,\)"),
        ({"blocks.1.attn_rate.router.bias": torch.full((3,), torch.nan)}, "not finite"),
        (
            {f"module.{name}": value for name, value in tensors.items()},
            "holds pos_embed twice",
        ),  # in addition to plain names
        ({"opt": 3}, "no state dict of tensors"),
    ):
        wrong = {name: value for name, value in {**tensors, **change}.items() if value is not None}
        with pytest.raises(UserError, match=words):
            opened(wrong, file)


def test_formats_that_cannot_hold_routers(routed: Callable[..., DynamicModel], tiny_model: ModelFactory) -> None:
    assert set(routed().loaded.unfit_formats()) == {"diffusers"}
    gated = attach(tiny_model(num_heads=4, hidden_size=32, depth=3).copy(), DynamicSettings(depth=True))
    assert "no keys" in gated.loaded.unfit_formats()["official"]
    assert "no routers of tokens" in routed(tokens=False).loaded.unfit_formats()["official"]


def test_a_student_cut_before_is_no_special_case(tiny_model: ModelFactory, tmp_path: Path) -> None:
    model = tiny_model(num_heads=4, depth=4).copy()
    model.stack.keep({"blocks": [0, 2]})
    model.arch = DIT.arch_with_depths(model.arch, model.stack.depths())
    dynamic = attach(model, DynamicSettings())
    found = opened(dynamic.module.state_dict(), tmp_path / "file.pt")
    assert isinstance(found.loaded.arch, DiTArch) and found.loaded.arch.depth == 2
