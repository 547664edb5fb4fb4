"""`lora`: a LoRA, IP-adapter or ControlNet of an unpruned model, for its student."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from tinyfusion.core.errors import UserError
from tinyfusion.core.files import atomic_write, check_space, sha256_of, write_json
from tinyfusion.core.records import file_output, folder_output, say_finished, stamp
from tinyfusion.core.tensors import flat_tensors, read_metadata, read_tensor_file
from tinyfusion.export.controlnet import fit_controlnet
from tinyfusion.export.folder import RECORD as FOLDER_RECORD
from tinyfusion.export.lora import ADAPTER, remap_lora
from tinyfusion.families.diffusers_classes.cutting import Cut
from tinyfusion.families.diffusers_classes.folder import TransformerFolder
from tinyfusion.families.diffusers_classes.weights import STEM, hash_stored, write_weights
from tinyfusion.jobs.transformer_sources import transformer_of

TrainedOn = Literal["original", "parent"]
Form = Literal["same", "peft"]
_HEADER = "tinyfusion"  # our record in the header of the new file


@dataclass(frozen=True)
class LoraOptions:
    """Options of `lora`.

    file: a LoRA or an IP-adapter, or the folder of a ControlNet. model: the student, as a run or a folder. trained_on: the model
    that it was trained for, the first of the student's lineage or the last before it. form: names of the keys, as they are or
    peft's. blocks: a user's rows.
    """

    file: Path
    model: Path
    out: Path
    trained_on: TrainedOn = "original"
    form: Form = "same"
    blocks: Path | None = None
    overwrite: bool = False
    dry_run: bool = False


def cuts_of(student: TransformerFolder, trained_on: TrainedOn = "original") -> list[Cut]:
    """The cuts that lead to a student, first to last; the last alone where a LoRA was trained on its parent.

    Raises UserError where the folder has no record of a cut.
    """
    record = student.record
    lineage = record.get("lineage")
    if not lineage or not isinstance(record.get("kept"), Mapping):
        raise UserError(
            f"{student.path} has no record of removed blocks in its config.json: wanted a student that `prune` or `export` wrote"
        )
    kept = [each.get("kept") for each in lineage[1:]] + [record["kept"]]
    cuts = []
    for ancestor, left in zip(lineage, kept, strict=True):
        counts = {
            each.count: ancestor["depth"][each.path] for each in student.row.lists if each.path in ancestor["depth"]
        }
        cuts.append(Cut(student.row, {**student.config, **counts}, ancestor["depth"], left))
    return cuts if trained_on == "original" else cuts[-1:]


def renumber_lora(options: LoraOptions) -> dict[str, Any]:
    """Write the LoRA, IP-adapter or ControlNet for the student; returns what `--json` prints.

    Raises UserError on every file that is not as wanted.
    """
    student = transformer_of(str(options.model), options.blocks)
    if student is None:
        raise UserError(
            f"{options.model} holds no transformer of diffusers: wanted a student that `prune` or `export` wrote"
        )
    if options.file.is_dir():
        return _fit_controlnet(options, student)
    if options.out.suffix != ".safetensors":
        raise UserError(f"--out of lora is a .safetensors file; got {options.out}")
    plain = {
        "file": str(options.file.absolute()), "sha256": sha256_of(options.file), "student": student.hash,
        "trained_on": options.trained_on, "form": options.form,
    }  # fmt: skip
    to_do = partial(file_output, options.out, "lora", plain, options.overwrite, _record_in)
    todo = to_do()
    tensors = flat_tensors(_flattened(read_tensor_file(options.file)), options.file)
    metadata = read_metadata(options.file) if options.file.suffix == ".safetensors" else {}
    if options.form == "peft":
        tensors, metadata = _in_peft_form(tensors, student.class_name, options.file), {"format": "pt"}
    new = remap_lora(tensors, metadata, cuts_of(student, options.trained_on), str(options.file))
    if todo and not options.dry_run:
        record = stamp("lora", plain, "done")
        with atomic_write(options.out) as path:
            save_file(_apart(new.tensors), path, {**new.metadata, "format": "pt", _HEADER: json.dumps(record)})
            to_do()  # again: what has come to be there meanwhile is not replaced
    elif not todo:
        say_finished(options.out, options.dry_run)
    return {
        "out": str(options.out), "renumbered": new.renumbered, "unchanged": new.unchanged, "dropped": new.dropped,
        "dropped_share": round(new.dropped_share, 4), "notes": list(new.notes),
    }  # fmt: skip


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory, as tied ones of a torch file do: safetensors writes no such."""
    seen, apart = set[int](), dict[str, Tensor]()
    for name, value in tensors.items():
        place = value.untyped_storage().data_ptr()
        apart[name] = value.contiguous() if place not in seen else value.clone(memory_format=torch.contiguous_format)
        seen.add(place)
    return apart


def _flattened(content: Any) -> Any:
    """The content of a file; the two dicts of an IP-adapter in a torch file become one, with names as in safetensors."""
    if not isinstance(content, Mapping) or {*content} != {"image_proj", ADAPTER}:
        return content
    if not all(isinstance(inner, Mapping) for inner in content.values()):
        return content
    return {f"{outer}.{name}": value for outer, inner in content.items() for name, value in inner.items()}


def _fit_controlnet(options: LoraOptions, student: TransformerFolder) -> dict[str, Any]:
    """Write the folder of a ControlNet for the student."""
    if options.form != "same":
        raise UserError(f"--form {options.form} is for LoRAs, and {options.file} is a folder: leave it out")
    new = fit_controlnet(options.file, cuts_of(student, options.trained_on))
    out, num_bytes = options.out, sum(stored.num_bytes for stored in new.weights.values())
    plain = {
        "file": str(options.file.absolute()), "sha256": hash_stored(new.weights), "student": student.hash,
        "trained_on": options.trained_on,
    }  # fmt: skip
    to_do = partial(folder_output, out, FOLDER_RECORD, "lora", plain, options.overwrite, "lora of a ControlNet")
    todo = to_do()
    check_space(out, num_bytes)
    if todo and not options.dry_run:
        with atomic_write(out, rf"config\.json|{STEM}[^/]*|{FOLDER_RECORD}") as folder:
            folder.mkdir()
            write_json(folder / "config.json", new.config)
            write_weights(new.weights, folder)
            write_json(folder / FOLDER_RECORD, stamp("lora", plain, "done"))
            to_do()  # again: what has come to be there meanwhile is not replaced
    elif not todo:
        say_finished(out, options.dry_run)
    return {"out": str(out), "residuals": new.residuals, "residuals_before": new.residuals_before}


def lines(facts: Mapping[str, Any]) -> list[str]:
    """The same, as lines to print."""
    if "residuals" in facts:
        left = {path: sum(i is not None for i in listed) for path, listed in facts["residuals"].items()}
        said = [
            f"{left[path]} of {before} residuals of {path} stay, each behind the block that it was behind"
            for path, before in facts["residuals_before"].items()
        ]
        return [*said, "control is weaker at the same conditioning scale", f"written to {facts['out']}"]
    said = [
        f"{facts['renumbered']} tensors follow their blocks, {facts['unchanged']} are outside of blocks, {facts['dropped']} "
        f"belonged to removed blocks: {facts['dropped_share']:.1%} of the norm of the file's update"
    ]
    return [*said, *facts["notes"], f"written to {facts['out']}"]


def _record_in(file: Path) -> Any:
    try:
        return json.loads(read_metadata(file).get(_HEADER, "null"))
    except (UserError, json.JSONDecodeError):
        return None


def _in_peft_form(tensors: Mapping[str, Tensor], class_name: str, file: Path) -> dict[str, Tensor]:
    """The tensors with peft's names, as the loader that diffusers has for this class converts them."""
    from diffusers.loaders import lora_pipeline  # late: it takes seconds

    stem = class_name.split("Transformer")[0]
    loader = next(
        (kind for name in (stem, f"{stem}1") if (kind := getattr(lora_pipeline, f"{name}LoraLoaderMixin", None))), None
    )
    if loader is None:
        raise UserError(
            f"diffusers has no reader of LoRAs for {class_name}, so their names cannot be converted: leave out --form peft"
        )
    try:
        state = loader.lora_state_dict(dict(tensors))
    except (KeyError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{file} is in no form that diffusers reads for {class_name} ({error}): leave out --form peft"
        ) from error
    state = state[0] if isinstance(state, tuple) else state
    odd = next((name for name, value in state.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise UserError(f"{file}: diffusers made no tensor of {odd}: leave out --form peft")
    return dict(state)
