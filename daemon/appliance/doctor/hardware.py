"""Checks of devices, and of the plugins and runtimes that are to use them."""

import shlex
from collections.abc import Iterable, Iterator
from typing import Final

from appliance.doctor import Finding, Severity
from appliance.doctor.facts import Facts
from appliance.inventory import Device, Step
from appliance.plugins import PluginStatus, reasons_unlisted

#: Distributions that install the same module, by module: of two in one environment the later overwrites the earlier.
RIVALS: Final = {
    "onnxruntime": frozenset(
        f"onnxruntime{suffix}"
        for suffix in ("", "-gpu", "-openvino", "-cann", "-directml", "-migraphx", "-qnn", "-rocm", "-training")
    ),
    "openvino": frozenset({"openvino", "openvino-nightly"}),
}

_STEP_WORDS: Final = {
    Step.PRESENT: "cannot be seen",
    Step.DRIVER: "has no working driver",
    Step.OPENABLE: "may not be opened by the daemon",
    Step.LISTED: "is not listed by any runtime",
    Step.SMOKE: "computes wrongly or not at all",
}

#: What runs on a vendor's devices, where nothing that is installed does.
_RUNTIMES: Final = {
    "nvidia": (
        "install onnxruntime-gpu in an environment of its own: python3 -m venv cuda && cuda/bin/pip install "
        "inference-appliance && cuda/bin/pip uninstall -y onnxruntime && cuda/bin/pip install "
        "'onnxruntime-gpu[cuda,cudnn]', write python = \".../cuda/bin/python\" below [backends.onnxruntime] in the "
        "configuration and restart the daemon"
    ),
    "intel": (
        "install OpenVINO (pip install openvino) and the device's user-space driver: package intel-opencl-icd for a "
        "GPU, intel-level-zero-npu for an NPU; then restart the daemon"
    ),
    "huawei": (
        "install CANN, and a backend plugin for Ascend with onnxruntime-cann in an environment of its own; write its "
        "interpreter as python below [backends.NAME] in the configuration and restart the daemon"
    ),
}


def survey(facts: Facts) -> Iterator[Finding]:
    """The hardware could not be read in full."""
    for problem in facts.inventory.problems:
        yield Finding(
            "survey",
            Severity.WARNING,
            "part of the hardware is unknown",
            problem,
            "appliancectl hardware --refresh looks again; sudo dmesg shows what drivers complain of",
        )


def device(facts: Facts) -> Iterator[Finding]:
    """A device is there and cannot be used."""
    for each in facts.inventory.devices:
        failed = each.failed
        if failed is not None:
            yield Finding(
                "device",
                Severity.WARNING if each.is_integrated else Severity.ERROR,
                f"{_named(each)} {_STEP_WORDS[failed.step]}",
                _with_user(facts, failed.step, failed.reason),
                failed.fix or "appliancectl hardware shows how far it gets",
            )


def _with_user(facts: Facts, step: Step, reason: str) -> str:
    if step is not Step.OPENABLE or facts.service.user in reason.split():
        return reason
    return f"{reason} (the daemon runs as {facts.service.user})"


def unused_device(facts: Facts) -> Iterator[Finding]:
    """A device could be used and no backend does."""
    for each in unused(facts):
        unusable = (
            f"{record.name} is {record.status.value}: {record.reason}"
            for record in facts.backends.values()
            if record.status is not PluginStatus.AVAILABLE
        )
        reasons = filter(None, (reasons_unlisted(facts.backends.values(), each.id), *unusable))
        yield Finding(
            "unused-device",
            Severity.WARNING,
            f"{_named(each)} is idle: no backend runs on it",
            "; ".join(reasons) or "no installed backend serves such a device",
            _RUNTIMES.get(each.vendor, "install a backend plugin for it; appliancectl backends lists those there are"),
        )


def unused(facts: Facts) -> list[Device]:
    """Usable devices that no available backend uses."""
    used = {
        device_id
        for record in facts.backends.values()
        if record.status is PluginStatus.AVAILABLE
        for device_id in record.devices
    }
    return [each for each in facts.inventory.devices if each.is_usable and each.id not in used]


def _named(each: Device) -> str:
    return f"{each.id} ({each.name})"


def backend(facts: Facts) -> Iterator[Finding]:
    """A backend is installed and does not serve."""
    for record in facts.backends.values():
        unwanted = f"where it is not wanted, enabled = false below [backends.{record.name}] in the configuration"
        if record.status is PluginStatus.FAILED:
            yield Finding(
                "backend",
                Severity.ERROR,
                f"the backend {record.name} is broken",
                record.reason,
                f"install {_distribution(record.distribution)} and its runtime again for {record.python}, or remove "
                f"it; {unwanted}",
            )
        elif record.status is PluginStatus.UNSUPPORTED:
            yield Finding(
                "backend",
                Severity.WARNING,
                f"the backend {record.name} can use nothing here",
                record.reason,
                f"bring what the reason names and restart the daemon; {unwanted}",
            )
        elif record.status is PluginStatus.DISABLED:
            yield Finding(
                "backend",
                Severity.NOTE,
                f"the backend {record.name} is disabled",
                record.reason,
                f"where it is wanted, enabled = true below [backends.{record.name}] in the configuration; then restart "
                "the daemon",
            )


def _distribution(distribution: str) -> str:
    return f"its plugin ({distribution})" if distribution else "its plugin"


def no_backend(facts: Facts) -> Iterator[Finding]:
    """Nothing can serve anything."""
    if not facts.backends:
        yield Finding(
            "no-backend",
            Severity.ERROR,
            "no backend is installed",
            "no distribution of the daemon's environment offers one",
            "install the appliance again: pip install --force-reinstall inference-appliance",
        )


def runtime_clash(facts: Facts) -> Iterator[Finding]:
    """Two distributions install the same module, so one has overwritten the other's files."""
    for environment in facts.environments:
        for module, rivals in RIVALS.items():
            found = sorted(rivals & environment.distributions)
            if len(found) > 1:
                yield Finding(
                    "runtime-clash",
                    Severity.WARNING,
                    f"{_listed(found)} are installed in one environment",
                    f"all of them install the module {module}, so each overwrites files of the others in the "
                    f"environment of {environment.python}, and which one is used is an accident",
                    f"{shlex.quote(environment.python)} -m pip uninstall -y {' '.join(found)}, then install again the "
                    "one that is wanted; give each other one an environment of its own and name its interpreter as "
                    "python below [backends.NAME] in the configuration",
                )


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}"
