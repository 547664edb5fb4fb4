"""Stages: the parts of a network that a sampler calls one by one, as functions of named tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Stage:
    """A function of named tensors, with one result, or a tuple of them.

    network: the module whose weights it uses. run: the function, by keywords. example: (rows, generator) -> random arguments, in the
    order of `run`. varying: {argument or output: {axis: its name}} for axes of any length. outputs: names of the results.
    """

    network: nn.Module
    run: Callable[..., Tensor | tuple[Tensor, ...]]
    example: Callable[[int, torch.Generator], dict[str, Tensor]]
    varying: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("output",)
