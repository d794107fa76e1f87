"""One layer that a sparsifier looks after: what it has seen, its mask, and its hook functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flex_model.core.hook_function import HookFunction
from flex_model.core.local_shard import LocalShard
from flex_model.core.needs import elementwise, observes
from flex_model.errors import FlexModelError, SparsityError
from flex_model.sparsity.aggregate import Aggregate, accurate
from flex_model.sparsity.functions import Functions
from flex_model.sparsity.sharded import Place, made_mask, over_replicas, own_part

__all__ = ["HookState", "Settings", "SparseLayer"]

HookState = Literal["aggregate", "sparsify", "None"]


@dataclass(frozen=True)
class Settings:
    """What was asked for a layer.

    Attributes:
        functions: how its mask is made.
        features: indices along ``feature_dim`` that have a mask each; None for one mask of all.
        feature_dim: the activation's dim of the features.
        sparse_config: keywords of the mask function.
    """

    functions: Functions
    features: tuple[int, ...] | None = None
    feature_dim: int | None = None
    sparse_config: dict[str, Any] = field(default_factory=dict)


class SparseLayer:
    """What one layer has been given since the last mask, and its mask.

    Args:
        name: of the module.
        settings: what was asked for it.
        zero_start: whether an aggregate starts from zeros, as torch's does.
    """

    def __init__(self, name: str, settings: Settings, zero_start: bool) -> None:
        self.name = name
        self.settings = settings
        self.masks: list[Tensor] | None = None
        self.hook: HookFunction | None = None
        self.hook_state: HookState = "None"
        self._zero_start = zero_start
        self._aggregates: list[Aggregate] = []
        self._place: Place | None = None

    @property
    def mask(self) -> Tensor | list[Tensor] | None:
        """One mask, or one for each feature. None before there is any."""
        if self.masks is None or self.settings.features is not None:
            return self.masks
        return self.masks[0]

    @property
    def data(self) -> Tensor | list[Tensor] | None:
        """What is aggregated on this rank; None right after a step."""
        found = [aggregate.data for aggregate in self._aggregates]
        if not found or self.settings.features is not None:
            return found or None
        return found[0]

    def forget(self) -> None:
        """Begin a new aggregate."""
        self._aggregates, self._place = [], None

    # -- aggregating ---------------------------------------------------------------------------

    def aggregating(self) -> HookFunction:
        """A hook function for the layer's input that aggregates it, seen once a forward."""

        def aggregate(
            current_module: nn.Module, inputs: Tensor, save_ctx: Any, modules: Any, *,
            shard: LocalShard,
        ) -> None:  # fmt: skip
            with self._named("aggregating"):
                self._take(accurate(inputs), Place.of(shard))

        function: Any = observes(aggregate)
        return HookFunction(self.name, editing_function=function)

    def _take(self, x: Tensor, here: Place) -> None:
        functions = self.settings.functions
        place = here.kept(functions.aggregate, self._feature_dims(x.ndim))
        if self._place is not None and not self._place.cut:
            place = here.whole()
        slices = self._slices(here.gathered(x, place))
        if self._place is None:
            found = [Aggregate.first(s, functions, self._zero_start) for s in slices]
            self._aggregates, self._place = found, place
            return
        pairs = list(zip(self._aggregates, slices, strict=True))
        if self._zero_start:
            found = [replace(a, data=functions.aggregate(a.data, s)) for a, s in pairs]
        elif all(not a.reduced and a.fits(s, functions) for a, s in pairs):
            found = [a.plus(s, functions) for a, s in pairs]
        else:
            found = [
                self._whole(a).plus_ragged(place.gathered(s, place.whole()), functions)
                for a, s in pairs
            ]
            self._place = self._place.whole()
        self._aggregates = found

    def _whole(self, aggregate: Aggregate) -> Aggregate:
        if self._place is None or not self._place.cut:
            return aggregate
        return replace(aggregate, data=self._place.gathered(aggregate.data, self._place.whole()))

    def _feature_dims(self, ndim: int) -> tuple[int, ...]:
        """The dim of the features, which must be whole to find them."""
        dim = self.settings.feature_dim
        if self.settings.features is None or dim is None:
            return ()
        if not -ndim <= dim < ndim:
            raise SparsityError(f"feature_dim {dim} does not exist in an input of {ndim} dims.")
        return (dim % ndim,)

    def _slices(self, x: Tensor) -> list[Tensor]:
        """One for each feature, with the dim kept; or the activation itself."""
        features, dims = self.settings.features, self._feature_dims(x.ndim)
        if features is None:
            return [x]
        (dim,) = dims
        self._check_features(x.shape[dim])
        indices = torch.tensor(features, device=x.device).unsqueeze(1)
        return [x.index_select(dim, index) for index in indices]

    def _check_features(self, length: int) -> None:
        beyond = [feature for feature in self.settings.features or () if feature >= length]
        if beyond:
            raise SparsityError(
                f"features {beyond} do not exist: the input has {length} along dim "
                f"{self.settings.feature_dim}."
            )

    # -- the mask ------------------------------------------------------------------------------

    def new_masks(self) -> list[Tensor] | None:
        """The masks of what is aggregated, whole and equal on every rank; None if nothing is.
        Collective, and nothing is changed.
        """
        if self._place is None:
            return None
        functions, config = self.settings.functions, self.settings.sparse_config
        made = []
        with self._named("making a mask"), torch.no_grad():
            for aggregate in self._aggregates:
                found, place = over_replicas(aggregate, self._place, functions)
                made.append(made_mask(found, place, functions, config))
        return made

    # -- sparsifying ---------------------------------------------------------------------------

    def sparsifying(self) -> HookFunction:
        """A hook function for the layer's input that multiplies it by the mask."""

        def sparsify(
            current_module: nn.Module, inputs: Tensor, save_ctx: Any, modules: Any, *,
            shard: LocalShard,
        ) -> Tensor:  # fmt: skip
            with self._named("sparsifying"):
                return self._sparsified(inputs, shard)

        function: Any = elementwise(sparsify)
        return HookFunction(self.name, editing_function=function)

    def _sparsified(self, x: Tensor, shard: LocalShard) -> Tensor:
        if self.masks is not None:  # of a file, say: they move once
            self.masks = [mask.to(x.device) for mask in self.masks]
        whole = self._multiplier(shard)
        own = own_part(whole, shard).to(x.dtype)
        try:
            shape = torch.broadcast_shapes(own.shape, x.shape)
        except RuntimeError:
            shape = torch.Size()
        if shape != x.shape:
            raise SparsityError(
                f"a mask {tuple(whole.shape)} does not broadcast against an input "
                f"{tuple(shard.whole_shape)}. Reduce the dims in which inputs differ."
            )
        return x * own

    def _multiplier(self, shard: LocalShard) -> Tensor:
        """The mask; of features, ones with each feature's mask in its place."""
        masks = self.masks or []
        if self.settings.features is None:
            return masks[0]
        ndim = len(shard.shape)
        (dim,) = self._feature_dims(ndim)
        self._check_features(shard.whole_shape[dim])
        aligned = [mask[(None,) * (ndim - mask.ndim)] for mask in masks]
        sizes = list(torch.broadcast_shapes(*(mask.shape for mask in aligned)))
        if sizes[dim] != 1:
            raise SparsityError(
                f"a feature's mask is {tuple(masks[0].shape)}, but one feature is of length 1 "
                f"along dim {dim}."
            )
        sizes[dim] = shard.whole_shape[dim]
        whole = torch.ones(sizes, dtype=masks[0].dtype, device=masks[0].device)
        for feature, mask in zip(self.settings.features, aligned, strict=True):
            whole.narrow(dim, feature, 1).copy_(mask)
        return whole

    @contextmanager
    def _named(self, doing: str) -> Iterator[None]:
        """Errors of the caller's functions tell which layer they were called for."""
        try:
            yield
        except SparsityError as error:
            raise SparsityError(f"Layer {self.name}, {doing}: {error}") from error
        except FlexModelError:  # what other ranks do is told as it is
            raise
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            told = f"{type(error).__name__}: {error}"
            raise SparsityError(f"Layer {self.name}, {doing}: {told}") from error
