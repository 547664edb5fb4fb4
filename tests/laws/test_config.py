"""Values of a recipe from outside: whatever their size, depth or length, they are taken or refused in one short line."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from tinyfusion.config.loading import load_recipe, recipe_fields
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError


def fields(kind: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and type, as text, of every field."""
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)


INTEGERS = [path for path, hint in fields(Recipe) if hint in ("int", "int | None", "tuple[int, ...]")]
FLOATS = [path for path, hint in fields(Recipe) if hint in ("float", "float | None")]


@pytest.mark.parametrize("value", [str(2**64), str(-(2**63) - 1), "1" + "0" * 400])
def test_no_whole_number_of_a_recipe_is_wider_than_a_tensor_can_hold(value: str) -> None:
    assert len(INTEGERS) > 60
    for path in INTEGERS:
        with pytest.raises(UserError, match=f"{path} must be at (least|most) .*; got -?[0-9]"):
            load_recipe(None, [f"{path}={value}"])


def test_numbers_that_are_not_finite() -> None:
    assert len(FLOATS) > 30
    for path in FLOATS:
        for value in ("nan", "inf", "-inf"):
            with pytest.raises(UserError, match=f"{path} wants a finite number; got {value}"):
                load_recipe(None, [f"{path}={value}"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (f"prune.lora_rank={2**63}", "prune.lora_rank must be at least 1 and at most 65,536; got 9223372036854775808"),
        ("prune.lora_rank=65537", "prune.lora_rank must be at least 1 and at most 65,536; got 65537"),
        ("prune.lora_rank=0", "prune.lora_rank must be at least 1; got 0"),
        ("train.steps=1000000001", "train.steps must be at least 1 and at most 1,000,000,000; got 1000000001"),
        ("sample.batch_size=1048577", "sample.batch_size must be at least 1 and at most 1,048,576; got 1048577"),
        ("model.depth=4097", "model.depth must be at least 1 and at most 4,096; got 4097"),
        ("compute.timeout_s=0", "compute.timeout_s must be above 0; got 0.0"),
        ("compute.timeout_s=1e300", "compute.timeout_s must be above 0 and at most 100,000,000.0; got 1e+300"),
        (f"model.depth=0x{'f' * 5000}", "model.depth must be at least 1 and at most 4,096; got a number of 20,000 bits"),
        (f"train.dtype=0x{'f' * 5000}", "train.dtype must be one of float32, bfloat16, float16; got a number of 20,000 bits"),
        (f"seed{'.a' * 5000}=1", "seed wants a whole number; got {'a': {'a': {"),
        (f"train{'.a' * 5000}=1", "unknown field 'train.a'"),
        (f"seed={'[' * 5000}", "seed wants a whole number; got '[[["),
        (f"seed={'[' * 50}{']' * 50}", "seed wants a whole number; got [[["),
        (f"seed={'x' * 10**6}", "seed wants a whole number; got 'xxx"),
        ("x" * 10**6, "--set wants section.field=value; got 'xxx"),
    ],
    ids=lambda value: value[:30],
)  # fmt: skip
def test_refusals_are_short(setting: str, message: str) -> None:
    with pytest.raises(UserError) as raised:
        load_recipe(None, [setting])
    assert message in str(raised.value) and len(str(raised.value)) < 1000


def test_the_largest_values_are_taken() -> None:
    recipe = load_recipe(None, ["prune.lora_rank=65536", f"seed={2**64 - 1}", "train.steps=1000000000"])
    assert (recipe.prune.lora_rank, recipe.seed, recipe.train.steps) == (65536, 2**64 - 1, 10**9)


@pytest.mark.parametrize("value", ["\udcff", "\0", "[]", "{}", "{a.a.a=1}", "1979-05-27", "''", '"\\uD800"', "[1,2,3]"])
def test_odd_values_of_every_field(value: str) -> None:
    for path, _, _ in recipe_fields(Recipe()):
        try:
            load_recipe(None, [f"{path}={value}"])
        except UserError as error:
            assert path.rpartition(".")[2] in str(error) or path in str(error)  # noqa: PT017  # either may come
