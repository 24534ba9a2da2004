"""Masked tokens of supervised rows: the model does not see them, and they stay targets."""

from __future__ import annotations

import numpy as np
from joint_samples import ids, sft_sample

from learners.samples.batching import collate
from learners.samples.masking import UNMASKED, ThoughtMask
from learners.samples.types import PackItem, demonstration_sample
from rlsys.types import Demonstration

LONG = demonstration_sample(
    Demonstration(token_ids=np.arange(1, 2001, dtype=np.int32), loss_mask=np.arange(2000) >= 1000)
)
MASK = ThoughtMask(share=0.4, token=0, seed=7)


def test_the_share_of_the_chain_is_hidden_and_nothing_of_the_prompt():
    sample = MASK.hide(LONG, 0)
    hidden = sample.inputs == 0
    # 1000 draws at 0.4: mean 400, standard deviation sqrt(1000 * 0.4 * 0.6) = 15.5.
    assert not hidden[:1000].any() and 340 < hidden[1000:].sum() < 460
    assert (sample.inputs[~hidden] == LONG.token_ids[~hidden]).all()
    assert (sample.token_ids == LONG.token_ids).all() and (sample.targets == LONG.sft_mask).all()


def test_draws_follow_from_the_seed_and_the_number_of_the_row():
    same, other, later = MASK.hide(LONG, 3), MASK.hide(LONG, 4), ThoughtMask(share=0.4, token=0, seed=8)
    assert (same.inputs == MASK.hide(LONG, 3).inputs).all()
    assert (same.inputs != other.inputs).any() and (same.inputs != later.hide(LONG, 3).inputs).any()


def test_without_a_share_nothing_is_hidden():
    assert UNMASKED.hide(LONG, 0).input_ids is None


def test_a_hidden_token_by_hand():
    # Of [5, 6, 7, 8], the model sees 5, 6, PAD, 8 and learns 7 after 6 and 8 after PAD.
    sample = sft_sample([5, 6, 7, 8], [0, 0, 1, 1])
    hidden = ThoughtMask(share=0.999, token=3, seed=0).hide(
        demonstration_sample(
            Demonstration(token_ids=sample.token_ids, loss_mask=np.array([False, False, True, False]))
        ),
        0,
    )
    assert hidden.inputs.tolist() == [5, 6, 3, 8]
    batch = collate([PackItem(samples=(hidden,))], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 3, 8]]
    assert (batch.targets.tolist(), batch.target_ids.tolist()) == ([1], [7])


def test_rows_share_what_the_model_sees_and_not_what_it_learns():
    # Both rows begin with 5, 6 as targets; the second sees 3 in the place of 6, so only token 5 can stand once.
    plain = sft_sample([5, 6, 7], [0, 1, 1])
    hidden = ThoughtMask(share=0.999, token=3, seed=0).hide(
        demonstration_sample(Demonstration(token_ids=ids(5, 6, 8), loss_mask=np.array([False, True, False]))), 0
    )
    batch = collate([PackItem(samples=(plain,)), PackItem(samples=(hidden,))], pad_id=0, rows=[[0, 1]])
    assert sorted(batch.input_ids[0].tolist()) == [3, 5, 6, 7, 8]
    assert batch.target_ids.tolist() == [6, 7, 6]
