"""Deterministic samplers as tables: every step is a linear combination of x, the network's output and fresh noise.

So the page needs one function for all samplers (`makeStep` in `demo/page/sampling.js`), and other timesteps are other data. A table
is a list of steps, a step a list of evaluations of the network {t, start, x, out, noise}. Each evaluation replaces x by

    start * (x at the beginning of the step) + x * (x now) + out * (output at t) + noise * (fresh noise)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from tinyfusion.core.errors import UserError
from tinyfusion.processes.flow import Flow
from tinyfusion.processes.gaussian import Schedule, respaced_timesteps

Step = list[dict[str, float]]
OFFERED_STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 30, 40, 50, 100)


@dataclass(frozen=True)
class PageSampler:
    """A sampler of the page.

    title: for people. command: the options of `tinyfusion sample` that select it, with {num_steps}, which is the number of steps
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


def samplers_of(process: str, settings: Mapping[str, Any], title: str) -> list[PageSampler]:
    """The samplers of a process, the first one chosen: DDIM of "gaussian"; Heun's and Euler's method of "flow".

    settings: of the process, as in the model's facts. title: of the model's family, for messages. Raises UserError for other
    processes.
    """
    if process == "gaussian":
        return [
            PageSampler(
                "DDIM",
                "--sampler ddim --num-steps {num_steps}",
                0,
                _offered(lambda number: ddim_table(respaced_timesteps(f"ddim{number}"))),
                50,
            )
        ]
    if process == "flow":
        flow = Flow.of_settings(settings)
        command = "--sampler ode --set sample.flow.method={method} --num-steps {{num_steps}}"
        return [
            PageSampler(
                name, command.format(method=method), 1, _offered(lambda n, m=method: flow_table(flow, n, m)), 25
            )
            for name, method in (("Heun", "heun2"), ("Euler", "euler"))
        ]
    raise UserError(f"the page draws with models of noise or of a flow (DiT, SiT); this is a {title}")


def _offered(table: Callable[[int], list[Step]]) -> dict[int, list[Step]]:
    tables: dict[int, list[Step]] = {}
    for number in OFFERED_STEPS:
        with suppress(ValueError):  # a number that the rule of a sampler cannot make
            tables[number] = table(number)
    return tables


def _evaluation(t: float, start: float, x: float, out: float, noise: float = 0.0) -> dict[str, float]:
    return {"t": t, "start": start, "x": x, "out": out, "noise": noise}


def ddim_table(timesteps: Sequence[int]) -> list[Step]:
    """DDIM without noise (arXiv 2010.02502, equation 12): x_0 from the predicted noise, and both mixed at the next timestep.

    timesteps: of the 1000, ascending; 0 need not be one of them, and behind the first one there is no noise.
    """
    bars, table = Schedule().alphas_cumprod, []
    for t, after in pairwise([*reversed(timesteps), -1]):
        bar, bar_after = float(bars[t]), float(bars[after]) if after >= 0 else 1.0
        of_noise = math.sqrt(1 - bar_after) - math.sqrt(bar_after) * math.sqrt(1 / bar - 1)
        table.append([_evaluation(float(t), 0.0, math.sqrt(bar_after / bar), of_noise)])
    return table


def flow_table(flow: Flow, num_steps: int, method: str) -> list[Step]:
    """Even steps of "euler" or "heun2" from noise to data, for any path and prediction of a flow."""
    low, high = flow.sampling_ends(None)
    table = []
    for begin, end in pairwise(torch.linspace(low, high, num_steps + 1, dtype=torch.float64).tolist()):
        size, (of_x, of_out) = end - begin, _slope(flow, begin)
        step = [_evaluation(_time(flow, begin), 0.0, 1 + size * of_x, size * of_out)]
        if (
            method == "heun2"
        ):  # x + size / 2 * (first slope + second slope), where size * first slope is x now - x before
            of_x, of_out = _slope(flow, end)
            step.append(_evaluation(_time(flow, end), 0.5, 0.5 + size / 2 * of_x, size / 2 * of_out))
        table.append(step)
    return table


def _time(flow: Flow, clean: float) -> float:
    return float(flow.convention.at_clean(clean))


def _slope(flow: Flow, clean: float) -> tuple[float, float]:
    """Factors of x and of the network's output in the velocity towards the data, at 1 - noise level `clean`."""
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    t = torch.tensor([_time(flow, clean)], dtype=torch.float64)
    return float(-flow.velocity(zero, one, t)), float(-flow.velocity(one, one, t) + flow.velocity(zero, one, t))
