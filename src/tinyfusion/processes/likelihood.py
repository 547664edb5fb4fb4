"""The log density that a flow gives to data, by the change of variables along its trajectory.

From the data back to noise over c = 1 - noise level: log p(x) = log N(x_noise; 0, 1) - integral of div v over c, with
v = dx/dc. The divergence is estimated by one probe z of random signs, z^T (dv/dx) z, which stays the same along the trajectory
(Hutchinson): its mean over probes is the divergence, and where the Jacobian is diagonal it is exact. In nats, summed over all
elements, of the space that the model works in: nothing is added for grey levels or for an autoencoder.
Source: Grathwohl et al., arXiv 1810.01367; Ma et al., arXiv 2401.08740.
Differs: the published code draws z anew at every call, so that the solver's error control sees noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tinyfusion.processes.integrate import Field, root_mean_square

Steps = Callable[[Field, Tensor, Callable[[Tensor], Tensor]], Iterator[Tensor]]


def log_density(velocity: Field, x: Tensor, probe: Tensor, steps: Steps) -> Tensor:
    """(B,) log density of x (B, ...) in nats. velocity: of an unguided model; it is differentiated by x.

    probe: as x, of -1 and 1. steps(field, state, norm): integrates from data to noise; its state (B, D + 1) is the D
    elements of a sample and the integral, and norm takes the larger of their two errors.
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
    return prior + integral  # taken from the data to noise, the integral has the other sign


def larger_error(error: Tensor) -> Tensor:
    """(B, D + 1) -> (B,): the root mean square of the D elements, or the error of the integral where that is larger."""
    return torch.maximum(root_mean_square(error[:, :-1]), error[:, -1].abs())
