# ruff: noqa: E501
"""Masks learned and students recovered by the commands: folders of diffusers, exact where nothing trained, refusals."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import Tiny
from tiny_images import IMAGES
from tiny_video import VIDEO

import tinyfusion as tf
from captioned_set import save_set
from prompt_pipelines import save_flux_pipeline
from tinyfusion import cli
from tinyfusion.blocks.plan import PrunePlan, plan_from_json
from tinyfusion.commands.transformer_job import stand_in
from tinyfusion.config.recipe import FlowSection, PruneSection, Recipe, TrainingSection
from tinyfusion.core.rng import Randomness
from tinyfusion.export.transformer import write_transformer
from tinyfusion.families.diffusers_classes import folder as transformer_folder
from tinyfusion.families.diffusers_classes.folder import open_transformer
from tinyfusion.families.diffusers_classes.rows import shipped_rows
from tinyfusion.families.diffusers_classes.weights import Weights, hash_stored
from tinyfusion.jobs.assemble import batches_for
from tinyfusion.jobs.latent_facts import open_stated
from tinyfusion.jobs.process_specs import objective_for
from tinyfusion.models.transformer import TransformerModel, gate_units
from tinyfusion.prune.layout import GateLayout
from tinyfusion.prune.learn import mask_learner, prune_with_weight_updates

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
Run = Callable[..., Any]
SHORT = ["--steps", "2", "--set", "prune.training.batch_size=4", "--set", "prune.training.ema_decay=0.1"]
BACK = ["--steps", "2", "--set", "recover.training.batch_size=4", "--set", "recover.training.ema_decay=0.1"]
LEARN = ["prune", "--teacher", "flux", "--data", "latents:set", "--scheme", "2:3;1:2", *SHORT]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder, made the present one, with a pipeline, a set for it, and learned and recovered students."""
    folder = tmp_path_factory.mktemp("transformers")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_flux_pipeline(Path("flux"))
        save_flux_pipeline(Path("plain"), guidance_embeds=False)
        save_set(Path("set"), pooled=32)
        Path("prompts.txt").write_text("a cat\na red dog\n")
        for command in (
            [*LEARN, "--out", "runs/cut"],
            ["recover", "--student", "runs/cut", "--data", "latents:set", *BACK, "--out", "runs/back"],
            [
                "record",
                "flux",
                "--prompts",
                "prompts.txt",
                "--steps",
                "4",
                "--height",
                "16",
                "--width",
                "16",
                "--out",
                "inputs.safetensors",
            ],
        ):
            assert cli.main(command) == 0, command
        yield folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_a_learned_student_has_the_teachers_tensors_and_a_recovered_one_others(place: Path) -> None:
    from diffusers import FluxTransformer2DModel

    teacher, cut, back = (weights(Path(name)) for name in ("flux/transformer", "runs/cut/student", "runs/back/student"))
    plan = json.loads(Path("runs/cut/plan.json").read_text())
    assert plan["criterion"] == "learned" and {name: len(kept) for name, kept in plan["kept"].items()} == {
        "transformer_blocks": 2, "single_transformer_blocks": 2,
    }  # fmt: skip
    for name, tensor in cut.items():
        path, _, rest = name.partition(".")
        index, _, inner = rest.partition(".")
        source = f"{path}.{plan['kept'][path][int(index)]}.{inner}" if path in plan["kept"] else name
        assert torch.equal(tensor, teacher[source]), name
    assert back.keys() == cut.keys() and not torch.equal(back["x_embedder.weight"], cut["x_embedder.weight"])
    opened, info = FluxTransformer2DModel.from_pretrained("runs/back/student", output_loading_info=True)
    assert not any(info.values()) and len(opened.transformer_blocks) == 2
    record = json.loads(Path("runs/back/student/config.json").read_text())["_tinyfusion"]
    assert (
        record["trained"]
        and record["kept"] == plan["kept"]
        and "trained afterwards" in Path("runs/back/student/README.md").read_text()
    )
    assert tf.open_model("runs/back").hash() == record["hash"] != tf.open_model("runs/cut").hash()


def test_recovery_of_guided_models_learns_from_the_teacher_alone(place: Path, run: Run) -> None:
    text = Path("runs/back/metrics.jsonl").read_text().splitlines()
    first = json.loads(text[0])
    assert first["loss"] == pytest.approx(first["kd_loss"] + first["beta"] * first["feat_loss"], rel=1e-5), (
        "no data in it"
    )
    run("prune", "--teacher", "plain", "--keep", "0,1,3,5", "--out", "runs/plain-cut")
    run("recover", "--student", "runs/plain-cut", "--data", "latents:set", *BACK, "--out", "runs/plain")
    of_data = json.loads(Path("runs/plain/metrics.jsonl").read_text().splitlines()[0])
    assert of_data["loss"] > of_data["kd_loss"] * 0.9 + 0.05, "a tenth of the loss on the data"


def test_updates_that_stay_are_in_the_students_files(place: Path, run: Run) -> None:
    for update in ("lora", "full"):
        where = f"runs/kept-{update}"
        kept = run(*LEARN, "--update", update, "--set", "prune.keep_deltas=true", "--out", where)["kept"]
        teacher, student = weights(Path("flux/transformer")), weights(Path(where, "student"))
        place_of = kept["single_transformer_blocks"]
        name = "single_transformer_blocks.{}.proj_mlp.weight"
        before, after = teacher[name.format(place_of[0])], student[name.format(0)]
        assert 0 < float((after - before).abs().max()) < 0.05


def test_only_parents_and_what_is_written_are_hashed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pruning with weight updates makes five models: the teacher, it trained, both cut, and the student."""
    plan, hashed = plan_from_json(json.loads(Path("runs/cut/plan.json").read_text())), list[str]()

    def counted(weights: Weights) -> str:
        hashed.append(hash_stored(weights))
        return hashed[-1]

    monkeypatch.setattr(transformer_folder, "hash_stored", counted)
    teacher = tf.open_model("flux/transformer")
    assert isinstance(teacher, TransformerModel)
    averages = {"x_embedder.bias": torch.ones_like(teacher.module.get_parameter("x_embedder.bias"))}
    student = prune_with_weight_updates(teacher, plan, averages, PruneSection())
    assert isinstance(student, TransformerModel)
    write_transformer(student.folder, tmp_path / "student", "A student")
    assert len(hashed) == 3 and {teacher.hash(), student.hash()} < {*hashed}, "and the trained teacher, a parent"
    assert weights(tmp_path / "student")["x_embedder.bias"].unique().tolist() == [1.0]
    record = json.loads((tmp_path / "student" / "config.json").read_text())["_tinyfusion"]
    assert record["hash"] == student.hash() and record["lineage"][0]["hash"] == teacher.hash()


def test_half_precision_stays_half_precision(place: Path, run: Run) -> None:
    from diffusers import FluxTransformer2DModel

    FluxTransformer2DModel.from_pretrained("flux/transformer").to(torch.bfloat16).save_pretrained("half")
    low = ["--set", "prune.training.dtype=bfloat16"]
    run(*["half" if word == "flux" else word for word in LEARN], *low, "--out", "runs/half")
    said = run(
        "recover", "--student", "runs/half", "--data", "latents:set", *BACK, "--set", "recover.training.dtype=bfloat16", "--out",
        "runs/half-back",
    )  # fmt: skip
    assert isinstance(said, dict), said
    for folder in ("runs/half/student", "runs/half-back/student"):
        assert {tensor.dtype for tensor in weights(Path(folder)).values()} == {torch.bfloat16}


def test_the_whole_model_is_its_own_teacher_without_loss(place: Path) -> None:
    """With all gates open and no update trained, the distance to the whole model is 0; with a block off it is not."""
    recipe = dataclasses.replace(Recipe(), data=dataclasses.replace(Recipe().data, name="latents:set"))
    teacher = open_stated(recipe, "flux", None, None)
    source = batches_for(recipe, teacher, torch.device("cpu"))
    for update in ("lora", "full", "frozen"):
        settings = PruneSection(
            scheme="2:3;1:2", update=update, target="teacher", training=TrainingSection(steps=2, batch_size=4)
        )
        learner = mask_learner(teacher, objective_for(teacher, 0.0, recipe), settings, 0)
        gated, draws = learner.objective, Randomness(0).at(0, 0, 4)
        noisy = gated.draw(source(0, 4, draws), draws)
        taught = gated._taught(learner.module, noisy)
        whole = dataclasses.replace(gated.inner.predict(learner.module, noisy), teacher=taught)
        assert gated.losses(learner.module, noisy, whole)["kd_loss"].abs().max() < 1e-10
        assert gated.losses(learner.module, noisy, gated.predict(learner.module, noisy))["kd_loss"].min() > 1e-8


def test_masks_and_students_learn_from_recorded_outputs(place: Path, run: Run) -> None:
    short = ["--set", "prune.training.batch_size=4", "--steps", "2", "--set", "prune.training.ema_decay=0.1"]
    run(
        "prune",
        "--teacher",
        "flux",
        "--inputs",
        "inputs.safetensors",
        "--scheme",
        "2:3;1:2",
        *short,
        "--out",
        "runs/rec",
    )
    run(
        "recover",
        "--student",
        "runs/rec",
        "--method",
        "logits-kd",
        "--inputs",
        "inputs.safetensors",
        *BACK,
        "--out",
        "runs/rec-logits",
    )
    run("recover", "--student", "runs/rec", "--inputs", "inputs.safetensors", *BACK, "--out", "runs/rec-features")
    logits, features = (
        json.loads(Path(f"runs/rec-{name}/metrics.jsonl").read_text().splitlines()[0])
        for name in ("logits", "features")
    )
    # the recorded outputs are those that the teacher gives when it runs
    assert features["kd_loss"] == pytest.approx(logits["loss"], rel=1e-4)
    assert "teacher" in json.loads(Path("runs/rec-logits/run.json").read_text())["job"]


def test_run_takes_a_folder_of_recorded_calls(place: Path, run: Run) -> None:
    sizes = ["--steps", "2", "--height", "16", "--width", "16"]
    run("record", "flux", "--prompts", "prompts.txt", *sizes, "--out", "recorded")
    Path("whole.toml").write_text(
        'teacher = "flux"\nprune.scheme = "2:3;1:2"\nrecover.method = "logits-kd"\n'
        "pipeline = { height = 16, width = 16, num_steps = 1 }\n"
    )
    given = ["--inputs", "recorded", "--prompts", "prompts.txt", "--out", "runs/whole"]
    said = run("run", "--recipe", "whole.toml", *given, "--dry-run")
    assert said["state"] == "checked" and said["plan"]["data"] == "recorded", said


def test_a_new_transformer_is_trained_for_a_pipeline(place: Path, run: Run) -> None:
    sizes = dict(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    given = ", ".join(f"{name} = {value}" for name, value in sizes.items())
    Path("new.toml").write_text(
        f'model = {{ family = "FluxTransformer2DModel", sizes = {{ {given} }} }}\npipeline.folder = "plain"\ndata.name = "latents:set"\n'
        "train = { steps = 2, batch_size = 4, ema_decay = 0.1 }\n"
    )
    run("train", "--recipe", "new.toml", "--out", "runs/new")
    run("prune", "--teacher", "runs/new", "--criterion", "uniform", "--out", "runs/new-cut")
    model = open_stated(Recipe(), "runs/new-cut", None, None)
    assert isinstance(model, TransformerModel) and model.scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    said = run("train", "--recipe", "new.toml", "--set", "model.sizes={num_layers=2}", "--out", "runs/none")
    assert "a new model of these sizes" in said and "GiB" in said, "of the published width it does not fit here"
    said = run("train", "--recipe", "new.toml", "--set", "model.sizes={num_layers='two'}", "--out", "runs/none")
    assert "model.sizes do not fit a FluxTransformer2DModel" in said


# ---------------------------------------------------------------------------------------------------------------- gates


@pytest.mark.parametrize("tiny", [*IMAGES, *VIDEO], ids=lambda each: each.name)
def test_what_gates_keep_can_be_cut(tiny: Tiny, tmp_path: Path) -> None:
    """For every class: any units that its gates may select make a plan that breaks none of its rules."""
    tiny.model().save_pretrained(tmp_path / "model")  # type: ignore[operator]
    folder = open_transformer(tmp_path / "model", shipped_rows())
    if folder.row.unfit:
        pytest.skip(f"it cannot be cut: {folder.row.unfit}")
    gated = tuple(each for each in gate_units(folder) if not each.aside)
    layout = GateLayout(folder.depths, gated)
    assert layout.plain == (layout.columns == list(range(len(layout.columns))))
    fixed, rng, first = {*layout.protected(())}, torch.Generator().manual_seed(1), 0
    kept: dict[str, list[int]] = {}
    for each in gated:
        size = len(each.units)
        stay = [i for i in range(size) if first + i in fixed]
        free = [i for i in range(size) if i not in stay]
        number = max(1, len(stay), (size + 1) // 2)
        chosen = torch.randperm(len(free), generator=rng)[: max(0, number - len(stay))].tolist()
        kept[each.name] = sorted({*stay, *(free[i] for i in chosen)})
        first += size
    blocks = layout.in_blocks(kept)
    plan = PrunePlan(blocks, dict(folder.depths), "learned")
    student = folder.cut(plan)
    masks = torch.zeros(2, len(layout.blocks))
    offset = 0
    for each in gated:
        masks[:, [offset + i for i in kept[each.name]]] = 1
        offset += len(each.units)
    columns = layout.of_blocks(masks)[0].bool().tolist()
    ends = list(folder.depths.items())
    listed = [(name, i) for name, depth in ends for i in range(depth)]
    assert [place for place, on in zip(listed, columns, strict=True) if on] == [
        (n, i) for n, _ in ends for i in blocks[n]
    ]
    assert student.depths == {name: len(each) for name, each in blocks.items()}


@pytest.mark.parametrize("name", ["ZImageTransformer2DModel", "HunyuanDiT2DModel", "HiDreamImageTransformer2DModel"])
def test_a_run_counts_units_before_masks_are_learned(name: str, tmp_path: Path) -> None:
    """Lists aside have no scheme, pairs are one, and blocks that stay are among the kept: as the gates will have it."""
    tiny = next(each for each in IMAGES if each.name == name)
    tiny.model().save_pretrained(tmp_path / "model")  # type: ignore[operator]
    folder = open_transformer(tmp_path / "model", shipped_rows())
    gated = [each for each in gate_units(folder) if not each.aside]
    scheme = ";".join(f"{len(each.units) - 1}:{len(each.units)}" for each in gated)
    recipe = dataclasses.replace(Recipe(), prune=PruneSection(scheme=scheme, distribution="subset"))
    plan = stand_in(folder, recipe, None)
    student = folder.cut(plan)
    aside = {path for each in folder.units if each.aside for path in each.name.split(" + ")}
    assert all(len(plan.kept[path]) == folder.depths[path] for path in aside)
    assert sum(student.depths.values()) < sum(folder.depths.values())


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "--teacher", "flux"], "criterion learned trains: for a FluxTransformer2DModel give --data latents:FOLDER"),
        (["prune", "--teacher", "flux", "--data", "digits"], "is trained on latents and encoded texts, and digits are pictures"),
        ([*LEARN[:5], "--scheme", "1:2", *SHORT], "scheme 1:2 needs a depth divisible by 2; the model has 3 blocks"),
        ([*LEARN, "--set", "flow.path=gvp"], "predicts the velocity of the linear path"),
        ([*LEARN, "--for", "official"], "has no such format: leave it out"),
        ([*LEARN[:3], *LEARN[5:], "--inputs", "none.safetensors"], "none.safetensors"),
        ([*LEARN, "--set", "flow.shift=0"], "flow.shift"),
        (["recover", "--student", "runs/cut", "--teacher", "plain", "--data", "latents:set"], "the student was pruned from the model"),
        (["recover", "--student", "runs/cut", "--method", "finetune", "--inputs", "inputs.safetensors"], "--method logits-kd learns from the recorded outputs"),
        (["recover", "--student", "digits", "--teacher", "digits", "--inputs", "inputs.safetensors"], "--inputs is for transformers of diffusers"),
        (["recover", "--student", "runs/cut", "--data", "latents:bare"], "has no encoded texts, which a FluxTransformer2DModel takes"),
        (["recover", "--student", "runs/cut", "--data", "latents:narrow"], "takes embeddings of width 32"),
        (["recover", "--student", "runs/cut", "--data", "latents:unpooled"], "no pooled"),
        (["recover", "--student", "runs/cut", "--data", "latents:wide"], "in_channels 16 (4 per channel of the latents); got latents of 8 channels"),
        (["recover", "--student", "runs/cut", "--data", "latents:few"], "has 4 texts, and its prompts are 2"),
        (["recover", "--student", "runs/cut", "--data", "latents:set", "--set", "watch.grid_every_steps=1"], "previews draw prompts, and there are none in latents:set: give --set watch.prompts=FILE"),
        (["train", "--data", "latents:set", "--set", "model.family=FluxTransformer2DModel", "--set", "model.sizes={heads=3}"], "a FluxTransformer2DModel has no heads"),
        (["dynamic", "--model", "flux", "--data", "latents:set"], "a model whose blocks have one stream can have routers"),
    ],
)  # fmt: skip
def test_what_cannot_train_is_said_before_it_begins(arguments: list[str], message: str, place: Path, run: Run) -> None:
    for name, sizes in {
        "narrow": {"width": 16, "pooled": 32}, "unpooled": {}, "wide": {"channels": 8, "pooled": 32}, "few": {"pooled": 32},
    }.items():  # fmt: skip
        if not Path(name).is_dir():
            save_set(Path(name), **sizes)
    if not Path("bare").is_dir():
        save_set(Path("bare"))
        Path("bare/prompts.safetensors").unlink()
        save_set(Path("two"), texts=2, pooled=32)
        Path("two/prompts.safetensors").replace("few/prompts.safetensors")
    said = run(*arguments, "--out", "runs/refused")
    assert message in said, said
    assert not Path("runs/refused").exists()


def test_the_shift_of_training_is_the_schedulers_unless_the_recipe_sets_one(place: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained("plain/scheduler")
    base = dataclasses.replace(Recipe(), data=dataclasses.replace(Recipe().data, name="latents:set"))
    for recipe, shift in (
        (base, 3.0),
        (dataclasses.replace(base, flow=FlowSection(shift=2.0), assigned=frozenset({"flow.shift"})), 2.0),
    ):
        model = open_stated(recipe, "plain", None, None)
        batches_for(recipe, model, torch.device("cpu"))
        assert objective_for(model, 0.1, recipe).times.shift == shift  # type: ignore[attr-defined]
