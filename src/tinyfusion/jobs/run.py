"""`run`: the whole job, stage by stage; each stage continues where it stopped."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinyfusion.core.config import to_plain
from tinyfusion.core.recipe import Recipe
from tinyfusion.core.rundir import RunDirectory, read_json, write_json, write_text
from tinyfusion.data.images import read_images_npz
from tinyfusion.evaluate.speed import Timing, interleaved, speedup
from tinyfusion.jobs.assemble import RunOptions, device_for
from tinyfusion.jobs.evaluate import evaluate, reference_images
from tinyfusion.jobs.inspect import inspect
from tinyfusion.jobs.prune import prune
from tinyfusion.jobs.recover import recover
from tinyfusion.jobs.report import render_run
from tinyfusion.jobs.sample import check_sampling, sample, sampler_of
from tinyfusion.models.checkpoint import LoadedModel, open_model
from tinyfusion.sample.drive import sample as draw_samples


def run(recipe: Recipe, options: RunOptions) -> dict[str, Any]:
    """Prune, recover, sample three models from the same seeds, evaluate, time, and write the page."""
    teacher = open_model(recipe.teacher, recipe.sample.weights, options.num_heads, options.family)
    plain = {**to_plain(recipe), "teacher": recipe.teacher, "teacher_hash": teacher.hash()}
    folder = RunDirectory(options.out)
    mode = folder.check("run", plain, options.overwrite)
    if mode == "finished":
        print(f"{options.out} is finished; --overwrite starts anew", file=sys.stderr)
        return _outcome(options.out)
    if mode == "new":  # whatever the stages would refuse is refused before anything is written
        prune(recipe, dataclasses.replace(options, out=options.out / "prune", dry_run=True, overwrite=True))
        check_sampling(recipe.sample, teacher)
        for reference in recipe.evaluate.references:
            reference_images(reference)
    if options.dry_run:
        return {"minutes": recipe.minutes}
    folder.begin("run", plain, options.overwrite)
    command = f"tinyfusion run --recipe {recipe.name} --out {options.out}"
    folder.mark("running", command=command)

    out = options.out
    stage = _stages(folder)
    stage("prune", lambda: prune(recipe, RunOptions(out / "prune", num_heads=options.num_heads, family=options.family)))
    stage("recover", lambda: recover(recipe, RunOptions(out / "recover", num_heads=options.num_heads, family=options.family), out / "prune"))
    models = {"teacher": recipe.teacher, "pruned": str(out / "prune" / "student"), "student": str(out / "recover" / "student")}
    stage("sample", lambda: _sample(recipe, options, models))
    stage("evaluate", lambda: _evaluate(recipe, out, list(models)))
    stage("speed", lambda: _speed(recipe, out, teacher, open_model(models["student"])))
    folder.mark("done", seconds=sum(folder.record()["stages"].values()))
    write_text(out / "report.html", render_run(out))
    return _outcome(out)


def _stages(folder: RunDirectory) -> Callable[[str, Callable[[], Any]], None]:
    """Run a stage and add its seconds to run.json."""

    def stage(name: str, work: Callable[[], Any]) -> None:
        print(f"{name} ...", file=sys.stderr)
        began = time.perf_counter()
        work()
        seconds = dict(folder.record().get("stages", {}))
        seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - began, 2)
        folder.mark("running", stages=seconds)

    return stage


def _sample(recipe: Recipe, options: RunOptions, models: dict[str, str]) -> None:
    for name, source in models.items():
        heads = options.num_heads if name == "teacher" else None
        where = RunOptions(options.out / "samples" / f"{name}.npz", num_heads=heads, family=options.family)
        sample(recipe, where, source, options.out / "samples" / f"{name}.png")


def _evaluate(recipe: Recipe, out: Path, models: list[str]) -> None:
    for reference in recipe.evaluate.references:
        for name in models:
            target = out / "evaluations" / f"{name}-{reference.replace(':', '-')}.json"
            evaluate(recipe, RunOptions(target), out / "samples" / f"{name}.npz", reference)
    first = recipe.evaluate.references[0].replace(":", "-")
    write_json(out / "evaluation.json", read_json(out / "evaluations" / f"student-{first}.json"))


def _speed(recipe: Recipe, out: Path, teacher: LoadedModel, student: LoadedModel) -> None:
    """Measured seconds of guided denoising steps, teacher and student in turn, in this process."""
    device, settings = device_for(recipe), recipe.speed
    sampler = dataclasses.replace(sampler_of(recipe.sample, teacher), sampler="ddpm", num_steps=settings.steps_per_repeat)
    labels = np.arange(settings.batch_size, dtype=np.int64) % teacher.arch.num_classes

    def trajectory(model: LoadedModel) -> Callable[[], object]:
        module = model.module.to(device).eval()
        shape = (model.arch.in_channels, model.arch.input_size, model.arch.input_size)
        return lambda: list(draw_samples(module, labels, shape, model.arch.num_classes, sampler, recipe.seed, settings.batch_size))

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times = interleaved({"teacher": trajectory(teacher), "student": trajectory(student)}, settings.repeats, synchronise)
    ratio, low, high = speedup(times["teacher"], times["student"])
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    write_json(
        out / "speed.json",
        {
            "protocol": f"{settings.repeats} interleaved trajectories of {settings.steps_per_repeat} denoising steps, batch {settings.batch_size}, "
            f"guidance {recipe.sample.guidance:g}, float32, {device.type}, {threads} threads; medians",
            "batch_size": settings.batch_size, "threads": threads, "dtype": "float32",
            "models": {"teacher": _speed_of(teacher, times["teacher"], settings.steps_per_repeat), "student": _speed_of(student, times["student"], settings.steps_per_repeat)},
            "speedup": ratio, "speedup_spread": [low, high],
        },
    )  # fmt: skip


def _speed_of(model: LoadedModel, timing: Timing, steps: int) -> dict[str, Any]:
    facts = inspect(model)
    spread = [min(timing.measurements_ms) / steps, max(timing.measurements_ms) / steps]
    return {**{k: facts[k] for k in ("depth", "num_parameters", "macs")}, "latency_ms": timing.median_ms / steps, "latency_ms_spread": spread}


def _outcome(out: Path) -> dict[str, Any]:
    """What `--json` prints of a finished run."""
    evaluation, speed = read_json(out / "evaluation.json"), read_json(out / "speed.json")
    plan = read_json(out / "prune" / "plan.json")
    print(f"open {out / 'report.html'}", file=sys.stderr)
    return {"report": str(out / "report.html"), "fid": evaluation["fid"], "speedup": speed["speedup"], "kept": plan["kept"]}
