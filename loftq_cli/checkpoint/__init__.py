"""Checkpoints as bytes: where they come from, how they are read and written; no maths."""
