"""Blocks of one and of two streams, as in FLUX, Stable Diffusion 3 and Wan: gates are the cut model, skipping is gating."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tinyfusion.blocks.stack import BlockStack
from tinyfusion.blocks.streams import Streams
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.families.registry import FAMILIES
from tinyfusion.models.checkpoint import LoadedModel, new_model
from tinyfusion.models.facts import ModelFacts
from tinyfusion.processes.base import NoisyBatch, Prediction
from tinyfusion.prune.calibrate import Calibration, block_statistics
from tinyfusion.prune.mask_search import mask_losses, plain_losses

NUM = 4  # images
TEXT_FIRST = ("encoder_hidden_states", "hidden_states")
BOTH = Streams(names=("hidden_states", "encoder_hidden_states"), returns=TEXT_FIRST, axes={"image_rotary_emb": None})
ALONE = Streams(names=("hidden_states",), axes={"rotary_emb": None})


@dataclasses.dataclass
class Example:
    """A model of diffusers with random weights, its blocks, and inputs for any number of images."""

    model: nn.Module
    lists: dict[str, Streams]
    inputs: Callable[[int], dict[str, Tensor]]
    last_ends: bool = False  # the last block drops the text: without it the model cannot be

    @property
    def stack(self) -> BlockStack:
        return BlockStack(self.model, tuple(self.lists), self.lists)

    def output(self, num: int = NUM, rows: Sequence[int] | None = None) -> Tensor:
        given = self.inputs(num)
        if rows is not None:
            given = {name: value if "_ids" in name else value[list(rows)] for name, value in given.items()}
        out: Tensor = self.model(**given, return_dict=False)[0]
        return out

    def cut(self, kept: Sequence[int]) -> Example:
        other, left, start = dataclasses.replace(self, model=copy.deepcopy(self.model)), {}, 0
        for name, depth in self.stack.depths().items():
            left[name] = [i - start for i in kept if start <= i < start + depth]
            start += depth
        other.stack.keep(left)
        return other


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flux() -> Example:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=3, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    tokens = {"img_ids": drawn(1, 3, 3).abs(), "txt_ids": torch.zeros(1, 3)}  # four rows in all, as many as images

    def inputs(num: int) -> dict[str, Tensor]:
        return {
            "hidden_states": drawn(2, num, 3, 4), "encoder_hidden_states": drawn(3, num, 1, 32),
            "pooled_projections": drawn(4, num, 32), "timestep": torch.linspace(0.1, 0.9, num),
            "guidance": torch.full((num,), 3.5), **tokens,
        }  # fmt: skip

    return Example(model, {"transformer_blocks": BOTH, "single_transformer_blocks": BOTH}, inputs)


def sd3() -> Example:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, num_layers=5, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=24, out_channels=4, pos_embed_max_size=4,
    )  # fmt: skip

    def inputs(num: int) -> dict[str, Tensor]:
        return {
            "hidden_states": drawn(2, num, 4, 4, 4), "encoder_hidden_states": drawn(3, num, 5, 32),
            "pooled_projections": drawn(4, num, 24), "timestep": torch.linspace(10, 900, num),
        }  # fmt: skip

    return Example(model, {"transformer_blocks": BOTH}, inputs, last_ends=True)


def wan() -> Example:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=8, ffn_dim=32, num_layers=4, rope_max_seq_len=8,
    )  # fmt: skip

    def inputs(num: int) -> dict[str, Tensor]:
        return {
            "hidden_states": drawn(2, num, 4, 2, 4, 4), "encoder_hidden_states": drawn(3, num, 5, 16),
            "timestep": torch.linspace(10, 900, num),
        }  # fmt: skip

    return Example(model, {"blocks": ALONE}, inputs)


MODELS = {"flux": flux, "sd3": sd3, "wan": wan}


@pytest.fixture(scope="module", params=MODELS)
def example(request: pytest.FixtureRequest) -> Example:
    """In a special point of weight space (gates of zero) every test of gating would pass: weights are random throughout."""
    made = MODELS[request.param]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    made.model.eval()
    return made


def columns(example: Example, kept: Sequence[int], num: int = NUM) -> Tensor:
    return torch.tensor([[float(i in kept) for i in range(len(example.stack))]] * num)


def masks(example: Example) -> list[tuple[int, ...]]:
    """One mask per image; a list is never left empty, and the block that ends the text stays."""
    first = list(example.stack.depths().values())[0]
    depth = len(example.stack)
    last = (depth - 1,)
    ends = (first - 1, depth - 1) if len(example.lists) == 2 else last
    return [tuple(range(depth)), tuple(sorted({*ends, 0})), tuple(range(1, depth)), ends]


@pytest.mark.parametrize("dropped", ["dense", "skip"])
@torch.no_grad()
def test_gates_of_ones_are_the_untouched_model_bit_for_bit(example: Example, dropped: Any) -> None:
    wanted = example.output()
    with example.stack.gated(torch.ones(NUM, len(example.stack)), dropped):
        assert torch.equal(example.output(), wanted)
    assert torch.equal(example.output(), wanted)
    assert not torch.equal(example.cut(masks(example)[1]).output(), wanted), "every block matters"


@pytest.mark.parametrize("dropped", ["dense", "skip"])
@torch.no_grad()
def test_gates_of_zero_and_one_are_the_cut_model_bit_for_bit(example: Example, dropped: Any) -> None:
    for kept in masks(example):
        with example.stack.gated(columns(example, kept), dropped):
            assert torch.equal(example.output(), example.cut(kept).output())


@pytest.mark.parametrize("dropped", ["dense", "skip"])
@torch.no_grad()
def test_every_image_has_its_own_mask(example: Example, dropped: Any) -> None:
    """Also where a table that all images share has as many rows as there are images (FLUX here)."""
    gates = torch.cat([columns(example, kept, 1) for kept in masks(example)])
    with example.stack.gated(gates, dropped):
        found = example.output()
    for row, kept in enumerate(masks(example)):
        torch.testing.assert_close(found[row], example.cut(kept).output()[row], rtol=1e-5, atol=1e-6)


def gradients(
    example: Example, gates: Tensor, *contexts: Any, dropped: Any = "skip", inside: bool = False
) -> list[Tensor]:
    """Output, gradients of all weights, and those of the gates. inside: the backward pass is within the contexts."""
    leaf = gates.clone().requires_grad_()
    example.model.zero_grad(set_to_none=True)
    with ExitStack() as entered:
        for context in contexts:
            entered.enter_context(context)
        with example.stack.gated(leaf, dropped):
            out = example.output()
            if inside:
                out.square().mean().backward()
    if not inside:
        out.square().mean().backward()
    assert leaf.grad is not None
    return [out.detach(), *(p.grad for p in example.model.parameters() if p.grad is not None), leaf.grad]


def test_skipping_is_dense_gating_in_values_and_gradients(example: Example) -> None:
    gates = torch.cat([columns(example, kept, 1) for kept in masks(example)])
    dense, skipped = (gradients(example, gates, dropped=dropped) for dropped in ("dense", "skip"))
    assert float(dense[-1].abs().min()) > 0, "every gate of every image has a gradient"
    torch.testing.assert_close(skipped, dense, rtol=1e-4, atol=1e-6)


def test_a_block_that_no_image_keeps_gives_zero_gradients(example: Example) -> None:
    gates = columns(example, masks(example)[2])
    dense, skipped = (gradients(example, gates, dropped=dropped) for dropped in ("dense", "skip"))
    torch.testing.assert_close(skipped, dense, rtol=1e-4, atol=1e-6)


def test_checkpointed_blocks_are_the_plain_ones_bit_for_bit(example: Example) -> None:
    gates = torch.cat([columns(example, kept, 1) for kept in masks(example)])
    wanted = gradients(example, gates)
    again = gradients(example, gates, example.stack.checkpointed())
    assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch warns of what it does itself
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_blocks_are_the_plain_ones(example: Example) -> None:
    gates = torch.cat([columns(example, kept, 1) for kept in masks(example)])
    wanted, stack = gradients(example, gates), example.stack
    torch._dynamo.reset()
    compiled = gradients(example, gates, stack.compiled("eager"), stack.checkpointed())
    torch.testing.assert_close(compiled, wanted, rtol=1e-4, atol=1e-6)


def test_checkpoints_of_diffusers_itself_call_blocks_otherwise(example: Example) -> None:
    """By position, where the plain path calls by keyword: streams are found by name."""
    gates = torch.cat([columns(example, kept, 1) for kept in masks(example)])
    wanted = gradients(example, gates)
    example.model.train()  # its condition for checkpoints; there is no dropout
    example.model.enable_gradient_checkpointing()
    try:
        found = gradients(example, gates, inside=True)  # such a checkpoint is around the gates, and runs them again
    finally:
        example.model.disable_gradient_checkpointing()
        example.model.eval()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_tap_gives_the_image_stream(example: Example) -> None:
    tokens = {"flux": 3, "sd3": 4, "wan": 8}[
        next(name for name in MODELS if name in type(example.model).__name__.lower())
    ]
    with example.stack.tap(range(len(example.stack))) as outputs:
        example.output()
    assert [len(outputs), {value.shape[:2] for value in outputs.values()}] == [len(example.stack), {(NUM, tokens)}]
    with (
        example.stack.gated(torch.zeros(NUM, len(example.stack)) + columns(example, masks(example)[3])),
        example.stack.tap([0]) as tapped,
    ):
        example.output()
    assert torch.equal(tapped[0], _entered(example))


def _entered(example: Example) -> Tensor:
    """The image stream that the first block is given."""
    seen: list[Tensor] = []
    with example.stack.watched([0], lambda _block, before, _after: seen.append(before)):
        example.output()
    return seen[0]


# ------------------------------------------------------------------------------------------------------- the criteria


class Squared:
    """Squared outputs as losses of a fixed batch."""

    def __init__(self, example: Example) -> None:
        self.example = example

    def predict(self, model: nn.Module, noisy: NoisyBatch) -> Prediction:
        rows = noisy.condition["labels"].tolist()
        return Prediction(dataclasses.replace(self.example, model=model).output(rows=rows))

    def losses(self, _model: nn.Module, _noisy: NoisyBatch, prediction: Prediction) -> dict[str, Tensor]:
        return {"loss": prediction.output.square().flatten(1).mean(1)}


def as_loaded(example: Example) -> tuple[LoadedModel, Calibration]:
    lists = dict.fromkeys(example.lists, "depth")
    family = dataclasses.replace(FAMILIES["dit"], name="example", block_lists=lists, streams=example.lists, computed={})
    arch = new_model(
        "dit", dict(input_size=4, patch_size=2, in_channels=1, hidden_size=4, depth=1, num_heads=1, num_classes=2), 0
    ).arch
    model = LoadedModel(example.model, family, arch, ModelFacts(image_size=4))
    rows = torch.arange(NUM)
    noisy = NoisyBatch(
        x0=rows.float(), noise=rows.float(), xt=rows.float(), t=rows, condition=class_condition(rows, 10)
    )
    return model, Calibration((noisy,), Squared(example), "fixed", NUM, NUM, 0)  # type: ignore[arg-type]


def test_a_mask_search_gives_the_losses_of_the_cut_models(example: Example) -> None:
    model, calibration = as_loaded(example)
    depth, fixed = len(example.stack), {0, len(example.stack) - 1}
    tried = sorted(mask for mask in itertools.combinations(range(depth), depth - 1) if fixed <= {*mask})
    sums = mask_losses(model, calibration, tried)
    for mask, loss in zip(tried, sums.loss, strict=True):
        assert loss == pytest.approx(plain_losses(model, calibration, mask)[0], rel=1e-5)
    assert len(set(sums.loss)) == len(tried)


def test_block_influence_looks_at_the_image_stream(example: Example) -> None:
    model, calibration = as_loaded(example)
    found = block_statistics(model, calibration, clean=False, tick=lambda _done: None)
    with torch.no_grad(), example.stack.tap([0, 1]) as outputs:
        example.output()
    wanted = float((outputs[1] - outputs[0]).square().mean())
    assert found.change[1] == pytest.approx(wanted, rel=1e-5)


# --------------------------------------------------------------------------------------------------- the declaration


class Pair(nn.Module):
    """Two streams, the images along axis 1 of the first."""

    def forward(self, *, x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return y + x.mean(0) * scale[:, None], x * 2


def test_images_may_lie_along_any_axis() -> None:
    pair = nn.Module()
    pair.blocks = nn.ModuleList([Pair()])
    stack = BlockStack(pair, ["blocks"], {"blocks": Streams(("x", "y"), ("y", "x"), axes={"x": 1})})
    x, y, scale = drawn(0, 5, 3, 2), drawn(1, 3, 2), torch.tensor([1.0, 2.0, 3.0])
    gates = torch.tensor([[1.0], [0.0], [0.5]])
    for num, dropped in itertools.product((2, 3), ("dense", "skip")):
        with stack.gated(gates[:num], dropped):  # type: ignore[arg-type]
            new_y, new_x = pair.blocks[0](x=x[:, :num], y=y[:num], scale=scale[:num])
        wanted = [y[0] + x[:, 0].mean(0), y[1], y[2] + 0.5 * 3 * x[:, 2].mean(0)]
        torch.testing.assert_close(new_y, torch.stack(wanted[:num]))
        torch.testing.assert_close(new_x, torch.stack([2 * x[:, 0], x[:, 1], 1.5 * x[:, 2]], 1)[:, :num])
    with (
        stack.gated(gates[:2], "skip"),
        pytest.raises(ValueError, match="scale of the block has 3 rows along axis 0"),
    ):
        pair.blocks[0](x=x[:, :2], y=y[:2], scale=scale)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (dict(names=("x", "y")), "returns the streams it takes"),
        (dict(names=("x", "y"), returns=("x",)), "returns the streams it takes"),
        (dict(names=("x",), tapped="z"), "is none of"),
        (dict(names=("x",), axes={"x": None}), "cannot be shared"),
    ],
)
def test_declarations_that_contradict_themselves_are_refused(declared: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Streams(**declared)


def test_a_wrong_declaration_is_noticed_at_the_first_call() -> None:
    pair = nn.Module()
    pair.blocks = nn.ModuleList([Pair()])
    x = drawn(0, 2, 2)
    alone = BlockStack(pair, ["blocks"], {"blocks": Streams(("x",))})
    with (
        alone.gated(torch.ones(2, 1)),
        pytest.raises(TypeError, match="returned a tuple; its declaration says one tensor"),
    ):
        pair.blocks[0](x=x, y=x, scale=x[:, 0])
