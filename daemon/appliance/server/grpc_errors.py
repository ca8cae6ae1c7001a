"""What a client learns of errors that are ours."""

import logging
import secrets

_log = logging.getLogger("appliance.grpc")


def log_unexpected(method: str) -> str:
    """Log the exception being handled; returns what the client may know."""
    number = secrets.token_hex(8)
    _log.exception("%s failed, error %s", method, number)
    return f"cannot answer the call: internal error {number}, the daemon's log has more"
