"""The inference appliance's daemon."""

import os

__version__ = "0.1.0"

# pydantic would read the metadata of every installed distribution, looking for plugins of its own: 30 ms of each start.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
