"""Sums that stay where their channels lie, and are made whole when somebody asks."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from flex_model.core.local_shard import LocalShard
from flex_model.distributed.mesh import ParallelMesh
from flex_model.errors import ImportanceError

__all__ = ["ShardedSum"]


class ShardedSum:
    """One float32 number per channel, added up over calls.

    Each rank adds up its own channels over its own tokens. Nothing is moved before `whole`.
    """

    def __init__(self) -> None:
        self._own: Tensor | None = None
        self._shard: LocalShard | None = None
        self._over: tuple[int, ...] = ()
        self._restored: Tensor | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing was added or restored."""
        return self._own is None and self._restored is None

    @property
    def own(self) -> Tensor | None:
        """This rank's terms of its own channels."""
        return self._own

    def add(self, term: Tensor, shard: LocalShard, over: Collection[int]) -> None:
        """Add one call's term.

        Args:
            term: ``[own channels]``.
            shard: which part of the activation it was computed of.
            over: the activation's dims that the term is a sum over.

        Raises:
            ImportanceError: another number of channels than before, or cut over other ranks.
        """
        if self._restored is not None:
            self._own = self._part_of(self._restored, term, shard, over)
            self._restored = None
        if self._own is None:
            self._own = torch.zeros_like(term)
        if self._own.shape != term.shape:
            raise ImportanceError(
                f"A layer of {self._own.numel()} channels on this rank was called with "
                f"{term.numel()}. Give every layer an importance hook of its own."
            )
        self._check_cuts(shard, over)
        self._own = self._own.to(term.device) + term
        self._shard, self._over = shard, tuple(over)

    def _check_cuts(self, shard: LocalShard, over: Collection[int]) -> None:
        """What was added up over some ranks' tokens cannot go on over others'."""
        if self._shard is None:
            return
        before, now = self._shard.mesh_dims(self._over), shard.mesh_dims(over)
        if before != now:
            raise ImportanceError(
                f"A layer's tokens were cut over the mesh dims {sorted(before)} before, and over "
                f"{sorted(now)} in this call {tuple(shard.shape)}. Give every rank a batch of its "
                "own in each call."
            )

    def whole(self) -> Tensor | None:
        """The whole sum, ``[channels]``, on every rank. Collective. None if there is none."""
        if self._restored is not None:
            return self._restored.clone()
        if self._own is None or self._shard is None:
            return None
        total = self._shard.summed(self._own, self._over)
        return self._shard.gathered(total, 0, -1).clone()

    def restore(self, whole: Tensor | None) -> None:
        """Go on from a whole sum, here or spread over other numbers of ranks."""
        self._own, self._shard = None, None
        self._restored = whole.detach().clone().float() if whole is not None else None

    def _part_of(
        self, whole: Tensor, term: Tensor, shard: LocalShard, over: Collection[int]
    ) -> Tensor:
        part = shard.take(whole.to(term.device), 0, -1)
        if part.shape != term.shape:
            raise ImportanceError(
                f"A state of {whole.numel()} entries was restored, but this layer has "
                f"{term.numel()} on this rank. It is another layer's, or another model's."
            )
        return part.clone() if shard.leads(over) else torch.zeros_like(term)

    # -- as it lies on this rank -------------------------------------------------------------

    def local_state(self) -> tuple[dict[str, Tensor], str]:
        """This rank's own terms and where they belong, for a file. Moves nothing."""
        tensors = {"own": self._own, "restored": self._restored}
        facts = {"over": self._over, "shard": self._shard.facts() if self._shard else None}
        return {name: t for name, t in tensors.items() if t is not None}, json.dumps(facts)

    def load_local_state(
        self, tensors: Mapping[str, Tensor], facts: str, mesh: ParallelMesh
    ) -> None:
        """Take up what `local_state` gave on the same rank of a job that runs on as many."""
        told: dict[str, Any] = json.loads(facts)
        self._own, self._restored = tensors.get("own"), tensors.get("restored")
        self._over = tuple(told["over"])
        self._shard = LocalShard.from_facts(told["shard"], mesh) if told["shard"] else None
