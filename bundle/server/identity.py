"""Tell a process from a later one with the same process id."""

from pathlib import Path

import psutil

PROC = Path("/proc")
START_TICKS = 22 - 3  # field `starttime` of /proc/PID/stat, counted from the third field, the first after the name


def start_mark(pid: int) -> str:
    """Return a mark of a process's start: another process with the same id has another mark.

    On Linux it is the kernel's own start time, in clock ticks since boot, with the id of that boot. It stays the same
    when the clock is set (by NTP, or when a virtual machine resumes). psutil's `create_time` does not: it is
    computed from the current wall clock. On systems without /proc the kernel stores the wall clock's time at the start.

    Raises:
        psutil.NoSuchProcess: no process has this id.
    """
    try:
        boot = (PROC / "sys" / "kernel" / "random" / "boot_id").read_text().strip()
    except OSError:
        return f"created {psutil.Process(pid).create_time()}"
    try:
        stat = (PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError) as exc:
        raise psutil.NoSuchProcess(pid) from exc
    # the name stands in parentheses and may contain spaces and parentheses
    return f"boot {boot}, tick {stat.rpartition(')')[2].split()[START_TICKS]}"


def start_mark_of_command(pid: int, argument: str) -> str:
    """Return the start mark of a process whose command line contains `argument`; "" for any other process id."""
    try:
        return start_mark(pid) if argument and argument in " ".join(psutil.Process(pid).cmdline()) else ""
    except psutil.Error:
        return ""
