"""What an activation is on this rank: placements, and the sources that know them."""

from flex_model.layouts.layout import ActivationLayout, DimLayout

__all__ = ["ActivationLayout", "DimLayout"]
