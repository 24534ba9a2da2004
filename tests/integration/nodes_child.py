"""Two raylets on this machine that are two nodes of one Ray cluster, or a command whose processes use both.

`nodes_child.py cluster CPUS` starts the nodes, prints the cluster's address, and takes orders from standard input:
`kill` kills the second node with its processes, `start` starts it again. It prints `done` after each. At the end of
the input it ends the cluster. `nodes_child.py run ARGUMENTS` is the command line of rlsys.
"""

from __future__ import annotations

import sys

from rlsys import cli
from rlsys.launch import ray_cluster


def serve(cpus: int) -> None:
    from ray.cluster_utils import Cluster

    options = {"num_cpus": cpus, "object_store_memory": 200 * 2**20, "node_ip_address": "127.0.0.1"}
    cluster = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    second = cluster.add_node(**options)
    try:
        print(cluster.address, flush=True)
        for line in sys.stdin:
            if line.strip() == "kill":
                cluster.remove_node(second, allow_graceful=False)
            else:
                second = cluster.add_node(**options)
            print("done", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    if sys.argv[1] == "cluster":
        serve(int(sys.argv[2]))
    else:
        ray_cluster.STRATEGY = "SPREAD"  # one process on each node in turn
        del sys.argv[1]
        sys.exit(cli.main())
