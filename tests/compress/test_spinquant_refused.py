"""What cannot be rotated is refused by name, and the model is as it was."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from spin_models import build, ids, logits
from torch import nn

from flex_model.compress.spinquant import (
    NormMapping,
    SpinQuantMapping,
    SpinQuantModifier,
    fuse_norm_linears,
    infer,
    learn,
    random_orthogonal_matrix,
    rotate,
)
from flex_model.errors import CompressionError
from flex_model.testing.compare import relative_error

MAPPING, NORMS = infer(build())
ALL = ("R1", "R2", "R3", "R4")


def _state(model: nn.Module) -> Any:
    values = {
        n: (id(t), t.clone()) for n, t in model.state_dict(keep_vars=True).items() if not t.is_meta
    }
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    return values, hooks, [type(m) for m in model.modules()], sorted(vars(model))


def _same(one: Any, other: Any) -> bool:
    return (
        one[1:] == other[1:]
        and one[0].keys() == other[0].keys()
        and all(one[0][n][0] == other[0][n][0] for n in one[0])
        and all(torch.equal(one[0][n][1], other[0][n][1]) for n in one[0])
    )


def _refuses(model: Any, message: str, *args: Any, **how: Any) -> None:
    before = _state(model)
    with pytest.raises(CompressionError, match=message):
        rotate(model, *args, **{"rotations": ALL, **how})
    assert _same(_state(model), before)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"block_size": 5}, "transform_block_size=5 does not divide the 32 features that R1"),
        ({"block_size": 16}, "does not divide the 8 features that R2"),
        ({"block_size": -8}, "does not divide"),
        ({"rotations": ("R5",)}, "rotations: R5 is none of R1, R2, R3, R4"),
        ({"rotations": ("R1", "R1")}, "names one twice"),
        ({"transform_type": "dct"}, "transform_type: dct is none of"),
        ({"precision": torch.int32}, "precision is a floating-point dtype"),
        ({"matrices": {"R1": torch.eye(16)}}, r"R1 needs a matrix \[32, 32\], got \(16, 16\)"),
        ({"matrices": {"R1": torch.randn(32, 32)}}, "R1 is not orthogonal"),
        ({"matrices": {"R3": torch.ones(8, 8)}}, "R3 is not orthogonal"),
        ({"matrices": {"R3": torch.full((8, 8), torch.nan)}}, "R3 is not orthogonal"),
        ({"matrices": {"R9": torch.eye(8)}}, "matrices: R9 is none of"),
    ],
)
def test_choices(how: dict[str, Any], message: str) -> None:
    _refuses(build(), message, **how)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attn_q": "re:.*query$"}, "attn_q: 're:.*query\\$' matches no module"),
        ({"lm_head": "head"}, "lm_head: 'head' matches no module"),
        ({"embedding": "re:.*layernorm$"}, "embedding is one module, but"),
        ({"attn_q": "re:.*layers.0.*q_proj$"}, "attn_q .* matches 1 modules, but there are 2"),
        ({"mlp_out": "re:.*proj$"}, "stands twice in mappings"),
        ({"attn_q": "re:.*k_proj$"}, "k_proj.* stands twice in mappings"),
        ({"attn_q": "re:.*[q_proj$"}, "is no regular expression"),
        ({"mlp_out": "re:.*mlp$"}, "LlamaMLP. has no weight"),
        ({"attn_o": "re:.*gate_proj$", "mlp_in": ("re:.*up_proj$",)}, "should be the 32 features"),
    ],
)
def test_mappings(changed: dict[str, Any], message: str) -> None:
    _refuses(build(), message, replace(MAPPING, **changed), NORMS)


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        ([NormMapping("re:.*no_norm$", ("lm_head",))], "norm: .* matches no module"),
        ([NormMapping("model.norm", ("head",))], "reader of model.norm: 'head' matches no module"),
        ([NormMapping("model.norm", ("lm_head", "lm_head"))], "lm_head stands twice"),
        ([*NORMS, NormMapping("model.norm", ("lm_head",))], "model.norm stands twice"),
        ([NormMapping("re:.*input_layernorm$", ("re:.*_proj$",))], "has 1 readers"),
        (NORMS[:2], "R1 needs the norm before each reader fused, .* none of lm_head"),
        ([], "none of model.layers.0.self_attn.q_proj, .* \\.\\.\\."),
        ([NormMapping("re:.*act_fn$", ("re:.*up_proj$",))], "known norms are"),
    ],
)
def test_norm_mappings(norms: list[NormMapping], message: str) -> None:
    _refuses(build(), message, MAPPING, norms)


@pytest.mark.parametrize("kind", ["gemma2", "phi3", "mixtral"])
def test_architectures_that_are_not_known(kind: str) -> None:
    """Catches norms behind blocks, fused projections and experts that are passed over silently."""
    _refuses(
        build(kind, "eager"),
        r"not understood. Nearest is Llama.*matched re:\.\*embed_tokens\$ \(1\)",
    )


def test_opt_with_norms_behind() -> None:
    _refuses(build("opt", do_layer_norm_before=False), "not understood. Nearest is OPT")


def _frozen(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)


def _meta(model: Any) -> None:
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to("meta"))


def _tied(model: Any) -> None:
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight


def _tied_outside(model: Any) -> None:
    model.extra = nn.Linear(4, 4)
    model.extra.weight = model.model.layers[0].mlp.down_proj.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_frozen, "layers.1.mlp.up_proj.weight is frozen"),
        (_meta, "layers.1.mlp.up_proj.weight has no values"),
        (_tied, "are one tied parameter"),
    ],
)
def test_parameters(change: Callable[[Any], None], message: str) -> None:
    model = build()
    change(model)
    _refuses(model, message)


def test_parameters_tied_to_something_else() -> None:
    model = build()
    _tied_outside(model)
    _refuses(model, "are one tied parameter", MAPPING, NORMS)


def test_no_hadamard_matrix() -> None:
    _refuses(build(intermediate_size=44 * 5 + 2), "No Hadamard matrix of size 222")


def test_attention_that_cannot_be_reached() -> None:
    model = build()
    model.config._attn_implementation_internal = "flex_attention"
    _refuses(model, "runs attention 'flex_attention'")


def test_twice() -> None:
    """Catches a second rotation, and an undoing of what is undone."""
    model = build()
    rotated = rotate(model)
    _refuses(model, "rotated already")
    rotated.undo()
    with pytest.raises(CompressionError, match="undone already"):
        rotated.undo()
    rotate(model)


def test_a_failure_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights that stay rotated when the last step fails."""
    model = build("qwen3")
    due = logits(model)
    module = importlib.import_module("flex_model.compress.spinquant.rotate")
    monkeypatch.setattr(module, "rotate_input", _fail)
    with pytest.raises(RuntimeError, match="half-way"):
        rotate(model, rotations=ALL)
    assert relative_error(logits(model), due) <= 1e-5
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(len(m._forward_pre_hooks) for m in model.modules())


def _fail(*_: Any) -> None:
    raise RuntimeError("half-way")


def test_layer_norms_uncentred() -> None:
    _refuses(build("opt"), "cannot be fused uncentred", center=False)


def test_fusing() -> None:
    linear = nn.Linear(4, 4, bias=False)
    with pytest.raises(CompressionError, match="listed twice"):
        fuse_norm_linears(nn.RMSNorm(4), [linear, linear])
    with pytest.raises(CompressionError, match="none to hold it"):
        fuse_norm_linears(nn.LayerNorm(4), [linear])
    with pytest.raises(CompressionError, match="known norms are"):
        fuse_norm_linears(nn.BatchNorm1d(4), [linear])


def test_modifier() -> None:
    """Catches a modifier that rotates a second model, or rotates before it knows its batches."""
    model = build()
    before = _state(model)
    with pytest.raises(CompressionError, match="needs calibration batches"):
        SpinQuantModifier(learnable=True).initialize(model)
    assert _same(_state(model), before)
    modifier = SpinQuantModifier()
    with pytest.raises(CompressionError, match="uninitialized"):
        modifier.finalize()
    with pytest.raises(CompressionError, match="rotated nothing"):
        modifier.rotated  # noqa: B018
    modifier.initialize(model)
    for other in (model, build()):
        with pytest.raises(CompressionError, match="already"):
            modifier.initialize(other)
    with pytest.raises(CompressionError, match="rotated already"):
        SpinQuantModifier().initialize(model)
    modifier.finalize()
    with pytest.raises(CompressionError, match="once"):
        modifier.finalize()


@pytest.mark.parametrize(
    "fields", [{"rotations": ["R7"]}, {"transform_block_size": 0}, {"rotation": ["R1"]}]
)
def test_fields_of_the_modifier(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SpinQuantModifier(**fields)


def test_learning() -> None:
    model = build()
    due = logits(model)
    with pytest.raises(CompressionError, match="at least one"):
        SpinQuantModifier(learnable=True).initialize(model, [])
    with pytest.raises(CompressionError, match="has neither"):
        learn(rotate(model, rotations=("R4",)), [ids()])
    model = build()
    modifier = SpinQuantModifier(learnable=True)
    model.lm_head.bias = nn.Parameter(torch.full((34,), torch.nan))
    with pytest.raises(CompressionError, match="The loss is nan at step 0"):
        modifier.initialize(model, [ids()])
    model.lm_head.bias = None
    assert relative_error(logits(model), due) <= 1e-5


def test_own_matrices_are_taken() -> None:
    matrix = random_orthogonal_matrix(32, torch.Generator().manual_seed(1))
    model = build()
    embedding = model.model.embed_tokens.weight.detach().clone()
    rotate(model, MAPPING, NORMS, rotations=("R1",), matrices={"R1": matrix})
    due = embedding.double() @ matrix
    assert relative_error(model.model.embed_tokens.weight.double(), due) <= 1e-6


def test_a_hand_written_model_needs_the_size_of_a_head() -> None:
    from frameworks.tiny_llama import filled

    model = filled()
    _refuses(model, "Nothing tells the size of a head", rotations=("R2",))
    mapping, norms = infer(model)
    _refuses(model, "no place in which queries and keys meet", replace(mapping, attn_head_dim=8),
             norms, rotations=("R3",))  # fmt: skip
    assert isinstance(mapping, SpinQuantMapping)
