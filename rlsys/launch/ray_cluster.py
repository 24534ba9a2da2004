"""Start Ray on loopback or join a cluster, reserve the resources of a run, and clean up after it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
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
from ray._private import services as ray_services
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rlsys.config.schema import Config
from rlsys.directory import RunDirectory
from rlsys.errors import AbortedRunError, ConfigError, EngineError, RlsysError
from rlsys.launch.access import check_address, child_environment, close_local_ray
from rlsys.launch.ray_log import output_to, ray_logging_to
from rlsys.launch.resources import MINIMUM_STORE_BYTES
from rlsys.launch.signals import signals_ignored
from rlsys.processes import kill_and_wait, kill_with_this_process, processes_of_ray

Result = TypeVar("Result")
SERVICES = ("gcs_server", "raylet")  # Ray works only while both run
WATCH_INTERVAL_S = 1.0
PLACEMENT_TIMEOUT_S = 180.0
STRATEGY = "PACK"  # as few nodes as possible, which keeps the learner ranks together
SHUTDOWN_TIMEOUT_S = 10.0
TEMPORARY_NOTE = ".temporary-folder"
RENDEZVOUS = ".rendezvous-"
RAY_LOG = "ray.log"

# Only the owner may read what a run writes in its run directory and in Ray's folder. Ray's processes inherit this.
os.umask(0o077)


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running Ray and the placement group of a run.

    Attributes:
        group: the bundles: rollout actors first, then engines of other models, then learner ranks.
        temporary: the scratch folder of a Ray that was started here.
        services: the essential processes of a Ray that was started here, by name.
    """

    group: PlacementGroup
    config: Config
    run_dir: Path
    temporary: Path
    services: Mapping[str, psutil.Process] = field(default_factory=dict)

    async def watched(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Return the result of `work`, unless a service of Ray dies before.

        Ray itself reports such a death after a minute or never, and calls to its actors hang.

        Raises:
            EngineError: a service of the Ray that was started here has died.
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

    def options(self, bundle: int, gpus: float, environment: Mapping[str, str]) -> dict[str, Any]:
        """Return Ray's options for the process of a bundle.

        Args:
            bundle: index of the bundle in the placement group.
            gpus: number of GPUs, or a share of one, if run.device is cuda.
            environment: variables of the process.
        """
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
        variables = {name: os.environ[name] for name in ("RLSYS_FAULTS", "RLSYS_DATA") if name in os.environ}
        variables |= child_environment(local)
        variables |= {"RLSYS_RUN_ID": self.run_dir.name, "TOKENIZERS_PARALLELISM": "false"}
        if local:
            variables["TMPDIR"] = str(self.temporary / "tmp")
        return variables


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
    temporary, log_file = _temporary_folder(run_dir), RunDirectory(run_dir).logs / RAY_LOG
    with contextlib.ExitStack() as stack:
        stack.enter_context(ray_logging_to(log_file))
        reaper = stack.enter_context(kill_with_this_process(temporary)) if local else None
        try:
            with output_to(log_file):
                cpus = int(sum(bundle["CPU"] for bundle in bundles))
                _start_ray(config.run.address, temporary, cpus, store_bytes)
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


def _start_ray(address: str, temporary: Path, cpus: int, store_bytes: int) -> None:
    options: dict[str, Any] = {"address": address, "log_to_driver": False}
    if address == "local":
        close_local_ray()
        options |= {
            "include_dashboard": False,
            "_temp_dir": str(temporary / "ray"),  # Ray opens this folder to all users, but not the one above
            "num_cpus": cpus,  # logical CPUs; OMP_NUM_THREADS sets the threads
            "object_store_memory": store_bytes,
            "_node_ip_address": "127.0.0.1",
        }
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with own_process_groups():
            ray.init(**options)
    except SystemExit:
        raise AbortedRunError("SIGTERM while Ray was starting") from None
    except RlsysError:
        raise
    except Exception as error:  # Ray raises a bare Exception if its processes start too slowly
        reason = " ".join(str(error).split())
        if address == "local":
            raise RlsysError(f"Ray did not start: {reason}") from error
        raise ConfigError(f"run.address {address}: no Ray cluster can be joined there: {reason}") from error
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray has installed a handler that exits silently


@contextlib.contextmanager
def own_process_groups() -> Iterator[None]:
    """Let Ray start every service in a process group of its own.

    `timeout`, systemd and batch systems send SIGTERM to the whole group of the driver, and a terminal sends SIGHUP and
    SIGTSTP. Ray's services would end 10 s later, while the driver is still saving.
    """
    original = ray_services.ConsolePopen
    ray_services.ConsolePopen = functools.partial(original, process_group=0)
    try:
        yield
    finally:
        ray_services.ConsolePopen = original


def _reserve(bundles: Sequence[Mapping[str, float]]) -> PlacementGroup:
    """Reserve the bundles. Raise ConfigError if the cluster is too small, or too busy for PLACEMENT_TIMEOUT_S."""
    check_cluster(bundles, ray.cluster_resources())
    group = placement_group([dict(bundle) for bundle in bundles], strategy=STRATEGY)
    if not group.wait(PLACEMENT_TIMEOUT_S):
        raise ConfigError(
            f"the cluster could not place {list(bundles)} within {PLACEMENT_TIMEOUT_S:.0f} s: of "
            f"{ray.cluster_resources()} only {ray.available_resources()} is free"
        )
    return group


def check_cluster(bundles: Sequence[Mapping[str, float]], resources: Mapping[str, float]) -> None:
    """Raise if all bundles together need more CPUs or GPUs than the cluster has.

    Args:
        bundles: resources of each process, by Ray's names.
        resources: resources of the whole cluster, by the same names.
    Raises:
        ConfigError: names the config fields to lower.
    """
    needed: Counter[str] = Counter()
    for bundle in bundles:
        needed.update(bundle)
    for name, amount in needed.items():
        if amount > resources.get(name, 0):
            fields = "actors.count, learner.ranks" + (" or actors.tensor_parallel_size" if name == "GPU" else "")
            raise ConfigError(f"{fields}: the run needs {amount:g} {name}s, the cluster has {resources.get(name, 0):g}")


def _temporary_folder(run_dir: Path) -> Path:
    """Make a folder for sockets and scratch files, and note it in the run directory for its removal.

    Socket paths in it must stay under 107 bytes, so $TMPDIR and the run directory may be too deep.
    """
    remove_leftovers(run_dir)
    folder = Path(f"/tmp/rl-{uuid.uuid4().hex[:8]}")  # noqa: S108 - unpredictable name, mode 700
    note = run_dir / TEMPORARY_NOTE
    undeleted = note.read_text(encoding="utf-8").split() if note.exists() else []
    note.write_text("".join(f"{each}\n" for each in (*undeleted, folder)), encoding="utf-8")
    folder.mkdir(mode=0o700)
    (folder / "tmp").mkdir(mode=0o700)
    return folder


def remove_leftovers(run_dir: Path) -> None:
    """Remove rendezvous files and the scratch folders of this attempt and of killed ones."""
    note = run_dir / TEMPORARY_NOTE
    if note.exists():
        text = note.read_text(encoding="utf-8")
        folders = re.findall(r"^/tmp/rl-[0-9a-f]{8}$", text, re.MULTILINE)  # nothing else is ever removed
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        if any(Path(folder).exists() for folder in folders):  # dying processes write there; the next call retries
            return
        note.unlink()
    for path in run_dir.glob(f"{RENDEZVOUS}*"):
        path.unlink(missing_ok=True)
