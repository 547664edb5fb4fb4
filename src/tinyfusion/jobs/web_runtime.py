"""onnxruntime-web, which runs networks in browsers: the pinned npm package, its cache, and the files that a page needs."""

from __future__ import annotations

import base64
import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from tinyfusion.core.errors import UserError
from tinyfusion.core.fetching import WouldFetch, fetching_forbidden
from tinyfusion.core.files import atomic_write, check_writable
from tinyfusion.core.progress import say
from tinyfusion.core.reading import check_plain
from tinyfusion.core.weights import cache_folder

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
# of the packed package, as `npm view onnxruntime-web@1.30.0 dist.integrity` says
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# the build for processors alone, its glue, and the smallest script in front of them
FILES = ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
# SHA-256 of these files in that package: an unpacked package has no other mark
_SUMS = {
    "ort.wasm.min.js": "faece07e84faa9001f5104bbe4e5c70861d06cb2376a0dea1fa0ad33a67adc81",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
_PACKED_BYTES = 33_106_585
_TIMEOUT_S = 600.0  # of npm


def runtime_files(given: Path | None) -> dict[str, bytes]:
    """`FILES` of the pinned package, by name.

    given: the package as `npm pack` writes it, or a folder with it, packed or unpacked; None: from the cache, else by npm. Raises
    UserError where it is not there, is another version or damaged, and where npm is missing or fails; WouldFetch in a dry run.
    """
    if given is not None:
        return _read(given)
    cached = cache_folder() / PACKAGE / f"{PACKAGE}-{VERSION}.tgz"
    if not cached.is_file():
        if fetching_forbidden():
            raise WouldFetch(f"{PACKAGE} {VERSION} by npm", _PACKED_BYTES)
        _fetch(cached)
    return _of_archive(cached)


def _read(given: Path) -> dict[str, bytes]:
    check_plain(given)
    if given.is_file():
        return _of_archive(given)
    packed = given / f"{PACKAGE}-{VERSION}.tgz"
    if packed.is_file():
        return _of_archive(packed)
    inside = (given, given / "dist", given / "package" / "dist", given / "node_modules" / PACKAGE / "dist")
    folder = next((each for each in inside if (each / FILES[0]).is_file()), None)
    if folder is None:
        raise UserError(
            f"--runtime wants {packed.name}, as `npm pack {PACKAGE}@{VERSION}` writes it, or a folder with it, packed or unpacked; "
            f"got {given}"
        )
    return _checked({name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}, folder)


def _of_archive(path: Path) -> dict[str, bytes]:
    """The files of a packed package. Raises UserError unless it is the pinned one, byte for byte."""
    content = path.read_bytes()
    sum = f"sha512-{base64.b64encode(hashlib.sha512(content).digest()).decode()}"
    if sum != INTEGRITY:
        raise UserError(
            f"{path} is not {PACKAGE} {VERSION}: wanted {INTEGRITY[:20]}..., got {sum[:20]}...; remove it, or give another --runtime"
        )
    found = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for name in FILES:
            member = archive.extractfile(f"package/dist/{name}")
            assert member is not None, "the pinned package has these files"
            found[name] = member.read()
    return found


def _checked(files: dict[str, bytes], folder: Path) -> dict[str, bytes]:
    """The files. Raises UserError on another version, a missing or a changed file."""
    for name in FILES:
        if name not in files or hashlib.sha256(files[name]).hexdigest() != _SUMS[name]:
            wrong = "is missing" if name not in files else f"is not that of {PACKAGE} {VERSION}"
            raise UserError(f"{folder / name} {wrong}: `npm pack {PACKAGE}@{VERSION}` gives it; or leave out --runtime")
    return files


def _fetch(path: Path) -> None:
    """Obtain the packed package by npm, as the user has configured it, into `path`."""
    alone = f"or give --runtime PATH, with the output of `npm pack {PACKAGE}@{VERSION}` from another machine"
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"the page needs {PACKAGE} {VERSION} of npm, and there is no npm: install Node.js, {alone}")
    check_writable(path)
    say([f"fetching {PACKAGE} {VERSION} by npm, {_PACKED_BYTES / 2**20:.0f} MiB, into {path.parent}"])
    with tempfile.TemporaryDirectory() as folder:
        failure = _packed([npm, "pack", f"{PACKAGE}@{VERSION}", "--pack-destination", folder])
        packed = next(Path(folder).glob("*.tgz"), None)
        if failure or packed is None:
            raise UserError(
                f"npm did not give {PACKAGE} {VERSION} ({failure or 'no file'}): see `npm config list`, {alone}"
            )
        _of_archive(packed)
        with atomic_write(path) as temporary:
            shutil.copyfile(packed, temporary)


def _packed(command: list[str]) -> str:
    """Why npm failed, in one line; empty if it did not."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer within {_TIMEOUT_S:.0f} s"
    except OSError as error:
        return str(error)
    if ran.returncode == 0:
        return ""
    errors = [
        line.removeprefix("npm error").strip() for line in ran.stderr.splitlines() if line.startswith("npm error")
    ]
    return next((line for line in errors if line and not line.startswith("code ")), f"exit code {ran.returncode}")
