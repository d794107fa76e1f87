"""flex_model: hook any model, sharded in any way, as if one process held it."""

from flex_model.core import DummyModule, FlexModel, HookFunction

__all__ = ["DummyModule", "FlexModel", "HookFunction"]
