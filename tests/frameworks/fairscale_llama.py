"""The tiny Llama on fairscale's model-parallel layers.

A projection that every rank holds whole but uses for its own heads is what fairscale has no layer
for: as its users do, the input goes through a copy-to region, so that its gradient is summed, and
the weight's gradient is summed after the backward.
"""

import contextlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import fairscale.nn.model_parallel as mpu
import torch.distributed as dist
from fairscale.nn.model_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from fairscale.nn.model_parallel.mappings import copy_to_model_parallel_region
from torch import Tensor, nn

from flex_model.testing.case import Case, Model
from frameworks import tiny_llama
from frameworks.tiny_llama import CUTS, FEW_SITES, SHARED, SITES, Layers, TinyLlama
from frameworks.values import fill, gather_grads

_LAYERS = Layers(
    column=partial(ColumnParallelLinear, bias=False, gather_output=False),
    row=partial(RowParallelLinear, bias=False, input_is_parallel=True),
    head=partial(ColumnParallelLinear, bias=False, gather_output=True),
    embedding=VocabParallelEmbedding,
    shared=copy_to_model_parallel_region,
)


@contextmanager
def sharded(tp: int) -> Iterator[Model]:
    """This rank's part, over groups that fairscale makes."""
    with contextlib.redirect_stdout(io.StringIO()):
        mpu.initialize_model_parallel(tp)
    try:
        module = TinyLlama(_LAYERS)
        fill(module, CUTS, mpu.get_model_parallel_rank(), tp)
        yield Model(
            module,
            tiny_llama.logits,
            "tok_embeddings",
            lambda: _weight_grads(module),
            dp_rank=mpu.get_data_parallel_rank(),
        )
    finally:
        mpu.destroy_model_parallel()


def _weight_grads(module: nn.Module) -> dict[str, Tensor]:
    group = mpu.get_model_parallel_group()
    for name, parameter in module.named_parameters():
        if name in SHARED and parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=group)
    return gather_grads(module, CUTS, group, mpu.get_data_parallel_group())


CASES = (
    Case("fairscale", 2, 1, tiny_llama.whole, partial(sharded, 2), SITES),
    Case("fairscale tp x dp", 2, 2, tiny_llama.whole, partial(sharded, 2), FEW_SITES),
)
