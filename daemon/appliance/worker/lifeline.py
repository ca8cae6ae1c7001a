"""Ties a worker process to the daemon: `appliance.lifeline`, and what the socket between the two adds."""

import os
import socket
import struct
from typing import Final

from appliance.lifeline import die_with_parent, volunteer_for_oom_kill

__all__ = ["die_with_parent", "parent_is_gone", "volunteer_for_oom_kill"]

_UCRED: Final = struct.Struct("3i")


def parent_is_gone(link: socket.socket) -> bool:
    """True where the process that made `link`, a socketpair inherited from the parent, is not the parent any more.

    The credentials of a socketpair's end are those of its maker (unix(7), SO_PEERCRED).
    """
    pid, _, _ = _UCRED.unpack(link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return bool(os.getppid() != pid)
