"""Compare choices of blocks of `digits-flux` and `digits-sd3` under equal budgets: images drawn by their own pipelines, and prompts.

    python benchmarks/two_stream_study.py --yardstick digits-flux --runs runs/two-stream-study
    python benchmarks/two_stream_study.py --yardstick digits-sd3 --runs runs/two-stream-study --seeds 0 --plans learned,bi

Each job removes half of every list of blocks and recovers the student; search and recovery together see `--share` of the images that
the teacher was trained on. Criteria without training recover for longer instead. Finished jobs are reused, so the command resumes.
`--table` prints the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

import tinyfusion as tf
from shared import spread, table
from tinyfusion.conditioning.condition import Condition
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import read_json, write_json
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.data.captioned_digits import COPIES, DIGIT_PROMPTS, PHRASINGS, digit_of, jittered
from tinyfusion.data.digits import ImageSet, load_digits
from tinyfusion.evaluate.extractors import open_extractor
from tinyfusion.evaluate.metrics import Moments, feature_moments, frechet_distance
from tinyfusion.models.places import shipped_models
from tinyfusion.processes.base import Batch
from tinyfusion.sample.drive import to_uint8
from two_stream_parts import TOKENS

SEARCH_BATCH, RECOVERY_BATCH, RECOVERY_RATE, CALIBRATION = 32, 32, 2e-3, 256
IMAGES, STEPS_DRAWN = 1000, 28
GUIDANCE: dict[str, dict[str, dict[str, Any]]] = {  # arguments of the pipelines
    "flux": {"none": {}, "1.5": {"true_cfg_scale": 1.5, "negative_prompt": ""}},
    "sd3": {"none": {"guidance_scale": 1.0}, "1.5": {"guidance_scale": 1.5}},
}
STUDENTS_GUIDANCE = {"flux": "none", "sd3": "1.5"}
HALF = {"flux": "{}:4;{}:8", "sd3": "{}:12"}  # a subset or run of each whole list
# merged: the student begins with the weight updates of the search
LEARNED: dict[str, dict[str, Any]] = {
    "learned 1:2": {"scheme": "1:2"},
    "learned subset": {"distribution": "subset", "gate_learning_rate": 1e-2, "scaling": (5.0, 40.0)},
    "learned subset merged": {
        "distribution": "subset", "gate_learning_rate": 1e-2, "scaling": (5.0, 40.0), "keep_deltas": True,
    },
    "learned run": {"distribution": "runs", "gate_learning_rate": 1e-2, "scaling": (5.0, 40.0)},
    "learned run merged": {
        "distribution": "runs", "gate_learning_rate": 1e-2, "scaling": (5.0, 40.0), "keep_deltas": True,
    },
}  # fmt: skip
_SUBSET = LEARNED["learned subset merged"]
SIDES = {
    "flux": {
        f"learned subset merged {a}+{b}": _SUBSET | {"scheme": f"{a}:4;{b}:8"} for a, b in ((4, 2), (3, 3), (1, 5))
    }
}
CRITERIA = ("bi", "sensitivity", "min-loss", "flux-lite", "first", "random")


def trained_images(pipeline: Path) -> int:
    """The number of images that a shipped teacher was trained on, as the card in its folder says."""
    stated = re.search(r"([\d,]+) training images", (pipeline / "README.md").read_text(encoding="utf-8"))
    assert stated is not None, pipeline
    return int(stated[1].replace(",", ""))


@torch.no_grad()
def encoded_texts(kind: str, pipeline: Any) -> Condition:
    """The table of the prompts, by the pipeline's own encoders; its null row is the empty prompt."""
    texts = [*DIGIT_PROMPTS, ""]
    if kind == "flux":
        embeddings, pooled, _ids = pipeline.encode_prompt(texts, max_sequence_length=TOKENS)
    else:
        embeddings, _null, pooled, _null_pooled = pipeline.encode_prompt(texts, None, None, max_sequence_length=TOKENS)
    return tf.text_table({"embeddings": embeddings, "pooled": pooled})


@torch.no_grad()
def encoded_images(autoencoder: Any, x: Tensor) -> Tensor:
    """Latents (N, 1, 8, 8) as the transformer sees them, of grey images in [-1, 1]."""
    modes = [autoencoder.encode(part.expand(-1, 3, -1, -1)).latent_dist.mode() for part in x.split(512)]
    latents: Tensor = (torch.cat(modes) - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor
    return latents


class Yardstick:
    """A shipped pipeline, its teacher and data, and the measures of its students."""

    def __init__(self, name: str, runs: Path, share: float) -> None:
        from diffusers import DiffusionPipeline

        self.kind = name.removeprefix("digits-")
        self.runs = runs / name
        self.images = int(share * trained_images(shipped_models()[name]))
        self.pipeline: Any = DiffusionPipeline.from_pretrained(shipped_models()[name], local_files_only=True)
        self.pipeline.set_progress_bar_config(disable=True)
        self.teacher = tf.open_model(name)
        self.texts = encoded_texts(self.kind, self.pipeline)
        self.extractor = open_extractor("digits-classifier", "cpu")
        self.objective: Any = tf.objective_of(self.teacher)

    @cached_property
    def latents(self) -> ImageSet:
        """The training data."""
        images = jittered(load_digits(), COPIES)
        return dataclasses.replace(images, x=encoded_images(self.pipeline.vae, torch.from_numpy(images.x)).numpy())

    def source(self, seed: int) -> ShuffledBatches:
        """Batches of the training data."""
        return ShuffledBatches(self.latents, Randomness(seed), torch.device("cpu")).conditioned_on(self.texts)

    @cached_property
    def references(self) -> dict[str, Moments]:
        """Moments of the features of the real digits."""
        sets = {"fid": load_digits(), "fid_heldout": load_digits(heldout=True)}
        return {name: feature_moments(self.extractor(to_uint8(torch.from_numpy(s.x))).pool) for name, s in sets.items()}

    def drawn(self, transformer: Any, seed: int, guidance: str | None = None) -> dict[str, float]:
        """FID and prompt accuracy of `IMAGES` images that the pipeline draws, of all prompts in turn.

        guidance: a row of `GUIDANCE`; None: that of students.
        """
        arguments = GUIDANCE[self.kind][guidance or STUDENTS_GUIDANCE[self.kind]]
        self.pipeline.transformer = transformer
        prompts = [DIGIT_PROMPTS[(7 * i) % len(DIGIT_PROMPTS)] for i in range(IMAGES)]
        pixels = []
        for first in range(0, IMAGES, 250):
            noise = [torch.Generator().manual_seed(seed * IMAGES + i) for i in range(first, first + 250)]
            images = self.pipeline(
                prompts[first : first + 250], height=8, width=8, num_inference_steps=STEPS_DRAWN, generator=noise,
                max_sequence_length=TOKENS, output_type="np", **arguments,
            ).images  # fmt: skip
            pixels.append((images[..., :1] * 255).round().astype(np.uint8))
        features = self.extractor(np.concatenate(pixels))
        assert features.logits is not None
        moments = feature_moments(features.pool)
        right = features.logits.argmax(1) == np.array([digit_of(prompt) for prompt in prompts])
        return {
            **{name: float(frechet_distance(*reference, *moments)) for name, reference in self.references.items()},
            "accuracy": float(right.mean()),
        }

    @torch.no_grad()
    def loss(self, model: Any, repeats: int = 4) -> np.ndarray:
        """(360,) loss of every held-out digit over stratified times."""
        images = load_digits(heldout=True)
        num = len(images)
        x = encoded_images(self.pipeline.vae, torch.from_numpy(images.x))
        labels = torch.from_numpy(images.y) * len(PHRASINGS) + torch.arange(num) % len(PHRASINGS)
        total = torch.zeros(num)
        for repeat in range(repeats):
            draws = Randomness(99).at(repeat, 0, num)
            position = (np.argsort(draws.uniform("stratum")) + draws.uniform("timestep")) / num
            levels = self.objective.times.sigma(position)
            t = torch.from_numpy(self.objective.flow.convention.at_sigma(levels)).float()
            noise = torch.from_numpy(draws.normal("noise", tuple(x.shape[1:])))
            noisy = self.objective.noised(Batch(x, self.texts.index(labels)), t, noise)
            total += self.objective.losses(model, noisy, self.objective.predict(model, noisy))["loss"]
        return (total / repeats).numpy()


# ----------------------------------------------------------------------------------------------------------------- jobs


def planned(stick: Yardstick, plan: str, seed: int) -> tuple[Any, int]:
    """The student of a plan, and the images of its search."""
    learned = LEARNED | SIDES.get(stick.kind, {})
    if plan not in learned:
        batches = CALIBRATION // SEARCH_BATCH
        student = tf.prune_model(
            stick.teacher, plan, task=stick.objective, batches=stick.source(seed), num_batches=batches, seed=seed
        )
        return student, 0
    steps = stick.images // 4 // SEARCH_BATCH
    settings = dict(learned[plan])
    if "scheme" not in settings:
        kept = [depth // 2 for depth in stick.teacher.stack.depths().values()]
        settings["scheme"] = HALF[stick.kind].format(*kept)
    training = tf.TrainingSection(steps=steps, batch_size=SEARCH_BATCH, learning_rate=1e-3, ema_decay=0.98)
    section = tf.PruneSection(**settings, training=training)
    masks = tf.learn_masks(stick.teacher, stick.objective, stick.source(seed), section, seed=seed)
    return tf.prune_model(stick.teacher, masks), steps * SEARCH_BATCH


def outcome(stick: Yardstick, plan: str, method: str, seed: int) -> dict[str, Any]:
    """The results of a job, which runs if they are missing."""
    file = stick.runs / f"{plan.replace(' ', '_').replace(':', '-')}--{method}-s{seed}.json"
    if file.is_file():
        return dict(read_json(file))
    began = time.perf_counter()
    student, searched = planned(stick, plan, seed)
    values: dict[str, Any] = {"plan": plan, "method": method, "seed": seed, "searched": searched}
    values["kept"] = {name: list(kept) for name, kept in (student.facts.kept or {}).items()}
    values["loss_before"] = float(stick.loss(student.module).mean())
    steps = (stick.images - searched) // RECOVERY_BATCH
    training = tf.TrainingSection(
        steps=steps, batch_size=RECOVERY_BATCH, learning_rate=RECOVERY_RATE, learning_rate_end_share=0.05, warmup_steps=20,
        ema_decay=0.98,
    )  # fmt: skip
    features = {"beta": (2e-4, 0.0)} if method in ("rep-kd", "masked-kd") else {}
    section = tf.RecoverSection(method=method, training=training, **features)  # type: ignore[arg-type]
    taught = None if method == "finetune" else stick.teacher
    student = tf.recover_model(student, taught, stick.objective, stick.source(seed + 1000), section, seed=seed)
    values |= {"recovered": steps * RECOVERY_BATCH, "loss": float(stick.loss(student.module).mean())}
    values |= {**stick.drawn(student.module, seed), "seconds": time.perf_counter() - began}
    write_json(file, values)
    return values


def block_influence(stick: Yardstick) -> dict[str, list[float | None]]:
    """1 - mean cosine between input and output of each block, of the image and of the text stream, over held-out digits."""
    means: dict[str, list[float | None]] = {"image": [], "text": []}
    sums: dict[tuple[int, str], list[float]] = {}

    def hook(block: int) -> Any:
        def measure(_module: Any, _args: Any, given: dict[str, Any], output: Any) -> None:
            before = {"text": given.get("encoder_hidden_states"), "image": given.get("hidden_states")}
            for (stream, x), y in zip(before.items(), output, strict=True):
                if x is not None and y is not None:
                    cosine = torch.nn.functional.cosine_similarity(x, y, dim=-1)
                    sums.setdefault((block, stream), []).append(float(1 - cosine.mean()))

        return measure

    hooks = [block.register_forward_hook(hook(i), with_kwargs=True) for i, block in enumerate(stick.teacher.stack)]
    stick.loss(stick.teacher.module, 2)
    for each in hooks:
        each.remove()
    for stream, values in means.items():
        for block in range(len(hooks)):
            found = sums.get((block, stream))
            values.append(None if found is None else float(np.mean(found)))
    return means


def teacher_outcome(stick: Yardstick, seeds: list[int]) -> dict[str, Any]:
    """The results of the teacher with and without guidance, the loss that removing each block adds, and the influence of each."""
    file = stick.runs / "teacher.json"
    values: dict[str, Any] = dict(read_json(file)) if file.is_file() else {**block_losses(stick), "seeds": {}}
    for seed in seeds:
        if str(seed) not in values["seeds"]:
            drawn = {guidance: stick.drawn(stick.teacher.module, seed, guidance) for guidance in GUIDANCE[stick.kind]}
            values["seeds"][str(seed)] = drawn
            write_json(file, values)
    return values


def block_losses(stick: Yardstick) -> dict[str, Any]:
    """The held-out loss of the teacher, the loss that removing each block adds, and the influence of each."""
    base = stick.loss(stick.teacher.module, 8)
    removed: dict[str, Any] = {}
    for block in range(len(stick.teacher.stack)):
        gates = torch.ones(len(base), len(stick.teacher.stack))
        gates[:, block] = 0.0
        with stick.teacher.stack.gated(gates):
            added = stick.loss(stick.teacher.module, 8) - base
        errors = float(added.std(ddof=1) / np.sqrt(len(added)))
        removed[str(block)] = {"added": float(added.mean()), "standard_errors": float(added.mean()) / errors}
    depths, influence = stick.teacher.stack.depths(), block_influence(stick)
    return {"loss": float(base.mean()), "removed": removed, "depths": depths, "influence": influence}


def rows(runs: Path) -> list[str]:
    """Markdown tables of finished jobs: the teacher, its blocks, and each plan."""
    teacher = read_json(runs / "teacher.json")
    blocks = list(teacher["removed"].values())
    lines = table(
        ["block removed", *map(str, range(len(blocks)))],
        ["added loss", *(f"{block['added']:.4f}" for block in blocks)],
        ["standard errors", *(f"{block['standard_errors']:.0f}" for block in blocks)],
    )
    for stream, scores in teacher["influence"].items():
        known = [(score, block["added"]) for score, block in zip(scores, blocks, strict=True) if score is not None]
        rank = spearmanr(*zip(*known, strict=True)).statistic
        listed = ["-" if score is None else f"{score:.3f}" for score in scores]
        lines.append(
            "| "
            + " | ".join([f"block influence, {stream} stream (rank correlation with the loss {rank:.2f})", *listed])
            + " |"
        )
    jobs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for file in sorted(runs.glob("*--*.json")):
        values = read_json(file)
        jobs.setdefault((values["plan"], values["method"]), []).append(values)

    def cells(results: list[dict[str, Any]]) -> list[str]:
        return [
            spread([r[m] for r in results], places) for m, places in (("fid", 2), ("fid_heldout", 2), ("accuracy", 3))
        ]

    drawn = {g: [seed[g] for seed in teacher["seeds"].values()] for g in ("none", "1.5")}
    body = [[f"teacher, guidance {g}", "", "", f"{teacher['loss']:.4f}", *cells(each), ""] for g, each in drawn.items()]
    for (plan, method), results in sorted(jobs.items(), key=lambda job: float(np.mean([r["fid"] for r in job[1]]))):
        kept = "; ".join(sorted({" + ".join(" ".join(map(str, k)) for k in r["kept"].values()) for r in results}))
        losses = [spread([r[name] for r in results], 4) for name in ("loss_before", "loss")]
        body.append([plan, method, *losses, *cells(results), kept])
    heads = [
        "plan",
        "recovery",
        "loss before",
        "held-out loss",
        "FID, digits",
        "FID, digits:heldout",
        "prompt accuracy",
        "kept",
    ]
    return [*lines, "", *table(heads, *body)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--yardstick", choices=("digits-flux", "digits-sd3"), required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/two-stream-study"))
    parser.add_argument("--plans", default=",".join([*LEARNED, *CRITERIA]))
    parser.add_argument("--methods", default="masked-kd")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--share", type=float, default=0.07, help="images of a job, of those that the teacher saw")
    parser.add_argument("--table", action="store_true", help="print what is finished, run nothing")
    options = parser.parse_args()
    if options.table:
        print("\n".join(rows(options.runs / options.yardstick)))
        return
    torch.set_num_threads(1)
    flush_denormals()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    plans = options.plans.split(",")
    stick = Yardstick(options.yardstick, options.runs, options.share)
    print(json.dumps(teacher_outcome(stick, seeds)), flush=True)
    for seed in seeds:
        for plan in plans:
            for method in options.methods.split(","):
                values = outcome(stick, plan, method, seed)
                print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
