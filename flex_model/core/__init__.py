"""FlexModel, hook functions, and the way of one activation through them."""

from flex_model.core.dummy_module import DummyModule
from flex_model.core.flex_model import FlexModel
from flex_model.core.hook_function import HookFunction

__all__ = ["DummyModule", "FlexModel", "HookFunction"]
