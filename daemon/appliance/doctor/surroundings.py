"""Checks of what the daemon runs in: environment variables, limits, memory, the CPU it is given."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Final

from appliance.doctor import Finding, Severity
from appliance.doctor.facts import Facts
from appliance.doctor.hardware import unused
from appliance.plugins import PluginStatus
from appliance.types import ModelState

#: Variables that decide what a runtime finds and does, and whose devices they are about: a vendor, or ``"any"``. A name
#: that ends in ``*`` stands for all that begin so. None of them carries secrets.
RUNTIME_VARIABLES: Final = {
    "LD_LIBRARY_PATH": "any",
    "LD_PRELOAD": "any",
    "CUDA_*": "nvidia",
    "NVIDIA_*": "nvidia",
    "ONEAPI*": "intel",
    "OPENVINO*": "intel",
    "ZE_*": "intel",
    "ASCEND_*": "huawei",
    "OMP_*": "cpu",
    "KMP_*": "cpu",
}

#: A server's own descriptors, and those of workers, pipes and files.
_OWN_DESCRIPTORS: Final = 256
_TRANSPORTS: Final = 3
#: Loaded models need room for the requests they run.
_HEADROOM: Final = 1.2
_SCARCE_SHARE: Final = 0.05
_X86: Final = ("x86_64", "AMD64")
_ARM: Final = ("aarch64", "arm64")


def relevant(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of `environment` that matter to runtimes."""
    return {name: value for name, value in sorted(environment.items()) if _subject(name)}


def _subject(name: str) -> str:
    for known, subject in RUNTIME_VARIABLES.items():
        if name == known or (known.endswith("*") and name.startswith(known[:-1])):
            return subject
    return ""


def environment(facts: Facts) -> Iterator[Finding]:
    """Whoever asks has a variable that the daemon lacks, or has differently: it works in the shell and not here."""
    vendors = {each.vendor for each in facts.inventory.devices}
    idle = {each.vendor for each in unused(facts)}
    has_trouble = bool(idle) or any(
        record.status in (PluginStatus.FAILED, PluginStatus.UNSUPPORTED) for record in facts.backends.values()
    )
    for name, value in relevant(facts.caller_environment).items():
        own = facts.service_environment.get(name)
        subject = _subject(name)
        if own == value or (subject not in ("any", "cpu") and subject not in vendors):
            continue
        is_suspect = has_trouble if subject == "any" else subject in idle
        has = "lacks it" if own is None else f"has {_short(own)}"
        yield Finding(
            "environment",
            Severity.WARNING if is_suspect else Severity.NOTE,
            f"{name} is set in your shell and {'not' if own is None else 'differently'} for the daemon",
            f"your shell has {_short(value)} and the daemon {has}, so what works there may not work here",
            "where it is needed: "
            + facts.in_unit(
                # systemd.unit(5): a percent sign begins a specifier
                f"Environment={shlex.quote(f'{name}={value}'.replace('%', '%%'))}",
                f"export {name}={shlex.quote(value)}",
            ),
        )


def _short(value: str) -> str:
    return f"{value[:200]!r}{' and more' if len(value) > 200 else ''}"


def descriptors(facts: Facts) -> Iterator[Finding]:
    """Clients may open more connections than the daemon may have open files."""
    needed = _TRANSPORTS * facts.max_connections + _OWN_DESCRIPTORS
    if facts.descriptors < needed:
        yield Finding(
            "descriptors",
            Severity.WARNING,
            "the daemon may open too few files for its connections",
            f"it may have {facts.descriptors} open and may need {needed}: limits.max_connections is "
            f"{facts.max_connections} on each of {_TRANSPORTS} transports",
            facts.in_unit(f"LimitNOFILE={max(needed, 65536)}", f"ulimit -n {max(needed, 65536)}")
            + "; or lower limits.max_connections",
        )


def memory_limit(facts: Facts) -> Iterator[Finding]:
    """The control group allows less memory than the loaded models will take."""
    limit = facts.memory.limit
    loaded = [each.status for each in facts.models if each.status.state is ModelState.READY]
    held = sum(status.resident_bytes for status in loaded)
    if limit and held * _HEADROOM > limit:
        yield Finding(
            "memory-limit",
            Severity.WARNING,
            "the memory limit is too tight for the loaded models",
            f"loaded models hold {held >> 20} MiB and the control group's limit is {limit >> 20} MiB; "
            "beyond it the kernel kills workers",
            "unload models nobody needs (appliancectl unload NAME); or "
            + facts.in_unit(f"MemoryMax={_mebibytes(held * 1.5)}M", "raise the container's or the group's limit"),
        )


def _mebibytes(count: float) -> int:
    return int(count) >> 20


def memory(facts: Facts) -> Iterator[Finding]:
    """Hardly any memory is left."""
    found = facts.memory
    if found.total and found.available < _SCARCE_SHARE * found.total:
        loaded = sorted(facts.models, key=lambda each: each.status.resident_bytes, reverse=True)
        largest = (
            f"; the largest model is {loaded[0].status.name}" if loaded and loaded[0].status.resident_bytes else ""
        )
        yield Finding(
            "memory",
            Severity.WARNING,
            "memory is nearly used up",
            f"{found.available >> 20} of {found.total >> 20} MiB can still be had{largest}",
            "unload models nobody needs (appliancectl unload NAME), make smaller variants (appliancectl quantize "
            "NAME), end other programs, or add memory",
        )


def cpu_quota(facts: Facts) -> Iterator[Finding]:
    """The control group allows less than one core."""
    if facts.cpu_quota is not None and facts.cpu_quota < 1:
        yield Finding(
            "cpu-quota",
            Severity.WARNING,
            "the daemon is given less than one core",
            f"its control group allows {facts.cpu_quota:g} of a core, so every request is stopped in between and takes "
            "up to a tenth of a second longer",
            facts.in_unit("CPUQuota=", "raise the container's or the group's CPU limit"),
        )


def cpu_features(facts: Facts) -> Iterator[Finding]:
    """The CPU lacks the instructions that make inference fast."""
    architecture = facts.inventory.host.get("architecture", "")
    wanted = "avx2" if architecture in _X86 else "asimd" if architecture in _ARM else ""
    for each in facts.inventory.devices:
        if each.kind == "cpu" and wanted and wanted not in each.features:
            yield Finding(
                "cpu-features",
                Severity.WARNING,
                f"the CPU has no {wanted.upper()}",
                f"{each.name} does not show it; models run several times slower than on one that has it",
                "in a virtual machine: have the host pass its CPU through (libvirt: cpu mode host-passthrough); else "
                "use a GPU, or a newer machine",
            )
