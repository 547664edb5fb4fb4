"""Compare recovery methods beyond the paper with the published one, on digits and under the same seeds.

    python benchmarks/recover_extras.py [--seeds 3] [--steps 200] [--fid NAME ...] [--out docs/results/recovery-extras.md]

Every variant starts from the shipped teacher pruned by one of two plans and sees the same batches, noise and label drops. The
result is the loss of its averaged weights on the 360 held-out images under common noise. Finished cases are cached in --runs,
so the command resumes where it stopped; --only selects variants. What helped is in the package.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recover_variants import PLANS, RECIPE, VARIANTS, Case, Variant, batches
from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.stack import frozen
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import read_json, write_json, write_text
from tinyfusion.data.digits import load_digits
from tinyfusion.evaluate.extractors import open_extractor
from tinyfusion.evaluate.metrics import feature_moments, frechet_distance
from tinyfusion.models.checkpoint import LoadedModel, open_model
from tinyfusion.processes.base import Batch, Prediction
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.recover.align import block_pairs
from tinyfusion.sample.drive import image_labels, sample, to_uint8
from tinyfusion.sample.gaussian import GaussianSampler
from tinyfusion.training.loop import train_steps
from tinyfusion.training.optim import ParameterGroup
from tinyfusion.training.state import TrainState

HELDOUT_ROUNDS = 8  # noise and timestep draws of every held-out image
FID_IMAGES = 1000


def train(case: Case, variant: Variant) -> tuple[LoadedModel, float]:
    """The recovered student with averaged weights, and its seconds of training."""
    student, parameters = variant.start(case)
    student.module.train()
    settings = dataclasses.replace(RECIPE.recover.training, steps=case.steps, batch_size=case.batch_size)
    inner = GaussianObjective(settings.label_drop)

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
    """Mean loss and its noise term over held-out images, with the same noise and timesteps for every model."""
    images = load_digits(heldout=True)
    x, y = torch.from_numpy(images.x), torch.from_numpy(images.y)
    objective = GaussianObjective(0.0)
    found: list[dict[str, float]] = []
    for number in range(HELDOUT_ROUNDS):
        noisy = objective.draw(
            Batch(x, class_condition(y, images.num_classes)), Randomness(2**40).at(number, 0, len(x))
        )
        prediction: Prediction = objective.predict(student.module, noisy)
        terms = objective.losses(student.module, noisy, prediction)
        found.append({name: float(terms[name].mean()) for name in ("loss", "mse")})
    return {name: float(np.mean([f[name] for f in found])) for name in ("loss", "mse")}


def fid(student: LoadedModel, seed: int) -> float:
    """FID against the training digits: DDIM 50, guidance of the recipe."""
    settings = RECIPE.sample
    sampler = GaussianSampler(settings.sampler, settings.num_steps, settings.guidance)
    labels = image_labels(FID_IMAGES, student.arch.num_classes, seed)
    images = np.concatenate([to_uint8(b.x) for b in sample(student, labels, sampler, seed, settings.batch_size)])
    extractor, real = open_extractor(RECIPE.evaluate.features, "auto"), load_digits().x
    pools = [extractor(pixels).pool for pixels in (images, to_uint8(torch.from_numpy(real)))]
    return frechet_distance(*feature_moments(pools[0]), *feature_moments(pools[1]))


def measured(case: Case, plan_name: str, name: str, options: argparse.Namespace) -> dict[str, float]:
    """One result, cached in a file."""
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
    """Mean and standard deviation over seeds, and those of the paired difference to the base."""
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
