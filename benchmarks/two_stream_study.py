"""Compare choices of blocks of `digits-flux` and `digits-sd3`, recovered alike: images drawn by their own pipelines, and prompts.

    python benchmarks/two_stream_study.py --yardstick digits-flux --runs runs/two-stream-study
    python benchmarks/two_stream_study.py --yardstick digits-sd3 --runs runs/two-stream-study --seeds 0 --plans learned,bi

Each job removes half of all blocks and recovers the student by the settings of the recipe of the same name: the learned choices have
search and recovery in its steps, criteria that train nothing have all of them for the recovery. Finished jobs are reused, so the
command resumes. `--table` prints the results.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

import tinyfusion as tf
from regret import recovered
from shared import spread, table
from tinyfusion.conditioning.condition import Condition
from tinyfusion.config.loading import load_recipe
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import read_json, write_json
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.data.captioned_digits import COPIES, DIGIT_PROMPTS, PHRASINGS, digit_of, jittered
from tinyfusion.data.digits import ImageSet, load_digits
from tinyfusion.evaluate.extractors import open_extractor
from tinyfusion.evaluate.metrics import Moments, feature_moments, frechet_distance
from tinyfusion.models.places import shipped_models
from tinyfusion.processes.base import Batch, FoldedGuidance
from tinyfusion.sample.drive import to_uint8
from two_stream_parts import TOKENS

CALIBRATION = 8  # batches that criteria see
IMAGES = 1000
GUIDED: dict[str, dict[str, Any]] = {
    "flux": {"true_cfg_scale": 1.5, "negative_prompt": ""},
    "sd3": {"guidance_scale": 1.5},
}
FREE: dict[str, dict[str, Any]] = {"flux": {}, "sd3": {"guidance_scale": 1.0}}
# settings of the recipe that a learned choice changes
LEARNED: dict[str, dict[str, Any]] = {"learned": {}, "learned runs": {"distribution": "runs"}}
SIDES = {"flux": {f"learned {a} + {b}": {"scheme": f"{a}:4;{b}:8"} for a, b in ((4, 2), (3, 3), (1, 5))}}
CRITERIA = ("sensitivity", "min-loss", "bi", "flux-lite", "uniform")


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
    """A shipped pipeline, its teacher, recipe and data, and the measures of its students."""

    def __init__(self, name: str, runs: Path) -> None:
        from diffusers import DiffusionPipeline

        self.kind = name.removeprefix("digits-")
        self.runs = runs / name
        self.recipe = load_recipe(name, (), {})
        given, usual = self.recipe.recover, tf.TrainingSection()
        unread = {"log_every_steps": usual.log_every_steps, "checkpoint_every_steps": usual.checkpoint_every_steps}
        self.recovery = dataclasses.replace(given, training=dataclasses.replace(given.training, **unread))
        assert given.guidance is not None
        self.guidance = FoldedGuidance(given.guidance, 1)
        self.pipeline: Any = DiffusionPipeline.from_pretrained(shipped_models()[name], local_files_only=True)
        self.pipeline.set_progress_bar_config(disable=True)
        self.teacher = tf.open_model(name)
        self.texts = encoded_texts(self.kind, self.pipeline)
        self.extractor = open_extractor("digits-classifier", "cpu")
        self.objective: Any = tf.objective_of(self.teacher, label_drop=0.0)

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

    def drawn(self, transformer: Any, seed: int, arguments: dict[str, Any]) -> dict[str, float]:
        """FID and prompt accuracy of `IMAGES` images that the pipeline draws, of all prompts in turn.

        arguments: of the pipeline.
        """
        self.pipeline.transformer = transformer
        prompts = [DIGIT_PROMPTS[(7 * i) % len(DIGIT_PROMPTS)] for i in range(IMAGES)]
        pixels = []
        for first in range(0, IMAGES, 250):
            noise = [torch.Generator().manual_seed(seed * IMAGES + i) for i in range(first, first + 250)]
            images = self.pipeline(
                prompts[first : first + 250], height=8, width=8, num_inference_steps=self.recipe.pipeline.num_steps,
                generator=noise, max_sequence_length=TOKENS, output_type="np", **arguments,
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

    @cached_property
    def heldout(self) -> list[Any]:
        """Held-out digits with texts, noised at stratified times, eight times each."""
        images = load_digits(heldout=True)
        num = len(images)
        x = encoded_images(self.pipeline.vae, torch.from_numpy(images.x))
        labels = torch.from_numpy(images.y) * len(PHRASINGS) + torch.arange(num) % len(PHRASINGS)
        batches = []
        for repeat in range(8):
            draws = Randomness(99).at(repeat, 0, num)
            position = (np.argsort(draws.uniform("stratum")) + draws.uniform("timestep")) / num
            levels = self.objective.times.sigma(position)
            t = torch.from_numpy(self.objective.flow.convention.at_sigma(levels)).float()
            noise = torch.from_numpy(draws.normal("noise", tuple(x.shape[1:])))
            batches.append(self.objective.noised(Batch(x, self.texts.index(labels)), t, noise))
        return batches

    @torch.no_grad()
    def loss(self, model: Any) -> np.ndarray:
        """(360,) loss of every held-out digit."""
        terms = [
            self.objective.losses(model, each, self.objective.predict(model, each))["loss"] for each in self.heldout
        ]
        return torch.stack(terms).mean(0).numpy()

    @cached_property
    def guided(self) -> list[Tensor]:
        """What the teacher predicts of the held-out digits under guidance."""
        with torch.no_grad():
            return [self.objective.taught(self.teacher.module, each, self.guidance) for each in self.heldout]

    @torch.no_grad()
    def distance(self, student: Any) -> float:
        """Mean distillation loss of a student on the held-out digits."""
        own = [self.objective.taught(student.module, each, None) for each in self.heldout]
        pairs = zip(self.heldout, own, self.guided, strict=True)
        return float(torch.stack([self.objective.kd_terms(*pair)["kd_loss"].mean() for pair in pairs]).mean())


# ----------------------------------------------------------------------------------------------------------------- jobs


def learned(stick: Yardstick, changes: dict[str, Any], seed: int) -> Any:
    """A student whose blocks are chosen within its recovery."""
    unread = {"training": tf.PruneSection().training, "keep_deltas": False}
    pruning = dataclasses.replace(stick.recipe.prune, **unread, **changes)
    return tf.recover_model(
        stick.teacher, stick.teacher, stick.objective, stick.source(seed), stick.recovery, pruning, seed=seed
    )


def kept_blocks(student: Any) -> dict[str, list[int]]:
    """The blocks of the teacher that a student keeps, by list."""
    return {name: list(kept) for name, kept in student.facts.kept.items()}


def chosen(stick: Yardstick, criterion: str, seed: int) -> Any:
    """What a criterion keeps of the teacher."""
    source = stick.source(seed)
    student = tf.prune_model(
        stick.teacher, criterion, task=stick.objective, batches=source, num_batches=CALIBRATION, seed=seed
    )
    return dataclasses.replace(student, latent_shape=stick.latents.x.shape[1:])


def outcomes(stick: Yardstick, plans: list[str], seed: int) -> None:
    """Run the jobs of a seed that are not finished, and write what they give.

    The students of criteria are distilled side by side; criteria of the same blocks have the same student.
    """
    files = {plan: stick.runs / f"{plan.replace(' ', '_')}-s{seed}.json" for plan in plans}
    missing = [plan for plan in plans if not files[plan].is_file()]
    known = LEARNED | SIDES.get(stick.kind, {})

    def measured(student: Any, names: list[str]) -> None:
        values = {"seed": seed, "kept": kept_blocks(student), "distance": stick.distance(student)}
        values |= stick.drawn(student.module.eval(), seed, FREE[stick.kind])
        for name in names:
            write_json(files[name], {"plan": name, **values})
            print(json.dumps({"plan": name, **values}), flush=True)

    students: dict[str, tuple[Any, list[str]]] = {}
    for plan in (each for each in missing if each not in known):
        student = chosen(stick, plan, seed)
        students.setdefault(str(kept_blocks(student)), (student, []))[1].append(plan)
    if students:
        recipe = dataclasses.replace(
            stick.recipe, seed=seed, recover=dataclasses.replace(stick.recovery, search_share=None)
        )
        pruned = [student for student, _ in students.values()]
        trained = recovered(stick.teacher, pruned, recipe, stick.objective, stick.source(seed))
        for student, (_, names) in zip(trained, students.values(), strict=True):
            measured(student, names)
    for plan in (each for each in missing if each in known):
        measured(learned(stick, known[plan], seed), [plan])


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
    stick.loss(stick.teacher.module)
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
            ways = {"none": FREE, "1.5": GUIDED}
            drawn = {way: stick.drawn(stick.teacher.module, seed, given[stick.kind]) for way, given in ways.items()}
            values["seeds"][str(seed)] = drawn
            write_json(file, values)
    return values


def block_losses(stick: Yardstick) -> dict[str, Any]:
    """The held-out loss of the teacher, the loss that removing each block adds, and the influence of each."""
    base = stick.loss(stick.teacher.module)
    removed: dict[str, Any] = {}
    for block in range(len(stick.teacher.stack)):
        gates = torch.ones(len(base), len(stick.teacher.stack))
        gates[:, block] = 0.0
        with stick.teacher.stack.gated(gates):
            added = stick.loss(stick.teacher.module) - base
        errors = float(added.std(ddof=1) / np.sqrt(len(added)))
        removed[str(block)] = {"added": float(added.mean()), "standard_errors": float(added.mean()) / errors}
    return {"loss": float(base.mean()), "removed": removed, "influence": block_influence(stick)}


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
        head = f"block influence, {stream} stream (rank correlation with the loss {rank:.2f})"
        lines.append("| " + " | ".join([head, *listed]) + " |")
    jobs: dict[str, dict[int, dict[str, Any]]] = {}
    for file in sorted(runs.glob("*-s*.json")):
        values = read_json(file)
        jobs.setdefault(values["plan"], {})[values["seed"]] = values
    guided = {int(seed): ways["1.5"] for seed, ways in teacher["seeds"].items()}
    body = []
    for way in ("none", "1.5"):
        drawn = [ways[way] for ways in teacher["seeds"].values()]
        body.append([f"teacher, guidance {way}", "all", "", *_scores(drawn), "", ""])
    for plan, by_seed in sorted(jobs.items(), key=lambda job: float(np.mean([r["fid"] for r in job[1].values()]))):
        kept = [" + ".join(" ".join(map(str, each)) for each in r["kept"].values()) for r in by_seed.values()]
        over = [r["fid"] / guided[seed]["fid"] for seed, r in by_seed.items()]
        learned = jobs.get("learned", {})
        gap = [r["fid"] - learned[seed]["fid"] for seed, r in by_seed.items() if seed in learned]
        body.append(
            [plan, "; ".join(dict.fromkeys(kept)), spread([r["distance"] for r in by_seed.values()], 5)]
            + [*_scores(list(by_seed.values())), spread(over, 3), spread(gap, 2) if gap else ""]
        )
    heads = ["chosen by", "kept, by seed", "held-out distillation loss", "FID", "FID, held-out reference", "prompt accuracy",
             "FID over the teacher's", "FID above the learned choice's"]  # fmt: skip
    return [*lines, "", *table(heads, *body)]


def _scores(drawn: list[dict[str, Any]]) -> list[str]:
    return [spread([r[m] for r in drawn], places) for m, places in (("fid", 2), ("fid_heldout", 2), ("accuracy", 3))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--yardstick", choices=("digits-flux", "digits-sd3"), required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/two-stream-study"))
    parser.add_argument("--plans", default=",".join([*LEARNED, *CRITERIA]))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--table", action="store_true", help="print what is finished, run nothing")
    options = parser.parse_args()
    if options.table:
        print("\n".join(rows(options.runs / options.yardstick)))
        return
    torch.set_num_threads(1)
    flush_denormals()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    stick = Yardstick(options.yardstick, options.runs)
    print(json.dumps(teacher_outcome(stick, seeds)), flush=True)
    for seed in seeds:
        outcomes(stick, options.plans.split(","), seed)


if __name__ == "__main__":
    main()
