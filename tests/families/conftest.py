"""Commands of the tests of transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tinyfusion import cli


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """A command: its JSON, or the last line of its error."""

    def command(*arguments: Any) -> Any:
        code = cli.main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        if code == 2:
            line = err.strip().splitlines()[-1]
            assert line.startswith("error: "), err
            return line
        assert code == 0, err
        return json.loads(out.strip().splitlines()[-1])

    return command


@pytest.fixture
def done(run: Callable[..., Any]) -> Callable[..., Any]:
    """A command that is not refused: its JSON."""

    def command(*arguments: Any) -> Any:
        said = run(*arguments)
        assert isinstance(said, dict), said
        return said

    return command
