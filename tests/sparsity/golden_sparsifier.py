"""The golden cases (made by torch's own sparsifier, see golden/), and how a script is replayed."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flex_model.sparsity import ActivationSparsifier

GOLDEN = Path(__file__).parent / "golden"
INDEX = json.loads((GOLDEN / "sparsifier_index.json").read_text())
CASES = INDEX["cases"]


def add(a: Tensor, b: Tensor) -> Tensor:
    return a + b


def maximum(a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum(a, b)


def absmax(a: Tensor, b: Tensor) -> Tensor:
    return torch.maximum(a.abs(), b.abs())


def ema(a: Tensor, b: Tensor) -> Tensor:
    return 0.75 * a + 0.25 * b


def addsq(a: Tensor, b: Tensor) -> Tensor:
    return a + b * b


def mean0(x: Tensor) -> Tensor:
    return x.mean(0)


def mean01(x: Tensor) -> Tensor:
    return x.mean((0, 1))


def identity(x: Tensor) -> Tensor:
    return x


def sum0keep(x: Tensor) -> Tensor:
    return x.sum(0, keepdim=True)


def absmean0(x: Tensor) -> Tensor:
    return x.abs().mean(0)


def threshold(x: Tensor, threshold: float) -> Tensor:
    return (x.abs() >= threshold).to(x.dtype)


def threshold_bool(x: Tensor, threshold: float) -> Tensor:
    return x.abs() >= threshold


def topk(x: Tensor, keep: float) -> Tensor:
    k = max(1, int(x.numel() * keep))
    return (x.abs() >= x.abs().flatten().topk(k).values[-1]).to(x.dtype)


def band(x: Tensor, lo: float, hi: float) -> Tensor:
    return ((x >= lo) & (x <= hi)).to(x.dtype)


FUNCTIONS: dict[str, dict[str, Any]] = {
    "aggregate": {"add": add, "max": maximum, "absmax": absmax, "ema": ema, "addsq": addsq},
    "reduce": {
        "mean0": mean0,
        "mean01": mean01,
        "id": identity,
        "sum0keep": sum0keep,
        "absmean0": absmean0,
        "meanhw": mean0,
    },
    "mask": {
        "threshold": threshold,
        "threshold_bool": threshold_bool,
        "topk": topk,
        "band": band,
    },
}


def tensors(case: dict[str, Any]) -> dict[str, Tensor]:
    return load_file(GOLDEN / case["file"])


def model_of(case: dict[str, Any], values: dict[str, Tensor]) -> nn.Sequential:
    """The case's model, with its weights."""
    dims = case["dims"]
    if case["model"] == "conv":
        conv = nn.Conv2d(dims[0], 6, 3, padding=1)
        model = nn.Sequential(conv, nn.Tanh(), nn.Conv2d(6, 4, 1))
    else:
        layers: list[nn.Module] = []
        for given, made in pairwise(dims):
            layers += [nn.Linear(given, made), nn.Tanh()]
        model = nn.Sequential(*layers[:-1])
    model.to(getattr(torch, case.get("dtype", "float32")))
    prefix = "model."
    model.load_state_dict(
        {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    )
    return model


def _functions(told: dict[str, Any]) -> dict[str, Any]:
    found = {f"{kind}_fn": FUNCTIONS[kind][told[kind]] for kind in FUNCTIONS if kind in told}
    kept = {key: told[key] for key in ("features", "feature_dim") if key in told}
    return found | kept | told.get("sparse_config", {})


def sparsifier_of(case: dict[str, Any], model: nn.Module) -> ActivationSparsifier:
    made = ActivationSparsifier(model, zero_start=True, **_functions(case["defaults"]))
    for layer in case["layers"]:
        made.register_layer(model.get_submodule(layer["name"]), **_functions(layer))
    return made


def replay(case: dict[str, Any]) -> tuple[dict[str, Tensor], ActivationSparsifier]:
    """Everything the case's file tells of a run, from ours."""
    values = tensors(case)
    model = model_of(case, values)
    sparsifier = sparsifier_of(case, model)
    found: dict[str, Tensor] = {}
    forwards = steps = 0
    for what, *args in case["script"]:
        if what == "forward":
            names = [layer["name"] for layer in case["layers"]]
            output, seen = _watched(model, names, values[f"input.{forwards}"])
            found[f"output.{forwards}"] = output
            found |= {f"layer_input.{forwards}.{name}": x for name, x in seen.items()}
            forwards += 1
        elif what == "step":
            found |= _told(f"aggregate.{steps}", sparsifier, "data")
            sparsifier.step()
            found |= _told(f"mask.{steps}", sparsifier, "mask")
            steps += 1
        elif what == "squash":
            sparsifier.squash_mask(args[0])
        else:
            state = sparsifier.state_dict()
            for name in [*sparsifier.state]:
                sparsifier.unregister_layer(name)
            sparsifier = ActivationSparsifier(model)
            sparsifier.load_state_dict(state)
    return found, sparsifier


def _watched(model: nn.Module, names: list[str], x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and what layers receive behind all hooks."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, a, name=name: seen.__setitem__(name, a[0].detach().clone())
        )
        for name in names
    ]
    with torch.no_grad():
        output = model(x)
    for handle in handles:
        handle.remove()
    return output, seen


def _told(key: str, sparsifier: ActivationSparsifier, what: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, group in sparsifier.data_groups.items():
        value = sparsifier.get_mask(name) if what == "mask" else group["data"]
        if isinstance(value, list):
            found |= {f"{key}.{name}.{n}": one for n, one in enumerate(value)}
        else:
            found[f"{key}.{name}"] = value
    return found
