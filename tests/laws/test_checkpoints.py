"""Training states on disk: continued is uninterrupted, whatever is damaged is found, and nothing is half there."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny_training import SETTINGS, STEPS, Job, ModelFactory, gated_job, plain_job, save_checkpoint, train, trainable
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tinyfusion.blocks.stack import frozen
from tinyfusion.config.recipe import TrainingSection
from tinyfusion.core import files
from tinyfusion.core.errors import UserError
from tinyfusion.core.locks import LOCK
from tinyfusion.processes.gaussian import GaussianObjective
from tinyfusion.prune.criteria import by_indices
from tinyfusion.recover.align import block_pairs
from tinyfusion.recover.distill import DistilledObjective
from tinyfusion.training import checkpoints, saved
from tinyfusion.training.checkpoints import (
    CheckpointWriter,
    checkpoint_folders,
    load_checkpoint,
    load_latest,
)
from tinyfusion.training.optim import ParameterGroup
from tinyfusion.training.saved import damage, open_checkpoint, write_tensors
from tinyfusion.training.shards import first_row, local_part
from tinyfusion.training.state import TrainState

PART = "state-00000-of-00001.safetensors"
FILES = [PART, "state.json", "SHA256SUMS"]


# ------------------------------------------------------------------------------------------------------ whole trainings


def distilled_job(tiny_model: ModelFactory) -> Job:
    teacher = tiny_model()
    plan = by_indices(teacher, [0, 2], seed=0)
    student = teacher.cut(plan)
    goal = DistilledObjective(
        GaussianObjective(), frozen(teacher.module), teacher.stack, student.stack, block_pairs(plan), steps=STEPS
    )
    return TrainState(student.module, trainable(student), SETTINGS), goal


JOBS: dict[str, Callable[[ModelFactory], Job]] = {
    "plain": plain_job,
    "gated-lora": gated_job,
    "gated-frozen": lambda tiny_model: gated_job(tiny_model, "frozen"),
    "distilled": distilled_job,
}


def assert_equal_states(first: TrainState, second: TrainState) -> None:
    one, two = first.tensors(), second.tensors()
    assert one.keys() == two.keys() and first.progress() == second.progress()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.mark.parametrize("kind", JOBS)
def test_stopped_anywhere_and_continued_is_bit_equal(tiny_model: ModelFactory, tmp_path: Path, kind: str) -> None:
    whole = JOBS[kind](tiny_model)
    uninterrupted = [record.values() for record in train(whole)]
    assert len(uninterrupted) == STEPS and len({record["loss"] for record in uninterrupted}) == STEPS
    for stop in range(1, STEPS):
        folder = tmp_path / str(stop)
        first = JOBS[kind](tiny_model)
        records = [record.values() for record in train(first, until=stop)]
        save_checkpoint(folder, first[0], limit=2)
        second = JOBS[kind](tiny_model)
        assert load_latest(folder, second[0]) == stop
        records += [record.values() for record in train(second)]
        assert records == uninterrupted, f"stopped after {stop}"
        assert_equal_states(second[0], whole[0])


def test_stopped_after_every_step_is_bit_equal_too(tiny_model: ModelFactory, tmp_path: Path) -> None:
    whole = plain_job(tiny_model)
    train(whole)
    for step in range(STEPS):
        job = plain_job(tiny_model)
        assert load_latest(tmp_path, job[0]) == step
        train(job, until=step + 1)
        save_checkpoint(tmp_path, job[0], limit=1)
    assert_equal_states(job[0], whole[0])
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{STEPS:07d}"]


@pytest.mark.parametrize("sizes", [{"hidden_size": 32}, {"depth": 6}, {"depth": 2}])
def test_a_checkpoint_of_another_model_is_reported_and_leaves_no_trace(
    tiny_model: ModelFactory, tmp_path: Path, sizes: dict[str, int]
) -> None:
    job = plain_job(tiny_model)
    train(job, until=2)
    save_checkpoint(tmp_path, job[0], limit=2)

    def other() -> TrainState:
        model = tiny_model(seed=1, **sizes)
        return TrainState(model.module, trainable(model), SETTINGS)

    state = other()
    found = "which this training has not" if sizes == {"depth": 2} else "no fitting weight/"
    with pytest.warns(UserWarning, match=f"step-0000002 does not fit.*{found}"):
        assert load_latest(tmp_path, state) == 0
    with pytest.raises(UserError, match=f"step-0000002 does not fit this training: .*{found}"):
        load_checkpoint(tmp_path / "step-0000002", state)
    assert_equal_states(state, other())


# ---------------------------------------------------------------------------------------------------------- small states


class Small(nn.Module):
    """Tensors of several shapes; `rows` of the largest."""

    def __init__(self, seed: int, rows: int = 7) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(rows, 3, generator=generator))
        self.bias = nn.Parameter(torch.randn(2, generator=generator))
        self.one = nn.Parameter(torch.randn(1, 4, generator=generator))


def small_state(steps: int = 0, seed: int = 0, settings: TrainingSection = SETTINGS, rows: int = 7) -> TrainState:
    """A state that has made so many steps, with moments, averages and weights that all differ."""
    model = Small(seed, rows)
    state = TrainState(model, [ParameterGroup(dict(model.named_parameters()))], settings)
    advance(state, steps)
    return state


def advance(state: TrainState, steps: int) -> None:
    for _ in range(steps):
        for parameter in state.parameters.values():
            grad = torch.sin(torch.arange(parameter.numel()) + state.step + 1.0).view(parameter.shape)
            parameter.grad = grad
        state.optimizer.step()
        state.ema.update()
        state.step += 1
        state.seen_images += SETTINGS.batch_size


def copied(state: TrainState) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.tensors().items()}


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def two_checkpoints(folder: Path) -> None:
    for step in (2, 4):
        save_checkpoint(folder, small_state(step), limit=2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def sign(folder: Path) -> None:
    """Make SHA256SUMS fit whatever is in a checkpoint, as a forger would."""
    named = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in named]
    (folder / "SHA256SUMS").write_text("".join(lines), encoding="utf-8")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --------------------------------------------------------------------------------------------------------------- format


def test_a_checkpoint_is_tensors_a_record_and_sums_that_sha256sum_knows(tmp_path: Path) -> None:
    state = small_state(3)
    state.bad_steps = 1
    save_checkpoint(tmp_path, state, limit=2)
    folder = tmp_path / "step-0000003"
    assert names(folder) == sorted(FILES)
    assert equal(load_file(folder / PART), state.tensors())
    record = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    assert record == {
        "format_version": 2, "step": 3, "bad_steps": 1, "seen_images": 12, "optimizer": "adamw", "loss_scale": None,
        "good_steps": 0, "optimizer_numbers": {}, "split": {},
    }  # fmt: skip
    signed = (folder / "SHA256SUMS").read_bytes()
    sign(folder)
    assert (folder / "SHA256SUMS").read_bytes() == signed
    if shutil.which("sha256sum"):
        output = subprocess.run(["sha256sum", PART, "state.json"], cwd=folder, capture_output=True, check=True)
        assert output.stdout == signed


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool])
def test_the_tensor_file_is_one_of_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "z/odd": torch.arange(5).to(dtype),
        "a": torch.tensor(1).to(dtype),
        "b": torch.arange(12).view(3, 4).to(dtype),
        "c/float": torch.linspace(0, 1, 3),
        "none": torch.empty((0, 2), dtype=dtype),
        "ü": torch.ones(1, dtype=torch.uint8),
    }
    hashed = write_tensors(tmp_path / "file", tensors)
    assert hashed == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    found = load_file(tmp_path / "file")
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in tensors.items()}
    assert equal(found, tensors)


def test_tensors_of_more_than_one_piece_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "_PIECE", 100)
    tensors = {"a": torch.randn(1001, generator=torch.Generator().manual_seed(0)), "b": torch.ones(25)}
    hashed = write_tensors(tmp_path / "file", tensors)
    assert hashed == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    assert equal(load_file(tmp_path / "file"), tensors)


def test_everything_comes_back(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, dtype="float16")
    state = small_state(5, settings=settings)
    state.bad_steps, state.scale.value, state.scale.good_steps = 2, 4096.0, 17
    kept = state.optimizer.state[state.parameters["bias"]]
    kept["absmax1"], kept["state1"], kept["round"] = torch.ones(3), torch.arange(2, dtype=torch.uint8), 7
    state._optimizer_name = "adamw-8bit"  # whose tensors have other names, types and shapes
    save_checkpoint(tmp_path, state, limit=1)
    other = small_state(1, seed=1, settings=settings)
    other._optimizer_name = "adamw-8bit"
    assert load_latest(tmp_path, other) == 5
    assert_equal_states(other, state)
    assert (other.scale.value, other.scale.good_steps, other.seen_images) == (4096.0, 17, 20)
    assert other.optimizer.state[other.parameters["bias"]]["round"] == 7


def test_moments_that_were_not_there_are_gone_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, small_state(0), limit=1)
    state = small_state(2)
    assert load_checkpoint(tmp_path / "step-0000000", state) == 0
    assert_equal_states(state, small_state(0))


def test_another_optimizer_does_not_fit(tmp_path: Path) -> None:
    state = small_state(2)
    state._optimizer_name = "adamw-8bit"
    save_checkpoint(tmp_path, state, limit=1)
    with pytest.raises(UserError, match="made with optimizer adamw-8bit, this training has adamw"):
        load_checkpoint(tmp_path / "step-0000002", small_state())


def test_a_moment_of_another_shape_does_not_fit(tmp_path: Path) -> None:
    state = small_state(2)
    state.optimizer.state[state.parameters["table"]]["exp_avg"] = torch.zeros(2, 3)
    save_checkpoint(tmp_path, state, limit=1)
    other, before = small_state(), copied(small_state())
    with pytest.raises(UserError, match=r"no fitting optimizer/exp_avg/table: wanted shape \(7, 3\), got \(2, 3\)"):
        load_checkpoint(tmp_path / "step-0000002", other)
    assert equal(copied(other), before)


def test_the_state_does_not_hang_on_the_file(tmp_path: Path) -> None:
    """Loaded tensors are copies: what happens to the file later is nothing to them."""
    save_checkpoint(tmp_path, small_state(2), limit=1)
    state = small_state()
    load_latest(tmp_path, state)
    with open(tmp_path / "step-0000002" / PART, "r+b") as file:
        file.write(b"\xff" * (tmp_path / "step-0000002" / PART).stat().st_size)
    assert_equal_states(state, small_state(2))


# --------------------------------------------------------------------------------------------------------------- damage

DAMAGE: dict[str, Callable[[Path], Any]] = {
    "flipped bit": lambda path: flip_a_bit(path / PART),
    "truncated": lambda path: (path / PART).write_bytes((path / PART).read_bytes()[:1000]),
    "empty": lambda path: (path / PART).write_bytes(b""),
    "no tensors": lambda path: (path / PART).unlink(),
    "no record": lambda path: (path / "state.json").unlink(),
    "half a record": lambda path: (path / "state.json").write_text('{"step": 4, "ba'),
    "foreign record": lambda path: (path / "state.json").write_text("[]"),
    "record of another step": lambda path: (path / "state.json").write_text(
        (path / "state.json").read_text().replace('"step": 4', '"step": 3')
    ),
    "no sums": lambda path: (path / "SHA256SUMS").unlink(),
    "sums of more": lambda path: (path / "SHA256SUMS").write_text(
        (path / "SHA256SUMS").read_text() + "0" * 64 + "  x\n"
    ),
    "one more file": lambda path: (path / "more.bin").write_bytes(b"more"),
    "a folder": lambda path: (path / "folder").mkdir(),
    "a link": lambda path: (path / "link").symlink_to(path / PART),
    "renamed tensors": lambda path: (path / PART).rename(path / "state-00001-of-00002.safetensors"),
    "nothing in it": lambda path: (shutil.rmtree(path), path.mkdir()),
    "a file": lambda path: (shutil.rmtree(path), path.write_text("x")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, kind: str) -> None:
    two_checkpoints(tmp_path)
    newest = tmp_path / "step-0000004"
    DAMAGE[kind](newest)
    state = small_state()
    named = {"a file": "no checkpoint at .*: it is a file", "nothing in it": "step-0000004 is not a checkpoint"}
    with pytest.raises(UserError, match=named.get(kind, "step-0000004 is damaged")):
        load_checkpoint(newest, state)
    assert_equal_states(state, small_state())
    with pytest.warns(UserWarning, match="step-0000004 is damaged.*the one before"):
        assert load_latest(tmp_path, state) == 2
    assert_equal_states(state, small_state(2))


def test_every_random_truncation_and_flipped_bit_is_found(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, small_state(2), limit=1)
    folder, state, before = tmp_path / "step-0000002", small_state(), copied(small_state())
    dice = random.Random(20261121)
    sound = {name: (folder / name).read_bytes() for name in FILES}
    for number in range(300):
        name = FILES[number % 3]
        content = bytearray(sound[name])
        kind = dice.choice(["flip", "flip", "truncate", "append", "zero"])
        place = dice.randrange(len(content))
        if kind == "flip":
            content[place] ^= 1 << dice.randrange(8)
        elif kind == "truncate":
            del content[place:]
        elif kind == "append":
            content += bytes(dice.randrange(1, 100))
        else:
            content[place] = 0 if content[place] else 1
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match="is damaged"):
            load_checkpoint(folder, state)
        (folder / name).write_bytes(sound[name])
    assert equal(copied(state), before) and state.step == 0
    assert damage(folder) is None and load_checkpoint(folder, state) == 2


def forged(record: Any) -> Callable[[Path], Any]:
    """state.json with other fields, or other content, and sums that fit."""

    def forge(path: Path) -> None:
        file = path / "state.json"
        value = {**json.loads(file.read_text()), **record} if isinstance(record, dict) else record
        file.write_text(json.dumps(value) if isinstance(value, dict) else value)

    return forge


FORGERIES: dict[str, Callable[[Path], Any]] = {
    "no object": forged("[1, 2]"),
    "deep": forged("[" * 100_000),
    "step": forged({"step": "4"}),
    "negative": forged({"step": -1}),
    "scale": forged({"loss_scale": "x"}),
    "not a number": forged({"loss_scale": float("nan")}),
    "huge": forged({"loss_scale": 10**400}),
    "no version": forged({"format_version": None}),
    "numbers": forged({"optimizer_numbers": {"step/table": "x"}}),
    "numbers of nobody": forged({"optimizer_numbers": {"step/nobody": 1}}),
    "no numbers": forged({"optimizer_numbers": None}),
    "optimizer": forged({"optimizer": ["adamw"]}),
    "split": forged({"split": {"weight/table": {"shape": [7, 3], "rows": [[0, 6]]}}}),
    "split of nothing": forged({"split": {"weight/table": {"shape": [], "rows": []}}}),
    "split of more": forged({"split": {"weight/table": {"shape": [7, 3], "rows": [[0, 4], [4, 3]]}}}),
    "split of another": forged({"split": {"weight/other": {"shape": [7, 3], "rows": [[0, 7]]}}}),
    "split list": forged({"split": [1]}),
    "tensors": lambda path: (path / PART).write_bytes(b"\xff" * 100),
    "too few tensors": lambda path: write_tensors(path / PART, {"weight/bias": torch.zeros(2)}),
    "no tensors": lambda path: (path / PART).unlink(),
    "another type": lambda path: write_tensors(
        path / PART, {name: tensor.double() for name, tensor in load_file(path / PART).items()}
    ),
    "more files": lambda path: (path / "model.bin").write_bytes(b"x"),
    "other names": lambda path: (path / PART).rename(path / "state-00001-of-00002.safetensors"),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_sound_sums_of_something_else_are_told_from_a_checkpoint(tmp_path: Path, kind: str) -> None:
    two_checkpoints(tmp_path)
    newest = tmp_path / "step-0000004"
    FORGERIES[kind](newest)
    sign(newest)
    assert damage(newest) is None
    state = small_state()
    with pytest.raises(UserError, match="step-0000004 does not fit this training"):
        load_checkpoint(newest, state)
    assert_equal_states(state, small_state())
    with pytest.warns(UserWarning, match="step-0000004 does not fit"):
        assert load_latest(tmp_path, state) == 2


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
@pytest.mark.parametrize("place", [*FILES, "state.pt", "optimizer.bin", "state-00001-of-00002.safetensors"])
def test_a_pickle_under_any_name_is_never_run(tmp_path: Path, place: str, signed: bool) -> None:
    crater = tmp_path / "crater"
    bombs = [pickle.dumps(Bomb(crater)), torch_pickle(Bomb(crater), tmp_path / "x.pt")]
    pickle.loads(bombs[0])
    crater.rmdir()  # it is live
    for bomb in bombs:
        folder = tmp_path / "checkpoints"
        two_checkpoints(folder)
        (folder / "step-0000004" / place).write_bytes(bomb)
        if signed and place != "SHA256SUMS":
            sign(folder / "step-0000004")
        with pytest.raises(UserError):
            load_checkpoint(folder / "step-0000004", small_state())
        with pytest.warns(UserWarning, match="step-0000004"):
            assert load_latest(folder, small_state()) == 2
        assert not crater.exists()
        shutil.rmtree(folder)


def torch_pickle(value: Any, path: Path) -> bytes:
    torch.save(value, path)
    return path.read_bytes()


def test_no_checkpoint_and_no_sound_one_are_step_zero(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "nothing", small_state()) == 0
    two_checkpoints(tmp_path)
    for path in tmp_path.iterdir():
        flip_a_bit(path / PART)
    state = small_state()
    with pytest.warns(UserWarning, match="is damaged") as found:
        assert load_latest(tmp_path, state) == 0
    assert len(found) == 2
    assert_equal_states(state, small_state())


def test_no_warning_without_a_cause(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    (tmp_path / "step-4").mkdir()
    (tmp_path / ".step-0000009.1.part").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_latest(tmp_path, small_state()) == 4


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (9_999_999, 10_000_000):
        state = small_state(1)
        state.step = step
        save_checkpoint(tmp_path, state, limit=2)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step-9999999", "step-10000000"]
    assert load_latest(tmp_path, small_state()) == 10_000_000


# ------------------------------------------------------------------------------------------------------- other versions


def make_former(folder: Path, step: int) -> None:
    """As 0.2.0 wrote them."""
    path = folder / f"step-{step:07d}"
    path.mkdir(parents=True)
    hashed = write_tensors(path / "state.safetensors", small_state(step).tensors())
    (path / "state.json").write_text(json.dumps({"step": step, "bad_steps": 0, "sha256": hashed}))


def make_newer(folder: Path, step: int) -> None:
    save_checkpoint(folder, small_state(step), limit=9)
    path = folder / f"step-{step:07d}"
    forged({"format_version": 3})(path)
    (path / "colours.safetensors").write_bytes(b"what a later version adds")
    sign(path)


@pytest.mark.parametrize(
    ("make", "message"), [(make_former, "was written by tinyfusion 0.2.0"), (make_newer, "has format 3")]
)
def test_other_versions_are_refused_in_a_sentence(
    tmp_path: Path, make: Callable[[Path, int], None], message: str
) -> None:
    make(tmp_path, 4)
    before = names(tmp_path / "step-0000004")
    pattern = rf"step-0000004 {message}.*start anew.*or continue with"
    with pytest.raises(UserError, match=pattern):
        load_latest(tmp_path, small_state())
    with pytest.raises(UserError, match=pattern):
        load_checkpoint(tmp_path / "step-0000004", small_state())
    assert names(tmp_path / "step-0000004") == before
    save_checkpoint(tmp_path, small_state(6), limit=9)
    assert load_latest(tmp_path, small_state()) == 6


def test_a_damaged_version_number_is_damage(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    forged({"format_version": 3})(tmp_path / "step-0000004")
    with pytest.warns(UserWarning, match="step-0000004 is damaged"):
        assert load_latest(tmp_path, small_state()) == 2


# -------------------------------------------------------------------------------------------------------- which ones stay


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    for step in range(1, 5):
        save_checkpoint(tmp_path, small_state(step), limit=2)
    assert names(tmp_path) == ["step-0000003", "step-0000004"]


def test_what_a_signal_saved_pushes_no_regular_checkpoint_out(tmp_path: Path) -> None:
    for step in (2, 3, 4, 6):  # every second step, and a signal after the third
        save_checkpoint(tmp_path, small_state(step), limit=2, every=2)
        if step == 3:
            assert names(tmp_path) == ["step-0000002", "step-0000003"]
    assert names(tmp_path) == ["step-0000004", "step-0000006"]


def test_a_damaged_newest_checkpoint_does_not_push_out_a_sound_one(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    flip_a_bit(tmp_path / "step-0000004" / PART)
    state = small_state()
    with pytest.warns(UserWarning, match="step-0000004 is damaged"):
        load_latest(tmp_path, state)
    advance(state, 1)
    save_checkpoint(tmp_path, state, limit=1)
    assert names(tmp_path) == ["step-0000003"]
    assert load_latest(tmp_path, small_state()) == 3


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, small_state(2, seed=1), limit=2)
    save_checkpoint(tmp_path, small_state(2), limit=2)
    state = small_state()
    assert load_latest(tmp_path, state) == 2 and names(tmp_path) == ["step-0000002"]
    assert_equal_states(state, small_state(2))


def test_a_checkpoint_that_goes_is_out_of_sight_before_it_is_taken_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_checkpoints(tmp_path)
    seen = []
    rmtree = shutil.rmtree

    def watched(path: Path, *args: Any, **more: Any) -> None:
        seen.append((path, names(tmp_path)))
        rmtree(path, *args, **more)

    monkeypatch.setattr(shutil, "rmtree", watched)
    save_checkpoint(tmp_path, small_state(6), limit=1)
    assert {path.name for path, _ in seen} == {"step-0000002", "step-0000004"}
    assert all(path.parent.name.endswith(".part") and path.name not in there for path, there in seen)
    assert names(tmp_path) == ["step-0000006"]


def test_files_of_others_in_a_checkpoint_stay_when_it_goes(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    (tmp_path / "step-0000002" / "notes.txt").write_text("mine")
    (tmp_path / "step-0000001").write_text("mine too")
    save_checkpoint(tmp_path, small_state(6), limit=1)
    assert names(tmp_path) == ["step-0000001", "step-0000002", "step-0000006"]
    assert names(tmp_path / "step-0000002") == ["notes.txt"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_latest(tmp_path, small_state()) == 6


def test_a_checkpoint_that_is_not_there_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint at .*step-0000002: no such folder"):
        load_checkpoint(tmp_path / "step-0000002", small_state())
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is a pipe"):
        load_checkpoint(tmp_path / "pipe", small_state())


def test_superfluous_ones_that_cannot_be_removed_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, small_state(2), limit=1)

    def refuse(path: Path, _ours: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(checkpoints, "discard", refuse)
    with pytest.raises(UserError, match="step-0000004 is written, but.*cannot be removed: Permission denied"):
        save_checkpoint(tmp_path, small_state(4), limit=1)
    assert damage(tmp_path / "step-0000004") is None


# ---------------------------------------------------------------------------------------------- in the background of a training


class Gate:
    """Stands in for the writing of tensors: waits until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.begun = threading.Event(), 0
        monkeypatch.setattr(checkpoints, "write_tensors", self)

    def __call__(self, path: Path, tensors: Mapping[str, Tensor]) -> str:
        self.begun += 1
        assert self.open.wait(30)
        return write_tensors(path, tensors)


def test_training_goes_on_while_what_it_was_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    state = small_state(2)
    with CheckpointWriter(tmp_path, 3) as writer:
        writer.save(state)
        advance(state, 1)
        state.bad_steps = 1
        assert writer.written is None and checkpoint_folders(tmp_path) == []
        waiting = threading.Thread(target=lambda: (writer.save(state), writer.finish()))
        waiting.start()
        time.sleep(0.05)
        assert gate.begun == 1, "one at a time"
        gate.open.set()
        waiting.join()
    for step, bad in ((2, 0), (3, 1)):
        found = small_state()
        load_checkpoint(tmp_path / f"step-000000{step}", found)
        whole = small_state(step)
        whole.bad_steps = bad
        assert_equal_states(found, whole)
    written = writer.written
    assert written is not None and (written.step, written.path) == (3, tmp_path / "step-0000003")
    assert written.num_bytes == sum(tensor.nbytes for tensor in state.tensors().values())
    assert written.held_s >= 0.04 and written.write_s > 0


def test_what_goes_wrong_is_told_once_and_the_next_one_may_go_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = small_state(2)
    writer = CheckpointWriter(tmp_path, 3)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_tensors", failing(errno.ENOSPC))
        writer.save(state)
        time.sleep(0.05)
        advance(state, 1)
    with pytest.raises(UserError, match="cannot write checkpoint .*step-0000002: no space left"):
        writer.save(state)
    writer.check()
    writer.save(state)
    writer.finish()
    writer.finish()
    assert names(tmp_path) == ["step-0000003"]


def test_our_own_bugs_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(checkpoints, "write_tensors", bug)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(tmp_path, small_state(2), limit=1)
    assert names(tmp_path) == []


def test_an_error_of_the_training_waits_for_the_writing_and_takes_its_error_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_off(steps: int) -> None:
        with CheckpointWriter(tmp_path, 3) as writer:
            writer.save(small_state(steps))
            raise RuntimeError("in training")

    with pytest.raises(RuntimeError, match="in training") as caught:
        broken_off(2)
    assert names(tmp_path) == ["step-0000002"] and not hasattr(caught.value, "__notes__")
    monkeypatch.setattr(checkpoints, "write_tensors", failing(errno.ENOSPC))
    with pytest.raises(RuntimeError, match="in training") as caught:
        broken_off(3)
    assert "no space left" in caught.value.__notes__[0] and names(tmp_path) == ["step-0000002"]


def test_a_second_interruption_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    writer = CheckpointWriter(tmp_path, 3)

    def broken_off() -> None:
        with writer:
            writer.save(small_state(2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert writer.written is None
    gate.open.set()
    writer.finish()


# ---------------------------------------------------------------------------------------------- when writing goes wrong


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number), "somewhere/file")

    return fail


def full_disk(patch: pytest.MonkeyPatch, _folder: Path) -> None:
    patch.setattr(os, "fsync", failing(errno.ENOSPC))


def quota(patch: pytest.MonkeyPatch, _folder: Path) -> None:
    patch.setattr(saved, "open", failing(errno.EDQUOT), raising=False)


def read_only(patch: pytest.MonkeyPatch, _folder: Path) -> None:
    patch.setattr(Path, "mkdir", failing(errno.EROFS))


def bad_disk(patch: pytest.MonkeyPatch, _folder: Path) -> None:
    patch.setattr(Path, "write_bytes", failing(errno.EIO))


def no_rename(patch: pytest.MonkeyPatch, _folder: Path) -> None:
    patch.setattr(os, "replace", failing(errno.EACCES))


def taken_away(patch: pytest.MonkeyPatch, folder: Path) -> None:
    def write(path: Path, tensors: Mapping[str, Tensor]) -> str:
        shutil.rmtree(folder)
        return write_tensors(path, tensors)

    patch.setattr(checkpoints, "write_tensors", write)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (full_disk, "no space left on the disk"),
        (quota, "no space left on the disk"),
        (read_only, "Read-only file system"),
        (bad_disk, "Input/output error"),
        (no_rename, "Permission denied"),
        (taken_away, "No such file or directory"),
    ],
)
def test_errors_of_the_disk_are_sentences_and_leave_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[pytest.MonkeyPatch, Path], None], reason: str
) -> None:
    folder = tmp_path / "checkpoints"
    save_checkpoint(folder, small_state(2), limit=1)
    kept = "there is none before it" if spoil is taken_away else "the last one, step-0000002, is as it was"
    with monkeypatch.context() as patch:
        spoil(patch, folder)
        with pytest.raises(UserError, match=rf"cannot write checkpoint .*step-0000004: {reason}.*{kept}") as caught:
            save_checkpoint(folder, small_state(4), limit=1)
    assert isinstance(caught.value.__cause__, OSError)
    if spoil is taken_away:
        assert names(tmp_path) == []
        return
    assert names(folder) == ["step-0000002"]
    assert load_latest(folder, small_state()) == 2
    save_checkpoint(folder, small_state(4), limit=1)
    assert names(folder) == ["step-0000004"]


KILLED = """
    import os, sys
    from pathlib import Path
    import torch
    from torch import nn
    from tinyfusion.config.recipe import TrainingSection
    from tinyfusion.training import checkpoints
    from tinyfusion.training.optim import ParameterGroup
    from tinyfusion.training.state import TrainState

    model = nn.Linear(2, 3)
    state = TrainState(model, [ParameterGroup(dict(model.named_parameters()))], TrainingSection())
    writer = checkpoints.CheckpointWriter(Path(sys.argv[1]), 5)
    state.step = 2
    writer.save(state)
    writer.finish()
    os.replace = checkpoints.write_record = lambda *_: os._exit(9)
    state.step = 4
    writer.save(state)
    writer.finish()
"""


def test_killed_while_writing_leaves_the_one_before(tmp_path: Path) -> None:
    code = subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)], check=False).returncode
    assert code == 9
    left = names(tmp_path)
    assert len(left) == 2 and left[0].startswith(".step-0000004.") and left[1] == "step-0000002"
    model = nn.Linear(2, 3)
    state = TrainState(model, [ParameterGroup(dict(model.named_parameters()))], TrainingSection())
    assert load_latest(tmp_path, state) == 2
    CheckpointWriter(tmp_path, 5)
    assert names(tmp_path) == ["step-0000002"]


# ----------------------------------------------------------------------------------------------------- several processes


@contextmanager
def process(rank: int, world: int) -> Iterator[None]:
    """Simulate one rank of `world` for sharded tensors; there are no other processes."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def split_state(rank: int, world: int, steps: int, seed: int = 0) -> TrainState:
    """What process `rank` holds of `small_state(steps, seed)` under FSDP2: rows of `table` and `one`, `bias` whole."""
    whole, model, mesh = small_state(steps, seed), Small(seed), init_device_mesh("cpu", (world,))

    def part(tensor: Tensor) -> Tensor:
        if tensor.ndim < 2:
            return tensor.clone()
        rows = chunk_of(tensor, rank, world).clone()
        return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())

    for name, parameter in whole.parameters.items():
        setattr(model, name, nn.Parameter(part(parameter.detach())))
    state = TrainState(model, [ParameterGroup(dict(model.named_parameters()))], SETTINGS)
    state.step, state.seen_images = steps, steps * SETTINGS.batch_size
    for name, parameter in state.parameters.items():
        state.ema.average[name] = part(whole.ema.average[name])
        moments = whole.optimizer.state.get(whole.parameters[name], {})
        state.optimizer.state[parameter] = {key: part(value) for key, value in moments.items()}
    return state


def chunk_of(tensor: Tensor, rank: int, world: int) -> Tensor:
    """The rows of a process; some have none."""
    chunks = torch.chunk(tensor, world)
    return chunks[rank] if rank < len(chunks) else tensor[:0]


def save_split(folder: Path, world: int, steps: int, limit: int = 2) -> None:
    """The processes write one after the other; process 0, which came first, completes the folder."""
    writers = [CheckpointWriter(folder, limit, rank=rank, world=world, timeout_s=30) for rank in range(world)]
    for rank, writer in enumerate(writers):
        with process(rank, world):
            writer.save(split_state(rank, world, steps))
    for writer in reversed(writers):
        writer.finish()


def assert_holds(state: TrainState, whole: TrainState, rank: int, world: int) -> None:
    """That `state` is the part of `whole` that process `rank` has."""
    assert state.progress() == whole.progress()
    tensors, all_of_it = state.tensors(), whole.tensors()
    assert tensors.keys() == all_of_it.keys()
    for name, tensor in tensors.items():
        wanted = all_of_it[name]
        if isinstance(tensor, DTensor):
            assert tensor.shape == wanted.shape
            wanted = chunk_of(wanted, rank, world)
        assert torch.equal(local_part(tensor), wanted), name
    split = {name for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    assert world == 1 or {f"optimizer/exp_avg/{name}" for name in ("table", "one")} < split


@pytest.mark.parametrize("written_by", [1, 2, 3])
@pytest.mark.parametrize("read_by", [1, 2, 3, 9])
def test_any_number_of_processes_reads_what_any_number_wrote(tmp_path: Path, written_by: int, read_by: int) -> None:
    if written_by == 1:
        save_checkpoint(tmp_path, small_state(3), limit=1)
    else:
        save_split(tmp_path, written_by, 3)
    folder = tmp_path / "step-0000003"
    files = [f"state-{rank:05d}-of-{written_by:05d}.safetensors" for rank in range(written_by)]
    assert names(folder) == ["SHA256SUMS", *files, "state.json"]
    assert damage(folder) is None
    opened = open_checkpoint(folder)
    assert equal({name: opened.whole(name) for name in opened.names()}, small_state(3).tensors())
    for rank in range(read_by):
        if read_by == 1:
            state = small_state(1, seed=1)
            assert load_latest(tmp_path, state) == 3
            assert_holds(state, small_state(3), 0, 1)
        else:
            with process(rank, read_by):
                state = split_state(rank, read_by, steps=1, seed=1)
                assert load_latest(tmp_path, state) == 3
                assert_holds(state, small_state(3), rank, read_by)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_averages_in_parts_are_the_rows_of_whole_averages(rank: int) -> None:
    whole = small_state(2)
    with process(rank, 3):
        state = split_state(rank, 3, 2)
        for each in (whole, state):
            for parameter in each.parameters.values():
                local_part(parameter.detach()).mul_(1.5)
            each.ema.update()
        for name, average in whole.ema.average.items():
            own = local_part(state.ema.average[name])
            wanted = average if name == "bias" else chunk_of(average, rank, 3)
            assert own.shape == wanted.shape and torch.allclose(own, wanted, rtol=1e-6)
        target = split_state(rank, 3, 0, seed=1)
        target.ema.average = state.ema.average
        target.ema.average["bias"] = target.ema.average["bias"] + 1
        target.ema.copy_to(target.model)
        for name, parameter in target.parameters.items():
            assert torch.equal(local_part(parameter), local_part(state.ema.average[name]))


def test_only_rows_over_one_list_of_processes_are_known() -> None:
    with process(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        columns = DTensor.from_local(torch.zeros(4, 2), mesh, [Shard(1)], run_check=False)
        with pytest.raises(ValueError, match="only tensors sharded by rows"):
            first_row(columns)


def test_continued_in_parts_is_continued_whole(tmp_path: Path) -> None:
    save_split(tmp_path, 2, 3)
    state = small_state()
    load_latest(tmp_path, state)
    advance(state, 2)
    assert_equal_states(state, small_state(5))


def test_parts_hold_own_rows_and_the_first_what_all_have(tmp_path: Path) -> None:
    save_split(tmp_path, 2, 1)
    first, second = (load_file(tmp_path / "step-0000001" / f"state-0000{rank}-of-00002.safetensors") for rank in (0, 1))
    assert first["weight/table"].shape == (4, 3) and second["weight/table"].shape == (3, 3)
    assert {name.rpartition("/")[2] for name in second} == {"table"}, "one row of `one`, and the first has it"
    assert not {name for name in second if name.startswith("optimizer/step")}
    record = json.loads((tmp_path / "step-0000001" / "state.json").read_text())
    assert record["split"]["ema/table"] == {"shape": [7, 3], "rows": [[0, 4], [4, 3]]}
    assert record["split"]["weight/one"] == {"shape": [1, 4], "rows": [[0, 1], [1, 0]]}


def test_only_needed_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_split(tmp_path, 3, 1)  # rows 0-2, 3-5, 6
    opened = open_checkpoint(tmp_path / "step-0000001")
    whole = opened.whole("weight/table")
    monkeypatch.setattr(opened, "_files", [opened._files[0], opened._files[1], None])
    assert torch.equal(opened.rows("weight/table", 2, 3), whole[2:5])
    assert opened.rows("weight/table", 4, 0).shape == (0, 3)


@pytest.mark.parametrize("kind", ["a part is gone", "a part is another's", "a bit of a part"])
def test_damage_in_any_part_is_found(tmp_path: Path, kind: str) -> None:
    save_split(tmp_path, 2, 1)
    save_split(tmp_path, 2, 2)
    first, second = sorted((tmp_path / "step-0000002").glob("*.safetensors"))
    {"a part is gone": second.unlink, "a part is another's": lambda: shutil.copy(first, second),
     "a bit of a part": lambda: flip_a_bit(second)}[kind]()  # fmt: skip
    with pytest.warns(UserWarning, match="step-0000002 is damaged"):
        assert load_latest(tmp_path, small_state()) == 1


def test_replicated_states_are_written_by_the_first_process_alone(tmp_path: Path) -> None:
    other = CheckpointWriter(tmp_path, 2, rank=1, world=2, timeout_s=5)
    other.save(small_state(2))
    other.finish()
    assert names(tmp_path) == []
    first = CheckpointWriter(tmp_path, 2, rank=0, world=2, timeout_s=5)
    first.save(small_state(2))
    first.finish()
    assert names(tmp_path / "step-0000002") == sorted(FILES)
    with process(1, 2):
        state = split_state(1, 2, 0)
        load_latest(tmp_path, state)
        assert_holds(state, small_state(2), 1, 2)


def test_a_process_that_does_not_deliver_is_named(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 2, rank=0, world=2, timeout_s=0.1)
    with process(0, 2):
        writer.save(split_state(0, 2, 1))
    with pytest.raises(
        UserError, match=r"state-00001-of-00002\.safetensors.* nothing was written for 0\.1 s: process 1 of 2 has ended"
    ):
        writer.finish()
    assert names(tmp_path) == []


def test_a_first_process_that_does_not_begin_is_told(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 2, rank=1, world=2, timeout_s=0.1)
    with process(1, 2):
        writer.save(split_state(1, 2, 1))
    with pytest.raises(UserError, match=r"process 0 did not begin .*step-0000001.*within 0\.1 s"):
        writer.finish()
    assert names(tmp_path) == []


def test_what_fails_in_one_process_is_told_by_both_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, tensors: Mapping[str, Tensor]) -> str:
        if "00001-of" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_tensors(path, tensors)

    monkeypatch.setattr(checkpoints, "write_tensors", write)
    writers = [CheckpointWriter(tmp_path, 2, rank=rank, world=2, timeout_s=30) for rank in (0, 1)]
    began = time.monotonic()
    for rank, writer in enumerate(writers):
        with process(rank, 2):
            writer.save(split_state(rank, 2, 1))
    with pytest.raises(UserError, match="process 1 of 2 could not write its file: no space left on the disk"):
        writers[0].finish()
    with pytest.raises(UserError, match="cannot write checkpoint .*: no space left on the disk"):
        writers[1].finish()
    assert time.monotonic() - began < 10 and names(tmp_path) == []


def test_of_several_processes_one_looks_which_are_sound(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    flip_a_bit(tmp_path / "step-0000004" / PART)
    results: list[Any] = []

    def main(call: Callable[[], Any]) -> Any:
        results.append(call())
        return results[-1]

    with pytest.warns(UserWarning, match="step-0000004 is damaged"):
        assert load_latest(tmp_path, small_state(), first=main) == 2
    flip_a_bit(tmp_path / "step-0000004" / PART)  # sound for this process: it counts what the first one found
    answers = iter(results)
    state = small_state()
    with pytest.warns(UserWarning, match="step-0000004 is damaged"):
        assert load_latest(tmp_path, state, first=lambda _call: next(answers)) == 2
    assert_equal_states(state, small_state(2))


def test_names_of_unfinished_folders_are_those_that_a_new_start_clears_away(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = tmp_path / f".step-0000003.{gone.pid}.part"
    (left / left.stem).mkdir(parents=True)
    (left / LOCK).touch()
    CheckpointWriter(tmp_path, 2, rank=1, world=2)
    assert names(tmp_path) == [left.name], "only the first process clears away"
    files.clear_unfinished(tmp_path)
    assert names(tmp_path) == []
