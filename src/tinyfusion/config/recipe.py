"""The recipe: settings of every verb, as frozen dataclasses of plain values.

The `Annotated` text of a field is its help (`tinyfusion recipes --list-fields`, options). Defaults are the published values
(arXiv 2412.01199 and its code); recipes for small models override them in TOML.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tinyfusion.config.constraints import (
    BatchSize,
    Count,
    Ge,
    Index,
    Le,
    Location,
    NonNegative,
    Offset,
    Positive,
    Seed,
    Share,
    Side,
    SmallCount,
)
from tinyfusion.config.pipeline_section import PipelineSection
from tinyfusion.config.process_sections import FlowSampleSection, FlowSection, MaskedSampleSection, MaskedSection
from tinyfusion.config.training_sections import (
    ComputeSection,
    Criterion,
    DistillStepsSection,
    Dtype,
    DynamicSection,
    PruneSection,
    RecoverSection,
    Recovery,
    StepDistillation,
    TrainingSection,
    WatchSection,
)

__all__ = [
    "BenchSection", "ComputeSection", "Criterion", "DataSection", "DistillStepsSection", "Dtype", "DynamicSection",
    "EncodeSection", "EvaluateSection", "Expectation", "ExplainSection", "FlowSampleSection", "FlowSection",
    "MaskedSampleSection", "MaskedSection", "ModelSection",
    "PipelineSection", "PruneSection", "Recipe", "RecoverSection", "Recovery", "SampleSection", "Sampler", "SpeedSection",
    "StepDistillation", "TrainingSection", "WatchSection",
]  # fmt: skip

Sampler = Literal["ddpm", "ddim", "dpm-solver++", "unipc", "ode", "sde", "masked"]
ModelSide = Annotated[int, Ge(1), Le(2**14)]  # of inputs, patches, sequences
Width = Annotated[int, Ge(1), Le(2**20)]
Depth = Annotated[int, Ge(1), Le(2**12)]
Destination = Literal["diffusers", "official"]
Classes = Annotated[int, Ge(1), Le(2**24)]
Orientation = Literal["follow", "ignore"]


@dataclass(frozen=True)
class ModelSection:
    """A new model to train."""

    family: Annotated[str | None, "model family: a registered name; a new model needs one"] = None
    input_size: Annotated[ModelSide | None, "side of the input in pixels or latent cells; None: that of the data"] = (
        None
    )
    patch_size: Annotated[ModelSide, "side of a patch"] = 2
    in_channels: Annotated[Width | None, "channels of the input; None: those of the data"] = None
    hidden_size: Annotated[Width, "width of the residual stream"] = 64
    depth: Annotated[Depth, "number of blocks"] = 12
    num_heads: Annotated[ModelSide, "attention heads"] = 4
    num_classes: Annotated[Classes | None, "classes, without the null class; None: those of the data"] = None
    sizes: Annotated[dict[str, Any] | None, "sizes specific to the family, by name; None: its defaults"] = None


@dataclass(frozen=True)
class DataSection:
    """Source of batches."""

    name: Annotated[
        str,
        Location(("parquet", "parquet-stream", "latents")),
        "data set: digits (training split), digits:heldout, parquet:PATH (a file or folder; columns img or image, label), "
        "hub:ORG/NAME[@REVISION][:CONFIG][:SPLIT] (downloaded once), parquet-stream:PATH and hub-stream:ID (the same, streamed, "
        "for sets larger than memory), latents:PATH (output of `encode`), a folder of pictures or of class folders, or an npz with "
        "arr_0 (N, H, W, C), uint8 pixels or floats, and arr_1 labels; empty: that of the run that made the model, or digits "
        "where the model takes such images",
    ] = ""
    size: Annotated[
        Side | None, "side of the centre crop of pictures, as in encode.size; None: no crop; not for an npz"
    ] = None
    orientation: Annotated[Orientation, "orientation tags (EXIF) of pictures: follow or ignore"] = "follow"
    window_images: Annotated[Count, "streams: images per shuffling window of random row groups; memory has two"] = (
        16_384
    )
    prompts: Annotated[
        str,
        "text models: safetensors file of encoded prompts, which labels count, the null prompt last; empty: prompts.safetensors "
        "in the folder of latents:PATH, else those of the model",
    ] = ""
    flip: Annotated[Share, "probability that an image is mirrored left to right"] = 0.0
    augment: Annotated[Share, "share of images that are slightly turned, scaled and sheared"] = 0.0


@dataclass(frozen=True)
class EncodeSection:
    """Encoding of pictures to latents on disk."""

    vae: Annotated[
        str | None,
        Location(),
        "autoencoder: AutoencoderKL of diffusers, a folder or hub id, alone or in a pipeline; None: stabilityai/sd-vae-ft-ema, "
        "and of features:PATH the published scale",
    ] = None
    pipeline: Annotated[
        str | None,
        Location(),
        "pictures with captions: pipeline of diffusers, a folder or hub id, whose autoencoder and text encoders encode them",
    ] = None
    caption_column: Annotated[
        str | None, "pipeline: column of captions in parquet files and JSON; None: text, caption or prompt"
    ] = None
    size: Annotated[
        Side | None, "side of the centre crop in pixels; None: 256, and with a pipeline one must be given"
    ] = None
    sizes: Annotated[
        tuple[str, ...] | None,
        "pipeline: sizes of buckets in place of encode.size, such as 1024x1024,832x1216 (height x width); a picture is cropped to "
        "that of the nearest aspect ratio",
    ] = None
    frames: Annotated[
        SmallCount | None, "pipeline of videos: frames of every clip, from its beginning; None: 1, of pictures"
    ] = None
    max_tokens: Annotated[SmallCount | None, "pipeline: longest prompt in tokens; None: that of a drawing"] = None
    orientation: Annotated[Orientation, "orientation tags (EXIF) of pictures: follow, or ignore (published)"] = "follow"
    posterior: Annotated[
        Literal["moments", "samples", "mode"],
        "stored values: mean and log-variance, sampled at every read; one sample (published); or the mean",
    ] = "moments"
    mirror: Annotated[
        bool | None, "also store the latents of the mirrored picture; None: yes, and with a pipeline no"
    ] = None
    dtype: Annotated[Literal["float32", "bfloat16"], "type of stored values; the autoencoder runs in float32"] = (
        "float32"
    )
    batch_size: Annotated[
        BatchSize,
        "pictures at a time, without mirrored copies; with a pipeline of 256 x 256, fewer of larger ones; rounding depends on it",
    ] = 32
    shard_images: Annotated[Count, "images per file; a process writes whole files"] = 1024


@dataclass(frozen=True)
class SampleSection:
    """Sampling of images from seeds."""

    num_images: Annotated[Count, "images to draw"] = 50_000
    batch_size: Annotated[BatchSize, "images at a time; the images do not depend on it"] = 32
    sampler: Annotated[
        Sampler | None,
        "Gaussian: ancestral, DDIM, or the solvers DPM-Solver++ (2M) and UniPC; flows: ode or sde; masked tokens: masked; "
        "None: the published one of the process",
    ] = None
    num_steps: Annotated[
        SmallCount | None,
        "Gaussian: denoising steps; ode and sde: points in time, both ends included (not for adaptive methods); masked: rounds; "
        "None: the published number",
    ] = None
    eta: Annotated[Share, "DDIM's share of fresh noise"] = 0.0
    guidance: Annotated[float, Ge(1), Le(10**6), "classifier-free guidance scale; 1: conditional model only"] = 1.5
    guidance_channels: Annotated[
        Literal["published", "all"], "channels that are guided: the family's published ones or all noise channels"
    ] = "published"
    guidance_interval: Annotated[
        tuple[Share, Share], "shares of the timesteps between which guidance is used; 0 is the clean end"
    ] = (0.0, 1.0)  # fmt: skip
    clip: Annotated[bool, "ddpm, ddim, masked: clamp the predicted clean image to [-1, 1] at every step"] = False
    dtype: Annotated[Dtype, "type of weights and activations; noise and the sampler's arithmetic stay float32"] = (
        "float32"
    )
    compile: Annotated[bool, "compile the blocks"] = False
    quantize: Annotated[
        Literal["int8"] | None,
        "products of the blocks as whole numbers of 8 bits, on a CPU in float32; None: as dtype says",
    ] = None
    decode: Annotated[bool, "latent models: decode to pixels; else the npz has latents, float32"] = True
    vae: Annotated[
        str | None,
        Location(),
        "latent models: folder or hub id of an AutoencoderKL of diffusers; None: the model's own",
    ] = None
    latent_scale: Annotated[
        Positive | None,
        "latent models whose file lacks it: they see (z - shift) x scale of a latent z of the autoencoder",
    ] = None
    latent_shift: Annotated[Offset | None, "latent models whose file lacks it: as in latent_scale"] = None
    decode_batch_size: Annotated[BatchSize, "images decoded at a time; the images do not depend on it"] = 8
    labels: Annotated[tuple[Index, ...], "classes to draw in turn, such as 3,7; empty: by label_rule"] = ()
    label_rule: Annotated[
        Literal["uniform", "balanced"], "labels drawn uniformly at random, or 0, 1, 2, ... in turn"
    ] = "uniform"  # fmt: skip
    weights: Annotated[Literal["ema", "raw"], "averaged or raw weights, where both exist"] = "ema"
    flow: FlowSampleSection = field(default_factory=FlowSampleSection)
    masked: MaskedSampleSection = field(default_factory=MaskedSampleSection)


@dataclass(frozen=True)
class EvaluateSection:
    """Metrics of images."""

    references: Annotated[
        tuple[str, ...],
        Location(("parquet",)),
        "reference sets: digits, digits:heldout, parquet:PATH, hub:ORG/NAME, or a folder or npz of images (pictures are cropped "
        "to data.size); none: of `run` the training data, of images like the digits those",
    ] = ()
    features: Annotated[
        str,
        Location(("dinov2",)),
        "feature extractor: digits-classifier, inception (weights downloaded once), a file of its weights, "
        "dinov2:FOLDER or dinov2:ID of the hub, or a folder with classifier.json; empty: digits-classifier for images like the digits",
    ] = ""
    clip: Annotated[
        str | None, Location(), "CLIP model saved by transformers, a folder or hub id, for the CLIP score of images and prompts"
    ] = None  # fmt: skip
    neighbours: Annotated[SmallCount, "k of precision and recall"] = 3
    is_splits_size: Annotated[Count, "images per split of the Inception Score"] = 5000
    checkpoints: Annotated[int, Ge(0), Le(10**6), "checkpoints of the recovery that are sampled for a curve of FID"] = 0


@dataclass(frozen=True)
class SpeedSection:
    """Measured sampling speed."""

    batch_size: Annotated[BatchSize, "images per guided denoising step"] = 256
    repeats: Annotated[SmallCount, "interleaved measurements of each model"] = 9
    steps_per_repeat: Annotated[SmallCount, "denoising steps per measurement"] = 3
    depths: Annotated[int, Ge(0), Le(10**6), "most depths of the pruned teacher that are timed; 0: none"] = 14


@dataclass(frozen=True)
class BenchSection:
    """Measured denoising steps of one model, or of two in turns."""

    batch_size: Annotated[BatchSize, "images per denoising step; a guided step has twice as many rows"] = 8
    repeats: Annotated[SmallCount, "measurements of each model"] = 9
    dtype: Annotated[Dtype, "type of weights, activations and of the measured matrix product"] = "float32"
    compile: Annotated[bool, "compile the blocks"] = False
    quantize: Annotated[Literal["int8"] | None, "as sample.quantize"] = None
    product_size: Annotated[
        Annotated[int, Ge(64), Le(2**17)] | None,
        "rows and columns of the matrix product; None: 2048 on a CPU, else 8192",
    ] = None


@dataclass(frozen=True)
class ExplainSection:
    """Measurements of what every block of a model does."""

    images: Annotated[
        Count, "images whose loss is measured with and without each block; fewer if the data set has fewer"
    ] = 360
    passes: Annotated[SmallCount, "noised copies of every image, at different noise levels"] = 16
    bins: Annotated[int, Ge(1), Le(100), "intervals of the timesteps in the maps"] = 10
    batch_size: Annotated[BatchSize, "noised images at a time; results do not depend on it, except for rounding"] = 128
    drawn: Annotated[int, Ge(0), Le(64), "images drawn by the whole model and without each block; 0: none"] = 10
    most_steps: Annotated[SmallCount, "denoising steps of these images at most, as of previews"] = 50


@dataclass(frozen=True)
class Expectation:
    """What the recipe is expected to give, for the report to check."""

    metric: str
    value: Annotated[float, Ge(-1e18), Le(1e18)]
    tolerance: NonNegative
    note: str = ""


@dataclass(frozen=True)
class Recipe:
    """A whole job. Verbs read the sections they need."""

    name: Annotated[str, "name of the recipe"] = "custom"
    description: Annotated[str, "one sentence"] = ""
    minutes: Annotated[NonNegative | None, "expected minutes on the stated machine"] = None
    machine: Annotated[str, "machine of the expected minutes"] = ""
    teacher: Annotated[
        str,
        Location(),
        "model to prune or learn from: a path, a shipped model, known weights, or a hub id; empty: of `recover` that of the "
        "student's run",
    ] = ""
    teacher_family: Annotated[
        str | None,
        "family of the teacher, or its class of diffusers, where several fit; None: --family, else the first",
    ] = None
    seed: Annotated[Seed, "seed of every draw"] = 0
    device: Annotated[str, "auto, cpu, cuda or mps"] = "auto"
    destination: Annotated[
        Destination | None,
        "export format of `prune` or `train`: the model computes as readers of that format do, so that its export is exact; "
        "None: as the teacher, or as published",
    ] = None
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
    distill_steps: DistillStepsSection = field(default_factory=DistillStepsSection)
    sample: SampleSection = field(default_factory=SampleSection)
    pipeline: PipelineSection = field(default_factory=PipelineSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    speed: SpeedSection = field(default_factory=SpeedSection)
    bench: BenchSection = field(default_factory=BenchSection)
    explain: ExplainSection = field(default_factory=ExplainSection)
    expected: tuple[Expectation, ...] = ()
    assigned: Annotated[
        frozenset[str], "fields that a file, an option or --set named; never compared or recorded"
    ] = field(default=frozenset(), compare=False, repr=False)  # fmt: skip
    typed: Annotated[
        Mapping[str, tuple[str, ...]], "options and --set fields of the command, with the fields that each sets; never compared or recorded"
    ] = field(default_factory=dict, compare=False, repr=False)  # fmt: skip
