"""Write a plan by hand to a file, replay it, and inspect the student.

    python examples/custom_plan.py [--model digits] [--keep 0,2,4,6,8,10] [--out cut]

A plan is data: any rule that names blocks can make one. It applies only to the model it was made for.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tinyfusion import open_model
from tinyfusion.blocks.plan import plan_from_json
from tinyfusion.commands.inspect import inspect
from tinyfusion.core.errors import UserError
from tinyfusion.core.rundir import read_json, write_json
from tinyfusion.models.checkpoint import save_model
from tinyfusion.prune.criteria import by_indices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="digits", help="model, as every verb takes it")
    parser.add_argument("--keep", help="blocks to keep; by default every other one")
    parser.add_argument("--out", type=Path, default=Path("cut"))
    args = parser.parse_args()

    teacher = open_model(args.model)
    keep = [int(i) for i in args.keep.split(",")] if args.keep else range(0, len(teacher.stack), 2)
    write_json(args.out / "plan.json", by_indices(teacher, list(keep), seed=0).to_json())

    plan = plan_from_json(read_json(args.out / "plan.json"))
    student = teacher.cut(plan)
    save_model(student, args.out / "student")

    before, after = inspect(teacher), inspect(open_model(args.out))
    for name in ("depth", "num_parameters", "macs"):
        print(f"{name:15} {before[name]:>12,} -> {after[name]:>12,}")
    print(f"kept {after['kept']}, parent {after['lineage'][0]['hash'][:12]}")
    try:
        student.cut(plan)
    except UserError as error:
        print(f"on another model: {error}")


if __name__ == "__main__":
    main()
