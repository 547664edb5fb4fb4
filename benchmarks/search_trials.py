"""Does a short trial rank the choices of blocks that a search leaves open? The likeliest ones, all trained to the end.

    python benchmarks/search_trials.py --recipe digits-sit --num 24 --also 0-2-4-7-9-11 --out runs/trials.json

The search of the recipe runs once. From its weights every choice is distilled for the remaining steps, on the same images, noise and
timesteps. Printed: the rank correlation (Spearman) of the final held-out distillation loss with what is known earlier: the
probability of the choice, the loss of the search's own weights, and the mean loss of stretches of the choice's training.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from scipy.stats import spearmanr

from criteria_recovered import Measures
from regret import TOGETHER, mask_of, name_of, recovered
from tinyfusion.config.loading import load_recipe
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rundir import write_json
from tinyfusion.jobs.assemble import batches_for
from tinyfusion.jobs.folding import with_taught_target
from tinyfusion.jobs.process_specs import objective_for
from tinyfusion.jobs.recovery import SearchedRecovery, recovery
from tinyfusion.models.checkpoint import LoadedModel, open_model
from tinyfusion.prune.criteria import by_indices
from tinyfusion.prune.mask_search import Mask
from tinyfusion.training.engine import Engine
from tinyfusion.training.loop import BatchSource

STRETCHES = ((0, 15), (0, 30), (30, 60), (0, 60), (60, 120), (0, 120))  # steps


def searched(recipe: Recipe, teacher: LoadedModel, source: BatchSource) -> SearchedRecovery:
    """The training of a recipe at the end of its search."""
    process = objective_for(teacher, recipe.recover.training.label_drop, recipe)
    training = recovery(recipe, teacher.copy(), teacher.copy(), process, source, Engine("cpu", recipe.compute))
    assert isinstance(training, SearchedRecovery)
    settings = replace(training.settings, stop_after=recipe.recover.search_steps)
    for _ in replace(training, settings=settings).steps(trials=False):
        pass
    return training


def after_search(recipe: Recipe) -> Recipe:
    """The recipe of the steps that are left after its search, with other noise."""
    training = replace(recipe.recover.training, steps=recipe.recover.training.steps - recipe.recover.search_steps)
    return replace(recipe, seed=recipe.seed + 1, recover=replace(recipe.recover, search_share=None, training=training))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="digits-sit")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num", type=int, default=24, help="likeliest choices")
    parser.add_argument("--also", type=mask_of, nargs="*", default=[], help="further choices, such as 0-2-4-7-9-11")
    parser.add_argument("--heldout", default="digits:heldout")
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    flush_denormals()
    recipe = load_recipe(options.recipe, tuple(options.set), {"seed": options.seed})
    teacher = open_model(recipe.teacher)
    recipe = with_taught_target(recipe, teacher, [])
    measures, source = Measures(recipe, teacher, options), batches_for(recipe, teacher, torch.device("cpu"))
    training, rest = searched(recipe, teacher, source), after_search(recipe)
    process = objective_for(teacher, recipe.recover.training.label_drop, recipe)
    gates, weights = training.learner.objective.gates, training.state.weights()
    changed = {name: value for name, value in weights.items() if not name.startswith("gates.")}
    likely = gates.likeliest(options.num, recipe.prune.scaling[1], 1e-9)
    choices: list[Mask] = [tuple(sorted(block for kept in choice for block in kept)) for choice in likely]
    choices += [mask for mask in options.also if mask not in choices]
    rows: dict[str, dict[str, float]] = {}
    for first in range(0, len(choices), TOGETHER):
        part = choices[first : first + TOGETHER]
        whole = teacher.with_changed(changed)
        students = [whole.cut(replace(by_indices(teacher, list(mask), 0), teacher="")) for mask in part]
        before = [measures.distance(student) for student in students]
        losses: list[list[float]] = []
        ends = recovered(teacher, students, rest, process, source, losses)
        for mask, own, ended, course in zip(part, before, ends, zip(*losses, strict=True), strict=True):
            means = {f"steps {a + 1} to {b}": sum(course[a:b]) / (b - a) for a, b in STRETCHES}
            rows[name_of(mask)] = {"weights of the search": own, **means, "final": measures.distance(ended)}
            print(name_of(mask), rows[name_of(mask)], flush=True)
            write_json(options.out, rows)
    final = [row["final"] for row in rows.values()]
    print(f"probability: {spearmanr(range(options.num), final[: options.num])[0]:.2f}, ends at {final[0]:.5f}")
    for key in rows[name_of(choices[0])]:
        values = [row[key] for row in rows.values()]
        print(
            f"{key}: {spearmanr(values, final)[0]:.2f}, the best by it ends at {final[values.index(min(values))]:.5f}"
        )


if __name__ == "__main__":
    main()
