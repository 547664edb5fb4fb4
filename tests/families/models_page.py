"""docs/models.md from the table of classes and what the tests run: `python tests/families/models_page.py` writes it."""

from __future__ import annotations

from pathlib import Path

from tiny_images import IMAGES
from tiny_video import VIDEO

from tinyfusion.families.diffusers_classes.rows import Row, shipped_rows
from tinyfusion.jobs.transformers import couplings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
_TITLE = """# Transformers of diffusers

`prune`, `export` and `inspect` take the folder of any of these classes: of the transformer, of a pipeline, or a hub id. Blocks
are removed on the files, by rules or [on recorded inputs](criteria.md#transformers-of-diffusers); every tensor keeps its type,
and memory does not grow with the model. The result is a folder that diffusers opens without tinyfusion.

[A lighter FLUX.1-dev, and its LoRAs](diffusers.md) has the commands: cuts, pipelines, files for ComfyUI, LoRAs.

Indices of `--keep` and `--protect` count through the lists in the order below, which is that in which they run: of a FLUX with 19
double blocks, 19 is the first single one. Lists *aside* of the trunk stay whole unless they are named. `--num-keep N` is per list;
`prune.budgets=all=N` divides N over the lists of the trunk. Nothing is trained here: a student draws worse than its parent until
it is recovered.

**Verified**: a cut model equals the gated one bit for bit, and so does its folder in diffusers. **Under a rule**: the same for every
choice that the rule allows; others are refused in one line that names it. **Measured only**: opened and gated, but a cut model
cannot be written. **Not run**: opened and cut by its declaration.

A class that is not in the table needs a row: the error of `inspect` has a guess, which is kept in a file and given as
`--blocks FILE`. It travels in the config of the student.

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
