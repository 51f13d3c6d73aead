"""The rules of channels, over their logs: what may be set, and where a rollback goes. No I/O.

    seq   move            standing deployments (the last is where the channel points)
    1     set 1           1
    2     set 2           1 2
    3     rollback        1
    4     set 3           1 3
    5     rollback        1

A `set` puts a deployment on top; a rollback takes off the present one, and whatever lies between it and the one it
goes back to. So a deployment that was rolled back once is never rolled back to by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from adapterhub.errors import NotFound, UsageError
from adapterhub.registry.base import ChannelMove, Target


def check_weights(targets: Mapping[int, int]) -> None:
    """Version → percent. Raises UsageError unless all are above 0 and they sum to 100."""
    if not targets or any(weight <= 0 for weight in targets.values()) or sum(targets.values()) != 100:
        shown = ", ".join(f"{version}: {weight}" for version, weight in targets.items())
        raise UsageError(f"a channel cannot point at {{{shown}}}", why="its weights must be above 0 and sum to 100")


def standing(log: Sequence[ChannelMove]) -> list[ChannelMove]:
    """The deployments that were not rolled back, oldest first. ``log`` is newest first, as `channel_log` gives it."""
    stack: list[ChannelMove] = []
    for move in reversed(log):
        if move.kind == "set":
            stack.append(move)
            continue
        below = stack[:-1]
        same = [place for place, earlier in enumerate(below, start=1) if earlier.targets == move.targets]
        stack = below[: same[-1]] if same else [*below, move]  # the latter: back to what never was deployed here
    return stack


def rollback_targets(log: Sequence[ChannelMove], *, usable: Callable[[Target], bool]) -> tuple[Target, ...]:
    """Where a rollback goes: the newest standing deployment that differs from the present one and can be used.

    Raises NotFound when there is none.
    """
    stack = standing(log)
    for move in reversed(stack[:-1]):
        if move.targets != log[0].targets and all(usable(target) for target in move.targets):
            return move.targets
    raise NotFound(
        f"the channel {log[0].channel!r} has nothing to go back to",
        why="no deployment before the present one is left, or all of them are yanked",
        hint="name the version: ah channel rollback ADAPTER CHANNEL VERSION",
    )
