"""A recorded machine that stands in for a real one."""

import errno
import json
from pathlib import Path

from appliance.inventory.fork import NoAnswer
from appliance.inventory.system import Identity, Node

MACHINES = Path(__file__).parents[1] / "machines"

#: What every recorded machine was asked about, by purpose.
DIRECTORIES = {"models": "/srv/appliance/models", "cache": "/var/cache/appliance", "state": "/var/lib/appliance"}


def recording(name):
    """The recording called `name`."""
    return json.loads((MACHINES / f"{name}.json").read_text(encoding="utf-8"))


class Replay:
    """A `System` that answers from a recording; `document` may be changed at any time.

    What was not recorded does not exist. A directory's names follow from what was recorded below it, unless it was
    listed itself; a node that may be opened by its mode opens.
    """

    def __init__(self, document):
        self.document = document

    @classmethod
    def of(cls, name):
        return cls(recording(name))

    def _missing(self, what, path):
        number = self.document["errors"].get(f"{what} {path}", errno.ENOENT)
        return OSError(number, "recorded", path)

    def read(self, path):
        try:
            return self.document["files"][path]
        except KeyError:
            raise self._missing("read", path) from None

    def names(self, path):
        listed = self.document["directories"].get(path)
        if listed is not None:
            return tuple(sorted(listed))
        known = (
            *self.document["files"],
            *self.document["links"],
            *self.document["nodes"],
            *self.document["directories"],
        )
        below = {one.removeprefix(f"{path}/").partition("/")[0] for one in known if one.startswith(f"{path}/")}
        if not below:
            raise self._missing("names", path)
        return tuple(sorted(below))

    def link(self, path):
        try:
            return self.document["links"][path]
        except KeyError:
            raise self._missing("link", path) from None

    def node(self, path):
        found = self.document["nodes"].get(path)
        if found is not None:
            return Node(**found)
        if path in self.document["files"]:
            return Node(0o444, "root", "root")
        raise self._missing("node", path)

    def identity(self):
        values = self.document["identity"]
        return Identity(values["uid"], values["user"], tuple(values["groups"]), tuple(values["member_of"]))

    def affinity(self):
        return tuple(self.document["affinity"])

    def kernel(self):
        release, architecture = self.document["kernel"]
        return release, architecture

    def ask(self, question, argument=""):
        key = question if question == "nvml" else f"{question} {argument}".strip()
        answer = self.document["answers"].get(key)

        def wait():
            if answer is None:
                if question == "open":
                    return ""
                raise NoAnswer("it was not asked")
            if "failed" in answer:
                raise NoAnswer(answer["failed"])
            return answer["answer"]

        return wait
