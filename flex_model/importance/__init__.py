"""Importance: which channels, heads and layers a model can do without, at any sharding.

Every hook is a plain forward hook, and runs under FlexModel (`FlexModel.register_importance_hook`),
where each rank scores its own channels on its own tokens and one vector is gathered in the end.
"""

from flex_model.importance.activation import PaddingMask
from flex_model.importance.depth import LayerSimilarityHook, layer_scores
from flex_model.importance.evaluation import evaluate_importance_scores
from flex_model.importance.experts import ExpertHook, FusedExpertsHook
from flex_model.importance.files import dump_scores, load_scores, load_states, save_states
from flex_model.importance.heads import (
    AttentionHeadHook,
    Heads,
    IndependentKvHeadContributionHook,
)
from flex_model.importance.hook import ForwardHook
from flex_model.importance.independent import IndependentChannelContributionHook
from flex_model.importance.iterative import IterativeChannelContributionHook
from flex_model.importance.l2_norm import L2NormHook, MegatronL2NormHook
from flex_model.importance.layer_norm import LayerNormContributionHook
from flex_model.importance.run.scoring import score
from flex_model.importance.run.targets import KINDS, Target, hooks_for

__all__ = [
    "AttentionHeadHook",
    "ExpertHook",
    "ForwardHook",
    "FusedExpertsHook",
    "Heads",
    "IndependentChannelContributionHook",
    "IndependentKvHeadContributionHook",
    "IterativeChannelContributionHook",
    "KINDS",
    "L2NormHook",
    "LayerNormContributionHook",
    "LayerSimilarityHook",
    "MegatronL2NormHook",
    "PaddingMask",
    "Target",
    "dump_scores",
    "evaluate_importance_scores",
    "hooks_for",
    "layer_scores",
    "load_scores",
    "load_states",
    "save_states",
    "score",
]
