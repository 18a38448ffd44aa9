"""A rank takes no more of its machine than is its: of the smallest control group, and shared with those beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloudckpt.transfer import free_bytes, ranks_here

MIB = 1 << 20


class Machine:
    """What a kernel says of its memory, as files."""

    def __init__(self, base: Path) -> None:
        self.proc = base / "proc"
        self.groups = base / "cgroup"
        self.write(self.proc / "meminfo", f"MemTotal: 999999999 kB\nMemAvailable:   {64 << 10} kB\n")

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def is_in(self, *lines: str) -> None:
        self.write(self.proc / "self/cgroup", "".join(f"{line}\n" for line in lines))

    def group_2(self, path: str, *, most: int | str, used: int, cached: int = 0, high: int | str = "max") -> None:
        place = self.groups / path
        self.write(place / "memory.max", f"{most}\n")
        self.write(place / "memory.high", f"{high}\n")
        self.write(place / "memory.current", f"{used}\n")
        self.write(place / "memory.stat", f"anon 7\nactive_file 999999999\ninactive_file {cached}\n")

    def group_1(self, path: str, *, most: int, used: int, cached: int = 0) -> None:
        place = self.groups / "memory" / path
        self.write(place / "memory.limit_in_bytes", f"{most}\n")
        self.write(place / "memory.usage_in_bytes", f"{used}\n")
        self.write(place / "memory.stat", f"inactive_file 999999999\ntotal_inactive_file {cached}\n")

    @property
    def free_bytes(self) -> int | None:
        return free_bytes(proc=self.proc, groups=self.groups)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_groups_it_is_what_the_machine_has(machine: Machine) -> None:
    assert machine.free_bytes == 64 * MIB


def test_a_system_that_says_nothing_is_not_guessed_at(tmp_path: Path) -> None:
    assert free_bytes(proc=tmp_path, groups=tmp_path) is None


def test_the_limit_of_the_processs_own_group_counts_and_not_the_roots_alone(machine: Machine) -> None:
    machine.is_in("0::/system.slice/slurmstepd.scope/job_7/step_0")
    machine.group_2("", most="max", used=9 * MIB)
    machine.group_2("system.slice/slurmstepd.scope/job_7/step_0", most=10 * MIB, used=4 * MIB)
    assert machine.free_bytes == 6 * MIB


def test_of_nested_groups_the_one_that_leaves_least_counts(machine: Machine) -> None:
    machine.is_in("0::/slice/pod/container")
    machine.group_2("slice", most="max", used=1)
    machine.group_2("slice/pod", most=10 * MIB, used=9 * MIB)
    machine.group_2("slice/pod/container", most=8 * MIB, used=1 * MIB)
    assert machine.free_bytes == 1 * MIB


def test_pages_of_files_that_can_be_dropped_are_not_in_use(machine: Machine) -> None:
    machine.is_in("0::/job")
    machine.group_2("job", most=10 * MIB, used=10 * MIB, cached=7 * MIB)
    assert machine.free_bytes == 7 * MIB


def test_where_a_group_is_slowed_down_is_a_limit_too(machine: Machine) -> None:
    machine.is_in("0::/job")
    machine.group_2("job", most=10 * MIB, used=1 * MIB, high=3 * MIB)
    assert machine.free_bytes == 2 * MIB


def test_a_group_beyond_its_limit_leaves_nothing(machine: Machine) -> None:
    machine.is_in("0::/job")
    machine.group_2("job", most=1 * MIB, used=2 * MIB)
    assert machine.free_bytes == 0


def test_groups_of_version_1_count_with_the_pages_below_them(machine: Machine) -> None:
    machine.is_in("5:cpu,cpuacct:/elsewhere", "4:hugetlb,memory:/slurm/job", "1:name=systemd:/memory")
    machine.group_1("", most=2**63 - 4096, used=3 * MIB)
    machine.group_1("slurm", most=20 * MIB, used=19 * MIB, cached=8 * MIB)
    machine.group_1("slurm/job", most=10 * MIB, used=2 * MIB, cached=1 * MIB)
    assert machine.free_bytes == 9 * MIB


def test_on_a_system_with_both_versions_both_count(machine: Machine) -> None:
    machine.is_in("4:memory:/job", "0::/scope")
    machine.group_1("job", most=10 * MIB, used=2 * MIB)
    machine.group_2("unified/scope", most=10 * MIB, used=5 * MIB)
    assert machine.free_bytes == 5 * MIB


@pytest.mark.parametrize("line", ["0::/host/path/of/container", "0::/../other", "0::/"])
def test_in_a_container_that_sees_its_own_group_as_the_root_that_one_counts(machine: Machine, line: str) -> None:
    machine.is_in(line)
    machine.group_2("", most=10 * MIB, used=4 * MIB)
    assert machine.free_bytes == 6 * MIB


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "8"}, 8),
        ({"SLURM_NTASKS_PER_NODE": "8"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "SLURM_NTASKS_PER_NODE": "16"}, 8),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
        ({"MPI_LOCALNRANKS": "4"}, 4),
        ({"MV2_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
        ({"PALS_LOCAL_SIZE": "4"}, 4),
        ({"JSM_NAMESPACE_LOCAL_SIZE": "4"}, 4),
        ({"LOCAL_WORLD_SIZE": "8", "SLURM_NTASKS_PER_NODE": "1"}, 8),
        ({"LOCAL_WORLD_SIZE": "1", "SLURM_STEP_TASKS_PER_NODE": "8"}, 8),
        ({"LOCAL_WORLD_SIZE": "many", "SLURM_NTASKS_PER_NODE": "", "MPI_LOCALNRANKS": "0"}, 1),
    ],
)
def test_a_machine_is_shared_by_as_many_as_its_launcher_says(environ: dict[str, str], count: int) -> None:
    assert ranks_here(environ) == count
