"""Optimisers with parameter groups, and the learning-rate schedule: exact at both ends for any length."""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tinyfusion.blocks.routers import is_router_key
from tinyfusion.config.recipe import TrainingSection
from tinyfusion.core.errors import UserError
from tinyfusion.training.shards import is_sharded

_SMALLEST_MATRIX = 16  # rows and columns


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that require gradients, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class ParameterGroup:
    """Named parameters with a common learning rate and weight decay.

    learning_rate: None: that of the training section. constant: no learning-rate schedule. decayed: with weight decay.
    """

    parameters: dict[str, nn.Parameter]
    learning_rate: float | None = None
    constant: bool = False
    decayed: bool = True


def decay_groups(
    parameters: dict[str, nn.Parameter],
    undecayed: Callable[[str, torch.Tensor], bool] | None,
    settings: TrainingSection,
) -> list[ParameterGroup]:
    """Split parameters into a group with weight decay and one without, for which `undecayed(name, value)` is true.

    A single group if there is no weight decay or no rule.
    """
    if undecayed is None or settings.weight_decay == 0:
        return [ParameterGroup(parameters)]
    exempt = {name: parameter for name, parameter in parameters.items() if undecayed(name, parameter)}
    rest = {name: parameter for name, parameter in parameters.items() if name not in exempt}
    return [ParameterGroup(rest), ParameterGroup(exempt, decayed=False)]


def block_matrices(blocks: Iterable[nn.Module]) -> set[int]:
    """The ids of the parameters that `Muon` updates: trained weights of the linear layers of these blocks.

    Routers and low-rank factors are none, nor is what has fewer than 16 rows or columns, such as the gate of a mixture of
    experts, or a head.
    """
    found = set()
    for block in blocks:
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear) and ".lora_" not in f".{name}" and not is_router_key(name):
                weight = module.weight
                if weight.requires_grad and min(weight.shape) >= _SMALLEST_MATRIX:
                    found.add(id(weight))
    return found


def optimizer_of(
    groups: Sequence[ParameterGroup], settings: TrainingSection, blocks: Iterable[nn.Module] = ()
) -> torch.optim.Optimizer:
    """The optimiser that the settings name, over the non-empty groups. blocks: of the model, for Muon.

    Its groups have "base", the peak learning rate, "constant", and "index", that of their `ParameterGroup`. Raises ValueError if all
    groups are empty, UserError if 8-bit moments are impossible (device, sharding, bitsandbytes), and on "muon" where torch has none
    or no matrix of a block trains.
    """
    listed: list[dict[str, Any]] = []
    matrices = block_matrices(blocks) if settings.optimizer == "muon" else set()
    for index, group in enumerate(groups):
        rate = settings.learning_rate if group.learning_rate is None else group.learning_rate
        about = {"lr": rate, "base": rate, "constant": group.constant, "index": index}
        about |= {} if group.decayed else {"weight_decay": 0.0}
        of_muon = [p for p in group.parameters.values() if id(p) in matrices]
        rest = [p for p in group.parameters.values() if id(p) not in matrices]
        listed += [{"params": values, **about, "matrices": values is of_muon} for values in (of_muon, rest) if values]
    if not listed:
        raise ValueError("nothing to train: no parameter group has a parameter")
    numbers: dict[str, Any] = dict(betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
    if settings.optimizer == "adamw-8bit":
        return _adamw_8bit(listed, numbers)
    return Muon(listed, numbers) if settings.optimizer == "muon" else torch.optim.AdamW(listed, **numbers, fused=True)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for the groups of `block_matrices`, AdamW for the others.

    The update of a matrix is its momentum (0.95, Nesterov), made orthogonal by five Newton-Schulz steps, and times
    0.2 sqrt(max(rows, columns)), so that it has the size of an AdamW update and the same learning rate serves both (arXiv
    2502.16982). groups: with "matrices", true or false. numbers: arguments of AdamW; its weight decay is for all.
    """

    def __init__(self, groups: list[dict[str, Any]], numbers: dict[str, Any]) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise UserError(
                f"optimizer muon needs torch 2.9 or newer, and this is {torch.__version__}: upgrade torch, or use optimizer adamw"
            )
        if not any(group["matrices"] for group in groups):
            raise UserError(
                "optimizer muon updates whole weight matrices of linear layers in blocks, and none trains here (low-rank updates and gates "
                "are not such matrices): use optimizer adamw"
            )
        sides = {side: [group for group in groups if group["matrices"] == side] for side in (True, False)}
        how = {"weight_decay": numbers["weight_decay"], "adjust_lr_fn": "match_rms_adamw"}
        made: dict[bool, torch.optim.Optimizer] = {True: torch.optim.Muon(sides[True], **how)}
        if sides[False]:
            made[False] = torch.optim.AdamW(sides[False], **numbers, fused=True)
        super().__init__([group for each in made.values() for group in each.param_groups], {})
        self._sides = made
        for each in made.values():
            each.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the parameters of `param_groups`."""
        for side, optimizer in self._sides.items():
            optimizer.param_groups = [group for group in self.param_groups if group["matrices"] == side]
            optimizer.step()


def _adamw_8bit(listed: list[dict[str, Any]], numbers: dict[str, Any]) -> torch.optim.Optimizer:
    """AdamW of bitsandbytes (arXiv 2110.02861), with moments of one byte.

    Only tensors of at least 4,096 elements have 8-bit moments, scaled per block of 256. The optimiser's state has the
    number of steps as a plain number.
    """
    first = listed[0]["params"][0]
    if any(is_sharded(parameter) for group in listed for parameter in group["params"]):
        raise UserError(
            "optimizer adamw-8bit needs whole parameters, and compute.parallel fsdp2 splits them: use ddp, or optimizer adamw"
        )
    if first.device.type not in ("cpu", "cuda"):
        raise UserError(
            f"optimizer adamw-8bit works on cpu and cuda, not on {first.device.type}: use optimizer adamw, or another device"
        )
    bitsandbytes = bitsandbytes_module("optim", "optimizer adamw-8bit is bitsandbytes", "use optimizer adamw")
    return bitsandbytes.AdamW8bit(listed, **numbers)


def bitsandbytes_module(name: str, needed: str, otherwise: str) -> Any:
    """A module of bitsandbytes. needed, otherwise: begin and end of the error. Raises UserError where it cannot be imported."""
    hush_bitsandbytes()
    try:
        return importlib.import_module(f"bitsandbytes.{name}")
    except (ImportError, OSError, RuntimeError) as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "bitsandbytes"
        what = "is not installed" if missing else f"does not load ({error})"
        raise UserError(f"{needed}, which {what}: pip install 'tinyfusion[8bit]', or {otherwise}") from error


def hush_bitsandbytes() -> None:
    """Silence bitsandbytes' import warnings about 4-bit kernels, which are not used here; peft imports it too."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def linear(ends: tuple[float, float], step: int, steps: int) -> float:
    """Linear schedule from ends[0] at step 0 to ends[1] at step `steps - 1` and after; ends[0] if `steps` is 1."""
    share = min(step / (steps - 1), 1.0) if steps > 1 else 0.0
    return ends[1] if share == 1 else ends[0] + (ends[1] - ends[0]) * share  # the end is exact, without rounding


def learning_rate_factor(settings: TrainingSection, step: int) -> float:
    """The learning rate at `step` as a share of its peak: linear warm-up, then cosine to `learning_rate_end_share`."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    floor = settings.learning_rate_end_share
    progress = min((step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps - 1, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
