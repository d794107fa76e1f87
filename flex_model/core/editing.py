"""Running the editing functions of one hook point, each on as much of the tensor as it needs."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from flex_model.core import debugging
from flex_model.core.hook_function import Edit
from flex_model.core.local_noise import LocalNoise
from flex_model.core.local_shard import LocalShard
from flex_model.core.randomness import RandomStreams
from flex_model.core.results import checked
from flex_model.core.session import Session
from flex_model.distributed.combining import combined
from flex_model.distributed.gradients import GradientMemory
from flex_model.distributed.routing import assemble, gather, reshard
from flex_model.layouts.layout import ActivationLayout

__all__ = ["Editing"]


@dataclass(frozen=True)
class _Split:
    """Where a function works.

    Attributes:
        gathered: the mesh dims that are made whole for it.
        local: the mesh dims over which it works on this rank's shard.
    """

    gathered: ActivationLayout
    local: ActivationLayout

    @property
    def scale(self) -> float:
        """Factor from local values to the whole's: of gradients over data-parallel ranks."""
        return math.prod(dim.value_scale for dim in self.local.dims)


class Editing:
    """The editing functions of one hook point.

    Args:
        module: the module hooked, for the functions.
        session: what all points share.
        memory: gradient placements measured at this point.
        streams: its random streams.
        where: module, kind and rank, for messages.
    """

    def __init__(
        self,
        module: nn.Module,
        session: Session,
        memory: GradientMemory,
        streams: RandomStreams,
        where: str,
    ) -> None:
        self._module = module
        self._session = session
        self._memory = memory
        self._streams = streams
        self._where = where

    def edit(
        self,
        local: Tensor,
        layout: ActivationLayout,
        edits: Sequence[Edit],
        record: Callable[[Tensor | None], None],
        *,
        recompute: bool,
    ) -> Tensor:
        """Pass a tensor through editing functions; itself where they changed nothing.

        Args:
            local: this rank's tensor.
            layout: how it lies.
            edits: the functions, in order.
            record: called once, before the first edit, with the whole tensor if it is at hand.
            recompute: whether a forward is run again within backward.
        """
        current, mesh = local, self._session.mesh
        # Checkpointing recomputes what autograd records, or (reentrant) a training module's calls.
        remember = torch.is_grad_enabled() or self._module.training
        for number, (split, group) in enumerate(_runs(edits, layout, local.ndim)):
            part = gather(current, split.gathered, mesh, self._memory)
            if number == 0:
                record(None if split.local.dims else part)
            before, scale = _version(part), split.scale
            edited = part if scale == 1.0 else part * scale
            for order, edit in group:
                call = self._call(edit, edited, split.local)
                with self._session.shared.over(split.local):
                    result = self._streams.run(
                        call, local, order, remember=remember, recompute=recompute
                    )
                edited = self._checked(result, edited, edit, split.local)
            edited = edited if scale == 1.0 else edited / scale
            untouched = edited is part and before is not None and _version(part) == before
            if not untouched or (part.requires_grad and not split.gathered.told):
                current = reshard(edited, split.gathered, mesh, self._memory)
        return current

    def statistic(self, local: Tensor, layout: ActivationLayout, edit: Edit) -> Tensor:
        """What a statistic of the whole tensor is, from every rank's part of it."""
        session, needs = self._session, edit.needs
        call, part, split = self._look(local, layout, edit)
        found = self._streams.run(call, local, -1)
        whole = combined(
            found, part.shape, split.local, needs.reduced(part.ndim), needs.combine or "sum",
            session.mesh, self._where,
        )  # fmt: skip
        if session.debug:
            invoke = partial(self._invoke, edit)
            debugging.check_statistic(invoke, part, split.local, whole, session, self._where)
        return whole

    def observe(self, local: Tensor, layout: ActivationLayout, edit: Edit) -> None:
        """Show a function this rank's part of the tensor."""
        call, _, _ = self._look(local, layout, edit)
        with torch.no_grad():
            self._streams.run(call, local, -1)

    def _look(
        self, local: Tensor, layout: ActivationLayout, edit: Edit
    ) -> tuple[Callable[[], Any], Tensor, _Split]:
        """A function that changes nothing, with the part that it needs."""
        session = self._session
        split = _Split(*edit.needs.split(layout, local.ndim))
        part = assemble(local.detach(), split.gathered, session.mesh)
        scale = split.scale
        part = part if scale == 1.0 else part * scale
        shard = LocalShard(part.shape, split.local, session.mesh)
        return partial(self._invoke, edit, part, shard, session.save_ctx), part, split

    def _call(self, edit: Edit, part: Tensor, local_dims: ActivationLayout) -> Callable[[], Any]:
        """An editing function with all that it is given."""
        session, invoke = self._session, partial(self._invoke, edit)
        if session.debug:
            return partial(debugging.checked_edit, invoke, part, local_dims, session, self._where)
        shard = LocalShard(part.shape, local_dims, session.mesh)
        return partial(invoke, part, shard, session.save_ctx)

    def _checked(
        self, result: Any, due: Tensor, edit: Edit, local_dims: ActivationLayout
    ) -> Tensor:
        edited = checked(result, due, edit, self._where)
        if self._session.debug and not local_dims.dims:
            debugging.check_replicas(edited, self._session, self._where)
        return edited

    def _invoke(self, edit: Edit, part: Tensor, shard: LocalShard, save_ctx: Namespace) -> Any:
        told = {"shard": shard} if edit.takes_shard else {}
        with LocalNoise(shard, self._where) if shard.dims else nullcontext():
            return edit.function(self._module, part, save_ctx, self._session.modules, **told)


def _runs(
    edits: Sequence[Edit], layout: ActivationLayout, ndim: int
) -> Iterator[tuple[_Split, list[tuple[int, Edit]]]]:
    """Neighbouring functions that work on the same part, which is gathered once for them."""
    split_of = [_Split(*edit.needs.split(layout, ndim)) for edit in edits]
    for split, group in groupby(enumerate(edits), key=lambda numbered: split_of[numbered[0]]):
        yield split, list(group)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
