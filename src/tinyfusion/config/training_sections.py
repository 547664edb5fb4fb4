"""Sections of a recipe for training: steps, processes, trackers, pruning, recovery, routers (rules: `config/recipe.py`)."""

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
    Location,
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
StepDistillation = Literal["consistency", "matching"]
Recovery = Literal["finetune", "logits-kd", "rep-kd", "masked-kd"]


@dataclass(frozen=True, kw_only=True)
class TrainingSection:
    """One call of the training loop."""

    steps: Annotated[Count, "optimiser steps of the schedules"] = 100_000
    stop_after: Annotated[Count | None, "steps after which training ends early, schedules unchanged; None: all"] = None
    batch_size: Annotated[BatchSize, "images per step"] = 256
    learning_rate: Annotated[Positive, "peak learning rate"] = 2e-4
    learning_rate_end_share: Annotated[Share, "learning rate at the last step over the peak (cosine); 1: constant"] = (
        0.5
    )
    warmup_steps: Annotated[CountOrZero, "steps of the linear rise of the learning rate"] = 0
    betas: Annotated[tuple[ShareBelowOne, ShareBelowOne], "AdamW's decay rates"] = (0.9, 0.999)
    eps: Annotated[Positive, "AdamW's denominator offset"] = 1e-8
    weight_decay: Annotated[NonNegative, "AdamW's decoupled weight decay"] = 0.0
    optimizer: Annotated[
        Literal["adamw", "adamw-8bit", "muon"],
        "AdamW; with 8-bit moments (extra 8bit); or Muon for the matrices of blocks, at the same learning rate",
    ] = "adamw"
    clip_norm: Annotated[Positive | None, "largest gradient norm; None: no clipping"] = 1.0
    skip_norm: Annotated[
        Positive | None, "skip the update at or above this gradient norm; None: never skip a finite gradient"
    ] = None
    clip_groups: Annotated[Literal["joint", "apart"], "clip gates and weights by their joint norm, or separately"] = (
        "joint"
    )
    ema_decay: Annotated[ShareBelowOne, "decay of the moving average of weights per step"] = 0.9999
    ema_device: Annotated[
        Literal["same", "cpu"],
        "where the moving average is: with the weights, or in the host's memory; ema_decay 0: nowhere",
    ] = "same"
    label_drop: Annotated[Share, "probability that a label is replaced by the null class"] = 0.1
    dtype: Annotated[Dtype, "autocast of matrix products; weights stay as `weights` says; float16 scales the loss"] = (
        "float32"
    )
    weights: Annotated[
        Literal["float32", "bfloat16"],
        "type of trained weights and gradients; bfloat16: updates in float32, rounded at random, with dtype bfloat16",
    ] = "float32"
    log_every_steps: Annotated[Count, "steps between two lines of metrics.jsonl"] = 100
    checkpoint_every_steps: Annotated[Count, "steps between two checkpoints"] = 10_000
    checkpoints_limit: Annotated[Count, "most checkpoints on disk; older ones are removed"] = 2
    max_bad_steps: Annotated[Count, "consecutive non-finite steps after which the run stops"] = 10

    @property
    def made_steps(self) -> int:
        """Steps until training ends."""
        return self.steps if self.stop_after is None else min(self.steps, self.stop_after)

    @property
    def made_images(self) -> int:
        """Images until training ends."""
        return self.made_steps * self.batch_size


@dataclass(frozen=True)
class ComputeSection:
    """Distribution of a training over processes and memory. Results do not depend on it, except for rounding."""

    parallel: Annotated[
        Literal["ddp", "fsdp2"], "several processes: each has the whole model (DDP), or a shard of every block (FSDP2)"
    ] = "ddp"
    shard_teacher: Annotated[bool, "fsdp2: shard the frozen teacher too; else every process has all of it"] = False
    gradient_accumulation_steps: Annotated[
        BatchSize, "microbatches of a process per step; the result stays the same"
    ] = 1
    gradient_checkpointing: Annotated[bool, "recompute blocks in the backward pass instead of storing activations"] = (
        False
    )
    compile: Annotated[bool, "compile the blocks; an error where that gains nothing"] = False
    tf32: Annotated[bool, "CUDA: float32 products with 10 bits of mantissa, as published"] = True
    prefetch_batches: Annotated[int, Ge(0), Le(2**10), "batches prepared ahead on a thread; 0: none"] = 2
    timeout_s: Annotated[float, Gt(0), Le(1e8), "seconds after which a process that waits for another gives up"] = 600.0


@dataclass(frozen=True)
class WatchSection:
    """Trackers, previews and FID during a training. Off by default."""

    report_to: Annotated[tuple[str, ...], "trackers that get every log line: tensorboard, wandb, trackio"] = ()
    project: Annotated[str, "name of the project at the tracker"] = "tinyfusion"
    grid_every_steps: Annotated[CountOrZero, "steps between two grids of samples of the averaged weights; 0: none"] = 0
    grid_images: Annotated[Count, "images of such a grid"] = 40
    fid_every_steps: Annotated[CountOrZero, "steps between two small FIDs of the averaged weights; 0: none"] = 0
    fid_images: Annotated[int, Ge(2), Le(10**9), "images of a small FID"] = 1000
    prompts: Annotated[
        str | None, Location(), "transformers of diffusers: text file of the prompts drawn, one a line; None: captions of the latents"
    ] = None  # fmt: skip

    @property
    def draws(self) -> bool:
        """Whether the training draws images: for grids, or for small FIDs."""
        return bool(self.grid_every_steps or self.fid_every_steps)


@dataclass(frozen=True)
class PruneSection:
    """Choice of the blocks to remove."""

    criterion: Annotated[Criterion, "rule that chooses the blocks"] = "learned"
    scheme: Annotated[
        str,
        "learned: 50% keeps half of every list of blocks, N:M keeps N of every M consecutive blocks; 2:4x3+3:4x4 is explicit, "
        "10:19;1:2 for two lists of blocks",
    ] = "50%"
    distribution: Annotated[
        Literal["categorical", "subset", "runs"] | None,
        "learned: one logit per candidate of a group, enumerated; one per block, over subsets of exact size; or one per place of "
        "the removed blocks, which are consecutive; None: subset where the scheme is a share, else (published) categorical",
    ] = None
    runs: Annotated[
        int, Ge(1), Le(2**10), "distribution runs: runs of removed blocks in each group, of equal length"
    ] = 1
    keep: Annotated[tuple[Index, ...], "criterion indices: blocks to keep, such as 0,2,4"] = ()
    num_keep: Annotated[
        SmallCount | None, "criteria other than learned: blocks to keep in each list; None: half, rounded up"
    ] = None
    budgets: Annotated[
        tuple[str, ...], "transformers of diffusers: blocks to keep per list, LIST=N; all=N over the lists of the trunk"
    ] = ()
    protect: Annotated[tuple[Index, ...], "blocks to keep whatever the criterion, such as 0,11"] = ()
    update: Annotated[Literal["lora", "full", "frozen"], "learned: weight updates trained with the gates"] = "lora"
    target: Annotated[
        Literal["data", "teacher"] | None,
        "learned: the loss of a masked model is that on the data, or its distance to the whole model's output; None: data, but "
        "teacher for models with guidance in the network and for recorded inputs",
    ] = None
    storage: Annotated[
        Literal["own", "float8", "nf4"],
        "learned, update lora or frozen: frozen weights of blocks as opened, or in 8 or 4 bits (extra 8bit)",
    ] = "own"
    keep_deltas: Annotated[
        bool, "learned: apply these updates to the student (published: discard them); other criteria have none"
    ] = False
    lora_rank: Annotated[int, Ge(1), Le(2**16), "rank of the low-rank weight deltas"] = 8
    lora_alpha: Annotated[Positive | None, "scale numerator of the deltas; None: twice the rank"] = None
    gate_learning_rate: Annotated[NonNegative, "learning rate of the gate logits"] = 1e-3
    logit_init: Annotated[Logit, "initial value of every gate logit"] = 0.02
    temperature: Annotated[
        tuple[Positive, Positive], "Gumbel-softmax temperature at the first and last step"
    ] = (4.0, 0.1)  # fmt: skip
    scaling: Annotated[
        tuple[NonNegative, NonNegative], "scale of the logits at the first and last step"
    ] = (100.0, 100.0)  # fmt: skip
    subset_estimator: Annotated[
        Literal["marginals", "gumbel-top-k", "score"],
        "gradient of a subset: through the exact marginals, through relaxed Gumbel top-K, or unbiased, from pairs of masks",
    ] = "marginals"
    dropped: Annotated[
        Literal["skip", "dense"],
        "blocks that an image drops: run without a graph, or (published) with one; same gradients",
    ] = "skip"
    calibration_images: Annotated[Count, "images on which scores are computed"] = 1024
    calibration_batch_size: Annotated[BatchSize, "calibration images at a time"] = 64
    bi_inputs: Annotated[
        Literal["noised", "clean"],
        "block influence: noised inputs at all timesteps, or (released) clean ones at t < 250",
    ] = "noised"
    sensitivity_order: Annotated[
        Literal["one-shot", "greedy"], "sensitivity: remove every block from the whole model, or one after another"
    ] = "one-shot"
    bk_sdm_list: Annotated[
        Literal["corrected", "old"], "bk-sdm at 28 blocks: the list with block 15, or the earlier one with 14"
    ] = "corrected"
    num_masks: Annotated[int, Ge(1), Le(10**7), "min-, median-, max-loss: masks to try; all where there are fewer"] = (
        100_000
    )
    width_share: Annotated[PositiveShare, "width: share of the teacher's parameters to keep"] = 0.5
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
    """Recovery of a pruned model."""

    method: Annotated[Recovery, "fine-tuning, or distillation of outputs and (rep-kd, masked-kd) features"] = (
        "masked-kd"
    )
    alpha_kd: Annotated[Share, "weight of the output distillation; the data loss has 1 - alpha_kd"] = 0.9
    guidance: Annotated[
        float | None, Ge(1), Le(10**6),
        "fold classifier-free guidance of this scale into the student: it learns the guided output of the teacher, and draws with one "
        "pass of the network per step; None: the student keeps both outputs, and guidance stays free",
    ] = None  # fmt: skip
    beta: Annotated[
        tuple[NonNegative, NonNegative], "weight of the feature distillation at the first and last step"
    ] = (1e-2, 0.0)  # fmt: skip
    mask: Annotated[
        Literal["own", "joint"], "masked activations: those massive in each model (released code), or in either (paper)"
    ] = "own"
    mask_sigmas: Annotated[Positive | None, "mask activations beyond so many standard deviations; None: no mask"] = 2.0
    teacher_storage: Annotated[
        Literal["own", "float8", "nf4", "streamed"],
        "the frozen teacher's weights: as opened, its blocks in 8 or 4 bits (extra 8bit), or on the host and brought block by block",
    ] = "own"
    update: Annotated[
        Literal["full", "lora"], "train all weights, or low-rank updates, which are merged at the end"
    ] = "full"
    lora_rank: Annotated[int, Ge(1), Le(2**16), "update lora: rank"] = 64
    lora_alpha: Annotated[Positive | None, "update lora: scale numerator; None: the rank"] = None
    lora_apart: Annotated[
        bool, "update lora: also write the updates alone, lora.safetensors for diffusers and peft"
    ] = False
    search_share: Annotated[
        PositiveShare | None,
        "choose the blocks of a whole model within its recovery, by the gates of section prune: share of the steps after which they "
        "are fixed at the latest; None: the student is pruned already",
    ] = None
    search_confidence: Annotated[
        PositiveShare, "search_share: the blocks are fixed as soon as every decision has at least this probability"
    ] = 0.95
    search_candidates: Annotated[
        Count,
        "search_share: where the search ends undecided, try this many of its likeliest choices: each trains from there, on the same "
        "images, and the best is kept; 1: no trials",
    ] = 1
    search_trial_steps: Annotated[Count, "search_candidates: steps of each; they come on top of training.steps"] = 120
    search_trial_batch_size: Annotated[
        BatchSize | None, "search_candidates: images per step of these, at most training.batch_size; None: as many"
    ] = None
    search_trial_rate: Annotated[
        PositiveShare,
        "search_candidates: learning rate of these over that of the training; a low one tells choices apart sooner",
    ] = 0.25
    training: TrainingSection = field(default_factory=TrainingSection)

    @property
    def search_steps(self) -> int:
        """Most steps of a search within the recovery; 0 without one."""
        return 0 if self.search_share is None else max(1, round(self.search_share * self.training.steps))

    @property
    def lora_scale(self) -> float:
        """Factor of the low-rank product B A."""
        return 1.0 if self.lora_alpha is None else self.lora_alpha / self.lora_rank

    @property
    def compares_features(self) -> bool:
        """Whether block outputs are distilled."""
        return self.method in ("rep-kd", "masked-kd")


@dataclass(frozen=True)
class DynamicSection:
    """Dynamic models: which heads, channels, tokens and blocks run at which timestep; published values of DyDiT."""

    target: Annotated[PositiveShare, "share of the blocks' multiply-accumulates to keep, mean over a sampling"] = 0.5
    width: Annotated[bool, "route heads and groups of hidden channels, by timestep"] = True
    tokens: Annotated[bool, "route tokens of the MLP, by content"] = True
    depth: Annotated[bool, "route whole blocks, by timestep (not published)"] = False
    forced_first: Annotated[bool, "the first head and group always run (code of March 2025; earlier: False)"] = True
    order: Annotated[bool, "before training, sort heads and hidden channels by weight; the function stays the same"] = (
        True
    )
    temperature: Annotated[Positive, "temperature of the surrogate gradient of a decision"] = 5.0
    width_bias: Annotated[Logit, "initial logit of heads and groups: they start on"] = 15.0
    token_bias: Annotated[Logit, "initial logit of tokens"] = 35.0
    block_bias: Annotated[Logit, "initial logit of blocks"] = 15.0
    budget_weight: Annotated[NonNegative, "weight of (ratio - budget) squared"] = 2.0
    ramp_steps: Annotated[
        CountOrZero | None, "steps of the linear ramp of the budget from 1 to target, after 100 at 1; None: no ramp"
    ] = 1000
    auxiliary: Annotated[
        Literal["complete", "teacher", "none"],
        "auxiliary loss: complete model on the data (published), teacher, or none",
    ] = "complete"
    auxiliary_steps: Annotated[CountOrZero, "steps with the auxiliary loss"] = 30_000
    auxiliary_weight: Annotated[NonNegative, "weight of the auxiliary loss"] = 1.0
    guidance: Annotated[
        float | None, Ge(1), Le(10**6),
        "auxiliary teacher: fold classifier-free guidance of this scale into the model: the guided output of the teacher is its only "
        "target, at all steps, and it draws with one pass of the network per step; None: guidance stays free",
    ] = None  # fmt: skip
    strata: Annotated[SmallCount, "ranges of timesteps over which every batch is spread; 1: none"] = 4
    finish_steps: Annotated[CountOrZero, "last steps, in which decisions have no noise, as at inference"] = 2_000
    in_run: Annotated[bool, "`run` makes the recovered student dynamic too, with the teacher of the recipe"] = False
    calibration_images: Annotated[
        CountOrZero,
        "images that calibrate one offset of all routers to the target within 1 % (every step of a sixteenth of them); 0: none",
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


@dataclass(frozen=True)
class DistillStepsSection:
    """Distillation of a sampling in few steps."""

    method: Annotated[
        StepDistillation,
        "consistency: every point of the teacher's trajectory leads to the end of its phase (phased consistency); matching: the images "
        "get the distribution of the teacher's (DMD), with a critic",
    ] = "consistency"
    num_steps: Annotated[SmallCount, "steps of a drawing, one call of the network each"] = 4
    guidance: Annotated[
        float | None, Ge(1), Le(10**6),
        "scale of classifier-free guidance that is folded in; None: sample.guidance, of transformers of diffusers that of the pipeline",
    ] = None  # fmt: skip
    first_level: Annotated[
        PositiveShare | None,
        "matching of noise predictions: noise level of the first step, 1: noise alone; the others follow evenly; None: 0.8, as the clean "
        "image is ill-determined above. Others begin at 1",
    ] = None
    teacher_steps: Annotated[SmallCount, "consistency: DDIM steps of the teacher over all noise levels"] = 48
    end_power: Annotated[
        NonNegative,
        "consistency: weight of an error, this power of how far the end of its phase moves with it; 0: none, 2: as published",
    ] = 1.0
    within: Annotated[
        tuple[PositiveShare, PositiveShare], "matching: noise levels between which distributions are compared"
    ] = (0.02, 0.8)  # fmt: skip
    fresh_noise: Annotated[
        bool, "matching: noise the predicted image anew in every step; else go on along the predicted noise"
    ] = True
    in_run: Annotated[bool, "`run` distils the recovered student's steps too, with the teacher of the recipe"] = False
    critic_learning_rate: Annotated[
        Positive | None, "matching: peak learning rate of the critic; None: ten times that of the generator"
    ] = None
    training: TrainingSection = field(
        default_factory=lambda: TrainingSection(
            steps=20_000,
            learning_rate=1e-4,
            learning_rate_end_share=0.05,
            ema_decay=0.999,
            clip_groups="apart",
            label_drop=0.0,
        )
    )
