"""The rule for tensors that a model folder has and its class lacks, or the reverse.

The check of the headers and the learner that loads the values both apply it, so that one accepts what the other does.
Only what transformers itself declares ignorable may be left over, such as layers for the prediction of several tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from rlsys.errors import ConfigError

# Buffers that old folders have, which transformers ignores in every class.
_OLD_BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


def refuse_differences(where: str, loading_info: Mapping[str, Any]) -> None:
    """Raise if the tensors of a folder are not those of its model.

    transformers gives random values to missing tensors and drops unexpected ones. A tied output layer and buffers that
    are computed are not missing.

    Args:
        where: the model folder, for the message.
        loading_info: report of transformers on the load.

    Raises:
        ConfigError: the message names the first difference, the most telling kind first.
    """
    mismatched = sorted(loading_info["mismatched_keys"])
    named = {name for name, _, _ in mismatched}
    problems = [
        *(
            f"tensor {name} has shape {list(stored)}, config.json makes it {list(expected)}"
            for name, stored, expected in mismatched
        ),
        *(f"tensor {name} is missing" for name in sorted(set(loading_info["missing_keys"]) - named)),
        *(f"config.json has no place for tensor {name}" for name in sorted(loading_info["unexpected_keys"])),
    ]
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise ConfigError(
            f"{where}: config.json and the weights belong to different models: {problems[0]}{more}; download both "
            "from one model, or save it again with from_pretrained and save_pretrained of transformers"
        )


def ignored_tensors(model: Any, names: Iterable[str]) -> list[str]:
    """Return the tensors that transformers declares ignorable for a model, in order.

    Args:
        model: a model of transformers.
        names: the tensors of its folder.
    """
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), *_OLD_BUFFERS]
    ignorable = re.compile("|".join(f"({pattern})" for pattern in patterns))
    loaded = model.state_dict().keys()
    return sorted(name for name in names if name not in loaded and ignorable.search(name))
