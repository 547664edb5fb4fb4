"""A transformer of diffusers on disk: located by path, checked against its row, read as headers alone, pruned, built as a module."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor, device, manual_seed, nn
from torch.random import fork_rng

from tinyfusion.blocks.plan import PrunePlan, plan_from_json
from tinyfusion.blocks.stack import BlockStack
from tinyfusion.blocks.streams import Streams
from tinyfusion.core.errors import UserError, prefixed
from tinyfusion.core.reading import check_memory, explained, license_in, read_json_object
from tinyfusion.families.diffusers_classes.cutting import Cut, UnitList, unit_lists
from tinyfusion.families.diffusers_classes.few_steps import (
    FewStepDrawing,
    FoldedDrawing,
    few_step_drawing,
    folded_drawing,
)
from tinyfusion.families.diffusers_classes.rows import Row, Rows, row_for, row_text, rows_in
from tinyfusion.families.diffusers_classes.weights import (
    Stored,
    hash_stored,
    mapped_tensors,
    stored_tensor,
    stored_weights,
)
from tinyfusion.training.optim import hush_bitsandbytes

RECORD = "_tinyfusion"  # our record in config.json; readers pass over names that begin with "_"
INDEX = "model_index.json"
_OF_SIZES = (TypeError, ValueError, RuntimeError, KeyError, IndexError)  # of classes on sizes that do not fit


@dataclass(frozen=True)
class TransformerFolder:
    """A transformer of diffusers: folder, config.json, row, tensors as byte ranges, and blocks per list.

    pipeline: the folder of a pipeline that it is a component of. license: of the weights, None where no file names it. parent: hub id
    of the model that it, or what it was pruned from, was fetched from. row_text: the row as TOML, where it is not of the shipped
    table. trained_as: how the tensors were drawn, in a tuple, where `drawn_by` says how those are that are trained from them.
    """

    path: Path
    config: Mapping[str, Any]
    row: Row
    weights: Mapping[str, Stored]
    depths: Mapping[str, int]
    pipeline: Path | None = None
    license: str | None = None
    parent: str | None = None
    row_text: str = ""
    trained_as: tuple[FoldedDrawing | None, ...] = ()

    @property
    def class_name(self) -> str:
        """The class that its config names."""
        return str(self.config["_class_name"])

    @property
    def record(self) -> Mapping[str, Any]:
        """Our record of a student; empty for a model that was not pruned."""
        record = self.config.get(RECORD)
        return record if isinstance(record, Mapping) else {}

    @property
    def config_to_write(self) -> dict[str, Any]:
        """The content of config.json; a record of ours has the hash of the tensors as they are."""
        return {**self.config, **({RECORD: {**self.record, "hash": self.hash}} if self.record else {})}

    @property
    def lineage(self) -> list[dict[str, Any]]:
        """Parents, oldest first: hash, blocks per list, which of its own parent these are, and guidance that it had folded in."""
        return list(self.record.get("lineage") or [])

    @property
    def few_steps(self) -> FewStepDrawing | None:
        """How a pipeline draws with a student of few steps; None for a denoiser of all noise levels."""
        record = self.record.get("few_steps")
        return None if record is None else few_step_drawing(record)

    @property
    def folded(self) -> FoldedDrawing | None:
        """How a pipeline draws with a student of folded guidance; None for a model that is drawn under guidance."""
        record = self.record.get("folded_guidance")
        return None if record is None else folded_drawing(record)

    @property
    def drawn_with(self) -> dict[str, Any]:
        """Arguments of a pipeline's call that this model wants; empty for one that takes any."""
        drawing = self.few_steps or self.folded
        return {} if drawing is None else dict(drawing.arguments)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of its tensors as stored (`hash_stored`)."""
        return hash_stored(self.weights)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(stored.num_bytes for stored in self.weights.values())

    @property
    def units(self) -> list[UnitList]:
        """What goes together, per budget."""
        return unit_lists(self.row, self.config, self.depths)

    def of_list(self, path: str) -> list[Stored]:
        """The tensors of the blocks of a list."""
        return [stored for name, stored in self.weights.items() if name.startswith(f"{path}.")]

    def cut(self, plan: PrunePlan) -> TransformerFolder:
        """The model without the blocks that the plan removes, still as byte ranges of this one's files; nothing is copied.

        Raises UserError where the plan breaks a coupling of the class, or is of a model with other lists.
        """
        self.check_prunable()
        if self.row.unfit:
            raise UserError(f"a pruned {self.class_name} cannot be written: {self.row.unfit}")
        if plan.depth != dict(self.depths):
            raise UserError(f"the plan is for depth {plan.depth}, the model has {dict(self.depths)}")
        cut = Cut(self.row, self.config, self.depths, plan.kept)
        weights = {
            new: self.weights[old].chunks(chunks) for new, (old, chunks) in cut.source(list(self.weights)).items()
        }
        parent: dict[str, Any] = {"hash": self.hash, "depth": dict(self.depths), "kept": self.record.get("kept")}
        drawn = {} if self.folded is None else {FoldedDrawing.key: self.folded.to_json()}
        had = self.trained_as[0] if self.trained_as else self.folded
        parent |= {} if had is None else {FoldedDrawing.key: had.to_json()}
        record = {
            **self._made_of,
            **drawn,
            "plan": plan.to_json(),
            "kept": plan.kept,
            "lineage": [*self.lineage, parent],
        }
        config = {**self.config, **cut.config_changes(), RECORD: record}
        depths = {path: len(kept) for path, kept in plan.kept.items()}
        return dataclasses.replace(self, config=config, weights=weights, depths=depths, trained_as=())

    @property
    def _made_of(self) -> dict[str, Any]:
        """What the record of every student says."""
        row = {"row": self.row_text} if self.row_text else {}
        return {"made_by": "tinyfusion", "license": self.license, "parent": self.parent, **row}

    def drawn_by(self, drawing: FewStepDrawing | FoldedDrawing | None) -> TransformerFolder:
        """The same weights as a student of few steps, of folded guidance, or of neither."""
        record = {name: value for name, value in self.record.items() if name not in ("few_steps", "folded_guidance")}
        if drawing is None and record == self.record:
            return self
        record |= {} if drawing is None else {drawing.key: drawing.to_json()}
        config, before = {**self.config, RECORD: {**self._made_of, **record}}, self.trained_as or (self.folded,)
        return dataclasses.replace(self, config=config, trained_as=before)

    def check_prunable(self) -> None:
        """Raise UserError for a student of few steps."""
        if self.few_steps is not None:
            raise UserError(
                f"{self.path}: a model of few steps cannot be pruned: prune its teacher, recover, and distil the student's steps"
            )

    def check_destination(self, destination: str | None) -> None:
        """Raise UserError for a format that such models have not: they compute what diffusers computes."""
        if destination == "official":
            raise UserError(
                f"--for official is for models of classes, and a {self.class_name} has no such format: leave it out"
            )

    def check_class(self) -> nn.Module:
        """The module without weights. Raises UserError unless diffusers builds a model of exactly these tensors from the config."""
        module = self.empty()
        shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        ignored = tuple(getattr(class_of(self.class_name), "_keys_to_ignore_on_load_unexpected", None) or ())
        faults = [f"missing {name}" for name in shapes if name not in self.weights]
        for name, stored in self.weights.items():
            if name not in shapes:
                faults += [] if any(re.search(each, name) for each in ignored) else [f"unexpected {name}"]
            elif shapes[name] != stored.shape:
                faults.append(f"{name} is {stored.shape}, wanted {shapes[name]}")
        if faults:
            more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
            raise UserError(
                f"{self.path} does not hold the {self.class_name} of its config.json: {'; '.join(faults[:3])}{more}"
            )
        return module

    def empty(self) -> nn.Module:
        """The module that the config describes, its parameters on the meta device and its computed buffers in memory."""
        from accelerate import init_empty_weights  # late: with diffusers it takes seconds

        kind = class_of(self.class_name)
        config = {name: value for name, value in self.config.items() if not name.startswith("_")}
        what = f"{self.path}/config.json is not one of a {self.class_name}"
        with prefixed(what, *_OF_SIZES), init_empty_weights(include_buffers=False):
            module: nn.Module = kind.from_config(config)
        return module

    def module(self) -> nn.Module:
        """The model in eval mode; every tensor has the type of the file, and is mapped from it, not copied."""
        module = self.check_class()
        wanted = set(module.state_dict())
        module.load_state_dict(
            mapped_tensors({n: stored for n, stored in self.weights.items() if n in wanted}), assign=True
        )
        return module.eval()

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> TransformerFolder:
        """The model with other values of these tensors, rounded to the types of its files; they are in memory until it is written."""
        changed = {n: stored_tensor(tensors[n], stored.dtype) for n, stored in self.weights.items() if n in tensors}
        weights = {**self.weights, **changed}
        trained = {RECORD: {**self.record, "trained": True}} if self.record else {}
        return dataclasses.replace(self, weights=weights, config={**self.config, **trained}, trained_as=())

    @property
    def streams(self) -> dict[str, Streams]:
        """The declaration of the blocks per list."""
        return {each.path: each.declared for each in self.row.lists if each.path in self.depths}

    def stack(self, module: nn.Module) -> BlockStack:
        """The blocks of a module of this model, with the streams that the row declares."""
        return BlockStack(module, tuple(self.streams), self.streams)


def new_transformer(config: Mapping[str, Any], rows: Rows, seed: int) -> TransformerFolder:
    """A model with fresh weights, as its class initialises them, in memory. config: with `_class_name`; the rest has defaults.

    Raises UserError on a class without a row, and on sizes that do not fit.
    """
    kind, row = class_of(str(config["_class_name"])), row_for(config, rows)
    if row is None:
        raise UserError(f"there is no row of blocks for a {kind.__name__}: give --blocks FILE")
    own = {name: value for name, value in config.items() if not name.startswith("_")}
    if odd := sorted(set(own) - set(signature(kind.__init__).parameters)):
        raise UserError(f"model.sizes: a {kind.__name__} has no {', '.join(odd)}")
    with fork_rng(devices=[]):
        manual_seed(seed)
        with explained(f"model.sizes do not fit a {kind.__name__}", *_OF_SIZES, ZeroDivisionError):
            with device("meta"):
                num_bytes = 4 * sum(tensor.numel() for tensor in kind.from_config(own).state_dict().values())
            check_memory(2 * num_bytes, "a new model of these sizes")
            module: Any = kind.from_config(own)
    whole = {**dict(module.config), "_class_name": kind.__name__}
    whole = {name: value for name, value in whole.items() if name == "_class_name" or not name.startswith("_")}
    weights = {name: stored_tensor(tensor, "F32") for name, tensor in module.state_dict().items()}
    path = Path(kind.__name__)
    text = row_text(kind.__name__, row) if row is not row_for(config) else ""
    return TransformerFolder(path, whole, row, weights, _depths(path, whole, row, weights), row_text=text)


# -------------------------------------------------------------------------------------------------------------- opening


@lru_cache(maxsize=64)
def class_of(name: str) -> Any:
    """The transformer class of diffusers of this name; nothing else is looked up. Raises UserError where there is none."""
    hush_bitsandbytes()  # which diffusers imports where it is installed
    import diffusers
    from diffusers.models import transformers

    kind = getattr(transformers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, nn.Module) or not hasattr(kind, "from_config"):
        raise UserError(f"diffusers {diffusers.__version__} has no transformer class {name}: a newer version may")
    return kind


def component_folders(pipeline: Path, rows: Rows) -> list[Path]:
    """The folders of a pipeline whose classes have a row, in the order of its model_index.json."""
    return [
        pipeline / name
        for name, kind in components(pipeline).items()
        if kind in rows and (pipeline / name / "config.json").is_file()
    ]


def components(pipeline: Path) -> dict[str, str | None]:
    """The components that a model_index.json names, and their classes. Raises UserError where a name leads out of the folder."""
    index = read_json_object(pipeline / INDEX)
    named = {name: value[1] for name, value in index.items() if isinstance(value, list) and len(value) == 2}
    odd = [name for name in named if name in ("", "..") or Path(name).name != name or "\0" in name]
    if odd:
        raise UserError(f"{pipeline / INDEX} names {odd[0]!r}, which is no folder of its pipeline")
    return {name: kind if isinstance(kind, str) else None for name, kind in named.items()}


def open_transformer(path: Path, rows: Rows) -> TransformerFolder:
    """The transformer in a folder with config.json. Raises UserError on what its row or its config contradicts."""
    config = read_json_object(path / "config.json")
    own = config.get(RECORD)
    record: dict[str, Any] = own if isinstance(own, dict) else {}
    if isinstance(text := record.get("row"), str):
        rows = {**rows_in(text, f"{path}/config.json"), **rows}
    row = row_for(config, rows)
    _check_record(path, record)
    if row is None:
        raise UserError(
            f"{path} is a {config.get('_class_name')} of diffusers, for which there is no row: give --blocks FILE"
        )
    if config.get("quantization_config"):
        raise UserError(
            f"{path} is quantised: wanted the model that it was made from; prune that, and quantise the student"
        )
    weights = stored_weights(path)
    depths = _depths(path, config, row, weights)
    _check_entries(path, config, row, depths)
    pipeline = path.parent if (path.parent / INDEX).is_file() else None
    licenses = (license_in(folder / "README.md") for folder in (path, pipeline) if folder)
    license = record.get("license") or next(filter(None, licenses), None)
    text = row_text(str(config["_class_name"]), row) if row is not row_for(config) else ""
    return TransformerFolder(path, config, row, weights, depths, pipeline, license, record.get("parent"), text)


def _check_record(path: Path, record: Mapping[str, Any]) -> None:
    """Raise UserError where a record has not the form that `cut` and `drawn_by` give it."""
    for name, read in (("few_steps", few_step_drawing), ("folded_guidance", folded_drawing)):
        if record.get(name) is not None:
            with prefixed(f"{path}/config.json has a damaged {RECORD}", ValueError, OverflowError):
                read(record[name])
    if "lineage" not in record:
        return
    try:
        parents, plan = record["lineage"], plan_from_json(record.get("plan"))
        hashes = [each["hash"] for each in parents]
        for each in parents:
            if each.get(FoldedDrawing.key) is not None:
                folded_drawing(each[FoldedDrawing.key])
        steps = [*(each["kept"] for each in parents[1:]), record["kept"]]
        cuts = [
            plan_from_json({"kept": kept, "depth": parent["depth"], "criterion": plan.criterion})
            for parent, kept in zip(parents, steps, strict=True)
        ]
        whole = all(isinstance(each, str) for each in hashes) and (cuts[-1].kept, cuts[-1].depth) == (
            plan.kept,
            plan.depth,
        )
    except (TypeError, KeyError, IndexError, ValueError):  # UserError is one of the latter
        whole = False
    if not whole:
        raise UserError(f"{path}/config.json has a damaged {RECORD}: prune its parent anew, or remove that field")


def _depths(path: Path, config: Mapping[str, Any], row: Row, weights: Mapping[str, Stored]) -> dict[str, int]:
    """Blocks per list. Raises UserError where indices have gaps, or the config has another count."""
    depths: dict[str, int] = {}
    for each in row.lists:
        pattern = re.compile(rf"{re.escape(each.path)}\.(\d+)\.")
        indices = sorted({int(match[1]) for name in weights if (match := pattern.match(name))})
        if not indices and each.optional:
            continue
        number = len(indices)
        if not indices:
            raise UserError(
                f"{path} holds no tensors of blocks {each.path}, and every {config['_class_name']} has them"
            )
        if indices != list(range(number)):
            first = next(i for i, index in enumerate(indices) if i != index)
            raise UserError(
                f"{path} holds {number} blocks of {each.path}, and their numbers have a gap at {first}: number them 0 to "
                f'{number - 1} and write "{each.count}": {number} in its config.json'
            )
        count = config.get(each.count, _default(config, each.count))
        if count != number:
            raise UserError(
                f"{path}/config.json has {each.count} {count!r}, and the weights hold {number} blocks of {each.path}: write "
                f'"{each.count}": {number}'
            )
        depths[each.path] = number
    return depths


def _default(config: Mapping[str, Any], name: str) -> Any:
    """What diffusers takes for a field that a config.json lacks."""
    parameter = signature(class_of(str(config["_class_name"])).__init__).parameters.get(name)
    return None if parameter is None else parameter.default


def _check_entries(path: Path, config: Mapping[str, Any], row: Row, depths: Mapping[str, int]) -> None:
    """Raise UserError where a list of the config has not one entry per block, or names a block that is not there."""
    for name, paths in row.per_block.items():
        values, number = config.get(name), sum(depths[path] for path in paths)
        if isinstance(values, list) and len(values) != number:
            raise UserError(
                f"{path}/config.json has {len(values)} {name}, and the model {number} blocks: write {number} entries"
            )
    for name, listed in {**row.indices, **row.hints}.items():
        outside = [i for i in config.get(name) or () if not (type(i) is int and 0 <= i < depths[listed])]
        if outside:
            raise UserError(
                f"{path}/config.json names {outside} in {name}; {listed} has blocks 0 to {depths[listed] - 1}"
            )
