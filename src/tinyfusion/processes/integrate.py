"""ODE solvers for dx/dt = v(x, t): fixed steps on a grid, and adaptive steps per sample or for the whole batch.

Shapes: B samples; x is (B, ...), t (B,). Methods and their coefficients are torchdiffeq's. A *field* is v(x, t) -> (B, ...).
Times may decrease.

torchdiffeq adapts one step size for the whole batch (`batch_steps`, as published): the error is one root mean square
over all samples, so a sample depends on the others of its batch by about the tolerance. `sample_steps`, which
torchdiffeq does not have, uses a time and a step size per sample; finished samples wait for the others. Step sizes are
rounded down to a geometric grid, four per factor of two, so that rounding in the network, which differs with the batch
size, rarely changes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor], Tensor]
Ends = tuple[float, float]  # first and last time
Steps = Callable[[Field, Tensor, Callable[[Tensor], Tensor]], Iterator[Tensor]]
EVEN_METHODS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}  # -> calls of the field per step
ADAPTIVE_METHODS = ("dopri5", "bosh3", "adaptive_heun", "fehlberg2", "dopri8")
_SAFETY, _SMALLEST_FACTOR, _LARGEST_FACTOR = 0.9, 0.2, 10.0  # of the next step size to this one
_SMALLEST_STEP = 1e-5  # as a share of the interval: such a step is accepted with any error
_NEARLY = 1.01  # a step that nearly reaches the end is lengthened to it
_SIZES_PER_OCTAVE = 4


@torch.no_grad()
def grid_steps(field: Field, x: Tensor, grid: Tensor, method: str) -> Iterator[Tensor]:
    """Yield x after each step from one time of the grid (N,) to the next."""
    from torchdiffeq import odeint  # late: only flows need it

    for at in range(len(grid) - 1):
        x = odeint(_timed(field, x), x, grid[at : at + 2], method=method)[-1]
        yield x


def check_points(num_points: int) -> None:
    """Raise ValueError if a grid of `num_points` times has no step."""
    if num_points < 2:
        raise ValueError(f"takes 2 points in time at least, both ends of one step; got {num_points}")


def _timed(field: Field, x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The field with one time for all samples, as torchdiffeq calls it."""
    return lambda t, state: field(state, t.to(torch.float32).expand(len(x)))


@torch.no_grad()
def batch_steps(
    field: Field, x: Tensor, ends: Ends, method: str, atol: float, rtol: float, beyond: bool = True
) -> Iterator[Tensor]:
    """Integrate with adaptive steps that the whole batch shares, as published; yields x at the end.

    The last step goes beyond the end, and x is interpolated, so the field is also evaluated beyond the end (in a toy
    ODE at t = 2.3 for an end of 1). beyond = False clamps times to the interval, for fields that are undefined outside
    of it.
    """
    from torchdiffeq import odeint

    def known(state: Tensor, t: Tensor) -> Tensor:
        return field(state, t if beyond else t.clamp(min(ends), max(ends)))

    times = torch.tensor(ends, dtype=torch.float32, device=x.device)
    # the solver's own times are float64, which Apple's devices do not have
    options = {"dtype": torch.float32} if x.device.type == "mps" else None
    yield odeint(_timed(known, x), x, times, method=method, atol=atol, rtol=rtol, options=options)[-1]


# -------------------------------------------------------------------------------------------------- steps of each sample


def root_mean_square(x: Tensor) -> Tensor:
    """Root mean square (B,) over all axes except the batch axis."""
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
    """Integrate with adaptive steps per sample; yields x after every round of steps, until all samples are at the end.

    A step is accepted if norm(error / (atol + rtol max|x|)) <= 1, and its size follows the error to the power
    -1 / order. norm: (B, ...) -> (B,). No sample goes beyond the end, and one with a non-finite field ends at once.
    Raises ValueError on methods outside of `ADAPTIVE_METHODS`. Source of the step control: Hairer, Norsett & Wanner,
    Solving Ordinary Differential Equations I, II.4.
    """
    if method not in ADAPTIVE_METHODS:
        raise ValueError(f"no method {method!r} with adaptive steps; there is {', '.join(ADAPTIVE_METHODS)}")
    from torchdiffeq._impl.odeint import SOLVERS  # the only place that has them all

    # an embedded Runge-Kutta pair: stage i at t + nodes[i] h from x + h sum_j rows[i][j] k_j; error: of the result's weights
    (nodes, rows, solution, error_weights), order = SOLVERS[method].tableau, SOLVERS[method].order
    reuses = solution.tolist() == [*rows[-1].tolist(), 0.0]  # the last stage is the slope at the result
    way, span = 1.0 if ends[1] >= ends[0] else -1.0, abs(ends[1] - ends[0])
    done = np.zeros(len(x))  # distance covered by every sample, float64

    def slope_at(state: Tensor, distance: np.ndarray) -> Tensor:
        """Slope by the distance covered, which always grows."""
        return way * field(state, torch.from_numpy(ends[0] + way * distance).to(state.device, torch.float32))

    def scaled(error: Tensor, *states: Tensor) -> np.ndarray:
        size = torch.stack([state.abs() for state in states]).amax(0)
        return norm(error / (atol + rtol * size)).double().cpu().numpy()

    slope = slope_at(x, done)
    step = _rounded_down(_first_step(slope_at, scaled, x, slope, span, order), span)
    while (running := done < span).any():
        left = span - done
        step = np.where(_NEARLY * step >= left, left, step)
        stages = torch.empty(len(nodes) + 1, *x.shape, dtype=x.dtype, device=x.device)
        stages[0] = slope if reuses else slope_at(x, done)
        for i, (node, weights) in enumerate(zip(nodes.tolist(), rows, strict=True), start=1):
            stages[i] = slope_at(x + _sum(weights, stages, step), done + node * step)
        after = x + _sum(solution, stages, step)
        error = scaled(_sum(error_weights, stages, step), x, after)
        accepted = running & ((error <= 1) | (step <= 1.001 * _SMALLEST_STEP * span))
        chosen = _column(accepted, x)
        x = torch.where(chosen, after, x)
        slope = torch.where(chosen, stages[-1], slope)
        done = np.where(accepted, np.where(np.isfinite(error) & (step < left), done + step, span), done)
        step = _rounded_down(step * _factor(error, order), span)
        yield x


def _rounded_down(step: np.ndarray, span: float) -> np.ndarray:
    """The next smaller step size of the geometric grid, at least about the smallest."""
    shares = np.maximum(step / span, _SMALLEST_STEP)
    return span * 2.0 ** (np.floor(_SIZES_PER_OCTAVE * np.log2(shares) + 1e-6) / _SIZES_PER_OCTAVE)


def _factor(error: np.ndarray, order: int) -> np.ndarray:
    """The next step size as a multiple of this one; the smallest if the error is not finite."""
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
    """The first step size, from the slope and its change."""
    size, steepness = scaled(x, x), scaled(slope, x)
    small = (size < 1e-5) | (steepness < 1e-5) | ~np.isfinite(steepness)
    guess = np.minimum(np.where(small, 1e-6, 0.01 * size / np.where(small, 1.0, steepness)), span)
    ahead = slope_at(x + _column(guess, x) * slope, guess)
    change = scaled(ahead - slope, x) / guess
    largest = np.maximum(steepness, change)
    flat = ~(largest > 1e-15)
    second = np.where(flat, np.maximum(1e-6, 1e-3 * guess), (0.01 / np.where(flat, 1.0, largest)) ** (1.0 / order))
    return np.clip(np.minimum(100 * guess, second), _SMALLEST_STEP * span, span)


def _sum(weights: Tensor, stages: Tensor, step: np.ndarray) -> Tensor:
    """h times the weighted sum of the first stages."""
    factors = weights.to(stages.device, stages.dtype)
    total = (factors.view(-1, *[1] * (stages.dim() - 1)) * stages[: len(weights)]).sum(0)
    return _column(step, total) * total


def _column(values: np.ndarray, like: Tensor) -> Tensor:
    """Values (B,), shaped to broadcast over the elements of each sample."""
    column = torch.from_numpy(values).to(like.device)
    if column.is_floating_point():
        column = column.to(like.dtype)
    return column.view(-1, *[1] * (like.dim() - 1))


# ------------------------------------------------------------------------------------------------------------- likelihood


def log_density(velocity: Field, x: Tensor, probe: Tensor, steps: Steps) -> Tensor:
    """(B,) log density of x (B, ...) under a flow, in nats: log N(x_noise; 0, 1) - integral of div v over c = 1 - noise level.

    Integrated from the data back to noise, v = dx/dc of an unguided model, which is differentiated by x. The divergence is
    estimated by one probe z of random signs, z^T (dv/dx) z, fixed along the trajectory (Hutchinson): its mean over probes is
    the divergence, and with a diagonal Jacobian it is exact. Summed over all elements in the model's own space.
    probe: as x, of -1 and 1. steps(field, state, norm): integrates from data to noise; its state (B, D + 1) is the D
    elements of a sample and the integral, and norm takes the larger of their two errors.
    Source: Grathwohl et al., arXiv 1810.01367; Ma et al., arXiv 2401.08740. Differs: the published code draws z anew at every
    call, so that the solver's error control sees noise.
    """

    def together(state: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            at = state[:, :-1].view_as(x).detach().requires_grad_()
            v = velocity(at, t)
            (pulled,) = torch.autograd.grad(v, at, probe)
        divergence = (pulled * probe).flatten(1).sum(1, keepdim=True)
        return torch.cat([v.detach().flatten(1), divergence], dim=1)

    *_, end = steps(together, torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1), larger_error)
    noise, integral = end[:, :-1].double(), end[:, -1].double()
    prior = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(1)
    return prior + integral  # from the data to noise, the integral has the other sign


def larger_error(error: Tensor) -> Tensor:
    """(B, D + 1) -> (B,): the larger of the root mean square of the D elements and the error of the integral."""
    return torch.maximum(root_mean_square(error[:, :-1]), error[:, -1].abs())
