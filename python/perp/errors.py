"""The one exception a user is meant to read."""


class UserError(Exception):
    """Something the user can put right: one sentence, what was wrong and what would be right.

    The command line prints the sentence and exits with code 2; nothing half-written is left behind.
    """


class Echo(UserError):
    """An error of another process of the same job, which tells it: here it only ends the job."""
