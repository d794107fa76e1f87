"""The parity grid: the same work on one process and on N ranks, compared."""

from flex_model.testing.compare import Measurement, relative_error
from flex_model.testing.ranks import RankFailure, run_ranks

__all__ = ["Measurement", "RankFailure", "relative_error", "run_ranks"]
