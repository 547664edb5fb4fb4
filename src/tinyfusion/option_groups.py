"""Options that verbs share, as dataclasses to inherit from; the verbs themselves are in `options.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from tyro.conf import UseAppendAction, arg

Weights = Literal["ema", "raw"]


def option(help: str, metavar: str | None = None) -> Any:
    """What `--help` says of an option; defaults are recipe fields, so none is shown here."""
    return arg(help=help, metavar=metavar, help_behavior_hint="")


@dataclass(frozen=True)
class Answers:
    """Options of every verb: how it answers."""

    json: Annotated[bool, option("make the last line of stdout machine-readable")] = False
    debug: Annotated[bool, option("show tracebacks")] = False


@dataclass(frozen=True)
class Job:
    """Options of verbs that do something by a recipe."""

    recipe: Annotated[
        str | None, option("shipped recipe by name, or a TOML file; see `tinyfusion recipes`", "NAME|FILE")
    ] = None
    set: Annotated[
        UseAppendAction[tuple[str, ...]],
        option("any recipe field, repeatable: --set section.field=value", "FIELD=VALUE"),
    ] = ()
    seed: Annotated[int | None, option("seed of every draw (default 0)", "N")] = None
    device: Annotated[str | None, option("auto, cpu, cuda or mps", "NAME")] = None
    overwrite: Annotated[bool, option("start anew where --out holds an earlier result of tinyfusion")] = False
    dry_run: Annotated[bool, option("check everything, print the plan, write nothing")] = False


@dataclass(frozen=True)
class Common(Answers, Job):
    """Options of most verbs."""

    def overrides(self) -> dict[str, Any]:
        """Recipe fields that the typed options set."""
        named: dict[str, Any] = {"seed": self.seed, "device": self.device}
        return {path: value for path, value in {**named, **self.fields()}.items() if value is not None}

    def fields(self) -> dict[str, Any]:
        """Recipe fields of this verb's own options."""
        return {}


@dataclass(frozen=True)
class Opening:
    """How a model is opened."""

    weights: Annotated[Weights | None, option("averaged or raw weights, where both exist (default ema)", "ema|raw")] = (
        None
    )
    num_heads: Annotated[int | None, option("attention heads of an official file whose width is in no table", "N")] = (
        None
    )
    num_classes: Annotated[
        int | None,
        option(
            "classes of an official file, without the null class: as many as its labels have rows, or one fewer", "N"
        ),
    ] = None
    family: Annotated[str | None, option("model family of an official file whose keys fit several", "NAME")] = None


@dataclass(frozen=True)
class OpensModel(Opening, Common):
    """Options of verbs that open a model."""

    def overrides(self) -> dict[str, Any]:
        weights = {} if self.weights is None else {"sample.weights": self.weights}
        return {**super().overrides(), **weights}


@dataclass(frozen=True)
class Trains(Common):
    """Options of verbs that train."""

    trained_sections: ClassVar[tuple[str, ...]] = ()

    checkpointing_steps: Annotated[int | None, option("steps between two checkpoints", "N")] = None
    checkpoints_total_limit: Annotated[int | None, option("checkpoints kept, older ones are removed", "N")] = None
    gradient_accumulation_steps: Annotated[
        int | None, option("parts in which a process goes through its share of a batch; the result stays", "N")
    ] = None
    gradient_checkpointing: Annotated[
        bool, option("run blocks again in the backward pass instead of keeping what is inside")
    ] = False
    compile: Annotated[bool, option("compile the blocks; an error where that gains nothing")] = False
    report_to: Annotated[str | None, option("trackers: tensorboard, wandb, trackio", "NAME,..")] = None

    def overrides(self) -> dict[str, Any]:
        """Recipe fields that the typed options set."""
        names = None if self.report_to is None else [part.strip() for part in self.report_to.split(",") if part.strip()]
        values: dict[str, Any] = {
            "compute.gradient_accumulation_steps": self.gradient_accumulation_steps,
            "compute.gradient_checkpointing": self.gradient_checkpointing or None,
            "compute.compile": self.compile or None,
            "watch.report_to": names,
        }
        for section in self.trained_sections:
            values[f"{section}.checkpoint_every_steps"] = self.checkpointing_steps
            values[f"{section}.checkpoints_limit"] = self.checkpoints_total_limit
        return {**super().overrides(), **{path: value for path, value in values.items() if value is not None}}
