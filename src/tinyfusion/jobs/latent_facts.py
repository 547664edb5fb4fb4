"""Facts of a model's inputs that a recipe states: scale, shift, autoencoder and image size of latents; encoded prompts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from tinyfusion.conditioning.texts import text_table
from tinyfusion.config.recipe import DataSection, Recipe, SampleSection
from tinyfusion.core.errors import UserError, prefixed
from tinyfusion.core.files import sha256_of
from tinyfusion.core.tensors import read_safetensors
from tinyfusion.data.buckets import facts_folder
from tinyfusion.data.latents import LATENTS, MANIFEST, LatentSpec, read_manifest
from tinyfusion.data.prompts import PROMPTS
from tinyfusion.data.published_latents import PUBLISHED_FACTOR
from tinyfusion.families.registry import family_named
from tinyfusion.families.tensor_checks import check_finite
from tinyfusion.jobs.transformer_sources import is_transformer_class, open_transformer_model, transformer_of
from tinyfusion.models.checkpoint import LoadedModel, open_model
from tinyfusion.models.transformer import TransformerModel

_CHECKED_BYTES = 2**30  # larger files are not searched for values that are not finite
_PUBLISHED_CHANNELS = 4


def prompts_file(data: DataSection) -> Path | None:
    """The file of the data's prompts: as set, else in its folder of latents; None where there is none."""
    if data.prompts:
        return Path(data.prompts)
    path = Path(data.name.removeprefix(LATENTS)) / PROMPTS
    return path if data.name.startswith(LATENTS) and path.is_file() else None


def prompts_hash(data: DataSection) -> dict[str, Any]:
    """The SHA-256 of the data's prompts for the plain recipe, {} where there are none."""
    path = prompts_file(data)
    if path is None or not path.is_file():
        return {}
    state = path.stat()
    return {"prompts": _hash(path, state.st_size, state.st_mtime_ns)}


@lru_cache(maxsize=4)
def _hash(path: Path, _size: int, _changed_ns: int) -> str:
    return sha256_of(path)


def takes_prompts(recipe: Recipe) -> bool:
    """Whether the new model of a recipe gets the prompts of its data."""
    family = recipe.model.family
    return family is not None and family_named(family).texts is not None and prompts_file(recipe.data) is not None


def with_prompts_of(data: DataSection, model: LoadedModel) -> LoadedModel:
    """The model with the prompts of its data, where there are any. Raises UserError on prompts that it cannot take."""
    path = prompts_file(data)
    if path is None or (model.family.texts is None and not data.prompts):
        return model
    if model.family.texts is None:
        raise UserError(
            f"{path}: prompts are for models of texts, and one of family {model.family.name} takes classes: leave it out"
        )
    tensors = read_safetensors(path)
    if path.stat().st_size <= _CHECKED_BYTES:
        check_finite(tensors, str(path))
    with prefixed(path, ValueError):  # UserError among them
        return model.with_prompts(text_table(tensors))


def open_stated(
    recipe: Recipe, source: str | Path, num_heads: int | None, family: str | None, num_classes: int | None = None,
    blocks: Path | None = None,
) -> LoadedModel:  # fmt: skip
    """Any model, of a family or a transformer of diffusers, with the facts that the recipe states.

    family: opens it, where several can; the name of a class of diffusers opens a folder as such a transformer. blocks: rows of
    classes that the shipped table lacks. Raises UserError where a setting contradicts the model's file.
    """
    if transformer := transformer_of(str(source), blocks, given_texts(recipe, family, blocks)):
        return with_prompts_of(recipe.data, open_transformer_model(source, transformer, recipe.flow, blocks))
    return with_facts_of(recipe, open_model(source, recipe.sample.weights, num_heads, family, num_classes))


def given_texts(recipe: Recipe, family: str | None, blocks: Path | None) -> bool:
    """Whether texts come with the data, so that a family that needs them may open a folder; not if a class of diffusers is named."""
    return bool(recipe.data.prompts or recipe.data.name) and not is_transformer_class(family, blocks)


def with_facts_of(recipe: Recipe, model: LoadedModel) -> LoadedModel:
    """The model with the facts of its latents that settings and data state, and with prompts."""
    if isinstance(model, TransformerModel):
        return with_prompts_of(recipe.data, model)
    model = with_prompts_of(recipe.data, with_settings(model, recipe.sample))
    folder = Path(recipe.data.name.removeprefix(LATENTS))
    # the reader of the data refuses it
    if not recipe.data.name.startswith(LATENTS) or not (folder / MANIFEST).is_file():
        return model
    return with_latents(model, *read_manifest(facts_folder(folder)))


def with_settings(model: LoadedModel, settings: SampleSection) -> LoadedModel:
    """The model with the scale, shift and autoencoder of `settings`. Raises UserError where its file states others."""
    for name in ("latent_scale", "latent_shift"):
        value = getattr(settings, name)
        if value is not None and name not in model.doubtful and (reason := model.facts.unlike("it is", name, value)):
            raise UserError(f"sample.{name} contradicts the model: {reason}")
    model = model.with_known(latent_scale=settings.latent_scale, latent_shift=settings.latent_shift)
    return model.with_known(vae=settings.vae) if model.of_latents else model


def with_latents(model: LoadedModel, spec: LatentSpec, about: Mapping[str, Any]) -> LoadedModel:
    """The model with the facts of a set of latents, unless its scale and shift differ. about: the manifest."""
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
    """Raise UserError where the latents `name` have another scale or shift than the model's."""
    for fact, value in (("latent_scale", spec.scale), ("latent_shift", spec.shift)):
        if reason := model.facts.unlike(f"{name} was made for the {fact.removeprefix('latent_')}", fact, value):
            raise UserError(reason)
