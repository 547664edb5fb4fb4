"""Run training-free criteria as a job: context, cost estimate, progress, resumable mask search."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.stack import num_parameters
from tinyfusion.config.recipe import PruneSection, Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.progress import progress
from tinyfusion.core.rundir import RunDirectory, write_json
from tinyfusion.jobs.assemble import batches_for, device_for
from tinyfusion.jobs.estimate import PASSING_VALUES, Estimate, rounded, step_seconds, time_after
from tinyfusion.jobs.footprint import FLOAT_BYTES
from tinyfusion.jobs.process_specs import objective_for
from tinyfusion.jobs.so_far import SoFar
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.prune.calibrate import Calibration, calibration_set
from tinyfusion.prune.context import CriterionContext
from tinyfusion.prune.criteria import CRITERIA, by_indices, decide, searched, space
from tinyfusion.prune.mask_search import LossSums, separate_evaluations, shared_evaluations
from tinyfusion.prune.width import check_width

OF_LOSS = ("min-loss", "median-loss", "max-loss", "sensitivity", "width")  # criteria that compare the loss on data
_SAVED_VALUES = 24  # values per token and channel that a block retains for its backward pass


def looks_at_images(criterion: str) -> bool:
    """Whether a criterion without training looks at images; False for one that does not exist."""
    return criterion in CRITERIA and CRITERIA[criterion].evaluations is not None


def warning_of_loss(teacher: LoadedModel, settings: PruneSection) -> str | None:
    """Why the loss on data is not what blocks of this model should be chosen by; None where they are not, or it is."""
    on_data = settings.criterion == "learned" and settings.target == "data"
    if not teacher.distilled_guidance or not (on_data or settings.criterion in OF_LOSS):
        return None
    compares = "prune.target=data" if on_data else settings.criterion
    return (
        f"the model predicts under guidance by itself, so the loss on data, which {compares} compares, is not what it is for; "
        f"{'prune.target=teacher compares' if on_data else 'learned and bi compare'} its own outputs"
    )


def criterion_context(
    teacher: LoadedModel, settings: PruneSection, seed: int, calibration: Callable[[], Calibration]
) -> CriterionContext:
    """The context of a criterion without training. calibration: called where it looks at images.

    Raises UserError on invalid settings.
    """
    if settings.criterion not in CRITERIA:
        raise UserError(f"criterion {settings.criterion} does not exist here: there is learned, {', '.join(CRITERIA)}")
    context = CriterionContext(teacher, settings, seed)
    if not looks_at_images(settings.criterion):
        decide(context)
        return context
    _ = context.groups  # raises
    if settings.criterion == "width":
        check_width(teacher, settings)
    return dataclasses.replace(context, calibration=calibration())


def criterion_work(recipe: Recipe, teacher: LoadedModel) -> CriterionWork:
    """The recipe's criterion, with a calibration set of the recipe's data."""
    settings, device = recipe.prune, device_for(recipe)

    def calibration() -> Calibration:
        plain = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, augment=0.0, flip=0.0))
        source = batches_for(plain, teacher, device)
        teacher.module.to(device)
        sizes = (len(source), settings.calibration_images, settings.calibration_batch_size)
        return calibration_set(objective_for(teacher, 0.0, recipe), source, recipe.data.name, *sizes, recipe.seed)

    return CriterionWork(criterion_context(teacher, settings, recipe.seed, calibration))


@dataclass(frozen=True)
class CriterionWork:
    """The work of `prune` with a criterion without training."""

    context: CriterionContext
    settings: None = None
    shown: None = None

    def disk_bytes(self) -> int:
        """Bytes of the student."""
        return FLOAT_BYTES * num_parameters(self.context.teacher.module)

    def estimate(self) -> Estimate:
        """Minutes from a measured forward pass, memory from shapes."""
        context = self.context
        teacher, evaluations = context.teacher, CRITERIA[context.settings.criterion].evaluations
        if evaluations is None:
            return rounded(0.0, 2 * self.disk_bytes(), self.disk_bytes(), "nothing is trained")
        calibration, arch, depth = context.images, teacher.arch, len(teacher.stack)
        batch, weights = calibration.batches[0], num_parameters(teacher.module)
        size, device = batch.x0.shape[0], batch.x0.device

        @torch.inference_mode()
        def measure(images: int) -> float:
            few, ends = batch.each(lambda value: value[:images]), [time.perf_counter()]
            for _ in range(2):  # the first one warms up
                output = calibration.objective.predict(teacher.module, few).output
                ends.append(time_after(float(output.flatten()[0])))
            return ends[2] - ends[1]

        seconds, basis = step_seconds(measure, teacher.macs(), size, weights, device)
        passes = evaluations(context) / depth * calibration.images / size
        values = depth + 1 + PASSING_VALUES
        if context.settings.criterion == "width":
            weights, values = 3 * weights, depth * _SAVED_VALUES  # a copy of the teacher and its gradients
        memory = FLOAT_BYTES * (weights + size * arch.num_tokens * arch.hidden_size * values)
        return rounded(passes * seconds, memory, self.disk_bytes(), basis)

    def describe(self) -> dict[str, str]:
        """Rows of `--dry-run` about the criterion."""
        context = self.context
        settings, row = context.settings, CRITERIA[context.settings.criterion]
        variants = {
            "bi": f", {settings.bi_inputs} inputs", "sensitivity": f", {settings.sensitivity_order}",
            "bk-sdm": f", {settings.bk_sdm_list} list", "random": f", seed {context.seed}",
        }  # fmt: skip
        says = {"criterion": f"{settings.criterion}: {row.says}{variants.get(settings.criterion, '')}"}
        if settings.criterion == "indices":
            kept = by_indices(context.teacher, settings.keep, context.seed).kept
            says["keeps"] = "; ".join(f"{', '.join(map(str, listed))} of {name}" for name, listed in kept.items())
        elif settings.criterion == "width":
            groups = check_width(context.teacher, settings)
            wide = f"every block, {groups['residual'].size} channels wide"
            says["keeps"] = f"{settings.width_share:.0%} of the parameters: {wide}"
        else:
            says["keeps"] = "; ".join(f"{g.keep} of {g.size} ({name})" for name, g in context.groups.items())
            if settings.protect:
                says["protected"] = ", ".join(map(str, sorted(set(settings.protect))))
        if context.calibration is None:
            return says
        calibration, size = context.images, settings.calibration_batch_size
        if settings.criterion == "width":
            num = f"{len(calibration.batches[0]):,} images of {calibration.data}"
            return {**says, "data": f"{num} at timesteps 0, 1, 2, ... (1,000 at the most)"}
        again = f" ({calibration.distinct:,} different ones)" if calibration.distinct < calibration.images else ""
        says["data"] = f"{calibration.images:,} images{again} of {calibration.data}, {size} at a time"
        if settings.criterion.endswith("-loss"):
            masks = searched(context)
            all_of_them = "all there are" if len(masks) == space(context) else f"random ones of {space(context):,}"
            shared, plain = shared_evaluations(masks), separate_evaluations(masks)
            says["search"] = (
                f"{len(masks):,} masks, {all_of_them}; {shared:,} block evaluations per batch instead of {plain:,}, "
                f"at most {plain / shared:.2f} times as fast"
            )
        return says

    def decide(self, run: RunDirectory) -> PrunePlan:
        """The plan, with progress; a mask search writes `calibration.json`, and resumes after an interruption."""
        context = self.context
        evaluations = CRITERIA[context.settings.criterion].evaluations
        if evaluations is None:
            return decide(context)
        batches, title = len(context.images.batches), f"prune ({context.settings.criterion})"
        so_far = SoFar(run, ("loss", "mse", "counts"))
        begun = _sums(so_far.begun) if so_far.begun else None

        def keep(sums: LossSums) -> None:
            if sums.batches < batches:
                so_far.keep(sums.batches, lambda: _arrays(sums))

        publish = partial(write_json, run.path / "calibration.json")
        total = evaluations(context) * batches
        with progress(title, total, "blocks", total * begun.batches // batches if begun else 0) as bar:
            running = dataclasses.replace(context, tick=bar, begun=begun, keep=keep, publish=publish)
            plan = decide(running)
        return dataclasses.replace(plan, cost={**plan.cost, "seconds": so_far.spent + plan.cost["seconds"]})


def _arrays(sums: LossSums) -> dict[str, np.ndarray]:
    """Sums as arrays, which are saved."""
    return {"loss": sums.loss, "mse": sums.mse, "counts": np.array([sums.images, sums.batches], dtype=np.int64)}


def _sums(arrays: Mapping[str, np.ndarray]) -> LossSums:
    """Sums of saved arrays."""
    images, batches = (int(count) for count in arrays["counts"])
    return LossSums(arrays["loss"], arrays["mse"], images, batches)
