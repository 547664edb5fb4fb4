"""LoRAs and IP-adapters of an unpruned model, renumbered for a student: keys follow their blocks, those of removed blocks are dropped.

diffusers loads a LoRA of the unpruned model onto a student without an error: the update of block 9 lands on whichever block is
now number 9. Only the index in a key changes, so every form of LoRA is renumbered alike: peft, kohya, the published names
of FLUX, xlabs, LyCORIS; ranks, alphas and fused projections stay as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tinyfusion.core.errors import UserError
from tinyfusion.families.diffusers_classes.cutting import LAST_BLOCKS, Cut

# names of a block list outside of diffusers: published files and the trainers that follow them
_OTHER_NAMES = {
    "transformer_blocks": ("double_blocks", "joint_blocks", "blocks"),
    "single_transformer_blocks": ("single_blocks", "single_layers"),
    "joint_transformer_blocks": ("double_layers",),
    "context_embedder.token_refiner.refiner_blocks": ("txt_in.individual_token_refiner.blocks",),
}
_PREFIXES = (
    "base_model", "diffusion_model", "lora_transformer", "lora_unet", "lycoris", "model", "transformer", "transformer_2",
    "unet",
)  # fmt: skip
# no key of a block
_OUTSIDE = re.compile(r"(?:lora_te\d?_|text_encoder(?:_\d)?[._]|image_proj\.|ip_adapter_proj_model\.)")
ADAPTER = "ip_adapter"  # entries of an IP-adapter, one per block
# what belongs to the text side of a joint block and is not there in a last one, in published names
_TEXT_SIDE = {
    "joint": ("context_block.attn.proj", "context_block.mlp"),
    "mochi": ("attn.proj_y", "mlp_y", "mod_y"),
}
_UP, _DOWN = ("lora_B", "lora_up", "up"), ("lora_A", "lora_down", "down")
_METADATA = "lora_adapter_metadata"  # the key under which peft's configuration is in the header of a safetensors file
_STALE_HASHES = ("sshs_model_hash", "sshs_legacy_hash")  # kohya's hashes of the tensors


@dataclass(frozen=True)
class Remapped:
    """A renumbered LoRA.

    tensors and metadata: the new file. renumbered, unchanged, dropped: keys of blocks that stay, keys outside of blocks, keys
    of removed blocks. dropped_share: of the sum over modules of the Frobenius norm of their update, in [0, 1]. notes: what a
    user has to know besides.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    renumbered: int
    unchanged: int
    dropped: int
    dropped_share: float
    notes: tuple[str, ...] = ()


def remap_lora(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], cuts: Sequence[Cut], name: str) -> Remapped:
    """The LoRA of an unpruned model for its student.

    cuts: from the model that the LoRA was trained for to the student, in the order in which they were made. name: of the
    file, for messages. Raises UserError where a key names a block beyond the model's depth, names a list of blocks in an
    unknown form, or where no key is left.
    """
    new, notes, dropped, unchanged = dict(tensors), [], 0, 0
    norms = update_norms(tensors)
    _check_form(tensors, cuts[0], name)
    lost: set[str] = set()
    origin = {key: key for key in tensors}
    for cut in cuts:
        names = _Names(cut)
        moved: dict[str, Tensor] = {}
        sources: dict[str, str] = {}
        unchanged = 0
        for key, value in new.items():
            place = names.place_of(key, name)
            if place is None:
                moved[key], sources[key] = value, origin[key]
                unchanged += 1
                continue
            renumbered = names.moved(place)
            kept = None if renumbered is None else names.as_last(place, value)
            if renumbered is None or kept is None:
                dropped += 1
                lost.add(_module_of(origin[key]))
                continue
            moved[renumbered], sources[renumbered] = kept, origin[key]
        new, origin = moved, sources
        metadata = _moved_metadata(metadata, names, name)
    if not new:
        raise UserError(f"{name} changes only blocks that the student no longer has: there is nothing to write")
    total = sum(norms.values())
    share = sum(norms.get(module, 0.0) for module in lost) / total if total else 0.0
    if unchanged == len(new) == len(tensors):
        notes.append("no key names a block of the model: nothing was renumbered")
    return Remapped(new, dict(metadata), len(new) - unchanged, unchanged, dropped, share, tuple(notes))


def _check_form(tensors: Mapping[str, Tensor], cut: Cut, file: str) -> None:
    """Raise UserError on a file that holds no updates, and on an IP-adapter without one entry per block of the unpruned model."""
    if not any(_ENDS.search(key) or ADAPTER in key for key in tensors):
        raise UserError(f"{file} is no LoRA and no IP-adapter: none of its {len(tensors)} keys names an update")
    entries = {key.split(".")[1] for key in tensors if key.startswith(f"{ADAPTER}.")}
    depths = [cut.depths[each.path] for each in cut.lists if each.adapter]
    if entries and not depths:
        raise UserError(
            f"{file} is an IP-adapter, and which blocks of this class its entries belong to is not known here"
        )
    if entries and entries != set(map(str, range(depths[0]))):
        raise UserError(
            f"{file} was trained for another model: it has {len(entries)} entries of {ADAPTER}, and the model before pruning "
            f"{depths[0]} blocks, an entry each"
        )


@dataclass(frozen=True)
class _Place:
    """Where a key names a block: text before the list's name, the list's path in diffusers, index, text behind the index."""

    head: str
    path: str
    index: int
    rest: str


class _Names:
    """The block lists of a pruned model in all their spellings."""

    def __init__(self, cut: Cut) -> None:
        self.cut = cut
        own = {prefix.removesuffix(".") for prefix, _ in cut.numbered}
        spellings: dict[str, str] = {}
        for path in own:
            for name in (path, *(other for other in _OTHER_NAMES.get(path, ()) if other not in own)):
                spellings |= {name: path, name.replace(".", "_"): path}
        for each in cut.lists:
            spellings |= {ADAPTER: each.path} if each.adapter else {}
        self._spellings = spellings
        lists = "|".join(re.escape(name) for name in sorted(spellings, key=len, reverse=True))
        prefixes = "|".join(sorted(_PREFIXES, key=len, reverse=True))
        self._anchored = re.compile(
            rf"(?P<head>(?:(?:{prefixes})[._])*(?P<list>{lists})[._])(?P<index>\d+)(?P<rest>(?:[._].*)?)$"
        )
        self._anywhere = re.compile(rf"(?:^|[._])(?:{lists})[._]\d+(?:[._]|$)")

    @cached_property
    def _moves(self) -> dict[str, Callable[[int], int | None]]:
        return {prefix.removesuffix("."): move for prefix, move in self.cut.numbered}

    def place_of(self, key: str, file: str) -> _Place | None:
        """The block that a key belongs to; None where it belongs to none. Raises UserError as `remap_lora` does."""
        match = self._anchored.match(key)
        if match is None:
            if self._anywhere.search(key) and not _OUTSIDE.match(key):
                raise UserError(
                    f"{file}: the key {key} names a block in a form that is not known; wanted the list at its start or behind one "
                    f"of {', '.join(_PREFIXES)}: convert the file to peft's form first"
                )
            return None
        path, index = self._spellings[match["list"]], int(match["index"])
        depth = self.cut.depths.get(path)
        if depth is not None and index >= depth:
            raise UserError(
                f"{file} was trained for another model: it changes block {index} of {path}, and the model before pruning has "
                f"{depth} (0 to {depth - 1}); give the LoRA of that model"
            )
        return _Place(match["head"], path, index, match["rest"])

    def moved(self, place: _Place) -> str | None:
        """The key in the student; None where the block is removed, or the module of a joint block that becomes the last one."""
        index, rest = self._moves[place.path](place.index), place.rest
        if (kind := self._last(place)) is not None:
            conversion = LAST_BLOCKS[kind]
            dropped = "|".join(map(_spelled, (*conversion.dropped, *_TEXT_SIDE[kind])))
            if re.match(rf"[._](?:{dropped})(?:[._]|$)", rest):
                return None
            module = r"(?<=^[._])norm1_context(?P<dot>[._])linear(?=[._]|$)"
            rest = re.sub(module, lambda match: conversion.renamed.replace(".", match["dot"]), rest)
        return None if index is None else f"{place.head}{index}{rest}"

    def _last(self, place: _Place) -> str | None:
        """The conversion of the block at this place, where it becomes the last one of joint blocks."""
        each = next((one for one in self.cut.lists if one.path == place.path), None)
        last = self.cut.kept[place.path][-1] if each is not None else None
        return each.as_last if each and place.index == last != self.cut.depths[place.path] - 1 else None

    def as_last(self, place: _Place, value: Tensor) -> Tensor | None:
        """The tensor in a joint block that becomes the last one, whose modulation has fewer rows; None where it cannot follow."""
        kind, inside = self._last(place), place.rest[1:]
        if kind is None or not re.match(r"norm1_context[._]linear[._]|context_block[._]adaLN_modulation[._]", inside):
            return value
        if not re.search(rf"\.(?:{'|'.join(_UP)})(?:\.|$)", inside):
            return value if re.search(rf"\.(?:{'|'.join((*_DOWN, 'alpha'))})(?:\.|$)", inside) else None
        conversion = LAST_BLOCKS[kind]
        chunks = value.chunk(conversion.chunks)
        return torch.cat(
            [chunks[i] for i in (conversion.order if inside.startswith("norm1") else sorted(conversion.order))]
        )


def _spelled(name: str) -> str:
    """A regular expression of a module's name, with dots or underscores."""
    return re.escape(name.removesuffix(".")).replace(r"\.", "[._]")


def _moved_metadata(metadata: Mapping[str, str], names: _Names, file: str) -> dict[str, str]:
    """The header of the new file: peft's configuration with its modules renumbered, without hashes of the old tensors."""
    new = {key: value for key, value in metadata.items() if key not in _STALE_HASHES}
    if _METADATA not in new:
        return new
    try:
        config = json.loads(new[_METADATA])
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: {_METADATA} in the header is no JSON ({error}): save the LoRA anew") from error
    if isinstance(config, dict):
        new[_METADATA] = json.dumps({key: _moved_setting(key, value, names, file) for key, value in config.items()})
    return new


def _moved_setting(key: str, value: Any, names: _Names, file: str) -> Any:
    """One setting of peft's configuration: modules named by their block follow it, and go with it."""

    def move(name: str) -> str | None:
        place = names.place_of(name, file)
        return name if place is None else names.moved(place)

    setting = key.rpartition(".")[2]
    if setting in ("rank_pattern", "alpha_pattern") and isinstance(value, dict):
        return {new: number for name, number in value.items() if (new := move(name)) is not None}
    if setting in ("target_modules", "exclude_modules", "modules_to_save") and isinstance(value, list):
        return [new for name in value if (new := move(name)) is not None]
    if setting == "layers_to_transform" and value is not None:
        lists = {names.cut.row.lists[0].path} if len(names.cut.lists) == 1 else set()
        if not lists:
            raise UserError(
                f"{file} states layers_to_transform, which does not say of which of the {len(names.cut.lists)} lists of blocks: "
                "remove it from the header's configuration; the keys say which blocks are changed"
            )
        numbers = [value] if isinstance(value, int) else list(value)
        moved = [names.moved(_Place("", path, number, "")) for path in lists for number in numbers]
        return [int(new) for new in moved if new is not None]
    return value


# ---------------------------------------------------------------------------------------------------------------- norms


def update_norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The Frobenius norm of every module's update, by the name of the module.

    LoRA: |alpha / r B A|, without forming the product; LoHa, LoKr and full differences by their formulas, and an IP-adapter's
    layers by their weights; scales of DoRA are not counted.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        module = _module_of(key)
        modules.setdefault(module, {})[key.removeprefix(module).lstrip(".")] = value
    return {module: _norm(parts) for module, parts in modules.items()}


_ENDS = re.compile(
    r"\.(?:(?:default\.)?lora_[AB]|lora_up|lora_down|(?:qkv_|proj_)?lora\d?\.(?:up|down)|lokr_\w+|hada_\w+|alpha|dora_scale"
    r"|lora_magnitude_vector|diff|diff_b|set_weight|lora_embedding_[AB])(?:\..*)?$"
)


def _module_of(key: str) -> str:
    """The module that a key of a LoRA changes."""
    found = _ENDS.search(key)
    return key[: found.start()] if found else key.rpartition(".")[0]


def _norm(parts: Mapping[str, Tensor]) -> float:
    alpha = next((float(value) for name, value in parts.items() if name == "alpha" and value.numel() == 1), None)
    total = 0.0
    for up, down in _pairs(parts):
        b, a = up.flatten(1).double(), down.flatten(1).double()
        square = float(((b.T @ b) * (a @ a.T).T).sum()) if b.shape[1] == a.shape[0] else 0.0
        total += max(square, 0.0) * ((alpha / a.shape[0]) ** 2 if alpha is not None else 1.0)
    if total:
        return float(total**0.5)
    named = {name.removesuffix(".weight"): value.double() for name, value in parts.items()}
    for whole in ("diff", "weight"):  # a difference of weights, or the layers of an IP-adapter
        if whole in named:
            return float(named[whole].norm())

    def factor(name: str) -> Tensor | None:
        if name in named:
            return named[name]
        left, right = named.get(f"{name}_a"), named.get(f"{name}_b")
        return left @ right.flatten(1) if left is not None and right is not None else None

    first, second = factor("lokr_w1"), factor("lokr_w2")
    if first is not None and second is not None:
        return float(first.norm() * second.norm())
    first, second = factor("hada_w1"), factor("hada_w2")
    return float((first * second).norm()) if first is not None and second is not None else 0.0


def _pairs(parts: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """(up, down) of a module's factors; xlabs names several pairs in one module."""
    for name, up in parts.items():
        words = name.split(".")
        for high, low in zip(_UP, _DOWN, strict=True):
            if high in words and up.ndim >= 2:
                down = parts.get(".".join(low if word == high else word for word in words))
                if down is not None:
                    yield up, down
