"""Drawing in few steps by pipelines of diffusers: which noise levels N steps have there, and how guidance is off.

A pipeline that is called with N steps and sigmas 1, (N - 1)/N, ..., 1/N gives these to its scheduler, which shifts them; without
sigmas the scheduler of Stable Diffusion 3 would go down to its smallest level first, and waste the last step.
Sources: the pipelines and FlowMatchEulerDiscreteScheduler of diffusers 0.42; `tests/families/test_few_step_pipelines.py` compares every
row with what the pipeline itself does.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from tinyfusion.config.loading import build_known
from tinyfusion.core.errors import UserError
from tinyfusion.families.diffusers_classes.schedules import EULER
from tinyfusion.processes.base import FoldedGuidance
from tinyfusion.processes.noising import FewSteps, even_levels

_SIZES = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")  # of a scheduler with dynamic shift


@dataclass(frozen=True)
class Drawn:
    """What a dynamic shift depends on. shape: (C, ..., h, w) of the latents. tokens: of one image."""

    shape: tuple[int, ...]
    tokens: int
    num_steps: int


# (functions of the pipeline's module, settings of its scheduler, what is drawn) -> mu
Mu = Callable[[Any, Mapping[str, Any], Drawn], float]


def _by_tokens(module: Any, scheduler: Mapping[str, Any], drawn: Drawn) -> float:
    return float(module.calculate_shift(drawn.tokens, *(scheduler[name] for name in _SIZES)))


def _by_channels(module: Any, scheduler: Mapping[str, Any], drawn: Drawn) -> float:
    """Lumina 2 takes the channels of its latents for their number of tokens."""
    return float(module.calculate_shift(drawn.shape[0], *(scheduler[name] for name in _SIZES)))


def _empirical(module: Any, _scheduler: Mapping[str, Any], drawn: Drawn) -> float:
    return float(module.compute_empirical_mu(image_seq_len=drawn.tokens, num_steps=drawn.num_steps))


@dataclass(frozen=True)
class StepPipeline:
    """How a pipeline draws in N steps.

    mu: of a scheduler with dynamic shift; None: the pipeline gives it none. guidance: the argument of classifier-free guidance, None
    where it has none, with `off` for none at all: a prediction is null + (1 + argument - off) (text - null). embeds: whether
    `guidance_scale` is the input of networks that take guidance. takes_sigmas: else it makes 1, ..., 1/N by itself.
    """

    mu: Mu | None = None
    guidance: str | None = "guidance_scale"
    off: float = 1.0
    embeds: bool = False
    takes_sigmas: bool = True


_TRUE: dict[str, Any] = {"guidance": "true_cfg_scale", "embeds": True}

STEP_PIPELINES: Mapping[str, StepPipeline] = MappingProxyType(
    {
        "AuraFlowPipeline": StepPipeline(),
        "ErnieImagePipeline": StepPipeline(takes_sigmas=False),
        "Flux2KleinPipeline": StepPipeline(_empirical),
        "Flux2Pipeline": StepPipeline(_empirical, guidance=None, embeds=True),
        "FluxPipeline": StepPipeline(_by_tokens, **_TRUE),
        "HiDreamImagePipeline": StepPipeline(),
        "HunyuanVideoPipeline": StepPipeline(**_TRUE),
        "Krea2Pipeline": StepPipeline(_by_tokens, off=0.0),
        "LTXPipeline": StepPipeline(_by_tokens, takes_sigmas=False),
        "LongCatImagePipeline": StepPipeline(_by_tokens),
        "Lumina2Pipeline": StepPipeline(_by_channels),
        "OvisImagePipeline": StepPipeline(_by_tokens),
        "QwenImagePipeline": StepPipeline(_by_tokens, **_TRUE),
        "SanaPipeline": StepPipeline(),
        "SanaVideoPipeline": StepPipeline(),
        "StableDiffusion3Pipeline": StepPipeline(_by_tokens),
        "ZImagePipeline": StepPipeline(_by_tokens, off=0.0),
    }
)

# pipelines of other processes and noise levels that have classifier-free guidance above a `guidance_scale` of 1
GUIDED_PIPELINES = frozenset(
    f"{name}Pipeline"
    for name in (
        "Allegro", "Bria", "Chroma", "CogVideoX", "CogView3Plus", "CogView4", "EasyAnimate", "HunyuanDiT", "Latte", "Lumina", "Mochi",
        "PixArtAlpha", "PixArtSigma", "SkyReelsV2", "Wan",
    )
)  # fmt: skip

_REASONS: Mapping[str, str] = MappingProxyType(
    {
        "BriaPipeline": "it chooses its noise levels by itself",
        "CogView4Pipeline": "the times that it gives its network are not its noise levels",
        "PRXPipeline": "it takes no sigmas, and its last step would be wasted",
        "SkyReelsV2Pipeline": "it takes no sigmas",
        "WanPipeline": "it takes no sigmas",
    }
)


def step_pipeline(kind: Any, index: Mapping[str, Any], scheduler: Mapping[str, Any]) -> StepPipeline:
    """The row of a pipeline class. index, scheduler: model_index.json and scheduler_config.json of its folder.

    Raises UserError on a pipeline whose noise levels are not known, on another scheduler, and on models of few steps.
    """
    name = kind.__name__
    if name not in STEP_PIPELINES:
        reason = _REASONS.get(name, "at which noise levels it draws few steps is not known")
        raise UserError(f"a {name} draws no student of few steps: {reason}; wanted {', '.join(STEP_PIPELINES)}")
    if index.get("is_distilled"):
        raise UserError(f"this {name} is of a model of few steps already (is_distilled in its model_index.json)")
    found = scheduler.get("_class_name")
    if found != EULER:
        raise UserError(
            f"the scheduler of this {name} is {found}, and a student of few steps goes on along its own prediction: give a pipeline "
            f"with {EULER}"
        )
    row = STEP_PIPELINES[name]
    if scheduler.get("use_dynamic_shifting") and row.mu is None:
        raise UserError(f"a {name} gives its scheduler no dynamic shift, and scheduler_config.json wants one")
    return row


def guidance_off(kind: Any) -> dict[str, float]:
    """The argument of a pipeline class with which it runs without classifier-free guidance. Raises UserError where none is known."""
    name = kind.__name__
    row = STEP_PIPELINES.get(name, StepPipeline(guidance="guidance_scale" if name in GUIDED_PIPELINES else None))
    if row.guidance is None:
        known = sorted({name for name, row in STEP_PIPELINES.items() if row.guidance} | GUIDED_PIPELINES)
        raise UserError(
            f"a {name} has no classifier-free guidance that is known here, to be folded in; wanted {', '.join(known)}"
        )
    return {row.guidance: row.off}


def step_levels(kind: Any, scheduler: Mapping[str, Any], drawn: Drawn) -> tuple[float, ...]:
    """The noise levels of N steps, as the pipeline's own scheduler makes them. Raises UserError where it refuses, or they do not fall."""
    import diffusers  # late: it takes seconds

    euler: Any = diffusers.FlowMatchEulerDiscreteScheduler
    try:
        made = euler.from_config(dict(scheduler))
        rule, dynamic = STEP_PIPELINES[kind.__name__].mu, made.config.use_dynamic_shifting
        mu = rule(sys.modules[kind.__module__], made.config, drawn) if dynamic and rule else None
        made.set_timesteps(sigmas=even_levels(drawn.num_steps), mu=mu)
        levels = tuple(float(sigma) for sigma in made.sigmas[:-1])
        FewSteps("", levels, 1.0, fresh_noise=False)
    except (ValueError, TypeError, ArithmeticError, ImportError) as error:
        raise UserError(
            f"scheduler_config.json gives no noise levels for {drawn.num_steps:,} steps: {error}"
        ) from error
    return levels


# --------------------------------------------------------------------------------------------------------------- record


@dataclass(frozen=True)
class FewStepDrawing:
    """How a pipeline of diffusers draws with a student of few steps. arguments: of its call, besides prompt and size."""

    key: ClassVar[str] = "few_steps"  # of the record
    steps: FewSteps
    arguments: Mapping[str, Any]

    @classmethod
    def of(cls, steps: FewSteps, row: StepPipeline, embedded: bool) -> FewStepDrawing:
        """embedded: whether guidance is an input of the network, which then gets that of `steps`."""
        arguments: dict[str, Any] = {"num_inference_steps": len(steps.levels)}
        arguments |= {"sigmas": list(even_levels(len(steps.levels)))} if row.takes_sigmas else {}
        arguments |= {row.guidance: row.off} if row.guidance is not None else {}
        return cls(steps, arguments | ({"guidance_scale": steps.guidance} if embedded else {}))

    def to_json(self) -> dict[str, Any]:
        """The record in config.json."""
        return {**dataclasses.asdict(self.steps), "arguments": dict(self.arguments)}

    def of_steps(self, num_steps: int) -> dict[str, Any]:
        """The arguments with another number of steps, for timing."""
        changed = {"num_inference_steps": num_steps, "sigmas": list(even_levels(num_steps))}
        return {name: changed.get(name, value) for name, value in self.arguments.items()}


@dataclass(frozen=True)
class FoldedDrawing:
    """How a pipeline of diffusers draws with a student of folded guidance. arguments: of its call, which turn guidance off."""

    key: ClassVar[str] = "folded_guidance"  # of the record
    guidance: FoldedGuidance
    arguments: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """The record in config.json."""
        return {**dataclasses.asdict(self.guidance), "arguments": dict(self.arguments)}


def folded_drawing(record: Any) -> FoldedDrawing:
    """The inverse of `to_json`. Raises ValueError on what it does not write."""
    guidance: FoldedGuidance = build_known(FoldedGuidance, record, "folded_guidance")
    given = record.get("arguments")
    if not isinstance(given, dict) or len(given) != 1 or not {*given} <= {"guidance_scale", "true_cfg_scale"}:
        raise ValueError(f"folded_guidance.arguments are guidance_scale or true_cfg_scale; got {given!r:.100}")
    if not all(type(scale) in (int, float) and 0 <= scale <= 1 for scale in given.values()):
        raise ValueError(f"folded_guidance.arguments turn guidance off, by 0 or 1; got {given!r:.100}")
    return FoldedDrawing(guidance, given)


def few_step_drawing(record: Any) -> FewStepDrawing:
    """The inverse of `to_json`. Raises ValueError on what it does not write."""
    steps: FewSteps = build_known(FewSteps, record, "few_steps")
    given, num = record.get("arguments"), len(steps.levels)
    known = {"num_inference_steps", "sigmas", "guidance_scale", "true_cfg_scale"}
    if not isinstance(given, dict) or not {"num_inference_steps"} <= set(given) <= known:
        raise ValueError(f"few_steps.arguments are of {', '.join(sorted(known))}; got {given!r:.100}")
    scales = [value for name, value in given.items() if name.endswith("_scale")]
    if not all(type(scale) in (int, float) and math.isfinite(scale) for scale in scales):
        raise ValueError(f"few_steps.arguments have scales that are no numbers: {scales!r:.100}")
    if given["num_inference_steps"] != num or given.get("sigmas", list(even_levels(num))) != list(even_levels(num)):
        raise ValueError(f"few_steps.arguments are not of {num} even steps")
    return FewStepDrawing(steps, given)
