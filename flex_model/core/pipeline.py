"""One step of a pipeline: its microbatches on this stage, and what stages hand each other.

A schedule calls each stage's part of the model once per microbatch, in the same order on every
stage, whenever its turn comes. So nothing that all stages would have to join happens inside a
call. What editing functions store travels down the line beside the activations; records and the
gradients of trainable modules are brought together when the step ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map_only

from flex_model.core.caller import Caller, caller
from flex_model.core.records import Records
from flex_model.core.step_gradients import StepGradients
from flex_model.core.stored import Stored, StoredNamespace
from flex_model.core.stored_in_step import StoredInStep
from flex_model.distributed.line import Line
from flex_model.errors import ConfigurationError

__all__ = ["Pipeline"]


class Pipeline:
    """A pipeline stage's steps.

    Args:
        line: this rank's counterparts on the other stages.
        records: where captured tensors go.
        save_ctx: the users' namespace.
        modules: the trainable modules.
    """

    def __init__(
        self, line: Line, records: Records, save_ctx: StoredNamespace, modules: nn.ModuleDict
    ) -> None:
        self.line = line
        self._records = records
        self._stored = StoredInStep(line, Stored(save_ctx))
        self._gradients = StepGradients(line, modules)
        self._in_step = False
        self._passes_on = False

    @contextmanager
    def step(self, passes_on: bool) -> Iterator[None]:
        """One run of a schedule, forward and backward.

        Args:
            passes_on: whether editing functions run, which may store values for later stages; the
                same on every stage.

        Raises:
            ConfigurationError: a step inside a step.
            EditError: a stored value cannot pass between stages.
        """
        if self._in_step:
            raise ConfigurationError("A step of a pipeline is under way already.")
        self._gradients.set_aside()
        self._in_step, self._passes_on = True, passes_on
        self._stored.begin()
        try:
            yield
            self._deliver_records()
            if passes_on:
                self._stored.share()
            self._gradients.add_up()
        except BaseException:
            self._gradients.put_back()
            self.line.give_up()
            raise
        finally:
            self._in_step = False
            self._records.pending = []
            self._stored.end()

    def begin_microbatch(self, root: nn.Module) -> bool:
        """Take over what earlier stages stored in this microbatch.

        Args:
            root: the wrapped model.

        Returns:
            Whether it is one; else torch only finds out shapes.

        Raises:
            ConfigurationError: a forward outside of a step, or one that torch makes wrongly.
            EditError: two stages build on what the other has not yet stored.
        """
        calling = caller()
        self._check(root, calling)
        if calling is not None and calling.dry:
            return False
        if calling is not None:
            self._gradients.note_scale(calling.module, calling.divisor)
        if self._passes_on:
            self._stored.begin_microbatch()
        return True

    def end_microbatch(self, output: Any) -> Any:
        """Hand on what this stage and those before it stored in this microbatch.

        Args:
            output: what the stage returns. What is to be returned in its place comes back.
        """
        # Megatron frees what a stage has sent, which torch allows of no view.
        output = tree_map_only(Tensor, lambda t: t if t._base is None else t.clone(), output)
        if self._passes_on:
            number = self._stored.end_microbatch()
            sent = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            for tensor in sent:
                if tensor.requires_grad:
                    tensor.register_hook(partial(self._begin_backward, number))
        return output

    def _begin_backward(self, microbatch: int, gradient: Tensor) -> None:
        if self._in_step:
            self._stored.begin_backward(microbatch)

    def _check(self, root: nn.Module, calling: Caller | None) -> None:
        if not self._in_step:
            raise ConfigurationError(
                "A pipeline's stage runs inside `with model.step():`, around the schedule's step: "
                "records and stored values are brought together at its end."
            )
        if calling is None:
            return
        if isinstance(root, DistributedDataParallel) and calling.module is not root:
            raise ConfigurationError(
                f"PipelineStage {calling.index} was given a {type(calling.module).__name__} around "
                "a DistributedDataParallel. It then does not know that it must hold back the "
                "reduction until the last microbatch, and gradients come out wrong. Give it the "
                "DistributedDataParallel module itself: hooks are on the modules, and run as well."
            )
        line = self.line
        if calling.index % line.stages != line.stage:
            raise ConfigurationError(
                f"Stage {calling.index} of the schedule is on rank {line.stage} of the pipeline's "
                f"{line.stages}. What stages store passes from rank to rank in their order: use a "
                "schedule that goes round them so (as the interleaved ones do, with a FlexModel "
                "for each of a rank's stages)."
            )

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
        keep: Any = self._records.keep
        return keep == "all" or (self.line.has(keep) and self.line.stage_of(keep) == stage)
