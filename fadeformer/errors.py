"""The one kind of error that is meant for the person at the keyboard."""


class UserError(Exception):
    """Something a user can mend: the message says what is wrong, in which file or key, and what to do.

    A stage prints it alone, without a traceback, and exits with status 1.
    """


class TransientError(UserError):
    """One that may pass by itself: a server that does not answer, another process at the same work.

    A stage exits with status 75, sysexits' EX_TEMPFAIL.
    """


class UnreadableImageError(UserError):
    """One image that cannot be used. A data set may hold some of them: who reads it says how many are too many.

    Attributes:
        name: the file, as it was called when it was read.
        reason: what is wrong with it and what to do, in plain words.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)  # both, so that a process pool can hand it on
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class StageInterrupted(Exception):  # noqa: N818  what was asked for is no error
    """A signal asked a stage to end. What was begun is kept, and the message says where it goes on.

    Attributes:
        signal_number: which signal, so that the exit status can tell.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
