"""`encode --pipeline`: pictures or clips with captions to latents and prompt embeddings, by the models of a pipeline of diffusers.

Prompts come first, in chunks of rows that the processes share; then the text encoders are freed, and the autoencoder encodes the
pictures as `encode` does, bucket by bucket. Several sizes give a folder with a set of latents per bucket.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinyfusion.commands.captioned import Job, opened_job, with_defaults
from tinyfusion.commands.encode import announce_plan, missing_shards, speed, write_shards
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.launch import launched_processes, launched_rank
from tinyfusion.core.progress import progress, say
from tinyfusion.core.ranks import check_overwrite, wait_for_files, wait_until
from tinyfusion.core.rundir import ENCODE_PROMPTS, RunDirectory, check_space, read_json
from tinyfusion.core.tensors import read_metadata
from tinyfusion.data.buckets import write_bucket_manifest
from tinyfusion.data.latents import MANIFEST, read_manifest, verify, write_manifest
from tinyfusion.data.originals import changed
from tinyfusion.data.prompts import prompts_entry, verify_prompts, write_texts
from tinyfusion.jobs.assemble import RunOptions, job_record, own_device, plain_recipe
from tinyfusion.jobs.estimate import announce, rounded
from tinyfusion.jobs.text_encoding import MOST_AT_ONCE, header, prompt_encoder

_LONGER = "too_long"  # in the notes of a chunk: its prompts of more tokens than the encoder reads


def encode_captions(
    recipe: Recipe, options: RunOptions, source: str | None, prompts: Path | None = None
) -> dict[str, Any]:
    """Write prompts and shards of this rank; rank 0 also joins prompts and writes manifests. Returns the outcome for `--json`.

    source: pictures with captions; prompts: a file of prompts in its place, of which no latents are made.
    """
    rank, world = launched_rank(), launched_processes()
    run = RunDirectory(options.out, rank == 0)
    recipe = dataclasses.replace(recipe, encode=with_defaults(recipe.encode, source, prompts))
    job = opened_job(recipe, source, prompts)
    plain = plain_recipe(recipe, "encode", **job.inputs)
    check_overwrite(options.out, run.record_path.exists(), options.overwrite, world)
    known = rank == 0 or run.record_path.exists()
    mode = run.check(ENCODE_PROMPTS, plain, options.overwrite) if known else "new"
    nowhere = options.out / ".none" if mode == "new" else options.out
    todo, chunks = job.todo(nowhere), job.prompts(nowhere).missing()
    check_space(options.out, sum(job.works[name].spec.shard_bytes(k) for name, shards in todo.items() for k in shards))
    if chunks or any(todo.values()):
        say(job.remarks)
    if options.dry_run:
        return _announced(job, recipe, str(source or prompts), todo, world, mode, rank == 0)
    if mode == "finished" and not chunks and not any(todo.values()):
        run.tidy()
        return _verified(options.out, job, rank)
    if rank > 0:
        wait_until(run.record_path.is_file, options.out, recipe.compute.timeout_s)
        run.check(ENCODE_PROMPTS, plain, overwrite=False)
        _write_chunks(job, recipe, options.out)
        _write_all_shards(job, recipe, options.out, rank)
        return {"rank": rank}
    with run.writing(ENCODE_PROMPTS, plain, options.overwrite):
        run.mark("running", job={**job_record(recipe, options), "data": str(source or prompts)})
        began = time.perf_counter()
        longer = _write_prompts(job, recipe, options.out, world)
        text_s, began = time.perf_counter() - began, time.perf_counter()
        done = _write_all_shards(job, recipe, options.out, rank)
        for name, work in job.works.items():
            say(changed(str(source) + (f", {name}" if name else ""), len(work.labels), work.changes))
        outcome = {"prompts": len(job.texts), "longer_prompts": longer, "text_seconds": round(text_s, 1)}
        busy = sum(work.busy_s for work in job.works.values())
        outcome |= speed(done, time.perf_counter() - began, busy, world) if job.works else {}
        _finish(job, options.out, world, recipe.compute.timeout_s)
        run.mark("done", **outcome)
    return outcome


# ------------------------------------------------------------------------------------------------------------- prompts


def _write_prompts(job: Job, recipe: Recipe, out: Path, world: int) -> int:
    """Encode the prompts of this rank, wait for those of others and join them. Returns the number of prompts that are too long."""
    file = job.prompts(out)
    about = _write_chunks(job, recipe, out)
    if not file.path.is_file():
        writers = {file.chunk(k): k % world for k in range(file.num_chunks)}
        wait_for_files(writers, world, recipe.compute.timeout_s)

    def joined(notes: list[dict[str, str]]) -> dict[str, str]:
        longer = sum(int(note.get(_LONGER, "0")) for note in notes)
        return {**(about or {"tinyfusion": notes[0]["tinyfusion"]}), _LONGER: str(longer)}

    file.join(joined)
    write_texts(out, job.texts)
    if longer := int(read_metadata(file.path).get(_LONGER, "0")):
        total = f"{longer:,} of {len(job.texts):,}"
        say(
            [
                f"captions of more tokens than the encoder reads, whose ends are not read: {total} (encode.max_tokens allows more)"
            ]
        )
    return longer


def _write_chunks(job: Job, recipe: Recipe, out: Path) -> dict[str, str] | None:
    """Encode the missing chunks of this rank. Returns the strings of the header; None where nothing was to be done."""
    rank, world = launched_rank(), launched_processes()
    file, step = job.prompts(out), min(recipe.encode.batch_size, MOST_AT_ONCE)
    mine = [chunk for chunk in file.missing() if chunk % world == rank]
    if not mine:
        return None
    total, done = sum(len(file.bounds(chunk)) for chunk in mine), 0
    title = "prompts" if world == 1 else f"prompts ({rank + 1} of {world})"
    with (
        prompt_encoder(job.pipeline, job.kind, own_device(recipe), recipe.encode.max_tokens) as encoder,
        progress(title, total, "prompts", shown=rank == 0) as bar,
    ):
        about = header(job.kind, encoder, job.files, len(job.texts))
        for chunk in mine:
            batches, longer = [], 0
            for texts in _batches(job.texts, file.bounds(chunk), step):
                batches.append(encoder.encode(texts) if texts else encoder.null())
                longer += encoder.longer(texts) if texts else 0
                if not done:
                    row_bytes = sum(tensor.nbytes for tensor in batches[0].values()) // max(len(texts), 1)
                    check_space(out, 2 * row_bytes * total)  # chunks and the file of all
                done += max(len(texts), 1)
                bar(done)
            file.write_chunk(chunk, batches, {**about, _LONGER: str(longer)})
    return about


def _batches(texts: tuple[str, ...], rows: range, size: int) -> Iterator[tuple[str, ...]]:
    """The texts of some rows, at most `size` at a time; nothing for the last row, the null prompt."""
    end = min(rows.stop, len(texts))
    for first in range(rows.start, end, size):
        yield texts[first : min(first + size, end)]
    if rows.stop > len(texts):
        yield ()


# -------------------------------------------------------------------------------------------------------------- latents


def _write_all_shards(job: Job, recipe: Recipe, out: Path, rank: int) -> int:
    """Write the missing shards of this rank, bucket by bucket. Returns the number of images."""
    done = offset = 0
    for name, work in job.works.items():
        if rank == 0:
            (out / name).mkdir(exist_ok=True)
        else:
            wait_until((out / name).is_dir, out / name, recipe.compute.timeout_s)
        settings = dataclasses.replace(recipe.encode, batch_size=work.about["batch_size"])
        if job.space is not None and missing_shards(out / name, work.spec):
            job.space.module.to(own_device(recipe))
        done += write_shards(work, out / name, settings, recipe.compute.timeout_s, offset)
        offset += work.spec.shards
    return done


def _finish(job: Job, out: Path, world: int, timeout_s: float) -> None:
    """Wait for the shards of all ranks, and write manifests and texts."""
    offset, writers = 0, dict[Path, int]()
    for name, work in job.works.items():
        writers |= {out / name / work.spec.file_name(k): (offset + k) % world for k in range(work.spec.shards)}
        offset += work.spec.shards
    wait_for_files(writers, world, timeout_s)
    entry = {"prompts": prompts_entry(out), "pipeline_class": job.kind.__name__}
    for name, work in job.works.items():
        write_manifest(out / name, work.spec, work.about | (entry if not name else {}))
    if job.works and "" not in job.works:
        nums = {name: work.spec.num_images for name, work in job.works.items()}
        write_bucket_manifest(out, nums, entry)


def _verified(out: Path, job: Job, rank: int) -> dict[str, Any]:
    """The outcome for a finished set, whose checksums are verified."""
    if rank > 0:
        return {"rank": rank}
    shards = 0
    for name in job.works:
        spec, about = read_manifest(out / name)
        verify(out / name, about)
        shards += spec.shards
    if job.works:
        verify_prompts(out, read_json(out / MANIFEST)["prompts"])
    print(f"{out} is finished, {shards} shards are as they were; --overwrite starts anew", file=sys.stderr)
    return {"prompts": len(job.texts), "num_images": sum(work.spec.num_images for work in job.works.values())}


def _announced(
    job: Job, recipe: Recipe, source: str, todo: dict[str, list[int]], world: int, mode: str, spoken: bool
) -> dict[str, Any]:
    """Print and return the plan of a dry run, with the times of a few prompts and of two pictures."""
    with prompt_encoder(job.pipeline, job.kind, own_device(recipe), recipe.encode.max_tokens) as encoder:
        some = job.texts[:2]
        encoder.encode(some)
        began = time.perf_counter()
        rows = encoder.encode(some)
        each_s = (time.perf_counter() - began) / len(some)
    row_bytes = sum(tensor.nbytes for tensor in rows.values()) // len(some)
    total = (len(job.texts) + 1) * row_bytes
    minutes, memory_gib, disk_mib = each_s * len(job.texts) / world / 60, 0.0, 2 * total / 2**20
    plan: dict[str, Any] = {
        "prompts": f"{len(job.texts):,} of {source}, {', '.join(f'{n} {tuple(t.shape[1:])}' for n, t in rows.items())} each",
        "encoders": f"those of {job.pipeline} ({job.kind.__name__})",
        "prompt file": f"{total / 2**20:,.1f} MiB, and as much while it is joined",
    }
    if job.space is not None:
        job.space.module.to(own_device(recipe))
        plan["autoencoder"] = type(job.space.module).__name__
    for name, work in job.works.items():
        settings = dataclasses.replace(recipe.encode, batch_size=work.about["batch_size"])
        made = announce_plan(work, settings, source, todo[name], world, mode, spoken=False)["plan"]
        plan[name or "latents"] = f"{work.spec.num_images:,} images, {made['latents']}; shards: {made['shards']}"
        minutes, disk_mib = minutes + made["minutes"], disk_mib + made["disk_mib"]
        memory_gib = max(memory_gib, made["memory_gib"])
    plan["out"] = "a new run" if mode == "new" else "continues what is there"
    estimate = rounded(60 * minutes, memory_gib * 2**30, disk_mib * 2**20, f"{len(some)} prompts and 2 images measured")
    return announce("encode", plan, estimate, spoken)
