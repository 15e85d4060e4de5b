"""events.py: TensorBoard reads event files in the order of their names, which a clock does not decide."""

import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sasa.training.events import EventWriter


@pytest.mark.parametrize("later", [2e9, 1e9])
def test_a_clock_set_back_hides_no_curve(tmp_path, monkeypatch, later):
    """Steps 1 to 4, then a resume from step 3: by the clock's time its file would come first."""
    for now, steps in ((1.5e9, (1, 2, 3, 4)), (later, (3, 4, 5))):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        writer = EventWriter(tmp_path, steps[0])
        for step in steps:
            writer.add_scalar("loss", now / 1e9 + step, step)
        writer.flush()
        writer.close()
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    values = {event.step: round(event.value, 3) for event in found.Scalars("loss")}
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert values == {1: 2.5, 2: 3.5, 3: later / 1e9 + 3, 4: later / 1e9 + 4, 5: later / 1e9 + 5}
