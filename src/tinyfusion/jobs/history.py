"""History of a model, step by step, from the records of the runs that wrote it and its parents."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import read_json_object
from tinyfusion.jobs.origins import MakingRun, making_run
from tinyfusion.models.places import RUN_MODELS

_PARENTS = {"recover": "student", "prune": "teacher", "dynamic": "model"}  # verb -> what it began with
_MOST_STEPS = 32


@dataclass(frozen=True)
class Step:
    """One run of a model's history: its verb, and a sentence."""

    verb: str
    sentence: str


def history(source: str | Path) -> list[Step]:
    """The runs behind the model at `source`, oldest first, as far back as their folders hold the models that they recorded."""
    steps: list[Step] = []
    run = making_run(source)
    while run is not None and len(steps) < _MOST_STEPS:
        verb = str(run.record.get("verb"))
        steps.append(Step(verb, _sentence(verb, run)))
        run = _parent(verb, run)
    return steps[::-1]


def _parent(verb: str, run: MakingRun) -> MakingRun | None:
    """The run that made the model that this one began with; None where that model is no longer what it was."""
    role = _PARENTS.get(verb, "")
    source = run.job.get(role) or (run.section("teacher") if verb == "prune" else None)
    inputs = run.record.get("recipe")
    if not isinstance(source, str) or not source or not isinstance(inputs, Mapping):
        return None
    for place in ("", *RUN_MODELS):
        file = Path(source) / place / "model.json"
        with suppress(UserError):
            if file.is_file():
                return making_run(source) if read_json_object(file).get("hash") == inputs.get(role) else None
    return None


def _sentence(verb: str, run: MakingRun) -> str:
    """What the run did, in words."""
    own = run.section(verb)
    settings: Mapping[str, Any] = own if isinstance(own, Mapping) else {}
    data = run.section("data")
    name = data.get("name") if isinstance(data, Mapping) else None
    seen = run.record.get("seen_images")
    images = f"{int(seen):,} images" if isinstance(seen, int | float) and 0 < seen < 2**63 else ""
    short = re.sub(r"(^|:)/.*/", r"\1", name) if isinstance(name, str) else ""  # a folder here means nothing elsewhere
    trained = f"{images} drawn from `{short}`" if images and short else images  # a picture counts each time it is drawn
    state = "" if run.record.get("state") == "done" else " (not finished)"
    if verb == "train":
        return f"Trained from nothing on {trained or 'data that are not recorded'}{state}."
    if verb == "prune":
        learned = f", scheme {settings.get('scheme')}" if settings.get("criterion") == "learned" else ""
        return (
            f"Cut by the criterion `{settings.get('criterion')}`{learned}{f', on {trained}' if trained else ''}{state}."
        )
    if verb == "recover":
        return f"Recovered by `{settings.get('method')}` on {trained or 'data that are not recorded'}{state}."
    return f"`{verb}`, on {trained or 'data that are not recorded'}{state}."
