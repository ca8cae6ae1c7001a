"""Writes down everything that is read of a machine, so that it can be looked at elsewhere.

Serial numbers and the option lists of mounts are left out. ``tests/machines/README.md`` describes the format.
"""

from dataclasses import asdict
from typing import Any, Final

from appliance.inventory.cpu import thin_cpuinfo
from appliance.inventory.fork import NoAnswer
from appliance.inventory.mounts import thin_mountinfo
from appliance.inventory.system import Identity, Node, System, Waiter

FORMAT: Final = 1

_THINNED: Final = {"/proc/cpuinfo": thin_cpuinfo, "/proc/self/mountinfo": thin_mountinfo}


class Recorder:
    """A system that notes what is read through it.

    Args:
        system: The machine.

    Attributes:
        document: The recording, a JSON value.
    """

    def __init__(self, system: System) -> None:
        self._system = system
        self.document: dict[str, Any] = {
            "format": FORMAT,
            "identity": {},
            "affinity": [],
            "kernel": [],
            "files": {},
            "directories": {},
            "links": {},
            "nodes": {},
            "answers": {},
            "errors": {},
        }

    def _failed(self, what: str, path: str, error: OSError) -> None:
        self.document["errors"][f"{what} {path}"] = error.errno

    def read(self, path: str) -> str:
        """As `System.read`."""
        try:
            text = self._system.read(path)
        except OSError as error:
            self._failed("read", path, error)
            raise
        thin = _THINNED.get(path)
        self.document["files"][path] = thin(text) if thin else text
        return text

    def names(self, path: str) -> tuple[str, ...]:
        """As `System.names`."""
        try:
            names = self._system.names(path)
        except OSError as error:
            self._failed("names", path, error)
            raise
        self.document["directories"][path] = list(names)
        return names

    def link(self, path: str) -> str:
        """As `System.link`."""
        try:
            target = self._system.link(path)
        except OSError as error:
            self._failed("link", path, error)
            raise
        self.document["links"][path] = target
        return target

    def node(self, path: str) -> Node:
        """As `System.node`."""
        try:
            node = self._system.node(path)
        except OSError as error:
            self._failed("node", path, error)
            raise
        self.document["nodes"][path] = asdict(node)
        return node

    def identity(self) -> Identity:
        """As `System.identity`."""
        identity = self._system.identity()
        self.document["identity"] = asdict(identity)
        return identity

    def affinity(self) -> tuple[int, ...]:
        """As `System.affinity`."""
        cores = self._system.affinity()
        self.document["affinity"] = list(cores)
        return cores

    def kernel(self) -> tuple[str, str]:
        """As `System.kernel`."""
        kernel = self._system.kernel()
        self.document["kernel"] = list(kernel)
        return kernel

    def ask(self, question: str, argument: str = "") -> Waiter:
        """As `System.ask`."""
        waiter = self._system.ask(question, argument)
        # The argument of NVML is a process id, which says nothing elsewhere.
        key = question if question == "nvml" else f"{question} {argument}".strip()

        def wait() -> Any:
            try:
                answer = waiter()
            except NoAnswer as silence:
                self.document["answers"][key] = {"failed": str(silence)}
                raise
            self.document["answers"][key] = {"answer": answer}
            return answer

        return wait
