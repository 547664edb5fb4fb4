# ruff: noqa: E501
"""Recorded inputs and criteria on them: real pipelines in small, scores and choices against the plain way, refusals."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SINGLE, TRUNK, Tiny, outputs
from tiny_images import IMAGES
from tiny_video import VIDEO
from torch import nn

import tinyfusion
from prompt_pipelines import save_flux_pipeline, save_wan_pipeline
from tinyfusion import cli
from tinyfusion.blocks.replayed import BlockReplay
from tinyfusion.blocks.stack import BlockStack
from tinyfusion.config.recipe import PruneSection
from tinyfusion.core.errors import UserError
from tinyfusion.core.rng import Randomness
from tinyfusion.core.rundir import RunDirectory
from tinyfusion.data.recorded import read_recorded, recording, write_recorded
from tinyfusion.families.diffusers_classes.cutting import Cut
from tinyfusion.families.diffusers_classes.folder import TransformerFolder, open_transformer
from tinyfusion.families.diffusers_classes.rows import shipped_rows
from tinyfusion.jobs.recording import recorded_calls
from tinyfusion.jobs.so_far import SoFar
from tinyfusion.jobs.transformers import recorded_work

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers, about itself
PROMPTS = "a cat\n\na red dog\n"
SIZES = ["--steps", "5", "--height", "16", "--width", "16"]


def tiny(name: str) -> Tiny:
    return next(each for each in [*IMAGES, *VIDEO] if each.name == name)


FLUX, SD3 = tiny("FluxTransformer2DModel"), tiny("SD3Transformer2DModel")
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two pipelines, prompts, and the inputs of the first one's transformer as `record` writes them."""
    folder = tmp_path_factory.mktemp("pipelines")
    (folder / "prompts.txt").write_text(PROMPTS)
    save_flux_pipeline(folder / "flux")
    save_wan_pipeline(folder / "wan")
    command = ["record", folder / "flux", "--prompts", folder / "prompts.txt", "--out", folder / "flux.safetensors"]
    assert cli.main([*map(str, command), *SIZES, "--calls", "3"]) == 0
    return folder


def recorded(tiny: Tiny | nn.Module, folder: Path, images: tuple[int, ...] = (1,)) -> tuple[TransformerFolder, Path]:
    """A class in small on disk, and a file of calls of it, with so many images."""
    model = tiny.model() if isinstance(tiny, Tiny) else tiny
    model.save_pretrained(folder / "model")
    calls = tiny if isinstance(tiny, Tiny) else FLUX
    with tinyfusion.record_inputs(model, folder / "inputs.safetensors"):
        for num in images:
            outputs(model, calls.given(num))
    return open_transformer(folder / "model", shipped_rows()), folder / "inputs.safetensors"


def planned(model: TransformerFolder, file: Path, **settings: Any) -> Any:
    work = recorded_work(model, PruneSection(**settings), 0, file)
    return work.decide(RunDirectory(file.parent / "run", writes=False), torch.device("cpu"))


def losses_of(model: TransformerFolder, file: Path, masks: list[dict[str, list[int]]]) -> list[float]:
    """The mean relative squared error of every mask, by gates around the whole model."""
    module = model.module()
    stack, found = model.stack(module), torch.zeros(len(masks), dtype=torch.float64)
    for call in read_recorded(file).calls:
        inputs = {name: value for name, value in call.items() if name != "return_dict"}
        values = lambda: torch.cat([t.flatten() for t in outputs(module, inputs)]).double()  # noqa: B023, E731
        whole = values()
        for number, kept in enumerate(masks):
            gates = [i in kept[path] for path, depth in model.depths.items() for i in range(depth)]
            with stack.gated(torch.tensor([gates], dtype=torch.uint8), "skip"):
                found[number] += float((values() - whole).square().sum() / whole.square().sum())
    return (found / len(read_recorded(file).calls)).tolist()


# --------------------------------------------------------------------------------------------------------------- record


def test_a_file_holds_what_the_pipeline_gave_its_transformer(place: Path, run: Run, tmp_path: Path) -> None:
    """First, middle and last of five calls of each prompt, as a hook of one's own around plain diffusers sees them."""
    from diffusers import FluxPipeline

    inputs = read_recorded(place / "flux.safetensors")
    assert [inputs.class_name, inputs.dtype, inputs.prompts, len(inputs.calls)] == [FLUX.name, "float32", 2, 6]
    assert inputs.hash == run("inspect", place / "flux")["hash"]
    pipeline = FluxPipeline.from_pretrained(place / "flux")
    seen: list[dict[str, Any]] = []
    pipeline.transformer.register_forward_pre_hook(lambda _m, _a, given: seen.append(dict(given)), with_kwargs=True)
    with tinyfusion.record_inputs(pipeline.transformer, tmp_path / "own.safetensors", calls=4):
        for number, prompt in enumerate(("a cat", "a red dog")):
            seed = Randomness(0).generator_seed(f"record/{number}")
            generator = torch.Generator().manual_seed(seed)
            pipeline(prompt, num_inference_steps=5, height=16, width=16, generator=generator, output_type="latent")
    for own, (number, call) in zip((0, 2, 4, 5, 7, 9), enumerate(inputs.calls), strict=True):
        assert call.keys() == seen[own].keys(), number
        for name, value in call.items():
            same = torch.equal(value, seen[own][name]) if isinstance(value, torch.Tensor) else value == seen[own][name]
            assert same, (number, name)
    texts = {id(call["encoder_hidden_states"]) for call in inputs.calls}
    assert len(texts) == 2, "a text is stored once per prompt"
    again = read_recorded(tmp_path / "own.safetensors")
    assert [again.hash, len(again.calls)] == [inputs.hash, 4]
    assert torch.equal(again.calls[3]["hidden_states"], inputs.calls[5]["hidden_states"])


def test_the_same_command_is_finished_and_another_is_refused(place: Path, run: Run) -> None:
    command = [
        "record",
        place / "flux",
        "--prompts",
        place / "prompts.txt",
        "--out",
        place / "flux.safetensors",
        *SIZES,
    ]
    before = (place / "flux.safetensors").read_bytes()
    assert run(*command, "--calls", "3")["prompts"] == 2
    assert "(calls: 3 there, 4 now)" in run(*command)
    assert run(*command, "--overwrite", "--dry-run")["arguments"]["num_inference_steps"] == 5
    assert (place / "flux.safetensors").read_bytes() == before


def test_a_file_that_comes_to_be_there_while_drawing_stays(
    place: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "own.safetensors"

    def drawing(*given: Any) -> Any:
        save_file({"x": torch.zeros(1)}, out)
        return recorded_calls(*given)

    monkeypatch.setattr("tinyfusion.commands.record.recorded_calls", drawing)
    command = ["record", place / "flux", "--prompts", place / "prompts.txt", "--out", out, *SIZES]
    assert "exists and was not made by tinyfusion" in run(*command)
    assert [*load_file(out)] == ["x"]


def test_experts_of_a_video_pipeline_are_recorded_and_scored_apart(place: Path, run: Run, tmp_path: Path) -> None:
    command = ["record", place / "wan", "--prompts", place / "prompts.txt", "--out", tmp_path / "a.safetensors"]
    command += ["--steps", 4, "--height", 32, "--width", 32, "--frames", 5, "--guidance-scale", 3]
    assert "has 2 transformers: give --component transformer or --component transformer_2" in run(*command)
    made = run(*command, "--component", "transformer_2")
    assert [made["class_name"], made["dtype"]] == ["WanTransformer3DModel", "float32"]
    calls = read_recorded(tmp_path / "a.safetensors").calls
    assert calls[0]["hidden_states"].shape == (1, 16, 2, 4, 4)
    texts = [call["encoder_hidden_states"] for call in calls]
    assert not torch.equal(texts[0], texts[1]), "guided and unguided calls are both among them"
    prune = ["prune", "--inputs", tmp_path / "a.safetensors", "--criterion", "bi", "--out", tmp_path / "run"]
    assert "that is another model" in run(*prune, "--teacher", place / "wan/transformer")
    assert len(run(*prune, "--teacher", place / "wan/transformer_2")["kept"]["blocks"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{flux}", "--frames", "5"], "a FluxPipeline has no num_frames"),
        (["{flux}", "--steps", "0"], "--steps must be at least 1; got 0"),
        (["{flux}", "--component", "vae"], "has no transformer vae: --component is transformer"),
        (["{flux}/transformer"], "is no pipeline of diffusers: wanted a folder with model_index.json"),
        (["{flux}", "--prompts", "{empty}"], "holds no prompts: wanted one a line"),
        (["{flux}", "--out", "{empty}"], "--out of record is a .safetensors file"),
        (["{flux}", "--out", "{foreign}"], "exists and was not made by tinyfusion"),
        (["{code}"], "brings a pipeline class of its own, and code of a model is never run"),
        (["{module}"], "brings a class for transformer of its own, and code of a model is never run"),
        (["{auto}"], "brings a class for tokenizer of its own, and code of a model is never run"),
        (["{unknown}"], "has no pipeline NoPipeline, which"),
        (["{classes}"], "a DiTPipeline takes no prompt: record from a script of your own"),
        (["{broken}"], "diffusers does not open"),
        (["{flux}/gone"], "no pipeline at"),
    ],
)
def test_what_cannot_be_recorded_is_said(place: Path, run: Run, tmp_path: Path, arguments: Any, message: str) -> None:
    names = {"flux": place / "flux", "empty": tmp_path / "empty.txt", "foreign": tmp_path / "foreign.safetensors"}
    names["empty"].write_text("\n")
    save_file({"x": torch.zeros(1)}, names["foreign"])
    index = json.loads((place / "flux/model_index.json").read_text())
    changes = {
        "code": {"_class_name": ["own_pipeline", "OwnPipeline"]},
        "module": {"transformer": ["own_transformer", FLUX.name]},
        "auto": {"tokenizer": ["transformers", "AutoTokenizer"]},
        "unknown": {"_class_name": "NoPipeline"},
        "classes": {"_class_name": "DiTPipeline"},
        "broken": {"text_encoder": ["transformers", "CLIPTextModel"]},
    }
    for name, change in changes.items():
        names[name] = tmp_path / name
        shutil.copytree(place / "flux/transformer", names[name] / "transformer")
        changed = index | change | ({"transformer": ["diffusers", FLUX.name]} if name != "module" else {})
        (names[name] / "model_index.json").write_text(json.dumps(changed))
    (names["auto"] / "tokenizer").mkdir()
    (names["auto"] / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["a.B", None]}})
    )
    command = ["--prompts", str(place / "prompts.txt"), "--out", str(tmp_path / "new.safetensors"), *SIZES]
    given = [argument.format(**names) for argument in arguments]
    assert message in run("record", *[given[0], *command, *given[1:]])
    assert not (tmp_path / "new.safetensors").exists()


def test_a_pipeline_of_the_hub_is_fetched_as_data_alone(
    place: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every component, in safetensors and texts: no pickles and no code."""
    wanted: list[Any] = []

    def snapshot(repository: str, revision: str, files: Any) -> Path:
        wanted.append((repository, revision, list(files)))
        return place / "flux"

    monkeypatch.setattr("tinyfusion.models.hub._snapshot", snapshot)
    command = ["--prompts", place / "prompts.txt", "--out", tmp_path / "a.safetensors", "--dry-run"]
    assert run("record", "org/flux@v2", *command)["pipeline"] == "FluxPipeline"
    assert [each[:2] for each in wanted] == [("org/flux", "v2")] * 2
    assert {"transformer/*.safetensors", "tokenizer_2/*.json", "text_encoder/*.safetensors"} <= {*wanted[1][2]}
    assert not [name for name in wanted[1][2] if name.endswith((".py", ".bin", ".pt", "*"))]


def test_recording_refuses_what_no_file_holds(tmp_path: Path) -> None:
    model = FLUX.model()
    with pytest.raises(UserError, match="joint_attention_kwargs of the call holds a object"), recording(model):
        outputs(model, FLUX.given() | {"joint_attention_kwargs": {"cache": object()}})
    with (
        pytest.raises(UserError, match="was not called within record_inputs"),
        tinyfusion.record_inputs(model, tmp_path / "a"),
    ):
        pass
    assert not (tmp_path / "a").exists()


def test_a_model_run_in_another_type_is_recognised_by_its_folder(tmp_path: Path) -> None:
    """Inputs in half precision for a folder in single: the tensors that follow the weights are converted."""
    model = FLUX.model()
    opened, file = recorded(model, tmp_path)
    half, given = model.to(torch.bfloat16), in_half(FLUX.given(1))
    module = opened.module()
    with tinyfusion.record_inputs(module, tmp_path / "single.safetensors"):
        outputs(module, {name: value.float() for name, value in given.items()})
    for source in (None, tmp_path / "model"):
        with tinyfusion.record_inputs(half, file, source=source):
            outputs(half, given)
        if source is None:
            with pytest.raises(UserError, match="that is another model"):
                planned(opened, file, criterion="bi")
    plans = [planned(opened, own, criterion="bi") for own in (file, tmp_path / "single.safetensors")]
    assert plans[0].scores[TRUNK] == plans[1].scores[TRUNK]


def in_half(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(torch.bfloat16) if value.is_floating_point() else value for name, value in given.items()}


# ------------------------------------------------------------------------------------------------------------- criteria


@pytest.mark.parametrize("criterion", ["bi", "flux-lite", "sensitivity", "min-loss"])
def test_blocks_that_do_nothing_go_first(tmp_path: Path, run: Run, criterion: str) -> None:
    """Gates of zero in a double and two single blocks."""
    model = FLUX.model()
    for name, parameter in model.named_parameters():
        dead = (
            f"{TRUNK}.1.norm1.linear",
            f"{TRUNK}.1.norm1_context.linear",
            f"{SINGLE}.0.norm.linear",
            f"{SINGLE}.3.norm.linear",
        )
        if name.startswith(dead):
            torch.nn.init.zeros_(parameter)
    opened, file = recorded(model, tmp_path)
    made = run("prune", "--teacher", opened.path, "--inputs", file, "--criterion", criterion, "--out", tmp_path / "cut")
    assert made["kept"] == {TRUNK: [0, 2], SINGLE: [1, 2]}
    scores = json.loads((tmp_path / "cut/plan.json").read_text())["scores"]
    assert scores["calibration"]["recorded_on"] == opened.hash
    if criterion == "min-loss":
        assert [scores["num_masks"], scores["exact"], scores["loss"]] == [18, True, pytest.approx(0, abs=1e-10)]
    else:
        assert scores[TRUNK][1] == pytest.approx(0, abs=1e-6) and min(scores[TRUNK][::2]) > 1e-4
        assert scores[SINGLE][3] == pytest.approx(0, abs=1e-6) and min(scores[SINGLE][1:3]) > 1e-4
    assert run("inspect", tmp_path / "cut")["lists"][SINGLE]["blocks"] == 2


CLASSES = ["FluxTransformer2DModel", "SD3Transformer2DModel", "HunyuanDiT2DModel", "Flux3Transformer2DModel",
           "WanVACETransformer3DModel", "MotifVideoTransformer3DModel", "LatteTransformer3DModel"]  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_losses_and_choices_are_those_of_the_plain_way(name: str, tmp_path: Path) -> None:
    """Pairs of a U, shared counts, hints, last blocks that count, lists that alternate: the best of the allowed choices."""
    opened, file = recorded(tiny(name), tmp_path)
    plan = planned(opened, file, criterion="min-loss", num_masks=10_000)
    choices = all_choices(opened, {path: len(own) for path, own in plan.kept.items()})
    others = [planned(opened, file, criterion=name) for name in ("bi", "sensitivity")]
    greedy = planned(opened, file, criterion="sensitivity", sensitivity_order="greedy")
    assert all(other.kept in choices for other in (*others, greedy))
    losses = losses_of(opened, file, choices)
    assert sorted(plan.scores["losses"]) == pytest.approx(sorted(losses), rel=1e-4)
    assert plan.scores["loss"] == pytest.approx(min(losses), rel=1e-4)
    assert losses[choices.index(plan.kept)] == pytest.approx(min(losses), rel=1e-4)
    assert losses[choices.index(greedy.kept)] == pytest.approx(greedy.scores["loss"], rel=1e-4)


def all_choices(model: TransformerFolder, sizes: dict[str, int]) -> list[dict[str, list[int]]]:
    """Every choice of so many blocks that the rules of the class allow."""
    per_list = [itertools.combinations(range(depth), sizes[path]) for path, depth in model.depths.items()]
    found = []
    for chosen in itertools.product(*per_list):
        kept = {path: [*own] for path, own in zip(model.depths, chosen, strict=True)}
        try:
            Cut(model.row, model.config, model.depths, kept)
        except UserError:
            continue
        found.append(kept)
    return found


def test_a_model_that_returns_zeros_has_no_losses(tmp_path: Path) -> None:
    model: Any = FLUX.model()
    with torch.no_grad():
        model.proj_out.weight.zero_()
        model.proj_out.bias.zero_()
    opened, file = recorded(model, tmp_path)
    with pytest.raises(UserError, match="returns zeros alone on call 1 of inputs.safetensors"):
        planned(opened, file, criterion="sensitivity")


def test_a_unit_of_several_blocks_explains_itself(tmp_path: Path) -> None:
    opened, file = recorded(tiny("HunyuanDiT2DModel"), tmp_path)
    plan = planned(opened, file, criterion="sensitivity", protect=(1,))
    assert plan.scores["units"] == {
        "blocks": [[["blocks", i], ["blocks", 7 - i]] for i in range(3)] + [[["blocks", 3], ["blocks", 4]]]
    }
    assert len(plan.scores["blocks"]) == 4
    assert {1, 3, 4, 6} <= {*plan.kept["blocks"]}
    assert plan.depth == {"blocks": 8}


def test_budgets_and_protected_blocks_are_those_of_the_rules(place: Path, run: Run, tmp_path: Path) -> None:
    command = [
        "prune",
        "--teacher",
        place / "flux",
        "--inputs",
        place / "flux.safetensors",
        "--criterion",
        "sensitivity",
    ]
    kept = run(*command, "--set", f"prune.budgets={TRUNK}=1,{SINGLE}=3", "--protect", "2,6", "--out", tmp_path / "a")[
        "kept"
    ]
    assert kept[TRUNK] == [2] and 3 in kept[SINGLE] and len(kept[SINGLE]) == 3
    assert "4 blocks of transformer_blocks cannot stay" in run(*command, "--num-keep", "4", "--out", tmp_path / "b")
    plain = run(*command, "--dry-run", "--out", tmp_path / "b")
    assert plain["state"] == "checked" and not (tmp_path / "b").exists()


def test_half_precision_is_scored_as_it_is(tmp_path: Path) -> None:
    """Norms in float32 in a model in bfloat16; nothing is converted."""
    model = FLUX.model().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm_q" in name or "norm_k" in name:
            parameter.data = parameter.data.float()
    model.save_pretrained(tmp_path / "model")
    opened = open_transformer(tmp_path / "model", shipped_rows())
    module, seen = opened.module(), set[Any]()
    with tinyfusion.record_inputs(module, tmp_path / "a.safetensors"):
        outputs(module, in_half(FLUX.given()))
    work = recorded_work(opened, PruneSection(criterion="sensitivity"), 0, tmp_path / "a.safetensors")
    with watched_linears(seen):
        plan = work.decide(RunDirectory(tmp_path / "run", writes=False), torch.device("cpu"))
    assert seen == {torch.bfloat16}
    assert len(plan.kept[TRUNK]) == 2


@contextmanager
def watched_linears(seen: set[Any]) -> Iterator[None]:
    """Collects the types of the weights of linear layers that run."""

    def note(module: nn.Module, _given: Any) -> None:
        if isinstance(module, nn.Linear):
            seen.add(module.weight.dtype)

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        yield
    finally:
        handle.remove()


def test_a_class_that_cannot_be_written_has_a_plan(tmp_path: Path, run: Run) -> None:
    opened, file = recorded(tiny("ChromaTransformer2DModel"), tmp_path)
    made = run(
        "prune", "--teacher", opened.path, "--inputs", file, "--criterion", "sensitivity", "--out", tmp_path / "cut"
    )
    assert made["kept"] == json.loads((tmp_path / "cut/plan.json").read_text())["kept"]
    assert not (tmp_path / "cut/student").exists()


def test_inputs_of_an_ancestor_are_good_for_a_student(tmp_path: Path, run: Run) -> None:
    """Where they are latents and texts: not where something is given per block."""
    for model, accepted in ((FLUX, True), (SD3, False)):
        folder = tmp_path / model.name
        opened, file = recorded(model, folder)
        run("prune", "--teacher", opened.path, "--keep", "0,1,3,4" if accepted else "0,1,3", "--out", folder / "one")
        command = ["prune", "--teacher", folder / "one", "--inputs", file, "--criterion", "bi", "--out", folder / "two"]
        if accepted:
            assert run(*command, "--num-keep", "1")["kept"].keys() == {TRUNK, SINGLE}
            assert (
                json.loads((folder / "two/plan.json").read_text())["scores"]["calibration"]["recorded_on"]
                == opened.hash
            )
        else:
            assert "its ancestor, which is given other inputs per block" in run(*command)


def test_an_interrupted_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, file = recorded(FLUX, tmp_path, (2, 1))
    settings = PruneSection(criterion="min-loss")
    whole = recorded_work(opened, settings, 0, file).decide(RunDirectory(tmp_path / "whole"), torch.device("cpu"))
    folder, save, calls = RunDirectory(tmp_path / "run"), SoFar.save, []

    def stopping(*given: Any) -> None:
        save(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr("tinyfusion.jobs.so_far.SAVED_EVERY_S", 0.0)
    monkeypatch.setattr(SoFar, "save", stopping)
    with pytest.raises(KeyboardInterrupt), folder.writing("prune", {}):
        recorded_work(opened, settings, 0, file).decide(folder, torch.device("cpu"))
    monkeypatch.setattr(SoFar, "save", lambda *given: calls.append(given))
    with folder.writing("prune", {}) as mode:
        again = recorded_work(opened, settings, 0, file).decide(folder, torch.device("cpu"))
    assert mode == "continue" and not calls, "of two calls one was left, after which nothing is saved"
    assert again.scores["losses"] == whole.scores["losses"] and again.kept == whole.kept


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--criterion", "bi"], "for a FluxTransformer2DModel give --inputs FILE, which `tinyfusion record` makes"),
        (
            ["--inputs", "{inputs}", "--scheme", "1:2"],
            "scheme 1:2 needs a depth divisible by 2; the model has 3 blocks",
        ),
        (["--inputs", "{inputs}", "--criterion", "first"], "criterion first looks at no recorded inputs"),
        (["--inputs", "{inputs}", "--criterion", "width"], "criterion width looks at no recorded inputs"),
        (["--inputs", "{inputs}", "--keep", "0,3"], "criterion indices looks at no recorded inputs"),
        (
            ["--inputs", "{inputs}", "--criterion", "bi", "--set", "prune.bi_inputs=clean"],
            "prune.bi_inputs=clean wants clean images",
        ),
        (
            ["--inputs", "{inputs}", "--criterion", "bi", "--num-keep", "9"],
            "9 blocks of transformer_blocks cannot stay",
        ),
        (
            ["--inputs", "{inputs}", "--criterion", "bi", "--num-keep", "1", "--protect", "0,1"],
            "2 units of transformer_blocks",
        ),
        (
            ["--inputs", "{random}", "--criterion", "bi"],
            "holds no recorded inputs: wanted a file that `tinyfusion record` wrote",
        ),
        (["--inputs", "{class}", "--criterion", "bi"], "was recorded on a SD3Transformer2DModel"),
        (["--inputs", "{model}", "--criterion", "bi"], "that is another model; record inputs of its own"),
        (["--inputs", "{damaged}", "--criterion", "bi"], "is damaged: its record names what it does not hold"),
        (["--inputs", "{unlike}", "--criterion", "bi"], "a FluxTransformer2DModel does not take the recorded inputs"),
        (["--inputs", "{text}", "--criterion", "bi"], "is no readable safetensors file"),
        (["--inputs", "{gone}", "--criterion", "bi"], "gone.safetensors"),
        (
            ["--inputs", "{inputs}", "--criterion", "bi", "--teacher", "digits"],
            "--inputs is for transformers of diffusers",
        ),
    ],
)
def test_what_cannot_be_scored_is_said(place: Path, run: Run, tmp_path: Path, arguments: Any, message: str) -> None:
    source = read_recorded(place / "flux.safetensors")
    names = {
        name: tmp_path / f"{name}.safetensors"
        for name in ("random", "class", "model", "damaged", "unlike", "text", "gone")
    }
    record = {"made_by": "tinyfusion", "class_name": source.class_name, "hash": source.hash, "dtype": "float32"}
    save_file(
        {name: value for name, value in source.calls[0].items() if isinstance(value, torch.Tensor)}, names["random"]
    )
    write_recorded(names["class"], source.calls, record | {"class_name": SD3.name})
    write_recorded(names["model"], source.calls, record | {"hash": "0" * 64})
    write_recorded(names["unlike"], [{"hidden_states": torch.zeros(1, 2)}], record)
    write_recorded(names["damaged"], source.calls, record)
    tensors = load_file(names["damaged"])
    first = next(iter(tensors))
    header = {"tinyfusion": json.dumps(record | {"calls": [{"dict": {"x": {"tensor": "gone"}}}]})}
    save_file({first: tensors[first]}, names["damaged"], header)
    names["text"].write_text("no tensors")
    names["inputs"] = place / "flux.safetensors"
    given = [argument.format(**names) for argument in arguments]
    said = run("prune", "--teacher", place / "flux", "--out", tmp_path / "run", *given)
    assert message in said
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------------- replay


class Writing(nn.Module):
    """Adds to the output of every block in place, as models do with residuals of a ControlNet."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            x += 1
        return x.clone()


@pytest.mark.parametrize("num_bytes", [0, 24, 10_000])
def test_replays_are_runs(num_bytes: int) -> None:
    """Of every mask in any order, whatever is retained, and where a model writes into what its blocks returned."""
    torch.manual_seed(0)
    model, masks = Writing(), [kept for num in range(5) for kept in itertools.combinations(range(4), num)]
    x, stack = torch.randn(2, 3), BlockStack(model, ["layers"])
    wanted = {}
    with torch.no_grad():
        for kept in masks:
            with stack.gated(torch.tensor([[float(i in kept) for i in range(4)]]), "skip"):
                wanted[kept] = model(x.clone())
        with BlockReplay(stack, num_bytes) as replay:
            for kept in [*masks, *reversed(masks), *masks[::3]]:
                assert torch.equal(replay.run(kept, lambda: model(x.clone())), wanted[kept])
    assert "forward" not in vars(model.layers[0])


def test_replays_run_only_what_changes(tmp_path: Path) -> None:
    """All masks that lack one of seven blocks, in order: the blocks behind the one that is missing, each time."""
    opened, file = recorded(FLUX, tmp_path)
    module = opened.module()
    stack, runs = opened.stack(module), []
    for index, block in enumerate(stack):
        norm = block.norm1 if hasattr(block, "norm1") else block.norm
        norm.register_forward_hook(lambda *_, i=index: runs.append(i))
    inputs = {name: value for name, value in read_recorded(file).calls[0].items() if name != "return_dict"}
    with torch.no_grad(), BlockReplay(stack, 2**20) as replay:
        for missing in [None, *reversed(range(7))]:
            replay.run([i for i in range(7) if i != missing], lambda: outputs(module, inputs))
    assert runs.count(0) == 1 and len(runs) == 7 + sum(range(7))
