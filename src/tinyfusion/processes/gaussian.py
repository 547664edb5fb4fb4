"""The Gaussian diffusion process: linear betas, noise prediction, learned-range variance, respaced sampling.

Shapes: B samples, C channels, N respaced timesteps. `model(x, t, **condition)` takes original step numbers and returns
(B, 2C, H, W): noise prediction and variance logits v (or (B, C, H, W) if the variance is not learned: no variational term, and
sampling uses the posterior variance). Tables are float64, looked up and cast to float32 (published numerics). In training the
output can be the velocity sqrt(abar) noise - sqrt(1 - abar) x_0 instead, which is finite where abar is 0 (zero terminal SNR).
Sources: Ho et al. arXiv 2006.11239; Nichol & Dhariwal arXiv 2102.09672; Song et al. arXiv 2010.02502; velocity: Salimans & Ho
arXiv 2202.00512.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from tinyfusion.conditioning.classes import class_inputs
from tinyfusion.conditioning.condition import ModelCall, calling
from tinyfusion.core.rng import Draws
from tinyfusion.processes.base import Batch, Denoiser, NoiseAxis, NoisyBatch, Prediction, Process, StepNoise, mean_flat
from tinyfusion.processes.time import check_choice

NUM_TIMESTEPS = 1000
Predicted = Literal["epsilon", "v"]
_LOW_NOISE_DIVISOR = 4  # the released block influence uses the first quarter of the chain: t in 0..249 of 1000


def respaced_timesteps(spacing: str) -> list[int]:
    """Original timesteps that a respacing string selects, ascending.

    "" selects all 1000. "N1,N2,..." divides the chain into as many nearly equal sections and selects N1, N2, ... evenly
    spread timesteps of each, both ends included; "N" is a single section. "ddimN" uses the smallest integer stride that
    gives exactly N timesteps. Raises ValueError, naming the nearest two possible numbers, if the rule cannot give N.
    """
    if not spacing:
        return list(range(NUM_TIMESTEPS))
    if spacing.startswith("ddim"):
        return _stride_timesteps(int(spacing[4:]))
    counts = [int(part) for part in spacing.split(",")]
    size, extra = divmod(NUM_TIMESTEPS, len(counts))
    timesteps: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if not 1 <= count <= length:
            near = "1 and 2" if count < 1 else f"{length - 1} and {length}"
            raise ValueError(f"cannot take {count} steps from a section of {length}; the nearest are {near}")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            timesteps.append(start + round(position))
            position += stride  # accumulated, not multiplied: the published rounding depends on it
        start += length
    return timesteps


def _stride_timesteps(count: int) -> list[int]:
    chains = {len(chain): chain for s in range(NUM_TIMESTEPS, 0, -1) if (chain := range(0, NUM_TIMESTEPS, s))}
    if count in chains:
        return list(chains[count])
    near = sorted(sorted(chains, key=lambda length: abs(length - count))[:2])
    raise ValueError(
        f"no integer stride gives {count} of {NUM_TIMESTEPS} steps; the nearest are {near[0]} and {near[1]}"
    )


class Schedule:
    """Tables of a respaced diffusion chain, float64, shape (N,). `timesteps[i]` is the original timestep of index i.

    betas: (1000,) float64, of the original chain; None: the linear betas of the published models.
    """

    def __init__(self, spacing: str = "", betas: np.ndarray | None = None) -> None:
        base = np.cumprod(1.0 - (np.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=np.float64) if betas is None else betas))
        self.timesteps = np.array(respaced_timesteps(spacing), dtype=np.int64)
        respaced = base[self.timesteps]
        self.betas = 1.0 - respaced / np.append(1.0, respaced[:-1])  # derived anew, even for all steps
        self.alphas_cumprod = np.cumprod(1.0 - self.betas)
        previous = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_prev = previous
        self.posterior_variance = self.betas * (1.0 - previous) / (1.0 - self.alphas_cumprod)
        clipped = np.append(self.posterior_variance[1:2], self.posterior_variance[1:])
        if len(self.betas) == 1:
            clipped = self.betas[:1]  # a chain of one step has no second entry, and its variance is never used
        self.posterior_log_variance_clipped = np.log(clipped)
        self.posterior_mean_x0 = self.betas * np.sqrt(previous) / (1.0 - self.alphas_cumprod)
        self.posterior_mean_xt = (1.0 - previous) * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_cumprod)
        self.log_betas = np.log(self.betas)
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        with np.errstate(divide="ignore"):  # infinite at zero terminal SNR: no noise prediction gives x_0 there
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1.0)
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self.betas)

    def at(self, table: str, index: Tensor, ndim: int = 4) -> Tensor:
        """Entries of a table at `index` (B,), float32, shaped (B, 1, ...) with `ndim` axes, those of x."""
        return self._table(table, index.device)[index].view(-1, *[1] * (ndim - 1))

    def original(self, index: Tensor) -> Tensor:
        """Original timesteps of respaced indices `index` (B,), int64."""
        return self._table("timesteps", index.device)[index]

    def _table(self, name: str, device: torch.device) -> Tensor:
        """A table on a device, moved once: a transfer makes the host wait for the device."""
        key = (name, device)
        if key not in self._on_device:
            values = torch.from_numpy(getattr(self, name))
            self._on_device[key] = (values.float() if values.is_floating_point() else values).to(device)
        return self._on_device[key]

    def q_sample(self, x0: Tensor, index: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise."""
        signal, spread = self._mixed(x0, index)
        return signal * x0 + spread * noise

    def velocity(self, x0: Tensor, index: Tensor, noise: Tensor) -> Tensor:
        """v = sqrt(abar_t) noise - sqrt(1 - abar_t) x_0: what a velocity network predicts."""
        signal, spread = self._mixed(x0, index)
        return signal * noise - spread * x0

    def _mixed(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t), shaped to multiply x."""
        tables = ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
        signal, spread = (self.at(table, index, x.ndim) for table in tables)
        return signal, spread

    def x0_from_noise(self, xt: Tensor, index: Tensor, noise: Tensor) -> Tensor:
        scale = self.at("sqrt_recip_alphas_cumprod", index, xt.ndim)
        return scale * xt - self.at("sqrt_recipm1_alphas_cumprod", index, xt.ndim) * noise

    def noise_from_x0(self, xt: Tensor, index: Tensor, x0: Tensor) -> Tensor:
        scaled = self.at("sqrt_recip_alphas_cumprod", index, xt.ndim) * xt - x0
        return scaled / self.at("sqrt_recipm1_alphas_cumprod", index, xt.ndim)

    def posterior(self, x0: Tensor, xt: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and clipped log variance of q(x_{t-1} | x_t, x_0)."""
        first = self.at("posterior_mean_x0", index, xt.ndim) * x0
        mean = first + self.at("posterior_mean_xt", index, xt.ndim) * xt
        return mean, self.at("posterior_log_variance_clipped", index, xt.ndim)

    def model_gaussian(self, noise: Tensor, v: Tensor | None, xt: Tensor, index: Tensor, clip: bool) -> Gaussian:
        """p(x_{t-1} | x_t) from a noise prediction and variance logits: log s^2 = f log beta + (1 - f) log posterior."""
        x0 = self.x0_from_noise(xt, index, noise)
        if clip:
            x0 = x0.clamp(-1, 1)
        mean, low = self.posterior(x0, xt, index)
        if v is None:
            return Gaussian(mean, low.expand_as(mean), x0)
        share = (v + 1) / 2
        return Gaussian(mean, share * self.at("log_betas", index, xt.ndim) + (1 - share) * low, x0)


@dataclass(frozen=True)
class Gaussian:
    """A reverse step as a Gaussian: mean and log variance, and the predicted clean image."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2), elementwise, in nats."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (-1.0 - ratio + ratio.exp() + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P(x) of a Gaussian integrated over bins of half-width 1/255, open at both ends, in nats, elementwise."""

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    centred, inverse = x - mean, torch.exp(-log_scale)
    upper, lower = cdf(inverse * (centred + 1 / 255)), cdf(inverse * (centred - 1 / 255))
    inner = (upper - lower).clamp(min=1e-12).log()
    above = (1 - lower).clamp(min=1e-12).log()
    below = upper.clamp(min=1e-12).log()
    return torch.where(x < -0.999, below, torch.where(x > 0.999, above, inner))


def split_output(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Noise prediction and variance logits (None if the model has none), float32."""
    output = output.float()
    if output.shape[1] == channels:
        return output, None
    return output[:, :channels], output[:, channels:]


@dataclass(frozen=True)
class GaussianObjective(Process):
    """Hybrid loss: noise MSE plus the variational term for the variance, both per sample.

    label_drop: probability of replacing a condition by the null row (published: 0.1; 0 in evaluation). teacher_at_zero:
    at t = 0 distillation uses the KL from the teacher as at other t; otherwise the data likelihood, as published.
    call: how the model is called. prediction: "epsilon", the noise; "v", the velocity, whose squared error is that of x_0 with weight
    1 / (1 - abar_t); channels of a variance behind it are passed over.
    Source: arXiv 2102.09672, equation 16, with weight 1 on the variational term in bits per dimension of the sampled t.
    """

    label_drop: float = 0.1
    schedule: Schedule = field(default_factory=Schedule)
    teacher_at_zero: bool = False
    call: ModelCall = calling(class_inputs)
    prediction: Predicted = "epsilon"

    def __post_init__(self) -> None:
        check_choice("prediction", self.prediction, Predicted)

    def draw(self, batch: Batch, draws: Draws) -> NoisyBatch:
        device = batch.x.device
        t = torch.from_numpy(draws.integers("timestep", len(self.schedule))).to(device)
        noise = torch.from_numpy(draws.normal("noise", tuple(batch.x.shape[1:]))).to(device)
        condition = batch.condition.drop(draws, self.label_drop)
        return self.noised(Batch(batch.x, condition), t, noise, draws.step)

    def noised(self, batch: Batch, t: Tensor, noise: Tensor, step: int = 0) -> NoisyBatch:
        """The batch noised with the given timesteps and noise; conditions are unchanged."""
        return NoisyBatch(batch.x, noise, self.schedule.q_sample(batch.x, t, noise), t, batch.condition, step)

    def predict(self, model: nn.Module, noisy: NoisyBatch) -> Prediction:
        return Prediction(self.call(model, noisy.xt, self.schedule.original(noisy.t), noisy.condition))

    def losses(self, model: nn.Module, noisy: NoisyBatch, prediction: Prediction) -> dict[str, Tensor]:
        """Per-sample "loss" = mse + vb, with its two terms; without learned variance "loss" = mse."""
        noise, v = split_output(prediction.output, noisy.x0.shape[1])
        if self.prediction == "v":
            mse = mean_flat((self.schedule.velocity(noisy.x0, noisy.t, noisy.noise) - noise) ** 2)
            return {"loss": mse, "mse": mse}
        mse = mean_flat((noisy.noise - noise) ** 2)
        if v is None:
            return {"loss": mse, "mse": mse}
        vb = self.variational_bits(noisy, noise, v)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def kd_terms(self, noisy: NoisyBatch, own: Prediction, taught: Prediction) -> dict[str, Tensor]:
        """Per-sample "kd_loss": noise MSE against the teacher + "vb_kd".

        vb_kd: KL(teacher || student) of the reverse step in bits. The KL trains the variance alone. At t = 0 it is
        replaced by the data likelihood (as published, unless `teacher_at_zero`). Without learned variance in both
        models "vb_kd" is left out. Source: arXiv 2412.01199, equation 6 and its released code.
        """
        channels = noisy.x0.shape[1]
        noise, v = split_output(own.output, channels)
        taught_noise, taught_v = split_output(taught.output.detach(), channels)
        mse_kd = mean_flat((noise - taught_noise) ** 2)
        if v is None or taught_v is None or self.prediction == "v":
            return {"kd_loss": mse_kd}
        step = self.schedule.model_gaussian(taught_noise, taught_v, noisy.xt, noisy.t, clip=False)
        vb_kd = self.variational_bits(noisy, noise, v, (step.mean, step.log_variance), not self.teacher_at_zero)
        return {"kd_loss": mse_kd + vb_kd, "vb_kd": vb_kd}

    def low_noise(self, noisy: NoisyBatch) -> NoisyBatch:
        """The batch with clean inputs and timesteps from the first quarter of the chain, as released.

        Differs from the released code: timesteps are stratified if those of the batch are.
        """
        return replace(noisy, xt=noisy.x0, t=torch.div(noisy.t, _LOW_NOISE_DIVISOR, rounding_mode="floor"))

    @property
    def noise_axis(self) -> NoiseAxis:
        return NoiseAxis("timestep", len(self.schedule), 0)

    @property
    def num_levels(self) -> int:
        return len(self.schedule)

    def at_level(self, noisy: NoisyBatch, level: int) -> NoisyBatch:
        t = torch.full_like(noisy.t, level)
        return replace(noisy, xt=self.schedule.q_sample(noisy.x0, t, noisy.noise), t=t)

    def variational_bits(
        self,
        noisy: NoisyBatch,
        noise: Tensor,
        v: Tensor,
        target: tuple[Tensor, Tensor] | None = None,
        data_at_zero: bool = True,
    ) -> Tensor:
        """The variational term (B,) in bits per dimension: KL(`target` || the model's reverse step).

        target: (mean, log variance); None: the true posterior. Only v gets a gradient. With `data_at_zero` the term at
        t = 0 is the data's negative log-likelihood (as published).
        """
        model = self.schedule.model_gaussian(noise.detach(), v, noisy.xt, noisy.t, clip=False)
        mean, log_variance = target or self.schedule.posterior(noisy.x0, noisy.xt, noisy.t)
        kl = mean_flat(normal_kl(mean, log_variance, model.mean, model.log_variance))
        if not data_at_zero:
            return kl / math.log(2.0)
        likelihood = discretised_log_likelihood(noisy.x0, model.mean, 0.5 * model.log_variance)
        return torch.where(noisy.t == 0, -mean_flat(likelihood), kl) / math.log(2.0)


def sample_ancestral(
    model: Denoiser, schedule: Schedule, x: Tensor, step_noise: StepNoise, clip: bool = False
) -> Iterator[Tensor]:
    """DDPM sampling from x (B, C, H, W) ~ N(0, 1): yields x after every step, from the noisiest timestep on.

    step_noise(j): noise of the j-th step; not called for the last step. Source: arXiv 2006.11239 alg. 2.
    """
    channels = x.shape[1]
    for position, i in enumerate(reversed(range(len(schedule)))):
        index, original = _indices(schedule, i, x)
        noise, v = split_output(model(x, original), channels)
        step = schedule.model_gaussian(noise, v, x, index, clip)
        x = step.mean if i == 0 else step.mean + torch.exp(0.5 * step.log_variance) * step_noise(position)
        yield x


def sample_ddim(
    model: Denoiser, schedule: Schedule, x: Tensor, step_noise: StepNoise, clip: bool = False, eta: float = 0.0
) -> Iterator[Tensor]:
    """DDIM sampling, as `sample_ancestral`; with eta 0 it is deterministic. Source: arXiv 2010.02502 equation 12."""
    channels = x.shape[1]
    for position, i in enumerate(reversed(range(len(schedule)))):
        index, original = _indices(schedule, i, x)
        noise, _ = split_output(model(x, original), channels)
        x0 = schedule.x0_from_noise(x, index, noise)
        if clip:
            x0 = x0.clamp(-1, 1)
            noise = schedule.noise_from_x0(x, index, x0)
        bar, bar_prev = float(schedule.alphas_cumprod[i]), float(schedule.alphas_cumprod_prev[i])
        sigma = eta * math.sqrt((1 - bar_prev) / (1 - bar)) * math.sqrt(1 - bar / bar_prev)
        x = math.sqrt(bar_prev) * x0 + math.sqrt(1 - bar_prev - sigma**2) * noise
        if i > 0 and sigma > 0:
            x = x + sigma * step_noise(position)
        yield x


def _indices(schedule: Schedule, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
    index = torch.full((x.shape[0],), i, dtype=torch.int64, device=x.device)
    return index, torch.full_like(index, int(schedule.timesteps[i]))
