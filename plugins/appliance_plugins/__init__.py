"""Backends that ship with the appliance; they come in through the same door as any other."""
