"""The process that owns the registry: the only place that opens the database, and the only one with its library.

``appliance.registry`` starts it when there is something to read or write, and lets it go when it has been idle.
"""
