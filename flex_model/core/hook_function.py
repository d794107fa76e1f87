"""What a user asks for at one hook point."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature

from torch import Tensor, nn
from torch.distributed.tensor.placement_types import Placement

from flex_model.core.arguments import checked_placements, whole_sizes
from flex_model.core.needs import WHOLE, Needs, needs_of

__all__ = ["Edit", "EditingFunction", "HookFunction"]

EditingFunction = Callable[[nn.Module, Tensor, Namespace, nn.ModuleDict], Tensor]


@dataclass(frozen=True)
class Edit:
    """An editing function and what it declares, read once.

    Attributes:
        function: the function itself.
        needs: how much of the tensor it needs.
        takes_shard: whether it asks, by a keyword ``shard``, which part of the whole it is given.
    """

    function: EditingFunction
    needs: Needs
    takes_shard: bool

    @classmethod
    def of(cls, function: EditingFunction) -> Edit:
        """Read a function's declarations and signature."""
        try:
            takes_shard = "shard" in signature(function).parameters
        except (TypeError, ValueError):  # built in C, or no function: refused when registered
            takes_shard = False
        return cls(function, needs_of(function), takes_shard)

    @property
    def name(self) -> str:
        """The function's name, for messages and statistics."""
        return getattr(self.function, "__name__", None) or repr(self.function)


class HookFunction:
    """Retrieves, and optionally edits, one activation of the wrapped model.

    The editing function gets the **whole** tensor, in the order one process would have it, on
    every rank: tensor-parallel shards and data-parallel batches are gathered first and cut again
    afterwards. It runs on every rank alike, so whatever it computes, trains or draws at random is
    the same everywhere.

    Args:
        module_name: path of the module to hook, as ``named_modules()`` spells it; of the parameter
            for `FlexModel.register_hook`.
        expected_shape: whole-tensor sizes, None where they are to be filled in. Not needed where
            the layout is found; checked where it is.
        editing_function: ``f(current_module, inputs, save_ctx, modules) -> Tensor``. ``inputs`` is
            the whole tensor (may be changed in place); the result must have its shape, dtype and
            device. None retrieves only: nothing of the forward or backward changes.
        unpack_idx: which tensor of the module's output (or input, or gradients), counting tensors
            only, over args then kwargs for pre-hooks.
        record: keyword only. Whether the activation (before any edit) is recorded. None records it
            unless the editing function declared (`flex_model.elementwise` and its kin) that it
            needs no whole tensor: then nothing at all is moved.
        part: keyword only. Of a fused projection the part to visit alone: "q", "k", "v", "gate" or
            "up". It is handed out as if it were a projection of its own.
        head: keyword only. Of a projection (or its part) the one attention head to visit alone.
        placements: keyword only. Placement by mesh dim ("tp", "dp"), overruling what is found.
        gradients: keyword only. Placement of the gradient by mesh dim, for a value that is
            replicated but whose gradient is not (``Partial()``), or the other way round.

    Raises:
        HintError: ``expected_shape``, ``placements`` or ``gradients`` hold something else.

    A loss built on a whole tensor (stored in ``save_ctx``, say) must be computed on every rank:
    each rank's gradient is its own slice of the whole one.

    Examples:
        >>> def edit(current_module, inputs, save_ctx, modules):
        ...     save_ctx.norm = inputs.norm(dim=-1)
        ...     return modules["probe"](inputs)
        >>> hook = HookFunction("model.layers.3.mlp.up_proj", editing_function=edit)
    """

    def __init__(
        self,
        module_name: str,
        expected_shape: Sequence[int | None] | None = None,
        editing_function: EditingFunction | None = None,
        unpack_idx: int = 0,
        *,
        record: bool | None = None,
        part: str | None = None,
        head: int | None = None,
        placements: Mapping[str, Placement] | None = None,
        gradients: Mapping[str, Placement] | None = None,
    ) -> None:
        self.module_name = module_name
        self.expected_shape = (
            whole_sizes(expected_shape, module_name) if expected_shape is not None else None
        )
        self.editing_function = editing_function
        self.unpack_idx = unpack_idx
        self.record = record
        self.part = part
        self.head = head
        self.placements = checked_placements(placements or {}, "placements", module_name)
        self.gradients = checked_placements(gradients or {}, "gradients", module_name)

    @property
    def editing_function(self) -> EditingFunction | None:
        """The function given."""
        return self._function.function if self._function is not None else None

    @editing_function.setter
    def editing_function(self, function: EditingFunction | None) -> None:
        self._function = Edit.of(function) if function is not None else None

    @property
    def statistic(self) -> Edit | None:
        """The function, if it returns a statistic, recorded in the activation's place."""
        function = self._function
        return function if function is not None and function.needs.combine else None

    @property
    def edit(self) -> Edit | None:
        """The function, if its result takes the activation's place."""
        function = self._function
        changes = function is not None and not (function.needs.combine or function.needs.observes)
        return function if changes else None

    @property
    def observer(self) -> Edit | None:
        """The function, if it only looks."""
        function = self._function
        return function if function is not None and function.needs.observes else None

    @property
    def recorded(self) -> bool:
        """Whether the activation itself is recorded."""
        if self.record is not None or self._function is None:
            return self.record is not False
        return self._function.needs == WHOLE

    @property
    def name(self) -> str:
        """The editing function's name, for messages and statistics."""
        return self._function.name if self._function is not None else "None"

    def record_key(self, activations: str) -> str:
        """Where its records go: statistics beside the activations, under their own names."""
        return f"{activations}:{self.name}" if self.statistic is not None else activations

    def __repr__(self) -> str:
        return f"HookFunction({self.module_name!r}, editing_function={self.name})"
