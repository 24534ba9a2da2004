"""Preference losses over pairs of a chosen and a rejected completion.

Losses are weighted sums over pairs, and metrics are sums over pairs. The shared prefix of a pair cancels in losses of
summed log-probabilities, in value and gradient. In length-normalised losses it does not cancel, because its tokens
count in the denominators.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from torch import Tensor
from torch.nn.functional import logsigmoid

from learners.objective.advantages import Float64Array
from learners.objective.losses import LossOutput

PreferenceLoss = Literal["dpo", "ipo"]

# At eps = 1/2 labels carry no information, and the optimum logit(1 - eps) would be 0.
MAX_SMOOTHING = 0.499


def pair_scores(logprobs: Tensor, segments: Tensor, count: int) -> Tensor:
    """Sum log-probabilities by segment; a segment is one completion of a pair.

    s_j = sum over t in j of logprobs_t

    Args:
        logprobs: [M] nats; carries gradient.
        segments: [M] int64 in [0, count), the segment of every target.
        count: number of segments; a segment without targets has score 0.

    Returns:
        [count] nats, in the dtype of `logprobs`; summed in fp64.
    """
    precise = logprobs.double()
    return precise.new_zeros(count).index_add(0, segments, precise).to(logprobs.dtype)


def preference_loss(
    chosen_logratio: Tensor,
    rejected_logratio: Tensor,
    weights: Tensor,
    *,
    loss: PreferenceLoss,
    beta: float,
    label_smoothing: Tensor,
) -> LossOutput:
    """Compute the loss of conservative DPO, whose labels are wrong with probability eps, or of IPO.

    d    = chosen_logratio - rejected_logratio
    dpo:   sum_p w_p [ -(1 - eps_p) log sigmoid(beta d_p) - eps_p log sigmoid(-beta d_p) ]
    ipo:   sum_p w_p (d_p - 1 / (2 beta))^2

    d dpo / d (beta d_p) = w_p (sigmoid(beta d_p) - (1 - eps_p)): the optimum is beta d = logit(1 - eps). With eps 0
    this is plain DPO, without a finite optimum. d ipo / d d_p = 2 w_p (d_p - 1 / (2 beta)).

    Args:
        chosen_logratio: [P] log pi_theta - log pi_ref of the chosen completion, nats; summed, or averaged over tokens
            (LN-DPO, and IPO as in TRL); carries gradient.
        rejected_logratio: [P], the same for the rejected completion.
        weights: [P], 1 over the pairs of the whole update.
        loss: "dpo" or "ipo".
        beta: > 0, inverse temperature.
        label_smoothing: [P] eps in [0, 0.5), constant or from `adaptive_smoothing`; all 0 for ipo.

    Returns:
        metrics: accuracy (count of d > 0), margin (sum of d), chosen_logratio, rejected_logratio (sums), nats.

    Raises:
        ValueError: eps outside [0, 0.5), eps with ipo, beta not positive, or an unknown loss.

    Source: DPO, arXiv:2305.18290, eq. 7; Mitchell, A note on DPO with noisy preferences & relationship to IPO (2023);
        Marco-o1 v2, arXiv:2503.01461; IPO, arXiv:2310.12036, eq. 17.
    """
    if not beta > 0:
        raise ValueError(f"expected beta > 0, found {beta}")
    if not ((label_smoothing >= 0) & (label_smoothing < 0.5)).all():
        raise ValueError(f"expected label_smoothing in [0, 0.5), found {label_smoothing.tolist()}")
    margin = chosen_logratio - rejected_logratio
    match loss:
        case "dpo":
            logit = beta * margin
            terms = -(1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit)
        case "ipo":
            if label_smoothing.any():
                raise ValueError("expected label_smoothing 0 with the loss ipo, which has no label smoothing")
            terms = (margin - 1 / (2 * beta)).square()
        case _:
            raise ValueError(f"expected the loss dpo or ipo, found {loss!r}")
    metrics = {
        "accuracy": (margin > 0).sum(),
        "margin": margin.detach().sum(),
        "chosen_logratio": chosen_logratio.detach().sum(),
        "rejected_logratio": rejected_logratio.detach().sum(),
    }
    return LossOutput((weights * terms).sum(), metrics)


def adaptive_smoothing(chosen_visits: Float64Array, rejected_visits: Float64Array) -> Float64Array:
    """Compute label smoothing of pairs from a tree; it grows with the visits of the rejected side.

    c   = 1 / (1 + q_l / max(1, q_w))
    eps = min(1 - c, 0.499)

    eps is 0 if the rejected side was never visited, and near 0.5 if it was visited at least as often as the chosen.

    Args:
        chosen_visits: [P] q_w >= 0, visits of the chosen node.
        rejected_visits: [P] q_l >= 0, visits of its rejected sibling.

    Returns:
        [P] float64.

    Raises:
        ValueError: shapes differ, or a count is negative or not finite.

    Source: MCTS-DPO, arXiv:2405.00451, and its code, which bounds eps at 0.5.
    """
    if chosen_visits.shape != rejected_visits.shape:
        raise ValueError(f"expected visits of one shape [P], found {chosen_visits.shape} and {rejected_visits.shape}")
    visits = np.stack([chosen_visits, rejected_visits]).astype(np.float64)
    if not np.isfinite(visits).all() or (visits < 0).any():
        raise ValueError(f"expected visits >= 0, found {visits.tolist()}")
    chosen, rejected = np.maximum(visits[0], 1.0), visits[1]
    # 1 - c = q_l / (q_w + q_l), which does not cancel near c = 1
    return np.minimum(rejected / (chosen + rejected), MAX_SMOOTHING)
