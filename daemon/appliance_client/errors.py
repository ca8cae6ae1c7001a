"""Errors a caller of the client library can meet: one class per kind of the protocol, and three of the client's own.

The kinds are the daemon's; docs/protocol.md has the table. A kind this version of the library does not know becomes an
`ApplianceError` that carries it.
"""

from typing import Final


class ApplianceError(Exception):
    """Base of every error this library raises on purpose.

    Args:
        message: What could not be done and why.
        kind: Only for a kind without a class of its own.
        is_retryable: What the daemon said; the class's own answer where it said nothing.

    Attributes:
        kind: Stable word for programs, such as ``"model-not-found"``.
        is_retryable: True where the same request may succeed later.
    """

    kind: str = "internal"
    is_retryable: bool = False

    def __init__(self, message: str, *, kind: str | None = None, is_retryable: bool | None = None) -> None:
        super().__init__(message)
        if kind is not None:
            self.kind = kind
        if is_retryable is not None:
            self.is_retryable = is_retryable


class InvalidRequest(ApplianceError):
    """Unknown tensor, wrong datatype, shape or size, or a value that is no tensor."""

    kind = "invalid-request"


class ModelNotFound(ApplianceError):
    """No such model, or no such version of it."""

    kind = "model-not-found"


class ModelNotReady(ApplianceError):
    """The model exists and is loading, warming, reloading, unloaded or quarantined."""

    kind = "model-not-ready"
    is_retryable = True


class Overloaded(ApplianceError):
    """A queue, memory, size or rate bound was reached."""

    kind = "overloaded"
    is_retryable = True


class DeadlineExceeded(ApplianceError, TimeoutError):
    """The timeout passed, or the daemon saw that it cannot be met."""

    kind = "deadline-exceeded"


class PermissionDenied(ApplianceError):
    """The daemon knows who asks, and that role does not allow the method."""

    kind = "permission-denied"


class Unauthenticated(ApplianceError):
    """No valid token was presented."""

    kind = "unauthenticated"


class Conflict(ApplianceError):
    """What is asked for does not go with what goes on: another change, files changed meanwhile, too many jobs."""

    kind = "conflict"
    is_retryable = True


class InvalidManifest(ApplianceError):
    """The manifest does not describe a model that can be served; the message lists every problem."""

    kind = "invalid-manifest"


class NoPlacement(ApplianceError):
    """No backend and device can serve the model; the message lists every candidate with its reason."""

    kind = "no-placement"


class ArtifactCorrupt(ApplianceError):
    """An artifact's digest differs from the manifest, or the file is truncated."""

    kind = "artifact-corrupt"


class BackendError(ApplianceError):
    """The backend's runtime raised, or broke its contract."""

    kind = "backend-error"


class WorkerLost(ApplianceError):
    """The worker process died or was killed while it had the request."""

    kind = "worker-lost"
    is_retryable = True


class DeviceLost(ApplianceError):
    """The device went away or reported an unrecoverable error."""

    kind = "device-lost"
    is_retryable = True


class ShuttingDown(ApplianceError):
    """The daemon drains and accepts nothing new."""

    kind = "shutting-down"
    is_retryable = True


class Cancelled(ApplianceError):
    """The request was withdrawn."""

    kind = "cancelled"


class Unimplemented(ApplianceError):
    """The method belongs to the protocol and this daemon does not offer it here."""

    kind = "unimplemented"


_SENT: Final[tuple[type[ApplianceError], ...]] = (ApplianceError, *ApplianceError.__subclasses__())
#: Classes by the kinds that travel on the wire.
KINDS: Final = {error.kind: error for error in _SENT}


class ConnectionLost(ApplianceError, ConnectionError):
    """The connection ended before the answer came; whether the daemon ran the request is unknown."""

    kind = "connection-lost"
    is_retryable = True


class DaemonUnreachable(ApplianceError, ConnectionError):
    """Nothing answers at the socket; the message says how to start the daemon."""

    kind = "daemon-unreachable"
    is_retryable = True


class ProtocolError(ApplianceError):
    """The other end broke the protocol; the connection is closed."""

    kind = "protocol-error"


def error_of(kind: str, message: str, is_retryable: bool | None = None) -> ApplianceError:
    """The exception for an error the daemon sent."""
    error = KINDS.get(kind)
    if error is None:
        return ApplianceError(message, kind=kind, is_retryable=is_retryable)
    return error(message, is_retryable=is_retryable)


def lost(problem: OSError | None, is_in_frame: bool) -> ConnectionLost:
    """The error for a connection that ended: of itself where `problem` is None."""
    where = " in the middle of a frame" if is_in_frame else ""
    reason = "it was closed" if problem is None or not problem.strerror else problem.strerror.lower()
    return ConnectionLost(f"cannot finish the request: the connection to the daemon ended{where}: {reason}")


def several_answers() -> InvalidRequest:
    """The error where a model gives several answers and the caller takes one."""
    return InvalidRequest("cannot give one answer: the model gives several to a request; iterate over results()")


def too_long(length: int, limit: int) -> InvalidRequest:
    """The error for a request that exceeds the daemon's bound."""
    return InvalidRequest(f"cannot send the request: it has {length} bytes, and the daemon takes at most {limit}")


def not_due(identifier: int) -> ProtocolError:
    """The error for an answer to nothing."""
    return ProtocolError(f"cannot read the answer: id {identifier} was not asked for")
