"""megatron-core's GPT with a mixture of experts in each layer, the experts shared out over ranks.

Expert ranks are cut out of the data-parallel ones: each takes its own part of the batch and holds
its own experts. Inside a MoE layer tokens go to the ranks of the experts that they chose, and come
back. On either side of it every rank sees its own tokens, in their own order.

Between the experts' weights it does not. A rank counts its experts from zero, so that
``local_experts.0`` is another one on each; and an expert's tokens lie in the order of ranks first,
positions next, where one process has positions first. The whole model is the same one on one rank.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from flex_model.testing.case import Case, Model, Site, only
from frameworks.megatron_cpu import model_parallel
from frameworks.megatron_gpt import HEAD_DIM, HEADS, HIDDEN, INNER, VOCABULARY, logits
from frameworks.values import value_of

LAYERS = 2
EXPERTS = 4
CHOSEN = 2

_EXPERT = re.compile(r"(?<=\.local_experts\.)\d+(?=\.)")


def _config(ep: int, dispatcher: str) -> TransformerConfig:
    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        kv_channels=HEAD_DIM,
        ffn_hidden_size=INNER,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_moe_experts=EXPERTS,
        moe_router_topk=CHOSEN,
        # A loss of the router's own would be one of each rank's part of the batch.
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type=dispatcher,
        expert_model_parallel_size=ep,
        # The local experts add their biases in place, which autograd refuses.
        add_bias_linear=False,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
    )


def _gpt(ep: int, dispatcher: str, idle: bool) -> GPTModel:
    module = GPTModel(
        config=_config(ep, dispatcher),
        transformer_layer_spec=get_gpt_layer_local_spec(num_experts=EXPERTS),
        vocab_size=VOCABULARY,
        max_sequence_length=16,
        parallel_output=False,
        position_embedding_type="rope",
    )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(value_of(_whole_name(name), tuple(parameter.shape)))
        if idle:
            _choose_the_first(module)
    return module


def _choose_the_first(module: GPTModel) -> None:
    """Have every token choose the first experts, so that the ranks of the others get none.

    All tokens get a common part, to which only those experts' gates answer.
    """
    for layer in module.decoder.layers:
        layer.pre_mlp_layernorm.bias += 0.5
        layer.mlp.router.weight[:CHOSEN] += 0.25
        layer.mlp.router.weight[CHOSEN:] -= 0.25


def _whole_name(name: str, ep_rank: int | None = None) -> str:
    """The name that a parameter has where one rank holds all experts."""
    if ep_rank is None:
        ep_rank = parallel_state.get_expert_model_parallel_rank()
    first = ep_rank * (EXPERTS // parallel_state.get_expert_model_parallel_world_size())
    return _EXPERT.sub(lambda found: str(first + int(found.group())), name)


@contextmanager
def build(ep: int, dispatcher: str = "allgather", idle: bool = False) -> Iterator[Model]:
    """This rank's part; the whole model where ``ep`` is 1 and so is the number of ranks."""
    with model_parallel(1, ep):
        module = _gpt(ep, dispatcher, idle)
        yield Model(
            module,
            logits,
            "embedding",
            lambda: _weight_grads(module),
            dp_rank=parallel_state.get_data_parallel_rank(),
            embedding_batch_dim=1,
        )


def _weight_grads(module: nn.Module) -> dict[str, Tensor]:
    """Those of the ranks' mean loss. An expert's hold the terms of all ranks it got tokens from."""
    grads: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            continue
        if _EXPERT.search(name):
            grads |= _of_all_experts(name, parameter.grad)
        else:
            grads[name] = _sum(parameter.grad, parallel_state.get_data_parallel_group())
    replicas = parallel_state.get_data_parallel_world_size()
    return {name: grad / replicas for name, grad in grads.items()}


def _of_all_experts(name: str, grad: Tensor) -> dict[str, Tensor]:
    """The gradients that the expert ranks have under one name, each under its whole name."""
    grad = _sum(grad, parallel_state.get_expert_data_parallel_group())
    group = parallel_state.get_expert_model_parallel_group()
    parts = [torch.empty_like(grad) for _ in range(group.size())]
    dist.all_gather(parts, grad, group=group)
    return {_whole_name(name, rank): part for rank, part in enumerate(parts)}


def _sum(grad: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = grad.detach().clone()
    dist.all_reduce(total, group=group)
    return total


_site = partial(Site, batch_dim=1)

SITES = (
    _site("embedding", HIDDEN),
    _site("decoder.layers.0.self_attention", HIDDEN, HIDDEN),
    _site("decoder.layers.0.pre_mlp_layernorm", HIDDEN, HIDDEN),
    _site("decoder.layers.0.mlp", HIDDEN, HIDDEN),
    # The probabilities come out as [tokens, experts], the positions of a sequence outermost.
    Site("decoder.layers.0.mlp.router", EXPERTS, HIDDEN, ndim=2, input_ndim=3, hard="router"),
    _site("decoder.layers.1", HIDDEN, HIDDEN, keywords_only=True),
    _site("output_layer", VOCABULARY, HIDDEN),
)

_FEW = only(
    SITES,
    "decoder.layers.0.mlp",
    "decoder.layers.0.mlp.router",
    "decoder.layers.1",
)

# Hook points between the experts' weights, in no order that one process has.
INSIDE = (
    "decoder.layers.0.mlp.experts",
    "decoder.layers.0.mlp.experts.local_experts.0",
    "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1",
    "decoder.layers.0.mlp.experts.local_experts.1.linear_fc2",
)


def _case(
    name: str,
    dispatcher: str = "allgather",
    dp: int = 2,
    idle: bool = False,
    sites: tuple[Site, ...] = _FEW,
) -> Case:
    whole = partial(build, 1, idle=idle)
    return Case(name, 1, dp, whole, partial(build, 2, dispatcher, idle), sites)


CASES = (
    _case("megatron moe", sites=SITES),
    _case("megatron moe alltoall", "alltoall"),
    _case("megatron moe idle", idle=True),
    _case("megatron moe ep x dp", dp=4),
)
