"""Every error a client can see, each with one transport-neutral kind.

Transports turn a kind into their own status in `appliance.server.status`; nothing below `server/` knows a status code.
Messages say "cannot X: because", with the offending value and the rule. They name no path, descriptor, address or other
client, since a message may travel to any client of the machine.
"""

from typing import ClassVar


class ApplianceError(Exception):
    """Base of the errors a client may be told about.

    Attributes:
        kind: Stable word for programs, such as ``"model-not-found"``.
        is_retryable: True where the same request may succeed later.
    """

    kind: ClassVar[str] = "internal"
    is_retryable: ClassVar[bool] = False


class InvalidRequest(ApplianceError):
    """Unknown tensor, wrong datatype, shape or size, undecodable body."""

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


class DeadlineExceeded(ApplianceError):
    """The deadline passed, or cannot be met."""

    kind = "deadline-exceeded"


class PermissionDenied(ApplianceError):
    """The caller is known, and its role does not allow the method."""

    kind = "permission-denied"


class Unauthenticated(ApplianceError):
    """The caller presented no valid token."""

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
    """The client withdrew the request."""

    kind = "cancelled"


class Unimplemented(ApplianceError):
    """The method belongs to the protocol and this daemon does not offer it here."""

    kind = "unimplemented"


_CLASSES: list[type[ApplianceError]] = [ApplianceError, *ApplianceError.__subclasses__()]

#: Error classes by kind.
KINDS: dict[str, type[ApplianceError]] = {error.kind: error for error in _CLASSES}


class ConfigError(Exception):
    """The configuration cannot be used; the message lists every problem with a suggestion. Never sent to a client."""
