"""Low-rank factors of residuals: exact, and fast."""

from loftq_cli.lowrank.draw import uniform
from loftq_cli.lowrank.svd import LowRankFactors, Subspace, full_precision, top_r, top_r_exact

__all__ = ["LowRankFactors", "Subspace", "full_precision", "top_r", "top_r_exact", "uniform"]
