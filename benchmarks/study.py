"""Run the study: compare criteria, recovery methods and settings under equal budgets on small images.

    python benchmarks/study.py --yardstick digits --runs runs/study
    python benchmarks/study.py --yardstick cifar16 --runs runs/study --set data.name=parquet:TRAIN --heldout parquet:TEST

Every job is a `prune`, a `recover` and 1,000 images, as on the command line; finished jobs are reused, so the command
resumes where it stopped, and `--rows 1,4` runs some rows only. `benchmarks/study_page.py` writes the page.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinyfusion.commands.prune import prune
from tinyfusion.commands.recover import recover
from tinyfusion.config.loading import load_recipe
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import read_json, write_json
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.evaluate.extractors import open_extractor
from tinyfusion.evaluate.metrics import Moments, feature_moments, frechet_distance
from tinyfusion.jobs.assemble import RunOptions, image_set
from tinyfusion.jobs.process_specs import objective_for
from tinyfusion.models.checkpoint import LoadedModel, open_model
from tinyfusion.prune.calibrate import Calibration, calibration_set
from tinyfusion.sample.drive import image_labels, sample, to_uint8
from tinyfusion.sample.gaussian import GaussianSampler

ASSETS = Path(__file__).resolve().parent / "assets"  # the CIFAR-10 teacher and classifier
SEEDS = (0, 1, 2)
STEPS = 200  # of recovery, 128 images each
SEARCH_STEPS = 400  # of 64 images each: as many images as 200 steps of recovery
NUM_MASKS = 40
COMMON = (
    f"recover.training.steps={STEPS}",
    "recover.training.batch_size=128",
    "recover.training.learning_rate=1e-3",
    "recover.training.learning_rate_end_share=0.05",
    "recover.training.warmup_steps=20",
    "recover.training.ema_decay=0.98",
    "recover.training.log_every_steps=50",
    "recover.training.checkpoint_every_steps=100000",
    "recover.training.checkpoints_limit=1",
    f"prune.training.steps={SEARCH_STEPS}",
    "prune.training.batch_size=64",
    "prune.training.learning_rate=1e-3",
    "prune.training.ema_decay=0.98",
    "prune.training.checkpoint_every_steps=100000",
    "prune.training.checkpoints_limit=1",
    "sample.num_images=1000",
    "sample.batch_size=250",
    "sample.sampler=ddim",
    "sample.num_steps=20",
    "sample.guidance=1.5",
)
SUBSET = (
    "prune.criterion=learned",
    "prune.scheme=6:12",
    "prune.distribution=subset",
    "prune.gate_learning_rate=1e-2",
    "prune.scaling=[5.0, 40.0]",
)
SCORE = ("prune.subset_estimator=score", "prune.gate_learning_rate=3e-3")
# uniform is not among them: at 12 blocks it keeps what bk-sdm keeps
CRITERIA: dict[str, tuple[str, ...]] = {
    "learned 1:2": ("prune.criterion=learned", "prune.scheme=1:2"),
    "learned 2:4": ("prune.criterion=learned", "prune.scheme=2:4"),
    "learned subset": SUBSET,
    "learned subset, deltas kept": (*SUBSET, "prune.keep_deltas=true"),
    "learned subset by score": (*SUBSET, *SCORE),
    "learned subset by score, deltas kept": (*SUBSET, *SCORE, "prune.keep_deltas=true"),
    "bi": ("prune.criterion=bi",),
    "bi released": ("prune.criterion=bi", "prune.bi_inputs=clean"),
    "flux-lite": ("prune.criterion=flux-lite",),
    "sensitivity": ("prune.criterion=sensitivity",),
    "sensitivity greedy": ("prune.criterion=sensitivity", "prune.sensitivity_order=greedy"),
    "bk-sdm": ("prune.criterion=bk-sdm",),
    "first": ("prune.criterion=first",),
    "last": ("prune.criterion=last",),
    "random": ("prune.criterion=random",),
    "min-loss": ("prune.criterion=min-loss", "prune.calibration_images=256"),
    "median-loss": ("prune.criterion=median-loss", "prune.calibration_images=256"),
    "max-loss": ("prune.criterion=max-loss", "prune.calibration_images=256"),
    "width": ("prune.criterion=width", "prune.width_share=0.5"),
}
UNSEARCHED = ("bi", "sensitivity", "sensitivity greedy", "min-loss")  # the best without training, as it turned out
FINETUNE = ("recover.method=finetune",)
RECOVERIES: dict[str, tuple[str, ...]] = {
    "finetune": FINETUNE,
    "logits-kd": ("recover.method=logits-kd",),
    "rep-kd": ("recover.method=rep-kd",),
    "masked-kd": ("recover.method=masked-kd",),
    "masked-kd k=0.1": ("recover.method=masked-kd", "recover.mask_sigmas=0.1"),
    "masked-kd k=4": ("recover.method=masked-kd", "recover.mask_sigmas=4"),
    "masked-kd joint": ("recover.method=masked-kd", "recover.mask=joint"),
}


@dataclass(frozen=True)
class Job:
    """One pruning and one recovery. parent: the job whose student is pruned, None for the teacher; grand: distil the teacher."""

    row: int
    plan: str
    plan_sets: tuple[str, ...]
    recovery: str
    recovery_sets: tuple[str, ...]
    seed: int
    plan_seed: int
    parent: Job | None = None
    grand: bool = False

    @property
    def plan_key(self) -> str:
        """Folder of the pruning run."""
        before = f"{self.parent.key}--" if self.parent else ""
        return f"{before}{self.plan}-s{self.plan_seed}".replace(", ", "_").replace(" ", "_").replace(":", "-")

    @property
    def key(self) -> str:
        """Folder of the recovery run."""
        return f"{self.plan_key}--{self.recovery}-s{self.seed}".replace(", ", "_").replace(" ", "_").replace(":", "-")


def steps(number: int) -> tuple[str, ...]:
    """Settings of a recovery of another length."""
    return (f"recover.training.steps={number}",)


def jobs() -> Iterator[Job]:
    """Every job, the most informative rows first; a job may be in several rows."""
    for seed in SEEDS:
        for name, sets in CRITERIA.items():
            yield Job(1, name, sets, "finetune", FINETUNE, seed, seed)
    for seed in SEEDS:  # the search counted: as many images in all as 400 steps of recovery
        for name in UNSEARCHED:
            yield Job(1, name, CRITERIA[name], "finetune 400 steps", (*FINETUNE, *steps(400)), seed, seed)
        short = (*CRITERIA["learned subset by score, deltas kept"], "prune.training.steps=200")
        label = "learned subset by score, deltas kept, half the search"
        yield Job(1, label, short, "finetune 300 steps", (*FINETUNE, *steps(300)), seed, seed)
    for mask in range(NUM_MASKS):
        yield Job(4, "random", CRITERIA["random"], "finetune", FINETUNE, 0, 100 + mask)
    for seed in SEEDS:
        for name, sets in RECOVERIES.items():
            yield Job(2, "learned subset", SUBSET, name, sets, seed, seed)
    for seed in SEEDS:
        for update in ("lora", "full", "frozen"):
            for name in ("learned 1:2", "learned 2:4", "learned subset by score"):
                sets = (*CRITERIA[name], f"prune.update={update}")
                label = name if update == "lora" else f"{name} {update}"
                yield Job(3, label, sets, "finetune", FINETUNE, seed, seed)
    yield from quarter_jobs()
    yield from rate_jobs()


def quarter_jobs() -> Iterator[Job]:
    """Row 5: a quarter of the depth, pruned from the teacher or from its half, distilled from either."""
    quarter = tuple(part for part in SUBSET if not part.startswith("prune.scheme="))
    for seed in SEEDS:
        half = Job(5, "learned subset", SUBSET, "masked-kd", RECOVERIES["masked-kd"], seed, seed)
        full = (*quarter, "prune.scheme=3:12")
        yield Job(5, "quarter of full", full, "masked-kd", RECOVERIES["masked-kd"], seed, seed)
        for grand, label in ((False, "masked-kd by half"), (True, "masked-kd by full")):
            sets = (*quarter, "prune.scheme=3:6")
            yield Job(5, "quarter of half", sets, label, RECOVERIES["masked-kd"], seed, seed, half, grand)


def rate_jobs() -> Iterator[Job]:
    """Row 6: recovery rates in the published proportions, and two ranges of the temperature."""
    for seed in SEEDS:
        for rate in (1e-3, 5e-4, 2.5e-4):
            sets = (*RECOVERIES["masked-kd"], f"recover.training.learning_rate={rate}")
            yield Job(6, "learned subset", SUBSET, f"masked-kd lr {rate:g}", sets, seed, seed)
        hot = (*CRITERIA["learned 1:2"], "prune.temperature=[1.0, 0.1]")
        yield Job(6, "learned 1:2", CRITERIA["learned 1:2"], "finetune", FINETUNE, seed, seed)
        yield Job(6, "learned 1:2 tau 1", hot, "finetune", FINETUNE, seed, seed)


class Yardstick:
    """A teacher, its data, and the measures of its students."""

    def __init__(self, name: str, recipe: str | None, sets: Sequence[str], heldout: str, root: Path) -> None:
        self.name, self.recipe_name, self.sets, self.root = name, recipe, tuple(sets), root / name
        self.base = self.recipe((), 0)
        self.heldout = heldout
        self.extractor = open_extractor(self.base.evaluate.features, "auto")
        self._references: dict[str, Moments] = {}
        self._calibrations: dict[str, Calibration] = {}

    def recipe(self, sets: Sequence[str], seed: int) -> Recipe:
        """The base recipe with a job's settings."""
        return load_recipe(self.recipe_name, (*COMMON, *self.sets, *sets), {"seed": seed})

    def reference(self, heldout: bool) -> Moments:
        """Moments of the features of the real images."""
        name = self.heldout if heldout else self.base.data.name
        if name not in self._references:
            images = to_uint8(torch.from_numpy(image_set(name, self.base.data.size).x))
            self._references[name] = feature_moments(self.extractor(images).pool)
        return self._references[name]

    def calibration(self, heldout: bool) -> Calibration:
        """1,024 noised images, the same for every model."""
        name = self.heldout if heldout else self.base.data.name
        if name not in self._calibrations:
            self._calibrations[name] = self._calibration_of(name)
        return self._calibrations[name]

    def _calibration_of(self, name: str) -> Calibration:
        images = image_set(name, self.base.data.size)
        source = ShuffledBatches(images, Randomness(0), torch.device("cpu"))
        objective = objective_for(open_model(self.base.teacher), 0.0, self.base)
        return calibration_set(objective, source, name, len(images), 1024, 128, 0)

    @torch.inference_mode()
    def loss(self, model: LoadedModel, heldout: bool) -> float:
        """Mean training loss without label drops."""
        calibration = self.calibration(heldout)
        total = 0.0
        for noisy in calibration.batches:
            prediction = calibration.objective.predict(model.module, noisy)
            total += float(calibration.objective.losses(model.module, noisy, prediction)["loss"].sum())
        return total / calibration.images

    def fid(self, model: LoadedModel, seed: int) -> dict[str, float]:
        """FID of 1,000 images against training and held-out images."""
        wanted = self.base.sample
        settings = GaussianSampler(wanted.sampler, wanted.num_steps, wanted.guidance)
        labels = image_labels(wanted.num_images, model.arch.num_classes, seed)
        batches = [to_uint8(part.x) for part in sample(model, labels, settings, seed, wanted.batch_size)]
        moments = feature_moments(self.extractor(np.concatenate(batches)).pool)
        return {
            "fid": frechet_distance(*self.reference(False), *moments),
            "fid_heldout": frechet_distance(*self.reference(True), *moments),
        }

    def cut(self, job: Job) -> Path:
        """The folder of the job's pruning run, which runs if it is missing."""
        folder = self.root / "cut" / job.plan_key
        if not (folder / "student").is_dir():
            recipe = self.recipe(job.plan_sets, job.plan_seed)
            if job.parent:
                if not (self.root / "recovered" / job.parent.key).is_dir():  # its numbers alone came from elsewhere
                    (self.root / "outcomes" / f"{job.parent.key}.json").unlink(missing_ok=True)
                self.outcome(job.parent)
                recipe = replace(recipe, teacher=str(self.root / "recovered" / job.parent.key))
            prune(recipe, RunOptions(folder))
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return folder

    def outcome(self, job: Job) -> dict[str, Any]:
        """The results of a job, which runs if they are missing."""
        file = self.root / "outcomes" / f"{job.key}.json"
        if file.is_file():
            return dict(read_json(file))
        began = time.perf_counter()
        cut, folder = self.cut(job), self.root / "recovered" / job.key
        recipe = self.recipe(job.recovery_sets, job.seed)
        if job.parent and not job.grand:
            recipe = replace(recipe, teacher=str(self.root / "recovered" / job.parent.key))
        values: dict[str, Any] = {"plan": job.plan, "recovery": job.recovery, "seed": job.seed, "failed": ""}
        values["kept"] = read_json(cut / "plan.json")["kept"]
        values["cost"] = read_json(cut / "plan.json")["cost"]
        values["calibration_loss"] = self.loss(open_model(cut), False)
        values["student"] = read_json(cut / "student" / "model.json")["hash"]
        twin = self._twin(job, values["student"])
        if twin:
            values |= {name: twin[name] for name in ("failed", "loss", "fid", "fid_heldout") if name in twin}
            write_json(file, {**values, "twin": f"{twin['plan']}, the same student, seed and fine-tuning"})
            return values
        try:
            recover(recipe, RunOptions(folder), cut)
            student = open_model(folder)
            values |= {"loss": self.loss(student, True), **self.fid(student, job.seed)}
        except UserError as error:  # too many bad steps: an outcome, and one that the paper reports as well
            values["failed"] = str(error)
        values["seconds"] = time.perf_counter() - began
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        shutil.rmtree(folder / "student-raw", ignore_errors=True)
        write_json(file, values)
        return values

    def _twin(self, job: Job, student: str) -> dict[str, Any] | None:
        """The outcome of an equal job: the same student, fine-tuned with the same settings and seed."""
        if "recover.method=finetune" not in job.recovery_sets:
            return None  # distillation also reads the plan's groups
        for file in (self.root / "outcomes").glob(f"*--{job.recovery.replace(' ', '_')}-s{job.seed}.json"):
            values = dict(read_json(file))
            if values.get("student") == student:
                return values
        return None

    def teacher(self) -> dict[str, Any]:
        """The results of the teacher for every seed."""
        file = self.root / "teacher.json"
        if not file.is_file():
            model = open_model(self.base.teacher)
            fids = [self.fid(model, seed) for seed in SEEDS]
            losses = {"loss": self.loss(model, True), "calibration_loss": self.loss(model, False)}
            write_json(
                file, {**losses, "fids": fids, "features": self.extractor.name, "data": Path(self.base.data.name).name}
            )
        return dict(read_json(file))


def yardstick(options: argparse.Namespace) -> Yardstick:
    """The yardstick that the options name."""
    cifar = (
        "data.size=16",
        "data.flip=0.5",
        f"teacher={ASSETS / 'cifar16' / 'teacher'}",
        f"evaluate.features={ASSETS / 'cifar16' / 'classifier'}",
    )
    presets: dict[str, tuple[str, ...]] = {"digits": (), "cifar16": cifar}
    return Yardstick(
        options.yardstick, None, (*presets[options.yardstick], *options.set), options.heldout, options.runs
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--yardstick", choices=("digits", "cifar16"), default="digits")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--heldout", default="digits:heldout", help="held-out images: a data set by name")
    parser.add_argument("--rows", default="1,2,3,4,5,6", help="which rows")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="print the jobs and what is done, run nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    flush_denormals()
    rows = {int(row) for row in options.rows.split(",")}
    listed: list[Job] = []
    for job in jobs():
        if job.row in rows and job.key not in {other.key for other in listed}:
            listed.append(job)
    root = options.runs / options.yardstick / "outcomes"
    done = sum((root / f"{job.key}.json").is_file() for job in listed)
    if options.list:
        print(f"{done} / {len(listed)} done")
        print("\n".join(f"row {job.row}  {job.key}" for job in listed))
        return
    stick = yardstick(options)
    print(json.dumps(stick.teacher()), flush=True)
    for number, job in enumerate(listed, start=1):
        values = stick.outcome(job)
        brief = {name: values.get(name) for name in ("kept", "calibration_loss", "loss", "fid", "seconds", "failed")}
        print(f"{number} / {len(listed)}  {job.key}  {json.dumps(brief)}", flush=True)


if __name__ == "__main__":
    main()
