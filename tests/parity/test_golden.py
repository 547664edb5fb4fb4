"""Every golden tensor against ours: max|ours - theirs| <= 1e-5 max|theirs|, gradients and Inception features 1e-4.

A subject (dit, gate, kd, metrics, inception) is SUBJECT.json, SUBJECT_golden.safetensors and its weights; those of
inception are drawn again by the rule in its JSON. Every tensor of the file
is one test, and `RULES` says how ours is computed for its name. Names of `INPUTS` (images, noise, labels, ...) are not
compared; their test fails unless some rule of the subject reads them. A name without a rule fails. Sizes, groups and
pairs come from the files alone, so `--golden DIR` runs the same on any other set.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tinyfusion.blocks.scheme import consecutive_groups
from tinyfusion.conditioning.classes import class_condition
from tinyfusion.evaluate.features import Features
from tinyfusion.evaluate.inception import InceptionFeatures, inception_from_state
from tinyfusion.evaluate.metrics import feature_moments, frechet_distance, inception_score, precision_recall
from tinyfusion.models.checkpoint import LoadedModel, open_model
from tinyfusion.processes.base import Batch, NoisyBatch, Objective
from tinyfusion.processes.gaussian import GaussianObjective, Schedule, sample_ancestral, sample_ddim
from tinyfusion.prune.gates import CategoricalGates
from tinyfusion.prune.layout import gate_layout
from tinyfusion.prune.learn import GatedObjective
from tinyfusion.recover.distill import DistilledObjective
from tinyfusion.sample.drive import guided

SUBJECTS = ("dit", "gate", "kd", "metrics", "inception")
TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
TOLERANCES = {"inception": 1e-4}  # of a subject, where it has its own
MASK_SIGMAS = 2.0  # fixed by the layout of `kd`, as is the `own` rule


Rule = Callable[..., Any]  # (golden set, groups of the pattern...) -> our value


class GoldenSet:
    """One subject: tensors that remember whether they were read, configuration, weights, and our computations."""

    def __init__(self, folder: Path, subject: str) -> None:
        self.folder, self.subject = folder, subject
        self.tensors = load_file(folder / f"{subject}_golden.safetensors")
        self.config: dict[str, Any] = json.loads((folder / f"{subject}.json").read_text(encoding="utf-8"))
        self.read: set[str] = set()
        self.computed: dict[str, Tensor] = {}

    def get(self, name: str) -> Tensor:
        """A golden tensor; from now on it counts as read."""
        self.read.add(name)
        return self.tensors[name]

    def ours(self, name: str) -> Tensor | None:
        """Our value for a tensor, by the first rule that fits its name; None for an input."""
        if self.is_input(name):
            return None
        if name not in self.computed:
            found = self.rule(name)
            if found is None:
                raise LookupError(f"no rule reads {name!r} of {self.subject}_golden.safetensors")
            value = found[0](self, *found[1])
            self.computed[name] = value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))
        return self.computed[name]

    def is_input(self, name: str) -> bool:
        return re.fullmatch(INPUTS[self.subject], name) is not None

    def rule(self, name: str) -> tuple[Rule, tuple[str | None, ...]] | None:
        """The rule for a name, with what the pattern captured."""
        for pattern, rule in RULES[self.subject].items():
            if match := re.fullmatch(pattern, name):
                return rule, match.groups()
        return None

    def use_everything(self) -> None:
        """Apply every rule and read every expected value; names without a rule stay unread."""
        for name in self.tensors:
            if not self.is_input(name) and self.rule(name):
                self.ours(name)
                self.get(name)

    def model(self, file: str, config: str = "config", weights: str = "ema") -> LoadedModel:
        """A fresh model from a weight file; heads come from the JSON, everything else from the tensors."""
        return open_model(self.folder / file, weights=weights, num_heads=self.config[config]["num_heads"])

    def noisy(self, objective: GaussianObjective) -> NoisyBatch:
        """x as clean images, with the recorded noise, timesteps and labels."""
        x, t, y, noise = (self.get(name) for name in ("x", "t", "y", "noise"))
        return objective.noised(Batch(x, class_condition(y, int(y.max()) + 1)), t, noise)

    # Computations that several tensors share.

    @cached_property
    def dit(self) -> LoadedModel:
        return self.model("dit_weights.pt")

    @cached_property
    def forward(self) -> tuple[Tensor, list[Tensor]]:
        """Output, and the residual stream: before the first block, then after every block."""
        module, stack = self.dit.module, self.dit.stack
        entries: list[Tensor] = []
        handle = next(iter(stack)).register_forward_pre_hook(lambda _module, args: entries.append(args[0]))
        with torch.no_grad(), stack.tap(range(len(stack))) as outputs:
            out = module(self.get("x"), self.get("t"), self.get("y"))
        handle.remove()
        return out, entries + [outputs[i] for i in range(len(stack))]

    @cached_property
    def guided_halves(self) -> Tensor:
        """The doubled batch of the published wrapper: guided channels twice, the rest of each half its own."""
        half = len(self.get("cfg_x")) // 2
        x, t, y = (self.get(name) for name in ("cfg_x", "cfg_t", "cfg_y"))
        arch, family = self.dit.arch, self.dit.family
        channels = min(arch.in_channels, family.guided_channels or arch.in_channels)
        assert bool((y[half:] == arch.num_classes).all()), "the second half of cfg_y is the null label"
        scale = float(self.get("cfg_scale"))
        with torch.no_grad():
            first = guided(self.dit, class_condition(y[:half], arch.num_classes), scale, channels)(x[:half], t[:half])
            rest = self.dit.module(x[:half], t[:half], y[half:])[:, channels:]
        return torch.cat([first, torch.cat([first[:, :channels], rest], dim=1)])

    @cached_property
    def terms(self) -> dict[str, Tensor]:
        """Per-sample losses of the subject, and gradients of their mean as "gradient/PARAMETER"."""
        model, objective, noisy, parameters = SETUPS[self.subject](self)
        losses = objective.losses(model, noisy, objective.predict(model, noisy))
        losses["loss"].mean().backward()
        gradients = {f"gradient/{name}": p.grad for name, p in parameters.items() if p.grad is not None}
        return {name: value.detach() for name, value in {**losses, **gradients}.items()}

    @cached_property
    def gates(self) -> CategoricalGates:
        """Gates with the recorded logits."""
        gates = CategoricalGates(consecutive_groups(self.config["groups"]))
        with torch.no_grad():
            for index, logits in enumerate(gates.logits):
                logits.copy_(self.get(f"logits_{index}").view_as(logits))
        return gates

    @cached_property
    def inception(self) -> InceptionFeatures:
        """The network with the weights of the rule: key i of the list from a generator of its own."""
        drawn = {}
        for i, (name, shape) in enumerate(self.config["tensors"]):
            z = np.random.RandomState(self.config["seed"] * 100000 + i).standard_normal(shape)
            if name.endswith("running_var"):
                z = 1 + 0.1 * np.abs(z)
            elif name.endswith("bn.weight"):
                z = 1 + 0.1 * z
            elif len(shape) in (2, 4):
                z = z * np.sqrt((2 if len(shape) == 4 else 1) / np.prod(shape[1:]))
            else:
                z = 0.1 * z
            drawn[name] = torch.from_numpy(z.astype(np.float32))
        return InceptionFeatures(inception_from_state(drawn), torch.device("cpu"))

    @cached_property
    def seen(self) -> dict[str, Features]:
        """Inception features of every set of images, by its name."""
        sets = [name.removesuffix("_images") for name in self.tensors if name.endswith("_images")]
        return {name: self.inception(self.get(f"{name}_images").permute(0, 2, 3, 1).numpy()) for name in sets}

    @property
    def gumbel(self) -> tuple[Tensor, ...]:
        return tuple(self.get(f"gumbel_{index}") for index in range(len(self.config["groups"])))


Setup = tuple[torch.nn.Module, Objective, NoisyBatch, dict[str, torch.nn.Parameter]]


def dit_setup(golden: GoldenSet) -> Setup:
    model = golden.model("dit_weights.pt")
    objective = GaussianObjective()
    return model.module, objective, golden.noisy(objective), dict(model.module.named_parameters())


def gate_setup(golden: GoldenSet) -> Setup:
    model = golden.model("gate_weights.pt")
    inner = GaussianObjective()
    tau, scaling = float(golden.get("tau")), float(golden.get("scaling"))
    schedules = (tau, tau), (scaling, scaling)
    gated = GatedObjective(inner, model.stack, golden.gates, *schedules, steps=1, layout=gate_layout(model))
    noisy = dataclasses.replace(golden.noisy(inner), gate_noise=golden.gumbel)
    parameters = {**dict(model.module.named_parameters()), **dict(golden.gates.named_parameters())}
    return model.module, gated, noisy, parameters


def kd_setup(golden: GoldenSet) -> Setup:
    teacher, student = golden.model("kd_teacher.pt", "teacher"), golden.model("kd_student.pt", "student")
    objective = GaussianObjective()
    beta = float(golden.get("beta"))
    pairs = [(int(s), int(t)) for s, t in golden.get("pairs")]
    distilled = DistilledObjective(
        objective, teacher.module, teacher.stack, student.stack, pairs, steps=1,
        alpha_kd=float(golden.get("alpha_kd")), beta=(beta, beta), sigmas=MASK_SIGMAS, mask="own",
    )  # fmt: skip
    return student.module, distilled, golden.noisy(objective), dict(student.module.named_parameters())


SETUPS: dict[str, Callable[[GoldenSet], Setup]] = {"dit": dit_setup, "gate": gate_setup, "kd": kd_setup}


def term(golden: GoldenSet, name: str) -> Tensor:
    return golden.terms[name]


def gradient(parameter: str) -> Callable[..., Tensor]:
    """Gradient of the parameter; a number captured from the tensor's name takes the place of {}."""
    return lambda golden, *index: golden.terms[f"gradient/{parameter.format(*index)}"]


def gradient_of_last_block(golden: GoldenSet) -> Tensor:
    return golden.terms[f"gradient/blocks.{golden.config['config']['depth'] - 1}.mlp.fc2.weight"]


def block_cosine(golden: GoldenSet) -> Tensor:
    stream = golden.forward[1]
    return torch.stack([torch.cosine_similarity(a, b, dim=-1).mean() for a, b in pairwise(stream)])


def ancestral(golden: GoldenSet, num_steps: str, clip: str | None) -> Tensor:
    noises, schedule = golden.get(f"ddpm{num_steps}{clip or ''}_noises"), Schedule(num_steps)
    return trajectory(golden, num_steps, lambda f, x: sample_ancestral(f, schedule, x, noises.__getitem__, bool(clip)))


def ddim(golden: GoldenSet, num_steps: str) -> Tensor:
    def no_noise(position: int) -> Tensor:
        raise AssertionError(f"DDIM with eta 0 draws nothing, but asked for noise {position}")

    return trajectory(golden, num_steps, lambda f, x: sample_ddim(f, Schedule(f"ddim{num_steps}"), x, no_noise))


@torch.no_grad()
def trajectory(golden: GoldenSet, num_steps: str, steps: Callable[..., Iterator[Tensor]]) -> Tensor:
    """The end of an unguided trajectory; DDIM starts where ancestral sampling does."""
    module, y = golden.dit.module, golden.get("y")
    made = list(steps(lambda x, t: module(x, t, y), golden.get(f"ddpm{num_steps}_init")))
    assert len(made) == int(num_steps)
    return made[-1]


@torch.no_grad()
def choice(golden: GoldenSet, index: str) -> Tensor:
    """One-hot over the candidates that the sampled gates equal."""
    gates = golden.gates.sample(golden.gumbel, float(golden.get("tau")), float(golden.get("scaling")))
    group = golden.gates.groups[int(index)]
    own = gates[:, group.start : group.start + group.size]
    return (own.unsqueeze(1) == golden.gates.candidates(int(index))).all(dim=-1).float()


def logits_gradient(golden: GoldenSet, index: str) -> Tensor:
    return golden.terms[f"gradient/logits.{index}"].view(1, -1)


def frechet(golden: GoldenSet, prefix: str | None) -> float:
    samples, reference = (feature_moments(golden.get(f"{prefix or ''}{name}").numpy()) for name in ("samples", "ref"))
    return frechet_distance(*samples, *reference)


def coverage(golden: GoldenSet, kind: str) -> float:
    precision, recall = precision_recall(golden.get("ref").numpy(), golden.get("samples").numpy(), k=3)
    return {"precision": precision, "recall": recall}[kind]


def inception(golden: GoldenSet) -> float:
    logits = golden.get("logits").numpy()
    return inception_score(logits, split_size=len(logits))


def spatial(golden: GoldenSet, name: str) -> Tensor:
    """Ours are channels last, in one row, as stored moments have them."""
    found = golden.seen[name].spatial
    assert found is not None
    return torch.from_numpy(found).unflatten(1, (17, 17, 7)).permute(0, 3, 1, 2)


RULES: dict[str, dict[str, Rule]] = {
    "dit": {
        r"out": lambda golden: golden.forward[0],
        r"block_outputs": lambda golden: torch.stack(golden.forward[1][1:]),
        r"block_cosine": block_cosine,
        r"cfg_out": lambda golden: golden.guided_halves,
        r"(loss|mse|vb)": term,
        r"betas": lambda golden: Schedule().betas,
        r"timesteps_(.*)": lambda golden, spacing: Schedule(spacing).timesteps,
        r"ddpm(\d+)(_clip)?_out": ancestral,
        r"ddim(\d+)_out": ddim,
        r"grad_block(\d+)_qkv": gradient("blocks.{}.attn.qkv.weight"),
        r"grad_label_table": gradient("y_embedder.embedding_table.weight"),
    },
    "gate": {
        r"options_(\d+)": lambda golden, index: golden.gates.candidates(int(index)),
        r"choice_(\d+)": choice,
        r"(loss|mse|vb)": term,
        r"logits_grad_(\d+)": logits_gradient,
        r"grad_block(\d+)_qkv": gradient("blocks.{}.attn.qkv.weight"),
        r"grad_last_fc2": gradient_of_last_block,
    },
    "kd": {
        r"(loss|gt|mse|vb|kd_loss|vb_kd|feat_loss)": term,
        r"grad_student_block(\d+)_qkv": gradient("blocks.{}.attn.qkv.weight"),
    },
    "metrics": {
        r"(lowrank_)?fid": frechet,
        r"inception_score": inception,
        r"(precision|recall)": coverage,
    },
    "inception": {
        r"(.*)_pool": lambda golden, name: golden.seen[name].pool,
        r"(.*)_logits_unbiased": lambda golden, name: golden.seen[name].logits,
        r"(.*)_spatial": spatial,
    },
}
# What a rule reads instead of giving: its test fails where no rule did.
INPUTS = {
    "dit": r"x|t|y|noise|cfg_(x|t|y|scale)|ddpm\d+_init|ddpm\d+(_clip)?_noises",
    "gate": r"x|t|y|noise|tau|scaling|logits_\d+|gumbel_\d+",
    "kd": r"x|t|y|noise|alpha_kd|beta|pairs",
    "metrics": r"logits|(lowrank_)?(samples|ref)",
    "inception": r".*_images",
}


_SETS: dict[tuple[Path, str], GoldenSet] = {}


def golden_set(config: pytest.Config, subject: str) -> GoldenSet:
    """The subject, loaded once per run; skips where the golden folder lacks it."""
    folder = Path(config.getoption("--golden"))
    if not tensor_file(folder, subject).is_file():
        pytest.skip(f"{folder} has no {tensor_file(folder, subject).name}")
    if (folder, subject) not in _SETS:
        _SETS[folder, subject] = GoldenSet(folder, subject)
    return _SETS[folder, subject]


def tensor_file(folder: Path, subject: str) -> Path:
    return folder / f"{subject}_golden.safetensors"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per tensor of every subject; one that is skipped where the folder lacks the subject."""
    if "tensor_name" not in metafunc.fixturenames:
        return
    folder = Path(metafunc.config.getoption("--golden"))
    cases: list[Any] = []
    for subject in SUBJECTS:
        if tensor_file(folder, subject).is_file():
            with safe_open(tensor_file(folder, subject), framework="pt") as file:
                cases += [pytest.param(subject, name, id=f"{subject}-{name}") for name in sorted(file.keys())]
        else:
            cases.append(pytest.param(subject, "", id=f"absent-{subject}"))
    metafunc.parametrize(("subject", "tensor_name"), cases)


def disagreement(ours: Tensor, theirs: Tensor) -> float:
    """max|ours - theirs| / max|theirs|; 0 where both are 0."""
    assert ours.shape == theirs.shape, f"ours is {tuple(ours.shape)}, theirs {tuple(theirs.shape)}"
    if ours.numel() == 0:
        return 0.0
    difference, largest = (ours.double() - theirs.double()).abs().max(), theirs.double().abs().max()
    return 0.0 if difference == 0 else float(difference / largest)


def test_tensor(pytestconfig: pytest.Config, subject: str, tensor_name: str) -> None:
    golden = golden_set(pytestconfig, subject)
    ours = golden.ours(tensor_name)
    if ours is None:
        golden.use_everything()
        assert tensor_name in golden.read, f"no rule of {subject} uses the input {tensor_name!r}"
        return
    tolerance = GRADIENT_TOLERANCE if "grad" in tensor_name else TOLERANCES.get(subject, TOLERANCE)
    assert disagreement(ours, golden.get(tensor_name)) <= tolerance


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_tensor_was_read(pytestconfig: pytest.Config, subject: str) -> None:
    golden = golden_set(pytestconfig, subject)
    golden.use_everything()
    assert sorted(set(golden.tensors) - golden.read) == []


@pytest.mark.parametrize(
    ("subject", "file", "config"),
    [
        ("dit", "dit_weights.pt", "config"),
        ("dit", "dit_training_checkpoint.pt", "config"),
        ("gate", "gate_weights.pt", "config"),
        ("kd", "kd_teacher.pt", "teacher"),
        ("kd", "kd_student.pt", "student"),
    ],
)
def test_weights_tell_every_size_but_the_heads(
    pytestconfig: pytest.Config, subject: str, file: str, config: str
) -> None:
    golden = golden_set(pytestconfig, subject)
    published = {"learn_sigma": True, "head_dim": None, "mlp_hidden": None, "frequency_shift": 0, "mlp_norm_eps": 1e-6,
                 "null_class": True}  # fmt: skip
    assert dataclasses.asdict(golden.model(file, config).arch) == {**golden.config[config], **published}


def test_training_checkpoint_has_averaged_and_raw_weights(pytestconfig: pytest.Config) -> None:
    golden = golden_set(pytestconfig, "dit")
    file = "dit_training_checkpoint.pt"
    raw, averaged = golden.model(file, weights="raw").module.state_dict(), golden.model(file).module.state_dict()
    plain = golden.dit.module.state_dict()
    assert raw.keys() == averaged.keys() == plain.keys()
    for name, value in plain.items():
        assert torch.equal(raw[name], value), name
        assert torch.equal(averaged[name], 0.5 * value), f"{name}: the average is half the weights, pos_embed included"


def test_a_tensor_without_a_rule_fails(pytestconfig: pytest.Config) -> None:
    golden = golden_set(pytestconfig, "dit")
    with pytest.raises(LookupError, match="out_of_tomorrow"):
        golden.ours("out_of_tomorrow")


@pytest.mark.parametrize(("spacing", "count"), [("", 1000), ("ddim50", 50), ("250", 250), ("100,50", 150)])
def test_timesteps_of_any_respacing_have_a_rule(pytestconfig: pytest.Config, spacing: str, count: int) -> None:
    found = golden_set(pytestconfig, "dit").rule(f"timesteps_{spacing}")
    assert found is not None
    rule, captured = found
    assert len(rule(None, *captured)) == count


def test_disagreement_is_relative_to_the_largest_magnitude() -> None:
    theirs = torch.tensor([2.0, -4.0])
    assert disagreement(theirs + torch.tensor([0.0, 0.4]), theirs) == pytest.approx(0.1)
    assert disagreement(torch.zeros(2), torch.zeros(2)) == 0.0
    assert not disagreement(torch.ones(2), torch.zeros(2)) <= TOLERANCE
    assert not disagreement(torch.tensor([float("nan"), 0.0]), theirs) <= TOLERANCE
