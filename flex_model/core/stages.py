"""Which pipeline stage holds which module, under the names that the whole model has."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from flex_model.distributed.mesh import ParallelMesh
from flex_model.errors import RegistrationError
from flex_model.layouts.names import named_modules, named_parameters

__all__ = ["Stages"]


class Stages:
    """The names of every stage's modules and parameters; of the one stage where there is no other.

    Constructing it is collective.

    Args:
        root: this rank's part of the model.
        mesh: the job's ranks, `watched`.
    """

    def __init__(self, root: nn.Module, mesh: ParallelMesh) -> None:
        self.own = mesh.coordinate("pp")
        modules = [name for name, _ in named_modules(root)]
        parameters = [name for name, _ in named_parameters(root)]
        self._modules, self._parameters = [modules], [parameters]
        if mesh.watch is not None and mesh.assembly is not None and mesh.size("pp") > 1:
            board, stages = mesh.watch.board, range(mesh.size("pp"))
            board.describe(f"modules of stage {self.own}", modules)
            board.describe(f"parameters of stage {self.own}", parameters)
            mesh.assembly.exchange([0])  # every rank has posted
            self._modules = [board.description(f"modules of stage {i}") for i in stages]
            self._parameters = [board.description(f"parameters of stage {i}") for i in stages]

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
        holding = self.holding(name)
        inside = [set(_below(name, self._modules[stage])) for stage in holding]
        if any(names != inside[0] for names in inside[1:]):
            raise RegistrationError(
                f"Module {name or '(the model itself)'} is cut between pipeline stages {holding}: "
                "none of them has its input and output. Hook a module inside it that one stage "
                "holds whole."
            )

    def records(self, name: str) -> bool:
        """Whether this stage records what passes a module, or parameter: the first that has it."""
        if len(self._modules) == 1:
            return True
        holding = self.holding(name) or self.holding(name, parameter=True)
        return self.own in holding[:1]


def _below(name: str, names: Iterable[str]) -> list[str]:
    prefix = f"{name}." if name else ""
    return [other for other in names if other.startswith(prefix)]
