"""The machine under a run: what it costs, the energy and memory it uses, and what `env.json` says about it.

Whatever can't be read is None, never 0.
"""

import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

CPUINFO = Path("/proc/cpuinfo")
POWERCAP = Path("/sys/class/powercap")
PROC_SELF = Path("/proc/self")
PACKAGES = ("torch", "transformers", "triton", "numpy", "hydra-core", "wandb", "specdec-lab")
BF16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}  # the last one is Arm's


@dataclass(frozen=True)
class Hardware:
    """A name, and what an hour of it costs.

    price_per_hour  US dollars; None: cost is not reported
    device          "cpu" or "cuda", what the price buys; None: any
    ValueError: another price or device
    """

    name: str
    price_per_hour: float | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(
                f"hardware.device={self.device}: expected cpu, cuda, or null for any; "
                "for example hardware.device=null"
            )
        price = self.price_per_hour
        if price is None or (type(price) in (int, float) and 0 <= price < math.inf):
            return
        raise ValueError(
            f"hardware.price_per_hour={price!r}: expected US dollars per hour, 0 or more, or null; "
            "for example hardware.price_per_hour=2.5"
        )

    def check_prices(self, device: torch.device) -> None:
        """ValueError for a device that the price does not buy."""
        if self.device not in (None, device.type):
            raise ValueError(
                f"hardware={self.name} is a price of {self.device}, the target runs on {device.type}, "
                f"expected one for both: target.device={self.device}, or hardware=local "
                "hardware.price_per_hour=PRICE"
            )


@dataclass(frozen=True)
class EnergyCounter:
    """A counter that grows until it wraps at `wraps_at` (None: it never does); one tick is `joules`."""

    read: Callable[[], int]
    joules: float
    wraps_at: int | None = None

    def joules_between(self, before: int, after: int) -> float:
        """Energy between two readings less than one turn apart (an hour at 70 W, for the common 262 kJ)."""
        wrapped = self.wraps_at is not None and after < before
        return (after - before + (self.wraps_at if wrapped else 0)) * self.joules


class EnergyMeter:
    """Joules between `start()` and `stop()`. The caller synchronises the device before either.

    On CUDA the meter sees the GPU alone, on a CPU all its packages, whatever else runs on them.
    """

    def __init__(self, counters: Sequence[EnergyCounter]) -> None:
        self._counters = counters
        self._before: list[int] | None = None

    @classmethod
    def for_device(cls, device: torch.device | str, powercap: Path = POWERCAP) -> "EnergyMeter":
        """NVML for a CUDA device, RAPL under `powercap` for the CPU; elsewhere `stop()` gives None.

        A GPU that can't be read does not fall back on RAPL: the host's joules are not the run's.
        """
        device = torch.device(device)
        if device.type == "cuda":
            return cls(_nvml_counters(device))
        return cls(_rapl_counters(powercap) if device.type == "cpu" else [])

    def start(self) -> None:
        """Take the first reading; a later `start()` begins anew."""
        self._before = self._read()

    def stop(self) -> float | None:
        """Joules since `start()`; None where they can't be read or the counter did not move."""
        before, self._before = self._before, None
        after = self._read()
        if not before or not after:
            return None
        joules = sum(c.joules_between(a, b) for c, a, b in zip(self._counters, before, after, strict=True))
        return joules if joules > 0 else None

    def _read(self) -> list[int] | None:
        try:
            return [counter.read() for counter in self._counters]
        except Exception:  # NVML's own exception classes exist only where NVML does
            return None


def _nvml_counters(device: torch.device) -> list[EnergyCounter]:
    try:
        import pynvml

        pynvml.nvmlInit()
        # By UUID: NVML's numbering knows nothing of CUDA_VISIBLE_DEVICES.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except Exception:  # not installed, no driver, a MIG slice, an old GPU: all mean "can't be read"
        return []
    return [EnergyCounter(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), joules=1e-3)]


def _rapl_counters(powercap: Path) -> list[EnergyCounter]:
    try:
        zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if _is_package(zone)]
        return [_rapl_counter(zone) for zone in zones]
    except (OSError, ValueError):
        return []


def _is_package(zone: Path) -> bool:
    # Core and dram zones lie inside a package, psys around them all: adding them would count joules twice.
    return (zone / "name").read_text().startswith("package")


def _rapl_counter(zone: Path) -> EnergyCounter:
    wraps_at = int((zone / "max_energy_range_uj").read_text())
    return EnergyCounter(lambda: int((zone / "energy_uj").read_text()), joules=1e-6, wraps_at=wraps_at)


class PeakMemory:
    """Peak memory since `reset()`: torch's allocations on CUDA, this process's resident set on a CPU."""

    def __init__(self, device: torch.device | str, proc: Path = PROC_SELF) -> None:
        self.device = torch.device(device)
        self._proc = proc
        self._is_reset = False

    def reset(self) -> None:
        """Forget earlier peaks; what is allocated now still counts."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._is_reset = self.device.type == "cuda" or (
            self.device.type == "cpu" and self._reset_resident_peak()
        )

    def peak_mb(self) -> float | None:
        """Megabytes (10^6 bytes); None before a reset, or where the reset is not permitted or not known."""
        if not self._is_reset:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        kibibytes = _field(self._proc / "status", "VmHWM")
        return int(kibibytes.split()[0]) * 1024 / 1e6 if kibibytes else None

    def _reset_resident_peak(self) -> bool:
        try:
            (self._proc / "clear_refs").write_text("5")
        except OSError:
            return False
        return True


def native_bf16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware; False where that can't be read."""
    flags = _field(cpuinfo, "flags") or _field(cpuinfo, "Features") or ""
    return not BF16_FLAGS.isdisjoint(flags.split())


def _field(path: Path, key: str) -> str | None:
    """The value of the first `key : value` line of a /proc file; None without the file or the line."""
    try:
        pairs = (line.partition(":") for line in path.read_text().splitlines())
    except OSError:
        return None
    return next((value.strip() for name, _, value in pairs if name.strip() == key), None)


def environment(argv: Sequence[str]) -> dict[str, Any]:
    """What `env.json` holds: date, command, software, machine. JSON types only; None for what is unknown."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": list(argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {
            "model": _field(CPUINFO, "model name") or platform.processor() or None,
            "cores": _cores(),
            "torch_threads": torch.get_num_threads(),
            "native_bf16": native_bf16(),
        },
        "memory_gib": memory_gib(),
        "gpu": _gpu(),
        "versions": {package: _version(package) for package in PACKAGES},
        "git": git_state(Path(__file__).parent),
    }


def _cores() -> int | None:
    """Logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


def memory_gib() -> float | None:
    """The machine's memory; None where the system does not say."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _gpu() -> dict[str, Any] | None:
    """The current CUDA device, and how many of them this process sees."""
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": device.name,
        "count": torch.cuda.device_count(),
        "memory_gib": round(device.total_memory / 2**30, 1),
        "driver": _nvidia_driver(),
        "cuda": torch.version.cuda,
    }


def _nvidia_driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # as in _nvml_counters
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any]:
    """`commit` and `dirty` of the checkout that tracks files in `folder`.

    Untracked files make it dirty: a new proposer is one. Both None elsewhere:
    an installed package inside somebody else's checkout has no commit of its own.
    """
    if not _git(folder, "ls-files"):
        return {"commit": None, "dirty": None}
    status = _git(folder, "status", "--porcelain")
    return {"commit": _git(folder, "rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _git(folder: Path, *args: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(folder), *args]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
