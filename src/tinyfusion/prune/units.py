"""Criteria on transformers of diffusers: they select units (blocks that must be removed together) on recorded calls.

A unit is a single block unless the class ties blocks together. The loss of a mask is the squared error of the pruned
model's output against the whole model's, over all tensors that a call returns, divided by their mean square and
averaged over the calls. It needs no training objective, so it is the same for every class. All images of a recorded
call run with one mask.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tinyfusion.blocks.plan import PrunePlan, first_blocks
from tinyfusion.blocks.replayed import BlockReplay
from tinyfusion.blocks.scheme import BlockGroup, check_range
from tinyfusion.blocks.streams import tensors_in
from tinyfusion.config.recipe import PruneSection
from tinyfusion.core.errors import UserError
from tinyfusion.data.recorded import RecordedInputs, returning_tuples
from tinyfusion.families.diffusers_classes.cutting import Cut, UnitList, unit_blocks
from tinyfusion.families.diffusers_classes.folder import TransformerFolder
from tinyfusion.processes.task import Task, TaskBatch
from tinyfusion.prune.calibrate import BlockStatistics, Calibration, Tick, block_statistics
from tinyfusion.prune.context import CriterionContext, bk_sdm_positions
from tinyfusion.prune.criteria import CRITERIA
from tinyfusion.prune.mask_search import LossSums, Mask, replayed_losses

ON_DATA = tuple(name for name, row in CRITERIA.items() if row.evaluations is not None and name != "width")
_ALL = "all"  # in a budget: the lists of the trunk together
_RETAINED_SHARE, _RETAINED_BYTES = 0.1, 2**26  # outputs of blocks that a search keeps: share of the model, at least


@dataclass(frozen=True)
class RecordedCalibration(Calibration):
    """Recorded calls as a calibration set. images: number of calls. facts: record of their file, for the plan."""

    facts: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """The record of the calibration set that a plan stores."""
        protocol = "calls as recorded from a pipeline, all images of a call with one mask, weights in their own types"
        return {"data": self.data, "calls": self.images, **self.facts, "protocol": protocol}


def recorded_calibration(inputs: RecordedInputs, model: TransformerFolder, seed: int) -> RecordedCalibration:
    """The recorded calls of a file, for a model. Raises UserError if they are of another class or another model.

    A student also takes the calls of its ancestors, whose latents and texts fit it, unless the class has inputs per
    block.
    """
    check_recorded_on(inputs, model)
    calls: Any = tuple(map(TaskBatch, inputs.calls))
    facts = {"prompts": inputs.prompts, "recorded_on": inputs.hash}
    return RecordedCalibration(calls, _AS_RECORDED, inputs.path.name, len(calls), len(calls), seed, facts)


def check_recorded_on(inputs: RecordedInputs, model: TransformerFolder) -> None:
    """Raise UserError unless calls were recorded on a model or, where it has no inputs per block, on an ancestor of it."""
    ancestor = inputs.hash in [each["hash"] for each in model.lineage]
    inputs.check_class(model.class_name, model.path)
    if inputs.hash != model.hash and (not ancestor or model.row.parallel or model.row.indices):
        why = "its ancestor, which is given other inputs per block" if ancestor else "another model"
        raise UserError(
            f"{inputs.path} was recorded on {inputs.hash[:12]}, and {model.path} is {model.hash[:12]}: that is {why}; record inputs of "
            "its own, `tinyfusion record`"
        )


def run_call(model: nn.Module, call: Mapping[str, Any]) -> Tensor:
    """All values that a call of the model returns, flattened into one float32 tensor.

    Raises UserError if the model does not take the call.
    """
    device = next(model.parameters()).device
    arguments = returning_tuples(model, tree_map_only(Tensor, lambda tensor: tensor.to(device), call))
    try:
        output = model(**arguments)
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(f"a {type(model).__name__} does not take the recorded inputs: {error}") from error
    return torch.cat([tensor.flatten().float() for tensor in tensors_in(output)])


_AS_RECORDED = Task(run_call, lambda _output, _call: torch.zeros(1))  # criteria here compare outputs, and train nothing


@dataclass(frozen=True)
class UnitContext(CriterionContext):
    """The input of a criterion on a transformer of diffusers: every list is a list of units, and indices count units.

    teacher: the module with its block lists, on the meta device if the criterion does not run it. unit_lists: of
    `model`.
    """

    model: TransformerFolder = field(kw_only=True)
    unit_lists: Sequence[UnitList] = field(kw_only=True)
    # of the whole model, by number of the call: output on the CPU, and its sum of squares
    _outputs_of_calls: dict[int, tuple[Tensor, float]] = field(default_factory=dict, repr=False)

    @property
    def depths(self) -> dict[str, int]:
        """Number of units per list."""
        return {each.name: len(each.units) for each in self.unit_lists}

    @property
    def teacher_hash(self) -> str:
        """The hash of the model folder."""
        return self.model.hash

    @property
    def loss(self) -> str:
        """Description of the loss of a mask, for the plan."""
        return "squared error to the whole model's output, relative to its mean square,"

    @cached_property
    def blocks(self) -> list[tuple[int, ...]]:
        """The blocks of every unit, as global indices through the model's lists."""
        return unit_blocks(self.unit_lists, self.model.depths)

    # ------------------------------------------------------------------------------------------------- what may stay

    @property
    def groups(self) -> dict[str, BlockGroup]:
        """For every list, how many units stay and which of them are protected."""
        settings = self.settings
        check_range("--protect", sorted(set(settings.protect)), self.model.depths)
        budgets, groups = _budgets(self.unit_lists, settings), dict[str, BlockGroup]()
        start = 0
        for each in self.unit_lists:
            size, wanted = len(each.units), budgets.get(each.name)
            protected = {i for i in range(size) if i in each.fixed or {*self.blocks[start + i]} & {*settings.protect}}
            keep = max((size + 1) // 2, len(each.fixed)) if wanted is None else _units_of(each, wanted)
            if each.aside and wanted is None:
                protected, keep = set(range(size)), size
            elif settings.criterion == "bk-sdm":
                keep = _by_pairs(each, settings, sorted(protected), None if wanted is None else keep)
            if len(protected) > keep:
                raise UserError(
                    f"{len(protected)} units of {each.name} have to stay or are protected, and {keep} are to stay: keep more"
                )
            groups[each.name] = BlockGroup(start, size, keep, tuple(start + i for i in sorted(protected)))
            start += size
        return groups

    @cached_property
    def occupied(self) -> list[frozenset[int]]:
        """Sets of units, of each of which at least one has to stay: between two hints, and at the end of some lists."""
        row, config, starts = self.model.row, self.model.config, first_blocks(self.model.depths)
        spans: list[tuple[str, int, int]] = []
        for name, path in row.last.items():
            depth = self.model.depths[path]
            spans += [(path, depth - config[name], depth)] if config.get(name) else []
        for name, path in row.hints.items():
            hints = sorted(config.get(name) or ())
            spans += [(path, before + 1, hint + 1) for before, hint in zip([-1, *hints], hints, strict=False)]
        blocks = [range(starts[path] + first, starts[path] + stop) for path, first, stop in spans]
        return [frozenset(i for i, unit in enumerate(self.blocks) if {*unit} & {*span}) for span in blocks]

    def allows(self, mask: Mask) -> bool:
        """Whether every set of `occupied` has a unit in the mask."""
        return all(units & {*mask} for units in self.occupied)

    def preferred(self, order: Sequence[int]) -> Sequence[int]:
        """`order`, with one unit of every set of `occupied` moved to the front, unless the set has a protected unit."""
        protected = {i for group in self.groups.values() for i in group.protected}
        first = [next(i for i in order if i in units) for units in self.occupied if not units & protected]
        return [*first, *(i for i in order if i not in first)]

    def in_blocks(self, plan: PrunePlan) -> PrunePlan:
        """Convert a criterion's plan from units to blocks. Raises UserError if it breaks a rule of the class."""
        kept: dict[str, list[int]] = {}
        for each in self.unit_lists:
            kept |= each.kept(plan.kept[each.name])
        Cut(self.model.row, self.model.config, self.model.depths, kept)
        scores = dict(plan.scores)
        if any(len(unit) > 1 for each in self.unit_lists for unit in each.units):
            scores["units"] = {
                each.name: [[[*block] for block in unit] for unit in each.units] for each in self.unit_lists
            }
        return dataclasses.replace(plan, kept=kept, depth=dict(self.model.depths), scores=scores)

    def check(self) -> None:
        """Raise UserError if no choice with the numbers of blocks of the settings satisfies the rules of the class."""
        order = self.preferred(range(self.depth))
        kept = {name: [i - group.start for i in group.first_of(order)] for name, group in self.groups.items()}
        self.in_blocks(PrunePlan(kept, self.depths, self.settings.criterion))

    # --------------------------------------------------------------------------------------------------- measurements

    def statistics(self, clean: bool) -> BlockStatistics:
        """Statistics of every unit, as means over its blocks, on the stream of image tokens if the class has one.

        Text tokens influence the output only through the image tokens, so the change of the text stream is not counted
        itself.
        """
        each, num = len(self.teacher.stack), self.depth
        found = block_statistics(self.teacher, self.images, clean, lambda done: self.tick(done * num // each))
        return BlockStatistics(self._of_units(found.cosine), self._of_units(found.change))

    def _of_units(self, values: Sequence[float]) -> list[float]:
        return [sum(values[i] for i in unit) / len(unit) for unit in self.blocks]

    def losses(
        self,
        masks: Sequence[Mask],
        tick: Tick = lambda done: None,
        begun: LossSums | None = None,
        keep: Callable[[LossSums], None] = lambda sums: None,
        prove: bool = True,
    ) -> LossSums:
        """Sums over the calls of the losses of masks of units (see the module); arguments as in `mask_losses`."""
        module, stack = self.teacher.module, self.teacher.stack
        num_bytes = max(int(_RETAINED_SHARE * self.model.num_bytes), _RETAINED_BYTES)

        def evaluate(replay: BlockReplay, number: int, call: TaskBatch, mask: Mask) -> tuple[float, float]:
            run = partial(self.images.objective.predict, module, call)
            if number not in self._outputs_of_calls:
                output = replay.run(range(len(stack)), run).output.cpu()
                self._outputs_of_calls[number] = output, float(output.square().sum(dtype=torch.float64))
            if len(mask) == self.depth:
                return 0.0, 0.0
            whole, size = self._outputs_of_calls[number]
            if not size:
                raise UserError(
                    f"the whole model returns zeros alone on call {number + 1} of {self.images.data}, so no loss is relative to it: is "
                    "it trained?"
                )
            error = replay.run({block for unit in mask for block in self.blocks[unit]}, run).output.cpu() - whole
            loss = float(error.square().sum(dtype=torch.float64)) / size
            return loss, loss

        calls: Sequence[Any] = self.images.batches
        retained = partial(BlockReplay, stack, num_bytes)
        return replayed_losses(retained, calls, masks, evaluate, tick, begun, keep, num_images=lambda call: 1)


# ---------------------------------------------------------------------------------------------------------------- budgets


def _by_pairs(each: UnitList, settings: PruneSection, protected: Sequence[int], wanted: int | None) -> int:
    """Number of units that bk-sdm's rule keeps. Raises UserError if a budget sets another number."""
    keep = len(bk_sdm_positions(len(each.units), settings.bk_sdm_list, protected))
    if wanted not in (None, keep):
        raise UserError(
            f"bk-sdm's rule keeps {keep} of the {len(each.units)} units of {each.name}, not {wanted}: leave out the budget"
        )
    return keep


def _units_of(each: UnitList, wanted: int) -> int:
    """Number of units that have `wanted` blocks of each list together. Raises UserError if no number does."""
    path = each.units[0][0][0]
    sizes = [sum(own == path for own, _ in unit) for unit in each.units]
    fixed = sum(sizes[i] for i in each.fixed)
    step = next((size for i, size in enumerate(sizes) if i not in each.fixed), 1)
    least = max(fixed, step)
    if not least <= wanted <= sum(sizes) or (wanted - fixed) % step:
        by = f" in steps of {step}" if step > 1 else ""
        raise UserError(f"{wanted} blocks of {each.name} cannot stay: {least} to {sum(sizes)} can{by}")
    return len(each.fixed) + (wanted - fixed) // step


def _budgets(units: Sequence[UnitList], settings: PruneSection) -> dict[str, int]:
    """Number of blocks to keep per list that has a budget: `prune.budgets`, else `--num-keep` for the main lists."""
    trunk = [each for each in units if not each.aside]
    budgets = {} if settings.num_keep is None else {each.name: settings.num_keep for each in trunk}
    for entry in settings.budgets:
        name, _, number = entry.partition("=")
        named = [each.name for each in units if name in each.name.split(" + ")]
        if not number.isdecimal() or (name != _ALL and not named):
            known = ", ".join(each.name for each in units)
            raise UserError(f"prune.budgets wants LIST=N or {_ALL}=N, lists are {known}; got {entry!r}")
        budgets |= _divided(trunk, int(number)) if name == _ALL else {named[0]: int(number)}
    return budgets


def _divided(trunk: Sequence[UnitList], total: int) -> dict[str, int]:
    """Divide a budget over lists in proportion to their lengths; the rest goes to the largest remainders."""
    sizes = {each.name: len({position for unit in each.units for _, position in unit}) for each in trunk}
    if not len(sizes) <= total <= sum(sizes.values()):
        raise UserError(
            f"{_ALL}={total}: of the {sum(sizes.values())} blocks of {', '.join(sizes)} 1 of each list to all can stay"
        )
    exact = {name: total * size / sum(sizes.values()) for name, size in sizes.items()}
    found = {name: max(1, math.floor(share)) for name, share in exact.items()}
    for name in sorted(exact, key=lambda name: found[name] - exact[name])[: max(0, total - sum(found.values()))]:
        found[name] += 1
    return found
