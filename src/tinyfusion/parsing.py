"""Parse the arguments of a verb: argparse built of the rows in `options.py`, with errors as `UserError`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinyfusion.config.loading import nearest
from tinyfusion.core.errors import UserError
from tinyfusion.options import VERBS, Option

_DESCRIPTION = (
    "Prune diffusion transformers by learned masks, recover them by distillation, measure and report. "
    "Without a --recipe the published values for ImageNet are the defaults; `tinyfusion recipes --list-fields` shows them."
)
_HELP = {"-h", "--help"}


def parse(arguments: Sequence[str]) -> tuple[str, argparse.Namespace]:
    """The verb and its options. Raises UserError on bad ones, SystemExit(0) after --help."""
    if not arguments:
        raise UserError(f"tinyfusion wants a verb: {', '.join(VERBS)}; see `tinyfusion --help`")
    verb, *typed = arguments
    if verb in _HELP:
        print(_overview(), flush=True)
        raise SystemExit(0)
    if verb not in VERBS:
        raise UserError(f"unknown verb {verb!r}{nearest(verb, VERBS)}")
    named = {option.typed: option for option in VERBS[verb].options if not option.positional}
    typed = [_spelled(verb, argument, named) for argument in typed]
    if _HELP & set(typed):
        print(_parser(verb, VERBS[verb].options).format_help(), flush=True)
        raise SystemExit(0)
    try:
        options, words = _parser(verb, list(named.values())).parse_known_args(typed)
    except argparse.ArgumentError as error:
        option = named[str(error.argument_name)]
        wants = "takes no value" if option.metavar is None else f"wants a value: {option.typed} {option.metavar}"
        raise UserError(f"{option.typed} {wants}; see `tinyfusion {verb} --help`") from None
    return verb, _read(verb, options, words)


def overrides(verb: str, options: argparse.Namespace) -> dict[str, Any]:
    """Recipe fields that the typed options set."""
    values = {option: getattr(options, option.name) for option in VERBS[verb].options if option.fields}
    given = {o: value for o, value in values.items() if value is not None and value is not False}
    fields = {field: value for option, value in given.items() for field in option.fields}
    if fields.get("sample.guidance", 1) < 1 and "pipeline.guidance" in fields:
        del fields["sample.guidance"]  # a scale that pipelines of diffusers alone know
    if verb == "prune":
        by_index = options.keep is not None
        if by_index and options.criterion not in (None, "indices"):
            raise UserError(
                f"--keep names the blocks to keep, leaving no choice: leave out --criterion {options.criterion}"
            )
        if by_index and options.num_keep is not None:
            raise UserError("--keep names the blocks to keep, and so how many: leave out --num-keep")
        fields |= {"prune.criterion": "indices"} if by_index else {}
    return fields


def typed(verb: str, options: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """What was typed, an option or a field of --set, and the fields that it sets; of an option without fields its name."""
    values = {option: getattr(options, option.name) for option in VERBS[verb].options}
    given = [option for option, value in values.items() if value is not None and value is not False and value != ()]
    settings = [setting.partition("=")[0].strip() for setting in getattr(options, "set", ())]
    return {option.typed: option.fields or (option.typed,) for option in given} | {name: (name,) for name in settings}


def _spelled(verb: str, argument: str, named: dict[str, Option]) -> str:
    """The argument, an option with hyphens. Raises UserError on an unknown option, with the nearest name."""
    name, equals, text = argument.partition("=")
    name = name.replace("_", "-")
    if not name.startswith("--"):
        return argument
    if name not in (*named, "--help"):
        hint = nearest(name, [*named, "--help"])
        raise UserError(f"{verb} has no option {name}{hint} (every recipe field: --set section.field=value)")
    return f"{name}{equals}{text}"


def _parser(verb: str, options: Sequence[Option]) -> argparse.ArgumentParser:
    """A parser that gives a list of texts per option, None without the option."""
    about, words = VERBS[verb], next((o.metavar for o in options if o.positional), None)
    example = f"\n\nExample: tinyfusion {verb} {about.example}" if about.example else ""
    parser = argparse.ArgumentParser(
        usage=f"tinyfusion {verb} [-h] [{verb.upper()} OPTIONS]{f' {words}' if words else ''}",
        description=f"{about.summary}{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    for option in options:
        text = option.help.replace("%", "%%")
        if option.positional:
            parser.add_argument(option.name, metavar=option.metavar, help=text)
        elif option.metavar is None:
            parser.add_argument(option.typed, action="store_true", help=text)
        else:
            parser.add_argument(option.typed, action="append", metavar=option.metavar, help=text)
    return parser


def _read(verb: str, options: argparse.Namespace, words: list[str]) -> argparse.Namespace:
    """Replace the texts of options by values. Raises UserError on invalid, missing and unknown ones."""
    spare = [word for word in words if word.startswith("-")]
    words = [word for word in words if word not in spare]
    for option in VERBS[verb].options:
        if option.positional:
            texts, words = (words, []) if option.many else (words[:1], words[1:])
        elif option.metavar is None:
            continue
        else:
            texts = getattr(options, option.name) or []
        values = tuple(map(option.value, texts))
        setattr(options, option.name, values if option.many else values[-1] if values else None)
    if spare := [*words, *spare]:
        raise UserError(f"{verb} does not take {', '.join(map(repr, spare))}; see `tinyfusion {verb} --help`")
    for option in VERBS[verb].options:
        if option.required and getattr(options, option.name) in (None, "", (), Path()):
            name = option.name.upper() if option.positional else option.typed
            raise UserError(f"{verb} needs {name}; see `tinyfusion {verb} --help`")
    return options


def _overview() -> str:
    """The text of `tinyfusion --help`."""
    lines = [f"usage: tinyfusion [-h] {{{','.join(VERBS)}}}", "", _DESCRIPTION, "", "verbs:"]
    for name, verb in VERBS.items():
        lines.append(f"  {name:10}{verb.summary}")
        lines += [f"{'':12}Example: tinyfusion {name} {verb.example}"] if verb.example else []
    return "\n".join([*lines, "", "`tinyfusion VERB --help` shows the options of a verb."])
