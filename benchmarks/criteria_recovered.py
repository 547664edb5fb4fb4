"""Recover the choice of every criterion as a recipe recovers its own, and compare their distance to the guided
teacher on held-out images, and FID, over seeds.

    python benchmarks/criteria_recovered.py --recipe digits --learned runs/seeds --runs runs/criteria --images 2000 [--out TABLE.md]
    python benchmarks/criteria_recovered.py --recipe digits --set recover.guidance=none --learned runs/free --runs runs/criteria-free

A criterion that trains nothing has all steps of the recipe for its recovery; the learned choice has them for search and recovery
together (`--learned`: the runs of `digits_seeds.py`). Students of one seed are distilled side by side on the same images, noise,
timesteps and label drops. FID is of the same noise and labels for all. Finished measurements are reused.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from drawn_fid import DrawnFid
from regret import mask_of, name_of, recovered_masks
from shared import spread, table
from tinyfusion.blocks.plan import global_indices
from tinyfusion.commands.prune import prune
from tinyfusion.config.loading import load_recipe
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import read_json, write_json, write_text
from tinyfusion.data.batches import ShuffledBatches
from tinyfusion.jobs.assemble import RunOptions, image_set
from tinyfusion.jobs.folding import folded_by
from tinyfusion.jobs.process_specs import objective_for
from tinyfusion.models.checkpoint import LoadedModel, open_model
from tinyfusion.prune.calibrate import calibration_set

CRITERIA = ("bi", "flux-lite", "sensitivity", "min-loss", "bk-sdm", "uniform")


class Measures:
    """Distance to the guided teacher on the same noised held-out images for all models, and FID of images from the same noise."""

    def __init__(self, recipe: Recipe, teacher: LoadedModel, options: argparse.Namespace) -> None:
        heldout = image_set(options.heldout, size=recipe.data.size)
        source = ShuffledBatches(heldout, Randomness(0), torch.device("cpu"))
        objective = objective_for(teacher, 0.0, recipe)
        self.teacher, self.guidance = teacher, folded_by(recipe, recipe.recover, teacher)
        self.calibration = calibration_set(objective, source, options.heldout, len(heldout), 2048, 256, 0)
        self.fid = DrawnFid(recipe, options.images)

    def of(self, model: LoadedModel) -> dict[str, float]:
        """Loss, and FID against every reference."""
        return {"loss": self.distance(model), **self.fid.of(model)}

    @torch.inference_mode()
    def distance(self, model: LoadedModel) -> float:
        """Mean distillation loss, of the outputs that images are drawn by."""
        process, terms = self.calibration.objective, []
        own = self.guidance if model.takes_guidance else None
        for noisy in self.calibration.batches:
            sides = [
                process.taught(m.module.eval(), noisy, g) for m, g in ((model, own), (self.teacher, self.guidance))
            ]
            terms.append(process.kd_terms(noisy, *sides)["kd_loss"])
        return float(torch.cat(terms).double().mean())


def masks_of(options: argparse.Namespace, seed: int, depths: dict[str, int]) -> dict[str, str]:
    """{criterion: the name of its mask}."""
    masks = {}
    for criterion in CRITERIA:
        folder = options.runs / f"cut-{criterion}-{seed}"
        if not (folder / "plan.json").is_file():
            sets = (*options.set, f"prune.criterion={criterion}", "prune.num_masks=924")
            prune(load_recipe(options.recipe, sets, {"seed": seed}), RunOptions(folder))
        masks[criterion] = name_of(global_indices(read_json(folder / "plan.json")["kept"], depths))
    return masks


def measure_seed(options: argparse.Namespace, seed: int) -> dict[str, dict[str, Any]]:
    """{criterion: its mask and measures} of one seed."""
    file = options.runs / f"measures-{seed}-{options.images}.json"
    done: dict[str, Any] = read_json(file) if file.is_file() else {}
    recipe = load_recipe(options.recipe, tuple(options.set), {"seed": seed})
    teacher = open_model(recipe.teacher)
    depths = teacher.stack.depths()
    masks = masks_of(options, seed, depths)
    learned = options.learned / f"seed-{seed}" / "recover" / "student"
    measures = None
    missing = [name for name in dict.fromkeys(masks.values()) if name not in done]
    students = recovered_masks(teacher, [mask_of(name) for name in missing], recipe) if missing else []
    todo = {**dict(zip(missing, students, strict=True))}
    todo |= {
        name: open_model(place)
        for name, place in (("learned", str(learned)), ("teacher", recipe.teacher))
        if name not in done
    }
    for name, model in todo.items():
        measures = measures or Measures(recipe, teacher, options)
        done[name] = measures.of(model)
        write_json(file, done)
        print(seed, name, json.dumps(done[name]), flush=True)
    own = name_of(global_indices(open_model(str(learned)).facts.kept, depths))  # type: ignore[arg-type]
    rows = {criterion: {"mask": mask, **done[mask]} for criterion, mask in masks.items()}
    return {"teacher": {"mask": "all", **done["teacher"]}, "learned": {"mask": own, **done["learned"]}, **rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learned", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--runs", type=Path, default=Path("runs/criteria"))
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--heldout", default="digits:heldout", help="data whose distance to the teacher is measured")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    flush_denormals()
    options.runs.mkdir(parents=True, exist_ok=True)
    seeds = [measure_seed(options, seed) for seed in range(options.seeds)]
    rows, references = [], load_recipe(options.recipe, tuple(options.set), {}).evaluate.references
    for name in seeds[0]:
        masks = "; ".join(dict.fromkeys(each[name]["mask"].replace("-", " ") for each in seeds))
        values = [[each[name][key] for each in seeds] for key in ("loss", *references)]
        over = [each[name][references[0]] / each["teacher"][references[0]] for each in seeds]
        gap = [each[name][references[0]] - each["learned"][references[0]] for each in seeds]
        rows.append(
            [
                name,
                masks,
                spread(values[0], 5),
                *(spread(each, 2) for each in values[1:]),
                spread(over, 3),
                spread(gap, 2),
            ]
        )
    head = ["chosen by", "kept, by seed", "held-out distillation loss", *(f"FID, `{name}`" for name in references),
            "FID over the teacher's", "FID above the learned choice's"]  # fmt: skip
    text = "\n".join(table(head, *rows))
    print(text)
    if options.out:
        write_text(options.out, text + "\n")


if __name__ == "__main__":
    main()
