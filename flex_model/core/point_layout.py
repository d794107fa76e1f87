"""The layout at one hook point: asked once per shape, remembered, and verified where inferred."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement

from flex_model.core.hook_function import HookFunction
from flex_model.core.session import Session
from flex_model.distributed.agreement import agree_on_length, agree_on_marks
from flex_model.distributed.gradients import ranks_agree
from flex_model.distributed.mesh import MESH_DIMS
from flex_model.errors import HintError, LayoutError
from flex_model.layouts.dtensor import placements_by_name, shard_sizes
from flex_model.layouts.fused import chosen_features
from flex_model.layouts.hints import apply_expected_shape
from flex_model.layouts.layout import ActivationLayout, is_sharded, shard_dim
from flex_model.layouts.marks import (
    UNKNOWN,
    WHOLE,
    Cut,
    Mark,
    OneOf,
    from_placement,
    one_of,
    to_placement,
)
from flex_model.layouts.names import named_parameters
from flex_model.layouts.resolve import Known, parameter_placement, resolve, tell
from flex_model.layouts.sources import Side, Site, Told

__all__ = ["PointLayout", "side_of"]

_SIDES: dict[str, Side] = {
    "forward": "output",
    "forward_pre": "input",
    "full_backward": "input",
    "full_backward_pre": "output",
}


def side_of(kind: str) -> Side:
    """Which side of a module a kind of hook sees."""
    return _SIDES[kind]


_ONE_PROCESS = ActivationLayout()
_HINTED = tuple(name for name in MESH_DIMS if name != "pp")  # no activation lies over stages


@dataclass(frozen=True)
class _Traced:
    """Marks as they were seen, and the sizes they were seen at."""

    marks: dict[str, Mark]
    shape: tuple[int, ...]
    per_sample: int  # entries of the batch-cut dim, within one block, that one sample makes
    per_position: int = 1  # the same of the sequence-cut dim, for one position of this rank's
    batches: tuple[int, ...] = ()  # of the data-parallel ranks, or of this one


class PointLayout:
    """How the tensors that pass one hook point lie over the mesh.

    Args:
        name: module (or parameter) path.
        kind: hook kind; decides whether inputs, outputs or a parameter are meant.
        index: which of the tensors.
        module: the module hooked.
        session: what all points share.
        where: module, kind and rank, for messages.
    """

    def __init__(
        self, name: str, kind: str, index: int, module: nn.Module, session: Session, where: str
    ) -> None:
        self._name = name
        self._side = _SIDES.get(kind)
        self._index = index
        self._module = module
        self._session = session
        self._where = where
        self._expected_shape: tuple[int | None, ...] | None = None
        self._placements: dict[str, Placement] = {}
        self._gradients: dict[str, Placement] = {}
        self._traced: dict[int, _Traced] = {}
        self._found: dict[Any, ActivationLayout] = {}
        self._by_shape: dict[tuple[int, ...], ActivationLayout] = {}
        self._verified: set[str] = set()
        self._left_to_trace: bool | None = None

    def take_hints(self, hook: HookFunction) -> None:
        """Adopt a hook function's hints.

        Raises:
            HintError: they contradict those of another hook function at this point.
        """
        unknown = {*hook.placements, *hook.gradients} - set(_HINTED)
        if unknown:
            there = ", ".join(_HINTED)
            raise HintError(f"{self._where}: hints name mesh dims {unknown}; there are {there}.")
        if hook.expected_shape is not None:
            if self._expected_shape not in (None, hook.expected_shape):
                raise HintError(
                    f"{self._where}: two hook functions expect {self._expected_shape} and "
                    f"{hook.expected_shape} of the same tensor."
                )
            self._expected_shape = hook.expected_shape
        self._placements.update(hook.placements)
        self._gradients.update(hook.gradients)
        self._found.clear()
        self._left_to_trace = None

    def part(self, part: str | None, head: int | None, width: int) -> Tensor:
        """Positions along the whole last dim of a part of the features.

        Raises:
            LayoutError: the activation is not as wide as its parts together.
        """
        side = self._side or "output"
        positions, due = chosen_features(self._session.root, self._name, side, part, head)
        if width != due:
            raise LayoutError(
                f"{self._where}: the whole activation is {width} wide, but its parts are {due} "
                "together: they lie in another way than the module's name tells. Hook the whole."
            )
        return positions

    def needs_trace(self) -> bool:
        """Whether some mesh dim's placement is left for the trace to find."""
        if any(self._is_outgrown(seen) for seen in self._traced.values()):
            self._traced.clear()
            self._found.clear()
        if self._side is None or self._traced:
            return False
        if self._left_to_trace is None:
            told = {*self._placements}
            if self._told(ndim=3) is not None:
                told.add("tp")
            self._left_to_trace = bool(set(self._session.sizes) - told)
        return self._left_to_trace

    def _is_outgrown(self, seen: _Traced) -> bool:
        """Whether a sequence was seen of a lone sample: it told nothing of where samples lie.

        With one sample ``[batch * sequence]`` and ``[sequence * batch]`` are the same. All ranks
        find the same, for they know of the same batches.
        """
        sequence = seen.marks.get("cp")
        return isinstance(sequence, Cut) and 1 in seen.batches and seen.batches != self._batches()

    def of(self, tensor: Tensor, *, gradient: bool = False) -> ActivationLayout:
        """The layout of a tensor at this point; of the activation a gradient belongs to.

        Raises:
            LayoutError: nothing tells how it lies.
            HintError: a hint that does not fit.
        """
        if not self._session.sizes:
            if self._expected_shape is not None:
                shape = tuple(tensor.shape)
                apply_expected_shape(_ONE_PROCESS, shape, self._expected_shape, self._where)
            return _ONE_PROCESS
        shape = tuple(tensor.shape)
        if gradient and not isinstance(tensor, DTensor) and shape in self._by_shape:
            return self._by_shape[shape]  # of the forward it belongs to, whatever came since
        own = tensor.placements if isinstance(tensor, DTensor) else None
        key = (shape, own, self._session.batch_sizes)
        found = self._found.get(key)
        if found is None:
            found = self._resolved(tensor)
            self._found[key] = found
        if not gradient:
            self._by_shape[shape] = found
        return found

    def marks_of(self, layout: ActivationLayout, ndim: int) -> dict[str, Mark]:
        """What the trace should know of a tensor that leaves this point."""
        return {
            dim.name: from_placement(dim.value, ndim)
            for dim in layout.dims
            if dim.value is not None
        }

    def _resolved(self, tensor: Tensor) -> ActivationLayout:
        """Ask the sources, compare the ranks where none is certain, then let the hint settle."""
        known = self._known(tensor)
        found = known.marks
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        layout = resolve(replace(known, expected_shape=None))
        measured = {
            dim.name: WHOLE if ranks_agree(local, self._session.mesh.along(dim.name)) else UNKNOWN
            for dim in layout.dims
            if (dim.value is None or isinstance(dim.value, Replicate))
            and not self._is_certain(dim.name, known)
            and not self._session.mesh.simulated  # what the trace says stands
            # What comes of a cut may be equal by chance: attention to one token is 1 everywhere.
            and not (found.get(dim.name) is UNKNOWN or isinstance(found.get(dim.name), OneOf))
        }
        if measured:
            self._verified |= {name for name, mark in measured.items() if mark is WHOLE}
            known = replace(known, marks={**known.marks, **measured})
            self._remember(tensor.ndim, known)
            layout = resolve(known)
        elif known.expected_shape is not None:
            layout = resolve(known)
        for dim in layout.dims:
            if dim.value is None:
                self._traced.pop(tensor.ndim, None)  # the next forward is to be watched anew
                raise self._undecided(
                    dim.name, tensor, found.get(dim.name), measured=dim.name in measured
                )
        return layout

    def _is_certain(self, dim: str, known: Known) -> bool:
        told = dim == "tp" and known.told is not None
        return told or dim in known.placements or dim in self._verified or self._side is None

    def _remember(self, ndim: int, known: Known) -> None:
        seen = self._traced.get(ndim, _Traced({}, tuple(known.local_shape), 1))
        self._note(ndim, replace(seen, marks=dict(known.marks)))

    def _note(self, ndim: int, traced: _Traced) -> None:
        """What was found by other marks no longer holds."""
        self._traced[ndim] = traced
        self._found.clear()

    def _known(self, tensor: Tensor) -> Known:
        session = self._session
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        self._check_hinted_dims(tuple(local.shape))
        placements, gradients, uneven = dict(self._placements), dict(self._gradients), {}
        if isinstance(tensor, DTensor):
            for name, placement in placements_by_name(tensor, session.dim_names).items():
                placements.setdefault(name, placement)
                if not is_sharded(placement):
                    # from_local and to_local make a replicated DTensor's gradient whole.
                    gradients.setdefault(name, Replicate())
                sizes = shard_sizes(tensor, placement, session.sizes[name])
                if sizes is not None:
                    uneven[name] = sizes
        marks = self._marks(tensor)
        ragged = self._ragged(marks.get("dp"), tensor.ndim)
        if ragged is not None:
            uneven["dp"] = ragged
        return Known(
            where=self._where,
            sizes=session.sizes,
            local_shape=tuple(local.shape),
            told=self._told(local.ndim),
            placements=placements,
            gradients=gradients,
            marks=marks,
            expected_shape=self._expected_shape,
            uneven=uneven,
            loss=session.loss,
            zigzag=session.zigzag,
        )

    def _check_hinted_dims(self, shape: tuple[int, ...]) -> None:
        for name, placement in (*self._placements.items(), *self._gradients.items()):
            if is_sharded(placement) and not -len(shape) <= shard_dim(placement) < len(shape):
                raise HintError(
                    f"{self._where}: the hint {placement} over {name} names dim "
                    f"{shard_dim(placement)}, but the local tensor {shape} has {len(shape)} dims."
                )

    def _told(self, ndim: int) -> Told | None:
        root = self._session.root
        if self._side is not None:
            return tell(Site(root, self._name, self._module, self._side, self._index, ndim))
        placement = parameter_placement(root, self._name, dict(named_parameters(root))[self._name])
        return Told(placement, placement) if placement is not None else None

    def _marks(self, tensor: Tensor) -> dict[str, Mark]:
        """From the trace under way, else as seen before, at this tensor's sizes."""
        if self._side is None:
            return dict.fromkeys(self._session.sizes, WHOLE)
        trace = self._session.trace
        seen = self._traced.get(tensor.ndim)
        if trace is not None and (seen is None or not self._verified):
            found = trace.marks_of(tensor)
            if not self._session.mesh.simulated:
                found = agree_on_marks(self._session.mesh, found, tensor.device)
            marks = {n: WHOLE if n in self._verified else m for n, m in found.items()}
            shape = tuple(tensor.shape)
            if "cp" in marks:
                marks["cp"] = self._with_all_positions(marks["cp"], shape)
            per_sample = self._per_sample(marks.get("dp"), shape, tensor.device)
            per_position = self._per_position(marks.get("cp"), shape)
            found_at = _Traced(marks, shape, per_sample, per_position, self._batches())
            self._note(tensor.ndim, found_at)
            return marks
        return self._resized(seen, tensor) if seen is not None else {}

    def _resized(self, seen: _Traced, tensor: Tensor) -> dict[str, Mark]:
        """Marks at another batch or sequence length: the blocks of an inner cut change too."""
        marks = dict(seen.marks)
        for name, mark in seen.marks.items():
            if isinstance(mark, Cut) and mark.outer > 1 and tuple(tensor.shape) != seen.shape:
                inner = seen.shape[mark.dim] // mark.outer
                if name == "dp":
                    inner = seen.per_sample * self._batch()
                elif name == "cp":
                    inner = seen.per_position * self._session.positions
                marks[name] = Cut(mark.dim, tensor.shape[mark.dim] // max(1, inner))
        return marks

    def _batches(self) -> tuple[int, ...]:
        """The batch of every data-parallel rank; of this one where there are no others."""
        return self._session.batch_sizes or (self._session.batch,)

    def _batch(self) -> int:
        """This rank's batch in this forward."""
        sizes = self._session.batch_sizes
        return sizes[self._session.mesh.coordinate("dp")] if sizes else 1

    def _per_sample(self, mark: Mark | None, shape: tuple[int, ...], device: torch.device) -> int:
        """How long one sample makes the batch-cut dim; ranks of an empty batch ask the others."""
        batches = self._session.batch_sizes
        if not isinstance(mark, Cut) or not batches:
            return 1
        own = shape[mark.dim] // mark.outer // self._batch() if self._batch() else 0
        return agree_on_length(self._session.mesh, own, device) if 0 in batches else own

    def _with_all_positions(self, mark: Mark, shape: tuple[int, ...]) -> Mark:
        """Of the cuts that local shapes leave open, those that hold this rank's whole part."""
        if not isinstance(mark, OneOf):
            return mark
        positions = max(1, self._session.positions)
        fitting = [cut for cut in mark.cuts if shape[cut.dim] // cut.outer % positions == 0]
        return one_of(fitting) if fitting else mark

    def _per_position(self, mark: Mark | None, shape: tuple[int, ...]) -> int:
        """How long one position makes the sequence-cut dim, within one block."""
        positions = self._session.positions
        if not isinstance(mark, Cut) or not positions:
            return 1
        return shape[mark.dim] // mark.outer // positions

    def _ragged(self, mark: Mark | None, ndim: int) -> tuple[int, ...] | None:
        """Every rank's length of the batch-cut dim, where the ranks' batches differ."""
        batches = self._session.batch_sizes
        seen = self._traced.get(ndim)
        if not isinstance(mark, Cut) or seen is None or len(set(batches)) <= 1:
            return None
        return tuple(seen.per_sample * batch for batch in batches)

    def _undecided(
        self, dim: str, tensor: Tensor, found: Mark | None, *, measured: bool
    ) -> LayoutError:
        if isinstance(found, OneOf):
            fits = ", ".join(str(to_placement(cut)) for cut in sorted(found.cuts, key=str))
            why = f"local shapes leave open which of {fits} it is"
        elif measured:
            why = "nothing tells how it lies, and the ranks hold different values"
        else:
            why = "it comes of an operation that no rule follows, or of values left open themselves"
        return LayoutError(
            f"{self._where}: over {dim} ({self._session.sizes[dim]} ranks) the local tensor "
            f"{tuple(tensor.shape)} is not understood: {why}. Give expected_shape with the whole "
            f'sizes, or HookFunction(..., placements={{"{dim}": Shard(d)}}).'
        )
