# ruff: noqa: E501
"""Bad transformers of diffusers, plans, LoRAs and outputs: exit code 2, one line with the reason, and nothing written."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_images import IMAGES

from tinyfusion import cli

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
WEIGHTS, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
Change = Callable[[], Any]


def config(folder: str = "model", **fields: Any) -> Change:
    """Other fields in a config; None removes one."""

    def change() -> None:
        path = Path(folder, "config.json")
        new = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({name: value for name, value in new.items() if value is not None}))

    return change


def record(**fields: Any) -> Change:
    """Other fields in the record of the student."""

    def change() -> None:
        path = Path("run/student/config.json")
        whole = json.loads(path.read_text())
        path.write_text(json.dumps({**whole, "_tinyfusion": {**whole["_tinyfusion"], **fields}}))

    return change


def text(path: str, content: str | bytes = "") -> Change:
    return lambda: Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def tensors(change: Callable[[dict[str, Any]], Any], file: str = f"model/{WEIGHTS}") -> Change:
    def apply() -> None:
        content = load_file(file)
        change(content)
        Path(file).unlink()  # which is mapped
        save_file({name: tensor.clone() for name, tensor in content.items()}, file)

    return apply


def sharded(**weight_map: str) -> Change:
    """The weights as one shard of an index, and more entries in the index."""

    def change() -> None:
        names = load_file(f"model/{WEIGHTS}")
        Path("model", WEIGHTS).rename("model/one.safetensors")
        Path("model", INDEX).write_text(
            json.dumps({"weight_map": {**dict.fromkeys(names, "one.safetensors"), **weight_map}})
        )

    return change


def copied(*_: Any) -> None:
    shutil.copy(f"model/{WEIGHTS}", "model/two.safetensors")
    sharded(more="two.safetensors")()


def as_folder() -> None:
    Path("model", WEIGHTS).unlink()
    Path("model", WEIGHTS).mkdir()


def as_pipe() -> None:
    Path("model", WEIGHTS).unlink()
    os.mkfifo(f"model/{WEIGHTS}")


def index(content: Any) -> Change:
    return text("pipeline/model_index.json", json.dumps(content))


def lora(**named: Any) -> Change:
    return lambda: save_file(named or {}, "bad.safetensors")


def torch_lora(content: Any) -> Change:
    return lambda: torch.save(content, "bad.bin")


NAME = "transformer.transformer_blocks.0.attn.to_q.lora_A.weight"
INSPECT, PRUNE = "inspect model", "prune --teacher model --criterion first --out out"
EXPORT, SINGLE = (
    "export --model run --to diffusers --out out",
    "export --model run --to single-file --out one.safetensors",
)
LORA = "lora bad.safetensors --model run --out new.safetensors"
ROWS: list[tuple[str, Change | None, str, str]] = [
    # ---- the config
    ("config-list", text("model/config.json", "[]"), INSPECT, "wanted a JSON object"),
    ("config-cut", text("model/config.json", "{"), INSPECT, "not valid JSON"),
    ("config-bytes", text("model/config.json", b"\xff{}"), INSPECT, "not UTF-8"),
    ("config-none", lambda: Path("model/config.json").unlink(), INSPECT, "model"),
    ("class-none", config(_class_name=None), INSPECT, "model"),
    ("class-new", config(_class_name="NewTransformer2DModel"), INSPECT, "NewTransformer2DModel"),
    ("class-number", config(_class_name=3), INSPECT, "3"),
    ("count-text", config(num_layers="3"), INSPECT, 'num_layers \'3\', and the weights hold 3 blocks'),
    ("count-negative", config(num_layers=-1), INSPECT, "num_layers -1"),
    ("heads-zero", config(num_attention_heads=0), PRUNE, "context_embedder.bias is (32,), wanted (0,)"),
    ("heads-text", config(num_attention_heads="two"), PRUNE, "is not one of a FluxTransformer2DModel"),
    ("field-new", config(joint_attention_dim=[1]), PRUNE, "is not one of a FluxTransformer2DModel"),
    ("heads-many", config(num_attention_heads=10**9), PRUNE, "FluxTransformer2DModel"),
    # ---- the pipeline
    ("index-list", index([]), "inspect pipeline", "wanted a JSON object"),
    ("index-cut", text("pipeline/model_index.json", "{"), "inspect pipeline", "not valid JSON"),
    ("index-empty", index({}), "inspect pipeline", "pipeline"),
    ("index-odd", index({"transformer": ["diffusers", 3]}), "inspect pipeline", "pipeline"),
    ("index-nested", index({"transformer": ["diffusers", ["a"]]}), "inspect pipeline", "pipeline"),
    ("index-path", index({"../model": ["diffusers", "FluxTransformer2DModel"]}), "inspect pipeline", "names '../model', which is no folder of"),
    ("index-path-of-others", index({"transformer": ["diffusers", "FluxTransformer2DModel"], "../work": ["a", "B"]}),
     "export --model pipeline --to diffusers --pipeline --out out", "names '../work', which is no folder of its pipeline"),
    ("index-parent", index({"transformer": ["diffusers", "FluxTransformer2DModel"], "..": ["a", "B"]}),
     "export --model pipeline --to diffusers --pipeline --out out", "names '..', which is no folder of its pipeline"),
    ("index-nameless", index({"transformer": ["diffusers", "FluxTransformer2DModel"], "": ["a", "B"]}),
     "export --model pipeline --to diffusers --pipeline --out out", "names '', which is no folder of its pipeline"),
    ("unet", index({"unet": ["diffusers", "UNet2DConditionModel"]}), "inspect pipeline", "pipeline"),
    # ---- the weights
    ("weights-empty", text(f"model/{WEIGHTS}"), INSPECT, "is no readable safetensors file"),
    ("weights-header", text(f"model/{WEIGHTS}", b"\xff" * 64), INSPECT, "is no readable safetensors file"),
    ("weights-folder", as_folder, INSPECT, f"wants {WEIGHTS} or .bin"),
    ("weights-pipe", as_pipe, INSPECT, f"{WEIGHTS}"),
    ("weights-html", text(f"model/{WEIGHTS}", "<html>not found</html>" * 9), INSPECT, "is no readable safetensors file"),
    ("tensor-more", tensors(lambda t: t.update(odd=torch.ones(1))), PRUNE, "unexpected odd"),
    ("tensor-less", tensors(lambda t: t.pop("proj_out.bias")), PRUNE, "missing proj_out.bias"),
    ("tensor-shape", tensors(lambda t: t.update({"proj_out.bias": torch.ones(3)})), PRUNE, "proj_out.bias is (3,), wanted (4,)"),
    ("no-blocks", tensors(lambda t: [t.pop(name) for name in list(t) if name.startswith("transformer_blocks.")]), INSPECT,
     "holds no tensors of blocks transformer_blocks"),
    ("block-half", tensors(lambda t: [t.pop(name) for name in list(t) if name.startswith("transformer_blocks.1.ff")]), PRUNE,
     "missing transformer_blocks.1.ff"),
    ("block-huge", tensors(lambda t: t.update({"transformer_blocks.99999999999999999999.x": torch.ones(1)})), INSPECT, "gap at 3"),
    ("shard-missing", sharded(odd="other.safetensors"), INSPECT, "other.safetensors does not exist"),
    ("shard-outside", sharded(odd="../secret.safetensors"), INSPECT, "names '../secret.safetensors', which is no file in its folder"),
    ("shard-number", sharded(odd=3), INSPECT, "wanted a weight_map of tensors to files"),  # type: ignore[arg-type]
    ("shard-twice", copied, INSPECT, "and so does another file of model"),
    ("index-of-shards-list", text(f"model/{INDEX}", "[]"), INSPECT, "wanted a JSON object"),
    # ---- the plan
    ("keep-text", None, "prune --teacher model --keep 0,b --out out", "--keep"),
    ("keep-negative", None, "prune --teacher model --keep=-1,3 --out out", "-1"),
    ("keep-none", None, "prune --teacher model --criterion indices --out out", "wants the blocks to keep: --keep 0,2,4"),
    ("keep-none-zero", None, "prune --teacher model --criterion first --num-keep 0 --out out", "num_keep"),
    ("keep-beyond", None, "prune --teacher model --keep 0,3,99 --out out", "blocks 0 to 6"),
    ("protect-left-out", None, "prune --teacher model --keep 0,3 --protect 1 --out out", "leaves out the protected blocks [1]"),
    ("budget-text", None, f"{PRUNE} --set prune.budgets=transformer_blocks=two", "wants LIST=N"),
    ("budget-all", None, f"{PRUNE} --set prune.budgets=all=8", "1 of each list to all can stay"),
    ("unknown-rule", None, "prune --teacher model --criterion best --out out", "best"),
    ("blocks-none", None, f"{PRUNE} --blocks none.toml", "none.toml"),
    ("blocks-text", text("rows.toml", "= 3"), f"{PRUNE} --blocks rows.toml", "rows.toml is not valid TOML"),
    ("blocks-field", text("rows.toml", '[A]\nlists = [{ path = "x", count = "n", kind = 3 }]'), f"{PRUNE} --blocks rows.toml", "kind"),
    ("blocks-spread", text("rows.toml", '[A]\nlists = [{ path = "x", count = "n", control = { net = "N", taps = "t", spread = "any" } }]'),
     f"{PRUNE} --blocks rows.toml", "spread"),
    # ---- the student
    ("record-list", config("run/student", _tinyfusion=[]), "lora good.safetensors --model run --out new.safetensors", "no record of removed blocks"),
    ("record-lineage", record(lineage="abc"), "lora good.safetensors --model run --out new.safetensors", "has a damaged _tinyfusion"),
    ("record-depth", record(lineage=[{"hash": "a", "depth": {}}]), "lora good.safetensors --model run --out new.safetensors", "has a damaged _tinyfusion"),
    ("record-kept", record(kept={"transformer_blocks": "ab"}), "lora good.safetensors --model run --out new.safetensors", "has a damaged _tinyfusion"),
    ("record-plan", record(plan=3), EXPORT, "has a damaged _tinyfusion"),
    ("record-plan-fields", record(plan={"kept": 3}), EXPORT, "has a damaged _tinyfusion"),
    ("record-row", record(row="= 3"), "inspect run", "is not valid TOML"),
    ("student-none", lambda: shutil.rmtree("run/student"), EXPORT, "run"),
    # ---- the outputs
    ("out-file", text("out"), EXPORT, "out is a file; export --to diffusers writes a folder"),
    ("out-mine", lambda: [Path("out").mkdir(), Path("out/notes").touch()], EXPORT, "is not an export of tinyfusion"),
    ("out-below-file", text("out"), EXPORT.replace("--out out", "--out out/deep"), "out"),
    ("out-record", lambda: [Path("out").mkdir(), Path("out/tinyfusion.json").write_text("{")], EXPORT, "not valid JSON"),
    ("one-mine", text("one.safetensors"), SINGLE, "one.safetensors exists and was not made by tinyfusion"),
    ("one-record-mine", text("one.json", "{}"), SINGLE, "one.json exists and was not made by tinyfusion"),
    ("one-folder", lambda: Path("one.safetensors").mkdir(), SINGLE, "is a folder; this verb writes a file"),
    ("one-pipeline", None, f"{SINGLE} --pipeline", "--pipeline is for --to diffusers"),
    ("vae", None, f"{EXPORT} --pipeline --vae vae", "--vae and --labels are for models of classes"),
    # ---- LoRAs
    ("lora-empty", lora(), LORA, "is no state dict of tensors (it holds 'nothing')"),
    ("lora-of-a-model", lambda: shutil.copy(f"model/{WEIGHTS}", "bad.safetensors"), LORA, "is no LoRA"),
    ("lora-other-depth", lora(**{NAME.replace(".0.", ".7.", 1): torch.ones(1, 1)}), LORA, "was trained for another model"),
    ("lora-huge-index", lora(**{NAME.replace(".0.", f".{10**30}.", 1): torch.ones(1, 1)}), LORA, "was trained for another model"),
    ("lora-dict", torch_lora({"state": {NAME: torch.ones(1)}}), LORA.replace("bad.safetensors", "bad.bin"), "is no state dict of tensors"),
    ("lora-list", torch_lora([1]), LORA.replace("bad.safetensors", "bad.bin"), "holds a list, not a state dict"),
    ("lora-half-adapter", torch_lora({"image_proj": 3, "ip_adapter": {}}), LORA.replace("bad.safetensors", "bad.bin"), "is no state dict"),
    ("lora-folder", lambda: Path("bad").mkdir(), LORA.replace("bad.safetensors", "bad"), "bad/config.json does not exist"),
    ("lora-of-itself", lambda: shutil.copy("good.safetensors", "bad.safetensors"), LORA.replace("new.saf", "bad.saf"),
     "bad.safetensors exists and was not made by tinyfusion"),
    ("lora-suffix", None, LORA.replace("bad.saf", "good.saf").replace("new.safetensors", "new.pt"), "is a .safetensors file"),
    ("lora-pipe", lambda: os.mkfifo("bad.safetensors"), LORA, "bad.safetensors is a pipe"),
    ("inputs-pipe", lambda: os.mkfifo("bad.safetensors"), "prune --teacher model --inputs bad.safetensors --criterion bi --out out",
     "bad.safetensors is a pipe"),
    ("lora-no-student", None, "lora good.safetensors --model model --out new.safetensors", "no record of removed blocks"),
    ("lora-no-model", None, "lora good.safetensors --model nothing --out new.safetensors", "nothing"),
    ("lora-metadata", lambda: save_file({NAME: torch.ones(1, 1)}, "bad.safetensors", {"lora_adapter_metadata": "[1"}), LORA, "is no JSON"),
    ("lora-layers", lambda: save_file({NAME: torch.ones(1, 1)}, "bad.safetensors", {"lora_adapter_metadata": json.dumps({"r.layers_to_transform": [1]})}),
     LORA, "does not say of which of the 2 lists"),
    ("lora-rank-text", lambda: save_file({NAME: torch.ones(1, 1)}, "bad.safetensors", {"lora_adapter_metadata": json.dumps({"rank_pattern": {"transformer_blocks.77.a": 1}})}),
     LORA, "was trained for another model"),
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its pipeline, its student and a LoRA."""
    place = tmp_path_factory.mktemp("made")
    next(each for each in IMAGES if each.name == "FluxTransformer2DModel").model().save_pretrained(place / "model")
    shutil.copytree(place / "model", place / "pipeline" / "transformer")
    save_file({NAME: torch.ones(1, 1)}, place / "good.safetensors")
    arguments = ["--teacher", place / "model", "--keep", "0,2,3", "--out", place / "run"]
    assert cli.main(["prune", *map(str, arguments)]) == 0
    return place


def contents(folder: Path) -> dict[str, str]:
    """The names in a folder, with the hash of each file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(("change", "command", "message"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS])
def test_bad_input_ends_in_one_line(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, change: Change | None, command: str, message: str
) -> None:  # fmt: skip
    work = tmp_path / "work"
    shutil.copytree(made, work)
    monkeypatch.chdir(work)
    if change is not None:
        change()
    before = contents(work)
    code = cli.main(shlex.split(command))
    lines = capsys.readouterr().err.strip().splitlines()
    assert code == 2, lines
    assert lines[-1].startswith("error: ") and message in lines[-1], lines
    assert len(lines) == 1
    assert contents(work) == before


def test_tensors_of_a_lora_that_share_memory_are_written_apart(made: Path, tmp_path: Path) -> None:
    """As tied ones of a torch file do."""
    tied = torch.arange(6.0).view(2, 3)
    torch.save(
        {NAME: tied, NAME.replace(".0.", ".2."): tied, NAME.replace("to_q", "to_k"): tied[:, :1]}, tmp_path / "tied.pt"
    )
    command = ["lora", tmp_path / "tied.pt", "--model", made / "run", "--out", tmp_path / "new.safetensors"]
    assert cli.main([*map(str, command)]) == 0
    new = load_file(tmp_path / "new.safetensors")
    assert torch.equal(new[NAME], tied) and torch.equal(new[NAME.replace(".0.", ".1.")], tied)
    assert torch.equal(new[NAME.replace("to_q", "to_k")], tied[:, :1])


def test_there_are_fifty_distinct_ones() -> None:
    assert len({row[0] for row in ROWS}) == len(ROWS) >= 50
