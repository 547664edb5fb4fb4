"""Mutations of parquet files, tar archives and pictures for `fuzz.py`, and extreme values for all formats."""

from __future__ import annotations

import io
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ABSURD: tuple[Any, ...] = (
    10**18, 10**12, 2**31, 2**63, -1, 0, 1, 1.5, -0.0, 1e308, float("nan"), float("inf"), True, False, None, "", "x", "../../x",
    "\0", "a" * 100_000, "1e18", [], [[]], [[[[1]]]], {}, {"": None}, [1, 2, 3], [10**18] * 4, [{}], [None], {"a": {"b": []}},
)  # fmt: skip


def place(chance: random.Random, size: int) -> int:
    """An index below `size`, often near one of the ends, where formats keep their headers."""
    near = min(size, 200)
    return chance.choice((chance.randrange(size), chance.randrange(near), size - 1 - chance.randrange(near)))


def change_parquet(path: Path, chance: random.Random) -> None:
    """Labels or pictures of another type, twin columns, other names, or a column of one value many times."""
    table = pq.read_table(path)
    labels, pictures, num = table["label"].to_pylist(), table["image"].to_pylist(), len(table)
    columns: dict[str, Any] = {"image": pictures, "label": labels}
    odd: tuple[Callable[[], Any], ...] = (
        lambda: pa.array([2**64 - 1 - i for i in labels], pa.uint64()),
        lambda: pa.array([2**62] * num, pa.timestamp("s")),
        lambda: pa.array([2**40] * num, pa.date64()),
        lambda: pa.array([2**30] * num, pa.date32()),
        lambda: pa.array([2**62] * num, pa.duration("us")),
        lambda: pa.array([2**40] * num, pa.int64()),
        lambda: pa.array([2**62] * num, pa.int64()),
        lambda: pa.array([float("nan")] * num),
        lambda: pa.array([None] * num, pa.int64()),
        lambda: pa.array([-1] * num, pa.int8()),
        lambda: pa.array([True] * num),
        lambda: pa.array([str(i) for i in labels]).dictionary_encode(),
        lambda: pa.array([b"\xff\xfe"] * num),
        lambda: pa.array([[i] for i in labels]),
        lambda: pa.array([{"bytes": {"bytes": b"x"}}] * num),
        lambda: pa.array([{"x": 1}] * num),
        lambda: pa.array([1] * num, pa.decimal256(70, 3)),
        lambda: pa.nulls(num),
    )
    name = chance.choice(("image", "label"))
    action = chance.randrange(7)
    if action == 0:
        made = pa.Table.from_arrays(
            [table["image"], table["label"], table["label"], table["image"]], ["image", "label", "label", "image"]
        )
    elif action == 1:
        made = table.rename_columns(
            chance.choice((["img", "fine_label"], ["", "label"], ["image", "x"], ["image.bytes", "label"]))
        )
    elif action == 2:
        about = json.dumps(chance.choice(ABSURD)).encode()
        made = table.rename_columns(["a", "b"]).replace_schema_metadata({b"huggingface": about})
    elif action == 3:
        many = 50_000_000
        run = pa.RunEndEncodedArray.from_arrays(pa.array([many], pa.int32()), pa.array([3]))
        made = pa.table({"label": pa.compute.run_end_decode(run)}).append_column("image", pa.nulls(many, pa.binary()))
    elif action == 4:
        made = pa.table({"image": [{"bytes": picture_bytes(chance)} for _ in labels], "label": labels})
    else:
        columns[name] = chance.choice(odd)()
        made = pa.table(columns)
    rows = None if len(made) > 10**6 else chance.choice((1, 4, None))
    pq.write_table(made, path, row_group_size=rows, compression=chance.choice(("snappy", "gzip", "zstd", "none")))


def picture_bytes(chance: random.Random) -> bytes:
    """An encoded picture of an unusual mode or shape, or with a wrong header."""
    if chance.random() < 0.2:
        return _huge_png(chance.choice((13_000, 100_000, 2**31 - 1)))
    mode, form = chance.choice((
        ("I;16", "PNG"), ("LA", "PNG"), ("P", "GIF"), ("RGBA", "WEBP"), ("CMYK", "JPEG"), ("F", "TIFF"), ("1", "TIFF"), ("L", "BMP"),
        ("RGB", "TIFF"), ("RGB", "PPM"), ("CMYK", "TIFF"), ("P", "PNG"), ("RGB", "JPEG2000"), ("RGB", "ICO"),
    ))  # fmt: skip
    size = chance.choice(((16, 16), (1, 1), (1, 3000), (17, 23)))
    stream = io.BytesIO()
    try:
        Image.new(mode, size).save(stream, format=form)
    except (OSError, KeyError, ValueError):
        Image.new("RGB", size).save(stream, format="PNG")
    content = bytearray(stream.getvalue())
    for _ in range(chance.choice((0, 0, 1, 5))):
        content[place(chance, len(content))] ^= 1 << chance.randrange(8)
    return bytes(content)


def _huge_png(side: int) -> bytes:
    """A PNG whose header states a large square; at 13,000 pixels it contains all of it."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    rows = zlib.compress(bytes((side + 1) * side), 9) if side < 20_000 else zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


def change_picture(path: Path, chance: random.Random) -> None:
    if chance.random() < 0.3:
        Image.open(path).save(path.with_suffix(chance.choice((".gif", ".tiff", ".bmp", ".webp", ".jpg", ".ppm"))))
        path.unlink()
    else:
        path.write_bytes(picture_bytes(chance))


def change_tar(path: Path, chance: random.Random) -> None:
    """Change header fields and their checksum, or add members of unusual kinds and names."""
    if chance.random() < 0.6:
        content = bytearray(path.read_bytes())
        heads = [i for i in range(0, len(content) - 512, 512) if content[i + 257 : i + 262] == b"ustar"]
        head = chance.choice(heads)
        first, length = chance.choice(
            ((124, 12), (124, 12), (124, 12), (100, 8), (108, 8), (136, 12), (156, 1), (0, 100), (157, 100), (345, 155))
        )
        value = chance.choice((
            b"77777777777\0", b"-0000000001\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"99999999999\0",
            b"\0" * 12, b" " * 12, b"1S", b"../../x\0", b"L", b"x",
        ))  # fmt: skip
        content[head + first : head + first + length] = value[:length].ljust(length, b"\0")
        content[head + 148 : head + 156] = b" " * 8
        content[head + 148 : head + 156] = b"%06o\0 " % sum(content[head : head + 512])
        path.write_bytes(content)
        return
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers() if m.isfile()]  # type: ignore[union-attr]
    index = chance.randrange(len(members))
    name, content = members[index]
    odd: tuple[bytes, ...] = (
        b"",
        b"\xff\xfe",
        b"9" * 5000,
        b"-1",
        b"1.5",
        b"99999999999999999999",
        b"cat",
        picture_bytes(chance),
    )
    members[index] = chance.choice((
        (name, chance.choice(odd)), ("../../" + name, content), (name.replace(".png", ".json"), b"[" * 100_000), ("x" * 300, content),
        (name.replace(".cls", ".txt"), content), (members[0][0], content),
    ))  # fmt: skip
    with tarfile.open(path, "w", format=chance.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.type = (
                chance.choice((tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE))
                if chance.random() < 0.03
                else tarfile.REGTYPE
            )
            tar.addfile(info, io.BytesIO(content))
