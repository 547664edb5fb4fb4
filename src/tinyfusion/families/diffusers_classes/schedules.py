"""Noise schedules of pipeline folders: what scheduler_config.json means for training, and the levels that a pipeline draws with.

A flow's noise level sigma is 0 at the data and 1 at noise. The pipeline chooses the levels before the shift, and mu where the shift
depends on the number of tokens; the scheduler shifts them. Both are needed to have the levels of a drawing.

Sources: the pipelines and schedulers of diffusers 0.42; Lin et al., arXiv 2305.08891 (zero terminal SNR).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from tinyfusion.core.errors import UserError
from tinyfusion.families.diffusers_classes.call_rows import call_of
from tinyfusion.processes.gaussian import NUM_TIMESTEPS, Predicted, Schedule
from tinyfusion.processes.time import shifted

_EULER, _MULTISTEP = "FlowMatchEulerDiscreteScheduler", ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler")
_LEVELS = (_EULER, *_MULTISTEP)
_OWN_MULTISTEP = ("FluxTransformer2DModel", "Flux2Transformer2DModel")  # leave the grid to a scheduler with flow sigmas
_SHAPED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "invert_sigmas")
Settings = Mapping[str, Any]
Mu = Callable[[Settings, int, int], float]  # (scheduler_config.json, tokens, steps) -> mu


# --------------------------------------------------------------------------------------------------------- shift by size


def linear_mu(scheduler: Settings, tokens: int, steps: int) -> float:
    """mu linear in the number of tokens."""
    first, last = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    low, high = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    slope = (high - low) / (last - first)
    return float(tokens * slope + (low - slope * first))


def _fixed_mu(scheduler: Settings, tokens: int, steps: int) -> float:
    """HiDream: whatever the scheduler has."""
    return linear_mu({}, tokens, steps)


def _root_mu(scheduler: Settings, tokens: int, steps: int) -> float:
    """CogView4: by the square root of the number of tokens."""
    share = math.sqrt(tokens / scheduler.get("base_image_seq_len", 256))
    return float(share * scheduler.get("max_shift", 1.15) + scheduler.get("base_shift", 0.5))


def _empirical_mu(scheduler: Settings, tokens: int, steps: int) -> float:
    """FLUX.2: by tokens and steps; lines at 200 and at 10 steps, and between them a line in the steps."""
    many = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return many
    few = 8.73809524e-05 * tokens + 1.89833333
    slope = (many - few) / 190.0
    return slope * steps + (many - 200.0 * slope)


@dataclass(frozen=True)
class Sampler:
    """How the pipeline of a class chooses noise levels.

    even: whether it gives the scheduler 1, 1 - 1/N ... 1/N; else the scheduler has a grid of its own. whole: whether the levels are
    thousandths, and the network is told those without the shift (CogView4). mu: of shifts by size; None: the pipeline gives none.
    tokens: (config, shape of x) -> number that mu depends on, where it is not the tokens of the image. distilled: mu of
    distilled models (Krea 2).
    """

    even: bool = True
    whole: bool = False
    mu: Mu | None = linear_mu
    tokens: Callable[[Settings, tuple[int, ...]], int] | None = None
    distilled: float | None = None


def _most_tokens(config: Settings, shape: tuple[int, ...]) -> int:
    """HiDream: tokens of the largest image."""
    height, width = config.get("max_resolution") or (128, 128)
    return int(height * width) // int(config["patch_size"]) ** 2


_OWN = Sampler(even=False, mu=None)
SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    dict.fromkeys(
        (
            "FluxTransformer2DModel",
            "OvisImageTransformer2DModel",
            "LongCatImageTransformer2DModel",
            "QwenImageTransformer2DModel",
            "ZImageTransformer2DModel",
            "LTXVideoTransformer3DModel",
        ),
        Sampler(),
    )
    | dict.fromkeys(
        (
            "SanaTransformer2DModel",
            "SanaVideoTransformer3DModel",
            "WanTransformer3DModel",
            "SkyReelsV2Transformer3DModel",
            "AuraFlowTransformer2DModel",
            "PRXTransformer2DModel",
        ),
        _OWN,
    )
    | dict.fromkeys(("HunyuanVideoTransformer3DModel", "ErnieImageTransformer2DModel"), Sampler(mu=None))
    | {
        "Flux2Transformer2DModel": Sampler(mu=_empirical_mu),
        "BriaTransformer2DModel": Sampler(),
        "Krea2Transformer2DModel": Sampler(distilled=1.15),
        # its pipeline takes the channels of the latents for the tokens
        "Lumina2Transformer2DModel": Sampler(tokens=lambda config, shape: shape[0]),
        "SD3Transformer2DModel": Sampler(even=False),
        "HiDreamImageTransformer2DModel": Sampler(even=False, mu=_fixed_mu, tokens=_most_tokens),
        "CogView4Transformer2DModel": Sampler(whole=True, mu=_root_mu),
    }
)


# ------------------------------------------------------------------------------------------------------------------ flows


@dataclass(frozen=True)
class FlowSchedule:
    """The levels of a flow's pipeline.

    config: of the transformer. scheduler: its scheduler_config.json. distilled: `is_distilled` of its model_index.json. Raises
    UserError on a scheduler whose levels are not known here, and on a class without a flow.
    """

    config: Settings
    scheduler: Settings
    distilled: bool = False

    def __post_init__(self) -> None:
        name = self.scheduler.get("_class_name")
        if name == "SCMScheduler":
            return
        shaped = [each for each in _SHAPED if self.scheduler.get(each)]
        if name not in _LEVELS or (name in _MULTISTEP and not self.scheduler.get("use_flow_sigmas")):
            raise UserError(
                f"the levels of a {name} are not known for a flow: wanted {', '.join(_LEVELS)} (the latter with use_flow_sigmas) in "
                "scheduler_config.json"
            )
        if shaped:
            raise UserError(f"levels with {shaped[0]} are not known: set it to false in scheduler_config.json")
        thousand = self.scheduler.get("num_train_timesteps", NUM_TIMESTEPS)
        if thousand != NUM_TIMESTEPS:
            raise UserError(f"scheduler_config.json has num_train_timesteps {thousand}: wanted {NUM_TIMESTEPS}")

    @property
    def sampler(self) -> Sampler:
        """How the pipeline chooses levels. Raises UserError where the class has no flow."""
        name = str(self.config.get("_class_name"))
        if name not in SAMPLERS:
            raise UserError(f"the levels of a {name} are not known; they are of {', '.join(sorted(SAMPLERS))}")
        return SAMPLERS[name]

    @property
    def dynamic(self) -> bool:
        """Whether the shift depends on the size."""
        return bool(self.scheduler.get("use_dynamic_shifting", False))

    def mu(self, steps: int, shape: tuple[int, ...]) -> float:
        """mu for latents of this shape (C, ..., h, w). Raises UserError where the pipeline gives none."""
        sampler = self.sampler
        if sampler.mu is None:
            raise UserError(
                f"scheduler_config.json has use_dynamic_shifting, and the pipeline of a {self.config['_class_name']} gives no mu: set it "
                "to false"
            )
        if self.distilled and sampler.distilled is not None:
            return sampler.distilled
        number = call_of(self.config).tokens if sampler.tokens is None else sampler.tokens
        return sampler.mu(self.scheduler, number(self.config, shape), steps)

    def shift(self, steps: int, shape: tuple[int, ...]) -> float:
        """The shift s of a drawing: a level sigma becomes s sigma / (1 + (s - 1) sigma)."""
        if self.dynamic:
            mu = self.mu(steps, shape)
            return math.exp(mu) if self.scheduler.get("time_shift_type", "exponential") == "exponential" else mu
        named = "shift" if self.scheduler["_class_name"] == _EULER else "flow_shift"
        return float(self.scheduler.get(named, 1.0))

    def levels(self, steps: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """(steps + 1,) noise levels of a drawing, the last 0; and (steps,) what the network is told, as noise levels.

        Multistep schedulers tell whole thousandths, rounded down. float64; the schedulers have them in float32.
        """
        if self.scheduler["_class_name"] == "SCMScheduler":
            return self._angles(steps)
        if self.scheduler["_class_name"] != _EULER:
            sigmas = self._multistep(steps, shape)
            return np.append(sigmas, 0.0), np.floor(sigmas * NUM_TIMESTEPS + 1e-9) / NUM_TIMESTEPS
        plain = self._plain(steps)
        sigmas = self._stretched(shifted(plain, self.shift(steps, shape)))
        return np.append(sigmas, 0.0), plain if self.sampler.whole else sigmas

    def _plain(self, steps: int) -> np.ndarray:
        """Levels before the shift. A grid of the scheduler's own ends at its lowest level, which a static shift moved already."""
        if self.sampler.whole:
            return np.floor(np.linspace(NUM_TIMESTEPS, 1, steps)) / NUM_TIMESTEPS
        given = self.dynamic if self.config["_class_name"] == "BriaTransformer2DModel" else self.sampler.even
        if given:
            return np.linspace(1.0, 1 / steps, steps)
        lowest = 1 / NUM_TIMESTEPS
        return np.linspace(1.0, lowest if self.dynamic else shifted(lowest, self.shift(steps, ())), steps)

    def _multistep(self, steps: int, shape: tuple[int, ...]) -> np.ndarray:
        """Levels of UniPC and DPM-Solver. The former starts a millionth below 1; only it knows shifts by size."""
        if self.scheduler["_class_name"] == "UniPCMultistepScheduler":
            given = self.sampler.even and self.config["_class_name"] not in _OWN_MULTISTEP
            sigmas = self._plain(steps) if given else np.linspace(1, 1 / NUM_TIMESTEPS, steps + 1)[:-1]
            sigmas = self._stretched(shifted(sigmas, self.shift(steps, shape)))
            sigmas[0] -= 1e-6 if abs(sigmas[0] - 1) < 1e-6 else 0.0
            return sigmas
        sigmas = 1.0 - np.linspace(1, 1 / NUM_TIMESTEPS, steps + 1)
        return shifted(sigmas, float(self.scheduler.get("flow_shift", 1.0)))[::-1][:-1].copy()

    def _stretched(self, sigmas: np.ndarray) -> np.ndarray:
        """Levels whose distance from 1 is scaled so that the last is `shift_terminal`, where the scheduler has one."""
        terminal = self.scheduler.get("shift_terminal")
        if not terminal:
            return sigmas
        clean = 1 - sigmas
        return np.asarray(1 - clean / (clean[-1] / (1 - terminal)))

    def _angles(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Sana Sprint: angles of noise against data from a right one to 0, evenly; in two steps 1.3 is between. As levels."""
        angles = np.array([1.57080, 1.3, 0.0]) if steps == 2 else np.linspace(1.57080, 0, steps + 1)
        sigmas = np.sin(angles) / (np.cos(angles) + np.sin(angles))
        return sigmas, sigmas[:-1]


def training_shift(scheduler: Settings) -> float:
    """The shift in the training examples of diffusers: the static one of an Euler scheduler, else none."""
    if scheduler.get("_class_name") != _EULER or scheduler.get("use_dynamic_shifting"):
        return 1.0
    return float(scheduler.get("shift", 1.0))


def expert_range(model_index: Settings, component: str) -> tuple[float, float]:
    """The noise levels that a component of a pipeline is for: of two experts (Wan 2.2) those above or below `boundary_ratio`.

    Raises UserError on a boundary that is no share.
    """
    boundary, two = model_index.get("boundary_ratio"), model_index.get("transformer_2")
    if boundary is None or not two or two[0] is None:
        return 0.0, 1.0
    if not (isinstance(boundary, int | float) and 0 < boundary < 1):
        raise UserError(f"model_index.json has boundary_ratio {boundary}: wanted a number between 0 and 1")
    return (0.0, float(boundary)) if component == "transformer_2" else (float(boundary), 1.0)


# --------------------------------------------------------------------------------------------------------------- Gaussian


def gaussian_schedule(scheduler: Settings) -> tuple[Schedule, Predicted]:
    """The chain of a pipeline folder, from its scheduler_config.json, and what the network predicts.

    Raises UserError on betas or a prediction that are not known.
    """
    num = scheduler.get("num_train_timesteps", NUM_TIMESTEPS)
    if num != NUM_TIMESTEPS:
        raise UserError(f"scheduler_config.json has num_train_timesteps {num}: wanted {NUM_TIMESTEPS}")
    predictions: dict[str, Predicted] = {"epsilon": "epsilon", "v_prediction": "v"}
    named = str(scheduler.get("prediction_type", "epsilon"))
    if named not in predictions:
        raise UserError(
            f"scheduler_config.json has prediction_type {named}: wanted epsilon or v_prediction for a Gaussian model"
        )
    bars = np.cumprod(1.0 - _betas(scheduler))
    if str(scheduler.get("_class_name")).startswith("CogVideoX"):
        scale = float(scheduler.get("snr_shift_scale", 3.0))
        bars = bars / (scale + (1 - scale) * bars)
    if scheduler.get("rescale_betas_zero_snr"):
        roots = np.sqrt(bars)
        bars = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
        if named == "epsilon":
            raise UserError(
                "scheduler_config.json has rescale_betas_zero_snr with prediction_type epsilon, which says nothing at the noise end: "
                "wanted v_prediction"
            )
    return Schedule(betas=1.0 - bars / np.append(1.0, bars[:-1])), predictions[named]


def _betas(scheduler: Settings) -> np.ndarray:
    """The betas of a scheduler, before its signal-to-noise ratio is shifted. Raises UserError on another kind of them."""
    kind, trained = scheduler.get("beta_schedule", "linear"), scheduler.get("trained_betas")
    if trained is not None:
        betas = np.asarray(trained, dtype=np.float64)
        if betas.shape != (NUM_TIMESTEPS,) or not ((betas > 0) & (betas < 1)).all():
            raise UserError(
                f"scheduler_config.json has trained_betas that are not {NUM_TIMESTEPS} numbers between 0 and 1"
            )
        return betas
    first, last = float(scheduler.get("beta_start", 1e-4)), float(scheduler.get("beta_end", 0.02))
    if kind == "linear":
        return np.linspace(first, last, NUM_TIMESTEPS)
    if kind == "scaled_linear":
        return np.asarray(np.linspace(math.sqrt(first), math.sqrt(last), NUM_TIMESTEPS) ** 2)
    raise UserError(f"scheduler_config.json has beta_schedule {kind}: wanted linear or scaled_linear")


def gaussian_timesteps(scheduler: Settings, steps: int) -> np.ndarray:
    """(steps,) timesteps of a drawing, from the noisiest on, of DDIM and DPM-Solver. Raises UserError on other schedulers."""
    name, spacing = str(scheduler.get("_class_name")), scheduler.get("timestep_spacing")
    shaped = [each for each in _SHAPED if scheduler.get(each)]
    multistep = name in _MULTISTEP
    if shaped or not (multistep or name in ("DDIMScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")):
        raise UserError(f"the timesteps of a {name} {' '.join(shaped)} are not known: wanted DDIM or DPM-Solver")
    spacing = spacing or ("linspace" if multistep else "leading")
    extra = 1 if multistep else 0
    if spacing == "trailing":
        return np.round(np.arange(NUM_TIMESTEPS, 0, -NUM_TIMESTEPS / steps)).astype(np.int64) - 1
    if spacing == "linspace":
        times = np.linspace(0, NUM_TIMESTEPS - 1, steps + extra).round()
    else:
        times = np.arange(steps + extra) * (NUM_TIMESTEPS // (steps + extra)) + scheduler.get("steps_offset", 0)
    return times[::-1][:steps].astype(np.int64)
