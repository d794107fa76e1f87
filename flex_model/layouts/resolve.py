"""Putting together what the sources know of one activation.

Per mesh dim the first that knows decides: the user's placement hint, the DTensor itself, the
framework's fields (tensor parallel), the trace. ``expected_shape`` settles what is left and is
checked against the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import Partial, Replicate
from torch.distributed.tensor.placement_types import Placement

from flex_model.errors import LayoutError
from flex_model.layouts import dtensor, fairscale, fsdp, megatron, transformers
from flex_model.layouts.hints import Hint, apply_expected_shape
from flex_model.layouts.layout import (
    ActivationLayout,
    DimLayout,
    block_count,
    gradient_of,
    is_sharded,
    shard_dim,
)
from flex_model.layouts.marks import Cut, Mark, OneOf, one_of, to_placement
from flex_model.layouts.sources import Site, Source, Told

__all__ = [
    "ContextOrder",
    "Known",
    "Loss",
    "groups_of",
    "parameter_placement",
    "resolve",
    "tell",
]

ContextOrder = Literal["zigzag", "contiguous"]
Loss = Literal["mean", "sum"]

# Over these each rank computes a loss of its own, on its part of the batch or of the sequence.
_OWN_LOSS = ("dp", "cp")
_SOURCES: tuple[Source, ...] = (megatron, fairscale, transformers, fsdp, dtensor)


@dataclass(frozen=True)
class Known:
    """What is known of one tensor before it is resolved.

    Attributes:
        where: module, hook kind and rank, for messages.
        sizes: ranks by mesh dim, outermost first.
        local_shape: sizes on this rank.
        told: the framework's word (tensor parallel).
        placements: by mesh dim, certain (a DTensor's own, or a user's hint).
        gradients: by mesh dim, the user's hint.
        marks: by mesh dim, from the trace.
        expected_shape: the user's hint.
        uneven: shard lengths by mesh dim where they differ between ranks.
        loss: how the losses of data- and context-parallel ranks combine.
        zigzag: whether context-parallel ranks hold the sequence in zig-zag order.
    """

    where: str
    sizes: Mapping[str, int]
    local_shape: Sequence[int]
    told: Told | None = None
    placements: Mapping[str, Placement] = field(default_factory=dict)
    gradients: Mapping[str, Placement] = field(default_factory=dict)
    marks: Mapping[str, Mark] = field(default_factory=dict)
    expected_shape: Hint | None = None
    uneven: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    loss: Loss = "mean"
    zigzag: bool = True


def groups_of(root: nn.Module) -> dict[str, ProcessGroup]:
    """The process groups that frameworks spread this model over, by mesh dim.

    Two dims of a mesh meet in one rank. What meets an earlier source's in more is another view of
    those ranks: a mesh without names, or the one that experts alone lie over.
    """
    found: dict[str, ProcessGroup] = {}
    seen: list[set[int]] = []
    for source in _SOURCES:
        for name, group in source.groups(root).items():
            ranks = set(dist.get_process_group_ranks(group))
            if name not in found and all(len(ranks & others) == 1 for others in seen):
                found[name] = group
                seen.append(ranks)
    return found


def tell(site: Site) -> Told | None:
    """The framework's word on a module's boundary, over the tensor-parallel ranks."""
    for source in _SOURCES:
        told = source.tell(site)
        if told is not None:
            return told
    return None


def parameter_placement(root: nn.Module, name: str, tensor: Tensor) -> Placement | None:
    """The framework's word on a parameter, over the tensor-parallel ranks."""
    for source in _SOURCES:
        placement = source.parameter(root, name, tensor)
        if placement is not None:
            return placement
    return None


def resolve(known: Known) -> ActivationLayout:
    """The layout of one activation; ``value`` stays None over mesh dims where nothing told.

    Raises:
        HintError: a hint that does not fit.
        LayoutError: a part of a sequence that is not two chunks.
    """
    layout = ActivationLayout(
        tuple(_one_dim(known, name, size) for name, size in known.sizes.items())
    )
    _check_chunks(layout, known)
    if known.expected_shape is not None:
        layout = apply_expected_shape(layout, known.local_shape, known.expected_shape, known.where)
    return layout


def _one_dim(known: Known, name: str, size: int) -> DimLayout:
    value = _normal(known.placements.get(name), known.local_shape)
    gradient = known.gradients.get(name)
    if value is None and name == "tp" and known.told is not None:
        value = _normal(known.told.value, known.local_shape)
        gradient = gradient or known.told.gradient
    if value is None and name in known.marks:
        value = to_placement(_among_nested(known, name))
    if name in _OWN_LOSS:
        return _own_loss(name, value, gradient, size, known)
    return DimLayout(
        name, size, value, gradient or gradient_of(value), shard_sizes=known.uneven.get(name)
    )


def _own_loss(
    name: str, value: Placement | None, gradient: Placement | None, size: int, known: Known
) -> DimLayout:
    """Each rank's gradient is that of its own loss: averaged, or summed, over the ranks."""
    zigzag = name == "cp" and known.zigzag
    if isinstance(value, Replicate):
        reduced = Partial("avg") if known.loss == "mean" else Partial("sum")
        return DimLayout(name, size, value, gradient or reduced, zigzag=zigzag)
    return DimLayout(
        name,
        size,
        value,
        gradient or gradient_of(value),
        shard_sizes=known.uneven.get(name),
        gradient_scale=1.0 / size if known.loss == "mean" else 1.0,
        zigzag=zigzag,
    )


def _check_chunks(layout: ActivationLayout, known: Known) -> None:
    """In zig-zag order a rank's part of each block is two chunks of one length."""
    shape = list(known.local_shape)
    for dim in reversed(layout.dims):
        if dim.value is None or not is_sharded(dim.value):
            continue
        at, blocks = shard_dim(dim.value), block_count(dim.value)
        if dim.zigzag and shape[at] % (2 * blocks):
            raise LayoutError(
                f"{known.where}: over {dim.name} ({dim.size} ranks) dim {at} of the local tensor "
                f"{tuple(known.local_shape)} holds {shape[at] // blocks} entries of the sequence, "
                "which are no two chunks of one length. Pad the whole sequence to a multiple of "
                f'{2 * dim.size}, or pass FlexModel(..., context_order="contiguous") if each rank '
                "holds one piece of it."
            )
        shape[at] = dim.whole_length(shape[at])


def _among_nested(known: Known, name: str) -> Mark:
    """The mark with blocks counted on the tensor as it is when its turn to be assembled comes.

    Parts over inner mesh dims are assembled before those over outer ones; if both cut one tensor
    dim and the former lies in front, it multiplies the blocks that the latter sees.
    """
    mark = known.marks[name]
    if isinstance(mark, OneOf):
        return _chosen_by_hint(mark, known, name)
    if not isinstance(mark, Cut):
        return mark
    names = list(known.sizes)
    blocks = mark.outer
    for inner in names[names.index(name) + 1 :]:
        other = known.marks.get(inner)
        if isinstance(other, Cut) and other.dim == mark.dim and other.outer < mark.outer:
            blocks *= known.sizes[inner]
    return Cut(mark.dim, blocks)


def _chosen_by_hint(mark: OneOf, known: Known, name: str) -> Mark:
    """Of the cuts that local shapes leave open, the one that gives the sizes expected."""
    if known.expected_shape is None or len(known.expected_shape) != len(known.local_shape):
        return mark
    hint, local, ranks = known.expected_shape, known.local_shape, known.sizes[name]
    fitting = [cut for cut in mark.cuts if hint[cut.dim] == local[cut.dim] * ranks]
    return one_of(fitting) if fitting else mark


def _normal(placement: Placement | None, shape: Sequence[int]) -> Placement | None:
    """Dims counted from the front."""
    if placement is None or not is_sharded(placement) or shard_dim(placement) >= 0:
        return placement
    dim = shard_dim(placement) + len(shape)
    if block_count(placement) > 1:
        return type(placement)(dim, split_factor=block_count(placement))  # type: ignore[call-arg]
    return type(placement)(dim)  # type: ignore[call-arg]
