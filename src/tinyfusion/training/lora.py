"""LoRA factors on every linear layer (arXiv 2106.09685), through peft; initial values depend only on a seed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tinyfusion.training.optim import hush_bitsandbytes

ADAPTER = "delta"  # in the names of factors


def add_lora(
    model: nn.Module, rank: int, alpha: float, seed: int, fixed: Collection[str] = ()
) -> dict[str, nn.Parameter]:
    """Add a low-rank update (alpha / rank) B A to every `nn.Linear` of `model`, in place; only A and B stay trainable.

    fixed: names of weights that no update may change. A (rank x in) is uniform in +-1/sqrt(in) and B (out x rank) zero, so the
    outputs do not change. Returns the factors by name. The model needs peft afterwards: pass a copy.
    """
    hush_bitsandbytes()
    from peft import LoraConfig, inject_adapter_in_model

    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name in linears if f"{name}.weight" not in fixed]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft divides it by the rank; it need not be whole
        target_modules=names,
        lora_dropout=0.0,
        bias="none",
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    factors = {name: p for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name}
    with torch.no_grad():
        for name, parameter in factors.items():
            parameter.requires_grad_(True)
            # peft takes the type of the layer, in which small updates would be lost
            parameter.data = parameter.data.float()
            if ".lora_A." in name:
                bound = parameter.shape[1] ** -0.5
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
    return factors


@contextmanager
def without_lora(model: nn.Module) -> Iterator[None]:
    """Within the context the model runs without the updates of `add_lora`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True  # `enable_adapters(False)` also freezes the factors
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def delta_weights(averages: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """{name of a weight in the model without LoRA: its update scale * B A}, from the (averaged) factors by name."""
    suffix = f".lora_A.{ADAPTER}.weight"
    layers = [name.removesuffix(suffix) for name in averages if name.endswith(suffix)]
    return {
        f"{layer}.weight": scale * averages[f"{layer}.lora_B.{ADAPTER}.weight"] @ averages[layer + suffix]
        for layer in layers
    }


def cast_frozen_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of frozen linear layers to `dtype`, in place.

    Use it on a temporary copy that runs under autocast. The outputs do not change: autocast casts the same weights at
    every call, because it caches only casts of trained weights.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and not any(p.requires_grad for p in module.parameters(recurse=False)):
            module.to(dtype)
