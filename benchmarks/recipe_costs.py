"""Size, work, memory and hours of the recipes for published transformers of diffusers: counted, without their weights.

    python benchmarks/recipe_costs.py [--only NAME] [--tflops 400]

Work is counted on the meta device at the published size (`models/macs.py`), memory on fake tensors (`jobs/cards.py`). Hours are
operations over a rate that one card is assumed to sustain:

    search:   every image passes the whole model, and its kept share once more for the checkpoints and once for the gradients of its
              activations (low-rank updates have next to no gradients of their own); where the teacher is the target, the whole
              model once more
    recovery: the student forward, again for the checkpoints, and twice for the gradients; the teacher forward

Not counted: encoding of the data, drawing, evaluation, waiting for data, and what streamed weights do not hide.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from shared import table
from tinyfusion.blocks.scheme import schemes_by_list
from tinyfusion.blocks.stack import BlockStack
from tinyfusion.conditioning.condition import Condition
from tinyfusion.config.loading import load_recipe
from tinyfusion.config.recipe import Recipe
from tinyfusion.families.diffusers_classes.call_rows import call_of
from tinyfusion.families.diffusers_classes.calls import CallContext, called
from tinyfusion.families.diffusers_classes.cutting import Cut
from tinyfusion.families.diffusers_classes.folder import class_of
from tinyfusion.families.diffusers_classes.rows import Row, row_for
from tinyfusion.jobs.cards import Counted, Way, counted, way_footprint
from tinyfusion.jobs.estimate import CARDS_GIB, GIB, MemoryPlan, fits, images_at_once, memory_plan
from tinyfusion.models.macs import macs_by_module

TFLOPS = 400.0  # about 40 % of what an H100 does at most in dense bfloat16


@dataclass(frozen=True)
class Model:
    """A published transformer, as its recipe trains it.

    config: what differs from the defaults of its class. latents: (C, ..., h, w). texts: shapes of the tensors of one text.
    """

    name: str
    latents: tuple[int, ...]
    texts: Mapping[str, tuple[int, ...]]
    config: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def full(self) -> dict[str, Any]:
        """The whole config."""
        with torch.device("meta"):
            module = class_of(self.name).from_config(dict(self.config))
        return {**dict(module.config), "_class_name": self.name}

    @cached_property
    def row(self) -> Row:
        """The row of its class."""
        row = row_for({"_class_name": self.name})
        assert row is not None
        return row

    def depths(self) -> dict[str, int]:
        """Blocks per list."""
        return {each.path: self.full[each.count] for each in self.row.lists if not each.optional}

    def build(self, config: Mapping[str, Any] | None = None) -> tuple[nn.Module, BlockStack]:
        """The module and its blocks; of another config, as that of a student."""
        values = {name: value for name, value in (config or self.full).items() if not name.startswith("_")}
        module = class_of(self.name).from_config(values)
        lists = {each.path: each.declared for each in self.row.lists if each.path in self.depths()}
        return module, BlockStack(module, list(lists), lists)

    def run(self, module: nn.Module) -> Any:
        """A call of one image, as training makes it."""
        texts = {n: torch.ones(1, *shape, dtype=torch.bool if n == "mask" else None) for n, shape in self.texts.items()}
        call = called(call_of(self.full), CallContext(self.full))
        return call(module, torch.zeros(1, *self.latents), torch.ones(1), Condition(texts))

    def macs(self, config: Mapping[str, Any] | None = None) -> int:
        """Multiply-accumulates of one image."""
        with torch.device("meta"):
            module = self.build(config)[0].eval()
            return macs_by_module(module, partial(self.run, module))[""]


def masked(tokens: int, width: int) -> dict[str, tuple[int, ...]]:
    """Texts with a mask."""
    return {"embeddings": (tokens, width), "mask": (tokens,)}


MODELS = {
    "flux1-dev-lite": Model("FluxTransformer2DModel", (16, 128, 128), {"embeddings": (512, 4096), "pooled": (768,)},
                            dict(guidance_embeds=True)),
    "sd35-medium-half": Model("SD3Transformer2DModel", (16, 128, 128), {"embeddings": (333, 4096), "pooled": (2048,)},
                              dict(num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
                                   dual_attention_layers=list(range(13)), qk_norm="rms_norm")),
    "qwen-image-half": Model("QwenImageTransformer2DModel", (16, 128, 128), masked(512, 3584)),
    "z-image-two-thirds": Model("ZImageTransformer2DModel", (16, 128, 128), masked(512, 2560)),
    "sana-1600m-half": Model("SanaTransformer2DModel", (32, 32, 32), masked(300, 2304)),
    "wan21-1.3b-half": Model("WanTransformer3DModel", (16, 21, 60, 104), {"embeddings": (512, 4096)},
                             dict(num_attention_heads=12, ffn_dim=8960, num_layers=30)),
    "pixart-sigma-half": Model("PixArtTransformer2DModel", (4, 128, 128), masked(300, 4096),
                               dict(sample_size=128, interpolation_scale=2, use_additional_conditions=False, caption_channels=4096)),
}  # fmt: skip


def kept_blocks(model: Model, recipe: Recipe) -> dict[str, list[int]]:
    """Blocks that stay, evenly spread; which ones they are makes no difference but in SD3.5."""
    gated = [each.path for each in model.row.lists if not each.aside and each.path in model.depths()]
    kept = {path: list(range(depth)) for path, depth in model.depths().items()}
    for path, scheme in zip(gated, schemes_by_list(recipe.prune.scheme, gated), strict=True):
        (keep, size), depth = map(int, scheme.split(":")), model.depths()[path]
        number = depth * keep // size
        kept[path] = [i * depth // number for i in range(number)]
    return kept


@dataclass(frozen=True)
class Costs:
    """Numbers of one recipe. parameters, macs: of teacher and student. plan: by stage, for images at once."""

    name: str
    recipe: Recipe
    parameters: tuple[int, int]
    macs: tuple[int, int]
    share: float  # of blocks kept, by work
    model: Counted
    kept: Mapping[str, int]

    def plan(self, stage: str, images: int) -> MemoryPlan:
        """The memory plan of the search or the recovery."""
        recipe, own = self.recipe, self.recipe.recover
        if stage == "search":
            way = Way(stage, "learn", "lora", recipe.prune.storage, recipe.prune.training)
        else:
            way = Way(stage, "recover", own.update, own.teacher_storage, own.training)
        footprint = way_footprint(self.model, self.kept, way)
        if stage == "recovery" and own.compares_features:
            pairs = sum(self.kept[name] for name in self.kept)  # at most one a block
            footprint = replace(footprint, features=pairs)
        return memory_plan(footprint, way.settings, recipe.compute, images=images)

    def at_once(self, stage: str) -> int:
        """Images at once, as the recipe has it."""
        settings = self.recipe.prune.training if stage == "search" else self.recipe.recover.training
        return images_at_once(settings.batch_size, 1, self.recipe.compute)

    def hours(self, stage: str, tflops: float = TFLOPS) -> float:
        """Hours of the search or the recovery."""
        whole, student = self.macs
        if stage == "search":
            settings = self.recipe.prune.training
            macs = whole * (2 if self.recipe.prune.target == "teacher" else 1) + 2 * self.share * whole
        else:
            settings, macs = self.recipe.recover.training, 4 * student + whole
        return 2 * macs * settings.batch_size * settings.made_steps / (tflops * 1e12) / 3600


def costs_of(name: str) -> Costs:
    """Count a recipe."""
    model, recipe = MODELS[name], load_recipe(name)
    blocks = kept_blocks(model, recipe)
    student = {**model.full, **Cut(model.row, model.full, model.depths(), blocks).config_changes()}
    numbers = []
    for config in (model.full, student):
        with torch.device("meta"):
            numbers.append(sum(p.numel() for p in model.build(config)[0].parameters()))
    macs = model.macs(), model.macs(student)
    kept = {path: len(own) for path, own in blocks.items()}
    return Costs(name, recipe, (numbers[0], numbers[1]), macs, macs[1] / macs[0], counted(model.build, model.run), kept)


def memory_cell(costs: Costs, stage: str) -> list[str]:
    """GiB of the recipe's own batch, and images at once per card."""
    images = costs.at_once(stage)
    own = f"{costs.plan(stage, images).total / GIB:.0f} GiB at {images}"
    number = [fits(partial(costs.plan, stage), gib) for gib in CARDS_GIB]
    return [own, " / ".join(str(each) if each else "no" for each in number)]


def lines(names: Sequence[str], tflops: float) -> list[str]:
    """The two tables."""
    costs = [costs_of(name) for name in names]
    sizes = [
        (
            f"`{c.name}`",
            " + ".join(str(c.model.lists.count(path)) for path in c.kept) + " to " + " + ".join(map(str, c.kept.values())),
            *(f"{number / 1e9:.2f} B" for number in c.parameters),
            *(f"{number / 1e12:.2f} T" for number in c.macs),
            f"{c.macs[1] / c.macs[0]:.2f}",
            *(f"{c.hours(stage, tflops):.1f}" for stage in ("search", "recovery")),
            f"{60 * (c.hours('search', tflops) + c.hours('recovery', tflops)):.0f}",
        )
        for c in costs
    ]  # fmt: skip
    memory = [(f"`{c.name}`", *memory_cell(c, "search"), *memory_cell(c, "recovery")) for c in costs]
    cards = " / ".join(map(str, CARDS_GIB))
    head = [
        "recipe",
        "blocks",
        "teacher",
        "student",
        "MACs, teacher",
        "student",
        "ratio",
        "search, h",
        "recovery, h",
        "minutes",
    ]
    return [
        *table(head, *sizes),
        "",
        *table(["recipe", "search", f"images at once on {cards} GiB", "recovery", f"on {cards} GiB"], *memory),
    ]  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(MODELS), action="append")
    parser.add_argument("--tflops", type=float, default=TFLOPS, help="sustained, of one card")
    given = parser.parse_args()
    print("\n".join(lines(given.only or list(MODELS), given.tflops)))
