"""Fast solvers of the same process, 10 to 50 steps: DPM-Solver++ (2M) and UniPC, by the schedulers of diffusers.

Shapes as in `processes/gaussian.py`. Both solve the noiseless equation of the process from its noise prediction; a
learned variance has no place in it and is dropped. Nothing is drawn on the way. Timesteps are spread evenly over
0..999, both ends included ("linspace", the default of both schedulers), and the last step ends without noise.
Sources: Lu et al. arXiv 2211.01095; Zhao et al. arXiv 2302.04867.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tinyfusion.processes.base import Denoiser
from tinyfusion.processes.gaussian import NUM_TIMESTEPS, split_output

SOLVERS = ("dpm-solver++", "unipc")
# the betas of `Schedule`, in the words of diffusers
PROCESS = {
    "num_train_timesteps": NUM_TIMESTEPS, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
    "prediction_type": "epsilon", "timestep_spacing": "linspace",
}  # fmt: skip


def solver_for(name: str) -> Any:
    """A new scheduler of diffusers: they remember the steps they made, so every batch has its own. ValueError on others."""
    if name not in SOLVERS:
        raise ValueError(f"no solver {name!r}; there is {', '.join(SOLVERS)}")
    import diffusers  # late: costs seconds

    kind: Any = diffusers.UniPCMultistepScheduler if name == "unipc" else diffusers.DPMSolverMultistepScheduler
    # order 2 and "dpmsolver++" are the defaults, said because they are meant
    with _quiet():
        return kind(**PROCESS, solver_order=2, **({} if name == "unipc" else {"algorithm_type": "dpmsolver++"}))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the word of NumPy on how diffusers makes arrays of tensors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array__ implementation doesn't accept a copy keyword")
        yield


def check_steps(num_steps: int) -> None:
    """ValueError on a number of steps that cannot be spread over the process."""
    if not 1 <= num_steps < NUM_TIMESTEPS:
        raise ValueError(f"takes 1 to {NUM_TIMESTEPS - 1} steps (10 to 50 are usual); got {num_steps}")


def sample_solver(model: Denoiser, name: str, num_steps: int, x: Tensor) -> Iterator[Tensor]:
    """Solve from x (B, C, H, W) ~ N(0, 1): yields x after every step. One call of the model each."""
    check_steps(num_steps)
    solver, channels = solver_for(name), x.shape[1]
    with _quiet():
        solver.set_timesteps(num_steps)
    for t in solver.timesteps:
        original = torch.full((x.shape[0],), int(t), dtype=torch.int64, device=x.device)
        noise, _ = split_output(model(x, original), channels)
        x = solver.step(noise, t, x).prev_sample
        yield x
