"""Plans of transformers of diffusers, by rules or on recorded inputs; what inspect prints of their work and couplings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tinyfusion.blocks.plan import PrunePlan, first_blocks
from tinyfusion.blocks.scheme import check_range
from tinyfusion.config.recipe import PruneSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.progress import say
from tinyfusion.core.rundir import RunDirectory
from tinyfusion.data.recorded import Call, RecordedInputs, read_recorded
from tinyfusion.families.diffusers_classes.cutting import Cut
from tinyfusion.families.diffusers_classes.folder import TransformerFolder
from tinyfusion.families.diffusers_classes.rows import Row
from tinyfusion.jobs.criteria import CriterionWork
from tinyfusion.models.macs import macs_by_module
from tinyfusion.models.transformer import opened
from tinyfusion.models.wrapped import wrap_module
from tinyfusion.processes.task import TaskBatch
from tinyfusion.prune.criteria import CRITERIA, RULES
from tinyfusion.prune.units import ON_DATA, UnitContext, recorded_calibration, run_call

# ------------------------------------------------------------------------------------------------------------- planning


def planned(model: TransformerFolder, settings: PruneSection, seed: int) -> PrunePlan:
    """The plan of a criterion that looks at no data. Raises UserError on others, and on what breaks a rule of the class."""
    if settings.criterion == "indices":
        kept = _named(model, settings)
        Cut(model.row, model.config, model.depths, kept)
        return PrunePlan(kept, dict(model.depths), "indices", seed=seed, teacher=model.hash)
    if settings.criterion not in RULES:
        ways = f"--inputs FILE, which `tinyfusion record` makes of a pipeline and prompts, and --criterion {', '.join(ON_DATA)}"
        raise UserError(
            f"criterion {settings.criterion} looks at data: for a {model.class_name} give {ways}; or --keep, or --criterion "
            f"{', '.join(RULES)}"
        )
    context = _context(model, settings, seed)
    return context.in_blocks(CRITERIA[settings.criterion].plan(context))


def _context(model: TransformerFolder, settings: PruneSection, seed: int) -> UnitContext:
    """The context of a criterion, without data."""
    teacher = wrap_module(model.empty(), model.streams)
    return UnitContext(teacher, settings, seed, model=model, unit_lists=model.units)


def recorded_work(model: TransformerFolder, settings: PruneSection, seed: int, file: Path) -> RecordedWork:
    """A criterion that looks at recorded calls, before the weights are opened.

    Raises UserError on other criteria, on a file that is not of this model, and on numbers that break a rule of the class.
    """
    if settings.criterion not in ON_DATA:
        raise UserError(
            f"criterion {settings.criterion} looks at no recorded inputs: leave out --inputs, or give --criterion {', '.join(ON_DATA)}"
        )
    if settings.criterion == "bi" and settings.bi_inputs == "clean":
        raise UserError(
            "prune.bi_inputs=clean wants clean images, and recorded inputs are as a pipeline had them: leave it out"
        )
    context = _context(model, settings, seed)
    context.check()
    inputs = read_recorded(file)
    calibration = recorded_calibration(inputs, model, seed)
    return RecordedWork(dataclasses.replace(context, calibration=calibration), inputs)


@dataclass(frozen=True)
class RecordedWork:
    """A criterion on recorded calls: what it will do, and the plan."""

    context: UnitContext
    inputs: RecordedInputs

    def describe(self) -> dict[str, str]:
        """What `--dry-run` says of it."""
        context, calls = self.context, self.context.images.images
        evaluations = CRITERIA[context.settings.criterion].evaluations
        passes = evaluations(context) / context.depth * calls if evaluations else 0.0
        more = f" of {self.inputs.prompts:,} prompts" if self.inputs.prompts else ""
        says = CriterionWork(context).describe()
        return {
            **says,
            "data": f"{calls:,} calls{more} in {self.inputs.path}",
            "work": f"{passes:,.0f} passes of the model at most",
        }

    def decide(self, run: RunDirectory, device: torch.device) -> PrunePlan:
        """The plan, with progress; opens the weights in their own types, and continues an interrupted search."""
        teacher = opened(self.context.model)
        module: Any = teacher.module.to(device)
        calls: Any = tuple(map(TaskBatch, self.inputs.for_dtype(module.dtype)))
        context = dataclasses.replace(
            self.context,
            teacher=teacher,
            calibration=dataclasses.replace(self.context.images, batches=calls),
        )
        return context.in_blocks(CriterionWork(context).decide(run))


def _named(model: TransformerFolder, settings: PruneSection) -> dict[str, list[int]]:
    """Exactly the blocks of `--keep`, counted through the lists; a list aside of which none is named stays whole."""
    depths = model.depths
    check_range("--keep", settings.keep, depths)
    if missing := sorted({*settings.protect} - {*settings.keep}):
        raise UserError(f"--keep leaves out the protected blocks {missing}: name them too, or do not protect them")
    if not settings.keep:
        raise UserError("criterion indices wants the blocks to keep: --keep 0,2,4")
    kept = {}
    for path, start in first_blocks(depths).items():
        kept[path] = sorted({i - start for i in settings.keep if start <= i < start + depths[path]})
    aside = [each.path for each in model.row.lists if each.aside and each.path in kept]
    return {path: own if own or path not in aside else list(range(depths[path])) for path, own in kept.items()}


def call_macs(model: TransformerFolder, file: Path) -> dict[str, int]:
    """Multiply-accumulates of the first call of a file of `record`, as `macs_of`; one with weights is reported on stderr.

    Raises UserError on inputs of another class.
    """
    inputs = read_recorded(file)
    inputs.check_class(model.class_name, model.path)
    kind, where = model.class_name, inputs.path

    def with_weights() -> Any:
        say([f"the work of a {kind} depends on values: counting on one call of {where} with its weights"])
        return model.module()

    return macs_of(model, lambda module: inputs.for_dtype(module.dtype)[0], with_weights)


def macs_of(model: TransformerFolder, call: Callable[[Any], Call], with_weights: Callable[[], Any]) -> dict[str, int]:
    """Multiply-accumulates of a call (of a module, in the type of its weights), by submodule; "" is the whole.

    Counted on shapes, without weights; for classes whose work depends on values (experts, packed texts) on `with_weights()`.
    """

    def counted(module: Any) -> dict[str, int]:
        return macs_by_module(module, partial(run_call, module, call(module)))

    with suppress(UserError):  # an operation without shapes of its own
        return counted(model.empty().to("meta").eval())
    return counted(with_weights())


def couplings(row: Row) -> list[str]:
    """The rules of a class, a line each."""
    rules = [f"{each.path}: {each.rule}" for each in row.lists if each.rule]
    rules += [
        f"{' and '.join(paths)} share one count" for paths in row.same_count if not set(paths) <= set(row.same_index)
    ]
    rules += [f"{' and '.join(row.same_index)} lose the same positions"] if row.same_index else []
    fields = [*row.indices, *row.per_block, *row.first, *row.last, *row.hints]
    return rules + ([f"rewritten in config.json: {', '.join(fields)}"] if fields else [])
