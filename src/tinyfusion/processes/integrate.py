"""Integrating dx/dt = v(x, t): steps on a grid, and steps whose size follows the error, of every sample or of the whole batch.

Shapes: B samples; x is (B, ...), t (B,). Methods and their coefficients are those of torchdiffeq. A *field* is
v(x, t) -> (B, ...). Going back is going from the later end to the earlier one.

Where the batch shares its steps (`batch_steps`, as published) the error is one root mean square over all samples, so a
sample depends on its neighbours by about the tolerance. `sample_steps` gives each sample a time and a step size of its own;
samples that have arrived wait for the others. Its steps are rounded down to fixed sizes, four to a factor of two, so that
rounding in the network, which differs with the size of the batch, does not move them unless it decides narrowly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]
Ends = tuple[float, float]  # time to start from, time to end at
EVEN_METHODS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}  # -> calls of the field in a step
ADAPTIVE_METHODS = ("dopri5", "bosh3", "adaptive_heun", "fehlberg2", "dopri8")
_SAFETY, _SMALLEST_FACTOR, _LARGEST_FACTOR = 0.9, 0.2, 10.0  # of the next step, by the error of this one
_SMALLEST_STEP = 1e-5  # as a share of the whole way: such a step is taken whatever its error
_NEARLY = 1.01  # a step that nearly ends the way ends it
_NOTCHES = 4  # step sizes to a factor of two


@torch.no_grad()
def even_steps(field: Field, x: Tensor, ends: Ends, method: str, num_points: int) -> Iterator[Tensor]:
    """x after each of the `num_points` - 1 even steps, as `grid_steps`. ValueError on fewer than 2 points."""
    check_points(num_points)
    yield from grid_steps(field, x, torch.linspace(*ends, num_points, dtype=torch.float32, device=x.device), method)


@torch.no_grad()
def grid_steps(field: Field, x: Tensor, grid: Tensor, method: str) -> Iterator[Tensor]:
    """x after each step from one time of the grid (N,) to the next; nothing is kept of those before."""
    from torchdiffeq import odeint  # late: only flows need it

    for at in range(len(grid) - 1):
        x = odeint(_timed(field, x), x, grid[at : at + 2], method=method)[-1]
        yield x


def check_points(num_points: int) -> None:
    """ValueError on a grid of times that has no step."""
    if num_points < 2:
        raise ValueError(f"takes 2 points in time at least, both ends of one step; got {num_points}")


def _timed(field: Field, x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The field as torchdiffeq calls it, with one time for all."""
    return lambda t, state: field(state, t.to(torch.float32).expand(len(x)))


@torch.no_grad()
def batch_steps(
    field: Field, x: Tensor, ends: Ends, method: str, atol: float, rtol: float, beyond: bool = True
) -> Iterator[Tensor]:
    """x at the end, by steps that the whole batch shares, as published.

    The last step reaches over the end, and x is read off in between: the field is asked for times there as well (a toy ODE:
    at t = 2.3 on the way to 1). beyond = False asks at the end instead, for fields that are not known there.
    """
    from torchdiffeq import odeint

    def known(state: Tensor, t: Tensor) -> Tensor:
        return field(state, t if beyond else t.clamp(min(ends), max(ends)))

    times = torch.tensor(ends, dtype=torch.float32, device=x.device)
    # the solver's own times are float64, which Apple's devices have not
    options = {"dtype": torch.float32} if x.device.type == "mps" else None
    yield odeint(_timed(known, x), x, times, method=method, atol=atol, rtol=rtol, options=options)[-1]


# ----------------------------------------------------------------------------------------------- steps of every sample


@dataclass(frozen=True)
class Tableau:
    """An embedded Runge-Kutta pair: stage i at t + nodes[i] h from x + h sum_j weights[i][j] k_j.

    solution: weights of the result; error: of its difference from the other method of the pair. reuses: the last stage is
    the slope at the result, so the next step has its first.
    """

    order: int
    nodes: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    solution: tuple[float, ...]
    error: tuple[float, ...]
    reuses: bool


@cache
def tableau(method: str) -> Tableau:
    """The coefficients of a method of `ADAPTIVE_METHODS`; ValueError on others."""
    if method not in ADAPTIVE_METHODS:
        raise ValueError(f"no method {method!r} whose steps follow the error; there is {', '.join(ADAPTIVE_METHODS)}")
    from torchdiffeq._impl.odeint import SOLVERS  # the one place that has them all

    solver = SOLVERS[method]
    found = solver.tableau
    weights = tuple(tuple(row.tolist()) for row in found.beta)
    solution = tuple(found.c_sol.tolist())
    reuses = solution == (*weights[-1], 0.0)
    return Tableau(solver.order, tuple(found.alpha.tolist()), weights, solution, tuple(found.c_error.tolist()), reuses)


def root_mean_square(x: Tensor) -> Tensor:
    """Over all but the batch axis: (B,)."""
    return x.flatten(1).square().mean(1).sqrt()


@torch.no_grad()
def sample_steps(
    field: Field,
    x: Tensor,
    ends: Ends,
    method: str,
    atol: float,
    rtol: float,
    norm: Callable[[Tensor], Tensor] = root_mean_square,
) -> Iterator[Tensor]:
    """x after every round of steps, each sample at a time of its own, until all are at the end; no time is beyond it.

    A step is kept where norm(error / (atol + rtol max|x|)) <= 1; its size follows the error to the power -1 / order. norm: of
    (B, ...) to (B,). A sample whose field is not finite comes out as it is. Source of the step control: Hairer, Norsett &
    Wanner, Solving Ordinary Differential Equations I, II.4.
    """
    table, way = tableau(method), 1.0 if ends[1] >= ends[0] else -1.0
    span = abs(ends[1] - ends[0])
    done = np.zeros(len(x))  # how far every sample has come, float64

    def slope_at(state: Tensor, distance: np.ndarray) -> Tensor:
        """Slope along the way, so that going back is going forward."""
        return way * field(state, torch.from_numpy(ends[0] + way * distance).to(state.device, torch.float32))

    def scaled(error: Tensor, *states: Tensor) -> np.ndarray:
        size = torch.stack([state.abs() for state in states]).amax(0)
        return norm(error / (atol + rtol * size)).double().cpu().numpy()

    slope = slope_at(x, done)
    step = _notched(_first_step(slope_at, scaled, x, slope, span, table.order), span)
    while (running := done < span).any():
        left = span - done
        step = np.where(_NEARLY * step >= left, left, step)
        stages = torch.empty(len(table.nodes) + 1, *x.shape, dtype=x.dtype, device=x.device)
        stages[0] = slope if table.reuses else slope_at(x, done)
        for i, (node, weights) in enumerate(zip(table.nodes, table.weights, strict=True), start=1):
            stages[i] = slope_at(x + _sum(weights, stages, step), done + node * step)
        after = x + _sum(table.solution, stages, step)
        error = scaled(_sum(table.error, stages, step), x, after)
        kept = running & ((error <= 1) | (step <= 1.001 * _SMALLEST_STEP * span))
        chosen = _column(kept, x)
        x = torch.where(chosen, after, x)
        slope = torch.where(chosen, stages[-1], slope)
        done = np.where(kept, np.where(np.isfinite(error) & (step < left), done + step, span), done)
        step = _notched(step * _factor(error, table.order), span)
        yield x


def _notched(step: np.ndarray, span: float) -> np.ndarray:
    """The next smaller step of those there are; none below the smallest."""
    shares = np.maximum(step / span, _SMALLEST_STEP)
    return span * 2.0 ** (np.floor(_NOTCHES * np.log2(shares) + 1e-6) / _NOTCHES)


def _factor(error: np.ndarray, order: int) -> np.ndarray:
    """What the next step is of this one: the smallest factor where the error is not a number."""
    with np.errstate(divide="ignore"):
        wanted = _SAFETY * np.where(np.isfinite(error), error, np.inf) ** (-1.0 / order)
    return np.clip(wanted, np.where(error < 1, 1.0, _SMALLEST_FACTOR), _LARGEST_FACTOR)


def _first_step(
    slope_at: Callable[[Tensor, np.ndarray], Tensor],
    scaled: Callable[..., np.ndarray],
    x: Tensor,
    slope: Tensor,
    span: float,
    order: int,
) -> np.ndarray:
    """A first step by the size of the slope and of its change."""
    size, steepness = scaled(x, x), scaled(slope, x)
    small = (size < 1e-5) | (steepness < 1e-5) | ~np.isfinite(steepness)
    guess = np.minimum(np.where(small, 1e-6, 0.01 * size / np.where(small, 1.0, steepness)), span)
    ahead = slope_at(x + _column(guess, x) * slope, guess)
    change = scaled(ahead - slope, x) / guess
    largest = np.maximum(steepness, change)
    flat = ~(largest > 1e-15)
    second = np.where(flat, np.maximum(1e-6, 1e-3 * guess), (0.01 / np.where(flat, 1.0, largest)) ** (1.0 / order))
    return np.clip(np.minimum(100 * guess, second), _SMALLEST_STEP * span, span)


def _sum(weights: tuple[float, ...], stages: Tensor, step: np.ndarray) -> Tensor:
    """h times the weighted sum of the first stages."""
    factors = torch.tensor(weights, dtype=stages.dtype, device=stages.device)
    total = (factors.view(-1, *[1] * (stages.dim() - 1)) * stages[: len(weights)]).sum(0)
    return _column(step, total) * total


def _column(values: np.ndarray, like: Tensor) -> Tensor:
    """Values (B,) so that they go with every element of their sample."""
    column = torch.from_numpy(values).to(like.device)
    if column.is_floating_point():
        column = column.to(like.dtype)
    return column.view(-1, *[1] * (like.dim() - 1))
