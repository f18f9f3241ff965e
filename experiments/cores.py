"""How many cores this process may use. Needs nothing installed: the Makefile runs it before there is a .venv."""

from __future__ import annotations

import os
from pathlib import Path

_QUOTAS = ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us")


def usable_cores(quotas: tuple[str, str, str] = _QUOTAS) -> int:
    """Cores of the machine, less what affinity or a container's quota takes away; at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(*(Path(path) for path in quotas))
    return max(1, count if quota is None else min(count, int(quota)))


def _quota(unified: Path, quota: Path, period: Path) -> float | None:
    """Cores that a container may use by its time quota, of cgroup 2 or 1; None where nothing limits it."""
    try:
        fields = unified.read_text().split() if unified.exists() else [quota.read_text(), period.read_text()]
        limit, every = float(fields[0]), float(fields[1])
    except (OSError, ValueError, IndexError):  # "max", no such file, not Linux
        return None
    return limit / every if limit > 0 and every > 0 else None


def devices_to_train_on(cores: int) -> int:
    """Virtual devices for a run: one per core, as many as divide the recipes' batches."""
    return max(devices for devices in (1, 2, 4, 8) if devices <= cores)


if __name__ == "__main__":
    print(devices_to_train_on(usable_cores()))
