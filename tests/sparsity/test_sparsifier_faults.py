"""What torch's own sparsifier gets wrong, one test each: this one must not."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse_models import (
    Mlp,
    above,
    add,
    add_squares,
    batches,
    concatenated,
    inner,
    itself,
    largest,
    mean,
    mean_per_token,
    mean_size,
    peak,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flex_model import FlexModel
from flex_model.errors import SparsityError
from flex_model.sparsity import ActivationSparsifier


def smallest(a: Tensor, b: Tensor) -> Tensor:
    return torch.minimum(a, b)


def mean0(x: Tensor) -> Tensor:
    return x.mean(0)


def is_large(x: Tensor, threshold: float = 0.5) -> Tensor:
    return x.abs() >= threshold


def _on(layer: nn.Module, **given: Any) -> tuple[nn.Sequential, ActivationSparsifier]:
    """A model of one layer, looked after as "0"."""
    model = nn.Sequential(layer)
    arguments = {"aggregate_fn": add, "reduce_fn": mean0, "mask_fn": is_large, **given}
    sparsifier = ActivationSparsifier(model, **arguments)
    sparsifier.register_layer(layer)
    return model, sparsifier


def _data(sparsifier: ActivationSparsifier, name: str = "0") -> Any:
    return sparsifier.data_groups[name]["data"]


@pytest.mark.parametrize("function", [smallest, largest, concatenated])
def test_an_aggregate_starts_from_the_first_input(function: Any) -> None:
    """Zeros are no start of a minimum, of negative numbers' maximum, or of a concatenation."""
    model, sparsifier = _on(nn.Identity(), aggregate_fn=function)
    first, second = torch.full((2, 3), -4.0), torch.full((2, 3), -5.0)
    model(first)
    model(second)
    due = {"smallest": second, "largest": first, "concatenated": torch.cat([first, second])}
    assert torch.equal(_data(sparsifier), due[function.__name__])


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    ("aggregate", "reduce"), [(add, mean0), (add, mean), (largest, peak), (concatenated, mean0)]
)
def test_a_ragged_batch_is_taken_where_it_makes_sense(
    aggregate: Any, reduce: Any, size: int
) -> None:
    """Batches of 4, 4 and then 2 or 1: neither refused nor broadcast."""
    model, sparsifier = _on(nn.Identity(), aggregate_fn=aggregate, reduce_fn=reduce, mask_fn=itself)
    given = [inner(x) for x in batches(4, 4, size, 4)]
    for x in given:
        model(x)
    sparsifier.step()
    if aggregate is concatenated:
        due = torch.cat(given).mean(0)
    else:
        due = reduce(given[0])
        for x in given[1:]:
            due = aggregate(due, reduce(x))
    torch.testing.assert_close(sparsifier.get_mask("0"), due)


@pytest.mark.parametrize(
    ("aggregate", "reduce"),
    [(add, itself), (add_squares, mean), (add, mean_size), (largest, mean)],
)
@pytest.mark.parametrize("size", [1, 2])
def test_a_ragged_batch_is_refused_before_anything_is_lost(
    aggregate: Any, reduce: Any, size: int
) -> None:
    model, sparsifier = _on(nn.Identity(), aggregate_fn=aggregate, reduce_fn=reduce)
    first, ragged = (inner(x) for x in batches(4, size))
    model(first)
    with pytest.raises(SparsityError, match=r"Layer 0, aggregating.*\(4, 5, 8\).*nothing"):
        model(ragged)
    assert torch.equal(_data(sparsifier), first)
    model(first)
    assert torch.equal(_data(sparsifier), aggregate(first, first))


def test_zeros_as_start_leave_ragged_batches_to_the_function() -> None:
    """torch's way: one sample is broadcast, two are refused (here by name)."""
    model = nn.Sequential(nn.Identity())
    sparsifier = ActivationSparsifier(model, add, mean0, is_large, zero_start=True)
    sparsifier.register_layer("0")
    model(torch.ones(4, 3))
    model(torch.ones(1, 3))
    with pytest.raises(SparsityError, match="Layer 0, aggregating: RuntimeError"):
        model(torch.ones(2, 3))
    assert torch.equal(_data(sparsifier), torch.full((4, 3), 2.0))


def test_the_aggregate_keeps_no_graph() -> None:
    model, sparsifier = _on(nn.Linear(3, 3))
    x = torch.ones(2, 3, requires_grad=True)
    model(x)
    model(x)
    assert not _data(sparsifier).requires_grad


def test_a_later_change_in_place_does_not_reach_the_aggregate() -> None:
    model, sparsifier = _on(nn.ReLU(inplace=True))
    x = torch.full((2, 3), -1.0)
    model(x)
    assert torch.equal(_data(sparsifier), torch.full((2, 3), -1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_short_floats_do_not_stall(dtype: torch.dtype) -> None:
    """In float16 a sum of ones ends at 2048."""
    model, sparsifier = _on(nn.Identity())
    for _ in range(3000):
        model(torch.ones(1, 2, dtype=dtype))
    assert torch.equal(_data(sparsifier), torch.full((1, 2), 3000.0))
    sparsifier.step()
    sparsifier.squash_mask()
    assert model(torch.ones(1, 2, dtype=dtype)).dtype == dtype


def test_float64_stays() -> None:
    model, sparsifier = _on(nn.Identity())
    model(torch.ones(1, 2, dtype=torch.float64))
    assert _data(sparsifier).dtype == torch.float64


def test_a_layer_that_is_not_reached() -> None:
    """The others' masks are made; it keeps what it has, and is named where that is nothing."""
    model = nn.ModuleDict({"a": nn.Identity(), "b": nn.Identity()})
    sparsifier = ActivationSparsifier(model, add, mean0, is_large)
    for name in ("a", "b"):
        sparsifier.register_layer(model[name])
    model["a"](torch.ones(2, 3))
    sparsifier.step()
    assert sparsifier.get_mask("a").all()  # type: ignore[union-attr]
    with pytest.raises(SparsityError, match="b has no mask"):
        sparsifier.get_mask("b")
    with pytest.raises(SparsityError, match=r"\['b'\]"):
        sparsifier.squash_mask()
    assert sparsifier.data_groups["a"]["hook_state"] == "aggregate"
    sparsifier.unregister_layer("b")
    sparsifier.squash_mask()


def test_a_forward_after_step_keeps_the_mask() -> None:
    model, sparsifier = _on(nn.Identity())
    model(torch.zeros(2, 3))
    sparsifier.step()
    model(torch.ones(2, 3))
    assert not sparsifier.get_mask("0").any()  # type: ignore[union-attr]


def test_features_leave_the_callers_tensor_alone() -> None:
    model, sparsifier = _on(nn.Identity(), features=[0, 2], feature_dim=1)
    x = torch.zeros(2, 3)
    model(x)
    sparsifier.step()
    sparsifier.squash_mask()
    given = torch.ones(2, 3)
    out = model(given)
    assert torch.equal(given, torch.ones(2, 3))
    assert torch.equal(out, torch.tensor([[0.0, 1.0, 0.0]] * 2))


def test_indices_do_not_pass_through_float32() -> None:
    """2^24 + 1 is no float32: the reference takes its neighbour."""
    model, sparsifier = _on(nn.Identity(), features=[2**24 + 1], feature_dim=1)
    x = torch.zeros(1, 2**24 + 2)
    x[0, -1] = 3.0
    model(x)
    assert _data(sparsifier)[0].item() == 3.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_follow_the_inputs_dtype(dtype: torch.dtype, kind: str) -> None:
    def as_float(x: Tensor) -> Tensor:
        return is_large(x).float()

    model, sparsifier = _on(nn.Identity(), mask_fn=is_large if kind == "bool" else as_float)
    model(torch.tensor([[0.0, 2.0]]))
    sparsifier.step()
    sparsifier.squash_mask()
    out = model(torch.ones(3, 2, dtype=dtype))
    assert out.dtype == dtype
    assert torch.equal(out, torch.tensor([[0.0, 1.0]] * 3, dtype=dtype))


class TwoArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Difference()

    def forward(self, x: Tensor, by_keyword: bool) -> Tensor:
        if by_keyword:
            return self.inner(x=x, y=torch.ones_like(x))
        return self.inner(x, torch.ones_like(x))


class Difference(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x - y


@pytest.mark.parametrize("by_keyword", [False, True])
def test_layers_of_two_arguments_and_of_keywords(by_keyword: bool) -> None:
    """The first is sparsified, the second is passed on."""
    model = TwoArguments()
    sparsifier = ActivationSparsifier(model, add, mean0, is_large)
    sparsifier.register_layer(model.inner)
    model(torch.tensor([[0.0, 3.0]]), by_keyword)
    sparsifier.step()
    sparsifier.squash_mask()
    out = model(torch.tensor([[5.0, 5.0]]), by_keyword)
    assert torch.equal(out, torch.tensor([[-1.0, 4.0]]))


def _stepped() -> tuple[nn.Sequential, ActivationSparsifier]:
    model, sparsifier = _on(nn.Identity(), threshold=1.0)
    model(torch.tensor([[0.0, 2.0]]))
    sparsifier.step()
    return model, sparsifier


def test_squashing_without_a_hook_and_loading_attaches_none() -> None:
    model, sparsifier = _stepped()
    sparsifier.squash_mask(attach_sparsify_hook=False)
    other_model, other = _on(nn.Identity())
    other.load_state_dict(sparsifier.state_dict())
    for one in (model, other_model):
        assert torch.equal(one(torch.ones(1, 2)), torch.ones(1, 2))
        assert not one[0]._forward_pre_hooks
    assert other.data_groups["0"]["hook_state"] == "None"


def test_loading_onto_a_registered_one_replaces() -> None:
    """Two hooks would multiply by the mask twice: here it holds a half."""
    model, sparsifier = _stepped()
    sparsifier.squash_mask()
    state = sparsifier.state_dict()
    state["state"]["0"]["mask"] = torch.tensor([0.5, 1.0])
    for _ in range(2):
        sparsifier.load_state_dict(state)
    assert torch.equal(model(torch.ones(1, 2)), torch.tensor([[0.5, 1.0]]))
    assert len(model[0]._forward_pre_hooks) == 1


def test_registering_again_replaces() -> None:
    model, sparsifier = _stepped()
    sparsifier.register_layer(model[0])
    assert len(model[0]._forward_pre_hooks) == 1
    model(torch.ones(1, 2))
    assert torch.equal(_data(sparsifier), torch.ones(1, 2))


def test_the_state_holds_no_function(tmp_path: Path) -> None:
    """torch.load(weights_only=True) takes it, and so do safetensors and JSON."""
    _, sparsifier = _stepped()
    sparsifier.squash_mask()
    torch.save(sparsifier.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    sparsifier.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "state.pt", "sparsifier.safetensors", "sparsifier.json",
    }  # fmt: skip
    for how in ("dict", "files", "pickle"):
        model = nn.Sequential(nn.Identity())
        if how == "pickle":
            other = pickle.loads(pickle.dumps(sparsifier))  # noqa: S301, TID251
            assert other.model is None
            other.attach(model)
        else:
            other = ActivationSparsifier(model)
            _ = other.load_state_dict(loaded) if how == "dict" else other.load(tmp_path)
        assert torch.equal(model(torch.ones(1, 2)), torch.tensor([[0.0, 1.0]])), how
        assert repr(other).splitlines()[2] == "\t    name: 0"
        assert other.data_groups["0"]["sparse_config"] == {"threshold": 1.0}
        assert other.data_groups["0"]["mask_fn"] is is_large


def test_a_state_with_features(tmp_path: Path) -> None:
    model, sparsifier = _on(nn.Identity(), features=[1, 2], feature_dim=-1)
    model(torch.tensor([[0.0, 2.0, 0.0]]))
    sparsifier.step()
    sparsifier.squash_mask()
    sparsifier.save(tmp_path)
    other_model = nn.Sequential(nn.Identity())
    other = ActivationSparsifier(other_model)
    other.load(tmp_path)
    x = torch.ones(2, 3)
    assert torch.equal(other_model(x), model(x))
    assert torch.equal(other_model(x), torch.tensor([[1.0, 1.0, 0.0]] * 2))
    del other
    assert torch.equal(other_model(x), x), "hooks go with the sparsifier"


def test_a_recompute_is_aggregated_once() -> None:
    """Activation checkpointing runs the layer again within backward."""

    class Recomputed(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[return-value]

    model = Recomputed()
    sparsifier = ActivationSparsifier(model, add, mean_per_token, above, threshold=0.1)
    sparsifier.register_layer("down")
    (x,) = batches(4)
    model(x.requires_grad_()).sum().backward()
    assert torch.equal(_data(sparsifier, "down"), inner(x))


def test_nothing_is_left_on_the_model() -> None:
    model, sparsifier = _stepped()
    before = copy.deepcopy(nn.Sequential(nn.Identity())[0].__dict__)
    sparsifier.squash_mask()
    sparsifier.unregister_layer("0")
    assert model[0].__dict__ == before


def test_the_callers_own_hooks_stay() -> None:
    """A FlexModel that is given keeps what is registered with it."""
    from flex_model import HookFunction

    records: dict[str, list[Tensor]] = {}
    flex = FlexModel(Mlp(), records)
    flex.register_forward_pre_hook(HookFunction("down"))
    sparsifier = ActivationSparsifier(flex, add, mean, above, threshold=100.0)
    sparsifier.register_layer(flex.module.down)  # type: ignore[arg-type]
    (x,) = batches(2)
    flex(x)
    sparsifier.step()
    sparsifier.squash_mask()
    out = flex(x)
    assert torch.equal(out, flex.module.down.bias.expand_as(out))  # type: ignore[union-attr,operator,arg-type]
    sparsifier.unregister_layer("down")
    flex(x)
    assert [torch.equal(record, inner(x)) for record in records["down"]] == [True] * 3


# -- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"mask_fn": None}, "mask_fn"),
        ({"reduce_fn": "mean"}, "reduce_fn"),
        ({"features": [0]}, "feature_dim"),
        ({"feature_dim": 0}, "features"),
        ({"features": [0, 0], "feature_dim": 0}, "distinct"),
        ({"features": [-1], "feature_dim": 0}, "distinct"),
        ({"features": [], "feature_dim": 0}, "distinct"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any], named: str) -> None:
    with pytest.raises(SparsityError, match=named):
        _on(nn.Identity(), **given)


@pytest.mark.parametrize(
    ("given", "named"), [({"features": [9], "feature_dim": 1}, r"\[9\]"),
                         ({"features": [0], "feature_dim": 5}, "feature_dim 5")],
)  # fmt: skip
def test_features_that_do_not_exist(given: dict[str, Any], named: str) -> None:
    model, _ = _on(nn.Identity(), **given)
    with pytest.raises(SparsityError, match=named):
        model(torch.ones(2, 3))


def test_names_and_times_that_make_no_sense() -> None:
    model, sparsifier = _on(nn.Identity())
    for call in (
        lambda: sparsifier.register_layer(nn.Identity()),
        lambda: sparsifier.register_layer("1"),
        lambda: sparsifier.unregister_layer("1"),
        lambda: sparsifier.get_mask("1"),
        sparsifier.get_mask,
        sparsifier.step,
        sparsifier.squash_mask,
        lambda: sparsifier.attach(model),
    ):
        with pytest.raises(SparsityError):
            call()
    assert len(model[0]._forward_pre_hooks) == 1


def test_a_function_that_raises_tells_whose_it_is() -> None:
    def wrong(x: Tensor) -> Tensor:
        return x.sum(7)

    model, sparsifier = _on(nn.Identity(), reduce_fn=wrong)
    model(torch.ones(2, 3))
    with pytest.raises(SparsityError, match="Layer 0, making a mask: IndexError"):
        sparsifier.step()
    assert torch.equal(_data(sparsifier), torch.ones(2, 3))


def test_a_mask_that_does_not_fit() -> None:
    model, sparsifier = _on(nn.Identity(), reduce_fn=itself)
    model(torch.ones(2, 3))
    sparsifier.step()
    sparsifier.squash_mask()
    for x in (torch.ones(5, 3), torch.ones(1, 3)):
        with pytest.raises(SparsityError, match=r"Layer 0, sparsifying: a mask \(2, 3\)"):
            model(x)


def test_functions_without_a_name_are_not_saved() -> None:
    _, sparsifier = _on(nn.Identity(), mask_fn=lambda x: x)
    with pytest.raises(SparsityError, match="saved by name"):
        sparsifier.state_dict()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.pop("defaults"),
        lambda state: state["data_groups"]["0"].pop("mask_fn"),
        lambda state: state["data_groups"]["0"].update(mask_fn="nowhere:f"),
        lambda state: state["data_groups"]["0"].update(hook_state="other"),
        lambda state: state["state"]["0"].update(mask=None),
        lambda state: state["state"].update({"1": {"mask": None}}),
        lambda state: [state[key].update({"other": state[key].pop("0")})
                       for key in ("state", "data_groups")],
    ],
)  # fmt: skip
def test_states_of_something_else_change_nothing(spoil: Any) -> None:
    model, sparsifier = _stepped()
    sparsifier.squash_mask()
    state = sparsifier.state_dict()
    spoil(state)
    with pytest.raises(SparsityError):
        sparsifier.load_state_dict(state)
    assert torch.equal(model(torch.ones(1, 2)), torch.tensor([[0.0, 1.0]]))
    assert len(model[0]._forward_pre_hooks) == 1


def test_files_of_something_else(tmp_path: Path) -> None:
    sparsifier = ActivationSparsifier(nn.Sequential(nn.Identity()))
    with pytest.raises(SparsityError, match="holds no"):
        sparsifier.load(tmp_path)
    (tmp_path / "sparsifier.json").write_text("{}")
    (tmp_path / "sparsifier.safetensors").write_bytes(b"spoilt")
    with pytest.raises(SparsityError, match="holds no"):
        sparsifier.load(tmp_path)
