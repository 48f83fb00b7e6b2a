"""How much memory there is, and how much a step takes, on systems that have /proc."""

import pathlib
from collections.abc import Callable

_PROC = pathlib.Path("/proc")


def available() -> float:
    """Bytes, infinitely many where the system does not say."""
    if not (_PROC / "meminfo").exists():
        return float("inf")
    return _field(_PROC / "meminfo", "MemAvailable")


def peak_of(call: Callable[[], object]) -> int | None:
    """By how many bytes the process grows at most while `call` runs."""
    process = _PROC / "self"
    if not (process / "clear_refs").exists():
        call()
        return None
    (process / "clear_refs").write_text("5")  # resets VmHWM
    before = _field(process / "status", "VmRSS")
    call()
    return _field(process / "status", "VmHWM") - before


def resident() -> int | None:
    """Return the bytes of memory that the process uses, `None` where the system does not say."""
    status = _PROC / "self" / "status"
    return _field(status, "VmRSS") if status.exists() else None


def _field(path: pathlib.Path, name: str) -> int:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return 1024 * int(value.split()[0])
    raise ValueError(f"{path} has no field {name}")
