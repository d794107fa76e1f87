"""Channels by the order in which a layer can do without them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flex_model.errors import ImportanceError, NothingCollectedError
from flex_model.importance.activation import Activation
from flex_model.importance.checks import keys_of, vector
from flex_model.importance.hook import ForwardHook
from flex_model.importance.independent import column_norms
from flex_model.importance.layer import bias_added, channels_of, weight_of, whole_channels
from flex_model.importance.sharded_sum import ShardedSum
from flex_model.layouts.sources import Side

__all__ = ["IterativeChannelContributionHook", "pruning_schedule"]

_EPSILON = 1e-8
_METHODS = (None, "scale_by_magnitude")
# Of the input's bytes: what the sum over pruned channels, and a block of kept ones, may take.
_SHARE_OF_ERRORS = 0.5
_SHARE_OF_BLOCK = 0.25
_LEAST_BLOCK = 32


def pruning_schedule(channels: int, calls: int) -> list[int]:
    """How many channels each call prunes: all of them in all, as evenly as whole numbers allow."""
    if channels >= calls:
        each, more = divmod(channels, calls)
        return [each + (call < more) for call in range(calls)]
    schedule = [0] * calls
    for number in range(1, channels + 1):
        schedule[number * calls // channels - 1] = 1
    return schedule


class IterativeChannelContributionHook(ForwardHook):
    """Channels by rank: in each call those whose loss would change the layer's output least go.

    With P the channels pruned so far, the output's error is ``s = r Y - Yhat``, which is
    ``X[:, P] W[:, P]^T`` (plus the bias, if the output holds it) for ``r = 1``; without channel i
    besides it would be ``s + x_i W_i``, whose norm over the output, averaged over tokens, is the
    channel's contribution. Its square is ``||s||^2 + 2 x_i (s W)_i + x_i^2 ||W_i||^2``, so a call
    costs about one forward of the layer. It is computed for blocks of channels: extra memory stays
    below the input's own.

    Args:
        linear_layer: the layer hooked: ``nn.Linear``, Megatron's or fairscale's
            ``RowParallelLinear``, or one with DTensor weights.
        activation_hooks_kwargs: ``validation_full_iters``: how many calls there will be;
            ``calibration_method``: None (r = 1) or "scale_by_magnitude" (r = ||Yhat|| / ||Y|| per
            token); ``clear_gpu_memory``: give cached memory back after each call.
        sequence_dim: which of two leading dims a padding mask's sequence is.

    Traffic per call: one sum of ``[tokens, output]`` over the tensor-parallel ranks once channels
    are pruned (in several parts where that is more than half the input), and where channels are
    pruned one vector.

    Raises:
        ImportanceError: no linear layer, or keyword arguments that cannot be.
    """

    def __init__(
        self,
        linear_layer: nn.Module,
        activation_hooks_kwargs: Mapping[str, Any],
        *,
        sequence_dim: int = 1,
    ) -> None:
        super().__init__(sequence_dim)
        self.channels = channels_of(linear_layer)
        self.calls = _checked_calls(activation_hooks_kwargs)
        self.method = activation_hooks_kwargs.get("calibration_method")
        if self.method not in _METHODS:
            raise ImportanceError(
                f"calibration_method must be one of {_METHODS}, got {self.method!r}."
            )
        self.clear_gpu_memory = bool(activation_hooks_kwargs.get("clear_gpu_memory", False))
        self.schedule = pruning_schedule(self.channels, self.calls)
        self.call = 0
        self.pruned: list[int] = []
        if self.method is not None:
            self.watches: tuple[Side, ...] = ("input", "output")  # type: ignore[misc]
        self._layer = linear_layer
        self._contributions = ShardedSum()
        self._norms: Tensor | None = None

    @property
    def sums(self) -> Mapping[str, ShardedSum]:
        return {"agg_cont_per_channel": self._contributions}

    @property
    def counters(self) -> dict[str, Any]:
        return {"curr_iter": self.call, "pruned_channels": list(self.pruned)}

    @counters.setter
    def counters(self, found: Mapping[str, Any]) -> None:
        self.call, self.pruned = found["curr_iter"], list(found["pruned_channels"])

    @property
    def made_with(self) -> dict[str, Any]:
        return {**super().made_with, **self._schedule()}

    # -- one call ------------------------------------------------------------------------------

    def see(
        self, module: nn.Module, inputs: Activation | None, outputs: Activation | None, raw: object
    ) -> None:
        assert inputs is not None
        if self.call >= self.calls:
            raise ImportanceError(
                f"{self._who}: call {self.call + 1}, but validation_full_iters={self.calls}, after "
                "which every channel is ranked. Give as many iterations as there are batches."
            )
        whole_channels(self._layer, inputs.values.shape[-1])
        if inputs.tokens > 0:
            weight = weight_of(self._layer)
            if self._norms is None:
                self._norms = column_norms(weight).square()
            bias = bias_added(self._layer, raw)
            call = _Call(inputs, outputs, weight, bias, self._norms, self.pruned)
            self._contributions.add(self.noted(call.contributions()), inputs.shard, inputs.leading)
        count = self.schedule[self.call]
        if count:
            self._prune(count)
        self.call += 1
        if self.clear_gpu_memory and inputs.values.device.type != "cpu":
            torch.get_device_module(inputs.values.device).empty_cache()

    def _prune(self, count: int) -> None:
        """The least contributing channels go; every rank sees the same numbers."""
        total = self._whole()
        if total is None:
            raise NothingCollectedError(f"{self._who}: no token came in call {self.call + 1}.")
        if torch.isnan(total).any():
            raise ImportanceError(
                f"{self._who}: the activations of call {self.call + 1}, or of one since channels "
                "were last pruned, hold NaNs. Leave that batch out, or mend the model."
            )
        self.pruned += total.argsort(stable=True)[:count].tolist()
        self._contributions.restore(None)

    def _whole(self) -> Tensor | None:
        """Contributions since the last pruning; infinite for channels that are pruned."""
        total = self._contributions.whole()
        if total is not None:
            total[self.pruned] = torch.inf
        return total

    @property
    def _who(self) -> str:
        return f"{type(self).__name__} on {self.name or type(self._layer).__name__}"

    # -- results -------------------------------------------------------------------------------

    def accumulate(self) -> Tensor:
        """Every channel's rank, ``[channels]``, int64: 0 is pruned first.

        Raises:
            NothingCollectedError: some channels are not ranked yet.
        """
        return self.to_dict()["score"]

    def to_dict(self) -> dict[str, Tensor]:
        """``score``: the ranks, and ``channels_importance_ascending``: the channels in order."""
        if len(self.pruned) != self.channels:
            raise NothingCollectedError(
                f"{self._who}: {len(self.pruned)} of {self.channels} channels are ranked after "
                f"{self.call} of {self.calls} calls. Run them all."
            )
        ascending = torch.tensor(self.pruned)
        return {"score": ascending.argsort(), "channels_importance_ascending": ascending}

    def get_progress_info(self) -> dict[str, Any]:
        return {
            "curr_iter": self.call,
            "total_iters": self.calls,
            "progress": self.call / self.calls,
            "pruned_channels_count": len(self.pruned),
            "total_channels": self.channels,
        }

    def state_dict(self) -> dict[str, Any]:
        """``curr_iter``, ``pruned_channels``, ``agg_cont_per_channel`` ``[channels]`` and what the
        hook was made with.
        """
        total = self._whole()
        return {
            **self.counters,
            "agg_cont_per_channel": torch.zeros(self.channels) if total is None else total,
            **self._schedule(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """See `state_dict`; refuses one of another layer or schedule."""
        hook, due = type(self).__name__, self._schedule()
        keys_of(state_dict, [*self.counters, *self.sums, *due], hook)
        for name, value in due.items():
            if state_dict[name] != value:
                raise ImportanceError(
                    f"{self._who}: the state was made with {name}={state_dict[name]!r}, this hook "
                    f"with {value!r}. Make the hook as it was."
                )
        total = vector(state_dict["agg_cont_per_channel"], self.channels, "contributions", hook)
        call, pruned = state_dict["curr_iter"], list(state_dict["pruned_channels"])
        if len({*pruned} & {*range(self.channels)}) != len(pruned) or not 0 <= call <= self.calls:
            raise ImportanceError(
                f"{self._who}: the state is at call {call} of {self.calls} with pruned channels "
                f"{pruned} of {self.channels}, which cannot be. The file is damaged."
            )
        self.counters = {"curr_iter": call, "pruned_channels": pruned}
        total[pruned] = 0.0
        self._contributions.restore(total if total.any() else None)

    def _schedule(self) -> dict[str, Any]:
        return {
            "num_channels": self.channels,
            "pruning_iters": self.calls,
            "pruning_schedule": self.schedule,
            "calibration_method": self.method,
            "epsilon": _EPSILON,
        }


@dataclass(frozen=True)
class _Call:
    """The mathematics of one call.

    Attributes:
        inputs: ``[.., own channels]``.
        outputs: ``[.., output]``, for the calibration that needs them.
        weight: ``[output, own channels]``.
        bias: ``[output]`` if the output holds it.
        norms: squared norms of the weight's columns, ``[own channels]``, float32.
        pruned: channels of the whole layer that are pruned.
    """

    inputs: Activation
    outputs: Activation | None
    weight: Tensor
    bias: Tensor | None
    norms: Tensor
    pruned: list[int]

    def contributions(self) -> Tensor:
        """Each own channel's mean over the whole call's tokens, ``[own channels]``, float32; this
        rank's tokens' term of it. Zero for pruned channels.
        """
        values = self.inputs.values.flatten(0, -2)
        keep = self.inputs.keep.flatten() if self.inputs.mask is not None else None
        outputs = self._outputs()
        total = values.new_zeros(values.shape[1], dtype=torch.float32)
        gone, kept = self._parted()
        for rows in self._rows(values):
            error = self._error(values[rows], outputs[rows] if outputs is not None else None, gone)
            self._add(total, values[rows], error, kept, keep[rows] if keep is not None else None)
        return total / self.inputs.tokens

    def _outputs(self) -> Tensor | None:
        """Of the same tokens as the input: sequence-parallel ranks hold a part of them each."""
        if self.outputs is None:
            return None
        values, shard = self.outputs.values, self.outputs.shard
        for dim in self.outputs.leading:
            if values.shape[dim] != self.inputs.values.shape[dim]:
                values = shard.gathered(values, dim, dim, over=("tp",))
        return values.flatten(0, -2)

    def _parted(self) -> tuple[Tensor, Tensor]:
        """Own channels that are pruned, and those that are not."""
        positions = self.inputs.shard.positions(-1)
        gone = torch.isin(positions, torch.tensor(self.pruned, dtype=torch.int64))
        device = self.inputs.values.device
        return gone.nonzero().flatten().to(device), (~gone).nonzero().flatten().to(device)

    def _rows(self, values: Tensor) -> Iterator[slice]:
        """Tokens whose errors are held at once. A rank without tokens still meets the others."""
        # By the ranks' mean share of channels: each must cut the tokens alike.
        share = self.inputs.shard.whole_shape[-1] / self.inputs.shard.ranks((-1,))
        room = _SHARE_OF_ERRORS * values.shape[0] * share * values.element_size()
        parts = max(1, round(values.shape[0] * self.weight.shape[0] * 4 / max(room, 1)))
        size = max(1, -(-values.shape[0] // parts))
        yield from (slice(at, at + size) for at in range(0, max(1, values.shape[0]), size))

    def _blocks(self, channels: Tensor, rows: int) -> Iterator[Tensor]:
        values = self.inputs.values
        room = _SHARE_OF_BLOCK * values.numel() * values.element_size()
        fitting = int(room / (4 * (2 * rows + self.weight.shape[0])))
        yield from channels.split(max(_LEAST_BLOCK, fitting)) if channels.numel() else ()

    def _error(self, values: Tensor, outputs: Tensor | None, gone: Tensor) -> Tensor | None:
        """``s``, ``[tokens, output]``, float32; None where it is zero."""
        lost = None
        if self.pruned:
            lost = values.new_zeros(values.shape[0], self.weight.shape[0], dtype=torch.float32)
            for block in self._blocks(gone, values.shape[0]):
                own = values.index_select(1, block).float()
                lost.addmm_(own, self.weight.index_select(1, block).float().T)
            lost = self.inputs.shard.summed(lost, (-1,), in_place=True)
        if outputs is not None:
            return _calibrated(outputs.float(), lost, self.bias)
        if self.bias is None:
            return lost
        bias = self.bias.float()
        return lost.add_(bias) if lost is not None else bias.expand(values.shape[0], -1)

    def _add(
        self,
        total: Tensor,
        values: Tensor,
        error: Tensor | None,
        kept: Tensor,
        keep: Tensor | None,
    ) -> None:
        """Add the norms of the kept channels' contributions over some tokens."""
        squares = None
        if error is not None:
            squares = torch.linalg.vector_norm(error, 2, 1, keepdim=True).square_()
        for block in self._blocks(kept, values.shape[0]):
            own = values.index_select(1, block).float()
            sizes = own * self.norms[block]
            if error is not None and squares is not None:
                sizes.addmm_(error, self.weight.index_select(1, block).float(), alpha=2.0)
            sizes.mul_(own)
            if squares is not None:
                sizes.add_(squares)
            # A true square: what rounding leaves below zero is zero.
            sizes.clamp_min_(0.0).add_(_EPSILON).sqrt_()
            total.index_add_(0, block, sizes.sum(0) if keep is None else keep @ sizes)


def _calibrated(outputs: Tensor, lost: Tensor | None, bias: Tensor | None) -> Tensor:
    """``||Yhat|| / ||Y|| Y - Yhat`` per token."""
    without = outputs - lost if lost is not None else outputs.clone()
    if bias is not None:
        without -= bias
    norm = torch.linalg.vector_norm(without, 2, 1, keepdim=True)
    scale = norm / (torch.linalg.vector_norm(outputs, 2, 1, keepdim=True) + _EPSILON)
    return without.neg_().addcmul_(outputs, scale)


def _checked_calls(given: Mapping[str, Any]) -> int:
    if not isinstance(given, Mapping) or "validation_full_iters" not in given:
        raise ImportanceError(
            "activation_hooks_kwargs needs validation_full_iters: how many batches will be run."
        )
    calls = given["validation_full_iters"]
    if isinstance(calls, bool) or not isinstance(calls, int) or calls < 1:
        raise ImportanceError(f"validation_full_iters must be 1 or more, got {calls!r}.")
    return calls
