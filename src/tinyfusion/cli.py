"""The command line: verbs to a recipe to one call in jobs, and the exit codes. Imports nothing heavy before parsing."""

from __future__ import annotations

import errno
import json
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from tinyfusion.config.loading import (
    flatten,
    load_recipe,
    nearest,
    recipe_fields,
    shipped_recipes,
    to_plain,
)
from tinyfusion.config.recipe import Recipe
from tinyfusion.core.errors import UserError
from tinyfusion.core.fetching import WouldFetch, no_fetching
from tinyfusion.core.launch import check_launch, launched_processes, launched_rank
from tinyfusion.core.signals import Interrupted, SignalWatch
from tinyfusion.core.standard_streams import guarded_streams
from tinyfusion.core.version import __version__
from tinyfusion.options import VERBS
from tinyfusion.parsing import overrides, parse


def execute(verb: str, options: Any, command: str = "") -> dict[str, Any]:
    """Do what a verb says; its machine-readable outcome. command: as typed, for the record."""
    if verb == "recipes":
        return _recipes(options)
    if verb == "inspect":
        return _inspect(options)
    if verb == "lora":
        return _lora(options)
    if verb == "record":
        return _checked(options, lambda: _record(options))
    recipe = load_recipe(options.recipe, options.set, overrides(verb, options))
    _check_teacher(verb, recipe)
    if verb == "bench":
        return _checked(options, lambda: _bench(options, recipe))
    if verb == "replay":
        from tinyfusion.commands.replay import replay

        return replay(options.run, options.step, options.device)
    if not VERBS[verb].parallel and launched_rank() > 0:
        return {"verb": verb, "state": "left to process 0"}
    from tinyfusion.jobs.assemble import RunOptions

    names = ("num_heads", "family", "num_classes", "resume", "blocks", "inputs")
    said = {name: getattr(options, name, None) for name in names}
    out = options.out
    where = RunOptions(out, options.overwrite, options.dry_run, command=command, **said)
    outcome = _checked(options, lambda: _perform(verb, options, recipe, where) or {})
    state = "checked" if options.dry_run else "done"
    if launched_rank() == 0:
        print(f"{verb}: {state}, {out}" + (" (nothing was written)" if options.dry_run else ""), file=sys.stderr)
    return {"verb": verb, "state": state, "out": str(out), **outcome}


def _checked(options: Any, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` answers; in a dry run nothing is fetched, and what would be is the end of what can be checked."""
    if not options.dry_run:
        return work()
    try:
        with no_fetching():
            return work()
    except WouldFetch as missing:
        if launched_rank() == 0:
            print(f"{missing}; what needs it was not checked", file=sys.stderr)
        return {"state": "checked", "would_fetch": {"what": missing.what, "bytes": missing.num_bytes}}


def _check_teacher(verb: str, recipe: Recipe) -> None:
    """A teacher that nobody named is not assumed."""
    if verb in ("prune", "run") and not recipe.teacher:
        raise UserError(f"{verb} needs --teacher (or a --recipe that names one), such as --teacher digits")


def _perform(verb: str, options: Any, recipe: Recipe, where: Any) -> dict[str, Any] | None:
    """One call in jobs; torch is imported here."""
    from tinyfusion.core.device import flush_denormals

    flush_denormals()
    if verb == "report":
        from tinyfusion.commands.report import report

        report(options.runs, where)
        return None
    if verb == "export":
        from tinyfusion.commands.export import ExportOptions, export

        chosen = {name: getattr(options, name) for name in ("model", "to", "pipeline", "vae", "labels", "push_to_hub")}
        return export(where, ExportOptions(settings=recipe.sample, **chosen))
    typed = {
        "recover": ("student",), "dynamic": ("model",), "encode": ("data",), "sample": ("model", "grid", "png"),
        "evaluate": ("samples", "reference", "against"),
    }.get(verb, ())  # fmt: skip
    together = {"together": True} if verb == "sample" else {}
    command = getattr(import_module(f"tinyfusion.commands.{verb}"), verb)
    return command(recipe, where, *(getattr(options, name) for name in typed), **together)


def _lora(options: Any) -> dict[str, Any]:
    from tinyfusion.commands.lora import LoraOptions, lines, renumber_lora

    names = ("trained_on", "form")
    chosen: dict[str, Any] = {name: getattr(options, name) or getattr(LoraOptions, name) for name in names}
    files: dict[str, Any] = {"file": options.file, "model": options.model, "out": options.out, "blocks": options.blocks}
    facts = renumber_lora(LoraOptions(**files, **chosen, overwrite=options.overwrite, dry_run=options.dry_run))
    if not options.json:
        print("\n".join(lines(facts)))
    return facts


def _record(options: Any) -> dict[str, Any]:
    from tinyfusion.commands.record import RecordOptions, record
    from tinyfusion.jobs.recording import Drawing

    fields = ("steps", "guidance_scale", "height", "width", "frames", "seed", "calls")
    drawing = Drawing(**{name: value for name in fields if (value := getattr(options, name)) is not None})
    names = ("pipeline", "prompts", "out", "component", "blocks", "overwrite", "dry_run")
    chosen = {name: getattr(options, name) for name in names}
    facts = record(RecordOptions(**chosen, drawing=drawing, device=options.device or "auto"))
    done = f"{facts['calls']:,} calls of" if "calls" in facts else "calls of"
    print(f"record: {done} {facts['prompts']:,} prompts, {facts['class_name']}, {options.out}", file=sys.stderr)
    return facts


def _inspect(options: Any) -> dict[str, Any]:
    from tinyfusion.commands.inspect import inspect, parent_words
    from tinyfusion.commands.transformers import inspect_transformer
    from tinyfusion.jobs.transformers import transformer_of
    from tinyfusion.models.checkpoint import open_model

    weights = options.weights or Recipe().sample.weights
    if transformer := transformer_of(options.model, options.blocks):
        facts = inspect_transformer(transformer, options.inputs)
    elif options.inputs is not None:
        raise UserError(f"--inputs is for transformers of diffusers, and {options.model} is none: leave it out")
    else:
        facts = inspect(open_model(options.model, weights, options.num_heads, options.family, options.num_classes))
    if not options.json:
        for name, value in flatten({k: v for k, v in facts.items() if k != "lineage"}).items():
            print(
                f"{name:24} {value:,}"
                if isinstance(value, int) and not isinstance(value, bool)
                else f"{name:24} {value}"
            )
        for parent in facts["lineage"]:
            print(f"{'parent':24} {parent_words(parent)}")
    return facts


def _bench(options: Any, recipe: Recipe) -> dict[str, Any]:
    """Only the first process measures, so that no other disturbs it."""
    if launched_rank() > 0:
        return {}
    from tinyfusion.commands.bench import BenchModels, bench
    from tinyfusion.core.device import flush_denormals

    flush_denormals()
    return bench(
        recipe,
        BenchModels(options.model, options.vs, options.num_heads, options.family, options.num_classes),
        options.dry_run,
    )


def _recipes(options: Any) -> dict[str, Any]:
    """A sentence, minutes and the main expected numbers of every shipped recipe; of one all of them; or the fields of any."""
    if options.list_fields:
        found = {path: {"default": default, "meaning": text} for path, default, text in recipe_fields(Recipe())}
        if not options.json:
            for path, about in found.items():
                print(f"{path} = {json.dumps(about['default'])}\n    {about['meaning']}")
        return found
    known = list(shipped_recipes())
    if options.name and options.name not in known:
        raise UserError(
            f"no shipped recipe {options.name!r}{nearest(options.name, known)} (there is {', '.join(known)})"
        )
    listed = {name: to_plain(load_recipe(name)) for name in ([options.name] if options.name else known)}
    if not options.json:
        for name, values in listed.items():
            minutes = f"{values['minutes']:g} min" if values["minutes"] else ""
            print(f"{name:18} {minutes:8} {values['description']}")
            for line in _expected(values["expected"]) if options.name else _main_expected(name, values["expected"]):
                print(f"{'':27} {line}")
    return listed


def _expected(numbers: Sequence[dict[str, Any]]) -> list[str]:
    """A line for every expected number."""
    return [f"expected {n['metric']} {n['value']:g} +- {n['tolerance']:g} {n['note']}".rstrip() for n in numbers]


def _main_expected(name: str, numbers: Sequence[dict[str, Any]]) -> list[str]:
    """One line of the student's first FID and its speed, and where the others are; none where nothing is expected."""
    fids = [n for n in numbers if n["metric"].startswith("student.") and n["metric"].endswith(".fid")][:1]
    shown = [*fids, *(n for n in numbers if n["metric"] == "speedup")]
    said = [f"{'speedup' if n['metric'] == 'speedup' else 'FID'} {n['value']:g} +- {n['tolerance']:g}" for n in shown]
    left = len(numbers) - len(shown)
    more = f"{left}{' more' if said else ''} in `tinyfusion recipes {name}`"
    return ["expected: " + ", ".join([*said, more] if left else said)] if numbers else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit codes of docs/contract.md."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # what is wrong with a picture is an error, or nothing
    with guarded_streams():
        return _ended(sys.argv[1:] if arguments is None else list(arguments))


def _answer(arguments: Sequence[str]) -> None:
    """Do what the arguments say, and print the outcome. Raises what a verb raises."""
    if list(arguments) == ["--version"]:
        print(f"tinyfusion {__version__}")
    else:
        check_launch()
        verb, options = parse(arguments)
        reproducing = [a for a in arguments if a not in ("--overwrite", "--debug", "--json")]
        outcome = execute(verb, options, shlex.join(["tinyfusion", *reproducing]))
        if options.json and launched_rank() == 0:
            print(json.dumps(outcome))
    sys.stdout.flush()


def _ended(arguments: Sequence[str]) -> int:
    """The exit code of the whole, after whatever error was said."""
    debug = "--debug" in arguments
    try:
        with SignalWatch(patient=False):
            _answer(arguments)
    except UserError as error:
        return _fail(error, debug)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our output has seen enough, as in `tinyfusion inspect M | head`
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(_no_space(error.filename), debug, error)
        if error.errno == errno.ENOMEM:
            return _unexpected(error, debug)
        return _fail(
            UserError(f"{error.strerror or error}: {error.filename or 'while reading or writing'}"), debug, error
        )
    except Exception as error:  # our bug, the machine's memory, or another process that ended
        return _unexpected(error, debug)
    return 0


_LONGEST_ERROR = 4000  # characters; a name or value in it may have any length


def _fail(error: UserError, debug: bool, cause: BaseException | None = None) -> int:
    if debug:
        traceback.print_exception(cause or error)
    text = " ".join(str(error).split())
    short = text if len(text) <= _LONGEST_ERROR else f"{text[: _LONGEST_ERROR // 2]} ... {text[-_LONGEST_ERROR // 2 :]}"
    print(f"error: {short}", file=sys.stderr)
    return 2


def _no_space(where: str | None = None) -> UserError:
    return UserError(
        f"no space left on the disk{f': {where}' if where else ''}; free some, then the same command goes on from its last checkpoint"
    )


_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "ALLOC_FAILED",
)
_SMALLER = (
    "a training also takes less by --gradient-accumulation-steps and --gradient-checkpointing, with the same result"
)


def _unexpected(error: Exception, debug: bool) -> int:
    said = str(error)
    if "No space left on device" in said:  # safetensors has an exception of its own
        return _fail(_no_space(), debug, error)
    if "can't start new thread" in said:
        few = "the system starts no more threads for this user: end other programs, or raise its limit (ulimit -u)"
        return _fail(UserError(few), debug, error)
    if isinstance(error, MemoryError) or any(sign in said for sign in _NO_MEMORY):
        short = said.strip().partition("\n")[0] or "the system gave no more"
        return _fail(UserError(f"out of memory: use a smaller batch; {_SMALLER} ({short})"), debug, error)
    if launched_processes() > 1:
        from tinyfusion.training.engine import lost_process

        if lost := lost_process(error):
            return _fail(lost, debug, error)
    traceback.print_exception(error)
    print("this is a bug in tinyfusion; please report it with the lines above", file=sys.stderr)
    return 1
