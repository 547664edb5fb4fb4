"""docs/models.md from the table of classes and what the tests run: `python tests/families/models_page.py` writes it."""

from __future__ import annotations

from pathlib import Path

from tiny_images import IMAGES
from tiny_video import VIDEO

from tinyfusion.families.diffusers_classes.rows import Row, shipped_rows
from tinyfusion.jobs.transformers import couplings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
_TITLE = """# Transformers of diffusers

The classes of diffusers whose transformers can be pruned, given as a folder of the transformer or of a pipeline, or a hub id. Blocks are
removed on the files, by rules or [on recorded inputs](criteria.md#transformers-of-diffusers); the result opens in diffusers without
tinyfusion. A student draws worse than its parent until it is recovered: 23 classes [can be trained](training-inputs.md) on pictures with
captions, others on [recorded calls](diffusers.md#without-data-few-step-and-guidance-distilled-models). [A lighter
FLUX.1-dev](diffusers.md) has the commands.

Indices of `--keep` and `--protect` count through the lists in the order below, which is that in which they run: of a FLUX with 19 double
blocks, 19 is the first single one. Lists *aside* of the trunk stay whole unless they are named. `--num-keep N` is per list;
`prune.budgets=all=N` divides N over the lists of the trunk.

**Verified**: a pruned model equals the gated one bit for bit, and so does its folder in diffusers. **Under a rule**: the same for every
choice that the rule allows; others are refused. **Measured only**: opened and gated, but a pruned model cannot be written. **Not run**:
pruned by its declaration.

A class that is not in the table needs a row: the error of `inspect` has a guess, to be saved in a file and given as `--blocks FILE`. It
is stored in the config of the student.

| class | lists and the fields that count them | streams of a block, as returned | what follows | state |
|---|---|---|---|---|
"""


def coupled(row: Row) -> bool:
    """Whether some choices of blocks are refused."""
    each = any(one.stay or one.mirror or one.period for one in row.lists)
    return each or bool(row.same_index or row.hints or row.same_count)


def state(name: str, row: Row) -> str:
    """What is known of a class."""
    if row.unfit:
        return "measured only"
    if name not in {tiny.name for tiny in [*IMAGES, *VIDEO]}:
        return "not run"
    return "under a rule" if coupled(row) else "verified"


def page() -> str:
    """The text of the page."""
    lines = []
    for name, row in shipped_rows().items():
        lists = "; ".join(f"{each.path}: `{each.count}`{' (aside)' if each.aside else ''}" for each in row.lists)
        streams = "; ".join(dict.fromkeys(", ".join(each.streams) for each in row.lists))
        rules = "; ".join([*couplings(row), *([row.unfit] if row.unfit else []), *row.notes])
        lines.append(f"| {name} | {lists} | {streams} | {rules} | {state(name, row)} |")
    return _TITLE + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
