"""Packed linear layers: the numbers of plain ones in the same type, eager and compiled, and nothing kept once they go."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

from tinyfusion.blocks import packed as packed_module
from tinyfusion.blocks.dynamics import Deciding
from tinyfusion.blocks.packed import PackedLinear, can_pack, gelu_linear, held_bytes, pack, row_step
from tinyfusion.blocks.packed_int8 import Int8Linear, can_quantize
from tinyfusion.blocks.routers import DynamicSettings
from tinyfusion.dynamic.subnetworks import SubNetworks, resolve
from tinyfusion.jobs.sampling_setup import in_dtype
from tinyfusion.models.attach import attach
from tinyfusion.models.checkpoint import LoadedModel, new_model

CPU = torch.device("cpu")
WIDE = dict(input_size=4, patch_size=2, in_channels=4, hidden_size=512, depth=3, num_heads=8, num_classes=5)

pytestmark = pytest.mark.skipif(not can_pack(torch.bfloat16, CPU), reason="oneDNN has no bfloat16 on this processor")


def wide() -> LoadedModel:
    """A model of random weights whose layers are large enough to be packed."""
    model, generator = new_model("dit", WIDE, 0), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.normal_(std=0.04, generator=generator)
    return model


def answer(model: LoadedModel) -> Tensor:
    x = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    held_in = next(model.module.parameters()).dtype
    with torch.inference_mode():
        out: Tensor = model.module(x.to(held_in), torch.tensor([0, 400, 999]), torch.tensor([0, 3, 5])).float()
    return out


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_a_packed_layer_gives_the_numbers_of_the_plain_one(bias: bool, approximate: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(192, 320, bias=bias).to(torch.bfloat16)
    x = torch.randn(2, 7, 192).to(torch.bfloat16)
    packed = PackedLinear(layer)
    with torch.inference_mode():
        exact = layer.float()(x.float())
        layer.to(torch.bfloat16)
        assert packed(x).dtype == torch.bfloat16 and packed(x).shape == (2, 7, 320)
        assert torch.allclose(packed(x).float(), exact, rtol=2**-7, atol=2**-8)
        after = F.gelu(exact, approximate=approximate)
        assert torch.allclose(gelu_linear(packed, x, approximate).float(), after, rtol=2**-6, atol=2**-7)
        assert torch.equal(gelu_linear(layer, x, approximate), F.gelu(layer(x), approximate=approximate))


@pytest.mark.parametrize(("rows", "inner", "columns"), [(9, 200, 64), (512, 96, 128), (640, 1200, 1152), (2, 40, 1600)])
def test_sizes_that_are_multiplied_in_another_way(rows: int, inner: int, columns: int) -> None:
    """Inner sizes that no matrix unit has are padded, and some products are split."""
    torch.manual_seed(0)
    layer = nn.Linear(inner, columns).to(torch.bfloat16)
    x = (
        torch.randn(2, rows // 2, inner).to(torch.bfloat16)
        if rows % 2 == 0
        else torch.randn(rows, inner).to(torch.bfloat16)
    )
    with torch.inference_mode():
        packed = PackedLinear(layer)
        found, exact = packed(x), layer.float()(x.float())
    assert found.shape == exact.shape and torch.allclose(found.float(), exact, rtol=2**-7, atol=2**-7)
    assert packed.num_bytes == 2 * columns * (inner + -inner % 32 + 1)


def test_few_numbers_of_rows() -> None:
    packed = PackedLinear(nn.Linear(64, 64).to(torch.bfloat16))
    for most in (16, 512, 2048, 5000):
        step = row_step(packed, most)
        assert step % 16 == 0 and most / step <= 32
    assert row_step(nn.Linear(64, 64), 512) == 1


@pytest.mark.parametrize("tokens", [False, True])
@torch.no_grad()
def test_sub_networks_are_packed(monkeypatch: pytest.MonkeyPatch, tokens: bool) -> None:
    """In bfloat16 their layers are packed ones, copies of every mask, as near to float32 as the masked form is.

    The routers of tokens keep the same tokens in both types here: logits are far from 0.
    """
    monkeypatch.setattr(packed_module, "_SMALLEST", 1)
    dynamic = attach(wide(), DynamicSettings(tokens=tokens))
    for name, parameter in dynamic.routers().items():
        parameter.normal_(std=1e-4 if "mlp_head.0.weight" in name else 1.0, generator=torch.Generator().manual_seed(1))
    if tokens:
        for block, sign in zip(
            dynamic.stack, (-1, 1, -1), strict=True
        ):  # of 4 tokens per image those with x[..., 0] > 0, or others
            block.token_selection.mlp_head[0].weight[0, 0] = 100.0 * sign
            block.token_selection.mlp_head[2].weight.zero_()[0, 0] = 1.0
            block.token_selection.mlp_head[0].bias[0] = 0.0
            block.token_selection.mlp_head[2].bias.fill_(-1.0)
    tables = resolve(dynamic, [400.0, 17.0])

    def answers(model: LoadedModel, t: int) -> Tensor:
        x = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
        held_in = next(model.module.parameters()).dtype
        out: Tensor = model.module(x.to(held_in), torch.full((3,), t), torch.tensor([0, 3, 5])).float()
        return out

    reference = Deciding()
    with dynamic.using(reference):
        exact = {t: answers(dynamic.loaded, t) for t in (400, 17)}
    if tokens:
        kept = [float(masks.tokens.mean()) for masks in reference.masks.values() if masks.tokens is not None]
        assert len(kept) == 3 and all(0.1 < share < 0.9 for share in kept)
    plain = dataclasses.replace(dynamic.loaded, module=copy.deepcopy(dynamic.module).to(torch.bfloat16))
    placed = in_dtype(dynamic.loaded, "bfloat16", CPU).dynamic
    assert placed is not None
    way = SubNetworks(placed, tables)
    for t in (400, 17):
        with placed.using(way):
            found = answers(placed.loaded, t)
        errors = [float((other - exact[t]).norm() / exact[t].norm()) for other in (found, answers(plain, t))]
        assert errors[0] < 1.2 * errors[1] < 0.05
    copies = [slices for weights in way.weights for slices in weights.copies.values()]
    layers = [layer for slices in copies for layer in (slices.into, slices.out)]
    assert layers and all(isinstance(layer, PackedLinear) for layer in layers)
    assert way.report()["extra_bytes"] == sum(layer.num_bytes for layer in layers if isinstance(layer, PackedLinear))


def test_a_model_in_bfloat16_is_packed_and_as_near_to_float32_as_a_plain_one() -> None:
    model = wide()
    exact = answer(model)
    plain = dataclasses.replace(model, module=copy.deepcopy(model.module).to(torch.bfloat16))
    placed = in_dtype(model, "bfloat16", CPU)
    assert sum(isinstance(layer, PackedLinear) for layer in placed.module.modules()) == 3 * 5
    assert not any(isinstance(layer, PackedLinear) for layer in model.module.modules()), "the model stays as it is"
    assert held_bytes(placed.module) == held_bytes(plain.module)
    errors = [float((answer(m) - exact).norm() / exact.norm()) for m in (placed, plain)]
    assert errors[0] < 1.2 * errors[1] < 0.05


def test_small_layers_and_other_types_stay() -> None:
    small = new_model("dit", {**WIDE, "hidden_size": 64}, 0)
    for dtype in ("bfloat16", "float16", "float32"):
        model = wide() if dtype == "float16" else small
        placed = in_dtype(model, dtype, CPU)
        assert not any(isinstance(layer, PackedLinear) for layer in placed.module.modules())


def test_blocks_of_packed_layers_share_a_compilation() -> None:
    placed = in_dtype(wide(), "bfloat16", CPU)
    eager = answer(placed)
    counters.clear()
    with placed.stack.compiled("aot_eager"):
        assert torch.allclose(answer(placed), eager, rtol=2**-6, atol=2**-7)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_packed_weight_goes_with_its_layer() -> None:
    block = nn.Sequential(nn.Linear(64, 64).to(torch.bfloat16))
    pack([block], smallest=1)
    kept = weakref.ref(block[0].packed)
    assert kept() is not None
    del block
    gc.collect()
    assert kept() is None


@torch.no_grad()
@pytest.mark.skipif(not can_quantize(torch.device("cpu")), reason="torch has no oneDNN products of whole numbers here")
def test_a_layer_of_whole_numbers_is_near_and_rows_do_not_depend_on_each_other() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(64, 96)
    whole = Int8Linear(layer)
    x = torch.randn(3, 5, 64, generator=generator)
    x[0] *= 1000  # would coarsen the others with a common scale
    found, wanted = whole(x), layer(x)
    assert found.shape == wanted.shape
    for rows in range(3):
        error = (found[rows] - wanted[rows]).square().mean().sqrt() / wanted[rows].square().mean().sqrt()
        assert 0 < float(error) < 0.02
    assert torch.allclose(whole(x[1:]), found[1:], atol=1e-5) and bool(whole(torch.zeros(1, 64)).isfinite().all())
