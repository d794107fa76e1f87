"""What the page of recipes calls the reader's functions."""

from compress_models import above
from compress_models import mean_of_tokens as mean

__all__ = ["above", "mean"]
