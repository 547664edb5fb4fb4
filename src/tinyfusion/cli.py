"""The command line: arguments to a recipe to one call of a command, and the exit codes. No heavy imports before parsing."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from tinyfusion.config.loading import flatten, load_recipe, nearest, recipe_fields, shipped_recipes, to_plain
from tinyfusion.config.recipe import Recipe
from tinyfusion.config.unread import Asked, check_typed
from tinyfusion.core.errors import UserError
from tinyfusion.core.fetching import WouldFetch, no_fetching
from tinyfusion.core.files import disk_reason
from tinyfusion.core.launch import check_launch, launched_processes, launched_rank
from tinyfusion.core.progress import say
from tinyfusion.core.signals import Interrupted, SignalWatch
from tinyfusion.core.version import __version__
from tinyfusion.options import VERBS
from tinyfusion.parsing import overrides, parse, typed

_LONGEST_ERROR = 4000  # characters; a name or value in it may have any length
_NO_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "ALLOC_FAILED")


_LEFT = {"state": "left to process 0"}


def execute(verb: str, options: Any, command: str = "") -> dict[str, Any]:
    """Execute a verb. Returns its machine-readable outcome. command: as typed, for the record."""
    if verb == "recipes":
        return _recipes(options)
    if verb == "inspect":
        return _inspect(options)
    if verb == "lora":
        return _lora(options)
    if verb == "record":
        return _checked(options, lambda: _record(options))
    recipe = load_recipe(options.recipe, options.set, overrides(verb, options))
    recipe = dataclasses.replace(recipe, typed=typed(verb, options))
    recipe, remarks = check_typed(Asked(verb, recipe, vars(options)))
    say(remarks)
    if verb in ("prune", "run") and not recipe.teacher:
        raise UserError(f"{verb} needs --teacher (or a --recipe that names one), such as --teacher digits")
    if verb == "bench":
        return _checked(options, lambda: _bench(options, recipe))
    if verb == "replay":
        from tinyfusion.commands.replay import replay

        return replay(options.run, options.step, options.device)
    if not VERBS[verb].parallel and launched_rank() > 0:
        return _LEFT | {"verb": verb}
    from tinyfusion.jobs.assemble import RunOptions

    names = ("num_heads", "family", "num_classes", "resume", "blocks", "inputs")
    given = {name: getattr(options, name, None) for name in names}
    out = options.out
    where = RunOptions(out, options.overwrite, options.dry_run, command=command, **given)
    outcome = _checked(options, lambda: _perform(verb, options, recipe, where) or {})
    state = "checked" if options.dry_run else "done"
    if launched_rank() == 0:
        print(f"{verb}: {state}, {out}" + (" (nothing was written)" if options.dry_run else ""), file=sys.stderr)
    return {"verb": verb, "state": state, "out": str(out), **outcome}


def _checked(options: Any, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The outcome of `work`; a dry run downloads nothing, and ends where something would have to be."""
    if not options.dry_run:
        return work()
    try:
        with no_fetching():
            return work()
    except WouldFetch as missing:
        if launched_rank() == 0:
            print(f"{missing}; what needs it was not checked", file=sys.stderr)
        return {"state": "checked", **missing.outcome()}


def _perform(verb: str, options: Any, recipe: Recipe, where: Any) -> dict[str, Any] | None:
    """Call the command of a verb; torch is imported here."""
    from tinyfusion.core.device import flush_denormals

    flush_denormals()
    if verb == "report":
        from tinyfusion.commands.report import report

        report(options.runs, where)
        return None
    if verb == "export":
        from tinyfusion.commands.export import ExportOptions, export

        names = ("model", "to", "pipeline", "vae", "labels", "push_to_hub", "guided", "quantize")
        chosen = {name: getattr(options, name) for name in names}
        return export(where, ExportOptions(settings=recipe.sample, **chosen))
    words = {
        "recover": ("student",), "dynamic": ("model",), "distill-steps": ("model",),
        "encode": ("data", "prompts"), "sample": ("model", "grid", "png"), "explain": ("model",),
        "evaluate": ("samples", "reference", "against"), "demo": ("model", "vs", "labels", "runtime"),
    }.get(verb, ())  # fmt: skip
    together = {"together": True} if verb == "sample" else {}
    name = "encode_captions" if verb == "encode" and recipe.encode.pipeline is not None else verb.replace("-", "_")
    command = getattr(import_module(f"tinyfusion.commands.{name}"), name)
    return command(recipe, where, *(getattr(options, name) for name in words), **together)


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
    given = {name: value for name in fields if (value := getattr(options, name)) is not None}
    if (calls := given.get("calls")) is not None:
        if calls != "all" and not calls.isdecimal():
            raise UserError(f"--calls wants a whole number, or all; got {calls!r}")
        given["calls"] = None if calls == "all" else int(calls)
    drawing = Drawing(**given)
    names = ("pipeline", "prompts", "out", "component", "shard_prompts", "blocks", "overwrite", "dry_run")
    chosen = {name: getattr(options, name) for name in names}
    facts = record(RecordOptions(**chosen, drawing=drawing, device=options.device or "auto"))
    if "rank" in facts:
        return facts
    done = f"{facts['calls']:,} calls of" if "calls" in facts else "calls of"
    print(f"record: {done} {facts['prompts']:,} prompts, {facts['class_name']}, {options.out}", file=sys.stderr)
    return facts


def _inspect(options: Any) -> dict[str, Any]:
    from tinyfusion.commands.inspect import inspect, parent_words
    from tinyfusion.commands.transformers import inspect_transformer
    from tinyfusion.jobs.transformer_sources import transformer_of
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
            print(f"{name:24} {value:,}" if type(value) is int else f"{name:24} {value}")
        for parent in facts["lineage"]:
            print(f"{'parent':24} {parent_words(parent)}")
    return facts


def _bench(options: Any, recipe: Recipe) -> dict[str, Any]:
    """Measure in the first process only, so that no other disturbs it."""
    if launched_rank() > 0:
        return {}
    from tinyfusion.commands.bench import BenchModels, bench
    from tinyfusion.commands.sample_prompts import draws_prompts
    from tinyfusion.core.device import flush_denormals

    flush_denormals()
    if draws_prompts(recipe):
        from tinyfusion.commands.bench_prompts import bench_prompts

        return bench_prompts(recipe, BenchModels(options.model, options.vs), options.blocks, options.dry_run)
    models = BenchModels(options.model, options.vs, options.num_heads, options.family, options.num_classes)
    return bench(recipe, models, options.dry_run)


def _recipes(options: Any) -> dict[str, Any]:
    """Shipped recipes with their main expected numbers; one with all of them (`name`); or every field (`list_fields`)."""
    if options.list_fields:
        fields = {path: {"default": default, "meaning": text} for path, default, text in recipe_fields(Recipe())}
        if not options.json:
            for path, about in fields.items():
                print(f"{path} = {json.dumps(about['default'])}\n    {about['meaning']}")
        return fields
    known = list(shipped_recipes())
    if options.name and options.name not in known:
        raise UserError(f"no shipped recipe {options.name!r}{nearest(options.name, known)} (of {', '.join(known)})")
    listed = {name: to_plain(load_recipe(name)) for name in ([options.name] if options.name else known)}
    if not options.json:
        for name, values in listed.items():
            minutes = f"{values['minutes']:g} min" if values["minutes"] else ""
            print(f"{name:18} {minutes:8} {values['description']}")
            for line in _expected(name, values["expected"], all_of_them=bool(options.name)):
                print(f"{'':27} {line}")
    return listed


def _expected(name: str, numbers: Sequence[dict[str, Any]], all_of_them: bool) -> list[str]:
    """A line per expected number, or one line of the student's first FID and its speed, with the number of others."""
    if all_of_them:
        return [f"expected {n['metric']} {n['value']:g} +- {n['tolerance']:g} {n['note']}".rstrip() for n in numbers]
    fids = [n for n in numbers if n["metric"].startswith("student.") and n["metric"].endswith(".fid")][:1]
    shown = [*fids, *(n for n in numbers if n["metric"] == "speedup")]
    main = [f"{'speedup' if n['metric'] == 'speedup' else 'FID'} {n['value']:g} +- {n['tolerance']:g}" for n in shown]
    left = len(numbers) - len(shown)
    more = f"{left}{' more' if main else ''} in `tinyfusion recipes {name}`"
    return ["expected: " + ", ".join([*main, more] if left else main)] if numbers else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code (docs/contract.md)."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # a damaged picture is an error, or harmless
    with guarded_streams():
        return _exit_code(sys.argv[1:] if arguments is None else list(arguments))


def _answer(arguments: Sequence[str]) -> None:
    """Execute the arguments, and print the outcome. Raises what a verb raises."""
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


def _exit_code(arguments: Sequence[str]) -> int:
    """Execute the arguments, and print an error. Returns the exit code."""
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
    except BrokenPipeError:  # the reader of our output has ended, as in `tinyfusion inspect M | head`
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return _fail(_no_space(error.filename), debug, error)
        if error.errno == errno.ENOMEM:
            return _unexpected(error, debug)
        place = error.filename or "while reading or writing"
        return _fail(UserError(f"{error.strerror or error}: {place}"), debug, error)
    except Exception as error:  # our bug, the machine's memory, or another process that ended
        return _unexpected(error, debug)
    return 0


def _fail(error: UserError, debug: bool, cause: BaseException | None = None) -> int:
    if debug:
        traceback.print_exception(cause or error)
    text = " ".join(str(error).split())
    short = text if len(text) <= _LONGEST_ERROR else f"{text[: _LONGEST_ERROR // 2]} ... {text[-_LONGEST_ERROR // 2 :]}"
    print(f"error: {short}", file=sys.stderr)
    return 2


def _no_space(where: str | None = None) -> UserError:
    advice = "free some, then the same command continues from its last checkpoint"
    return UserError(f"no space left on the disk{f': {where}' if where else ''}; {advice}")


def _unexpected(error: Exception, debug: bool) -> int:
    text = str(error)
    if "No space left on device" in text:  # safetensors has an exception of its own
        return _fail(_no_space(), debug, error)
    if "can't start new thread" in text:
        few = "the system starts no more threads for this user: end other programs, or raise its limit (ulimit -u)"
        return _fail(UserError(few), debug, error)
    if isinstance(error, MemoryError) or any(sign in text for sign in _NO_MEMORY):
        reason = text.strip().partition("\n")[0] or "the system gave no more"
        less = "in training, --gradient-accumulation-steps and --gradient-checkpointing need less, with the same result"
        return _fail(UserError(f"out of memory: use a smaller batch; {less} ({reason})"), debug, error)
    if launched_processes() > 1:
        from tinyfusion.training.engine import lost_process

        if lost := lost_process(error):
            return _fail(lost, debug, error)
    traceback.print_exception(error)
    print("this is a bug in tinyfusion; please report it with the lines above", file=sys.stderr)
    return 1


class _Stream:
    """A text stream that escapes characters which it cannot encode, such as bytes of a name that is not UTF-8.

    lossy: drop text that cannot be written; else raise UserError, or BrokenPipeError where the reader has ended.
    """

    def __init__(self, stream: Any, lossy: bool) -> None:
        self._stream, self._lossy = stream, lossy
        self.failed = False

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._attempt(self._stream.write, text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, call: Any, *given: str) -> None:
        try:
            call(*given)
        except OSError as error:
            self.failed = True
            if self._lossy:
                return
            if isinstance(error, BrokenPipeError):
                raise
            raise UserError(f"cannot write standard output: {disk_reason(error)}") from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def guarded_streams() -> Iterator[None]:
    """Within the context, standard error never fails, and standard output fails with a UserError, at `flush` at the latest.

    A closed stream becomes the null device, so that no file opened later gets its descriptor and what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    before = sys.stdout, sys.stderr
    nothing = open(os.devnull, "w") if None in before else None  # noqa: SIM115  # closed below
    out = _Stream(sys.stdout or nothing, lossy=False)
    sys.stdout, sys.stderr = out, _Stream(sys.stderr or nothing, lossy=True)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        if out.failed:  # what is left in its buffer would fail again at the end of the program
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        if nothing is not None:
            nothing.close()
