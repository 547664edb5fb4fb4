# ruff: noqa: E501
"""A LoRA of the uncut model acts on its student as on the uncut model without those blocks, whatever form it came in."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tinyfusion import cli
from tinyfusion.blocks.stack import BlockStack
from tinyfusion.core.errors import UserError
from tinyfusion.export.lora import Remapped, remap_lora, update_norms
from tinyfusion.families.diffusers_classes.cutting import Cut
from tinyfusion.families.diffusers_classes.rows import shipped_rows

FLUX = {"transformer_blocks": 3, "single_transformer_blocks": 4}
KEPT = {"transformer_blocks": [0, 2], "single_transformer_blocks": [1, 2]}


def cut_of(name: str, depths: Mapping[str, int], kept: Mapping[str, Sequence[int]]) -> Cut:
    row = shipped_rows()[name]
    config = {each.count: depths[each.path] for each in row.lists if each.path in depths}
    return Cut(row, config, depths, kept)


def remapped(
    keys: Sequence[str] | Mapping[str, Tensor], name: str = "FluxTransformer2DModel", metadata: Any = None
) -> Remapped:
    depths, kept = (
        (FLUX, KEPT) if name.startswith("Flux") else ({"transformer_blocks": 4}, {"transformer_blocks": [1, 3]})
    )
    tensors = keys if isinstance(keys, Mapping) else {key: torch.full((2, 2), float(i)) for i, key in enumerate(keys)}
    return remap_lora(tensors, metadata or {}, [cut_of(name, depths, kept)], "a.safetensors")


@pytest.mark.parametrize(
    ("stays", "becomes", "goes"),
    [
        ("transformer.transformer_blocks.2.attn.to_q.lora_A.weight", "transformer.transformer_blocks.1.attn.to_q.lora_A.weight",
         "transformer.transformer_blocks.1.attn.to_q.lora_A.weight"),
        ("transformer.single_transformer_blocks.1.proj_mlp.lora_B.default.weight",
         "transformer.single_transformer_blocks.0.proj_mlp.lora_B.default.weight",
         "transformer.single_transformer_blocks.3.proj_mlp.lora_B.default.weight"),
        ("single_transformer_blocks.2.attn.to_k.lora_A.weight", "single_transformer_blocks.1.attn.to_k.lora_A.weight",
         "single_transformer_blocks.0.attn.to_k.lora_A.weight"),
        ("lora_unet_double_blocks_2_img_attn_qkv.lora_down.weight", "lora_unet_double_blocks_1_img_attn_qkv.lora_down.weight",
         "lora_unet_double_blocks_1_img_attn_qkv.alpha"),
        ("lora_unet_single_blocks_2_linear1.lora_up.weight", "lora_unet_single_blocks_1_linear1.lora_up.weight",
         "lora_unet_single_blocks_0_linear1.alpha"),
        ("lora_unet_transformer_blocks_2_attn_to_q.alpha", "lora_unet_transformer_blocks_1_attn_to_q.alpha",
         "lora_unet_transformer_blocks_1_attn_to_q.alpha"),
        ("diffusion_model.double_blocks.2.img_attn.qkv.lora_A.weight", "diffusion_model.double_blocks.1.img_attn.qkv.lora_A.weight",
         "diffusion_model.double_blocks.1.img_attn.norm.query_norm.scale"),
        ("base_model.model.single_blocks.2.linear2.lora_B.weight", "base_model.model.single_blocks.1.linear2.lora_B.weight",
         "base_model.model.single_blocks.0.linear2.lora_B.weight"),
        ("double_blocks.2.processor.qkv_lora1.down.weight", "double_blocks.1.processor.qkv_lora1.down.weight",
         "double_blocks.1.processor.qkv_lora1.down.weight"),
        ("lycoris_single_transformer_blocks_2_attn_to_q.lokr_w1", "lycoris_single_transformer_blocks_1_attn_to_q.lokr_w1",
         "lycoris_single_transformer_blocks_0_attn_to_q.dora_scale"),
    ],
)  # fmt: skip
def test_each_form_follows_its_block(stays: str, becomes: str, goes: str) -> None:
    outside = "transformer.x_embedder.lora_A.weight"
    text = "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"
    new = remapped([stays, goes, outside, text])
    assert set(new.tensors) == {becomes, outside, text}
    assert new.tensors[becomes][0, 0] == 0 and new.tensors[outside][0, 0] == 2
    assert (new.renumbered, new.unchanged, new.dropped) == (1, 2, 1)


def test_every_block_is_renumbered_by_its_own_list() -> None:
    keys = {f"transformer.{path}.{i}.attn.to_q.lora_A.weight": torch.full((1, 1), 100.0 * n + i) for n, (path, depth) in
            enumerate(FLUX.items()) for i in range(depth)}  # fmt: skip
    new = remapped(keys).tensors
    assert {name: float(value) for name, value in new.items()} == {
        f"transformer.{path}.{i}.attn.to_q.lora_A.weight": 100.0 * n + old
        for n, path in enumerate(FLUX)
        for i, old in enumerate(KEPT[path])
    }


def test_two_cuts_are_followed_one_after_the_other() -> None:
    first = cut_of("FluxTransformer2DModel", FLUX, KEPT)
    second = cut_of("FluxTransformer2DModel", {path: len(kept) for path, kept in KEPT.items()},
                    {"transformer_blocks": [1], "single_transformer_blocks": [0, 1]})  # fmt: skip
    keys = {f"transformer_blocks.{i}.ff.lora_A.weight": torch.full((1, 1), float(i)) for i in range(3)}
    new = remap_lora(keys, {}, [first, second], "a")
    assert {name: float(value) for name, value in new.tensors.items()} == {"transformer_blocks.0.ff.lora_A.weight": 2.0}
    assert new.dropped == 2


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("transformer.transformer_blocks.3.attn.to_q.lora_A.weight", "block 3 of transformer_blocks, and the model before pruning has 3"),
        ("lora_unet_single_blocks_37_linear1.alpha", "block 37 of single_transformer_blocks"),
        ("other.double_blocks.1.attn.lora_A.weight", "in a form that is not known"),
        ("transformer.transformer_blocks.1.attn.to_q.lora_A.weight", "changes only blocks that the student no longer has"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(key: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        remapped([key])


def test_metadata_follows_too() -> None:
    config = {
        "transformer.r": 4,
        "transformer.rank_pattern": {
            "transformer_blocks.2.attn.to_q": 8,
            "transformer_blocks.1.attn.to_q": 16,
            "proj_out": 2,
        },
        "transformer.target_modules": [
            "to_q",
            "single_transformer_blocks.1.proj_mlp",
            "single_transformer_blocks.0.proj_mlp",
        ],
    }
    given = {"lora_adapter_metadata": json.dumps(config), "ss_network_dim": "4", "sshs_model_hash": "a", "format": "pt"}
    new = remapped(["transformer_blocks.2.attn.to_q.lora_A.weight"], metadata=given).metadata
    assert json.loads(new.pop("lora_adapter_metadata")) == {
        "transformer.r": 4,
        "transformer.rank_pattern": {"transformer_blocks.1.attn.to_q": 8, "proj_out": 2},
        "transformer.target_modules": ["to_q", "single_transformer_blocks.0.proj_mlp"],
    }
    assert new == {"ss_network_dim": "4", "format": "pt"}


def test_a_joint_block_that_becomes_the_last_one_has_other_modules() -> None:
    """Mochi's last block names its modulation otherwise, and has no text output: keys and configuration follow."""
    names = [f"transformer_blocks.3.{name}" for name in ("attn1.to_q", "norm1_context.linear", "ff_context.net.2")]
    keys = {f"{name}.lora_{half}.weight": torch.arange(8.0)[:, None] for name in names for half in "AB"}
    keys["lora_unet_transformer_blocks_3_norm1_context_linear.lora_down.weight"] = torch.ones(1, 8)
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.target_modules": names})}
    cut = cut_of("MochiTransformer3DModel", {"transformer_blocks": 5}, {"transformer_blocks": [0, 3]})
    new = remap_lora(keys, metadata, [cut], "a")
    left = ["transformer_blocks.1.attn1.to_q", "transformer_blocks.1.norm1_context.linear_1"]
    assert json.loads(new.metadata["lora_adapter_metadata"])["transformer.target_modules"] == left
    assert set(new.tensors) == {f"{name}.lora_{half}.weight" for name in left for half in "AB"} | {
        "lora_unet_transformer_blocks_1_norm1_context_linear_1.lora_down.weight"
    }
    assert new.tensors[f"{left[1]}.lora_B.weight"].tolist() == [[0], [1]], "the first of four chunks"
    assert len(new.tensors[f"{left[1]}.lora_A.weight"]) == 8
    assert new.dropped == 2


def test_norms_of_updates_are_those_of_the_products() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 7, generator=draw), torch.randn(5, 3, generator=draw)
    w1, w2 = torch.randn(2, 3, generator=draw), torch.randn(4, 5, generator=draw)
    norms = update_norms({
        "p.lora_A.weight": a, "p.lora_B.weight": b, "k.lora_down.weight": a, "k.lora_up.weight": b, "k.alpha": torch.tensor(6.0),
        "l.lokr_w1": w1, "l.lokr_w2": w2, "d.diff": w1, "x.processor.qkv_lora1.down.weight": a, "x.processor.qkv_lora1.up.weight": b,
        "h.hada_w1_a": b, "h.hada_w1_b": a, "h.hada_w2_a": b, "h.hada_w2_b": a,
    })  # fmt: skip
    product = float((b @ a).norm())
    wanted = {
        "p": product, "k": 2 * product, "l": float(torch.kron(w1, w2).norm()), "d": float(w1.norm()), "x.processor": product,
        "h": float(((b @ a) ** 2).norm()),
    }  # fmt: skip
    assert norms == pytest.approx(wanted, rel=1e-5)


def test_the_dropped_share_is_that_of_the_norms() -> None:
    one, two = torch.eye(2), 3 * torch.eye(2)
    keys = {
        "transformer_blocks.0.ff.lora_A.weight": one, "transformer_blocks.0.ff.lora_B.weight": one,
        "transformer_blocks.1.ff.lora_A.weight": one, "transformer_blocks.1.ff.lora_B.weight": two,
    }  # fmt: skip
    assert remapped(keys).dropped_share == pytest.approx(0.75)


# ------------------------------------------------------------------------------------------------- on models of diffusers


def flux() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=3, num_single_layers=4, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return perturbed(model)


def sd3() -> nn.Module:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=24, out_channels=4, pos_embed_max_size=4,
    )  # fmt: skip
    return perturbed(model)


def perturbed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return model.eval()


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


FLUX_INPUTS = {
    "hidden_states": drawn(2, 2, 3, 4), "encoder_hidden_states": drawn(3, 2, 1, 32), "pooled_projections": drawn(4, 2, 32),
    "timestep": torch.tensor([0.2, 0.7]), "guidance": torch.full((2,), 3.5), "img_ids": drawn(1, 3, 3).abs(),
    "txt_ids": torch.zeros(1, 3),
}  # fmt: skip
SD3_INPUTS = {
    "hidden_states": drawn(2, 2, 4, 4, 4), "encoder_hidden_states": drawn(3, 2, 5, 32), "pooled_projections": drawn(4, 2, 24),
    "timestep": torch.tensor([100.0, 700.0]),
}  # fmt: skip


def student_of(model: nn.Module, cut: Cut) -> nn.Module:
    """A new model of the cut's configuration with the cut's tensors."""
    old = dict(model.state_dict())
    tensors = {}
    for new, (name, chunks) in cut.source(list(old)).items():
        value = old[name]
        tensors[new] = torch.cat([value.chunk(number)[i] for i, number in chunks]) if chunks else value
    config = {**dict(model.config), **cut.config_changes()}  # type: ignore[arg-type]
    student = type(model).from_config(config)  # type: ignore[attr-defined]
    student.load_state_dict(tensors)
    return student.eval()  # type: ignore[no-any-return]


def lora_of(model: nn.Module, targets: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a LoRA made by peft on a copy of the model, none of them zero, in the form that diffusers saves."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    other = copy.deepcopy(model)
    other.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=list(targets)))  # type: ignore[operator]
    state = get_peft_model_state_dict(other)
    return {f"transformer.{name}": drawn(i, *value.shape) * 0.2 for i, (name, value) in enumerate(state.items())}


TARGETS = ["to_q", "to_out.0", "to_add_out", "add_k_proj", "norm1_context.linear", "ff_context.net.2"]
METADATA = {
    "lora_adapter_metadata": json.dumps(
        {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.target_modules": TARGETS}
    )
}


def loaded(model: nn.Module, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> nn.Module:
    """A copy of the model with a LoRA loaded by diffusers, which must warn of nothing."""
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = json.loads(metadata["lora_adapter_metadata"])
        other.load_lora_adapter(dict(tensors), prefix="transformer", metadata=config)  # type: ignore[operator]
    return other


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_lora_acts_on_the_student_as_on_the_uncut_model_without_its_blocks(name: str) -> None:
    if name == "flux":
        model, inputs, row = flux(), FLUX_INPUTS, "FluxTransformer2DModel"
        cut = cut_of(row, FLUX, KEPT)
    else:
        model, inputs, row = sd3(), SD3_INPUTS, "SD3Transformer2DModel"
        cut = cut_of(row, {"transformer_blocks": 4}, {"transformer_blocks": [0, 2]})  # block 2 becomes the last one
    tensors = lora_of(model, TARGETS)
    assert any("norm1_context" in key for key in tensors)
    uncut = loaded(model, tensors, METADATA)
    lists = {each.path: each.declared for each in cut.lists}
    stack = BlockStack(uncut, tuple(lists), lists)
    gates = torch.tensor([[float(i in cut.kept[path]) for path in lists for i in range(cut.depths[path])]] * 2)
    with torch.no_grad(), stack.gated(gates, "dense"):
        wanted = uncut(**inputs, return_dict=False)[0]
    new = remap_lora(tensors, METADATA, [cut], "a")
    student = loaded(student_of(model, cut), new.tensors, new.metadata)
    with torch.no_grad():
        got = student(**inputs, return_dict=False)[0]
        without = student_of(model, cut)(**inputs, return_dict=False)[0]
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, without, rtol=1e-2, atol=1e-2)
    if name == "sd3":
        assert not any("transformer_blocks.1.ff_context" in key for key in new.tensors)
        assert new.tensors["transformer.transformer_blocks.1.norm1_context.linear.lora_B.weight"].shape[0] == 64


# --------------------------------------------------------------------------------------------------------------- the verb


@pytest.fixture(scope="module")
def cut_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX on disk, cut twice: blocks 0 and 2 of 3, and 1 to 3 of 4; then the first single block of those."""
    place = tmp_path_factory.mktemp("flux")
    flux().save_pretrained(place / "transformer")  # type: ignore[operator]
    first = [
        "prune",
        "--teacher",
        place / "transformer",
        "--criterion",
        "indices",
        "--keep",
        "0,2,4,5,6",
        "--out",
        place / "once",
    ]
    second = [
        "prune",
        "--teacher",
        place / "once",
        "--criterion",
        "indices",
        "--keep",
        "0,1,3,4",
        "--out",
        place / "twice",
    ]
    for arguments in (first, second):
        assert cli.main([*map(str, arguments)]) == 0
    return place


def answered(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    """The JSON of `lora`, or the one line of its error."""
    code = cli.main(["lora", *map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return json.loads(out.strip().splitlines()[-1]) if code == 0 else err.strip()


def test_the_pipeline_of_diffusers_loads_the_new_file(cut_flux: Path, tmp_path: Path, capsys: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    model = flux()
    tensors = lora_of(model, TARGETS)
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "style.safetensors", METADATA)
    out, student = tmp_path / "new.safetensors", cut_flux / "twice" / "student"
    facts = answered(capsys, tmp_path / "style.safetensors", "--model", student, "--out", out)
    assert facts["dropped"] and 0 < facts["dropped_share"] < 1 and facts["renumbered"]
    again = answered(capsys, tmp_path / "style.safetensors", "--model", student, "--out", out)
    assert again == facts
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = FluxPipeline(
            FlowMatchEulerDiscreteScheduler(),
            None,
            None,
            None,
            None,
            None,
            FluxTransformer2DModel.from_pretrained(student),
        )
        pipeline.load_lora_weights(str(out))
    kept = {"transformer_blocks": [0, 2], "single_transformer_blocks": [2, 3]}
    uncut = loaded(model, tensors, METADATA)
    row = shipped_rows()["FluxTransformer2DModel"]
    lists = {each.path: each.declared for each in row.lists}
    gates = torch.tensor([[float(i in kept[path]) for path in lists for i in range(FLUX[path])]] * 2)
    with torch.no_grad(), BlockStack(uncut, tuple(lists), lists).gated(gates, "dense"):
        wanted = uncut(**FLUX_INPUTS, return_dict=False)[0]
    with torch.no_grad():
        got = pipeline.transformer(**FLUX_INPUTS, return_dict=False)[0]
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_a_file_of_the_trainers_form_becomes_one_of_pefts(cut_flux: Path, tmp_path: Path, capsys: Any) -> None:
    """Names alone: published widths are fixed in the converter of fused projections, and these are apart."""
    names = [
        "transformer_blocks.2.attn.to_q",
        "transformer_blocks.1.attn.to_q",
        "single_transformer_blocks.3.attn.to_v",
    ]
    tensors = {f"{name}.{kind}.weight": drawn(i, *shape) for i, name in enumerate(names) for kind, shape in
               (("lora_A", (2, 32)), ("lora_B", (32, 2)))}  # fmt: skip
    save_file(tensors, tmp_path / "bare.safetensors")
    facts = answered(capsys, tmp_path / "bare.safetensors", "--model", cut_flux / "once" / "student", "--out", tmp_path / "a.safetensors",
                     "--form", "peft")  # fmt: skip
    assert (facts["renumbered"], facts["dropped"]) == (4, 2)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert json.loads(file.metadata()["tinyfusion"])["verb"] == "lora"
        names = list(file.keys())
        assert "transformer_blocks.1.attn.to_q.lora_A.weight" in {name.removeprefix("transformer.") for name in names}


def test_a_lora_of_the_parent_is_followed_through_the_last_cut_alone(
    cut_flux: Path, tmp_path: Path, capsys: Any
) -> None:
    save_file(
        {"transformer.single_transformer_blocks.2.ff.lora_A.weight": torch.ones(1, 1)}, tmp_path / "p.safetensors"
    )
    arguments = [
        tmp_path / "p.safetensors",
        "--model",
        cut_flux / "twice" / "student",
        "--out",
        tmp_path / "o.safetensors",
    ]
    assert answered(capsys, *arguments, "--trained-on", "parent")["renumbered"] == 1
    with safe_open(tmp_path / "o.safetensors", "pt") as file:
        assert list(file.keys()) == ["transformer.single_transformer_blocks.1.ff.lora_A.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "transformer"}, "has no record of removed blocks"),
        ({"--model": "nowhere"}, "error: "),
        ({"--out": "a.bin"}, "is a .safetensors file"),
        ({"FILE": "none.safetensors"}, "none.safetensors"),
        ({"FILE": "text.safetensors"}, "no readable safetensors file"),
        ({"FILE": "deep.safetensors"}, "was trained for another model"),
        ({"FILE": "header.safetensors"}, "is no JSON"),
        ({"--out": "theirs.safetensors"}, "was not made by tinyfusion"),
        ({"--form": "twisted"}, "--form"),
    ],
)
def test_bad_files_end_in_one_line(
    cut_flux: Path, tmp_path: Path, capsys: Any, change: dict[str, str], message: str
) -> None:
    good = {"transformer.transformer_blocks.0.ff.lora_A.weight": torch.ones(1, 1)}
    save_file(good, tmp_path / "good.safetensors")
    save_file({"transformer.transformer_blocks.18.ff.lora_A.weight": torch.ones(1, 1)}, tmp_path / "deep.safetensors")
    save_file(good, tmp_path / "header.safetensors", {"lora_adapter_metadata": "{"})
    save_file(good, tmp_path / "theirs.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    asked = {
        "FILE": "good.safetensors",
        "--model": str(cut_flux / "once" / "student"),
        "--out": "new.safetensors",
    } | change
    if "--model" in change:
        asked["--model"] = str(cut_flux / change["--model"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    arguments = [tmp_path / asked.pop("FILE")]
    for name, value in asked.items():
        arguments += [name, tmp_path / value if name == "--out" else value]
    line = answered(capsys, *arguments)
    assert line.startswith("error: ") and "\n" not in line
    assert message in line
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
