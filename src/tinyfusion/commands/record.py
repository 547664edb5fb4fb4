"""`record`: the inputs and outputs of a transformer of diffusers, from the folder of its pipeline and prompts.

A file is written by one process, at the end. A folder is written in shards of a few prompts, which processes share; an interrupted
job continues with the shards that are missing.
"""

from __future__ import annotations

import dataclasses
import re
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tinyfusion.config.recipe import ComputeSection, Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.files import check_space, sha256_of
from tinyfusion.core.launch import launched_processes, launched_rank
from tinyfusion.core.progress import progress
from tinyfusion.core.ranks import check_overwrite, wait_for_files, wait_until
from tinyfusion.core.records import file_output, say_finished, stamp
from tinyfusion.core.rundir import RunDirectory
from tinyfusion.data.captions import read_prompts
from tinyfusion.data.recorded import MANIFEST, recorded_in, write_recorded
from tinyfusion.data.recorded_shards import RecordShards
from tinyfusion.families.diffusers_classes.folder import TransformerFolder
from tinyfusion.jobs.assemble import own_device
from tinyfusion.jobs.estimate import announce, rounded
from tinyfusion.jobs.pipelines import opened_pipeline, pipeline_class, transformer_in
from tinyfusion.jobs.recording import Drawing, cost_of_prompt, dtype_name, recorded_calls
from tinyfusion.jobs.transformer_sources import pipeline_folder

SUFFIX = ".safetensors"
_FILE = r"\.[a-z][a-z0-9]*"  # suffixes of files, unlike that of FLUX.1-inputs
_SHARD_PROMPTS = 8
_WAIT_S, _WAIT_SHARDS = 3600.0, 5  # for other processes: an hour without a file, or the time of so many own shards


@dataclass(frozen=True)
class RecordOptions:
    """What `record` does.

    pipeline: a folder, or a hub id. prompts: a file of them. out: a .safetensors file, or a folder. component: the
    transformer's name in the pipeline, where there are several. shard_prompts: of a shard of a folder; None: 8. blocks: a user's
    rows.
    """

    pipeline: str
    prompts: Path
    out: Path
    component: str | None = None
    drawing: Drawing = field(default_factory=Drawing)
    shard_prompts: int | None = None
    device: str = "auto"
    blocks: Path | None = None
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class _Job:
    """What is recorded. plain: what identifies the job."""

    options: RecordOptions
    prompts: list[str]
    folder: Path
    model: TransformerFolder
    kind: Any
    device: torch.device

    @property
    def arguments(self) -> dict[str, Any]:
        return self.options.drawing.arguments(self.kind)

    @property
    def plain(self) -> dict[str, Any]:
        hashes = {"transformer": self.model.hash, "prompts": sha256_of(self.options.prompts)}
        drawing = dataclasses.asdict(self.options.drawing)
        wanted = drawing.pop("wanted")
        own = {"drawn_with": wanted} if wanted else {}
        return {**hashes, **drawing, **own}

    @property
    def outcome(self) -> dict[str, Any]:
        return {"prompts": len(self.prompts), "class_name": self.model.class_name, "hash": self.model.hash}

    @property
    def settings(self) -> dict[str, Any]:
        return {"pipeline": self.kind.__name__, **self.arguments}

    def opened(self) -> tuple[Any, Any]:
        """The pipeline, and the transformer in it."""
        name = self.model.path.name
        pipeline = opened_pipeline(self.kind, self.folder, {name: self.model}, self.device)
        return pipeline, getattr(pipeline, name)


def record(options: RecordOptions) -> dict[str, Any]:
    """Draw each prompt and write the inputs and outputs of the transformer's calls; returns what `--json` prints.

    Raises UserError on a pipeline that brings code, or cannot be called with prompts alone.
    """
    drawing, in_shards = options.drawing, not re.fullmatch(_FILE, options.out.suffix)
    for name, least in (("steps", 1), ("height", 1), ("width", 1), ("frames", 1), ("calls", 1), ("seed", 0)):
        if (value := getattr(drawing, name)) is not None and value < least:
            raise UserError(f"--{name} must be at least {least}; got {value}")
    if options.shard_prompts is not None and options.shard_prompts < 1:
        raise UserError(f"--shard-prompts must be at least 1; got {options.shard_prompts}")
    if not in_shards and options.out.suffix != SUFFIX:
        raise UserError(f"--out of record is a {SUFFIX} file, or a folder, whose name has no suffix; got {options.out}")
    if not in_shards and options.shard_prompts is not None:
        raise UserError(f"--shard-prompts is for folders, and --out {options.out} is a file: leave one of the two out")
    if not in_shards and launched_processes() > 1:
        raise UserError(
            f"several processes write a folder, and --out {options.out} is a file: give a name without suffix"
        )
    prompts = read_prompts(options.prompts)
    folder = pipeline_folder(options.pipeline)
    model = transformer_in(folder, options.component, options.blocks)
    kind = pipeline_class(folder)
    drawing = dataclasses.replace(drawing, wanted=model.drawn_with)
    drawing.arguments(kind)
    job = _Job(
        dataclasses.replace(options, drawing=drawing),
        prompts,
        folder,
        model,
        kind,
        own_device(Recipe(device=options.device)),
    )
    return _record_folder(job) if in_shards else _record_file(job)


def _record_file(job: _Job) -> dict[str, Any]:
    options, plain = job.options, job.plain
    to_do = partial(file_output, options.out, "record", plain, options.overwrite, recorded_in)
    if not to_do():
        say_finished(options.out, options.dry_run)
        return {**job.outcome, "pipeline": job.kind.__name__, "arguments": job.arguments}
    if options.dry_run:
        return _announced(job, 1, len(job.prompts), len(job.prompts), "a new file")
    pipeline, transformer = job.opened()
    with progress("record", len(job.prompts), "prompts") as bar:
        calls = recorded_calls(pipeline, transformer, job.prompts, options.drawing, bar)
    outcome = {**job.outcome, "dtype": dtype_name(transformer), "settings": job.settings}
    to_do()  # again: what has come to be there meanwhile is not replaced
    write_recorded(options.out, calls, stamp("record", plain, "done", **outcome))
    return {**outcome, "calls": len(calls)}


# -------------------------------------------------------------------------------------------------------------- folders


def _record_folder(job: _Job) -> dict[str, Any]:
    """Write the missing shards of this rank; rank 0 also waits for the others and writes the manifest."""
    options, rank, world = job.options, launched_rank(), launched_processes()
    run = RunDirectory(options.out, rank == 0)
    check_overwrite(options.out, run.record_path.exists(), options.overwrite, world)
    shards = RecordShards(options.out, len(job.prompts), options.shard_prompts or _SHARD_PROMPTS)
    plain = {**job.plain, "shard_prompts": shards.shard_prompts}
    known = rank == 0 or run.record_path.exists()
    mode = run.check("record", plain, options.overwrite) if known else "new"
    missing = shards.missing() if mode != "new" else list(range(shards.num_shards))
    if options.dry_run and rank > 0:
        return {"rank": rank}
    if mode == "finished" and not missing and (options.out / MANIFEST).is_file():
        return _verified(job, shards, run) if rank == 0 else {"rank": rank}
    if options.dry_run:
        left = sum(len(shards.prompts(shard)) for shard in missing)
        state = "a new folder" if mode == "new" else f"continues: {shards.num_shards - len(missing):,} shards are there"
        return _announced(job, world, left, shards.shard_prompts, f"{state}, {shards.num_shards:,} shards in all")
    if rank > 0:
        wait_until(run.record_path.is_file, options.out, ComputeSection().timeout_s)
        run.check("record", plain, overwrite=False)
        _write_shards(job, shards)
        return {"rank": rank}
    with run.writing("record", plain, options.overwrite):
        run.mark("running", job={"pipeline": options.pipeline, "prompts": str(options.prompts)})
        slowest_s = _write_shards(job, shards)
        writers = {shards.file(shard): shard % world for shard in range(shards.num_shards)}
        wait_for_files(writers, world, max(_WAIT_S, _WAIT_SHARDS * slowest_s))
        facts = {"class_name": job.model.class_name, "hash": job.model.hash, "dtype": shards.written_facts()["dtype"]}
        calls = shards.finish(facts, {"settings": job.settings})
        outcome = {**job.outcome, **facts, "settings": job.settings, "shards": shards.num_shards, "calls": calls}
        run.mark("done", **outcome)
    return outcome


def _write_shards(job: _Job, shards: RecordShards) -> float:
    """Write the missing shards of this rank, one at a time in memory. Returns the seconds of the slowest."""
    rank, world = launched_rank(), launched_processes()
    mine = [shard for shard in shards.missing() if shard % world == rank]
    if not mine:
        return 0.0
    pipeline, transformer = job.opened()
    facts = {"class_name": job.model.class_name, "hash": job.model.hash, "dtype": dtype_name(transformer)}
    total, done, slowest_s = sum(len(shards.prompts(shard)) for shard in mine), 0, 0.0
    title = "record" if world == 1 else f"record ({rank + 1} of {world})"
    with progress(title, total, "prompts", shown=rank == 0) as bar:
        for place, shard in enumerate(mine):
            began, numbers = time.perf_counter(), shards.prompts(shard)

            def tick(num: int, before: int = done) -> None:
                bar(before + num)

            own = job.prompts[numbers.start : numbers.stop]
            calls = recorded_calls(pipeline, transformer, own, job.options.drawing, tick, numbers.start)
            num_bytes = shards.write(shard, calls, facts)
            if not place:
                check_space(shards.folder, num_bytes * (len(mine) - 1))
            done += len(numbers)
            slowest_s = max(slowest_s, time.perf_counter() - began)
    return slowest_s


def _verified(job: _Job, shards: RecordShards, run: RunDirectory) -> dict[str, Any]:
    """The outcome for a finished folder, whose checksums are verified."""
    calls = shards.verify()
    say_finished(run.path, job.options.dry_run)
    if not job.options.dry_run:
        run.tidy()
    return {**job.outcome, "pipeline": job.kind.__name__, "arguments": job.arguments, "calls": calls}


def _announced(job: _Job, world: int, prompts: int, at_once: int, state: str) -> dict[str, Any]:
    """Print and return the plan of a dry run, with time and bytes of the first prompt in two steps."""
    pipeline, transformer = job.opened()
    cost = cost_of_prompt(pipeline, transformer, job.prompts[0], job.options.drawing)
    model, mib = job.model, cost.num_bytes / 2**20
    plan: dict[str, Any] = {
        "transformer": f"{model.class_name} {model.hash[:12]} of {job.folder}",
        "prompts": f"{prompts:,} of {len(job.prompts):,} in {job.options.prompts}, drawn by a {job.kind.__name__}",
        "calls": f"{cost.calls:,} a prompt, {mib:,.3g} MiB with their outputs, at most",
        "out": f"{job.options.out}: {state}",
    }
    sizes = [tensor.nbytes for tensor in transformer.parameters()]
    memory = sum(sizes) + min(at_once, prompts) * cost.num_bytes
    basis = f"one prompt measured, {cost.steps} steps"
    estimate = rounded(cost.seconds * prompts / world, memory, cost.num_bytes * prompts, basis)
    return {
        **job.outcome,
        "pipeline": job.kind.__name__,
        "arguments": job.arguments,
        **announce("record", plan, estimate),
    }
