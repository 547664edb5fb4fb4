"""The training loop, a generator of one record per step; logging, checkpoints and interruption are the caller's `for` body.

Families, gates and teachers reach it as an `Objective` and as parameter groups; the engine hides the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from tinyfusion.config.recipe import TrainingSection
from tinyfusion.core.ahead import Ahead
from tinyfusion.core.device import SideStream
from tinyfusion.core.errors import BadNumbers
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.processes.base import Objective, Trials
from tinyfusion.training.engine import Engine
from tinyfusion.training.optim import learning_rate_factor
from tinyfusion.training.shards import local_part
from tinyfusion.training.state import TrainState

BatchSource = Callable[[int, int, Draws], Any]  # (step, global batch size, draws of a slice) -> its batch on the device


@dataclass(frozen=True)
class StepRecord:
    """Record of one step: 0-based number, mean of every loss term, gradient norm, whether it was applied.

    gradient_norm: over all parameters, before clipping. bad_samples: indices in the global batch with a non-finite
    loss, if the step was not applied. waited_s: seconds that the step waited for its batch. loss_scale: in float16
    only. trial: of which `Trials` it is a step; None for steps of the training itself.
    """

    step: int
    terms: Mapping[str, Tensor]
    gradient_norm: Tensor
    learning_rate: float
    applied: bool
    bad_samples: list[int] = field(default_factory=list)
    waited_s: float = 0.0
    loss_scale: float | None = None
    trial: int | None = None

    def values(self) -> dict[str, float | None]:
        """The numbers of a log line by name; None in place of non-finite ones."""
        numbers = {name: float(value) for name, value in {**self.terms, "gradient_norm": self.gradient_norm}.items()}
        scale = {} if self.loss_scale is None else {"loss_scale": self.loss_scale}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        return {**finite, "learning_rate": self.learning_rate, **scale}


class ForwardPass(nn.Module):
    """The forward pass of a step as one module with every trained parameter, so that DDP sees gates as well."""

    def __init__(self, state: TrainState, objective: Objective, settings: TrainingSection) -> None:
        super().__init__()
        self.model = state.model
        inside = {id(p) for p in state.model.parameters()}
        self.gates = nn.ParameterList([p for p in state.parameters.values() if id(p) not in inside])
        self.objective = objective
        self.dtype = settings.dtype

    def forward(self, noisy: Any) -> dict[str, Tensor]:
        """Per-sample loss terms (B,), float32; only the models run under autocast, not the losses."""
        device = next(iter(self.parameters())).device
        with autocast(device.type, self.dtype):
            prediction = self.objective.predict(self.model, noisy)
        return self.objective.losses(self.model, noisy, prediction)


def autocast(device: str, dtype: str) -> torch.autocast:
    """Autocast on a kind of device to a type by its name; off for float32."""
    off = dtype == "float32"
    return torch.autocast(device, dtype=None if off else getattr(torch, dtype), enabled=not off)


def noisy_microbatches(
    step: int, objective: Objective, source: BatchSource, batch_size: int, randomness: Randomness, engine: Engine
) -> list[Any]:
    """The microbatches of this rank at `step`, with all random numbers drawn."""
    slices = [randomness.at(step, first, num) for first, num in engine.slices(batch_size)]
    return [objective.draw(source(step, batch_size, draws), draws) for draws in slices]


def train_steps(
    state: TrainState,
    objective: Objective,
    source: BatchSource,
    settings: TrainingSection,
    randomness: Randomness,
    engine: Engine | None = None,
    trials: bool = True,
) -> Generator[StepRecord]:
    """Train from `state.step` to `settings.made_steps`, and yield a record after every step, when `state` can be saved.

    Steps of the objective's trials are yielded too: `StepRecord.trial` is not None, and `state` can be saved once the generator is
    closed. trials: False leaves them out. A non-finite loss or gradient on any rank, or a gradient norm of at least
    `settings.skip_norm`, skips the update on all ranks (moving average and optimiser do not change); `settings.max_bad_steps` such
    steps in a row raise BadNumbers. In float16 an overflow of the gradients lowers the loss scale, and counts as such a step only
    at the lowest scale. Batches are prepared on another thread.
    """
    engine = engine or Engine(next(iter(state.parameters.values())).device)
    loop = _Loop(state, objective, source, randomness, engine, engine.wrap(ForwardPass(state, objective, settings)))
    at = objective.trial_step
    if trials and at is not None and state.step <= at <= settings.made_steps:
        yield from loop.steps(settings, at)
        if wanted := objective.trials():
            yield from loop.trials(settings, wanted)
    yield from loop.steps(settings, settings.made_steps)


@dataclass(frozen=True)
class _Loop:
    """The steps of a training with one forward pass, which several sections of it share."""

    state: TrainState
    objective: Objective
    source: BatchSource
    randomness: Randomness
    engine: Engine
    forward: nn.Module

    def trials(self, settings: TrainingSection, trials: Trials) -> Iterator[StepRecord]:
        """The steps of all trials, and the decision. Each begins at the present state, which is there again at the end."""
        state, losses = self.state, []
        # bad steps of a trial are its loss, and never end a training
        most = state.bad_steps + trials.steps + 1
        own = replace(settings, batch_size=trials.batch_size, max_bad_steps=most)
        for index in range(trials.num):
            with state.restored():
                trials.enter(index)
                terms = []
                for record in self.steps(own, state.step + trials.steps, trials.rate):
                    terms.append(float(record.terms["loss"]))
                    yield replace(record, trial=index)
            late = terms[len(terms) // 2 :]
            losses.append(sum(late) / len(late))
        trials.decide(losses)

    def steps(self, settings: TrainingSection, end: int, rate: float = 1.0) -> Iterator[StepRecord]:
        """The steps from the state's own to `end`. rate: multiplies all learning rates."""
        state, objective, randomness, engine = self.state, self.objective, self.randomness, self.engine
        if state.step >= end:
            return
        side = SideStream(engine.device)

        def make(step: int) -> tuple[list[Any], Any]:
            with side.running():
                made = noisy_microbatches(step, objective, self.source, settings.batch_size, randomness, engine)
                return made, side.ready()

        compute = engine.compute
        with Ahead(make, compute.prefetch_batches, end=end, timeout_s=compute.timeout_s) as ahead:
            while state.step < end:
                step = state.step
                factor = learning_rate_factor(settings, step)
                for group in state.optimizer.param_groups:
                    group["lr"] = rate * group["base"] * (1.0 if group["constant"] else factor)

                waited_before = ahead.waited_s
                microbatches, ready = ahead.take(step)
                side.receive(ready, microbatches)
                waited_s = ahead.waited_s - waited_before
                state.optimizer.zero_grad(set_to_none=True)
                with _seeded(randomness, step, settings, engine):
                    with torch.no_grad(), autocast(engine.device.type, settings.dtype):
                        microbatches = list(objective.prepared(state.model, microbatches))
                    terms, losses = _forward_backward(state, self.forward, microbatches, settings, engine)
                norm, applied = _update(state, terms["loss"], settings, engine, randomness.seed)
                state.step += 1
                state.seen_images += settings.batch_size
                bad_samples = [] if applied else engine.gathered(_bad_samples(losses, settings, engine))
                made = rate * settings.learning_rate * factor
                yield StepRecord(step, terms, norm, made, applied, bad_samples, waited_s, state.scale.value)
                if state.bad_steps >= settings.max_bad_steps:
                    raise BadNumbers(_gone_bad(state.bad_steps, step, settings, bad_samples, float(norm)))


@contextmanager
def _seeded(randomness: Randomness, step: int, settings: TrainingSection, engine: Engine) -> Iterator[None]:
    """Within the context the global generators of torch depend on seed, step and rank alone, as the dropout of own modules does."""
    with torch.random.fork_rng(devices=[engine.device] if engine.device.type == "cuda" else []):
        torch.manual_seed(randomness.generator_seed(f"modules/{step}/{engine.slices(settings.batch_size)[0][0]}"))
        yield


def _forward_backward(
    state: TrainState, forward: nn.Module, microbatches: list[Any], settings: TrainingSection, engine: Engine
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Compute gradients of the mean loss over the global batch; return the means of all terms and this rank's losses."""
    sums: dict[str, Tensor] = {}
    losses = []
    for index, noisy in enumerate(microbatches):
        with engine.gradients(forward, last=index == len(microbatches) - 1):
            terms: dict[str, Tensor] = forward(noisy)
            # the engine averages over ranks, and the gradient of the mean loss is the sum of their shares
            share = terms["loss"].sum() / settings.batch_size
            (share * engine.world * (state.scale.value or 1.0)).backward()
        for name, values in terms.items():
            total = values.detach().sum()
            sums[name] = sums[name] + total if name in sums else total
        losses.append(terms["loss"].detach())
    totals = engine.total(torch.stack(list(sums.values())).float()) / settings.batch_size
    return dict(zip(sums, totals.unbind(), strict=True)), losses


def _bad_samples(losses: list[Tensor], settings: TrainingSection, engine: Engine) -> list[int]:
    first = engine.slices(settings.batch_size)[0][0]
    return [first + int(index) for index in (~torch.isfinite(torch.cat(losses))).nonzero()]


def _update(
    state: TrainState, loss: Tensor, settings: TrainingSection, engine: Engine, seed: int
) -> tuple[Tensor, bool]:
    """Clip gradients and update, unless loss or norm is not finite, or the norm reaches `skip_norm`.

    Returns (norm before clipping, whether the update was applied).
    """
    parameters = list(state.parameters.values())
    engine.finish_gradients(parameters)
    scale, limit = state.scale.value or 1.0, settings.clip_norm
    groups = state.clipped_apart() if settings.clip_groups == "apart" else [parameters]
    norms = [engine.gradient_norm(group) / scale for group in groups]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    # per group: removes the loss scale, and clips to the norm `limit`
    clips = [torch.ones_like(own) if limit is None else (limit / (own + 1e-6)).clamp(max=1.0) for own in norms]
    factors = [clip / scale for clip in clips]
    # one transfer of all that the host needs of a step: on an accelerator it waits for the device here and nowhere else
    norm_value, loss_value, *numbers = torch.stack([norm, loss, *factors]).tolist()
    finite = math.isfinite(norm_value) and math.isfinite(loss_value)
    applied = finite and (settings.skip_norm is None or norm_value < settings.skip_norm)
    if applied:
        for group, factor, number in zip(groups, factors, numbers, strict=True):
            gradients = [local_part(p.grad) for p in group if p.grad is not None]
            if gradients and number != 1:  # most steps of a calm training save two passes over all gradients
                torch._foreach_mul_(gradients, factor)
        state.update(seed)
        state.bad_steps = 0
    elif finite or not (state.scale.can_fall and math.isfinite(loss_value)):
        state.bad_steps += 1
    state.scale.update(finite)
    return norm, applied


def _gone_bad(bad_steps: int, step: int, settings: TrainingSection, bad_samples: list[int], norm: float) -> str:
    batch_size = settings.batch_size
    shown = ", ".join(map(str, bad_samples[:8])) + (", ..." if len(bad_samples) > 8 else "")
    what, which = "had a non-finite loss or gradient", "its loss is finite, its gradient is not"
    if bad_samples:
        which = f"samples {shown} of its {batch_size} have no finite loss"
    elif math.isfinite(norm):
        what, which = "were skipped", f"its gradient has the norm {norm:.4g}, and skip_norm is {settings.skip_norm:g}"
    return (
        f"{bad_steps} steps in a row {what}, the last at step {step} (images {step * batch_size:,} to "
        f"{(step + 1) * batch_size - 1:,}; {which}): `tinyfusion replay RUN --step {step}` shows it sample by sample; lower the "
        "learning rate, use float32, or look at the data of that step"
    )
