"""TrainState: everything a training must remember between two steps, moving average and loss scale included."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tinyfusion.config.recipe import TrainingSection
from tinyfusion.core.errors import UserError
from tinyfusion.training.optim import ParameterGroup, optimizer_of
from tinyfusion.training.rounding import hold_weights, rounded_step
from tinyfusion.training.saved import Progress, SavedState
from tinyfusion.training.shards import first_row, is_sharded, like_part, local_part, whole

HORIZON_REMAINDER = 0.05  # share of the initial weights in the average above which a run counts as too short
_START_SCALE, _LOWEST_SCALE, _GROW_EVERY = 2.0**16, 1.0, 2000


class Ema:
    """Exponential moving average e <- decay * e + (1 - decay) * p of named parameters p, initialised with p.

    It is in float32 at least, also of bfloat16 parameters, whose precision a small share of a step is below. With decay 0 it is
    the parameters themselves, without a copy. on_host: in the host's memory, and updated there. The average of a sharded
    parameter is sharded in the same way, and every rank updates its own rows; on the host that is refused with UserError.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float, on_host: bool = False) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1); got {decay}")
        if on_host and decay and any(is_sharded(p) for p in parameters.values()):
            raise UserError("ema_device cpu needs whole parameters, and compute.parallel fsdp2 splits them: use same")
        self.decay = decay
        self.parameters = dict(parameters)
        self.on_host = on_host and decay > 0
        self.average = {name: p.detach() if decay == 0 else self._copied(p.detach()) for name, p in parameters.items()}

    def _copied(self, parameter: Tensor) -> Tensor:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return parameter.to("cpu" if self.on_host else parameter.device, dtype, copy=True)

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the current parameters; call it once per step."""
        if self.decay == 0:
            return
        pairs = [
            (local_part(a), local_part(p)) for a, p in zip(self.average.values(), self.parameters.values(), strict=True)
        ]
        alike = [(a, p) for a, p in pairs if (a.dtype, a.device) == (p.dtype, p.device)]
        if alike:
            averages, current = zip(*alike, strict=True)
            torch._foreach_lerp_(averages, current, 1 - self.decay)
        for average, parameter in pairs:
            if (average.dtype, average.device) != (parameter.dtype, parameter.device):
                average.lerp_(parameter.to(average.device).to(average.dtype), 1 - self.decay)  # moved before it grows

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Copy the averages into the parameters of `module` by name; all ranks must call this if they are sharded."""
        parameters = dict(module.named_parameters())
        for name, value in self.average.items():
            if is_sharded(parameters[name]):
                local_part(parameters[name]).copy_(local_part(value))
            else:
                parameters[name].copy_(whole(value))


def horizon_warning(decay: float, steps: int, section: str) -> str | None:
    """A warning with advice if more than 5 % of the average is the initial weights after `steps`; else None.

    section: section of the recipe that sets this training, such as "recover.training".
    The published decay 0.9999 leaves 37 % after 10,000 steps (arXiv 2412.01199, table 7, samples raw weights instead).
    """
    remainder = decay**steps
    if remainder <= HORIZON_REMAINDER:
        return None
    largest = math.floor(1e4 * HORIZON_REMAINDER ** (1 / max(steps, 1))) / 1e4  # rounded down: the advice must suffice
    return (
        f"the moving average (decay {decay}) still holds {remainder:.0%} of the initial weights after {steps} steps: "
        f"--set {section}.ema_decay={largest:g} or less, or train longer"
    )


class LossScale:
    """Loss scale of float16, whose small gradients would round to 0: halved on overflow, doubled after 2000 good steps.

    This is the rule of torch's GradScaler, which reads only the gradients of one process; here gradients may be
    sharded. value: None unless `used`.
    """

    def __init__(self, used: bool) -> None:
        self.value: float | None = _START_SCALE if used else None
        self.good_steps = 0

    @property
    def can_fall(self) -> bool:
        """Whether the scale can be lowered, which may avoid the overflow."""
        return self.value is not None and self.value > _LOWEST_SCALE

    def update(self, finite: bool) -> None:
        """Adapt the scale to a step whose gradients were finite or not."""
        if self.value is None:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, _LOWEST_SCALE)
        elif self.good_steps == _GROW_EVERY:
            self.value, self.good_steps = self.value * 2, 0


class TrainState:
    """Model, optimiser, moving average, loss scale and counters of a training."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[ParameterGroup],
        settings: TrainingSection,
        blocks: Iterable[nn.Module] = (),
    ) -> None:
        self.model = model
        self.parameters = {name: p for group in groups for name, p in group.parameters.items()}
        hold_weights(model, self.parameters, settings)
        self.optimizer: torch.optim.Optimizer = optimizer_of(groups, settings, blocks)
        self.ema = Ema(self.parameters, settings.ema_decay, settings.ema_device == "cpu")
        self.scale = LossScale(settings.dtype == "float16")
        self.step = 0
        self.seen_images = 0  # in all steps so far, whatever their batch sizes
        self.bad_steps = 0
        self._optimizer_name: str = settings.optimizer

    def clipped_apart(self) -> list[list[nn.Parameter]]:
        """The parameters of every `ParameterGroup` that has any."""
        apart: dict[int, list[nn.Parameter]] = {}
        for group in self.optimizer.param_groups:
            apart.setdefault(group["index"], []).extend(group["params"])
        return list(apart.values())

    def matrices(self) -> frozenset[str]:
        """Names of the parameters that Muon updates; none of another optimiser."""
        chosen = {id(p) for group in self.optimizer.param_groups if group["matrices"] for p in group["params"]}
        return frozenset(name for name, p in self.parameters.items() if id(p) in chosen)

    def update(self, seed: int) -> None:
        """Make the optimiser's step and update the average. seed: addresses the rounding of bfloat16 weights."""
        if any(p.dtype == torch.bfloat16 for p in self.parameters.values()):
            names = {p: name for name, p in self.parameters.items()}
            rounded_step(self.optimizer, names, seed, self.step)
        else:
            self.optimizer.step()
        self.ema.update()

    def weights(self) -> dict[str, Tensor]:
        """The trained parameters by name, gathered from all ranks, each of which must call this."""
        return {name: whole(parameter) for name, parameter in self.parameters.items()}

    def averages(self) -> dict[str, Tensor]:
        """Moving averages of the trained parameters by name, gathered from all ranks, each of which must call this."""
        return {name: whole(average) for name, average in self.ema.average.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Weights, averages and optimiser state by name, without gathering sharded tensors."""
        state = self._optimizer_state()
        return self._fixed() | {f"optimizer/{key}": value for key, value in state.items() if isinstance(value, Tensor)}

    def progress(self) -> Progress:
        """The fields of a checkpoint that are not tensors."""
        return Progress(
            self.step,
            self.bad_steps,
            self.seen_images,
            self._optimizer_name,
            self.scale.value,
            self.scale.good_steps,
            {key: value for key, value in self._optimizer_state().items() if isinstance(value, int | float)},
        )

    @torch.no_grad()
    def load(self, saved: SavedState) -> None:
        """Continue from a checkpoint, written on any number of ranks; each rank reads its own rows.

        Raises UserError, with the state unchanged, on missing or extra tensors, and on other shapes or dtypes.
        """
        targets, progress = self._fixed(), saved.progress
        self._check(saved, targets)
        for key, target in targets.items():
            own = local_part(target)
            own.copy_(saved.rows(key, first_row(target), own.shape[0] if own.ndim else 1))
        self.optimizer.state.clear()
        for key in saved.names():
            if key not in targets and not self._unused(key):
                _, slot, name = key.split("/", 2)
                parameter = self.parameters[name]
                self.optimizer.state[parameter][slot] = _placed(saved, key, parameter)
        for key, number in progress.optimizer_numbers.items():
            slot, name = key.split("/", 1)
            self.optimizer.state[self.parameters[name]][slot] = number
        self._count(progress)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within the context the state may train; afterwards it is as before. The copy is in the memory of the host."""
        kept, progress = {key: local_part(t).to("cpu", copy=True) for key, t in self.tensors().items()}, self.progress()
        had, numbers = self._optimizer_state().keys(), progress.optimizer_numbers
        try:
            yield
        finally:
            with torch.no_grad():
                for key, tensor in self.tensors().items():
                    if key in kept:
                        local_part(tensor).copy_(kept[key])
            for name, parameter in self.parameters.items():
                slots = self.optimizer.state.pop(parameter, {})
                keys = {slot: f"{slot}/{name}" for slot in slots}
                if before := {slot: numbers.get(key, slots[slot]) for slot, key in keys.items() if key in had}:
                    self.optimizer.state[parameter] = before
            self._count(progress)

    def _count(self, progress: Progress) -> None:
        """Take over the counters."""
        if self.scale.value is not None and progress.loss_scale is not None:
            self.scale.value, self.scale.good_steps = progress.loss_scale, progress.good_steps
        self.step, self.seen_images, self.bad_steps = progress.step, progress.seen_images, progress.bad_steps

    def _fixed(self) -> dict[str, Tensor]:
        """The tensors that exist before the first step."""
        tensors: dict[str, Tensor] = {f"weight/{name}": p.detach() for name, p in self.parameters.items()}
        if self.ema.decay == 0:  # it is the weights
            return tensors
        return tensors | {f"ema/{name}": average for name, average in self.ema.average.items()}

    def _optimizer_state(self) -> dict[str, Tensor | float]:
        """Tensors and numbers of the optimiser by "SLOT/PARAMETER"."""
        state = self.optimizer.state
        return {f"{k}/{name}": v for name, p in self.parameters.items() for k, v in state.get(p, {}).items()}

    def _unused(self, key: str) -> bool:
        """Whether a tensor of a checkpoint is an average that this training is without."""
        return self.ema.decay == 0 and key.startswith("ema/")

    def _check(self, saved: SavedState, targets: Mapping[str, Tensor]) -> None:
        progress = saved.progress
        if progress.optimizer != self._optimizer_name:
            raise UserError(
                f"it was made with optimizer {progress.optimizer}, this training has {self._optimizer_name}"
            )
        names = set(saved.names())
        for key, target in targets.items():
            wanted = f"{target.dtype} of shape {tuple(target.shape)}"
            got = f"{saved.dtype(key)} of shape {saved.shape(key)}" if key in names else "none"
            if got != wanted:
                raise UserError(f"it has no fitting {key}: wanted {wanted}, got {got}")
        matrices = self.matrices()
        extra = [key for key in sorted(names) if key not in targets and not self._unused(key)]
        for key in [*extra, *(f"optimizer/{key}" for key in progress.optimizer_numbers)]:
            kind, _, rest = key.partition("/")
            name = rest.partition("/")[2]
            if kind != "optimizer" or name not in self.parameters:
                raise UserError(f"it has {key}, which this training has not")
            if self._optimizer_name == "muon" and rest.startswith("momentum_buffer/") != (name in matrices):
                raise UserError(f"it has {key}, and this training updates {name} otherwise")
            if self._optimizer_name != "adamw-8bit" and key in names:
                shape = tuple(self.parameters[name].shape)
                if saved.shape(key) not in ((), shape):
                    raise UserError(f"it has no fitting {key}: wanted shape {shape}, got {saved.shape(key)}")


def _placed(saved: SavedState, key: str, parameter: Tensor) -> Tensor:
    """A tensor of the optimiser, on the device of its parameter, sharded alike where it has the same shape."""
    if is_sharded(parameter) and saved.shape(key) == tuple(parameter.shape):
        rows = saved.rows(key, first_row(parameter), local_part(parameter).shape[0])
        return like_part(rows.to(parameter.device, copy=True), parameter)
    return saved.whole(key).to(parameter.device, copy=True)
