"""Every transformer class of diffusers: blocks gated are blocks cut, and the cut folder is opened by diffusers alone."""

from __future__ import annotations

import inspect
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from models_page import PAGE, coupled, page
from tiny import Tiny, outputs, return_dict, tensors_of
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


NO_BACKWARD = ("AnyFlowFARTransformer3DModel", "Kandinsky6SRTransformer3DModel")  # FlexAttention has none on a CPU
NOT_CHECKPOINTED = (
    "HunyuanImageTransformer2DModel",
    "WanAnimate2Transformer3DModel",
)  # diffusers passes keywords it refuses


@pytest.mark.parametrize(
    "tiny", [each for each in CLASSES if each.name not in NO_BACKWARD], ids=lambda tiny: tiny.title
)
def test_every_gate_has_a_gradient_and_checkpointed_calls_are_gated_too(tiny: Tiny, tmp_path: Path) -> None:
    """Checkpointed blocks are called by position where plain ones are called by name."""
    opened = saved(tiny.model(), tmp_path / "parent")
    model: Any = in_memory(opened.module())
    stack, plain = opened.stack(model), return_dict(model)
    ones = torch.ones(1, len(stack), requires_grad=True)
    with stack.gated(ones):
        sum(each.square().sum() for each in tensors_of(model(**tiny.given(), **plain)) if each.requires_grad).backward()
    assert ones.grad is not None and ones.grad.isfinite().all() and (ones.grad != 0).all()
    if not getattr(model, "_supports_gradient_checkpointing", False) or tiny.name in NOT_CHECKPOINTED:
        return
    model.train()
    model.enable_gradient_checkpointing()
    found = []
    for gate in (None, torch.ones(1, len(stack))):
        torch.manual_seed(0)  # of labels that are dropped within
        with stack.gated(gate) if gate is not None else ExitStack():
            found.append([each.detach() for each in tensors_of(model(**tiny.given(), **plain))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("tiny", CLASSES, ids=lambda tiny: tiny.title)
def test_first_middle_and_last_unit_of_every_list(tiny: Tiny, tmp_path: Path) -> None:
    """Each alone: gated and cut are the same bit for bit, or the class's rule refuses the cut."""
    opened = saved(tiny.model(), tmp_path / "parent")
    same_inputs = tiny.for_student(given := tiny.given()) is given
    if opened.row.unfit or tiny.adapters or not same_inputs:  # cut above, with what their callers give
        return
    model = in_memory(opened.module())
    stack = opened.stack(model)
    for each in opened.units:
        for position in sorted({0, len(each.units) // 2, len(each.units) - 1}):
            removed: dict[str, list[int]] = {}
            for path, block in each.units[position]:
                removed.setdefault(path, []).append(block)
            try:
                student = opened.cut(plan_without(opened, removed))
            except UserError:
                by_rule = position in each.fixed or len(each.units) == 1 or coupled(opened.row)
                assert by_rule, "refused without a rule"
                continue
            with stack.gated(gates(opened, removed)):
                gated = outputs(model, tiny.given())
            folder = written(student, tmp_path / f"{each.name}-{position}")
            again, info = type(model).from_pretrained(folder, output_loading_info=True)
            assert not any(info.values()), info
            cut = outputs(in_memory(again), tiny.given())
            assert all(torch.equal(a, b) for a, b in zip(cut, gated, strict=True)), (each.name, position)


def test_the_page_of_classes_is_that_of_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "write it anew: python tests/families/models_page.py"
