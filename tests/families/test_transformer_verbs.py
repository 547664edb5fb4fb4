# ruff: noqa: E501
"""`prune`, `export` and `inspect` on transformers of diffusers: order of blocks, budgets, refusals, types, pipelines, memory."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import SINGLE, TRUNK, Tiny, outputs
from tiny_images import IMAGES
from tiny_video import VIDEO

from tinyfusion import cli
from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.commands.transformers import write_transformer
from tinyfusion.families.diffusers_classes.folder import RECORD, open_transformer
from tinyfusion.families.diffusers_classes.guess import guessed_row
from tinyfusion.families.diffusers_classes.rows import row_text, rows_in, shipped_rows
from tinyfusion.jobs.transformer_sources import transformer_of
from tinyfusion.models.wrapped import wrap_module

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
WEIGHTS = "diffusion_pytorch_model.safetensors"


def tiny(name: str, tag: str = "") -> Tiny:
    return next(each for each in [*IMAGES, *VIDEO] if each.name == name and each.tag == tag)


FLUX, SD3, WAN = tiny("FluxTransformer2DModel"), tiny("SD3Transformer2DModel"), tiny("WanTransformer3DModel")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The saved model of a class, made once."""
    saved: dict[str, Path] = {}

    def folder(model: Tiny) -> Path:
        if model.title not in saved:
            saved[model.title] = tmp_path_factory.mktemp(model.name) / "transformer"
            model.model().save_pretrained(saved[model.title])
        return saved[model.title]

    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """A command: its JSON, or the one line of its error."""

    def command(*arguments: Any) -> Any:
        code = cli.main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        if code == 2:
            return err.strip()
        assert code == 0, err
        return json.loads(out.strip().splitlines()[-1])

    return command


def changed(folder: Path, target: Path, **fields: Any) -> Path:
    """A copy of a folder with other fields in its config."""
    target.mkdir()
    config = json.loads((folder / "config.json").read_text()) | fields
    (target / "config.json").write_text(json.dumps(config))
    (target / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    return target


# ---------------------------------------------------------------------------------------------------- which blocks stay


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (["--keep", "0,2,3,6"], {TRUNK: [0, 2], SINGLE: [0, 3]}),  # 3 is the first single block
        (["--criterion", "first"], {TRUNK: [0, 1], SINGLE: [0, 1]}),
        (["--criterion", "last", "--num-keep", "1"], {TRUNK: [2], SINGLE: [3]}),
        (["--criterion", "uniform", "--num-keep", "2"], {TRUNK: [0, 2], SINGLE: [0, 3]}),
        (["--criterion", "bk-sdm"], {TRUNK: [0, 2], SINGLE: [0, 3]}),
        (["--criterion", "first", "--num-keep", "2", "--protect", "2,6"], {TRUNK: [0, 2], SINGLE: [0, 3]}),
        (["--criterion", "first", "--set", f"prune.budgets={SINGLE}=3"], {TRUNK: [0, 1], SINGLE: [0, 1, 2]}),
        (["--criterion", "last", "--set", f"prune.budgets={TRUNK}=3,{SINGLE}=1"], {TRUNK: [0, 1, 2], SINGLE: [3]}),
        (["--criterion", "first", "--set", "prune.budgets=all=5"], {TRUNK: [0, 1], SINGLE: [0, 1, 2]}),
    ],
)
def test_blocks_count_through_the_lists(
    folders: Any, run: Any, tmp_path: Path, arguments: list[str], kept: Any
) -> None:
    assert run("prune", "--teacher", folders(FLUX), "--out", tmp_path / "run", *arguments)["kept"] == kept
    config = json.loads((tmp_path / "run/student/config.json").read_text())
    assert [config["num_layers"], config["num_single_layers"]] == [len(kept[TRUNK]), len(kept[SINGLE])]
    assert json.loads((tmp_path / "run/plan.json").read_text())["kept"] == kept


def test_a_random_choice_is_that_of_its_seed(folders: Any, run: Any, tmp_path: Path) -> None:
    chosen = [
        run("prune", "--teacher", folders(FLUX), "--criterion", "random", "--seed", seed, "--out", tmp_path / str(i))[
            "kept"
        ]
        for i, seed in enumerate((0, 0, 1, 2, 3))
    ]
    assert chosen[0] == chosen[1]
    assert len({json.dumps(each) for each in chosen}) > 1


def test_lists_aside_stay_whole_unless_named(folders: Any, run: Any, tmp_path: Path) -> None:
    model = tiny("HunyuanVideoTransformer3DModel")
    refiner = next(iter(model.removed))
    rule = run(
        "prune", "--teacher", folders(model), "--criterion", "first", "--num-keep", "2", "--out", tmp_path / "a"
    )["kept"]
    assert rule == {refiner: [0, 1, 2], TRUNK: [0, 1], SINGLE: [0, 1]}
    named = run("prune", "--teacher", folders(model), "--keep", "3,8", "--out", tmp_path / "b")["kept"]
    assert named == {refiner: [0, 1, 2], TRUNK: [0], SINGLE: [2]}
    less = ["--set", f"prune.budgets={refiner}=1"]
    assert run("prune", "--teacher", folders(model), "--criterion", "last", *less, "--out", tmp_path / "c")["kept"][
        refiner
    ] == [2]


def test_rules_choose_among_units(folders: Any, run: Any, tmp_path: Path) -> None:
    """Pairs of a U, and runs of n blocks: what goes together is one choice."""
    pairs, runs = tiny("HunyuanDiT2DModel"), tiny("WanAnimateTransformer3DModel")
    command = ["--criterion", "first", "--num-keep", "4"]
    assert run("prune", "--teacher", folders(pairs), *command, "--out", tmp_path / "a")["kept"] == {
        "blocks": [0, 3, 4, 7]
    }
    assert run("prune", "--teacher", folders(runs), *command, "--out", tmp_path / "b")["kept"] == {
        "blocks": [0, 1, 2, 3]
    }
    said = run("prune", "--teacher", folders(pairs), "--criterion", "first", "--num-keep", "5", "--out", tmp_path / "c")
    assert "5 blocks of blocks cannot stay: 2 to 8 can in steps of 2" in said


# ------------------------------------------------------------------------------------------------------------- refusals

REFUSED = [
    (tiny("HunyuanDiT2DModel"), "1,2,3,4,5,6,7", "blocks 0 can only be removed together with 7"),
    (tiny("HunyuanDiT2DModel"), "0,1,2,4,5,6,7", "the middle blocks have no partner"),
    (
        tiny("HiDreamImageTransformer2DModel"),
        "0,1,2,3,4",
        "the text layer of the last block is also the text of the first",
    ),
    (tiny("WanVACETransformer3DModel"), "1,2,3,4,5", "blocks 0 cannot be removed: the first control hint"),
    (tiny("WanVACETransformer3DModel"), "0,3,4,5", "two entries of vace_layers would move to one block"),
    (tiny("LatteTransformer3DModel"), "1,2,3,5,6,7", "temporal positions are added behind the first pair"),
    (tiny("LatteTransformer3DModel"), "0,1,2,4,5,7", "alternate, so the same positions"),
    (tiny("NucleusMoEImageTransformer2DModel"), "0,1,3,4,5", "blocks have experts by position"),
    (tiny("NucleusMoEImageTransformer2DModel"), "0,1,2,3,4", "blocks have experts by position"),
    (tiny("WanAnimateTransformer3DModel"), "0,2,3,4,5", "can only be removed 2 in a row"),
    (tiny("ConsisIDTransformer3DModel", "face"), "0,1,2,3,5", "can only be removed 2 in a row"),
    (tiny("SanaWMTransformer3DModel"), "0,2,3,4,5,6,7", "can only be removed 4 in a row"),
    (
        tiny("ZImageTransformer2DModel"),
        "0,3,4,6,7",
        "share one count in the config; 1 of noise_refiner, 2 of context_refiner",
    ),
    (
        tiny("MotifVideoTransformer3DModel"),
        "0,1,2,3,4,5",
        "at least one of the last 2 blocks of single_transformer_blocks",
    ),
    (FLUX, "0,1,2", "at least one block of single_transformer_blocks must stay"),
    (FLUX, "0,7", "--keep [7] out of range: the model has blocks 0 to 6"),
    (
        tiny("ChromaTransformer2DModel"),
        "0,1,3,4",
        "a pruned ChromaTransformer2DModel cannot be written: its modulation",
    ),
]


@pytest.mark.parametrize(("model", "keep", "message"), REFUSED, ids=lambda value: getattr(value, "name", None))
def test_a_broken_coupling_is_refused_in_one_line(
    folders: Any, run: Any, tmp_path: Path, model: Tiny, keep: Any, message: str
) -> None:
    said = run("prune", "--teacher", folders(model), "--keep", keep, "--out", tmp_path / "run")
    assert message in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--criterion", "bi"], "looks at data"),
        ([], "criterion learned trains: for a FluxTransformer2DModel give --data latents:FOLDER"),
        (["--criterion", "first", "--num-keep", "4"], "4 blocks of transformer_blocks cannot stay: 1 to 3 can"),
        (
            ["--criterion", "first", "--set", "prune.budgets=blocks=2"],
            "wants LIST=N or all=N, lists are transformer_blocks",
        ),
        (["--criterion", "first", "--set", "prune.budgets=all=1"], "of the 7 blocks of"),
        (["--criterion", "first", "--num-keep", "1", "--protect", "0,1"], "2 units of transformer_blocks have to stay"),
        (["--criterion", "bk-sdm", "--num-keep", "1"], "bk-sdm's rule keeps 2 of the 3 units"),
        (["--criterion", "first", "--protect", "9"], "--protect [9] out of range"),
    ],
)
def test_what_cannot_be_planned_is_said(
    folders: Any, run: Any, tmp_path: Path, arguments: list[str], message: str
) -> None:
    assert message in run("prune", "--teacher", folders(FLUX), "--out", tmp_path / "run", *arguments)


def test_wrong_counts_and_gaps_are_errors_with_the_number_to_write(folders: Any, run: Any, tmp_path: Path) -> None:
    """What diffusers opens without an error, and fails or draws noise with."""
    source = folders(FLUX)
    said = run("inspect", changed(source, tmp_path / "count", num_layers=4))
    assert 'has num_layers 4, and the weights hold 3 blocks of transformer_blocks: write "num_layers": 3' in said
    gap = changed(source, tmp_path / "gap", num_single_layers=3)
    tensors = {name: t for name, t in load_file(gap / WEIGHTS).items() if not name.startswith(f"{SINGLE}.1.")}
    save_file(tensors, gap / WEIGHTS)
    said = run("inspect", gap)
    assert "3 blocks of single_transformer_blocks, and their numbers have a gap at 1" in said
    assert 'write "num_single_layers": 3' in said
    hidream = folders(tiny("HiDreamImageTransformer2DModel"))
    said = run("inspect", changed(hidream, tmp_path / "entries", llama_layers=[0, 1]))
    assert "has 2 llama_layers, and the model 6 blocks: write 6 entries" in said
    shallow = changed(folders(SD3), tmp_path / "dual", dual_attention_layers=[0, 9])
    assert "names [9] in dual_attention_layers; transformer_blocks has blocks 0 to 4" in run("inspect", shallow)
    wide = changed(source, tmp_path / "width", joint_attention_dim=48)
    said = run("prune", "--teacher", wide, "--criterion", "first", "--out", tmp_path / "run")
    assert (
        "does not hold the FluxTransformer2DModel of its config.json: context_embedder.weight is (32, 32), wanted (32, 48)"
        in said
    )


def test_damaged_weights_are_said(folders: Any, run: Any, tmp_path: Path) -> None:
    cut = changed(folders(FLUX), tmp_path / "cut")
    (cut / WEIGHTS).write_bytes((cut / WEIGHTS).read_bytes()[:5000])
    assert "is no readable safetensors file (truncated or foreign)" in run("inspect", cut)
    (cut / WEIGHTS).unlink()
    assert "wants diffusion_pytorch_model.safetensors or .bin" in run("inspect", cut)
    (cut / "model.gguf").touch()
    assert "there is model.gguf" in run("inspect", cut)


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "gguf", "quanto"])
def test_quantised_weights_are_refused_for_their_parent(folders: Any, run: Any, tmp_path: Path, method: str) -> None:
    source = changed(folders(FLUX), tmp_path / "quantised", quantization_config={"quant_method": method})
    for verb in (["inspect"], ["prune", "--criterion", "first", "--out", tmp_path / "run", "--teacher"],
                 ["export", "--to", "diffusers", "--out", tmp_path / "out", "--model"]):  # fmt: skip
        said = run(*verb, source)
        assert "is quantised: wanted the model that it was made from; prune that, and quantise the student" in said
    assert "kept" in run("inspect", changed(folders(FLUX), tmp_path / "plain", quantization_config=None))
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["whole", "sharded", "variant", "old"])
def test_torch_files_are_cut_as_safetensors_are(folders: Any, run: Any, tmp_path: Path, how: str) -> None:
    """The same hash, the same student, of mixed types; SD3 loses its last block, whose modulation is cut in chunks."""
    model = SD3.model().to(torch.bfloat16)
    model.proj_out.float()
    model.save_pretrained(tmp_path / "safe")
    variant = {"variant": "fp16"} if how == "variant" else {}
    shards = {"max_shard_size": "60KB"} if how == "sharded" else {}
    model.save_pretrained(tmp_path / "torch", safe_serialization=False, **variant, **shards)
    if how == "old":
        torch.save(
            model.state_dict(), tmp_path / "torch" / "diffusion_pytorch_model.bin", _use_new_zipfile_serialization=False
        )
    files = [path.name for path in (tmp_path / "torch").iterdir()]
    assert not any("safetensors" in name for name in files) and any(name.endswith(".bin") for name in files)
    students = []
    for name in ("safe", "torch"):
        run("prune", "--teacher", tmp_path / name, "--keep", "0,2,3", "--out", tmp_path / f"run-{name}")
        students.append(run("inspect", tmp_path / f"run-{name}"))
    assert students[0]["hash"] == students[1]["hash"] and students[0]["lineage"] == students[1]["lineage"]
    assert (tmp_path / "run-torch/student" / WEIGHTS).is_file()
    held = open_transformer(tmp_path / "torch", shipped_rows()).module().state_dict()
    assert all(
        torch.equal(held[name], tensor) and held[name].dtype == tensor.dtype
        for name, tensor in model.state_dict().items()
    )


class _Code:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_code_in_a_torch_file_is_not_run(folders: Any, run: Any, tmp_path: Path, capsys: Any) -> None:
    source = changed(folders(FLUX), tmp_path / "source")
    tensors = load_file(source / WEIGHTS)
    (source / WEIGHTS).unlink()
    file = source / "diffusion_pytorch_model.bin"
    torch.save({**tensors, "code": _Code()}, file)
    assert "holds code or foreign objects (print)" in run("inspect", source)
    torch.save({**tensors, "odd": torch.zeros(2, dtype=torch.complex64)}, file)
    assert "holds odd, a tensor of type torch.complex64" in run("inspect", source)
    torch.save({"state_dict": tensors}, file)
    assert "is no state dict of tensors (it holds 'state_dict')" in run("inspect", source)
    torch.save(tensors, source / "diffusion_pytorch_model.fp16.bin")
    torch.save(tensors, source / "diffusion_pytorch_model.ema.bin")
    file.unlink()
    assert "holds several variants, diffusion_pytorch_model.ema.bin, diffusion_pytorch_model.fp16.bin" in run(
        "inspect", source
    )


# --------------------------------------------------------------------------------------------- types, shards and memory


@pytest.mark.parametrize("how", ["sharded", "variant"])
def test_every_tensor_keeps_its_type(folders: Any, run: Any, tmp_path: Path, how: str) -> None:
    """Half precision beside norms in float32, as folders of diffusers hold them, in shards or as a variant."""
    model = FLUX.model().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    source = tmp_path / "source"
    model.save_pretrained(source, **(dict(max_shard_size="40KB") if how == "sharded" else dict(variant="bf16")))
    assert len(list(source.glob("*.safetensors"))) > 1 if how == "sharded" else not (source / WEIGHTS).exists()
    run("prune", "--teacher", source, "--keep", "1,2,3,5,6", "--out", tmp_path / "run")
    student = load_file(tmp_path / "run/student" / WEIGHTS)
    before = model.state_dict()
    assert {t.dtype for t in student.values()} == {torch.bfloat16, torch.float32}
    moved = {f"{TRUNK}.{new}.": f"{TRUNK}.{old}." for new, old in enumerate((1, 2))}
    moved |= {f"{SINGLE}.{new}.": f"{SINGLE}.{old}." for new, old in enumerate((0, 2, 3))}
    for name, tensor in student.items():
        old = next((name.replace(new, old) for new, old in moved.items() if name.startswith(new)), name)
        assert tensor.dtype == before[old].dtype
        assert torch.equal(tensor, before[old])
    opened = open_transformer(source, shipped_rows())
    held = opened.module().state_dict()
    assert all(held[name].dtype == tensor.dtype and torch.equal(held[name], tensor) for name, tensor in before.items())
    facts = run("inspect", source)
    assert set(facts["types"]) == {"BF16", "F32"}
    assert facts["hash"] == wrap_module(model, [TRUNK, SINGLE]).hash()


_MEASURED = """
import sys, resource
from pathlib import Path
import torch
from tinyfusion import cli
from tinyfusion.blocks.plan import PrunePlan
from tinyfusion.commands.transformers import write_transformer
def peak(): return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) // 1024
cli.main(["prune", "--teacher", sys.argv[1], "--criterion", "first", "--num-keep", "1", "--out", sys.argv[1] + "-warm", "--dry-run"])
open("/proc/self/clear_refs", "w").write("5")
before = peak()
assert cli.main(["prune", "--teacher", sys.argv[2], "--criterion", "uniform", "--num-keep", "3", "--out", sys.argv[3]]) == 0
print("MiB", peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak of memory to reset")
def test_a_model_is_cut_in_a_fraction_of_its_memory(folders: Any, tmp_path: Path) -> None:
    """A cut copies byte ranges: of a model of 270 MiB it takes less than a fifth at a time."""
    from diffusers import FluxTransformer2DModel

    large = dict(FLUX.config) | dict(
        num_layers=4, num_single_layers=4, attention_head_dim=128, num_attention_heads=6, axes_dims_rope=[32, 48, 48]
    )
    with torch.device("meta"):
        model = FluxTransformer2DModel(**large)
    model.to_empty(device="cpu").to(torch.bfloat16).save_pretrained(tmp_path / "large")
    size = (tmp_path / "large" / WEIGHTS).stat().st_size / 2**20
    assert size > 200
    command = [sys.executable, "-c", _MEASURED, str(folders(FLUX)), str(tmp_path / "large"), str(tmp_path / "run")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(said.split("MiB")[-1]) < size / 5


# ------------------------------------------------------------------------------------------------- pipelines and export


@pytest.fixture
def pipeline(folders: Any, tmp_path: Path) -> Path:
    """A pipeline folder as diffusers saves one, with a large file among its other components."""
    folder = tmp_path / "pipeline"
    changed(folders(FLUX), folder.parent / "transformer").rename(folder.parent / "moved")
    folder.mkdir()
    (folder.parent / "moved").rename(folder / "transformer")
    index = {
        "_class_name": "FluxPipeline",
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "vae").mkdir()
    (folder / "vae/config.json").write_text("{}")
    (folder / "vae/large.bin").write_bytes(bytes(2**20))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


def test_a_pipeline_is_cut_and_handed_on(pipeline: Path, run: Any, tmp_path: Path) -> None:
    run("prune", "--teacher", pipeline, "--keep", "0,2,3,5", "--out", tmp_path / "run")
    out = tmp_path / "out"
    run("export", "--model", tmp_path / "run", "--to", "diffusers", "--pipeline", "--out", out)
    assert json.loads((out / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
    assert (out / "vae/large.bin").samefile(pipeline / "vae/large.bin")
    assert not (out / "vae/config.json").samefile(pipeline / "vae/config.json")
    card = (out / "README.md").read_text()
    for text in (
        "license: apache-2.0",
        "Removed: transformer_blocks 1; single_transformer_blocks 1, 3",
        "FluxPipeline.from_pretrained",
        "LoRA",
    ):
        assert text in card
    assert (out / "plan.png").is_file()
    facts = run("inspect", out)
    assert facts["kept"] == {TRUNK: [0, 2], SINGLE: [0, 2]}
    assert facts["lineage"][0]["hash"] == run("inspect", pipeline)["hash"]
    assert facts["lists"][TRUNK]["blocks"] == 2
    assert facts["license"] == "apache-2.0"
    code = (
        "import sys; sys.modules['tinyfusion'] = None; from diffusers import FluxTransformer2DModel as Flux\n"
        f"model, info = Flux.from_pretrained({str(out / 'transformer')!r}, output_loading_info=True); assert not any(info.values()), info"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert (
        run("export", "--model", tmp_path / "run", "--to", "diffusers", "--pipeline", "--out", out)["state"] == "done"
    )  # there already


def test_a_parent_without_a_licence_has_none_in_any_card(folders: Any, run: Any, tmp_path: Path) -> None:
    """The card of a student says "unknown", which is no licence for the next one either."""
    run("prune", "--teacher", folders(FLUX), "--criterion", "uniform", "--out", tmp_path / "run")
    run("export", "--model", tmp_path / "run", "--to", "diffusers", "--out", tmp_path / "light")
    for card in (tmp_path / "run/student/README.md", tmp_path / "light/README.md"):
        assert "The weights are under the licence of the parent, which no file names." in card.read_text()
    assert run("inspect", tmp_path / "light")["license"] is None


def test_a_student_is_cut_again(pipeline: Path, run: Any, tmp_path: Path) -> None:
    """The lineage grows, and the second cut is that of a model of the first one's depth."""
    run("prune", "--teacher", pipeline, "--keep", "0,2,3,4,5", "--out", tmp_path / "one")
    run("prune", "--teacher", tmp_path / "one", "--keep", "1,2,4", "--out", tmp_path / "two")
    facts = run("inspect", tmp_path / "two")
    assert [each["depth"] for each in facts["lineage"]] == [{TRUNK: 3, SINGLE: 4}, {TRUNK: 2, SINGLE: 3}]
    student = load_file(tmp_path / "two/student" / WEIGHTS)
    teacher = load_file(pipeline / "transformer" / WEIGHTS)
    name = "attn.to_q.weight"
    assert torch.equal(student[f"{TRUNK}.0.{name}"], teacher[f"{TRUNK}.2.{name}"])
    assert torch.equal(student[f"{SINGLE}.1.{name}"], teacher[f"{SINGLE}.2.{name}"])


def test_a_model_of_the_hub_is_named_as_the_parent(
    pipeline: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = lambda name: (pipeline, {"hub": name, "license": "mit"})  # noqa: E731
    monkeypatch.setattr("tinyfusion.jobs.transformer_sources.by_name", cached)
    run("prune", "--teacher", "org/flux", "--criterion", "first", "--out", tmp_path / "run")
    card = (tmp_path / "run/student/README.md").read_text()
    assert "base_model: org/flux" in card
    assert "license: apache-2.0" in card, "that of the files goes first"


def test_two_experts_are_two_models(folders: Any, run: Any, tmp_path: Path) -> None:
    both = {name: ["diffusers", "WanTransformer3DModel"] for name in ("transformer", "transformer_2")}
    for name in both:
        changed(folders(WAN), tmp_path / name)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **both}))
    said = run("prune", "--teacher", tmp_path, "--criterion", "first", "--out", tmp_path / "run")
    assert (
        f"has 2 transformers, each with blocks of its own: give {tmp_path / 'transformer'} or {tmp_path / 'transformer_2'}"
        in said
    )
    second, out = tmp_path / "transformer_2", tmp_path / "out"
    run("prune", "--teacher", second, "--criterion", "first", "--num-keep", "3", "--out", tmp_path / "run")
    run("export", "--model", tmp_path / "run", "--to", "diffusers", "--pipeline", "--out", out)
    depths = [json.loads((out / name / "config.json").read_text())["num_layers"] for name in both]
    assert depths == [4, 3]


def test_export_refuses_what_it_cannot_do(folders: Any, run: Any, tmp_path: Path) -> None:
    source = folders(FLUX)
    assert "has no format tinyfusion" in run("export", "--model", source, "--to", "tinyfusion", "--out", tmp_path / "a")
    assert "no record names one" in run(
        "export", "--model", source, "--to", "diffusers", "--pipeline", "--out", tmp_path / "a"
    )
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    assert "is not an export of tinyfusion" in run(
        "export", "--model", source, "--to", "diffusers", "--out", tmp_path / "taken"
    )


def test_an_export_is_uploaded_where_that_is_asked(
    folders: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads = []
    monkeypatch.setattr("tinyfusion.commands.export.upload_folder", lambda *said: uploads.append(said) or "address")
    arguments = ["export", "--model", folders(FLUX), "--push-to-hub", "org/name", "--out"]
    assert run(*arguments, tmp_path / "a", "--to", "diffusers")["pushed_to"] == "address"
    assert uploads == [(tmp_path / "a", "org/name")]
    assert "pushed_to" not in run(*arguments, tmp_path / "b", "--to", "diffusers", "--dry-run")
    assert "--push-to-hub" in run(*arguments, tmp_path / "c.safetensors", "--to", "single-file")
    assert "--vae and --labels" in run(*arguments, tmp_path / "d", "--to", "diffusers", "--pipeline", "--vae", "x")
    assert len(uploads) == 1


def test_a_model_of_texts_without_any_is_pruned_on_its_files(folders: Any, run: Any, tmp_path: Path) -> None:
    folder = folders(tiny("PixArtTransformer2DModel"))
    assert transformer_of(str(folder), None, prompts=True) is None, "with prompts its family opens it"
    assert run("prune", "--teacher", folder, "--keep", "0,1", "--out", tmp_path / "run")["kept"] == {TRUNK: [0, 1]}


# ------------------------------------------------------------------------------------------------ classes without a row


def test_every_class_of_diffusers_has_a_row() -> None:
    """A class that a newer diffusers adds: its guessed row is in the message, to be checked and put into the table."""
    from diffusers.models import transformers

    known = {
        *shipped_rows(),
        "DualTransformer2DModel",
    }  # the latter is a pair of Transformer2DModels, and no model on its own
    new = sorted(
        name
        for name, kind in inspect.getmembers(transformers, inspect.isclass)
        if issubclass(kind, torch.nn.Module) and name not in known
    )
    guesses = [guessed_row({"_class_name": name}) or f"{name}: no guess" for name in new]
    assert not new, "\n\n".join(guesses)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel", "CogVideoXTransformer3DModel"])
def test_a_guess_is_the_row(name: str) -> None:
    text = guessed_row({"_class_name": name, **tiny(name).config})
    assert text is not None
    found = [(each.path, each.count, each.streams) for each in rows_in(text, "guess")[name].lists]
    assert found == [(each.path, each.count, each.streams) for each in shipped_rows()[name].lists]


def test_a_row_of_the_users_travels_with_the_student(
    folders: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinyfusion.families.diffusers_classes import rows

    own = {name: row for name, row in shipped_rows().items() if name != FLUX.name}
    monkeypatch.setattr(rows, "shipped_rows", lambda: own)
    said = run("prune", "--teacher", folders(FLUX), "--criterion", "first", "--out", tmp_path / "run")
    assert "is a FluxTransformer2DModel, for which there is no row. A guess" in said
    file = tmp_path / "rows.toml"
    file.write_text(said[said.index("FluxTransformer2DModel = ") :])
    blocks = ["--blocks", file]
    made = run("prune", "--teacher", folders(FLUX), "--criterion", "first", *blocks, "--out", tmp_path / "run")
    assert isinstance(made, dict), made
    assert made["kept"] == {TRUNK: [0, 1], SINGLE: [0, 1]}
    facts = run("inspect", tmp_path / "run")
    assert isinstance(facts, dict), facts
    assert facts["lists"][SINGLE]["returns"] == "encoder_hidden_states hidden_states"
    file.write_text('[FluxTransformer2DModel]\nlists = [{ path = "transformer_blocks" }]')
    assert "count is missing" in run("inspect", folders(FLUX), *blocks)
    file.write_text('[A]\nlists = [{ path = "x", count = "n" }]\nindices = { y = "z" }')
    assert "A names the list 'z'; its lists are x" in run("inspect", folders(FLUX), *blocks)


@pytest.mark.parametrize("name", shipped_rows())
def test_rows_are_written_as_they_are_read(name: str) -> None:
    row = shipped_rows()[name]
    assert rows_in(row_text(name, row), "text") == {name: row}


def test_the_record_of_a_student_is_in_its_config(folders: Any, run: Any, tmp_path: Path) -> None:
    run("prune", "--teacher", folders(SD3), "--keep", "0,2,3", "--out", tmp_path / "run")
    config = json.loads((tmp_path / "run/student/config.json").read_text())
    assert config[RECORD]["kept"] == {TRUNK: [0, 2, 3]}
    assert config[RECORD]["hash"] == run("inspect", tmp_path / "run")["hash"]
    from diffusers import SD3Transformer2DModel

    again = SD3Transformer2DModel.from_pretrained(tmp_path / "run/student")
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())[RECORD]["kept"] == {TRUNK: [0, 2, 3]}
    assert len(outputs(again.eval(), SD3.given())) == 1


# ----------------------------------------------------------------------------------------------------------- single files


def columns_of_one(name: str, folder: Path, **sizes: Any) -> Path:
    """A folder with the rows of the published width, which converters split by, and one column: some bytes instead of gigabytes."""
    from diffusers.models import transformers

    with torch.device("meta"):
        model = getattr(transformers, name)(**sizes)
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: torch.randn(len(t), *([1] * (t.ndim - 1)), generator=generator).to(torch.bfloat16)
        for key, t in model.state_dict().items()
    }
    save_file(tensors, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps({**model.config, "_class_name": name}))
    return folder


@pytest.mark.parametrize(
    ("name", "sizes", "converter"),
    [
        (
            "FluxTransformer2DModel",
            dict(num_layers=3, num_single_layers=4, guidance_embeds=True),
            "flux_transformer_checkpoint",
        ),
        ("WanTransformer3DModel", dict(WAN.config) | dict(image_dim=16, added_kv_proj_dim=24), "wan_transformer"),
        ("ZImageTransformer2DModel", tiny("ZImageTransformer2DModel").config, "z_image_transformer_checkpoint"),
        ("QwenImageTransformer2DModel", tiny("QwenImageTransformer2DModel").config, None),
        ("Flux2Transformer2DModel", tiny("Flux2Transformer2DModel").config, "flux2_transformer_checkpoint"),
        ("SD3Transformer2DModel", tiny("SD3Transformer2DModel").config, "sd3_transformer_checkpoint"),
        ("HiDreamImageTransformer2DModel", tiny("HiDreamImageTransformer2DModel").config, "hidream_transformer"),
        ("LTXVideoTransformer3DModel", tiny("LTXVideoTransformer3DModel").config, "ltx_transformer_checkpoint"),
        # the converter knows no other number of blocks
        (
            "MochiTransformer3DModel",
            {**tiny("MochiTransformer3DModel").config, "num_layers": 49},
            "mochi_transformer_checkpoint",
        ),
    ],
)
def test_a_single_file_is_what_the_converter_of_diffusers_reads(
    run: Any, tmp_path: Path, name: str, sizes: Any, converter: Any
) -> None:
    """Of a student: contiguous blocks in the names of others, every tensor as it was, metadata that readers look for."""
    from diffusers.loaders import single_file_utils

    opened = open_transformer(columns_of_one(name, tmp_path / "model", **sizes), shipped_rows())
    kept = {
        each.path: [i for i in range(opened.depths[each.path]) if i != 1]
        for each in opened.row.lists
        if each.path in opened.depths
    }
    student = opened.cut(PrunePlan(kept, dict(opened.depths), "indices"))
    folder, out = tmp_path / "student", tmp_path / "one.safetensors"
    write_transformer(student, folder, "student")
    run("export", "--model", folder, "--to", "single-file", "--out", out)
    checkpoint = load_file(out)
    read = getattr(single_file_utils, f"convert_{converter}_to_diffusers")(checkpoint) if converter else checkpoint
    wanted = load_file(folder / WEIGHTS)
    assert read.keys() == wanted.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in wanted.items())
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["modelspec.architecture"]
    assert json.loads(metadata["tinyfusion"])["kept"] == kept


def test_readers_of_a_fixed_depth_are_named(folders: Any, run: Any, tmp_path: Path) -> None:
    made = run("export", "--model", folders(SD3), "--to", "single-file", "--out", tmp_path / "one.safetensors")
    assert "ComfyUI takes the depth of an SD3 from its width and cannot open a cut one" in made["warning"]
    indices = {
        int(name.split(".")[1]) for name in load_file(tmp_path / "one.safetensors") if name.startswith("joint_blocks.")
    }
    assert indices == set(range(SD3.config["num_layers"])), (
        "consecutive from 0, and one more than the highest is their number"
    )


def test_single_files_are_refused_where_there_are_no_names(folders: Any, run: Any, tmp_path: Path) -> None:
    command = ["--to", "single-file", "--out", tmp_path / "one.safetensors"]
    model = folders(tiny("HunyuanDiT2DModel"))
    assert "has no names of single files here, only FluxTransformer2DModel" in run("export", "--model", model, *command)
    assert "--to single-file is for transformers of diffusers" in run("export", "--model", "digits", *command)
    said = run("export", "--model", folders(FLUX), "--to", "single-file", "--out", tmp_path / "one")
    assert "is a .safetensors file, without --pipeline" in said
