"""The one kind of error that is meant for the person at the keyboard."""


class UserError(Exception):
    """Something a user can mend: the message says what is wrong, in which file or key, and what to do.

    A stage prints it alone, without a traceback, and exits with status 1.
    """
