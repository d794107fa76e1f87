"""The golden events and traces (made by llmcompressor, see golden/), and how they are replayed."""

import json
from pathlib import Path
from typing import Any

from pydantic import PrivateAttr

from flex_model.compress import Event, EventType, Lifecycle, Modifier

GOLDEN = Path(__file__).parent / "golden"
EVENTS = json.loads((GOLDEN / "event_cases.json").read_text())["cases"]
TRACES = json.loads((GOLDEN / "lifecycle_traces.json").read_text())["traces"]
FLAGS = ("initialized", "finalized", "started", "ended")


class Recorder(Modifier):
    """Notes who was called with what."""

    name: str
    init_result: bool = True

    _calls: list[list[Any]] = PrivateAttr(default_factory=list)

    def _note(self, callback: str, event: Event | None, names: list[str]) -> None:
        value = event.type_.value if event is not None and event.type_ is not None else None
        self._calls.append([self.name, callback, value, names])

    def on_initialize(self, state: Any, **kwargs: Any) -> bool:
        self._note("on_initialize", None, [])
        return self.init_result

    def on_finalize(self, state: Any, **kwargs: Any) -> bool:
        self._note("on_finalize", None, [])
        return True

    def on_event(self, state: Any, event: Event, **kwargs: Any) -> None:
        self._note("on_event", event, sorted(kwargs))


def _noting(name: str) -> Any:
    def callback(self: Recorder, state: Any, event: Event, **kwargs: Any) -> None:
        self._note(name, event, [])

    callback.__name__ = name
    return callback


for _name in ("start", "update", "end", "calibration_start", "sequential_epoch_end",
              "calibration_end"):  # fmt: skip
    setattr(Recorder, f"on_{_name}", _noting(f"on_{_name}"))


def recorders(trace: dict[str, Any]) -> tuple[list[Recorder], list[list[Any]]]:
    """The trace's modifiers, which note into one list."""
    calls: list[list[Any]] = []
    made = [Recorder(**told) for told in trace["modifiers"]]
    for recorder in made:
        recorder._calls = calls
    return made, calls


def flags_of(modifier: Modifier) -> dict[str, bool]:
    return {flag: getattr(modifier, flag) for flag in FLAGS}


def canonical(callbacks: list[list[Any]]) -> list[list[Any]]:
    """With values of one naming."""
    return [
        [who, what, EventType(value).value if value else None, sorted(names)]
        for who, what, value, names in callbacks
    ]


class Session:
    """One `Lifecycle` behind the calls of a session trace."""

    def __init__(self, modifiers: list[Recorder]) -> None:
        self.modifiers = modifiers
        self.lifecycle = Lifecycle()

    def __call__(self, what: str, kwargs: dict[str, Any]) -> Any:
        lifecycle = self.lifecycle
        if what == "initialize":
            return lifecycle.initialize(self.modifiers)
        if what == "initialize_empty":
            return lifecycle.initialize()
        if what in ("finalize", "reset"):
            return getattr(lifecycle, what)()
        return lifecycle.event(what.removeprefix("event:"), **kwargs)

    def told(self) -> dict[str, Any]:
        lifecycle = self.lifecycle
        return {
            "initialized": lifecycle.initialized,
            "finalized": lifecycle.finalized,
            "last": lifecycle.last_event.value,
            "global_step": lifecycle.global_step,
            "recipe_modifiers": len(lifecycle.modifiers),
        }


def directly(modifier: Recorder, what: str, kwargs: dict[str, Any]) -> Any:
    """A call of a modifier trace."""
    if what in ("initialize", "finalize"):
        return getattr(modifier, what)(None)
    fields = {name.removeprefix("@"): value for name, value in kwargs.items()}
    return modifier.update_event(None, Event(type_=EventType(what), **fields))  # type: ignore[arg-type,func-returns-value]
