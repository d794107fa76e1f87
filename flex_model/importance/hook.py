"""The base of every importance hook: called by torch, or shown shards by FlexModel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from flex_model.core.hook_function import HookFunction
from flex_model.core.hook_point import Kind
from flex_model.core.local_shard import LocalShard
from flex_model.core.needs import observes
from flex_model.core.randomness import in_backward
from flex_model.core.unpacking import tensors_in
from flex_model.errors import ImportanceError
from flex_model.importance import files
from flex_model.importance.activation import Activation, PaddingMask
from flex_model.importance.layer import PlainCut, plain_cut, plain_shard
from flex_model.importance.sharded_sum import ShardedSum
from flex_model.layouts.sources import Side

__all__ = ["ForwardHook"]


class ForwardHook(ABC):
    """Scores the channels (or heads, experts, layers) of one layer while the model runs.

    It is a plain forward hook, ``layer.register_forward_hook(hook)``, which sees tensor-parallel
    shards as the layer tells them; and it runs under FlexModel, by `register_importance_hook`,
    where data, context and sequence parallelism are known as well. Either way each rank keeps
    statistics of its own channels and tokens. `accumulate`, `to_dict` and `state_dict` are
    collective: they gather one vector, and give every rank what one process has.

    Statistics are float32 whatever the model's dtype, keep no autograd graph, are taken once where
    activation checkpointing runs a forward twice, and leave padding out (see `padding`).

    Attributes:
        watches: the sides of the layer that the hook looks at.
        sequence_dim: the dim of the tokens of one sequence in ``[.., .., channels]``: 0 or 1.
        mask: of padding, for the forward that is under way.
        name: the module's, once it is known.
    """

    watches: ClassVar[tuple[Side, ...]] = ("input",)

    def __init__(self, sequence_dim: int = 1) -> None:
        if sequence_dim not in (0, 1):
            raise ImportanceError(f"sequence_dim must be 0 or 1, got {sequence_dim!r}.")
        self.sequence_dim = sequence_dim
        self.mask: PaddingMask | None = None
        self._noted: Tensor | None = None
        self.name = ""
        self._cuts: dict[tuple[nn.Module, Side, int, int], PlainCut] = {}
        self._input: Activation | None = None

    # -- what each kind of hook does -----------------------------------------------------------

    @abstractmethod
    def see(
        self, module: nn.Module, inputs: Activation | None, outputs: Activation | None, raw: object
    ) -> None:
        """Take one call's statistics.

        Args:
            module: the layer.
            inputs: what it was given, if the hook watches inputs.
            outputs: what it returned, if the hook watches outputs.
            raw: everything it returned, if that is at hand.
        """

    @abstractmethod
    def accumulate(self) -> Tensor:
        """The scores of the whole layer, on every rank alike. Collective.

        Raises:
            NothingCollectedError: there was no call yet, or not enough of them.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Tensor]:
        """The scores (``"score"``, higher means keep) and what they were made of. Collective."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """A copy of the whole state: the same on every rank, to be restored on any number of
        tensor-parallel ones. Collective.
        """

    @abstractmethod
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state. Nothing is changed if it does not fit.

        Raises:
            ImportanceError: keys are missing, or it is the state of another layer or hook.
        """

    def get_progress_info(self) -> dict[str, Any]:
        """How far the hook is, for hooks that end by themselves."""
        return {}

    @property
    def sums(self) -> Mapping[str, ShardedSum]:
        """The running sums that make up the state, by name."""
        return {}

    @property
    def made_with(self) -> dict[str, Any]:
        """What decides its scores beside the activations, in numbers and strings: two hooks that
        differ in it must not go on from each other's state.
        """
        return {"sequence_dim": self.sequence_dim}

    # -- as a plain forward hook ---------------------------------------------------------------

    def __call__(self, module: nn.Module, args: Any, *rest: Any) -> None:
        """A forward hook's ``(module, args, output)``, or ``(module, args, kwargs, output)``."""
        if in_backward():  # a forward that activation checkpointing runs again
            return
        kwargs, output = rest if len(rest) > 1 else ({}, rest[0])
        seen = {}
        if "input" in self.watches:
            first = args[0] if args and isinstance(args[0], Tensor) else (args, kwargs)
            seen["input"] = self._plain(module, "input", first)
        if "output" in self.watches:
            seen["output"] = self._plain(module, "output", output)
        with torch.no_grad(), _exact(_device(seen)):
            self.see(module, seen.get("input"), seen.get("output"), output)

    def _plain(self, module: nn.Module, side: Side, tree: Any) -> Activation:
        tensor = tree if isinstance(tree, Tensor) else next(iter(tensors_in(tree)), None)
        if tensor is None:
            raise ImportanceError(
                f"{type(self).__name__}: {type(module).__name__} has no tensor as its {side}. "
                "Where a layer is called by keywords alone, register the hook with_kwargs=True."
            )
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            shard = plain_shard(module, side, tensor, self._group())
            return Activation(tensor.to_local(), shard, self.mask, self.sequence_dim)
        known = (module, side, tensor.ndim, tensor.shape[-1])
        if known not in self._cuts:  # asking the frameworks takes longer than many a layer
            self._cuts[known] = plain_cut(module, side, tensor, self._group())
        return Activation(tensor, self._cuts[known].of(tensor), self.mask, self.sequence_dim)

    def _group(self) -> ProcessGroup | None:
        """Ranks over which channels are cut where the layer does not tell; None if they are not."""
        return None

    # -- under FlexModel -----------------------------------------------------------------------

    def hook_functions(self, module_name: str) -> list[tuple[Kind, HookFunction]]:
        """What FlexModel registers, kind by kind, to run this hook on a module."""
        self.take_name(module_name)
        last: Side = "output" if "output" in self.watches else "input"

        def see_input(
            current_module: nn.Module, inputs: Tensor, save_ctx: Any, modules: Any, *,
            shard: LocalShard,
        ) -> None:  # fmt: skip
            activation = Activation(inputs, shard, self.mask, self.sequence_dim)
            if last == "input":
                self.see(current_module, activation, None, None)
            else:
                self._input = activation

        def see_output(
            current_module: nn.Module, inputs: Tensor, save_ctx: Any, modules: Any, *,
            shard: LocalShard,
        ) -> None:  # fmt: skip
            activation = Activation(inputs, shard, self.mask, self.sequence_dim)
            given, self._input = self._input, None
            self.see(current_module, given, activation, None)

        kinds: dict[Side, tuple[Kind, Any]] = {
            "input": ("forward_pre", see_input),
            "output": ("forward", see_output),
        }
        found = []
        for side in self.watches:
            kind, function = kinds[side]
            hook = HookFunction(module_name, editing_function=observes(_exactly(function)))
            found.append((kind, hook))
        return found

    def take_name(self, module_name: str) -> None:
        """Belong to a module: what two of them do must not be added up.

        Raises:
            ImportanceError: the hook belongs to another one.
        """
        if self.name not in ("", module_name):
            raise ImportanceError(
                f"{type(self).__name__} is registered on {self.name} and cannot score "
                f"{module_name} besides. Give every module a hook of its own."
            )
        self.name = module_name

    # -- on disk -------------------------------------------------------------------------------

    @classmethod
    def dump_activations_logs(
        cls: type[ForwardHook],
        activation_hooks: Mapping[str, ForwardHook],
        activations_log_dir: str | Path,
        args: Any,
        *,
        file_format: files.Format = "safetensors",
    ) -> None:
        """Write every hook's `to_dict` as `files.dump_scores` does. Collective."""
        files.dump_scores(activation_hooks, activations_log_dir, args, file_format=file_format)

    @classmethod
    def save_hook_states(
        cls: type[ForwardHook],
        activation_hooks: Mapping[str, ForwardHook],
        activations_log_dir: str | Path,
        *,
        file_format: files.Format = "safetensors",
    ) -> None:
        """Write every hook's `state_dict` as `files.save_states` does. Collective."""
        files.save_states(activation_hooks, activations_log_dir, file_format=file_format)

    @property
    def counters(self) -> dict[str, Any]:
        """What the state holds beside its sums, in numbers and strings; the same on every rank."""
        return {}

    @counters.setter
    def counters(self, found: Mapping[str, Any]) -> None:
        """Take them up again."""
        if found:
            raise ImportanceError(f"{type(self).__name__} keeps no counters, but got {found}.")

    def noted(self, term: Tensor) -> Tensor:
        """One call's statistics, kept for `healthy`."""
        same = self._noted is not None and self._noted.shape == term.shape
        # What is no number stays none in a sum.
        self._noted = self._noted + term if same else term  # type: ignore[operator]
        return term

    @property
    def healthy(self) -> Tensor | None:
        """Whether the statistics of all calls since `forget_health` were finite; a tensor, so that
        asking waits for no device. None before the first call.
        """
        return torch.isfinite(self._noted).all() if self._noted is not None else None

    def forget_health(self) -> None:
        """Let `healthy` tell of the calls that come."""
        self._noted = None


def _exactly(function: Any) -> Any:
    """In float32 under autocast too."""

    def exact(
        current_module: nn.Module, inputs: Tensor, save_ctx: Any, modules: Any, *, shard: LocalShard
    ) -> None:
        with _exact(inputs.device.type):
            function(current_module, inputs, save_ctx, modules, shard=shard)

    return exact


def _exact(device: str) -> AbstractContextManager[Any]:
    """Without autocast, which would multiply in short floats."""
    on = torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def _device(seen: Mapping[str, Activation]) -> str:
    return next(iter(seen.values())).values.device.type
