"""`ah serve` while it runs: an engine that ends by itself is started again, and the port is never silent.

    start ──► the stand-in answers 503 on the port ──► the engine is ready ──► it answers ──► it ends, or hangs ──┐
                  ▲                                                                                              │
                  └───────────── after 1, 2, 4 … seconds; given up after so many ends in a row ◄─────────────────┘

What was loaded is loaded again (`workingset`). An engine that ran for `STEADY_SECONDS` has put its past behind it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from adapterhub.errors import EngineError
from adapterhub.serving.draining import STOPPING
from adapterhub.serving.engine.engine import Engine
from adapterhub.serving.engine.standin import StandIn

STEADY_SECONDS = 600.0
_LONGEST_PAUSE = 60.0  # seconds
_FAREWELL_SECONDS = 5.0
_STARTING = "it is starting"
_AGAIN = "its engine ended, and is being started again"


class Supervisor:
    """One engine, kept running."""

    def __init__(
        self,
        engine: Engine,
        *,
        restarts: int,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """``restarts`` in a row are tried; 0: the first end is the last."""
        self._engine = engine
        self._restarts = restarts
        self._say = say
        self._clock = clock
        self._sleep = sleep
        self._ends = 0  # in a row

    def start(self) -> None:
        """Returns when the engine answers. Raises like `Engine.start`."""
        launch = self._engine.prepare()
        with StandIn(launch.host, launch.port, why=_STARTING):
            self._engine.start()

    def run(self) -> None:
        """Keep the engine running. Raises EngineError when it is given up."""
        while True:
            begun = self._clock()
            try:
                self._engine.wait()
            except EngineError as end:
                if self._clock() - begun >= STEADY_SECONDS:
                    self._ends = 0
                self._bring_back(end)

    def drain(self, seconds: float) -> bool:
        """Let running requests finish; False where ``seconds`` were not enough. `Engine.stop` ends it in any case."""
        launch = self._engine.launch
        with StandIn(launch.host, launch.port, why=STOPPING):
            return self._engine.drain(seconds)

    def _bring_back(self, end: EngineError) -> None:
        launch = self._engine.launch
        with StandIn(launch.host, launch.port, why=_AGAIN):
            self._start_again(end)
        self._say("ready again")  # the stand-in is gone: nobody is told 503 any more

    def _start_again(self, end: EngineError) -> None:
        while True:
            self._engine.drain(_FAREWELL_SECONDS)  # of its HTTP server: the last errors go out
            self._engine.stop()  # what is left of it
            self._ends += 1
            if self._ends > self._restarts:
                raise self._given_up(end) from end
            pause = pause_after(self._ends)
            self._say(f"{end}; starting it again in {pause:.0f} s ({self._ends} of {self._restarts})")
            self._sleep(pause)
            try:
                self._engine.start()
                return
            except EngineError as error:
                end = error

    def _given_up(self, end: EngineError) -> EngineError:
        if not self._restarts:
            return end
        return EngineError(
            f"the engine ended {self._ends} times in a row, and is given up", why=str(end), hint=end.hint
        )


def pause_after(ends: int) -> float:
    """Seconds to wait before an engine that ended so often in a row is started again."""
    return min(_LONGEST_PAUSE, 2.0 ** (ends - 1))
