"""Gradients of trainable modules over the stages of a pipeline, which may each use any of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from flex_model.distributed.line import Line
from flex_model.errors import ConfigurationError, EditError

__all__ = ["StepGradients"]


class StepGradients:
    """A step's own gradients: apart from what there was before, then summed over the stages.

    Args:
        line: this rank's counterparts on the other stages.
        modules: the trainable modules.
    """

    _in_a_step: ClassVar[set[int]] = set()

    def __init__(self, line: Line, modules: nn.ModuleDict) -> None:
        self._line = line
        self._modules = modules
        self._parameters: list[nn.Parameter] = []
        self._before: list[Tensor | None] = []
        self._buffers: dict[str, Tensor] = {}
        self._divisor = 1

    def set_aside(self) -> None:
        """Begin a step without any.

        Raises:
            ConfigurationError: a module is in another FlexModel's step: torch would scale its
                gradients twice, and they would be summed twice.
        """
        for name, parameter in self._modules.named_parameters():
            if id(parameter) in self._in_a_step:
                raise ConfigurationError(
                    f"Trainable module {name.partition('.')[0]!r} takes part in a step of another "
                    "FlexModel already. Give each stage of a rank trainable modules of its own."
                )
        self._parameters = list(self._modules.parameters())
        self._in_a_step.update(map(id, self._parameters))
        # By their values: torch counts no new version of running statistics.
        self._buffers = {n: b.detach().clone() for n, b in self._modules.named_buffers()}
        self._before = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        self._divisor = 1

    def note_scale(self, called: nn.Module, divisor: int) -> None:
        """Trainable modules are scaled as the model is, be they in what torch scales or not.

        Args:
            called: whose parameters' gradients a schedule divides at its end.
            divisor: by what.
        """
        if divisor != 1 and self._parameters:
            scaled = {id(parameter) for parameter in called.parameters()}
            self._divisor = 1 if id(self._parameters[0]) in scaled else divisor

    def add_up(self) -> None:
        """Each is the sum over the stages whose edits used it, on every stage.

        Raises:
            EditError: alike on every stage, if two of them changed the same buffer.
        """
        if self._parameters or self._buffers:
            told = self._line.exchange([self._own(), self._changed_buffers()], "gradients")
            for number, parameter in enumerate(self._parameters):
                parameter.grad = None
                for gradients, _ in told:
                    _add(parameter, gradients[number])
            self._take_buffers([buffers for _, buffers in told])
        self._end()

    def put_back(self) -> None:
        """Leave those of before: the step has failed."""
        for parameter in self._parameters:
            parameter.grad = None
        self._end()

    def _end(self) -> None:
        for parameter, before in zip(self._parameters, self._before, strict=True):
            found, parameter.grad = parameter.grad, before
            _add(parameter, found)
            self._in_a_step.discard(id(parameter))
        self._parameters, self._before, self._buffers = [], [], {}

    def _own(self) -> list[Tensor | None]:
        own = (parameter.grad for parameter in self._parameters)
        return [None if grad is None else (grad / self._divisor).cpu() for grad in own]

    def _changed_buffers(self) -> dict[str, Tensor]:
        """Those that edits on this stage changed: statistics that a module keeps."""
        return {
            name: buffer.cpu()
            for name, buffer in self._modules.named_buffers()
            if name not in self._buffers or not torch.equal(buffer, self._buffers[name])
        }

    def _take_buffers(self, told: Sequence[dict[str, Tensor]]) -> None:
        buffers = dict(self._modules.named_buffers())
        for name in dict.fromkeys(name for changed in told for name in changed):
            stages = [stage for stage, changed in enumerate(told) if name in changed]
            if len(stages) > 1:
                raise EditError(
                    f"Buffer {name} of the trainable modules was changed on pipeline stages "
                    f"{stages}: each began from its own. Use the module on one stage, or one that "
                    "keeps no statistics."
                )
            if name in buffers and stages != [self._line.stage]:
                buffers[name].copy_(told[stages[0]][name])


def _add(parameter: nn.Parameter, term: Tensor | None) -> None:
    """Accumulate as autograd does."""
    if term is None:
        return
    term = term.to(parameter.device)
    if parameter.grad is None:
        parameter.grad = term
    else:
        with torch.no_grad():
            parameter.grad += term
