"""Options and settings of the whole suite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=30)
settings.load_profile("suite")

DEFAULT_GOLDEN = Path(__file__).parent / "assets" / "golden"
GOLDEN_SUBJECTS = ("dit", "gate", "kd", "metrics", "inception")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden", metavar="DIR", default=str(DEFAULT_GOLDEN), help="folder of golden tensors for tests/parity"
    )


def pytest_configure(config: pytest.Config) -> None:
    """One thread: bit equality must not depend on how many there are, and the tensors are tiny."""
    torch.set_num_threads(1)
    check_golden(Path(config.getoption("--golden")))


def check_golden(folder: Path) -> None:
    """UsageError on a folder that holds no subject at all, which would pass by skipping everything."""
    if not folder.is_dir():
        raise pytest.UsageError(f"--golden wants a folder of golden tensors; {folder} is none")
    wanted = [f"{subject}_golden.safetensors" for subject in GOLDEN_SUBJECTS]
    if not any((folder / name).is_file() for name in wanted):
        raise pytest.UsageError(f"--golden wants a folder of golden tensors; {folder} has none of {', '.join(wanted)}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why golden subjects were skipped, without needing -rs."""
    for report in terminalreporter.stats.get("skipped", []):
        if "test_golden.py" in report.nodeid and isinstance(report.longrepr, tuple):
            terminalreporter.write_line(f"{report.nodeid}: {report.longrepr[2]}")


@pytest.fixture(autouse=True)
def denormals_as_they_were() -> Iterator[None]:
    """The command line, called in this process, flushes denormal numbers for good; a test must not do so for the next."""
    yield
    torch.set_flush_denormal(False)
