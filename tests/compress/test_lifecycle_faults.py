"""What the reference's lifecycle gets wrong, and bad input: named errors, the model as it was."""

from typing import Any

import pytest
import torch
from compress_models import Mlp, add, batches, mean_of_tokens
from golden_lifecycle import Recorder, flags_of
from pydantic import PrivateAttr, ValidationError
from torch import Tensor, nn

from flex_model import FlexModel, HookFunction
from flex_model.compress import (
    Event,
    EventType,
    GroupsModifier,
    HooksMixin,
    Lifecycle,
    Modifier,
    ScoreModifier,
    SparsifyModifier,
    State,
)
from flex_model.errors import CompressionError, ModifierStateError


class Doubling(Modifier):
    """Doubles a layer's output; raises in a callback, if asked."""

    fails: str | None = None
    _layer: Any = PrivateAttr(default=None)
    _bias: Any = PrivateAttr(default=None)

    def on_initialize(self, state: State, **kwargs: Any) -> bool:
        self._layer = state.model.down  # type: ignore[union-attr]
        self.register_hook(self._layer, lambda module, args, output: 2 * output)
        self._bias = self._layer.bias.detach().clone()
        with torch.no_grad():
            self._layer.bias.add_(1.0)
        self._raise("on_initialize")
        return True

    def on_undo(self, state: State) -> None:
        if self._layer is not None:
            with torch.no_grad():
                self._layer.bias.copy_(self._bias)
            self._layer = None

    def on_update(self, state: State, event: Event, **kwargs: Any) -> None:
        self._raise("on_update")

    def on_finalize(self, state: State, **kwargs: Any) -> bool:
        self._raise("on_finalize")
        return True

    def _raise(self, where: str) -> None:
        if self.fails == where:
            raise KeyError("of the caller's")


def _batch(lifecycle: Lifecycle, **kwargs: Any) -> None:
    lifecycle.event("batch_start", **kwargs)
    lifecycle.event("batch_end", **kwargs)


# -- the faults --------------------------------------------------------------------------------


def test_events_carry_the_step() -> None:
    """start=2, end=4: on for the third and the fourth batch."""
    recorder = Recorder(name="a", start=2, end=4)
    lifecycle = Lifecycle([recorder])
    lifecycle.initialize()
    running = []
    for _ in range(6):
        lifecycle.event("batch_start")
        running.append(recorder.started and not recorder.ended)
        lifecycle.event("batch_end")
    assert running == [False, False, True, True, False, False]
    assert lifecycle.global_step == 6


def test_epochs() -> None:
    """With the length of an epoch, start and end are epochs."""
    recorder = Recorder(name="a", start=0.5, end=1.0)
    lifecycle = Lifecycle([recorder], steps_per_epoch=4)
    lifecycle.initialize()
    _batch(lifecycle)
    _batch(lifecycle)
    assert not recorder.started
    _batch(lifecycle)
    assert recorder.started
    assert not recorder.ended
    _batch(lifecycle)
    assert recorder.ended


def test_a_failing_second_modifier_undoes_the_first() -> None:
    model = Mlp()
    (x,) = batches(1)
    due, bias = model(x), model.down.bias.detach().clone()
    first, second = Doubling(start=0), Doubling(fails="on_initialize")
    lifecycle = Lifecycle([first, second])
    with pytest.raises(CompressionError, match=r"Doubling\.on_initialize.*KeyError"):
        lifecycle.initialize(model=model)
    assert torch.equal(model(x), due)
    assert torch.equal(model.down.bias, bias)
    assert not any(flags_of(first).values())
    assert not lifecycle.initialized
    second.fails = None
    lifecycle.initialize()
    assert torch.allclose(model(x), 4 * (due + 2), atol=1e-5)
    lifecycle.finalize()
    assert torch.allclose(model(x), due + 2, atol=1e-5)


def test_disabling_nests() -> None:
    """The reference's inner context re-enables hooks inside the outer one."""
    model, (x,) = Mlp(), batches(1)
    flex = FlexModel(model, {})
    due = model(x)
    modifier = Doubling()
    lifecycle = Lifecycle([modifier])
    lifecycle.initialize(model=flex.module)

    def tripled(current_module: Any, inputs: Tensor, save_ctx: Any, modules: Any) -> Tensor:
        return 3 * inputs

    modifier.register_flex_hook(flex, HookFunction("down", editing_function=tripled))
    hooked = model(x)
    assert torch.allclose(hooked, 6 * (due + 1), atol=1e-5)
    with lifecycle.disable_hooks():
        with modifier.disable_hooks():
            assert torch.allclose(model(x), due + 1)
        assert torch.allclose(model(x), due + 1)
    assert torch.equal(model(x), hooked)
    other = Doubling()
    other.initialize(State(model=model))
    with modifier.disable_hooks():
        assert torch.allclose(model(x), 2 * (due + 2), atol=1e-5), "the other's stay on"


def test_a_second_calibration_start_is_not_heard_twice() -> None:
    recorder = Recorder(name="a")
    recorder.initialize(State())
    event = Event(type_=EventType("calibration_start"))
    recorder.update_event(State(), event)
    recorder.update_event(State(), event)
    assert [call[1] for call in recorder._calls].count("on_calibration_start") == 1
    lifecycle = Lifecycle([Recorder(name="b")])
    lifecycle.initialize()
    lifecycle.event("calibration_start")
    with pytest.raises(CompressionError, match="calibration_epoch_start came during"):
        lifecycle.event("calibration_epoch_start")
    lifecycle.event("calibration_end")
    for late in ("sequential_epoch_end", "calibration_end"):
        with pytest.raises(CompressionError, match="outside a calibration"):
            lifecycle.event(late)


def test_finalizing_takes_every_hook_off_whatever_fails() -> None:
    """Hooks of a FlexModel too, and of those behind the one that fails."""
    model, (x,) = Mlp(), batches(1)
    due = model(x)
    lifecycle = Lifecycle([Doubling(fails="on_finalize"), Doubling()])
    lifecycle.initialize(model=model)
    with pytest.raises(CompressionError, match=r"Doubling\.on_finalize"):
        lifecycle.finalize()
    assert torch.allclose(model(x), due + 2, atol=1e-5)
    assert not model.down._forward_hooks


# -- bad input ---------------------------------------------------------------------------------


def test_a_callback_that_raises_in_mid_epoch() -> None:
    """Named with its step; no hook and no change is left, and the run can begin again."""
    model, (x,) = Mlp(), batches(1)
    due, bias = model(x), model.down.bias.detach().clone()
    first, second = Doubling(start=0), Doubling(start=2, fails="on_update")
    lifecycle = Lifecycle([first, second])
    lifecycle.initialize(model=model)
    _batch(lifecycle)
    _batch(lifecycle)
    with pytest.raises(CompressionError, match=r"Doubling\.on_update at batch_start, step 2"):
        lifecycle.event("batch_start")
    assert torch.equal(model.down.bias, bias)
    assert torch.equal(model(x), due)
    with pytest.raises(CompressionError, match="before initializing"):
        lifecycle.event("batch_end")
    second.fails = None
    lifecycle.initialize()
    _batch(lifecycle)
    lifecycle.finalize()


class Stubborn(Doubling):
    """Cannot be undone."""

    def on_undo(self, state: State) -> None:
        super().on_undo(state)
        raise KeyError("cannot")


def test_one_that_cannot_be_undone_keeps_no_other_from_it() -> None:
    model, (x,) = Mlp(), batches(1)
    due = model(x)
    lifecycle = Lifecycle([Doubling(), Stubborn(), Doubling(start=0, fails="on_update")])
    lifecycle.initialize(model=model)
    with pytest.raises(CompressionError, match="Stubborn could not be undone") as caught:
        lifecycle.event("batch_start")
    assert "on_update" in str(caught.value.__context__)
    assert torch.equal(model(x), due)
    assert not any(modifier.initialized for modifier in lifecycle.modifiers)


def test_modifiers_used_twice() -> None:
    modifier = Recorder(name="a")
    with pytest.raises(CompressionError, match="twice"):
        Lifecycle([modifier, modifier])
    Lifecycle([modifier]).initialize()
    other = Lifecycle([modifier])
    with pytest.raises(ModifierStateError, match="already been initialized"):
        other.initialize()
    assert flags_of(modifier)["initialized"], "the first lifecycle goes on with it"
    modifier.finalize(State())
    for call in (modifier.initialize, modifier.finalize):
        with pytest.raises(RuntimeError):
            call(State())
    with pytest.raises(ModifierStateError, match="finalized"):
        modifier.update_event(State(), Event())


@pytest.mark.parametrize(
    ("events", "named"),
    [
        (["loss_calculated"], "loss_calculated came after batch_end"),
        (["batch_start", "batch_start"], "batch_start came after batch_start"),
        (["batch_start", "optim_post_step", "batch_start"], "batch_start came after optim_post"),
        (["no_such_event"], "no_such_event"),
        (["initialize"], "Cannot invoke the event initialize"),
    ],
)
def test_events_out_of_order(events: list[str], named: str) -> None:
    lifecycle = Lifecycle([Recorder(name="a", start=0)])
    lifecycle.initialize()
    for event in events[:-1]:
        lifecycle.event(event)
    before = (lifecycle.last_event, lifecycle.global_step)
    with pytest.raises(CompressionError, match=named):
        lifecycle.event(events[-1], loss=1.0)
    assert (lifecycle.last_event, lifecycle.global_step) == before


def _frozen() -> nn.Parameter:
    return nn.Parameter(torch.ones(2), requires_grad=False)


@pytest.mark.parametrize(
    ("target", "kind", "named"),
    [
        (_frozen(), "tensor", "frozen"),
        (nn.Parameter(torch.ones(2, device="meta")), "tensor", "meta"),
        (nn.Linear(2, 2), "tensor", "parameter"),
        (nn.Parameter(torch.ones(2)), "forward", "module"),
        (nn.Linear(2, 2), "sideways", "sideways"),
    ],
)
def test_hooks_where_none_can_be(target: Any, kind: Any, named: str) -> None:
    owner = HooksMixin()
    with pytest.raises(CompressionError, match=named):
        owner.register_hook(target, lambda *args: None, kind)
    assert not owner._handles


def test_hooks_on_parameters_and_backward() -> None:
    owner, layer = HooksMixin(), nn.Linear(2, 2)
    seen: list[str] = []
    owner.register_hook(layer.weight, lambda grad: seen.append("weight"), "tensor")
    owner.register_hook(layer, lambda *args: seen.append("inputs"), "full_backward")
    x = torch.ones(1, 2, requires_grad=True)
    layer(x).sum().backward()
    assert sorted(seen) == ["inputs", "weight"]
    owner.remove_hooks()
    layer(x).sum().backward()
    assert len(seen) == 2


def test_fields_that_do_not_exist() -> None:
    with pytest.raises(ValidationError, match="begin"):
        ScoreModifier(layers=["a"], begin=1)  # type: ignore[call-arg]
    with pytest.raises(CompressionError, match="modell"):
        Lifecycle().initialize(modell=None)
    state = State()
    state.update(calib_data=[1], device="cpu", loss=None)
    assert state.data.calib == [1]
    assert state.hardware.device == "cpu"
    assert not state.compression_ready


@pytest.mark.parametrize("model", [None, Mlp()])
def test_groups_need_a_flex_model(model: Any) -> None:
    lifecycle = Lifecycle([GroupsModifier(groups=["probes"])])
    with pytest.raises(CompressionError, match="FlexModel"):
        lifecycle.initialize(model=model)
    with pytest.raises(CompressionError, match="GroupError: No hook group"):
        lifecycle.initialize(model=FlexModel(Mlp(), {}))


# -- hook groups -------------------------------------------------------------------------------


def _runs(flex: FlexModel, lifecycle: Lifecycle, count: int) -> list[int]:
    """In which steps hooks of a group record."""
    records: list[Tensor] = flex.output_ptr.setdefault("up", [])
    found = []
    for step, x in enumerate(batches(count)):
        before = len(records)
        lifecycle.event("batch_start")
        flex(x)
        lifecycle.event("batch_end")
        if len(records) > before:
            found.append(step)
    return found


@pytest.mark.parametrize(
    ("fields", "due"),
    [
        ({"start": 2, "end": 5}, [2, 3, 4]),
        ({"start": 0, "end": 8, "update": 3}, [0, 3, 6]),
        ({"start": 6}, [6, 7, 8]),
        ({}, []),
    ],
)
def test_groups_are_on_in_their_steps(fields: dict[str, Any], due: list[int]) -> None:
    flex = FlexModel(Mlp(), {})
    flex.create_hook_group("probes", "up")
    lifecycle = Lifecycle([GroupsModifier(groups=["probes"], **fields)])
    lifecycle.initialize(model=flex)
    assert _runs(flex, lifecycle, 9) == due
    lifecycle.finalize()
    flex(batches(1)[0])
    assert len(flex.output_ptr["up"]) == len(due) + 1, "on again, as without a recipe"


def test_two_recipes_on_overlapping_groups() -> None:
    """Off is off, whichever began first."""
    flex = FlexModel(Mlp(), {})
    flex.create_hook_group("a", "up")
    flex.update_hook_groups("up", "b")
    lifecycle = Lifecycle(
        [GroupsModifier(groups=["a"], start=1, end=4), GroupsModifier(groups=["b"], start=2, end=6)]
    )
    lifecycle.initialize(model=flex)
    assert _runs(flex, lifecycle, 7) == [2, 3]


def test_masks_are_made_anew() -> None:
    """update=2: at the end of every second batch."""
    modifier = SparsifyModifier(
        layers=["down"], aggregate=add, reduce=mean_of_tokens, mask=torch.sign,
        start=0, end=4, update=2,
    )  # fmt: skip
    lifecycle = Lifecycle([modifier])
    model = Mlp()
    lifecycle.initialize(model=model)
    given, masks = batches(5), []
    for x in given:
        lifecycle.event("batch_start")
        model(x)
        lifecycle.event("batch_end")
        masks.append(modifier.sparsifier.state["down"]["mask"])
    assert masks[0] is None
    assert masks[1] is masks[2]
    assert masks[3] is not masks[2]
    assert modifier.sparsifier.data_groups["down"]["hook_state"] == "sparsify"
    lifecycle.reset()
    assert not model.down._forward_pre_hooks
    assert lifecycle.modifiers == []
