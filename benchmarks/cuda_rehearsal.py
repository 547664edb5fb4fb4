"""Rehearse the CUDA code paths on a machine without a GPU.

    python benchmarks/cuda_rehearsal.py [--only TEXT] [--table FILE]

Needs a CUDA build of torch, but no device: `fake_cuda.py` says what is checked and what is replaced. Training, masks,
recovery, criteria, routers, sampling, replay, timing, feature extraction and autoencoders run for every registered family,
and masks and recovery for modules from outside with one stream and with two. Batches are made two steps ahead, on their thread
and stream. Not rehearsed: backward passes, values, compiled code, several processes, 8-bit moments, writing files, and the
solvers dpm-solver++ and unipc, which look their steps up by value. Exit status 1 where a rehearsal fails; 0, with the
reason, where torch has no CUDA.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tinyfusion as tf
from fake_cuda import fake_cuda
from own_modules import Own
from shared import table
from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.blocks.routers import DynamicSettings
from tinyfusion.commands.replay import _one_step
from tinyfusion.config.process_sections import FlowSampleSection
from tinyfusion.config.recipe import (
    ComputeSection,
    PruneSection,
    Recipe,
    RecoverSection,
    SampleSection,
    TrainingSection,
)
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import write_text
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.data.digits import ImageSet
from tinyfusion.dynamic.train import DynamicObjective, inference_ratio
from tinyfusion.evaluate.inception import Inception, InceptionFeatures
from tinyfusion.evaluate.metrics import precision_recall
from tinyfusion.evaluate.timing import interleaved
from tinyfusion.families.registry import families
from tinyfusion.jobs.criteria import criterion_context
from tinyfusion.jobs.process_specs import objective_for, sampler_of
from tinyfusion.jobs.routing import _drawn_passes
from tinyfusion.jobs.sampling_setup import open_drawing, timed_model
from tinyfusion.jobs.training import Training, mask_training
from tinyfusion.models.attach import attach
from tinyfusion.models.autoencoder import Autoencoder
from tinyfusion.models.checkpoint import LoadedModel, new_model
from tinyfusion.prune.calibrate import calibration_set
from tinyfusion.prune.criteria import CRITERIA, decide
from tinyfusion.training.checkpoints import CheckpointWriter
from tinyfusion.training.engine import Engine
from tinyfusion.training.optim import ParameterGroup, decay_groups, trainable
from tinyfusion.training.state import TrainState

CUDA = torch.device("cuda")  # without an index, as `--device cuda` gives it
SIZES = dict(input_size=4, patch_size=2, in_channels=2, hidden_size=16, depth=2, num_heads=2, num_classes=5)
MORE = {
    "mar": {"buffer_size": 3, "head_depth": 2, "head_width": 8},
    "pixart": {"caption_tokens": 3, "caption_channels": 8},
}
TRAINING = TrainingSection(steps=2, batch_size=8, ema_decay=0.2)
# every distribution, and every update
LEARNED: dict[str, dict[str, Any]] = {
    "categorical lora": {},
    "categorical full": {"update": "full"},
    "categorical frozen": {"update": "frozen"},
    "marginals lora": {"distribution": "subset"},
    "gumbel frozen": {"distribution": "subset", "subset_estimator": "gumbel-top-k", "update": "frozen"},
    "score full": {"distribution": "subset", "subset_estimator": "score", "update": "full"},
    "dense": {"dropped": "dense"},
    "clipped-apart": {"clip_groups": "apart"},
    "bfloat16 lora": {"dtype": "bfloat16"},
    "bfloat16 full": {"dtype": "bfloat16", "update": "full"},
    "float16 frozen": {"dtype": "float16", "update": "frozen"},
}
RECOVERED: dict[str, dict[str, Any]] = {
    "finetune": {"method": "finetune"},
    "logits-kd": {"method": "logits-kd"},
    "rep-kd": {"method": "rep-kd"},
    "masked-kd": {},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "checkpointed": {"gradient_checkpointing": True},
    "accumulated": {"gradient_accumulation_steps": 2},
}
LOW = ("bfloat16", "float16")
# criteria that look at images; those of the same search but another choice are left out
LOOKING = [n for n, row in CRITERIA.items() if row.evaluations and n not in ("median-loss", "max-loss")]
Rehearsal = Callable[[], None]


def model_of(family: str, **sizes: Any) -> LoadedModel:
    """A tiny model of a family on the fake device."""
    made = new_model(family, {**SIZES, **MORE.get(family, {}), **sizes}, 0)
    return dataclasses.replace(made, module=made.module.to(CUDA))


def batches(model: LoadedModel) -> ShuffledBatches:
    """Random images that fit the model."""
    arch = model.arch
    x = np.zeros((32, arch.in_channels, arch.input_size, arch.input_size), np.float32)
    images = ImageSet("random", x, np.arange(32, dtype=np.int64) % arch.num_classes, arch.num_classes)
    return ShuffledBatches(images, Randomness(0), CUDA, augment=0.5, flip=0.5).conditioned_on(model.conditions)


def steps_of(work: Training) -> None:
    """All steps, what a log line holds, the average, and the copy that a checkpoint is written from."""
    with work.in_place():
        for record in work.steps():
            record.values()
            work.extra(record)
    work.state.averages()
    with tempfile.TemporaryDirectory() as folder:
        copies = CheckpointWriter(Path(folder), 1)._copied(work.state.tensors())
    for tensor in copies.values():
        tensor.numpy()


def training(family: str, dtype: str = "float32", replayed: bool = False, **compute: Any) -> Rehearsal:
    """`train`, and what `replay` makes of a step."""

    def run() -> None:
        model, settings = model_of(family), dataclasses.replace(TRAINING, dtype=dtype)
        engine = Engine(CUDA, ComputeSection(**compute))
        engine.place(model.module.train(), list(model.stack))
        groups = decay_groups(trainable(model.module), model.family.undecayed, settings)
        state, objective = TrainState(model.module, groups, settings), objective_for(model, 0.1, Recipe())
        work = Training("train", Recipe(), settings, model, model.stack, state, objective, batches(model), engine)
        steps_of(work)
        if replayed:
            _one_step(work, 0)

    return run


def learning(family: str, dtype: str = "float32", clip_groups: str = "joint", **changes: Any) -> Rehearsal:
    """`prune` with learned masks."""

    def run() -> None:
        model = model_of(family)
        own = dataclasses.replace(TRAINING, dtype=dtype, clip_groups=clip_groups)  # type: ignore[arg-type]
        settings = PruneSection(training=own, **changes)
        objective = objective_for(model, 0.1, Recipe())
        work = mask_training(Recipe(prune=settings), model, objective, batches(model), Engine(CUDA))
        steps_of(work)
        work.decision().kept()

    return run


def halved(model: LoadedModel) -> LoadedModel:
    """A student with every second block of every list."""
    depths = model.stack.depths()
    kept = {name: list(range(0, depth, 2)) for name, depth in depths.items()}
    return tf.prune_model(model, PrunePlan(kept=kept, depth=depths, criterion="indices", teacher=model.hash()))


def recovery(family: str, method: str = "masked-kd", dtype: str = "float32", **compute: Any) -> Rehearsal:
    """`recover`."""

    def run() -> None:
        teacher = model_of(family)
        settings = RecoverSection(method=method, training=dataclasses.replace(TRAINING, dtype=dtype))  # type: ignore[arg-type]
        recovered(halved(teacher), teacher, tf.objective_of(teacher), batches(teacher), settings, **compute)

    return run


def recovered(student: LoadedModel, teacher: LoadedModel, task: Any, data: Any, settings: Any, **compute: Any) -> None:
    """Recover by the library; distillation has the teacher."""
    tf.recover_model(
        student, None if settings.method == "finetune" else teacher, task, data, settings,
        compute=ComputeSection(**compute), on_step=lambda record: record.values() and None,
    )  # fmt: skip


def criterion(family: str, name: str, **changes: Any) -> Rehearsal:
    """`prune` with a criterion without training."""

    def run() -> None:
        model = model_of(family)
        settings = PruneSection(criterion=name, **changes)  # type: ignore[arg-type]
        context = criterion_context(
            model, settings, 0,
            lambda: calibration_set(objective_for(model, 0.0, Recipe()), batches(model), "random", 32, 8, 4, 0),
        )  # fmt: skip
        model.cut(decide(context))

    return run


def sampling(family: str, num_steps: int = 4, decoded: bool = False, **settings: Any) -> Rehearsal:
    """`sample`, with an autoencoder where `decoded`."""

    def run() -> None:
        model = model_of(family, **({"in_channels": 4} if decoded else {}))
        fixed = FlowSampleSection(method="heun2")
        section = SampleSection(num_images=4, num_steps=num_steps, batch_size=3, flow=fixed, **settings)
        drawing = open_drawing(Recipe(sample=section), model, CUDA, autoencoder() if decoded else None)
        list(drawing.images(0, 4))

    return run


def autoencoder() -> Autoencoder:
    """A small AutoencoderKL."""
    from diffusers import AutoencoderKL

    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    module = AutoencoderKL(**blocks, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4)
    return Autoencoder(module.eval().requires_grad_(False), "small", 0.2, 0.0, 4, 2)


def encoding() -> None:
    """What `encode` computes."""
    encoder = autoencoder()
    encoder.module.to(CUDA)
    pixels = torch.zeros(3, 3, 8, 8, dtype=torch.uint8).pin_memory().to(CUDA, non_blocking=True)
    moments = encoder.moments(pixels.float().div_(255).sub_(0.5).div_(0.5)).cpu()
    encoder.latents(moments, torch.zeros(3, 4, 4, 4)).numpy()


def evaluation() -> None:
    """Features, and the distances between them."""
    features = InceptionFeatures(Inception(), CUDA)(np.zeros((4, 32, 32, 3), np.uint8))
    precision_recall(features.pool, features.pool, 2, CUDA)


def timing(family: str, dtype: str = "float32") -> Rehearsal:
    """`bench`."""

    def run() -> None:
        section = SampleSection(num_steps=4, flow=FlowSampleSection(method="euler"))
        side = timed_model(model_of(family), section, 4, CUDA, dtype=dtype)
        interleaved({"model": side.run}, 2, CUDA)

    return run


def routed(family: str, dtype: str, auxiliary: str, parts: int = 1) -> Rehearsal:
    """`dynamic`: training, the measured budget, and sampling by sub-networks."""

    def run() -> None:
        model, static = model_of(family), model_of(family)
        dynamic = attach(model, DynamicSettings(), 0)
        engine = Engine(CUDA, ComputeSection(gradient_accumulation_steps=parts))
        engine.place(model.module.train(), list(model.stack))
        settings, recipe = dataclasses.replace(TRAINING, dtype=dtype), Recipe()
        objective = DynamicObjective(
            inner=objective_for(model, 0.1, recipe), dynamic=dynamic, target=0.5, label_drop=0.1, ramp_steps=1, weight=2.0,
            auxiliary=auxiliary, auxiliary_steps=2, auxiliary_weight=1.0, finish_from=1, strata=4,
            teacher=(static.module, static.stack) if auxiliary == "teacher" else None,
        )  # type: ignore[arg-type]  # fmt: skip
        state = TrainState(model.module, [ParameterGroup(trainable(model.module))], settings)
        steps_of(Training("dynamic", recipe, settings, model, model.stack, state, objective, batches(model), engine))
        model.module.eval()
        section = SampleSection(num_images=4, num_steps=4, flow=FlowSampleSection(method="euler"))
        inference_ratio(dynamic, _drawn_passes(recipe, model, sampler_of(section, model), 4))
        list(open_drawing(Recipe(sample=section), model, CUDA).images(0, 4))

    return run


def own_learning(two_streams: bool, dtype: str = "float32", clip_groups: str = "joint", **changes: Any) -> Rehearsal:
    """Masks of a module from outside, its student, and that recovered."""

    def run() -> None:
        own = Own(two_streams, CUDA)
        training = dataclasses.replace(TRAINING, dtype=dtype, clip_groups=clip_groups)  # type: ignore[arg-type]
        settings = PruneSection(training=training, **changes)
        masks = tf.learn_masks(own.model, own.task, own.batch, settings)
        tf.prune_model(own.model, masks.plan)

    return run


def own_recovery(two_streams: bool, method: str = "masked-kd", dtype: str = "float32", **compute: Any) -> Rehearsal:
    """A student of a module from outside, recovered."""

    def run() -> None:
        own = Own(two_streams, CUDA)
        settings = RecoverSection(method=method, training=dataclasses.replace(TRAINING, dtype=dtype))  # type: ignore[arg-type]
        recovered(halved(own.model), own.model, own.task, own.batch, settings, **compute)

    return run


def own_criterion(two_streams: bool, name: str) -> Rehearsal:
    """A criterion without training, of a module from outside."""

    def run() -> None:
        own = Own(two_streams, CUDA)
        tf.prune_model(own.model, name, task=own.task, batches=own.batch, num_batches=1)

    return run


def of_family(family: str) -> dict[str, Rehearsal]:
    """What every family is rehearsed in, by kind and configuration."""
    listed: dict[str, Rehearsal] = {"train float32": training(family, replayed=True)}
    listed |= {f"train {dtype}": training(family, dtype) for dtype in LOW}
    listed["train accumulated"] = training(family, gradient_accumulation_steps=2)
    listed["train checkpointed"] = training(family, gradient_checkpointing=True)
    listed["train in-turn"] = training(family, prefetch_batches=0)
    listed |= {f"learn {name}": learning(family, **changes) for name, changes in LEARNED.items()}
    listed |= {f"recover {name}": recovery(family, **changes) for name, changes in RECOVERED.items()}
    for name in LOOKING:
        if name != "width" or families()[family].widths is not None:
            listed[f"criterion {name}"] = criterion(family, name)
    listed["criterion bi-clean"] = criterion(family, "bi", bi_inputs="clean")
    listed["criterion greedy"] = criterion(family, "sensitivity", sensitivity_order="greedy")
    listed |= {f"sample {dtype}": sampling(family, dtype=dtype) for dtype in ("float32", *LOW)}
    listed["sample decoded"] = sampling(family, decoded=True)
    listed |= {f"bench {dtype}": timing(family, dtype) for dtype in ("float32", "bfloat16")}
    if families()[family].dynamic is not None:
        listed |= {f"dynamic {name}": routed(family, "float32", name) for name in ("complete", "teacher", "none")}
        listed["dynamic bfloat16"] = routed(family, "bfloat16", "complete")
        listed["dynamic accumulated"] = routed(family, "float32", "complete", 2)
    return listed


def of_own(two_streams: bool) -> dict[str, Rehearsal]:
    """What a module from outside is rehearsed in."""
    listed = {f"learn {name}": own_learning(two_streams, **changes) for name, changes in LEARNED.items()}
    listed |= {f"recover {name}": own_recovery(two_streams, **changes) for name, changes in RECOVERED.items()}
    listed |= {f"criterion {name}": own_criterion(two_streams, name) for name in LOOKING if name != "width"}
    return listed


def rehearsals() -> dict[str, Rehearsal]:
    """Everything that is rehearsed, by what is rehearsed, kind and configuration."""
    groups = {family: of_family(family) for family in families()}
    groups |= {"module-1-stream": of_own(False), "module-2-streams": of_own(True)}
    groups["dit"] |= {"sample ddim": sampling("dit", sampler="ddim"), "sample ddpm-clip": sampling("dit", clip=True)}
    groups["sit"] |= {"sample sde": sampling("sit", sampler="sde")}
    groups["encode"], groups["evaluate"] = {"encode moments": encoding}, {"evaluate inception": evaluation}
    return {f"{group} {name}": run for group, listed in groups.items() for name, run in listed.items()}


def outcome(run: Rehearsal) -> str | None:
    """None, or the error of a rehearsal and where in the package it came from."""
    try:
        with fake_cuda():
            run()
    except Exception as error:
        place = [f for f in traceback.extract_tb(error.__traceback__) if "src/tinyfusion" in f.filename][-1:]
        where = f"{place[0].filename.rpartition('tinyfusion/')[2]}:{place[0].lineno}" if place else "outside"
        return f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rehearse only what has this text in its name")
    parser.add_argument("--table", type=Path, help="write how many configurations passed to this Markdown file")
    options = parser.parse_args()
    if not torch.backends.cuda.is_built():
        print(f"skipped: torch {torch.__version__} is built without CUDA; a CUDA build needs no GPU for this")
        return 0
    outcomes = {}
    for name, run in rehearsals().items():
        if options.only in name:
            outcomes[name] = outcome(run)
            if outcomes[name]:
                print(f"FAILED {name}: {outcomes[name]}", flush=True)
    passed = [name for name, error in outcomes.items() if error is None]
    print(f"{len(passed)} of {len(outcomes)} rehearsals passed, torch {torch.__version__}")
    if options.table:
        write_text(options.table, "\n".join(counted(list(outcomes), passed)) + "\n")
    return 0 if len(passed) == len(outcomes) else 1


def counted(names: list[str], passed: list[str]) -> list[str]:
    """A table: passed configurations of all, a row per model and a column per kind."""
    every, good = (Counter(tuple(name.split()[:2]) for name in listed) for listed in (names, passed))
    kinds = list(dict.fromkeys(kind for _, kind in every))
    rows = []
    for group in dict.fromkeys(group for group, _ in every):
        cells = [f"{good[group, kind]} of {every[group, kind]}" if every[group, kind] else "" for kind in kinds]
        rows.append([group, *cells])
    return table(["model", *kinds], *rows)


if __name__ == "__main__":
    sys.exit(main())
