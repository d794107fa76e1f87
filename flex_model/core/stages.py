"""Which pipeline stage holds which module, under the names that the whole model has."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from flex_model.distributed.line import Line
from flex_model.distributed.mesh import ParallelMesh
from flex_model.errors import RegistrationError
from flex_model.layouts.names import named_modules, named_parameters, plain_name

__all__ = ["Stages"]

_DIGESTED = 4096


class Stages:
    """The names of every stage's modules and parameters; of the one stage where there is no other.

    Constructing it is collective.

    Args:
        root: this rank's part of the model.
        mesh: the job's ranks, `watched`.
    """

    def __init__(self, root: nn.Module, mesh: ParallelMesh) -> None:
        self.own = mesh.coordinate("pp")
        self._root = root
        self._alike: set[str] = set()
        self._of_all: list[list[list[str]]] = []
        if mesh.watch is not None and mesh.assembly is not None and mesh.size("pp") > 1:
            board, stages = mesh.watch.board, range(mesh.size("pp"))
            kinds = ("modules", "parameters")
            for kind, names in zip(kinds, self._own_names(), strict=True):
                board.describe(f"{kind} of stage {self.own}", names)
                board.description(f"{kind} of stage {self.own}")  # the store has it
            mesh.assembly.exchange([0])  # every rank has posted
            self._of_all = [
                [board.description(f"{kind} of stage {stage}") for stage in stages]
                for kind in kinds
            ]

    @property
    def _modules(self) -> list[list[str]]:
        return self._of_all[0] if self._of_all else [self._own_names()[0]]

    @property
    def _parameters(self) -> list[list[str]]:
        return self._of_all[1] if self._of_all else [self._own_names()[1]]

    def _own_names(self) -> tuple[list[str], list[str]]:
        """As they are now: a model may get more modules after it was wrapped."""
        modules = [name for name, _ in named_modules(self._root)]
        return modules, [name for name, _ in named_parameters(self._root)]

    def names(self, *, parameters: bool = False) -> list[str]:
        """Every name once, the first stage's first."""
        stages = self._parameters if parameters else self._modules
        return list(dict.fromkeys(name for names in stages for name in names))

    def holding(self, name: str, *, parameter: bool = False) -> list[int]:
        """The stages that have a module (or parameter) of this name."""
        stages = self._parameters if parameter else self._modules
        return [stage for stage, names in enumerate(stages) if name in names]

    def check_whole(self, name: str) -> None:
        """Refuse a module that is cut between stages: none of them has its value.

        Raises:
            RegistrationError: naming the stages.
        """
        if self._is_cut(name):
            raise RegistrationError(
                f"Module {name or '(the model itself)'} is cut between pipeline stages "
                f"{self.holding(name)}: "
                "none of them has its input and output. Hook a module inside it that one stage "
                "holds whole."
            )

    def check_alike(self, names: Iterable[str], line: Line) -> None:
        """Refuse names that mean another module on each stage, as `nn.ModuleList` makes them.

        It counts what is left in it from zero anew. A module that is on several stages by right has
        the same parameters there. Collective along the line.

        Raises:
            RegistrationError: alike on every stage.
        """
        shared = [n for name in names for n in self._shared(plain_name(name))]
        new = [name for name in dict.fromkeys(shared) if name not in self._alike]
        if not new:
            return
        told = line.exchange({name: self._digest(name) for name in new}, "digests of parameters")
        for name in new:
            holding = self._having(name)
            if any(told[stage][name] != told[holding[0]][name] for stage in holding):
                raise RegistrationError(
                    f"{name} has other parameters on each of the pipeline stages {holding}, so one "
                    "name stands for several modules. Give each the name that it has in the whole "
                    "model: hold the layers of a stage in an nn.ModuleDict with the numbers of the "
                    "whole model as keys, for an nn.ModuleList counts from zero on every stage."
                )
        self._alike.update(new)

    def _shared(self, name: str) -> list[str]:
        """Of a name and those around it the ones that several stages have, and none in part."""
        around = [name.rsplit(".", parts)[0] for parts in range(name.count(".") + 1)]
        return [n for n in around if len(self._having(n)) > 1 and not self._is_cut(n)]

    def _having(self, name: str) -> list[int]:
        return self.holding(name) or self.holding(name, parameter=True)

    def _is_cut(self, name: str) -> bool:
        below = [set(_below(name, self._modules[stage])) for stage in self.holding(name)]
        return any(names != below[0] for names in below[1:])

    def _digest(self, name: str) -> list[list[Any]]:
        """Name, shape and a digest of some values of each parameter of a module (or of one)."""
        below = f"{name}." if name else ""
        return [
            [own, list(parameter.shape), _digest_of(parameter)]
            for own, parameter in named_parameters(self._root)
            if own == name or own.startswith(below)
        ]

    def records(self, name: str) -> bool:
        """Whether this stage records what passes a module, or parameter: the first that has it."""
        if not self._of_all:
            return True
        return self.own in self._having(name)[:1]


def _below(name: str, names: Iterable[str]) -> list[str]:
    prefix = f"{name}." if name else ""
    return [other for other in names if other.startswith(prefix)]


def _digest_of(parameter: Tensor) -> int:
    """Of values spread over this rank's part, enough to tell one parameter from another."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if local.is_meta:
        return 0
    flat = local.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // _DIGESTED)].cpu().contiguous()
    return zlib.crc32(some.view(torch.uint8).numpy().tobytes())
