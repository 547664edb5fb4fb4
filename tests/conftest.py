"""Options and settings of the whole suite."""

from __future__ import annotations

import gc
import os
import re
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("suite")

DEFAULT_GOLDEN = Path(__file__).parent / "assets" / "golden"
GOLDEN_SUBJECTS = ("dit", "gate", "kd", "metrics", "inception", "sit", "mar", "dydit")

# Whole files go to one worker or another (`make test`), so that what a module shares is made once. These take longest, longest
# first: begun first, none of them is left to one worker at the end.
LONG_FILES = (
    "laws/test_processes.py", "families/test_classes.py", "cli/test_faults.py", "cli/test_hub.py", "cli/test_docs.py",
    "cli/test_demo.py", "cli/test_onnx.py",
    "families/test_pipelines.py", "families/test_recorded.py", "families/test_transformer_verbs.py", "cli/test_evaluate.py",
    "laws/test_pictures.py", "cli/test_watching.py", "cli/test_verbs.py", "parity/test_diffusers.py", "cli/test_bad_input.py",
    "laws/test_compile.py", "cli/test_sampling.py", "laws/test_recipes.py",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden", metavar="DIR", default=str(DEFAULT_GOLDEN), help="folder of golden tensors for tests/parity"
    )


def pytest_configure(config: pytest.Config) -> None:
    """One thread: bit equality must not depend on how many there are, and the tensors are tiny.

    Nothing waits for the disk in this process: no test turns the power off.
    """
    torch.set_num_threads(1)
    os.fsync = lambda _descriptor: None
    check_golden(Path(config.getoption("--golden")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """For one of several workers: long files first. The order within a file stays."""
    absent = [name for name in LONG_FILES if not (Path(__file__).parent / name).is_file()]
    if absent:
        raise pytest.UsageError(f"tests/conftest.py names files that are not there: {', '.join(absent)}")
    if hasattr(config, "workerinput"):
        places = {Path(__file__).parent / name: place for place, name in enumerate(LONG_FILES)}
        items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """What is imported stays: leave it out of garbage collections, which took a twentieth of the time of the tests."""
    gc.collect()
    gc.freeze()


def check_golden(folder: Path) -> None:
    """UsageError on a folder that holds no subject at all, which would pass by skipping everything."""
    if not folder.is_dir():
        raise pytest.UsageError(f"--golden wants a folder of golden tensors; {folder} is none")
    wanted = [f"{subject}_golden.safetensors" for subject in GOLDEN_SUBJECTS]
    if not any((folder / name).is_file() for name in wanted):
        raise pytest.UsageError(f"--golden wants a folder of golden tensors; {folder} has none of {', '.join(wanted)}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why golden subjects and pages in a browser were skipped, without needing -rs."""
    for report in terminalreporter.stats.get("skipped", []):
        if re.search("test_golden|test_demo", report.nodeid) and isinstance(report.longrepr, tuple):
            terminalreporter.write_line(f"{report.nodeid}: {report.longrepr[2]}")


@pytest.fixture(autouse=True)
def denormals_as_they_were() -> Iterator[None]:
    """The command line, called in this process, flushes denormal numbers for good; a test must not do so for the next."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """Sets the size in bytes above which no file can be written, for the test."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda num_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)
