"""Compare a masked-KD step at DiT-XL/2 shape with a straightforward one: seconds, peak memory, retained features.

    python benchmarks/recover_step.py [--depth 8] [--batch-size 4] [--repeats 7] [--threads 2] [--out docs/results/recover-step.md]

The straightforward step collects the outputs of all blocks of both models in lists (forward hooks) and computes the released
formula with generic operations at the end; models, batch and output distillation are the same. A step is both forward
passes, the loss and the backward pass, without the optimiser. Sides alternate. Peak memory: allocated bytes above the state
before the step, as recorded by torch's profiler.
"""

from __future__ import annotations

import argparse
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared import memory_profile, peak_bytes, quartiles, xl_model
from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.stack import frozen
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import write_text
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.processes.base import Batch, NoisyBatch
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.recover.align import block_pairs
from tinyfusion.recover.distill import DistilledObjective
from tinyfusion.recover.terms import masked_feature_loss

MIB = 2**20
SIGMAS, BETA = 2.0, 1e-2


@dataclass
class Setting:
    """Teacher, student and one batch."""

    teacher: LoadedModel
    student: LoadedModel
    pairs: list[tuple[int, int]]
    noisy: NoisyBatch

    def objective(self, beta: float) -> DistilledObjective:
        """Distillation at a constant feature weight."""
        inner = GaussianObjective()
        stacks = self.teacher.stack, self.student.stack
        return DistilledObjective(
            inner, self.teacher.module, *stacks, self.pairs, steps=1, beta=(beta, beta), sigmas=SIGMAS
        )


def setting(depth: int, batch_size: int, width: int) -> Setting:
    """A random teacher, a student of half of its blocks (1:2), and a random batch of 32 x 32 latents."""
    teacher = xl_model(depth, width)
    groups = {"blocks": [[1, 2]] * (depth // 2)}
    plan = PrunePlan({"blocks": list(range(0, depth, 2))}, {"blocks": depth}, "indices", groups=groups)
    student = teacher.cut(plan)
    frozen(teacher.module)
    draws = Randomness(0).at(0, 0, batch_size)
    x = torch.from_numpy(draws.normal("x", (4, 32, 32)))
    noisy = GaussianObjective().draw(
        Batch(x, class_condition(torch.from_numpy(draws.integers("y", 1000)), 1000)), draws
    )
    return Setting(teacher, student, block_pairs(plan), noisy)


Forward = Callable[[], Tensor]


def ours(given: Setting) -> Forward:
    """The objective of `recover`."""
    objective = given.objective(BETA)

    def forward() -> Tensor:
        prediction = objective.predict(given.student.module, given.noisy)
        return objective.losses(given.student.module, given.noisy, prediction)["loss"].mean()

    return forward


def generic_feature_loss(own: Tensor, taught: Tensor) -> Tensor:
    """The released formula by generic operations: (B,)."""
    masks = [(f - f.mean((1, 2), keepdim=True)).abs() < SIGMAS * f.std((1, 2), keepdim=True) for f in (own, taught)]
    return ((masks[0] * own - masks[1] * taught) ** 2).mean((1, 2))


def straightforward(given: Setting) -> Forward:
    """The step that collects every block's output and computes the feature loss at the end."""
    objective = given.objective(0.0)

    def forward() -> Tensor:
        features: dict[str, list[Tensor]] = {"teacher": [], "student": []}
        handles = [
            block.register_forward_hook(lambda _m, _a, output, kept=features[name]: kept.append(output))
            for name, model in (("teacher", given.teacher), ("student", given.student))
            for block in model.stack
        ]
        prediction = objective.predict(given.student.module, given.noisy)
        for handle in handles:
            handle.remove()
        loss = objective.losses(given.student.module, given.noisy, prediction)["loss"]
        terms = []
        for s, t in given.pairs:
            terms.append(generic_feature_loss(features["student"][s], features["teacher"][t]))
        total = (loss + BETA * torch.stack(terms).mean(0)).mean()
        total.features = features  # type: ignore[attr-defined]  # where a step stores them: they live as long as it does
        return total

    return forward


SIDES: dict[str, Callable[[Setting], Forward]] = {"straightforward": straightforward, "ours": ours}


def step(given: Setting, forward: Forward) -> float:
    """Run forward and backward; return the loss."""
    given.student.module.zero_grad(set_to_none=True)
    loss = forward()
    loss.backward()
    return float(loss.detach())


def agreement(given: Setting) -> tuple[float, float]:
    """Relative differences of the loss and of the gradient between the two sides."""
    losses: dict[str, float] = {}
    gradients: dict[str, list[Tensor]] = {}
    for name, make in SIDES.items():
        losses[name] = step(given, make(given))
        gradients[name] = [p.grad for p in given.student.module.parameters() if p.grad is not None]
    apart = max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
        for a, b in zip(gradients["ours"], gradients["straightforward"], strict=True)
    )
    return abs(losses["ours"] / losses["straightforward"] - 1), apart


def step_peak_bytes(given: Setting, forward: Forward) -> int:
    """Peak of allocated bytes in a step above the state before it."""
    given.student.module.zero_grad(set_to_none=True)
    with memory_profile() as recorded:
        forward().backward()
    return peak_bytes(recorded)


def features_alive(given: Setting, forward: Forward) -> int:
    """Number of teacher block outputs in memory when the backward pass begins."""
    outputs: list[weakref.ReferenceType[Any]] = []
    handles = [
        block.register_forward_hook(lambda _m, _a, out: outputs.append(weakref.ref(out.untyped_storage())))
        for block in given.teacher.stack
    ]
    loss = forward()
    for handle in handles:
        handle.remove()
    alive = sum(reference() is not None for reference in outputs)
    del loss
    return alive


def feature_term_ms(given: Setting, repeats: int) -> dict[str, list[float]]:
    """CPU milliseconds of the feature loss of one pair, forward and backward, alternating."""
    arch, batch = given.teacher.arch, len(given.noisy.t)
    draws = Randomness(1).at(0, 0, batch)
    own, taught = (torch.from_numpy(draws.normal(name, (arch.num_tokens, arch.hidden_size))) for name in ("s", "t"))
    own.requires_grad_()
    kinds = {"straightforward": generic_feature_loss, "ours": lambda s, t: masked_feature_loss(s, t, SIGMAS)}
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(5 * repeats):
        for name, loss in kinds.items():
            own.grad = None
            began = time.process_time()
            loss(own, taught).sum().backward()
            found[name].append(1000 * (time.process_time() - began))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=8, help="blocks of the teacher; the student has half")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    given = setting(options.depth, options.batch_size, options.width)
    loss_apart, gradient_apart = agreement(given)  # also the warm-up
    calls = {name: make(given) for name, make in SIDES.items()}
    terms = feature_term_ms(given, options.repeats)
    alive = {name: features_alive(given, call) for name, call in calls.items()}
    memory = {name: step_peak_bytes(given, call) for name, call in calls.items()}
    wall: dict[str, list[float]] = {name: [] for name in SIDES}
    work: dict[str, list[float]] = {name: [] for name in SIDES}
    for repeat in range(options.repeats):
        for name in list(SIDES)[:: 1 if repeat % 2 else -1]:
            began = time.perf_counter(), time.process_time()
            step(given, calls[name])
            wall[name].append(time.perf_counter() - began[0])
            work[name].append(time.process_time() - began[1])
    rows = [
        f"DiT-XL/2 shape (width {options.width}, 256 tokens), teacher of {options.depth} blocks, student of {options.depth // 2}, "
        f"batch {options.batch_size}, float32, CPU, {torch.get_num_threads()} threads, {options.repeats} alternating steps: "
        "median (quartiles).",
        "",
        "| step | seconds | CPU seconds | of that, CPU ms of the features of one pair | peak MiB above the static state "
        "| teacher features alive at backward |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in SIDES:
        cells = (
            quartiles(wall[name], 2),
            quartiles(work[name], 2),
            quartiles(terms[name], 1),
            f"{memory[name] / MIB:.1f}",
            str(alive[name]),
        )
        rows.append(f"| {name} | {' | '.join(cells)} |")
    ratios = [
        [a / b for a, b in zip(kind["straightforward"], kind["ours"], strict=True)] for kind in (wall, work)
    ]  # fmt: skip
    peaks = [memory[name] for name in ("ours", "straightforward")]
    rows += [
        "",
        f"Straightforward over ours, neighbouring steps: {quartiles(ratios[0], 3)} of seconds, {quartiles(ratios[1], 3)} of CPU seconds. "
        f"Peak memory of ours: {peaks[0] / peaks[1] - 1:+.1%}.",
        "",
        f"Agreement: loss {loss_apart:.1e}, worst gradient tensor {gradient_apart:.1e} (relative).",
    ]
    print("\n".join(rows))
    if options.out:
        write_text(options.out, "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
