"""The sections of a recipe for what trains: steps, processes, trackers, and what pruning, recovery and routers have of their own.

The same rules as in `config/recipe.py`: values only, every field explained once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tinyfusion.config.constraints import (
    BatchSize,
    Count,
    CountOrZero,
    Ge,
    Gt,
    Index,
    Le,
    Logit,
    NonNegative,
    Positive,
    PositiveShare,
    Share,
    ShareBelowOne,
    SmallCount,
)

Dtype = Literal["float32", "bfloat16", "float16"]
Criterion = Literal[
    "learned", "bi", "flux-lite", "sensitivity", "bk-sdm", "first", "last", "uniform", "random",
    "min-loss", "median-loss", "max-loss", "indices", "width",
]  # fmt: skip
Recovery = Literal["finetune", "logits-kd", "rep-kd", "masked-kd"]


@dataclass(frozen=True, kw_only=True)
class TrainingSection:
    """One call of the training loop."""

    steps: Annotated[Count, "optimiser steps that schedules are laid out for"] = 100_000
    stop_after: Annotated[
        Count | None, "steps after which training ends early, schedules unchanged; None makes them all"
    ] = None
    batch_size: Annotated[BatchSize, "images per step"] = 256
    learning_rate: Annotated[Positive, "peak learning rate of AdamW"] = 2e-4
    learning_rate_end_share: Annotated[
        Share, "learning rate at the last step as a share of the peak, reached by cosine; 1 keeps it constant"
    ] = 0.5
    warmup_steps: Annotated[CountOrZero, "steps over which the learning rate rises linearly"] = 0
    betas: Annotated[tuple[ShareBelowOne, ShareBelowOne], "AdamW's decay rates"] = (0.9, 0.999)
    eps: Annotated[Positive, "AdamW's denominator offset"] = 1e-8
    weight_decay: Annotated[NonNegative, "AdamW's decoupled weight decay"] = 0.0
    optimizer: Annotated[
        Literal["adamw", "adamw-8bit"], "AdamW, or AdamW with moments in 8 bits (extra 8bit: bitsandbytes)"
    ] = "adamw"
    clip_norm: Annotated[Positive | None, "largest gradient norm; None does not clip"] = 1.0
    skip_norm: Annotated[
        Positive | None, "gradient norm from which on a step is not made; None makes every finite one"
    ] = None
    clip_groups: Annotated[
        Literal["joint", "apart"], "gradients of gates and weights clipped by their joint norm, or each by its own"
    ] = "joint"
    ema_decay: Annotated[ShareBelowOne, "decay of the moving average of weights per step"] = 0.9999
    label_drop: Annotated[Share, "probability that a label is replaced by the null class"] = 0.1
    dtype: Annotated[
        Dtype, "arithmetic of matrix products (autocast); weights stay float32; float16 scales the loss"
    ] = "float32"
    log_every_steps: Annotated[Count, "steps between two lines of metrics.jsonl"] = 100
    checkpoint_every_steps: Annotated[Count, "steps between two checkpoints"] = 10_000
    checkpoints_limit: Annotated[Count, "checkpoints kept; older ones are removed"] = 2
    max_bad_steps: Annotated[Count, "non-finite steps in a row after which the run stops"] = 10

    @property
    def made_steps(self) -> int:
        """Steps that are really made."""
        return self.steps if self.stop_after is None else min(self.steps, self.stop_after)

    @property
    def made_images(self) -> int:
        """Images that are really seen."""
        return self.made_steps * self.batch_size


@dataclass(frozen=True)
class ComputeSection:
    """How a training is spread over processes and memory. Results do not depend on it, but for rounding."""

    parallel: Annotated[
        Literal["ddp", "fsdp2"], "several processes: each holds the whole model (DDP), or parts of every block (FSDP2)"
    ] = "ddp"
    shard_teacher: Annotated[bool, "fsdp2: the frozen teacher lies in parts too; else every process holds it"] = False
    gradient_accumulation_steps: Annotated[
        BatchSize, "parts in which a process goes through its share of a batch; the batch and the result stay the same"
    ] = 1
    gradient_checkpointing: Annotated[
        bool, "run every block of the trained model again in the backward pass instead of keeping what is inside"
    ] = False
    compile: Annotated[bool, "compile the blocks; an error where that gains nothing"] = False
    tf32: Annotated[bool, "CUDA: float32 products with 10 bits of mantissa, as published"] = True
    prefetch_batches: Annotated[
        int, Ge(0), Le(2**10), "batches that are made ahead while the model computes; 0 makes them in turn"
    ] = 2
    timeout_s: Annotated[float, Gt(0), Le(1e8), "seconds after which a process that waits for another gives up"] = 600.0


@dataclass(frozen=True)
class WatchSection:
    """What a training shows while it runs, beside its progress and metrics.jsonl. Off by default."""

    report_to: Annotated[tuple[str, ...], "trackers that get every log line: tensorboard, wandb, trackio"] = ()
    project: Annotated[str, "name of the project at the tracker"] = "tinyfusion"
    grid_every_steps: Annotated[
        CountOrZero, "steps between two pictures of samples of the averaged weights; 0 makes none"
    ] = 0
    grid_images: Annotated[Count, "images in such a picture"] = 40
    fid_every_steps: Annotated[CountOrZero, "steps between two small FIDs of the averaged weights; 0 takes none"] = 0
    fid_images: Annotated[int, Ge(2), Le(10**9), "images of a small FID"] = 1000


@dataclass(frozen=True)
class PruneSection:
    """Which blocks go."""

    criterion: Annotated[Criterion, "how blocks are chosen"] = "learned"
    scheme: Annotated[str, "N:M keeps N of every M consecutive blocks; 2:4x3+3:4x4 is explicit"] = "1:2"
    distribution: Annotated[
        Literal["categorical", "subset"],
        "learned: one logit per candidate of a group, enumerated, or one per block, over subsets of exact size",
    ] = "categorical"
    keep: Annotated[tuple[Index, ...], "blocks to keep, for criterion indices"] = ()
    num_keep: Annotated[
        SmallCount | None, "blocks that stay in each list, for criteria without groups; None is half, rounded up"
    ] = None
    budgets: Annotated[
        tuple[str, ...],
        "transformers of diffusers: blocks that stay per list, LIST=N; all=N over the lists of the trunk",
    ] = ()
    protect: Annotated[tuple[Index, ...], "blocks that stay whatever the criterion says"] = ()
    update: Annotated[Literal["lora", "full", "frozen"], "what is trained beside the gates"] = "lora"
    keep_deltas: Annotated[
        bool,
        "learned: the student starts from what was trained beside the gates, instead of throwing it away (published)",
    ] = False
    lora_rank: Annotated[int, Ge(1), Le(2**16), "rank of the low-rank weight deltas"] = 8
    lora_alpha: Annotated[Positive | None, "scale numerator of the deltas; None is twice the rank"] = None
    gate_learning_rate: Annotated[NonNegative, "learning rate of the gate logits"] = 1e-3
    logit_init: Annotated[Logit, "initial value of every gate logit"] = 0.02
    temperature: Annotated[tuple[Positive, Positive], "Gumbel-softmax temperature at the first and last step"] = (
        4.0,
        0.1,
    )
    scaling: Annotated[tuple[NonNegative, NonNegative], "scale of the logits at the first and last step"] = (
        100.0,
        100.0,
    )
    subset_estimator: Annotated[
        Literal["marginals", "gumbel-top-k", "score"],
        "gradient of a subset: through the exact marginals, through relaxed Gumbel top-K, or unbiased, from pairs of masks",
    ] = "marginals"
    dropped: Annotated[
        Literal["skip", "dense"],
        "blocks that an image drops: run without a graph, or (published) with one; the gradients are the same",
    ] = "skip"
    calibration_images: Annotated[
        Count,
        "images on which scores are taken",
    ] = 1024
    calibration_batch_size: Annotated[BatchSize, "calibration images at a time"] = 64
    bi_inputs: Annotated[
        Literal["noised", "clean"],
        "block influence: noised inputs at all timesteps, or as released, clean ones at t < 250",
    ] = "noised"
    sensitivity_order: Annotated[
        Literal["one-shot", "greedy"], "sensitivity: every block from the whole model, or block by block"
    ] = "one-shot"
    bk_sdm_list: Annotated[
        Literal["corrected", "old"], "bk-sdm at 28 blocks: the list with block 15, or the earlier one with 14"
    ] = "corrected"
    num_masks: Annotated[
        int, Ge(1), Le(10**7), "masks tried by min-loss, median-loss and max-loss; all of them where there are fewer"
    ] = 100_000
    width_share: Annotated[PositiveShare, "width: share of the teacher's parameters that stays"] = 0.5
    width_threshold: Annotated[
        Share, "width: gradients are summed over timesteps until the loss falls below this share of the largest"
    ] = 0.05
    training: TrainingSection = field(
        default_factory=lambda: TrainingSection(
            steps=10_009,
            batch_size=128,
            learning_rate=1e-4,
            learning_rate_end_share=1.0,
            ema_decay=0.999,
        )
    )

    @property
    def lora_scale(self) -> float:
        """Factor of the low-rank product B A."""
        return 2.0 if self.lora_alpha is None else self.lora_alpha / self.lora_rank


@dataclass(frozen=True)
class RecoverSection:
    """How the cut model is brought back."""

    method: Annotated[
        Recovery, "plain fine-tuning, or distillation of outputs, of outputs and features, with massive features masked"
    ] = "masked-kd"
    alpha_kd: Annotated[Share, "weight of the output distillation; the data loss has 1 - alpha_kd"] = 0.9
    beta: Annotated[
        tuple[NonNegative, NonNegative], "weight of the feature distillation at the first and last step"
    ] = (1e-2, 0.0)
    mask: Annotated[
        Literal["own", "joint"],
        "own: each side drops its massive activations (released code); joint: both drop the union (paper)",
    ] = "own"
    mask_sigmas: Annotated[
        Positive | None, "activations further than this many standard deviations are masked; None masks none"
    ] = 2.0
    training: TrainingSection = field(default_factory=TrainingSection)

    @property
    def compares_features(self) -> bool:
        """Whether block outputs are distilled."""
        return self.method in ("rep-kd", "masked-kd")


@dataclass(frozen=True)
class DynamicSection:
    """Which parts of a model run at which timestep, and for which token; published values of DyDiT."""

    target: Annotated[
        PositiveShare, "multiply-accumulates of the blocks that stay, as a share of all, mean over a sampling"
    ] = 0.5
    width: Annotated[bool, "decide on heads and groups of hidden channels, by timestep"] = True
    tokens: Annotated[bool, "decide on tokens of the MLP, by content"] = True
    depth: Annotated[bool, "decide on whole blocks, by timestep (not published)"] = False
    forced_first: Annotated[
        bool, "the first head and group always run (released in March 2025), or none has to (December 2024)"
    ] = True
    order: Annotated[
        bool, "before training, put heads and hidden channels in the order of their weights; the function stays"
    ] = True
    temperature: Annotated[Positive, "of the surrogate gradient of a decision"] = 5.0
    width_bias: Annotated[Logit, "initial logit of heads and groups: they start on"] = 15.0
    token_bias: Annotated[Logit, "initial logit of tokens"] = 35.0
    block_bias: Annotated[Logit, "initial logit of blocks"] = 15.0
    budget_weight: Annotated[NonNegative, "weight of (ratio - budget) squared"] = 2.0
    ramp_steps: Annotated[
        CountOrZero | None, "steps over which the budget falls from 1 to the target, after 100 at 1; None lets it jump"
    ] = 1000
    beside: Annotated[
        Literal["complete", "teacher", "none"],
        "what runs beside: the complete model on the data (published), the teacher to learn from, or nothing",
    ] = "complete"
    beside_steps: Annotated[CountOrZero, "steps for which it does"] = 30_000
    beside_weight: Annotated[NonNegative, "weight of its loss"] = 1.0
    strata: Annotated[
        SmallCount, "parts of the range of timesteps that every batch is spread over; 1 draws them freely"
    ] = 4
    finish_steps: Annotated[CountOrZero, "last steps, in which decisions have no noise, as at inference"] = 2_000
    in_run: Annotated[bool, "`run` makes the recovered student dynamic too, with the teacher of the recipe"] = False
    calibration_images: Annotated[
        CountOrZero,
        "one offset of all routers is found that meets the target within 1 %, on every step of a sixteenth of so many drawn "
        "images; 0 leaves the routers as they are",
    ] = 256
    training: TrainingSection = field(
        default_factory=lambda: TrainingSection(
            steps=200_000,
            learning_rate=1e-4,
            learning_rate_end_share=1.0,
            clip_norm=None,
            skip_norm=200.0,
        )
    )
