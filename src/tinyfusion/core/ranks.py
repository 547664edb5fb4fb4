"""Output files written by several ranks (samples, latents, checkpoints). Rank 0 waits for all and completes the output.

Ranks share only the file system, so no collective operation waits for a slow or ended rank.

1. Rank 0 creates the folder; the others wait for it (`wait_until`).
2. Each rank writes its files under hidden names and renames each when it is complete (`complete_file`).
3. Rank 0 waits for the files of all ranks as long as any of them grows (`wait_for_files`), then verifies and joins them.

An interrupted job leaves complete files. A later run, with any number of ranks, writes the missing ones.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import check_plain
from tinyfusion.core.signals import check_stop

_POLL_S = 0.05
_AGAIN = "start the same command again, with any number of processes"


def check_overwrite(out: Path, recorded: bool, overwrite: bool, world: int) -> None:
    """Raise UserError where several processes would write anew what one of them removes. recorded: whether a run is there."""
    if overwrite and world > 1 and recorded:
        raise UserError(
            "--overwrite of several processes: one would write files that another removes; remove "
            f"{out} first, or start anew with one process"
        )


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A hidden path next to `path` to write to; it is renamed to `path` when the block succeeds, and removed when it fails.

    The folder is not created: it belongs to rank 0. Raises UserError where it was removed.
    """
    temporary = path.with_name(f".{path.name}.part")
    for place in (path, temporary):
        check_plain(place)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, FileNotFoundError):
            raise _removed(path.parent) from error
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)
        raise


def wait_until(is_begun: Callable[[], bool], output: Path, timeout_s: float) -> None:
    """Wait until rank 0 has begun `output`. Raises UserError after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while not is_begun():
        if time.monotonic() > deadline:
            late = f"process 0 did not begin {output} within {timeout_s:g} s"
            raise UserError(f"{late}: look at its output, and start all of WORLD_SIZE processes with one --out")
        time.sleep(_POLL_S)
        check_stop()


def wait_for_files(
    writers: Mapping[Path, int], world: int, timeout_s: float, is_complete: Callable[[Path], bool] = Path.is_file
) -> None:
    """Wait until all files are complete. writers: the rank that writes each file, of `world` ranks.

    Raises UserError, which names the ranks, where nothing was written to the folders of the files for `timeout_s` seconds.
    """
    missing, since = list(writers), time.monotonic()
    sizes: dict[str, int] = {}
    while missing := [path for path in missing if not is_complete(path)]:
        if (now := _file_sizes({path.parent for path in missing})) != sizes:
            sizes, since = now, time.monotonic()
        elif time.monotonic() - since > timeout_s:
            late = ", ".join(map(str, sorted({writers[path] for path in missing})))
            lack = f"{len(missing)} of {len(writers)} files are missing ({missing[0]})"
            cause = f"process {late} of {world} has ended, hangs or sees another folder"
            problem = f"{lack} and nothing was written for {timeout_s:g} s: {cause}"
            raise UserError(f"{problem}; see its output, then {_AGAIN} (compute.timeout_s allows more)")
        time.sleep(_POLL_S)
        check_stop()


def _file_sizes(folders: Iterable[Path]) -> dict[str, int]:
    """Sizes of all files in some folders, complete or not. Raises UserError where a folder was removed."""
    sizes = {}
    for folder in folders:
        try:
            names = os.listdir(folder)
        except FileNotFoundError as error:
            raise _removed(folder) from error
        for name in names:
            try:
                sizes[f"{folder}/{name}"] = os.stat(folder / name).st_size
            except FileNotFoundError:  # it was renamed just now
                continue
    return sizes


def _removed(folder: Path) -> UserError:
    return UserError(f"{folder} was removed while it was being written: {_AGAIN}")
