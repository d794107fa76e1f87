"""The tiny Llama under DistributedDataParallel: the batch cut, the model whole on every rank.

Or cut by tensor parallelism below it: given a mesh, DistributedDataParallel keeps the shards as
plain parameters and makes DTensors of them in the first forward, since when the module does not
name them any more. So gradients are read off the parameters as they were named before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from flex_model.testing.case import Case, Model
from frameworks import dtensor_llama, tiny_llama
from frameworks.tiny_llama import FEW_SITES, SHARED, SITES
from frameworks.values import gather_grads


@contextmanager
def sharded() -> Iterator[Model]:
    """One replica of it; its gradients are averaged by the time backward returns."""
    yield model_on(DistributedDataParallel(tiny_llama.filled()), dist.get_rank())


@contextmanager
def sharded_twice() -> Iterator[Model]:
    """This rank's part of a replica, over a mesh of (dp, tp)."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    inner = tiny_llama.filled()
    dtensor_llama.parallelize(inner, mesh["tp"])
    module = DistributedDataParallel(inner, device_mesh=mesh["dp"])
    parameters = dict(module.named_parameters())
    model = model_on(module, mesh.get_local_rank("dp"))
    yield replace(model, weight_grads=partial(_taken_grads, parameters, mesh["tp"]))


def model_on(module: nn.Module, rank: int = 0) -> Model:
    """What the grid needs to know of it on a rank."""
    return Model(
        module,
        tiny_llama.logits,
        "module.tok_embeddings",
        lambda: _plain(gather_grads(module, {})),
        dp_rank=rank,
    )


def _taken_grads(parameters: dict[str, nn.Parameter], tp: DeviceMesh) -> dict[str, Tensor]:
    """Whole gradients by name. They are taken off: the module's own zero_grad() misses them."""
    grads = {}
    for name, parameter in parameters.items():
        grad, parameter.grad = parameter.grad, None
        if name.removeprefix("module.") in SHARED:
            dist.all_reduce(grad, group=tp.get_group())
        if hasattr(parameter, "_st_info"):
            placements = parameter._st_info.placements
            grad = DTensor.from_local(grad, tp, placements).full_tensor()
        grads[name] = grad
    return _plain(grads)


def _plain(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """By their names in the model that is wrapped."""
    return {name.removeprefix("module."): grad for name, grad in grads.items()}


CASES = (
    Case("ddp", 1, 2, tiny_llama.whole, sharded, SITES),
    Case("ddp x tp", 2, 2, tiny_llama.whole, sharded_twice, FEW_SITES),
)
