"""Which modules of a model a rotation concerns: by name, and inferred for known architectures.

Names are as in compressed-tensors: a module's path, or ``re:`` and a regular expression.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

from torch import nn

from flex_model.errors import CompressionError
from flex_model.layouts.names import named_modules, named_parameters

__all__ = ["Found", "NormMapping", "SpinQuantMapping", "find", "infer"]


@dataclass(frozen=True)
class NormMapping:
    """A norm, and the linear layers that read what it returns.

    Attributes:
        norm: the norms, one of each layer, or the last.
        linears: their readers, in the same layer.
    """

    norm: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class SpinQuantMapping:
    """Modules by their part. All but the embedding and the head are those of every layer.

    Attributes:
        embedding: writes the residual stream first.
        attn: the attention module, in which queries and keys meet.
        attn_q: the queries' projection; None where ``attn_qkv`` is fused.
        attn_k: the keys'.
        attn_v: the values'.
        attn_o: the output projection, which writes the stream.
        mlp_in: read the stream.
        mlp_out: writes the stream; its input is R4's.
        lm_head: reads the stream last.
        attn_qkv: all three projections in one.
        positions: an embedding of positions that is added to the stream.
        attn_head_dim: features of one head; None to read it off the model's config.
    """

    embedding: str = r"re:.*embed_tokens$"
    attn: str = r"re:.*self_attn$"
    attn_q: str | None = r"re:.*q_proj$"
    attn_k: str | None = r"re:.*k_proj$"
    attn_v: str | None = r"re:.*v_proj$"
    attn_o: str = r"re:.*o_proj$"
    mlp_in: tuple[str, ...] = (r"re:.*up_proj$", r"re:.*gate_proj$")
    mlp_out: str = r"re:.*down_proj$"
    lm_head: str = "lm_head"
    attn_qkv: str | None = None
    positions: str | None = None
    attn_head_dim: int | None = None


@dataclass(frozen=True)
class Found:
    """The modules that mappings name, by plain path, in the model's order.

    Attributes:
        parts: by the mapping's field.
        norms: each norm with its readers.
    """

    mapping: SpinQuantMapping
    parts: dict[str, tuple[str, ...]]
    norms: dict[str, tuple[str, ...]]

    def __getitem__(self, part: str) -> tuple[str, ...]:
        return self.parts.get(part, ())

    @property
    def named(self) -> set[str]:
        """All modules."""
        readers = (name for names in self.norms.values() for name in names)
        return {name for names in self.parts.values() for name in names} | {*self.norms, *readers}


_LLAMA_NORMS = (
    NormMapping(r"re:.*input_layernorm$", (r"re:.*q_proj$", r"re:.*k_proj$", r"re:.*v_proj$")),
    NormMapping(r"re:.*post_attention_layernorm$", (r"re:.*up_proj$", r"re:.*gate_proj$")),
    NormMapping(r"re:(.*\.)?model\.norm$", ("lm_head",)),
)


@dataclass(frozen=True)
class _Architecture:
    name: str
    mapping: SpinQuantMapping
    norms: tuple[NormMapping, ...]


# Llama's names are those of Mistral, Qwen2, Qwen3 and Gemma too; models that share them but have
# parts of their own (Gemma 2's norms behind each block, experts) leave parameters that no part is.
_KNOWN = (
    _Architecture("Llama, Mistral, Qwen2, Qwen3, Gemma", SpinQuantMapping(), _LLAMA_NORMS),
    _Architecture(
        "OPT",
        SpinQuantMapping(
            attn_o=r"re:.*out_proj$",
            mlp_in=(r"re:.*fc1$",),
            mlp_out=r"re:.*fc2$",
            positions=r"re:.*embed_positions$",
        ),
        (
            NormMapping(r"re:.*self_attn_layer_norm$", _LLAMA_NORMS[0].linears),
            NormMapping(r"re:.*layers\.\d+\.final_layer_norm$", (r"re:.*fc1$",)),
            NormMapping(r"re:.*decoder\.final_layer_norm$", ("lm_head",)),
        ),
    ),
    _Architecture(
        "Megatron's GPT",
        SpinQuantMapping(
            embedding=r"re:.*word_embeddings$",
            attn=r"re:.*self_attention$",
            attn_q=None,
            attn_k=None,
            attn_v=None,
            attn_qkv=r"re:.*linear_qkv$",
            attn_o=r"re:.*linear_proj$",
            mlp_in=(r"re:.*linear_fc1$",),
            mlp_out=r"re:.*linear_fc2$",
            lm_head="re:.*output_layer$",
        ),
        (
            NormMapping(r"re:.*input_layernorm$", (r"re:.*linear_qkv$",)),
            NormMapping(r"re:.*pre_mlp_layernorm$", (r"re:.*linear_fc1$",)),
            NormMapping(r"re:.*final_layernorm$", ("re:.*output_layer$",)),
        ),
    ),
    _Architecture(
        "Llama as Meta publishes it",
        SpinQuantMapping(
            embedding=r"re:.*tok_embeddings$",
            attn=r"re:.*attention$",
            attn_q=r"re:.*wq$",
            attn_k=r"re:.*wk$",
            attn_v=r"re:.*wv$",
            attn_o=r"re:.*wo$",
            mlp_in=(r"re:.*w1$", r"re:.*w3$"),
            mlp_out=r"re:.*w2$",
            lm_head="output",
        ),
        (
            NormMapping(r"re:.*attention_norm$", (r"re:.*wq$", r"re:.*wk$", r"re:.*wv$")),
            NormMapping(r"re:.*ffn_norm$", (r"re:.*w1$", r"re:.*w3$")),
            NormMapping(r"norm", ("output",)),
        ),
    ),
)
# Norms of queries and keys, inside the heads: R1 passes them by, R3 comes after.
_PASSED_BY = re.compile(r".*\.(q_norm|k_norm|q_layernorm|k_layernorm)")


def infer(model: nn.Module) -> tuple[SpinQuantMapping, tuple[NormMapping, ...]]:
    """The mappings of a known architecture that account for every parameter of the model.

    Raises:
        CompressionError: none does; tells what the nearest one matched and what it did not.
    """
    told = []
    for known in _KNOWN:
        try:
            found = find(model, known.mapping, known.norms)
        except CompressionError as error:
            told.append((len(_matched(model, known)), known, str(error)))
            continue
        left = _left_over(model, found)
        if not left:
            return known.mapping, known.norms
        told.append((len(found.named), known, f"no part is {', '.join(left)}"))
    _, nearest, why = max(told, key=lambda one: one[0])
    matched = ", ".join(_matched(model, nearest)) or "nothing"
    raise CompressionError(
        f"The architecture of {type(model).__name__} is not understood. Nearest is {nearest.name}: "
        f"matched {matched}; but {why} Give mappings and norm_mappings."
    )


def _left_over(model: nn.Module, found: Found) -> list[str]:
    """Parameters that belong to no module named, a few of them."""
    owners = {name.rpartition(".")[0]: name for name, _ in named_parameters(model)}
    left = [n for o, n in owners.items() if o not in found.named and not _PASSED_BY.fullmatch(o)]
    return left if len(left) <= 3 else [*left[:3], f"and {len(left) - 3} more."]


def _matched(model: nn.Module, known: _Architecture) -> list[str]:
    """Each pattern that matches something, with how often."""
    patterns = [p for _, own in _patterns(known.mapping) for p in own]
    patterns += [norm.norm for norm in known.norms]
    counts = {pattern: len(_matches(model, pattern)) for pattern in patterns}
    return [f"{pattern} ({count})" for pattern, count in counts.items() if count]


def find(model: nn.Module, mapping: SpinQuantMapping, norms: Sequence[NormMapping]) -> Found:
    """The modules that mappings name.

    Raises:
        CompressionError: a pattern matches nothing, too much, or what another one has matched.
    """
    parts = {
        part: tuple(name for own in patterns for name in _some(model, own, part))
        for part, patterns in _patterns(mapping)
    }
    for part in ("embedding", "lm_head", "positions"):
        if len(parts.get(part, ())) > 1:
            raise CompressionError(
                f"{part} is one module, but {getattr(mapping, part)!r} matches "
                f"{', '.join(parts[part])}."
            )
    _once([name for names in parts.values() for name in names], "mappings")
    layers = len(parts["attn"])
    for part, patterns in _patterns(mapping):
        whole = part in ("embedding", "lm_head", "positions")
        if not whole and len(parts[part]) != layers * len(patterns):
            raise CompressionError(
                f"{part} ({', '.join(patterns)}) matches {len(parts[part])} modules, but there are "
                f"{layers} attention modules. Give a pattern that matches one in each layer."
            )
    found = {
        norm: tuple(_readers(model, norm, own))
        for own in norms
        for norm in _some(model, own.norm, "norm")
    }
    _once([norm for own in norms for norm in _some(model, own.norm, "norm")], "norm_mappings")
    _once([name for names in found.values() for name in names], "norm_mappings")
    return Found(mapping, parts, found)


def _patterns(mapping: SpinQuantMapping) -> list[tuple[str, tuple[str, ...]]]:
    """Each part's patterns; ``attn_q`` ... are left out where they are fused."""
    found = []
    for one in fields(mapping):
        value = getattr(mapping, one.name)
        if value is not None and one.name != "attn_head_dim":
            found.append((one.name, (value,) if isinstance(value, str) else tuple(value)))
    return found


def _matches(model: nn.Module, pattern: str) -> list[str]:
    names = [name for name, _ in named_modules(model)]
    if not pattern.startswith("re:"):
        return [name for name in names if name == pattern]
    try:
        expression = re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise CompressionError(f"{pattern!r} is no regular expression: {error}.") from None
    return [name for name in names if expression.match(name)]


def _some(model: nn.Module, pattern: str, part: str) -> list[str]:
    found = _matches(model, pattern)
    if not found:
        raise CompressionError(f"{part}: {pattern!r} matches no module of {type(model).__name__}.")
    return found


def _once(names: Sequence[str], where: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CompressionError(
            f"{', '.join(twice)} stands twice in {where}, so it would be changed twice. Name each "
            "module once."
        )


def _readers(model: nn.Module, norm: str, mapping: NormMapping) -> list[str]:
    """The nearest modules around a norm that its patterns match."""
    owner = norm
    while owner:
        owner = owner.rpartition(".")[0]
        near = [
            name
            for pattern in mapping.linears
            for name in _some(model, pattern, f"reader of {norm}")
            if name.startswith(f"{owner}." if owner else "")
        ]
        if near:
            if len(near) != len(mapping.linears):
                raise CompressionError(
                    f"{norm} has {len(mapping.linears)} readers ({', '.join(mapping.linears)}), "
                    f"but near it are {', '.join(near)}."
                )
            return near
    raise CompressionError(f"No module that {', '.join(mapping.linears)} matches is near {norm}.")
