"""Whether the service's user can open a device's nodes, and what helps where not."""

from collections.abc import Sequence
from dataclasses import dataclass

from appliance.inventory import Rung, Step
from appliance.inventory.fork import NoAnswer
from appliance.inventory.ladder import failed, passed
from appliance.inventory.system import Identity, Node, System

#: Reading and writing for the group.
_GROUP_BITS = 0o060


@dataclass(frozen=True, slots=True)
class Kind:
    """What sort of node it is.

    Attributes:
        absent: What helps where there is none.
        rule: The part of a udev rule that picks such nodes; empty where udev does not make them.
        group: The group such nodes usually have.
        unruled: What helps in a udev rule's stead.
        is_opened: Whether to open it; else its mode alone is looked at, since opening would wake the device.
        is_read_only: Whether reading it is all that is needed.
    """

    absent: str
    rule: str = ""
    group: str = ""
    unruled: str = ""
    is_opened: bool = True
    is_read_only: bool = False


def openable(system: System, kind: Kind, paths: Sequence[str]) -> Rung:
    """The rung OPENABLE of a device that needs every one of `paths`."""
    for path in paths:
        rung = _refusal(system, kind, path)
        if rung is not None:
            return rung
    return passed(Step.OPENABLE, ", ".join(paths))


def _refusal(system: System, kind: Kind, path: str) -> Rung | None:
    try:
        node = system.node(path)
    except OSError:
        return failed(Step.OPENABLE, f"there is no {path}", kind.absent)
    identity = system.identity()
    if not node.is_readable if kind.is_read_only else node.refusal:
        whose = f"it has owner {node.user}, group {node.group}, mode {node.mode:04o}"
        reason = f"user {identity.user} may not open {path}: {whose}"
        return failed(Step.OPENABLE, reason, _fix(identity, node, kind))
    if not kind.is_opened:
        return None
    try:
        error = system.ask("open", path)()
    except NoAnswer as silence:
        return failed(
            Step.OPENABLE,
            f"{path} cannot be opened: {silence}",
            "look for the driver's complaint in the kernel's log: sudo dmesg",
        )
    return _complaint(path, str(error)) if error else None


def _complaint(path: str, error: str) -> Rung:
    """Its mode allows it and the kernel does not."""
    if error in ("EPERM", "EACCES"):
        return failed(
            Step.OPENABLE,
            f"the control group forbids opening {path} ({error}), although its mode allows it",
            f"in a systemd unit: DeviceAllow={path} rw; in a container: --device {path}",
        )
    return failed(
        Step.OPENABLE,
        f"{path} cannot be opened: the driver answers {error}",
        "look for the driver's complaint in the kernel's log: sudo dmesg",
    )


def _fix(identity: Identity, node: Node, kind: Kind) -> str:
    if node.mode & _GROUP_BITS == _GROUP_BITS and node.group != "root":
        if node.group in identity.member_of and node.group not in identity.groups:
            return (
                f"restart the daemon (or log in again): user {identity.user} joined the group {node.group} after it "
                "was started"
            )
        return f"sudo usermod -aG {node.group} {identity.user}, then restart the daemon (or log in again)"
    if not kind.rule:
        return kind.unruled
    rule = f'{kind.rule}, GROUP="{kind.group}", MODE="0660"'
    return (
        f"add the udev rule {rule} in /etc/udev/rules.d/70-inference-appliance.rules, then "
        f"sudo udevadm control --reload && sudo udevadm trigger && sudo usermod -aG {kind.group} {identity.user}"
    )
