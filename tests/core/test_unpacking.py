"""One tensor found in whatever a module takes or returns, and another put in its place."""

import dataclasses
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaModel
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from flex_model import FlexModel, HookFunction
from flex_model.core.unpacking import count_tensors, find_tensor, tensors_in
from flex_model.errors import LayoutError


class Named(NamedTuple):
    first: Tensor
    note: str
    second: Tensor


Plain = namedtuple("Plain", ["x", "y"])


@dataclasses.dataclass
class Opened:
    first: Tensor
    note: str
    inner: dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Frozen:
    only: Tensor
    nothing: None = None


def _numbers(count: int) -> list[Tensor]:
    return [torch.full((2, 3), float(number)) for number in range(count)]


def _caches(make: Callable[[], Any], layers: int) -> Any:
    cache = make()
    for layer in range(layers):
        cache.update(
            torch.full((1, 1, 2, 3), 2.0 * layer), torch.full((1, 1, 2, 3), 2.0 * layer + 1), layer
        )
    return cache


def _trees() -> dict[str, Any]:
    a, b, c, d = _numbers(4)
    return {
        "tensor": a,
        "parameter": nn.Parameter(a),
        "tuple": (a, b),
        "tuple with others": (None, a, 3, "text", b),
        "list": [a, [b, c]],
        "dict": {"z": a, "a": b},
        "ordered dict": OrderedDict(z=a, a=b),
        "named tuple": Named(a, "note", b),
        "untyped named tuple": Plain(a, b),
        "return type": torch.max(torch.stack([a, b]), 0),
        "dataclass": Opened(a, "note", {"inner": b}),
        "frozen dataclass": Frozen(a),
        "list of dataclasses": [Frozen(a), Opened(b, "", {"x": c}), d],
        "model output": BaseModelOutputWithPast(last_hidden_state=a, hidden_states=(b, c)),
        "model output with a cache": BaseModelOutputWithPast(
            last_hidden_state=a, past_key_values=_caches(DynamicCache, 2)
        ),
        "cache": _caches(DynamicCache, 2),
        "args and kwargs": ((a, None), {"mask": b, "cache": _caches(DynamicCache, 1)}),
    }


COUNTS = {
    "tensor": 1,
    "parameter": 1,
    "tuple": 2,
    "tuple with others": 2,
    "list": 3,
    "dict": 2,
    "ordered dict": 2,
    "named tuple": 2,
    "untyped named tuple": 2,
    "return type": 2,
    "dataclass": 2,
    "frozen dataclass": 1,
    "list of dataclasses": 4,
    "model output": 3,
    "model output with a cache": 5,
    "cache": 4,
    "args and kwargs": 4,
}


@pytest.mark.parametrize("name", COUNTS)
def test_every_tensor_is_counted_found_and_replaced_alone(name: str) -> None:
    """Catches a container that is passed over in silence, and a neighbour that is lost or moved."""
    count = COUNTS[name]
    assert count_tensors(_trees()[name]) == count
    for index in range(-count, count):
        tree = _trees()[name]
        before = list(tensors_in(tree))
        found = find_tensor(tree, index)
        assert found is not None
        tensor, repack = found
        assert tensor is before[index]
        new = tensor.detach() + 100
        after = repack(new)
        assert type(after) is (Tensor if name == "parameter" else type(tree))
        due = [new if at == index % count else old for at, old in enumerate(before)]
        assert all(x is y for x, y in zip(tensors_in(after), due, strict=True))


@pytest.mark.parametrize("name", COUNTS)
def test_no_tensor_beyond_the_last(name: str) -> None:
    """Catches an index that wraps round, or that fails with an error of another part."""
    tree = _trees()[name]
    assert find_tensor(tree, COUNTS[name]) is None
    assert find_tensor(tree, -COUNTS[name] - 1) is None


@pytest.mark.parametrize("tree", [None, 3, "text", (), {}, [], (None, {"x": 1}), object()])
def test_nothing_in_what_holds_no_tensor(tree: Any) -> None:
    """Catches an object opened, or taken for a tensor, that is none."""
    assert count_tensors(tree) == 0
    assert find_tensor(tree, 0) is None


def test_what_is_no_tensor_stays_as_it_was() -> None:
    """Catches notes, ``None`` and numbers lost as a tree is taken apart and put together."""
    a, b = _numbers(2)
    found = find_tensor(Opened(a, "kept", {"x": b}), 1)
    assert found is not None
    assert found[1](a).note == "kept"
    found = find_tensor((None, a, 3, "text", {"k": b}), 0)
    assert found is not None
    assert found[1](b)[0::2] == (None, 3, {"k": b})
    output = BaseModelOutputWithPast(last_hidden_state=a)
    found = find_tensor(output, 0)
    assert found is not None
    assert list(found[1](b).keys()) == ["last_hidden_state"]


def test_a_cache_is_changed_in_place() -> None:
    """Catches an edited copy that the model, which holds on to its cache, never sees."""
    cache = _caches(DynamicCache, 2)
    found = find_tensor(cache, 3)
    assert found is not None
    assert found[1](torch.ones(1, 1, 2, 3)) is cache
    assert torch.equal(cache.layers[1].values, torch.ones(1, 1, 2, 3))


def test_both_caches_of_an_encoder_and_a_decoder() -> None:
    """Catches a cache that holds its layers one level down, as those of T5 and Whisper do."""
    cache = EncoderDecoderCache(_caches(DynamicCache, 1), _caches(DynamicCache, 2))
    assert count_tensors(cache) == 6


# -- through a FlexModel -----------------------------------------------------------------------


class Returns(nn.Module):
    """Gives back what it is told to."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


def _hundred(module: nn.Module, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    return x + 100


@pytest.mark.parametrize(
    ("make", "index", "read"),
    [
        (lambda x: (x, x + 1), 1, lambda out: out[1]),
        (lambda x: {"b": x, "a": x + 1}, 1, lambda out: out["a"]),
        (lambda x: Named(x, "", x + 1), 1, lambda out: out.second),
        (lambda x: Opened(x, "", {"k": x + 1}), -1, lambda out: out.inner["k"]),
        (lambda x: BaseModelOutputWithPast(x, None, (x, x + 1)), 2, lambda o: o.hidden_states[1]),
        (lambda x: [None, "x", {"y": (x, [x + 1])}], 1, lambda out: out[2]["y"][1][0]),
    ],
)
def test_an_edit_of_any_output(
    make: Callable[[Tensor], Any], index: int, read: Callable[[Any], Tensor]
) -> None:
    """Catches outputs that are silently ignored: nothing recorded, nothing edited."""
    records: dict[str, list[Tensor]] = {}
    x = torch.arange(6.0).reshape(2, 3)
    with FlexModel(nn.Sequential(Returns(make)), records) as model:
        model.register_forward_hook(HookFunction("0", None, _hundred, index))
        assert torch.equal(read(model(x)), x + 101)
    assert torch.equal(records["0"][0], x + 1)


def test_a_parameter_as_output() -> None:
    """Catches an ``nn.Parameter`` taken for no tensor."""
    layer = nn.Linear(2, 2)
    records: dict[str, list[Tensor]] = {}
    with FlexModel(nn.Sequential(Returns(lambda x: layer.weight)), records) as model:
        model.register_forward_hook(HookFunction("0", editing_function=_hundred))
        assert torch.equal(model(torch.ones(1)), layer.weight + 100)
    assert torch.equal(records["0"][0], layer.weight.detach())


class Takes(nn.Module):
    """Adds up with weights that tell every argument apart."""

    def forward(self, x: Tensor, y: Any, *, mask: Tensor, extra: Any = None) -> Tensor:
        total = x + 10 * y["in"] + 100 * mask
        return total if extra is None else total + 1000 * extra[0]


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Takes()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, {"in": x}, extra=[x], mask=x)


@pytest.mark.parametrize(("index", "weight"), [(0, 1), (1, 10), (2, 1000), (3, 100), (-1, 100)])
def test_a_pre_hook_counts_args_then_kwargs(index: int, weight: float) -> None:
    """Catches keyword arguments that are not seen, or counted in another order than the call's."""
    records: dict[str, list[Tensor]] = {}
    x = torch.ones(2)
    with FlexModel(Calls(), records) as model:
        model.register_forward_pre_hook(HookFunction("inner", None, _hundred, index))
        assert torch.equal(model(x), x * (1111 + 100 * weight))
    assert torch.equal(records["inner"][0], x)


def test_a_module_called_by_keywords_alone() -> None:
    """Catches the way transformers calls its attention: nothing positional at all."""

    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(input=x)

    with FlexModel(Keywords(), {}) as model:
        model.register_forward_pre_hook(HookFunction("inner", editing_function=_hundred))
        assert torch.equal(model(torch.zeros(2)), torch.full((2,), 100.0))


@pytest.mark.parametrize("index", [2, 9, -3])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_an_index_out_of_range_is_named(kind: str, index: int) -> None:
    """Catches a hook that is passed over because there is no such tensor."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Returns(lambda x: (x * 1, x + 1))

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.inner(x)
            return first + second

    with FlexModel(Two(), {}) as model:
        register = getattr(model, f"register_{kind}_hook")
        register(HookFunction("inner", unpack_idx=index))
        with pytest.raises(LayoutError, match=rf"inner .*unpack_idx={index}.*tensors"):
            model(torch.ones(2, requires_grad=True)).sum().backward()


def test_backward_hooks_count_tensors_too() -> None:
    """Catches a gradient index that counts arguments which are no tensors."""

    class Mixed(nn.Module):
        def forward(self, note: str, x: Tensor, y: Tensor) -> tuple[str, Tensor, Tensor]:
            return note, x * 2, y * 3

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Mixed()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            _, a, b = self.inner("note", x, y)
            return (a * 5 + b * 7).sum()

    for index in (0, 1, -1):
        records: dict[str, list[Tensor]] = {}
        x, y = (torch.ones(2, requires_grad=True) for _ in range(2))
        with FlexModel(Outer(), records) as model:
            inputs = HookFunction("inner", unpack_idx=index)
            outputs = HookFunction("inner", unpack_idx=index)
            model.register_full_backward_hook(inputs)
            model.register_full_backward_pre_hook(outputs)
            keys = model.record_key(inputs), model.record_key(outputs)
            model(x, y).backward()
        assert records[keys[0]][0].tolist() == [[10.0] * 2, [21.0] * 2][index]
        assert records[keys[1]][0].tolist() == [[5.0] * 2, [7.0] * 2][index]


def test_a_cache_of_a_real_model_is_edited() -> None:
    """Catches an edited cache that the next token does not see."""
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = LlamaModel(config).eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        plain = model(ids, use_cache=True)
        due = plain.past_key_values.layers[1].values.clone()
        records: dict[str, list[Tensor]] = {}
        with FlexModel(model, records) as flex:
            # Counted: the last hidden state, then keys and values of both layers.
            flex.register_forward_hook(HookFunction("", None, _hundred, 4))
            cache = flex(ids, use_cache=True).past_key_values
        assert torch.equal(records[""][0], due)
        assert torch.equal(cache.layers[1].values, due + 100)
        after = model(torch.tensor([[4]]), past_key_values=cache).last_hidden_state
        before = model(torch.tensor([[4]]), past_key_values=plain.past_key_values).last_hidden_state
    assert not torch.allclose(after, before)
