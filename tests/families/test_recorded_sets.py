# ruff: noqa: E501
"""Folders of recorded calls: written in shards, continued after a kill, shared by processes, and trained on."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import forks
from safetensors.torch import load_file

from prompt_pipelines import save_flux_pipeline, save_wan_pipeline
from tinyfusion.data.recorded import read_recorded, write_recorded
from tinyfusion.data.recorded_shards import RecordShards

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself

Together = Callable[..., list[int]]
PROMPTS = ["a cat", "a red dog", "fog", "a long sentence about the sea", "tea"]
DRAWING = ["--steps", "3", "--height", "16", "--width", "16"]
TRAINING = [
    "steps=4",
    "batch_size=4",
    "ema_decay=0.5",
    "log_every_steps=1",
    "checkpoint_every_steps=2",
    "warmup_steps=0",
]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline and prompts."""
    folder = tmp_path_factory.mktemp("sets")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    save_flux_pipeline(folder / "flux", num_layers=2, num_single_layers=2)
    return folder


@pytest.fixture(scope="module")
def together(begun: Path) -> Iterator[Together]:
    """Runs commands at the same time: (arguments, environment, text, N) each. Their exit codes."""
    with forks(begun, [recording(begun, "whole")]) as run:
        yield lambda *jobs: [code for code, _ in run(*jobs)]


@pytest.fixture(scope="module")
def place(begun: Path, together: Together) -> Path:
    """That folder, and the calls as `record` writes them in one go, three shards."""
    assert (begun / "whole/manifest.json").is_file()
    return begun


Run = Callable[..., Any]


def recording(place: Path, out: str | Path, *more: str) -> list[str]:
    return [*recording_to_file(place, out), "--shard-prompts", "2", *more]


def recording_to_file(place: Path, out: str | Path) -> list[str]:
    command = ["record", str(place / "flux"), "--prompts", str(place / "prompts.txt"), "--out", str(place / out)]
    return [*command, *DRAWING, "--calls", "all"]


def bytes_of(folder: Path) -> dict[str, str]:
    """Hashes of all files but the record of the run, which has times in it."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.name != "run.json"
    }


# --------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_holds_what_a_file_holds(place: Path, run: Run, tmp_path: Path) -> None:
    """The same calls and outputs, in shards of two prompts, and a manifest with their checksums."""
    assert run(*recording_to_file(place, tmp_path / "a.safetensors"))["calls"] == 15
    file, folder = read_recorded(tmp_path / "a.safetensors"), read_recorded(place / "whole")
    assert [len(file.calls), len(folder.calls), folder.prompts, folder.class_name] == [15, 15, 5, file.class_name]
    assert file.outputs is not None and folder.outputs is not None
    for one, other in zip(
        zip(file.calls, file.outputs, strict=True), zip(folder.calls, folder.outputs, strict=True), strict=True
    ):
        assert one[0].keys() == other[0].keys()
        for name, value in one[0].items():
            assert torch.equal(value, other[0][name]) if isinstance(value, torch.Tensor) else value == other[0][name]
        assert torch.equal(one[1][0], other[1][0])
    manifest = json.loads((place / "whole/manifest.json").read_text())
    hashes = bytes_of(place / "whole")
    assert [shard["calls"] for shard in manifest["shards"]] == [6, 6, 3]
    assert all(hashes[shard["file"]] == shard["sha256"] for shard in manifest["shards"])
    tensors = load_file(place / "whole" / manifest["shards"][0]["file"])
    assert sum("encoder_hidden_states" in name for name in tensors) == 2, "a text is stored once per prompt"
    assert sum("img_ids" in name for name in tensors) == 1, "positions are stored once per shard"


def test_a_finished_folder_is_verified_and_another_job_is_refused(place: Path, run: Run) -> None:
    before = bytes_of(place / "whole")
    assert run(*recording(place, "whole"))["calls"] == 15
    assert "(shard_prompts: 2 there, 3 now)" in run(*recording(place, "whole", "--shard-prompts", "3"))
    assert "(calls: None there, 2 now)" in run(*recording(place, "whole", "--calls", "2"))
    assert bytes_of(place / "whole") == before


@pytest.mark.parametrize(("text", "number"), [("shard-00001", 1), ("manifest", 3)])
def test_a_killed_recording_continues_to_the_same_bytes(
    place: Path, together: Together, text: str, number: int
) -> None:
    """Killed before a shard is renamed, and before the manifest is begun and renamed."""
    out = f"killed-{text[0]}{text[-1]}{number}"
    assert together((recording(place, out), {}, text, number)) == [-signal.SIGKILL]
    left = {file.name for file in (place / out).glob("shard*")}
    assert left and not (place / out / "manifest.json").exists()
    times = {name: (place / out / name).stat().st_mtime_ns for name in left}
    with pytest.raises(ValueError, match="is unfinished: repeat its `record` command, which continues"):
        read_recorded(place / out)
    assert together((recording(place, out), {}, "", 0)) == [0]
    assert bytes_of(place / out) == bytes_of(place / "whole")
    assert all((place / out / name).stat().st_mtime_ns == time for name, time in times.items()), (
        "nothing is drawn twice"
    )


def test_two_processes_write_what_one_writes(place: Path, together: Together) -> None:
    """Also after one of them was killed, and with one process for what is left."""
    ranks = [{"WORLD_SIZE": "2", "RANK": str(rank)} for rank in range(2)]
    assert together(*((recording(place, "shared"), rank, "", 0) for rank in ranks)) == [0, 0]
    assert bytes_of(place / "shared") == bytes_of(place / "whole")
    shutil.rmtree(place / "shared")
    codes = together(
        (recording(place, "shared"), ranks[0], "shard-00002", 1), (recording(place, "shared"), ranks[1], "", 0)
    )
    assert codes == [-signal.SIGKILL, 0]
    assert together((recording(place, "shared"), {}, "", 0)) == [0]
    assert bytes_of(place / "shared") == bytes_of(place / "whole")


def test_a_dry_run_says_disk_and_writes_nothing(place: Path, run: Run) -> None:
    plan = run(*recording(place, "dry", "--dry-run"))["plan"]
    there = sum(file.stat().st_size for file in (place / "whole").glob("*.safetensors")) / 2**20
    assert there / 2 < plan["disk_mib"] < 2 * there
    assert plan["minutes"] > 0 and plan["calls"].startswith("3 a prompt")
    assert not (place / "dry").exists()


def test_a_folder_is_opened_shard_by_shard(place: Path) -> None:
    inputs = read_recorded(place / "whole")
    assert inputs.shards is not None
    inputs.calls[4], inputs.calls[-1]
    assert inputs.shards.opened.cache_info().currsize == 2, "the second shard was not opened"
    low = inputs.for_dtype(torch.bfloat16)
    assert low[7]["hidden_states"].dtype == torch.bfloat16 and low[7]["img_ids"].dtype == torch.bfloat16
    assert len(low) == 15 and len(low[3:5]) == 2


def test_only_the_calls_of_one_expert(place: Path, run: Run) -> None:
    """Of two transformers: the second has the later steps of each trajectory, in two texts."""
    save_wan_pipeline(place / "wan")
    nums = {}
    for name in ("transformer", "transformer_2"):
        command = [
            "record",
            place / "wan",
            "--prompts",
            place / "prompts.txt",
            "--out",
            place / name,
            "--component",
            name,
        ]
        command += ["--steps", 4, "--height", 16, "--width", 16, "--frames", 1, "--guidance-scale", 3, "--calls", "all"]
        nums[name] = run(*command)["calls"]
        calls = read_recorded(place / name).calls
        times = [float(call["timestep"][0]) for call in calls]
        assert all(time >= 500 if name == "transformer" else time < 500 for time in times)
    assert sum(nums.values()) == len(PROMPTS) * 4 * 2 and min(nums.values()) > 0
    stored = load_file(next((place / "transformer_2").glob("shard*")))
    assert sum("encoder_hidden_states" in name for name in stored) == len(PROMPTS) + 1, "the empty text is stored once"


# -------------------------------------------------------------------------------------------------------------- training


def training(verb: str, place: Path, out: Path, *more: str) -> list[str]:
    section = f"{verb}.training"
    return [
        *more,
        "--inputs",
        str(place / "whole"),
        "--out",
        str(out),
        *(w for s in TRAINING for w in ("--set", f"{section}.{s}")),
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student/diffusion_pytorch_model.safetensors")


def test_killed_trainings_on_a_folder_continue_bit_equal(place: Path, together: Together, tmp_path: Path) -> None:
    """Learned masks and then recovery, each killed after the checkpoint of its second step."""
    prune = ["prune", "--teacher", str(place / "flux"), "--criterion", "learned", "--scheme", "1:2"]
    recover = ["recover", "--student", str(tmp_path / "prune-whole"), "--method", "logits-kd"]
    for verb, command in (("prune", prune), ("recover", recover)):
        whole, killed = tmp_path / f"{verb}-whole", tmp_path / f"{verb}-killed"
        assert together((training(verb, place, whole, *command), {}, "", 0)) == [0]
        job = training(verb, place, killed, *command)
        assert together((job, {}, "step-0000004", 1)) == [-signal.SIGKILL]
        assert [folder.name for folder in (killed / "checkpoints").glob("step-*")] == ["step-0000002"]
        assert not (killed / "student").exists()
        assert together((job, {}, "", 0)) == [0]
        assert weights(killed).keys() == weights(whole).keys()
        assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(killed).items()), verb
        if verb == "prune":
            plans = [json.loads((folder / "plan.json").read_text()) for folder in (whole, killed)]
            assert plans[0]["kept"] == plans[1]["kept"] and plans[0]["scores"] == plans[1]["scores"]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "recover-whole/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and losses[0] > 0


def test_criteria_and_inspect_take_a_folder(place: Path, run: Run, tmp_path: Path) -> None:
    found = run(
        "prune",
        "--teacher",
        place / "flux",
        "--inputs",
        place / "whole",
        "--criterion",
        "bi",
        "--out",
        tmp_path / "bi",
    )
    assert {name: len(kept) for name, kept in found["kept"].items()} == {
        "transformer_blocks": 1,
        "single_transformer_blocks": 1,
    }
    assert json.loads((tmp_path / "bi/plan.json").read_text())["scores"]["calibration"]["calls"] == 15
    assert run("inspect", place / "flux", "--inputs", place / "whole")["macs"] > 0


# ------------------------------------------------------------------------------------------------------------- bad inputs


def _damage(folder: Path, what: str) -> None:
    """Damage a copy of the recorded folder."""
    manifest = json.loads((folder / "manifest.json").read_text())
    first, second, _ = sorted(folder.glob("shard*"))
    changes: dict[str, Callable[[], Any]] = {
        "gone": lambda: second.unlink(),
        "short": lambda: second.write_bytes(second.read_bytes()[:-8]),
        "foreign": lambda: manifest.update(class_name="SD3Transformer2DModel"),
        "text": lambda: (folder / "manifest.json").write_text("{"),
        "version": lambda: manifest.update(format_version=9),
        "fields": lambda: manifest.pop("shards"),
        "outside": lambda: manifest["shards"][0].update(file="../flux/model_index.json"),
        "twice": lambda: manifest["shards"].append(manifest["shards"][0]),
        "none": lambda: manifest.update(shards=[]),
        "dtype": lambda: manifest.update(dtype="float33"),
        "others": lambda: manifest.update(made_by="me"),
        "latents": lambda: manifest.pop("class_name"),
        "unfinished": lambda: (folder / "manifest.json").unlink(),
        "empty": lambda: [file.unlink() for file in folder.iterdir()],
        "count": lambda: manifest["shards"][0].update(calls=7),
        "model": lambda: _of_another_model(first, manifest),
    }
    changes[what]()
    if what not in ("text", "unfinished", "empty"):
        (folder / "manifest.json").write_text(json.dumps(manifest))


def _of_another_model(shard: Path, manifest: dict[str, Any]) -> None:
    """A shard in place of another, with the same number of calls, that was recorded on another model."""
    inputs = read_recorded(shard)
    calls = [{**call, "(output)": list(made)} for call, made in zip(inputs.calls, inputs.outputs or (), strict=True)]
    record = {"made_by": "tinyfusion", "class_name": inputs.class_name, "hash": "0" * 64, "dtype": "float32"}
    write_recorded(shard, calls, record)
    manifest["shards"][0]["bytes"] = shard.stat().st_size


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("gone", "shard-00001-of-00003.safetensors is missing: repeat the `record` command"),
        ("short", "is damaged: it has"),
        ("foreign", "shard-00000-of-00003.safetensors is of another model than"),
        ("text", "manifest.json is damaged: not valid JSON"),
        ("version", "has format_version 9; this version reads 1: upgrade"),
        ("fields", "manifest.json is damaged: shards is missing"),
        ("outside", "its shards are no list of different files with calls"),
        ("twice", "its shards are no list of different files with calls"),
        ("none", "its shards are no list of different files with calls"),
        ("dtype", "its record lacks class, hash or type of the model"),
        ("others", "has no recorded inputs: "),
        ("latents", "has no recorded inputs: "),
        ("unfinished", "is unfinished: repeat its `record` command, which continues"),
        ("empty", "has no recorded inputs (there is no manifest.json)"),
        ("count", "manifest.json says 7 calls with outputs, it has 6"),
        ("model", "is of another model than"),
    ],
)
def test_damaged_folders_are_refused(place: Path, run: Run, tmp_path: Path, what: str, message: str) -> None:
    shutil.copytree(place / "whole", tmp_path / "set")
    _damage(tmp_path / "set", what)
    command = [
        "prune",
        "--teacher",
        place / "flux",
        "--inputs",
        tmp_path / "set",
        "--criterion",
        "learned",
        "--scheme",
        "1:2",
    ]
    assert message in run(*command, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--shard-prompts", "0"], "--shard-prompts must be at least 1; got 0"),
        (["--calls", "some"], "--calls wants a whole number, or all; got 'some'"),
        (["--calls", "0"], "--calls must be at least 1; got 0"),
        (["--out", "{place}/a.txt"], "--out of record is a .safetensors file, or a folder, whose name has no suffix"),
        (["--out", "{place}/a.safetensors"], "--shard-prompts is for folders, and --out"),
        (["--out", "{place}/flux"], "exists and is not a tinyfusion run"),
        (["--out", "{place}/prompts.txt/x"], "prompts.txt is a file"),
    ],
)
def test_what_cannot_be_recorded_is_said(place: Path, run: Run, more: list[str], message: str) -> None:
    given = [word.format(place=place) for word in more]
    assert message in run(*recording(place, "new", *given))
    assert not (place / "new").exists()


def test_a_bit_that_turned_is_found_by_the_same_command(place: Path, run: Run, tmp_path: Path) -> None:
    shutil.copytree(place / "whole", tmp_path / "set")
    shard = sorted((tmp_path / "set").glob("shard*"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert "is damaged: its SHA-256 is not that of manifest.json" in run(*recording(place, tmp_path / "set"))


def test_several_processes_write_no_file(place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "several processes write a folder" in run(*recording_to_file(place, "a.safetensors"))


def test_shards_of_another_job_do_not_become_one_set(place: Path, tmp_path: Path) -> None:
    """A shard that was put in the place of another one, and a half one."""
    shutil.copytree(place / "whole", tmp_path / "set")
    shards = RecordShards(tmp_path / "set", 5, 2)
    facts = {
        name: json.loads((place / "whole/manifest.json").read_text())[name] for name in ("class_name", "hash", "dtype")
    }
    shutil.copy(shards.file(0), shards.file(1))
    with pytest.raises(ValueError, match="does not go with the others: first_prompt is 0, wanted 2; remove it"):
        shards.finish(facts, {})
    shards.file(1).write_bytes(shards.file(0).read_bytes()[:100])
    with pytest.raises(ValueError, match="is no readable safetensors file .*: remove it, and repeat the command"):
        shards.finish(facts, {})
