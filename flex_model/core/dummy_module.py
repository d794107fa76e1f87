"""A place to hook where a model has none."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["DummyModule"]


class DummyModule(nn.Module):
    """Returns its input. Put one where a value should be hooked but no module makes it.

    Examples:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.scores = DummyModule()
        ...     def forward(self, q, k):
        ...         return self.scores(q @ k.mT)      # now "scores" is a hook point
    """

    def forward(self, inputs: Any) -> Any:
        """Return ``inputs``, whatever it is."""
        return inputs
