"""The ranks of a job: pipeline, data, context and tensor dims on one torch ``DeviceMesh``.

Rank order is (pp, dp, cp, tp), tp fastest, as in flex-model 0.1.0 and Megatron. Process groups that
a framework already made are adopted; only what no framework made is created here.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store

from flex_model.distributed.board import Board
from flex_model.distributed.communicator import Communicator
from flex_model.distributed.control import ControlGroup
from flex_model.distributed.watch import Watch
from flex_model.errors import ConfigurationError

__all__ = ["MESH_DIMS", "ParallelMesh", "build_mesh", "watched"]

MESH_DIMS = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True)
class ParallelMesh:
    """The mesh as hooks use it: only the dims with more than one rank, each with its group.

    Attributes:
        device_mesh: torch's mesh over ``names``; None in a single-process job.
        names: mesh dims of size > 1, outermost first.
        ranks: global ranks of the mesh, in mesh order.
        everyone: one group of all ``ranks``; None in a single-process job.
        assembly: all of them on a CPU group of FlexModel's own, once `watched`.
        control: of them those that pass the same modules: this rank's pipeline stage.
        watch: the watch kept while waiting, once `watched`.
        simulated: whether this process stands for all ranks (torch's backend "fake"): there is
            nobody to wait for, and no other rank's values to compare with.
    """

    device_mesh: DeviceMesh | None = None
    names: tuple[str, ...] = ()
    ranks: tuple[int, ...] = (0,)
    everyone: ProcessGroup | None = None
    assembly: ControlGroup | None = None
    control: ControlGroup | None = None
    watch: Watch | None = None
    simulated: bool = False
    _groups: Mapping[str, ProcessGroup] = field(default_factory=dict)
    _places: Mapping[str, Mapping[int, int]] = field(default_factory=dict)

    def size(self, name: str) -> int:
        """Ranks along a mesh dim; 1 where the job has no such dim."""
        return self._groups[name].size() if name in self._groups else 1

    def group(self, name: str) -> ProcessGroup:
        """The ranks that differ from this one along ``name`` only."""
        return self._groups[name]

    def along(self, name: str) -> Communicator:
        """The same ranks, for collectives."""
        return Communicator(self._groups[name], self.watch)

    def coordinate(self, name: str) -> int:
        """This rank's place along a mesh dim."""
        return self._groups[name].rank() if name in self._groups else 0

    def coordinate_of(self, rank: int, name: str) -> int:
        """The place of any global rank along a mesh dim: its place in its own group there."""
        return self._places[name][rank] if name in self._places else 0

    def rank_at(self, name: str, index: int) -> int:
        """Global rank of the ``index``-th member of this rank's group along ``name``."""
        return dist.get_global_rank(self._groups[name], index)

    @property
    def rank(self) -> int:
        """This process's global rank."""
        return dist.get_rank() if self.device_mesh is not None else 0


def watched(mesh: ParallelMesh, store: Store | None, patience: float) -> ParallelMesh:
    """The mesh with a watch over its ranks. Collective; a single process has nothing to watch, nor
    have simulated ranks.

    Args:
        mesh: the job's ranks.
        store: that all of them reach; None for the job's own.
        patience: seconds that a rank may stand in another collective before it counts as stuck.
    """
    if not mesh.names or mesh.simulated:
        return mesh
    store = store or _get_default_store()
    posts = _connection_for_posts(store)
    ranks, own = mesh.ranks, mesh.rank
    spelled = "-".join(map(str, ranks))
    # Each rank counts the FlexModels it built on these ranks: the same number on all of them.
    name = f"flex_model/{spelled}/{posts.add(f'flex_model/{spelled}/built by {own}', 1)}"
    stage = tuple(r for r in ranks if mesh.coordinate_of(r, "pp") == mesh.coordinate("pp"))
    watch = Watch(Board(posts, name), own, ranks, stage, patience)
    watch.meet()
    assembly = ControlGroup(store, f"{name}/all", ranks, watch)
    control = assembly
    if len(stage) < len(ranks):
        control = ControlGroup(store, f"{name}/{mesh.coordinate('pp')}", stage, watch)
    seen = replace(mesh, watch=watch, assembly=assembly, control=control)
    weakref.finalize(seen, watch.close).atexit = False  # then the watch knows more to say
    return seen


_CONNECTIONS: weakref.WeakKeyDictionary[Store, Store] = weakref.WeakKeyDictionary()


def _connection_for_posts(store: Store) -> Store:
    """One apart from torch's own, on which a group that is being made waits for late ranks."""
    if store not in _CONNECTIONS:
        _CONNECTIONS[store] = store.clone()  # type: ignore[attr-defined]
    return _CONNECTIONS[store]


def build_mesh(
    sizes: Mapping[str, int],
    process_group: ProcessGroup | None,
    adopted: Mapping[str, ProcessGroup],
    device_type: str,
) -> ParallelMesh:
    """The mesh of a job from its sizes, adopting the groups that frameworks made.

    Args:
        sizes: ranks along "pp", "dp", "cp", "tp"; 1 where left out.
        process_group: the ranks the model is spread over; None for the whole world.
        adopted: groups read off the model, by mesh dim.
        device_type: "cpu", "cuda", ...

    Raises:
        ConfigurationError: sizes that are not positive, contradict the adopted groups or do not
            multiply to the number of ranks; no process group where one is needed.
    """
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ConfigurationError(f"{name} size must be a positive whole number, got {size!r}.")
    sizes = _with_adopted_sizes(sizes, adopted)
    wanted = _product(sizes)
    if not (dist.is_available() and dist.is_initialized()):
        if wanted > 1:
            raise ConfigurationError(
                f"Sizes {_spelled(sizes)} need {wanted} ranks, but torch.distributed has no "
                "process group. Start with torchrun and call init_process_group() first."
            )
        return ParallelMesh()
    ranks = tuple(dist.get_process_group_ranks(process_group or dist.group.WORLD))
    if wanted != len(ranks):
        raise ConfigurationError(
            f"Sizes {_spelled(sizes)} multiply to {wanted}, but the job has {len(ranks)} ranks. "
            "Give sizes whose product is the number of ranks, or a process_group of the ranks "
            "that hold this model."
        )
    if wanted == 1:
        return ParallelMesh(ranks=ranks)
    return _on_ranks(sizes, ranks, process_group, adopted, device_type)


def from_device_mesh(device_mesh: DeviceMesh) -> ParallelMesh:
    """The job's mesh as a torch ``DeviceMesh`` that the caller made, with named dims.

    Raises:
        ConfigurationError: a mesh without dim names, or whose names are none of ours.
    """
    names = device_mesh.mesh_dim_names
    if names is None or any(name not in MESH_DIMS for name in names):
        raise ConfigurationError(
            f"A DeviceMesh given to FlexModel needs dim names out of {MESH_DIMS}, got {names}. "
            "Pass mesh_dim_names to init_device_mesh()."
        )
    large = tuple(n for n in names if device_mesh[n].size() > 1)
    if not large:
        return ParallelMesh(ranks=tuple(device_mesh.mesh.flatten().tolist()))
    mesh = device_mesh if large == names else device_mesh[large]
    ranks = tuple(device_mesh.mesh.flatten().tolist())
    return _wrapped(mesh, ranks, None)


def _on_ranks(
    sizes: Mapping[str, int],
    ranks: tuple[int, ...],
    process_group: ProcessGroup | None,
    adopted: Mapping[str, ProcessGroup],
    device_type: str,
) -> ParallelMesh:
    """Lay the ranks out; take adopted groups where they fit, make the missing."""
    names = tuple(name for name in MESH_DIMS if sizes.get(name, 1) > 1)
    shape = tuple(sizes[name] for name in names)
    layout = torch.tensor(ranks).view(shape)
    if len(names) == 1 and process_group is not None and names[0] not in adopted:
        adopted = {**adopted, names[0]: process_group}
    if not adopted and process_group is None:
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
        return _wrapped(mesh, ranks, None)
    groups = [
        adopted[name] if name in adopted else _new_group(layout, axis)
        for axis, name in enumerate(names)
    ]
    for axis, (name, group) in enumerate(zip(names, groups, strict=True)):
        _check_row(layout, axis, name, group)
    if len(groups) == 1:
        mesh = DeviceMesh.from_group(groups[0], device_type, mesh_dim_names=names)
    else:
        mesh = DeviceMesh.from_group(groups, device_type, mesh=layout, mesh_dim_names=names)
    return _wrapped(mesh, ranks, process_group)


def _wrapped(
    mesh: DeviceMesh, ranks: tuple[int, ...], process_group: ProcessGroup | None
) -> ParallelMesh:
    names = mesh.mesh_dim_names or ()
    everyone = process_group
    if everyone is None:
        whole_world = len(ranks) == dist.get_world_size()
        everyone = (
            dist.group.WORLD
            if whole_world
            else dist.new_group(list(ranks), use_local_synchronization=True)
        )
    if mesh.get_coordinate() is None:
        raise ConfigurationError(f"Rank {dist.get_rank()} is not in the mesh over ranks {ranks}.")
    return ParallelMesh(
        device_mesh=mesh,
        names=names,
        ranks=ranks,
        everyone=everyone,
        simulated=dist.get_backend(everyone) == "fake",
        _groups={name: mesh.get_group(name) for name in names},
        # Groups count their members in the order of global ranks, whatever the mesh's order.
        _places={
            name: {rank: sorted(_row(mesh.mesh, axis, rank)).index(rank) for rank in ranks}
            for axis, name in enumerate(names)
        },
    )


def _row(layout: torch.Tensor, axis: int, rank: int) -> list[int]:
    """The ranks of a rank's line along one axis of the layout."""
    here = (layout == rank).nonzero()
    if len(here) == 0:
        raise ConfigurationError(
            f"Rank {rank} is not among the model's ranks {layout.flatten().tolist()}."
        )
    index: list[int | slice] = here[0].tolist()
    index[axis] = slice(None)
    return layout[tuple(index)].tolist()


def _new_group(layout: torch.Tensor, axis: int) -> ProcessGroup:
    # Only the members meet, so a model on a part of the world makes its groups alone.
    return dist.new_group(_row(layout, axis, dist.get_rank()), use_local_synchronization=True)


def _check_row(layout: torch.Tensor, axis: int, name: str, group: ProcessGroup) -> None:
    due, found = _row(layout, axis, dist.get_rank()), dist.get_process_group_ranks(group)
    if due != found:
        raise ConfigurationError(
            f"The framework's {name} group of rank {dist.get_rank()} is {found}, but in "
            f"({', '.join(MESH_DIMS)}) order it would be {due}. Pass the job's DeviceMesh as "
            "mesh=..."
        )


def _with_adopted_sizes(
    sizes: Mapping[str, int], adopted: Mapping[str, ProcessGroup]
) -> dict[str, int]:
    """Fill sizes that were left at 1 from the adopted groups; refuse a contradiction."""
    filled = dict(sizes)
    for name, group in adopted.items():
        if filled.get(name, 1) == 1:
            filled[name] = group.size()
        elif filled[name] != group.size():
            raise ConfigurationError(
                f"{name} size {filled[name]} was given, but the model is spread over "
                f"{group.size()} ranks along {name}. Leave the size out to read it off the model."
            )
    return filled


def _product(sizes: Mapping[str, int]) -> int:
    product = 1
    for size in sizes.values():
        product *= size
    return product


def _spelled(sizes: Mapping[str, int]) -> str:
    given = [name for name in MESH_DIMS if name != "cp" or sizes.get(name, 1) > 1]
    return " x ".join(f"{name}={sizes.get(name, 1)}" for name in given)


def device_type_of(module: nn.Module) -> str:
    """Where the model's parameters lie, but for offloaded ones; "cpu" for a model without any."""
    devices = (parameter.device.type for parameter in module.parameters())
    return next((device for device in devices if device != "meta"), "cpu")
