"""The reference's own traces, and where this library differs from them on purpose."""

from typing import Any

import pytest
from golden_lifecycle import TRACES, Session, canonical, directly, flags_of, recorders

from flex_model.compress import EventType
from flex_model.errors import CompressionError, ModifierStateError

# Fields of the lifecycle that differ, by trace and call (see docs/recipes.md).
STEPS_ARE_COUNTED = {
    "trace_training_start0": {5: 1, 6: 1, 7: 2, 8: 2},
    "trace_no_start": {5: 1, 6: 1},
    "trace_end0": {2: 1, 3: 1, 4: 2, 5: 2},
    "trace_order_errors": dict.fromkeys(range(7, 11), 1),
}
REFUSED_EVENTS_DO_NOT_COUNT = {"trace_loss_required": {2: "batch_start"}}
ERRORS = {"ValueError": CompressionError, "RuntimeError": ModifierStateError}


def _due(trace: str, number: int, lifecycle: dict[str, Any]) -> dict[str, Any]:
    due = {**lifecycle, "last": EventType(lifecycle["last"]).value}
    due["global_step"] = STEPS_ARE_COUNTED.get(trace, {}).get(number, due["global_step"])
    due["last"] = REFUSED_EVENTS_DO_NOT_COUNT.get(trace, {}).get(number, due["last"])
    return due


def _replay(trace: dict[str, Any]) -> list[str]:
    """What differs from a trace, call by call."""
    modifiers, calls = recorders(trace)
    session = Session(modifiers)
    differences = []

    def same(what: str, found: Any, due: Any) -> None:
        if found != due:
            differences.append(f"call {number} {step['call']} {what}: {found}, {due} is due")

    for number, step in enumerate(trace["trace"]):
        what, kwargs = step["call"][0], dict(*step["call"][1:])
        calls.clear()
        returned, error = None, None
        try:
            if trace["level"] == "session":
                returned = session(what, kwargs)
            else:
                returned = directly(modifiers[0], what, kwargs)
        except (CompressionError, ModifierStateError) as raised:
            error = raised
        same("error", type(error), ERRORS[step["error"]] if "error" in step else type(None))
        same("returned", returned, step.get("modifier_data", step.get("returned")))
        same("callbacks", canonical(calls), canonical(step["callbacks"]))
        same("flags", {m.name: flags_of(m) for m in modifiers}, step["flags"])
        if "lifecycle" in step:
            same("lifecycle", session.told(), _due(trace["id"], number, step["lifecycle"]))
    return differences


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace["id"])
def test_golden(trace: dict[str, Any]) -> None:
    differences = _replay(trace)
    if trace["id"] != "trace_global_step_ignored":
        assert not differences
        return
    # The reference builds every event with step 0: here start=1 has come at step 5.
    started, flags, updated, same_flags = differences
    assert "'on_start', 'batch_start'" in started
    assert "'on_update', 'batch_start'" in started
    assert "'on_update', 'batch_end'" in updated
    assert "'started': True" in flags
    assert "'started': True" in same_flags


def test_there_are_twelve() -> None:
    assert len(TRACES) == 12
