"""On one process: outputs stay under every subset, and `undo` brings the weights back."""

import copy
from itertools import product
from typing import Any

import pytest
import torch
from spin_models import SUBSETS, build, ids, logits, weights

from flex_model.compress.spinquant import hadamard_matrix, rotate
from flex_model.testing.compare import relative_error

EXACT = 1e-5
ALL = ("R1", "R2", "R3", "R4")


@pytest.mark.parametrize("rotations", SUBSETS, ids="-".join)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_subset(attention: str, rotations: tuple[str, ...]) -> None:
    """Catches a rotation without its counterpart, and heads that are not reached."""
    model = build(attention=attention)
    due, before = logits(model), weights(model)
    rotated = rotate(model, rotations=rotations)
    assert relative_error(logits(model), due) <= EXACT
    # R2 alone leaves what it is between; norms are fused in any case.
    norms = {n for n, t in model.state_dict().items() if "norm" in n and (t == 1).all()}
    assert len(norms) == 5
    rotated.undo()
    assert relative_error(logits(model), due) <= EXACT
    for name, value in model.state_dict().items():
        assert torch.allclose(value, before[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "gemma", "opt"])
@pytest.mark.parametrize("how", [{}, {"transform_type": "random-hadamard", "randomize": True}])
def test_architectures(kind: str, how: dict[str, Any]) -> None:
    """Catches norms that add 1, tied embeddings, norms of heads, LayerNorms, positions, biases."""
    model = build(kind)
    due, before = logits(model), weights(model)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    rotated = rotate(model, rotations=ALL, **how)
    assert relative_error(logits(model), due) <= EXACT
    if tied:
        assert not model.config.tie_word_embeddings
    rotated.undo()
    assert relative_error(logits(model), due) <= EXACT
    assert tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert tied == model.config.tie_word_embeddings
    assert model.state_dict().keys() == before.keys()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, before[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize(
    "how",
    [
        {"block_size": 8},
        {"transform_type": "random-matrix"},
        {"transform_type": "random-matrix", "block_size": 4, "randomize": True},
        {"precision": torch.float32},
        {"matrices": {"R1": torch.linalg.qr(torch.randn(32, 32))[0]}},
        {"transform_type": "random-hadamard", "seed": 3},
    ],
    ids=["blocks", "dense", "dense blocks", "float32", "own", "signs"],
)
def test_kinds_of_matrices(how: dict[str, Any]) -> None:
    model = build()
    due = logits(model)
    rotate(model, rotations=ALL, **how)
    assert relative_error(logits(model), due) <= EXACT


def test_sizes_that_are_no_power_of_two() -> None:
    """Catches a core that comes outermost, or its transpose."""
    model = build(hidden_size=24, intermediate_size=40)
    due = logits(model)
    rotate(model, rotations=ALL)
    assert relative_error(logits(model), due) <= EXACT


def test_what_is_rotated_online_is_rotated() -> None:
    """Catches hooks that do nothing because nothing else does: truth is a dense product."""
    model = build()
    seen: dict[str, list[torch.Tensor]] = {"before": [], "after": []}
    layer = model.model.layers[1].mlp.down_proj

    def keep(which: str) -> Any:
        hook = lambda _, args: seen[which].append(args[0])  # noqa: E731
        return layer.register_forward_pre_hook(hook)

    handle = keep("before")
    logits(model)
    handle.remove()
    rotate(model, rotations=("R4",))
    keep("after")
    logits(model)
    due = seen["before"][0] @ hadamard_matrix(64, torch.float32)
    assert relative_error(seen["after"][0], due) <= EXACT


def test_queries_and_keys_are_rotated() -> None:
    """Catches R3 that is registered but never run: rounded heads then give other outputs."""
    model = build()
    attention = model.model.layers[0].self_attn
    rotated = rotate(model, rotations=("R3",))
    assert attention.config._attn_implementation == "flex_model_rotated"
    assert model.config._attn_implementation == "sdpa"
    vars(attention)["_flex_model_r3"] = (_Zero(), model.config)
    assert relative_error(logits(model), logits(build())) > 1e-3
    rotated.undo()
    assert attention.config is model.config
    assert "_flex_model_r3" not in vars(attention)


class _Zero:
    size = 8

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


def test_generation_with_a_cache() -> None:
    """Catches keys that are rotated twice, or only when they are new."""
    model = build()
    due = model.generate(ids(), max_new_tokens=6, do_sample=False)
    rotate(model, rotations=ALL)
    assert torch.equal(model.generate(ids(), max_new_tokens=6, do_sample=False), due)


def test_matrices_differ_where_asked() -> None:
    """Catches one matrix for all layers, or other ones at each run."""
    found = {}
    for randomize, seed in product((False, True), (0, 1)):
        how = {"transform_type": "random-hadamard", "randomize": randomize, "seed": seed}
        turns = rotate(build(), rotations=ALL, **how).turns
        again = rotate(build(), rotations=ALL, **how).turns
        for one, same in ((turns.r2, again.r2), (turns.r3, again.r3), (turns.r4, again.r4)):
            first, second = (rotation.matrix() for rotation in one.values())
            assert torch.equal(first, next(iter(same.values())).matrix())
            assert torch.equal(first, second) != randomize
        found[randomize, seed] = turns.r1.matrix()
    assert not torch.equal(found[False, 0], found[False, 1])


def test_centring_changes_rms_norm_models_only_if_forced() -> None:
    """Catches centring by default, which is exact for LayerNorms alone."""
    model = build()
    due = logits(model)
    rotate(model, rotations=("R1",), center=True)
    assert relative_error(logits(model), due) > 1e-3


def test_bfloat16_rounds_once() -> None:
    """Catches weights that are rounded after each step, and another dtype."""
    model = build().bfloat16()
    exact = build()
    for name, value in exact.state_dict().items():
        value.copy_(model.state_dict()[name])
    rotate(model)
    rotate(exact)
    for name, value in exact.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.bfloat16()), name


def test_a_norm_with_zeros_comes_back() -> None:
    """Catches weights behind a factor of 0 that are lost."""
    model = build()
    with torch.no_grad():
        model.model.norm.weight[3] = 0.0
        model.model.layers[0].input_layernorm.weight[5:7] = 0.0
    due, before = logits(model), weights(model)
    rotated = rotate(model, rotations=ALL)
    assert relative_error(logits(model), due) <= EXACT
    rotated.undo()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, before[name], rtol=1e-5, atol=1e-6), name


def test_a_copy_computes_the_same() -> None:
    """Catches hooks that a copied model shares with, or leaves at, the one it was copied from."""
    model = build()
    rotated = rotate(model, rotations=ALL)
    due, other = logits(model), copy.deepcopy(model)
    rotated.undo()
    assert torch.equal(logits(other), due)


def test_training_goes_on() -> None:
    """Catches parameters replaced under an optimizer, and gradients that stop at a hook."""
    model = build()
    parameters = {name: id(p) for name, p in model.named_parameters()}
    rotate(model, rotations=ALL)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
