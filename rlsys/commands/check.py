"""`rlsys check`: validate a config, its model and its data, and print what a run would use."""

from __future__ import annotations

from rlsys.config.files import dump_config
from rlsys.config.schema import Config
from rlsys.display import print_table, standard_output
from rlsys.launch.prepare import check_settings, prepare
from rlsys.launch.resources import ResourcePlan


def run(config: Config) -> None:
    """Print the resolved config, the resource plans and the notes on the data.

    Raises:
        ConfigError: the input is not usable, or this machine is too small.
    """
    check_settings(config, "check")
    prepared = prepare(config, "check")
    print(dump_config(config))
    for title, plan in zip(("resource plan", "resource plan of rlsys search"), prepared.plans, strict=False):
        _show_plan(title, plan)
    for note in prepared.notes:
        print(note)
    for plan in prepared.plans:
        plan.check()


def _show_plan(title: str, plan: ResourcePlan) -> None:
    auxiliary = [f"{engines.actors.count} of search.{engines.role}" for engines in plan.auxiliary]
    learner = [f"{plan.ranks} learner ranks"] if plan.ranks else []
    processes = ", ".join([f"{plan.config.actors.count} actors", *auxiliary, *learner])
    rows = [(need.phase, need.resource, f"{need.amount:.4g}", f"{need.available:.4g}") for need in plan.needs]
    if plan.config.run.device == "cuda":
        rows.append(("all", "GPUs", str(plan.gpus), "the cluster's"))
    print_table(standard_output(), ("phase", "needs", "amount", "this machine"), rows, title=f"{title}: {processes}")
