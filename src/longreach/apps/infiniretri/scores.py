"""Which sentences a question attends to. Knows what its tokens pay to others; not where that comes from, or what they say.

With A [T, N] the attention of the rows from the question to the end of a prompt, all heads added up, q the tokens of the question and c those of the text:

    w_r = sum over q of A[r, q]                     how much of a question a row sees
    s_j = sum over r of w_r^2 A[r, j], j in c
    score_j = s_(j-3) + ... + s_(j+4)               of a phrase of 8 tokens, of those that are in c

The sentences of the tokens that score best are kept. Rows are added up before phrases are, which is the same and less work.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def token_scores(paid: torch.Tensor, question: slice, context: slice, phrase: int) -> torch.Tensor:
    """paid [T, N] of the rows -> the scores [c] of the tokens `context`. `question`: its tokens among the N.

    Raises ValueError where they are no numbers.
    """
    weights = paid[:, question].sum(1).square()
    of_each = weights @ paid[:, context]
    if not bool(of_each.isfinite().all()):
        raise ValueError("the model gives NaN or infinity as attention; load it in another dtype (float32, or bfloat16 where float16 overflows)")
    padded = F.pad(of_each, ((phrase - 1) // 2, phrase // 2))
    return padded.unfold(0, phrase, 1).sum(1)


def best(scores: torch.Tensor, owners: list[int], top_k: int) -> list[int]:
    """scores [c], `owners` the sentences that these tokens belong to -> those of the `top_k` best tokens, the best first. Of equal tokens the earlier wins."""
    order = scores.sort(descending=True, stable=True).indices[:top_k].tolist()
    return list(dict.fromkeys(owners[token] for token in order))
