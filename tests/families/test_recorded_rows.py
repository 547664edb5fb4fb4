# ruff: noqa: E501
"""Batches of recorded calls: every image of every class alone and together as recorded, exact epochs, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import draw
from tiny_pipelines import GENERATOR, PIPELINES, TinyPipeline

import tinyfusion
from tinyfusion import cli
from tinyfusion.blocks.stack import BlockStack
from tinyfusion.config.recipe import ComputeSection, TrainingSection
from tinyfusion.core.rng import Randomness
from tinyfusion.data.recorded import OUTPUT, RecordedInputs, recording
from tinyfusion.data.recorded_batches import PLAIN, RecordedBatches, RowLayout, joined
from tinyfusion.families.diffusers_classes.call_rows import LAYOUTS
from tinyfusion.families.diffusers_classes.cutting import UnitList
from tinyfusion.families.diffusers_classes.folder import open_transformer
from tinyfusion.families.diffusers_classes.rows import shipped_rows
from tinyfusion.jobs.recorded_training import RecordedTask, call_outputs, check_masks, check_rows
from tinyfusion.models.transformer import TransformerModel, opened
from tinyfusion.training.engine import Engine

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
CPU = torch.device("cpu")
ROWS = shipped_rows()
# arguments of the second image of some pipelines: texts of other lengths
LONGER: dict[str, Callable[[], dict[str, Any]]] = {
    "QwenImagePipeline": lambda: dict(
        prompt_embeds=draw(1, 13, 16), prompt_embeds_mask=torch.ones(1, 13, dtype=torch.int64)
    ),
    "ZImagePipeline": lambda: dict(prompt_embeds=list(draw(1, 40, 16))),
    "ErnieImagePipeline": lambda: dict(prompt_embeds=list(draw(1, 14, 16))),
}
REFUSED = {"Kandinsky5T2VPipeline"}  # its texts are packed, without an axis of images


def recorded(family: TinyPipeline, pipeline: Any) -> RecordedInputs:
    """Two images in two steps each, of different texts."""
    pipeline.set_progress_bar_config(disable=True)
    for name, value in family.attributes.items():
        setattr(pipeline, name, value)
    GENERATOR.manual_seed(5)
    with recording(pipeline.transformer, outputs=True) as calls:
        for image in range(2):
            given = family.call() | (LONGER.get(family.name, dict)() if image else {})
            noise = torch.Generator().manual_seed(image)
            pipeline(output_type="latent", return_dict=False, num_inference_steps=2, generator=noise, **given)
    outputs = [tuple(call.pop(OUTPUT)) for call in calls]
    return RecordedInputs(calls, family.model, "", "float32", outputs=outputs, path=Path("inputs"))


def batches(inputs: RecordedInputs, seed: int = 0, layout: RowLayout | None = None) -> RecordedBatches:
    own = LAYOUTS.get(inputs.class_name, PLAIN) if layout is None else layout
    return RecordedBatches(inputs, torch.float32, Randomness(seed), CPU, own)


@torch.no_grad()
def difference(module: torch.nn.Module, batch: Any) -> float:
    """Relative difference of the outputs of a batch to the recorded ones."""
    made, wanted = call_outputs(module, batch.call)[0], batch.outputs[0]
    assert made.shape == wanted.shape
    return float((made - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("family", PIPELINES, ids=lambda family: family.name)
def test_images_alone_and_together_give_what_was_recorded(family: TinyPipeline, tmp_path: Path) -> None:
    """Rows of calls with two images, of calls with one, and rows of both images and all steps as one batch."""
    pipeline = family.build()
    inputs = recorded(family, pipeline)
    source, module = batches(inputs), pipeline.transformer
    module.save_pretrained(tmp_path)
    model = opened(open_transformer(tmp_path, ROWS))
    if family.name in REFUSED:
        with pytest.raises(ValueError, match="cannot be run as one batch \\(rows of a call alone: other outputs"):
            check_rows(model, source, 2)
        return
    assert len(source) == sum(len(of_call[0]) for of_call in inputs.outputs or ())
    assert len(source.buckets) == 1, "texts of other lengths are in the same batches"
    rows = [source.row(0, place) for place in range(len(source))]
    assert max(difference(module, row) for row in rows) < 1e-5
    assert difference(module, joined([rows[-1], *rows[:-1]])) < 1e-5
    assert difference(module, joined(rows).each(lambda tensor: tensor[1::2])) < 1e-5
    check_rows(model, source, 2)
    module.train()  # some classes return something else then
    assert difference(module, rows[0]) < 1e-5
    prediction = RecordedTask().predict(module, rows[0])
    assert float(RecordedTask().losses(module, rows[0], prediction)["loss"]) < 1e-9
    assert module.training


def test_times_per_token_go_with_their_images() -> None:
    """WanPipeline with expand_timesteps, as of the 5B model of Wan 2.2."""
    family = next(each for each in PIPELINES if each.name == "WanPipeline")
    pipeline = family.build()
    pipeline.register_to_config(expand_timesteps=True)
    source = batches(recorded(family, pipeline))
    assert source.row(0, 0).call["timestep"].ndim == 2
    assert difference(pipeline.transformer, joined([source.row(0, place) for place in (0, 7, 2)])) < 1e-5


def test_sizes_within_dicts_go_with_their_images() -> None:
    """As of PixArt at 1024 pixels, two rows of a guided call."""
    sizes = {"resolution": torch.tensor([[64.0, 32.0], [64.0, 32.0]]), "aspect_ratio": torch.tensor([[2.0], [2.0]])}
    call = {"hidden_states": draw(2, 4), "added_cond_kwargs": sizes, "attention_kwargs": {}, "scale": (1.0, 2.0)}
    inputs = RecordedInputs([call], "Any", "", "float32", outputs=[(draw(2, 4),)])
    source = batches(inputs)
    row = source.row(0, 1).call
    assert row["added_cond_kwargs"]["resolution"].shape == (1, 2) and row["added_cond_kwargs"][
        "aspect_ratio"
    ].shape == (1, 1)
    assert row["attention_kwargs"] == {} and row["scale"] == (1.0, 2.0)
    assert joined([source.row(0, 0), source.row(0, 1)]).call["added_cond_kwargs"]["resolution"].shape == (2, 2)


# --------------------------------------------------------------------------------------------------------------- epochs


def numbered(*sizes: int) -> RecordedInputs:
    """Calls of two images, whose output is their number; widths are the buckets."""
    calls, outputs, number = [], [], 0
    for width, num in enumerate(sizes, 1):
        for _ in range(num):
            calls.append({"x": torch.zeros(2, width), "ids": torch.arange(3)})
            outputs.append((torch.tensor([[2.0 * number], [2.0 * number + 1]]),))
            number += 1
    return RecordedInputs(calls, "Any", "", "float32", outputs=outputs)


def numbers(source: RecordedBatches, step: int, size: int, first: int = 0, num: int | None = None) -> list[int]:
    draws = Randomness(0).at(step, first, size if num is None else num)
    return source(step, size, draws).outputs[0][:, 0].int().tolist()


def test_every_image_comes_once_an_epoch() -> None:
    """Two sizes, in batches of one size each; after three epochs each image came three times, in another order."""
    source = batches(numbered(9, 6), seed=3)
    assert [len(source), [len(bucket) for bucket in source.buckets]] == [30, [18, 12]]
    steps = [numbers(source, step, 6) for step in range(15)]
    assert all(len({number < 18 for number in step}) == 1 for step in steps)
    for epoch in range(3):
        assert sorted(number for step in steps[5 * epoch : 5 * epoch + 5] for number in step) == list(range(30))
    assert steps[:5] != steps[5:10]
    assert [numbers(batches(numbered(9, 6), seed=3), step, 6) for step in range(15)] == steps
    uneven = batches(numbered(4, 3))
    seen = Counter(number for step in range(4 * 7) for number in numbers(uneven, step, 4))
    assert set(seen.values()) == {8} and len(seen) == 14, "14 images in batches of 4: eight epochs are 28 steps"


def test_processes_and_microbatches_share_a_batch() -> None:
    source = batches(numbered(9, 6))
    for step in (0, 3, 7):
        whole = numbers(source, step, 6)
        assert numbers(source, step, 6, 0, 3) + numbers(source, step, 6, 3, 3) == whole
        assert [numbers(source, step, 6, i, 1)[0] for i in range(6)] == whole


# ------------------------------------------------------------------------------------------------------------- refusals


class OneByOne(torch.nn.Module):
    """A model that knows one image a call."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(4, 4)])

    def forward(self, x: torch.Tensor, mean: bool = False) -> torch.Tensor:
        if mean:
            return self.layers[0](x - x.mean(0) * (len(x) > 1))
        if len(x) != 1:
            raise ValueError("one image a call")
        return self.layers[0](x)


def one_by_one(images: int, **more: Any) -> tuple[Any, RecordedInputs]:
    module = OneByOne()
    calls = [{"x": draw(images, 4), **more} for _ in range(3)]
    with torch.no_grad():
        outputs = [(module(**call),) for call in calls]
    inputs = RecordedInputs(calls, "OneByOne", "", "float32", outputs=outputs, path=Path("inputs"))
    stack = BlockStack(module, ["layers"])
    folder = SimpleNamespace(class_name="OneByOne", path=Path("model"), depths={"layers": 1})
    units = [UnitList("layers", ((("layers", 0),),), frozenset(), False)]
    return SimpleNamespace(module=module, folder=folder, stack=stack, units=units), inputs


@pytest.mark.parametrize(
    ("images", "more", "message"),
    [
        (1, {}, r"calls together: one image a call\); set the batch size to 1, or run one at a time"),
        (1, {"mean": True}, r"calls together: other outputs \(relative difference"),
        (2, {"mean": True}, r"rows of a call alone: other outputs .* record calls of one image"),
    ],
)
def test_calls_that_cannot_be_joined_are_refused(images: int, more: dict[str, Any], message: str) -> None:
    model, inputs = one_by_one(images, **more)
    with pytest.raises(ValueError, match=message):
        check_rows(model, batches(inputs), 2)
    if images == 1:
        check_rows(model, batches(inputs), 1)  # one at a time


def test_a_model_that_knows_one_image_trains_by_accumulation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of four is refused, four microbatches of one are not, and give what a model without that limit gives in one batch."""
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    family = next(each for each in PIPELINES if each.name == "StableDiffusion3Pipeline")
    model = family.tiny.model()
    model.save_pretrained(tmp_path / "model")
    with tinyfusion.record_inputs(model, tmp_path / "inputs.safetensors"), torch.no_grad():
        for _ in range(2):
            model(**family.tiny.given(2))
    command = ["prune", "--teacher", str(tmp_path / "model"), "--criterion", "learned", "--update", "frozen"]
    command += ["--scheme", f"1:{family.tiny.config['num_layers']}", "--inputs", str(tmp_path / "inputs.safetensors")]
    for setting in ("steps=2", "batch_size=4", "log_every_steps=1", "warmup_steps=0", "ema_decay=0.0"):
        command += ["--set", f"prune.training.{setting}"]
    assert cli.main([*command, "--out", str(tmp_path / "whole")]) == 0
    plain = SD3Transformer2DModel.forward

    def limited(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(hidden_states) > 1:
            raise ValueError("one image a call")
        return plain(self, hidden_states, *args, **kwargs)

    limited.__signature__ = __import__("inspect").signature(plain)  # type: ignore[attr-defined]
    monkeypatch.setattr(SD3Transformer2DModel, "forward", limited)
    with tinyfusion.record_inputs(model, tmp_path / "single.safetensors"), torch.no_grad():
        for _ in range(2):
            given = family.tiny.given(2)
            for image in range(2):
                model(**{name: value[image : image + 1] for name, value in given.items()})
    command[command.index("--inputs") + 1] = str(tmp_path / "single.safetensors")
    capsys.readouterr()
    assert cli.main([*command, "--out", str(tmp_path / "refused")]) == 2
    assert "calls together: one image a call); set the batch size to 1, or run one at a time" in capsys.readouterr().err
    command += ["--set", "compute.gradient_accumulation_steps=4"]
    assert cli.main([*command, "--out", str(tmp_path / "single"), "--dry-run"]) == 0
    assert cli.main([*command, "--out", str(tmp_path / "single")]) == 0
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "single")
    ]
    assert len(losses[0]) == 2 and losses[0][0] > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_masks_are_learned_where_blocks_write_into_their_inputs(tmp_path: Path) -> None:
    """CogView4 turns queries in place by tables that take no gradient; one batch and microbatches of one give equal losses."""
    family = next(each for each in PIPELINES if each.name == "CogView4Pipeline")
    pipeline = family.build()
    pipeline.transformer.save_pretrained(tmp_path / "model")
    GENERATOR.manual_seed(5)
    with tinyfusion.record_inputs(pipeline.transformer, tmp_path / "inputs.safetensors"):
        pipeline(
            output_type="latent", num_inference_steps=2, generator=torch.Generator().manual_seed(0), **family.call()
        )
    losses = []
    for steps in (1, 4):
        out = tmp_path / f"run-{steps}"
        command = [
            "prune",
            "--teacher",
            str(tmp_path / "model"),
            "--inputs",
            str(tmp_path / "inputs.safetensors"),
            "--scheme",
            "3:4",
        ]
        command += ["--out", str(out), "--update", "frozen", "--set", f"compute.gradient_accumulation_steps={steps}"]
        for setting in ("steps=1", "batch_size=4", "warmup_steps=0", "ema_decay=0.0"):
            command += ["--set", f"prune.training.{setting}"]
        assert cli.main(command) == 0
        losses.append(json.loads((out / "metrics.jsonl").read_text())["loss"])
    assert losses[0] > 0 and losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_images_that_share_their_mask_are_learned_one_at_a_time() -> None:
    row = SimpleNamespace(one_mask="its blocks see a row per token")
    model = object.__new__(TransformerModel)
    model.folder = SimpleNamespace(row=row, class_name="Any")  # type: ignore[assignment]
    settings = TrainingSection(batch_size=4)
    with pytest.raises(ValueError, match="share their mask .* compute.gradient_accumulation_steps=4"):
        check_masks(model, settings, Engine(CPU))
    check_masks(model, settings, Engine(CPU, ComputeSection(gradient_accumulation_steps=4)))


def test_files_without_outputs_are_for_criteria_alone() -> None:
    inputs = RecordedInputs([{"x": torch.zeros(1, 2)}], "Any", "", "float32", path=Path("old.safetensors"))
    with pytest.raises(
        ValueError, match=r"old\.safetensors has no outputs of the model, which training learns from: record it again"
    ):
        batches(inputs)
