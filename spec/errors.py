"""The one error that a user is meant to see."""


class MoeplanError(Exception):
    """Something the user can mend: one line that names what was wrong and what to do.

    The command line prints it without a traceback and exits with ``exit_code``.
    """

    exit_code = 2


class DocumentError(MoeplanError):
    """A document on disk is unreadable, malformed or breaks one of its rules."""


class MissingCurveError(MoeplanError):
    """The cluster lacks a measured curve that the prediction needs."""


class InfeasibleError(MoeplanError):
    """No plan satisfies the limits; the message says by how much and where."""


class RunError(MoeplanError):
    """A rank failed, hung or could not be started."""

    exit_code = 3
