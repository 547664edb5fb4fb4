"""Golden tensors of MAR against ours: max|ours - theirs| <= 1e-5 max|theirs|, the loss 1e-4.

Every tensor of mar_golden.safetensors is one test. `tokens`, `mask`, `encoder_out`, `z` and `loss` are computed; the others
are what they are computed from, and a tensor of another name fails. Sizes come from the JSON and the tensors, so
`--golden DIR` runs the same on any other set.
"""

from __future__ import annotations

import json
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tinyfusion.blocks.tokens import from_tokens, to_tokens
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.families.mar.model import Mar, MarArch
from tinyfusion.models.checkpoint import open_model
from tinyfusion.processes.base import Batch
from tinyfusion.processes.masked import MaskedBatch, MaskedObjective

TENSORS, WEIGHTS, CONFIG = "mar_golden.safetensors", "mar_weights.pt", "mar.json"
TOLERANCES = {"loss": 1e-4}
TOLERANCE = 1e-5
INPUTS = ("x", "y", "orders", "loss_t", "loss_noise")


def arch_of(config: dict[str, Any]) -> MarArch:
    """The sizes that the published constructor gives names to."""
    assert config["mlp_ratio"] == 4, "the published models have one MLP ratio"
    return MarArch(
        input_size=config["img_size"] // config["vae_stride"],
        patch_size=config["patch_size"],
        in_channels=config["vae_embed_dim"],
        hidden_size=config["encoder_embed_dim"],
        encoder_depth=config["encoder_depth"],
        decoder_depth=config["decoder_depth"],
        num_heads=config["encoder_num_heads"],
        num_classes=config["class_num"],
        buffer_size=config["buffer_size"],
        head_depth=config["diffloss_d"],
        head_width=config["diffloss_w"],
        decoder_width=config["decoder_embed_dim"],
        decoder_heads=config["decoder_num_heads"],
    )


class GoldenMar:
    """The set with our computations."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = load_file(folder / TENSORS)
        self.config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["config"]
        self.arch = arch_of(self.config)

    @cached_property
    def module(self) -> Mar:
        module = Mar(self.arch)
        module.load_state_dict(torch.load(self.folder / WEIGHTS, weights_only=True))
        return module.eval()

    @cached_property
    def noisy(self) -> MaskedBatch:
        """The recorded rows, which are of all tokens and of the whole batch time after time; ours are of hidden ones alone."""
        mask, orders = self.tensors["mask"], self.tensors["orders"]
        counts = mask.sum(1)
        assert bool((counts == counts[0]).all()), "all images hide equally many tokens"
        m, (num, length) = int(counts[0]), mask.shape
        hidden, known = orders[:, :m], orders[:, m:].sort(dim=1).values
        repeats = self.config["diffusion_batch_mul"]
        t = self.tensors["loss_t"].view(repeats, num, length).permute(1, 2, 0)
        noise = self.tensors["loss_noise"].view(repeats, num, length, -1).permute(1, 2, 0, 3)
        t = torch.take_along_dim(t, hidden[:, :, None], dim=1)
        noise = torch.take_along_dim(noise, hidden[:, :, None, None], dim=1)
        return self.objective.noised(
            Batch(self.tensors["x"], class_condition(self.tensors["y"], self.arch.num_classes)), known, hidden, t, noise
        )

    @cached_property
    def objective(self) -> MaskedObjective:
        return MaskedObjective(self.arch.patch_size)

    @torch.no_grad()
    def ours(self, name: str) -> Tensor | None:
        """Our value for a tensor; None for an input."""
        if name in INPUTS:
            return None
        noisy, tokens = self.noisy, to_tokens(self.tensors["x"], self.arch.patch_size)
        if name == "tokens":
            assert torch.equal(from_tokens(tokens, self.arch.patch_size), self.tensors["x"])
            return tokens
        if name == "mask":
            return torch.zeros_like(self.tensors["mask"]).scatter(1, noisy.hidden, 1.0)
        if name == "encoder_out":
            return self.module.encode(tokens, noisy.condition["labels"], noisy.known)
        if name == "z":
            return self.module.condition(tokens, noisy.condition["labels"], noisy.known, noisy.hidden)
        if name == "loss":
            return self.objective.losses(self.module, noisy, self.objective.predict(self.module, noisy))["loss"].mean()
        raise LookupError(f"no rule reads {name!r} of {TENSORS}")


@lru_cache
def _golden(folder: Path) -> GoldenMar:
    return GoldenMar(folder)


def golden_of(config: pytest.Config) -> GoldenMar:
    """The set, loaded once per run; skips where the golden folder lacks it."""
    folder = Path(config.getoption("--golden"))
    if not (folder / TENSORS).is_file():
        pytest.skip(f"{folder} has no {TENSORS}")
    return _golden(folder)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per tensor; one that is skipped where the folder lacks the set."""
    if "tensor_name" not in metafunc.fixturenames:
        return
    file = Path(metafunc.config.getoption("--golden")) / TENSORS
    names = ["absent"]
    if file.is_file():
        with safe_open(file, framework="pt") as opened:
            names = sorted(opened.keys())
    metafunc.parametrize("tensor_name", names)


def test_tensor(pytestconfig: pytest.Config, tensor_name: str) -> None:
    golden = golden_of(pytestconfig)
    ours = golden.ours(tensor_name)
    if ours is None:
        assert tensor_name in INPUTS
        return
    theirs = golden.tensors[tensor_name]
    assert ours.shape == theirs.shape
    difference, largest = (ours.double() - theirs.double()).abs().max(), theirs.double().abs().max()
    assert float(difference) <= TOLERANCES.get(tensor_name, TOLERANCE) * float(largest)


@pytest.mark.parametrize("name", INPUTS)
def test_every_input_matters(pytestconfig: pytest.Config, name: str) -> None:
    """The loss is another one where an input is: it is really read."""
    golden, changed = golden_of(pytestconfig), GoldenMar(golden_of(pytestconfig).folder)
    value = changed.tensors[name]
    changed.tensors[name] = value.roll(1, dims=0) if name != "loss_t" else (value + 1) % 1000
    if name == "orders":
        changed.tensors["mask"] = changed.tensors["mask"].roll(1, dims=0)
    before, after = golden.ours("loss"), changed.ours("loss")
    assert before is not None and after is not None and not torch.equal(before, after)


def test_weights_tell_every_size_but_the_heads_and_the_patch(pytestconfig: pytest.Config) -> None:
    golden = golden_of(pytestconfig)
    arch = golden.arch
    if arch.patch_size != 1 or arch.decoder_heads is not None:
        pytest.skip("the set has sizes that a state dict of the published models cannot have")
    opened = open_model(golden.folder / WEIGHTS, num_heads=arch.num_heads, family="mar")
    assert opened.arch == arch
    for name, value in golden.module.state_dict().items():
        assert torch.equal(opened.module.state_dict()[name], value), name


def test_a_tensor_without_a_rule_fails(pytestconfig: pytest.Config) -> None:
    with pytest.raises(LookupError, match="out_of_tomorrow"):
        golden_of(pytestconfig).ours("out_of_tomorrow")
