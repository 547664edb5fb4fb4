"""`evaluate`: compute the scores of images, with the protocol that decides which scores are comparable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tinyfusion.config.recipe import DataSection, EvaluateSection, Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.progress import say
from tinyfusion.core.rundir import atomic_write, file_output, read_json, say_finished, stamp, write_json
from tinyfusion.data.digits import REAL_SETS
from tinyfusion.data.image_source import ImageSource, is_videos, open_npz, without_colour
from tinyfusion.data.originals import MixedSizes
from tinyfusion.data.parquet import WHOLE
from tinyfusion.evaluate.extractors import open_extractor
from tinyfusion.evaluate.features import FeatureExtractor
from tinyfusion.evaluate.fidelity import fidelity, open_pairs
from tinyfusion.evaluate.inception import INCEPTION
from tinyfusion.evaluate.perceptual import LEAST_PX, open_lpips
from tinyfusion.jobs.assemble import RunOptions, device_for, is_pictures, plain_recipe
from tinyfusion.jobs.origins import require_features, require_reference, with_evaluation
from tinyfusion.jobs.prompt_scores import open_prompt_scores, prompt_accuracy
from tinyfusion.jobs.scoring import STORED_MOMENTS, Reference, open_images, open_reference, protocol_of, score
from tinyfusion.report import schema
from tinyfusion.report.format import count, significant
from tinyfusion.report.tables import UNBIASED_IMAGES, distance_name

T = TypeVar("T")
METRICS = (*schema.SCORES, "protocol")
NO_FEATURES, NO_REFERENCE = "no features", "no reference"  # of a protocol without distances
_TABLE = {  # label and metrics of the rows of the printed table, after the Fréchet distance
    "sFID": ("sfid",),
    "Inception Score": ("inception_score",),
    "precision, recall": ("precision", "recall"),
}
NUM_EXAMPLES = 40  # of real images on the page


def evaluate(
    recipe: Recipe,
    options: RunOptions,
    samples: Path,
    reference: str | None,
    against: Path | None = None,
    print_table: bool = True,
    examples: Path | None = None,
) -> dict[str, Any]:
    """Score images (npz, folder of images, real set by name) against a reference and write the JSON at `options.out`.

    reference: None: the first of `evaluate.references`; none is needed with `against` or `evaluate.clip`. against: an npz of
    another model's images from the same seeds; adds PSNR, SSIM and LPIPS of the image pairs. print_table: print the scores on
    stderr. examples: path of an npz, to which some images of the reference are written.
    """
    remarks: list[str] = []
    compared = reference or next(iter(recipe.evaluate.references), None)
    images = _opened(samples, recipe, compared)
    alone = against is not None or recipe.evaluate.clip is not None  # without a reference these are scores enough
    if not (recipe.evaluate.features and (reference or recipe.evaluate.references)):
        recipe = with_evaluation(recipe, images.shape[1:], remarks)
    settings = recipe.evaluate
    reference = reference or next(iter(settings.references), None)
    distances = None
    if reference is not None or not alone:
        distances = _distances(recipe, samples, images, reference or require_reference(recipe))
    pairs = None if against is None else open_pairs(samples, against)
    clip = None
    if settings.clip is not None:
        file = Path(recipe.data.prompts) if recipe.data.prompts else None
        clip = open_prompt_scores(settings.clip, samples, images, file, str(device_for(recipe)))
    digest = images.hash()
    sampling = _sampling(samples, images, digest)
    inputs: dict[str, Any] = {"samples": digest} | (clip.inputs if clip else {})
    if distances:
        protocol = protocol_of(distances.real, distances.extractor, settings, sampling, images.shape[1:])
        inputs |= {"reference": distances.real.hash, "features": distances.extractor.hash}
    else:
        protocol = f"{NO_FEATURES} | {NO_REFERENCE} | {sampling}"
    if clip:
        features, _, rest = protocol.partition(" | ")
        protocol = f"{'' if features == NO_FEATURES else f'{features}, '}{clip.name} | {rest}"
    inputs["protocol"] = protocol
    if pairs is not None:
        inputs["against"] = pairs.hash()
    plain = plain_recipe(recipe, "evaluate", **inputs)
    plain.pop("prompts", None)  # those of the images are among `inputs`
    for other in ("references", "checkpoints", "clip"):  # the reference and the model are among `inputs`
        plain["evaluate"].pop(other)
    if not file_output(options.out, "evaluate", plain, options.overwrite, read_json):
        say_finished(options.out, options.dry_run)
        record = schema.checked(read_json(options.out), schema.EVALUATION, options.out)
        return _outcome(record, str(samples), print_table)
    if options.dry_run:
        say(remarks)
        return {"protocol": protocol}
    scores: dict[str, Any] = distances.scores(examples) if distances else {"num_images": len(images)}
    scores |= clip.score(images) if clip else {}
    if pairs is not None and against is not None:
        scores["against"] = _fidelity(images, pairs, against, inputs["against"], remarks, str(device_for(recipe)))
    record = {**stamp("evaluate", plain, "done"), **scores, "protocol": protocol}
    file_output(options.out, "evaluate", plain, options.overwrite, read_json)  # again: it may exist by now
    write_json(options.out, record)
    say(remarks)
    return _outcome(record, str(samples), print_table)


def _opened(samples: Path, recipe: Recipe, compared: str | None) -> ImageSource:
    """The images, or videos of an npz. Raises UserError on videos with a reference."""
    if not is_videos(samples):
        return _of_one_size(lambda: open_images(str(samples), recipe.data), lambda: _side_of(compared, recipe.data))
    if compared is not None:
        raise UserError(
            f"{samples} holds videos, which --against and --clip score, frame by frame; distances to a reference are of images: "
            "leave out --reference"
        )
    if recipe.evaluate.clip is None:
        raise UserError(
            f"{samples} holds videos: give --against NPZ with those of another model, or --clip MODEL, or both"
        )
    return open_npz(samples, videos=True)


@dataclass(frozen=True)
class _Distances:
    """Images with a reference and an extractor that fit them."""

    samples: Path
    images: ImageSource
    real: Reference
    extractor: FeatureExtractor
    settings: EvaluateSection

    def scores(self, examples: Path | None) -> dict[str, Any]:
        """FID and what belongs to it, for the record. examples: as of `evaluate`."""
        real, extractor, settings = self.real, self.extractor, self.settings
        if examples is not None and real.source is not None:
            _write_examples(real.source, real.name, examples)
        return {
            **prompt_accuracy(self.samples, self.images, extractor),
            **score(self.images, real, extractor, settings.neighbours, settings.is_splits_size),
            "features": {"name": extractor.name, "hash": extractor.hash},
            "reference": {"name": real.name, "hash": real.hash, "count": len(real)},
        }


def _distances(recipe: Recipe, samples: Path, images: ImageSource, reference: str) -> _Distances:
    """Open extractor and reference. Raises UserError where images and reference do not go together."""
    settings = recipe.evaluate
    extractor = open_extractor(require_features(recipe, str(samples), images.shape[1:]), str(device_for(recipe)))
    images = without_colour(images) if extractor.grey else images
    extractor.check(images.first() if images.array is None else images.array, str(samples))
    check_count(len(images), str(samples), settings)
    real = _of_one_size(lambda: open_reference(reference, extractor, recipe.data), lambda: min(images.shape[1:3]))
    _check_reference(real, images, settings, [is_pictures(str(samples)), is_pictures(reference)])
    return _Distances(samples, images, real, extractor, settings)


def _fidelity(
    images: ImageSource, pairs: ImageSource, against: Path, digest: str, remarks: list[str], device: str
) -> dict[str, Any]:
    """Scores of the pairs, LPIPS among them where its package is there and the images are large enough for it."""
    large = min(images.shape[-3:-1]) >= LEAST_PX
    lpips = open_lpips(device) if large else None
    if isinstance(lpips, str):
        remarks.append(f"LPIPS is left out: {lpips}")
        lpips = None
    return fidelity(images, pairs, against, digest, lpips)


def _write_examples(source: ImageSource, name: str, path: Path) -> None:
    """Write some images of a reference as an npz: evenly spaced where all are in memory, else the first ones."""
    num = min(NUM_EXAMPLES, len(source))
    chosen = np.linspace(0, len(source) - 1, num).astype(int)
    images = next(source.read(num)) if source.array is None else source.array[chosen]
    write_json(path.with_suffix(".json"), {"protocol": f"{num} images of {name}"})
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, arr_0=images)


def _sampling(samples: Path, images: ImageSource, digest: str) -> str:
    """The sampling protocol from the record of an npz, else "unknown". Raises UserError if it describes other images."""
    num_images = len(images)
    if str(samples) in REAL_SETS or str(samples).startswith(WHOLE):
        return f"{num_images} images | real"
    file = samples.with_suffix(".json")
    record = read_json(file) if samples.suffix == ".npz" and file.is_file() else None
    if not isinstance(record, dict) or not isinstance(record.get("protocol"), str):
        return f"{num_images} images | unknown"
    num = record.get("num_images", num_images)
    what = f"{num} images, {samples} holds {num_images}" if num != num_images else ""
    if not what and record.get("image_hash") not in (None, digest):
        what = f"other images than {samples} holds"
    if what:
        raise UserError(f"{file} describes {what}: they do not belong together; sample again, or remove the record")
    return str(record["protocol"])


def _of_one_size(load: Callable[[], T], side_of_other: Callable[[], int | None]) -> T:
    """The result of `load`. Raises `MixedSizes` with the side of the images to be compared with, where it is known."""
    try:
        return load()
    except MixedSizes as error:
        side = side_of_other()
        raise MixedSizes(error.problem, side) if side else error from None


def _side_of(name: str | None, data: DataSection) -> int | None:
    """Side of images that `data.size` does not change; None of pictures, and where they cannot be read."""
    if name is None or is_pictures(name):
        return None
    with suppress(UserError):
        return open_images(name, data).shape[1]
    return None


def _check_reference(real: Reference, images: ImageSource, settings: EvaluateSection, pictures: Sequence[bool]) -> None:
    """Raise UserError on an unfit reference. pictures: whether `data.size` resizes the images, and the reference."""
    if real.source is None:
        return
    check_count(len(real.source), f"reference {real.name}", settings)
    shapes = images.shape[1:], real.source.shape[1:]
    if shapes[0] == shapes[1]:
        return
    sizes = f"reference {real.name} has images {shapes[1]}, the samples {shapes[0]}"
    what = f"{sizes}: a distance between them would measure"
    if shapes[0][:2] == shapes[1][:2]:
        raise UserError(f"{what} the colour: make both grey or both coloured")
    fixed = [shape for shape, scaled in zip(shapes, pictures, strict=True) if not scaled]
    side = min(min(shape[:2]) for shape in fixed or shapes)
    remedy = f": --set data.size={side}" if any(pictures) and all(h == w for h, w, _ in fixed) else ""
    raise UserError(f"{what} the size: bring both to one size{remedy}")


def check_count(num: int, what: str, settings: EvaluateSection) -> None:
    """Raise UserError where `what` has too few images for precision and recall."""
    k = settings.neighbours
    if num <= k:
        raise UserError(f"{what} has {num} images: precision and recall with {k} neighbours need at least {k + 1}")


def _outcome(record: Mapping[str, Any], samples: str, print_table: bool) -> dict[str, Any]:
    """The scores in the record of an evaluation, for `--json`; prints them as a table if `print_table`."""
    more = [name for name in ("clip_score", "prompt_accuracy", "against") if name in record]
    numbers = {name: record.get(name) for name in (*METRICS, *more)}
    say(score_lines(record, samples) if print_table else ())
    return numbers


def score_lines(record: Mapping[str, Any], samples: str) -> list[str]:
    """Lines of the table of an evaluation: scores, counts, protocol, and the limits of the FID."""
    reference, features = record.get("reference", {}), record.get("features", {}).get("name")
    num_images, num_real = record.get("num_images"), reference.get("count")
    protocol, distance = str(record.get("protocol")), distance_name([record])
    counts = {"images": num_images, "reference images": None if STORED_MOMENTS in protocol else num_real}
    # 0 stands for moments alone, of an unknown number of images
    few = [f"{count(num)} {what}" for what, num in counts.items() if num and num < UNBIASED_IMAGES]
    remarks = [] if features == INCEPTION else [f"features of {features}: no FID of Inception features compares"]
    remarks += [f"{' and '.join(few)}: biased upward, compare only at equal counts"] if few else []
    table = {distance: ("fid",), **_TABLE} if features else {}
    rows = {label: ", ".join(significant(record.get(name)) for name in names) for label, names in table.items()}
    if features:
        rows[distance] += f"   ({'; '.join(remarks)})" if remarks else ""
    if clip := record.get("clip"):
        rows["CLIP score"] = f"{significant(record.get('clip_score'))}   (of {clip.get('name')})"
    if pairs := record.get("against"):
        rows["PSNR, SSIM"] = f"{significant(pairs.get('psnr_db'))} dB, {significant(pairs.get('ssim'))}"
        if "lpips" in pairs:
            rows["LPIPS"] = significant(pairs["lpips"])
    compared = f", against {count(num_real or None)} of {reference.get('name')}" if features else ""
    rows["images"] = f"{count(num_images)} of {samples}{compared}"
    rows["protocol"] = protocol
    return [f"{label:20}{text}" for label, text in rows.items()]
