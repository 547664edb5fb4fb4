"""The recipes of published models: two steps of search and recovery at the published depths, and a drawing by the real pipeline."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import Tiny
from tiny_pipelines import PIPELINES, TinyPipeline
from torch._subclasses import FakeTensorMode

from captioned_set import save_set
from tinyfusion import cli
from tinyfusion.conditioning.condition import Condition
from tinyfusion.config.loading import flatten, load_recipe, to_plain
from tinyfusion.config.recipe import Recipe
from tinyfusion.families.diffusers_classes.call_rows import call_of
from tinyfusion.families.diffusers_classes.calls import CallContext
from tinyfusion.jobs.estimate import MemoryPlan
from tinyfusion.jobs.latent_facts import open_stated
from tinyfusion.jobs.training import Training
from tinyfusion.jobs.transformer_training import transformer_objective
from tinyfusion.models.transformer import TransformerModel

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
KL = dict(latent_channels=4, block_out_channels=(4,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
          up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=2)  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A recipe's teacher in small: width 32, with the published blocks.

    pipeline: its class. blocks, kept: per list, of teacher and student. config: changes of the class in small. texts: of the
    encoded captions, as of `save_set`. scheduler: changes of the pipeline's. more: arguments of a drawing.
    """

    pipeline: str
    blocks: Mapping[str, int]
    kept: Mapping[str, int]
    config: Mapping[str, Any]
    texts: Mapping[str, Any]
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    vae: Mapping[str, Any] | None = None
    more: Callable[[], dict[str, Any]] = dict

    @property
    def family(self) -> TinyPipeline:
        """The pipeline in small."""
        own = next(each for each in PIPELINES if each.name == self.pipeline)
        kind, settings = own.scheduler
        vae = own.vae if self.vae is None else ("AutoencoderKL", self.vae)
        return dataclasses.replace(own, scheduler=(kind, {**settings, **self.scheduler}), vae=vae,
                                   call=lambda: {**own.call(), **self.more()})  # fmt: skip

    @property
    def tiny(self) -> Tiny:
        """Its transformer."""
        own = self.family.tiny
        return dataclasses.replace(own, config={**own.config, **self.config})

    def save(self, folder: Path) -> Path:
        """Write the pipeline, with random weights and without text encoders."""
        import diffusers

        family = self.family
        parts: dict[str, Any] = dict.fromkeys(family.components)
        parts["scheduler"] = getattr(diffusers, family.scheduler[0])(**family.scheduler[1])
        parts["transformer"] = self.tiny.model()
        if family.vae is not None:
            torch.manual_seed(3)
            parts["vae"] = getattr(diffusers, family.vae[0])(**family.vae[1])
        getattr(diffusers, family.name)(**parts).save_pretrained(folder)
        return folder


TRUNK, SINGLE = "transformer_blocks", "single_transformer_blocks"
REFINERS = {"noise_refiner": 2, "context_refiner": 2}
RECIPES = {
    "flux1-dev-lite": Published(
        "FluxPipeline", {TRUNK: 19, SINGLE: 38}, {TRUNK: 8, SINGLE: 20},
        dict(num_layers=19, num_single_layers=38, in_channels=16, guidance_embeds=True), dict(width=32, pooled=32),
        dict(use_dynamic_shifting=True), KL | dict(scaling_factor=0.3611, shift_factor=0.1159), lambda: dict(guidance_scale=3.5)),
    "sd35-medium-half": Published(
        "StableDiffusion3Pipeline", {TRUNK: 24}, {TRUNK: 12},
        dict(num_layers=24, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"), dict(width=32, pooled=24), dict(shift=3.0)),
    "qwen-image-half": Published(
        "QwenImagePipeline", {TRUNK: 60}, {TRUNK: 30}, dict(num_layers=60), dict(width=16, masked=True),
        dict(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02)),
    "z-image-two-thirds": Published(
        "ZImagePipeline", REFINERS | {"layers": 30}, REFINERS | {"layers": 20},
        dict(n_layers=30, n_refiner_layers=2, dim=32, n_heads=2, n_kv_heads=2), dict(width=16, masked=True), dict(shift=6.0)),
    "sana-1600m-half": Published(
        "SanaPipeline", {TRUNK: 20}, {TRUNK: 10},
        dict(num_layers=20, attention_head_dim=16, cross_attention_head_dim=16, cross_attention_dim=32), dict(width=8, masked=True)),
    "wan21-1.3b-half": Published(
        "WanPipeline", {"blocks": 30}, {"blocks": 15}, dict(num_layers=30, attention_head_dim=16), dict(width=16, frames=2)),
    "pixart-sigma-half": Published(
        "PixArtSigmaPipeline", {TRUNK: 28}, {TRUNK: 14},
        dict(num_layers=28, attention_head_dim=16, cross_attention_dim=32), dict(width=16, masked=True)),
}  # fmt: skip
SHORT = {
    f"{stage}.training.{name}": value
    for stage in ("prune", "recover")
    for name, value in (("stop_after", 2), ("batch_size", 2), ("ema_decay", 0.1), ("log_every_steps", 1))
} | {"compute.gradient_accumulation_steps": 1}


@pytest.fixture(autouse=True)
def present(tmp_path: Path) -> Iterator[None]:
    """The test's folder is the present one. Memory is not planned, which takes longer than two steps."""
    plan = MemoryPlan({}, 1, "bfloat16", overlap=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(Training, "memory", lambda _self: (None, plan))
        yield


def run(*arguments: Any) -> None:
    assert cli.main([*map(str, arguments)]) == 0, arguments


def differing(run: str, name: str) -> set[str]:
    """Fields whose value in the record of a run is not the recipe's."""
    values = flatten(to_plain(load_recipe(name)))
    record = flatten(json.loads(Path(run, "run.json").read_text())["recipe"])
    return {path for path, value in record.items() if path in values and values[path] != value}


@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_of_search_and_recovery_and_a_drawing(name: str) -> None:
    import diffusers

    teacher = RECIPES[name]
    teacher.save(Path("teacher"))
    save_set(Path("set"), **teacher.texts)
    given = [f"--set={path}={value}" for path, value in SHORT.items()]
    common = ["--recipe", name, "--teacher", "teacher", "--data", "latents:set", *given]
    run("prune", *common, "--out", "cut")
    run("recover", *common, "--student", "cut", "--out", "back")
    allowed = {"teacher", "data.name", "data.prompts", "prompts", *SHORT}
    assert differing("cut", name) | differing("back", name) <= allowed

    plan = json.loads(Path("cut/plan.json").read_text())
    assert plan["criterion"] == "learned" and plan["depth"] == dict(teacher.blocks)
    assert {path: len(kept) for path, kept in plan["kept"].items()} == dict(teacher.kept)
    logged = [
        [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()] for run in ("cut", "back")
    ]
    assert [[line["step"] for line in lines] for lines in logged] == [[0, 1], [0, 1]]
    assert all(line["applied"] for lines in logged for line in lines)
    if name == "flux1-dev-lite":  # the teacher is the only target
        assert all(line["loss"] == pytest.approx(line["kd_loss"], rel=1e-5) for lines in logged for line in lines)

    kind = getattr(diffusers, teacher.tiny.name)
    student, info = kind.from_pretrained("back/student", output_loading_info=True)
    assert not any(info.values())
    assert {path: len(student.get_submodule(path)) for path in teacher.kept} == dict(teacher.kept)
    assert moved("cut/student", "back/student"), "recovery trained"
    family = teacher.family
    absent = dict.fromkeys(part for part in family.components if not Path("teacher", part).is_dir())
    pipeline = getattr(diffusers, family.name).from_pretrained("teacher", transformer=student, **absent)
    image = family.drawn(pipeline)
    assert torch.isfinite(image).all() and image.std() > 0


def moved(before: str, after: str) -> bool:
    """Whether a tensor of a student differs."""
    file = "diffusion_pytorch_model.safetensors"
    with safe_open(Path(before, file), "pt") as old, safe_open(Path(after, file), "pt") as new:
        assert [*old.keys()] == [*new.keys()]
        return any(not torch.equal(old.get_tensor(name), new.get_tensor(name)) for name in old.keys())  # noqa: SIM118


# ------------------------------------------------------------------------------------------------------------ by themselves


@pytest.mark.parametrize("name", RECIPES)
def test_without_data_nothing_is_fetched(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tinyfusion.models.hub._snapshot", lambda *_: pytest.fail("fetched"))
    assert cli.main(["prune", "--recipe", name, "--out", "cut"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "give --data latents:FOLDER" in error and "\n" not in error
    assert not Path("cut").exists()


def test_a_fetched_transformer_comes_with_its_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedule and the shift of its training are in that file."""
    RECIPES["pixart-sigma-half"].save(Path("hub"))

    def snapshot(repository: str, revision: str, files: Sequence[str]) -> Path:
        for file in (each for pattern in files for each in Path("hub").glob(pattern)):
            Path("cache", file.relative_to("hub")).parent.mkdir(parents=True, exist_ok=True)
            Path("cache", file.relative_to("hub")).write_bytes(file.read_bytes())
        return Path("cache")

    monkeypatch.setattr("tinyfusion.models.hub._snapshot", snapshot)
    model = open_stated(Recipe(), "org/pixart", None, None)
    assert isinstance(model, TransformerModel)
    assert model.scheduler["_class_name"] == "DPMSolverMultistepScheduler" and transformer_objective(
        model, 0.0, Recipe()
    )


def test_pixart_is_opened_as_diffusers_has_it_where_the_class_is_named() -> None:
    RECIPES["pixart-sigma-half"].save(Path("teacher"))
    save_set(Path("set"), width=16, masked=True)
    recipe = dataclasses.replace(Recipe(), data=dataclasses.replace(Recipe().data, name="latents:set"))
    by_family = open_stated(recipe, "teacher", None, None)
    by_class = open_stated(recipe, "teacher", None, "PixArtTransformer2DModel")
    assert by_family.family.name == "pixart" and isinstance(by_class, TransformerModel)


@pytest.mark.parametrize("name", ["qwen-image-half", "z-image-two-thirds", "sana-1600m-half"])
def test_calls_of_masked_texts_are_made_without_values(name: str) -> None:
    """As a dry run counts large models: fake tensors have no values, which masks are looked at for."""
    tiny = RECIPES[name].tiny
    config = {**tiny.config, "_class_name": tiny.name}
    with FakeTensorMode():
        texts = Condition({"embeddings": torch.zeros(1, 6, 16), "mask": torch.zeros(1, 6, dtype=torch.uint8)})
        arguments = call_of(config).arguments(CallContext(config), torch.zeros(1, 4, 8, 8), torch.ones(1), texts)
    given = arguments.get("encoder_hidden_states", arguments.get("cap_feats"))
    assert given[0].shape == (6, 16), "of full length"


def test_hours_of_the_page_are_the_minutes_of_the_recipes() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    for name, published in RECIPES.items():
        recipe = load_recipe(name)
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |") and " T |" in line)
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert (
            cells[1]
            == f"{' + '.join(map(str, published.blocks.values()))} to {' + '.join(map(str, published.kept.values()))}"
        )
        assert recipe.minutes == pytest.approx(60 * (float(cells[7]) + float(cells[8])), abs=7), (
            "hours have one decimal"
        )
        assert "Never run" in recipe.description and "computed, not measured" in recipe.machine
