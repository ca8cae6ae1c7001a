"""The only two tables from error kinds to transport status codes."""

from typing import Final

import grpc

from appliance.errors import ApplianceError

GRPC_STATUS: Final[dict[str, grpc.StatusCode]] = {
    "internal": grpc.StatusCode.INTERNAL,
    "invalid-request": grpc.StatusCode.INVALID_ARGUMENT,
    "model-not-found": grpc.StatusCode.NOT_FOUND,
    "model-not-ready": grpc.StatusCode.UNAVAILABLE,
    "overloaded": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "deadline-exceeded": grpc.StatusCode.DEADLINE_EXCEEDED,
    "permission-denied": grpc.StatusCode.PERMISSION_DENIED,
    "unauthenticated": grpc.StatusCode.UNAUTHENTICATED,
    "conflict": grpc.StatusCode.ABORTED,
    "invalid-manifest": grpc.StatusCode.FAILED_PRECONDITION,
    "no-placement": grpc.StatusCode.FAILED_PRECONDITION,
    "artifact-corrupt": grpc.StatusCode.DATA_LOSS,
    "backend-error": grpc.StatusCode.INTERNAL,
    "worker-lost": grpc.StatusCode.UNAVAILABLE,
    "device-lost": grpc.StatusCode.UNAVAILABLE,
    "shutting-down": grpc.StatusCode.UNAVAILABLE,
    "cancelled": grpc.StatusCode.CANCELLED,
    "unimplemented": grpc.StatusCode.UNIMPLEMENTED,
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


def grpc_status(error: ApplianceError) -> grpc.StatusCode:
    """GRPC status of an error."""
    return GRPC_STATUS[error.kind]


def http_status(error: ApplianceError) -> int:
    """HTTP status of an error."""
    return HTTP_STATUS[error.kind]
