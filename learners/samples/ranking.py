"""Items of the term ranking: right and wrong answers of one prompt."""

from __future__ import annotations

from learners.samples.types import PackItem, Ranking, Sample, count_targets
from rlsys.types import Trajectory, TrajectoryGroup


def ranking_item(group: TrajectoryGroup, most: int) -> PackItem | None:
    """Return the distinct judged answers of a group, right ones first; None without a right one or a wrong one.

    A chain that backtracked was told of its wrong answers, so it is left out. The trained tokens are those that the
    policy chose.

    Args:
        group: a sampled or searched group.
        most: largest number of right answers, and of wrong ones; the first ones of the group are taken.
    """
    answers: dict[bytes, Trajectory] = {}
    for trajectory in group.trajectories:
        hinted = any(step.backtrack for step in trajectory.steps)
        if trajectory.judged and not hinted and count_targets(trajectory.loss_mask):
            answers.setdefault(trajectory.token_ids.tobytes(), trajectory)
    right, wrong = ([each for each in answers.values() if _is_right(each) == wanted] for wanted in (True, False))
    if not right or not wrong:
        return None
    ranked = [*right[:most], *wrong[:most]]
    return PackItem(
        samples=tuple(Sample(token_ids=each.token_ids, ranking_mask=each.loss_mask) for each in ranked),
        ranking=Ranking(is_right=tuple(_is_right(each) for each in ranked)),
    )


def _is_right(trajectory: Trajectory) -> bool:
    return trajectory.correct
