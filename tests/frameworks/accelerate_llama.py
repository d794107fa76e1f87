"""The tiny Llama as accelerate hands it out: prepared for several ranks, or spread over devices.

On several CPU ranks ``Accelerator.prepare`` always means DistributedDataParallel. A device map
replaces the modules' forwards by ones that fetch a module's weights before it runs and drop them
after, so between forwards these weights are on no device; and what is fetched anew each time keeps
no gradient.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist
from accelerate import Accelerator, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.optim import SGD

from flex_model.testing.case import Case, Model
from frameworks import ddp_llama, tiny_llama
from frameworks.tiny_llama import FEW_SITES, SITES
from frameworks.values import gather_grads

# What is on disk is fetched to the CPU, where the rest stays.
_DEVICE_MAP = {
    "tok_embeddings": "disk",
    "rotary": "cpu",
    "layers.0": "cpu",
    "layers.1": "disk",
    "norm": "disk",
    "output": "cpu",
}


@contextmanager
def prepared() -> Iterator[Model]:
    """One replica of it, with an optimizer that is prepared beside it."""
    try:
        accelerator = Accelerator(cpu=True)
        module = tiny_llama.filled()
        wrapped, _ = accelerator.prepare(module, SGD(module.parameters(), lr=0.1))
        yield ddp_llama.model_on(wrapped, accelerator.process_index)
    finally:  # accelerate's states are shared by all of a process
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


@contextmanager
def whole_on_devices() -> Iterator[Model]:
    """The one-process model, of which only the gradients that a device map keeps are compared."""
    module = tiny_llama.filled()
    yield _model(module, lambda: _kept(gather_grads(module, {})))


@contextmanager
def on_devices() -> Iterator[Model]:
    """One replica of it, a part of it on disk."""
    module = tiny_llama.filled()
    with tempfile.TemporaryDirectory() as folder:
        dispatch_model(module, _DEVICE_MAP, offload_dir=folder)
        try:
            group = dist.group.WORLD
            yield _model(module, lambda: gather_grads(module, {}, dp_group=group), dist.get_rank())
        finally:
            remove_hook_from_submodules(module)


def _model(
    module: nn.Module, weight_grads: Callable[[], Mapping[str, Tensor]], dp_rank: int = 0
) -> Model:
    return Model(module, tiny_llama.logits, "tok_embeddings", weight_grads, dp_rank=dp_rank)


def _kept(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    on_disk = tuple(name for name, device in _DEVICE_MAP.items() if device == "disk")
    return {name: grad for name, grad in grads.items() if not name.startswith(on_disk)}


CASES = (
    Case("accelerate prepare", 1, 2, tiny_llama.whole, prepared, SITES),
    Case("accelerate device map", 1, 1, whole_on_devices, on_devices, SITES),
    Case("accelerate device map x dp", 1, 2, whole_on_devices, on_devices, FEW_SITES),
)
