"""Every golden tensor of `dydit` against ours, in all realisations: max|ours - theirs| <= 1e-5 max|theirs|; masks equal.

The layout of the set: routers with H - 1 outputs and unit 0 always on; masks (batch, depth, heads), tokens (batch, depth,
tokens, 1). Sizes come from the files, so `--golden DIR` runs the same on any other set.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tinyfusion.blocks.dynamics import Deciding
from tinyfusion.core.tensors import read_pickle
from tinyfusion.dynamic.subnetworks import SubNetworks, resolve
from tinyfusion.families.registry import FAMILIES
from tinyfusion.models.checkpoint import open_model
from tinyfusion.models.loaded import DynamicModel
from tinyfusion.models.statedicts import find_state_dict

TOLERANCE = 1e-5
FILE, INPUTS = "dydit_golden.safetensors", ("x", "t", "y")
MASKS = {"attn_head_mask": "heads", "mlp_group_mask": "groups", "token_mask": "tokens"}


class Golden:
    """The set, and what we compute on it."""

    def __init__(self, folder: Path) -> None:
        self.tensors = load_file(folder / FILE)
        config = json.loads((folder / "dydit.json").read_text(encoding="utf-8"))["config"]
        file = folder / "dydit_weights.pt"
        self.weights = find_state_dict(read_pickle(file), [FAMILIES["dit"].mark], "ema", file).tensors
        dynamic = open_model(file, num_heads=config["num_heads"], family="dit").dynamic
        assert dynamic is not None
        self.model: DynamicModel = dynamic
        self.config = config
        self.inputs = tuple(self.tensors[name] for name in INPUTS)

    @torch.no_grad()
    def ours(self, name: str) -> Tensor:
        """Our value of a tensor."""
        if name == "out_complete":
            with self.model.complete():
                return self.model.module(*self.inputs)
        way = Deciding()
        with self.model.using(way):
            out = self.model.module(*self.inputs)
        if name == "out_dynamic":
            return out
        masks = torch.stack([getattr(way.masks[i], MASKS[name]) for i in range(len(self.model.stack))], dim=1)
        return masks.unsqueeze(-1) if name == "token_mask" else masks


@cache
def opened(folder: Path) -> Golden:
    return Golden(folder)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "tensor_name" not in metafunc.fixturenames:
        return
    path = Path(metafunc.config.getoption("--golden")) / FILE
    names = [""]
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            names = sorted(set(file.keys()) - set(INPUTS))
    metafunc.parametrize("tensor_name", names)


@pytest.fixture
def golden(pytestconfig: pytest.Config) -> Golden:
    folder = Path(pytestconfig.getoption("--golden"))
    if not (folder / FILE).is_file():
        pytest.skip(f"{folder} has no {FILE}")
    return opened(folder)


def disagreement(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape, f"ours is {tuple(ours.shape)}, theirs {tuple(theirs.shape)}"
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def test_tensor(golden: Golden, tensor_name: str) -> None:
    theirs = golden.tensors[tensor_name]
    if tensor_name in MASKS:
        assert torch.equal(golden.ours(tensor_name), theirs)
    else:
        assert disagreement(golden.ours(tensor_name), theirs) <= TOLERANCE


@pytest.mark.parametrize("mode", ["gathered", "bucketed", "masked"])
@torch.no_grad()
def test_sub_networks_give_the_dynamic_output(golden: Golden, mode: str) -> None:
    """Image by image, because the set has another timestep for each; no router of width runs."""
    tables = resolve(golden.model, golden.inputs[1].tolist())
    assert torch.equal(tables.heads, golden.tensors["attn_head_mask"].bool())
    assert torch.equal(tables.groups, golden.tensors["mlp_group_mask"].bool())
    rows = []
    with golden.model.using(SubNetworks(golden.model, tables, mode)):
        for i in range(len(golden.inputs[0])):
            rows.append(golden.model.module(*(value[i : i + 1] for value in golden.inputs)))
    assert disagreement(torch.cat(rows), golden.tensors["out_dynamic"]) <= TOLERANCE


def test_weights_tell_layout_and_sizes(golden: Golden) -> None:
    assert golden.model.settings.forced_first and golden.model.settings.width and golden.model.settings.tokens
    assert golden.model.loaded.arch.depth == golden.config["depth"]
    assert set(golden.model.module.state_dict()) == set(golden.weights)
