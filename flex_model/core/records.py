"""Where a captured activation goes: the caller's dict, as whole CPU tensors."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from flex_model.core.transforms import plain_values
from flex_model.distributed.mesh import ParallelMesh
from flex_model.distributed.routing import assemble, assemble_on
from flex_model.errors import ConfigurationError
from flex_model.layouts.layout import ActivationLayout

__all__ = ["Keep", "Records"]

Keep = Literal["first", "all"] | int


class Records:
    """Appends whole, detached CPU copies to ``output_ptr[key]``, one per call, in call order.

    Args:
        output_ptr: the caller's dict; it is only ever appended to, clearing it is the caller's.
        keep: which ranks hold the records: the model's first rank, all, or one global rank.
        mesh: the job's ranks.

    Attributes:
        pending: what a pipeline stage has captured in this step; None where there is but one.

    Raises:
        ConfigurationError: ``keep`` is none of these, or a rank without this model.
    """

    def __init__(self, output_ptr: dict[str, list[Tensor]], keep: Keep, mesh: ParallelMesh) -> None:
        if keep == "first":
            keep = mesh.ranks[0]
        if keep != "all" and (isinstance(keep, bool) or keep not in mesh.ranks):
            raise ConfigurationError(
                f'keep={keep!r} is none of "first", "all" and the model\'s ranks {mesh.ranks}.'
            )
        self.output_ptr = output_ptr
        self.keep = keep
        self.pending: list[tuple[str, Tensor]] | None = [] if mesh.size("pp") > 1 else None
        self._mesh = mesh
        self._here = keep == "all" or all(
            mesh.coordinate(name) == mesh.coordinate_of(keep, name)
            for name in mesh.names
            if name != "pp"  # each stage's counterpart collects, and hands over when a step ends
        )

    def store(self, key: str, whole: Tensor) -> None:
        """Record a tensor that is whole on this rank already."""
        if self._here:
            self._note(key, plain_values(whole.detach().to("cpu", copy=True)))

    def collect(self, key: str, local: Tensor, layout: ActivationLayout) -> None:
        """Make a tensor whole where records are kept, and only there, and record it."""
        if not layout.moves_value:
            self.store(key, local)
            return
        local = local.detach()
        if self.keep == "all":
            whole: Tensor | None = assemble(local, layout, self._mesh)
        else:
            whole = assemble_on(local, layout, self._mesh, int(self.keep))
        if whole is not None:
            self._note(key, whole.to("cpu"))

    def append(self, key: str, whole: Tensor) -> None:
        """Hand a record to the caller."""
        kept = self.output_ptr.setdefault(key, [])
        if not hasattr(kept, "append"):
            raise ConfigurationError(
                f"output_ptr[{key!r}] is {type(kept).__name__}, but records are appended to a list "
                "there. Remove it, or name another dict."
            )
        kept.append(whole)

    def _note(self, key: str, whole: Tensor) -> None:
        if self.pending is None:
            self.append(key, whole)
        else:
            self.pending.append((key, whole))
