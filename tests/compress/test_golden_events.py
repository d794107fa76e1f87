"""The reference's own events: every property, every row of should_update."""

import builtins
from typing import Any

import pytest
from golden_lifecycle import EVENTS

from flex_model.compress import Event, EventType
from flex_model.errors import CompressionError


def _event(case: dict[str, Any]) -> tuple[Event, Event]:
    first = event = Event(**case["construct"])
    if "set_current_index" in case:
        event.current_index = case["set_current_index"]
    if "new_instance" in case:
        event = first.new_instance(**case["new_instance"])
    return first, event


@pytest.mark.parametrize("case", EVENTS, ids=lambda case: case["id"])
def test_golden(case: dict[str, Any]) -> None:
    """Floats compare exactly, the reference's own traps (0.3 % 0.1, 0.29 * 100) included."""
    first, event = _event(case)
    for name, due in case["expect"].items():
        if "error" in due:
            with pytest.raises(getattr(builtins, due["error"])):
                getattr(event, name)
        else:
            assert getattr(event, name) == due["value"], name
    for row in case.get("should_update", []):
        asked = {name: row[name] for name in ("start", "end", "update")}
        if "error" in row:
            with pytest.raises(getattr(builtins, row["error"])):
                event.should_update(**asked)
        else:
            assert event.should_update(**asked) is row["value"], row
    for name, value in case.get("original_after", {}).items():
        assert getattr(first, name) == value


def test_there_are_twenty_six_with_rows() -> None:
    assert len(EVENTS) == 26
    assert sum(len(case.get("should_update", [])) for case in EVENTS) >= 8 * 13


def test_both_namings() -> None:
    assert len(EventType) == 10
    assert EventType("calibration_start") is EventType.CALIBRATION_EPOCH_START
    assert EventType("calibration_end") is EventType.CALIBRATION_EPOCH_END
    with pytest.raises(ValueError, match="epoch_middle"):
        EventType("epoch_middle")


def test_unknown_fields_are_refused() -> None:
    """The reference sets them as plain attributes."""
    with pytest.raises(CompressionError, match="steps_per_epock"):
        Event().new_instance(steps_per_epock=3)
