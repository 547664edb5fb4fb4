"""Does a short trial rank the choices of blocks that a search leaves open? The likeliest ones, all trained to the end.

    python benchmarks/search_trials.py --recipe digits-sit --num 24 --also 0-2-4-7-9-11 --out runs/trials.json

The search of the recipe runs once. From its weights every choice is distilled for the remaining steps, on the same images, noise and
timesteps. Printed: the rank correlation (Spearman) of the final held-out distillation loss with what is known earlier: the
probability of the choice, the loss of the search's own weights, and the mean loss of stretches of the choice's training.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from scipy.stats import spearmanr

from criteria_recovered import Measures
from regret import TOGETHER, Remembering, mask_of, name_of
from tinyfusion.blocks.stack import frozen
from tinyfusion.config.loading import load_recipe
from tinyfusion.config.recipe import ComputeSection, Recipe
from tinyfusion.core.device import flush_denormals
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import write_json
from tinyfusion.jobs.assemble import batches_for
from tinyfusion.jobs.folding import fold_guidance, with_taught_target
from tinyfusion.jobs.process_specs import objective_for
from tinyfusion.jobs.recovery import SearchedRecovery, recovery
from tinyfusion.models.checkpoint import LoadedModel, open_model
from tinyfusion.prune.criteria import by_indices
from tinyfusion.prune.mask_search import Mask
from tinyfusion.recover.distill import distilled
from tinyfusion.training.engine import Engine
from tinyfusion.training.loop import BatchSource, train_steps
from tinyfusion.training.optim import ParameterGroup, trainable
from tinyfusion.training.state import TrainState

STRETCHES = ((0, 15), (0, 30), (30, 60), (0, 60), (60, 120), (0, 120))  # steps


def searched(recipe: Recipe, teacher: LoadedModel, source: BatchSource, engine: Engine) -> SearchedRecovery:
    """The training of a recipe at the end of its search."""
    alone = replace(recipe, recover=replace(recipe.recover, search_candidates=1))
    process = objective_for(teacher, recipe.recover.training.label_drop, recipe)
    training = recovery(alone, teacher.copy(), teacher.copy(), process, source, engine)
    assert isinstance(training, SearchedRecovery)
    settings = replace(training.settings, stop_after=recipe.recover.search_steps)
    for _ in train_steps(training.state, training.objective, source, settings, Randomness(recipe.seed), engine):
        pass
    return training


def distil(
    students: Sequence[LoadedModel], teacher: LoadedModel, recipe: Recipe, source: BatchSource
) -> list[tuple[LoadedModel, list[float]]]:
    """The students, trained side by side for the steps after the search, and the loss of every step."""
    training = replace(recipe.recover.training, steps=recipe.recover.training.steps - recipe.recover.search_steps)
    settings = replace(recipe.recover, search_share=None, search_candidates=1, training=training)
    own, taught = replace(recipe, recover=settings), Remembering(frozen(teacher.copy().module))
    process = objective_for(teacher, training.label_drop, recipe)
    states, loops, losses = [], [], [[] for _ in students]  # type: ignore[var-annotated]
    for student in students:
        guidance = fold_guidance(own, settings, student, teacher, process)
        goal = replace(distilled(settings, process, teacher, student, [], guidance=guidance), teacher=taught)
        states.append(TrainState(student.module.train(), [ParameterGroup(trainable(student.module))], training))
        engine = Engine("cpu", ComputeSection(prefetch_batches=0))
        loops.append(train_steps(states[-1], goal, source, training, Randomness(recipe.seed + 1), engine))
    for _ in range(training.steps):
        taught.outputs = None
        for loop, kept in zip(loops, losses, strict=True):
            kept.append(float(next(loop).terms["loss"]))
    ended = [student.with_changed(state.averages()) for student, state in zip(students, states, strict=True)]
    return list(zip(ended, losses, strict=True))


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
    training = searched(recipe, teacher, source, Engine("cpu", recipe.compute))
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
        for mask, own, (ended, losses) in zip(part, before, distil(students, teacher, recipe, source), strict=True):
            means = {f"steps {a + 1} to {b}": sum(losses[a:b]) / (b - a) for a, b in STRETCHES}
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
