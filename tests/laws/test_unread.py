"""Every field has verbs that read it; an option that a command does not read is refused, and a field of --set remarked on."""

from __future__ import annotations

import ast
import dataclasses
import shlex
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import tinyfusion
from tinyfusion.config.loading import load_recipe, recipe_fields, shipped_recipes
from tinyfusion.config.recipe import Recipe
from tinyfusion.config.unread import DATA_FREE, EVEN, ROWS, VERBS_OF, Asked, ModelKind, check_typed
from tinyfusion.core.errors import UserError
from tinyfusion.options import VERBS
from tinyfusion.parsing import overrides, parse, typed
from tinyfusion.processes.integrate import EVEN_METHODS
from tinyfusion.prune.criteria import CRITERIA

DIT, SIT, MAR = ModelKind("gaussian"), ModelKind("flow", of_latents=True), ModelKind("masked", null_class=False)
FEW, FLUX = ModelKind("gaussian", few_steps=True), ModelKind(None)
FIELDS = [path for path, _, _ in recipe_fields(Recipe())]
TEXTS_ALONE = {"name", "description", "minutes", "machine"}  # of a recipe, for people
RULE = "prune --teacher digits --out x --criterion uniform"
CUT = "recover --student cut --out x"
WHOLE = "recover --teacher digits --search-share 0.1 --out x"
RUN = "run --recipe digits --out x"
DISTILL = "distill-steps --model m --out x"
SAMPLE = "sample --model m --out x.npz"
BENCH = "bench m"


def checked(command: str, *models: ModelKind) -> list[str]:
    """The remarks on a command, first without its models, then with them."""
    verb, options = parse(shlex.split(command))
    recipe = load_recipe(options.recipe, options.set, overrides(verb, options))
    recipe = dataclasses.replace(recipe, typed=typed(verb, options))
    recipe, remarks = check_typed(Asked(verb, recipe, vars(options)))
    return remarks + (check_typed(Asked(verb, recipe), models)[1] if models else [])


def patterns(fields: str) -> list[str]:
    return [name for name in FIELDS if any(fnmatchcase(name, pattern) for pattern in fields.split())]


def test_every_field_has_verbs_that_read_it() -> None:
    known = {name for fields in VERBS_OF for name in patterns(fields)}
    assert set(FIELDS) - known == TEXTS_ALONE


def test_every_pattern_is_of_a_field_or_an_option() -> None:
    options = {option.typed for verb in VERBS.values() for option in verb.options if not option.fields}
    for fields in [*VERBS_OF, *(row.fields for row in ROWS)]:
        for pattern in fields.split():
            assert pattern in options or patterns(pattern), pattern
    for verbs in [*VERBS_OF.values(), *(row.verbs for row in ROWS)]:
        assert set(verbs.split()) <= set(VERBS)


def test_every_field_is_read_somewhere() -> None:
    """By its name, outside of the configuration; shares of a section that is handed on whole are read in it."""
    folder = Path(tinyfusion.__file__).parent
    files = [path for path in folder.rglob("*.py") if "config" not in path.parts or path.name.endswith("_sections.py")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {name for name in FIELDS if name.rpartition(".")[2] not in read} <= TEXTS_ALONE


def test_the_names_of_criteria_and_methods_are_those_of_the_code() -> None:
    free = {name for name, criterion in CRITERIA.items() if criterion.evaluations is None}
    assert set(DATA_FREE) == free and set(EVEN) == set(EVEN_METHODS)


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_fields_of_a_file_are_not_looked_at(name: str) -> None:
    for verb, arguments in (("prune", "--criterion uniform"), ("recover", "--student cut"), ("sample", "--model m")):
        out = "x.npz" if verb == "sample" else "x"
        assert checked(f"{verb} --recipe {name} {arguments} --out {out}", DIT, FLUX) == []


UNREAD: list[tuple[str, str, tuple[ModelKind, ...]]] = [
    (f"{CUT} --method finetune --teacher nonexistent", "--teacher is for methods with a teacher, not finetune", ()),
    (f"{CUT} --scheme 1:2", "--scheme is for a search within the recovery, and --student is pruned already", ()),
    (f"{CUT} --search-share 0.1", "--search-share is for whole models", ()),
    (f"{CUT} --set destination=diffusers", "destination is for a search within the recovery", ()),
    (f"{CUT} --inputs calls --method logits-kd --teacher m", "--teacher is for methods with a teacher: --inputs has its outputs", ()),
    (f"{CUT} --inputs calls --method logits-kd --data digits", "--data is for data, and --inputs takes their place", ()),
    *((f"{WHOLE} --set prune.{setting}", f"prune.{setting.partition('=')[0]} is for {reader}", ()) for setting, reader in (
        ("criterion=bi", "`prune`"), ("target=teacher", "masks that are learned before"), ("update=frozen", "masks that are"),
        ("keep=0,1", "`prune`"), ("bi_inputs=clean", "`prune`"))),
    ("prune --teacher digits --out x --set prune.budgets=blocks=3", "prune.budgets is for other criteria", ()),
    (f"{RULE} --set prune.budgets=blocks=3", "prune.budgets is for transformers of diffusers", (DIT,)),
    (f"{RULE} --resume nowhere", "--resume is for criterion learned, which trains, not uniform", ()),
    (f"{RULE} --report-to tensorboard", "--report-to is for criterion learned", ()),
    *((f"{RULE} --set prune.{setting}", f"prune.{setting.partition('=')[0]} is for criterion learned, not uniform", ()) for setting in (
        "scheme=1:2", "update=full", "training.steps=3", "keep_deltas=true", "storage=nf4", "distribution=runs")),
    (f"{RULE} --scheme 1:2", "--scheme is for criterion learned, not uniform: leave it out", ()),
    (f"{RULE} --set watch.fid_every_steps=5", "watch.fid_every_steps is not read by `prune`", ()),
    (f"{RULE} --set prune.bi_inputs=clean", "prune.bi_inputs is for criterion bi, not uniform", ()),
    (f"{RULE} --set recover.alpha_kd=0.5", "recover.alpha_kd is not read by `prune`, but by recover, run", ()),
    (f"{CUT} --method finetune --set recover.alpha_kd=0.5", "recover.alpha_kd is for methods with a teacher", ()),
    (f"{CUT} --method rep-kd --set recover.mask_sigmas=3", "recover.mask_sigmas is for method masked-kd", ()),
    (f"{CUT} --method logits-kd --set recover.beta=1,0", "recover.beta is for rep-kd and masked-kd", ()),
    (f"{WHOLE} --set recover.beta=1,0", "recover.beta is for rep-kd and masked-kd", ()),
    (f"{CUT} --set recover.lora_rank=4", "recover.lora_rank is for recover.update=lora", ()),
    (f"{RUN} --set recover.search_share=none --set recover.search_confidence=0.5", "recover.search_confidence is for searches within", ()),
    (f"{RUN} --set recover.search_trial_rate=0.5", "recover.search_trial_rate is for recover.search_candidates above 1", ()),
    (f"{RUN} --set dynamic.target=0.5", "dynamic.target is for a run that trains routers", ()),
    (f"{RUN} --set pipeline.height=64", "pipeline.height is for transformers of diffusers", (DIT,)),
    (f"{RUN} --set sample.num_steps=5", "sample.num_steps is for models of families", (FLUX,)),
    *((f"{BENCH} --set {setting}", f"{setting.partition('=')[0]} is", ()) for setting in (
        "sample.dtype=bfloat16", "sample.compile=true", "sample.quantize=int8", "pipeline.num_steps=4")),
    *((f"demo m --out x --set {setting}", f"{setting.partition('=')[0]} is not read by `demo`", ()) for setting in (
        "sample.num_steps=7", "sample.sampler=unipc", "sample.guidance_channels=all")),
    *((f"explain m --out x --set {setting}", f"{setting.partition('=')[0]} is", ()) for setting in (
        "sample.num_images=3", "sample.compile=true", "sample.label_rule=balanced")),
    ("explain m --out x --drawn 0 --guidance 2", "--guidance is for drawn images (explain.drawn is 0)", ()),
    (f"{SAMPLE} --set sample.eta=0.5", "sample.eta is for --sampler ddim", (DIT,)),
    (f"{SAMPLE} --set sample.flow.method=euler", "sample.flow.method is for flows", (DIT,)),
    (f"{SAMPLE} --set sample.masked.head_steps=4", "sample.masked.head_steps is for masked models", (SIT,)),
    (f"{SAMPLE} --set sample.flow.last_step=euler", "sample.flow.last_step is for --sampler sde", (SIT,)),
    (f"{SAMPLE} --set sample.latent_scale=3", "sample.latent_scale is for models of latents, and this model draws pixels", (DIT,)),
    (f"{SAMPLE} --labels 3 --set sample.label_rule=balanced", "sample.label_rule is for sampling without --labels", ()),
    (f"{SAMPLE} --set compute.gradient_checkpointing=true --set data.flip=0.5", "data.flip is not read by `sample`", ()),
    (f"{SAMPLE} --num-steps 9", "--num-steps is for models of many steps", (FEW,)),
    (f"{SAMPLE} --prompts texts.txt --set sample.eta=0.5", "sample.eta is for models of families, and --prompts names texts", ()),
    (f"{DISTILL} --method consistency --set distill_steps.within=0.1,0.5", "distill_steps.within is for method matching", ()),
    (f"{DISTILL} --method consistency --set distill_steps.critic_learning_rate=1", "is for method matching", ()),
    (f"{DISTILL} --method matching --set distill_steps.teacher_steps=9", "distill_steps.teacher_steps is for method consistency", ()),
    ("train --out x --set model.depth=4", "model.depth is for models of families", (FLUX,)),
    ("train --out x --set flow.shift=2", "flow.shift is for models whose process is a flow", (DIT,)),
    ("train --out x --set train.label_drop=0.2", "train.label_drop is for models with a class for no label", (MAR,)),
    ("train --out x --set sample.num_steps=9", "sample.num_steps is for previews (section watch)", ()),
    ("export --model m --to diffusers --out x --set sample.guidance=2", "sample.guidance is for --to onnx", ()),
    ("replay runs/x --step 0 --seed 3", "--seed is not read by `replay`, but by", ()),
    ("report runs/x --out x.html --recipe digits", "--recipe is not read by `report`", ()),
]  # fmt: skip


@pytest.mark.parametrize(("command", "message", "models"), UNREAD, ids=[command for command, _, _ in UNREAD])
def test_options_are_refused_and_settings_remarked_on(
    command: str, message: str, models: tuple[ModelKind, ...]
) -> None:
    if message.startswith("--"):
        with pytest.raises(UserError) as caught:
            checked(command, *models)
        assert message in str(caught.value) and str(caught.value).endswith(": leave it out")
    else:
        remarks = [remark for remark in checked(command, *models) if message in remark]
        assert len(remarks) == 1 and remarks[0].endswith("; it is left out")


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (f"{RULE} --gradient-checkpointing", "--gradient-checkpointing"),
        (f"{RULE} --compile", "--compile"),
        (f"{SAMPLE} --set compute.compile=true", "compute.compile"),
        ("train --out x --set sample.batch_size=3", "sample.batch_size"),
    ],
)
def test_remarked_on(command: str, name: str) -> None:
    (remark,) = checked(command)
    assert remark.startswith(f"{name} is ") and remark.endswith("; it is left out")


@pytest.mark.parametrize(
    ("command", "models"),
    [
        (f"{RUN} --checkpointing-steps 5", (DIT,)),  # of both trainings
        (f"{RUN} --set prune.criterion=uniform --checkpointing-steps 5", (DIT,)),  # of the recovery alone
        (f"{BENCH} --guidance 2 --vs few", (DIT, FEW)),  # one of the models reads it
        (f"{SAMPLE} --num-steps 9 --guidance 2 --dtype bfloat16 --batch-size 3", (DIT,)),
        (f"{SAMPLE} --prompts texts.txt --num-steps 9 --guidance 2", ()),
        (f"{RULE} --set watch.fid_every_steps=0 --set prune.keep_deltas=false", (DIT,)),  # off, and stays so
        (f"{WHOLE} --scheme 1:2 --set prune.criterion=learned --set prune.temperature=3,1", (DIT,)),
        ("train --out x --set model.sizes.expansion=4 --set watch.grid_every_steps=5 --set sample.num_steps=9", (DIT,)),
    ],
)
def test_read(command: str, models: tuple[ModelKind, ...]) -> None:
    assert checked(command, *models) == []
