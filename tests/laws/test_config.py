"""Values of a recipe from outside: whatever their size, depth or length, they are taken or refused in one short line."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tinyfusion.config.constraints import Limit
from tinyfusion.config.loading import build, load_recipe, recipe_fields, to_plain
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError


def fields(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and annotation of every field; of the items of a tuple of sections, by its name."""
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        kinds = (kind for kind in (hint, *typing.get_args(hint)) if isinstance(kind, type))
        section = next(filter(dataclasses.is_dataclass, kinds), None)
        if section:
            yield from fields(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", hint


def numbers(hint: Any) -> list[tuple[type, list[Limit]]]:
    """Kind and limits of every number that an annotation holds."""
    if hint in (int, float):
        return [(hint, [])]
    if typing.get_origin(hint) is typing.Literal:
        return []
    own = [part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Limit)]
    inner = typing.get_args(hint)[:1] if hasattr(hint, "__metadata__") else typing.get_args(hint)
    return [(kind, [*limits, *own]) for part in inner for kind, limits in numbers(part)]


NUMBERS = {path: found for path, hint in fields(Recipe) if (found := numbers(hint))}
SINGLE = {path: found[0] for path, found in NUMBERS.items() if not path.startswith("expected.")}
INTEGERS = [path for path, (kind, _) in SINGLE.items() if kind is int]
FLOATS = [path for path, (kind, _) in SINGLE.items() if kind is float and len(NUMBERS[path]) == 1]


def test_every_number_of_a_recipe_has_limits_and_its_default_is_within() -> None:
    assert len(NUMBERS) > 150
    assert [path for path, found in NUMBERS.items() if not all(limits for _, limits in found)] == []
    assert build(Recipe, to_plain(Recipe()), "") == Recipe()


@pytest.mark.parametrize("section", ["", "prune"])
def test_a_field_without_a_name_is_unknown(section: str) -> None:
    values = {"": 3}
    with pytest.raises(UserError, match="unknown field"):
        build(Recipe, {section: values} if section else values, "")


def test_limits_are_where_they_say() -> None:
    """On each side of every limit; of whole numbers the next one, of others the next that is not rounded to 0."""
    for path, (kind, limits) in SINGLE.items():
        for limit in limits:
            bound, step = limit.bound, 1 if kind is int else max(abs(limit.bound) * 1e-9, 1e-300)
            inside, outside = {
                "at least": (bound, bound - step), "above": (bound + step, bound),
                "at most": (bound, bound + step), "below": (bound - step, bound),
            }[limit.words]  # fmt: skip
            text = "[{0},{0}]" if len(NUMBERS[path]) == 2 else "{0}"
            with suppress(UserError):  # of a section whose fields must agree
                load_recipe(None, [f"{path}={text.format(inside)}"])
            with pytest.raises(UserError, match=f"{re.escape(path)} must be .*{limit.words} .*; got"):
                load_recipe(None, [f"{path}={text.format(outside)}"])


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


def test_paths_of_a_recipe_file_are_looked_for_beside_it_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "own"))
    monkeypatch.chdir(tmp_path)
    for name in ("mine/data.npz", "mine/shards/x", "mine/digits/x", "mine/runs/teacher/x", "mine/x:y.npz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    text = """
        teacher = {teacher}
        data.name = {data}
        encode.vae = "~/vae"
        evaluate.references = ["data.npz", "digits:heldout", "hub:org/name", "elsewhere.npz", "{elsewhere}"]
    """
    file = tmp_path / "mine" / "recipe.toml"

    def loaded(teacher: str, data: str, *settings: str) -> Recipe:
        file.write_text(text.format(teacher=repr(teacher), data=repr(data), elsewhere=tmp_path / "mine"))
        return load_recipe(str(file), settings)

    recipe = loaded("runs/teacher", "data.npz")
    assert (recipe.teacher, recipe.data.name) == (str(tmp_path / "mine/runs/teacher"), str(tmp_path / "mine/data.npz"))
    assert recipe.encode.vae == str(tmp_path / "own/vae")
    assert recipe.evaluate.references[1:] == ("digits:heldout", "hub:org/name", "elsewhere.npz", str(tmp_path / "mine"))
    assert loaded("digits", "latents:shards").teacher == "digits", "a word is a name"
    assert loaded("./digits", "latents:shards").teacher == str(tmp_path / "mine/digits")
    assert loaded("./digits", "latents:shards").data.name == f"latents:{tmp_path}/mine/shards"
    assert loaded("org/name", "parquet:~/x").data.name == f"parquet:{tmp_path}/own/x"
    assert loaded("org/name", "x:y.npz").data.name == str(tmp_path / "mine/x:y.npz")
    typed = loaded("~", "digits", "data.name=data.npz", "sample.vae=~/vae")
    assert (typed.teacher, typed.data.name) == (str(tmp_path / "own"), "data.npz"), "what is typed is of this folder"
    assert typed.sample.vae == str(tmp_path / "own/vae")
    assert load_recipe("dit-xl-d7").teacher == "runs/dit-xl-d14"


def test_what_was_named_is_known_whatever_its_value() -> None:
    recipe = load_recipe("digits", ["data.flip=0"], {"seed": 0})
    assert {"data.flip", "seed", "prune.scheme"} <= recipe.assigned
    assert "data.augment" not in recipe.assigned
    assert "assigned" not in to_plain(recipe) and recipe == build(Recipe, to_plain(recipe), "")
    with pytest.raises(UserError, match="unknown field 'assigned'"):
        load_recipe(None, ["assigned=[]"])


@pytest.mark.parametrize(("text", "value"), [(".5", 0.5), ("1.", 1.0), ("5e-1", 0.5), (".25e1", 2.5)])
def test_numbers_without_a_digit_on_one_side_are_numbers(text: str, value: float) -> None:
    """As a shell's user writes them; TOML has no such numbers."""
    assert load_recipe("digits", [f"recover.training.learning_rate={text}"]).recover.training.learning_rate == value
    assert load_recipe("digits", [f"teacher={text}/model"]).teacher == f"{text}/model"
