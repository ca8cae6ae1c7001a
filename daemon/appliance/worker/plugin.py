"""Finds one backend by its entry-point name and imports it. Only ever called in a child process."""

import grp
import os
import pwd
import stat
import sys
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path

from appliance.backend import ENTRY_POINT_GROUP, Backend


class PluginRefused(Exception):
    """A plugin that cannot be used as it is; the message says why."""


def find_backend(name: str) -> Backend:
    """Import and construct the backend called `name`.

    Raises:
        PluginRefused: There is no such entry point, or more than one, or it breaks the contract, or its files are
            open to others.
        Exception: Whatever importing it raises.
    """
    points = list(metadata.entry_points(group=ENTRY_POINT_GROUP, name=name))
    if not points:
        raise PluginRefused(
            f"no distribution in its environment offers the entry point {name!r} of {ENTRY_POINT_GROUP}"
        )
    if len(points) > 1:
        raise PluginRefused(f"{len(points)} distributions offer the entry point {name!r} of {ENTRY_POINT_GROUP}")
    refuse_open_files(points[0].module)
    backend = points[0].load()()
    if not isinstance(backend, Backend):
        raise PluginRefused(
            "it lacks a part of the contract: name, formats, scope, probe, candidates and load are needed"
        )
    if backend.name != name:
        raise PluginRefused(f"it calls itself {backend.name!r} and its entry point {name!r}; both must be equal")
    return backend


def distribution_of(name: str) -> str:
    """Name and version of the distribution that offers the backend called `name`, or an empty string."""
    for point in metadata.entry_points(group=ENTRY_POINT_GROUP, name=name):
        if point.dist:
            return f"{point.dist.name} {point.dist.version}"
    return ""


def refuse_open_files(module: str) -> None:
    """Refuse a module that somebody else could rewrite: its file, its packages' files and directories.

    Nothing is imported. Modules that are in no file (built in, zipped) pass.

    Raises:
        PluginRefused: Group or others may write. A user's private group (of the same name, with no other member) counts
            as the user, since common umasks leave it write permission.
    """
    search: list[str] | None = None
    prefix = ""
    for part in module.split("."):
        prefix = f"{prefix}.{part}" if prefix else part
        spec = _locate(prefix, search)
        if spec is None:
            return
        search = list(spec.submodule_search_locations) if spec.submodule_search_locations else None
        origin = [spec.origin] if spec.origin and spec.has_location else []
        for path in map(Path, [*origin, *(search or [])]):
            if path.exists() and _is_open(path.stat()):
                raise PluginRefused(f"{path.name!r} of module {prefix!r} is writable by group or others")


def _locate(name: str, search: list[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        spec = finder.find_spec(name, search)
        if spec is not None:
            return spec
    return None


def _is_open(status: os.stat_result) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    if not status.st_mode & stat.S_IWGRP:
        return False
    try:
        owner, group = pwd.getpwuid(status.st_uid).pw_name, grp.getgrgid(status.st_gid)
    except KeyError:
        return True
    return group.gr_name != owner or not set(group.gr_mem) <= {owner}
