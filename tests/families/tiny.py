"""Transformers of diffusers in small: for every class that is tried a config, inputs, and blocks that may go together."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Removed = Mapping[str, list[int]]
GENERATOR = torch.Generator()


@dataclass(frozen=True)
class Tiny:
    """A class in small.

    inputs: of the forward pass, for a number of images. removed: positions per list that go in the test. for_student: the
    inputs of the cut model, where its caller has to give others. adapters: modules between blocks that go with them, as (path,
    index of the positional argument that they are added to, block). images: False where a call is one image.
    """

    name: str
    config: Mapping[str, Any]
    inputs: Callable[[int], dict[str, Any]]
    removed: Removed
    for_student: Callable[[dict[str, Any]], dict[str, Any]] = lambda inputs: inputs
    adapters: tuple[tuple[str, int], ...] = ()
    images: bool = True
    tag: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Name for people."""
        return f"{self.name}{f'-{self.tag}' if self.tag else ''}"

    def model(self) -> nn.Module:
        """The model with random weights; fresh ones have gates of zero, which would make every test pass."""
        from diffusers.models import transformers

        torch.manual_seed(0)
        with torch.random.fork_rng():
            model: nn.Module = getattr(transformers, self.name)(**self.config).eval()
        saved = set(model.state_dict())
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                uninitialised = parameter.ndim == 3 and self.name.startswith("Nucleus")  # its experts are torch.empty
                parameter.copy_(noise) if uninitialised else parameter.add_(noise)
            for name, buffer in model.named_buffers():
                if name in saved and buffer.is_floating_point() and not bool(buffer.any()):
                    buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))
        return model

    def given(self, num: int = 2) -> dict[str, Any]:
        """The inputs for some images: the same at every call."""
        GENERATOR.manual_seed(2)
        return self.inputs(num if self.images else 1)


@torch.no_grad()
def outputs(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """All tensors that a model returns."""
    return tensors_of(model(**inputs, **return_dict(model)))


def return_dict(model: nn.Module) -> dict[str, bool]:
    """The argument by which a model returns tuples, where it has it."""
    return {"return_dict": False} if "return_dict" in inspect.signature(model.forward).parameters else {}


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in what a model returns."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


def draw(*shape: int) -> Tensor:
    """Normals."""
    return torch.randn(*shape, generator=GENERATOR)


def steps(num: int) -> Tensor:
    """Whole timesteps, a different one per image."""
    return torch.randint(1, 999, (num,), generator=GENERATOR)


def levels(num: int, value: float = 0.7) -> Tensor:
    """One noise level for all images."""
    return torch.full((num,), value)


def grid(height: int, width: int) -> Tensor:
    """Positions (t, h, w, l) of image tokens."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(1))


def line(num: int) -> Tensor:
    """Positions (t, h, w, l) of text tokens."""
    return torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(num))


def mask(*shape: int) -> Tensor:
    """All true."""
    return torch.ones(*shape, dtype=torch.bool)


TRUNK, SINGLE = "transformer_blocks", "single_transformer_blocks"
