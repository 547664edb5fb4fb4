"""torch.compile: check that it can work on this machine, and turn its errors into UserError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tinyfusion.core.errors import UserError

_LEAVE = "leave --compile away"


def check_compiler(device: torch.device) -> None:
    """Raise UserError where nothing can be compiled for `device`: no C++ compiler, or no triton for a GPU."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError(f"--compile needs triton for a GPU that it supports, got none: install it, or {_LEAVE}")
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except RuntimeError as error:
            wanted = "--compile needs a C++ compiler for the CPU, got none"
            raise UserError(f"{wanted}: install g++ or clang++, or {_LEAVE}") from error


def compiler_failure(error: BaseException, what: str) -> UserError | None:
    """The UserError for an error of the compiler; None for other errors. what: name of the compiled object."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch")):
        return None
    # the first error of the C++ compiler in one line, else the first line of torch's message
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.endswith(" raised:")]
    reason = ([line for line in lines if "error:" in line.lower()] or lines or [type(error).__name__])[0]
    return UserError(f"--compile: {what} cannot be compiled ({reason}): {_LEAVE}")


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """Turn errors of the compiler within the context into a UserError that names `what`; other errors pass through."""
    try:
        yield
    except Exception as error:
        failure = compiler_failure(error, what)
        if failure is None:
            raise
        raise failure from error
