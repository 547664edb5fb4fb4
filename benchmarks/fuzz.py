"""Damage files of every format that the command line reads, and check the reaction to each.

    python benchmarks/fuzz.py [--cases 3000] [--seed 0] [--seconds 3600] [--only "images npz"] [--case 17] [--failures FILE]

A case copies a small valid input, changes one file of it (`fuzz_mutations.py`), and runs a command that reads it
(`fuzz_material.py`) in a process forked from this one, which has imported everything. A case passes with exit code 0 or 2 (with
2 the last line, and no other, begins with "error:"), no traceback, warning or "out of memory", less than 1 GiB of memory and 20 s
of processor time, and no change to anything but the output. The process sees 1 GiB as the memory of the machine. Every case is
a function of the seed, its kind and its number, so `--only KIND --case N` repeats it and prints its output.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import os
import pkgutil
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", MPLBACKEND="Agg")

import torch

import fuzz_mutations
from fuzz_material import KINDS, NEVER_WHOLE, Kind, fill
from fuzz_mutations import mutate

MEMORY_BYTES = 2**30
PROCESSOR_S, WALL_S = 20.0, 120.0  # of a case; other work on the machine does not count to the first
HANG_S = 8.0  # without any processor time
_ROOM_BYTES = 6 * 2**30  # of addresses, beyond those of this process
_LARGEST_FILE = 2**31
_LATE = (
    "accelerate",
    "peft",
    "sklearn.datasets",
    "pyarrow.parquet",
    "psutil",
    "torch._dynamo",
    "diffusers.models.autoencoders.autoencoder_kl",
)
_FRAME = re.compile(r'File "[^"]*/tinyfusion/([^"]+)", line (\d+), in (\w+)')


@dataclass
class Case:
    """One damaged input and its outcome."""

    kind: str
    number: int
    command: str
    damaged: str
    code: int = 0
    said: str = ""
    memory_bytes: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def preload() -> None:
    """Import all that a command may need, so that a fork starts at once."""
    import tinyfusion

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in [module.name for module in pkgutil.walk_packages(tinyfusion.__path__, "tinyfusion.")]:
            if not name.endswith("__main__"):
                importlib.import_module(name)
        for name in _LATE:
            importlib.import_module(name)
        with contextlib.suppress(ImportError):
            importlib.import_module("transformers.models.dinov2.modeling_dinov2")
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------------- one process


def run_command(command: str, folder: Path, wall_s: float = WALL_S) -> tuple[int, str, resource.struct_rusage]:
    """Exit code (minus the signal's number), stderr and resources of a command in `folder`, in a forked process."""
    said_in = folder.with_suffix(".stderr")
    began = changed = time.monotonic()
    used = ""
    process = os.fork()
    if process == 0:
        _as_child(command, folder, said_in)
    while True:
        ended, status, usage = os.wait4(process, os.WNOHANG)
        if ended:
            break
        now, latest = time.monotonic(), " ".join(Path(f"/proc/{process}/stat").read_text().split()[13:15])
        used, changed = latest, (changed if latest == used else now)
        if now - began > wall_s or now - changed > HANG_S:
            os.kill(process, signal.SIGKILL)
        time.sleep(0.005)
    said = said_in.read_text(encoding="utf-8", errors="replace")
    said_in.unlink()
    return os.waitstatus_to_exitcode(status), said, usage


def _as_child(command: str, folder: Path, said_in: Path) -> None:
    code = 99
    try:
        os.dup2(os.open(said_in, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os.chdir(folder)
        home = folder / "home"
        os.environ["HOME"] = str(home)
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HOME = str(home / "hub")
        _limit()
        from tinyfusion.cli import main

        code = main(shlex.split(command))
        sys.stdout.flush()
        sys.stderr.flush()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os._exit(code)


def _limit() -> None:
    """Limit address space and file size of this process, and the memory that readers see."""
    from tinyfusion.core import reading

    page = resource.getpagesize()
    size, resident = (int(n) * page for n in Path("/proc/self/statm").read_text().split()[:2])
    resource.setrlimit(resource.RLIMIT_AS, (size + _ROOM_BYTES, size + _ROOM_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, _LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    reading.available_memory_bytes = lambda: MEMORY_BYTES - resident


# ---------------------------------------------------------------------------------------------------------- one case


def snapshot(folder: Path) -> dict[str, tuple[int, ...]]:
    """Kind, size and modification time of every entry of a folder."""
    found = {}
    for path in folder.rglob("*"):
        about = path.lstat()
        found[str(path.relative_to(folder))] = (about.st_mode, 0 if path.is_dir() else about.st_size, about.st_mtime_ns)
    return found


@contextlib.contextmanager
def copied(kind: Kind, material: Path, scratch: Path) -> Iterator[tuple[Path, Path]]:
    """Within the context: the folder of a case and the copy of its input in it."""
    folder = Path(tempfile.mkdtemp(prefix=f"{kind.name.replace(' ', '-')}-", dir=scratch))
    given, source = folder / kind.path, material / kind.path
    given.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, given) if source.is_dir() else shutil.copyfile(source, given)
    (folder / "home").mkdir(exist_ok=True)
    try:
        yield folder, given
    finally:
        shutil.rmtree(folder)


def attempt(kind: Kind, number: int, seed: int, material: Path, scratch: Path, debug: bool = False) -> Case:
    """Run a case and check its outcome."""
    chance = random.Random(f"{seed}/{kind.name}/{number}")
    with copied(kind, material, scratch) as (folder, given):
        files = sorted({path for pattern in kind.files for path in given.glob(pattern) if path.is_file()}) or [given]
        target = chance.choice(files)
        command = chance.choice(kind.commands).format(i=kind.path, m=material)
        damaged = f"{target.relative_to(folder)}: {_mutated(target, chance)}"
        case = Case(kind.name, number, command.replace(str(material), "MATERIAL"), damaged)
        before = snapshot(folder), snapshot(material)
        case.code, case.said, usage = run_command(command + " --debug" * debug, folder)
        case.memory_bytes, case.seconds = usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime
        outputs = ("made", "page.html", "home/hub", *((kind.path.split("/")[0],) if kind.own else ()))
        case.faults = judged(case) + touched(before[0], snapshot(folder), outputs)
        case.faults += [f"material {fault}" for fault in touched(before[1], snapshot(material), ())]
        return case


def failures_of_intact(kinds: Sequence[Kind], material: Path, scratch: Path) -> list[str]:
    """Messages about commands that fail on undamaged input, whose cases would mean nothing."""
    failed = []
    for kind in kinds:
        for command in kind.commands:
            with copied(kind, material, scratch) as (folder, _given):
                code, said, _usage = run_command(command.format(i=kind.path, m=material), folder)
            if code and kind.name not in NEVER_WHOLE:
                failed.append(f"{kind.name}: `{command}` ends with {code} on whole input: {said.strip()}")
    return failed


def _mutated(target: Path, chance: random.Random) -> str:
    """Damage a file in a forked process, whose memory does not count; return the name of the mutation."""
    receiver, sender = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                os.write(sender, mutate(target, chance).encode())
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    os.close(sender)
    with open(receiver, encoding="utf-8") as answer:
        name = answer.read()
    if os.waitpid(process, 0)[1]:
        raise RuntimeError(f"{target} could not be damaged")
    return name


def judged(case: Case) -> list[str]:
    """What is wrong with an outcome."""
    faults = []
    if "Traceback" in case.said or case.code not in (0, 2):
        faults.append(f"exit code {case.code}" + (", traceback" if "Traceback" in case.said else ""))
    lines = case.said.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if case.code == 2 and (len(errors) != 1 or lines[-1] != errors[0]):
        faults.append(f"{len(errors)} error lines")
    if case.code == 2 and "out of memory" in case.said:
        faults.append("out of memory")
    if case.code == 2 and "Warning" in case.said:
        faults.append("a warning")
    if case.memory_bytes >= MEMORY_BYTES:
        faults.append(f"{case.memory_bytes / 2**20:.0f} MiB")
    if case.code == -signal.SIGKILL and case.seconds < PROCESSOR_S:
        faults.append("hangs")
    if case.seconds >= PROCESSOR_S:
        faults.append(f"{case.seconds:.0f} s of processor time")
    return faults


def touched(
    before: dict[str, tuple[int, ...]], after: dict[str, tuple[int, ...]], allowed: tuple[str, ...]
) -> list[str]:
    """Entries that were changed, created or removed outside of `allowed`."""
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    inside = {name for name in changed if not any(name == top or name.startswith(f"{top}/") for top in allowed)}
    folders = {name for name in inside if any(other.startswith(f"{name}/") for other in changed)}
    foreign = sorted(inside - {name for name in folders if name in before and name in after})
    return [f"touched {', '.join(foreign[:3])}"] if foreign else []


# ------------------------------------------------------------------------------------------------------------- report


def place_of(case: Case) -> str:
    """The line of the package where a traceback ends, and its error; else what is wrong."""
    frames = _FRAME.findall(case.said)
    frames = [frame for frame in frames if not frame[0].startswith("cli.py")]
    if "Traceback" in case.said and frames:
        error = next((line for line in reversed(case.said.splitlines()) if re.match(r"[\w.]+(Error|Exception|Interrupt)?:? ?", line)
                      and not line.startswith("error:") and "report it" not in line), "")  # fmt: skip
        return f"src/tinyfusion/{frames[-1][0]}:{frames[-1][1]} {frames[-1][2]}: {error[:100]}"
    return "; ".join(re.sub(r"\d+ (MiB|s\b)", r"too much \1", fault) for fault in case.faults)


def failures_page(cases: list[Case], seed: int) -> str:
    """Failures by the line where they happened, most frequent first, each with an example."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        if case.faults:
            groups[place_of(case)].append(case)
    rows = [f"# {sum(map(len, groups.values()))} failures of {len(cases)} cases, seed {seed}", ""]
    for place, found in sorted(groups.items(), key=lambda group: -len(group[1])):
        first = found[0]
        kinds = ", ".join(f"{kind} {n}" for kind, n in Counter(case.kind for case in found).most_common(4))
        rows += [f"## {len(found)} x {place}", f"kinds: {kinds}"]
        rows += [
            f"example: `--seed {seed} --only '{first.kind}' --case {first.number}` ({first.damaged}; {'; '.join(first.faults)})"
        ]
        rows += [f"    tinyfusion {first.command}", *(f"    {line[:200]}" for line in first.said.splitlines()[-3:]), ""]
    return "\n".join(rows)


def table(cases: list[Case]) -> str:
    """Markdown table: cases and passed cases by kind."""
    rows = ["| kind | tried | as promised | exit code 0 | most memory | most time |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(case.kind for case in cases):
        found = [case for case in cases if case.kind == name]
        good = sum(not case.faults for case in found)
        most = max(case.memory_bytes for case in found) / 2**20, max(case.seconds for case in found)
        rows.append(
            f"| {name} | {len(found)} | {good} | {sum(c.code == 0 for c in found)} | {most[0]:.0f} MiB | {most[1]:.1f} s |"
        )
    good = sum(not case.faults for case in cases)
    return "\n".join([*rows, f"| all | {len(cases)} | {good} | {sum(c.code == 0 for c in cases)} | | |"])


@contextlib.contextmanager
def workplace() -> Iterator[tuple[Path, Path]]:
    """Within the context: temporary folders of the material and of the cases."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        material, scratch = Path(name) / "material", Path(name) / "cases"
        material.mkdir()
        scratch.mkdir()
        fuzz_mutations.SCRATCH = scratch

        def call(command: str, folder: Path) -> None:
            code, said, _usage = run_command(command, folder, 10 * WALL_S)
            if code:
                raise RuntimeError(f"{command} ended with {code}:\n{said}")

        fill(material, call)
        yield material, scratch


def fuzz(
    kinds: Sequence[Kind], numbers: Iterable[int], seed: int, whole_first: bool, debug: bool = False
) -> Iterator[Case]:
    """The cases of these numbers of every kind, by number. whole_first: print the commands that fail on undamaged input."""
    preload()
    with workplace() as (material, scratch):
        for line in failures_of_intact(kinds, material, scratch) if whole_first else ():
            print(line, flush=True)
        for number in numbers:
            for kind in kinds:
                yield attempt(kind, number, seed, material, scratch, debug)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3000, help="spread evenly over the kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3600.0, help="time limit: no case starts later")
    parser.add_argument("--trust-whole", action="store_true", help="do not run the commands on undamaged inputs first")
    parser.add_argument("--only", metavar="KIND")
    parser.add_argument("--case", type=int, help="the number of one case, whose output is printed")
    parser.add_argument(
        "--failures", type=Path, help="write the failures, by the line where they happened, to this file"
    )
    options = parser.parse_args()
    kinds = [kind for kind in KINDS if options.only in (None, kind.name)]
    if not kinds:
        parser.error(f"--only is one of: {', '.join(kind.name for kind in KINDS)}")
    one = options.case is not None
    numbers = (options.case,) if one else itertools.count()
    deadline, cases = time.monotonic() + options.seconds, []
    for case in fuzz(kinds, numbers, options.seed, not one and not options.trust_whole, one):
        cases.append(case)
        if one:
            print(f"tinyfusion {case.command}\ndamaged: {case.damaged}\n{case.said}\nexit code {case.code}")
        if case.faults:
            print(
                f"--seed {options.seed} --only '{case.kind}' --case {case.number}: {'; '.join(case.faults)}", flush=True
            )
        done = len(cases) >= options.cases or time.monotonic() > deadline
        if options.failures and (done or len(cases) % 200 == 0):
            page = f"{failures_page(cases, options.seed)}\n\n{table(cases)}\n"
            options.failures.write_text(page, encoding="utf-8")
        if done:
            break
    print(table(cases))
    return 1 if any(case.faults for case in cases) else 0


if __name__ == "__main__":
    sys.exit(main())
