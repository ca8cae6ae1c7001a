"""What the daemon tells its administrator, as JSON values."""

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appliance import __version__
from appliance.errors import ModelNotFound
from appliance.server.oip import EXTENSIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from appliance.engine import Engine


def parse_statm(text: str, page_bytes: int) -> int:
    """Resident bytes from the text of /proc/self/statm, whose second field counts pages (proc(5))."""
    return int(text.split()[1]) * page_bytes


class AdminViews:
    """Reads the engine for ``/admin`` and the server metadata.

    Args:
        engine: What is shown.
        endpoints: Listening sockets by name; shown as they are at the time.
    """

    def __init__(self, engine: "Engine", endpoints: "Mapping[str, str]") -> None:
        self._engine = engine
        self._endpoints = endpoints
        self._started = time.monotonic()

    def server_metadata(self) -> dict[str, Any]:
        """Answer of ``GET /v2``."""
        return {"name": "inference-appliance", "version": __version__, "extensions": EXTENSIONS}

    def resident_bytes(self) -> int:
        """Resident memory of the front-end."""
        return parse_statm(Path("/proc/self/statm").read_text(encoding="ascii"), os.sysconf("SC_PAGE_SIZE"))

    def status(self) -> dict[str, Any]:
        """The daemon and every model."""
        return {
            "version": __version__,
            "ready": self._engine.is_ready(),
            "accepting": self._engine.accepting,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._started, 3),
            "rss_bytes": self.resident_bytes(),
            "sockets": dict(self._endpoints),
            "models": self.models(),
        }

    def models(self) -> list[dict[str, Any]]:
        """Every model of the repository."""
        return [asdict(status) for status in self._engine.statuses()]

    def model(self, name: str) -> dict[str, Any]:
        """One model.

        Raises:
            ModelNotFound: There is none of that name.
        """
        for status in self._engine.statuses():
            if status.name == name:
                return asdict(status)
        raise ModelNotFound(f"cannot find model {name[:64]!r}: the repository has none of that name")

    async def hardware(self) -> dict[str, Any]:
        """The machine as the daemon sees it, with what backends make of each device."""
        return asdict(await self._engine.hardware.climbed())

    async def backends(self) -> list[dict[str, Any]]:
        """Every plugin found, usable or not."""
        return [
            {key: value for key, value in asdict(record).items() if key != "variants"}
            for record in (await self._engine.backends()).values()
        ]
