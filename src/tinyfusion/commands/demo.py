"""`demo`: a page of static files on which models draw in the browser, side by side from the same noise."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tinyfusion.commands.export import read_labels
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.files import atomic_write
from tinyfusion.core.records import folder_output, read_record
from tinyfusion.core.rundir import check_space, say_finished, stamp, write_json
from tinyfusion.demo.page import OUR_FILES, PageModel, check_model, check_pair, page_facts, page_files, roles
from tinyfusion.export.folder import RECORD
from tinyfusion.export.onnx_graph import onnx_graph, onnx_module
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.jobs.process_specs import sampler_of
from tinyfusion.jobs.web_runtime import PACKAGE, VERSION, runtime_files
from tinyfusion.models.checkpoint import LoadedModel, open_model

_SPACE = 3  # bytes on the disk per byte of weights and runtime, at most


def demo(
    recipe: Recipe, options: RunOptions, model: str, vs: str | None, labels: Path | None, runtime: Path | None
) -> dict[str, Any]:
    """Write the page of a model, or of two, into `options.out`; returns the sizes of its files.

    labels: file with the names of the classes, None for their numbers. runtime: as in `runtime_files`. Raises UserError on models
    that a page cannot draw with, on two of different sizes, and without the runtime.
    """
    sources = [model, vs] if vs is not None else [model]
    models = _opened(recipe, options, sources)
    if roles(models) == ["Student", "Teacher"]:
        sources, models = sources[::-1], models[::-1]
    onnx_module("onnx")  # raises, also in a dry run
    names = read_labels(labels, models[0], model) if labels else {i: str(i) for i in range(models[0].arch.num_classes)}
    inputs = {
        "models": [each.hash() for each in models],
        "names": _names(sources),
        "classes": list(names.values()),
        "guidance": recipe.sample.guidance,
        "seed": recipe.seed,
        "runtime": f"{PACKAGE} {VERSION}",
    }
    todo = folder_output(options.out, RECORD, "demo", inputs, options.overwrite, "demo")
    if not todo:
        say_finished(options.out, options.dry_run)
        written = read_record(options.out / RECORD)
        return {name: written[name] for name in ("bytes", "files") if name in written}
    program = runtime_files(runtime)
    weights = sum(tensor.numel() * tensor.element_size() for each in models for tensor in each.tensors().values())
    check_space(options.out, _SPACE * (weights + sum(map(len, program.values()))))
    if options.dry_run:
        return {}
    pages = [
        PageModel(name, source, each, onnx_graph(each, switches=True).SerializeToString())
        for name, source, each in zip(_names(sources), _shown(sources), models, strict=True)
    ]
    facts = page_facts(pages, list(names.values()), recipe.sample.guidance, recipe.seed, f"{PACKAGE} {VERSION}")
    files = page_files(facts, pages, program)
    sizes = {name: len(content) for name, content in files.items()}
    outcome = {"bytes": sum(sizes.values()), "files": sizes}
    with atomic_write(options.out, OUR_FILES) as temporary:
        for name, content in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(content)
        write_json(temporary / RECORD, stamp("demo", inputs, "done", **outcome))
    _say(options.out, sizes)
    return outcome


def _opened(recipe: Recipe, options: RunOptions, sources: list[str]) -> list[LoadedModel]:
    """The models, checked."""
    typed = options.num_heads, options.family, options.num_classes
    models = {source: open_model(source, recipe.sample.weights, *typed) for source in sources}
    for source, model in models.items():
        check_model(model, source)
        sampler_of(recipe.sample, model)
    check_pair(models)
    return [models[source] for source in sources]


def _names(sources: list[str]) -> list[str]:
    """Short names of the models: the last part of their path, unless they share it."""
    short = [Path(source).name or source for source in sources]
    return short if len(set(short)) == len(short) else _shown(sources)


def _shown(sources: list[str]) -> list[str]:
    """The models as typed, for commands on the page; of absolute paths, which mean nothing elsewhere, the last part."""
    return [Path(source).name if Path(source).is_absolute() else source for source in sources]


def _say(out: Path, sizes: dict[str, int]) -> None:
    networks = sum(size for name, size in sizes.items() if "network" in name)
    total, runtime = sum(sizes.values()), sum(size for name, size in sizes.items() if "assets" in name) - networks
    print(
        f"page: {total / 1e6:.1f} MB, of which networks {networks / 1e6:.1f} and runtime {runtime / 1e6:.1f}",
        file=sys.stderr,
    )
    print(f"open {out / 'index.html'}, or serve it: python -m http.server --directory {out}", file=sys.stderr)
