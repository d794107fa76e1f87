"""One step of a pipeline: its microbatches on this stage, and what stages hand each other.

A schedule calls each stage's part of the model once per microbatch, in the same order on every
stage, whenever its turn comes. So nothing that all stages would have to join happens inside a
call. What editing functions store travels down the line beside the activations; records and the
gradients of trainable modules are brought together when the step ends.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from flex_model.core.records import Records
from flex_model.distributed.line import Line
from flex_model.errors import ConfigurationError

__all__ = ["Pipeline", "is_dry_call"]

_DEPTH = 40
_DRY = tuple(
    getattr(PipelineStage, name).__code__
    for name in ("_forward_metadata_inference", "_backward_metadata_inference")
    if hasattr(PipelineStage, name)
)


def is_dry_call() -> bool:
    """Whether torch's pipeline stage only finds out what shapes it will send.

    Its inputs then are made up (stage 0's are the first microbatch's, once more), so that only the
    caller tells.
    """
    frame = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame.f_code in _DRY:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


class Pipeline:
    """A pipeline stage's steps.

    Args:
        line: this rank's counterparts on the other stages.
        records: where captured tensors go.
        save_ctx: the users' namespace.
        modules: the trainable modules.
    """

    def __init__(
        self, line: Line, records: Records, save_ctx: Namespace, modules: nn.ModuleDict
    ) -> None:
        self.line = line
        self._records = records
        self._save_ctx = save_ctx
        self._modules = modules
        self._in_step = False
        self._passes_on = False
        self._before: dict[str, int] = {}
        self._received: set[str] = set()

    @contextmanager
    def step(self, passes_on: bool) -> Iterator[None]:
        """One run of a schedule, forward and backward.

        Args:
            passes_on: whether editing functions run, which may store values for later stages.

        Raises:
            ConfigurationError: a step inside a step.
        """
        if self._in_step:
            raise ConfigurationError("A step of a pipeline is under way already.")
        self._in_step, self._passes_on = True, passes_on
        gradients = self._set_gradients_aside()
        try:
            yield
        except BaseException:
            self._records.pending = []
            raise
        finally:
            self._in_step = False
        self.line.finish()
        self._deliver_records()
        if passes_on:
            self._share_namespace()
        self._add_gradients(gradients)

    def begin_microbatch(self) -> None:
        """Take over what earlier stages stored in this microbatch.

        Raises:
            ConfigurationError: a forward outside of a step.
        """
        if not self._in_step:
            raise ConfigurationError(
                "A pipeline's stage runs inside `with model.step():`, around the schedule's step: "
                "records and stored values are brought together at its end."
            )
        self._received.clear()
        if self._passes_on and self.line.stage > 0:
            values = self.line.receive(self.line.stage - 1, "save_ctx")
            self._received.update(values)
            vars(self._save_ctx).update(values)
        self._before = {name: id(value) for name, value in vars(self._save_ctx).items()}

    def end_microbatch(self) -> None:
        """Hand on what this stage and those before it stored in this microbatch."""
        if self._passes_on and self.line.stage < self.line.stages - 1:
            self.line.send(self.line.stage + 1, self._stored())

    def _stored(self) -> dict[str, Any]:
        """What is new since the microbatch began; of lists and dicts that cannot be told."""
        return {
            name: _detached(value)
            for name, value in vars(self._save_ctx).items()
            if name in self._received
            or self._before.get(name) != id(value)
            or isinstance(value, (list, dict))
        }

    # -- the end of a step -----------------------------------------------------------------

    def _deliver_records(self) -> None:
        """Bring what this stage captured to where records are kept."""
        pending, self._records.pending = self._records.pending, []
        keepers = [stage for stage in range(self.line.stages) if self._keeps(stage)]
        for stage in keepers:
            if stage != self.line.stage:
                self.line.send(stage, pending)
        for stage in range(self.line.stages) if self.line.stage in keepers else ():
            own = stage == self.line.stage
            for key, whole in (pending or ()) if own else self.line.receive(stage, "records"):
                self._records.append(key, whole)
        self.line.finish()

    def _keeps(self, stage: int) -> bool:
        keep = self._records.keep
        return keep == "all" or (self.line.has(keep) and self.line.stage_of(keep) == stage)

    def _share_namespace(self) -> None:
        """The last stage has been handed what all stored: everybody gets it."""
        last = self.line.stages - 1
        if self.line.stage < last:
            vars(self._save_ctx).update(self.line.receive(last, "save_ctx"))
        else:
            stored = {name: _detached(value) for name, value in vars(self._save_ctx).items()}
            for stage in self.line.others:
                self.line.send(stage, stored)
        self.line.finish()

    def _set_gradients_aside(self) -> list[Tensor | None]:
        """What trainable modules had accumulated before: the step's own are to be added up."""
        parameters = list(self._modules.parameters())
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        return before

    def _add_gradients(self, before: list[Tensor | None]) -> None:
        """A module's gradient is the sum over the stages whose edits used it, on every stage."""
        parameters = list(self._modules.parameters())
        own = [parameter.grad for parameter in parameters]
        for stage in self.line.others if parameters else ():
            self.line.send(stage, [g.cpu() if g is not None else None for g in own])
        found: list[Tensor | None] = [None] * len(own)
        for stage in range(self.line.stages) if parameters else ():
            theirs = own if stage == self.line.stage else self.line.receive(stage, "gradients")
            found = [_sum(total, term) for total, term in zip(found, theirs, strict=True)]
        for parameter, total, earlier in zip(parameters, found, before, strict=False):
            parameter.grad = _sum(earlier, total)
        self.line.finish()


def _sum(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    if total is None or term is None:
        return term if total is None else total
    return total + term.to(total.device)


def _detached(value: Any) -> Any:
    """Values pass between stages, autograd graphs do not."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), value)
