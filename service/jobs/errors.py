"""What a request to the service can meet, each with the HTTP status that says so."""

from ...spec.errors import MoeplanError


class UnknownError(MoeplanError):
    """There is no job or document of that name."""

    status = 404


class ConflictError(MoeplanError):
    """What is asked for does not go with the state that a job is in."""

    status = 409


class TooLargeError(MoeplanError):
    """More bytes than are taken."""

    status = 413


class BusyError(MoeplanError):
    """Too much at once: the same request may succeed later."""

    status = 429


class UnavailableError(MoeplanError):
    """The disk is full or the database does not answer; nothing that was accepted is lost."""

    status = 503
