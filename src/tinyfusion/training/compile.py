"""Time and compare a training step eager and compiled, on this machine and this batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyfusion.core.compiler import compiler_failure
from tinyfusion.core.device import synchronise
from tinyfusion.core.errors import UserError

Step = Callable[[], Sequence[Tensor]]  # -> what must agree: losses and gradients


@dataclass(frozen=True)
class Gain:
    """Median milliseconds of both steps, seconds of compilation, and the difference of their results.

    apart: largest |compiled - eager| / |eager| of the returned tensors, in Euclidean norms.
    """

    eager_ms: float
    compiled_ms: float
    compile_s: float
    apart: float

    def require(self, tolerance: float = 1e-3) -> None:
        """Raise UserError if the compiled step is not faster, or differs by more than `tolerance`."""
        if not self.apart <= tolerance:
            raise UserError(
                f"compile changes the step here: losses and gradients are {self.apart:.1g} apart (relative), rounding allows "
                f"{tolerance:g}; leave --compile away"
            )
        if self.compiled_ms >= self.eager_ms:
            raise UserError(
                f"compile gains nothing here: {self.compiled_ms:,.4g} ms a step against {self.eager_ms:,.4g} ms without; "
                "leave --compile away"
            )


def measured_gain(eager: Step, compiled: Step, device: torch.device, repeats: int = 5) -> Gain:
    """Time both steps in turns, after a warm-up. Raises UserError if the compiler fails, also in a backward pass.

    A step is forward and backward on the same batch, and must not change weights and moments; torch's generators are
    restored. The number of calls does not depend on the measurement, so ranks that synchronise in a step stay together.
    """

    def seconds(step: Step) -> float:
        synchronise(device)
        began = time.perf_counter()
        step()
        synchronise(device)
        return time.perf_counter() - began

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        wanted = [value.detach().clone() for value in eager()]
        eager()
        try:
            began = time.perf_counter()
            apart = _apart(compiled(), wanted)
            compiled()
            synchronise(device)
            first_s = time.perf_counter() - began
            times = [(seconds(eager), seconds(compiled)) for _ in range(repeats)]
        except Exception as error:
            failure = compiler_failure(error, "the step")
            if failure is None:
                raise
            raise failure from error
    eager_s, compiled_s = (statistics.median(column) for column in zip(*times, strict=True))
    return Gain(1000 * eager_s, 1000 * compiled_s, max(0.0, first_s - 2 * compiled_s), apart)


def _apart(values: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Largest relative difference of two lists of tensors; NaN if one has NaN.

    Norms below 1e-6 of the largest count as that: zeros with rounding have no relative difference.
    """
    if not wanted:
        return 0.0
    norms = torch.stack([torch.linalg.vector_norm(w.float()) for w in wanted])
    pairs = zip(values, wanted, strict=True)
    apart = torch.stack([torch.linalg.vector_norm((value.detach() - w).float()) for value, w in pairs])
    tiny = torch.finfo(torch.float32).tiny
    return float((apart / norms.clamp(min=1e-6 * float(norms.max()) + tiny)).max())
