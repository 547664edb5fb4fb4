"""`inspect`: what a model is, at a glance."""

from __future__ import annotations

from typing import Any

from tinyfusion.evaluate.speed import count_macs
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.models.stack import num_parameters


def model_macs(model: LoadedModel) -> int:
    """Multiply-accumulates of one unguided forward pass of one image."""
    family, arch = model.family, model.arch
    return count_macs(lambda: family.build(arch), lambda: family.example(arch, 1))


def inspect(model: LoadedModel) -> dict[str, Any]:
    """The facts that `inspect --json` prints."""
    arch = {field: getattr(model.arch, field) for field in model.arch.__dataclass_fields__}
    facts = model.facts
    return {
        "family": model.family.name,
        "process": model.family.process,
        "process_settings": facts.process_settings,
        "depth": len(model.stack),
        "num_parameters": num_parameters(model.module),
        "trainable_parameters": num_parameters(model.module, trainable_only=True),
        "macs": model_macs(model),
        "kept": facts.kept,
        "lineage": facts.lineage,
        "hash": model.hash(),
        "arch": arch,
        "image_size": facts.image_size,
        "latent_scale": facts.latent_scale,
        "vae": facts.vae,
        "license": facts.license,
        "seen_images": facts.seen_images,
        "criterion": facts.plan.criterion if facts.plan else None,
        "scheme": facts.plan.scheme if facts.plan else None,
        "origin": model.origin,
        "unfit_formats": model.unfit_formats(),
    }
