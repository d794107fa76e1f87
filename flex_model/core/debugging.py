"""What ``FlexModel(debug=True)`` looks for at every edit, at the price of time and traffic.

* a function that declared to need less than the whole tensor, but gives another result on it;
* a NaN where the input had none;
* replicas that hold different edited tensors: of such hooks the first is named.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flex_model.core.hook_function import Edit
from flex_model.core.local_shard import LocalShard
from flex_model.core.randomness import repeated
from flex_model.core.session import Session
from flex_model.distributed.routing import assemble, disassemble
from flex_model.errors import EditError, RankDisagreementError
from flex_model.layouts.layout import ActivationLayout

__all__ = ["check_replicas", "check_statistic", "checked_edit"]

Invoke = Callable[[Tensor, LocalShard, Namespace], Any]

# The same arithmetic on the same numbers, but a kernel may take a row of another length in another
# order: what a function claimed wrongly is off by orders of magnitude more.
_RELATIVE = 1e-4


def checked_edit(
    invoke: Invoke, part: Tensor, local: ActivationLayout, session: Session, where: str
) -> Any:
    """Run an editing function on its part, and (if that is not all) on the whole besides.

    Raises:
        EditError: the function made a NaN, or claimed too much.
    """
    before = part.detach().clone()
    shard = LocalShard(part.shape, local, session.mesh)
    with repeated(part.device) as again:
        result = invoke(part, shard, session.save_ctx)
        if local.dims and isinstance(result, Tensor):
            again()
            expected = disassemble(_on_whole(invoke, before, local, session), local, session.mesh)
            _compare(result, expected, invoke, where)
    if _has_nan(result) and not _has_nan(before):
        raise EditError(
            f"{where}: {_name(invoke)} made a NaN of an input {tuple(before.shape)} without one. "
            "Edits keep values finite; debug=False lets NaNs pass."
        )
    return result


def check_statistic(
    invoke: Invoke,
    part: Tensor,
    local: ActivationLayout,
    combined: Tensor,
    session: Session,
    where: str,
) -> None:
    """Compare a statistic that was combined from the ranks' parts with that of the whole."""
    _compare(combined, _on_whole(invoke, part, local, session), invoke, where)


def check_replicas(edited: Tensor, session: Session, where: str) -> None:
    """Compare what the ranks made of the same whole tensor.

    Raises:
        RankDisagreementError: alike on every rank.
    """
    if session.mesh.control is None:
        return
    flat = edited.detach().reshape(-1).to(torch.float64)
    ramp = torch.arange(1, flat.numel() + 1, dtype=torch.float64, device=flat.device)
    sums = torch.stack((flat.sum(), flat @ ramp, flat.abs() @ ramp)).cpu()
    rows = session.mesh.control.exchange(sums.view(torch.int64).tolist())
    found = {rank: torch.tensor(row).view(torch.float64) for rank, row in rows.items()}
    first = next(iter(found.values()))
    apart = [
        rank
        for rank, own in found.items()
        if not torch.allclose(own[:2], first[:2], rtol=_RELATIVE, atol=_RELATIVE * float(first[2]))
    ]
    if apart:
        raise RankDisagreementError(
            f"{where.partition(',')[0]}): the edited tensor {tuple(edited.shape)} on ranks {apart} "
            f"is another than on rank {next(iter(found))}. An edit must compute the same on every "
            "rank: from its input, save_ctx, trainable modules and torch's random numbers alone."
        )


def _on_whole(invoke: Invoke, part: Tensor, local: ActivationLayout, session: Session) -> Tensor:
    whole = assemble(part, local, session.mesh)
    everything = LocalShard(whole.shape, ActivationLayout(), session.mesh)
    with torch.no_grad():
        result: Tensor = invoke(whole, everything, Namespace(**vars(session.save_ctx)))
    return result


def _compare(actual: Tensor, expected: Tensor, invoke: Invoke, where: str) -> None:
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    close = partial(torch.allclose, rtol=_RELATIVE, atol=_RELATIVE * largest, equal_nan=True)
    if actual.shape != expected.shape or not close(actual.detach(), expected):
        raise EditError(
            f"{where}: {_name(invoke)} declared to need only a part of the tensor, but gives "
            "another result on the part than on the whole. Declare what it mixes, or nothing."
        )


def _has_nan(value: Any) -> bool:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return floating and bool(value.isnan().any())


def _name(invoke: Any) -> str:
    edit: Edit = invoke.args[0]
    return edit.name
