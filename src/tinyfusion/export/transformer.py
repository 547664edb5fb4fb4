"""A transformer as a folder of diffusers: config, weights, model card and the picture of its plan."""

from __future__ import annotations

from pathlib import Path

from tinyfusion.blocks.plan import PrunePlan, plan_from_json
from tinyfusion.core.rundir import write_json
from tinyfusion.export.card import PICTURE, plan_png
from tinyfusion.families.diffusers_classes.card import transformer_card
from tinyfusion.families.diffusers_classes.folder import TransformerFolder
from tinyfusion.families.diffusers_classes.weights import STEM, write_weights

FILES = rf"config\.json|{STEM}[^/]*|README\.md|{PICTURE}"  # pattern of its files


def write_transformer(
    model: TransformerFolder, folder: Path, title: str, card: Path | None = None, pipeline: str | None = None
) -> None:
    """A folder that diffusers opens: config, weights, card and picture of the plan. card: the folder of the latter, another one."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", model.config_to_write)
    write_weights(model.weights, folder)
    place = card or folder
    (place / "README.md").write_text(transformer_card(model, title, PICTURE, pipeline), encoding="utf-8")
    if model.lineage:
        plan = plan_in(model)
        (place / PICTURE).write_bytes(plan_png(plan.kept, plan.depth))


def plan_in(model: TransformerFolder) -> PrunePlan:
    """The plan by which a student was pruned."""
    return plan_from_json(model.record.get("plan"))
