"""Words for what a vendor runtime raised. They may travel to any client, so they carry no path and no address."""

import re
from typing import Final

_PATH: Final = re.compile(r"(?<![\w.:/])/(?:[^\s'\"():;,/]+/)+([^\s'\"():;,/]*)")
_ADDRESS: Final = re.compile(r"\b0x[0-9a-fA-F]{6,}\b")
_MAX_CHARACTERS: Final = 600


def presentable(error: BaseException) -> str:
    """The exception's type and message on one line, absolute paths cut to their last part, at most 600 characters."""
    text = " ".join(str(error).split())
    text = _ADDRESS.sub("an address", _PATH.sub(r"\1", text))
    shown = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return shown if len(shown) <= _MAX_CHARACTERS else shown[: _MAX_CHARACTERS - 3] + "..."
