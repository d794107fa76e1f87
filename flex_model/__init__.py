"""flex_model: hook any model, sharded in any way, as if one process held it."""

from flex_model.core import (
    DummyModule,
    FlexModel,
    HookFunction,
    LocalShard,
    channelwise,
    elementwise,
    observes,
    reduces,
    tokenwise,
)

__all__ = ["DummyModule", "FlexModel", "HookFunction", "LocalShard"]
__all__ += ["channelwise", "elementwise", "observes", "reduces", "tokenwise"]
