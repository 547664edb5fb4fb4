"""`record`: the inputs of a transformer of diffusers, from the folder of its pipeline and prompts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyfusion.core.device import choose_device
from tinyfusion.core.errors import UserError
from tinyfusion.core.files import sha256_of
from tinyfusion.core.progress import progress
from tinyfusion.core.records import file_output, say_finished, stamp
from tinyfusion.data.recorded import recorded_in, write_recorded
from tinyfusion.jobs.pipelines import (
    opened_pipeline,
    pipeline_class,
    pipeline_folder,
    read_prompts,
    transformer_in,
)
from tinyfusion.jobs.recording import Drawing, dtype_name, recorded_calls


@dataclass(frozen=True)
class RecordOptions:
    """What `record` does.

    pipeline: a folder, or a hub id. prompts: a text file, one a line. component: the transformer's name in the pipeline, where
    there are several. blocks: a user's rows.
    """

    pipeline: str
    prompts: Path
    out: Path
    component: str | None = None
    drawing: Drawing = field(default_factory=Drawing)
    device: str = "auto"
    blocks: Path | None = None
    overwrite: bool = False
    dry_run: bool = False


def record(options: RecordOptions) -> dict[str, Any]:
    """Draw each prompt and write the inputs of the transformer's calls; returns what `--json` prints.

    Raises UserError on a pipeline that brings code, or cannot be called with prompts alone.
    """
    drawing = options.drawing
    for name, least in (("steps", 1), ("height", 1), ("width", 1), ("frames", 1), ("calls", 1), ("seed", 0)):
        if (value := getattr(drawing, name)) is not None and value < least:
            raise UserError(f"--{name} must be at least {least}; got {value}")
    if options.out.suffix != ".safetensors":
        raise UserError(f"--out of record is a .safetensors file; got {options.out}")
    prompts = read_prompts(options.prompts)
    folder = pipeline_folder(options.pipeline)
    model = transformer_in(folder, options.component, options.blocks)
    kind = pipeline_class(folder)
    arguments = drawing.arguments(kind)
    device = choose_device(options.device)
    plain = {"transformer": model.hash, "prompts": sha256_of(options.prompts), **dataclasses.asdict(drawing)}
    outcome = {"prompts": len(prompts), "class_name": model.class_name, "hash": model.hash}

    def to_do() -> bool:
        return file_output(options.out, "record", plain, options.overwrite, recorded_in)

    todo = to_do()
    if not todo:
        say_finished(options.out, options.dry_run)
    if not todo or options.dry_run:
        return {**outcome, "pipeline": kind.__name__, "arguments": arguments}
    pipeline = opened_pipeline(kind, folder, {model.path.name: model}, device)
    transformer = getattr(pipeline, model.path.name)
    with progress("record", len(prompts), "prompts") as bar:
        calls = recorded_calls(pipeline, transformer, prompts, drawing, bar)
    outcome = {**outcome, "dtype": dtype_name(transformer), "settings": {"pipeline": kind.__name__, **arguments}}
    to_do()  # again: what has come to be there meanwhile is not replaced
    write_recorded(options.out, calls, stamp("record", plain, "done", **outcome))
    return {**outcome, "calls": len(calls)}
