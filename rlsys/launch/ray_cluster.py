"""Ray: started on loopback or joined, a placement group for the run, and an end that leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import uuid
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlsys.config.schema import Config
from rlsys.errors import AbortedRunError, ConfigError, EngineError, RlsysError
from rlsys.launch.access import check_address, child_environment, close_local_ray
from rlsys.launch.ray_log import output_to, ray_logging_to
from rlsys.launch.resources import MINIMUM_STORE_BYTES
from rlsys.launch.signals import signals_ignored
from rlsys.processes import kill_and_wait, kill_with_this_process, processes_of_ray

Result = TypeVar("Result")
SERVICES = ("gcs_server", "raylet")  # without either nothing of Ray works
WATCH_INTERVAL_S = 1.0
PLACEMENT_TIMEOUT_S = 180.0
SHUTDOWN_TIMEOUT_S = 10.0
TEMPORARY_NOTE = ".temporary-folder"
RENDEZVOUS = ".rendezvous-"
RAY_LOG = "ray.log"

# Whatever a run writes is for its owner alone: the run directory, and the folder of Ray, whose processes inherit this.
os.umask(0o077)


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running Ray and the bundles of a placement group: actors first, then learner ranks.

    services: processes of a Ray started here that everything depends on.
    """

    group: PlacementGroup
    config: Config
    run_dir: Path
    temporary: Path
    services: Mapping[str, psutil.Process] = field(default_factory=dict)

    async def watched(self, work: Coroutine[Any, Any, Result]) -> Result:
        """The result of `work`. It ends at once where a service of the Ray started here has died.

        Ray itself would not say so for a minute, or never: calls to its actors only hang.

        Raises:
            EngineError: names the service.
        """
        task = asyncio.create_task(work)
        try:
            while not (await asyncio.wait({task}, timeout=WATCH_INTERVAL_S))[0]:
                for name, service in self.services.items():
                    if not _runs(service):
                        raise EngineError(f"Ray is lost: its {name} (process {service.pid}) has died")
            return await task
        finally:
            task.cancel()
            await asyncio.wait({task}, timeout=SHUTDOWN_TIMEOUT_S)

    def options(self, bundle: int, gpus: int, environment: Mapping[str, str]) -> dict[str, Any]:
        """Where and how Ray starts the process of a bundle."""
        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=bundle)
        return {
            "num_cpus": 1,
            "num_gpus": gpus if self.config.run.device == "cuda" else 0,
            "scheduling_strategy": strategy,
            "runtime_env": {"env_vars": {**environment, **self._common_environment()}},
            "max_restarts": 0,
            "max_task_retries": 0,
        }

    def _common_environment(self) -> dict[str, str]:
        local = self.config.run.address == "local"
        found = {name: os.environ[name] for name in ("RLSYS_FAULTS", "RLSYS_DATA") if name in os.environ}
        found |= child_environment(local)
        found |= {"RLSYS_RUN_ID": self.run_dir.name, "TOKENIZERS_PARALLELISM": "false"}
        if local:
            found["TMPDIR"] = str(self.temporary / "tmp")
        return found


@contextlib.contextmanager
def ray_cluster(
    config: Config, run_dir: Path, bundles: Sequence[Mapping[str, float]], store_bytes: int = MINIMUM_STORE_BYTES
) -> Iterator[Cluster]:
    """Start Ray on loopback, or join a cluster, and reserve the resources of the run.

    Ray's own messages go to `logs/ray.log` in the run directory.

    Args:
        run_dir: holds the logs, and a note of the scratch folder until that folder is removed.
        bundles: the resources of each process of the run, by Ray's names ("CPU", "GPU").
        store_bytes: size of the object store of a Ray started here.
    Raises:
        ConfigError: no cluster answers at run.address, it is too small, or it would be joined without a token.
        EngineError: Ray failed while the block ran.
        RlsysError: Ray did not start.
    """
    check_address(config.run.address)
    local = config.run.address == "local"
    temporary, log_file = _temporary_folder(run_dir), run_dir / "logs" / RAY_LOG
    with contextlib.ExitStack() as stack:
        stack.enter_context(ray_logging_to(log_file))
        reaper = stack.enter_context(kill_with_this_process(temporary)) if local else None
        try:
            with output_to(log_file):
                _start_ray(config.run.address, temporary, len(bundles), store_bytes)
            children = psutil.Process().children() if local else []
            services = {child.name(): child for child in children if child.name() in SERVICES}
            yield Cluster(_reserve(bundles), config, run_dir, temporary, services)
        except RayError as error:
            raise EngineError(f"Ray: {type(error).__name__}: {' '.join(str(error).split())}") from error
        finally:
            with signals_ignored(), output_to(log_file):
                _stop_ray(run_dir, temporary if local else None, reaper)


def _stop_ray(run_dir: Path, temporary: Path | None, reaper: psutil.Process | None) -> None:
    """Disconnect from Ray. End a Ray that was started here, with all its processes, and remove its files.

    Args:
        temporary: the scratch folder of a Ray that was started here; None if a cluster was joined.
        reaper: the process that the caller ends itself.
    """
    children = psutil.Process().children(recursive=True) if temporary else []
    try:
        ray.shutdown()
    finally:
        # On a busy machine workers outlive the driver by seconds. If Ray failed to start, its agents are no longer
        # children of this process.
        left = [child for child in children if child != reaper]
        try:
            strays = processes_of_ray(str(temporary)) if temporary else []
            kill_and_wait([*left, *strays], SHUTDOWN_TIMEOUT_S)
        finally:
            remove_leftovers(run_dir)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _start_ray(address: str, temporary: Path, processes: int, store_bytes: int) -> None:
    options: dict[str, Any] = {"address": address, "log_to_driver": False}
    if address == "local":
        close_local_ray()
        options |= {
            "include_dashboard": False,
            "_temp_dir": str(temporary / "ray"),  # which Ray opens to everybody; the folder above is not
            "num_cpus": processes,  # logical: phases alternate, threads are set by OMP_NUM_THREADS
            "object_store_memory": store_bytes,
            "_node_ip_address": "127.0.0.1",
        }
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except SystemExit:
        raise AbortedRunError("SIGTERM while Ray was starting") from None
    except RlsysError:
        raise
    except Exception as error:  # of no kind of its own where Ray's processes are too slow on a busy machine
        reason = " ".join(str(error).split())
        if address == "local":
            raise RlsysError(f"Ray did not start: {reason}") from error
        raise ConfigError(f"run.address {address}: no Ray cluster can be joined there: {reason}") from error
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray has put its own, which exits without a word


def _reserve(bundles: Sequence[Mapping[str, float]]) -> PlacementGroup:
    """Raises ConfigError where the cluster is too small, at once, or too busy, after PLACEMENT_TIMEOUT_S."""
    check_cluster(bundles, ray.cluster_resources())
    group = placement_group([dict(bundle) for bundle in bundles], strategy="PACK")
    if not group.wait(PLACEMENT_TIMEOUT_S):
        raise ConfigError(
            f"the cluster could not place {list(bundles)} within {PLACEMENT_TIMEOUT_S:.0f} s: of "
            f"{ray.cluster_resources()} only {ray.available_resources()} is free"
        )
    return group


def check_cluster(bundles: Sequence[Mapping[str, float]], found: Mapping[str, float]) -> None:
    """Raises ConfigError where all bundles together ask for more CPUs or GPUs than the cluster has."""
    needed: Counter[str] = Counter()
    for bundle in bundles:
        needed.update(bundle)
    for name, amount in needed.items():
        if amount > found.get(name, 0):
            fields = "actors.count, learner.ranks" + (" or actors.tensor_parallel_size" if name == "GPU" else "")
            raise ConfigError(f"{fields}: the run needs {amount:g} {name}s, the cluster has {found.get(name, 0):g}")


def _temporary_folder(run_dir: Path) -> Path:
    """A new folder for sockets and scratch files, noted in the run directory so that it can never be lost.

    Socket paths below it must stay under 107 bytes, so neither $TMPDIR nor the run directory itself will do.
    """
    remove_leftovers(run_dir)
    folder = Path(f"/tmp/rl-{uuid.uuid4().hex[:8]}")  # noqa: S108 - unpredictable name, mode 700
    note = run_dir / TEMPORARY_NOTE
    kept = note.read_text(encoding="utf-8").split() if note.exists() else []  # what could not be removed yet
    note.write_text("".join(f"{each}\n" for each in (*kept, folder)), encoding="utf-8")
    folder.mkdir(mode=0o700)
    (folder / "tmp").mkdir(mode=0o700)
    return folder


def remove_leftovers(run_dir: Path) -> None:
    """Remove the scratch folders of this and of killed attempts, and rendezvous files."""
    note = run_dir / TEMPORARY_NOTE
    if note.exists():
        text = note.read_text(encoding="utf-8")
        found = re.findall(r"^/tmp/rl-[0-9a-f]{8}$", text, re.MULTILINE)  # nothing else is ever removed
        for folder in found:
            shutil.rmtree(folder, ignore_errors=True)
        if any(Path(folder).exists() for folder in found):  # what is dying still writes there: the next call removes it
            return
        note.unlink()
    for path in run_dir.glob(f"{RENDEZVOUS}*"):
        path.unlink(missing_ok=True)
