"""Widths as data: channels that can only be removed together, and the model that a choice of them leaves.

A *group* is a set of channels that many tensors share: channel c of the residual stream is a row of the patch projection,
a column of every qkv, and so on. Groups have names: "residual", or "hidden.blocks.3" if each block has its own.
`kept_widths` of a plan has the kept channels of every group, nested by name:
{"residual": [...], "hidden": {"blocks": [[...], [...]]}}.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """`size` channels in `sections` equal runs, which keep equally many (heads: one run per head)."""

    size: int
    sections: int = 1


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor: the channels of `group`, `repeats` times over (q, k and v; the six modulations)."""

    group: str
    repeats: int = 1


Axes = Mapping[str, Sequence[Axis | None]]  # per tensor, per axis; None: never cut


@dataclass(frozen=True)
class WidthRules:
    """How the channels of a family's models are grouped and pruned, as functions of an architecture (arch).

    groups: arch -> its channel groups by name. axes: arch -> which group each axis of each tensor belongs to. narrowed:
    (arch, {group: number of channels}) -> arch of these sizes; raises ValueError if there is none. for_share: (arch,
    share of the parameters, 0 to 1) -> narrower arch. compensate: (sliced tensors, old arch, new arch) corrects side
    effects of slicing in place.
    """

    groups: Callable[[Any], dict[str, ChannelGroup]]
    axes: Callable[[Any], Axes]
    narrowed: Callable[[Any, Mapping[str, int]], Any]
    for_share: Callable[[Any, float], Any]
    compensate: Callable[[dict[str, Tensor], Any, Any], None]


def flat_kept(kept_widths: Any, name: str = "") -> dict[str, list[int]]:
    """`kept_widths` by name of group, ascending. Raises ValueError on anything but whole numbers in lists."""
    if isinstance(kept_widths, Mapping):
        items = list(kept_widths.items())
    elif isinstance(kept_widths, list) and any(isinstance(item, list) for item in kept_widths):
        items = list(enumerate(kept_widths))
    elif isinstance(kept_widths, list) and all(type(item) is int for item in kept_widths):
        return {name: sorted(kept_widths)}
    else:
        raise ValueError(f"kept_widths {name} wants lists of channels; got {str(kept_widths)[:40]}")
    channels: dict[str, list[int]] = {}
    for key, inner in items:
        channels.update(flat_kept(inner, f"{name}.{key}" if name else str(key)))
    return channels


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flat_kept`: values by name of group to the form of `kept_widths`."""
    kept_widths: dict[str, Any] = {}
    for name, value in flat.items():
        first, *rest = name.split(".")
        if not rest:
            kept_widths[first] = value
            continue
        lists = kept_widths.setdefault(first, {}).setdefault(rest[0], [])
        assert len(lists) == int(rest[1]), f"groups of {first} are out of order"
        lists.append(value)
    return kept_widths


def narrowed_arch(rules: WidthRules, arch: Any, kept_widths: Any) -> Any:
    """The arch with only `kept_widths`. Raises ValueError if they do not fit the groups of `arch`."""
    kept, groups = flat_kept(kept_widths), rules.groups(arch)
    if set(kept) != set(groups):
        odd = sorted(set(kept) ^ set(groups))
        raise ValueError(f"kept_widths and the model's groups of channels differ: {', '.join(odd[:3])}")
    student = rules.narrowed(arch, {name: len(channels) for name, channels in kept.items()})
    for name, group in rules.groups(student).items():
        channels, size, sections = kept[name], groups[name].size, group.sections
        if len(set(channels)) != len(channels) or not 0 <= channels[0] <= channels[-1] < size:
            raise ValueError(f"kept_widths {name} must be different channels from 0 to {size - 1}")
        per_section = [c * sections // size for c in channels]
        if [per_section.count(i) for i in range(sections)] != [group.size // sections] * sections:
            raise ValueError(
                f"kept_widths {name} must keep {group.size // sections} channels of each {size // sections}"
            )
    return student


def sliced(
    rules: WidthRules, arch: Any, tensors: Mapping[str, Tensor], kept_widths: Any
) -> tuple[Any, dict[str, Tensor]]:
    """The narrower arch, and copies of the tensors with only the kept channels. Raises ValueError as `narrowed_arch`."""
    student = narrowed_arch(rules, arch, kept_widths)
    kept, groups = flat_kept(kept_widths), rules.groups(arch)
    axes, slices = rules.axes(arch), {}
    for name, tensor in tensors.items():
        part = tensor.detach()
        for dim, axis in enumerate(axes.get(name, ())):
            if axis is not None:
                channels = torch.tensor(kept[axis.group], device=tensor.device)
                offsets = groups[axis.group].size * torch.arange(axis.repeats, device=tensor.device)
                part = part.index_select(dim, (offsets.unsqueeze(1) + channels).flatten())
        slices[name] = part.clone() if part.data_ptr() == tensor.data_ptr() else part
    rules.compensate(slices, arch, student)
    return student, slices


def channel_sums(axes: Axes, groups: Mapping[str, ChannelGroup], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Per group (size,), float64 on the CPU: the sum of `values` (by name, shaped as the weights) of each channel."""
    sums = {name: torch.zeros(group.size, dtype=torch.float64) for name, group in groups.items()}
    for name, tensor in values.items():
        whole = tensor.detach().cpu().double()
        for dim, axis in enumerate(axes.get(name, ())):
            if axis is not None:
                others = [i for i in range(whole.ndim) if i != dim]
                along = whole.sum(others) if others else whole
                sums[axis.group] += along.view(axis.repeats, -1).sum(0)
    return sums


def num_elements(shapes: Mapping[str, Sequence[int]], axes: Axes, groups: Mapping[str, ChannelGroup]) -> int:
    """Number of parameters of a model with these `groups`, from the `shapes` of another one of its family and depth."""
    total = 0
    for name, shape in shapes.items():
        along = axes.get(name) or [None] * len(shape)
        cut = [groups[axis.group].size * axis.repeats if axis else n for n, axis in zip(shape, along, strict=True)]
        total += math.prod(cut)
    return total
