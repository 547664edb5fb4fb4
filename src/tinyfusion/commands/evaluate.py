"""`evaluate`: compute the scores of images, with the protocol that decides which scores are comparable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from tinyfusion.config.recipe import DataSection, EvaluateSection, Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.progress import say
from tinyfusion.core.rundir import atomic_write, file_output, read_json, say_finished, stamp, write_json
from tinyfusion.data.digits import REAL_SETS
from tinyfusion.data.image_source import ImageSource
from tinyfusion.data.originals import MixedSizes
from tinyfusion.data.parquet import WHOLE
from tinyfusion.evaluate.extractors import open_extractor
from tinyfusion.evaluate.fidelity import fidelity, open_pairs
from tinyfusion.evaluate.inception import INCEPTION
from tinyfusion.jobs.assemble import RunOptions, device_for, is_pictures, plain_recipe
from tinyfusion.jobs.origins import require_features, require_reference, with_evaluation
from tinyfusion.jobs.scoring import STORED_MOMENTS, Reference, open_images, open_reference, protocol_of, score
from tinyfusion.report import schema
from tinyfusion.report.format import count, significant
from tinyfusion.report.tables import UNBIASED_IMAGES, distance_name

T = TypeVar("T")
METRICS = (*schema.SCORES, "protocol")
_TABLE = {  # label and metrics of the rows of the table for people, after the Fréchet distance
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

    reference: None: the first of `evaluate.references`. against: an npz of another model's images from the same seeds;
    adds PSNR and SSIM of the image pairs. print_table: print the scores on stderr. examples: path of an npz, to which
    some images of the reference are written.
    """
    remarks: list[str] = []
    compared = reference or next(iter(recipe.evaluate.references), None)
    images = _of_one_size(lambda: open_images(str(samples), recipe.data), lambda: _side_of(compared, recipe.data))
    if not (recipe.evaluate.features and (reference or recipe.evaluate.references)):
        recipe = with_evaluation(recipe, images.shape[1:], remarks)
    reference, settings = reference or require_reference(recipe), recipe.evaluate
    features = require_features(recipe, str(samples), images.shape[1:])
    extractor = open_extractor(features, str(device_for(recipe)))
    extractor.check(images.first() if images.array is None else images.array, str(samples))
    check_count(len(images), str(samples), settings)
    pairs = None if against is None else open_pairs(samples, against)
    real = _of_one_size(lambda: open_reference(reference, extractor, recipe.data), lambda: min(images.shape[1:3]))
    _check_reference(real, images, settings, [is_pictures(str(samples)), is_pictures(reference)])
    digest = images.hash()
    protocol = protocol_of(real, extractor, settings, _sampling(samples, images, digest), images.shape[1:])
    inputs = {"samples": digest, "reference": real.hash, "features": extractor.hash, "protocol": protocol}
    if pairs is not None:
        inputs["against"] = pairs.hash()
    plain = plain_recipe(recipe, "evaluate", **inputs)
    for other in ("references", "checkpoints"):  # the reference is among `inputs`
        plain["evaluate"].pop(other)
    if not file_output(options.out, "evaluate", plain, options.overwrite, read_json):
        say_finished(options.out, options.dry_run)
        record = schema.checked(read_json(options.out), schema.EVALUATION, options.out)
        return _outcome(record, str(samples), print_table)
    if options.dry_run:
        say(remarks)
        return {"protocol": protocol}
    if examples is not None and real.source is not None:
        _write_examples(real.source, real.name, examples)
    scores = score(images, real, extractor, settings.neighbours, settings.is_splits_size)
    if pairs is not None and against is not None:
        scores["against"] = fidelity(images, pairs, against, inputs["against"])
    record = {
        **stamp("evaluate", plain, "done"),
        **scores,
        "features": {"name": extractor.name, "hash": extractor.hash},
        "reference": {"name": real.name, "hash": real.hash, "count": len(real)},
        "protocol": protocol,
    }
    file_output(options.out, "evaluate", plain, options.overwrite, read_json)  # again: it may exist by now
    write_json(options.out, record)
    say(remarks)
    return _outcome(record, str(samples), print_table)


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
    numbers = {name: record.get(name) for name in (*METRICS, *(["against"] if "against" in record else []))}
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
    table = {distance: ("fid",), **_TABLE}
    rows = {label: ", ".join(significant(record.get(name)) for name in names) for label, names in table.items()}
    rows[distance] += f"   ({'; '.join(remarks)})" if remarks else ""
    if pairs := record.get("against"):
        rows["PSNR, SSIM"] = f"{significant(pairs.get('psnr_db'))} dB, {significant(pairs.get('ssim'))}"
    rows["images"] = f"{count(num_images)} of {samples}, against {count(num_real or None)} of {reference.get('name')}"
    rows["protocol"] = protocol
    return [f"{label:20}{text}" for label, text in rows.items()]
