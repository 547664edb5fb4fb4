"""The families that tinyfusion knows: its own, those of installed packages, and those that a program registers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from tinyfusion.config.loading import nearest
from tinyfusion.core.errors import UserError
from tinyfusion.families.dit.family import DIT
from tinyfusion.families.family import ModelFamily
from tinyfusion.families.mar.family import MAR
from tinyfusion.families.pixart import PIXART
from tinyfusion.families.sit import SIT

ENTRY_POINTS = "tinyfusion.families"  # group of a package's entry points that name a `ModelFamily` each
# by name; where a file fits several, the first that was registered is assumed
FAMILIES: dict[str, ModelFamily] = {family.name: family for family in (DIT, SIT, MAR, PIXART)}


def register_family(family: ModelFamily) -> ModelFamily:
    """Make a family known by its name, for files, recipes and `--family`; returns it. Raises UserError where the name is taken."""
    if FAMILIES.setdefault(family.name, family) is not family:
        raise UserError(f"a family {family.name!r} is registered already: give the new one another name")
    return family


def families() -> Mapping[str, ModelFamily]:
    """Every registered family by name, those of installed packages among them."""
    _load_entry_points()
    return FAMILIES


def family_named(name: Any) -> ModelFamily:
    """The family of this name. Raises UserError where there is none."""
    family = families().get(name) if isinstance(name, str) else None
    if family is None:
        raise UserError(f"unknown family {name!r}{nearest(str(name), families())}")
    return family


def family_of_config(config: Mapping[str, Any]) -> ModelFamily | None:
    """The family whose models a folder of diffusers with this config.json holds; None where it is of no family."""
    return next((each for each in families().values() if each.diffusers and each.diffusers.holds(config)), None)


def diffusers_classes() -> str:
    """Names of the classes of diffusers that registered families read, for messages."""
    return ", ".join(name for family in families().values() if family.diffusers for name in family.diffusers.classes)


@cache  # once per process
def _load_entry_points() -> None:
    """Register the families of installed packages; one that cannot be loaded is reported on stderr and left out."""
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            register_family(entry.load())
        except Exception as error:  # code of another package
            print(f"warning: family {entry.name} ({entry.value}) cannot be loaded: {error}", file=sys.stderr)
