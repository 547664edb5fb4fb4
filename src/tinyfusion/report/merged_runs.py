"""Runs that belong together: a `recover` run that went on from what a `prune` run made is told with it, as one story."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from tinyfusion.report.run_data import RunData

VERB = "prune and recover"


def stories(runs: Sequence[RunData]) -> list[RunData]:
    """The runs in their order, every recovery merged with the search that its student comes from.

    They belong together where the recovery was given the very model that the search left: the hash of one is the input
    of the other. A search that is told with a recovery is not told by itself; one with several recoveries is told with each.
    """
    found = {id(run): search for run in runs if (search := _search_of(run, runs))}
    told = {id(search) for search in found.values()}
    return [_merged(found[id(run)], run) if id(run) in found else run for run in runs if id(run) not in told]


def _search_of(run: RunData, runs: Sequence[RunData]) -> RunData | None:
    """The `prune` run whose student a `recover` run was given; of several that made the same one that which it was opened from."""
    if run.record.get("verb") != "recover":
        return None
    given = run.recipe.get("student")
    same = [
        other for other in runs
        if other.record.get("verb") == "prune" and given and other.models.get("pruned", {}).get("hash") == given
    ]  # fmt: skip
    opened = str((run.record.get("job") or {}).get("student", ""))
    named = [other for other in same if opened.endswith(other.name.strip("./"))]
    return next(iter([*named, *same]), None)


def _merged(search: RunData, recovery: RunData) -> RunData:
    """One run of two: the decision from the search, what became of it from the recovery, what either measured from both."""
    two = (search, recovery)
    sections = {**search.recipe, **recovery.recipe}
    settings = {name: value for name, value in sections.items() if name not in ("student", "seed")}
    seeds = dict.fromkeys(run.recipe.get("seed") for run in two)
    settings["seed"] = next(iter(seeds)) if len(seeds) == 1 else None
    record = {**recovery.record, "verb": VERB, "recipe": settings, "seconds": _seconds(two)}
    evaluations = {
        model: {**search.evaluations.get(model, {}), **recovery.evaluations.get(model, {})}
        for model in dict.fromkeys(chain(search.evaluations, recovery.evaluations))
    }
    return RunData(
        name=f"{search.name} → {recovery.name}",
        record=record,
        plan=search.plan or recovery.plan,
        decided=search.decided,
        metrics={**search.metrics, **recovery.metrics},
        records={**search.records, **recovery.records},
        evaluations=evaluations,
        speed=recovery.speed or search.speed,
        samples={**search.samples, **recovery.samples},
        models={**search.models, **recovery.models},
        calibration=search.calibration,
        activations=recovery.activations or search.activations,
        depth_speed=recovery.depth_speed or search.depth_speed,
        fid_steps=recovery.fid_steps,
        pairs=[*search.pairs, *recovery.pairs],
        watched={**search.watched, **recovery.watched},
        watch_lines={**search.watch_lines, **recovery.watch_lines},
        notes=(*search.notes, *recovery.notes),
        parts=two,
    )


def _seconds(runs: Sequence[RunData]) -> float | None:
    """Of both together; None while one has no end."""
    known = [run.record.get("seconds") for run in runs]
    return None if None in known else sum(float(value) for value in known if value is not None)
