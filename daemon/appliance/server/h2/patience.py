"""How much of what brings nothing a client may send: every frame costs us time, and some make us answer."""

from typing import Final

from appliance.server.h2.frames import Code, ConnectionBroken

# Between two looks of the sweep. Keepalives come every few seconds, estimates of bandwidth a few times a second.
_MAX_PINGS: Final = 64
_MAX_SETTINGS: Final = 64
_MAX_EMPTY: Final = 4096
#: Streams given up or refused, for each that a connection may have open: a client may withdraw all it has.
_MAX_RESETS_PER_STREAM: Final = 2


class Patience:
    """Counts one connection's frames between two looks of the sweep.

    After the word ``too_many_pings``, clients of gRPC ping less often (gRFC A8).
    """

    def __init__(self, max_streams: int) -> None:
        self._max_resets = _MAX_RESETS_PER_STREAM * max_streams + _MAX_PINGS
        self.renew()

    def renew(self) -> None:
        """Begin anew."""
        self._pings = self._settings = self._empty = self._resets = 0

    def ping(self) -> None:
        """A PING came.

        Raises:
            ConnectionBroken: Too many.
        """
        self._pings += 1
        if self._pings > _MAX_PINGS:
            raise ConnectionBroken(Code.ENHANCE_YOUR_CALM, "too_many_pings")

    def settings(self) -> None:
        """SETTINGS came.

        Raises:
            ConnectionBroken: Too often.
        """
        self._settings += 1
        if self._settings > _MAX_SETTINGS:
            raise ConnectionBroken(Code.ENHANCE_YOUR_CALM, "too_many_settings")

    def nothing(self) -> None:
        """A frame without meaning or content came.

        Raises:
            ConnectionBroken: Too many.
        """
        self._empty += 1
        if self._empty > _MAX_EMPTY:
            raise ConnectionBroken(Code.ENHANCE_YOUR_CALM, "too_many_empty_frames")

    def reset(self) -> None:
        """A stream was given up, refused or broken (CVE-2023-44487).

        Raises:
            ConnectionBroken: Too many.
        """
        self._resets += 1
        if self._resets > self._max_resets:
            raise ConnectionBroken(Code.ENHANCE_YOUR_CALM, "too_many_resets")
