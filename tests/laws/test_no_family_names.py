"""No module outside of `families/` names a family, neither in code nor in comments: a new one adds nothing there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tinyfusion.families.registry import FAMILIES

SOURCE = Path(__file__).resolve().parents[2] / "src" / "tinyfusion"
NAMED = re.compile(rf"\b({'|'.join(FAMILIES)})\b", re.IGNORECASE)
# not read: recipes of published models and the table of known weights, which are data files with published names
MODULES = sorted(path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).parts[0] != "families")


def test_no_module_outside_of_families_names_one() -> None:
    assert len(MODULES) > 100
    found = [
        f"{path.relative_to(SOURCE)}:{number}: {line.strip()}"
        for path in MODULES
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
