"""A short soak of `elastic serve`; `python -m tests.robustness.soak` is the long one."""

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from tests.robustness.soak import KINDS, soak


def test_a_server_that_many_use_at_a_time_loses_and_mixes_up_nothing():
    found = soak(120, different=25)
    assert not found.lost and not found.mixed_up
    assert found.tracebacks == 0 and found.code == 0 and found.left_running == 0
    assert found.growth_mb < 20, found.rss_mb
    assert set(found.kinds) == set(KINDS) and set(found.ends) == {"stop", "length"}
    assert not found.waited_for_the_long_one
    assert found.beside_s < 3 * found.alone_s + 0.05  # the last is for the clock of a busy machine
