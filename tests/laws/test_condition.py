"""Conditions: one type for classes and texts, whose rows are picked, dropped, guided and moved without knowing which."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tinyfusion.conditioning.classes import class_condition, class_inputs, class_table
from tinyfusion.conditioning.condition import Condition, concat
from tinyfusion.conditioning.texts import text_table
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness


def classes(num: int = 6) -> Condition:
    return class_condition(torch.arange(num) % 5, 5)


def several(num: int = 6) -> Condition:
    """What models of texts take: embeddings, a mask, one vector per text and one number."""
    tensors = {
        "embeddings": torch.randn(num, 3, 4), "mask": torch.ones(num, 3, dtype=torch.bool), "pooled": torch.randn(num, 4),
        "guidance": torch.full((num,), 3.5),
    }  # fmt: skip
    return Condition(tensors, {name: torch.zeros_like(tensor[:1]) for name, tensor in tensors.items()})


KINDS = pytest.mark.parametrize("make", [classes, several])


@KINDS
def test_rows_are_picked_and_joined(make: Callable[[], Condition]) -> None:
    whole, order = make(), torch.tensor([4, 0, 0])
    picked = whole.index(order)
    assert len(picked) == 3 and len(whole.index(slice(1, 3))) == 2
    for name, tensor in whole.tensors.items():
        assert torch.equal(picked[name], tensor[order])
        assert torch.equal(concat([picked, whole])[name], torch.cat([tensor[order], tensor]))
    assert concat([picked, whole]).null_row is whole.null_row


@KINDS
def test_a_share_of_rows_becomes_the_null_row(make: Callable[[], Condition]) -> None:
    whole, draws = make(), Randomness(0).at(3, 0, 6)
    dropped = torch.from_numpy(draws.uniform("label_drop") < 0.5)
    assert 0 < int(dropped.sum()) < 6 and whole.null_row is not None
    found = whole.drop(draws, 0.5)
    for name, tensor in whole.tensors.items():
        assert torch.equal(found[name][~dropped], tensor[~dropped])
        assert torch.equal(found[name][dropped], whole.null()[name][dropped])
        assert found[name].dtype == tensor.dtype and torch.equal(whole.null()[name][:1], whole.null_row[name])
    assert whole.drop(draws, 0.0) is whole
    assert not torch.equal(whole.drop(draws, 0.5, "another").tensors[name], found[name])
    halves = [whole.index(slice(first, first + 3)).drop(Randomness(0).at(3, first, 3), 0.5) for first in (0, 3)]
    assert torch.equal(concat(halves)[name], found[name])


@KINDS
def test_only_floats_are_cast_and_the_null_row_goes_along(make: Callable[[], Condition]) -> None:
    whole = make()
    half = whole.to("cpu", torch.bfloat16)
    assert half.null_row is not None and whole.to().device == torch.device("cpu")
    for name, tensor in whole.tensors.items():
        wanted = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
        assert half[name].dtype == half.null_row[name].dtype == wanted


def test_classes_are_what_they_were() -> None:
    """The label where it stays, K where it is dropped or guided against, under the name that class models have for it."""
    labels = torch.tensor([0, 3, 4])
    condition = class_table(5).index(labels)
    assert torch.equal(class_inputs(condition)["y"], labels) and condition["labels"].dtype == torch.int64
    assert condition.null()["labels"].tolist() == [5, 5, 5]
    assert condition.drop(Randomness(0).at(0, 0, 3), 1.0)["labels"].tolist() == [5, 5, 5]


def test_conditions_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one number of rows; got \[2, 3\]"):
        Condition({"a": torch.zeros(2), "b": torch.zeros(3)})
    for null in ({"a": torch.zeros(2)}, {"b": torch.zeros(1)}, {}):
        with pytest.raises(ValueError, match="one row of every tensor"):
            Condition({"a": torch.zeros(2)}, null)
    alone = Condition({"a": torch.zeros(2)})
    for use in (alone.null, lambda: alone.drop(Randomness(0).at(0, 0, 2), 0.1)):
        with pytest.raises(UserError, match="no null row.*guidance 1 and label_drop 0"):
            use()
    with pytest.raises(ValueError, match="of one kind"):
        concat([alone, classes()])


def test_a_table_of_texts_has_the_null_text_last_whatever_else_a_text_has() -> None:
    embeddings, pooled = torch.randn(4, 3, 8, dtype=torch.float64), torch.randn(4, 5)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 0]])
    table = text_table({"embeddings": embeddings, "lengths": torch.tensor([3, 1, 2, 1]), "pooled": pooled})
    assert len(table) == 3 and table.null_row is not None and sorted(table.tensors) == ["embeddings", "mask", "pooled"]
    assert torch.equal(table["mask"], mask[:3].bool()) and torch.equal(table.null()["pooled"], pooled[3:].expand(3, -1))
    assert table["embeddings"].data_ptr() == embeddings.data_ptr(), "a view: a mapped file is read as rows are picked"
    older = text_table({"captions": embeddings, "caption_mask": mask})
    assert sorted(older.tensors) == ["embeddings", "mask"] and torch.equal(older["mask"], mask[:3])
    assert sorted(text_table({"embeddings": embeddings}).tensors) == ["embeddings"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "null text last; got nothing"),
        ({"embeddings": torch.zeros(1, 3, 8)}, r"floats embeddings .*; got embeddings \(1, 3, 8\)"),
        ({"embeddings": torch.zeros(2, 3, 8, dtype=torch.int64)}, "floats embeddings"),
        ({"embeddings": torch.zeros(2, 3, 8), "mask": torch.zeros(2, 3)}, "a token in every row"),
        ({"embeddings": torch.zeros(2, 3, 8), "mask": torch.ones(2, 4)}, "a mask of texts is"),
        ({"embeddings": torch.zeros(2, 3, 8), "pooled": torch.ones(3, 4)}, r"one row per text .*pooled \(3, 4\)"),
        ({"embeddings": torch.zeros(2, 3, 8), "scale": torch.ones(())}, "one row per text"),
    ],
)
def test_texts_that_cannot_be_are_refused(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_table(tensors)
