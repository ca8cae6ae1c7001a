"""The host's memory: the machine's, what the control groups leave of it, and its huge pages."""

import re

from appliance.inventory import Memory
from appliance.inventory.cgroup import Limits
from appliance.inventory.system import System, peek


def parse_meminfo(text: str) -> dict[str, int]:
    """Values of /proc/meminfo by name: bytes where it says kB, else counts."""
    found = re.finditer(r"^(\S+):\s*(\d+)( kB)?$", text, re.MULTILINE)
    return {match[1]: int(match[2]) * (1024 if match[3] else 1) for match in found}


def read_memory(system: System, limits: Limits) -> Memory:
    """The memory this process may use.

    Raises:
        OSError: /proc/meminfo cannot be read.
        ValueError: It names no total.
    """
    values = parse_meminfo(system.read("/proc/meminfo"))
    machine = values.get("MemTotal", 0)
    if not machine:
        raise ValueError("/proc/meminfo has no MemTotal")
    available = values.get("MemAvailable", values.get("MemFree", 0))
    return Memory(
        total=min(machine, limits.memory or machine),
        machine=machine,
        limit=limits.memory,
        available=available if limits.memory_left is None else min(available, limits.memory_left),
        huge_page_bytes=values.get("Hugepagesize", 0),
        huge_pages=values.get("HugePages_Total", 0),
    )


def transparent_huge_pages(system: System) -> str:
    """When the kernel makes huge pages by itself: ``"always"``, ``"madvise"`` or ``"never"``; empty where unknown."""
    chosen = re.search(r"\[(\w+)\]", peek(system, "/sys/kernel/mm/transparent_hugepage/enabled"))
    return chosen[1] if chosen else ""
