"""A short form of the soak test; ``make soak`` is the long one."""

from __future__ import annotations

import asyncio

import pytest
import uvloop

from tests.soak import Soak, quiet


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_soak(loop: str, seed: int) -> None:
    """Whatever happens at random, nothing is left and every connection is accounted for."""
    soak = Soak(seed)
    with quiet():
        soak.run_on(asyncio.new_event_loop if loop == "asyncio" else uvloop.new_event_loop, 1000)
    assert not soak.wrong
    assert len(soak.outcomes) > 50
