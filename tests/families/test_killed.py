# ruff: noqa: E501
"""`export` and `lora` killed while they write: the output is absent or whole, and the same command then succeeds."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Forks, forks
from safetensors.torch import load_file, save_file
from test_adapters import controlnet, tiny
from tiny import SINGLE, TRUNK

from tinyfusion import cli

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of a tiny FLUX, its student, a LoRA and a ControlNet."""
    place = tmp_path_factory.mktemp("killed")
    tiny("Flux").model().save_pretrained(place / "pipeline/transformer")  # type: ignore[operator]
    index = {
        "_class_name": "FluxPipeline",
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (place / "pipeline/model_index.json").write_text(json.dumps(index))
    (place / "pipeline/vae").mkdir()
    (place / "pipeline/vae/config.json").write_text("{}")
    (place / "pipeline/vae/large.bin").write_bytes(bytes(2**20))
    lists = ((TRUNK, 3), (SINGLE, 4))
    names = [
        f"transformer.{path}.{i}.attn.to_q.lora_{half}.weight"
        for path, depth in lists
        for i in range(depth)
        for half in "AB"
    ]
    save_file({name: torch.ones(4, 4) for name in names}, place / "style.safetensors")
    controlnet("Flux", num_layers=1, num_single_layers=1).save_pretrained(place / "net")
    keep = ["--keep", "0,2,3,4", "--out", str(place / "run")]
    assert cli.main(["prune", "--teacher", str(place / "pipeline"), *keep]) == 0
    return place


@pytest.fixture(scope="module")
def run(place: Path) -> Iterator[Forks]:
    once = [[word.replace("OUT", f"once-{verb}") for word in COMMANDS[verb]] for verb in ("export", "lora")]
    with forks(place, once) as run:
        yield run


COMMANDS = {
    "export": ["export", "--model", "run", "--to", "diffusers", "--pipeline", "--out", "OUT"],
    "single-file": ["export", "--model", "run", "--to", "single-file", "--out", "OUT.safetensors"],
    "lora": ["lora", "style.safetensors", "--model", "run", "--out", "OUT.safetensors"],
    "controlnet": ["lora", "net", "--model", "run", "--out", "OUT"],
}  # fmt: skip


def contents(path: Path) -> dict[str, Any]:
    """What an output holds: tensors of safetensors files, and the bytes of the others but those with a time or the folder's name."""
    found: dict[str, Any] = {}
    for file in [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file()):
        name = str(file.relative_to(path))
        if file.suffix == ".safetensors":
            found |= {f"{name}:{key}": tensor.numpy().tobytes() for key, tensor in load_file(file).items()}
        else:
            found[name] = file.name in ("tinyfusion.json", "README.md") or file.read_bytes()
    return found


def check_kills(place: Path, run: Forks, verb: str, number: int) -> None:
    """Kill a command at so many moments, from the first change of the disk to the last; then the same command succeeds."""
    command = COMMANDS[verb]
    suffix = ".safetensors" if "OUT.safetensors" in command else ""
    named = lambda out: [word.replace("OUT", out) for word in command]  # noqa: E731
    ((code, calls),) = run((named("whole"), {}, "whole", 0))
    assert code == 0
    wanted, there = contents(place / f"whole{suffix}"), 0
    moments = sorted({1 + round(i * (calls - 1) / max(number - 1, 1)) for i in range(number)})
    for moment in moments:
        out = f"{verb}-at-{moment}-"
        made = place / f"{out}{suffix}"
        assert run((named(out), {}, out, moment))[0][0] == -signal.SIGKILL
        there += made.exists()
        assert not made.exists() or contents(made) == wanted, f"half-written at call {moment} of {calls}"
        assert run((named(out), {}, "", 0))[0][0] == 0
        assert contents(made) == wanted
        assert not [path.name for path in place.iterdir() if path.name.startswith(".")], "what was begun is gone"
    for path in place.glob("whole*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    print(
        f"{verb}: {calls} calls change the disk; killed before {moments}; {there} outputs were whole, the others absent"
    )


@pytest.mark.parametrize(("verb", "number"), [("export", 3), ("lora", 3)])
def test_a_killed_command_leaves_nothing_half_written(place: Path, run: Forks, verb: str, number: int) -> None:
    check_kills(place, run, verb, number)
