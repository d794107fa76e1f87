"""What a pruned model computes, against the original with the same parts silenced or sliced."""

from typing import Any

import pytest
import torch
from pruned_models import (
    CHOSEN,
    EXPERT_INNER,
    EXPERTS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KINDS,
    KV_HEADS,
    LAYERS,
    MIXTURES,
    SHARED_INNER,
    build,
    highest,
    ids,
    logits,
    targets,
)
from torch import Tensor, nn

from flex_model.pruning import Target, prune, random_scores
from flex_model.testing.compare import relative_error

EXACT = 1e-5


def _silence_channels(module: nn.Module, cut: list[int], inner: int) -> None:
    """Let an MLP's channels be zero: those of up, which every gate multiplies."""
    if hasattr(module, "gate_up_proj"):
        module.gate_up_proj.weight[[inner + channel for channel in cut]] = 0
        return
    module.up_proj.weight[cut] = 0
    if module.up_proj.bias is not None:
        module.up_proj.bias[cut] = 0


def _cut(scores: Tensor, left: int) -> list[int]:
    kept = highest(scores, left)
    return [index for index in range(len(scores)) if index not in kept]


@torch.no_grad()
def _silence_ffn(model: Any, scores: dict[str, Tensor]) -> None:
    for number, layer in enumerate(model.model.layers):
        name, mlp = f"model.layers.{number}.mlp", layer.mlp
        if hasattr(mlp, "experts"):
            inner = mlp.experts.down_proj.shape[-1]
            for expert, own in enumerate(scores[f"{name}.experts.down_proj"]):
                cut = [inner + channel for channel in _cut(own, inner // 2)]
                mlp.experts.gate_up_proj[expert, cut] = 0
        else:
            _silence_channels(mlp, _cut(scores[f"{name}.down_proj"], INNER // 2), INNER)
        if hasattr(mlp, "shared_expert"):
            own = scores[f"{name}.shared_expert.down_proj"]
            _silence_channels(mlp.shared_expert, _cut(own, SHARED_INNER // 2), SHARED_INNER)


@pytest.mark.parametrize("kind", KINDS)
def test_without_channels_as_with_their_zeros(kind: str) -> None:
    """Catches a gate, up, down or bias that is cut elsewhere than the others."""
    model, original = build(kind), build(kind)
    scores = random_scores(model, 1)
    plan = prune(model, scores, ffn=Target(ratio=0.5))
    _silence_ffn(original, scores)
    assert relative_error(logits(model), logits(original)) <= EXACT
    assert sum(p.numel() for p in model.parameters()) == plan.parameters_after
    assert sum(p.numel() for p in original.parameters()) == plan.parameters_before


@pytest.mark.parametrize("kind", KINDS)
def test_without_kv_heads_as_with_their_outputs_silenced(kind: str) -> None:
    """Catches query heads that are left to another key, and fused projections cut wrongly."""
    model, original = build(kind), build(kind)
    scores = random_scores(model, 2)
    prune(model, scores, kv_heads=Target(size=3))
    width = HEADS // KV_HEADS * HEAD_DIM
    with torch.no_grad():
        for number, layer in enumerate(original.model.layers):
            for head in _cut(scores[f"model.layers.{number}.self_attn.o_proj"], 3):
                layer.self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0
    assert relative_error(logits(model), logits(original)) <= EXACT
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (6, 3)


def _by_hand(original: Any, changed: dict[str, Any], weights: dict[str, Tensor]) -> Any:
    """A model made of a config and of given weights, by transformers alone."""
    config = type(original.config)(**{**original.config.to_dict(), **changed})
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = type(original)(config)
    model.load_state_dict(weights, strict=True)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_narrower_model_is_the_one_made_by_hand(kind: str) -> None:
    """Catches an embedding, norm, bias, router or projection that keeps other features: every dim
    that has the hidden size's length is sliced, whatever its name.
    """
    model, original = build(kind), build(kind)
    scores = random_scores(model, 3)
    kept = torch.tensor(highest(scores["hidden"], 16))

    def sliced(value: Tensor) -> Tensor:
        for dim in range(value.ndim):
            if value.shape[dim] == HIDDEN:
                value = value.index_select(dim, kept)
        return value

    prune(model, scores, hidden=Target(size=16))
    weights = {name: sliced(value) for name, value in original.state_dict().items()}
    by_hand = _by_hand(original, {"hidden_size": 16, "head_dim": HEAD_DIM}, weights)
    assert relative_error(logits(model), logits(by_hand)) <= EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_layers_are_the_model_made_by_hand(kind: str) -> None:
    """Catches layers that keep their old number (their cache), or another layer's kind."""
    model, original = build(kind), build(kind)
    scores = {"layers": torch.tensor([0.3, 0.1, 0.2])}
    prune(model, scores, layers=Target(size=2))
    weights = {
        name.replace(".layers.2.", ".layers.1."): value
        for name, value in original.state_dict().items()
        if ".layers.1." not in name
    }
    changed: dict[str, Any] = {"num_hidden_layers": 2}
    if getattr(original.config, "layer_types", None) is not None:
        types = original.config.layer_types
        changed["layer_types"] = [types[0], types[2]]
    if hasattr(original.config, "mlp_only_layers"):
        changed["mlp_only_layers"] = []  # layer 1 had no experts
    by_hand = _by_hand(original, changed, weights)
    assert relative_error(logits(model), logits(by_hand)) <= EXACT
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    tokens, due = (
        m.generate(ids(), max_new_tokens=4, do_sample=False, pad_token_id=0)
        for m in (model, by_hand)
    )
    assert torch.equal(tokens, due)


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("alias", ["experts", "gate"])
def test_fewer_experts_are_the_model_made_by_hand(kind: str, alias: str) -> None:
    """Catches a router that chooses experts that are gone, or other ones."""
    model, original = build(kind), build(kind)
    scores = {
        name.replace(".experts", f".{alias}"): values
        for name, values in random_scores(model, 4).items()
        if name.endswith(".experts")
    }

    def sliced(name: str, value: Tensor) -> Tensor:
        own = [s for key, s in scores.items() if name.startswith(key.rpartition(".")[0] + ".")]
        if own and len(value) == EXPERTS:
            return value[highest(own[0], 3)]
        return value

    prune(model, scores, experts=Target(size=3))
    weights = {name: sliced(name, value) for name, value in original.state_dict().items()}
    by_hand = _by_hand(original, {"num_experts": 3, "num_local_experts": 3}, weights)
    assert relative_error(logits(model), logits(by_hand)) <= EXACT


@pytest.mark.parametrize("kind", MIXTURES)
def test_channels_of_the_experts_that_are_left(kind: str) -> None:
    """Catches channels that are chosen by another expert's scores once experts are gone."""
    at_once, one_by_one = build(kind), build(kind)
    scores = random_scores(at_once, 5)
    prune(at_once, scores, experts=Target(size=CHOSEN), ffn=Target(ratio=0.5))
    prune(one_by_one, scores, ffn=Target(ratio=0.5))
    prune(one_by_one, scores, experts=Target(size=CHOSEN))
    assert torch.equal(logits(at_once), logits(one_by_one))
    inner = INNER if kind == "mixtral" else EXPERT_INNER
    assert at_once.model.layers[0].mlp.experts.down_proj.shape == (CHOSEN, HIDDEN, inner // 2)


@pytest.mark.parametrize("kind", ["gemma2", "qwen3"])
def test_tied_embeddings_stay_tied(kind: str) -> None:
    """Catches an embedding that is cut twice, or a head that is left with its old weight."""
    model = build(kind)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prune(model, random_scores(model), hidden=Target(size=16))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape[1] == 16


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_model_trains(kind: str) -> None:
    """Catches weights that lose their gradients, or modules that keep old sizes."""
    model = build(kind)
    model.model.norm.weight.requires_grad_(False)
    prune(model, random_scores(model, 6), **targets(kind))
    model(input_ids=ids()).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name == "model.norm.weight"), name
    assert len(model.model.layers) == LAYERS - 1
    linear = model.model.layers[0].self_attn.o_proj
    assert (linear.out_features, linear.in_features) == tuple(linear.weight.shape)


def test_the_random_stream_is_left_alone() -> None:
    """Catches models built for the proof that draw from the caller's stream."""
    model = build("llama")
    before = torch.get_rng_state()
    prune(model, random_scores(model), ffn=Target(ratio=0.5))
    assert torch.equal(before, torch.get_rng_state())


def test_hooks_stay_on_their_modules() -> None:
    """Catches modules that are replaced, with the hooks on them."""
    model = build("llama")
    seen = []
    module = model.model.layers[0].mlp.down_proj
    module.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape[-1]))
    prune(model, random_scores(model), ffn=Target(size=30))
    logits(model)
    assert seen == [30]


@pytest.mark.parametrize(("dropped", "dense"), [(0, [0]), (1, []), (2, [1])])
def test_layers_without_experts_are_counted_anew(dropped: int, dense: list[int]) -> None:
    """Catches a reloaded mixture whose dense layer stands elsewhere, or every second layer's."""
    model = build("qwen3_moe")
    scores = torch.ones(LAYERS)
    scores[dropped] = 0
    prune(model, {"layers": scores}, layers=Target(size=2))
    assert model.config.mlp_only_layers == dense
    assert model.config.decoder_sparse_step == 1
