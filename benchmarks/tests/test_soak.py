"""Which rises of a figure count as growth in the soak."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.mark.parametrize(
    ("name", "values", "grows"),
    [
        ("rank MiB", [1500.0 + 10 * minute for minute in range(10)], True),
        ("rank MiB", [1500.0 + 4 * minute for minute in range(10)], False),  # 36 MiB: below the bound
        ("rank MiB", [1936.0, 1855.0, 1876.0, 1883.0, 1990.0, 1990.0, 2041.0, 2041.0], False),  # measured, no direction
        ("rank MiB", [1500.0, 1560.0], True),
        ("driver files", [100.0, 103.0, 106.0, 109.0], True),
        ("driver files", [100.0, 100.0, 104.0, 104.0], False),
        ("stored objects", [4.0, 11.0, 5.0, 13.0, 4.0], False),
    ],
)
def test_a_steady_rise_is_growth_and_a_variation_is_not(
    name: str, values: list[float], grows: bool, soak: ModuleType
) -> None:
    assert bool(soak.grown("within the job", {name: values})) == grows


def test_memory_is_judged_in_the_second_half_of_long_jobs_and_files_in_all(soak: ModuleType) -> None:
    def grown(minutes: list[float]) -> list[str]:
        job = soak.Job("joint", minutes={"rank MiB": minutes, "rank files": minutes})
        return sorted(line.split()[2] for line in soak.growth([job]))

    assert grown([100.0 + 20 * minute for minute in range(6)]) == ["files"]
    assert grown([100.0 + 20 * minute for minute in range(16)]) == ["MiB", "files"]
    assert grown([100.0 + 20 * min(minute, 6) for minute in range(16)]) == []
    assert grown([100.0] * 16) == []


def test_looks_become_medians_of_minutes(soak: ModuleType) -> None:
    looks = [(61.0, {"a": 1.0}), (70.0, {"a": 3.0, "b": 1.0}), (119.0, {"a": 2.0}), (121.0, {"a": 9.0})]
    assert soak.by_minute(looks) == {"a": [2.0, 9.0], "b": [1.0]}
