"""How a training shows itself on stderr: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from adapterhub.cli.output import err, say
from adapterhub.trainers.events import Evaluated, Event, Listener, Stage, Started, Step

_LINE_SECONDS = 5.0  # between two plain lines


@contextlib.contextmanager
def shown() -> Iterator[Listener]:
    """A listener that draws; the terminal is left clean whatever happens."""
    if not err().is_terminal:
        yield Lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err(), transient=True) as progress:
        task = progress.add_task("starting", total=None, numbers="")

        def listener(event: Event) -> None:
            if isinstance(event, Stage):
                progress.update(task, description=event.text)
            elif isinstance(event, Started):
                progress.update(task, description="training", total=event.steps, completed=event.done)
            elif isinstance(event, Step):
                progress.update(task, completed=event.step, numbers=_numbers(event))
            else:
                progress.console.print(_evaluated(event))

        yield listener


class Lines:
    """A line when something begins, and one every few seconds between."""

    def __init__(self) -> None:
        self.last = 0.0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stage):
            say(event.text)
        elif isinstance(event, Step):
            now = time.monotonic()
            if now - self.last >= _LINE_SECONDS or event.step in (1, event.steps):
                self.last = now
                left = f", {event.seconds_left:.0f} s left" if event.step < event.steps else ""
                say(f"step {event.step}/{event.steps}: {_numbers(event)}{left}")
        elif isinstance(event, Evaluated):
            say(_evaluated(event))


def _numbers(event: Step) -> str:
    loss = f"loss {event.loss:.3f}" if event.loss is not None else ""
    return f"{loss}, {event.tokens_per_second:.0f} tokens/s"


def _evaluated(event: Evaluated) -> str:
    margin = f", reward margin {event.reward_margin:.3f}" if event.reward_margin is not None else ""
    accuracy = f", accuracy {event.reward_accuracy:.1%}" if event.reward_accuracy is not None else ""
    return f"step {event.step}: evaluation loss {event.loss:.4f}{margin}{accuracy}"
