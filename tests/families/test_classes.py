"""Every transformer class of diffusers: blocks gated are blocks cut, and the cut folder is opened by diffusers alone."""

from __future__ import annotations

import inspect
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from models_page import PAGE, page
from tiny import Tiny, outputs
from tiny_images import IMAGES
from tiny_video import VIDEO
from torch import nn

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.core.errors import UserError
from tinyfusion.families.diffusers_classes.folder import TransformerFolder, open_transformer
from tinyfusion.families.diffusers_classes.rows import shipped_rows
from tinyfusion.families.diffusers_classes.weights import write_weights

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
CLASSES = [*IMAGES, *VIDEO]


def saved(model: nn.Module, folder: Path, **more: Any) -> TransformerFolder:
    model.save_pretrained(folder, **more)
    return open_transformer(folder, shipped_rows())


def plan_without(opened: TransformerFolder, removed: Any) -> PrunePlan:
    kept = {path: [i for i in range(depth) if i not in removed.get(path, ())] for path, depth in opened.depths.items()}
    return PrunePlan(kept, dict(opened.depths), "indices")


def written(student: TransformerFolder, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(student.config))
    write_weights(student.weights, folder)
    return folder


def in_memory(model: nn.Module) -> nn.Module:
    """The model with tensors of its own: kernels round by the alignment of a mapped file."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model.eval()


def gates(opened: TransformerFolder, removed: Any) -> torch.Tensor:
    columns = [float(i not in removed.get(path, ())) for path, depth in opened.depths.items() for i in range(depth)]
    return torch.tensor([columns])


def of_image(tensors: list[torch.Tensor], image: int) -> list[torch.Tensor]:
    """What a model returns for one of two images, along axis 0 or one tensor each."""
    rows = [tensor[image] for tensor in tensors if len(tensor) == 2]
    return rows or [tensors[image]]


@pytest.mark.parametrize("tiny", CLASSES, ids=lambda tiny: tiny.title)
def test_gated_blocks_are_cut_blocks_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    """Of a plan that removes blocks of every list: gates, of all images or one; the folder, in diffusers, with no tensor too many."""
    opened = saved(tiny.model(), tmp_path / "parent")
    model = in_memory(opened.module())
    stack = opened.stack(model)
    whole = outputs(model, tiny.given())
    parameters = {name for block in stack for name in inspect.signature(block.forward).parameters}
    assert {name for each in opened.row.lists for name in (*each.shared, *each.axes)} <= parameters
    with stack.gated(torch.ones(1, len(stack))):
        assert all(torch.equal(a, b) for a, b in zip(outputs(model, tiny.given()), whole, strict=True))
    plan = plan_without(opened, tiny.removed)
    if opened.row.unfit:
        with pytest.raises(UserError, match="cannot be written"):
            opened.cut(plan)
        return
    with ExitStack() as entered:
        entered.enter_context(stack.gated(gates(opened, tiny.removed)))
        for path, argument in tiny.adapters:
            hook = lambda _module, given, _output, i=argument: torch.zeros_like(given[i])  # noqa: E731
            entered.callback(model.get_submodule(path).register_forward_hook(hook).remove)
        gated = outputs(model, tiny.given())
    assert not all(torch.equal(a, b) for a, b in zip(gated, whole, strict=True)), "the blocks matter"
    if tiny.images and not opened.row.one_mask and not tiny.adapters:
        with stack.gated(
            torch.cat([torch.ones_like(gates(opened, tiny.removed)), gates(opened, tiny.removed)]), "skip"
        ):
            mixed = outputs(model, tiny.given())
        for image, wanted in enumerate((whole, gated)):
            torch.testing.assert_close(of_image(mixed, image), of_image(wanted, image), rtol=1e-4, atol=1e-5)
    student = opened.cut(plan)
    student.check_class()
    again, info = type(model).from_pretrained(written(student, tmp_path / "student"), output_loading_info=True)
    assert not any(info.values()), info
    cut = outputs(in_memory(again), tiny.for_student(tiny.given()))
    assert all(torch.equal(a, b) for a, b in zip(cut, gated, strict=True))


def test_the_page_of_classes_is_that_of_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "write it anew: python tests/families/models_page.py"
