"""Deterministic samplers as tables: every step is a linear combination of x, the network's output and fresh noise.

So the page needs one function for all samplers (`makeStep` in `demo/page/sampling.js`), and other timesteps are other data. A table
is a list of steps, a step a list of evaluations of the network {t, start, x, out, noise}. Each evaluation replaces x by

    start * (x at the beginning of the step) + x * (x now) + out * (output at t) + noise * (fresh noise)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from tinyfusion.core.errors import UserError
from tinyfusion.models.loaded import LoadedModel
from tinyfusion.processes.flow import Flow
from tinyfusion.processes.gaussian import NUM_TIMESTEPS, respaced_timesteps
from tinyfusion.processes.noising import (
    FewSteps,
    FlowNoising,
    GaussianNoising,
    LinearStep,
    linear_steps,
    noising_of_process,
)

Step = list[dict[str, float]]
OFFERED_STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 30, 40, 50, 100)


@dataclass(frozen=True)
class PageSampler:
    """A sampler of the page.

    title: as shown. command: the options of `tinyfusion sample` that select it, with {num_steps}, which is the number of steps
    plus `more`. steps: tables by number of steps. chosen: the number of steps at first.
    """

    title: str
    command: str
    more: int
    steps: Mapping[int, list[Step]]
    chosen: int

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        steps = {str(number): table for number, table in self.steps.items()}
        return {"title": self.title, "command": self.command, "more": self.more, "steps": steps, "chosen": self.chosen}


def samplers_of(model: LoadedModel) -> list[PageSampler]:
    """The samplers of a model, the first one chosen: DDIM of noise predictions, Heun's and Euler's method of flows, its own steps of a
    model that was distilled for few.

    Raises UserError for models of other processes.
    """
    noising = noising_of_process(model.family.process, model.facts.process_settings)
    if noising is None:
        raise UserError(
            f"the page draws with models that predict noise, or of a flow, and this is a {model.family.title}: give another model"
        )
    if (few := model.facts.few_steps) is not None:
        number = len(few.levels)
        return [PageSampler(few.method, "", 0, {number: _rows(linear_steps(noising, few))}, number)]
    if not isinstance(noising, FlowNoising):
        return [PageSampler("DDIM", "--sampler ddim --num-steps {num_steps}", 0, _offered(ddim_table), 50)]
    command = "--sampler ode --set sample.flow.method={method} --num-steps {{num_steps}}"
    return [
        PageSampler(name, command.format(method=method), 1, _offered(partial(flow_table, noising.flow, method)), 25)
        for name, method in (("Heun", "heun2"), ("Euler", "euler"))
    ]


def _offered(table: Callable[[int], list[Step]]) -> dict[int, list[Step]]:
    tables: dict[int, list[Step]] = {}
    for number in OFFERED_STEPS:
        with suppress(ValueError):  # a number that the rule of a sampler cannot make
            tables[number] = table(number)
    return tables


def _rows(steps: Sequence[LinearStep]) -> list[Step]:
    return [[{"start": 0.0, **step._asdict()}] for step in steps]


def ddim_table(num_steps: int) -> list[Step]:
    """DDIM without noise, at the timesteps of `sample`. Raises ValueError on a number of steps that its rule cannot make."""
    levels = [(t + 1) / NUM_TIMESTEPS for t in reversed(respaced_timesteps(f"ddim{num_steps}"))]
    return _rows(linear_steps(GaussianNoising(), FewSteps("ddim", tuple(levels), guidance=1.0, fresh_noise=False)))


def flow_table(flow: Flow, method: str, num_steps: int) -> list[Step]:
    """Even steps of "euler" or "heun2" from noise to data, for any path and prediction of a flow."""
    low, high = flow.sampling_ends(None)
    table = []
    for begin, end in pairwise(torch.linspace(low, high, num_steps + 1, dtype=torch.float64).tolist()):
        size, (of_x, of_out) = end - begin, _slope(flow, begin)
        step = [_evaluation(flow, begin, 0.0, 1 + size * of_x, size * of_out)]
        # x + size / 2 * (first slope + second slope), where size * first slope is x now - x before
        if method == "heun2":
            of_x, of_out = _slope(flow, end)
            step.append(_evaluation(flow, end, 0.5, 0.5 + size / 2 * of_x, size / 2 * of_out))
        table.append(step)
    return table


def _evaluation(flow: Flow, clean: float, start: float, x: float, out: float) -> dict[str, float]:
    return {"start": start, "t": float(flow.convention.at_clean(clean)), "x": x, "out": out, "noise": 0.0}


def _slope(flow: Flow, clean: float) -> tuple[float, float]:
    """Factors of x and of the network's output in the velocity towards the data, at 1 - noise level `clean`."""
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    t = torch.tensor([flow.convention.at_clean(clean)], dtype=torch.float64)
    return float(-flow.velocity(zero, one, t)), float(-flow.velocity(one, zero, t))
