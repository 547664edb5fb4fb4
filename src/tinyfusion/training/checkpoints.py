"""Training state on disk: `checkpoints/step-0000123/` with tensors and a JSON that holds their hash."""

from __future__ import annotations

import hashlib
import shutil
import warnings
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tinyfusion.core.errors import UserError
from tinyfusion.core.rundir import read_json, write_json, written_beside
from tinyfusion.training.state import TrainState


def save_checkpoint(folder: Path, state: TrainState, limit: int, every: int = 1) -> None:
    """Write `folder/step-N`, whole or not at all; remove the oldest beyond `limit`, and newer ones.

    Only multiples of `every` count: what a signal saved between them stays until the next one is written, and pushes none
    out. A newer one is damaged, else training would have gone on from there.
    """
    target = folder / f"step-{state.step:07d}"
    with written_beside(target) as beside:
        beside.mkdir(parents=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors().items()}
        save_file(tensors, beside / "state.safetensors")
        digest = _digest(beside / "state.safetensors")
        write_json(beside / "state.json", {"step": state.step, "bad_steps": state.bad_steps, "sha256": digest})
    found = sorted(folder.glob("step-*"))
    sound = [path for path in found if path.name <= target.name]
    regular = [path for path in sound if int(path.name.removeprefix("step-")) % every == 0]
    between = [path for path in sound if path not in regular and path != target]
    for path in [*between, *regular[: -max(limit, 1)], *found[len(sound) :]]:
        shutil.rmtree(path)


def load_latest(folder: Path, state: TrainState) -> int:
    """Load the newest sound checkpoint into `state`; its step, 0 where there is none. A damaged one is reported."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            record = read_json(path / "state.json")
            if _digest(path / "state.safetensors") != record["sha256"]:
                raise ValueError("its hash does not match")
            state.load(load_file(path / "state.safetensors"), record["step"], record["bad_steps"])
            return int(record["step"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, UserError) as error:
            warnings.warn(
                f"checkpoint {path} is damaged ({error}); trying the one before it (the next one saved replaces it)",
                stacklevel=2,
            )
    return 0


def _digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
