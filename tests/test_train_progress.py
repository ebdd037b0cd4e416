"""The numbers of an interval of steps: what they are means of, and what their clock counts."""

import io
import math
from types import SimpleNamespace

import pytest
from rich.console import Console

from train import progress
from train.progress import Display, Meter, Record


def metrics(loss=1.0, skipped=0, in_a_row=0):
    values = {"loss": loss, "gradient_norm": loss, "accuracy": 0.5, "learning_rate": 0.1}
    return {**values, "skipped": skipped, "skipped_in_a_row": in_a_row}


def test_a_step_that_was_skipped_is_counted_and_not_averaged():
    meter = Meter(0, every=3, steps_per_epoch=3, batch_size=8)
    rows = [metrics(1.0), metrics(math.nan, 1, 1), metrics(3.0, 1), *[metrics(math.inf, 2, 1)] * 3]
    some, none = [record for row in rows for record in meter.add(row)] + meter.rest()
    assert (some.loss, some.gradient_norm, some.skipped) == (2.0, 2.0, 1)
    assert not math.isfinite(none.loss)


def test_a_series_of_skipped_steps_is_seen_wherever_it_ends():
    meter = Meter(0, every=4, steps_per_epoch=4, batch_size=8)
    in_a_row = [0, 1, 2, 0, 0, 0, 1, 2, 3, 0, 0, 0]
    records = [record for count in in_a_row for record in meter.add(metrics(in_a_row=count))] + meter.rest()
    assert [record.skipped_in_a_row for record in records] == [2, 2, 3]


def test_a_line_of_a_log_file_says_how_long_it_will_take():
    file = io.StringIO()
    record = Record(
        step=12_510,
        epoch=10.0,
        loss=4.871,
        accuracy=0.214,
        learning_rate=1e-3,
        gradient_norm=1.2345,
        images_per_second=11_212.0,
        data_wait=0.01,
        skipped=0,
        skipped_in_a_row=0,
    )
    with Display(Console(file=file), start_step=0, total_steps=387_810, epochs=310, batch_size=1024) as display:
        display.show(record)
    # (387810 - 12510) * 1024 / 11212 = 34276 seconds
    assert file.getvalue() == (
        "step 12510/387810  epoch 10.0  loss 4.871  accuracy  21.4%  lr 1.0e-03  norm 1.23  "
        "11,212 images/s  data wait 1%  9:31:16 left\n"
    )


@pytest.mark.parametrize("every", [1, 4])
def test_the_clock_stops_when_the_devices_are_done_and_not_when_the_host_is(monkeypatch, every):
    """Steps of 1 s, handed to the devices in no time, and an evaluation of 100 s behind every fourth."""
    now, done = [0.0], [0.0]

    def wait_for_the_devices(_):
        now[0] = max(now[0], done[0])

    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(progress, "jax", SimpleNamespace(block_until_ready=wait_for_the_devices, device_get=list))
    meter = Meter(0, every, steps_per_epoch=4, batch_size=8)
    records = []
    for step in range(1, 9):
        done[0] = max(now[0], done[0]) + 1
        now[0] += 1e-3
        evaluates = step % 4 == 0
        records += meter.add(metrics(), wait=evaluates)
        if evaluates:
            with meter.paused():
                wait_for_the_devices(None)
                now[0] += 100
    records += meter.rest()
    seconds = sum(every * 8 / record.images_per_second for record in records)
    assert seconds == pytest.approx(8, rel=0.01)


class OnDevice(float):
    """A number that the devices are done with, or not."""

    ready = True

    def is_ready(self):
        return self.ready


def test_a_wait_for_images_counts_only_where_the_devices_have_nothing_left_to_do(monkeypatch):
    """Steps of 1 s with a wait of 0.25 s each. Before the first there is no work; before the third it has run out."""
    now = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    meter = Meter(0, every=1, steps_per_epoch=4, batch_size=8)
    records = []
    for OnDevice.ready in (False, False, True, False):
        with meter.waiting():
            now[0] += 0.25
        now[0] += 0.75
        records += meter.add({name: OnDevice(value) for name, value in metrics().items()})
    records += meter.rest()
    assert [record.data_wait for record in records] == [0.25, 0.0, 0.25, 0.0]
