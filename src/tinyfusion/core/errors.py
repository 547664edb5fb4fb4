"""UserError: invalid input or environment that the user can fix; exit code 2 on the command line."""


class UserError(ValueError):
    """Something the user gave, or the machine lacks. The message says what was wanted, what came and what to do."""


class BadNumbers(UserError):
    """Training was given up because its numbers are no longer finite; its run stays, so that the step can be looked at."""
