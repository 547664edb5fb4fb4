"""Pictures and folders of them as people have them: what is decoded, what is counted, and what is refused by name."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.data.folders import open_picture_folder
from tinyfusion.data.originals import open_originals, read_originals
from tinyfusion.data.picture import FORMATS, MOST_PIXELS, SMALL_FILE_BYTES, centre_crop, decode

RAW = Randomness(3).at(0, 0, 1).integers("pixels", 256, (5, 7, 3))[0].astype(np.uint8)
ORIENTATION = 274  # of EXIF


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **more: Any) -> bytes:
    stream = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(stream, format=kind, **more)
    return stream.getvalue()


def put(path: Path, content: bytes | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(RAW) if content is None else content)
    return path


# ------------------------------------------------------------------------------------------------------------- decoding


TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: x[::-1].transpose(1, 0, 2),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: x[:, ::-1].transpose(1, 0, 2),
    9: lambda x: x,
}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("tag", TURNED)
def test_orientation_tags_are_followed_or_ignored(kind: str, tag: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = tag
    lossless = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(RAW, kind, exif=exif.tobytes(), **lossless)
    plain = decode(encoded(RAW, kind, **lossless), "x").pixels
    followed = decode(content, "x")
    assert np.array_equal(followed.pixels, TURNED[tag](plain))
    assert followed.changes == (("turned as their orientation tags say",) if 1 < tag < 9 else ())
    assert np.array_equal(decode(content, "x", orientation="ignore").pixels, plain)
    square = centre_crop(Image.fromarray(TURNED[tag](plain)), 4)
    assert np.array_equal(decode(content, "x", 4).pixels, np.asarray(square))


def test_tags_of_tiff_files_are_followed_once() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    assert np.array_equal(decode(encoded(RAW, "TIFF", exif=exif), "x").pixels, TURNED[6](RAW))


def test_damaged_tags_say_nothing() -> None:
    content = encoded(RAW, exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x12\x01")
    assert np.array_equal(decode(content, "x").pixels, RAW)


DEEP = np.array([[0, 255, 256], [257 * 100, 65_280, 65_535]], np.uint16)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (encoded(DEEP), DEEP >> 8),
        (b"P5 3 2 65535\n" + DEEP.astype(">u2").tobytes(), DEEP >> 8),
        (encoded(Image.fromarray(RAW).convert("1")), np.asarray(Image.fromarray(RAW).convert("1")) * np.uint8(255)),
        (encoded(Image.merge("LA", [Image.fromarray(RAW[..., 0]), Image.new("L", (7, 5), 255)])), RAW[..., 0]),
        (encoded(Image.fromarray(np.dstack([RAW, np.full((5, 7), 255, np.uint8)]))), RAW),
        (encoded(RAW, "BMP"), RAW),
        (encoded(RAW, "TIFF"), RAW),
        (encoded(RAW, "PPM"), RAW),
        (encoded(RAW[..., 0], "GIF", save_all=True, append_images=[Image.new("L", (7, 5))]), RAW[..., 0]),
    ],
    ids=["16-bit", "16-bit-pgm", "bits", "grey-alpha", "alpha", "bmp", "tiff", "ppm", "gif"],
)
def test_what_loses_nothing_is_taken(content: bytes, wanted: np.ndarray) -> None:
    found = decode(content, "x").pixels
    assert np.array_equal(found if wanted.ndim == 3 else found[..., :1], wanted.reshape(*wanted.shape[:2], -1))


def test_cmyk_and_palette_become_colour() -> None:
    image = Image.new("RGB", (8, 8), (250, 20, 30))
    for content in (
        encoded(image.convert("P", palette=Image.Palette.ADAPTIVE)),
        encoded(image.convert("CMYK"), "TIFF"),
    ):
        assert decode(content, "x").pixels[3, 3].tolist() == [250, 20, 30]


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes for a picture of bits."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = zlib.compress(bytes(1 + (width + 7) // 8) * min(height, 13_000), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bomb(13_000, 13_000), f"x is 13000 x 13000: wanted at most {MOST_PIXELS:,} pixels; make it smaller"),
        (bomb(8_200, 8_200), "x is 8200 x 8200, and its file has 8,2"),
        (encoded(Image.new("RGB", (5_800, 5_800))), "x is 5800 x 5800, and its file has 98,"),
        (bomb(60_000, 60_000), f"x has more than {MOST_PIXELS:,} pixels"),
        (b"P6 2147483647 2147483647 255\n", "x has more than"),
        (encoded(DEEP, "TIFF"), "x is a picture of mode I;16: wanted 8 bits"),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "x is a picture of mode F"),
        (encoded(Image.new("LAB", (4, 4)), "TIFF"), "x is a picture of mode LAB"),
        (encoded(Image.new("RGBA", (4, 4), (1, 2, 3, 0))), "x is partly transparent"),
        (encoded(Image.new("P", (4, 4)), "GIF", transparency=0), "x is partly transparent"),
        (b"GIF89a" + b"\xff" * 30, "x cannot be decoded as a picture"),
        (b"", "x cannot be decoded as a picture"),
    ],
    ids=[
        "bomb",
        "bits",
        "colour",
        "huge",
        "header",
        "16-bit-tiff",
        "float",
        "lab",
        "clear",
        "clear-gif",
        "gif",
        "empty",
    ],
)
def test_what_is_refused_is_named(content: bytes, message: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # as the command line does
        with pytest.raises(UserError) as caught:
            decode(content, "x")
    assert str(caught.value).startswith(message)


def test_a_small_file_may_be_a_scanned_page() -> None:
    assert SMALL_FILE_BYTES > 4960 * 7016 * 2
    assert decode(bomb(4960, 7016), "x", 4).pixels.max() == 0


def test_a_picture_that_the_memory_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyfusion.core.reading.available_memory_bytes", lambda: 2**26)
    with pytest.raises(UserError, match=r"^x, a picture of 5000 x 5000, would take 0\.1 GiB of memory"):
        decode(bomb(5000, 5000), "x", 16)


def test_a_set_that_the_memory_does_not_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(20):
        put(tmp_path / f"{i}.png")
    monkeypatch.setattr("tinyfusion.core.reading.UNCHECKED_BYTES", 0)
    monkeypatch.setattr("tinyfusion.core.reading.available_memory_bytes", lambda: 20 * 5 * 7 * 3 * 5)
    with pytest.raises(UserError, match="20 pictures of 7 x 5 would take"):
        read_originals(str(tmp_path))


def mutations(content: bytes, num: int) -> Iterator[bytes]:
    """Cut short, with changed bytes, and with bytes left out."""
    for i in range(num):
        draws = Randomness(7).at(i, 0, 1)
        place, value = draws.integers("place", len(content), (4,))[0], draws.integers("value", 256, (4,))[0]
        changed = bytearray(content)
        for at, new in zip(place.tolist(), value.tolist(), strict=True):
            changed[at] = new
        yield (bytes(changed), content[: int(place[0])], content[: int(place[0])] + content[int(place[0]) + 3 :])[i % 3]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_pictures_are_errors_for_people(kind: str) -> None:
    """Every mutation is decoded or refused in one line; nothing else happens."""
    assert kind != "WEBP" or features.check("webp")
    image = Image.fromarray(np.tile(RAW, (4, 4, 1)))
    messages = []
    for content in mutations(encoded(image, kind), 150):
        try:
            assert decode(content, "here").pixels.dtype == np.uint8
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all(message.startswith("here") and "\n" not in message for message in messages)


# -------------------------------------------------------------------------------------------------------------- folders


def remarks(path: Path) -> list[str]:
    return [line.removeprefix(f"{path}: ") for line in open_picture_folder(path).remarks]


def test_classes_are_the_sorted_folders_and_say_nothing(tmp_path: Path) -> None:
    for name in ("dog/b.png", "cat/2.png", "cat/10.png", ".git/x.png", "cat/.hidden.png"):
        put(tmp_path / name)
    found = open_picture_folder(tmp_path)
    assert [os.path.relpath(file, tmp_path) for file in found.files] == ["cat/10.png", "cat/2.png", "dog/b.png"]
    assert (found.labels, found.classes, found.remarks) == ((0, 0, 1), ("cat", "dog"), ())


def test_what_is_left_out_or_taken_otherwise_is_counted(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/a/2.gif", "cat/a/b/3.JPEG", "dog/4.jpg", "cover.png"):
        put(tmp_path / name)
    for name in ("cat/notes.txt", "dog/x.heic", "dog/y.HEIC", "readme"):
        put(tmp_path / name, b"")
    assert remarks(tmp_path) == [
        "pictures left out, in no class folder: 1, such as cover.png",
        "pictures below a class folder, which are of that class: 2",
        "files left out, without a suffix of pictures: 4 (2 .heic, 1 without a suffix, 1 .txt)",
        ".gif pictures, of which the first frame is taken: 1",
    ]
    assert open_picture_folder(tmp_path).labels == (0, 0, 0, 1)


def test_a_folder_without_classes_is_one_class(tmp_path: Path) -> None:
    for name in ("1.png", "2.png", "small/3.png"):
        put(tmp_path / name)
    found = open_picture_folder(tmp_path)
    assert [Path(file).name for file in found.files] == ["1.png", "2.png"]
    assert (found.labels, found.classes) == ((0, 0), ())
    assert remarks(tmp_path) == [
        "no class folders, so its pictures are one class (2); pictures left out, in folders below: 1"
    ]


@pytest.mark.parametrize(
    ("names", "labels", "classes", "remark"),
    [
        (range(3), [0, 1, 2], 3, None),
        (range(12), list(range(12)), 12, "the names of its folders are numbers, and so are the labels: 0 to 11"),
        ((3, 7), [3, 7], 8, "the names of its folders are numbers, and so are the labels: 3 to 7"),
        ((1998, 2005, 2010), [0, 1, 2], 3, "the names of its folders are numbers, and labels count them: 1998 is 0, 2010 is 2"),
        (("2", "10", "ten"), [0, 1, 2], 3, None),
        (("1", "01"), [0, 1], 2, None),
        ((99_999_999_999, 5), [0, 1], 2, "the names of its folders are numbers, and labels count them: 5 is 0, 99999999999 is 1"),
    ],
    ids=["few", "twelve", "gaps", "years", "words", "twice", "huge"],
)  # fmt: skip
def test_numbers_sort_as_numbers(tmp_path: Path, names: Any, labels: list[int], classes: int, remark: str) -> None:
    for name in names:
        put(tmp_path / str(name) / "x.png")
    found = open_picture_folder(tmp_path)
    assert (sorted(found.labels), len(found.classes)) == (labels, classes)
    assert remarks(tmp_path) == ([] if remark is None else [remark])
    if remark and "so are" in remark:
        assert [int(Path(file).parent.name) for file in found.files] == list(found.labels)
        assert found.classes[labels[-1]] == str(labels[-1])


def test_of_splits_that_of_training_is_taken(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "train/dog/2.png", "Val/cat/3.png"):
        put(tmp_path / name)
    found = open_picture_folder(tmp_path)
    assert (found.root, found.labels, found.classes) == (tmp_path / "train", (0, 1), ("cat", "dog"))
    assert remarks(tmp_path) == [f"the split train of Val, train is taken; name {tmp_path}/Val for another"]
    assert open_originals(str(tmp_path)).fingerprint == open_originals(str(tmp_path / "train")).fingerprint
    (tmp_path / "train").rename(tmp_path / "test")
    with pytest.raises(UserError, match="holds the splits Val, test: name one of them, such as"):
        open_picture_folder(tmp_path)
    (tmp_path / "test").rename(tmp_path / "bus")
    assert open_picture_folder(tmp_path).classes == ("Val", "bus")


def test_links_that_loop_are_met_once(tmp_path: Path) -> None:
    put(tmp_path / "cat" / "1.png")
    put(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "cat" / "back").symlink_to(tmp_path / "cat")
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    found = open_picture_folder(tmp_path)
    names = [os.path.relpath(file, tmp_path) for file in found.files]
    assert names == ["cat/1.png", "cat/up/elsewhere/2.png", "elsewhere/2.png"]
    assert found.labels == (0, 0, 1)


@pytest.mark.parametrize("kind", ["pipe", "broken", "loop"])
def test_a_picture_that_is_no_file_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    put(tmp_path / "1.png")
    odd = tmp_path / "2.png"
    if kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to(odd if kind == "loop" else tmp_path / "gone.png")
    with pytest.raises(UserError, match="is a pipe" if kind == "pipe" else "is a link to nothing"):
        read_originals(str(tmp_path))


def test_names_that_are_not_utf_8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    for name in (b"/\xff.png", b"/b.png"):
        Path(os.fsdecode(folder + name)).write_bytes(encoded(RAW))
    Path(os.fsdecode(folder + b"/\xfe.tx\xfe")).touch()
    found = open_originals(str(tmp_path))
    assert found.classes == ("caf\\udce9",)
    assert all(line.encode("utf-8") for line in found.remarks)
    assert len(read_originals(str(tmp_path)).pixels) == 2
    Path(os.fsdecode(folder + b"/\xff.png")).write_bytes(b"")
    with pytest.raises(UserError, match="cannot be decoded"):
        read_originals(str(tmp_path))


def test_one_coloured_picture_makes_a_set_coloured(tmp_path: Path) -> None:
    for i in range(3):
        put(tmp_path / f"{i}.png", encoded(RAW[..., 0]))
    assert read_originals(str(tmp_path)).pixels.shape == (3, 5, 7, 1)
    put(tmp_path / "3.png")
    found = read_originals(str(tmp_path)).pixels
    assert found.shape == (4, 5, 7, 3)
    assert np.array_equal(found[2], RAW[..., :1].repeat(3, -1))
    assert np.array_equal(found[3], RAW)


def test_sizes_are_brought_to_one_and_counted(tmp_path: Path) -> None:
    sizes = ((500, 349), (8, 20), (16, 16))
    pixels = [
        Randomness(i).at(0, 0, 1).integers("p", 256, (h, w, 3))[0].astype(np.uint8) for i, (w, h) in enumerate(sizes)
    ]
    for i, values in enumerate(pixels):
        put(tmp_path / f"{i}.png", encoded(values))
    with pytest.raises(UserError, match=r"1\.png is 8 x 20, and the first .* 500 x 349: .* --set data\.size=64$"):
        read_originals(str(tmp_path))
    found = read_originals(str(tmp_path), 16)
    wanted = [np.asarray(centre_crop(Image.fromarray(values), 16)) for values in pixels]
    assert np.array_equal(found.pixels, np.stack(wanted))
    assert list(found.remarks[1:]) == [
        f"{tmp_path}: pictures cropped to 16 x 16: 1 of 3",
        f"{tmp_path}: pictures enlarged to 16 x 16: 1 of 3",
    ]


# ----------------------------------------------------------------------------------------------------------------- tars


def header(size: bytes, kind: bytes = b"0", name: bytes = b"a.png") -> bytes:
    """A block that describes an entry; size: its field of twelve bytes."""
    info = tarfile.TarInfo(name.decode())
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157], block[148:156] = size, kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def in_tar(*names: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            content = encoded(RAW) if name.endswith(".png") else b"0"
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


NEGATIVE, HUGE = b"\xff" * 11 + b"\x00", b"\x80" + b"\x00" * 3 + b"\x7f" + b"\xff" * 7
GOOD = in_tar("a.png", "a.cls")
SECOND = next(i for i in range(512, len(GOOD), 512) if GOOD[i : i + 5] == b"a.cls")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(NEGATIVE) + bytes(1024), "a.png has -256 bytes"),
        (header(HUGE) + bytes(1024), "is damaged: a.png has"),
        (header(NEGATIVE, b"5") + bytes(1024), "is damaged: a.png has -256 bytes"),
        (header(HUGE, b"L") + bytes(1024), "cannot be read as a tar"),
        (header(HUGE, b"x") + bytes(1024), "cannot be read as a tar"),
        (header(b"%011o\0" % 512, b"L") * 5000, "cannot be read as a tar"),
        (GOOD[:SECOND] + b"\x07" * 512 + bytes(1024), f"is damaged: at byte {SECOND} there is no header"),
        (in_tar("a.png", "a.cls", "a.jpg.png"), None),
        (in_tar("a.png"), "a has no label"),
    ],
    ids=["negative", "huge", "negative-folder", "long-name", "pax", "chain", "middle", "other-suffix", "no-label"],
)
def test_odd_tars(tmp_path: Path, content: bytes, message: str | None) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    if message is None:
        assert len(open_originals(f"webdataset:{tmp_path / 'x.tar'}")) == 1
        return
    with pytest.raises(UserError) as caught:
        open_originals(f"webdataset:{tmp_path / 'x.tar'}")
    assert message in str(caught.value)


def test_a_label_of_many_digits_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in (("a.png", encoded(RAW)), ("a.cls", b"9" * 30)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with pytest.raises(UserError, match=r"a\.cls: wanted a label, a whole number from 0 to 2,147,483,647; got 9999"):
        open_originals(f"webdataset:{tmp_path / 'x.tar'}")


def test_tars_have_names_that_are_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(GOOD.replace(b"a.png", b"\xe9.png").replace(b"a.cls", b"\xe9.cls"))
    content = bytearray((tmp_path / "x.tar").read_bytes())
    for begin in (0, SECOND):  # the sum of the bytes of a header
        content[begin + 148 : begin + 156] = b" " * 8
        content[begin + 148 : begin + 156] = b"%06o\0 " % sum(content[begin : begin + 512])
    (tmp_path / "x.tar").write_bytes(content)
    found = read_originals(f"webdataset:{tmp_path / 'x.tar'}")
    assert np.array_equal(found.pixels[0], RAW)
