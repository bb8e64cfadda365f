"""Exceptions whose message is shown to the user without a traceback."""


class UserError(Exception):
    """Error that the user can fix: the message gives the problem, the file or key, and the remedy.

    A stage prints the message without a traceback and exits with status 1.
    """


class TransientError(UserError):
    """Error that may disappear on retry: a server does not respond, or another process holds the lock.

    A stage exits with status 75 (EX_TEMPFAIL in sysexits.h).
    """


class UnreadableImageError(UserError):
    """An image file that cannot be decoded; the caller decides whether to skip it or to stop.

    Attributes:
        name: file name that was passed to the reader.
        reason: problem and remedy, without the file name.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both arguments, so that the exception can be pickled
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class StageInterrupted(Exception):  # noqa: N818  an intentional stop, not a failure
    """A signal stopped a stage; its progress is saved, and the message says where it resumes.

    Attributes:
        signal_number: signal that was received; the exit status is 128 + this number.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
