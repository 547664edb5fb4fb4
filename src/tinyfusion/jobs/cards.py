"""Which trainings of a large model fit on which card: numbers from shapes and activations from fake tensors, without its weights.

A model on the meta device is run with tensors that have a type and a size and no memory, under the same autocast, kernels and
checkpoints as on a CPU, and what would be allocated is counted as in `jobs/footprint.py`. So a table for FLUX.1 takes seconds on
any machine. What fits is then the arithmetic of the memory plan. Not counted: the program's context, workspaces, text encoders and
the autoencoder, whose outputs are in the data set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tinyfusion.blocks.stack import BlockStack, num_parameters
from tinyfusion.config.recipe import ComputeSection, TrainingSection
from tinyfusion.jobs.estimate import CARDS_GIB, FREE_SHARE, GIB, MemoryPlan, fits, memory_plan
from tinyfusion.jobs.footprint import FLOAT_BYTES, Footprint, Measured, measured_stack
from tinyfusion.models.loaded import LoadedModel
from tinyfusion.models.transformer import TransformerModel
from tinyfusion.training.lora import add_lora

Build = Callable[[], tuple[nn.Module, BlockStack]]  # on the meta device, in any type
Run = Callable[[nn.Module], Any]  # one call of the model for one image, whose tensors it makes on the default device
LARGE = 1_000_000_000  # parameters from which on a dry run shows ways to train a model
_LOW = 2  # bytes of bfloat16, in which models of this size are published
_LORA_RANKS = {"learn": 8, "recover": 64}
_BITS = {"float8": 8.0, "nf4": 4 + 32 / 64}


@dataclass(frozen=True)
class Way:
    """A way to train a model that was opened in bfloat16, one image or more at once, with gradient checkpointing."""

    title: str
    verb: Literal["learn", "recover"]
    update: Literal["lora", "full"]
    storage: Literal["own", "float8", "nf4", "streamed"] = "own"
    settings: TrainingSection = dataclasses.field(
        default_factory=lambda: TrainingSection(dtype="bfloat16", ema_device="cpu")
    )


_LEAN = TrainingSection(dtype="bfloat16", weights="bfloat16", optimizer="adamw-8bit", ema_device="cpu")
WAYS = (
    Way("learn masks with low-rank updates", "learn", "lora"),
    Way("learn masks with low-rank updates, float8", "learn", "lora", "float8"),
    Way("recover low-rank updates, teacher shared", "recover", "lora"),
    Way("recover low-rank updates, teacher shared, float8", "recover", "lora", "float8"),
    Way("recover low-rank updates, teacher shared, nf4", "recover", "lora", "nf4"),
    Way("recover all weights, bfloat16, 8-bit moments, teacher streamed", "recover", "full", "streamed", _LEAN),
    Way("recover all weights, bfloat16, 8-bit moments, teacher float8", "recover", "full", "float8", _LEAN),
    Way("recover all weights, bfloat16, 8-bit moments", "recover", "full", "own", _LEAN),
    Way("recover all weights in float32", "recover", "full", "own", TrainingSection(dtype="bfloat16")),
)


@dataclass(frozen=True)
class Counted:
    """A large model: numbers in the tensors of its blocks and outside, of which in linear layers, and measured blocks by update."""

    lists: tuple[str, ...]  # the list of every block
    tensors: tuple[tuple[int, ...], ...]  # numbers in the parameters of every block
    outside: tuple[int, ...]
    linears: tuple[int, ...]
    low_rank: tuple[tuple[int, ...], ...]  # in, and out, of the linear layers of every block
    outside_low_rank: tuple[int, ...]
    measured: Mapping[str, Measured]  # by update

    def repeated(self, depths: Mapping[str, int]) -> Counted:
        """The model with the first block of every list so many times, which is the deeper model where blocks are alike."""
        order = [self.lists.index(name) for name in dict.fromkeys(self.lists) for _ in range(depths[name])]

        def each(values: Sequence[Any]) -> tuple[Any, ...]:
            return tuple(values[i] for i in order)

        measured = {name: dataclasses.replace(m, blocks=each(m.blocks)) for name, m in self.measured.items()}
        return dataclasses.replace(
            self, lists=each(self.lists), tensors=each(self.tensors), linears=each(self.linears), low_rank=each(self.low_rank),
            measured=measured,
        )  # fmt: skip

    @property
    def blocks(self) -> list[int]:
        """Parameters of every block."""
        return [sum(sizes) for sizes in self.tensors]

    @property
    def numbers(self) -> int:
        """Parameters."""
        return sum(self.blocks) + sum(self.outside)


def counted(build: Build, run: Run) -> Counted:
    """Count a model that `build` makes and measure its blocks in the calls that `run` makes. Takes no memory for weights."""
    with torch.device("meta"):
        module, stack = build()
    measured = {"full": measured_stack(_low(module), stack, run)}
    blocks = list(stack)
    of_linears = [[m for m in block.modules() if isinstance(m, nn.Linear)] for block in blocks]
    inside = {id(value) for block in blocks for value in (*block.parameters(), *block.modules())}
    others = [m for m in module.modules() if isinstance(m, nn.Linear) and id(m) not in inside]

    def widths(layers: Sequence[nn.Linear]) -> tuple[int, ...]:
        return tuple(size for layer in layers for size in (layer.in_features, layer.out_features))

    values = Counted(
        lists=tuple(name for name in stack.lists for _ in stack.block_list(name)),
        tensors=tuple(tuple(p.numel() for p in block.parameters()) for block in blocks),
        outside=tuple(p.numel() for p in module.parameters() if id(p) not in inside),
        linears=tuple(sum(m.weight.numel() for m in own) for own in of_linears),
        low_rank=tuple(map(widths, of_linears)),
        outside_low_rank=widths(others),
        measured=measured,
    )
    with torch.device("meta"):
        module, stack = build()
        add_lora(_low(module), _LORA_RANKS["recover"], 1.0, 0)
    return dataclasses.replace(values, measured={**measured, "lora": measured_stack(module, stack, run)})


def _low(module: nn.Module) -> nn.Module:
    return module.to(torch.bfloat16)


def way_footprint(model: Counted, kept: Mapping[str, int], way: Way) -> Footprint:
    """The footprint of training a model, of which the first `kept` blocks per list stay, as `way` says. Which ones makes no difference."""
    first: dict[str, int] = {}
    chosen = []
    for index, name in enumerate(model.lists):
        if first.setdefault(name, 0) < kept[name]:
            chosen.append(index)
        first[name] += 1
    learning = way.verb == "learn"
    inside = list(range(len(model.lists))) if learning else chosen
    rank = _LORA_RANKS[way.verb]
    item, frozen = FLOAT_BYTES, 0
    if way.update == "lora":
        sizes = [*model.outside_low_rank, *(size for i in inside for size in model.low_rank[i])]
        trained = tuple(rank * size for size in sizes)
        if way.storage == "streamed" or learning:  # else the frozen tensors are the teacher's
            blocks_bytes = _LOW * sum(model.blocks[i] for i in inside)
            frozen = (_stored_bytes(model, way.storage) if learning else blocks_bytes) + _LOW * sum(model.outside)
    else:
        trained = (*model.outside, *(size for i in inside for size in model.tensors[i]))
        item = _LOW if way.settings.weights == "bfloat16" else FLOAT_BYTES
    measured = model.measured[way.update]
    casts = _LOW if item == FLOAT_BYTES and way.update == "full" else 0
    blocks = tuple(
        dataclasses.replace(measured.blocks[i], casts=max(measured.blocks[i].casts, casts * model.blocks[i]))
        for i in inside
    )
    teacher = () if learning else model.measured["full"].blocks
    largest = max(model.linears) if way.storage in _BITS else 0  # expanded layer by layer: at most a block's
    teacher = tuple(dataclasses.replace(b, casts=min(_LOW * largest, b.casts + _LOW * largest // 2)) for b in teacher)
    held = 0 if learning else _LOW * sum(model.outside) + _stored_bytes(model, way.storage)
    two = max(a + b for a, b in zip(model.blocks, [*model.blocks[1:], 0], strict=True))
    return Footprint(
        trained=trained, item_bytes=(item,) * len(trained), frozen_linear=0, frozen_rest=-(-frozen // FLOAT_BYTES), gathered=0,
        teacher=held, teacher_gathered=0, also_resident=0, batch=0, passing=_LOW * two if way.storage == "streamed" else 0,
        graph_share=len(chosen) / len(model.lists) if learning else 1.0, features=0,
        measured={"bfloat16": dataclasses.replace(measured, blocks=blocks, teacher=teacher)},
    )  # fmt: skip


def _stored_bytes(model: Counted, storage: str) -> int:
    """Bytes on the device of a teacher's blocks."""
    if storage == "streamed":
        return 0
    if storage in _BITS:
        rest = sum(model.blocks) - sum(model.linears)
        return int(sum(model.linears) * _BITS[storage] / 8) + _LOW * rest
    return _LOW * sum(model.blocks)


def way_plan(model: Counted, kept: Mapping[str, int], way: Way, images: int = 1) -> MemoryPlan:
    """The memory plan of training a model as `way` says."""
    compute = ComputeSection(gradient_checkpointing=True)
    return memory_plan(way_footprint(model, kept, way), way.settings, compute, images=images)


def card_lines(model: Counted, kept: Mapping[str, int]) -> list[str]:
    """A human-readable table: memory for one image at once, and how many fit on each card."""
    wide = max(len(way.title) for way in WAYS)
    numbers = model.numbers / 1e9
    stay = ", ".join(f"{kept[name]} of {model.lists.count(name)} {name}" for name in dict.fromkeys(model.lists))
    lines = [
        f"{numbers:.1f} B parameters, kept {stay}; bfloat16, gradient checkpointing, {100 * FREE_SHARE:.0f} % of a card left free:",
        f"  {'':{wide}}{'one image':>12}" + "".join(f"{f'{gib} GiB':>14}" for gib in CARDS_GIB),
    ]
    for way in WAYS:
        plan_of = partial(way_plan, model, kept, way)
        cells = [f"{n:,}" if n else "does not fit" for n in (fits(plan_of, gib) for gib in CARDS_GIB)]
        lines.append(
            f"  {way.title:{wide}}{f'{plan_of(1).total / GIB:,.1f} GiB':>12}" + "".join(f"{c:>14}" for c in cells)
        )
    return lines


def lines_of_large(model: LoadedModel, kept: Mapping[str, int]) -> list[str]:
    """`card_lines` of a transformer of diffusers in its training data; none of smaller models, and of others."""
    if not isinstance(model, TransformerModel) or num_parameters(model.module) < LARGE:
        return []

    def build() -> tuple[nn.Module, BlockStack]:
        module = model.folder.empty().to("meta")
        return module, model.family.stack(module)

    def run(module: nn.Module) -> Any:
        if model.example is not None:
            return module(
                **tree_map_only(Tensor, lambda value: torch.zeros(value.shape, dtype=value.dtype), model.example)
            )
        assert model.latent_shape is not None and model.prompts is not None  # training needs both
        one = model.prompts.each(lambda value: torch.zeros(1, *value.shape[1:], dtype=value.dtype))
        return model.family.call(module, torch.zeros(1, *model.latent_shape), torch.ones(1), one)

    return ["ways to train it, of which the recipe has one:", *card_lines(counted(build, run), kept)]
