"""The one question every framework's file answers, and the frameworks asked.

A source tells how a module's tensors lie over the *tensor-parallel* ranks, from the module's own
fields, or nothing. It never imports its framework: a model can only hold that framework's layers if
someone imported it already.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, Protocol

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor.placement_types import Placement

__all__ = ["Dispatch", "Side", "Site", "Source", "Told", "loaded", "spread"]

Side = Literal["input", "output"]


@dataclass(frozen=True)
class Site:
    """One tensor at a module's boundary.

    Attributes:
        root: the wrapped model.
        name: module path below ``root``.
        module: the module itself.
        side: its inputs or its outputs.
        index: position among the tensors of that side.
        ndim: dims of the tensor.
    """

    root: nn.Module
    name: str
    module: nn.Module
    side: Side
    index: int
    ndim: int


@dataclass(frozen=True)
class Told:
    """Placement of a value and of its gradient (None: not told) over the tensor-parallel ranks."""

    value: Placement
    gradient: Placement | None


@dataclass(frozen=True)
class Dispatch:
    """A place where tokens are sent to the ranks of the experts that they chose, and taken back.

    Attributes:
        boundary: path of the module around it: its first output lies as its first input does.
        experts: path of the module that runs the experts: the boundary, or a module inside.
        ranks: how many ranks the experts are shared out over.
        numbered_anew: whether every rank counts its experts from zero, so that the same path names
            another expert on each.
        instead: what can be hooked in place of a module inside.
    """

    boundary: str
    experts: str
    ranks: int
    numbered_anew: bool
    instead: str

    def inside(self, name: str) -> bool:
        """Whether a module (or parameter) lies between sending and taking back."""
        return name != self.boundary and f"{name}.".startswith(f"{self.experts}.")


class Source(Protocol):
    """What a framework's file offers."""

    def groups(self, root: nn.Module) -> Mapping[str, ProcessGroup]:
        """Process groups the framework spread this model over, by mesh dim."""

    def tell(self, site: Site) -> Told | None:
        """How a boundary tensor lies, where the framework says so."""

    def parameter(self, root: nn.Module, name: str, tensor: Tensor) -> Placement | None:
        """How a parameter lies over the tensor-parallel ranks, where the framework says so."""


def spread(groups: Mapping[str, ProcessGroup | None]) -> dict[str, ProcessGroup]:
    """The groups that there are several ranks in."""
    return {name: group for name, group in groups.items() if group is not None and group.size() > 1}


def loaded(name: str) -> ModuleType | None:
    """A framework module if the program has imported it."""
    return sys.modules.get(name)
