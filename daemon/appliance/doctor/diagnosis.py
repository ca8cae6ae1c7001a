"""From facts to findings."""

from collections.abc import Callable, Iterable
from typing import Final

from appliance.doctor import Finding, Severity, hardware, models, storage, surroundings
from appliance.doctor.facts import Facts

Check = Callable[[Facts], Iterable[Finding]]

#: Every check by name, in the order findings of equal severity are shown.
CHECKS: Final[dict[str, Check]] = {
    "no-backend": hardware.no_backend,
    "backend": hardware.backend,
    "runtime-clash": hardware.runtime_clash,
    "survey": hardware.survey,
    "device": hardware.device,
    "unused-device": hardware.unused_device,
    "environment": surroundings.environment,
    "model": models.model,
    "crashes": models.crashes,
    "placement": models.placement,
    "fallback": models.fallback,
    "pin": models.pin,
    "measurements": models.measurements,
    "directory": storage.directory,
    "disk-space": storage.disk_space,
    "registry": storage.registry,
    "descriptors": surroundings.descriptors,
    "memory-limit": surroundings.memory_limit,
    "memory": surroundings.memory,
    "swapped": models.swapped,
    "cpu-quota": surroundings.cpu_quota,
    "cpu-features": surroundings.cpu_features,
}

_ORDER: Final = tuple(Severity)


def diagnose(facts: Facts) -> list[Finding]:
    """What is wrong, the worst first."""
    found = [finding for check in CHECKS.values() for finding in check(facts)]
    return sorted(found, key=lambda finding: _ORDER.index(finding.severity))


def is_healthy(findings: Iterable[Finding]) -> bool:
    """True where nothing but notes was found."""
    return all(finding.severity is Severity.NOTE for finding in findings)
