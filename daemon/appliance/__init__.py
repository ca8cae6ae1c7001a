"""The inference appliance's daemon."""

__version__ = "0.1.0"
