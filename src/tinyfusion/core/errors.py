"""UserError: invalid input or environment that the user can fix; exit code 2 on the command line."""

from typing import Any


class UserError(ValueError):
    """Something the user gave, or the machine lacks. The message says what was wanted, what came and what to do."""


class OtherRecipe(UserError):
    """An output was made with another recipe. difference: the dotted field, its value there and its value now."""

    def __init__(self, message: str, difference: tuple[str, Any, Any]) -> None:
        super().__init__(message)
        self.difference = difference


class BadNumbers(UserError):
    """Training was given up because its numbers are no longer finite; its run stays, so that the step can be looked at."""
