"""The numbers of an interval of steps: means, speed, waits, and the time left."""

import dataclasses
import io
import math
from types import SimpleNamespace

import pytest
from rich.console import Console

from train.report import meter as meters, progress
from train.report.meter import Meter, Record
from train.report.progress import Display


class OnDevice(float):
    """A metric that the devices have finished, or not."""

    ready = False

    def is_ready(self):
        return self.ready


def metrics(loss=1.0, skipped=0, in_a_row=0):
    values = {"loss": loss, "gradient_norm": loss, "accuracy": 0.5, "learning_rate": 0.1}
    values |= {"skipped": skipped, "skipped_in_a_row": in_a_row}
    return {name: OnDevice(value) for name, value in values.items()}


def test_a_skipped_step_is_counted_and_not_averaged():
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


def test_the_time_left_includes_evaluations(monkeypatch):
    """A run that resumes from step 100 of 1000: 60 s of compiling, steps of 1 s, and 40 s for an evaluation."""
    now, file = [0.0], io.StringIO()
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    record = Record(
        step=121,
        epoch=12.1,
        loss=4.871,
        accuracy=0.214,
        learning_rate=1e-3,
        gradient_norm=1.2345,
        images_per_second=11_212.0,
        data_wait=0.01,
        skipped=0,
        skipped_in_a_row=0,
    )
    with Display(Console(file=file), start_step=100, total_steps=1000, epochs=100) as display:
        display.advance(100)
        now[0] += 60
        display.advance(101)
        display.show(dataclasses.replace(record, step=101))
        now[0] += 40 + 20
        display.show(record)
    first, second = file.getvalue().splitlines()
    assert first.endswith("  -:--:-- left")
    # (1000 - 121) * 60 / 20 = 2637 seconds
    assert second == (
        "step 121/1000  epoch 12.1  loss 4.871  accuracy  21.4%  lr 1.0e-03  norm 1.23  "
        "11,212 images/s  data wait 1%  0:43:57 left"
    )


class Devices:
    """Devices whose steps take 1 s, a host that dispatches in no time, and the clock of both."""

    def __init__(self, monkeypatch):
        self.now, self.done = 0.0, 0.0
        monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(meters, "jax", SimpleNamespace(block_until_ready=self.wait, device_get=list))

    def step(self):
        self.done = max(self.now, self.done) + 1
        self.now += 1e-3
        return {**metrics(), "loss": OnDevice(self.done)}

    def wait(self, given):
        self.now = max(self.now, given["loss"])
        return given


@pytest.mark.parametrize("every", [1, 4, 5])
def test_the_speed_of_an_interval_excludes_pauses(monkeypatch, every):
    """An evaluation of 100 s follows every fourth step of 22."""
    devices, records = Devices(monkeypatch), []
    meter = Meter(0, every, steps_per_epoch=4, batch_size=8)
    for step in range(1, 23):
        evaluates = step % 4 == 0
        records += meter.add(devices.step(), wait=evaluates)
        if evaluates:
            assert meter.step == step
            with meter.paused():
                devices.now += 100
    records += meter.rest()
    assert [record.step for record in records] == [*range(every, 22, every), 22]
    assert [record.images_per_second for record in records] == pytest.approx([8] * len(records), rel=0.01)


def test_all_processes_report_an_interval_at_the_same_step(monkeypatch):
    # All processes must act on a record at the same step.
    for ready in (False, True):
        monkeypatch.setattr(OnDevice, "ready", ready)
        meter = Meter(3, every=2, steps_per_epoch=4, batch_size=8)
        expected = [[record.step for record in meter.add(metrics(), wait=step == 8)] for step in range(4, 10)]
        assert expected == [[], [], [4], [], [6, 8], []]
        assert [record.step for record in meter.rest()] == [9]


def test_a_wait_for_images_counts_only_if_the_devices_are_idle(monkeypatch):
    """Steps of 1 s with a wait of 0.25 s each. The devices are idle before the first and before the third."""
    now = [0.0]
    monkeypatch.setattr(meters, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    meter = Meter(0, every=4, steps_per_epoch=4, batch_size=8)
    for ready in (False, False, True, False):
        monkeypatch.setattr(OnDevice, "ready", ready)
        with meter.waiting():
            now[0] += 0.25
        monkeypatch.setattr(OnDevice, "ready", False)
        now[0] += 0.75
        assert meter.add(metrics()) == []
    (record,) = meter.rest()
    assert record.data_wait == (0.25 + 0.25) / 4
