"""No code outside of `families/` names a family, not even in a comment: a new one adds nothing there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tinyfusion.families.registry import FAMILIES

SOURCE = Path(__file__).resolve().parents[2] / "src" / "tinyfusion"
NAMED = re.compile(rf"\b({'|'.join(FAMILIES)})\b", re.IGNORECASE)
# not read: recipes of published models and the table of known weights, whose names are those of published files
FILES = sorted(
    path for kind in ("*.py", "*.j2") for path in SOURCE.rglob(kind) if "families" not in path.relative_to(SOURCE).parts
)


def test_no_code_outside_of_families_names_one() -> None:
    assert len(FILES) > 100
    found = [
        f"{path.relative_to(SOURCE)}:{number}: {line.strip()}"
        for path in FILES
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
