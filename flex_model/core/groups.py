"""Named sets of hook functions, switched on and off together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flex_model.core.hook_function import HookFunction
from flex_model.errors import GroupError

__all__ = ["ALL", "HookGroups"]

ALL = "all"

Members = HookFunction | str | Sequence[HookFunction]


class HookGroups:
    """Which hook functions belong to which groups. Every one belongs to ``"all"``."""

    def __init__(self) -> None:
        self._groups_of: dict[HookFunction, set[str]] = {}
        self._off: set[str] = set()

    @property
    def hooks(self) -> tuple[HookFunction, ...]:
        """Every hook function, in order of registration."""
        return tuple(self._groups_of)

    @property
    def names(self) -> set[str]:
        """Every group that has a member."""
        return {ALL}.union(*self._groups_of.values())

    def add(self, hook: HookFunction) -> None:
        self._groups_of[hook] = {ALL}

    def remove(self, hook: HookFunction) -> None:
        self._groups_of.pop(hook, None)

    def clear(self) -> None:
        self._groups_of.clear()
        self._off.clear()

    @property
    def off(self) -> frozenset[str]:
        """The groups that are switched off."""
        return frozenset(self._off)

    def switch(self, groups: str | Iterable[str], on: bool) -> None:
        """Switch groups on or off until told otherwise.

        Raises:
            GroupError: a group that does not exist; none is switched.
        """
        wanted = {groups} if isinstance(groups, str) else set(groups)
        for group in wanted - self._off:
            self._check_exists(group)
        self._off = self._off - wanted if on else self._off | wanted

    def is_off(self, hook: HookFunction) -> bool:
        """Whether a hook function belongs to a group that is switched off."""
        return bool(self._off) and not self._off.isdisjoint(self._groups_of.get(hook, ()))

    def groups_of(self, hook: HookFunction) -> set[str]:
        """The groups of one hook function.

        Raises:
            GroupError: the hook function is not registered.
        """
        if hook not in self._groups_of:
            raise GroupError(f"{hook!r} is not registered with this FlexModel.")
        return set(self._groups_of[hook])

    def members(self, group: str) -> list[HookFunction]:
        """The hook functions of one group, in order of registration."""
        self._check_exists(group)
        return [hook for hook, groups in self._groups_of.items() if group in groups]

    def extend(self, members: Members, group: str) -> None:
        """Put hook functions into a group, which comes into being with its first member."""
        for hook in self._chosen(members):
            self._groups_of[hook].add(group)

    def reduce(self, members: Members, group: str) -> None:
        """Take hook functions out of a group; it ends with its last member."""
        if group == ALL:
            raise GroupError('Every hook function belongs to "all"; it cannot be taken out of it.')
        self._check_exists(group)
        for hook in self._chosen(members):
            self._groups_of[hook].discard(group)

    def active(self, groups: str | Iterable[str], complement: bool) -> frozenset[HookFunction]:
        """The hook functions in any of ``groups``, or in none of them.

        Raises:
            GroupError: a group that does not exist.
        """
        wanted = {groups} if isinstance(groups, str) else set(groups)
        for group in wanted:
            self._check_exists(group)
        return frozenset(
            hook for hook, own in self._groups_of.items() if own.isdisjoint(wanted) == complement
        )

    def _chosen(self, members: Members) -> list[HookFunction]:
        if isinstance(members, str):
            matching = [hook for hook in self._groups_of if members in hook.module_name]
            if not matching:
                raise GroupError(
                    f"No hook function is on a module whose name contains {members!r}."
                )
            return matching
        chosen = [members] if isinstance(members, HookFunction) else list(members)
        for hook in chosen:
            if not isinstance(hook, HookFunction):
                raise GroupError(f"A group takes HookFunctions, got {type(hook).__name__}.")
            self.groups_of(hook)
        return chosen

    def _check_exists(self, group: str) -> None:
        if group not in self.names:
            raise GroupError(
                f"No hook group {group!r}. There are {sorted(self.names)}; make one with "
                "update_hook_groups() or create_hook_group()."
            )
