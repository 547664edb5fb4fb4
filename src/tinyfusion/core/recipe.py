"""Every knob of every verb, on one page: frozen dataclasses, no imports but the standard library and errors.

A recipe is values, never objects: names are strings, files are paths. Each field is documented once, in its `Annotated`
text, which `tinyfusion recipes --list-fields` prints. Published defaults (arXiv 2412.01199 and its code) are the defaults here; recipes
for small models override them in TOML.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tinyfusion.core.errors import UserError
from tinyfusion.core.process_sections import FlowSampleSection, FlowSection, MaskedSampleSection, MaskedSection

Dtype = Literal["float32", "bfloat16", "float16"]
Criterion = Literal[
    "learned", "bi", "flux-lite", "sensitivity", "bk-sdm", "first", "last", "uniform", "random",
    "min-loss", "median-loss", "max-loss", "indices", "width",
]  # fmt: skip
Sampler = Literal["ddpm", "ddim", "dpm-solver++", "unipc", "ode", "sde", "masked"]
Recovery = Literal["finetune", "logits-kd", "rep-kd", "masked-kd"]


@dataclass(frozen=True)
class ModelSection:
    """A model to train from nothing."""

    family: Annotated[str, "model family"] = "dit"
    input_size: Annotated[int, "side of the square input in the model's own space, pixels or latent cells"] = 8
    patch_size: Annotated[int, "side of a patch"] = 2
    in_channels: Annotated[int, "channels of the input"] = 1
    hidden_size: Annotated[int, "width of the residual stream"] = 64
    depth: Annotated[int, "number of blocks"] = 12
    num_heads: Annotated[int, "attention heads"] = 4
    num_classes: Annotated[int, "classes, without the null class"] = 10
    buffer_size: Annotated[int | None, "mar: tokens that carry the class; None is the published 64"] = None
    head_depth: Annotated[int | None, "mar: residual layers of the diffusion head; None is 3"] = None
    head_width: Annotated[int | None, "mar: width of the diffusion head; None is 1024"] = None


@dataclass(frozen=True)
class DataSection:
    """Where batches come from."""

    name: Annotated[
        str,
        "data set: digits (training part), digits:heldout, parquet:PATH (a file or folder; columns img or image, label), "
        "hub:ORG/NAME[@REVISION][:CONFIG][:SPLIT] (a data set of the hub, fetched once), parquet-stream:PATH and hub-stream:ID "
        "(the same, read in parts: for sets larger than memory), latents:PATH (what `encode` made), "
        "or an npz with arr_0 (N, H, W, C), uint8 pixels or floats as they are, and arr_1 labels",
    ] = "digits"
    size: Annotated[
        int | None, "side to which images of parquet files and of the hub are reduced by a box filter; None keeps theirs"
    ] = None
    window_images: Annotated[
        int,
        "streams: images among which order is mixed, those of row groups drawn at random; two windows are held",
    ] = 16_384
    flip: Annotated[float, "probability that an image is mirrored left to right"] = 0.0
    augment: Annotated[float, "share of images that are slightly turned, scaled and sheared, 0 to 1"] = 0.0


@dataclass(frozen=True)
class EncodeSection:
    """Pictures to latents on disk."""

    vae: Annotated[str, "autoencoder: any AutoencoderKL of diffusers, a folder or hub id, alone or in a pipeline"] = (
        "stabilityai/sd-vae-ft-ema"
    )
    size: Annotated[int, "side of the centre crop in pixels"] = 256
    posterior: Annotated[
        Literal["moments", "samples"],
        "what is stored: mean and log-variance, sampled anew at every read, or one sample (published)",
    ] = "moments"
    mirror: Annotated[bool, "also store the latents of the mirrored picture"] = True
    dtype: Annotated[Literal["float32", "bfloat16"], "type of what is stored; the autoencoder computes in float32"] = (
        "float32"
    )
    batch_size: Annotated[int, "pictures at a time, mirrored ones beside them; rounding depends on it"] = 32
    shard_images: Annotated[int, "images of a file; a process makes whole files"] = 1024


@dataclass(frozen=True, kw_only=True)
class TrainingSection:
    """One call of the training loop."""

    steps: Annotated[int, "optimiser steps that schedules are laid out for"] = 100_000
    stop_after: Annotated[
        int | None, "steps after which training ends early, schedules unchanged; None makes them all"
    ] = None
    batch_size: Annotated[int, "images per step"] = 256
    learning_rate: Annotated[float, "peak learning rate of AdamW"] = 2e-4
    learning_rate_end: Annotated[float | None, "learning rate at the last step, by cosine; None keeps it constant"] = (
        1e-4
    )
    warmup_steps: Annotated[int, "steps over which the learning rate rises linearly"] = 0
    betas: Annotated[tuple[float, float], "AdamW's decay rates"] = (0.9, 0.999)
    eps: Annotated[float, "AdamW's denominator offset"] = 1e-8
    weight_decay: Annotated[float, "AdamW's decoupled weight decay"] = 0.0
    optimizer: Annotated[
        Literal["adamw", "adamw-8bit"], "AdamW, or AdamW with moments in 8 bits (extra 8bit: bitsandbytes)"
    ] = "adamw"
    clip_norm: Annotated[float | None, "largest gradient norm; None does not clip"] = 1.0
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

    def __post_init__(self) -> None:
        end = self.learning_rate_end
        if end is not None and end > self.learning_rate:
            raise UserError(
                f"learning_rate_end {end:g} is above learning_rate {self.learning_rate:g}, so the rate would rise: "
                "set both, or learning_rate_end to none for a constant rate"
            )

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


@dataclass(frozen=True)
class PruneSection:
    """Which blocks go."""

    criterion: Annotated[Criterion, "how blocks are chosen"] = "learned"
    scheme: Annotated[str, "N:M keeps N of every M consecutive blocks; 2:4x3+3:4x4 is explicit"] = "1:2"
    distribution: Annotated[
        Literal["categorical", "subset"],
        "learned: one logit per candidate of a group, enumerated, or one per block, over subsets of exact size",
    ] = "categorical"
    keep: Annotated[tuple[int, ...], "blocks to keep, for criterion indices"] = ()
    num_keep: Annotated[
        int | None, "blocks that stay in each list, for criteria without groups; None is half, rounded up"
    ] = None
    protect: Annotated[tuple[int, ...], "blocks that stay whatever the criterion says"] = ()
    update: Annotated[Literal["lora", "full", "frozen"], "what is trained beside the gates"] = "lora"
    keep_deltas: Annotated[
        bool,
        "learned: the student starts from what was trained beside the gates, instead of throwing it away (published)",
    ] = False
    lora_rank: Annotated[int, "rank of the low-rank weight deltas"] = 8
    lora_alpha: Annotated[float | None, "scale numerator of the deltas; None is twice the rank"] = None
    gate_learning_rate: Annotated[float, "learning rate of the gate logits"] = 1e-3
    logit_init: Annotated[float, "initial value of every gate logit"] = 0.02
    temperature: Annotated[tuple[float, float], "Gumbel-softmax temperature at the first and last step"] = (4.0, 0.1)
    scaling: Annotated[tuple[float, float], "scale of the logits at the first and last step"] = (100.0, 100.0)
    subset_estimator: Annotated[
        Literal["marginals", "gumbel-top-k", "score"],
        "gradient of a subset: through the exact marginals, through relaxed Gumbel top-K, or unbiased, from pairs of masks",
    ] = "marginals"
    dropped: Annotated[
        Literal["skip", "dense"],
        "blocks that an image drops: run without a graph, or (published) with one; the gradients are the same",
    ] = "skip"
    calibration_images: Annotated[int, "images on which scores are taken"] = 1024
    calibration_batch_size: Annotated[int, "calibration images at a time"] = 64
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
        int, "masks tried by min-loss, median-loss and max-loss; all of them where there are fewer"
    ] = 100_000
    width_share: Annotated[float, "width: share of the teacher's parameters that stays"] = 0.5
    width_threshold: Annotated[
        float, "width: gradients are summed over timesteps until the loss falls below this share of the largest"
    ] = 0.05
    training: TrainingSection = field(
        default_factory=lambda: TrainingSection(
            steps=10_009,
            batch_size=128,
            learning_rate=1e-4,
            learning_rate_end=None,
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
    alpha_kd: Annotated[float, "weight of the output distillation; the data loss has 1 - alpha_kd"] = 0.9
    beta: Annotated[tuple[float, float], "weight of the feature distillation at the first and last step"] = (1e-2, 0.0)
    mask: Annotated[
        Literal["own", "joint"],
        "own: each side drops its massive activations (released code); joint: both drop the union (paper)",
    ] = "own"
    mask_sigmas: Annotated[
        float | None, "activations further than this many standard deviations are masked; None masks none"
    ] = 2.0
    training: TrainingSection = field(default_factory=TrainingSection)

    @property
    def compares_features(self) -> bool:
        """Whether block outputs are distilled."""
        return self.method in ("rep-kd", "masked-kd")


@dataclass(frozen=True)
class SampleSection:
    """Seeds to images."""

    num_images: Annotated[int, "images to draw"] = 50_000
    batch_size: Annotated[int, "images at a time; the images do not depend on it"] = 32
    sampler: Annotated[
        Sampler | None,
        "Gaussian: ancestral, DDIM, or the solvers DPM-Solver++ (2M) and UniPC; flows: ode or sde; masked tokens: masked; "
        "None is the published one of the model's process",
    ] = None
    num_steps: Annotated[int | None, "denoising steps; None is the published number"] = None
    eta: Annotated[float, "DDIM's share of fresh noise, 0 to 1"] = 0.0
    guidance: Annotated[float, "classifier-free guidance scale; 1 runs the conditional model alone"] = 1.5
    guidance_channels: Annotated[
        Literal["published", "all"], "channels that are guided: the family's published ones or all noise channels"
    ] = "published"
    guidance_interval: Annotated[
        tuple[float, float], "shares of the timesteps, 0 to 1, between which there is guidance; 0 is the clean end"
    ] = (0.0, 1.0)
    clip: Annotated[bool, "ddpm, ddim: clamp the predicted clean image to [-1, 1] at every step"] = False
    dtype: Annotated[Dtype, "type of weights and activations; noise and the sampler's arithmetic stay float32"] = (
        "float32"
    )
    compile: Annotated[bool, "compile the blocks"] = False
    decode: Annotated[bool, "models of latents: decode to pixels; else the npz holds latents, float32"] = True
    vae: Annotated[
        str | None, "models of latents: folder or hub id of an AutoencoderKL of diffusers; None is the model's own"
    ] = None
    decode_batch_size: Annotated[int, "images decoded at a time; the images do not depend on it"] = 8
    labels: Annotated[tuple[int, ...], "classes to draw, repeated in turn; empty draws them by label_rule"] = ()
    label_rule: Annotated[
        Literal["uniform", "balanced"], "labels drawn uniformly at random, or 0, 1, 2, ... in turn"
    ] = "uniform"
    weights: Annotated[Literal["ema", "raw"], "which weights, where both exist"] = "ema"
    flow: FlowSampleSection = field(default_factory=FlowSampleSection)
    masked: MaskedSampleSection = field(default_factory=MaskedSampleSection)


@dataclass(frozen=True)
class EvaluateSection:
    """Images to numbers."""

    references: Annotated[
        tuple[str, ...], "sets to compare with: digits, digits:heldout, parquet:PATH, hub:ORG/NAME, or a folder or npz of images"
    ] = (
        "digits",
        "digits:heldout",
    )
    features: Annotated[
        str,
        "feature extractor: digits-classifier, inception (weights fetched once), a file of its weights, dinov2:FOLDER, "
        "or a folder with classifier.json",
    ] = "digits-classifier"
    neighbours: Annotated[int, "k of precision and recall"] = 3
    is_splits_size: Annotated[int, "images per split of the Inception Score"] = 5000
    checkpoints: Annotated[
        int, "points of the curve of FID over the recovery: so many checkpoints, evenly spread, are drawn and scored"
    ] = 0


@dataclass(frozen=True)
class SpeedSection:
    """Measured sampling speed."""

    batch_size: Annotated[int, "images per guided denoising step"] = 256
    repeats: Annotated[int, "interleaved measurements of each model"] = 9
    steps_per_repeat: Annotated[int, "denoising steps in one measurement"] = 3
    depths: Annotated[
        int, "depths at which the cut teacher is timed for the curve of speed over depth, at most; 0 times none"
    ] = 14


@dataclass(frozen=True)
class BenchSection:
    """Measured denoising steps of one model, or of two in turns."""

    batch_size: Annotated[int, "images per denoising step; a guided step runs twice as many rows"] = 8
    repeats: Annotated[int, "measurements of each side, in turns"] = 9
    dtype: Annotated[Dtype, "type of weights and activations, and of the matrix product beside"] = "float32"
    compile: Annotated[bool, "compile the blocks"] = False
    product_size: Annotated[int | None, "rows and columns of the matrix product; None: 2048 on a CPU, else 8192"] = None


@dataclass(frozen=True)
class Expectation:
    """What the recipe is expected to give, for the report to check."""

    metric: str
    value: float
    tolerance: float
    note: str = ""


@dataclass(frozen=True)
class Recipe:
    """A whole job. Verbs read the sections they need."""

    name: Annotated[str, "name of the recipe"] = "custom"
    description: Annotated[str, "one sentence"] = ""
    minutes: Annotated[float | None, "expected minutes on the stated machine"] = None
    machine: Annotated[str, "machine of the expected minutes"] = ""
    teacher: Annotated[str, "model to make shallow"] = "digits"
    seed: Annotated[int, "seed of every draw"] = 0
    device: Annotated[str, "auto, cpu, cuda or mps"] = "auto"
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    encode: EncodeSection = field(default_factory=EncodeSection)
    compute: ComputeSection = field(default_factory=ComputeSection)
    watch: WatchSection = field(default_factory=WatchSection)
    flow: FlowSection = field(default_factory=FlowSection)
    masked: MaskedSection = field(default_factory=MaskedSection)
    train: TrainingSection = field(default_factory=TrainingSection)
    prune: PruneSection = field(default_factory=PruneSection)
    recover: RecoverSection = field(default_factory=RecoverSection)
    sample: SampleSection = field(default_factory=SampleSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    speed: SpeedSection = field(default_factory=SpeedSection)
    bench: BenchSection = field(default_factory=BenchSection)
    expected: tuple[Expectation, ...] = ()
