"""A table of embeddings whose weight stays in packed codes: only the rows that tokens look up are unpacked.

The layout is that of `loftq_cli.formats.packed`. This file also travels inside checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loftq_cli.runtime.scheme import Scheme
from loftq_cli.runtime.unpacking import rows_by_torch
from loftq_cli.runtime.weight import PackedLayer


class PackedEmbedding(PackedLayer, nn.Embedding):
    """`nn.Embedding` with packed codes in place of the weight [tokens, features]; frozen."""

    plain = nn.Embedding

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, scheme: Scheme, dtype: torch.dtype
    ) -> None:
        self.make_room(num_embeddings, embedding_dim, scheme, dtype)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        # as torch has them by default, for who looks a table of its own up in the same way, as PEFT's adapter does
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False

    def forward(self, input: Tensor) -> Tensor:
        """`weight[input]`."""
        if not isinstance(self, PackedEmbedding):  # dense by now, see `PackedLinear.forward`
            return nn.functional.embedding(input, self.weight, self.padding_idx)
        rows = rows_by_torch(self.packed(), input.reshape(-1), self.compute_dtype)
        return rows.view(*input.shape, self.embedding_dim)
