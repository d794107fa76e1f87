"""Which modules are scored, and how: patterns over module names, and kinds of hooks."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import SimpleNamespace
from typing import Any

from torch import nn

from flex_model.core.flex_model import FlexModel
from flex_model.errors import ImportanceError, UnknownModuleError
from flex_model.importance.depth import LayerSimilarityHook
from flex_model.importance.experts import ExpertHook, FusedExpertsHook
from flex_model.importance.heads import (
    AttentionHeadHook,
    Heads,
    IndependentKvHeadContributionHook,
)
from flex_model.importance.hook import ForwardHook
from flex_model.importance.independent import IndependentChannelContributionHook
from flex_model.importance.iterative import IterativeChannelContributionHook
from flex_model.importance.l2_norm import L2NormHook, MegatronL2NormHook
from flex_model.importance.layer_norm import LayerNormContributionHook
from flex_model.layouts.names import named_modules

__all__ = ["KINDS", "Target", "hooks_for", "kind_of", "module_of"]

_BETWEEN = "#"


@dataclass(frozen=True)
class Target:
    """Modules to score alike.

    Attributes:
        pattern: of module names as shells match files: ``model.layers.*.mlp.down_proj``. A ``*``
            stands for anything, dots too.
        kind: one of `KINDS`.
        options: of the hook: ``{"calibration_method": "scale_by_magnitude"}``. ``sequence_dim`` is
            1 if left out, and 0 in Megatron's models.
    """

    pattern: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a kind that there is not.

        Raises:
            ImportanceError: naming the nearest.
        """
        if self.kind not in KINDS:
            raise ImportanceError(
                f"There is no kind of hook {self.kind!r}. There are {', '.join(KINDS)}."
            )


@dataclass(frozen=True)
class _Place:
    """What a hook is made of.

    Attributes:
        root: the model.
        layer: the module that is scored.
        options: as given, ``sequence_dim`` filled in.
        calls: how many batches will be run, if that is known.
    """

    root: nn.Module
    layer: nn.Module
    options: dict[str, Any]
    calls: int | None


def hooks_for(
    model: nn.Module, targets: Sequence[Target], calls: int | None = None
) -> dict[str, ForwardHook]:
    """The hooks that some targets ask for.

    Args:
        model: on this rank, wrapped in a FlexModel or not.
        targets: several may name one module, by different kinds.
        calls: how many batches will be run, for kinds that end by themselves.

    Returns:
        By the module's name; where it has several kinds by ``"name#kind"``. Ordered by target, and
        then as the model has its modules.

    Raises:
        UnknownModuleError: a pattern fits no module; the message names the nearest.
        ImportanceError: a kind cannot score the module, or is asked for twice.
    """
    root = model.module if isinstance(model, FlexModel) else model
    modules, made = dict(named_modules(root)), {}
    default = {"sequence_dim": 0 if _is_megatrons(root) else 1}
    for target in targets:
        for name in _matching(target.pattern, modules):
            if (name, target.kind) in made:
                raise ImportanceError(
                    f"{name} is named twice for {target.kind!r}, the second time by "
                    f"{target.pattern!r}. Name each module once for each kind."
                )
            place = _Place(root, modules[name], {**default, **target.options}, calls)
            made[name, target.kind] = _made(name, target, place)
    kinds = Counter(name for name, _ in made)
    return {
        name if kinds[name] == 1 else f"{name}{_BETWEEN}{kind}": hook
        for (name, kind), hook in made.items()
    }


def module_of(key: str) -> str:
    """The module's name in a key of `hooks_for`."""
    return key.partition(_BETWEEN)[0]


def kind_of(hook: ForwardHook) -> str:
    """The kind of `KINDS` that a hook is of; of a hook of another class its name."""
    if type(hook) is L2NormHook and hook.watches == ("output",):
        return "hidden"
    return _CLASSES.get(type(hook), type(hook).__name__)


def _matching(pattern: str, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    found = [name for name in modules if fnmatchcase(name, pattern)]
    if not found:
        nearest = difflib.get_close_matches(pattern, list(modules), n=3, cutoff=0.3)
        raise UnknownModuleError(
            f"The model has no module {pattern!r}. Nearest: {', '.join(nearest) or 'none'}."
        )
    yield from found


def _made(name: str, target: Target, place: _Place) -> ForwardHook:
    try:
        return KINDS[target.kind](place)
    except (ImportanceError, TypeError) as error:  # TypeError: options that the hook has not
        raise ImportanceError(
            f"{name} cannot be scored by {target.kind!r} with options {dict(target.options)}: "
            f"{error}"
        ) from error


# -- kinds -------------------------------------------------------------------------------------


def _norms(place: _Place) -> ForwardHook:
    return L2NormHook(**place.options)


def _hidden(place: _Place) -> ForwardHook:
    return L2NormHook(**{**place.options, "side": "output"})


def _megatron_norms(place: _Place) -> ForwardHook:
    return MegatronL2NormHook(**place.options)


def _independent(place: _Place) -> ForwardHook:
    return IndependentChannelContributionHook(place.layer, **place.options)


def _iterative(place: _Place) -> ForwardHook:
    given = dict(place.options)
    dim = given.pop("sequence_dim")
    if place.calls is not None:
        given.setdefault("validation_full_iters", place.calls)
    _check_options(given, {"validation_full_iters", "calibration_method", "clear_gpu_memory"})
    return IterativeChannelContributionHook(place.layer, given, sequence_dim=dim)


def _key_value_heads(place: _Place) -> ForwardHook:
    given = dict(place.options)
    dim = given.pop("sequence_dim")
    _check_options(given, {"optimize_for"})
    heads = _heads_of(place.root)
    config = SimpleNamespace(
        hidden_size=heads.query * heads.width,
        num_attention_heads=heads.query,
        head_dim=heads.width,
    )
    attention = SimpleNamespace(num_key_value_heads=heads.key_value)
    given["model"] = SimpleNamespace(config=config)
    given["block_config"] = SimpleNamespace(attention=attention)
    return IndependentKvHeadContributionHook(place.layer, given, sequence_dim=dim)


def _heads(place: _Place) -> ForwardHook:
    return AttentionHeadHook(place.layer, _heads_of(place.root), **place.options)


def _layer_norm(place: _Place) -> ForwardHook:
    return LayerNormContributionHook(place.layer, **place.options)


def _layers(place: _Place) -> ForwardHook:
    return LayerSimilarityHook(**place.options)


def _experts(place: _Place) -> ForwardHook:
    """Of a layer whose experts are one module, or of one expert that is a module of its own."""
    _check_options(place.options, {"sequence_dim"})
    fused = hasattr(place.layer, "gate_up_proj")
    return FusedExpertsHook(place.layer) if fused else ExpertHook()


KINDS: Mapping[str, Callable[[_Place], ForwardHook]] = {
    "l2": _norms,
    "megatron_l2": _megatron_norms,
    "independent": _independent,
    "iterative": _iterative,
    "kv_heads": _key_value_heads,
    "heads": _heads,
    "layer_norm": _layer_norm,
    "layers": _layers,
    "hidden": _hidden,
    "experts": _experts,
}
_CLASSES: Mapping[type[ForwardHook], str] = {
    L2NormHook: "l2",
    MegatronL2NormHook: "megatron_l2",
    IndependentChannelContributionHook: "independent",
    IterativeChannelContributionHook: "iterative",
    IndependentKvHeadContributionHook: "kv_heads",
    AttentionHeadHook: "heads",
    LayerNormContributionHook: "layer_norm",
    LayerSimilarityHook: "layers",
    ExpertHook: "experts",
    FusedExpertsHook: "experts",
}


def _check_options(given: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        raise ImportanceError(f"there is no option {unknown}, but {sorted(known)}.")


def _heads_of(root: nn.Module) -> Heads:
    """Read off the model's config, transformers' or Megatron's."""
    config: Any = next((m.config for m in root.modules() if hasattr(m, "config")), None)
    if config is None:
        raise ImportanceError("the model has no config that tells its heads.")
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    if hasattr(config, "num_query_groups"):
        groups = config.num_query_groups or config.num_attention_heads
        return Heads(config.num_attention_heads, groups, config.kv_channels)
    return Heads.of(config)


def _is_megatrons(root: nn.Module) -> bool:
    """Its layers pass ``[sequence, batch, hidden]``."""
    return any(type(module).__module__.startswith("megatron.") for module in root.modules())
