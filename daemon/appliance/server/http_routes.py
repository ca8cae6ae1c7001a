"""The table of HTTP routes, and how a path finds its row."""

import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from appliance.server.http_message import Request, Response

Handler = Callable[[Request], Awaitable[Response]]

_NAME = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Route:
    """One row.

    Attributes:
        method: ``GET`` (which serves HEAD too) or ``POST``.
        template: Path with ``{names}``; a part in brackets may be absent.
        access: The method's name in the access table.
        handler: Answers the request.
    """

    method: str
    template: str
    access: str
    handler: Handler
    pattern: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        escaped = re.escape(self.template).replace(r"\{", "{").replace(r"\}", "}")
        optional = escaped.replace(r"\[", "(?:").replace(r"\]", ")?")
        object.__setattr__(self, "pattern", re.compile(_NAME.sub(r"(?P<\1>[^/]+)", optional)))


@dataclass(frozen=True, slots=True)
class Match:
    """What a path led to: a row with the path's parts, or the methods that would have led to one."""

    route: Route | None
    names: dict[str, str] = field(default_factory=dict)
    allowed: tuple[str, ...] = ()


class Routes:
    """Rows by path: those without names in a dictionary, the others in order."""

    def __init__(self, rows: Sequence[Route]) -> None:
        self._fixed: dict[str, list[Route]] = {}
        self._named: list[Route] = []
        for row in rows:
            if row.pattern.groups or "[" in row.template:
                self._named.append(row)
            else:
                self._fixed.setdefault(row.template, []).append(row)

    def match(self, method: str, path: str) -> Match:
        """The row for a method and a path; HEAD takes GET's."""
        wanted = "GET" if method == "HEAD" else method
        allowed: list[str] = []
        for row in self._fixed.get(path, ()):
            if row.method == wanted:
                return Match(row)
            allowed.append(row.method)
        if allowed:
            return Match(None, allowed=tuple(allowed))
        for row in self._named:
            found = row.pattern.fullmatch(path)
            if found is None:
                continue
            if row.method == wanted:
                return Match(row, {name: part or "" for name, part in found.groupdict().items()})
            allowed.append(row.method)
        return Match(None, allowed=tuple(allowed))
