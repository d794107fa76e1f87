"""FlexModel, hook functions, and the way of one activation through them."""

from flex_model.core.dummy_module import DummyModule
from flex_model.core.flex_model import FlexModel
from flex_model.core.hook_function import HookFunction
from flex_model.core.local_shard import LocalShard
from flex_model.core.needs import channelwise, elementwise, observes, reduces, tokenwise

__all__ = ["DummyModule", "FlexModel", "HookFunction", "LocalShard"]
__all__ += ["channelwise", "elementwise", "observes", "reduces", "tokenwise"]
