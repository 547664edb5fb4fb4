"""Hub ids as models, and uploads, against a hub on the loopback; then the same without any hub, from the cache."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, hub_of
from material import tiny

from tinyfusion.commands.export import ExportOptions, export
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.models.checkpoint import LoadedModel, open_model, save_model
from tinyfusion.prune.criteria import by_indices

# one process for several commands: the client reads its environment once, when it is imported
_COMMANDS = """
import contextlib, io, json, sys
from tinyfusion.cli import main
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def called(commands: list[list[str]], folder: Path, **environment: str) -> list[tuple[int, Any, str]]:
    """(exit code, last line of stdout as JSON or "", last line of stderr) of every command."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", _COMMANDS, json.dumps(commands)],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**plain, "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return [
        (code, json.loads(out.splitlines()[-1]) if out else "", (err.splitlines() or [""])[-1])
        for code, out, err in answers
    ]


def files_of(folder: Path, below: str = "") -> dict[str, bytes]:
    return {
        below + str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture
def student(tmp_path: Path) -> LoadedModel:
    """A cut model, as our folder `own` and as the folder `theirs` of diffusers."""
    teacher = tiny()
    teacher.facts = dataclasses.replace(teacher.facts, license="CC-BY-NC-4.0")
    model = teacher.cut(by_indices(teacher, [1, 2], 0))
    save_model(model, tmp_path / "own")
    export(RunOptions(tmp_path / "theirs"), ExportOptions(str(tmp_path / "own"), "diffusers"))
    return model


def test_fetched_opened_and_open_without_a_hub(student: LoadedModel, tmp_path: Path) -> None:
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    foreign = {**files_of(tmp_path / "theirs"), "README.md": b"---\nlicense: cc-by-nc-4.0\n---\nA card."}
    foreign["config.json"] = json.dumps({k: v for k, v in config.items() if k != "_tinyfusion"}).encode()
    # without our record it computes as the class of diffusers does, which is another model
    stock = dataclasses.replace(student, arch=dataclasses.replace(student.arch, frequency_shift=1))
    pipeline = {f"transformer/{name}": content for name, content in foreign.items() if name != "README.md"}
    pipeline |= {"vae/config.json": b'{"scaling_factor": 0.5, "block_out_channels": [4, 4]}'}
    pipeline |= {"model_index.json": b'{"_class_name": "DiTPipeline"}', "README.md": foreign["README.md"]}
    unneeded = {
        "transformer/diffusion_pytorch_model.bin": b"x",
        "vae/diffusion_pytorch_model.safetensors": b"x",
        "picture.png": b"x",
    }
    repositories = {"org/own": files_of(tmp_path / "own"), "org/alone": foreign, "org/pipe": {**pipeline, **unneeded}}
    commands = [
        ["inspect", name, "--json"] for name in ("org/own", "org/alone", "org/pipe@v1", "org/absent", "org/own@v9")
    ]
    with hub_of(repositories) as hub:
        own, alone, pipe, absent, revision = called(commands, tmp_path, HF_ENDPOINT=hub.address)
    for code, facts, err in (own, alone, pipe):
        assert code == 0, err
        assert facts["hash"] == (student if facts is own[1] else stock).hash() and facts["origin"]["revision"] == COMMIT
    assert own[1]["kept"] == {"blocks": [1, 2]} and own[1]["origin"]["hub"] == "org/own"
    assert alone[1]["license"] == pipe[1]["license"] == "cc-by-nc-4.0"
    assert pipe[1]["origin"]["kind"] == "folder of diffusers in a DiTPipeline"
    assert (pipe[1]["vae"], pipe[1]["latent_scale"], pipe[1]["image_size"]) == ("org/pipe@v1", 0.5, 16)
    assert not set(unneeded) & set(hub.read), "just what is needed"
    assert absent[0] == 2 and "no model at org/absent" in absent[2] and "none of that id" in absent[2]
    assert revision[0] == 2 and "no revision 'v9' of org/own" in revision[2]
    again = called([*commands[:4]], tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert [facts for _, facts, _ in again[:3]] == [own[1], alone[1], pipe[1]]
    assert again[3][0] == 2 and "nothing of it is in the cache" in again[3][2]


def test_a_dry_run_fetches_nothing(student: LoadedModel, tmp_path: Path) -> None:
    """Nothing of a model that is not in the cache; where it is, everything is checked."""
    dry = ["prune", "--teacher", "org/own", "--scheme", "1:2", "--out", "run", "--dry-run", "--json"]
    inspected = ["inspect", "org/own", "--json"]
    with hub_of({"org/own": files_of(tmp_path / "own")}) as hub:
        before, *_ = called([dry], tmp_path, HF_ENDPOINT=hub.address)
        read = list(hub.read)
        *_, after = called([inspected, dry], tmp_path, HF_ENDPOINT=hub.address)
    assert read == []
    assert before[0] == after[0] == 0, before[2] + after[2]
    assert before[1]["would_fetch"]["what"] == "org/own from the hub" and before[1]["state"] == "checked"
    assert "would_fetch" not in after[1] and "teacher" in after[1]["plan"]
    assert not (tmp_path / "run").exists()


def test_push_to_hub(student: LoadedModel, tmp_path: Path) -> None:
    commands = [
        ["export", "--model", "own", "--to", "tinyfusion", "--out", "mine", "--push-to-hub", "org/mine", "--json"],
        ["export", "--model", "own", "--to", "diffusers", "--out", "shallow", "--push-to-hub", "org/shallow", "--json"],
    ]
    with hub_of({}) as hub:
        for code, facts, err in called(commands, tmp_path, HF_ENDPOINT=hub.address, HF_TOKEN="hf_token"):
            assert code == 0, err
            assert facts["pushed_to"].startswith(hub.address)
        without_login = called([[*commands[0], "--overwrite"]], tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert without_login[0][0] == 2 and "mine was written, and the hub did not take it" in without_login[0][2]
    assert {"model.safetensors", "model.json", "README.md", "plan.png"} <= set(hub.pushed["org/mine"])
    assert {"diffusion_pytorch_model.safetensors", "config.json", "README.md"} <= set(hub.pushed["org/shallow"])
    card = hub.pushed["org/mine"]["README.md"].decode()
    assert card.startswith("---\nlicense: cc-by-nc-4.0\nlibrary_name: tinyfusion\n") and "non-commercial" in card
    assert "Kept: blocks 1, 2." in card and "prune --teacher TEACHER --keep 1,2" in card
    with hub_of({name: dict(files) for name, files in hub.pushed.items()}) as later:
        fetched = called([["inspect", name, "--json"] for name in hub.pushed], tmp_path, HF_ENDPOINT=later.address)
    assert [facts["hash"] for _, facts, _ in fetched] == [student.hash(), student.made_for("diffusers").hash()]
    assert open_model(tmp_path / "mine").hash() == student.hash()
