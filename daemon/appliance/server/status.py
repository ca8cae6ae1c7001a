"""The only two tables from error kinds to transport status codes."""

from enum import IntEnum
from typing import Final

from appliance.errors import ApplianceError


class GrpcStatus(IntEnum):
    """Status codes of gRPC (grpc/grpc doc/statuscodes.md)."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


GRPC_STATUS: Final[dict[str, GrpcStatus]] = {
    "internal": GrpcStatus.INTERNAL,
    "invalid-request": GrpcStatus.INVALID_ARGUMENT,
    "model-not-found": GrpcStatus.NOT_FOUND,
    "model-not-ready": GrpcStatus.UNAVAILABLE,
    "overloaded": GrpcStatus.RESOURCE_EXHAUSTED,
    "deadline-exceeded": GrpcStatus.DEADLINE_EXCEEDED,
    "permission-denied": GrpcStatus.PERMISSION_DENIED,
    "unauthenticated": GrpcStatus.UNAUTHENTICATED,
    "conflict": GrpcStatus.ABORTED,
    "invalid-manifest": GrpcStatus.FAILED_PRECONDITION,
    "no-placement": GrpcStatus.FAILED_PRECONDITION,
    "artifact-corrupt": GrpcStatus.DATA_LOSS,
    "backend-error": GrpcStatus.INTERNAL,
    "worker-lost": GrpcStatus.UNAVAILABLE,
    "device-lost": GrpcStatus.UNAVAILABLE,
    "shutting-down": GrpcStatus.UNAVAILABLE,
    "cancelled": GrpcStatus.CANCELLED,
    "unimplemented": GrpcStatus.UNIMPLEMENTED,
}

HTTP_STATUS: Final[dict[str, int]] = {
    "internal": 500,
    "invalid-request": 400,
    "model-not-found": 404,
    "model-not-ready": 503,
    "overloaded": 429,
    "deadline-exceeded": 504,
    "permission-denied": 403,
    "unauthenticated": 401,
    "conflict": 409,
    "invalid-manifest": 400,
    "no-placement": 400,
    "artifact-corrupt": 500,
    "backend-error": 500,
    "worker-lost": 503,
    "device-lost": 503,
    "shutting-down": 503,
    "cancelled": 499,
    "unimplemented": 501,
}


def grpc_status(error: ApplianceError) -> GrpcStatus:
    """GRPC status of an error."""
    return GRPC_STATUS[error.kind]


def http_status(error: ApplianceError) -> int:
    """HTTP status of an error."""
    return HTTP_STATUS[error.kind]
