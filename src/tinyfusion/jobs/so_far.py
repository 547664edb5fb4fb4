"""Results so far of a long measurement: saved in its run folder, so that the same command continues from them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tinyfusion.core.files import discard
from tinyfusion.core.rundir import CHECKPOINT_FILES, RunDirectory, atomic_write

SAVED_EVERY_S = 60.0
_FILE = "losses.safetensors"


class SoFar:
    """The arrays of a measurement that was interrupted, and the place of those to come: `checkpoints/step-N/` of a run.

    spent: seconds of the processes before this one.
    """

    def __init__(self, run: RunDirectory, names: tuple[str, ...]) -> None:
        self.run, self.spent = run, 0.0
        self.begun: dict[str, np.ndarray] = {}
        self._began = self._saved = time.perf_counter()
        for path in sorted(run.checkpoints.glob("step-*"), reverse=True):
            try:
                saved = load_file(path / _FILE)
                self.begun = {name: saved[name] for name in names}
                self.spent = float(run.record().get("seconds", 0.0))
                return
            except (OSError, KeyError, ValueError, SafetensorError):
                run.note(f"{path.name} is damaged; the measurement begins anew")

    def keep(self, step: int, arrays: Callable[[], Mapping[str, np.ndarray]]) -> None:
        """Save the arrays as those of `step`, a number that rises, where the last ones are a minute old."""
        if time.perf_counter() - self._saved > SAVED_EVERY_S:
            self._saved = time.perf_counter()
            self.save(step, arrays())

    def save(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Save the arrays, and remove the previous ones."""
        target = self.run.checkpoints / f"step-{step:07d}"
        with atomic_write(target, CHECKPOINT_FILES) as unfinished:
            unfinished.mkdir(parents=True)
            save_file(dict(arrays), unfinished / _FILE)
        self.drop(but=target)
        self.run.mark("running", seconds=self.spent + time.perf_counter() - self._began)

    def drop(self, but: Path | None = None) -> None:
        """Remove all that is saved, but one."""
        for path in self.run.checkpoints.glob("step-*"):
            if path != but:
                discard(path, CHECKPOINT_FILES)
        with contextlib.suppress(OSError):  # not empty, or not there
            self.run.checkpoints.rmdir()
