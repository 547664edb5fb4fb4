"""tinyfusion: make diffusion transformers shallow, recover them, measure and show it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("tinyfusion")
except PackageNotFoundError:
    __version__ = "0+unknown"

if TYPE_CHECKING:
    from tinyfusion.models.checkpoint import open_model as open_model

__all__ = ["__version__", "open_model"]


def __getattr__(name: str) -> Any:
    """`tinyfusion.open_model` without importing torch before it is used."""
    if name == "open_model":
        from tinyfusion.models.checkpoint import open_model

        return open_model
    raise AttributeError(f"module 'tinyfusion' has no attribute {name!r}")
