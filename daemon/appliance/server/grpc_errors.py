"""How errors leave over gRPC."""

import logging
import secrets
from typing import Any, Final, NoReturn

import grpc

from appliance.errors import ApplianceError
from appliance.server.status import grpc_status

_log = logging.getLogger("appliance.grpc")

#: Trailing metadata that carries the error's kind.
KIND_KEY: Final = "appliance-kind"

#: Bytes of a message at most: it travels percent-encoded in a header, and clients take 8 KiB of headers.
_MAX_DETAILS_BYTES: Final = 2048


async def abort(context: Any, error: ApplianceError) -> NoReturn:
    """End the call with the error's status, its message, and its kind in the trailing metadata."""
    details = str(error).encode("utf-8", "replace")[:_MAX_DETAILS_BYTES].decode("utf-8", "ignore")
    await context.abort(grpc_status(error), details, ((KIND_KEY, error.kind),))
    raise error


async def abort_unexpected(context: Any, method: str) -> NoReturn:
    """End a call that an exception of ours broke: the traceback goes to the log, the client gets its number only."""
    details = log_unexpected(method)
    await context.abort(grpc.StatusCode.INTERNAL, details, ((KIND_KEY, ApplianceError.kind),))
    raise ApplianceError(details)


def log_unexpected(method: str) -> str:
    """Log the exception being handled; returns what the client may know."""
    number = secrets.token_hex(8)
    _log.exception("%s failed, error %s", method, number)
    return f"cannot answer the call: internal error {number}, the daemon's log has more"
