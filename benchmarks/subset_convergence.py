"""Measure noise and bias of the gradient of masks with a global budget, and whether such masks converge.

    python benchmarks/subset_convergence.py --runs runs/subset [--seeds 3] [--only NAME ...] [--out docs/results/subset.md]

Gradient: the unchanged teacher, 64 fixed images, all 924 masks of 6:12 enumerated, so the exact gradient of the mean loss
is known; each estimator is drawn many times. Convergence: masks are learned as in the digits recipe; students are fine-tuned
for 150 steps of 128 images; loss on held-out digits before and after. Results are cached in --runs, so the command resumes
where it stopped; the page states how much is done.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from digits_teacher import calibration_loss
from shared import table
from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.scheme import parse_scheme
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.config.loading import load_recipe
from tinyfusion.config.recipe import TrainingSection
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.core.rundir import read_json, write_json, write_text
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.data.digits import load_digits
from tinyfusion.models.checkpoint import LoadedModel, make_trainable, open_model
from tinyfusion.processes.base import Batch, NoisyBatch
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.prune.gates import CategoricalGates, GateDistribution, SubsetGates
from tinyfusion.prune.learn import mask_learner
from tinyfusion.training.loop import train_steps
from tinyfusion.training.optim import ParameterGroup, trainable
from tinyfusion.training.state import TrainState

FINE_TUNING = TrainingSection(
    steps=150, batch_size=128, learning_rate=1e-3, learning_rate_end_share=0.01, warmup_steps=10, ema_decay=0.9
)
SUBSET: dict[str, Any] = {
    "scheme": "6:12",
    "distribution": "subset",
    "scaling": (5.0, 40.0),
    "gate_learning_rate": 1e-2,
}
SEARCHES: dict[str, dict[str, Any]] = {
    "subset, marginals": SUBSET,
    "subset, gumbel-top-k": {**SUBSET, "subset_estimator": "gumbel-top-k", "temperature": (1.0, 0.3)},
    "subset, scale 100, rate 1e-3": {**SUBSET, "scaling": (100.0, 100.0), "gate_learning_rate": 1e-3},
    "subset, scale 20, rate 2e-2": {**SUBSET, "scaling": (20.0, 20.0), "gate_learning_rate": 2e-2},
    "categorical 1:2": {"scheme": "1:2"},
    "categorical 2:4": {"scheme": "2:4"},
    "categorical 6:12, rate 1e-2": {"scheme": "6:12", "gate_learning_rate": 1e-2},
}
MASKS: dict[str, list[int]] = {"sensitivity, one shot": [0, 1, 2, 3, 6, 11]}


# ----------------------------------------------------------------------------------------------------------- gradient


@torch.no_grad()
def loss_table(model: LoadedModel, objective: GaussianObjective, noisy: NoisyBatch, masks: Tensor) -> Tensor:
    """(masks, B) loss of every image under every mask."""
    num = len(noisy.xt)
    rows = []
    for mask in masks:
        with model.stack.gated(mask.expand(num, -1)):
            rows.append(objective.losses(model.module, noisy, objective.predict(model.module, noisy))["loss"])
    return torch.stack(rows)


def exact_gradient(gates: GateDistribution, masks: Tensor, losses: Tensor) -> list[Tensor]:
    """Gradient of the mean loss to the logits at scaling 1, over every mask that the gates allow."""
    total = torch.zeros(len(masks), dtype=torch.float64)
    for group, theta in zip(gates.groups, gates.logits, strict=True):
        inside = masks[:, group.start : group.start + group.size].double()
        fits = torch.zeros(len(masks), dtype=torch.float64)
        if isinstance(gates, SubsetGates):
            fits = inside @ theta.double()
            fits = torch.where(inside.sum(1) == group.keep, fits, -torch.inf)
        else:
            candidates = torch.zeros(group.num_candidates, group.size, dtype=torch.float64)
            for row, kept in enumerate(group.candidates()):
                candidates[row, [i - group.start for i in kept]] = 1.0
            same = (inside[:, None] == candidates[None]).all(-1)
            fits = torch.where(same.any(1), theta.double()[same.int().argmax(1)], -torch.inf)
        total = total + fits
    expected = torch.softmax(total, 0) @ losses.double().mean(1)
    return [g.detach() for g in torch.autograd.grad(expected, list(gates.logits))]


def drawn_gradient(
    model: LoadedModel,
    objective: GaussianObjective,
    noisy: NoisyBatch,
    gates: GateDistribution,
    draws: Draws,
    tau: float,
) -> list[Tensor]:
    """One estimate: a mask per image, the gradient through the gates."""
    masks = gates.sample(gates.draw(draws), tau, 1.0)
    with model.stack.gated(masks):
        loss = objective.losses(model.module, noisy, objective.predict(model.module, noisy))["loss"].mean()
    return list(torch.autograd.grad(loss, list(gates.logits)))


def reinforced_gradient(gates: SubsetGates, masks: Tensor, losses: Tensor, draws: Draws, siblings: int) -> list[Tensor]:
    """One estimate by the score function: unbiased, no gradient through blocks.

    siblings: masks per image, of as many images fewer, drawn from all; the baseline is the mean loss of the others of the same
    image. 1: of all other images.
    """
    drawn = gates.sample(gates.draw(draws), 1.0, 1.0).detach()
    chosen = (drawn[:, None] == masks[None]).all(-1).int().argmax(1)
    images = torch.arange(len(drawn))
    if siblings > 1:
        order = torch.from_numpy(draws.uniform("images", ())).argsort()
        images = order[: len(drawn) // siblings].repeat_interleave(siblings)
    own = losses[chosen, images].view(-1, siblings if siblings > 1 else len(drawn))
    others = ((own.sum(1, keepdim=True) - own) / (own.shape[1] - 1)).flatten()
    own = own.flatten()
    score = drawn - torch.tensor(gates.probabilities(0, gates.logits[0].detach(), 1.0))
    return [((own - others)[:, None] * score).mean(0)]


def quality(exact: list[Tensor], drawn: list[list[Tensor]]) -> dict[str, float]:
    """Direction of the mean against the exact gradient, and noise: standard deviation of one draw over the mean's norm.

    The mean of T draws has noise of its own, whose share of its squared norm, noise^2 / T, is taken out of `cosine` (which
    may then exceed 1 by chance) and of `size`, the norms' ratio.
    """
    target = torch.cat([g.double() for g in exact])
    rows = torch.stack([torch.cat([g.double() for g in gradient]) for gradient in drawn])
    mean = rows.mean(0)
    variance = float((rows - mean).square().sum() / (len(rows) - 1))
    norm = max(float(mean.square().sum()) - variance / len(rows), 1e-30) ** 0.5
    cosine = float(mean @ target / target.norm()) / norm
    single = float(torch.cosine_similarity(rows, target[None], dim=1).mean())
    return {"cosine": cosine, "single": single, "noise": variance**0.5 / norm, "size": norm / float(target.norm())}


def gradients(trials: int, num_images: int = 64) -> list[dict[str, Any]]:
    """Every estimator at equal logits, and where the first four blocks are half decided."""
    model = open_model("digits")
    for parameter in model.module.parameters():
        parameter.requires_grad_(False)
    objective = GaussianObjective(label_drop=0.0)
    images = load_digits()
    batch = Batch(
        torch.from_numpy(images.x[:num_images]),
        class_condition(torch.from_numpy(images.y[:num_images]), images.num_classes),
    )
    noisy = objective.draw(batch, Randomness(7).at(0, 0, num_images))
    masks = torch.zeros(924, 12)
    for row, kept in enumerate(itertools.combinations(range(12), 6)):
        masks[row, list(kept)] = 1.0
    losses = loss_table(model, objective, noisy, masks)
    half = torch.tensor([2.0] * 4 + [-1.0] * 8)
    rows = []
    for name, scheme, estimator, tau, at in (
        ("marginals", "6:12", "marginals", 1.0, None),
        ("gumbel-top-k", "6:12", "gumbel-top-k", 4.0, None),
        ("gumbel-top-k", "6:12", "gumbel-top-k", 1.0, None),
        ("gumbel-top-k", "6:12", "gumbel-top-k", 0.3, None),
        ("score function, other images as baseline", "6:12", "reinforce 1", 1.0, None),
        ("`score`: two masks per image", "6:12", "reinforce 2", 1.0, None),
        ("four masks per image, leave one out", "6:12", "reinforce 4", 1.0, None),
        ("eight masks per image, leave one out", "6:12", "reinforce 8", 1.0, None),
        ("categorical", "6:12", "", 4.0, None),
        ("categorical", "6:12", "", 1.0, None),
        ("categorical", "2:4", "", 4.0, None),
        ("categorical", "2:4", "", 1.0, None),
        ("categorical", "1:2", "", 4.0, None),
        ("categorical", "1:2", "", 1.0, None),
        ("marginals", "6:12", "marginals", 1.0, half),
        ("gumbel-top-k", "6:12", "gumbel-top-k", 1.0, half),
        ("score function, other images as baseline", "6:12", "reinforce 1", 1.0, half),
        ("`score`: two masks per image", "6:12", "reinforce 2", 1.0, half),
        ("four masks per image, leave one out", "6:12", "reinforce 4", 1.0, half),
        ("eight masks per image, leave one out", "6:12", "reinforce 8", 1.0, half),
    ):
        distribution = "subset" if estimator else "categorical"
        groups = parse_scheme(scheme, {"blocks": 12}, distribution)["blocks"]
        gates: GateDistribution = CategoricalGates(groups, 0.0)
        kind, _, siblings = estimator.partition(" ")
        if estimator:
            gates = SubsetGates(groups, 0.0, "marginals" if siblings else kind)
        if at is not None:
            gates.logits[0].data.copy_(at)
        drawn = []
        for trial in range(trials):
            draws = Randomness(11).at(trial, 0, num_images)
            if siblings:
                assert isinstance(gates, SubsetGates)
                drawn.append(reinforced_gradient(gates, masks, losses, draws, int(siblings)))
            else:
                drawn.append(drawn_gradient(model, objective, noisy, gates, draws, tau))
        found = quality(exact_gradient(gates, masks, losses), drawn)
        state = "equal" if at is None else "half decided"
        shown = f"{tau:g}" if estimator in ("", "gumbel-top-k") else ""
        rows.append({"estimator": name, "scheme": scheme, "temperature": shown, "logits": state, **found})
    return rows


# -------------------------------------------------------------------------------------------------------- convergence


def learned(settings: dict[str, Any], seed: int, training: dict[str, Any] | None = None) -> dict[str, Any]:
    """Learn a mask with the digits recipe and other settings of the prune section."""
    teacher, recipe = open_model("digits"), load_recipe("digits-published")
    section = dataclasses.replace(
        recipe.prune, training=dataclasses.replace(recipe.prune.training, **(training or {})), **settings
    )
    objective = GaussianObjective()
    learner = mask_learner(teacher, objective, section, Randomness(seed).generator_seed("lora"))
    state = TrainState(learner.module, learner.parameter_groups, section.training)
    source = ShuffledBatches(load_digits(), Randomness(seed), torch.device("cpu"))
    lines = []
    for record in train_steps(state, learner.objective, source, section.training, Randomness(seed)):
        if record.step % 20 == 0 or state.step == section.training.made_steps:
            decision = learner.decision(state.ema, record.step)
            lines.append({"step": record.step, **record.values(), **decision.log(record.step, learner.objective)})
    return {"kept": lines[-1]["kept"]["blocks"], "lines": lines}


def fine_tuned(kept: list[int], seed: int = 0) -> dict[str, float]:
    """Held-out loss of a student before and after the fine-tuning."""
    teacher, heldout = open_model("digits"), load_digits(heldout=True)
    student = teacher.cut(PrunePlan({"blocks": kept}, {"blocks": 12}, "indices", teacher=teacher.hash()))
    before = float(calibration_loss(student, heldout, 8).mean())
    make_trainable(student.module, student.family)
    student.module.train()
    state = TrainState(student.module, [ParameterGroup(trainable(student.module))], FINE_TUNING)
    source = ShuffledBatches(load_digits(), Randomness(seed), torch.device("cpu"))
    objective = GaussianObjective()
    for _ in train_steps(state, objective, source, FINE_TUNING, Randomness(seed)):
        pass
    state.ema.copy_to(student.module)
    student.module.eval()
    return {"before": before, "after": float(calibration_loss(student, heldout, 16).mean())}


def stored(path: Path, work: Callable[[], Any], allowed: bool = True) -> Any:
    """Result of `work`, cached in a file; None if it is neither cached nor allowed to run."""
    if not path.exists():
        if not allowed:
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, work())
    return read_json(path)


def tuned(runs: Path, kept: list[int], allowed: bool = True) -> Any:
    """Cached result of `fine_tuned`."""
    return stored(runs / f"tuned-{'-'.join(map(str, kept))}.json", lambda: fine_tuned(kept), allowed)


def settled(lines: list[dict[str, Any]]) -> int:
    """The first logged step from which the decision no longer changes."""
    last = lines[-1]["kept"]
    changes = [i for i, line in enumerate(lines) if line["kept"] != last]
    return int(lines[changes[-1] + 1 if changes else 0]["step"])


# --------------------------------------------------------------------------------------------------------------- page


def gradient_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown of `gradients`."""
    head = ["estimator", "scheme", "temperature", "logits"]
    head += ["cosine of the mean with the exact gradient", "cosine of one draw", "noise", "size"]
    numbers = ([f"{r['cosine']:.3f}", f"{r['single']:.3f}", f"{r['noise']:.2f}", f"{r['size']:.2f}"] for r in rows)
    return table(head, *([str(r[key]) for key in head[:4]] + n for r, n in zip(rows, numbers, strict=True)))


def convergence_table(runs: Path, seeds: int, only: list[str] | None) -> list[str]:
    """Markdown table of every search and mask; runs missing ones of those named by `only` (None: all)."""
    rows: list[list[str]] = []
    done = total = 0
    for name, settings in SEARCHES.items():
        allowed = only is None or name in only
        by_mask: dict[str, list[str]] = {}
        for seed in range(seeds):
            total += 1
            slug = "".join(c if c.isalnum() else "-" for c in name)
            result = stored(runs / f"{slug}-{seed}.json", partial(learned, settings, seed), allowed)
            losses = tuned(runs, result["kept"], allowed) if result else None
            if losses:
                done += 1
                mask = " ".join(map(str, result["kept"]))
                step = str(settled(result["lines"]))
                if mask in by_mask:
                    row = by_mask[mask]
                    row[2:4] = f"{row[2]}, {seed}", f"{row[3]}, {step}"
                else:
                    by_mask[mask] = [name, mask, str(seed), step, f"{losses['before']:.4f}", f"{losses['after']:.4f}"]
        rows += by_mask.values()
    for name, mask in MASKS.items():
        total += 1
        losses = tuned(runs, mask, only is None or name in only)
        if losses:
            done += 1
            rows.append([name, " ".join(map(str, mask)), "", "", f"{losses['before']:.4f}", f"{losses['after']:.4f}"])
    head = ["search", "kept", "seeds", "settled at step", "loss, pruned", "loss, tuned"]
    return [*table(head, *rows), "", f"{done} of {total} done."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/subset"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=48, help="draws of every estimator")
    parser.add_argument("--only", nargs="*", help="searches to run now; what is done already is shown anyway")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    flush_denormals()
    rows = gradient_table(stored(options.runs / "gradients.json", lambda: gradients(options.trials)))
    print("\n".join(rows), flush=True)
    rows += ["", *convergence_table(options.runs, options.seeds, options.only)]
    print("\n".join(rows))
    if options.out:
        write_text(options.out, "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
