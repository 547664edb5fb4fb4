"""Report diagnostics that require the models: activation histograms, speed by depth, FID by step of the recovery.

Each is a JSON file in the run folder (docs/report.md).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinyfusion.blocks.plan import global_indices
from tinyfusion.config.recipe import Recipe, TrainingSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import read_json, write_json
from tinyfusion.evaluate.extractors import open_extractor
from tinyfusion.evaluate.timing import interleaved, speedup
from tinyfusion.jobs.assemble import batches_for, device_for
from tinyfusion.jobs.process_specs import objective_for
from tinyfusion.jobs.sampling_setup import draw, protocol
from tinyfusion.jobs.scoring import open_reference, protocol_of, score
from tinyfusion.models.checkpoint import LoadedModel
from tinyfusion.prune.learn import FIXED
from tinyfusion.training.loop import BatchSource
from tinyfusion.training.saved import damage, open_checkpoint, other_version

BIN_WIDTH = 0.05  # of a histogram of activations, in the unit of `symmetric_log`
NUM_ACTIVATION_IMAGES = 64
_BATCH = 16
DEPTH_REPEATS = 7
DEPTH_BATCH = 128  # images at most, so that timing many depths stays cheap


def symmetric_log(x: Tensor) -> Tensor:
    """x itself in [-1, 1], sign and 1 + log10 of the magnitude beyond."""
    magnitude = x.abs()
    return torch.where(magnitude <= 1, x, x.sign() * (1 + magnitude.clamp(min=1).log10()))


@torch.no_grad()
def activations(recipe: Recipe, teacher: LoadedModel, student: LoadedModel) -> dict[str, Any]:
    """activations.json: a histogram and the extremes of every block's output, teacher and student on the same inputs.

    64 training images, each noised at a timestep of its own, uniform over all; labels are never dropped. The published
    figure (arXiv 2412.01199, figure 8) has 4 clean images at t < 250.
    """
    device = device_for(recipe)
    source: BatchSource = batches_for(recipe, teacher, device)
    objective, depths = objective_for(teacher, 0.0, recipe), teacher.stack.depths()
    models, kept = {"teacher": teacher, "student": student}, student.facts.kept or {}
    student_blocks = global_indices({name: kept.get(name, range(depth)) for name, depth in depths.items()}, depths)
    blocks = {"teacher": list(range(len(teacher.stack))), "student": student_blocks}
    histograms = {name: [_Histogram() for _ in listed] for name, listed in blocks.items()}
    for model in models.values():
        model.module.to(device).eval()
    for first in range(0, NUM_ACTIVATION_IMAGES, _BATCH):
        draws = Randomness(recipe.seed).at(0, first, _BATCH)
        noisy = objective.draw(source(0, NUM_ACTIVATION_IMAGES, draws), draws)
        for name, model in models.items():
            with model.stack.tap(range(len(blocks[name]))) as outputs:
                objective.predict(model.module, noisy)
            for index, histogram in enumerate(histograms[name]):
                histogram.add(outputs[index])
    images = f"{NUM_ACTIVATION_IMAGES} images of {recipe.data.name}, noised at uniform timesteps, labels kept, float32"
    entries = {
        name: [{"teacher_block": b, **h.values()} for b, h in zip(blocks[name], listed, strict=True)]
        for name, listed in histograms.items()
    }
    fixed = {"protocol": f"{images}, seed {recipe.seed}", "bin_width": BIN_WIDTH, "depth": len(teacher.stack)}
    return {**fixed, "lists": depths, "models": entries}


class _Histogram:
    """Counts in bins of `symmetric_log`, extremes and moments of all values that were added."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.low, self.high = math.inf, -math.inf
        self.num, self.total, self.squares = 0, 0.0, 0.0

    def add(self, x: Tensor) -> None:
        """Add values of any shape. Raises UserError where one is not finite."""
        values = x.detach().float().flatten()
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UserError("a block gives values that are not finite: the model is broken or unrecovered")
        bins = torch.floor(symmetric_log(values) / BIN_WIDTH).long()
        first = int(bins.min())
        self.counts.update({first + i: n for i, n in enumerate(torch.bincount(bins - first).tolist()) if n})
        self.low, self.high = min(self.low, low), max(self.high, high)
        doubles = values.double() if values.device.type != "mps" else values
        self.num += values.numel()
        self.total += float(doubles.sum())
        self.squares += float(doubles.square().sum())

    def values(self) -> dict[str, Any]:
        """Plain values; counts of the bins `first`, first + 1, ..."""
        mean, first, last = self.total / self.num, min(self.counts), max(self.counts)
        std = max(self.squares / self.num - mean**2, 0.0) ** 0.5
        counts = [self.counts[i] for i in range(first, last + 1)]
        return {"min": self.low, "max": self.high, "mean": mean, "std": std, "first": first, "counts": counts}


def timed_depths(depth: int, most: int, also: int, least: int = 1) -> list[int]:
    """At most `most` depths from all down to `least`, evenly spread, and `also`, descending; none where `most` is 0."""
    return sorted({also, *range(depth, least - 1, -math.ceil(depth / most))}, reverse=True) if most else []


def shared_out(num: int, depths: Mapping[str, int]) -> dict[str, int]:
    """`num` blocks divided over the lists in proportion to their depths, at least one each, by largest remainders.

    Raises ValueError where `num` is less than the lists or more than the blocks.
    """
    total = sum(depths.values())
    if not len(depths) <= num <= total:
        raise ValueError(f"{num} blocks do not go into the lists {dict(depths)}, at least one into each")
    shares = {name: max(1, depth * num // total) for name, depth in depths.items()}
    while (short := num - sum(shares.values())) != 0:
        step = 1 if short > 0 else -1
        room = [name for name in depths if 1 <= shares[name] + step <= depths[name]]
        shares[max(room, key=lambda name: step * (depths[name] * num / total - shares[name]))] += step
    return shares


def shallow(model: LoadedModel, depths: Mapping[str, int]) -> LoadedModel:
    """The model with only the first blocks of every list, `depths` of each; weights are shared, not copied."""
    tensors = itertools.chain(model.module.parameters(), model.module.buffers())
    module = copy.deepcopy(model.module, {id(tensor): tensor for tensor in tensors})
    pruned = LoadedModel(module, model.family, model.arch, model.facts)
    pruned.stack.keep({name: range(depth) for name, depth in depths.items()})
    pruned.arch = model.family.arch_with_depths(model.arch, dict(depths))
    return pruned


def depth_speed(
    recipe: Recipe,
    teacher: LoadedModel,
    student: Mapping[str, int],
    step_of: Callable[[LoadedModel, int], Callable[[], object]],
) -> dict[str, Any] | None:
    """depth_speed.json: the teacher with its first blocks only, at several depths, interleaved; None where not wanted.

    student: its blocks per list, for the timing at its depth; other depths are divided over the lists in proportion. step_of:
    (model, images) -> a call of one denoising step.
    """
    device, whole, lists, own = device_for(recipe), len(teacher.stack), teacher.stack.depths(), sum(student.values())
    depths = timed_depths(whole, recipe.speed.depths, own, len(lists))
    if not depths:
        return None
    split = {depth: dict(student) if depth == own else shared_out(depth, lists) for depth in depths}
    num = min(recipe.speed.batch_size, DEPTH_BATCH)
    sides = {str(depth): step_of(shallow(teacher, split[depth]), num) for depth in depths}
    times = interleaved(sides, DEPTH_REPEATS, device, "speed by depth")
    points = []
    for depth in depths:
        ratio, *spread = speedup(times[str(whole)], times[str(depth)])
        point = {"depth": depth, "latency_ms": times[str(depth)].median_ms, "speedup": ratio, "speedup_spread": spread}
        points.append(point | ({"lists": split[depth]} if len(lists) > 1 else {}))
    where = f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
    steps = f"{DEPTH_REPEATS} interleaved guided denoising steps at every depth, batch {num}"
    return {"protocol": f"{steps}, float32, {where}; medians", "teacher_depth": whole, "points": points}


def checkpoint_steps(settings: TrainingSection, num: int) -> list[int]:
    """The steps of `num` checkpoints, evenly spread, that exist at the end of a training. Raises UserError where it retains too few."""
    made, every = settings.made_steps, settings.checkpoint_every_steps
    if num == 0:
        return []
    saved = sorted({*range(every, made + 1, every), made})[-settings.checkpoints_limit :]
    chosen = [min(saved, key=lambda step: abs(step * num - i * made)) for i in range(1, num + 1)]
    if len(set(chosen)) < num or any(2 * abs(step * num - i * made) > made for i, step in enumerate(chosen, 1)):
        raise UserError(
            f"evaluate.checkpoints {num} wants a checkpoint near every {made // num}th of {made} steps, and "
            f"recover.training retains {', '.join(map(str, saved))}: set its checkpoint_every_steps to "
            f"{max(made // num, 1)} and checkpoints_limit to {num}"
        )
    return chosen


def fid_steps(recipe: Recipe, out: Path, student: LoadedModel, evaluation: Callable[[str, str], Path]) -> None:
    """fid_steps.json: FID of the averaged weights at checkpoints of the recovery, against the first reference.

    Written after every point; existing points are not measured again. The first point is the pruned model, the last the
    student, both already evaluated. evaluation: (model, reference) -> its JSON. Changes the weights of `student`.
    """
    settings, file = recipe.recover.training, out / "fid_steps.json"
    steps = checkpoint_steps(settings, recipe.evaluate.checkpoints)
    if not steps:
        return
    reference = recipe.evaluate.references[0]
    fixed = {"method": recipe.recover.method, "reference": evaluation("", reference).stem.removeprefix("-")}
    points: list[dict[str, Any]] = list(read_json(file)) if file.is_file() else []
    done = {point["step"] for point in points}

    def add(step: int, scores: Mapping[str, Any]) -> None:
        numbers = {key: scores[key] for key in ("fid", "inception_score", "protocol")}
        points.append({"step": step, "images": step * settings.batch_size, **fixed, **numbers})
        write_json(file, sorted(points, key=lambda point: point["step"]))

    for step, model in ((0, "pruned"), (settings.made_steps, "student")):
        # a search within the recovery has no pruned model
        if step not in done and evaluation(model, reference).is_file():
            add(step, read_json(evaluation(model, reference)))
    if missing := [step for step in steps if step not in done and step != settings.made_steps]:
        extractor = open_extractor(recipe.evaluate.features, str(device_for(recipe)))
        real = open_reference(reference, extractor, recipe.data)
        for step in missing:
            _load_average(student, out / "recover" / "checkpoints" / f"step-{step:07d}")
            images, _ = draw(recipe, student, f"sample step {step}")
            scores = score(images, real, extractor, recipe.evaluate.neighbours, recipe.evaluate.is_splits_size)
            add(step, {**scores, "protocol": protocol_of(real, extractor, recipe.evaluate, protocol(recipe, student))})


@torch.no_grad()
def _load_average(model: LoadedModel, checkpoint: Path) -> None:
    """Load the averaged weights of a checkpoint into `model`, also of a training of the whole model that it was pruned from.

    Raises UserError where they are missing.
    """
    if not checkpoint.is_dir():
        raise UserError(
            f"{checkpoint} does not exist: evaluate.checkpoints needs it for the curve of FID over the recovery"
        )
    if (wrong := other_version(checkpoint) or damage(checkpoint)) is not None:
        raise UserError(f"cannot take the averaged weights of checkpoint {checkpoint}: {wrong}")
    saved = open_checkpoint(checkpoint)
    names = set(saved.names())
    plan, trained = model.facts.plan, {name: name for name, _ in model.module.named_parameters()}
    if plan is not None and f"ema/{FIXED}" in names:
        for listed, kept in plan.kept.items():
            places = {f"{listed}.{new}.": f"{listed}.{old}." for new, old in enumerate(kept)}
            own = {name: place for name in trained for place in places if name.startswith(place)}
            trained |= {name: name.replace(place, places[place], 1) for name, place in own.items()}
    for name, parameter in model.module.named_parameters():
        if (there := f"ema/{trained[name]}") in names:
            parameter.copy_(saved.whole(there))


def write_pictures(
    recipe: Recipe,
    out: Path,
    teacher: LoadedModel,
    student: LoadedModel,
    step_of: Callable[[LoadedModel, int], Callable[[], object]],
    evaluation: Callable[[str, str], Path],
) -> None:
    """Write every file of this module that does not exist yet."""
    if not (out / "activations.json").is_file():
        write_json(out / "activations.json", activations(recipe, teacher, student))
    if not (out / "depth_speed.json").is_file():
        speed = depth_speed(recipe, teacher, student.stack.depths(), step_of)
        if speed is not None:
            write_json(out / "depth_speed.json", speed)
    fid_steps(recipe, out, student, evaluation)
