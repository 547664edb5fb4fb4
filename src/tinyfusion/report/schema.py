"""Schemas of the JSON files of a run, as far as the page reads them.

A schema is a type (float takes whole numbers too, and neither takes NaN or infinity), a `Least`, None, a tuple of alternatives,
[schema] for a list of any length, [schema, schema] for a pair, or a dict of fields: "name!" must be there, "*" stands for
all fields that are not named, and fields without a schema are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyfusion.core.errors import UserError

_MOST = 1e30  # of a number: beyond it no drawing has an axis


@dataclass(frozen=True)
class Least:
    """A number of this kind that is not below `low`."""

    kind: type
    low: float


def checked(value: Any, schema: Any, source: Path | str) -> Any:
    """The value. Raises UserError, with the file and the field, where it is not of its schema."""
    if wrong := mismatch(value, schema):
        raise UserError(f"{source} is damaged: {wrong}; correct or remove it")
    return value


def mismatch(value: Any, schema: Any, place: str = "") -> str | None:
    """The first place where a value is not of its schema, as "models.teacher.macs: wanted a number, got 'x'"; else None."""
    if isinstance(schema, tuple):
        reasons = [mismatch(value, option, place) for option in schema]
        return None if None in reasons else reasons[0]
    if isinstance(schema, dict):
        return _fields(value, schema, place)
    if isinstance(schema, list):
        if not isinstance(value, list) or (len(schema) > 1 and len(value) != len(schema)):
            return _wanted("a list" if len(schema) == 1 else f"a list of {len(schema)}", value, place)
        kinds = schema * len(value) if len(schema) == 1 else schema
        pairs = enumerate(zip(value, kinds, strict=True))
        return next((text for i, (item, kind) in pairs if (text := mismatch(item, kind, f"{place}[{i}]"))), None)
    return _leaf(value, schema, place)


def _fields(value: Any, schema: Mapping[str, Any], place: str) -> str | None:
    if not isinstance(value, dict):
        return _wanted("an object", value, place)
    prefix = f"{place}." if place else ""
    named = {name.removesuffix("!"): kind for name, kind in schema.items()}
    missing = next((name[:-1] for name in schema if name.endswith("!") and name[:-1] not in value), None)
    if missing:
        return f"{prefix}{missing} is missing"
    for name, item in value.items():
        kind = named.get(name, named.get("*", ...))
        if kind is not ... and (text := mismatch(item, kind, f"{prefix}{name}")):
            return text
    return None


def _leaf(value: Any, schema: Any, place: str) -> str | None:
    if schema is None:
        return None if value is None else _wanted("null", value, place)
    kind, low = (schema.kind, schema.low) if isinstance(schema, Least) else (schema, -math.inf)
    if kind in (int, float):
        words = ("a whole number" if kind is int else "a number") + (f" from {low:g} on" if low > -math.inf else "")
        fits = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
        return None if fits and low <= value and abs(value) < _MOST else _wanted(words, value, place)
    return None if isinstance(value, kind) else _wanted({str: "a text", bool: "true or false"}[kind], value, place)


def _wanted(words: str, value: Any, place: str) -> str:
    got = repr(value)
    return f"{place or 'the whole'}: wanted {words}, got {got if len(got) <= 40 else got[:37] + '...'}"


_MAYBE = (float, None)
_PAIR = [float, float]
_BLOCKS = {"*": [Least(int, 0)]}
_SIZE = Least(int, 1)
_TRAINING = {"steps": int, "stop_after": (int, None)}
RECIPE = {
    "name": str, "description": str, "student": str, "teacher_hash": str, "class": str, "encodes": bool,
    "expected": [{"metric!": str, "value!": float, "tolerance!": float, "note": str}],
    "evaluate": {"references": [str]},
    "train": _TRAINING,
    "prune": {"criterion": str, "scheme": (str, None), "distribution": (str, None), "protect": ([int], None),
              "runs": (Least(int, 1), None), "training": _TRAINING},
    "recover": {"training": _TRAINING},
    "dynamic": {"training": _TRAINING, "in_run": bool},
    "distill_steps": {"training": _TRAINING, "in_run": bool},
}  # fmt: skip
RUN = {
    "verb!": str, "format_version": int, "state": str, "version": str, "commit": (str, None), "command": str,
    "machine": {}, "job": {"student": str}, "recipe": (RECIPE, None), "stages": {"*": Least(float, 0)}, "seconds": _MAYBE,
    "seen_images": _MAYBE, "teacher_seen_images": _MAYBE,
}  # fmt: skip
LINE = {
    "step!": int, "seen_images": _MAYBE, "seconds": Least(float, 0), "kept": _BLOCKS, "confidence": {"*": [float]}, "fixed": bool,
    "marginals": {"*": [float]}, "watch": {"made_steps!": int, "fid": _MAYBE, "protocol": str},
    **dict.fromkeys(("loss", "mse", "kd_loss", "feat_loss", "dynamic_loss", "complete_loss", "ratio", "budget", "generator_loss",
                    "critic_loss"), _MAYBE),
}  # fmt: skip
MODEL = {
    "arch": {"depth": int},
    "kept": (_BLOCKS, None),
    "plan": ({}, None),
    "hash": (str, None),
    "few_steps": ({"method!": str, "levels!": [float], "guidance!": float}, None),
    "folded_guidance": ({"scale!": float, "channels!": int}, None),
}
SCORES = ("fid", "sfid", "inception_score", "precision", "recall", "nearest_reference_distance", "num_images")
EVALUATION = {
    **dict.fromkeys(SCORES, _MAYBE),
    "clip_score": _MAYBE, "prompt_accuracy": _MAYBE, "clip": {"name": str, "hash": str, "std": _MAYBE},
    "protocol": (str, None), "recipe": {}, "reference": {"name": str, "count": _MAYBE}, "features": {"name": str},
    "against": {"name": str, "hash": str, "protocol": (str, None),
                **dict.fromkeys(("psnr_db", "psnr_db_std", "ssim", "ssim_std", "lpips", "lpips_std"), _MAYBE)},
}  # fmt: skip
SPEED = {
    "protocol": str, "batch_size!": int, "speedup!": Least(float, 0), "speedup_spread": _PAIR,
    "models!": {"*": {"depth!": int, "num_parameters!": _SIZE, "macs!": Least(float, 1), "latency_ms!": float,
                      "latency_ms_spread": _PAIR, "speedup": Least(float, 0), "drawing_speedup": Least(float, 0)}},
}  # fmt: skip
CALIBRATION = {"losses": [object], "masks": [str], "marks": {"*": object}, "mark_masks": {"*": str}}  # some not finite
ACTIVATIONS = {
    "bin_width!": Least(float, 1e-6), "depth": _SIZE, "lists": {"*": _SIZE}, "protocol": str,
    "models!": {"*": [{"teacher_block!": Least(int, 0), "min!": float, "max!": float, "mean!": float, "std!": float,
                       "first!": int, "counts!": [Least(int, 0)]}]},
}  # fmt: skip
DEPTH_SPEED = {
    "protocol": str, "teacher_depth!": _SIZE,
    "points!": [{"depth!": _SIZE, "latency_ms!": float, "speedup!": Least(float, 1e-6), "speedup_spread!": _PAIR,
                 "lists": {"*": int}}],
}  # fmt: skip
FID_STEPS = [{
    "step!": int, "images": _MAYBE, "method": str, "reference": str, "fid": _MAYBE, "inception_score": _MAYBE, "protocol": str,
}]  # fmt: skip
KEPT = {
    "times!": [float], "shares!": {"*": [[float]]}, "ratio!": float, "macs!": float, "static_macs!": float,
    "sub_networks!": int, "protocol!": str,
    "maps": (None, {"times!": [float], "percent!": [[[[Least(float, 0)]]]], "images!": [[[[Least(int, 0)]]]], "space!": str}),
}  # fmt: skip
_MEAN = {"mean!": _MAYBE, "error!": _MAYBE}
_BY_NOISE = {"mean!": _MAYBE, "by_noise!": [_MAYBE]}
EXPLAIN = {
    "protocol!": str, "model!": {"source!": str, "hash!": str, "lists!": {"*": _SIZE}, "title": str}, "not_measured": {"*": str},
    "noise!": (None, {"name!": str, "edges!": [float]}), "classes!": [Least(int, 0)], "channels!": {"*": [Least(int, 0)]},
    "loss!": {**_MEAN, "by_noise!": [_MEAN], "by_class!": [_MEAN]},
    "blocks!": [{
        "block!": Least(int, 0), "list!": str, "added_loss!": {**_MEAN, "by_noise!": [_MEAN], "by_class!": [_MEAN]},
        **{f"{name}!": _BY_NOISE for name in ("update_cosine", "update_norm", "influence", "attention_share")},
        "activations!": {"median!": _MAYBE, "largest!": _MAYBE, "ratios!": [_MAYBE], "large!": [Least(int, 0)],
                         "massive!": [Least(int, 0)]},
    }],
    "similarity!": {
        "with!": str, "source!": str, "lists!": {"*": _SIZE}, "rows!": Least(int, 0), "matrix!": [[_MAYBE]],
        "most_like!": [(Least(int, 0), None)], "origins!": ([Least(int, 0)], None),
    },
    "drawn!": (None, {"protocol!": str, "labels!": [Least(int, 0)], "difference!": [_MAYBE], "by_image!": [[_MAYBE]]}),
}  # fmt: skip
DYNAMIC = {"ratio": float, "target": float}
SAMPLES = {"protocol": str, "image_hash": str, "prompts": ([str], None)}
