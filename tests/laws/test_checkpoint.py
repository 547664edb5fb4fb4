"""Models on disk: what was written is what is read, the hash knows it, and nothing else gets in."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tinyfusion.core.errors import UserError
from tinyfusion.families.family import ModelFamily
from tinyfusion.families.sizes import position_table
from tinyfusion.models.checkpoint import LoadedModel, new_model, open_model, save_model
from tinyfusion.prune.criteria import by_indices


@pytest.fixture
def model(tiny_model: Callable[..., LoadedModel]) -> LoadedModel:
    return tiny_model(depth=2)


def official(model: LoadedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def same_tensors(first: LoadedModel, second: LoadedModel) -> bool:
    one, two = first.module.state_dict(), second.module.state_dict()
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


def opened(path: Path, **more: Any) -> LoadedModel:
    return open_model(path, num_heads=2, **more)


# ------------------------------------------------------------------------------------------------------ round trips


def test_our_folder_gives_back_everything(model: LoadedModel, tmp_path: Path) -> None:
    student = model.cut(by_indices(model, [1], seed=4))
    student = dataclasses.replace(
        student, facts=dataclasses.replace(student.facts, license="CC0", latent_scale=0.5, vae="some/vae")
    )
    save_model(student, tmp_path / "m")
    again = open_model(tmp_path / "m")
    assert same_tensors(student, again) and again.hash() == student.hash()
    assert again.arch == student.arch and again.facts == student.facts and again.family is student.family
    assert not again.module.training
    assert [n for n, p in again.module.named_parameters() if not p.requires_grad] == ["pos_embed"]
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["model.json", "model.safetensors"]


def test_model_json_says_what_the_contract_says(model: LoadedModel, tmp_path: Path) -> None:
    save_model(model, tmp_path / "m")
    record = json.loads((tmp_path / "m" / "model.json").read_text())
    assert {
        "format_version",
        "family",
        "process",
        "arch",
        "plan",
        "kept",
        "lineage",
        "hash",
        "image_size",
        "latent_scale",
        "vae",
        "license",
    } <= set(record)
    assert record["hash"] == model.hash() and record["kept"] is None and record["lineage"] == []
    assert record["arch"] == dataclasses.asdict(model.arch)


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.bin", "m.ckpt", "m.safetensors"])
def test_official_files_hash_like_our_folder(model: LoadedModel, tmp_path: Path, name: str) -> None:
    if name.endswith("safetensors"):
        save_file(official(model), tmp_path / name)
    else:
        torch.save(official(model), tmp_path / name)
    save_model(model, tmp_path / "folder")
    found = opened(tmp_path / name)
    assert found.hash() == open_model(tmp_path / "folder").hash() == model.hash()
    assert same_tensors(found, model) and found.arch == model.arch


def test_the_order_of_keys_does_not_matter(model: LoadedModel, tmp_path: Path) -> None:
    torch.save(dict(reversed(official(model).items())), tmp_path / "m.pt")
    assert opened(tmp_path / "m.pt").hash() == model.hash()


def test_training_checkpoints_have_two_sets_of_weights(model: LoadedModel, tmp_path: Path) -> None:
    halved = {name: 0.5 * tensor for name, tensor in official(model).items()}
    content = {
        "model": official(model),
        "ema": halved,
        "opt": {"state": {}},
        "train_steps": 3,
        "args": argparse.Namespace(lr=1e-4),
    }
    torch.save(content, tmp_path / "both.pt")
    assert same_tensors(opened(tmp_path / "both.pt", weights="raw"), model)
    assert torch.equal(opened(tmp_path / "both.pt").module.state_dict()["pos_embed"], halved["pos_embed"])
    torch.save({name: content[name] for name in ("model", "args")}, tmp_path / "raw-only.pt")
    assert same_tensors(opened(tmp_path / "raw-only.pt"), model)
    with pytest.raises(UserError, match="ema or raw"):
        opened(tmp_path / "both.pt", weights="best")


def test_run_folders_offer_their_student_else_their_model(
    model: LoadedModel, tiny_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    raw, student = tiny_model(1, depth=2), tiny_model(2, depth=1)
    save_model(model, tmp_path / "train" / "model")
    save_model(raw, tmp_path / "train" / "model-raw")
    save_model(model, tmp_path / "run" / "prune" / "student")
    save_model(student, tmp_path / "run" / "recover" / "student")
    assert open_model(tmp_path / "train").hash() == model.hash()
    assert open_model(tmp_path / "train", weights="raw").hash() == raw.hash()
    assert open_model(tmp_path / "run").hash() == open_model(tmp_path / "run", weights="raw").hash() == student.hash()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no model.*model\.json"):
        open_model(tmp_path / "empty")


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_shapes_tell_every_size_but_the_heads(
    tiny_model: Callable[..., LoadedModel], tmp_path: Path, learn_sigma: bool
) -> None:
    model = tiny_model(input_size=9, patch_size=3, in_channels=3, depth=3, num_classes=7, learn_sigma=learn_sigma)
    torch.save(official(model), tmp_path / "m.pt")
    assert opened(tmp_path / "m.pt").arch == model.arch


def test_published_widths_know_their_heads_and_latents(tmp_path: Path) -> None:
    sizes = dict(input_size=4, patch_size=2, in_channels=4, hidden_size=384, depth=1, num_heads=6, num_classes=3)
    torch.save(official(new_model("dit", sizes, 0)), tmp_path / "s.pt")
    found = open_model(tmp_path / "s.pt")
    assert found.arch.num_heads == 6
    assert (found.facts.image_size, found.facts.latent_scale, found.facts.vae) == (
        32,
        0.18215,
        "stabilityai/sd-vae-ft-ema",
    )


# ------------------------------------------------------------------------------------------------------------- hash


def test_a_hash_is_computed_once_and_again_after_any_change(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, compute = [0], ModelFamily.hash

    def counted(*given: Any, **named: Any) -> str:
        calls[0] += 1
        return compute(*given, **named)

    def step(**kind: bool) -> None:
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        torch.optim.AdamW(trained, **kind).step()

    monkeypatch.setattr(ModelFamily, "hash", counted)
    module, trained = model.module, [p for p in model.module.parameters() if p.requires_grad]
    double = {name: 2 * value for name, value in module.state_dict().items()}
    changes = {
        "fused": lambda: step(fused=True), "foreach": lambda: step(foreach=True),
        "loaded": lambda: module.load_state_dict(double), "one element": lambda: trained[0].detach().view(-1)[3].add_(1),
        "replaced": lambda: module.load_state_dict({k: 2 * v for k, v in double.items()}, assign=True),
    }  # fmt: skip
    for number, (name, change) in enumerate(changes.items(), 1):
        before = model.hash()
        assert dataclasses.replace(model, origin={"kind": "same"}).hash() == before and calls == [number], name
        change()
        assert model.hash() != before, name
    assert model.copy().hash() == model.hash()


def test_a_formula_table_is_left_out_of_the_hash_and_another_counts(model: LoadedModel, tmp_path: Path) -> None:
    tensors = official(model)
    without = {name: tensor for name, tensor in tensors.items() if name != "pos_embed"}
    assert torch.equal(tensors["pos_embed"], position_table(16, 2))
    assert model.hash() == model.family.hash(without, model.arch)
    tensors["pos_embed"][0, 1, 2] += 1e-3
    torch.save(tensors, tmp_path / "m.pt")
    other = opened(tmp_path / "m.pt")
    assert other.hash() != model.hash() and torch.equal(other.module.state_dict()["pos_embed"], tensors["pos_embed"])
    save_model(other, tmp_path / "folder")
    again = open_model(tmp_path / "folder")
    assert again.hash() == other.hash() and same_tensors(again, other)


def test_every_tensor_counts_in_the_hash(model: LoadedModel) -> None:
    hashes = {model.hash()}
    names = [name for name in official(model) if name != "pos_embed"]
    for name in names:
        tensors = official(model)
        tensors[name].view(-1)[-1] += 1e-3
        hashes.add(model.family.hash(tensors, model.arch))
    assert len(hashes) == len(names) + 1


def test_the_hash_knows_names_dtypes_and_shapes(model: LoadedModel) -> None:
    name, tensors = "blocks.0.attn.proj.weight", official(model)
    changed = [
        {**tensors, name: tensors[name].t().contiguous()},
        {**tensors, name: tensors[name].reshape(-1)},
        {**tensors, name: tensors[name].half()},
        {("renamed" if key == name else key): tensor for key, tensor in tensors.items()},
    ]
    assert len({model.hash(), *(model.family.hash(c, model.arch) for c in changed)}) == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_hash_is_that_of_the_tensors_as_held(model: LoadedModel, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in official(model).items()}
    tensors["pos_embed"] = position_table(16, 2)
    torch.save(tensors, tmp_path / "m.pt")
    found = opened(tmp_path / "m.pt")
    assert all(tensor.dtype == torch.float32 for tensor in found.module.state_dict().values())
    cast = {name: tensor.float() for name, tensor in tensors.items()}
    assert found.hash() == model.family.hash(cast, model.arch)
    assert (found.hash() == model.hash()) == (dtype == torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_of_another_type_is_saved_and_opened(model: LoadedModel, tmp_path: Path, dtype: torch.dtype) -> None:
    other = dataclasses.replace(model, module=model.copy().module.to(dtype))
    save_model(other, tmp_path / "m")
    found = open_model(tmp_path / "m")
    assert found.hash() == other.hash() and (found.hash() == model.hash()) == (dtype == torch.float64)
    wanted = other.module.state_dict()
    assert all(torch.equal(value, wanted[name].float()) for name, value in found.module.state_dict().items())


def test_a_changed_weight_changes_the_hash_at_once(model: LoadedModel, tmp_path: Path) -> None:
    save_model(model, tmp_path / "m")
    found = open_model(tmp_path / "m")
    next(found.module.parameters()).data[0] += 1
    assert found.hash() != model.hash() == open_model(tmp_path / "m").hash()


def test_opened_tensors_share_no_memory(model: LoadedModel, tmp_path: Path) -> None:
    tensors = official(model)
    name, twin = "blocks.0.mlp.fc1.bias", "blocks.1.mlp.fc1.bias"
    tensors[twin] = tensors[name]
    tensors["blocks.0.attn.qkv.bias"] = torch.zeros(1).expand(48)
    tensors["blocks.0.attn.proj.weight"] = tensors["blocks.0.attn.proj.weight"].t()
    torch.save(tensors, tmp_path / "m.pt")
    held = dict(opened(tmp_path / "m.pt").module.named_parameters())
    assert len({tensor.data_ptr() for tensor in held.values()}) == len(held)
    assert all(tensor.is_contiguous() for tensor in held.values())
    assert all(torch.equal(held[key], tensors[key]) for key in held)


# ------------------------------------------------------------------------------------------------------- strictness


NO_FLOATS = {
    "integers": torch.zeros(16, dtype=torch.int64),
    "truth": torch.zeros(16, dtype=torch.bool),
    "complex": torch.zeros(16, dtype=torch.complex64),
    "sparse": torch.zeros(16).to_sparse(),
}


def faulty(model: LoadedModel, fault: str) -> dict[str, Any]:
    tensors: dict[str, Any] = official(model)
    if fault == "missing":
        del tensors["blocks.1.mlp.fc1.bias"]
    elif fault == "unexpected":
        tensors["blocks.0.attn.q_norm.weight"] = torch.ones(8)
    elif fault == "misshapen":
        tensors["blocks.0.attn.proj.weight"] = torch.zeros(16, 15)
    elif fault == "gap":
        tensors = {name.replace("blocks.1.", "blocks.3."): tensor for name, tensor in tensors.items()}
    elif fault == "no blocks":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("blocks.")}
    elif fault == "nan":
        tensors["final_layer.linear.bias"][3] = float("nan")
    elif fault == "infinity":
        tensors["blocks.1.attn.qkv.weight"][0, 0] = float("inf")
    elif fault == "too large for float32":
        tensors["final_layer.linear.bias"] = torch.full((16,), 1e300, dtype=torch.float64)
    elif fault in NO_FLOATS:
        tensors["final_layer.linear.bias"] = NO_FLOATS[fault]
    elif fault == "no family":
        tensors = {"encoder.weight": torch.zeros(3, 3)}
    elif fault == "flat table":
        tensors["pos_embed"] = torch.zeros(4)
    elif fault == "scalar labels":
        tensors["y_embedder.embedding_table.weight"] = torch.zeros(())
    elif fault == "no square grid":
        tensors["pos_embed"] = torch.zeros(1, 5, 16)
    elif fault == "no tensor":
        tensors["blocks.0.mlp.fc1.bias"] = "text"
    elif fault == "no classes":
        tensors["y_embedder.embedding_table.weight"] = torch.zeros(0, 16)
    return tensors


FAULTS = {
    "missing": r"missing blocks\.1\.mlp\.fc1\.bias",
    "unexpected": r"unexpected blocks\.0\.attn\.q_norm\.weight",
    "misshapen": r"blocks\.0\.attn\.proj\.weight is \(16, 15\), wanted \(16, 16\)",
    "gap": r"gaps: \[1, 2\] missing of 0 to 3",
    "no blocks": "depth must be at least 1",
    "nan": r"final_layer\.linear\.bias is not finite",
    "infinity": r"blocks\.1\.attn\.qkv\.weight is not finite",
    "too large for float32": r"final_layer\.linear\.bias is not finite",
    "integers": r"final_layer\.linear\.bias is int64, wanted floats",
    "truth": "is bool, wanted floats",
    "complex": "is complex64, wanted floats",
    "sparse": r"is float32 \(sparse_coo\), wanted floats",
    "no family": r"no known family: wanted one of the tensors x_embedder\.proj\.weight \(family dit\)",
    "flat table": "not a DiT's",
    "scalar labels": "not a DiT's",
    "no square grid": "no square grid",
    "no tensor": "no state dict of tensors",
    "no classes": r"embedding_table\.weight is \(0, 16\), wanted \(2, 16\)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_official_files_are_refused_by_name(model: LoadedModel, tmp_path: Path, fault: str) -> None:
    torch.save(faulty(model, fault), tmp_path / "m.pt")
    with pytest.raises(UserError, match=FAULTS[fault]):
        opened(tmp_path / "m.pt")


def test_only_the_first_faults_are_named(model: LoadedModel, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in official(model).items() if not name.endswith("bias")}
    torch.save(tensors, tmp_path / "m.pt")
    with pytest.raises(UserError, match=r"missing .*; missing .*; missing .* \(and \d+ more\)"):
        opened(tmp_path / "m.pt")


@pytest.mark.parametrize(
    "content", [[1, 2], "text", 3, None, {}, {"model": {}}, {"ema": {"a": 1}}, {"epoch": 3}, torch.zeros(3)]
)
def test_other_contents_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(UserError, match="m.pt"):
        opened(tmp_path / "m.pt")


def test_unknown_heads_name_the_option(model: LoadedModel, tmp_path: Path) -> None:
    torch.save(official(model), tmp_path / "m.pt")
    with pytest.raises(UserError, match="width 16.*--num-heads"):
        open_model(tmp_path / "m.pt")
    with pytest.raises(UserError, match="num_heads 3"):
        open_model(tmp_path / "m.pt", num_heads=3)
    save_model(model, tmp_path / "folder")
    with pytest.raises(UserError, match="has 2 heads; --num-heads 4 contradicts"):
        open_model(tmp_path / "folder", num_heads=4)


def test_unknown_models_and_families(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model at nowhere"):
        open_model("nowhere")
    with pytest.raises(UserError, match="family"):
        new_model("unet", {}, 0)


# ------------------------------------------------------------------------------------------------------- our folder


def change_record(folder: Path, **changes: Any) -> None:
    record = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**record, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2.*upgrade"),
        ({"format_version": "1"}, "format_version"),
        ({"format_version": None}, "format_version"),
        ({"family": "unet"}, "family 'unet'"),
        ({"family": ["dit"]}, "family"),
        ({"arch": None}, "damaged"),
        ({"arch": {}}, "damaged"),
        ({"arch": "big"}, "damaged"),
        ({"plan": {"version": 1}}, "plan is incomplete"),
        ({"plan": {"version": 99}}, "version 99"),
        ({"hash": "0" * 64}, "do not give the hash"),
        ({"hash": None}, "do not give the hash"),
        ({"arch": 5}, "damaged: arch"),
        ({"kept": [1, 2]}, r"damaged: kept wants names with values; got \[1, 2\]"),
        ({"kept": {"blocks": [0.5]}}, r"damaged: kept\.blocks wants a whole number; got 0\.5"),
        ({"lineage": 5}, "damaged: lineage wants a list; got 5"),
        ({"lineage": [5]}, "damaged: lineage wants names"),
        ({"image_size": "8"}, "damaged: image_size wants a whole number; got '8'"),
        ({"latent_scale": "0.2"}, "damaged: latent_scale wants a number"),
        ({"seen_images": 1.5}, "damaged: seen_images"),
        ({"plan": 5}, "damaged: plan"),
        (
            {"plan": {"kept": {"blocks": ["a"]}, "depth": {"blocks": 2}, "criterion": "x"}},
            r"damaged: plan\.kept\.blocks",
        ),
        ({"plan": {"kept": {}, "depth": {}, "criterion": "x", "version": "1"}}, r"damaged: plan\.version"),
        ({"plan": {"kept": {}, "depth": {}, "criterion": "x", "groups": [1]}}, r"damaged: plan\.groups"),
    ],
)
def test_damaged_records_are_refused(model: LoadedModel, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_model(model, tmp_path / "m")
    change_record(tmp_path / "m", **changes)
    with pytest.raises(UserError, match=message):
        open_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("size", "value"),
    [
        ("depth", 3),
        ("depth", 0),
        ("hidden_size", 20),
        ("num_classes", "five"),
        ("num_heads", 3),
        ("depth", 2.0),
        ("depth", True),
        ("learn_sigma", "no"),
    ],
)
def test_records_that_contradict_their_tensors_are_refused(
    model: LoadedModel, tmp_path: Path, size: str, value: Any
) -> None:
    save_model(model, tmp_path / "m")
    change_record(tmp_path / "m", arch={**dataclasses.asdict(model.arch), size: value})
    with pytest.raises(UserError):
        open_model(tmp_path / "m")


def test_newer_fields_are_ignored(model: LoadedModel, tmp_path: Path) -> None:
    save_model(model, tmp_path / "m")
    change_record(tmp_path / "m", colour="blue", arch={**dataclasses.asdict(model.arch), "rope": False})
    assert open_model(tmp_path / "m").hash() == model.hash()


def test_a_folder_without_one_of_its_files_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    for name in ("model.json", "model.safetensors"):
        save_model(model, tmp_path / name)
        (tmp_path / name / name).unlink()
        with pytest.raises(UserError, match=name):
            open_model(tmp_path / name)


def test_saving_replaces_its_own_files_and_leaves_nothing_beside(
    model: LoadedModel, tiny_model: Callable[..., LoadedModel], tmp_path: Path
) -> None:
    save_model(tiny_model(5), tmp_path / "m")
    (tmp_path / "m" / "stray").write_text("x")
    save_model(model, tmp_path / "m")
    assert open_model(tmp_path / "m").hash() == model.hash()
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m" / "stray").read_text() == "x"  # somebody else's
