"""What was typed for a command and its opened models do not read."""

from __future__ import annotations

from tinyfusion.config.recipe import Recipe
from tinyfusion.config.unread import Asked, ModelKind, check_typed
from tinyfusion.core.progress import say
from tinyfusion.families.diffusers_classes.folder import TransformerFolder
from tinyfusion.models.loaded import LoadedModel
from tinyfusion.models.transformer import TransformerModel


def check_read(verb: str, recipe: Recipe, *models: LoadedModel | TransformerFolder | None) -> None:
    """Raise UserError on typed fields that none of the models of a command reads."""
    kinds = [_kind_of(model) for model in models if model is not None]
    _, remarks = check_typed(Asked(verb, recipe), kinds)
    say(remarks)


def _kind_of(model: LoadedModel | TransformerFolder) -> ModelKind:
    if isinstance(model, TransformerFolder | TransformerModel):
        folder = model if isinstance(model, TransformerFolder) else model.folder
        null_class = isinstance(model, TransformerFolder) or model.null_class
        return ModelKind(None, False, folder.few_steps is not None, null_class, folder.folded is not None)
    facts = model.facts
    drawn = facts.few_steps is not None, model.null_class, facts.folded_guidance is not None
    return ModelKind(model.family.process, model.of_latents, *drawn)
