"""Prose is tested: the commands of README, CONTRIBUTING and docs, and every link.

`tinyfusion` commands run for real (those of a launcher on one process), in the order of their page, on a small stand-in
for the shipped model and with every length overridden to a few steps, so a page's later commands find what its earlier ones
made. As typed, without those overrides, only their recipes are resolved and their moving averages checked. `make`, `python`
and `pytest` lines do not run: the target exists, the script exists and its --help knows the options, the paths exist.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from material import Cli, Outcome, pages_of_few_bytes, tiny, tiny_mar, tiny_sit
from PIL import Image
from safetensors.torch import save_file
from test_evaluate import random_weights

from prompt_pipelines import save_clip, save_dino, save_flux_pipeline
from tinyfusion.config.loading import load_recipe, recipe_fields, shipped_recipes
from tinyfusion.config.recipe import Recipe, TrainingSection
from tinyfusion.data import captioned_digits
from tinyfusion.evaluate import extractors
from tinyfusion.jobs import scoring
from tinyfusion.models.checkpoint import save_model, shipped_models
from tinyfusion.options import VERBS
from tinyfusion.parsing import overrides, parse
from tinyfusion.training.state import horizon_warning

ROOT = Path(__file__).parents[2]
PAGES = sorted(p for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")) if p.exists())
SHELLS = ("", "bash", "console", "sh")
OURS = ("tinyfusion", "make", "python", "pytest")
LAUNCHERS = ("torchrun", "accelerate")
ELSEWHERE = ("git", "cd", "pip", "source", "pre-commit", "open")  # not ours to test
TRAINING = "steps=2 batch_size=4 ema_decay=0.5 log_every_steps=1 checkpoint_every_steps=2 warmup_steps=0"
DRAWING = "--steps 2 --height 16 --width 16 --calls 1"  # the last one counts
PROMPTS = "pipeline.num_steps=1 pipeline.height=16 pipeline.width=16 pipeline.num_images=5 bench.repeats=1 bench.product_size=64"
SHORT = {
    "run": "prune.training recover recover.training distill_steps.training distill_steps sample speed",
    "train": "train compute",
    "prune": "prune.training",
    "recover": "recover recover.training",
    "dynamic": "dynamic.training dynamic",
    "distill-steps": "distill_steps.training distill_steps",
    "sample": "sample",
    "explain": "explain",
}
YARDSTICKS = ("digits-flux", "digits-sd3")  # pipelines that ship
SETTINGS = {
    **dict.fromkeys(
        ("train", "prune.training", "recover.training", "dynamic.training", "distill_steps.training"), TRAINING
    ),
    "compute": "compile=false",
    "recover": "search_trial_steps=1",
    "dynamic": "finish_steps=1 auxiliary_steps=1 ramp_steps=1 calibration_images=0",
    "distill_steps": "teacher_steps=8",
    "sample": "num_images=8 batch_size=8 num_steps=2",
    "explain": "images=8 passes=1 drawn=2 most_steps=2",
    "speed": "repeats=2 batch_size=2 steps_per_repeat=1",
}


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """The fenced blocks of a page in these languages."""
    fence = re.compile(r"^ *```([\w-]*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
    for language, text in fence.findall(page.read_text(encoding="utf-8")):
        if language in languages:
            yield text


def write_recipes(page: Path, folder: Path) -> None:
    """The recipe files that a page shows: TOML blocks that begin with their name, as in `# photos.toml`."""
    for text in blocks(page, "toml"):
        if name := re.match(r"# ([\w-]+\.toml)\n", text):
            (folder / name[1]).write_text(text, encoding="utf-8")


def commands(page: Path) -> list[list[str]]:
    """The commands of a page, as words; a block without a language counts where its first line is one of ours."""
    found = []
    for block in blocks(page, *SHELLS):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"^\$ ", "", line.strip()), comments=True)
            if words:
                words[0] = words[0].removeprefix(".venv/bin/")
                found.append(unlaunched(words))
    return [words for words in found if words[0] in OURS]


def unlaunched(words: list[str]) -> list[str]:
    """What a launcher starts several times, as it would be typed alone: alone is how it runs here."""
    if words[0] in LAUNCHERS:
        assert "-m" in words and words[words.index("-m") + 1] == "tinyfusion", shlex.join(words)
        return words[words.index("-m") + 1 :]
    return words


def shortened(words: list[str]) -> list[str]:
    """A command of ours without the program's name, and with a few steps instead of many."""
    settings = [
        f"{section}.{item}" for section in SHORT.get(words[1], "").split() for item in SETTINGS[section].split()
    ]
    drawing = shlex.split(DRAWING) if words[1] == "record" else []
    if words[1] == "encode" and "--pipeline" in words:  # of the stand-in, whose cells are pixels
        words = [
            re.sub("1024|832|1216", lambda size: {"1024": "16", "832": "16", "1216": "24"}[size[0]], word)
            for word in words
        ]
    if words[1] in ("sample", "bench") and "--prompts" in words:
        settings += PROMPTS.split()
    if words[1] == "run" and words[words.index("--recipe") + 1].startswith(YARDSTICKS):
        settings += [
            "pipeline.num_steps=1",
            "pipeline.num_images=5",
            "pipeline.batch_size=5",
            "bench.repeats=1",
            "bench.product_size=64",
        ]
    elif words[1] == "run" and of_a_pipeline(words[words.index("--recipe") + 1]):
        settings += f"{PROMPTS} encode.size=16 encode.max_tokens=16 pipeline.max_tokens=16".split()
    return [*words[1:], *drawing, *(part for setting in settings for part in ("--set", setting))]


def of_a_pipeline(recipe: str) -> bool:
    """Whether a recipe draws by a pipeline of diffusers."""
    return Path(recipe).is_file() and "pipeline" in tomllib.loads(Path(recipe).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small `digits`, and the files that a reader would bring."""
    folder = tmp_path_factory.mktemp("stand-ins")
    save_model(tiny(depth=12), folder / "shipped" / "digits")
    save_model(tiny_mar(), folder / "shipped" / "digits-mar")
    save_model(tiny_sit(), folder / "shipped" / "digits-sit")
    for name in YARDSTICKS:
        shutil.copytree(shipped_models()[name], folder / "shipped" / name)
    brought = folder / "brought"
    brought.mkdir()
    official = tiny(hidden_size=384, num_heads=6, in_channels=4, patch_size=2).module.state_dict()
    torch.save(official, brought / "DiT-XL-2-256x256.pt")
    save_model(tiny(in_channels=4, patch_size=2), folder / "shipped" / "dit-xl-2-256")  # never fetched
    latents = np.random.default_rng(0).standard_normal((16, 8, 8, 4), dtype=np.float32)
    np.savez(brought / "latents.npz", latents, np.arange(16) % 10)
    (brought / "pictures").mkdir()
    written(brought / "pictures" / "train-00000-of-00001.parquet")
    save_autoencoder(brought / "sd-vae-ft-ema")
    save_photographs(brought / "photos")
    save_photographs(brought / "captioned")
    for picture in sorted((brought / "captioned").iterdir()):
        picture.with_suffix(".txt").write_text(f"photograph {picture.stem}", encoding="utf-8")
    save_flux_pipeline(brought / "FLUX.1-dev", num_layers=19, num_single_layers=38, num_attention_heads=1)
    (brought / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    save_clip(brought / "clip-vit-large-patch14")
    save_dino(brought / "dinov2-large")
    names = (f"transformer.transformer_blocks.{i}.attn.to_q.lora_{half}.weight" for i in range(19) for half in "AB")
    save_file({name: torch.ones(4, 4) for name in names}, brought / "style.safetensors")
    random_weights(folder)
    return folder


def save_photographs(folder: Path) -> None:
    """12 of them in colour and of mixed sizes."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(12):
        height, width = ((50, 35), (40, 64), (64, 64))[i % 3]
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{i:02d}.jpg")


def save_autoencoder(folder: Path) -> None:
    """A tiny one with eight pixels to a latent cell."""
    from diffusers import AutoencoderKL

    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    with torch.random.fork_rng(devices=[]):
        AutoencoderKL(
            block_out_channels=(4,) * 4, down_block_types=down, up_block_types=up, norm_num_groups=2
        ).save_pretrained(folder)


def written(path: Path) -> None:
    """16 grey pictures of 8 x 8 pixels in row groups of four."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = []
    for level in range(16):
        stream = io.BytesIO()
        Image.new("L", (8, 8), level).save(stream, format="PNG")
        pictures.append({"bytes": stream.getvalue(), "path": None})
    pq.write_table(pa.table({"image": pictures, "label": [i % 10 for i in range(16)]}), path, row_group_size=4)


@pytest.fixture
def reader(stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a reader of the docs would have it, as the current one."""
    shipped = {path.name: path for path in (stand_ins / "shipped").iterdir()}
    monkeypatch.setattr("tinyfusion.models.places.shipped_models", lambda: shipped)
    monkeypatch.setattr(captioned_digits, "COPIES", 1)
    monkeypatch.setattr(extractors, "fetch_weights", lambda name: stand_ins / "inception.safetensors")
    monkeypatch.setattr(scoring, "cache_folder", lambda: tmp_path / "cache")
    pages_of_few_bytes(monkeypatch)
    shutil.copytree(stand_ins / "brought", tmp_path / "reader")
    monkeypatch.chdir(tmp_path / "reader")
    return tmp_path / "reader"


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def called_shortened(cli: Cli, words: list[str]) -> Outcome:
    """The outcome of a shortened command, without those of our settings that it does not read."""
    command, typed = shortened(words), len(words) - 1
    own, added = command[:typed], command[typed:]
    while True:
        outcome = cli(*own, *added)
        unread = re.search(r"^error: ([\w.]+) is (?:for|not read)", outcome.err, re.MULTILINE)
        places = [i for i, part in enumerate(added) if unread and part.startswith(f"{unread[1]}=")]
        if not places:
            return outcome
        del added[places[0] - 1 : places[0] + 1]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_commands(page: Path, cli: Cli, request: pytest.FixtureRequest) -> None:
    listed = commands(page)
    if any(words[0] == "tinyfusion" for words in listed):
        write_recipes(page, request.getfixturevalue("reader"))
    for words in listed:
        if words[0] == "tinyfusion":
            outcome = called_shortened(cli, words)
            assert outcome.code == 0, f"{shlex.join(words)}\n{outcome.err}"
        elif words[0] == "make":
            goals = [word for word in words[1:] if "=" not in word]
            assert set(goals) <= makefile_targets(), shlex.join(words)
        elif words[0] == "pytest":
            assert all((ROOT / word).exists() for word in words[1:] if "/" in word and "{" not in word), shlex.join(
                words
            )
        else:
            check_script(words)


def trainings(verb: str, recipe: Recipe) -> dict[str, TrainingSection]:
    """What a verb trains, by its section; nothing for the verbs that do not, and for a choice by hand."""
    pruning = {"prune.training": recipe.prune.training} if recipe.prune.criterion == "learned" else {}
    recovery = {"recover.training": recipe.recover.training}
    routed = {"dynamic.training": recipe.dynamic.training}
    fewer = {"distill_steps.training": recipe.distill_steps.training}
    whole = (
        pruning | recovery | (routed if recipe.dynamic.in_run else {}) | (fewer if recipe.distill_steps.in_run else {})
    )
    found = {
        "train": {"train": recipe.train},
        "prune": pruning,
        "recover": recovery,
        "run": whole,
        "dynamic": routed,
        "distill-steps": fewer,
    }
    return found.get(verb, {})


def horizon_warnings(words: list[str]) -> list[str]:
    """The warnings about moving averages that a command of ours would print, exactly as typed."""
    verb, options = parse(words[1:])
    if verb not in ("train", "prune", "recover", "run", "dynamic", "distill-steps"):
        return []
    recipe = load_recipe(options.recipe, options.set, overrides(verb, options))
    found = [horizon_warning(s.ema_decay, s.made_steps, section) for section, s in trainings(verb, recipe).items()]
    return [warning for warning in found if warning]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_no_command_trains_too_short_for_its_average(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a reader types must not begin with a warning that the outcome is mostly the initial weights."""
    write_recipes(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    ours = [words for words in commands(page) if words[0] == "tinyfusion" and "--help" not in words]
    assert {shlex.join(words): found for words in ours if (found := horizon_warnings(words))} == {}


@pytest.mark.parametrize(
    ("command", "num"),
    [
        ("recover --student s --teacher digits --steps 1000 --out o", 1),
        ("prune --teacher digits --steps 400 --out o", 1),
        ("prune --teacher digits --criterion indices --keep 0 --out o", 0),
        ("run --recipe digits --set recover.training.ema_decay=0.9999 --out o", 1),
        ("run --recipe digits --out o", 0),
        ("train --steps 3 --out o", 1),
        ("dynamic --model digits --data digits --steps 500 --out o", 1),
        ("dynamic --recipe digits-dynamic --model digits --out o", 0),
        ("distill-steps --model digits --teacher digits --steps 500 --out o", 1),
        ("distill-steps --recipe digits-4-steps --model digits --out o", 0),
    ],
)
def test_short_averages_are_recognised(command: str, num: int) -> None:
    assert len(horizon_warnings(["tinyfusion", *shlex.split(command)])) == num


def check_script(words: list[str]) -> None:
    """`python FILE ...`: the file is there, answers --help, and knows the options."""
    if words[1:3] == ["-m", "pytest"]:
        return
    path = ROOT / words[1]
    assert path.is_file(), shlex.join(words)
    options = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
    described = help_of(path)
    assert all(option in described for option in options), shlex.join(words)


@functools.cache
def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@functools.cache
def help_of(script: Path) -> str:
    """What a script prints for --help."""
    import contextlib

    before, printed = (sys.argv, sys.path), io.StringIO()
    sys.argv, sys.path = [script.name, "--help"], [str(script.parent), *sys.path]  # as `python FILE` has them
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as stop:
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv, sys.path = before
    assert not stop.value.code
    return printed.getvalue()


def test_readme_shows_every_verb_and_the_demo() -> None:
    """The first page that a new user reads has a command for everything that can be typed."""
    readme = ROOT / "README.md"
    shown = {words[1] for words in commands(readme) if words[0] == "tinyfusion"}
    assert {"run", "prune", "recover", "sample", "evaluate", "report", "inspect", "recipes"} <= shown
    assert ["make", "demo"] in commands(readme)


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_python_blocks(page: Path) -> None:
    """Those of pages other than README, which may be parts of something, are at least Python."""
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


def test_python_of_the_readme(reader: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for block in blocks(ROOT / "README.md", "python"):
        exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_toml_blocks(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "toml"):
        (tmp_path / "shown.toml").write_text(block, encoding="utf-8")
        assert load_recipe(str(tmp_path / "shown.toml")).name == "shown"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_relative_links(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:|#", t)]
    assert [t for t in targets if not (page.parent / t.partition("#")[0]).exists()] == []


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipe(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe.minutes
    assert recipe.machine


def test_every_fenced_shell_command_is_known() -> None:
    """Nothing in a shell block escapes: it is run above, or named as not ours."""
    strangers = []
    for page in PAGES:
        for block in blocks(page, "bash", "console", "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(re.sub(r"^\$ ", "", line.strip()), comments=True)
                if words and words[0].removeprefix(".venv/bin/") not in (*OURS, *LAUNCHERS, *ELSEWHERE):
                    strangers.append(f"{page.name}: {line}")
    assert strangers == []


# ------------------------------------------------------------------------------------------------- names in messages

FIELDS = {path for path, _, _ in recipe_fields(Recipe())}
SECTIONS = {path.rpartition(".")[0] for path in FIELDS if "." in path}
OPTIONS = {option.typed for verb in VERBS.values() for option in verb.options}
FILES = (
    "json",
    "npz",
    "toml",
    "html",
    "pkl",
    "safetensors",
    "save_pretrained",
    "py",
    "onnx",
)  # what follows a dot in other names

# options of tar, http.server and npm; a field of model.json
FOREIGN = {"--sparse", "--directory", "--pack-destination", "dynamic.ratio"}


def spoken(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of every string in a module that is no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bodies = [n.body for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef) and n.body]
    docstrings = {id(body[0].value) for body in bodies if isinstance(body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def strangers_in(text: str) -> list[str]:
    """Recipe fields, options and documents that a message names and a user of a wheel does not have."""
    heads = "|".join(sorted({section.partition(".")[0] for section in SECTIONS}))
    named = [match[1].rstrip(".") for match in re.finditer(rf"(?<![\w./-])((?:{heads})\.[a-z_.0-9]+)", text)]
    fields = [n for n in named if n not in FIELDS | SECTIONS and n.rpartition(".")[2] not in FILES]
    options = (
        set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z](?![a-z-])", text)) - OPTIONS - {"--help", "--version", "--set"}
    )
    fields, options = [name for name in fields if name not in FOREIGN], options - FOREIGN
    return [*fields, *sorted(options), *re.findall(r"docs/[\w/.-]*", text)]


@pytest.mark.parametrize(
    ("text", "strangers"),
    [
        ("--set recover.training.ema_decay=0.9 or --steps 3, see speed.json", []),
        ("set masked.guidance_schedule", ["masked.guidance_schedule"]),
        ("--set recover.ema_decay=0.9", ["recover.ema_decay"]),
        ("use --keep-all", ["--keep-all"]),
        ("wanted a text (docs/pixart.md)", ["docs/pixart.md"]),
    ],
)
def test_strangers_are_recognised(text: str, strangers: list[str]) -> None:
    assert strangers_in(text) == strangers


def test_messages_name_only_what_there_is() -> None:
    """Fields that the recipe has, options that a verb has, and no documents: an installed package brings none."""
    sources = sorted(
        # assets: scripts of their own. unread.py: patterns of fields, which test_unread.py compares with the recipe
        path
        for path in (ROOT / "src").rglob("*.py")
        if "assets" not in path.parts and path.name != "unread.py"
    )
    found = {f"{p.name}:{line}": names for p in sources for line, text in spoken(p) if (names := strangers_in(text))}
    assert len(sources) > 100 and found == {}
