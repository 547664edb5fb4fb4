"""The model card, README.md: what the model is, its origin, scores with their protocol, how to make it, its licence; and its picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from tinyfusion.blocks.stack import num_parameters
from tinyfusion.models.facts import ModelFacts
from tinyfusion.models.loaded import LoadedModel

_STAYS, _EDGE, _INK = "#2a6f97", "#9aa5b1", "#334155"
_CELL, _GAP, _ROW, _MARGIN = 34, 4, 76, 12  # pixels: a block, between two, a list of blocks with its title, around all
PICTURE = "plan.png"
_NUMBERS = {"fid": "FID", "sfid": "sFID", "inception_score": "IS", "precision": "precision", "recall": "recall"}


def plan_png(kept: Mapping[str, Sequence[int]], depth: Mapping[str, int]) -> bytes:
    """One row of numbered cells per list of blocks, as PNG.

    kept: indices that stay, per list. depth: blocks of the parent, per list.
    """
    width = max(480, 2 * _MARGIN + max(depth.values()) * _CELL)
    image = Image.new("RGB", (width, 2 * _MARGIN + _ROW * len(depth)), "white")
    draw, title, number = ImageDraw.Draw(image), ImageFont.load_default(16), ImageFont.load_default(13)
    for row, (name, blocks) in enumerate(depth.items()):
        stays, top = set(kept[name]), _MARGIN + _ROW * row
        draw.text((_MARGIN, top), f"{name}: {len(stays)} of {blocks} blocks stay", _INK, title)
        for i in range(blocks):
            left, upper = _MARGIN + _CELL * i, top + 26
            fill, ink = (_STAYS, "white") if i in stays else ("white", _EDGE)
            draw.rectangle((left, upper, left + _CELL - _GAP, upper + _CELL - _GAP), fill, _EDGE)
            draw.text((left + (_CELL - _GAP) / 2, upper + (_CELL - _GAP) / 2), str(i), ink, number, anchor="mm")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


_GRAPH_USE = """With numpy and onnxruntime (`pip install numpy onnxruntime`):

```bash
python sample.py --labels 0,1,2 --out images.npy
```

`sample.py --help` lists its options. `sampler.json` has the process, shapes, classes and recommended settings for samplers of your
own; the inputs and outputs of the graphs are in their files."""


@dataclass(frozen=True)
class CardNotes:
    """Content of a card beyond the facts of the model.

    target: "diffusers", "pipeline", "onnx" or "tinyfusion". differences: sentences on what readers of the format compute
    differently. evaluations: contents of evaluation files. parents: hub repositories or known weights of origin. steps:
    sentences on recorded runs, oldest first. untuned: whether pruning was the last of them; None where unrecorded.
    from_nothing: whether the first weights were trained from nothing.
    """

    title: str
    target: str
    differences: Sequence[str] = ()
    evaluations: Sequence[Mapping[str, Any]] = ()
    command: str | None = None
    parents: Sequence[str] = ()
    steps: Sequence[str] = ()
    untuned: bool | None = None
    from_nothing: bool = False


def model_card(model: LoadedModel, notes: CardNotes) -> str:
    """The text of README.md."""
    sections = [
        _head(model, notes),
        f"# {notes.title}\n\n{_what(model)}",
        _plan(model),
        _use(model, notes),
        _drawing(model, notes),
        _differences(notes),
        _numbers(notes.evaluations),
        _how(model, notes),
        "## Licence\n\n" + licence_note(model, notes.from_nothing),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def licence_note(model: LoadedModel, from_nothing: bool = False) -> str:
    """The section on the licence; a pruned model has that of its parent. from_nothing: a record of that training exists."""
    license, family = model.facts.license, model.family
    if license is not None:
        commercial = " That is a non-commercial licence." if "-nc" in license.lower() else ""
        return f"The weights are under {license}, carried over from the model that they came from.{commercial}"
    if from_nothing or trained_from_nothing(model.facts):
        return "The first of its weights were trained from nothing, and no licence is recorded for them."
    unknown = "The files that this model came from name no licence for their weights, and their origin is unknown."
    published = family.published_license
    if published is None:
        return unknown
    use = " (non-commercial use only)" if "-nc" in published.lower() else ""
    return (
        f"{unknown} Published weights of the family {family.name} are under {published}{use}, and so is whatever was pruned or "
        "trained from them."
    )


def trained_from_nothing(facts: ModelFacts) -> bool:
    """Whether the model, or its oldest parent, counts the images of a training from nothing."""
    root = facts.lineage[0].get("seen_images") if facts.lineage else facts.seen_images
    return root is not None


def _head(model: LoadedModel, notes: CardNotes) -> str:
    library = notes.target if notes.target in ("tinyfusion", "onnx") else "diffusers"
    license = (model.facts.license or "unknown").lower()
    tags = ["tags:", "- diffusion", f"- {model.family.name}", "- tinyfusion"]
    lines = [f"license: {license}", f"library_name: {library}", *tags]
    if notes.target == "pipeline":
        lines.append("pipeline_tag: unconditional-image-generation")
    return "---\n" + "\n".join(lines) + "\n---"


def _what(model: LoadedModel) -> str:
    arch, facts = model.arch, model.facts
    depths = model.stack.depths()
    lists = f" ({', '.join(f'{depth} of {name}' for name, depth in depths.items())})" if len(depths) > 1 else ""
    space = f"latents of {facts.vae or 'an autoencoder'}" if model.of_latents else "pixels"
    classes = f", {arch.num_classes} class{'es' if arch.num_classes > 1 else ''}" if arch.num_classes else ""
    return (
        f"A {model.family.title} of {len(model.stack)} blocks{lists}, width {arch.hidden_size}, {arch.num_heads} heads, "
        f"{num_parameters(model.module):,} parameters, for {space} of images {facts.image_size} pixels wide{classes}. "
        f"SHA-256 of its tensors (as tinyfusion counts it): `{model.hash()}`."
    )


def _plan(model: LoadedModel) -> str:
    facts = model.facts
    if facts.plan is None or not facts.lineage:
        return ""
    parent, plan = facts.lineage[-1], facts.plan
    chain = " -> ".join(f"{sum(step['depth'].values())} blocks (`{step['hash'][:12]}`)" for step in facts.lineage)
    scheme = f", scheme {plan.scheme}" if plan.scheme else ""
    kept = "; ".join(f"{name} {', '.join(map(str, indices))}" for name, indices in plan.kept.items())
    narrower = " Its channels were pruned too." if plan.kept_widths else ""
    return (
        f"## Pruning\n\n![which blocks stay]({PICTURE})\n\nPruned from the model `{parent['hash'][:12]}` by the criterion "
        f"`{plan.criterion}`{scheme}. Kept: {kept}.{narrower} Lineage: {chain} -> {len(model.stack)} blocks."
    )


def _use(model: LoadedModel, notes: CardNotes) -> str:
    if notes.target == "tinyfusion":
        code = f'import tinyfusion\n\nmodel = tinyfusion.open_model("{notes.title}")  # a folder, or its hub id'
        return f"## Use\n\n```python\n{code}\n```"
    if notes.target == "onnx":
        return f"## Use\n\n{_GRAPH_USE}"
    export = model.diffusers_export()
    usage = export.pipeline.usage if notes.target == "pipeline" and export.pipeline else export.usage
    return f"## Use\n\n{usage(model.arch, notes.title, model.takes_guidance)}"


def _drawing(model: LoadedModel, notes: CardNotes) -> str:
    few, folded = model.facts.few_steps, model.facts.folded_guidance
    if folded is not None:
        return (
            f"## Guidance\n\nClassifier-free guidance of scale {folded.scale:g} is folded in: draw it without (scale 1), one pass of the "
            "network per step. It predicts nothing without a label."
        )
    if few is None:
        return ""
    noise = (
        "each step but the first noises the predicted image anew"
        if few.fresh_noise
        else "steps go on along the predicted noise"
    )
    text = f"Distilled by {few.method}: draw it in {few.describe()}; {noise}. It is no denoiser of other noise levels."
    if notes.target == "pipeline":
        text += f" In the pipeline: `num_inference_steps={len(few.levels)}, guidance_scale=1`."
    return f"## Few steps\n\n{text}"


def _differences(notes: CardNotes) -> str:
    if not notes.differences:
        return ""
    listed = "\n".join(f"- {sentence}" for sentence in notes.differences)
    return f"## Not quite the same numbers\n\nWith the same tensors, a reader of this format computes differently:\n\n{listed}"


def _numbers(evaluations: Sequence[Mapping[str, Any]]) -> str:
    """A table per protocol: numbers of different protocols never share one."""
    tables = []
    for numbers in evaluations:
        shown = {label: numbers[key] for key, label in _NUMBERS.items() if isinstance(numbers.get(key), int | float)}
        if not shown:
            continue
        names, line = " | ".join(shown), " | ".join("---" for _ in shown)
        values = " | ".join(f"{value:.4g}" for value in shown.values())
        tables.append(f"| {names} |\n| {line} |\n| {values} |\n\nProtocol: {numbers.get('protocol', 'not recorded')}.")
    return "## Numbers\n\n" + "\n\n".join(tables) if tables else ""


def _how(model: LoadedModel, notes: CardNotes) -> str:
    plan, lines = model.facts.plan, list[str]()
    if notes.parents:
        lines.append(f"From {', '.join(notes.parents)}.")
    if notes.command:
        lines.append(f"```\n{notes.command}\n```")
    if notes.steps:
        lines.append("\n".join(f"{number}. {sentence}" for number, sentence in enumerate(notes.steps, 1)))
    if plan is not None and len(plan.kept) == 1 and not plan.kept_widths:
        kept = ",".join(str(i) for indices in plan.kept.values() for i in indices)
        unknown = " (whether anything followed it is not recorded)"
        after = {True: " alone", False: ", without what followed it", None: unknown}
        command = f"```\ntinyfusion prune --teacher TEACHER --keep {kept} --out run\n```"
        lines.append(f"The pruning{after[notes.untuned]}:\n\n{command}")
    return "## How it was made\n\n" + "\n\n".join(lines) if lines else ""
