"""Low-rank factors of a residual: exact, and fast."""

from loftq_cli.lowrank.svd import LowRankFactors, Subspace, top_r, top_r_exact

__all__ = ["LowRankFactors", "Subspace", "top_r", "top_r_exact"]
