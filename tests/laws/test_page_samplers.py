"""The page of `demo`: its tables are the samplers, its noise is that of `sample`, and its blocks are in the right columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from families import tiny
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.demo.page import NOISE, block_columns, check_pair, roles
from tinyfusion.demo.schedules import Step, samplers_of
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.flow import Flow
from tinyfusion.processes.noising import FewSteps, GaussianNoising
from tinyfusion.prune.criteria import by_indices
from tinyfusion.sample.drive import SampleDraws, Sampler, sample
from tinyfusion.sample.few_steps import FewStepSampler
from tinyfusion.sample.flow import FlowSampler
from tinyfusion.sample.gaussian import GaussianSampler

LABELS = [1, 0, 2]


def drawn(model: LoadedModel, table: list[Step], seed: int) -> Tensor:
    """What the page's `makeStep` makes of a table, without guidance."""
    draws = SampleDraws(Randomness(seed), 0, len(LABELS), torch.device("cpu"))
    x, labels = draws.images(model), torch.tensor(LABELS)
    for position, step in enumerate(table):
        start = x
        for e in step:
            out = model.module(x, torch.full((len(x),), e["t"]), labels)[:, : x.shape[1]]
            x = e["start"] * start + e["x"] * x + e["out"] * out + e["noise"] * draws.images(model, position)
    return x


def few(fresh_noise: bool) -> FewSteps:
    return FewSteps("matching", (1.0, 0.6, 0.3), 1.5, fresh_noise)


CASES: dict[
    str, tuple[str, int, int, Callable[[LoadedModel], Sampler]]
] = {  # family, sampler of the page, steps, its like
    "ddim": ("dit", 0, 10, lambda _: GaussianSampler("ddim", 10, guidance=1.0)),
    "ddim-1": ("dit", 0, 1, lambda _: GaussianSampler("ddim", 1, guidance=1.0)),
    "heun": ("sit", 0, 5, lambda _: FlowSampler(method="heun2", num_points=6, guidance=1.0)),
    "euler": ("sit", 1, 8, lambda _: FlowSampler(method="euler", num_points=9, guidance=1.0)),
    "few": ("dit", 0, 3, lambda _: FewStepSampler(GaussianNoising(), few(False))),
    "few-fresh": ("dit", 0, 3, lambda _: FewStepSampler(GaussianNoising(), few(True))),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_tables_draw_what_the_samplers_draw(name: str) -> None:
    family, number, num_steps, like = CASES[name]
    model = tiny(family, std=0.1)
    if name.startswith("few"):
        model.facts = dataclasses.replace(model.facts, few_steps=few(name.endswith("fresh")))
    table = samplers_of(model)[number].plain()["steps"][str(num_steps)]
    wanted = next(sample(model, LABELS, like(model), seed=3)).x
    assert len(table) == num_steps
    assert float((drawn(model, table, 3) - wanted).abs().max()) < 2e-4 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize(("path", "prediction"), [("gvp", "velocity"), ("vp", "noise"), ("linear", "score")])
@torch.no_grad()
def test_tables_hold_for_every_path_and_prediction_of_a_flow(path: str, prediction: str) -> None:
    model = tiny("sit", std=0.05)
    settings = Flow(path, prediction).settings()  # type: ignore[arg-type]
    model.facts = dataclasses.replace(model.facts, process_settings=settings)
    table = samplers_of(model)[0].plain()["steps"]["4"]
    wanted = next(sample(model, LABELS, FlowSampler(method="heun2", num_points=5, guidance=1.0), seed=0)).x
    assert float((drawn(model, table, 0) - wanted).abs().max()) < 1e-3 * max(1.0, float(wanted.abs().max()))


def test_other_processes_are_refused() -> None:
    with pytest.raises(UserError, match="noise, or of a flow"):
        samplers_of(tiny("mar"))


def test_the_noise_has_the_purpose_of_the_samplers() -> None:
    own = Randomness(5).at(0, 0, 2).normal(NOISE, (1, 2, 2))
    draws = SampleDraws(Randomness(5), 0, 2, torch.device("cpu"))
    assert torch.equal(draws.normal(-1, (1, 2, 2)), torch.from_numpy(own))


def test_blocks_are_in_the_columns_of_the_oldest_common_ancestor() -> None:
    teacher, other = tiny("dit"), tiny("dit", seed=1)
    student = teacher.cut(by_indices(teacher, [0, 2, 3], 0))
    grandchild = student.cut(by_indices(student, [0, 2], 0))
    sibling = teacher.cut(by_indices(teacher, [1], 0))
    assert block_columns([teacher, grandchild]) == (4, [[0, 1, 2, 3], [0, 3]])
    assert block_columns([sibling, student]) == (4, [[1], [0, 2, 3]])
    assert block_columns([grandchild]) == (4, [[0, 3]])
    assert block_columns([other, student]) == (4, [[0, 1, 2, 3], [0, 1, 2]])
    assert roles([grandchild, teacher]) == ["Student", "Teacher"] and roles([teacher, student]) == [
        "Teacher",
        "Student",
    ]
    assert roles([sibling, student]) == ["", ""] and roles([teacher]) == [""]


def test_two_models_of_different_images_are_refused() -> None:
    model = tiny("dit")
    larger = dataclasses.replace(model, arch=dataclasses.replace(model.arch, input_size=8))
    check_pair({"a": model, "b": tiny("sit")})
    with pytest.raises(UserError, match="a has 2 channels, 4 side, .* b has 2 channels, 8 side"):
        check_pair({"a": model, "b": larger})
