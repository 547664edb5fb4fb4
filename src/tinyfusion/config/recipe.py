"""Every knob of every verb, on one page: frozen dataclasses, no imports but the standard library and errors.

A recipe is values, never objects: names are strings, files are paths. Each field is documented once, in its `Annotated`
text, which `tinyfusion recipes --list-fields` prints. Published defaults (arXiv 2412.01199 and its code) are the defaults here; recipes
for small models override them in TOML.
"""

from __future__ import annotations

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
from tinyfusion.config.process_sections import FlowSampleSection, FlowSection, MaskedSampleSection, MaskedSection
from tinyfusion.config.training_sections import (
    ComputeSection,
    Criterion,
    Dtype,
    DynamicSection,
    PruneSection,
    RecoverSection,
    Recovery,
    TrainingSection,
    WatchSection,
)

__all__ = [
    "BenchSection", "ComputeSection", "Criterion", "DataSection", "Dtype", "DynamicSection", "EncodeSection", "EvaluateSection",
    "Expectation", "FlowSampleSection", "FlowSection", "MaskedSampleSection", "MaskedSection", "ModelSection",
    "PruneSection", "Recipe", "RecoverSection", "Recovery", "SampleSection", "Sampler", "SpeedSection",
    "TrainingSection", "WatchSection",
]  # fmt: skip

Sampler = Literal["ddpm", "ddim", "dpm-solver++", "unipc", "ode", "sde", "masked"]
ModelSide = Annotated[int, Ge(1), Le(2**14)]  # of inputs, patches, sequences
Width = Annotated[int, Ge(1), Le(2**20)]
Depth = Annotated[int, Ge(1), Le(2**12)]
Orientation = Literal["follow", "ignore"]


@dataclass(frozen=True)
class ModelSection:
    """A model to train from nothing."""

    family: Annotated[str | None, "model family: a registered name; a new model needs one"] = None
    input_size: Annotated[
        ModelSide | None,
        "side of the square input in the model's own space, pixels or latent cells; None is that of the data",
    ] = None
    patch_size: Annotated[ModelSide, "side of a patch"] = 2
    in_channels: Annotated[Width | None, "channels of the input; None is those of the data"] = None
    hidden_size: Annotated[Width, "width of the residual stream"] = 64
    depth: Annotated[Depth, "number of blocks"] = 12
    num_heads: Annotated[ModelSide, "attention heads"] = 4
    num_classes: Annotated[
        Annotated[int, Ge(1), Le(2**24)] | None, "classes, without the null class; None is those of the data"
    ] = None
    sizes: Annotated[
        dict[str, Any] | None, "sizes that only this family has, by their names; None: its own defaults"
    ] = None


@dataclass(frozen=True)
class DataSection:
    """Where batches come from."""

    name: Annotated[
        str,
        Location(("parquet", "parquet-stream", "latents")),
        "data set: digits (training part), digits:heldout, parquet:PATH (a file or folder; columns img or image, label), "
        "hub:ORG/NAME[@REVISION][:CONFIG][:SPLIT] (a data set of the hub, fetched once), parquet-stream:PATH and hub-stream:ID "
        "(the same, read in parts: for sets larger than memory), latents:PATH (what `encode` made), "
        "a folder of pictures or with a folder of them per class, or an npz with arr_0 (N, H, W, C), uint8 pixels or floats as they are, "
        "and arr_1 labels; empty: that of the run that made the model, or digits where the model takes such images",
    ] = ""
    size: Annotated[
        Side | None,
        "side of the centre crop of pictures, as in encode.size; None keeps theirs, which must be one size; not for an npz",
    ] = None
    orientation: Annotated[Orientation, "orientation tags (EXIF) of pictures: turn them as they say, or leave them"] = (
        "follow"
    )
    window_images: Annotated[
        Count,
        "streams: images among which order is mixed, those of row groups drawn at random; two windows are held",
    ] = 16_384
    prompts: Annotated[
        str,
        "of models of texts: a safetensors file of encoded prompts that labels stand for, the null prompt last; empty: "
        "prompts.safetensors in the folder of latents:PATH, else those of the model",
    ] = ""
    flip: Annotated[Share, "probability that an image is mirrored left to right"] = 0.0
    augment: Annotated[Share, "share of images that are slightly turned, scaled and sheared, 0 to 1"] = 0.0


@dataclass(frozen=True)
class EncodeSection:
    """Pictures to latents on disk."""

    vae: Annotated[
        str | None,
        Location(),
        "autoencoder: any AutoencoderKL of diffusers, a folder or hub id, alone or in a pipeline; None is "
        "stabilityai/sd-vae-ft-ema, and of features:PATH the published scale",
    ] = None
    size: Annotated[Side, "side of the centre crop in pixels"] = 256
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
    batch_size: Annotated[BatchSize, "pictures at a time, mirrored ones beside them; rounding depends on it"] = 32
    shard_images: Annotated[Count, "images of a file; a process makes whole files"] = 1024


@dataclass(frozen=True)
class SampleSection:
    """Seeds to images."""

    num_images: Annotated[Count, "images to draw"] = 50_000
    batch_size: Annotated[BatchSize, "images at a time; the images do not depend on it"] = 32
    sampler: Annotated[
        Sampler | None,
        "Gaussian: ancestral, DDIM, or the solvers DPM-Solver++ (2M) and UniPC; flows: ode or sde; masked tokens: masked; "
        "None is the published one of the model's process",
    ] = None
    num_steps: Annotated[
        SmallCount | None,
        "Gaussian: denoising steps; ode and sde: points in time, both ends among them, so one step fewer (methods that choose "
        "their steps take none); masked: rounds; None is the published number",
    ] = None
    eta: Annotated[Share, "DDIM's share of fresh noise, 0 to 1"] = 0.0
    guidance: Annotated[
        float, Ge(1), Le(10**6), "classifier-free guidance scale; 1 runs the conditional model alone"
    ] = 1.5
    guidance_channels: Annotated[
        Literal["published", "all"], "channels that are guided: the family's published ones or all noise channels"
    ] = "published"
    guidance_interval: Annotated[
        tuple[Share, Share], "shares of the timesteps, 0 to 1, between which there is guidance; 0 is the clean end"
    ] = (0.0, 1.0)
    clip: Annotated[bool, "ddpm, ddim, masked: clamp the predicted clean image to [-1, 1] at every step"] = False
    dtype: Annotated[Dtype, "type of weights and activations; noise and the sampler's arithmetic stay float32"] = (
        "float32"
    )
    compile: Annotated[bool, "compile the blocks"] = False
    decode: Annotated[bool, "models of latents: decode to pixels; else the npz holds latents, float32"] = True
    vae: Annotated[
        str | None,
        Location(),
        "models of latents: folder or hub id of an AutoencoderKL of diffusers; None is the model's own",
    ] = None
    latent_scale: Annotated[
        Positive | None,
        "models of latents whose file does not give it: they see (z - shift) x scale of a latent z of the autoencoder",
    ] = None
    latent_shift: Annotated[Offset | None, "models of latents whose file does not give it: as in latent_scale"] = None
    decode_batch_size: Annotated[BatchSize, "images decoded at a time; the images do not depend on it"] = 8
    labels: Annotated[tuple[Index, ...], "classes to draw, repeated in turn; empty draws them by label_rule"] = ()
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
        Location(("parquet",)),
        "sets to compare with: digits, digits:heldout, parquet:PATH, hub:ORG/NAME, or a folder or npz of images (pictures are "
        "cropped as data.size says); none: of `run` the training data, of images in the form of the digits those",
    ] = ()
    features: Annotated[
        str,
        Location(("dinov2",)),
        "feature extractor: digits-classifier, inception (weights fetched once), a file of its weights, dinov2:FOLDER, "
        "or a folder with classifier.json; empty: digits-classifier for images in the form of the digits",
    ] = ""
    neighbours: Annotated[SmallCount, "k of precision and recall"] = 3
    is_splits_size: Annotated[Count, "images per split of the Inception Score"] = 5000
    checkpoints: Annotated[
        int,
        Ge(0),
        Le(10**6),
        "points of the curve of FID over the recovery: so many checkpoints, evenly spread, are drawn and scored",
    ] = 0


@dataclass(frozen=True)
class SpeedSection:
    """Measured sampling speed."""

    batch_size: Annotated[BatchSize, "images per guided denoising step"] = 256
    repeats: Annotated[SmallCount, "interleaved measurements of each model"] = 9
    steps_per_repeat: Annotated[SmallCount, "denoising steps in one measurement"] = 3
    depths: Annotated[
        int,
        Ge(0),
        Le(10**6),
        "depths at which the cut teacher is timed for the curve of speed over depth, at most; 0 times none",
    ] = 14


@dataclass(frozen=True)
class BenchSection:
    """Measured denoising steps of one model, or of two in turns."""

    batch_size: Annotated[BatchSize, "images per denoising step; a guided step runs twice as many rows"] = 8
    repeats: Annotated[SmallCount, "measurements of each side, in turns"] = 9
    dtype: Annotated[Dtype, "type of weights and activations, and of the matrix product beside"] = "float32"
    compile: Annotated[bool, "compile the blocks"] = False
    product_size: Annotated[
        Annotated[int, Ge(64), Le(2**17)] | None,
        "rows and columns of the matrix product; None: 2048 on a CPU, else 8192",
    ] = None


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
        "model to make shallow: a path, the name of a shipped model or of known weights, or a hub id; empty: of `recover` that "
        "of the run that made the student",
    ] = ""
    teacher_family: Annotated[
        str | None, "family of the teacher, where its file fits several and --family does not say; None takes the first"
    ] = None
    seed: Annotated[Seed, "seed of every draw"] = 0
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
    assigned: Annotated[
        frozenset[str],
        "fields that a file, an option or --set named, whatever their values; never compared or recorded",
    ] = field(default=frozenset(), compare=False, repr=False)
