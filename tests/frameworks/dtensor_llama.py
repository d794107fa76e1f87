"""The tiny Llama sharded by torch's ``parallelize_module``.

Three ways: hooks registered after it, which see plain tensors; hooks registered before it, which
see DTensors, some of them unreduced; and with the stream between the layers cut along the sequence.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from flex_model.testing.case import Case, Model
from frameworks import tiny_llama
from frameworks.tiny_llama import FEW_SITES, KV_HEADS, SHARED, SITES, TinyLlama
from frameworks.values import gather_grads


@contextmanager
def sharded(
    tp: int, dp: int, *, hooks_first: bool = False, sequence_parallel: bool = False
) -> Iterator[Model]:
    """This rank's part, over a mesh of (dp, tp)."""
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    module = tiny_llama.filled()
    shard = partial(parallelize, module, mesh["tp"], sequence_parallel)
    if not hooks_first:
        shard()
    tp_rank = mesh.get_local_rank("tp")
    yield Model(
        module,
        tiny_llama.logits,
        "tok_embeddings",
        lambda: weight_grads(module, mesh["tp"], mesh["dp"]),
        dp_rank=mesh.get_local_rank("dp"),
        embedding_part=lambda x: x.chunk(tp, 1)[tp_rank] if sequence_parallel else x,
        parallelize=shard if hooks_first else None,
    )


def parallelize(module: TinyLlama, mesh: DeviceMesh, sequence_parallel: bool = False) -> None:
    """Shard a whole model over the tensor-parallel mesh."""
    parallelize_module(module, mesh, _plan(sequence_parallel))
    for layer, kv_heads in zip(module.layers, KV_HEADS, strict=True):
        if kv_heads == 1:
            layer.attention.shared = partial(_sum_gradients, mesh=mesh)


def _sum_gradients(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The same value, whose gradients on the ranks are terms of a sum."""
    whole = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    return whole.to_local(grad_placements=[Partial()])


def _plan(sequence_parallel: bool) -> dict[str, ParallelStyle]:
    stream = Shard(1) if sequence_parallel else Replicate()
    plan: dict[str, ParallelStyle] = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=stream),
        "output": ColwiseParallel(input_layouts=stream, output_layouts=Replicate()),
    }
    if sequence_parallel:
        plan["norm"] = SequenceParallel()
    for layer, kv_heads in enumerate(KV_HEADS):
        styles = _layer_plan(stream, kv_heads)
        plan |= {f"layers.{layer}.{name}": style for name, style in styles.items()}
    return plan


def _layer_plan(stream: Replicate | Shard, kv_heads: int) -> dict[str, ParallelStyle]:
    columns = ["attention.wq", "feed_forward.w1", "feed_forward.w3"]
    if kv_heads > 1:
        columns += ["attention.wk", "attention.wv"]
    plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in columns}
    for name in ("attention.wo", "feed_forward.w2"):
        plan[name] = RowwiseParallel(output_layouts=stream)
    if isinstance(stream, Shard):
        plan["attention_norm"] = plan["ffn_norm"] = SequenceParallel()
        plan["attention"] = _whole_input(3)
        plan["feed_forward"] = _whole_input(1)
    return plan


def _whole_input(inputs: int) -> ParallelStyle:
    others = (None,) * (inputs - 1)
    return PrepareModuleInput(
        input_layouts=(Shard(1), *others),
        desired_input_layouts=(Replicate(), *others),
        use_local_output=True,
    )


def weight_grads(
    module: nn.Module, tp: DeviceMesh, dp: DeviceMesh | None = None
) -> dict[str, Tensor]:
    """Whole gradients by name; their mean over the data-parallel mesh, if nothing else takes it."""
    for name, parameter in module.named_parameters():
        if name in SHARED and parameter.grad is not None:
            grad = parameter.grad
            local = grad.to_local() if isinstance(grad, DTensor) else grad
            dist.all_reduce(local, group=tp.get_group())
    return gather_grads(module, {}, dp_group=dp.get_group() if dp else None)


def _case(name: str, dp: int = 1, **options: bool) -> Case:
    sites = SITES if dp == 1 else FEW_SITES
    return Case(name, 2, dp, tiny_llama.whole, partial(sharded, 2, dp, **options), sites)


CASES = (
    _case("dtensor"),
    _case("dtensor hooked first", hooks_first=True),
    _case("dtensor sequence", sequence_parallel=True),
    _case("dtensor tp x dp", dp=2),
)
