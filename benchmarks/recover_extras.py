"""Ideas beyond the paper for recovery, each against the published one under the same seeds: held-out loss on digits.

    python benchmarks/recover_extras.py [--seeds 3] [--steps 200] [--fid NAME ...] [--out docs/results/recovery-extras.md]

Every variant starts from the shipped teacher cut by one of two plans, sees the same batches, noise and label drops, and
is judged by its averaged weights on the 360 held-out images under common noise. A finished case is kept in --runs, so the
command continues where it stopped; --only makes some variants. Everything here is thrown away: what helped is in the package.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.stack import frozen
from tinyfusion.config.loading import load_recipe
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import read_json, write_json, write_text
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.data.digits import load_digits
from tinyfusion.evaluate.extractors import open_extractor
from tinyfusion.evaluate.metrics import feature_moments, frechet_distance
from tinyfusion.models.checkpoint import LoadedModel, open_model
from tinyfusion.processes.base import Batch, NoisyBatch, Prediction
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.prune.learn import mask_learner
from tinyfusion.recover.align import block_pairs
from tinyfusion.recover.distill import DistilledObjective
from tinyfusion.recover.terms import massive_mask
from tinyfusion.sample.drive import image_labels, sample, to_uint8
from tinyfusion.sample.gaussian import GaussianSampler
from tinyfusion.training.loop import train_steps
from tinyfusion.training.optim import ParameterGroup, trainable
from tinyfusion.training.state import TrainState

RECIPE = load_recipe("digits")
PLANS: dict[str, tuple[list[int], list[list[int]] | None]] = {
    "1:2": ([0, 2, 4, 6, 9, 10], [[1, 2]] * 6),
    "no groups": ([0, 1, 2, 3, 5, 6], None),
}
HELDOUT_ROUNDS = 8  # noise and timestep draws of every held-out image
FID_IMAGES = 1000


@dataclasses.dataclass(frozen=True)
class Case:
    """A teacher, a plan, a seed, and how many steps of how many images there are."""

    teacher: LoadedModel
    plan: PrunePlan
    seed: int
    steps: int
    batch_size: int

    @property
    def dropped(self) -> dict[int, list[int]]:
        """Student block -> dropped teacher blocks up to the next kept one; those before the first belong to it."""
        kept = self.plan.kept["blocks"]
        ends = [*kept[1:], self.plan.depth["blocks"]]
        runs = {k: list(range(start + 1, end)) for k, (start, end) in enumerate(zip(kept, ends, strict=True))}
        return {**runs, 0: list(range(kept[0])) + runs[0]}


Start = Callable[[Case], tuple[LoadedModel, dict[str, nn.Parameter]]]


def plain_start(case: Case) -> tuple[LoadedModel, dict[str, nn.Parameter]]:
    """The cut teacher."""
    student = case.teacher.cut(case.plan)
    return student, trainable(student.module)


def merged_start(case: Case, weight: float) -> tuple[LoadedModel, dict[str, nn.Parameter]]:
    """Every kept block is (1 - weight) of itself and weight of the mean of its dropped neighbours."""
    student, parameters = plain_start(case)
    teacher_blocks, student_blocks = list(case.teacher.stack), list(student.stack)
    with torch.no_grad():
        for index, neighbours in case.dropped.items():
            if neighbours:
                others = [dict(teacher_blocks[i].named_parameters()) for i in neighbours]
                for name, own in student_blocks[index].named_parameters():
                    own.lerp_(torch.stack([o[name] for o in others]).mean(0), weight)
    return student, parameters


@functools.cache
def learned_deltas(seed: int) -> dict[str, Tensor]:
    """Averaged low-rank deltas of mask learning with the recipe's settings: {name of a weight: delta}."""
    teacher = open_model("digits")
    objective = GaussianObjective(teacher.arch.num_classes, RECIPE.prune.training.label_drop)
    learner = mask_learner(teacher, objective, RECIPE.prune, Randomness(seed).generator_seed("lora"))
    state = TrainState(learner.module, learner.parameter_groups, RECIPE.prune.training)
    for _ in train_steps(state, learner.objective, batches(seed), RECIPE.prune.training, Randomness(seed)):
        pass
    with torch.no_grad():
        for name, value in learner.module.named_parameters():
            if name in state.ema.average:
                value.copy_(state.ema.average[name])
        return {
            f"{name}.weight": module.get_delta_weight("delta")
            for name, module in learner.module.named_modules()
            if hasattr(module, "get_delta_weight")
        }


def with_deltas(case: Case) -> tuple[LoadedModel, dict[str, nn.Parameter]]:
    """The cut of a teacher that holds the deltas its masks were learned with."""
    changed, deltas = case.teacher.copy(), learned_deltas(case.seed)
    with torch.no_grad():
        for name, delta in deltas.items():
            changed.module.get_parameter(name).add_(delta)
    student = changed.cut(dataclasses.replace(case.plan, teacher=""))
    return student, trainable(student.module)


class LinearBridge(nn.Module):
    """x + x W + b in place of a run of dropped blocks, after a kept block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) to the same shape."""
        return x + torch.addmm(self.bias, x.flatten(0, 1), self.weight).view_as(x)


class AffineBridge(nn.Module):
    """x (1 + a) + b per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) to the same shape."""
        return torch.addcmul(self.bias, x, 1 + self.weight)


def bridged_start(case: Case, kind: type[nn.Module], fitted: bool) -> tuple[LoadedModel, dict[str, nn.Parameter]]:
    """Bridges where blocks were dropped; they start as nothing, or (fitted) as the least-squares answer to the teacher."""
    student, parameters = plain_start(case)
    for index, neighbours in case.dropped.items():
        if neighbours:
            bridge = kind(case.teacher.arch.hidden_size)
            if fitted:
                fit_bridge(case, bridge, neighbours)
            list(student.stack)[index].register_forward_hook(lambda _m, _a, out, bridge=bridge: bridge(out))
            parameters |= {f"bridge.{index}.{name}": p for name, p in bridge.named_parameters()}
    return student, parameters


@torch.no_grad()
def fit_bridge(case: Case, bridge: nn.Module, neighbours: list[int]) -> None:
    """Ridge regression of what the dropped blocks add on their input, over 512 training images."""
    first = list(case.teacher.stack)[neighbours[0]]
    inputs: list[Tensor] = []
    handle = first.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    objective = GaussianObjective(case.teacher.arch.num_classes, 0.0)
    draws = Randomness(case.seed).at(10**6, 0, 512)
    with case.teacher.stack.tap([neighbours[-1]]) as outputs:
        objective.predict(case.teacher.module, objective.draw(batches(case.seed)(10**6, 512, draws), draws))
    handle.remove()
    x = inputs[0].flatten(0, 1).double()
    added = outputs[neighbours[-1]].flatten(0, 1).double() - x
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    solved = torch.linalg.solve(ones.T @ ones + 1e-2 * len(x) * torch.eye(ones.shape[1], dtype=x.dtype), ones.T @ added)
    bridge.get_parameter("weight").copy_(solved[:-1])
    bridge.get_parameter("bias").copy_(solved[-1])


@dataclasses.dataclass(frozen=True)
class Normalised(DistilledObjective):
    """The feature loss of a pair over the mean square of the teacher's masked features of the sample."""

    def feature_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(B,) of one pair."""
        calm = 1.0 if self.sigmas is None else massive_mask(teacher, self.sigmas)
        return super().feature_loss(student, teacher) / (calm * teacher).square().flatten(1).mean(1)


@dataclasses.dataclass(frozen=True)
class BlockWise(DistilledObjective):
    """First, every paired piece of the student on the teacher's own stream: from its paired position before to the one after."""

    blockwise_steps: int = 0

    def predict(self, model: nn.Module, noisy: NoisyBatch) -> Any:
        """While blocks learn on their own, (B,) squared error of the pieces; the student as a whole does not run."""
        if noisy.step >= self.blockwise_steps:
            return super().predict(model, noisy)
        stream: dict[int, tuple[Any, ...]] = {}
        blocks = list(self.teacher_stack)
        handles = [
            block.register_forward_pre_hook(lambda _m, args, i=i: stream.__setitem__(i, args))
            for i, block in enumerate(blocks)
        ]
        with torch.no_grad(), self.teacher_stack.tap([len(blocks) - 1]) as last:
            self.inner.predict(self.teacher, noisy)
        for handle in handles:
            handle.remove()
        after = {**{i - 1: args[0] for i, args in stream.items()}, len(blocks) - 1: last[len(blocks) - 1]}
        own, errors, student, x = list(self.student_stack), [], -1, after[-1]
        for s, t in self.pairs:
            for block in own[student + 1 : s + 1]:
                x = block(x, *stream[0][1:])
            errors.append((x - after[t]).square().flatten(1).mean(1))
            student, x = s, after[t]
        return torch.stack(errors).mean(0)

    def losses(self, model: nn.Module, noisy: NoisyBatch, prediction: Any) -> dict[str, Tensor]:
        """The error that `predict` took, then the losses of the whole."""
        return {"loss": prediction} if isinstance(prediction, Tensor) else super().losses(model, noisy, prediction)


@dataclasses.dataclass(frozen=True)
class Variant:
    """Where the student starts, what it learns from, and steps of block-wise warm-up that are taken from the others."""

    about: str
    start: Start = plain_start
    objective: type[DistilledObjective] | None = DistilledObjective
    blockwise: float = 0.0  # share of the steps
    more: dict[str, Any] = dataclasses.field(default_factory=dict)


VARIANTS: dict[str, Variant] = {
    "masked-kd": Variant("the published recovery: what the others are compared with"),
    "finetune": Variant("no teacher", objective=None),
    "logits-kd": Variant("no features", more={"beta": (0.0, 0.0)}),
    "rep-kd": Variant("no masks", more={"sigmas": None}),
    "joint": Variant("masks of both sides together", more={"mask": "joint"}),
    "masked-kd beta 0.1": Variant("ten times the feature weight", more={"beta": (0.1, 0.0)}),
    "normalised beta 0.01": Variant("feature loss over the teacher's mean square", objective=Normalised),
    "normalised beta 0.1": Variant("same, ten times the weight", objective=Normalised, more={"beta": (0.1, 0.0)}),
    "normalised beta 1": Variant("same, hundred times the weight", objective=Normalised, more={"beta": (1.0, 0.0)}),
    "merged 0.25": Variant(
        "kept blocks hold 0.25 of their dropped neighbours", functools.partial(merged_start, weight=0.25)
    ),
    "merged 0.5": Variant("the same, 0.5", functools.partial(merged_start, weight=0.5)),
    "deltas kept": Variant("the low-rank deltas of mask learning stay", with_deltas),
    "bridge": Variant(
        "x + xW + b after a kept block, from zero", functools.partial(bridged_start, kind=LinearBridge, fitted=False)
    ),
    "bridge fitted": Variant(
        "the same, from least squares", functools.partial(bridged_start, kind=LinearBridge, fitted=True)
    ),
    "bridge affine": Variant(
        "x(1 + a) + b per channel, from zero", functools.partial(bridged_start, kind=AffineBridge, fitted=False)
    ),
    "block-wise 1/8": Variant(
        "an eighth of the steps teacher-forced, block by block", objective=BlockWise, blockwise=0.125
    ),
    "block-wise 1/4": Variant("a quarter", objective=BlockWise, blockwise=0.25),
}


@functools.cache
def batches(seed: int) -> ShuffledBatches:
    """The training batches of the recipe."""
    return ShuffledBatches(load_digits(), Randomness(seed), torch.device("cpu"), RECIPE.data.augment)


def train(case: Case, variant: Variant) -> tuple[LoadedModel, float]:
    """The recovered student with averaged weights, and its seconds of training."""
    student, parameters = variant.start(case)
    student.module.train()
    settings = dataclasses.replace(RECIPE.recover.training, steps=case.steps, batch_size=case.batch_size)
    inner = GaussianObjective(case.teacher.arch.num_classes, settings.label_drop)

    objective: Any = inner
    if variant.objective is not None:
        more = dict(variant.more)
        if variant.blockwise:
            more["blockwise_steps"] = round(variant.blockwise * case.steps)
        objective = variant.objective(
            inner, frozen(case.teacher.module), case.teacher.stack, student.stack, block_pairs(case.plan), case.steps,
            **more,
        )  # fmt: skip
    began = time.process_time()
    state = TrainState(student.module, [ParameterGroup(parameters)], settings)
    for _ in train_steps(state, objective, batches(case.seed), settings, Randomness(case.seed)):
        pass
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.ema.average[name])
    student.module.eval()
    return student, time.process_time() - began


@torch.no_grad()
def heldout_losses(student: LoadedModel) -> dict[str, float]:
    """Mean loss and its noise part over held-out images, under noise and timesteps that are the same for every model."""
    images = load_digits(heldout=True)
    x, y = torch.from_numpy(images.x), torch.from_numpy(images.y)
    objective = GaussianObjective(student.arch.num_classes, 0.0)
    found: list[dict[str, float]] = []
    for number in range(HELDOUT_ROUNDS):
        noisy = objective.draw(Batch(x, y), Randomness(2**40).at(number, 0, len(x)))
        prediction: Prediction = objective.predict(student.module, noisy)
        terms = objective.losses(student.module, noisy, prediction)
        found.append({name: float(terms[name].mean()) for name in ("loss", "mse")})
    return {name: float(np.mean([f[name] for f in found])) for name in ("loss", "mse")}


def fid(student: LoadedModel, seed: int) -> float:
    """Against the training digits: DDIM 50, guidance as in the recipe."""
    settings = RECIPE.sample
    sampler = GaussianSampler(settings.sampler, settings.num_steps, settings.guidance)
    labels = image_labels(FID_IMAGES, student.arch.num_classes, seed)
    images = np.concatenate([to_uint8(b.x) for b in sample(student, labels, sampler, seed, settings.batch_size)])
    extractor, real = open_extractor(RECIPE.evaluate.features, "auto"), load_digits().x
    pools = [extractor(pixels).pool for pixels in (images, to_uint8(torch.from_numpy(real)))]
    return frechet_distance(*feature_moments(pools[0]), *feature_moments(pools[1]))


def measured(case: Case, plan_name: str, name: str, options: argparse.Namespace) -> dict[str, float]:
    """One result, from its file where there is one."""
    path = options.runs / f"{plan_name}-{name}-{case.steps}x{case.batch_size}-{case.seed}.json".replace(
        " ", "_"
    ).replace("/", ":")
    result: dict[str, float] = read_json(path) if path.is_file() else {}
    wants_fid = name in options.fid
    if "loss" not in result or (wants_fid and "fid" not in result):
        student, seconds = train(case, VARIANTS[name])
        result = {**heldout_losses(student), "cpu_seconds": seconds, **({"fid": fid(student, 0)} if wants_fid else {})}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
        print(plan_name, name, case.seed, result, flush=True)
    return result


def cell(values: list[float], base: list[float]) -> str:
    """Mean and deviation over seeds, and the mean difference to the base under the same seeds with its deviation."""
    if not values:
        return "–"
    text = f"{np.mean(values):.4g}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.2g}"
    if len(base) == len(values) > 1 and base != values:
        difference = np.array(values) - np.array(base)
        text += f" ({np.mean(difference):+.2g} ± {np.std(difference, ddof=1):.1g})"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--runs", type=Path, default=Path("runs/recover-extras"))
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--plans", nargs="*", choices=list(PLANS), default=list(PLANS))
    parser.add_argument(
        "--fid", nargs="*", choices=list(VARIANTS), default=[], help="variants that are sampled from, too"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    flush_denormals()
    teacher = open_model("digits")
    results: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        for plan_name in options.plans:
            kept, groups = PLANS[plan_name]
            plan = PrunePlan(
                kept={"blocks": kept}, depth=teacher.stack.depths(), criterion="indices", teacher=teacher.hash(),
                groups=None if groups is None else {"blocks": groups},
            )  # fmt: skip
            for name in options.only:
                case = Case(teacher, plan, seed, options.steps, options.batch_size)
                results.setdefault((plan_name, name), []).append(measured(case, plan_name, name, options))
    rows = [
        f"{options.steps} steps of {options.batch_size} images, {options.seeds} seeds, mean ± standard deviation; "
        "in brackets the difference to `masked-kd` under the same seeds.",
        "",
    ]
    for plan_name in options.plans:
        rows += [
            f"Plan {PLANS[plan_name][0]} ({plan_name}):", "",
            "| variant | what | held-out loss | held-out mse | FID | CPU s |", "|---|---|---|---|---|---|",
        ]  # fmt: skip
        base = results.get((plan_name, "masked-kd"), [])
        for name in options.only:
            found = results[plan_name, name]
            columns = [
                cell([f[k] for f in found if k in f], [f[k] for f in base if k in f]) for k in ("loss", "mse", "fid")
            ]
            seconds = f"{np.mean([f['cpu_seconds'] for f in found]):.0f}"
            rows.append(f"| {name} | {VARIANTS[name].about} | {' | '.join(columns)} | {seconds} |")
        rows.append("")
    print("\n".join(rows))
    if options.out:
        write_text(options.out, "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
