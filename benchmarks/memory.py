"""Free memory of the machine, and memory of this process, on systems that have /proc."""

import pathlib
from collections.abc import Callable

_PROC = pathlib.Path("/proc")


def available() -> float:
    """Return the bytes of memory available to new processes, or infinity where unknown."""
    if not (_PROC / "meminfo").exists():
        return float("inf")
    return _field(_PROC / "meminfo", "MemAvailable")


def peak_of(call: Callable[[], object]) -> int | None:
    """Run `call`, and return by how many bytes of memory the process grew at its peak.

    Returns `None` where the system does not report it; `call` runs all the same.
    """
    process = _PROC / "self"
    if not (process / "clear_refs").exists():
        call()
        return None
    (process / "clear_refs").write_text("5")  # Linux then resets VmHWM, the peak
    before = _field(process / "status", "VmRSS")
    call()
    return _field(process / "status", "VmHWM") - before


def resident() -> int | None:
    """Return the bytes of memory that this process occupies, or `None` where unknown."""
    status = _PROC / "self" / "status"
    return _field(status, "VmRSS") if status.exists() else None


def _field(path: pathlib.Path, name: str) -> int:
    """Return a field of a file of /proc in bytes; the file has it in KiB."""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return 1024 * int(value.split()[0])
    raise ValueError(f"{path} has no field {name}")
