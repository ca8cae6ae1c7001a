"""Transports: each decodes, calls the engine, encodes. Only here do errors become status codes."""

import os

# Read by gRPC when it is first imported. The daemon spawns workers by exec, so gRPC's fork handlers only cost and warn.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
