"""Low-rank factors of a residual: exact, and fast."""

from loftq_cli.lowrank.svd import LowRankFactors, top_r, top_r_exact

__all__ = ["LowRankFactors", "top_r", "top_r_exact"]
