"""What a recipe states of a model's latents: scale, shift, autoencoder and picture side, from its settings and its data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinyfusion.config.recipe import Recipe, SampleSection
from tinyfusion.core.errors import UserError
from tinyfusion.data.latents import LATENTS, MANIFEST, LatentSpec, read_manifest
from tinyfusion.data.published_latents import PUBLISHED_FACTOR
from tinyfusion.jobs.prompts import with_prompts_of
from tinyfusion.models.checkpoint import LoadedModel, open_model

_PUBLISHED_CHANNELS = 4


def open_stated(
    recipe: Recipe, source: str | Path, num_heads: int | None, family: str | None, num_classes: int | None = None
) -> LoadedModel:
    """`open_model` with the facts of its latents that the recipe states: in its settings, and by its data.

    Raises UserError where a setting contradicts what the model's own file states.
    """
    return with_facts_of(recipe, open_model(source, recipe.sample.weights, num_heads, family, num_classes))


def with_facts_of(recipe: Recipe, model: LoadedModel) -> LoadedModel:
    """The model with what the recipe states of it: facts of its latents, in its settings and by its data, and prompts."""
    model = with_prompts_of(recipe.data, with_settings(model, recipe.sample))
    folder = Path(recipe.data.name.removeprefix(LATENTS))
    if not recipe.data.name.startswith(LATENTS) or not (folder / MANIFEST).is_file():  # whoever reads the data says so
        return model
    return with_latents(model, *read_manifest(folder))


def with_settings(model: LoadedModel, settings: SampleSection) -> LoadedModel:
    """The model with scale, shift and autoencoder as set. Raises UserError where its file states another scale or shift."""
    for name in ("latent_scale", "latent_shift"):
        value = getattr(settings, name)
        if value is not None and name not in model.doubtful and (reason := model.facts.unlike("it is", name, value)):
            raise UserError(f"sample.{name} contradicts the model: {reason}")
    model = model.with_known(latent_scale=settings.latent_scale, latent_shift=settings.latent_shift)
    return model.with_known(vae=settings.vae) if model.of_latents else model


def with_latents(model: LoadedModel, spec: LatentSpec, about: Mapping[str, Any]) -> LoadedModel:
    """The model with the facts of a set of latents, where it has none or the same scale and shift. about: its manifest."""
    facts = model.facts
    if spec.shape[0] != model.arch.in_channels or any(
        facts.unlike("", name, value) for name, value in (("latent_scale", spec.scale), ("latent_shift", spec.shift))
    ):
        return model
    side, vae = about.get("size"), about.get("vae")
    if not isinstance(side, int):  # the published layout, which gives none
        side = PUBLISHED_FACTOR * spec.shape[-1] if spec.shape[0] == _PUBLISHED_CHANNELS else None
    return model.with_known(
        latent_scale=spec.scale, latent_shift=spec.shift, image_size=side, vae=vae if isinstance(vae, str) else None
    )


def check_latents(model: LoadedModel, name: str, spec: LatentSpec) -> None:
    """Raise UserError where the latents `name` were scaled or shifted otherwise than the model wants them."""
    for fact, value in (("latent_scale", spec.scale), ("latent_shift", spec.shift)):
        if reason := model.facts.unlike(f"{name} was made for the {fact.removeprefix('latent_')}", fact, value):
            raise UserError(reason)
