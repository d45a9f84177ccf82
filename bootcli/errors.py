"""The errors a user may see: one message (what, where) and one hint (what to do)."""


class BootError(Exception):
    """A failure the user can understand: a broken file, a NaN, a missing network. Exit code 1.

    Args:
        message: what went wrong and where, one sentence.
        hint: what to do about it; empty when there is nothing to add.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class DoesNotFit(BootError):
    """A device has not enough memory. Exit code 1."""


class UsageError(BootError):
    """The command line or configuration asks for something impossible. Exit code 2."""

    exit_code = 2


class Interrupted(BootError):
    """A signal stopped the work after its state was saved. Exit code 128 + signal number.

    Args:
        message: what was saved and where.
        hint: how to go on.
        signum: the signal, 2 for SIGINT and 15 for SIGTERM.
    """

    def __init__(self, message: str, hint: str = "", *, signum: int) -> None:
        super().__init__(message, hint)
        self.exit_code = 128 + signum
