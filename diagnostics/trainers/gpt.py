"""A decoder-only transformer, as GPT-2 (Radford et al. 2019) with few and small blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from diagnostics.trainers.models import at_least_one
from diagnostics.trainers.tasks import Inputs

NORM_POSITIONS = ("pre", "post")
DEVIATION = 0.02  # GPT-2's, of all weights; residual projections have 1 / sqrt(2 * blocks) of it


class Attention(nn.Module):
    """Causal self-attention with several heads.

    Example:
        >>> Attention(8, heads=2, dropout=0.0)(torch.zeros(5, 6, 8)).shape
        torch.Size([5, 6, 8])
    """

    def __init__(self, width: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps ``(batch, context, width)`` to the same shape; a place sees itself and what is before it."""
        split = self.query_key_value(hidden).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        result: Tensor = self.projection(mixed.transpose(1, 2).flatten(2))
        return result


class FeedForward(nn.Sequential):
    """Two Linear layers with a GELU between, four times as wide inside.

    Example:
        >>> FeedForward(8).expansion.out_features
        32
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expansion = nn.Linear(width, 4 * width)
        self.activation = nn.GELU()
        self.projection = nn.Linear(4 * width, width)


class DecoderBlock(nn.Module):
    """Attention and feed-forward network, each added to its input.

    Normalised is each part's input (``pre``: Radford et al. 2019) or each sum (``post``: Vaswani et al. 2017).

    Example:
        >>> DecoderBlock(8, heads=2, norm_position="pre", dropout=0.0)(torch.zeros(5, 6, 8)).shape
        torch.Size([5, 6, 8])
    """

    def __init__(self, width: int, *, heads: int, norm_position: str, dropout: float) -> None:
        super().__init__()
        self.pre = norm_position == "pre"
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads=heads, dropout=dropout)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps ``(batch, context, width)`` to the same shape."""
        hidden = self._add(hidden, self.attention, self.attention_norm)
        return self._add(hidden, self.feed_forward, self.feed_forward_norm)

    def _add(self, hidden: Tensor, part: nn.Module, norm: nn.Module) -> Tensor:
        if self.pre:
            return hidden + self.dropout(part(norm(hidden)))  # type: ignore[no-any-return]
        return norm(hidden + self.dropout(part(hidden)))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """A decoder: embeddings of tokens and positions, ``depth`` blocks, scores of the next token at every place.

    Initialised as GPT-2: normal weights with deviation 0.02, those of the projections back into the residual stream
    smaller by the root of their number, biases zero. The context is the task's.

    Args:
        inputs: What a task feeds: tokens.
        outputs: Different tokens.
        depth: Blocks, at least 1. Layers of a pass: two embeddings, in each block four Linear and two normalisations,
            with ``pre`` one more normalisation, and the head.
        width: Numbers at each place, a multiple of ``heads``.
        heads: Of the attention, at least 1.
        norm_position: ``pre`` normalises what enters attention and feed-forward network, ``post`` the sum behind them.
        tied: Whether the head's weights are the token embedding's. They are then counted at the embedding.
        dropout: Share of attention weights and of numbers entering the residual stream that are dropped in training.

    Raises:
        ValueError: An option that does not exist, a size out of range, or a task that feeds no tokens.

    Example:
        >>> model = GPT(Inputs("tokens", (6,)), 256, depth=2, width=8, heads=2)
        >>> model(torch.zeros(5, 6, dtype=torch.long)).shape
        torch.Size([5, 6, 256])
    """

    def __init__(
        self,
        inputs: Inputs,
        outputs: int,
        *,
        depth: int = 6,
        width: int = 64,
        heads: int = 4,
        norm_position: str = "pre",
        tied: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        (context,) = inputs.required("gpt", "tokens").shape
        _check(depth, width, heads, norm_position, dropout)
        self.tokens = nn.Embedding(outputs, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        blocks = (DecoderBlock(width, heads=heads, norm_position=norm_position, dropout=dropout) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width) if norm_position == "pre" else nn.Identity()
        self.head = nn.Linear(width, outputs, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self._initialise(depth)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps ``(batch, context)`` to ``(batch, context, outputs)``."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.dropout(self.tokens(tokens) + self.positions(places))
        scores: Tensor = self.head(self.norm(self.blocks(hidden)))
        return scores

    def _initialise(self, depth: int) -> None:
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                into_stream = name.endswith(".projection")
                nn.init.normal_(module.weight, std=DEVIATION / (2 * depth) ** 0.5 if into_stream else DEVIATION)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def _check(depth: int, width: int, heads: int, norm_position: str, dropout: float) -> None:
    at_least_one(depth=depth, width=width, heads=heads)
    if width % heads:
        raise ValueError(f"width must be a multiple of heads, {heads}; got {width}.")
    if norm_position not in NORM_POSITIONS:
        raise ValueError(f"norm_position must be one of {', '.join(NORM_POSITIONS)}; got {norm_position!r}.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1; got {dropout}.")
