"""The house keeps its own rules: versions agree, prose is current, every knob is explained, files stay small."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tomllib
import typing
from pathlib import Path

import pytest

import tinyfusion
from tinyfusion.config.loading import load_recipe, shipped_recipes
from tinyfusion.config.recipe import Recipe

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "tinyfusion"
PROSE = [
    path for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))] if path.exists()
]
MACHINE_PATH = re.compile(r"(?<![\w.~<])/(?:home|root|Users|mnt)/\w")


def tracked_files() -> list[Path]:
    """Files under version control, and new ones that are not ignored."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_versions_agree() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    head = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert head is not None
    assert cited is not None
    assert head[1] == cited[1] == tinyfusion.__version__ == declared


def test_dates_agree() -> None:
    head = re.search(r"^## .*?(\d{4}-\d{2}-\d{2})", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    cited = re.search(r"^date-released: (\S+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert head is not None
    assert cited is not None
    assert head[1] == cited[1]


def test_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_no_machine_paths() -> None:
    own = re.compile(rf"(?<![\w.]){re.escape(str(ROOT))}/") if len(ROOT.parts) > 2 else None
    found: list[str] = []
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" in content:
            continue
        text = content.decode("utf-8")
        match = MACHINE_PATH.search(text) or (own.search(text) if own else None)
        if match:
            found.append(f"{path.relative_to(ROOT)}: {match[0]}")
    assert not found


@pytest.mark.parametrize(
    ("text", "bad"),
    [("see |home|ada|runs", True), ("in |root|x", True), ("docs|home|page", False), ("runs|digits", False)],
)
def test_machine_paths_are_recognised(text: str, bad: bool) -> None:
    assert bool(MACHINE_PATH.search(text.replace("|", "/"))) is bad


def leaves(kind: type, path: str = "") -> typing.Iterator[tuple[str, typing.Any]]:
    """(dotted name, type hint) of every value that `--set` reaches."""
    values = {field.name for field in dataclasses.fields(kind) if field.compare}  # how a recipe was given is none
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        if name not in values:
            continue
        if dataclasses.is_dataclass(hint):
            yield from leaves(typing.cast(type, hint), f"{path}{name}.")
        elif not any(dataclasses.is_dataclass(inner) for inner in typing.get_args(hint)):
            yield f"{path}{name}", hint


def test_every_recipe_field_says_what_it_means() -> None:
    fields = list(leaves(Recipe))
    assert len(fields) > 60
    silent = [name for name, hint in fields if typing.get_origin(hint) is not typing.Annotated]
    silent += [
        name
        for name, hint in fields
        if name not in silent and not any(isinstance(text, str) and len(text) > 5 for text in hint.__metadata__)
    ]
    assert not silent


def test_every_shipped_recipe_reads_and_says_what_it_is() -> None:
    for name in shipped_recipes():
        recipe = load_recipe(name)
        assert recipe.description
        assert recipe.minutes is None or recipe.machine, f"{name} states minutes without a machine"


def test_source_files_stay_small() -> None:
    long = {str(path.relative_to(SOURCE)): len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")}
    assert {name: lines for name, lines in long.items() if lines > 400} == {}


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.name)
def test_prose_names_only_files_that_exist(path: Path) -> None:
    """Every `folder/file.ext` in backticks is a file of the package or of the repository."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    named = set(re.findall(r"`([\w.-]+(?:/[\w.-]+)*\.(?:py|toml|md|j2|cff|yaml))`", text))
    missing = [
        name for name in sorted(named) if not any((base / name).exists() for base in (ROOT, SOURCE, ROOT / "docs"))
    ]
    assert not missing


def test_a_folder_without_a_set_is_refused(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    suite = next(plugin for plugin in pytestconfig.pluginmanager.get_plugins() if hasattr(plugin, "check_golden"))
    (tmp_path / "dit.json").write_text("{}", encoding="utf-8")
    for folder, message in ((tmp_path, "none of .*dit_golden.safetensors"), (tmp_path / "absent", "is none")):
        with pytest.raises(pytest.UsageError, match=message):
            suite.check_golden(folder)
    (tmp_path / "kd_golden.safetensors").touch()
    suite.check_golden(tmp_path)


def test_constraints_pin_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.split(r"[<>=!~ ]", requirement)[0].lower() for requirement in wanted}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().split("==") for line in lines if line and not line.startswith("#"))
    assert names <= set(pins)
    assert pins["torch"] == "2.13.0"
