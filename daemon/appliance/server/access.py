"""Who may do what: one table, one function, below every transport.

Identity on the Unix sockets is SO_PEERCRED. TCP has no identity at all and gets the role the configuration gives it.
"""

import socket
import struct
from collections.abc import Container
from typing import Final

from appliance.errors import PermissionDenied
from appliance.types import Peer, Role

#: Role a method needs. Methods carry the Open Inference Protocol's names where it has one.
METHOD_ROLE: Final[dict[str, Role]] = {
    "ServerLive": Role.INFER,
    "ServerReady": Role.INFER,
    "ServerMetadata": Role.INFER,
    "ModelReady": Role.INFER,
    "ModelMetadata": Role.INFER,
    "ModelConfig": Role.INFER,
    "ModelStatistics": Role.INFER,
    "ModelInfer": Role.INFER,
    "ModelStreamInfer": Role.INFER,
    "RepositoryIndex": Role.INFER,
    "RepositoryModelLoad": Role.ADMIN,
    "RepositoryModelUnload": Role.ADMIN,
    "Status": Role.INFER,
    "Hardware": Role.INFER,
    "HardwareRefresh": Role.ADMIN,
    "HardwareRecord": Role.ADMIN,
    "Backends": Role.INFER,
    "Explain": Role.INFER,
    "Jobs": Role.INFER,
    "JobCancel": Role.ADMIN,
    "Tune": Role.ADMIN,
    "Quantize": Role.ADMIN,
    "VariantRemove": Role.ADMIN,
    "Pin": Role.ADMIN,
    "Unpin": Role.ADMIN,
    "Instances": Role.INFER,
    "InstancesChange": Role.ADMIN,
    "Doctor": Role.ADMIN,
}

_UCRED: Final = struct.Struct("3i")


def peer_of(sock: socket.socket, transport: str, admin_uids: Container[int]) -> Peer:
    """The peer of a connected Unix socket: its uid, gid and pid, and the role that follows."""
    pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    role = Role.ADMIN if uid in admin_uids else Role.INFER
    return Peer(transport=transport, role=role, uid=uid, gid=gid, pid=pid)


def address_of(sock: socket.socket) -> str:
    """``host:port`` of the other end of a TCP connection; empty where it is gone already."""
    try:
        host, port = sock.getpeername()[:2]
    except OSError:
        return ""
    return f"{host}:{port}"


def may(role: Role, method: str) -> bool:
    """True where `role` covers `method`; a method missing from the table is nobody's."""
    needed = METHOD_ROLE.get(method)
    return needed is not None and (role is Role.ADMIN or needed is Role.INFER)


def authorise(peer: Peer, method: str) -> None:
    """Let `peer` call `method`, or raise.

    Raises:
        PermissionDenied: The peer's role is too low, or the method is in no row of the table.
    """
    if not may(peer.role, method):
        raise PermissionDenied(
            f"cannot call {method}: it needs the role admin, and this connection has {peer.role.value}"
        )
