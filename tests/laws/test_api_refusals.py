"""What the library refuses: settings out of limits, fields that nothing reads, inputs that do not fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from library_models import (
    FEW,
    TASK,
    TRAINING,
    Models,
    Stack,
    digits,
    distil,
    drawn,
    finetune,
    learn,
    made,
    pairs,
    recover,
    recovered,
    search,
    trained,
)

import tinyfusion as tf
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.config.process_sections import FlowSampleSection
from tinyfusion.core.errors import UserError
from tinyfusion.jobs import library_settings
from tinyfusion.jobs.library_settings import python_words

IMAGES = np.arange(20 * 64, dtype=np.uint32).astype(np.uint8).reshape(20, 8, 8, 1)
ONE_PLAN = tf.PrunePlan(kept={"layers": [0]}, depth={"layers": 4}, criterion="indices")

OUT_OF_LIMITS = [
    (lambda m: recover(m, training=trained(dtype="bf16")), "RecoverSection.training.dtype must be one of float32, .*got 'bf16'"),
    (lambda m: recover(m, training=trained(optimizer="sgd")), "training.optimizer must be one of adamw"),
    (lambda m: recover(m, training=trained(weights="fp16")), "training.weights must be one of float32, bfloat16"),
    (lambda m: recover(m, training=trained(clip_groups="x")), "training.clip_groups must be one of"),
    (lambda m: recover(m, training=trained(ema_device="gpu")), "training.ema_device must be one of"),
    (lambda m: recover(m, training=trained(steps=0)), "RecoverSection.training.steps must be at least 1; got 0"),
    (lambda m: recover(m, training=trained(steps="4")), "training.steps wants a whole number; got '4'"),
    (lambda m: recover(m, training=trained(learning_rate=-1.0)), "training.learning_rate must be above 0; got -1"),
    (lambda m: recover(m, training=trained(clip_norm=0.0)), "training.clip_norm must be above 0"),
    (lambda m: recover(m, training=trained(ema_decay=1.0)), "training.ema_decay must be .*below 1"),
    (lambda m: recover(m, training=trained(betas=(0.9, 1.5))), "training.betas must be .*below 1"),
    (lambda m: recover(m, method="mse"), "RecoverSection.method must be one of finetune"),
    (lambda m: recover(m, update="LoRA"), "RecoverSection.update must be one of full, lora; got 'LoRA'"),
    (lambda m: recover(m, teacher_storage="int8"), "RecoverSection.teacher_storage must be one of own"),
    (lambda m: recover(m, alpha_kd=3.0), "RecoverSection.alpha_kd must be at least 0 and at most 1; got 3"),
    (lambda m: recover(m, beta=0.5), "RecoverSection.beta wants 2 values"),
    (lambda m: recover(m, mask_sigmas=-1.0), "RecoverSection.mask_sigmas must be above 0"),
    (lambda m: search(m, search_share=2.0), "RecoverSection.search_share must be .*at most 1"),
    (lambda m: learn(m, update="LoRA"), "PruneSection.update must be one of lora, full, frozen"),
    (lambda m: learn(m, distribution="bogus"), "PruneSection.distribution must be one of"),
    (lambda m: learn(m, target="x"), "PruneSection.target must be one of data, teacher"),
    (lambda m: learn(m, dropped="x"), "PruneSection.dropped must be one of"),
    (lambda m: learn(m, subset_estimator="zzz"), "PruneSection.subset_estimator must be one of"),
    (lambda m: learn(m, storage="int8"), "PruneSection.storage must be one of own"),
    (lambda m: learn(m, scheme=0.5), "scheme '0.5'"),
    (lambda m: learn(m, training=None), "PruneSection.training is a section"),
    (lambda m: learn(m, seed=-1), "seed must be at least 0; got -1"),
    (lambda m: learn(m, seed=1.5), "seed wants a whole number; got 1.5"),
    (lambda m: learn(m, tf.ComputeSection(gradient_accumulation_steps=0)), "ComputeSection.gradient_accumulation_steps must be at least 1"),
    (lambda m: recover(m, tf.ComputeSection(parallel="x")), "ComputeSection.parallel must be one of ddp, fsdp2"),  # type: ignore[arg-type]
    (lambda m: tf.learn_masks(m.own, TASK, pairs(), tf.RecoverSection()), "wanted a PruneSection; got RecoverSection"),  # type: ignore[arg-type]
    (lambda m: distil(m, method="cm"), "DistillStepsSection.method must be one of consistency, matching"),
    (lambda m: distil(m, num_steps=0), "DistillStepsSection.num_steps must be at least 1"),
    (lambda m: distil(m, end_power=-1.0), "DistillStepsSection.end_power must be at least 0"),
    (lambda m: distil(m, 0.5), "^guidance must be at least 1"),
    (lambda m: drawn(m.dit, quantize="int4"), "SampleSection.quantize must be one of int8"),
    (lambda m: drawn(m.dit, dtype="bf16"), "SampleSection.dtype must be one of"),
    (lambda m: drawn(m.dit, guidance_channels="foo"), "SampleSection.guidance_channels must be one of"),
    (lambda m: drawn(m.dit, batch_size=0), "SampleSection.batch_size must be at least 1"),
    (lambda m: drawn(m.few, sampler="banana"), "SampleSection.sampler must be one of"),
    (lambda m: tf.objective_of(m.dit, 2.0), "label_drop must be at least 0 and at most 1; got 2"),
    (lambda m: tf.prune_model(m.own, "bi", task=TASK, batches=pairs(), num_batches=0), "num_batches must be at least 1; got 0"),
    (lambda m: tf.prune_model(m.own, "first", num_keep=0), "^num_keep must be at least 1; got 0"),
    (lambda m: tf.evaluate_images(IMAGES, IMAGES, neighbours=0), "neighbours must be at least 1; got 0"),
    (lambda m: tf.evaluate_images(IMAGES, IMAGES, device="tpu"), "device 'tpu' is not available here"),
    (lambda m: tf.open_model("digits", weights="banana"), "^weights must be one of ema, raw; got 'banana'"),
]  # fmt: skip

UNREAD = [
    (lambda m: learn(m, criterion="bi"), "learn_masks does not read PruneSection.criterion='bi' here: prune_model takes criteria"),
    (lambda m: learn(m, num_keep=2), "PruneSection.num_keep=2 here: the scheme says how many blocks stay"),
    (lambda m: learn(m, keep=(0, 1)), r"PruneSection.keep=\(0, 1\)"),
    (lambda m: learn(m, budgets=("layers=2",)), "PruneSection.budgets"),
    (lambda m: learn(m, keep_deltas=True), r"PruneSection.keep_deltas=True here: prune_model\(model, masks, keep_updates=...\)"),
    (lambda m: learn(m, width_share=0.3), "PruneSection.width_share=0.3 here: it is for other functions"),
    (lambda m: learn(m, update="full", lora_rank=2), "PruneSection.lora_rank=2 here"),
    (lambda m: learn(m, runs=2), "PruneSection.runs=2 here: it is for distribution runs"),
    (lambda m: learn(m, subset_estimator="score"), "PruneSection.subset_estimator='score' here: it is for distribution subset"),
    (lambda m: learn(m, training=trained(label_drop=0.5)), "PruneSection.training.label_drop=0.5 here: labels are dropped by"),
    (lambda m: learn(m, training=trained(log_every_steps=5)), "training.log_every_steps=5 here: on_step is called with every step"),
    (lambda m: learn(m, training=trained(batch_size=9)), "PruneSection.training.batch_size is 9, and the batches have 8 images"),
    (lambda m: learn(m, tf.ComputeSection(tf32=False)), "ComputeSection.tf32=False here: torch.backends.cuda.matmul.allow_tf32 stays"),
    (lambda m: learn(m, tf.ComputeSection(shard_teacher=True)), "ComputeSection.shard_teacher=True here"),
    (lambda m: recover(m, lora_apart=True, update="lora"), "RecoverSection.lora_apart=True here"),
    (lambda m: recover(m, lora_rank=2), "RecoverSection.lora_rank=2 here: it is for RecoverSection.update=lora"),
    (lambda m: recover(m, search_confidence=0.5), "search_confidence=0.5 here: it is for whole models, and student is pruned"),
    (lambda m: recover(m, method="rep-kd", mask_sigmas=3.0), "RecoverSection.mask_sigmas=3.0 here: it is for method masked-kd"),
    (lambda m: recover(m, method="logits-kd", beta=(1.0, 1.0)), "RecoverSection.beta"),
    (lambda m: finetune(m, alpha_kd=0.5), "RecoverSection.alpha_kd=0.5 here: it is for methods with a teacher"),
    (lambda m: search(m, tf.PruneSection(criterion="bi")), "recover_model with search_share does not read PruneSection.criterion"),
    (lambda m: search(m, search_candidates=2), r"trials of an iterable are not supported.*\(step, draws\)"),
    (lambda m: search(m, tf.PruneSection(num_keep=2)), "PruneSection.num_keep=2"),
    (lambda m: search(m, tf.PruneSection(target="teacher")), "PruneSection.target='teacher'"),
    (lambda m: search(m, tf.PruneSection(update="full")), "PruneSection.update='full'"),
    (lambda m: search(m, tf.PruneSection(storage="nf4")), "PruneSection.storage='nf4'"),
    (lambda m: search(m, tf.PruneSection(training=TRAINING)), "PruneSection.training here: the training of a search is that of Recover"),
    (lambda m: recovered(m, tf.objective_of(m.dit, 0.2), digits(), label_drop=0.3), "RecoverSection.training.label_drop=0.3 here"),
    (lambda m: distil(m, within=(0.3, 0.5)), r"DistillStepsSection.within=\(0.3, 0.5\) here: it is for method matching"),
    (lambda m: distil(m, fresh_noise=False), "DistillStepsSection.fresh_noise=False"),
    (lambda m: distil(m, critic_learning_rate=9.0), "DistillStepsSection.critic_learning_rate=9.0"),
    (lambda m: distil(m, method="matching", teacher_steps=9), "DistillStepsSection.teacher_steps=9 here: it is for method consistency"),
    (lambda m: distil(m, method="matching", end_power=3.0), "DistillStepsSection.end_power=3.0"),
    (lambda m: distil(m, in_run=True), "DistillStepsSection.in_run=True"),
    (lambda m: distil(m, training=trained(label_drop=0.9)), "DistillStepsSection.training.label_drop=0.9"),
    (lambda m: distil(m, method="matching", training=TRAINING), "training.clip_groups is 'joint', and method matching clips .*'apart'"),
    (lambda m: distil(m, 7.0, guidance=2.0), "guidance is 7, and .*guidance 2: give one"),
    *((lambda m, c=c: tf.sample_images(m.dit, [1], tf.SampleSection(**c)), f"does not read SampleSection.{next(iter(c))}") for c in (
        {"num_images": 7}, {"labels": (5,)}, {"label_rule": "balanced"}, {"weights": "raw"}, {"decode": False}, {"vae": "nowhere"},
        {"latent_scale": 2.0}, {"decode_batch_size": 1}, {"flow": FlowSampleSection(method="euler")},
    )),
    (lambda m: drawn(m.dit, sampler="ddpm", eta=0.5), "SampleSection.eta is for ddim, and the sampler is ddpm"),
    (lambda m: drawn(m.few), "a model that draws in its own 2 steps does not read SampleSection.sampler='ddim'"),
    (lambda m: drawn(m.few, sampler=None, num_steps=None, guidance=9.0), "SampleSection.guidance=9.0"),
    (lambda m: tf.prune_model(m.own, learn(m), num_keep=2), "prune_model does not read num_keep here: the masks are learned"),
    (lambda m: tf.prune_model(m.own, ONE_PLAN, keep_updates=False), "keep_updates here: only learned masks have updates"),
    (lambda m: tf.prune_model(m.own, ONE_PLAN, seed=3), "seed here: the plan names the blocks"),
    (lambda m: tf.prune_model(m.own, [0, 1], task=TASK), "task here: the indices name the blocks"),
    (lambda m: tf.prune_model(m.dit, "width", num_keep=2), "num_keep here: it keeps all blocks, narrower"),
]  # fmt: skip


def shared_blocks() -> Stack:
    module = Stack()
    module.layers[1] = module.layers[0]
    return module


def tied() -> Stack:
    module = Stack()
    module.layers[1].inner.weight = module.layers[0].inner.weight
    return module


@torch.no_grad()
def within_no_grad(m: Models) -> None:
    recover(m)


UNFIT = [
    (lambda m: drawn(m.dit, [11]), r"labels \[11\] out of range: the model knows classes 0 to 9"),
    (lambda m: drawn(m.dit, [-1]), r"labels \[-1\] out of range"),
    (lambda m: drawn(m.dit, [1.7]), "labels are whole numbers, one per image"),
    (lambda m: drawn(m.dit, []), "labels are whole numbers, one per image"),
    (lambda m: drawn(m.dit, [[1, 2]]), "labels are whole numbers, one per image"),
    (lambda m: drawn(m.dit, [[1], [1, 2]]), "labels are whole numbers, one per image"),
    (lambda m: drawn(m.dit, class_condition(torch.tensor([10]), 10)), r"labels \[10\] out of range"),
    (lambda m: recovered(m, tf.objective_of(m.dit), digits(), m.sit), "the process is not that of the model, .* of family sit"),
    (lambda m: tf.learn_masks(m.few, tf.objective_of(m.dit), digits()), "the model was distilled for 2 steps"),
    (lambda m: recovered(m, tf.objective_of(m.dit), digits(), m.few), "the model was distilled for 2 steps"),
    (lambda m: tf.prune_model(m.few, [0]), "the model was distilled for 2 steps"),
    (lambda m: tf.distill_model_steps(m.dit, m.few, digits(), FEW), "the teacher draws in few steps itself"),
    (lambda m: tf.distill_model_steps(m.dit, m.dit, [1, 2], FEW), "needs batches of a data set"),  # type: ignore[arg-type]
    *((lambda m, how=how: tf.prune_model(m.own, how), r"indices of the blocks to keep as whole numbers, such as \[0, 2, 4\]") for how in (
        np.array([0.0, 2.0]), ["0", "2"], {"layers": [0, 1]}, 3, None, [True, False], [],
    )),
    (lambda m: tf.prune_model(m.own, [-1]), "index of a block must be at least 0; got -1"),
    (lambda m: tf.prune_model(m.own, [0, 9]), r"^keep \[9\] out of range"),
    (lambda m: tf.prune_model(m.own, "indices"), "no criterion 'indices' without training"),
    (lambda m: tf.prune_model(m.own, "first", num_keep=9), "^num_keep 9: list layers has 4 blocks"),
    (lambda m: tf.prune_model(m.own, dataclasses.replace(ONE_PLAN, teacher="f" * 64)), ": give the model of the plan"),
    (lambda m: tf.wrap_module(shared_blocks(), ["layers"]), "the blocks layers.0 and layers.1 are one module"),
    (lambda m: tf.wrap_module(tied(), ["layers"]), "the weights layers.0.inner.weight and layers.1.inner.weight are tied"),
    (lambda m: recovered(m, tf.objective_of(m.dit), lambda step, draws: None), r"calls batches\(step, batch_size, draws\), with 3"),
    (lambda m: recovered(m, tf.objective_of(m.dit), pairs()), "needs batches of a data set .*got an iterable"),
    (lambda m: recovered(m, TASK, digits(), m.own), r"a Task calls batches\(step, draws\), with 2 arguments"),
    (lambda m: recovered(m, None, pairs(), m.own), "task is a Task of two functions, or .*got a NoneType"),
    (lambda m: recovered(m, TASK, torch.ones(8, 5, 3), m.own), "batches are an iterable of batches, or a function; got a Tensor"),
    (lambda m: tf.objective_of(m.own), "a Stack of your own has no process: a Task says how it is trained"),
    (lambda m: recovered(m, tf.objective_of(m.dit), digits(), m.own), "a Stack of your own has no process"),
    (lambda m: tf.sample_images(m.own, [0]), "a Stack of your own has no process"),
    (within_no_grad, r"a training needs gradients: call it outside of torch.no_grad\(\)"),
    (lambda m: tf.evaluate_images(list(IMAGES), IMAGES), "the images: wanted a NumPy array, .*got a list"),  # type: ignore[arg-type]
    (lambda m: tf.evaluate_images(IMAGES, torch.from_numpy(IMAGES)), "the reference: wanted a NumPy array, .*got a Tensor"),  # type: ignore[arg-type]
    (lambda m: tf.open_model(123), "source is a path, a name or a hub id; got 123"),  # type: ignore[arg-type]
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tiny_model: Any) -> Models:
    return made(tiny_model)


@pytest.mark.parametrize(("call", "message"), [*OUT_OF_LIMITS, *UNREAD, *UNFIT])
def test_what_is_refused(models: Models, call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        call(models)
    assert "--" not in str(error.value), "the library has no options"


def test_tables_name_fields_that_exist() -> None:
    sections = {kind.__name__: kind for kind in (tf.PruneSection, tf.RecoverSection, tf.DistillStepsSection, tf.SampleSection,
                                                 tf.ComputeSection, tf.TrainingSection)}  # fmt: skip
    named = [name.split(".") for name in library_settings._MEANT]
    named += [["PruneSection", name] for name in library_settings._GATES]
    named += [["SampleSection", name] for name in library_settings._DRAWN | library_settings._SAMPLER]
    named += [["ComputeSection", name] for name in library_settings._COMPUTE]
    named += [["TrainingSection", name] for name in library_settings._UNTRAINED]
    assert all(name in {field.name for field in dataclasses.fields(sections[kind])} for kind, name in named)


def test_messages_name_arguments_instead_of_options() -> None:
    assert (
        python_words("--set recover.training.ema_decay=0.9 or less") == "RecoverSection.training.ema_decay=0.9 or less"
    )
    assert python_words("bad: `tinyfusion replay RUN --step 3` shows it sample by sample; lower it") == "bad: lower it"
    assert (
        python_words("use --num-keep 3 (`tinyfusion prune --keep 1`)") == "use num_keep 3 (`tinyfusion prune --keep 1`)"
    )
    assert python_words("tinyfusion.sample.drive, a-b --x") == "tinyfusion.sample.drive, a-b x"
