"""IP-adapters and ControlNets of an uncut model act on its student as on the uncut model without those blocks."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SINGLE, TRUNK, Tiny
from tiny_images import IMAGES
from torch import Tensor, nn

from tinyfusion import cli
from tinyfusion.blocks.stack import BlockStack
from tinyfusion.export.controlnet import residuals_of
from tinyfusion.families.diffusers_classes.folder import open_transformer
from tinyfusion.families.diffusers_classes.rows import shipped_rows

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself


def tiny(name: str, **sizes: Any) -> Tiny:
    found = next(each for each in IMAGES if each.name == f"{name}Transformer2DModel")
    return Tiny(found.name, {**found.config, **sizes}, found.inputs, found.removed)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed)) * 0.2


def answered(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Any:
    """The JSON of a command, or the one line of its error."""
    code = cli.main([*map(str, arguments), "--json"])
    out, err = capsys.readouterr()
    return json.loads(out.strip().splitlines()[-1]) if code == 0 else err.strip()


def cut(capsys: Any, model: nn.Module, folder: Path, kept: Sequence[int]) -> nn.Module:
    """The student of a model, through its folder: `folder`/run."""
    model.save_pretrained(folder / "parent")  # type: ignore[operator]
    keep = ",".join(map(str, kept))
    made = answered(capsys, "prune", "--teacher", folder / "parent", "--keep", keep, "--out", folder / "run")
    assert isinstance(made, dict), made
    return type(model).from_pretrained(folder / "run" / "student").eval()  # type: ignore[attr-defined, no-any-return]


def drawn(model: nn.Module, inputs: dict[str, Any], gates: Sequence[int] | None = None) -> Tensor:
    """The output of a model, with gates on its blocks where they are given."""
    row = shipped_rows()[type(model).__name__]
    lists = {each.path: each.declared for each in row.lists}
    with torch.no_grad():
        if gates is None:
            return model(**inputs, return_dict=False)[0]  # type: ignore[no-any-return]
        with BlockStack(model, tuple(lists), lists).gated(torch.tensor([gates]).float()):
            return model(**inputs, return_dict=False)[0]  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------------- IP-adapters


def flux_adapter(blocks: int, width: int = 32) -> dict[str, Tensor]:
    """The tensors of an IP-adapter of FLUX: one token of 4 is made of 8 numbers of an image."""
    proj = {"image_proj.proj.weight": values(4 * width, 8), "image_proj.proj.bias": values(4 * width),
            "image_proj.norm.weight": torch.ones(width), "image_proj.norm.bias": torch.zeros(width)}  # fmt: skip
    entries = {f"ip_adapter.{i}.to_{name}_ip.{kind}": values(*shape, seed=i) for i in range(blocks) for name in "kv"
               for kind, shape in (("weight", (width, width)), ("bias", (width,)))}  # fmt: skip
    return proj | entries


def sd3_adapter(blocks: int, width: int = 32) -> dict[str, Tensor]:
    """The tensors of an IP-adapter of SD3, as its own modules have them."""
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
    from diffusers.models.embeddings import IPAdapterTimeImageProjection

    modules: dict[str, nn.Module] = {"image_proj": IPAdapterTimeImageProjection(
        embed_dim=8, output_dim=width, hidden_dim=64, depth=1, dim_head=64, heads=1, num_queries=2, timestep_in_dim=16)}  # fmt: skip
    for i in range(blocks):
        modules[f"ip_adapter.{i}"] = SD3IPAdapterJointAttnProcessor2_0(width, width, 8, timesteps_emb_dim=64)
    return {f"{outer}.{name}": values(*tensor.shape, seed=i) for i, (outer, module) in enumerate(modules.items())
            for name, tensor in module.state_dict().items()}  # fmt: skip


def nested(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """As torch files of IP-adapters have them."""
    return {
        outer: {name.removeprefix(f"{outer}."): t for name, t in tensors.items() if name.startswith(f"{outer}.")}
        for outer in ("image_proj", "ip_adapter")
    }


def with_adapter(model: Any, tensors: dict[str, Tensor]) -> Any:
    """The model with an IP-adapter as pipelines of diffusers load one."""
    given = nested(tensors)
    model._load_ip_adapter_weights([given] if hasattr(model, "single_transformer_blocks") else given)
    return model


@pytest.mark.parametrize(
    ("name", "kept", "suffix"), [("Flux", [0, 2, 4, 5, 6], "safetensors"), ("SD3", [1, 2, 4], "bin"), ("SD3", [0, 2, 3], "safetensors")]
)  # fmt: skip
def test_an_ip_adapter_follows_its_blocks(capsys: Any, tmp_path: Path, name: str, kept: list[int], suffix: str) -> None:
    family = tiny(name)
    model: Any = family.model()
    student = cut(capsys, model, tmp_path, kept)
    depth = len(model.transformer_blocks)
    tensors = flux_adapter(depth) if name == "Flux" else sd3_adapter(depth)
    file, out = tmp_path / f"adapter.{suffix}", tmp_path / "new.safetensors"
    if suffix == "bin":
        torch.save(nested(tensors), file)
    else:
        save_file(tensors, file)
    facts = answered(capsys, "lora", file, "--model", tmp_path / "run", "--out", out)
    assert 0 < facts["dropped_share"] < 1 and facts["dropped"]
    inputs = family.given()
    if name == "Flux":
        more = {"joint_attention_kwargs": {"ip_adapter_image_embeds": [values(2, 1, 8)]}}
        more_again = {"joint_attention_kwargs": {"ip_adapter_image_embeds": [values(2, 1, 8)]}}
    else:
        hidden, temb = values(2, 2, 32), values(2, 64)
        more = {"joint_attention_kwargs": {"ip_hidden_states": hidden, "temb": temb}}
        more_again = {"joint_attention_kwargs": {"ip_hidden_states": hidden, "temb": temb}}
    without = drawn(student, inputs)
    whole = with_adapter(model, tensors)
    depths = [len(blocks) for blocks in (model.transformer_blocks, getattr(model, SINGLE, ()))]
    wanted = drawn(whole, inputs | more, [int(i in kept) for i in range(sum(depths))])
    got = drawn(with_adapter(student, load_file(out)), inputs | more_again)
    assert not torch.allclose(got, without, atol=1e-3), "the adapter matters"
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_the_entries_of_an_ip_adapter_are_those_of_its_model(capsys: Any, tmp_path: Path) -> None:
    cut(capsys, tiny("Flux").model(), tmp_path, [0, 2, 3, 4])
    save_file(flux_adapter(4), tmp_path / "other.safetensors")
    out = ["--out", tmp_path / "o.safetensors"]
    said = answered(capsys, "lora", tmp_path / "other.safetensors", "--model", tmp_path / "run", *out)
    assert "it has 4 entries of ip_adapter, and the model before pruning 3 blocks" in said
    (tmp_path / "qwen").mkdir()
    cut(capsys, tiny("QwenImage").model(), tmp_path / "qwen", [0, 2])
    said = answered(capsys, "lora", tmp_path / "other.safetensors", "--model", tmp_path / "qwen/run", *out)
    assert "which blocks of this class its entries belong to is not known here" in said
    assert not (tmp_path / "o.safetensors").exists()


# ----------------------------------------------------------------------------------------------------------- ControlNets


def controlnet(name: str, **sizes: Any) -> Any:
    """A random ControlNet for the tiny model of a family."""
    import diffusers

    kind = getattr(diffusers, f"{name}ControlNetModel")
    known = inspect.signature(kind.__init__).parameters
    torch.manual_seed(0)
    net = kind(**{key: value for key, value in {**tiny(name).config, **sizes}.items() if key in known}).eval()
    with torch.no_grad():
        for i, parameter in enumerate(net.parameters()):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return net


def residuals(name: str, net: Any, inputs: dict[str, Any]) -> list[list[Tensor]]:
    """The residuals of a ControlNet, per list of the model."""
    condition = values(*inputs["hidden_states"].shape)
    with torch.no_grad():
        made = net(**inputs, controlnet_cond=condition, return_dict=False)
    return [list(made)] if name == "QwenImage" else [list(each) for each in made if each is not None]


_ARGUMENTS = {
    "Flux": ("controlnet_block_samples", "controlnet_single_block_samples"), "QwenImage": ("controlnet_block_samples",),
    "SD3": ("block_controlnet_hidden_states",), "Sana": ("controlnet_block_samples",),
}  # fmt: skip
_FITS: list[tuple[str, dict[str, int], dict[str, int], list[int], list[int]]] = [
    # depths of the model, of the ControlNet, blocks that stay, and depths of the ControlNet afterwards
    ("Flux", {"num_layers": 6, "num_single_layers": 4}, {"num_layers": 3, "num_single_layers": 2}, [0, 2, 5, 6, 9], [3, 2]),
    ("Flux", {"num_layers": 4, "num_single_layers": 6}, {"num_layers": 2, "num_single_layers": 3}, [0, 1, 2, 3, 4, 5, 6], [2, 2]),
    ("Flux", {"num_layers": 6, "num_single_layers": 2}, {"num_layers": 3, "num_single_layers": 0}, [0, 1, 2, 6], [2, 0]),
    ("QwenImage", {"num_layers": 7}, {"num_layers": 3}, [0, 2, 3, 5, 6], [3]),
    ("SD3", {"num_layers": 6}, {"num_layers": 3}, [1, 3, 5], [3]),
    ("Sana", {"num_layers": 6}, {"num_layers": 3}, [0, 1, 2, 4], [2]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "depths", "samples", "kept", "left"), _FITS)
def test_a_controlnet_that_fits_gives_each_block_its_residual(
    capsys: Any, tmp_path: Path, name: str, depths: dict[str, int], samples: dict[str, int], kept: list[int], left: list[int]
) -> None:  # fmt: skip
    """The uncut model gets its residuals one by one, with zeros behind the blocks that are switched off."""
    family = tiny(name, **depths)
    model: Any = family.model()
    student = cut(capsys, model, tmp_path, kept)
    net = controlnet(name, **samples)
    net.save_pretrained(tmp_path / "net")
    command = ["lora", tmp_path / "net", "--model", tmp_path / "run", "--out", tmp_path / "new"]
    facts = answered(capsys, *command)
    assert isinstance(facts, dict), facts
    config = json.loads((tmp_path / "new/config.json").read_text())
    assert [config[count] for count in samples] == left
    again, info = type(net).from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info.values()), info
    inputs, start = family.given(), 0
    named = _ARGUMENTS[name]
    uncut: dict[str, Any] = {}
    for each, path, argument, made in zip(depths, (TRUNK, SINGLE), named, residuals(name, net, inputs), strict=False):
        depth, spread = depths[each], {"SD3": "ratio", "Sana": "next"}.get(name, "interval")
        which = residuals_of(spread, depth, len(made))
        zero = torch.zeros_like(made[0])
        single = [zero if number is None or start + i not in kept else made[number] for i, number in enumerate(which)]
        uncut[argument] = single[1:] if name == "Sana" else single  # which has none behind the first block
        start += depth
        assert facts["residuals"][path] == [which[i - start + depth] for i in kept if start - depth <= i < start]
    gates = [int(i in kept) for i in range(sum(depths.values()))]
    wanted = drawn(model, inputs | uncut, gates)
    cut_residuals = dict(zip(named, residuals(name, again.eval(), inputs), strict=False))
    got = drawn(student, inputs | cut_residuals)
    assert not torch.allclose(got, drawn(student, inputs), atol=1e-3), "control matters"
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert answered(capsys, *command) == facts, "there already"


@pytest.mark.parametrize(
    ("name", "depths", "samples", "kept", "message"),
    [
        ("Flux", {"num_layers": 6, "num_single_layers": 2}, {"num_layers": 3, "num_single_layers": 1}, [0, 1, 2, 5, 6, 7],
         "1 of the 4 transformer_blocks that stay would get another residual than before (block 5 number 1 instead of number 2); it fits "
         "where equally many of every group stay, fewer only of the last: 0 1; 2 3; 4 5"),
        ("Flux", {"num_layers": 6, "num_single_layers": 2}, {"num_layers": 3, "num_single_layers": 1}, [0, 1, 3, 6, 7], "instead of"),
        ("SD3", {"num_layers": 6}, {"num_layers": 3}, [0, 2, 4], "where the last block and equally many"),
        ("Sana", {"num_layers": 6}, {"num_layers": 3}, [0, 2, 3], "it fits where the first block stays"),
        ("QwenImage", {"num_layers": 6}, {"num_layers": 2}, [3, 4, 5], "instead of number 1"),
    ],
)  # fmt: skip
def test_a_controlnet_that_does_not_fit_says_what_shifts(
    capsys: Any, tmp_path: Path, name: str, depths: dict[str, int], samples: dict[str, int], kept: list[int], message: str
) -> None:  # fmt: skip
    cut(capsys, tiny(name, **depths).model(), tmp_path, kept)
    controlnet(name, **samples).save_pretrained(tmp_path / "net")
    said = answered(capsys, "lora", tmp_path / "net", "--model", tmp_path / "run", "--out", tmp_path / "new")
    assert message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("spread", ["interval", "ratio", "next", "modulo"])
def test_residuals_are_spread_as_in_diffusers(spread: str) -> None:
    """Read back from the models: residual n is the number n + 1, blocks hand on what they get."""
    name, argument = {"ratio": ("SD3", "block_controlnet_hidden_states")}.get(
        spread, ("Flux", "controlnet_block_samples")
    )
    name = "Sana" if spread == "next" else name
    for depth, number in ((7, 3), (5, 5), (6, 2)):
        family = tiny(name, num_layers=depth, **({"num_single_layers": 1} if name == "Flux" else {}))
        model: Any = family.model()
        seen: list[Tensor] = []
        streams = shipped_rows()[family.name].lists[0].streams
        place = streams.index("hidden_states")

        def passed(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            given = {**dict(zip(("hidden_states",), args, strict=False)), **kwargs}  # noqa: B023
            seen.append(given["hidden_states"].mean())  # noqa: B023
            new = [given.get(stream) for stream in streams]  # noqa: B023
            return new[place] if len(streams) == 1 else tuple(new)  # noqa: B023

        for block in model.transformer_blocks:
            block.register_forward_hook(passed, with_kwargs=True)
        end = model.single_transformer_blocks[0] if name == "Flux" else model.norm_out
        end.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).mean()), with_kwargs=True  # noqa: B023
        )  # fmt: skip
        given = {argument: [torch.full((1, 1, 1), float(i + 1)) for i in range(number)]}
        given |= {"controlnet_blocks_repeat": True} if spread == "modulo" else {}
        drawn(model, family.given() | given)
        added = [round(float(after - before)) for before, after in zip(seen, seen[1:], strict=False)]
        assert added == [0 if i is None else i + 1 for i in residuals_of(spread, depth, number)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "SD3ControlNetModel"}, "is a SD3ControlNetModel; ControlNets of this student's model are FluxControlNetModel"),
        ({"quantization_config": {"quant_method": "gguf"}}, "is quantised: give the ControlNet that it was made from"),
        ({"form": "peft"}, "--form peft is for LoRAs"),
        ({"out": "mine"}, "exists and is not an export of tinyfusion"),
        ({"weights": None}, "wants diffusion_pytorch_model.safetensors or .bin"),
        ({"config": None}, "config.json does not exist"),
        ({"tensor": "controlnet_blocks.first.weight"}, "is damaged: entries of controlnet_blocks are not numbered from 0 on"),
    ],
)  # fmt: skip
def test_bad_controlnets_end_in_one_line(capsys: Any, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    cut(capsys, tiny("Flux").model(), tmp_path, [0, 2, 3, 4])
    controlnet("Flux", num_layers=1, num_single_layers=1).save_pretrained(tmp_path / "net")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").touch()
    config = tmp_path / "net/config.json"
    form = ["--form", change["form"]] if "form" in change else []
    if "weights" in change:
        (tmp_path / "net/diffusion_pytorch_model.safetensors").unlink()
    elif "config" in change:
        config.unlink()
    elif "tensor" in change:
        file = tmp_path / "net/diffusion_pytorch_model.safetensors"
        content = {name: tensor.clone() for name, tensor in load_file(file).items()}
        save_file(content | {change["tensor"]: torch.ones(1)}, file)
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    out = tmp_path / change.get("out", "new")
    said = answered(capsys, "lora", tmp_path / "net", "--model", tmp_path / "run", "--out", out, *form)
    assert re.fullmatch("error: .*", said) and message in said
    assert not (tmp_path / "new").exists()


def test_the_table_names_classes_of_diffusers() -> None:
    import diffusers

    for row in shipped_rows().values():
        for each in row.lists:
            assert each.control is None or hasattr(diffusers, each.control.net)


def test_an_uncut_folder_has_no_student(capsys: Any, tmp_path: Path) -> None:
    tiny("Flux").model().save_pretrained(tmp_path / "parent")  # type: ignore[operator]
    assert open_transformer(tmp_path / "parent", shipped_rows()).lineage == []
    controlnet("Flux", num_layers=1, num_single_layers=1).save_pretrained(tmp_path / "net")
    said = answered(capsys, "lora", tmp_path / "net", "--model", tmp_path / "parent", "--out", tmp_path / "new")
    assert "has no record of removed blocks" in said
