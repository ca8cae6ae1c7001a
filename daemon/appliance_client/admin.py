"""The administrative client: JSON over the daemon's HTTP socket. Needs neither numpy nor protobuf."""

import http.client
import json
import os
import socket
from pathlib import Path
from typing import Any, Final

from appliance_client import endpoints
from appliance_client.errors import ApplianceError, ConnectionLost, DeadlineExceeded, ProtocolError, error_of

#: Longest reply accepted.
_MAX_REPLY_BYTES: Final = 64 * 1024 * 1024


class AdminClient:
    """Asks and tells the daemon over its HTTP socket, one connection for each request.

    Args:
        path: The HTTP socket; by default ``$APPLIANCE_HTTP_SOCKET``, else beside ``$APPLIANCE_SOCKET``, else the user's
            own daemon, else the service.
        timeout: Seconds each request may take unless it says otherwise; None for no limit.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, *, timeout: float | None = 30.0) -> None:
        self._path = None if path is None else Path(path)
        self._timeout = timeout

    def get(self, path: str, *, timeout: float | None = None) -> Any:
        """GET a path.

        Args:
            path: Path and query, such as ``"/v2/models/digits"``.
            timeout: Seconds it may take; the client's own where None.

        Returns:
            The reply's JSON value, its text where it is no JSON, None where it is empty.

        Raises:
            DaemonUnreachable: Nothing listens at the socket.
            ApplianceError: What the daemon answered, or what became of the connection.
        """
        return self.request("GET", path, None, timeout=timeout)

    def post(self, path: str, body: Any = None, *, timeout: float | None = None) -> Any:
        """POST a JSON value; None sends an empty body. Otherwise as `get`."""
        return self.request("POST", path, body, timeout=timeout)

    def request(self, method: str, path: str, body: Any, *, timeout: float | None = None) -> Any:
        """Any method with a JSON body; as `get`."""
        headers = {"Accept": "application/json", "Connection": "close"}
        content = None
        if body is not None:
            content = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        connection = _UnixConnection(
            self._path or endpoints.http_socket(), self._timeout if timeout is None else timeout
        )
        try:
            connection.request(method, path, content, headers)
            response = connection.getresponse()
            reply = response.read(_MAX_REPLY_BYTES + 1)
            if response.length and len(reply) <= _MAX_REPLY_BYTES:
                raise http.client.IncompleteRead(reply, response.length)
        except ApplianceError:
            raise
        except TimeoutError:
            raise DeadlineExceeded(
                f"cannot finish {method} {path}: the daemon did not answer within the timeout"
            ) from None
        except (http.client.RemoteDisconnected, http.client.IncompleteRead):
            raise ConnectionLost(f"cannot finish {method} {path}: the daemon closed the connection") from None
        except http.client.HTTPException as problem:
            raise ProtocolError(f"cannot read the reply to {method} {path}: {type(problem).__name__}") from None
        except OSError as problem:
            reason = (problem.strerror or "it was closed").lower()
            raise ConnectionLost(f"cannot finish {method} {path}: the connection ended, {reason}") from None
        finally:
            connection.close()
        if len(reply) > _MAX_REPLY_BYTES:
            raise ProtocolError(f"cannot read the reply to {method} {path}: it has more than {_MAX_REPLY_BYTES} bytes")
        is_json = response.headers.get_content_type().endswith("json")
        if response.status >= 400:
            raise _refusal(method, path, response.status, reply, is_json)
        if not reply:
            return None
        return _parsed(method, path, reply) if is_json else reply.decode("utf-8", "replace")


class _UnixConnection(http.client.HTTPConnection):
    """HTTP to a Unix socket. The Host header says localhost, which the daemon accepts on its own socket."""

    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket.

        Raises:
            DaemonUnreachable: Nothing listens there.
        """
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(str(self._path))
        except OSError as problem:
            raise endpoints.unreachable(self._path, problem) from None


def _parsed(method: str, path: str, reply: bytes) -> Any:
    try:
        return json.loads(reply)
    except ValueError:
        raise ProtocolError(f"cannot read the reply to {method} {path}: it is not the JSON it claims to be") from None


def _refusal(method: str, path: str, status: int, reply: bytes, is_json: bool) -> ApplianceError:
    """The error in a reply: its kind where the daemon names one."""
    content = _parsed(method, path, reply) if is_json else None
    error = content.get("error") if isinstance(content, dict) else None
    if isinstance(error, dict):  # as the OpenAI-compatible paths nest it
        error = error.get("message")
    kind = content.get("kind") if isinstance(content, dict) else None
    message = error if isinstance(error, str) else f"cannot {method} {path}: the daemon answered with status {status}"
    return error_of(kind if isinstance(kind, str) else "internal", message)
