"""What is wrong with an installation, and what to do about it.

`gathering` looks, `diagnosis` judges: a pure function from `Facts` to a list of `Finding`. So every fault can be seeded
as a value. A check belongs to the module of its subject; `diagnosis.CHECKS` is the list of them all.
"""

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad it is. With notes alone an installation is healthy."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        check: Name of the check that found it.
        severity: Something does not work; or works worse than it could; or is only good to know.
        title: What is wrong, in a line.
        reason: How that is known, and why.
        fix: What a person can do about it: a command, a package, a line of configuration.
    """

    check: str
    severity: Severity
    title: str
    reason: str
    fix: str
