"""Arrays out of npz and npy files: read as they are, or refused in one line before their values take memory."""

from __future__ import annotations

import contextlib
import io
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tinyfusion.core.errors import UserError
from tinyfusion.data.batches import scale_remarks
from tinyfusion.data.image_source import has_images, open_npz, read_moments
from tinyfusion.data.images import read_images_npz
from tinyfusion.data.npz import opened_npz, read_npy
from tinyfusion.data.published_latents import open_published
from tinyfusion.jobs.assemble import image_set

IMAGES, LABELS = np.arange(4 * 8 * 8, dtype=np.uint8).reshape(4, 8, 8, 1), np.arange(4)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=True)
    return stream.getvalue()


def headed(header: str, values: bytes = bytes(256), version: tuple[int, int] = (1, 0)) -> bytes:
    length = struct.pack("<H" if version == (1, 0) else "<I", len(header))
    return b"\x93NUMPY" + bytes(version) + length + header.encode("latin1") + values


def shaped(shape: str, descr: str = "'|u1'") -> bytes:
    return headed(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}")


def zipped(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", ["u1", "<f4", ">f8", "<i8", "?", "<c8", "U3"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (0, 3)])
def test_arrays_are_read_as_numpy_reads_them(tmp_path: Path, order: str, kind: str, shape: tuple[int, ...]) -> None:
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(kind, order=order)
    np.save(tmp_path / "x.npy", array)
    read = read_npy(tmp_path / "x.npy")
    assert read.dtype == array.dtype and np.array_equal(read, array)


def test_batches_are_the_array(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "x.npz", IMAGES)
    with opened_npz(tmp_path / "x.npz") as archive:
        assert np.array_equal(np.concatenate(list(archive.batches("arr_0", 3))), IMAGES)


DAMAGED: dict[str, tuple[bytes, str]] = {
    "shape-huge": (shaped(f"({10**30},)"), "claims uint8"),
    "shape-large": (shaped("(1000000000000, 8, 8, 1)"), "(64,000,000,000,000 bytes) and holds 256 bytes"),
    "shape-true": (shaped("(True, 8, 8, 1)"), "wanted whole numbers from 0"),
    "shape-negative": (shaped("(-4, 8, 8, 1)"), "wanted whole numbers from 0"),
    "shape-text": (shaped("'x'"), "shape is not valid"),
    "parentheses": (shaped("(" * 300), "cannot be read"),
    "unclosed": (headed("{'descr': '|u1', 'shape': (("), "cannot be read"),
    "nested": (headed("{" * 9000), "cannot be read"),
    "digits": (shaped(f"({'9' * 5000},)"), "cannot be read"),
    "no-fields": (headed("{}"), "cannot be read"),
    "no-header": (b"\x93NUMPY\x01\x00", "cannot be read"),
    "magic": (b"\x93NUMPX" + npy(IMAGES)[6:], "magic string is not correct"),
    "version": (headed("{}", version=(9, 9)), "version (9, 9): wanted 1, 2 or 3"),
    "objects": (npy(np.array([{}, None], dtype=object)), "would have to be unpickled"),
    "wide-type": (shaped("(4, 8, 8, 1)", "'|V1000000000'"), "and holds 256 bytes"),
    "no-array": (b"These are no numbers.", "magic string is not correct"),
    "empty": (b"", "cannot be read"),
    "cut-short": (npy(IMAGES)[:-1], "(256 bytes) and holds 255 bytes"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_an_error_for_people(tmp_path: Path, damage: str) -> None:
    content, message = DAMAGED[damage]
    (tmp_path / "x.npy").write_bytes(content)
    zipped(tmp_path / "x.npz", arr_0=content, mu=content, sigma=content)
    readers: list[Callable[[], object]] = [
        lambda: read_npy(tmp_path / "x.npy"),
        lambda: read_images_npz(tmp_path / "x.npz"),
        lambda: open_npz(tmp_path / "x.npz"),
        lambda: read_moments(tmp_path / "x.npz"),
    ]
    for read in readers:
        with pytest.raises(UserError) as caught:
            read()
        assert message in str(caught.value) and "\n" not in str(caught.value)
    assert has_images(tmp_path / "x.npz")


@pytest.mark.parametrize("version", [(2, 0), (3, 0)])
def test_later_versions_of_the_format_are_read(tmp_path: Path, version: tuple[int, int]) -> None:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, IMAGES, version=version)
    assert np.array_equal(read_images_npz(zipped(tmp_path / "x.npz", arr_0=stream.getvalue()))[0], IMAGES)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full(4, 2**64 - 1, np.uint64), "the largest is 18446744073709551615"),
        (np.full(4, 2**40), "labels are at most 2,147,483,647; the largest is 1099511627776"),
        (np.arange(4.0), r"labels in arr_1 are \(4,\) integers; got \(4,\) float64"),
        (np.arange(4) < 2, r"labels in arr_1 are \(4,\) integers; got \(4,\) bool"),
    ],
)
def test_labels_that_are_none(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_images_npz(zipped(tmp_path / "x.npz", arr_0=npy(IMAGES), arr_1=npy(labels)))


def test_labels_are_refused_before_images_are_inflated(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.npz", arr_0=npy(np.zeros((100, 500, 500, 1), np.uint8)), arr_1=npy(LABELS))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"labels in arr_1 are \(100,\) integers; got \(4,\)"):
        read_images_npz(path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_images_that_do_not_fit_into_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zipped(tmp_path / "x.npz", arr_0=npy(np.zeros((100, 500, 500, 1), np.uint8)))
    monkeypatch.setattr("tinyfusion.core.reading.available_memory_bytes", lambda: 2**24)
    with pytest.raises(UserError, match="arr_0, uint8 .* would take 0.0 GiB of memory"):
        read_images_npz(path)


@pytest.mark.parametrize("place", [8, 10, 16, 20, 24, 28, 42])
@pytest.mark.parametrize("value", [b"\xff\xff\xff\xff", b"\0\0\0\0"])
def test_a_directory_that_is_not_that_of_the_zip_is_an_error_for_people(
    tmp_path: Path, place: int, value: bytes
) -> None:
    path = zipped(tmp_path / "x.npz", arr_0=npy(IMAGES + 1))
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    width = 2 if place in (8, 10, 28) else 4
    content[entry + place : entry + place + width] = value[:width]
    path.write_bytes(content)
    with contextlib.suppress(UserError):  # where the field is needed
        assert np.array_equal(read_images_npz(path)[0], IMAGES + 1)


def published(folder: Path) -> Path:
    for name in ("features", "labels"):
        (folder / f"small_{name}").mkdir()
    for i in range(3):
        np.save(folder / "small_features" / f"{i}.npy", np.zeros((2, 4, 8, 8), np.float32))
        np.save(folder / "small_labels" / f"{i}.npy", np.array([i]))
    return folder


def test_a_number_in_a_file_name_takes_no_memory(tmp_path: Path) -> None:
    folder = published(tmp_path)
    (folder / "small_features" / "2.npy").rename(folder / "small_features" / "99999999999.npy")
    with pytest.raises(UserError, match=r"has gaps: 2.npy, 3.npy, 4.npy \.\.\. of 100,000,000,000 missing"):
        open_published(folder)


@pytest.mark.parametrize("name", ["²", "٣", "007", "-1", "x"])
def test_a_file_name_that_is_no_number(tmp_path: Path, name: str) -> None:
    folder = published(tmp_path)
    (folder / "small_features" / f"{name}.npy").touch()
    with pytest.raises(UserError, match=f"holds {name}.npy: wanted 0.npy, 1.npy"):
        open_published(folder)


def test_features_of_several_pictures_say_why(tmp_path: Path) -> None:
    folder = published(tmp_path)
    np.save(folder / "small_features" / "0.npy", np.zeros((8, 4, 8, 8), np.float32))
    with pytest.raises(UserError, match=r"0.npy has 8 rows .* extract with a batch size of 1"):
        open_published(folder)


@pytest.mark.parametrize("label", [np.array([2**64 - 1], np.uint64), np.array([-1]), np.array([0.5]), np.arange(2)])
def test_a_label_of_the_published_layout_that_is_none(tmp_path: Path, label: np.ndarray) -> None:
    folder = published(tmp_path)
    np.save(folder / "small_labels" / "1.npy", label)
    with pytest.raises(UserError, match="1.npy is .*: wanted one whole number from 0 to 2,147,483,647"):
        open_published(folder)


@pytest.mark.parametrize("factor", [0.18, 0.7, 1.0, 5.5])
def test_latents_of_another_scale_are_said(factor: float) -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(8, 4, 8, 8)).astype(np.float32)) * factor
    said = scale_remarks(x, "old")
    assert len(said) == (factor in (0.18, 5.5)) and all(
        f"deviation of {x.double().std():.3g} where" in line for line in said
    )


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            np.zeros((4, 8, 8, 4), np.uint8),
            "arr_0 is uint8 with 4 channels, taken as pixels; latents are stored as floats",
        ),
        (np.linspace(-9, 9, 1024).reshape(4, 8, 8, 4), "the latents have a standard deviation of 5.2"),
        (np.zeros((4, 8, 8, 3), np.uint8), ""),
    ],
)
def test_latents_in_an_npz_are_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], images: np.ndarray, message: str
) -> None:
    np.savez(tmp_path / "x.npz", images, LABELS)
    capfd.readouterr()
    assert image_set(str(tmp_path / "x.npz")).x.shape[0] == 4
    said = capfd.readouterr().err
    assert message in said and len(said.splitlines()) == bool(message)


def test_values_beyond_float32_are_refused_without_a_warning(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=np.full((1, 2, 2, 1), 1e300))
    with pytest.raises(UserError, match="arr_0 has 4 values that are not finite"):
        read_images_npz(tmp_path / "x.npz")


def test_small_arrays_are_read_without_asking_for_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of latents are a million small files, and a query of the memory takes longer than reading one."""

    def queried() -> int:
        raise AssertionError("queried")

    monkeypatch.setattr("tinyfusion.core.reading.available_memory_bytes", queried)
    np.save(tmp_path / "0.npy", np.ones((2, 4, 64, 64), np.float32))
    assert read_npy(tmp_path / "0.npy").sum() == 2 * 4 * 64 * 64
    np.save(tmp_path / "0.npy", np.ones(2**18 + 1, np.float32))
    with pytest.raises(AssertionError, match="queried"):
        read_npy(tmp_path / "0.npy")
