"""The model card of a transformer of diffusers that lost blocks: from what, which blocks, how to load it, under which licence."""

from __future__ import annotations

from tinyfusion.families.diffusers_classes.folder import TransformerFolder


def transformer_card(
    model: TransformerFolder, title: str, picture: str, pipeline: str | None = None, use: str | None = None
) -> str:
    """The text of README.md. picture: file of the plan's picture. pipeline: class of the pipeline that the folder is, if it is one.

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
        _cut(model, picture),
        f"## Use\n\n{use}" if use else _use(model, title, pipeline),
    ]
    notes = [*model.row.notes] if model.lineage else []
    if model.lineage:
        notes.append(
            "a LoRA made for the uncut model names its blocks by index: without a remap it loads onto other blocks"
        )
    sections += ["## Notes\n\n" + "\n".join(f"- {note}" for note in notes)] if notes else []
    unknown = "under the licence of the parent, which no file names"
    licence = f"under {model.license}, carried over from the parent" if model.license else unknown
    sections.append(f"## Licence\n\nThe weights are {licence}.")
    return "\n\n".join(filter(None, sections)) + "\n"


def _cut(model: TransformerFolder, picture: str) -> str:
    if not model.lineage:
        return ""
    parent, plan = model.lineage[-1], model.record["plan"]
    gone = {path: sorted({*range(depth)} - {*plan["kept"][path]}) for path, depth in plan["depth"].items()}
    removed = "; ".join(f"{path} {', '.join(map(str, blocks))}" for path, blocks in gone.items() if blocks) or "none"
    chain = " -> ".join(f"{sum(each['depth'].values())} blocks (`{each['hash'][:12]}`)" for each in model.lineage)
    return (
        f"## Pruning\n\n![which blocks stay]({picture})\n\nPruned from {model.parent or 'the model'} `{parent['hash'][:12]}` by the "
        f"criterion `{plan['criterion']}`. Removed: {removed}. Lineage: {chain} -> {sum(model.depths.values())} blocks. "
        + (
            "They were trained afterwards."
            if model.record.get("trained")
            else "The blocks that stay have the parent's weights: nothing was trained after pruning."
        )
    )


def _use(model: TransformerFolder, title: str, pipeline: str | None) -> str:
    kind = pipeline or model.class_name
    code = f'from diffusers import {kind}\n\nmodel = {kind}.from_pretrained("{title}", torch_dtype="auto")'
    other = "" if pipeline else "\n# Pipeline.from_pretrained(PARENT, transformer=model) draws with it"
    return f"## Use\n\n```python\n{code}{other}\n```"
