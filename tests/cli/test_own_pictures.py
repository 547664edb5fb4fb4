"""A folder of photographs of any sizes to a pruned, recovered, scored and exported model; and what is said on the way."""

from __future__ import annotations

import io
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from material import Cli, done, refused
from PIL import Image

from tinyfusion.core.rng import Randomness
from tinyfusion.evaluate.features import ClassifierFeatures
from tinyfusion.jobs.assemble import image_set

SIZES = ((500, 349), (120, 333), (64, 64), (9, 30))
SIDE = "--set data.size=8"
MODEL = "--set model.family=dit --set model.hidden_size=16 --set model.num_heads=2 --set model.depth=2"
STEPS = " ".join(f"--set {s}.batch_size=4 --set {s}.ema_decay=0.1" for s in ("train", "recover.training"))


def photograph(i: int, mode: str = "L") -> Image.Image:
    width, height = SIZES[i % len(SIZES)]
    small = Randomness(4).at(0, i, 1).integers("photograph", 256, (6, 6, 3))[0].astype(np.uint8)
    return Image.fromarray(small).convert(mode).resize((width, height), Image.Resampling.BICUBIC)


def photographs(folder: Path, num: int = 12, mode: str = "L", classes: int = 0) -> Path:
    for i in range(num):
        path = folder / (f"class-{i % classes}" if classes else "") / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[274] = 6 if i == 0 else 1
        photograph(i, mode).save(path, exif=exif.tobytes())
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arch(folder: str) -> Any:
    found = json.loads(Path(folder, "model.json").read_text())["arch"]
    return tuple(found[name] for name in ("input_size", "in_channels", "num_classes", "patch_size"))


def test_photographs_to_a_scored_and_exported_student(cli: Cli, here: Path) -> None:
    """Grey ones, which the small features of digits take, so that the whole way has its numbers."""
    photographs(here / "photos")
    outcome = done(cli, f"train --data photos --out base --steps 3 {SIDE} {MODEL} {STEPS}")
    said = [line for line in outcome.err.splitlines() if "it is left out" not in line]  # settings of another verb
    assert said[:3] == [
        "photos: no class folders, so its pictures are one class (12)",
        "photos: pictures cropped to 8 x 8: 12 of 12",
        "photos: pictures turned as their orientation tags say: 1 of 12",
    ]
    assert arch("base/model") == (8, 1, 1, 2)
    settings = json.loads(Path("base/run.json").read_text())
    for record in (settings["recipe"]["model"], settings["job"]["recipe"]["model"]):
        assert {k: record[k] for k in ("input_size", "in_channels", "num_classes")} == {
            "input_size": 8, "in_channels": 1, "num_classes": 1,
        }  # fmt: skip
    assert "is finished" in done(cli, f"train --data photos --out base --steps 3 {SIDE} {MODEL} {STEPS}").err
    done(cli, "replay base --step 1")
    calibration = "--criterion bi --num-keep 1 --set prune.calibration_images=12"
    done(cli, f"prune --teacher base --data photos --out cut {calibration} {SIDE}")
    student = f"recover --teacher base --student cut --data photos --out back --steps 2 {SIDE} {STEPS}"
    done(cli, f"{student} --set recover.mask_sigmas=none")
    done(cli, "sample --model back --num-images 6 --num-steps 3 --out drawn.npz --png drawn")
    numbers = done(cli, f"evaluate --samples drawn.npz --reference photos --out fid.json {SIDE} --json").last_json
    assert numbers["fid"] > 0
    assert numbers["num_images"] == 6
    done(cli, f"evaluate --samples drawn --reference photos --out folder.json {SIDE}")
    assert json.loads(Path("folder.json").read_text())["fid"] == numbers["fid"]
    same = done(cli, f"evaluate --samples photos --reference photos --out same.json {SIDE} --json").last_json
    assert same["fid"] == pytest.approx(0, abs=1e-6)
    assert json.loads(Path("same.json").read_text())["reference"]["count"] == 12
    done(cli, "export --model back --to tinyfusion --out exported")


def test_what_is_evaluated_is_what_was_trained_on(cli: Cli, here: Path) -> None:
    """The reference of a folder has the pixels of the training set; another crop or orientation is another reference."""
    from tinyfusion.config.recipe import DataSection
    from tinyfusion.jobs.assemble import image_set
    from tinyfusion.jobs.scoring import open_images

    photographs(here / "photos", mode="RGB", classes=3)
    trained = image_set("photos", 8)
    reference = open_images("photos", DataSection(size=8))
    assert reference.array is not None
    assert np.array_equal(reference.array, np.rint((trained.x + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1))
    ignoring = open_images("photos", DataSection(size=8, orientation="ignore"))
    assert ignoring.hash() != reference.hash()
    rows = [
        {"bytes": file.read_bytes()} for folder in sorted(Path("photos").iterdir()) for file in sorted(folder.iterdir())
    ]
    pq.write_table(pa.table({"image": rows, "label": trained.y}), "photos.parquet", row_group_size=5)
    assert open_images("parquet:photos.parquet", DataSection(size=8)).hash() == reference.hash()
    stream = f"train --data parquet-stream:photos.parquet --out stream --steps 1 {SIDE} {MODEL} {STEPS}"
    done(cli, stream)
    assert arch("stream/model") == (8, 3, 3, 2)
    record = json.loads(Path("stream/run.json").read_text())
    assert record["recipe"]["data"]["orientation"] == "follow"
    assert "(data.orientation: 'follow' there, 'ignore' now)" in refused(cli, f"{stream} --set data.orientation=ignore")


TRAIN = f"train --data photos --out run --steps 1 {MODEL} {STEPS}"
ROWS: dict[str, tuple[str, str]] = {
    "several-sizes": (TRAIN, "give one size for all, such as --set data.size=64"),
    "broken": (TRAIN.replace("photos", "broken"), "broken/01.jpg cannot be decoded as a picture"),
    "one-size": (TRAIN.replace("photos", "wide"), "data wide has images (3, 349, 500), the model takes (3, 349, 349): --set data.size=64"),
    "patch": (f"{TRAIN} --set data.size=15",
              "images of 15 x 15, no multiple of model.patch_size=2: --set data.size=14 or --set model.patch_size=3"),
    "channels": (f"{TRAIN} {SIDE} --set model.in_channels=1", "has images (3, 8, 8), the model takes (1, 8, 8): --set model.in_channels=3"),
    "side": (f"{TRAIN} {SIDE} --set model.input_size=16", "the model takes (3, 16, 16): --set model.input_size=8 or --set data.size=16"),
    "classes": (f"{TRAIN} {SIDE} --set model.num_classes=2", "has 3 classes, the model knows 2: --set model.num_classes=3"),
    "teacher-side": ("prune --teacher digits --data grey --out cut --criterion bi --set data.size=16",
                     "has images (1, 16, 16), the model takes (1, 8, 8): --set data.size=8"),
    "teacher-colour": ("prune --teacher digits --data photos --out cut --criterion bi --set data.size=16",
                       "has images (3, 16, 16), the model takes (1, 8, 8): make its pictures grey and --set data.size=8"),
    "label": (TRAIN.replace("photos", "parquet:far.parquet"),
              "has the label 123456789: where it really has so many classes, say --set model.num_classes=123456790"),
    "bomb": (TRAIN.replace("photos", "bomb"), "bomb/0.png is 13000 x 13000: wanted at most 134,217,728 pixels; make it smaller"),
}  # fmt: skip


@pytest.mark.parametrize("cause", ROWS)
def test_what_does_not_fit_names_what_to_type(cli: Cli, here: Path, cause: str) -> None:
    photographs(here / "photos", 6, "RGB", classes=3)
    photographs(here / "grey", 3)
    (here / "wide").mkdir()
    for i in (0, 4):
        photograph(i, "RGB").save(here / "wide" / f"{i}.png")
    pixels = Path("photos/class-2/02.jpg").read_bytes()
    pq.write_table(pa.table({"image": [pixels], "label": [123_456_789]}), "far.parquet")
    (here / "bomb").mkdir()
    Image.new("1", (13_000, 13_000)).save(here / "bomb" / "0.png")
    assert os.path.getsize(here / "bomb" / "0.png") < 60_000
    photographs(here / "broken", 9)
    for i in range(1, 8):
        (here / f"broken/{i:02d}.jpg").write_bytes(b"x")
    command, message = ROWS[cause]
    assert message in (line := refused(cli, command))
    if cause == "broken":
        assert line.endswith("(7 of the 9 pictures read cannot be used, among them 02.jpg, 03.jpg, 04.jpg, 05.jpg)")
    assert not (here / "run").exists()
    assert not (here / "cut").exists()


EVALUATE = "evaluate --out fid.json --set evaluate.features=digits-classifier"
PHOTOS = "photos/01.jpg is 120 x 333, and the first picture of photos 349 x 500: give one size for all, such as --set data.size="
SIZE_ROWS: dict[str, tuple[str, str]] = {
    "mixed-reference": ("--samples eight.npz --reference photos", f"{PHOTOS}8"),
    "mixed-samples": ("--samples photos --reference eight.npz", f"{PHOTOS}8"),
    "both-mixed": ("--samples photos --reference photos", f"{PHOTOS}64"),
    "both-npz": ("--samples eight.npz --reference nine.npz", "would measure the size: bring both to one size"),
    "larger-samples": ("--samples sixteen --reference eight.npz", "bring both to one size: --set data.size=8"),
    "larger-reference": ("--samples eight.npz --reference sixteen", "bring both to one size: --set data.size=8"),
    "both-pictures": ("--samples sixteen --reference nine", "bring both to one size: --set data.size=9"),
}


@pytest.mark.parametrize("cause", SIZE_ROWS)
def test_evaluate_suggests_a_size_that_works(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch, cause: str) -> None:
    monkeypatch.setattr(ClassifierFeatures, "check", lambda *_: None)  # of any size
    photographs(here / "photos", 6)
    for name, side in (("eight", 8), ("nine", 9), ("sixteen", 16)):
        np.savez(f"{name}.npz", arr_0=np.zeros((6, side, side, 1), np.uint8))
        Path(name).mkdir()
        for i in range(6):
            photograph(i).resize((side, side)).save(here / name / f"{i}.png")
    options, message = SIZE_ROWS[cause]
    line = refused(cli, f"{EVALUATE} {options}")
    assert line.endswith(message), line


def test_grey_pictures_serve_a_model_of_colour(cli: Cli, here: Path) -> None:
    photographs(here / "photos", 4)
    done(cli, f"{TRAIN} {SIDE} --set model.in_channels=3")
    assert arch("run/model") == (8, 3, 1, 2)


def test_a_picture_of_which_pillow_warns_says_nothing_more(cli: Cli, here: Path) -> None:
    photographs(here / "photos", 4)
    stream = io.BytesIO()
    photograph(4).save(stream, format="TIFF")
    content = bytearray(stream.getvalue())
    entry = content.index(struct.pack("<HHI", 259, 3, 1))  # the compression
    content[entry + 4] = 2  # values, where one is expected
    (here / "photos" / "04.tif").write_bytes(content)
    assert "Warning" not in done(cli, f"{TRAIN} {SIDE}").err


def test_pictures_that_changed_are_decoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("set").mkdir()
    for name, grey in (("a.png", 10), ("b.png", 20)):
        Image.new("L", (4, 4), grey).save(Path("set") / name)
    first = image_set("set")
    assert image_set("set").x is not first.x and (image_set("set").x == first.x).all()
    Image.new("L", (4, 4), 250).save("set/b.png")
    os.utime("set/b.png", ns=(1, 1))
    assert image_set("set").x.max() > first.x.max()
