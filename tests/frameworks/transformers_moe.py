"""A transformers Mixtral, loaded with its experts shared out over data-parallel ranks.

Expert ranks are cut out of the data-parallel times the tensor-parallel ones. Each data-parallel
rank takes its own part of the batch. Inside ``experts`` its tokens go to the ranks of the experts
that they chose, and come back: every module but the activation function between the experts'
weights sees a rank's own tokens, in their own order. The other parameters are cut by FSDP2.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from flex_model.testing.case import Case, Model, Site, only
from frameworks.values import fill, gather_grads

HIDDEN = 24
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 8
INNER = 40
VOCABULARY = 34
EXPERTS = 4
CHOSEN = 2

logging.set_verbosity_error()
logging.disable_progress_bar()


def _filled(idle: bool) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        attn_implementation="eager",
        experts_implementation="eager",
        use_cache=False,
    )
    module = MixtralForCausalLM(config)
    fill(module, {})
    if idle:
        _choose_the_first(module)
    return module


def _choose_the_first(module: MixtralForCausalLM) -> None:
    """Have every token choose the first experts, so that the ranks of the others get none.

    All tokens get a common part, to which only those experts' gates answer.
    """
    with torch.no_grad():
        module.model.embed_tokens.weight += 0.3
        for layer in module.model.layers:
            layer.mlp.gate.weight[:CHOSEN] += 0.2
            layer.mlp.gate.weight[CHOSEN:] -= 0.2


def _logits(module: nn.Module, ids: Tensor) -> Tensor:
    return module(input_ids=ids).logits


@contextmanager
def whole(idle: bool = False) -> Iterator[Model]:
    """The one-process model."""
    module = _filled(idle)
    yield Model(module, _logits, "model.embed_tokens", lambda: gather_grads(module, {}))


@contextmanager
def sharded(dp: int, ep: int, idle: bool = False, tp: int = 1) -> Iterator[Model]:
    """This rank's part: its experts, and a part of all other parameters."""
    with _saved(idle) as folder:
        module = MixtralForCausalLM.from_pretrained(
            folder,
            distributed_config=DistributedConfig(tp_size=tp, fsdp_size=dp, ep_size=ep),
            attn_implementation="eager",
            experts_implementation="eager",
        )
    yield Model(
        module,
        _logits,
        "model.embed_tokens",
        lambda: gather_grads(module, {}),
        dp_rank=dist.get_rank() // tp,
    )


@contextmanager
def _saved(idle: bool) -> Iterator[Path]:
    """A folder with the whole model, for as long as any rank reads it."""
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared, src=0)
        _filled(idle).save_pretrained(shared[0])  # transformers writes on the first rank only
        dist.barrier()
        yield Path(shared[0])
        dist.barrier()


SITES = (
    Site("model.embed_tokens", HIDDEN),
    Site("model.layers.0.self_attn", HIDDEN, HIDDEN, keywords_only=True),
    Site("model.layers.0.post_attention_layernorm", HIDDEN, HIDDEN),
    Site("model.layers.0.mlp", HIDDEN, HIDDEN),
    # Tokens are flat here, [tokens, width]. Only the second thing that the gate returns is used, so
    # in its backward there is but one gradient, and none with the index of either.
    Site("model.layers.0.mlp.gate", EXPERTS, HIDDEN, ndim=2, backward=False, hard="router"),
    Site("model.layers.0.mlp.gate", CHOSEN, index=1, ndim=2, backward=False, hard="router"),
    Site("model.layers.0.mlp.experts", HIDDEN, HIDDEN, ndim=2),
    Site("model.layers.1", HIDDEN, HIDDEN),
    Site("lm_head", VOCABULARY, HIDDEN),
)

_FEW = only(
    SITES,
    "model.layers.0.mlp.gate[1]",
    "model.layers.0.mlp.experts",
    "model.layers.1",
)

# Called for a rank's own experts with whatever tokens came: in no order that one process has, and
# not as often on each rank.
INSIDE = ("model.layers.0.mlp.experts.act_fn",)


def _case(
    name: str, dp: int = 2, tp: int = 1, idle: bool = False, sites: tuple[Site, ...] = _FEW
) -> Case:
    build = partial(sharded, dp, 2, idle, tp)
    return Case(name, tp, dp, partial(whole, idle), build, sites)


CASES = (
    _case("transformers moe", sites=SITES),
    _case("transformers moe idle", idle=True),
    _case("transformers moe ep x fsdp", dp=4),
    _case("transformers moe tp x fsdp", tp=2),
)
