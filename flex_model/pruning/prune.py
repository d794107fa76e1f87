"""From scores to a smaller model: the one call that does it all."""

from __future__ import annotations

from torch import nn

from flex_model.pruning.agreement import agreed
from flex_model.pruning.cut import cut
from flex_model.pruning.plan import PruningPlan, make_plan
from flex_model.pruning.scores import Scores
from flex_model.pruning.target import Target, Targets

__all__ = ["plan_alike", "prune"]


def prune(
    model: nn.Module,
    scores: Scores,
    *,
    ffn: Target | None = None,
    kv_heads: Target | None = None,
    hidden: Target | None = None,
    layers: Target | None = None,
    experts: Target | None = None,
    dry_run: bool = False,
) -> PruningPlan:
    """Make a transformers decoder model smaller, in place, by importance scores.

    Every weight that shares a dimension is cut alike, and the config follows, so that the model
    works at once and ``flex_model.pruning.save`` writes a checkpoint that ``from_pretrained``
    loads. On a model sharded by its ``tp_plan`` every rank ends with its even share of what one
    process would have kept; call it on every rank, with the same scores. Parameters that shrink are
    new ones: make optimizers afterwards.

    Args:
        model: whole, or sharded over tensor-parallel ranks.
        scores: by module name, one number for each index, the higher the more it is kept:
            ``{mlp}.down_proj`` (FFN channels, ``[intermediate]``; of experts
            ``{mlp}.experts.down_proj``, ``[experts, intermediate]``, for each keeps channels of its
            own), ``{attention}.o_proj`` (``[KV heads]``), ``{mlp}.experts`` or ``{mlp}.gate``
            (``[experts]``), "hidden" (``[hidden]``) and "layers" (``[layers]``). Further scores of
            the model's modules are passed over. Of equal scores the first index is kept.
        ffn: channels of the feed-forward networks, in each layer alike many.
        kv_heads: key-value heads, each with the query heads that share it.
        hidden: the width of what passes between layers.
        layers: whole layers.
        experts: of each mixture of experts.
        dry_run: decide and check everything, change nothing.

    Returns:
        What is kept, and how many parameters that makes.

    Raises:
        PruningError: the architecture, the scores or a target do not fit; on every rank alike, and
            before anything is changed.
        RankDisagreementError: ranks came with different scores or targets.

    Examples:
        >>> plan = prune(model, scores, ffn=Target(ratio=0.25))  # doctest: +SKIP
        >>> plan.parameters_after < plan.parameters_before  # doctest: +SKIP
        True
    """
    targets = Targets(ffn=ffn, kv_heads=kv_heads, hidden=hidden, layers=layers, experts=experts)
    plan = plan_alike(model, scores, targets)
    if not dry_run:
        cut(model, plan)
    return plan


def plan_alike(model: nn.Module, scores: Scores, targets: Targets) -> PruningPlan:
    """The plan that all ranks make; dimensions with None are left as they are."""
    return agreed(model, lambda: make_plan(model, scores, targets), _spelled)


def _spelled(plan: PruningPlan) -> str:
    kept = {name: index.tolist() for name, index in plan.kept.items()}
    return f"{kept} {dict(plan.fields)} {plan.parameters_before}"
