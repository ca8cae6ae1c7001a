"""Client library of the inference appliance: ten lines from import to answer.

    from appliance_client import Client

    with Client() as client:
        answer = client.infer("language-id", {"text": ["Guten Morgen"]}, timeout=1.0)
        print(answer.text("label"), answer.timings)

`Client` blocks and may be shared between threads, `AsyncClient` is for asyncio, `AdminClient` speaks to the HTTP
socket. Names load on first use: importing the package alone brings in neither numpy nor protobuf nor asyncio, so a
command line tool that needs only `AdminClient` starts fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from appliance_client.errors import (
    ApplianceError,
    ArtifactCorrupt,
    BackendError,
    Cancelled,
    Conflict,
    ConnectionLost,
    DaemonUnreachable,
    DeadlineExceeded,
    DeviceLost,
    InvalidManifest,
    InvalidRequest,
    ModelNotFound,
    ModelNotReady,
    NoPlacement,
    Overloaded,
    PermissionDenied,
    ProtocolError,
    ShuttingDown,
    Unauthenticated,
    Unimplemented,
    WorkerLost,
)

if TYPE_CHECKING:
    from appliance_client.admin import AdminClient
    from appliance_client.answer import Answer, Timings
    from appliance_client.async_client import AsyncClient
    from appliance_client.client import Client
    from appliance_client.tensors import Tensor

__all__ = [
    "AdminClient",
    "Answer",
    "ApplianceError",
    "ArtifactCorrupt",
    "AsyncClient",
    "BackendError",
    "Cancelled",
    "Client",
    "Conflict",
    "ConnectionLost",
    "DaemonUnreachable",
    "DeadlineExceeded",
    "DeviceLost",
    "InvalidManifest",
    "InvalidRequest",
    "ModelNotFound",
    "ModelNotReady",
    "NoPlacement",
    "Overloaded",
    "PermissionDenied",
    "ProtocolError",
    "ShuttingDown",
    "Tensor",
    "Timings",
    "Unauthenticated",
    "Unimplemented",
    "WorkerLost",
]

_HOME = {
    "AdminClient": "admin",
    "Answer": "answer",
    "AsyncClient": "async_client",
    "Client": "client",
    "Tensor": "tensors",
    "Timings": "answer",
}


def __getattr__(name: str) -> object:
    """Load a class on first use."""
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
