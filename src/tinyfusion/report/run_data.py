"""What the page knows of a run: plain values, whatever of them there is. Reading the files is done in `commands/report.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.core.files import file_label

MODELS = ("teacher", "pruned", "student", "dynamic", "model", "real")
MODEL_NAMES = {
    "teacher": "teacher",
    "pruned": "cut, untuned",
    "student": "student, recovered",
    "dynamic": "dynamic",
    "model": "model",
    "real": "real images",
}


@dataclass(frozen=True)
class Samples:
    """Images (N, H, W, C) uint8, their labels (N,) where known, how they were drawn, and their hash where it is recorded."""

    images: np.ndarray
    labels: np.ndarray | None
    protocol: str = ""
    hash: str = ""


@dataclass(frozen=True)
class Look:
    """A picture that averaged weights drew after so many steps: the PNG."""

    steps: int
    png: bytes


@dataclass(frozen=True)
class RunData:
    """One run folder.

    name: the path as it was given. record: run.json. plan: the decision, or while it forms the present favourite
    (decided False). metrics: lines of metrics.jsonl per stage (prune, recover, train). records: run.json per stage.
    evaluations: model -> reference -> evaluation. speed: speed.json. samples and models (model.json): by model name.
    calibration, activations, depth_speed, fid_steps, kept: the files of these names, see docs/report.md. reached: dynamic.json.
    pairs: (model, evaluation) of those that were compared with images of the same seeds, each once.
    watched: pictures of averaged weights per stage while it trained. watch_lines: what was measured at those looks.
    notes: what was left out of the page, and why. parts: the runs of which this is the story, see `story.py`.
    """

    name: str
    record: Mapping[str, Any]
    plan: PrunePlan | None = None
    decided: bool = True
    metrics: Mapping[str, list[dict[str, Any]]] = field(default_factory=dict)
    records: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    evaluations: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    speed: Mapping[str, Any] | None = None
    samples: Mapping[str, Samples] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None
    activations: Mapping[str, Any] | None = None
    depth_speed: Mapping[str, Any] | None = None
    fid_steps: Sequence[Mapping[str, Any]] = ()
    kept: Mapping[str, Any] | None = None
    reached: Mapping[str, Any] | None = None
    pairs: Sequence[tuple[str, Mapping[str, Any]]] = ()
    watched: Mapping[str, Sequence[Look]] = field(default_factory=dict)
    watch_lines: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    parts: tuple[RunData, ...] = ()

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The resolved recipe, empty where there is none."""
        recipe = self.record.get("recipe")
        return recipe if isinstance(recipe, Mapping) else {}

    @property
    def title(self) -> str:
        """The recipe's name for a whole job, else the verb; with the depths once they are decided."""
        name = str(self.recipe.get("name") or self.record.get("verb", "run"))
        if not self.plan or not self.decided:
            return name
        kept = sum(len(blocks) for blocks in self.plan.kept.values())
        return f"{name}: {sum(self.plan.depth.values())} blocks to {kept}"

    @property
    def references(self) -> list[str]:
        """References evaluated against, those of the recipe first and in its order."""
        wanted = [file_label(str(name)) for name in (self.recipe.get("evaluate") or {}).get("references", ())]
        found = {reference for listed in self.evaluations.values() for reference in listed}
        return [name for name in wanted if name in found] + sorted(found - set(wanted))
