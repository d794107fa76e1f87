"""megatron-core's GPT: gated, grouped queries, rotary positions, biases; ``[sequence, batch, h]``.

The whole model is the same one at a tensor-parallel size of 1. Under sequence parallelism the
stream between the layers is cut along the sequence; Megatron's local norm refuses that, so a torch
LayerNorm with the mark that Megatron's gradient reduction looks for takes its place.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from flex_model.testing.case import Case, Model, Site, only
from frameworks.megatron_cpu import model_parallel
from frameworks.values import Cut, fill, gather_grads

HIDDEN = 24
HEADS = 4
HEAD_DIM = 8
INNER = 40
VOCABULARY = 34

CUTS = {"embedding.word_embeddings.weight": Cut(0), "output_layer.weight": Cut(0)}
for _layer in range(4):  # of the deepest model built here
    _name = f"decoder.layers.{_layer}"
    for _kind in ("weight", "bias"):
        CUTS[f"{_name}.self_attention.linear_qkv.{_kind}"] = Cut(0)
        CUTS[f"{_name}.mlp.linear_fc1.{_kind}"] = Cut(0, segments=2)
    CUTS[f"{_name}.self_attention.linear_proj.weight"] = Cut(1)
    CUTS[f"{_name}.mlp.linear_fc2.weight"] = Cut(1)


class MarkedNorm(nn.LayerNorm):
    """A LayerNorm whose gradients Megatron is to sum over ranks that hold parts of the sequence."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


@dataclass(frozen=True)
class Setting:
    """How large a model is, and how it is sharded."""

    kv_heads: int = 2
    layers: int = 2
    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False


def _config(setting: Setting) -> TransformerConfig:
    return TransformerConfig(
        num_layers=setting.layers,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        kv_channels=HEAD_DIM,
        num_query_groups=setting.kv_heads,
        ffn_hidden_size=INNER,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=setting.tp,
        sequence_parallel=setting.sequence_parallel,
        pipeline_model_parallel_size=setting.pp,
        pipeline_dtype=torch.float32,
        # As Megatron trains: what a stage has sent on loses its data, whoever still looks at it.
        deallocate_pipeline_outputs=True,
        batch_p2p_sync=False,  # waits for a CUDA device
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
    )


def gpt(setting: Setting) -> GPTModel:
    """This rank's part, with Megatron's own values."""
    spec = get_gpt_layer_local_spec()
    if setting.sequence_parallel:
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = MarkedNorm
        specs = [spec] * (setting.layers // setting.pp)
        spec = TransformerBlockSubmodules(layer_specs=specs, layer_norm=MarkedNorm)
    return GPTModel(
        config=_config(setting),
        transformer_layer_spec=spec,
        vocab_size=VOCABULARY,
        max_sequence_length=16,
        parallel_output=False,
        position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def logits(module: Any, ids: Tensor) -> Tensor:
    """Logits, ``[batch, sequence, vocabulary]``; on an earlier stage of a pipeline, its output."""
    batch, sequence = ids.shape
    positions = torch.arange(sequence).expand(batch, sequence)
    hidden = torch.ones(1, 1, sequence, sequence, dtype=torch.bool).triu(1)
    return module(ids, positions, hidden)


@contextmanager
def build(setting: Setting) -> Iterator[Model]:
    """This rank's part; the whole model where nothing shards it."""
    with model_parallel(setting.tp):
        module = gpt(setting)
        yield model_of(setting, module, module)


def model_of(setting: Setting, module: GPTModel, named: nn.Module) -> Model:
    """What the grid needs to know of it, once its parameters have their values.

    Args:
        setting: what it was built from.
        module: what is called.
        named: holds the same modules by the names that they have in the whole model.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    fill(named, CUTS, rank, setting.tp)
    return Model(
        module,
        logits,
        "embedding",
        lambda: _weight_grads(named),
        dp_rank=parallel_state.get_data_parallel_rank(),
        embedding_batch_dim=1,
        embedding_part=lambda x: x.chunk(setting.tp, 0)[rank] if setting.sequence_parallel else x,
    )


def _weight_grads(named: nn.Module) -> dict[str, Tensor]:
    tp_group = parallel_state.get_tensor_model_parallel_group()
    for parameter in named.parameters():
        if getattr(parameter, "sequence_parallel", False) and parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=tp_group)
    return gather_grads(named, CUTS, tp_group, parallel_state.get_data_parallel_group())


def _sites(kv_heads: int, sequence_parallel: bool) -> tuple[Site, ...]:
    site = partial(Site, batch_dim=1)
    mixed = (HEADS + 2 * kv_heads) * HEAD_DIM
    sites = (
        site("embedding", HIDDEN),
        # One value for the whole batch, [sequence, 1, 1, width]: rolled along the sequence.
        Site("rotary_pos_emb", HEAD_DIM, ndim=4, backward=False, hard="rotary"),
        site("decoder.layers.0", HIDDEN, HIDDEN, keywords_only=True),
        site("decoder.layers.0.self_attention", HIDDEN, HIDDEN),
        site(
            "decoder.layers.1.self_attention.linear_qkv",
            mixed,
            HIDDEN,
            hard="kv heads < ranks" if kv_heads == 1 else "",
        ),
        site(
            "decoder.layers.0.self_attention.core_attention",
            HEADS * HEAD_DIM,
            HEAD_DIM,
            input_ndim=4,
            hard="between shards",
        ),
        site("decoder.layers.0.self_attention.linear_proj", HIDDEN, HEADS * HEAD_DIM),
        site("decoder.layers.1.input_layernorm", HIDDEN, HIDDEN),
        site("decoder.layers.0.mlp.linear_fc1", 2 * INNER, HIDDEN),
        site("decoder.layers.1.mlp.linear_fc2", HIDDEN, INNER),
        site("output_layer", VOCABULARY, HIDDEN),
    )
    if sequence_parallel:  # the embedding below then returns another order of dims
        return sites
    return (Site("embedding.word_embeddings", HIDDEN), *sites)


# One of each kind, where four ranks share the machine.
_FEW = (
    "embedding.word_embeddings",
    "rotary_pos_emb",
    "decoder.layers.0",
    "decoder.layers.0.self_attention.core_attention",
    "decoder.layers.0.mlp.linear_fc1",
    "decoder.layers.1.mlp.linear_fc2",
)


def _case(name: str, kv_heads: int = 2, dp: int = 1, sequence_parallel: bool = False) -> Case:
    sites = _sites(kv_heads, sequence_parallel)
    return Case(
        name,
        2,
        dp,
        partial(build, Setting(kv_heads)),
        partial(build, Setting(kv_heads, tp=2, sequence_parallel=sequence_parallel)),
        sites if dp == 1 else only(sites, *_FEW),
    )


CASES = (
    _case("megatron"),
    _case("megatron 1 kv head", kv_heads=1),
    _case("megatron sequence", sequence_parallel=True),
    _case("megatron tp x dp", dp=2),
)
