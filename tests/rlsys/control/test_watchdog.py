"""Time without progress, by a clock of the test."""

from __future__ import annotations

from rlsys.control.watchdog import ProgressTimer, WatchClock, watch_interval


class Time:
    now = 100.0

    def timer(self) -> ProgressTimer:
        return ProgressTimer(WatchClock(monotonic=lambda: self.now, interval_s=1.0))


def test_an_update_adds_at_most_two_intervals() -> None:
    time = Time()
    timer = time.timer()
    time.now += 1.5
    assert timer.update() == 1.5
    time.now += 3600  # the driver stood still
    assert timer.update() == 1.5 + 2


def test_only_growing_progress_restarts_the_timer_unless_the_process_is_idle() -> None:
    time = Time()
    timer = time.timer()
    for progress, idle, seconds in ((3, False, 0), (3, False, 1), (4, False, 0), (4, True, 0), (4, False, 1)):
        time.now += 1
        timer.update()
        timer.report(progress, idle=idle)
        assert timer.seconds == seconds
    time.now += 1
    timer.restart()
    assert timer.update() == 0


def test_questions_to_many_processes_are_further_apart() -> None:
    assert [watch_interval(count) for count in (1, 100, 1000)] == [1.0, 1.0, 10.0]
