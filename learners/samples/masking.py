"""Masked Thought: supervised rows in which the model does not see some tokens of the chain that it imitates."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from learners.samples.types import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class ThoughtMask:
    """Replacement of random tokens of a chain on the input side. The targets stay.

    Attributes:
        share: probability that a token of the chain is replaced; tokens of the prompt never are.
        token: token id that stands in the place of a replaced one.
        seed: seed of the draws of one training step.

    Source: Masked Thought, arXiv:2403.02178, sec. 3.
    """

    share: float
    token: int
    seed: int

    def hide(self, sample: Sample, number: int) -> Sample:
        """Return the sample of a supervised row with hidden tokens.

        Args:
            sample: the whole row.
            number: its number in the training step, from which its draws follow.
        """
        ids, mask = sample.token_ids, sample.sft_mask
        if not self.share or mask is None:
            return sample
        draws = np.random.default_rng((self.seed, number)).random(len(ids))
        masked = mask & (draws < self.share)
        return replace(sample, input_ids=np.where(masked, self.token, ids).astype(np.int32))


UNMASKED = ThoughtMask(share=0.0, token=0, seed=0)
