"""The parts of a recipe that every training has: its steps, how it is spread over processes, and what it shows.

The same rules as in `config/recipe.py`: values only, every field explained once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class TrainingSection:
    """One call of the training loop."""

    steps: Annotated[int, "optimiser steps that schedules are laid out for"] = 100_000
    stop_after: Annotated[
        int | None, "steps after which training ends early, schedules unchanged; None makes them all"
    ] = None
    batch_size: Annotated[int, "images per step"] = 256
    learning_rate: Annotated[float, "peak learning rate of AdamW"] = 2e-4
    learning_rate_end_share: Annotated[
        float, "learning rate at the last step as a share of the peak, reached by cosine; 1 keeps it constant"
    ] = 0.5
    warmup_steps: Annotated[int, "steps over which the learning rate rises linearly"] = 0
    betas: Annotated[tuple[float, float], "AdamW's decay rates"] = (0.9, 0.999)
    eps: Annotated[float, "AdamW's denominator offset"] = 1e-8
    weight_decay: Annotated[float, "AdamW's decoupled weight decay"] = 0.0
    optimizer: Annotated[
        Literal["adamw", "adamw-8bit"], "AdamW, or AdamW with moments in 8 bits (extra 8bit: bitsandbytes)"
    ] = "adamw"
    clip_norm: Annotated[float | None, "largest gradient norm; None does not clip"] = 1.0
    skip_norm: Annotated[
        float | None, "gradient norm from which on a step is not made; None makes every finite one"
    ] = None
    clip_groups: Annotated[
        Literal["joint", "apart"], "gradients of gates and weights clipped by their joint norm, or each by its own"
    ] = "joint"
    ema_decay: Annotated[float, "decay of the moving average of weights per step"] = 0.9999
    label_drop: Annotated[float, "probability that a label is replaced by the null class"] = 0.1
    dtype: Annotated[
        Dtype, "arithmetic of matrix products (autocast); weights stay float32; float16 scales the loss"
    ] = "float32"
    log_every_steps: Annotated[int, "steps between two lines of metrics.jsonl"] = 100
    checkpoint_every_steps: Annotated[int, "steps between two checkpoints"] = 10_000
    checkpoints_limit: Annotated[int, "checkpoints kept; older ones are removed"] = 2
    max_bad_steps: Annotated[int, "non-finite steps in a row after which the run stops"] = 10

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
        int, "parts in which a process goes through its share of a batch; the batch and the result stay the same"
    ] = 1
    gradient_checkpointing: Annotated[
        bool, "run every block of the trained model again in the backward pass instead of keeping what is inside"
    ] = False
    compile: Annotated[bool, "compile the blocks; an error where that gains nothing"] = False
    tf32: Annotated[bool, "CUDA: float32 products with 10 bits of mantissa, as published"] = True
    prefetch_batches: Annotated[int, "batches that are made ahead while the model computes; 0 makes them in turn"] = 2
    timeout_s: Annotated[float, "seconds after which a process that waits for another gives up"] = 600.0


@dataclass(frozen=True)
class WatchSection:
    """What a training shows while it runs, beside its progress and metrics.jsonl. Off by default."""

    report_to: Annotated[tuple[str, ...], "trackers that get every log line: tensorboard, wandb, trackio"] = ()
    project: Annotated[str, "name of the project at the tracker"] = "tinyfusion"
    grid_every_steps: Annotated[int, "steps between two pictures of samples of the averaged weights; 0 makes none"] = 0
    grid_images: Annotated[int, "images in such a picture"] = 40
    fid_every_steps: Annotated[int, "steps between two small FIDs of the averaged weights; 0 takes none"] = 0
    fid_images: Annotated[int, "images of a small FID"] = 1000
