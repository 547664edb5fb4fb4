"""What `test_processes.py` trains on one process and on two: run by hand as `python two_processes.py FOLDER` per process.

Not a test by itself. Every case is trained under every way of being two; the main process writes what came out.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tinyfusion.blocks.routers import DynamicSettings
from tinyfusion.blocks.stack import frozen
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.config.process_sections import MaskedSection
from tinyfusion.config.recipe import (
    ComputeSection,
    DistillStepsSection,
    PruneSection,
    Recipe,
    RecoverSection,
    TrainingSection,
)
from tinyfusion.core.rng import Draws, Randomness
from tinyfusion.dynamic.train import DynamicObjective
from tinyfusion.jobs.few_steps import few_step_training
from tinyfusion.models.attach import attach
from tinyfusion.models.checkpoint import LoadedModel, new_model
from tinyfusion.processes.base import Batch, FoldedGuidance, Objective
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.processes.masked import MaskedObjective
from tinyfusion.prune.criteria import by_indices
from tinyfusion.prune.learn import Search, mask_learner, search_within
from tinyfusion.recover.align import block_pairs
from tinyfusion.recover.distill import distilled
from tinyfusion.training.checkpoints import CheckpointWriter, load_latest
from tinyfusion.training.engine import Engine, open_engine
from tinyfusion.training.loop import StepRecord, train_steps
from tinyfusion.training.optim import ParameterGroup, decay_groups, trainable
from tinyfusion.training.state import TrainState

STEPS = 8
SETTINGS = TrainingSection(
    steps=STEPS, batch_size=8, learning_rate=2e-3, learning_rate_end_share=0.5, ema_decay=0.9, label_drop=0.3
)
RANDOMNESS = Randomness(11)
WAYS = {
    "ddp": ComputeSection(timeout_s=60),
    "fsdp2": ComputeSection(parallel="fsdp2", timeout_s=60),
    "fsdp2-teacher-accumulated": ComputeSection(
        parallel="fsdp2", shard_teacher=True, gradient_accumulation_steps=2, timeout_s=60
    ),
    "ddp-accumulated": ComputeSection(gradient_accumulation_steps=2, timeout_s=60),
}
FOLDED = FoldedGuidance(2.0, 1)  # on one of the two channels


ROUGH = {"bf16": 2e-2, "fp16": 2e-2, "muon": 1e-4}  # tolerances of cases, by their names: Muon multiplies in bfloat16


@dataclass
class Job:
    """A training of a tiny model."""

    state: TrainState
    objective: Objective
    settings: TrainingSection


def teacher_model(family: str = "dit", **more: int) -> LoadedModel:
    sizes = {"input_size": 4, "patch_size": 2, "in_channels": 2, "hidden_size": 16, "depth": 4, "num_heads": 2}
    model = new_model(family, {**sizes, "num_classes": 5, **more}, seed=3)
    generator = torch.Generator().manual_seed(0)  # new models begin at zero outputs: nothing would depend on anything
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.empty(parameter.shape).normal_(0, 0.05, generator=generator))
    return model


def batches(step: int, batch_size: int, draws: Draws) -> Batch:
    assert batch_size == SETTINGS.batch_size
    x = torch.from_numpy(draws.normal("data", (2, 4, 4)))
    return Batch(x, class_condition(torch.from_numpy(draws.integers("label", 5)), 5))


def learning(engine: Engine, settings: TrainingSection = SETTINGS, **more: Any) -> Job:
    section = PruneSection(**{"scheme": "1:2", "lora_rank": 2, "training": settings, **more})
    learner = mask_learner(teacher_model(), GaussianObjective(0.3), section, 0, engine.device, engine.place)
    return Job(TrainState(learner.module, learner.parameter_groups, settings), learner.objective, settings)


def recovery(
    engine: Engine, method: Any, settings: TrainingSection = SETTINGS, guidance: FoldedGuidance | None = None
) -> Job:
    teacher = teacher_model()
    plan = by_indices(teacher, [0, 2], seed=0)
    student = teacher.cut(plan)
    engine.place(student.module, list(student.stack))
    engine.place_teacher(frozen(teacher.module), list(teacher.stack))
    goal: Objective = GaussianObjective(0.3)
    if method != "finetune":
        section = RecoverSection(method=method, beta=(0.5, 0.1), training=settings)
        goal = distilled(section, GaussianObjective(0.3), teacher, student, block_pairs(plan), guidance=guidance)
    groups = [ParameterGroup(trainable(student.module))]
    return Job(TrainState(student.module, groups, settings, student.stack), goal, settings)


def searched(
    engine: Engine, sure: float = 1.0, guidance: FoldedGuidance | None = None, trials: Sequence[int] = (), **more: Any
) -> Job:
    """A distillation of the whole model that chooses its blocks in the first half. trials: further fields of the `Search`."""
    teacher, student = teacher_model(), teacher_model()
    engine.place(student.module, list(student.stack))
    engine.place_teacher(frozen(teacher.module), list(teacher.stack))
    how = RecoverSection(method="logits-kd", training=SETTINGS)
    goal = distilled(how, GaussianObjective(0.3), teacher, student, [], guidance=guidance)
    section = PruneSection(**{"scheme": "2:4", "distribution": "subset", "gate_learning_rate": 0.05, **more})
    groups = [ParameterGroup(trainable(student.module))]
    learner = search_within(student, goal, groups, section, Search(STEPS // 2, sure, *trials), engine.device)
    return Job(TrainState(learner.module, learner.parameter_groups, SETTINGS), learner.objective, SETTINGS)


def masked_recovery(engine: Engine) -> Job:
    """A MAR with dropout, from both stacks of which half the blocks went."""
    settings = replace(SETTINGS, weight_decay=0.01)
    teacher = teacher_model("mar", patch_size=1, buffer_size=2, head_depth=1, head_width=16)
    plan = by_indices(teacher, [0, 2, 5, 6], seed=0)
    student = teacher.cut(plan)
    engine.place(student.module.train(), list(student.stack))
    engine.place_teacher(frozen(teacher.module), list(teacher.stack))
    masked = MaskedSection(0.3, attention_dropout=0.1, projection_dropout=0.1)
    section = RecoverSection(beta=(0.5, 0.1), training=settings)
    goal = distilled(section, MaskedObjective(1, 0.3, masked), teacher, student, block_pairs(plan))
    groups = decay_groups(trainable(student.module), student.family.undecayed, settings)
    return Job(TrainState(student.module, groups, settings), goal, settings)


def dynamic(
    engine: Engine,
    auxiliary: Any = "complete",
    guidance: FoldedGuidance | None = None,
    training: TrainingSection = SETTINGS,
    **settings: Any,
) -> Job:
    """A model with routers that decide this way and that, under a budget of the global batch."""
    model = teacher_model()
    routed = attach(model, DynamicSettings(width_bias=0.3, token_bias=0.3, block_bias=0.3, **settings))
    engine.place(model.module.train(), list(model.stack))
    static = teacher_model()
    teacher = (frozen(static.module), static.stack) if auxiliary == "teacher" else None
    if teacher is not None:
        engine.place_teacher(static.module, list(static.stack))
    goal = DynamicObjective(
        GaussianObjective(0.3), routed, 0.6, label_drop=0.3, ramp_steps=6, auxiliary=auxiliary,
        auxiliary_steps=5, teacher=teacher, finish_from=7, total=engine.total if engine.world > 1 else None,
        taught_alone=guidance is not None, guidance=guidance,
    )  # fmt: skip
    groups = [ParameterGroup(trainable(model.module))]
    return Job(TrainState(model.module, groups, training, model.stack), goal, training)


def few_steps(engine: Engine, method: str) -> Job:
    """A pruned student that learns to draw in few steps: its own calls differ by image, and a critic trains too."""
    teacher = teacher_model()
    student = teacher.cut(by_indices(teacher, [0, 2], seed=0))
    settings = replace(SETTINGS, learning_rate=2e-4)  # two players at a high rate carry rounding on
    section = DistillStepsSection(method=method, num_steps=3, teacher_steps=6, training=settings)  # type: ignore[arg-type]
    work = few_step_training(Recipe(distill_steps=section), student, teacher, batches, engine)
    return Job(work.state, work.objective, settings)


CASES: dict[str, Callable[[Engine], Job]] = {
    "learning-lora": learning,
    "learning-full-subset-score": lambda engine: learning(
        engine, scheme="2:4", update="full", distribution="subset", subset_estimator="score"
    ),
    "learning-bf16-apart": lambda engine: learning(
        engine, replace(SETTINGS, dtype="bfloat16", clip_groups="apart", clip_norm=0.1)
    ),
    "searched": lambda engine: searched(engine, trials=(3, 2, 8), scaling=(1.0, 1.0)),
    "searched-score": lambda engine: searched(engine, subset_estimator="score"),
    "finetune": lambda engine: recovery(engine, "finetune"),
    "masked-kd": lambda engine: recovery(engine, "masked-kd"),
    "masked-kd-folded": lambda engine: recovery(engine, "masked-kd", guidance=FOLDED),
    "searched-folded": lambda engine: searched(engine, guidance=FOLDED),
    "masked-kd-fp16": lambda engine: recovery(engine, "masked-kd", replace(SETTINGS, dtype="float16")),
    "masked-kd-muon": lambda engine: recovery(engine, "masked-kd", replace(SETTINGS, optimizer="muon")),
    "masked-tokens": masked_recovery,
    "few-steps-consistency": lambda engine: few_steps(engine, "consistency"),
    "few-steps-matching": lambda engine: few_steps(engine, "matching"),
    "dynamic": dynamic,
    "dynamic-depth-teacher": lambda engine: dynamic(engine, "teacher", depth=True, forced_first=False),
    "dynamic-muon": lambda engine: dynamic(engine, training=replace(SETTINGS, optimizer="muon")),
    "dynamic-folded": lambda engine: dynamic(engine, "teacher", FOLDED),
}
BASIC = ("learning-lora", "masked-kd", "masked-kd-folded", "dynamic")
EVERY = ("ddp", "fsdp2-teacher-accumulated")  # ways of all cases: nothing and everything in parts
RUNS = [(case, way) for case in CASES for way in WAYS if case in BASIC or way in EVERY]


def steps(job: Job, engine: Engine, until: int | None = None) -> Iterator[StepRecord]:
    settings = job.settings if until is None else replace(job.settings, stop_after=until)
    return train_steps(job.state, job.objective, batches, settings, RANDOMNESS, engine)


def outcome(job: Job, engine: Engine) -> dict[str, Any]:
    """Losses, norms and the sum of every average: what must not depend on the number of processes."""
    records = list(steps(job, engine))
    averages = job.state.averages()
    return {
        "loss": [float(record.terms["loss"]) for record in records],
        "norm": [float(record.gradient_norm) for record in records],
        "applied": [record.applied for record in records],
        "averages": {name: value.double().abs().sum().item() for name, value in averages.items()},
    }


def split_share(job: Job) -> float:
    """Numbers of the trained weights that this process holds, as a share of all, by DTensors alone."""
    found = [p for p in job.state.model.parameters() if p.requires_grad]
    if not all(isinstance(p, DTensor) for p in found):
        return 1.0
    return sum(p.to_local().numel() for p in found) / sum(p.numel() for p in found)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for way, compute in WAYS.items():
        engine = open_engine("cpu", compute)
        for name in (case for case, chosen in RUNS if chosen == way):
            job = CASES[name](engine)
            share = split_share(job)
            found[f"{name}/{way}"] = {**outcome(job, engine), "share": share, "world": engine.world}

    # half of a training in parts on two processes, for one process to go on with; and the other way round
    engine = open_engine("cpu", WAYS["fsdp2"])
    job = CASES["learning-lora"](engine)
    main_pid = engine.first(os.getpid)
    parts: Any = {"rank": engine.rank, "world": engine.world, "main_pid": main_pid}
    with CheckpointWriter(folder / "by_two", 1, **parts, timeout_s=30) as writer:
        for _ in steps(job, engine, STEPS // 2):
            pass
        writer.save(job.state)
    job = CASES["learning-lora"](engine)
    assert load_latest(folder / "by_one", job.state, first=engine.first) == STEPS // 2
    found["continued"] = outcome(job, engine)

    found["news"] = {
        "agree": engine.agree(engine.rank * 15),
        "gathered": engine.gathered([engine.rank + 4]),
        "first": engine.first(lambda: f"from {engine.rank}"),
    }
    engine.wait()
    if engine.is_main:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
