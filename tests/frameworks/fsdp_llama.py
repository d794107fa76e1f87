"""The tiny Llama under both generations of fully sharded data parallelism: parameters are cut.

The first generation keeps a unit's parameters as one flat tensor between forwards, which the module
shows either as such or under the parameters' own names. The second keeps DTensors, and is put on
top of tensor parallelism too. Hybrid sharding cuts parameters over some ranks and copies the parts
to others.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from flex_model.testing.case import Case, Model, only
from frameworks import dtensor_llama, tiny_llama
from frameworks.tiny_llama import FEW_SITES, SITES, Block
from frameworks.values import gather_grads


@contextmanager
def first_generation(use_orig_params: bool) -> Iterator[Model]:
    """This rank's part, a unit for each layer and one for the rest."""
    module = FullyShardedDataParallel(
        tiny_llama.filled(),
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        device_id=torch.device("cpu"),
        use_orig_params=use_orig_params,
    )
    grads = _grads_by_name if use_orig_params else _grads_of_flat
    yield _model(module, lambda: grads(module))


@contextmanager
def first_generation_hybrid() -> Iterator[Model]:
    """This rank's part on one of two pairs of ranks, one unit of all."""
    module = FullyShardedDataParallel(
        tiny_llama.filled(),
        sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        device_mesh=_pairs(),
        device_id=torch.device("cpu"),
        use_orig_params=True,
    )
    yield _model(module, lambda: _grads_by_name(module))


@contextmanager
def second_generation(hybrid: bool = False) -> Iterator[Model]:
    """This rank's part, cut layer by layer and the rest."""
    module = tiny_llama.filled()
    _fully_shard(module, mesh=_pairs() if hybrid else None)
    yield _model(module, lambda: gather_grads(module, {}))


@contextmanager
def second_generation_on_tensor_parallel() -> Iterator[Model]:
    """The same on top of tensor parallelism, over a mesh of (dp, tp)."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    module = tiny_llama.filled()
    dtensor_llama.parallelize(module, mesh["tp"], sequence_parallel=False)
    _fully_shard(module, mesh=mesh["dp"])
    yield _model(
        module,
        lambda: dtensor_llama.weight_grads(module, mesh["tp"]),
        mesh.get_local_rank("dp"),
    )


def _pairs() -> DeviceMesh:
    """Parameters are cut over the ranks of a row and copied along a column."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))


def _fully_shard(module: tiny_llama.TinyLlama, mesh: DeviceMesh | None) -> None:
    for layer in module.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)


def _model(
    module: nn.Module,
    weight_grads: Callable[[], Mapping[str, Tensor]],
    dp_rank: int | None = None,
) -> Model:
    return Model(
        module,
        tiny_llama.logits,
        "tok_embeddings",
        weight_grads,
        dp_rank=dist.get_rank() if dp_rank is None else dp_rank,
    )


def _grads_by_name(module: FullyShardedDataParallel) -> dict[str, Tensor]:
    with FullyShardedDataParallel.summon_full_params(module, writeback=False, with_grads=True):
        return {
            name.replace("_fsdp_wrapped_module.", ""): parameter.grad.clone()
            for name, parameter in module.named_parameters()
            if parameter.grad is not None
        }


def _grads_of_flat(module: FullyShardedDataParallel) -> dict[str, Tensor]:
    """Each unit's flat gradient, joined over the ranks and cut at its parameters' ends."""
    grads = {}
    for name, unit in module.named_modules():
        if not isinstance(unit, FullyShardedDataParallel):
            continue
        flat = unit._handle.flat_param
        parts = [torch.empty_like(flat.grad) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, flat.grad)
        lengths = list(flat._numels)
        pieces = torch.cat(parts)[: sum(lengths)].split(lengths)
        prefix = f"{name}.".replace("_fsdp_wrapped_module.", "").lstrip(".")
        for own, shape, piece in zip(flat._fqns, flat._shapes, pieces, strict=True):
            grads[f"{prefix}{own}"] = piece.view(shape)
    return grads


_HYBRID_SITES = only(SITES, "tok_embeddings", "layers.1.attention.wo")

CASES = (
    Case("fsdp1", 1, 2, tiny_llama.whole, partial(first_generation, True), SITES),
    Case("fsdp1 flat", 1, 2, tiny_llama.whole, partial(first_generation, False), FEW_SITES),
    Case("fsdp2", 1, 2, tiny_llama.whole, second_generation, SITES),
    Case("fsdp2 x tp", 2, 2, tiny_llama.whole, second_generation_on_tensor_parallel, FEW_SITES),
    Case("fsdp1 hybrid", 1, 4, tiny_llama.whole, first_generation_hybrid, _HYBRID_SITES),
    Case("fsdp2 hybrid", 1, 4, tiny_llama.whole, partial(second_generation, True), _HYBRID_SITES),
)
