"""Fixtures of the command line: a call in this process, and a folder of material to call it on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from material import Cli, Outcome, fill

from tinyfusion.cli import main
from tinyfusion.evaluate.extractors import open_extractor


@pytest.fixture(autouse=True, scope="module")
def fresh_extractors() -> Iterator[None]:
    """Feature extractors that one module opened by name, stand-ins perhaps, are not those of the next."""
    yield
    open_extractor.cache_clear()


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """cli("prune", "--out", "x"): the command line in this process."""

    def call(*arguments: str | Path) -> Outcome:
        capfd.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder; see `work`."""
    folder = tmp_path_factory.mktemp("material")
    fill(folder)
    return folder


@pytest.fixture
def work(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the material, as the current folder."""
    folder = tmp_path / "work"
    shutil.copytree(material, folder)
    monkeypatch.chdir(folder)
    return folder
