"""`inspect`: what a model is, at a glance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinyfusion.blocks.dynamics import total_macs
from tinyfusion.blocks.stack import num_parameters
from tinyfusion.jobs.process_specs import default_sampling, sampler_of
from tinyfusion.jobs.sampling_setup import skipped_run_for
from tinyfusion.models.checkpoint import LoadedModel, model_record


def _dynamic(model: LoadedModel) -> dict[str, Any] | None:
    """Of a model with routers: what they decide on, the ratio they were set to, and heads and groups kept over the chain.

    Per block, the mean shares of heads and of groups over the times of the published sampler; MACs at the recorded ratio.
    """
    routed = model.dynamic
    if routed is None:
        return None
    recorded = dict(model.facts.dynamic or {})
    skipping = skipped_run_for(model, sampler_of(default_sampling(model), model))
    assert skipping is not None
    tables = skipping.tables
    facts = {**recorded, **tables.report()}
    for name, table in (("heads", tables.heads), ("groups", tables.groups)):
        facts[f"{name}_per_block"] = [round(float(share), 4) for share in table.float().mean(dim=(0, 2))]
    if "ratio" in recorded:
        facts["macs"] = total_macs(
            model.macs(), routed.sizes, len(model.stack), recorded["ratio"], routed.settings.tokens
        )
    return facts


def inspect(model: LoadedModel) -> dict[str, Any]:
    """The JSON record of a model that `inspect --json` prints: sizes, plan, multiply-accumulates and origin."""
    record, plan = model_record(model), model.facts.plan
    del record["format_version"], record["plan"]
    return {
        **record,
        "num_parameters": num_parameters(model.module),
        "trainable_parameters": num_parameters(model.module, trainable_only=True),
        "macs": model.macs(),
        "dynamic": _dynamic(model),
        "criterion": plan.criterion if plan else None,
        "scheme": plan.scheme if plan else None,
        "origin": model.origin,
        "unfit_formats": model.unfit_formats(),
    }


def parent_words(parent: Mapping[str, Any]) -> str:
    """An ancestor of the lineage on one line: hash, blocks, and which blocks of its own parent these are, if it was pruned."""
    depth, kept = parent.get("depth") or {}, parent.get("kept")
    several = len(depth) > 1
    sizes = ", ".join(f"{blocks} {name if several else 'blocks'}" for name, blocks in depth.items())
    if not kept:
        return f"{str(parent.get('hash'))[:12]} {sizes}, not pruned"
    blocks = "; ".join(f"{f'{name} ' * several}{', '.join(map(str, own))}" for name, own in kept.items())
    return f"{str(parent.get('hash'))[:12]} {sizes}, which are {blocks} of its own parent"
