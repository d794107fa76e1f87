"""One score vector for each thing that can be pruned, as `flex-model prune` reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flex_model.importance.results.summary import Row

__all__ = ["pruning_scores"]


def pruning_scores(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Scores by module name, the higher the more it is kept.

    Where a module has several kinds the first one speaks for it. "layers" are the scores of kind
    ``layers`` one after the other; "hidden" are those of kind ``hidden``, or else ``layer_norm``,
    summed over the norms.

    Returns:
        Float32 each.
    """
    found: dict[str, Tensor] = {}
    for row in rows:
        found.setdefault(row.module, row.scores.float())
    layers = [row.scores for row in rows if row.kind == "layers"]
    if layers:
        found["layers"] = torch.cat(layers).float()
    hidden = _summed(rows, "hidden")
    hidden = hidden if hidden is not None else _summed(rows, "layer_norm")
    if hidden is not None:
        found["hidden"] = hidden.float()
    return found


def _summed(rows: Sequence[Row], kind: str) -> Tensor | None:
    scores: Mapping[int, Tensor] = {n: r.scores for n, r in enumerate(rows) if r.kind == kind}
    if not scores or len({values.shape for values in scores.values()}) > 1:
        return None  # norms of heads beside those of the residual stream
    return torch.stack(list(scores.values())).sum(0)
