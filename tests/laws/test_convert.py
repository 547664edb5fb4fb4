"""Official, ours, diffusers: the same numbers under other names, in both directions, at every published shape."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinyfusion.commands.export import ExportOptions, export
from tinyfusion.core.errors import UserError
from tinyfusion.families.dit import diffusers
from tinyfusion.families.dit.model import SIZES, published_arch
from tinyfusion.families.registry import FAMILIES
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.models.checkpoint import LoadedModel, open_model, save_model
from tinyfusion.prune.criteria import by_indices

DIT = FAMILIES["dit"]
WEIGHTS = "diffusion_pytorch_model"


def same(first: LoadedModel, second: LoadedModel) -> bool:
    a, b = first.module.state_dict(), second.module.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def write(model: str | Path, to: str, out: Path, **more: Any) -> Path:
    export(
        RunOptions(out, num_heads=2 if str(model).endswith((".pt", ".safetensors")) else None),
        ExportOptions(str(model), to, **more),
    )
    return out


def saved(model: LoadedModel, folder: Path) -> Path:
    save_model(model, folder)
    return folder


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("image_size", [256, 512])
def test_shapes_of_every_published_model(name: str, image_size: int) -> None:
    arch = published_arch(f"{name}/2", image_size)
    ours = DIT.shapes(arch)
    theirs = diffusers.to_diffusers(ours, arch.depth)
    assert len(theirs) == 6 + arch.depth * (5 + 2 * 4 + 2 * 3)
    copies = (arch.depth - 1) * sum(ours[name].numel() for name in ours if name[:2] in ("t_", "y_"))
    table = ours["pos_embed"].numel()
    assert sum(t.numel() for t in theirs.values()) == sum(t.numel() for t in ours.values()) + copies - table
    config = diffusers.config_of_arch(arch)
    again = diffusers.arch_of_config(config)
    assert again == dataclasses.replace(arch, frequency_shift=1) and config["num_layers"] == arch.depth


@pytest.mark.parametrize("name", SIZES)
def test_round_trip_of_every_depth_and_number_of_heads(name: str, tiny_model: Callable[..., LoadedModel]) -> None:
    """All depths and heads, narrow: bit-equal tensors, every one."""
    depth, _, heads = SIZES[name]
    model = tiny_model(depth=depth, num_heads=heads, hidden_size=4 * heads)
    ours = model.module.state_dict()
    theirs = diffusers.to_diffusers(ours, depth)
    back = diffusers.from_diffusers(theirs, model.arch)
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)
    numbers = {name: i for i, name in enumerate(theirs)}
    for name, tensor in theirs.items():
        other = tensor + 1 + numbers[name]
        if ".emb." in name:  # its copies would differ
            continue
        changed = diffusers.from_diffusers({**theirs, name: other}, model.arch)
        differing = [key for key in ours if not torch.equal(changed[key], ours[key])]
        assert len(differing) == 1, f"{name} reaches {differing}"


def test_official_ours_diffusers_ours_official(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    model = tiny_model()
    official = tmp_path / "official.pt"
    torch.save(dict(model.module.state_dict()), official)
    own = write(official, "tinyfusion", tmp_path / "own")
    folder = write(own, "diffusers", tmp_path / "diffusers")
    own_again = write(folder, "tinyfusion", tmp_path / "own-again")
    for end in ("last.pt", "last.safetensors"):
        last = write(own_again, "official", tmp_path / end)
        found = torch.load(last, weights_only=True) if last.suffix == ".pt" else load_file(last)
        first = torch.load(official, weights_only=True)
        assert found.keys() == first.keys() and all(torch.equal(found[name], first[name]) for name in first)
        assert found.keys() == model.module.state_dict().keys()
    opened = open_model(folder)
    assert opened.arch == dataclasses.replace(model.arch, frequency_shift=1), "it computes what diffusers computes"
    assert opened.hash() == open_model(own_again).hash() != model.hash() == open_model(own).hash()


def test_a_cut_model_keeps_what_is_known_of_it(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    teacher = tiny_model()
    teacher.facts = dataclasses.replace(teacher.facts, license="CC-BY-NC-4.0", seen_images=7)
    student = teacher.cut(by_indices(teacher, [1, 3], 0))
    folder = write(saved(student, tmp_path / "student"), "diffusers", tmp_path / "out")
    again = open_model(folder)
    assert same(again, student) and again.facts == student.facts
    assert again.arch == dataclasses.replace(student.arch, frequency_shift=1) == student.made_for("diffusers").arch
    assert json.loads((folder / "config.json").read_text())["num_layers"] == 2
    assert again.facts.kept == {"blocks": [1, 3]} and again.facts.lineage[0]["hash"] == teacher.hash()


def theirs(model: LoadedModel, folder: Path, **config: Any) -> Path:
    """A folder as diffusers writes it: nothing of ours in the configuration."""
    folder.mkdir()
    tensors = diffusers.to_diffusers(model.module.state_dict(), model.arch.depth)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / f"{WEIGHTS}.safetensors")
    (folder / "config.json").write_text(json.dumps({**diffusers.config_of_arch(model.arch), **config}))
    return folder


def test_a_folder_of_diffusers_computes_what_diffusers_does(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    model = tiny_model()
    plain = open_model(theirs(model, tmp_path / "plain"))
    assert same(plain, model) and plain.arch == dataclasses.replace(model.arch, frequency_shift=1)
    old = open_model(theirs(model, tmp_path / "old", _class_name="Transformer2DModel", norm_eps=1e-5))
    assert same(old, model) and old.arch.mlp_norm_eps == 1e-5
    assert old.module.get_submodule("blocks.2.norm2").eps == 1e-5
    cut = old.cut(by_indices(old, [2, 3], 0))
    assert cut.arch.frequency_shift == 1 and cut.module.get_submodule("t_embedder").frequency_shift == 1


def test_weights_in_shards_and_in_torch_files(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    model = tiny_model()
    whole = theirs(model, tmp_path / "whole")
    tensors = load_file(whole / f"{WEIGHTS}.safetensors")
    names = sorted(tensors)
    for suffix, write_file in (("safetensors", save_file), ("bin", torch.save)):
        folder = theirs(model, tmp_path / suffix)
        (folder / f"{WEIGHTS}.safetensors").unlink()
        files = {name: f"{WEIGHTS}-0000{1 + i % 2}-of-00002.{suffix}" for i, name in enumerate(names)}
        for file in set(files.values()):
            write_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
        (folder / f"{WEIGHTS}.{suffix}.index.json").write_text(json.dumps({"weight_map": files}))
        assert same(open_model(folder), model)
        single = theirs(model, tmp_path / f"single-{suffix}")
        (single / f"{WEIGHTS}.safetensors").unlink()
        write_file(tensors, single / f"{WEIGHTS}.{suffix}")
        assert same(open_model(single), model)


def test_a_pipeline_tells_its_latents(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    model = tiny_model(in_channels=4)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(
        json.dumps({"_class_name": "AutoencoderKL", "scaling_factor": 0.5, "block_out_channels": [8, 8, 8]})
    )
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    theirs(model, tmp_path / "transformer")
    facts = open_model(tmp_path).facts
    assert (facts.image_size, facts.latent_scale, facts.vae) == (16, 0.5, "stabilityai/sd-vae-ft-ema")
    (tmp_path / "vae" / f"{WEIGHTS}.safetensors").touch()
    assert open_model(tmp_path).facts.vae == str(tmp_path / "vae")
    assert open_model(tmp_path).origin["kind"] == "folder of diffusers in a DiTPipeline"


@pytest.mark.parametrize("name", ["timestep_embedder.linear_2.bias", "class_embedder.embedding_table.weight"])
def test_copies_that_differ_are_named(name: str, tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    folder = theirs(tiny_model(), tmp_path / "m")
    tensors = load_file(folder / f"{WEIGHTS}.safetensors")
    apart = f"transformer_blocks.2.norm1.emb.{name}"
    tensors[apart].view(-1)[0] = torch.nextafter(tensors[apart].view(-1)[0], torch.tensor(9.0))
    save_file(tensors, folder / f"{WEIGHTS}.safetensors")
    with pytest.raises(UserError, match=apart.replace(".", r"\.")):
        open_model(folder)


def test_a_stored_position_table(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """Some versions store it: the formula's is taken, another one refused."""
    model = tiny_model()
    folder = theirs(model, tmp_path / "m")
    file = folder / f"{WEIGHTS}.safetensors"
    tensors, table = load_file(file), model.module.state_dict()["pos_embed"]
    save_file({**tensors, "pos_embed.pos_embed": table * (1 + 1e-7)}, file)
    assert same(open_model(folder), model)
    save_file({**tensors, "pos_embed.pos_embed": table + 0.01}, file)
    with pytest.raises(UserError, match="position table"):
        open_model(folder)


def test_embedders_are_one_after_opening(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """Training moves the one embedder, and the next export copies it to every block again."""
    model = open_model(theirs(tiny_model(), tmp_path / "m"))
    with torch.no_grad():
        model.module.get_submodule("y_embedder").embedding_table.weight += 1
    folder = write(saved(model, tmp_path / "moved"), "diffusers", tmp_path / "out")
    tables = [t for name, t in load_file(folder / f"{WEIGHTS}.safetensors").items() if "class_embedder" in name]
    assert len(tables) == 4 and all(torch.equal(t, tables[0]) for t in tables)
    assert same(open_model(folder), model)


def test_differences_are_said(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model()
    published, foreign = saved(model, tmp_path / "published"), theirs(model, tmp_path / "foreign", norm_eps=1e-5)
    write(published, "diffusers", tmp_path / "a")
    assert "diffusers compute timestep frequencies as 10000^(-i/127)" in capsys.readouterr().err
    write(foreign, "diffusers", tmp_path / "b")
    write(published, "official", tmp_path / "a.safetensors")
    assert capsys.readouterr().err == ""
    write(foreign, "official", tmp_path / "b.safetensors")
    said = capsys.readouterr().err
    assert (
        "published scripts compute timestep frequencies as 10000^(-i/128)" in said
        and "epsilon 1e-06, this model 1e-05" in said
    )


def test_no_format_holds_what_it_cannot(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.module.get_parameter("pos_embed").add_(0.5)
    folder = saved(model, tmp_path / "moved-table")
    with pytest.raises(UserError, match="position table is not the formula's"):
        write(folder, "diffusers", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert same(open_model(write(folder, "official", tmp_path / "o.safetensors"), num_heads=2), model)
    narrow = saved(tiny_model(head_dim=4), tmp_path / "narrow")
    for to in ("diffusers", "official"):
        with pytest.raises(UserError, match="attention is 8 channels wide"):
            write(narrow, to, tmp_path / "n.safetensors")


def test_a_model_made_for_a_format_is_exported_exactly(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same tensors, other rules: nothing is left to say at the export, and what is opened again is the same model."""
    published = tiny_model()
    made = published.made_for("diffusers")
    assert (
        same(made, published)
        and made.arch.frequency_shift == made.module.get_submodule("t_embedder").frequency_shift == 1
    )
    assert published.arch.frequency_shift == published.module.get_submodule("t_embedder").frequency_shift == 0
    folder = write(saved(made, tmp_path / "made"), "diffusers", tmp_path / "out")
    assert capsys.readouterr().err == "" and open_model(folder).hash() == made.hash() != published.hash()
    back = made.made_for("official")
    assert back.hash() == published.hash() and made.made_for(None) is made is made.made_for("diffusers")
    with pytest.raises(UserError, match=r"cannot be made for diffusers: its attention is 8 channels wide"):
        tiny_model(head_dim=4).made_for("diffusers")


def test_no_path_of_this_machine_leaves_it(tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    model = tiny_model(in_channels=4)
    model.facts = dataclasses.replace(model.facts, latent_scale=0.18215, vae=str(tmp_path / "vae"))
    for to in ("diffusers", "tinyfusion"):
        folder = write(saved(model, tmp_path / "own"), to, tmp_path / to)
        texts = [file.read_text() for file in folder.iterdir() if file.suffix in (".json", ".md")]
        assert len(texts) == 3 and not any(str(tmp_path) in text for text in texts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_narrow_numbers_are_widened(dtype: torch.dtype, tiny_model: Callable[..., LoadedModel], tmp_path: Path) -> None:
    """Whatever floats a folder holds, they are float32 here, each the same number."""
    folder = write(saved(tiny_model(), tmp_path / "own"), "diffusers", tmp_path / "out")
    file = folder / f"{WEIGHTS}.safetensors"
    narrow = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    save_file(narrow, file)
    found = diffusers.to_diffusers(open_model(folder).module.state_dict(), 4)
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in narrow.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_and_their_students_go_to_diffusers(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model()
    exact = model.module.state_dict()["pos_embed"]
    torch.save({name: t.to(dtype) for name, t in model.module.state_dict().items()}, tmp_path / "half.pt")
    half = open_model(tmp_path / "half.pt", num_heads=2)
    stored = half.module.state_dict()["pos_embed"]
    assert torch.equal(stored, exact.to(dtype).float()) and not torch.equal(stored, exact)
    student = saved(half.cut(by_indices(half, [0, 2], 0)), tmp_path / "student")
    for source in (tmp_path / "half.pt", student):
        folder = write(source, "diffusers", tmp_path / f"{source.stem}-diffusers")
        assert "what a formula gives (pos_embed) is computed in float32 there" in capsys.readouterr().err
        found, wanted = open_model(folder), open_model(source, num_heads=2).made_for("diffusers")
        tensors = wanted.module.state_dict()
        assert torch.equal(found.module.state_dict()["pos_embed"], exact)
        assert all(
            torch.equal(t, tensors[name]) for name, t in found.module.state_dict().items() if name != "pos_embed"
        )
        assert found.arch == wanted.arch and found.hash() == wanted.with_formulas().hash() != wanted.hash()
    assert write(student, "official", tmp_path / "again.pt").is_file()
    assert torch.equal(torch.load(tmp_path / "again.pt", weights_only=True)["pos_embed"], stored)
    other = dict(half.module.state_dict())
    other["pos_embed"] = stored + 0.01
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(UserError, match="position table is not the formula's"):
        write(tmp_path / "other.pt", "diffusers", tmp_path / "refused")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_stored_table_of_diffusers_in_half_precision(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path, dtype: torch.dtype
) -> None:
    model = tiny_model()
    folder = theirs(model, tmp_path / "m")
    tensors = {name: t.to(dtype) for name, t in load_file(folder / f"{WEIGHTS}.safetensors").items()}
    tensors["pos_embed.pos_embed"] = model.module.state_dict()["pos_embed"].to(dtype)
    save_file(tensors, folder / f"{WEIGHTS}.safetensors")
    assert torch.equal(open_model(folder).module.state_dict()["pos_embed"], model.module.state_dict()["pos_embed"])
