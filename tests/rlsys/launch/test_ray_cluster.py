"""Ray's services and the signals of the driver."""

from __future__ import annotations

import os

from ray._private import services

from rlsys.launch.ray_cluster import own_process_groups


def test_a_signal_to_the_group_of_the_driver_does_not_reach_the_services_of_ray() -> None:
    with own_process_groups(), services.ConsolePopen(["sleep", "60"]) as service:
        try:
            assert os.getpgid(service.pid) == service.pid != os.getpgid(0)
        finally:
            service.kill()
    with services.ConsolePopen(["true"]) as other:
        assert os.getpgid(other.pid) == os.getpgid(0)
