"""`prune`, `export` and `inspect` of a transformer of diffusers: on its files, so that memory does not grow with its size."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.reading import read_json_object
from tinyfusion.core.records import folder_output, recorded_output
from tinyfusion.core.rundir import RunDirectory, atomic_write, check_space, read_json, say_finished, stamp, write_json
from tinyfusion.data.recorded import read_recorded
from tinyfusion.export.transformer import FILES, plan_in, write_transformer
from tinyfusion.families.diffusers_classes.folder import INDEX, TransformerFolder, components
from tinyfusion.families.diffusers_classes.single_file import single_file_metadata, single_file_of, single_file_weights
from tinyfusion.families.diffusers_classes.weights import write_file
from tinyfusion.jobs.assemble import RunOptions, device_for, engine_for, job_record, plain_recipe
from tinyfusion.jobs.transformer_sources import origin_of
from tinyfusion.jobs.transformers import call_macs, couplings, planned, recorded_work
from tinyfusion.jobs.typed import check_read
from tinyfusion.jobs.verbs import finished

_RECORD = "tinyfusion.json"
_LINK_BYTES = 2**20  # files of a parent from this size on are linked where the disk can, smaller ones copied


def prune_transformer(recipe: Recipe, options: RunOptions, teacher: TransformerFolder) -> dict[str, Any]:
    """Plan by a rule or on recorded inputs, and prune the files; writes `plan.json` and `student/`. Returns what `--json` prints."""
    engine = engine_for(recipe)
    check_read("prune", recipe, teacher)
    teacher.check_destination(recipe.destination)
    teacher.check_prunable()
    inputs = {} if options.inputs is None else {"inputs": read_recorded(options.inputs).fingerprint}
    plain = plain_recipe(recipe, "prune", teacher=teacher.hash, **inputs)
    folder = RunDirectory(options.out, engine.is_main)
    mode = engine.first(lambda: folder.check("prune", plain, options.overwrite))
    began = time.perf_counter()
    work = options.inputs and recorded_work(teacher, recipe.prune, recipe.seed, options.inputs)
    plan = None if work else planned(teacher, recipe.prune, recipe.seed)
    teacher.check_class()
    student = plan and _student(teacher, plan)
    if mode == "finished":
        finished(folder, options.dry_run)
        return {"kept": read_json(folder.path / "plan.json")["kept"]}
    engine.first(lambda: check_space(options.out, (student or teacher).num_bytes))
    if options.dry_run:
        rows = {"teacher": described_folder(teacher)} | ({"student": described_folder(student)} if student else {})
        rows |= work.describe() if work else {}
        print("prune would do this:" + "".join(f"\n  {name:12} {said}" for name, said in rows.items()))
        return {"kept": plan.kept, "bytes": student.num_bytes} if plan and student else {}
    with folder.writing("prune", plain, options.overwrite):
        folder.mark("running", job=job_record(recipe, options, teacher=recipe.teacher, inputs=options.inputs))
        if work:
            plan = work.decide(folder, device_for(recipe))
            student = None if teacher.row.unfit else _student(teacher, plan)
        assert plan is not None
        if folder.writes:
            write_json(folder.path / "plan.json", plan.to_json())
        if folder.writes and student:
            with atomic_write(folder.path / "student", FILES) as new:
                write_transformer(student, new, options.out.name)
        folder.mark("done", seconds=time.perf_counter() - began, seen_images=0)
    if engine.is_main:
        listed = [f"{' '.join(map(str, kept))} of {plan.depth[name]} {name}" for name, kept in plan.kept.items()]
        made = described_folder(student) if student else f"a plan without a student: {teacher.row.unfit}"
        notes = "".join(f"\nnote: {note}" for note in teacher.row.notes)
        print(f"{plan.criterion}: kept {', '.join(listed)}; {made}{notes}", file=sys.stderr)
    return {"kept": plan.kept}


def _student(teacher: TransformerFolder, plan: PrunePlan) -> TransformerFolder:
    """The pruned model. Raises UserError where diffusers would not build it."""
    student = teacher.cut(plan)
    student.check_class()
    return student


def described_folder(model: TransformerFolder) -> str:
    """A transformer of diffusers in a few words."""
    blocks = ", ".join(f"{depth} {path}" for path, depth in model.depths.items())
    return f"{model.class_name}, {blocks}, {model.num_bytes / 2**30:.2f} GiB"


# --------------------------------------------------------------------------------------------------------------- export


def export_transformer(
    options: RunOptions, source: str, to: str, pipeline: bool, model: TransformerFolder
) -> dict[str, Any]:
    """A folder of diffusers, alone or in a pipeline; returns what `--json` prints. Raises UserError on another format."""
    if to == "single-file":
        return _export_single_file(options, pipeline, model)
    if to != "diffusers":
        raise UserError(
            f"{source} is a {model.class_name}, which has no format {to}: give --to diffusers or single-file"
        )
    out = options.out
    origin = _origin(source, model, options.blocks) if pipeline else None
    plain = {"to": to, "pipeline": pipeline, "model": model.hash}
    to_do = partial(folder_output, out, _RECORD, "export", plain, options.overwrite, f"export --to {to}")
    todo = to_do()
    check_space(out, model.num_bytes)
    outcome = {"to": to, "model": model.hash, "bytes": model.num_bytes}
    if options.dry_run:
        return outcome
    if not todo:
        say_finished(out)
        return outcome
    inside = rf"{FILES}|{_RECORD}|{INDEX}" + (rf"|{origin[1]}/(?:{FILES})" if origin else "")
    with atomic_write(out, inside) as new:
        if origin is None:
            write_transformer(model, new, out.name)
        else:
            parent, component = origin
            kind = read_json_object(parent / INDEX).get("_class_name")
            new.mkdir(parents=True)
            _take_over(parent, new, component)
            write_transformer(model, new / component, out.name, new, str(kind))
        write_json(new / _RECORD, stamp("export", plain, "done", **outcome))
        to_do()  # again: what has come to be there meanwhile is not replaced
    return outcome


def _export_single_file(options: RunOptions, pipeline: bool, model: TransformerFolder) -> dict[str, Any]:
    """One safetensors file for ComfyUI and stable-diffusion.cpp, and its record in a JSON file of the same name."""
    out = options.out
    if pipeline or out.suffix != ".safetensors":
        raise UserError(f"--out of export --to single-file is a .safetensors file, without --pipeline; got {out}")
    weights, names = single_file_weights(model), single_file_of(model)
    outcome = {"to": "single-file", "model": model.hash, "bytes": model.num_bytes, "warning": names.warning or None}
    plain = {"to": "single-file", "model": model.hash}
    to_do = partial(recorded_output, out, "export", plain, options.overwrite)
    todo = to_do()
    check_space(out, model.num_bytes)
    notes = [f"diffusers opens it by {model.class_name}.from_single_file({out.name!r}, config={str(model.path)!r})"]
    notes += ["guidance is folded in: draw it without, at CFG 1"] if model.folded else []
    notes += [names.warning] if names.warning else []
    print("\n".join(f"note: {note}" for note in notes), file=sys.stderr)
    if not options.dry_run and not todo:
        say_finished(out)
    elif not options.dry_run:
        with atomic_write(out) as new:
            write_file(weights, new, single_file_metadata(model, out.stem))
            to_do()  # again: what has come to be there meanwhile is not replaced
            write_json(out.with_suffix(".json"), stamp("export", plain, "done", **outcome))
    return outcome


def _origin(source: str, model: TransformerFolder, blocks: Path | None) -> tuple[Path, str]:
    """The pipeline and the component whose place the model takes. Raises UserError where no record names one."""
    origin = origin_of(source, model, blocks)
    if origin is None:
        raise UserError(
            f"--pipeline puts {source} where its parent was in a pipeline, and no record names one: give the run folder of `prune` "
            "of a pipeline's transformer, or leave out --pipeline"
        )
    return origin


def _take_over(pipeline: Path, out: Path, replaced: str) -> None:
    """The index and the other components of a pipeline: large files as hard links where the disk can, others copied."""
    write_json(out / INDEX, read_json_object(pipeline / INDEX))
    for name in components(pipeline):
        if name == replaced or not (pipeline / name).is_dir():
            continue
        for file in sorted(path for path in (pipeline / name).rglob("*") if path.is_file()):
            target = out / file.relative_to(pipeline)
            target.parent.mkdir(parents=True, exist_ok=True)
            real = Path(os.path.realpath(file))  # files of a hub cache are links
            if real.stat().st_size >= _LINK_BYTES:
                try:
                    os.link(real, target)
                    continue
                except OSError:  # another disk, or one without links
                    pass
            shutil.copyfile(real, target)


# -------------------------------------------------------------------------------------------------------------- inspect


def inspect_transformer(model: TransformerFolder, inputs: Path | None = None) -> dict[str, Any]:
    """The facts that `inspect --json` prints: streams, units and couplings, and what a block of each list weighs.

    inputs: a file of `record`, for the multiply-accumulates of a call of its size. Raises UserError where it is of another class.
    """
    macs = call_macs(model, inputs) if inputs is not None else {}
    total = sum(stored.numel for stored in model.weights.values())
    units = {path: each for each in model.units for path in each.name.split(" + ")}
    lists: dict[str, Any] = {}
    for each in model.row.lists:
        if each.path not in model.depths:
            continue
        depth, stored = model.depths[each.path], model.of_list(each.path)
        parameters = sum(tensor.numel for tensor in stored)
        streams = each.declared
        lists[each.path] = {
            "blocks": depth,
            "count": each.count,
            "streams": " ".join(streams.names),
            "returns": " ".join(streams.returns or streams.names),
            "units": len(units[each.path].units),
            "units_that_stay": len(units[each.path].fixed),
            "aside": each.aside,
            "parameters": parameters,
            "share": round(parameters / total, 4),
            "parameters_per_block": parameters // depth,
            "bytes_per_block": sum(tensor.num_bytes for tensor in stored) // depth,
        }
        if macs:
            in_list = sum(macs.get(f"{each.path}.{i}", 0) for i in range(depth))
            lists[each.path] |= {
                "macs": in_list,
                "macs_share": round(in_list / macs[""], 4),
                "macs_per_block": in_list // depth,
            }
    return {
        "class": model.class_name,
        "depth": sum(model.depths.values()),
        "num_parameters": total,
        "bytes": model.num_bytes,
        **({"macs": macs[""], "macs_of": f"one call as recorded in {inputs}"} if macs else {}),
        "types": dict(Counter(stored.dtype for stored in model.weights.values())),
        "lists": lists,
        "couplings": couplings(model.row),
        "one_mask": model.row.one_mask or None,
        "unfit": model.row.unfit or None,
        "notes": list(model.row.notes),
        "kept": model.record.get("kept"),
        "lineage": model.lineage,
        "criterion": plan_in(model).criterion if model.lineage else None,
        **{drawing.key: drawing.to_json() for drawing in (model.few_steps, model.folded) if drawing},
        "hash": model.hash,
        "license": model.license,
        "parent": model.parent,
        "pipeline": str(model.pipeline) if model.pipeline else None,
        "path": str(model.path),
    }
