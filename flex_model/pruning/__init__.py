"""From importance scores to a smaller model that works."""

from flex_model.pruning.cut import pruned
from flex_model.pruning.dimensions import Dimension, Space
from flex_model.pruning.evaluate import Comparison, Measured, compare, perplexity
from flex_model.pruning.plan import Cut, PruningPlan
from flex_model.pruning.prune import prune
from flex_model.pruning.save import save
from flex_model.pruning.scores import random_scores, read_scores
from flex_model.pruning.target import Target
from flex_model.pruning.text import comparison_table, plan_table

__all__ = ["Target", "prune", "PruningPlan", "Cut", "Space", "Dimension"]
__all__ += ["random_scores", "read_scores", "save", "pruned"]
__all__ += ["perplexity", "compare", "Comparison", "Measured"]
__all__ += ["plan_table", "comparison_table"]
