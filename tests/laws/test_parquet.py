"""Parquet files of encoded pictures are the pictures; everything else is refused in one line."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.data.digits import load_digits
from tinyfusion.data.originals import read_originals
from tinyfusion.data.parquet import check_rows
from tinyfusion.data.stream import open_shards
from tinyfusion.jobs.assemble import image_set


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(stream, format=kind)
    return stream.getvalue()


def pictures(num: int, side: int, channels: int = 3) -> np.ndarray:
    values = Randomness(side).at(0, 0, num).uniform("pixels", (side, side, channels))
    return (values * 256).astype(np.uint8)


def written(path: Path, rows: list[Any], labels: list[Any], column: str = "img") -> Path:
    pq.write_table(pa.table({column: rows, "label": labels}), path, row_group_size=3)
    return path


def read(path: Path, size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels of a parquet file, or of all in a folder."""
    found = read_originals(f"parquet:{path}", size)
    return found.pixels, found.labels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("column", "struct"), [("img", True), ("image", False)])
def test_round_trip(tmp_path: Path, channels: int, column: str, struct: bool) -> None:
    images, labels = pictures(7, 8, channels), [3, 0, 1, 1, 2, 9, 0]
    rows = [{"bytes": encoded(i), "path": None} if struct else encoded(i) for i in images]
    found, classes = read(written(tmp_path / "a.parquet", rows, labels, column))
    assert np.array_equal(found, images) and classes.tolist() == labels


def test_box_filter_is_the_mean_of_each_area(tmp_path: Path) -> None:
    images = pictures(4, 8)
    file = written(tmp_path / "a.parquet", [encoded(i) for i in images], [0, 1, 2, 3])
    found, _ = read(file, size=4)
    means = images.reshape(4, 4, 2, 4, 2, 3).astype(float).mean((2, 4))
    assert found.shape == (4, 4, 4, 3) and np.abs(found - means).max() <= 1.0


def test_a_folder_is_its_files_by_name_and_grey_among_colours_is_colour(tmp_path: Path) -> None:
    first, second = pictures(2, 8), pictures(2, 8, 1)
    written(tmp_path / "b.parquet", [encoded(i) for i in second], [2, 3])
    written(tmp_path / "a.parquet", [encoded(i) for i in first], [0, 1])
    found, labels = read(tmp_path)
    assert labels.tolist() == [0, 1, 2, 3]
    assert np.array_equal(found[:2], first) and np.array_equal(found[2:], second.repeat(3, -1))


def test_the_data_set_by_name(tmp_path: Path) -> None:
    images = pictures(3, 8)
    file = written(tmp_path / "a.parquet", [encoded(i) for i in images], [0, 4, 1])
    made = image_set(f"parquet:{file}", 8)
    assert made.num_classes == 5 and made.x.dtype == np.float32
    assert np.array_equal(np.rint((made.x + 1) * 127.5).astype(np.uint8), images.transpose(0, 3, 1, 2))


def test_a_folder_of_classes_is_a_data_set(tmp_path: Path) -> None:
    images = pictures(4, 8)
    for i, image in enumerate(images):
        path = tmp_path / "set" / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(image))
    made = image_set(str(tmp_path / "set"))
    assert made.y.tolist() == [0, 0, 1, 1] and made.num_classes == 2
    assert np.array_equal(np.rint((made.x + 1) * 127.5).astype(np.uint8), images[[0, 2, 1, 3]].transpose(0, 3, 1, 2))
    assert image_set(str(tmp_path / "set"), 4).x.shape == (4, 3, 4, 4)
    (tmp_path / "set" / "dog" / "4.png").write_bytes(encoded(pictures(1, 6)[0]))
    (tmp_path / "set").rename(tmp_path / "other")
    with pytest.raises(
        UserError,
        match=r"4.png is 6 x 6, and the first picture of .* 8 x 8: give one size for all, such as --set data\.size=8",
    ):
        image_set(str(tmp_path / "other"))


GOOD = encoded(pictures(1, 8)[0])
BAD = {
    "no label": ([GOOD, GOOD], [0, None], None, "row 1: wanted a label"),
    "no labels": ([GOOD], [None], None, "column label is of the type null: wanted a label"),
    "label beyond int64": (
        [GOOD],
        pa.array([2**64 - 1], pa.uint64()),
        None,
        "row 0: wanted a label, a whole number from 0 to 2,1",
    ),
    "far date for a label": (
        [GOOD],
        pa.array([2**62], pa.timestamp("ms")),
        None,
        "column label is of the type timestamp[ms]",
    ),
    "fraction for a label": ([GOOD], [0.5], None, "column label is of the type double"),
    "truth for a label": ([GOOD], [True], None, "column label is of the type bool"),
    "list for a label": ([GOOD], [[1]], None, "column label is of the type list"),
    "nested struct": (
        [{"bytes": {"bytes": GOOD}}],
        [0],
        None,
        "column img is of the type struct<bytes: struct<bytes: binary>>",
    ),
    "struct without bytes": ([{"path": "x"}], [0], None, "column img is of the type struct<path: string>"),
    "negative label": ([GOOD], [-1], None, "row 0: wanted a label"),
    "no picture": ([GOOD, b"not a picture"], [0, 1], None, "row 1 cannot be decoded"),
    "text for bytes": (["GOOD"], [0], None, "wanted an encoded picture"),
    "two sizes": ([GOOD, encoded(pictures(1, 6)[0])], [0, 1], None, "row 1 is 6 x 6, and the first picture of"),
    "too narrow": (
        [encoded(np.zeros((1, 9000, 3), np.uint8))],
        [0],
        256,
        "9000 x 1: too narrow for a crop of 256 x 256",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_refused(tmp_path: Path, case: str) -> None:
    rows, labels, size, part = BAD[case]
    file = written(tmp_path / "a.parquet", rows, labels)
    with pytest.raises(UserError) as caught:
        read(file, size)
    assert part in str(caught.value) and "\n" not in str(caught.value)


def test_twin_columns_are_refused(tmp_path: Path) -> None:
    twins = pa.Table.from_arrays([pa.array([GOOD]), pa.array([0]), pa.array([1])], ["img", "label", "label"])
    pq.write_table(twins, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has 2 columns label: wanted one"):
        image_set(f"parquet:{tmp_path / 'a.parquet'}")


@pytest.mark.parametrize("name", ["parquet", "parquet-stream"])
def test_a_picture_that_is_repeated_by_reference_is_read_a_few_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """20,000 rows of one picture of 1 MB are 20 GB, in a file of a few kB."""
    repeated = pa.DictionaryArray.from_arrays(pa.array(np.zeros(20_000, np.int32)), pa.array([GOOD + bytes(2**20)]))
    table = pa.table({"img": repeated, "label": np.zeros(20_000, np.int64)})
    pq.write_table(
        table, tmp_path / "a.parquet", compression="zstd", dictionary_pagesize_limit=2**22, store_schema=False
    )
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    monkeypatch.setattr("tinyfusion.core.reading.available_memory_bytes", lambda: 2**28)
    monkeypatch.setattr("tinyfusion.data.parquet.available_memory_bytes", lambda: 2**28)
    before = pa.total_allocated_bytes()
    file = tmp_path / "a.parquet"
    reader = image_set if name == "parquet" else lambda _name: open_shards(file, None, 3).groups[0].read()
    with pytest.raises(UserError, match=r"a\.parquet, row group 0 as pictures in memory would take 19\.\d GiB"):
        reader(f"parquet:{file}")
    assert pa.default_memory_pool().max_memory() - before < 2**28


@pytest.mark.parametrize("rows", [-1, 10**15])
def test_a_footer_that_claims_other_rows_is_refused(tmp_path: Path, rows: int) -> None:
    file = written(tmp_path / "a.parquet", [GOOD], [0])
    footer = SimpleNamespace(num_rows=rows, num_row_groups=1, row_group=lambda _: SimpleNamespace(num_rows=rows))
    with pytest.raises(UserError, match=f"a.parquet is damaged: its footer claims {rows:,} rows"):
        check_rows(footer, file, file.stat().st_size)


def test_foreign_and_missing_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read(tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no parquet data"):
        read(tmp_path / "y.parquet")
    pq.write_table(pa.table({"pixels": [GOOD], "label": [0]}), tmp_path / "z.parquet")
    with pytest.raises(UserError, match="wanted img or image"):
        read(tmp_path / "z.parquet")


def test_flips_are_addressed_and_as_often_as_asked() -> None:
    images = load_digits()
    plain = ShuffledBatches(images, Randomness(1), torch.device("cpu"))
    flipping = ShuffledBatches(images, Randomness(1), torch.device("cpu"), flip=0.3)
    draws = Randomness(1).at(2, 0, 400)
    straight, mixed = plain(2, 400, draws).x, flipping(2, 400, draws).x
    same = (mixed == straight).flatten(1).all(1)
    mirrored = (mixed == straight.flip(-1)).flatten(1).all(1)
    assert bool((same | mirrored).all()) and 0.2 < float((~same).float().mean()) < 0.4
    assert torch.equal(flipping(2, 400, Randomness(1).at(2, 200, 200)).x, mixed[200:])


def test_a_folder_with_two_splits_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        written(tmp_path / f"{split}-00000-of-00001.parquet", [GOOD], [0])
    with pytest.raises(UserError, match="splits test, train: name one file"):
        read(tmp_path)


def test_pictures_that_would_change_silently_are_refused(tmp_path: Path) -> None:
    deep, clear = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.full((8, 8), 4_000, np.uint16)).save(deep, format="TIFF")
    Image.new("RGBA", (8, 8), (1, 2, 3, 4)).save(clear, format="PNG")
    for content, part in ((deep, "mode I;16: wanted 8 bits"), (clear, "partly transparent")):
        file = written(tmp_path / "a.parquet", [content.getvalue()], [0])
        with pytest.raises(UserError, match=part):
            read(file)
