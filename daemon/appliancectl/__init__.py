"""Administers the appliance from the command line."""
