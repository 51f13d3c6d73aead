"""What is asked while something else is done."""

from __future__ import annotations

import threading

import pytest

from adapterhub.errors import AdapterError, StorageError
from adapterhub.registry.parallel import meanwhile


def away() -> None:
    raise StorageError("the store is away")


def test_an_answer_is_waited_for() -> None:
    reading, answered = threading.Event(), []

    def ask() -> None:
        assert reading.wait(60)
        answered.append(True)

    with meanwhile(ask):
        reading.set()
    assert answered


def test_what_went_wrong_meanwhile_is_said_after_the_block() -> None:
    done = []
    with pytest.raises(StorageError, match="away"), meanwhile(away):
        done.append(True)
    assert done


def test_a_block_that_fails_waits_for_no_answer() -> None:
    over = threading.Event()
    with pytest.raises(AdapterError, match="broken"), meanwhile(lambda: over.wait(60)):
        raise AdapterError("the adapter is broken")
    over.set()
