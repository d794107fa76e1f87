"""Parts of fused projections and single heads: read and edited as one process has them."""

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from flex_model import FlexModel, HookFunction
from flex_model.errors import RegistrationError
from flex_model.testing.edits import PROBE, new_probe
from flex_model.testing.ranks import run_ranks
from flex_model.testing.raw_hooks import hook_raw, recorder
from flex_model.testing.step import Outcome, differences, take_step
from frameworks.rows import row

HEAD = 8
GROUP = 2 * HEAD + 2 * HEAD  # Megatron's: two queries, their key and their value


def _ranges(*bounds: tuple[int, int]) -> list[int]:
    return [position for start, stop in bounds for position in range(start, stop)]


@dataclass(frozen=True)
class Part:
    """A part, and where it stands along the last dim of one process's activation."""

    module: str
    part: str | None
    head: int | None
    positions: tuple[int, ...]
    kind: str = "forward"

    @property
    def key(self) -> str:
        chosen = ".".join(str(item) for item in (self.part, self.head) if item is not None)
        return f"{self.module}:{chosen}"


_ATTENTION = "decoder.layers.1.self_attention"
_QKV = f"{_ATTENTION}.linear_qkv"
_FC1 = "decoder.layers.0.mlp.linear_fc1"


def _part(module: str, part: str | None, head: int | None, *bounds: tuple[int, int]) -> Part:
    return Part(module, part, head, tuple(_ranges(*bounds)))


MEGATRON = (
    _part(_QKV, "q", None, (0, 16), (GROUP, GROUP + 16)),
    _part(_QKV, "k", None, (16, 24), (GROUP + 16, GROUP + 24)),
    _part(_QKV, "v", None, (24, 32), (GROUP + 24, GROUP + 32)),
    _part(_QKV, "q", 3, (GROUP + 8, GROUP + 16)),
    _part(_QKV, "k", 0, (16, 24)),
    _part(_FC1, "gate", None, (0, 40)),
    _part(_FC1, "up", None, (40, 80)),
    _part(f"{_ATTENTION}.core_attention", None, 2, (16, 24)),
    Part(f"{_ATTENTION}.linear_proj", None, 1, tuple(range(8, 16)), "forward_pre"),
)
MEGATRON_ONE_KV = (
    _part(_QKV, "q", None, (0, 32)),
    _part(_QKV, "k", None, (32, 40)),
    _part(_QKV, "v", 0, (40, 48)),
    _part(_QKV, "q", 1, (8, 16)),
)
_LLAMA = "model.layers.1.self_attn"
TRANSFORMERS = (
    _part(f"{_LLAMA}.q_proj", None, 2, (16, 24)),
    _part(f"{_LLAMA}.k_proj", "k", 1, (8, 16)),
    Part(f"{_LLAMA}.o_proj", None, 3, tuple(range(24, 32)), "forward_pre"),
)
PARTS = [
    *(("megatron", part) for part in MEGATRON),
    *(("megatron sequence", part) for part in MEGATRON[:1]),
    *(("megatron 1 kv head", part) for part in MEGATRON_ONE_KV),
    *(("transformers", part) for part in TRANSFORMERS),
]


def _edit(module: Any, x: Tensor, save_ctx: Any, modules: Any) -> Tensor:
    """Mixes the features, the tokens and the samples of the part."""
    rolled = torch.roll(x, 1, 0) + torch.roll(x, 1, 1)
    return x + torch.softmax(x, -1) + 0.5 * rolled + modules[PROBE](x)


def _truth(name: str, part: Part) -> Outcome:
    """One process, by a plain torch hook that cuts the part out by its positions."""
    probe, records = new_probe(len(part.positions)), []
    keep = recorder(records, lambda x: _edit(None, x, None, {PROBE: probe}))

    def visit(whole: Tensor) -> Tensor:
        edited = whole.clone()
        edited[..., list(part.positions)] = keep(whole[..., list(part.positions)])
        return edited

    case = row(name)
    with case.whole() as model:
        handle = hook_raw(model.module.get_submodule(part.module), part.kind, 0, visit)
        outcome = take_step(case, model, model.module, replicas=1).note_hook(records, probe)
        handle.remove()
    return outcome


def _same(name: str, part: Part, due: Outcome) -> dict[str, tuple[float, str]]:
    case, records = row(name), {}
    probe = new_probe(len(part.positions))
    hook = HookFunction(part.module, editing_function=_edit, part=part.part, head=part.head)
    with case.sharded() as model, FlexModel(model.module, records, case.tp) as flex:
        flex.register_trainable_module(PROBE, probe)
        getattr(flex, f"register_{part.kind}_hook")(hook)
        assert flex.record_key(hook) == part.key
        found = take_step(case, model, flex, case.dp).note_hook(records.get(part.key, []), probe)
        return differences(case, model, found, due)


@pytest.mark.parametrize(
    ("name", "part"), PARTS, ids=[f"{name}-{part.key}-{part.kind}" for name, part in PARTS]
)
def test_a_part_is_read_and_edited_as_on_one_process(name: str, part: Part) -> None:
    """Catches parts grouped by rank, another head, gradients that miss the part or the rest."""
    due = run_ranks(_truth, 1, name, part)[0]
    assert due.records[0].shape[-1] == len(part.positions)
    for found in run_ranks(_same, 2, name, part, due):
        for quantity, (error, worst) in found.items():
            assert error <= 1e-5, (quantity, worst, error)


def _entries_sent(**part: str) -> int:
    """How many entries a rank sends to where records are kept."""
    case, sent, gather = row("megatron"), [], dist.gather

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(tensor.numel())
        return gather(tensor, *args, **kwargs)

    with case.sharded() as model, FlexModel(model.module, {}, case.tp) as flex:
        flex.register_forward_hook(HookFunction(_QKV, **part))
        with patch.object(dist, "gather", counting):
            model.logits(flex, case.data.tokens(1)[0][:, :-1])
    return sum(sent)


def _moved() -> tuple[int, int]:
    return _entries_sent(), _entries_sent(part="k")


def test_only_the_part_is_moved() -> None:
    """Catches a gather of the whole projection for a part that every rank holds its share of."""
    for whole, keys in run_ranks(_moved, 2):
        assert 0 < keys * 4 == whole


class _Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)


def test_what_has_no_such_part_is_refused_at_registration() -> None:
    """Catches a guess at where heads lie, and a typing error that shows in the forward only."""
    with FlexModel(_Plain(), {}) as flex, pytest.raises(RegistrationError, match=r"q_proj.*head"):
        flex.register_forward_hook(HookFunction("q_proj", head=1))
    case = row("transformers")
    with case.whole() as model, FlexModel(model.module, {}) as flex:
        for part, words in (
            (HookFunction(f"{_LLAMA}.q_proj", part="k"), r"no part 'k', but \['q'\]"),
            (HookFunction(f"{_LLAMA}.q_proj", head=4), "no head 4, but 4"),
            (HookFunction("model.norm", head=0), "nothing tells"),
        ):
            with pytest.raises(RegistrationError, match=words):
                flex.register_forward_hook(part)
