"""What a caller asks for a layer, checked, and as it is told in a state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flex_model.errors import SparsityError
from flex_model.sparsity.functions import FUNCTIONS, Functions, function_named, import_name
from flex_model.sparsity.layer import Settings

__all__ = ["checked", "defaults_from", "from_state", "to_state"]

_ASKED = (*FUNCTIONS, "features", "feature_dim", "sparse_config")


def checked(name: str, asked: Mapping[str, Any]) -> Settings:
    """The settings of a layer.

    Raises:
        SparsityError: a function is missing, or features without a dim or the other way round.
    """
    missing = [f for f in FUNCTIONS[:3] if asked.get(f) is None]
    if missing:
        raise SparsityError(
            f"Layer {name} has no {', '.join(missing)}, and there is no default. Give them to "
            "register_layer() or to the sparsifier."
        )
    wrong = [f for f in FUNCTIONS if asked.get(f) is not None and not callable(asked[f])]
    if wrong:
        raise SparsityError(f"Layer {name}: {', '.join(wrong)} must be functions.")
    features, dim = asked.get("features"), asked.get("feature_dim")
    if (features is None) != (dim is None):
        raise SparsityError(f"Layer {name}: features and feature_dim are given together or not.")
    return Settings(
        Functions(*(asked.get(f) for f in FUNCTIONS)),  # type: ignore[arg-type]
        _features(name, features) if features is not None else None,
        dim,
        dict(asked.get("sparse_config") or {}),
    )


def _features(name: str, features: Sequence[int]) -> tuple[int, ...]:
    found = tuple(int(feature) for feature in features)
    if not found or min(found) < 0 or len({*found}) != len(found):
        raise SparsityError(f"Layer {name}: features {list(features)} must be distinct and >= 0.")
    return found


def to_state(settings: Settings) -> dict[str, Any]:
    """In numbers and strings: functions by their import names."""
    own = settings.functions
    functions = (own.aggregate, own.reduce, own.mask, own.combine)
    return {
        **{f: import_name(given) for f, given in zip(FUNCTIONS, functions, strict=True)},
        "features": list(settings.features) if settings.features is not None else None,
        "feature_dim": settings.feature_dim,
        "sparse_config": dict(settings.sparse_config),
    }


def from_state(name: str, told: Mapping[str, Any]) -> Settings:
    """What `to_state` told.

    Raises:
        SparsityError: something is missing, or a function is not there.
    """
    return checked(name, defaults_from(told))


def defaults_from(told: Mapping[str, Any]) -> dict[str, Any]:
    """What a state tells, with functions in the place of their names."""
    if not isinstance(told, Mapping) or not {*_ASKED} <= {*told}:
        raise SparsityError(f"A state must tell {list(_ASKED)} of every layer.")
    return {key: function_named(told[key]) if key in FUNCTIONS else told[key] for key in _ASKED}
