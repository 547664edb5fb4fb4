"""Mutations of files for `fuzz.py`: of bytes for every format, and of the structure of those that have one.

Each mutation takes the path of a file that it may change and a seeded `random.Random`; all changes come from it.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fuzz_media import ABSURD, change_parquet, change_picture, change_tar, place

Mutation = Callable[[Path, random.Random], None]
BOMB_BYTES = 1_500_000_000  # what a bomb inflates to; more than the memory that a case may use

# ------------------------------------------------------------------------------------------------------------------ bytes


def flip_bits(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 1, 4, 32)) if content else 0):
        content[place(chance, len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: place(chance, len(content))] if content else b"")


def repeat_piece(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    first = place(chance, len(content)) if content else 0
    piece = content[first : first + chance.choice((1, 16, 512))]
    path.write_bytes(content[:first] + piece * chance.choice((2, 9, 300)) + content[first:])


def erase_piece(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    first = place(chance, len(content)) if content else 0
    piece = content[first : first + chance.choice((1, 8, 64, 4096))]
    content[first : first + len(piece)] = chance.choice((b"\0", b"\xff", b"9")) * len(piece)
    path.write_bytes(content)


def replace_file(path: Path, chance: random.Random) -> None:
    """Replace a file by nothing, a folder, a pipe, a broken link, text, or another format."""
    path.unlink()
    kind = chance.randrange(7)
    if kind == 0:
        return
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.symlink_to(path.name)
    else:
        path.write_bytes(
            chance.choice((b"", b"\0" * 4096, "Grüße\n".encode(), b"\xff\xfe", b"null", b"PK\x05\x06" + b"\0" * 18))
        )


BYTES: tuple[Mutation, ...] = (flip_bits, truncate, repeat_piece, erase_piece, replace_file)

# ------------------------------------------------------------------------------------------------------------ JSON and TOML

_RAW = (
    "9" * 5000,
    "[" * 100_000,
    "[" * 2_000 + "]" * 2_000,
    '{"a":' * 2_000 + "1" + "}" * 2_000,
    "-",
    "1e999",
    '"\\ud800"',
)
_MARK = "<raw value>"


def change_json(path: Path, chance: random.Random) -> None:
    """Replace, remove or move a value, up to three times, also by extreme values."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    index = chance.randrange(len(lines))
    lines[index] = changed_json(lines[index], chance)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def changed_json(text: str, chance: random.Random) -> str:
    value = json.loads(text)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        value = changed_value(value, chance)
    return json.dumps(value).replace(json.dumps(_MARK), chance.choice(_RAW))


def changed_value(value: Any, chance: random.Random) -> Any:
    places = [(None, None), *_places(value)]
    holder, key = places[chance.randrange(len(places))] if chance.random() < 0.97 else places[0]
    new = _MARK if chance.random() < 0.1 else chance.choice(ABSURD)
    if holder is None:
        return new if chance.random() < 0.3 or not isinstance(value, dict) else {**value, "another": new}
    action = chance.randrange(8)
    if action == 0:
        del holder[key]
    elif action == 1:
        holder[key] = [holder[key]]
    elif action == 2:
        holder[key] = str(holder[key])
    elif action == 3 and isinstance(holder[key], int | float):
        holder[key] = chance.choice((-holder[key], holder[key] + 1, holder[key] * 10**9, float(holder[key])))
    else:
        holder[key] = new
    return value


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in [(value, key), *_places(inner)]]


def change_toml(path: Path, chance: random.Random) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    settings = [i for i, line in enumerate(lines) if "=" in line]
    value = chance.choice((
        *_RAW, "1e18", "-1", "nan", "inf", "true", "[]", '""', "'../x'", '"\\u0000"', "[[1]]", "{}", "{a.b.c=1}", "1979-05-27",
        '"http://127.0.0.1:9/x%2e%2e%2fy"', '"http://[::1"', '"file:///etc/passwd"', "1000000000000000000", '"""',
    ))  # fmt: skip
    index = chance.choice(settings)
    key = lines[index].partition("=")[0]
    lines[index] = chance.choice(
        (f"{key}= {value}", f"{key.strip()}.a = 1", f"[{key.strip()}]", f"x{key}= 1", key, f"[[{key.strip()}]]")
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- safetensors


def change_safetensors(path: Path, chance: random.Random) -> None:
    """Change the header, or its stated length."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, values = content[8 : 8 + size], content[8 + size :]
    action = chance.randrange(6)
    if action == 0:
        length = chance.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little")
        path.write_bytes(length + header + values)
        return
    if action == 1:
        tensors = json.loads(header)
        names = [name for name in tensors if name != "__metadata__"]
        old = chance.choice(names)
        tensors[_other_name(old, chance)] = tensors.pop(old)
        changed = json.dumps(tensors)
    elif action == 2:
        tensors = json.loads(header)
        name = chance.choice([name for name in tensors if name != "__metadata__"])
        tensors[name]["shape"] = chance.choice(
            ([2**40], [2**63], [], [0], [-1], [1, 2, 3], tensors[name]["shape"][::-1])
        )
        changed = json.dumps(tensors)
    elif action == 3:
        tensors = json.loads(header)
        name = chance.choice([name for name in tensors if name != "__metadata__"])
        tensors[name]["dtype"] = chance.choice(("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "X", ""))
        changed = json.dumps(tensors)
    else:
        changed = changed_json(header.decode(), chance)
    text = changed.encode("utf-8", "surrogatepass")
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)


def _other_name(name: str, chance: random.Random) -> str:
    number = chance.choice(("1000000000000", "-1", "99", "x", "007", "٣", ""))
    return chance.choice(
        (re.sub(r"\d+", number, name, count=1), name + ".x", f"module.{name}", "", "\0", name.upper(), "a/../b")
    )


# ------------------------------------------------------------------------------------------------------------ npy and npz


def change_npy(path: Path, chance: random.Random) -> None:
    path.write_bytes(changed_npy(path.read_bytes(), chance))


_ARRAYS: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    lambda a: a.astype(np.uint64) + np.uint64(2**63),
    lambda a: a.astype(np.float64) * np.nan,
    lambda a: a.astype(bool),
    lambda a: a.astype(complex),
    lambda a: a.astype("U8"),
    lambda a: a.astype("S3"),
    lambda a: a.astype("M8[s]"),
    lambda a: a.astype(">i8"),
    lambda a: a.astype(np.float16),
    lambda a: a.astype(np.float64) * 1e300,
    lambda a: a[..., None],
    lambda a: a[:0],
    lambda a: a.reshape(-1),
    lambda a: np.asfortranarray(a),
    lambda a: np.zeros((), a.dtype),
    lambda a: np.zeros(a.shape, [("x", "u1"), ("y", "f4")]),
    lambda a: -a.astype(np.int64) - 1,
    lambda a: a.astype(np.int64) + 2**40,
    lambda a: np.array([{"x": 1}, None], dtype=object),
)


def changed_npy(content: bytes, chance: random.Random) -> bytes:
    """Another header, dtype or shape of the array, or a small file of a large array."""
    if chance.random() < 0.4:
        array = np.load(io.BytesIO(content), allow_pickle=False)
        stream = io.BytesIO()
        with np.errstate(all="ignore"):
            np.lib.format.write_array(stream, chance.choice(_ARRAYS)(array), allow_pickle=True)
        return stream.getvalue()
    (size,) = struct.unpack("<H", content[8:10])
    header, values = content[10 : 10 + size].decode("latin1"), content[10 + size :]
    shape = chance.choice((
        "(10000000000,)", f"({10**30},)", "(-1,)", "(True,)", "(1.5,)", "((((", "(" * 300, "()", "None", "'x'", "(0,)",
        f"({10**9}, {10**9})",
        "(16, 8, 8, 1000000000)", "(1000000000000, 0)", "[16, 8]", "(4, 4, 4, 4, 4, 4)",
    ))  # fmt: skip
    descr = chance.choice((
        "'|O'", "'<f8'", "'|V1000000000'", "'<U1000000000'", "[('a', '<f4')]", "'<x9'", "[]", "7", "'|b1'", "'<c8'", "'>u8'",
    ))  # fmt: skip
    action = chance.randrange(6)
    if action == 0:
        header = re.sub(r"'descr': [^,]+", lambda _: f"'descr': {descr}", header)
    elif action == 1:
        header = chance.choice(
            ("{" * 500, "", "{}", "__import__('os').system('touch code-has-run')", "{'shape': (1,)}", "9" * 5000, "\0")
        )
    elif action == 2:
        magic = chance.choice((b"\x03\x00", b"\x02\x00", b"\x09\x09", b"\x00\x00"))
        return content[:6] + magic + content[8:]
    elif action == 3:
        return content[:8] + chance.choice((b"\xff\xff", b"\0\0", b"\x01\0")) + content[10:]
    else:
        header = re.sub(r"'shape': \([^)]*\)", lambda _: f"'shape': {shape}", header)
    text = header.encode("latin1")
    return content[:8] + struct.pack("<H", len(text)) + text + values


def change_npz(path: Path, chance: random.Random) -> None:
    """Other members, other content or directory entry of a member, or one that decompresses to a large size."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = chance.choice(sorted(members))
    action = chance.randrange(9)
    if action == 0:
        members[chance.choice(("arr_7.npy", "../x.npy", "/x.npy", name.removesuffix(".npy"), "a" * 60_000, ""))] = (
            members.pop(name)
        )
    elif action == 1:
        members[name] = chance.choice((b"", b"no array", members[name][:20], os.urandom(0) + bytes(range(256))))
    elif action == 2:
        shutil.copyfile(_bomb(), path)
        return
    elif action == 3:
        members = {name: members[name]}
    else:
        members[name] = changed_npy(members[name], chance)
    method = chance.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(path, "w", method) as archive:
        for member, content in members.items():
            archive.writestr(zipfile.ZipInfo(member), content, method)
    if action == 8:
        _falsify_zip(path, chance)


def _falsify_zip(path: Path, chance: random.Random) -> None:
    """Change sizes, checksums, methods or flags in the central directory."""
    content = bytearray(path.read_bytes())
    entry = content.find(b"PK\x01\x02")
    offset, length = chance.choice(((10, 2), (8, 2), (16, 4), (20, 4), (24, 4), (42, 4), (28, 2)))
    content[entry + offset : entry + offset + length] = chance.choice(
        (b"\xff" * length, b"\0" * length, b"\x01" + b"\0" * (length - 1))
    )
    path.write_bytes(content)


def _bomb() -> Path:
    """A small npz file whose images decompress to many zeros and whose labels do not fit."""
    path = SCRATCH / "bomb.npz"
    if path.exists():
        return path
    side = 2_000
    num = BOMB_BYTES // side**2
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("arr_0.npy", "w") as file:
            np.lib.format.write_array_header_1_0(
                file, dict(descr="|u1", fortran_order=False, shape=(num, side, side, 1))
            )
            for _ in range(num):
                file.write(bytes(side**2))
        stream = io.BytesIO()
        np.lib.format.write_array(stream, np.full(3, -1, np.int64))
        archive.writestr("arr_1.npy", stream.getvalue())
    return path


SCRATCH = Path()  # where bombs are kept; set by the harness

# ------------------------------------------------------------------------------------------------------------ torch's files


class _Touch:
    """An object whose pickle is a call that creates a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch code-has-run",)


def change_torch(path: Path, chance: random.Random) -> None:
    """Another state dict: unusual names, shapes, dtypes and nesting, truncated values, and code."""
    try:
        state = torch.load(path, weights_only=False)["model"]  # made by the harness
    except (RuntimeError, TypeError):  # a script and no state dict
        return flip_bits(path, chance)
    name = chance.choice(sorted(state))
    old = state[name]
    values: tuple[Callable[[], Any], ...] = (
        lambda: torch.zeros(()).expand(10**6, 10**6),
        lambda: torch.zeros(1).expand(2**40),
        lambda: torch.empty(10**6, 10**6, device="meta"),
        lambda: torch.sparse_coo_tensor(torch.zeros((2, 1), dtype=torch.int64), torch.ones(1), (10**9, 10**9)),
        lambda: torch.full_like(old, float("nan")),
        lambda: old.to(
            chance.choice(
                (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.complex64, torch.bool, torch.uint8)
            )
        ),
        lambda: old.reshape(-1),
        lambda: old[:0],
        lambda: torch.zeros(()),
        lambda: torch.nn.Parameter(old),
        lambda: old.tolist(),
        lambda: chance.choice(ABSURD),
        lambda: _Touch(),
        lambda: torch.quantize_per_tensor(old.float(), 0.1, 0, torch.quint8),
    )
    action = chance.randrange(5)
    if action == 0:
        state[_other_name(name, chance)] = state.pop(name)
    elif action == 1:
        del state[name]
    elif action == 2:
        deep: Any = state
        for _ in range(chance.choice((1, 3, 200))):
            deep = {chance.choice(("model", "state_dict", "ema", 3)): deep}
        state = deep
    else:
        state[name] = chance.choice(values)()
    wrapped = {"model": state, "ema": chance.choice((None, {}, state))} if chance.random() < 0.5 else state
    torch.save(wrapped, path, _use_new_zipfile_serialization=chance.random() < 0.8)
    return None


FORMATS: dict[str, Mutation] = {
    ".json": change_json, ".jsonl": change_json, ".toml": change_toml, ".safetensors": change_safetensors, ".npy": change_npy,
    ".npz": change_npz, ".parquet": change_parquet, ".tar": change_tar, ".png": change_picture, ".pt": change_torch,
}  # fmt: skip


def mutate(path: Path, chance: random.Random) -> str:
    """Change a file by its format or as bytes; return the name of the mutation."""
    mutation = FORMATS.get(path.suffix)
    if mutation is None or chance.random() < 0.35:
        mutation = chance.choice(BYTES)
    before = path.read_bytes()
    try:
        mutation(path, chance)
    except Exception:  # a format's own writer may refuse such values; the bytes of the file never do
        path.write_bytes(before)
        mutation = chance.choice(BYTES)
        mutation(path, chance)
    return mutation.__name__
