"""Every knob of every verb, on one page: frozen dataclasses, no imports but the standard library and errors.

A recipe is values, never objects: names are strings, files are paths. Each field is documented once, in its `Annotated`
text, which `tinyfusion recipes --list-fields` prints. Published defaults (arXiv 2412.01199 and its code) are the defaults here; recipes
for small models override them in TOML.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tinyfusion.config.process_sections import FlowSampleSection, FlowSection, MaskedSampleSection, MaskedSection
from tinyfusion.config.training_sections import ComputeSection, Dtype, TrainingSection, WatchSection

__all__ = [
    "BenchSection", "ComputeSection", "Criterion", "DataSection", "Dtype", "DynamicSection", "EncodeSection", "EvaluateSection",
    "Expectation", "FlowSampleSection", "FlowSection", "MaskedSampleSection", "MaskedSection", "ModelSection",
    "PruneSection", "Recipe", "RecoverSection", "Recovery", "SampleSection", "Sampler", "SpeedSection",
    "TrainingSection", "WatchSection",
]  # fmt: skip

Criterion = Literal[
    "learned", "bi", "flux-lite", "sensitivity", "bk-sdm", "first", "last", "uniform", "random",
    "min-loss", "median-loss", "max-loss", "indices", "width",
]  # fmt: skip
Sampler = Literal["ddpm", "ddim", "dpm-solver++", "unipc", "ode", "sde", "masked"]
Orientation = Literal["follow", "ignore"]
Recovery = Literal["finetune", "logits-kd", "rep-kd", "masked-kd"]


@dataclass(frozen=True)
class ModelSection:
    """A model to train from nothing."""

    family: Annotated[str | None, "model family: a registered name; a new model needs one"] = None
    input_size: Annotated[
        int | None,
        "side of the square input in the model's own space, pixels or latent cells; None is that of the data",
    ] = None
    patch_size: Annotated[int, "side of a patch"] = 2
    in_channels: Annotated[int | None, "channels of the input; None is those of the data"] = None
    hidden_size: Annotated[int, "width of the residual stream"] = 64
    depth: Annotated[int, "number of blocks"] = 12
    num_heads: Annotated[int, "attention heads"] = 4
    num_classes: Annotated[int | None, "classes, without the null class; None is those of the data"] = None
    sizes: Annotated[
        dict[str, Any] | None, "sizes that only this family has, by their names; None: its own defaults"
    ] = None


@dataclass(frozen=True)
class DataSection:
    """Where batches come from."""

    name: Annotated[
        str,
        "data set: digits (training part), digits:heldout, parquet:PATH (a file or folder; columns img or image, label), "
        "hub:ORG/NAME[@REVISION][:CONFIG][:SPLIT] (a data set of the hub, fetched once), parquet-stream:PATH and hub-stream:ID "
        "(the same, read in parts: for sets larger than memory), latents:PATH (what `encode` made), "
        "a folder of pictures or with a folder of them per class, or an npz with arr_0 (N, H, W, C), uint8 pixels or floats as they are, "
        "and arr_1 labels; empty: that of the run that made the model, or digits where the model takes such images",
    ] = ""
    size: Annotated[
        int | None,
        "side of the centre crop of pictures, as in encode.size; None keeps theirs, which must be one size; not for an npz",
    ] = None
    orientation: Annotated[Orientation, "orientation tags (EXIF) of pictures: turn them as they say, or leave them"] = (
        "follow"
    )
    window_images: Annotated[
        int,
        "streams: images among which order is mixed, those of row groups drawn at random; two windows are held",
    ] = 16_384
    flip: Annotated[float, "probability that an image is mirrored left to right"] = 0.0
    augment: Annotated[float, "share of images that are slightly turned, scaled and sheared, 0 to 1"] = 0.0


@dataclass(frozen=True)
class EncodeSection:
    """Pictures to latents on disk."""

    vae: Annotated[
        str | None,
        "autoencoder: any AutoencoderKL of diffusers, a folder or hub id, alone or in a pipeline; None is "
        "stabilityai/sd-vae-ft-ema, and of features:PATH the published scale",
    ] = None
    size: Annotated[int, "side of the centre crop in pixels"] = 256
    orientation: Annotated[
        Orientation, "orientation tags (EXIF) of pictures: turn them as they say, or leave them (published)"
    ] = "follow"
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
    budgets: Annotated[
        tuple[str, ...],
        "transformers of diffusers: blocks that stay per list, LIST=N; all=N over the lists of the trunk",
    ] = ()
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
    calibration_images: Annotated[
        int,
        "images on which scores are taken",
    ] = 1024
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
class DynamicSection:
    """Which parts of a model run at which timestep, and for which token; published values of DyDiT."""

    target: Annotated[
        float, "multiply-accumulates of the blocks that stay, as a share of all, mean over a sampling"
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
    temperature: Annotated[float, "of the surrogate gradient of a decision"] = 5.0
    width_bias: Annotated[float, "initial logit of heads and groups: they start on"] = 15.0
    token_bias: Annotated[float, "initial logit of tokens"] = 35.0
    block_bias: Annotated[float, "initial logit of blocks"] = 15.0
    budget_weight: Annotated[float, "weight of (ratio - budget) squared"] = 2.0
    ramp_steps: Annotated[
        int | None, "steps over which the budget falls from 1 to the target, after 100 at 1; None lets it jump"
    ] = 1000
    beside: Annotated[
        Literal["complete", "teacher", "none"],
        "what runs beside: the complete model on the data (published), the teacher to learn from, or nothing",
    ] = "complete"
    beside_steps: Annotated[int, "steps for which it does"] = 30_000
    beside_weight: Annotated[float, "weight of its loss"] = 1.0
    strata: Annotated[int, "parts of the range of timesteps that every batch is spread over; 1 draws them freely"] = 4
    finish_steps: Annotated[int, "last steps, in which decisions have no noise, as at inference"] = 2_000
    in_run: Annotated[bool, "`run` makes the recovered student dynamic too, with the teacher of the recipe"] = False
    calibration_images: Annotated[
        int,
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
    num_steps: Annotated[
        int | None,
        "Gaussian: denoising steps; ode and sde: points in time, both ends among them, so one step fewer (methods that choose "
        "their steps take none); masked: rounds; None is the published number",
    ] = None
    eta: Annotated[float, "DDIM's share of fresh noise, 0 to 1"] = 0.0
    guidance: Annotated[float, "classifier-free guidance scale; 1 runs the conditional model alone"] = 1.5
    guidance_channels: Annotated[
        Literal["published", "all"], "channels that are guided: the family's published ones or all noise channels"
    ] = "published"
    guidance_interval: Annotated[
        tuple[float, float], "shares of the timesteps, 0 to 1, between which there is guidance; 0 is the clean end"
    ] = (0.0, 1.0)
    clip: Annotated[bool, "ddpm, ddim, masked: clamp the predicted clean image to [-1, 1] at every step"] = False
    dtype: Annotated[Dtype, "type of weights and activations; noise and the sampler's arithmetic stay float32"] = (
        "float32"
    )
    compile: Annotated[bool, "compile the blocks"] = False
    decode: Annotated[bool, "models of latents: decode to pixels; else the npz holds latents, float32"] = True
    vae: Annotated[
        str | None, "models of latents: folder or hub id of an AutoencoderKL of diffusers; None is the model's own"
    ] = None
    latent_scale: Annotated[
        float | None,
        "models of latents whose file does not give it: they see (z - shift) x scale of a latent z of the autoencoder",
    ] = None
    latent_shift: Annotated[float | None, "models of latents whose file does not give it: as in latent_scale"] = None
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
        tuple[str, ...],
        "sets to compare with: digits, digits:heldout, parquet:PATH, hub:ORG/NAME, or a folder or npz of images (pictures are "
        "cropped as data.size says); none: of `run` the training data, of images in the form of the digits those",
    ] = ()
    features: Annotated[
        str,
        "feature extractor: digits-classifier, inception (weights fetched once), a file of its weights, dinov2:FOLDER, "
        "or a folder with classifier.json; empty: digits-classifier for images in the form of the digits",
    ] = ""
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
    teacher: Annotated[
        str,
        "model to make shallow: a path, the name of a shipped model or of known weights, or a hub id; empty: of `recover` that "
        "of the run that made the student",
    ] = ""
    teacher_family: Annotated[
        str | None, "family of the teacher, where its file fits several and --family does not say; None takes the first"
    ] = None
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
    dynamic: DynamicSection = field(default_factory=DynamicSection)
    sample: SampleSection = field(default_factory=SampleSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    speed: SpeedSection = field(default_factory=SpeedSection)
    bench: BenchSection = field(default_factory=BenchSection)
    expected: tuple[Expectation, ...] = ()
