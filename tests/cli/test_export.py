"""`export` from the command line: every format, twice, over, dry, and the card that goes with a model."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from material import Cli, tiny
from PIL import Image

from tinyfusion.commands import export as exporting
from tinyfusion.export.card import plan_png
from tinyfusion.export.folder import push_to_hub, save_pretrained
from tinyfusion.models.checkpoint import open_model, save_model

CARD = "README.md"


def test_every_format_and_back(cli: Cli, work: Path) -> None:
    teacher = open_model("teacher")
    outs = {"diffusers": "d", "tinyfusion": "t", "official": "o.safetensors"}
    for to, out in outs.items():
        made = cli("export", "--model", "teacher", "--to", to, "--out", out, "--json")
        assert made.code == 0, made.err
        assert made.last_json["model"] == teacher.hash() and made.last_json["to"] == to
    assert open_model("t").hash() == open_model("o.safetensors", num_heads=2).hash() == teacher.hash()
    assert open_model("d").hash() == teacher.made_for("diffusers").hash()
    assert {path.name for path in Path("d").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        CARD,
        "tinyfusion.json",
    }
    assert {path.name for path in Path("t").iterdir()} == {"model.json", "model.safetensors", CARD, "tinyfusion.json"}
    kinds = [cli("inspect", out, "--num-heads", "2", "--json").last_json["origin"]["kind"] for out in outs.values()]
    assert kinds == ["folder of diffusers", "model folder of tinyfusion", "official state dict"]


def test_a_torch_file_is_tensors_and_nothing_else(cli: Cli, work: Path) -> None:
    assert cli("export", "--model", "teacher", "--to", "official", "--out", "made/o.pt").code == 0
    found = torch.load("made/o.pt", weights_only=True)
    wanted = open_model("teacher").module.state_dict()
    assert list(found) == list(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(type(tensor) is torch.Tensor for tensor in found.values()) and type(found) is dict
    assert json.loads(Path("made/o.json").read_text())["verb"] == "export"


def test_again_other_and_over(cli: Cli, work: Path) -> None:
    command = ("export", "--model", "student", "--to", "diffusers", "--out", "d")
    assert cli(*command).code == 0
    before = (Path("d") / "config.json").stat().st_mtime_ns
    assert "d is finished" in cli(*command).err
    assert (Path("d") / "config.json").stat().st_mtime_ns == before
    other = cli("export", "--model", "teacher", "--to", "diffusers", "--out", "d")
    assert other.code == 2 and "made with another recipe (model:" in other.err
    assert cli("export", "--model", "teacher", "--to", "diffusers", "--out", "d", "--overwrite").code == 0
    assert open_model("d").hash() == open_model("teacher").made_for("diffusers").hash()
    assert not list(Path().glob(".d*"))


def test_dry_run_writes_nothing(cli: Cli, work: Path) -> None:
    done = cli("export", "--model", "teacher", "--to", "diffusers", "--out", "made/d", "--dry-run", "--json")
    assert done.code == 0 and done.last_json["bytes"] > 100_000 and not Path("made").exists()


def test_the_card_of_a_run(cli: Cli, work: Path) -> None:
    """Plan as a picture, numbers with their protocol and never two protocols in a table, the command, the licence."""
    assert cli("prune", "--teacher", "teacher", "--keep", "0,2", "--out", "run").code == 0
    record = json.loads(Path("run/run.json").read_text())
    Path("run/run.json").write_text(json.dumps({**record, "command": "tinyfusion run --recipe mine.toml --out run"}))
    Path("run/evaluations").mkdir()
    for name, fid, protocol in (("digits", 12.345, "protocol one"), ("digits-heldout", 23.456, "protocol two")):
        numbers = {"fid": fid, "precision": 0.5, "protocol": protocol, "num_images": 40}
        Path(f"run/evaluations/student-{name}.json").write_text(json.dumps(numbers))
    assert cli("export", "--model", "run", "--to", "tinyfusion", "--out", "card").code == 0
    card = Path("card/README.md").read_text()
    second, first = card.index("protocol one"), card.index("protocol two")
    assert (
        "23.46" in card[:first]
        and "12.35" in card[first:second]
        and "12.35" not in card[:first]
        and card.count("| FID |") == 2
    )
    assert "tinyfusion run --recipe mine.toml --out run" in card and "![which blocks stay](plan.png)" in card
    assert open_model("teacher").hash()[:12] in card and "Kept: blocks 0, 2." in card
    assert "name no licence" in card and "CC-BY-NC-4.0" in card
    with Image.open("card/plan.png") as picture:
        assert picture.format == "PNG" and picture.width > 300


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "sit",
            (
                "A scalable interpolant transformer (SiT) of 4 blocks, width",
                "- sit\n",
                "of the family sit are under MIT",
            ),
        ),
        (
            "mar",
            (
                "A masked autoregressive model (MAR) of 8 blocks (4 of encoder_blocks, 4 of decoder_blocks), width",
                "- mar\n",
                "of the family mar are under MIT",
            ),
        ),
    ],
)
def test_a_card_names_the_family(cli: Cli, work: Path, name: str, said: tuple[str, ...]) -> None:
    assert cli("export", "--model", name, "--to", "tinyfusion", "--out", "card").code == 0
    card = Path("card/README.md").read_text()
    assert all(part in card for part in said), card
    assert "diffusers" not in card and "(DiT)" not in card and "non-commercial" not in card
    assert "tinyfusion.open_model(" in card


def test_the_library_saves_with_a_card(work: Path) -> None:
    model = open_model("student")
    save_pretrained(model, Path("saved"))
    assert {path.name for path in Path("saved").iterdir()} == {"model.json", "model.safetensors", CARD, "plan.png"}
    assert open_model("saved").hash() == model.hash() and "# saved" in Path("saved/README.md").read_text()


def test_the_library_pushes_what_it_saves(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def taken(folder: Path, repository: str) -> str:
        seen.update(files={path.name for path in folder.iterdir()}, hash=open_model(folder).hash(), to=repository)
        seen["card"] = (folder / CARD).read_text()
        return f"https://hub.invalid/{repository}"

    monkeypatch.setattr("tinyfusion.export.folder.upload_folder", taken)
    model = open_model("student")
    assert push_to_hub(model, "someone/student") == "https://hub.invalid/someone/student"
    assert seen["files"] == {"model.json", "model.safetensors", CARD, "plan.png"}
    assert (seen["hash"], seen["to"]) == (model.hash(), "someone/student")
    assert "# someone/student" in str(seen["card"])
    assert not Path("someone").exists(), "nothing stays here"


FAST = "--set {0}.batch_size=4 --set {0}.ema_decay=0.5"
SIZES = "--set model.family=dit --set model.hidden_size=32 --set model.depth=4"
OWN = f"train --data images.npz --steps 2 {SIZES} --out own {FAST.format('train')}"


def run_words(cli: Cli, command: str) -> None:
    outcome = cli(*shlex.split(command))
    assert outcome.code == 0, outcome.err


def card_of(cli: Cli, model: str) -> str:
    run_words(cli, f"export --model {model} --to tinyfusion --out cards/{model}")
    return Path("cards", model, CARD).read_text()


def test_a_card_says_how_the_model_was_made(cli: Cli, work: Path) -> None:
    """Trained from nothing on one's own pictures, cut, recovered: no licence of others, and every step in order."""
    run_words(cli, OWN)
    run_words(cli, "prune --teacher own --keep 0,2 --out cut")
    run_words(cli, f"recover --student cut --steps 3 --out back {FAST.format('recover.training')}")
    own, cut, back = (card_of(cli, name) for name in ("own", "cut", "back"))
    for card in (own, cut, back):
        assert "trained from nothing, and no licence is recorded" in card
        assert "non-commercial" not in card and "CC-BY" not in card and "origin is unknown" not in card
        assert "1. Trained from nothing on 8 images drawn from `images.npz`." in card
    assert "2. Pruned by the criterion `indices`." in cut and "The pruning alone:" in cut
    assert (
        "2. Pruned by the criterion `indices`.\n3. Recovered by `masked-kd` on 12 images drawn from `images.npz`."
        in back
    )
    assert "The pruning, without what followed it:" in back and "The pruning alone" not in back
    run_words(cli, "export --model back/student --to official --out back.pt")
    answer = json.loads(Path("back.json").read_text())
    assert "trained from nothing" in answer["license_note"] and len(answer["history"]) == 3


def test_a_card_does_not_guess_what_no_record_tells(cli: Cli, work: Path) -> None:
    card = card_of(cli, "student")
    assert "The pruning (whether anything followed it is not recorded):" in card and "their origin is unknown" in card
    run_words(cli, OWN)
    run_words(cli, "prune --teacher own --keep 0,2 --out cut")
    shutil.copytree("cut/student", "moved")
    card = card_of(cli, "moved")
    assert "trained from nothing, and no licence" in card, "by its lineage"
    assert "not recorded" in card and "1. " not in card
    save_model(tiny(7), work / "own" / "model")
    card = card_of(cli, "cut")
    assert "1. Pruned by the criterion `indices`." in card, "the teacher there is another one now"


# -------------------------------------------------------------------------------------------------------------- pipeline

NAMES = [f"name {i}, other {i}" for i in range(1000)]


def latent_model(work: Path, vae: str) -> None:
    """`latent`, whose null class is that of DiTPipeline, and a folder `vae` with the form of an autoencoder."""
    model = tiny(in_channels=4, num_classes=1000)
    model.facts = dataclasses.replace(model.facts, latent_scale=0.18215, vae=vae)
    save_model(model, work / "latent")
    (work / "vae").mkdir()
    config = {"_class_name": "AutoencoderKL", "latent_channels": 4, "scaling_factor": 0.18215}
    (work / "vae" / "config.json").write_text(json.dumps(config))
    (work / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")


def index_of(folder: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((Path(folder) / "model_index.json").read_text())
    return found


def test_names_of_classes_go_from_pipeline_to_pipeline(cli: Cli, work: Path) -> None:
    latent_model(work, "vae")
    (work / "names.txt").write_text("\n".join(NAMES))
    command = ("export", "--to", "diffusers", "--pipeline", "--vae", "vae")
    assert cli(*command, "--model", "latent", "--out", "plain").code == 0
    assert "id2label" not in index_of("plain"), "where no names are known, none are made up"
    assert cli(*command, "--model", "latent", "--labels", "names.txt", "--out", "named").code == 0
    wanted = {str(i): name for i, name in enumerate(NAMES)}
    assert index_of("named")["id2label"] == wanted
    assert cli(*command, "--model", "named", "--out", "again").code == 0
    assert index_of("again")["id2label"] == wanted, "kept, as the source has them"
    assert cli(*command, "--model", "latent", "--labels", "named/model_index.json", "--out", "third").code == 0
    assert index_of("third")["id2label"] == wanted


def test_names_that_are_not_those_of_the_classes(cli: Cli, work: Path) -> None:
    latent_model(work, "vae")
    (work / "few.txt").write_text("\n".join(NAMES[:3]))
    (work / "odd.json").write_text(json.dumps({"id2label": {str(i): "" for i in range(1000)}}))
    command = ("export", "--model", "latent", "--to", "diffusers", "--out", "never")
    assert "add --pipeline" in cli(*command, "--labels", "few.txt").err
    for file, wanted in {
        "few.txt": "it names 3 classes",
        "odd.json": "a name for each",
        "none.txt": "a name per line",
    }.items():
        refused = cli(*command, "--pipeline", "--vae", "vae", "--labels", file)
        assert refused.code == 2 and wanted in refused.err, refused.err
    assert not Path("never").exists()


def test_a_dry_run_of_a_pipeline_fetches_no_autoencoder(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latent_model(work, "someone/vae")
    monkeypatch.setattr(exporting, "autoencoder_folder", lambda name: pytest.fail(f"{name} was fetched"))
    dry = cli("export", "--model", "latent", "--to", "diffusers", "--pipeline", "--out", "d", "--dry-run")
    assert dry.code == 0 and "someone/vae is taken from the hub" in dry.err
    assert not Path("d").exists()


def test_an_official_file_has_its_licence_beside(cli: Cli, work: Path) -> None:
    model = open_model("teacher")
    model.facts = dataclasses.replace(model.facts, license="CC-BY-NC-4.0")
    save_model(model, work / "licensed")
    for source in ("licensed", "teacher"):
        assert cli("export", "--model", source, "--to", "official", "--out", f"{source}.pt").code == 0
    answer = json.loads(Path("licensed.json").read_text())
    assert answer["license"] == "CC-BY-NC-4.0" and "non-commercial" in answer["license_note"]
    assert "name no licence" in json.loads(Path("teacher.json").read_text())["license_note"]


def test_the_picture_shows_the_plan() -> None:
    some, other = (plan_png({"blocks": kept}, {"blocks": 28}) for kept in ([0, 2], [0, 3]))
    assert some == plan_png({"blocks": [0, 2]}, {"blocks": 28}) != other


def test_known_weights_are_opened_by_name(cli: Cli, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(work))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(work / "cache"))
    (work / ".config" / "tinyfusion").mkdir(parents=True)
    table = '[mine]\naddress = "https://example.invalid/good.pt"\nlicense = "CC-BY-NC-4.0"\n'
    (work / ".config" / "tinyfusion" / "weights.toml").write_text(table)
    (work / "cache" / "tinyfusion" / "mine").mkdir(parents=True)
    (work / "cache" / "tinyfusion" / "mine" / "good.pt").write_bytes((work / "good.pt").read_bytes())
    facts = cli("inspect", "mine", "--num-heads", "2", "--json").last_json
    assert facts["hash"] == open_model("teacher").hash() and facts["license"] == "CC-BY-NC-4.0"
    assert facts["origin"]["name"] == "mine" and facts["origin"]["address"] == "https://example.invalid/good.pt"
    assert facts["origin"]["kind"].startswith("official state dict of a training checkpoint")
    cut = ("prune", "--teacher", "mine", "--num-heads", "2", "--keep", "1,2", "--out", "cut")
    assert cli(*cut).code == 0
    assert open_model("cut").facts.license == "CC-BY-NC-4.0", "students keep their parent's licence"


def test_a_model_of_published_sizes_says_latents(cli: Cli, work: Path) -> None:
    save_model(tiny(in_channels=4), work / "latent")
    assert cli("export", "--model", "latent", "--to", "official", "--out", "l.safetensors").code == 0
    facts = cli("inspect", "l.safetensors", "--num-heads", "2", "--json").last_json
    assert (facts["image_size"], facts["latent_scale"], facts["vae"]) == (64, 0.18215, "stabilityai/sd-vae-ft-ema")
