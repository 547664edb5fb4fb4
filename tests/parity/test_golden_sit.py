"""Every golden tensor of the flow family against ours: max|ours - theirs| <= 1e-5 max|theirs|.

The subject `sit` is sit.json, sit_golden.safetensors and sit_weights.pt in the folder that `--golden DIR` names. Every tensor
is one test, and `RULES` says how ours is computed for its name. Names of `INPUTS` are not compared; their test fails unless
some rule reads them. A name without a rule fails. Sizes come from the files alone, so that other sets run the same.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tinyfusion.conditioning.classes import class_condition
from tinyfusion.models.checkpoint import LoadedModel, open_model
from tinyfusion.processes.base import Batch
from tinyfusion.processes.flow import Flow, FlowObjective
from tinyfusion.processes.stochastic import Stochastic, sample_stochastic
from tinyfusion.sample.flow import FlowSampler

TOLERANCE = 1e-5
NUM_POINTS = 10  # of the grid of times of every recorded trajectory

Rule = Callable[..., Tensor]  # (golden set, groups of the pattern...) -> our value


class SitSet:
    """The tensors, which remember whether they were read, and our model with their weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = load_file(folder / "sit_golden.safetensors")
        self.config: dict[str, Any] = json.loads((folder / "sit.json").read_text(encoding="utf-8"))["config"]
        self.read: set[str] = set()

    def get(self, name: str) -> Tensor:
        """A golden tensor; from now on it counts as read."""
        self.read.add(name)
        return self.tensors[name]

    @cached_property
    def model(self) -> LoadedModel:
        return open_model(self.folder / "sit_weights.pt", num_heads=self.config["num_heads"], family="sit")

    def network(self, x: Tensor, t: Tensor) -> Tensor:
        """The conditional model with the recorded labels."""
        out: Tensor = self.model.module(x, t, self.get("y"))
        return out

    def ours(self, name: str) -> Tensor:
        """Our value for a tensor, by the rule that fits its name."""
        found = rule_of(name)
        if found is None:
            raise LookupError(f"no rule reads {name!r} of sit_golden.safetensors")
        rule, captured = found
        with torch.no_grad():
            return rule(self, *captured)

    def use_everything(self) -> None:
        """Apply every rule; inputs that no rule asks for stay unread."""
        for name in self.tensors:
            if not is_input(name) and rule_of(name):
                self.ours(name)
                self.get(name)


def forward(golden: SitSet) -> Tensor:
    return golden.network(golden.get("data"), golden.get("t"))


def loss(golden: SitSet, path: str, prediction: str, weight: str) -> Tensor:
    """Per sample. The recorded names are those of the published flags."""
    flow = Flow(path.lower(), prediction)  # type: ignore[arg-type]
    objective = FlowObjective(0.0, flow, weight.lower())  # type: ignore[arg-type]
    x, y, t = (golden.get(name) for name in ("data", "y", "t"))
    noise = golden.get(f"noise_{path}_{prediction}_{weight}")
    noisy = objective.noised(Batch(x, class_condition(y, golden.config["num_classes"])), t, noise)
    return objective.losses(golden.model.module, noisy, objective.predict(golden.model.module, noisy))["loss"]


def last(trajectory: Iterator[Tensor]) -> Tensor:
    return deque(trajectory, maxlen=1).pop()


def ode(golden: SitSet, method: str) -> Tensor:
    """On the straight path, by the velocity; where the steps follow the error, that of the whole batch."""
    sampler = FlowSampler(method=method, num_points=NUM_POINTS, error_norm="batch", guidance=1.0)
    return last(sampler.steps(golden.network, golden.get("init"), (0.0, 1.0)))


def sde(golden: SitSet, method: str, form: str) -> Tensor:
    noises = golden.get(f"sde_{method}_{form}_noises")
    settings = Stochastic(method=method, num_points=NUM_POINTS, form=form)  # type: ignore[arg-type]
    return last(sample_stochastic(golden.network, Flow(), settings, golden.get("init"), noises.__getitem__))


RULES: dict[str, Rule] = {
    r"out": forward,
    r"loss_(Linear|GVP|VP)_(velocity|noise|score)_(None|velocity|likelihood)": loss,
    r"ode_([a-z0-9]+)": ode,
    r"sde_(euler|heun)_([a-z-]+)": sde,
}
# What a rule reads instead of giving: its test fails where no rule did.
INPUTS = r"data|y|t|init|noise_.*|sde_.*_noises"

_SETS: dict[Path, SitSet] = {}


def is_input(name: str) -> bool:
    return re.fullmatch(INPUTS, name) is not None


def rule_of(name: str) -> tuple[Rule, tuple[str, ...]] | None:
    for pattern, rule in RULES.items():
        if match := re.fullmatch(pattern, name):
            return rule, match.groups()
    return None


def folder_of(config: pytest.Config) -> Path:
    return Path(config.getoption("--golden"))


@pytest.fixture
def golden(pytestconfig: pytest.Config) -> SitSet:
    """The set, loaded once per run; skips where the golden folder lacks it."""
    folder = folder_of(pytestconfig)
    if not (folder / "sit_golden.safetensors").is_file():
        pytest.skip(f"{folder} has no sit_golden.safetensors")
    if folder not in _SETS:
        _SETS[folder] = SitSet(folder)
    return _SETS[folder]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per tensor; one that is skipped where the folder lacks the set."""
    if "tensor_name" not in metafunc.fixturenames:
        return
    file = folder_of(metafunc.config) / "sit_golden.safetensors"
    if not file.is_file():
        metafunc.parametrize("tensor_name", [pytest.param("", id="absent-sit")])
        return
    with safe_open(file, framework="pt") as opened:
        metafunc.parametrize("tensor_name", sorted(opened.keys()))


def test_tensor(golden: SitSet, tensor_name: str) -> None:
    if is_input(tensor_name):
        golden.use_everything()
        assert tensor_name in golden.read, f"no rule uses the input {tensor_name!r}"
        return
    ours, theirs = golden.ours(tensor_name), golden.get(tensor_name)
    assert ours.shape == theirs.shape
    assert float((ours.double() - theirs.double()).abs().max()) <= TOLERANCE * float(theirs.abs().max())


def test_every_tensor_was_read(golden: SitSet) -> None:
    golden.use_everything()
    assert sorted(set(golden.tensors) - golden.read) == []


def test_a_tensor_without_a_rule_fails(golden: SitSet) -> None:
    with pytest.raises(LookupError, match="out_of_tomorrow"):
        golden.ours("out_of_tomorrow")


def test_weights_tell_every_size_but_the_heads(golden: SitSet) -> None:
    found = {name: value for name, value in dataclasses.asdict(golden.model.arch).items() if name in golden.config}
    assert found == golden.config
    assert golden.model.arch.learn_sigma


def test_every_image_for_itself_ends_where_the_batch_does(golden: SitSet) -> None:
    """The recorded dopri5 shares its steps; ours by image agree with it within the tolerance of both."""
    apart = FlowSampler(method="dopri5", guidance=1.0)
    with torch.no_grad():
        ends = last(apart.steps(golden.network, golden.get("init"), (0.0, 1.0)))
    together = ode(golden, "dopri5")
    assert float((ends - together).abs().max()) < 2e-3 * float(together.abs().max())
