"""Start Ray, the actors and the learner ranks, and connect them.

This module sets the environment variables of Ray, because Ray reads them when it is imported.
"""

import os

# Without this, Ray binds its services to every interface.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# By default Ray runs its workers at nice 15, which starves them next to other programs.
os.environ.setdefault("RAY_worker_niceness", "0")
# By default the raylet drains for 30 s on SIGTERM; here nothing else uses it.
os.environ.setdefault("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0")
