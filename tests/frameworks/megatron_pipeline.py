"""megatron-core's GPT of four layers on the stages of its own pipeline, 1F1B without interleaving.

Each stage counts its layers from zero: ``decoder.layers.0`` of the second one is the whole model's
``decoder.layers.2``. Names here are the whole model's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor, nn

from flex_model.testing.case import Case, Data, Microbatch, Model, Site, only
from frameworks.megatron_cpu import model_parallel
from frameworks.megatron_gpt import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    VOCABULARY,
    Setting,
    build,
    gpt,
    logits,
    model_of,
)

WHOLE = Setting(layers=4)
MICROBATCHES = 4

_site = partial(Site, batch_dim=1)

SITES = (
    _site("embedding", HIDDEN),
    # One value for the whole batch, [sequence, 1, 1, width], on every stage.
    Site("rotary_pos_emb", HEAD_DIM, ndim=4, backward=False, hard="rotary"),
    _site("decoder.layers.0.mlp.linear_fc1", 2 * INNER, HIDDEN),
    # The two sides of the boundary between the stages.
    _site("decoder.layers.1", HIDDEN, HIDDEN, keywords_only=True),
    _site("decoder.layers.2", HIDDEN, HIDDEN, keywords_only=True),
    _site("decoder.layers.2.self_attention.linear_proj", HIDDEN, HEADS * HEAD_DIM),
    _site("decoder.layers.3.mlp.linear_fc2", HIDDEN, INNER),
    _site("decoder.final_layernorm", HIDDEN, HIDDEN),
    _site("output_layer", VOCABULARY, HIDDEN),
)

# One of each kind, where four ranks share the machine.
_FEW = (
    "embedding",
    "rotary_pos_emb",
    "decoder.layers.1",
    "decoder.layers.2",
    "decoder.layers.3.mlp.linear_fc2",
)


@contextmanager
def sharded(setting: Setting) -> Iterator[Model]:
    """This rank's part of its stage."""
    with model_parallel(setting.tp, pp=setting.pp):
        module = gpt(setting)
        yield replace(
            model_of(setting, module, _by_whole_names(module)),
            schedule=partial(_schedule, module),
            pp_group=parallel_state.get_pipeline_model_parallel_group(),
        )


def _by_whole_names(stage: GPTModel) -> nn.Module:
    """The modules of a stage, held by the names that they have in the whole model."""
    named, decoder = _holding(stage), _holding(stage.decoder)
    decoder.layers = nn.ModuleDict({str(x.layer_number - 1): x for x in stage.decoder.layers})
    named.decoder = decoder
    return named


def _holding(module: nn.Module) -> nn.Module:
    holder = nn.Module()
    for name, child in module.named_children():
        holder.add_module(name, child)
    return holder


def _schedule(
    module: GPTModel,
    called: Any,
    microbatches: Sequence[Microbatch],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> list[Tensor]:
    """A step of Megatron's schedule, which is given the model itself and calls what stands for it.

    It divides each loss by the number of microbatches.
    """
    outputs: list[Tensor] = []

    def forward_step(batches: Iterator[Microbatch], model: nn.Module) -> tuple[Tensor, Any]:
        ids, labels = next(batches)
        return logits(called, ids), partial(loss_of, labels)

    def loss_of(labels: Tensor, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        outputs.append(output)
        return loss(output, labels), {}

    batch, sequence = microbatches[0].ids.shape
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(microbatches),
        model=module,
        num_microbatches=len(microbatches),
        seq_length=sequence,
        micro_batch_size=batch,
    )
    return outputs


def _case(name: str, sites: tuple[Site, ...] = SITES, **sharding: Any) -> Case:
    setting = replace(WHOLE, pp=2, **sharding)
    return Case(
        name,
        setting.tp,
        1,
        partial(build, WHOLE),
        partial(sharded, setting),
        sites,
        Data(microbatches=MICROBATCHES),
        pp=setting.pp,
    )


CASES = (
    _case("megatron pp"),
    _case("megatron pp x tp", only(SITES, *_FEW), tp=2),
    _case("megatron pp x sequence", only(SITES, *_FEW), tp=2, sequence_parallel=True),
)
