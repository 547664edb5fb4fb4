"""PixArt against the class of diffusers: the same outputs, before and after a cut, and its folders."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from families import tiny
from tinyfusion.cli import main
from tinyfusion.commands.export import ExportOptions, export
from tinyfusion.conditioning.condition import concat
from tinyfusion.conditioning.texts import text_table
from tinyfusion.core.errors import UserError
from tinyfusion.families import pixart
from tinyfusion.families.pixart import PixArtArch, with_prompts
from tinyfusion.families.registry import FAMILIES
from tinyfusion.jobs.assemble import RunOptions
from tinyfusion.models.checkpoint import LoadedModel, new_model, open_model, save_model
from tinyfusion.prune.criteria import by_indices
from tinyfusion.sample.drive import sample
from tinyfusion.sample.gaussian import GaussianSampler

BLOCKS, TEXTS, CHANNELS = 3, 4, 12  # of the tiny class of diffusers, and of its prompts: three and the null one
T = torch.tensor([0, 250, 999, 500])


@pytest.fixture(scope="module")
def theirs() -> Any:
    """A PixArt of diffusers with random weights everywhere."""
    from diffusers import PixArtTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=BLOCKS,
            cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=CHANNELS,
        )  # fmt: skip
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def prompts() -> tuple[Tensor, Tensor]:
    """Texts (4, 5, 12) of 5, 3, 1 and 2 tokens, and their mask."""
    mask = (torch.arange(5) < torch.tensor([[5], [3], [1], [2]])).float()
    return torch.randn(TEXTS, 5, CHANNELS, generator=torch.Generator().manual_seed(1)), mask


@pytest.fixture
def folder(theirs: Any, prompts: tuple[Tensor, Tensor], tmp_path: Path) -> Path:
    """A folder of diffusers with prompts beside."""
    theirs.save_pretrained(tmp_path / "theirs")
    save_file({"captions": prompts[0], "caption_mask": prompts[1]}, tmp_path / "theirs" / pixart.PROMPTS)
    return tmp_path / "theirs"


def noised() -> Tensor:
    return torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def said(model: Any, captions: Tensor, mask: Tensor, y: Tensor) -> Tensor:
    """What the class of diffusers says, called as its pipeline calls it."""
    found = model(noised(), encoder_hidden_states=captions[y], encoder_attention_mask=mask[y], timestep=T)
    return found.sample


def texts_of(model: LoadedModel, y: Tensor) -> dict[str, Any]:
    """The arguments of the model for its texts of rows y, the null text last."""
    table = model.conditions
    return dict(model.family.inputs(concat([table, table.index(slice(1)).null()]).index(y)))


@torch.no_grad()
def ours(model: LoadedModel, y: Tensor) -> Tensor:
    return model.module(noised(), T, **texts_of(model, y))


# ------------------------------------------------------------------------------------------------------------- outputs


def test_a_folder_of_diffusers_computes_what_its_class_computes(
    theirs: Any, prompts: tuple[Tensor, Tensor], folder: Path
) -> None:
    model, y = open_model(folder), torch.tensor([0, 1, 2, 3])
    assert model.arch == PixArtArch(8, 2, 4, 16, BLOCKS, 2, 3, 5, CHANNELS)
    assert (model.family.name, model.facts.image_size, model.facts.latent_scale) == ("pixart", 64, 0.18215)
    torch.testing.assert_close(ours(model, y), said(theirs, *prompts, y), rtol=0, atol=1e-5)
    masked = prompts[0].clone()
    masked[1, 3:] += 100.0  # places that the mask covers say nothing
    changed = with_prompts(model, masked, prompts[1])
    torch.testing.assert_close(ours(changed, y), ours(model, y), rtol=0, atol=1e-5)


def test_the_scale_of_positions_is_that_of_the_folder(prompts: tuple[Tensor, Tensor], folder: Path) -> None:
    """The conversion script of diffusers writes 0.5 for models of 256 pixels, and those of 2023 wrote nothing."""
    from diffusers import PixArtTransformer2DModel

    plain, y = open_model(folder), torch.tensor([0, 1, 2, 3])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "interpolation_scale": 0.5}))
    model, wanted = open_model(folder), PixArtTransformer2DModel.from_pretrained(folder).eval()
    assert model.arch.interpolation_scale == 0.5
    torch.testing.assert_close(ours(model, y), said(wanted, *prompts, y), rtol=0, atol=1e-5)
    assert not torch.allclose(ours(model, y), ours(plain, y), atol=1e-4)
    assert model.hash() != plain.hash()  # another model with the same tensors


def test_a_pruned_model_goes_back_to_diffusers(prompts: tuple[Tensor, Tensor], folder: Path, tmp_path: Path) -> None:
    from diffusers import PixArtTransformer2DModel

    teacher, y = open_model(folder), torch.tensor([3, 2, 1, 0])
    student = teacher.cut(by_indices(teacher, [0, 2]))
    save_model(student, tmp_path / "student")
    again = open_model(tmp_path / "student")
    assert again.hash() == student.hash()
    again.module.net.save_pretrained(tmp_path / "back")
    back, told = PixArtTransformer2DModel.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert back.config.num_layers == 2
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(said(back.eval(), *prompts, y), ours(again, y), rtol=0, atol=1e-5)


def test_blocks_are_compiled_and_checkpointed(folder: Path) -> None:
    """diffusers hands a block its texts by keyword; the stream comes first."""
    model, y = open_model(folder), torch.tensor([0, 1, 2, 3])
    plain = ours(model, y)
    with model.stack.compiled("eager"):
        torch.testing.assert_close(ours(model, y), plain)
    with model.stack.tap([1]) as seen, model.stack.checkpointed():
        model.module(noised(), T, **texts_of(model, y)).sum().backward()
    assert seen[1].shape == (4, 16, 16)
    assert all(parameter.grad is not None for parameter in model.module.parameters())


def test_the_published_model_has_as_many_parameters_as_the_class_of_diffusers_gives() -> None:
    """PixArt-alpha XL/2: 0.6 billion in arXiv 2310.00426."""
    from diffusers import PixArtTransformer2DModel

    arch = PixArtArch(32, 2, 4, 1152, 28, 16, num_classes=1)
    with torch.device("meta"):
        module = FAMILIES["pixart"].build(arch)
        wanted = PixArtTransformer2DModel(sample_size=32, caption_channels=4096)
    found = sum(parameter.numel() for parameter in module.parameters())
    assert found == sum(parameter.numel() for parameter in wanted.parameters()) == 610_856_096


# ------------------------------------------------------------------------------------------------------------- prompts


def test_prompts_make_classes(theirs: Any, prompts: tuple[Tensor, Tensor]) -> None:
    model = tiny("pixart")
    texts, mask = torch.randn(3, 6, 8), torch.ones(3, 6, dtype=torch.int64)
    other = with_prompts(model, texts, mask)
    assert (other.arch.num_classes, other.arch.caption_tokens) == (2, 6)
    assert torch.equal(other.conditions["embeddings"], texts[:-1])
    assert other.hash() != model.hash() and other.module is model.module
    gone = mask.clone()
    gone[1] = 0
    for bad in (
        (texts[..., :4], mask),
        (texts, mask[:, :4]),
        (texts[:1], mask[:1]),
        (texts[0], mask[0]),
        (texts, gone),
    ):
        with pytest.raises(
            UserError, match=r"(with embeddings|floats embeddings|a mask of texts is) .*; a mask is \(K \+ 1, tokens\)"
        ):
            with_prompts(model, *bad)


def test_prompts_come_from_a_text_encoder() -> None:
    """Prompts of an encoder with random weights, T5 of transformers, and of tokens as its tokenizer gives them."""
    transformers = pytest.importorskip("transformers", reason="prompts are encoded by transformers")
    config = transformers.T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with torch.random.fork_rng():
        encoder = transformers.T5EncoderModel(config).eval()
    tokens = torch.tensor([[5, 6, 1], [7, 1, 0], [1, 0, 0]])  # 1 ends a text, 0 fills
    mask = (tokens != 0).long()
    with torch.no_grad():
        captions = encoder(tokens, attention_mask=mask).last_hidden_state
    model = with_prompts(tiny("pixart"), captions, mask)
    y = torch.tensor([0, 1, 2])
    found = model.module(torch.randn(3, 2, 4, 4), torch.tensor([1, 2, 3]), **texts_of(model, y))
    assert found.shape == (3, 4, 4, 4)
    assert bool(torch.isfinite(found).all())


# ------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_without_prompts_takes_those_of_data(folder: Path, prompts: tuple[Tensor, Tensor]) -> None:
    """The same outputs, and another hash: texts of its own are part of a model."""
    with_own, y = open_model(folder), torch.tensor([0, 1, 2, 3])
    (folder / pixart.PROMPTS).unlink()
    model = open_model(folder)
    assert (model.arch.num_classes, model.arch.caption_tokens) == (0, 0) and model.hash() != with_own.hash()
    with pytest.raises(UserError, match=r"none of its own: give a file of encoded prompts, --set data.prompts=FILE"):
        model.conditions  # noqa: B018
    given = model.with_prompts(text_table({"embeddings": prompts[0], "mask": prompts[1]}))
    assert given.hash() == model.hash()
    assert torch.equal(ours(given, y), ours(with_own, y))
    with pytest.raises(UserError, match=r"takes texts with embeddings \(K, tokens, 12\); got"):
        model.with_prompts(text_table({"embeddings": prompts[0][..., :4]}))
    with pytest.raises(UserError, match="of family dit takes classes"):
        tiny("dit").with_prompts(given.conditions)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "use_additional_conditions": True}))
    with pytest.raises(UserError, match="has use_additional_conditions True"):  # before anybody encodes texts for it
        open_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_additional_conditions": True}, "has use_additional_conditions True"),
        ({"sample_size": 128, "use_additional_conditions": None}, "has use_additional_conditions True"),
        ({"interpolation_scale": 0}, "interpolation_scale must be above 0; got 0"),
        ({"out_channels": 4}, "has out_channels 4"),
        ({"num_layers": "3"}, "depth"),
        ({"num_layers": None}, "config.json is damaged: no sizes can be read: 'num_layers'"),
        ({"num_attention_heads": 0}, "hidden_size must be at least 1; got 0"),
        ({"num_layers": 2}, "unexpected net.transformer_blocks.2"),
        ({"sample_size": "8"}, "config.json is damaged: no sizes can be read"),
        ({"caption_channels": 16}, "captions is .*, wanted"),
    ],
)
def test_other_models_are_refused(folder: Path, change: dict[str, Any], message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        open_model(folder)


def test_folders_of_2023_and_pipelines_are_opened(folder: Path, tmp_path: Path) -> None:
    """They name an older class, and store the position table and a null text that the class never looks at."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "Transformer2DModel"}))
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    more = {"pos_embed.pos_embed": torch.zeros(1, 16, 16), "caption_projection.y_embedding": torch.zeros(5, CHANNELS)}
    plain = open_model(folder)
    save_file({**tensors, **more}, folder / "diffusion_pytorch_model.safetensors")
    assert open_model(folder).hash() == plain.hash()
    folder.rename(tmp_path / "transformer")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "PixArtAlphaPipeline"}))
    assert open_model(tmp_path).hash() == plain.hash()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"_class_name": "OtherTransformer2DModel"}))
    with pytest.raises(UserError, match="of its models .*PixArtTransformer2DModel can be opened"):
        open_model(tmp_path)


@pytest.mark.parametrize(("to", "file"), [("official", "a.safetensors"), ("diffusers", "a")])
def test_exports_say_why_not(folder: Path, tmp_path: Path, to: str, file: str) -> None:
    with pytest.raises(UserError, match=f"cannot be exported to {to}: .*prompts"):
        export(RunOptions(tmp_path / file), ExportOptions(str(folder), to))


def test_published_state_dicts_are_refused_with_the_way_out(tmp_path: Path) -> None:
    save_file({"t_block.1.weight": torch.zeros(2, 2)}, tmp_path / "published.safetensors")
    with pytest.raises(UserError, match="does not say its sizes: give the folder of diffusers"):
        open_model(tmp_path / "published.safetensors")


def test_sizes_are_checked() -> None:
    sizes = dataclasses.asdict(tiny("pixart").arch)
    for change, message in (
        ({"caption_tokens": 0}, "caption_tokens must be at least 1"),
        ({"input_size": 5}, "input_size 5 is not a multiple of patch_size 2"),
        ({"hidden_size": 18}, "hidden_size 18 is not a multiple of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            PixArtArch(**{**sizes, **change})


def test_a_new_model_starts_as_published() -> None:
    model = new_model("pixart", {**dataclasses.asdict(tiny("pixart").arch), "hidden_size": 64}, 0)
    again = new_model("pixart", {**dataclasses.asdict(tiny("pixart").arch), "hidden_size": 64}, 0)
    assert model.hash() == again.hash()
    state = model.module.state_dict()
    zero = [name for name in state if "attn2.to_out" in name or "proj_out" in name]
    assert zero and not any(bool(state[name].any()) for name in zero)
    assert abs(float(state["net.caption_projection.linear_2.weight"].std()) - 0.02) < 0.001
    assert abs(float(state["net.scale_shift_table"].std()) - 64**-0.5) < 0.03
    assert abs(float(model.conditions["embeddings"].std()) - 1) < 0.2
    assert not bool(
        model.module(torch.randn(2, 2, 4, 4), torch.tensor([3, 9]), **texts_of(model, torch.tensor([0, 5]))).any()
    )


def test_the_command_line_prunes_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tiny("pixart"), tmp_path / "teacher")
    keep = ["--set", "prune.keep=0,2"]
    command = [
        "prune",
        "--teacher",
        str(tmp_path / "teacher"),
        "--criterion",
        "indices",
        "--out",
        str(tmp_path / "cut"),
    ]
    assert main([*command, *keep]) == 0, capsys.readouterr().err
    assert len(open_model(tmp_path / "cut").stack) == 2


@pytest.mark.parametrize("kind", ["given", "own"])
def test_prompts_of_data_and_of_older_folders_draw_the_same(tmp_path: Path, kind: str) -> None:
    """Folders that hold captions among their weights, as all once did, and folders without, whose prompts are a file."""
    model, out = tiny("pixart"), tmp_path / "images.npz"
    wanted = next(iter(sample(model, [4, 1, 0], GaussianSampler("ddim", 2, 1.5), 0))).x
    texts = {name: tensor for name, tensor in model.tensors().items() if name in ("captions", "caption_mask")}
    save_file(texts, tmp_path / "prompts.safetensors")
    if kind == "given":
        sizes = dataclasses.replace(model.arch, num_classes=0)
        model = dataclasses.replace(model, arch=sizes, texts=None)
    save_model(model, tmp_path / "model")
    assert ("captions" in load_file(tmp_path / "model" / "model.safetensors")) == (kind == "own")
    again = open_model(tmp_path / "model")
    assert again.hash() == model.hash() and (again.texts is None) == (kind == "given")
    options = f"--num-images 3 --labels 4,1,0 --sampler ddim --num-steps 2 --set sample.decode=false --out {out}"
    given = ["--prompts", str(tmp_path / "prompts.safetensors")] if kind == "given" else []
    assert main(["sample", "--model", str(tmp_path / "model"), *options.split(), *given]) == 0
    with np.load(out) as drawn:
        torch.testing.assert_close(torch.from_numpy(drawn["arr_0"]).permute(0, 3, 1, 2), wanted)
        assert drawn["arr_1"].tolist() == [4, 1, 0]
    if kind == "given":
        assert main(["sample", "--model", str(tmp_path / "model"), *options.split(), "--overwrite"]) == 2


def test_a_model_of_texts_is_pruned_on_the_prompts_of_its_data(tmp_path: Path) -> None:
    """Labels of an npz are rows of the prompts; more labels than prompts are refused."""
    model = tiny("pixart")
    save_file({"embeddings": torch.randn(4, 6, 8), "lengths": torch.tensor([6, 2, 1, 1])}, tmp_path / "p.safetensors")
    model = dataclasses.replace(model, arch=dataclasses.replace(model.arch, num_classes=0), texts=None)
    save_model(model, tmp_path / "teacher")
    draws = np.random.default_rng(0).normal(size=(8, 4, 4, 2)).astype(np.float32)
    np.savez(tmp_path / "x.npz", arr_0=draws, arr_1=np.arange(8) % 3)
    np.savez(tmp_path / "y.npz", arr_0=draws, arr_1=np.arange(8) % 4)
    command = f"prune --teacher {tmp_path}/teacher --criterion bi --set prune.calibration_images=8"
    for data, code in (("x", 0), ("y", 2)):
        rest = f" --data {tmp_path}/{data}.npz --set data.prompts={tmp_path}/p.safetensors --out {tmp_path}/{data}"
        assert main((command + rest).split()) == code
    student = open_model(tmp_path / "x")
    assert len(student.stack) == 2 and student.texts is None
