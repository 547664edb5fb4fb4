"""A transformer as a folder of diffusers: config, weights, model card and the picture of its plan."""

from __future__ import annotations

from pathlib import Path

from tinyfusion.blocks.plan import PrunePlan, plan_from_json
from tinyfusion.core.rundir import write_json
from tinyfusion.export.card import PICTURE, plan_png
from tinyfusion.families.diffusers_classes.call_rows import call_of
from tinyfusion.families.diffusers_classes.folder import TransformerFolder
from tinyfusion.families.diffusers_classes.weights import STEM, write_weights

FILES = rf"config\.json|{STEM}[^/]*|README\.md|{PICTURE}"  # pattern of its files


def write_transformer(
    model: TransformerFolder, folder: Path, title: str, card: Path | None = None, pipeline: str | None = None
) -> None:
    """A folder that diffusers opens: config, weights, card and picture of the plan. card: the folder of the latter, another one."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", model.config_to_write)
    write_weights(model.weights, folder)
    write_card(model, card or folder, title, pipeline)


def write_card(
    model: TransformerFolder, folder: Path, title: str, pipeline: str | None = None, use: str | None = None
) -> None:
    """The card, as of `transformer_card`, and the picture of the plan of a student."""
    (folder / "README.md").write_text(transformer_card(model, title, pipeline, use), encoding="utf-8")
    if model.lineage:
        plan = plan_in(model)
        (folder / PICTURE).write_bytes(plan_png(plan.kept, plan.depth))


def plan_in(model: TransformerFolder) -> PrunePlan:
    """The plan by which a student was pruned."""
    return plan_from_json(model.record.get("plan"))


def transformer_card(model: TransformerFolder, title: str, pipeline: str | None = None, use: str | None = None) -> str:
    """The text of README.md. pipeline: class of the pipeline that the folder is, if it is one.

    use: how a graph is run; None: the folder is of diffusers.
    """
    head = [f"license: {(model.license or 'unknown').lower()}", f"library_name: {'onnx' if use else 'diffusers'}"]
    head += [f"base_model: {model.parent}"] if model.parent else []
    head += ["tags:", "- diffusion", "- tinyfusion"]
    blocks = ", ".join(f"{depth} {path}" for path, depth in model.depths.items())
    what = (
        f"A `{model.class_name}` of diffusers: {blocks}; {sum(stored.numel for stored in model.weights.values()):,} parameters "
        f"({', '.join(sorted({stored.dtype for stored in model.weights.values()}))}). SHA-256 of its tensors: `{model.hash}`."
    )
    sections = [
        "---\n" + "\n".join(head) + "\n---",
        f"# {title}\n\n{what}",
        _cut(model),
        _drawing(model),
        f"## Use\n\n{use}" if use else _use(model, title, pipeline),
    ]
    notes = [*model.row.notes] if model.lineage else []
    if model.lineage:
        notes.append(
            "a LoRA made for the unpruned model names its blocks by index: without a remap it loads onto other blocks"
        )
    sections += ["## Notes\n\n" + "\n".join(f"- {note}" for note in notes)] if notes else []
    unknown = "under the licence of the parent, which no file names"
    licence = f"under {model.license}, carried over from the parent" if model.license else unknown
    sections.append(f"## Licence\n\nThe weights are {licence}.")
    return "\n\n".join(filter(None, sections)) + "\n"


def _cut(model: TransformerFolder) -> str:
    if not model.lineage:
        return ""
    parent, plan = model.lineage[-1], model.record["plan"]
    gone = {path: sorted({*range(depth)} - {*plan["kept"][path]}) for path, depth in plan["depth"].items()}
    removed = "; ".join(f"{path} {', '.join(map(str, blocks))}" for path, blocks in gone.items() if blocks) or "none"
    chain = " -> ".join(f"{sum(each['depth'].values())} blocks (`{each['hash'][:12]}`)" for each in model.lineage)
    return (
        f"## Pruning\n\n![which blocks stay]({PICTURE})\n\nPruned from {model.parent or 'the model'} `{parent['hash'][:12]}` by the "
        f"criterion `{plan['criterion']}`. Removed: {removed}. Lineage: {chain} -> {sum(model.depths.values())} blocks. "
        + (
            "They were trained afterwards."
            if model.record.get("trained")
            else "The blocks that stay have the parent's weights: nothing was trained after pruning."
        )
    )


def _drawing(model: TransformerFolder) -> str:
    few, folded = model.few_steps, model.folded
    if folded is not None:
        return (
            f"## Guidance\n\nClassifier-free guidance of scale {folded.guidance.scale:g} is folded in: draw it without, one pass of the "
            "network per step, and without a negative prompt."
        )
    if few is None:
        return ""
    return (
        f"## Few steps\n\nDistilled by {few.steps.method} to draw in {few.steps.describe()}: a step is one pass of the network. It is no "
        "denoiser of other noise levels. Where the scheduler shifts levels by the size, they are those of the size of the training data."
    )


def _use(model: TransformerFolder, title: str, pipeline: str | None) -> str:
    kind = pipeline or model.class_name
    code = f'from diffusers import {kind}\n\nmodel = {kind}.from_pretrained("{title}", torch_dtype="auto")'
    other = "" if pipeline else "\n# Pipeline.from_pretrained(PARENT, transformer=model) draws with it"
    if model.drawn_with:
        given = ", ".join(f"{name}={value!r}" for name, value in model.drawn_with.items())
        name = "model" if pipeline else "pipeline"
        drawn = "frames" if call_of(model.config).axes == 5 else "images"
        other += f"\ndrawn = {name}(PROMPT, {given}).{drawn}[0]"
    return f"## Use\n\n```python\n{code}{other}\n```"
