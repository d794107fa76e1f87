"""What stays with the FlexModel that made it."""

from __future__ import annotations

from typing import Any, NoReturn

from flex_model.errors import CopyError

__all__ = ["NotCopied"]


class NotCopied:
    """Refuses to be copied or pickled along with the model that its hooks are on.

    A copy would keep the hooks with nobody to take them off, and record where no one looks.
    """

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise CopyError(
            "A model cannot be copied or pickled while a FlexModel's hooks are on it: the copy's "
            "could not be taken off. Copy the FlexModel by copy.deepcopy(), save the model's "
            "state_dict(), or call restore() first."
        )
