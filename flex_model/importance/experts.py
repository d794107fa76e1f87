"""Experts by the size of what they add to the tokens that chose them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from flex_model.core.hook_function import HookFunction
from flex_model.core.hook_point import Kind
from flex_model.core.local_shard import LocalShard
from flex_model.core.needs import observes
from flex_model.core.randomness import in_backward
from flex_model.core.unpacking import tensors_in
from flex_model.distributed.collectives import all_reduce_sum
from flex_model.distributed.communicator import Communicator
from flex_model.errors import ImportanceError
from flex_model.importance.activation import Activation
from flex_model.importance.checks import collected, keys_of, vector
from flex_model.importance.hook import ForwardHook
from flex_model.importance.layer import plain_shard, weight_of
from flex_model.importance.sharded_sum import ShardedSum
from flex_model.layouts.layout import is_sharded, shard_dim
from flex_model.layouts.sources import Side

__all__ = ["ExpertHook", "FusedExpertsHook"]

_KEY = "sum_of_norms"
_LAST = 2  # of the three tensors that fused experts are given


class _NormsHook(ForwardHook):
    """Experts by ``sum over tokens routed to them of ||output||`` (Minitron's score)."""

    experts = 1

    def __init__(self) -> None:
        super().__init__()
        self._norms = ShardedSum()

    @property
    def sums(self) -> Mapping[str, ShardedSum]:
        return {_KEY: self._norms}

    @property
    def made_with(self) -> dict[str, Any]:
        return {**super().made_with, "experts": self.experts}

    def accumulate(self) -> Tensor:
        """``[experts]``, float32."""
        return collected(self._norms.whole(), type(self).__name__)

    def to_dict(self) -> dict[str, Tensor]:
        """``score``: `accumulate`'s."""
        return {"score": self.accumulate()}

    def state_dict(self) -> dict[str, Tensor | None]:
        """``sum_of_norms``: ``[experts]``, None before the first call."""
        return {_KEY: self._norms.whole()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `state_dict`."""
        keys_of(state_dict, [_KEY], type(self).__name__)
        norms = state_dict[_KEY]
        if norms is not None:
            norms = vector(norms, self.experts, _KEY, type(self).__name__)
        self._norms.restore(norms)


class ExpertHook(_NormsHook):
    """One expert that is a module of its own: ``sum over its tokens of ||output||``, ``[1]``.

    A plain forward hook, as on each of Megatron's ``local_experts``, whose outputs are weighted by
    the router. Under expert parallelism an expert lies whole on one rank, where all its tokens
    come, so the sum is already whole there; an idle expert's is zero.
    """

    watches: ClassVar[tuple[Side, ...]] = ("output",)

    def see(
        self, module: nn.Module, inputs: Activation | None, outputs: Activation | None, raw: object
    ) -> None:
        assert outputs is not None
        if outputs.mask is not None:
            raise ImportanceError(
                f"{type(self).__name__} on {self.name or type(module).__name__}: of the tokens "
                "routed to an expert nobody tells which are padding. Give batches without."
            )
        norms = torch.linalg.vector_norm(outputs.values.float(), 2, -1)
        self._norms.add(self.noted(norms.sum().view(1)), outputs.shard, outputs.leading)


class FusedExpertsHook(_NormsHook):
    """All experts of a transformers layer, whose weights are three-dimensional parameters.

    On the module ``experts`` that is called with ``(hidden_states, top_k_index, top_k_weights)``.
    What an expert adds is seen by nobody outside, so it is computed once more: a call costs one
    forward of the experts. Where tensor-parallel ranks hold parts of every expert, their outputs
    are added up, ``[tokens routed, hidden]`` per expert.

    Args:
        experts: has ``gate_up_proj`` ``[experts, 2 * inner, hidden]``, ``down_proj`` ``[experts,
            hidden, inner]`` and ``act_fn``.

    Raises:
        ImportanceError: another module, or experts that are shared out over ranks.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        down = getattr(experts, "down_proj", None)
        if not isinstance(down, Tensor) or down.ndim != 3 or not hasattr(experts, "gate_up_proj"):
            raise ImportanceError(
                f"{type(experts).__name__} holds no fused experts: it lacks gate_up_proj and "
                "down_proj of three dims. Where experts are modules, give each an ExpertHook."
            )
        self.experts = down.shape[0]
        self._module = experts
        self._given: dict[int, tuple[Tensor, LocalShard]] = {}

    def see(
        self, module: nn.Module, inputs: Activation | None, outputs: Activation | None, raw: object
    ) -> None:
        """Not called: the experts are given three tensors."""
        raise NotImplementedError

    def __call__(self, module: nn.Module, args: Any, *rest: Any) -> None:
        """See `ForwardHook.__call__`."""
        if in_backward():
            return
        given = list(tensors_in((args, rest[0] if len(rest) > 1 else {})))
        self._check_given(given)
        with torch.no_grad(), torch.autocast(given[0].device.type, enabled=False):
            shard = plain_shard(module, "input", given[0])
            self._add(given[0], given[1], given[2], shard)

    def hook_functions(self, module_name: str) -> list[tuple[Kind, HookFunction]]:
        """One for each of the three tensors; the last one finds the others."""
        self.take_name(module_name)

        def looking(index: int) -> Any:
            def see_one(
                current_module: nn.Module, inputs: Tensor, save_ctx: Any, modules: Any, *,
                shard: LocalShard,
            ) -> None:  # fmt: skip
                self._given[index] = (inputs, shard)
                if index == _LAST:
                    given = [self._given[at] for at in range(_LAST + 1)]
                    hidden, chosen, weights = (tensor for tensor, _ in given)
                    self._given = {}
                    with torch.autocast(inputs.device.type, enabled=False):
                        self._add(hidden, chosen, weights, given[0][1])

            return observes(see_one)

        return [
            ("forward_pre", HookFunction(module_name, None, looking(index), index))
            for index in range(_LAST + 1)
        ]

    def _check_given(self, given: list[Tensor]) -> None:
        if len(given) != _LAST + 1 or given[1].shape != given[2].shape:
            shapes = [tuple(tensor.shape) for tensor in given]
            raise ImportanceError(
                f"{type(self).__name__}: the experts were given {shapes}, but (hidden_states, "
                "top_k_index, top_k_weights) are due. Hook the module that runs the experts."
            )

    def _add(self, hidden: Tensor, chosen: Tensor, weights: Tensor, shard: LocalShard) -> None:
        group = self._group_of_parts()
        gate_up, down = (
            weight_of(self._module, "gate_up_proj"),
            weight_of(self._module, "down_proj"),
        )
        keep = Activation(hidden, shard, self.mask, self.sequence_dim).keep.flatten()
        norms = hidden.new_zeros(self.experts, dtype=torch.float32)
        for expert in range(self.experts):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            gate, up = F.linear(hidden[token].float(), gate_up[expert].float()).chunk(2, -1)
            output = F.linear(self._module.act_fn(gate) * up, down[expert].float())  # type: ignore[operator]
            if group is not None:
                output = all_reduce_sum(output, group, in_place=True)
            sizes = torch.linalg.vector_norm(output, 2, -1)
            norms[expert] = sizes @ (weights[token, place].float().abs() * keep[token])
        self._norms.add(self.noted(norms), shard, tuple(range(hidden.ndim - 1)))

    def _group_of_parts(self) -> Communicator | None:
        """Ranks that hold parts of every expert's inner channels."""
        down = self._module.down_proj
        if not isinstance(down, DTensor):
            return None
        for axis, placement in enumerate(down.placements):
            if down.device_mesh.size(axis) == 1 or not is_sharded(placement):
                continue
            if shard_dim(placement) % 3 != 2:
                raise ImportanceError(
                    f"{type(self).__name__} on {self.name or type(self._module).__name__}: "
                    f"down_proj lies as {down.placements} over the ranks, so that experts are "
                    "shared out, and what one of them adds to other ranks' tokens is nowhere seen. "
                    "Score the model without expert parallelism."
                )
            group: ProcessGroup = down.device_mesh.get_group(axis)
            return Communicator(group)
        return None
