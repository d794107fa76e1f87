"""What cannot be pruned: each mistake has a named error, and leaves the model as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pruned_models import INNER, build, snapshot
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from flex_model import FlexModel
from flex_model.errors import FlexModelError, PruningError
from flex_model.pruning import Target, prune, random_scores

FFN = "model.layers.1.mlp.down_proj"
HALF = Target(ratio=0.5)

Case = tuple[str, Callable[[Any, dict[str, Tensor]], Any], str]

CASES: list[Case] = [
    ("fewer scores than channels", lambda m, s: _with(m, s, FFN, s[FFN][:-1]), "shape (43,)"),
    ("more scores than channels", lambda m, s: _with(m, s, FFN, torch.ones(45)), "shape (45,)"),
    ("scores in two dims", lambda m, s: _with(m, s, FFN, torch.ones(1, INNER)), "shape (1, 44)"),
    ("NaN scores", lambda m, s: _with(m, s, FFN, s[FFN].log().sqrt()), "are NaN"),
    ("complex scores", lambda m, s: _with(m, s, FFN, s[FFN].to(torch.cfloat)), "plain tensors"),
    ("a list of scores", lambda m, s: _with(m, s, FFN, s[FFN].tolist()), "plain tensors"),
    ("no scores", lambda m, s: prune(m, {}, ffn=HALF), "scores of model.layers.0.mlp.down_proj"),
    ("an unknown module", lambda m, s: _with(m, s, FFN + "x", s[FFN]), f"{FFN + 'x'!r}, an unk"),
    ("a ratio below 0", lambda m, s: prune(m, s, ffn=Target(ratio=-0.1)), "from 0 to 1, got -0.1"),
    ("a ratio above 1", lambda m, s: prune(m, s, ffn=Target(ratio=1.1)), "from 0 to 1, got 1.1"),
    ("a ratio that is NaN", lambda m, s: prune(m, s, ffn=Target(ratio=torch.nan)), "got nan"),
    ("a ratio as text", lambda m, s: prune(m, s, ffn=Target(ratio="1")), "got '1'"),  # type: ignore[arg-type]
    ("two targets in one", lambda m, s: prune(m, s, ffn=Target(ratio=0.5, size=2)), "one of"),
    ("an empty target", lambda m, s: prune(m, s, ffn=Target()), "one of ratio, size and"),
    ("a number for a target", lambda m, s: prune(m, s, ffn=0.5), "takes a Target"),  # type: ignore[arg-type]
    ("no target", prune, "Nothing to prune"),
    ("everything by ratio", lambda m, s: prune(m, s, ffn=Target(ratio=1)), "Everything would"),
    ("everything by size", lambda m, s: prune(m, s, layers=Target(size=0)), "Everything would"),
    ("more than there is", lambda m, s: prune(m, s, ffn=Target(size=45)), "from 1 to 44"),
    ("a negative size", lambda m, s: prune(m, s, ffn=Target(size=-1)), "size is positive"),
    ("half a channel", lambda m, s: prune(m, s, ffn=Target(size=1.5)), "whole number, got 1.5"),  # type: ignore[arg-type]
    ("a multiple of 0", lambda m, s: prune(m, s, ffn=Target(0.5, multiple_of=0)), "is positive"),
    ("experts of none", lambda m, s: prune(m, s, experts=HALF), "has no experts"),
    (
        "heads that do not divide the hidden size",
        lambda m, s: prune(m, s, hidden=Target(size=19)),
        "LlamaConfig does not allow {'hidden_size': 19}",
    ),
    (
        "a budget that cannot be met",
        lambda m, s: prune(m, s, ffn=Target(parameters=100)),
        "cannot be met by cutting ffn: at least",
    ),
    (
        "two budgets",
        lambda m, s: prune(m, s, ffn=Target(parameters=9000), hidden=Target(parameters=9001)),
        "one budget",
    ),
    ("a wrapper", lambda m, s: prune(FlexModel(m, {}), s, ffn=HALF), "got FlexModel"),
    ("another library's", lambda m, s: prune(nn.Linear(2, 2), s, ffn=HALF), "got Linear"),
]


def _with(model: Any, scores: dict[str, Tensor], name: str, value: Any) -> None:
    prune(model, {**scores, name: value}, ffn=HALF)


@pytest.mark.parametrize(
    ("ask", "message"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_is_refused_and_changes_nothing(ask: Any, message: str) -> None:
    """Catches a model that is half cut when it turns out that it cannot be."""
    model = build("llama")
    scores = random_scores(model)
    before = snapshot(model)
    with pytest.raises(FlexModelError) as refused:
        ask(model, scores)
    assert type(refused.value) is PruningError
    assert message in str(refused.value)
    assert snapshot(model) == before


def _without_values(model: Any) -> Any:
    model.model.layers[1].mlp.to("meta")
    return model


def _with_a_stranger(model: Any) -> Any:
    model.model.layers[1].mlp.extra = nn.Linear(2, 2)
    return model


def _with_another_width(model: Any) -> Any:
    model.model.layers[1].mlp.down_proj = nn.Linear(INNER + 1, 24)
    return model


def _with_odd_heads(model: Any) -> Any:
    model.config.num_key_value_heads = 3
    return model


def _without_a_layer(model: Any) -> Any:
    del model.model.layers[1]
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_values, "has no values"),
        (_with_a_stranger, "not understood: model.layers.1.mlp.extra.weight"),
        (_with_another_width, "not understood: model.layers.1.mlp.down_proj.weight"),
        (_with_odd_heads, "heads do not divide"),
        (_without_a_layer, "not understood: layers"),
    ],
)
def test_a_model_that_is_not_as_its_config_says(change: Any, message: str) -> None:
    """Catches weights that would be cut by guesswork."""
    model = change(build("llama"))
    with pytest.raises(PruningError, match=message):
        prune(model, {"hidden": torch.ones(24)}, hidden=HALF)


def test_another_architecture() -> None:
    """Catches weights of another order that happen to have the names."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=4))
    with pytest.raises(PruningError, match="GPT2LMHeadModel is not understood: model_type 'gpt2'"):
        prune(model, {"hidden": torch.ones(8)}, hidden=HALF)


def test_fewer_experts_than_a_token_takes() -> None:
    """Catches a router that is asked for more experts than are left."""
    model = build("mixtral")
    with pytest.raises(PruningError, match="num_experts can be cut to a size from 2 to 6"):
        prune(model, random_scores(model), experts=Target(size=1))


def test_one_size_for_experts_of_several_widths() -> None:
    """Catches a size that is meant for one kind of MLP and cuts the others too."""
    model = build("qwen2_moe")
    with pytest.raises(PruningError, match="One size for ffn is not enough"):
        prune(model, random_scores(model), ffn=Target(size=8))
