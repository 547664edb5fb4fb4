"""Training, pruning and recovery know no family by name, neither in code nor in comments: a new one adds nothing there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tinyfusion.families.family import FAMILIES

SOURCE = Path(__file__).resolve().parents[2] / "src" / "tinyfusion"
NAMED = re.compile(rf"\b({'|'.join(FAMILIES)})\b", re.IGNORECASE)


@pytest.mark.parametrize("folder", ["training", "recover", "prune"])
def test_a_folder_names_no_family(folder: str) -> None:
    files = sorted((SOURCE / folder).rglob("*.py"))
    assert files
    found = [
        f"{path.relative_to(SOURCE)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if NAMED.search(line)
    ]
    assert not found


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("as DiT does", True),
        ('if name == "sit":', True),
        ("MAR's head", True),
        ("PixArt-alpha", True),
        ("edit, site, marked", False),
    ],
)
def test_names_are_recognised(line: str, named: bool) -> None:
    assert bool(NAMED.search(line)) is named
