"""A transformers Llama, saved once whole and loaded sharded by its ``tp_plan``.

With fewer key-value heads than ranks the stock plan cannot cut k_proj and v_proj. They are loaded
whole on every rank, in the style that sums their weights' gradients; what that style leaves open is
completed here: the input's gradient is summed too, and a rank's query heads share the one head.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from flex_model.testing.case import Case, Model, Site, only
from frameworks.values import fill, gather_grads

HIDDEN = 24
HEADS = 4
HEAD_DIM = 8
INNER = 40
VOCABULARY = 34

logging.set_verbosity_error()
logging.disable_progress_bar()


def _filled(kv_heads: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        attn_implementation="eager",
        use_cache=False,
    )
    module = LlamaForCausalLM(config)
    fill(module, {})
    return module


def _logits(module: nn.Module, ids: Tensor) -> Tensor:
    return module(input_ids=ids).logits


@contextmanager
def whole(kv_heads: int) -> Iterator[Model]:
    """The one-process model."""
    module = _filled(kv_heads)
    yield Model(module, _logits, "model.embed_tokens", lambda: gather_grads(module, {}))


@contextmanager
def sharded(kv_heads: int, tp: int, dp: int) -> Iterator[Model]:
    """This rank's part; over data-parallel ranks the parameters are cut too, by FSDP2."""
    with _saved(kv_heads) as folder:
        module = _loaded(folder, kv_heads, tp, dp)
    yield Model(
        module,
        _logits,
        "model.embed_tokens",
        lambda: gather_grads(module, {}),
        dp_rank=dist.get_rank() // tp,
    )


@contextmanager
def _saved(kv_heads: int) -> Iterator[Path]:
    """A folder with the whole model, for as long as any rank reads it."""
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared, src=0)
        _filled(kv_heads).save_pretrained(shared[0])  # transformers writes on the first rank only
        dist.barrier()
        yield Path(shared[0])
        dist.barrier()


def _loaded(folder: Path, kv_heads: int, tp: int, dp: int) -> nn.Module:
    plan: str | dict[str, str] = "auto"
    if kv_heads < tp:
        style = "replicated_with_grad_allreduce"
        plan = {f"model.layers.*.self_attn.{name}": style for name in ("k_proj", "v_proj")}
    module = LlamaForCausalLM.from_pretrained(
        folder,
        distributed_config=DistributedConfig(tp_plan=plan, tp_size=tp, fsdp_size=dp),
        attn_implementation="eager",
    )
    if kv_heads < tp:
        for layer in module.model.layers:
            _share_kv_heads(layer.self_attn, HEADS // tp // kv_heads, module._device_mesh)
    return module


def _share_kv_heads(attention: nn.Module, groups: int, mesh: DeviceMesh) -> None:
    attention.num_key_value_groups = groups
    for projection in (attention.k_proj, attention.v_proj):
        projection.register_forward_pre_hook(partial(_sum_gradients, mesh=mesh["tp"]))


def _sum_gradients(module: nn.Module, args: tuple[Tensor], mesh: DeviceMesh) -> Tensor:
    whole = DTensor.from_local(args[0], mesh, [Replicate()], run_check=False)
    return whole.to_local(grad_placements=[Partial()])


def _sites(kv_heads: int) -> tuple[Site, ...]:
    return (
        Site("model.embed_tokens", HIDDEN),
        Site("model.rotary_emb", HEAD_DIM, HIDDEN, backward=False, hard="rotary"),
        Site("model.rotary_emb", HEAD_DIM, index=1, backward=False, hard="rotary"),
        Site("model.layers.0", HIDDEN, HIDDEN),
        # transformers calls it with keywords only: torch's backward hooks see no input of it.
        Site("model.layers.0.self_attn", HIDDEN, HIDDEN, keywords_only=True),
        Site(
            "model.layers.1.self_attn.k_proj",
            kv_heads * HEAD_DIM,
            HIDDEN,
            hard="kv heads < ranks" if kv_heads == 1 else "",
        ),
        Site("model.layers.1.self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM),
        Site("model.layers.1.input_layernorm", HIDDEN, HIDDEN),
        Site("model.layers.0.mlp.up_proj", INNER, HIDDEN),
        Site("model.layers.1.mlp.act_fn", INNER, INNER, hard="between shards"),
        Site("lm_head", VOCABULARY, HIDDEN),
    )


# One of each kind, where four ranks share the machine.
_FEW = (
    "model.embed_tokens",
    "model.rotary_emb",
    "model.layers.0.self_attn",
    "model.layers.1.self_attn.o_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.1.mlp.act_fn",
)


def _case(name: str, kv_heads: int = 2, dp: int = 1) -> Case:
    build = partial(sharded, kv_heads, 2, dp)
    sites = _sites(kv_heads) if dp == 1 else only(_sites(kv_heads), *_FEW)
    return Case(name, 2, dp, partial(whole, kv_heads), build, sites)


CASES = (
    _case("transformers"),
    _case("transformers 1 kv head", kv_heads=1),
    _case("transformers tp x fsdp", dp=2),
)
