"""UserError: invalid input or environment that the user can fix; exit code 2 on the command line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class UserError(ValueError):
    """Invalid input or environment. The message says what was wanted, what was given and what to do."""


class OtherRecipe(UserError):
    """An output was made with another recipe. difference: the dotted field, its value there and its value now."""

    def __init__(self, message: str, difference: tuple[str, Any, Any]) -> None:
        super().__init__(message)
        self.difference = difference


class BadNumbers(UserError):
    """Training stopped because its numbers are no longer finite. Its run is retained, so that the step can be inspected."""


@contextmanager
def prefixed(words: object, *kinds: type[BaseException]) -> Iterator[None]:
    """Turn exceptions of these kinds (default UserError) within the block into UserError: the words, and the exception's message."""
    try:
        yield
    except kinds or UserError as error:  # noqa: B030  # a tuple of classes, or one
        raise UserError(f"{words}: {error}") from error
