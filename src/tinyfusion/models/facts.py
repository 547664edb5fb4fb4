"""Facts of a model that are not in its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.processes.base import FoldedGuidance
from tinyfusion.processes.noising import FewSteps


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model that are not in its tensors.

    image_size: side of its images in pixels. latent_scale, latent_shift: models of latents see (z - shift) x scale of a
    latent z of the autoencoder `vae`; None for a pixel-space model and if unknown. assumed: names of facts that neither file
    nor user stated, taken from the published models. kept: indices into the direct parent per list, None for an unpruned model.
    lineage: parents, oldest first, each with hash, depth and kept, if it was pruned in width the kept residual channels of its
    own parent, and its arch if its child was. seen_images: of a model trained from scratch; None for pruned models and if
    unknown. process_settings: settings of its process for training and sampling, if it has any. dynamic: of a model with
    routers, their settings (`DynamicSettings`) and the ratios they reach. few_steps: how a model draws that was distilled for few steps.
    folded_guidance: of a model that learned the guided output of its teacher, and is drawn without guidance.
    """

    image_size: int
    latent_scale: float | None = None
    latent_shift: float | None = None
    vae: str | None = None
    assumed: list[str] = field(default_factory=list)
    license: str | None = None
    kept: dict[str, list[int]] | None = None
    lineage: list[dict[str, Any]] = field(default_factory=list)
    plan: PrunePlan | None = None
    seen_images: int | None = None
    process_settings: dict[str, Any] = field(default_factory=dict)
    dynamic: dict[str, Any] | None = None
    few_steps: FewSteps | None = None
    folded_guidance: FoldedGuidance | None = None

    def unlike(self, words: str, name: str, value: float) -> str | None:
        """Why latents of this "latent_scale" or "latent_shift" are not the model's; None if they are, or may be.

        words: begin the sentence, as in "it scales latents by".
        """
        own = getattr(self, name)
        if own is None or math.isclose(own, value, rel_tol=1e-6, abs_tol=1e-9):
            return None
        if name not in self.assumed:
            return f"{words} {value:g}, and the model was trained with {own:g}"
        return (
            f"{words} {value:g}, and {own:g} is assumed for the model, whose file gives none: if it was trained on such "
            f"latents, add --set sample.{name}={value:g}"
        )
