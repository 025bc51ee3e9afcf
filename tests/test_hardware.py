"""The machine's numbers: energy and memory are right or None, and `env.json` can be written anywhere."""

import json
import subprocess
import sys
from mmap import mmap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from specdec import hardware
from specdec.hardware import EnergyMeter, Hardware, PeakMemory, environment, git_state, native_bf16

CONF = Path(__file__).parents[1] / "conf" / "hardware"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two packages, with the zones that overlap them."""
    zones = {
        "intel-rapl:0": "package-0",
        "intel-rapl:0:0": "core",
        "intel-rapl:1": "package-1",
        "intel-rapl:2": "psys",
        "intel-rapl-mmio:0": "package-0",
    }
    for zone, name in zones.items():
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(f"{name}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text("10000000\n")
        set_energy(tmp_path, zone, 4_000_000)
    return tmp_path


def set_energy(powercap: Path, zone: str, microjoules: int) -> None:
    (powercap / zone / "energy_uj").write_text(f"{microjoules}\n")


def test_rapl_adds_packages_only(powercap: Path) -> None:
    meter = EnergyMeter.for_device("cpu", powercap)
    meter.start()
    set_energy(powercap, "intel-rapl:0", 5_500_000)
    set_energy(powercap, "intel-rapl:1", 4_250_000)
    for overlapping in ("intel-rapl:0:0", "intel-rapl:2", "intel-rapl-mmio:0"):
        set_energy(powercap, overlapping, 9_000_000)
    assert meter.stop() == pytest.approx(1.75)


def test_rapl_wraps_one_package_at_a_time(powercap: Path) -> None:
    meter = EnergyMeter.for_device("cpu", powercap)
    meter.start()
    set_energy(powercap, "intel-rapl:0", 1_000_000)
    set_energy(powercap, "intel-rapl:1", 6_000_000)
    assert meter.stop() == pytest.approx(7.0 + 2.0)


def test_a_meter_can_be_used_again_and_gives_none_for_no_movement(powercap: Path) -> None:
    meter = EnergyMeter.for_device("cpu", powercap)
    joules = []
    for microjoules in (5_000_000, 7_000_000, 7_000_000):
        meter.start()
        set_energy(powercap, "intel-rapl:0", microjoules)
        joules.append(meter.stop())
    assert joules == [pytest.approx(1.0), pytest.approx(2.0), None]


@pytest.mark.parametrize("lost", ["energy_uj", "max_energy_range_uj", "name"])
def test_one_unreadable_package_makes_the_sum_none(powercap: Path, lost: str) -> None:
    """The other package did use energy; half a sum would be a wrong number."""
    (powercap / "intel-rapl:1" / lost).unlink()
    meter = EnergyMeter.for_device("cpu", powercap)
    meter.start()
    set_energy(powercap, "intel-rapl:0", 5_000_000)
    assert meter.stop() is None


@pytest.mark.parametrize("device", ["cpu", "cuda:0", "meta"])
def test_no_rapl_and_no_pynvml_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = EnergyMeter.for_device(device, tmp_path / "absent")
    meter.start()
    assert meter.stop() is None


class FakeNvml:
    """Two GPUs seen by NVML; CUDA sees the second one only, as its device 0."""

    def __init__(self) -> None:
        self.millijoules = {"GPU-hidden": 1_000, "GPU-visible": 50_000}
        self.fail_at = ""

    def _maybe_fail(self, name: str) -> None:
        if self.fail_at == name:
            raise RuntimeError(name)

    def nvmlInit(self) -> None:
        self._maybe_fail("init")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self._maybe_fail("handle")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self._maybe_fail("energy")
        return self.millijoules[handle]

    def nvmlSystemGetDriverVersion(self) -> str:
        self._maybe_fail("driver")
        return "580.1"


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml()
    properties = SimpleNamespace(uuid="visible", name="Fake GPU", total_memory=80 * 2**30)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return fake


def test_nvml_measures_the_device_in_use(nvml: FakeNvml) -> None:
    meter = EnergyMeter.for_device("cuda:0")
    meter.start()
    nvml.millijoules = {"GPU-hidden": 9_000, "GPU-visible": 52_500}
    assert meter.stop() == pytest.approx(2.5)


@pytest.mark.parametrize("failure", ["init", "handle", "energy"])
def test_nvml_failure_is_none_and_never_the_cpu(nvml: FakeNvml, powercap: Path, failure: str) -> None:
    nvml.fail_at = failure
    meter = EnergyMeter.for_device("cuda:0", powercap)
    meter.start()
    set_energy(powercap, "intel-rapl:0", 5_000_000)
    assert meter.stop() is None


def test_nvml_failing_between_readings_is_none(nvml: FakeNvml) -> None:
    meter = EnergyMeter.for_device("cuda:0")
    meter.start()
    nvml.fail_at = "energy"
    assert meter.stop() is None


def test_peak_memory_of_a_process(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tpython\nVmPeak:\t 9000 kB\nVmHWM:\t 2000 kB\nVmRSS:\t 1000 kB\n")
    memory = PeakMemory("cpu", tmp_path)
    assert memory.peak_mb() is None
    memory.reset()
    assert (tmp_path / "clear_refs").read_text() == "5"
    assert memory.peak_mb() == pytest.approx(2.048)


def test_peak_memory_without_permission_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A readable VmHWM that was not reset belongs to an earlier arm."""
    (tmp_path / "status").write_text("VmHWM:\t 2000 kB\n")

    def refuse(path: Path, text: str) -> int:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "write_text", refuse)
    memory = PeakMemory("cpu", tmp_path)
    memory.reset()
    assert memory.peak_mb() is None


def test_peak_memory_falls_after_a_real_reset() -> None:
    memory = PeakMemory("cpu")
    memory.reset()
    base = memory.peak_mb()
    if base is None:
        pytest.skip("this machine does not permit the reset")
    with mmap(-1, 100_000_000) as block:  # not malloc's, which may have such a block at hand
        block.write(b"1" * len(block))
    with_block = memory.peak_mb()
    memory.reset()
    assert with_block > base + 80
    assert memory.peak_mb() < with_block - 80


def test_peak_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    was_reset = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", was_reset.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3_000_000)
    memory = PeakMemory("cuda:1")
    memory.reset()
    assert was_reset == [torch.device("cuda:1")]
    assert memory.peak_mb() == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor : 0\nflags\t\t: fpu avx512f amx_bf16 amx_tile\n", True),
        ("flags\t\t: fpu avx512_bf16\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags\t\t: fpu avx512f avx2\n", False),
        ("model name\t: bf16\nFeatures\t: fp svebf16\n", False),
    ],
)
def test_native_bf16(tmp_path: Path, cpuinfo: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert native_bf16(tmp_path / "cpuinfo") is expected


def test_environment_is_json_and_names_no_place() -> None:
    argv = ["specdec.run", "target=random"]
    text = json.dumps(environment(argv), allow_nan=False)
    found = json.loads(text)
    assert found["argv"] == argv
    assert found["date"].endswith("+00:00")
    assert found["cpu"]["cores"] >= 1
    assert found["versions"]["torch"]
    assert set(found["versions"]) == set(hardware.PACKAGES)
    assert str(Path(__file__).parents[1]) not in text
    assert str(Path.home()) + "/" not in text


def test_environment_names_the_gpu(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    gpu = environment([])["gpu"]
    assert (gpu["name"], gpu["memory_gib"], gpu["driver"]) == ("Fake GPU", 80.0, "580.1")
    nvml.fail_at = "driver"
    assert environment([])["gpu"]["driver"] is None


def test_what_is_missing_is_null(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "PACKAGES", ("torch", "no-such-package-here"))
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "absent")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = environment([])
    assert found["versions"]["no-such-package-here"] is None
    assert found["gpu"] is None
    assert native_bf16(tmp_path / "absent") is False


def git(folder: Path, *args: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit that tracks package/a.py and ignores installed/."""
    for variable in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # set where a git hook runs the tests
        monkeypatch.delenv(variable, raising=False)
    for name in ("package/a.py", "installed/b.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    (tmp_path / ".gitignore").write_text("installed/\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    return tmp_path


@pytest.mark.parametrize("changed", [None, "package/a.py", "package/new.py"])
def test_git_state(checkout: Path, changed: str | None) -> None:
    if changed:
        (checkout / changed).write_text("x = 1\n")
    commit = git(checkout, "rev-parse", "HEAD")
    assert git_state(checkout / "package") == {"commit": commit, "dirty": changed is not None}


def test_git_state_is_null_for_an_installed_package_or_without_git(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_slow(command: list[str], **options: object) -> None:
        raise subprocess.TimeoutExpired(command, 10)

    unknown = {"commit": None, "dirty": None}
    assert git_state(checkout / "installed") == unknown
    monkeypatch.setattr(subprocess, "run", too_slow)
    assert git_state(checkout / "package") == unknown
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(checkout))
    assert git_state(checkout / "package") == unknown


@pytest.mark.parametrize("price", [-1, -0.01, float("nan"), float("inf"), "2.5", True])
def test_a_bad_price_names_its_override(price: object) -> None:
    with pytest.raises(ValueError, match=r"hardware\.price_per_hour=.*expected"):
        Hardware("h100", price)


@pytest.mark.parametrize("name", NAMES)
def test_conf_builds(name: str) -> None:
    text = (CONF / f"{name}.yaml").read_text()
    fields = yaml.safe_load(text)
    assert fields.pop("_target_") == "specdec.hardware.Hardware"
    assert Hardware(**fields).name == name
    assert text.startswith(f"# python -m specdec.run hardware={name} ")
    assert (name == "local") == (fields["price_per_hour"] is None)
