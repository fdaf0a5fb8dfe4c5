"""Hangs of real processes: each is found, told with stacks, and ended; what is only slow is left alone."""

import ctypes
import json
import os
import re
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from tests.distributed import Ranks, on_ranks
from tests.runs import CPU, head_manifest, outcome, tiny_config, train_on
from workers import outage
from workers.config import ComputeConfig
from workers.storage import open_store
from workers.training import loop, watchdog, watchdog_process
from workers.training.hangs import describe_hangs, hang_keys
from workers.training.progress import Progress, create_file
from workers.training.watchdog import LONG_SECONDS, PROFILED_SECONDS, deadlines, watched
from workers.training.watchdog_process import OUTAGE, OUTAGE_SECONDS, Task, Watch, progress_file

HANG_SECONDS = 3
AT_STEP = 7
LONG = 200


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def hold_the_interpreter():
    """In C, with the GIL held."""
    ctypes.PyDLL(None).sleep(60)


def search_forever():
    re.match(r"(a+)+$", "a" * 40 + "b")


def stand_still():
    time.sleep(60)


def before_steps(act):
    """`act(step)` is called in the loop's thread, before each update."""
    original = loop.train_step

    def step(*arguments, **options):
        act(options["step"])
        return original(*arguments, **options)

    loop.train_step = step


def train_and_hang(act, where, config, run_url):
    """The second rank does `act` once, before a step's update or where its batch is made."""
    if dist.get_rank() == 1 and where == "step":
        before_steps(lambda step: step == AT_STEP and act())
    if dist.get_rank() == 1 and where == "data":

        class Stream(loop.TrainStream):
            def __next__(self):
                if self._step == AT_STEP:
                    act()
                return super().__next__()

        loop.TrainStream = Stream
    loop.train(config, run_url, CPU)


def train_and_leave_out(config, run_url):
    """The second rank leaves out a collective operation of a group of its own."""
    group = dist.new_group()
    before_steps(lambda step: step == AT_STEP and dist.get_rank() == 0 and dist.barrier(group))
    loop.train(config, run_url, CPU)


def hanging_config(data_url):
    return tiny_config(data_url, f"compute.hang_seconds={HANG_SECONDS}")


def told_after_death(ranks, run_url):
    """What is said of the hang, and the stacks."""
    ranks.wait_for_death()
    ranks.kill()
    store = open_store(run_url)
    assert hang_keys(store) == {"hangs/000000-00000.json"}
    assert describe_hangs(store, hang_keys(store)) == ""
    told, _, stacks = describe_hangs(store, ()).partition("; stacks: ")
    assert stacks == f"{run_url}/hangs/000000-00000.txt"
    record = json.loads(store.read("hangs/000000-00000.json"))
    assert record["reason"] == told
    text = store.read("hangs/000000-00000.txt").decode()
    assert text.count("in _train_under") == 2
    assert re.findall(r"^== rank (\d)", text, re.MULTILINE) == ["0", "1"]
    return told, text


STOOD = r"\(pid \d+ on [^)]+\) stood still for \d+ s in"


@pytest.mark.parametrize(
    ("act", "where", "told"),
    [
        (
            hold_the_interpreter,
            "step",
            f"(rank 0 {STOOD} 'step' at step 7; )?rank 1 {STOOD} 'step' at step 7",
        ),
        (search_forever, "step", f"(rank 0 {STOOD} 'step' at step 7; )?rank 1 {STOOD} 'step' at step 7"),
        (stand_still, "data", f"rank 1 {STOOD} 'data' at step 7"),
    ],
)
def test_a_hang_is_found_told_and_ended(digits_url, store_url, act, where, told):
    """Rank 1 hangs; rank 0 waits for it, from a little later on."""
    with Ranks(2, train_and_hang, act, where, hanging_config(digits_url), store_url) as ranks:
        text, stacks = told_after_death(ranks, store_url)
    assert re.fullmatch(told, text), text
    assert f"in {act.__name__}" in stacks


def test_a_stopped_process_is_found_and_the_next_group_goes_on(digits_url, store_url, tmp_path):
    """And the run ends as if nothing had been."""
    with Ranks(2, train_and_hang, stop, "step", hanging_config(digits_url), store_url) as ranks:
        text, _ = told_after_death(ranks, store_url)
    assert re.fullmatch(f"rank 1 {STOOD} 'step' at step 7, stopped by a signal", text), text
    assert head_manifest(store_url).step == 5
    config, undisturbed = tiny_config(digits_url), (tmp_path / "undisturbed").as_uri()
    train_on(2, config, store_url)
    train_on(2, config, undisturbed)
    assert outcome(store_url) == outcome(undisturbed)


def test_a_rank_that_leaves_out_a_collective_operation(digits_url, store_url):
    with Ranks(2, train_and_leave_out, hanging_config(digits_url), store_url) as ranks:
        text, stacks = told_after_death(ranks, store_url)
    assert re.match(f"rank 0 {STOOD} 'step' at step 7", text), text
    assert "in barrier" in stacks


def train_slower_and_slower(config, run_url, memory):
    """From the fifth step on steps take longer than a hang of the first ones would."""
    watchdog.MEMORY = memory
    before_steps(lambda step: time.sleep(0.4 if step < 4 else 2.5))
    loop.train(config, run_url, CPU)


def test_a_slow_run_is_left_alone(digits_url, store_url, tmp_path):
    config = tiny_config(digits_url, "compute.hang_seconds=2", steps=6)
    on_ranks(2, train_slower_and_slower, config, store_url, tmp_path)
    assert head_manifest(store_url).complete
    assert hang_keys(open_store(store_url)) == set()
    assert list(tmp_path.iterdir()) == [tmp_path / "store"]


@pytest.fixture
def sleeper():
    with subprocess.Popen(["/bin/sleep", "60"]) as process:
        yield process
        process.kill()


class Bench:
    """A watchdog over one rank of this test, with a clock of the test's own."""

    def __init__(self, folder, monkeypatch, pid=None):
        self.now = 0.0
        clock = SimpleNamespace(monotonic=lambda: self.now, time=time.time)
        monkeypatch.setattr(watchdog_process, "time", clock)
        create_file(progress_file(folder, 0))
        (folder / OUTAGE).touch()
        self.progress = Progress(progress_file(folder, 0))
        self.measured = 0.0
        monkeypatch.setattr("time.perf_counter", lambda: self.measured)
        limits = {phase: min(limit, LONG) for phase, limit in deadlines(ComputeConfig()).items()}
        self.watch = Watch(Task(str(folder), "", 0, {0: pid or os.getpid()}, limits, 30.0))

    def first_late(self, seconds):
        """When a hang is found within so many seconds, in which the rank gets nowhere."""
        until = self.now + seconds
        while self.now < until:
            self.now += 1
            if self.watch.look():
                return self.now
        return None


@pytest.fixture
def bench(tmp_path, monkeypatch):
    return Bench(tmp_path, monkeypatch)


def test_each_phase_has_its_time(bench):
    assert bench.first_late(LONG - 1) is None
    bench.progress.step(0)
    with bench.progress.phase("data"):  # the first batch belongs to the start
        assert bench.first_late(LONG - 1) is None
    assert bench.first_late(LONG - 1) is None  # as does the first step
    bench.progress.compiled = True
    bench.progress.step(1)
    begun = bench.now
    assert bench.first_late(1000) == begun + 30
    with bench.progress.phase("data"):
        begun = bench.now
        assert bench.first_late(1000) == begun + 30
    with bench.progress.phase("evaluate"):
        assert bench.first_late(LONG - 1) is None
        bench.progress.evaluated(8, 16)
        begun = bench.now
        assert bench.first_late(1000) == begun + 30
        bench.progress.evaluated(16, 16)
        assert bench.first_late(LONG - 1) is None
    with bench.progress.phase("save"):
        assert bench.first_late(LONG - 1) is None
    bench.progress.end()
    assert bench.first_late(2 * LONG) is None


def test_steps_take_ten_times_what_they_took(bench):
    for step in range(4):
        bench.progress.step(step)
        bench.progress.compiled = True
        bench.measured += 100.0 if step == 0 else 12.0
    assert bench.first_late(119) is None
    assert bench.first_late(10) is not None


def test_the_second_step_takes_twice_what_the_first_took(bench):
    bench.progress.step(0)
    bench.measured += 50.0
    bench.progress.compiled = True
    bench.progress.step(1)
    assert bench.first_late(99) is None
    assert bench.first_late(10) is not None


def test_a_machine_that_was_paused_did_not_hang(bench):
    bench.progress.compiled = True
    bench.progress.step(1)
    bench.now += 3600
    assert bench.watch.look() is None
    assert bench.first_late(25) is None
    assert bench.first_late(10) is not None


def test_who_waits_for_a_store_does_not_hang(bench, tmp_path, monkeypatch):
    monkeypatch.setenv(outage.VARIABLE, str(tmp_path / OUTAGE))
    bench.progress.compiled = True
    bench.progress.step(1)
    for again in range(20):
        assert bench.first_late(20) is None
        os.utime(tmp_path / OUTAGE, (again, again))  # as the next line, of which a clock may not see two
        outage.note()
    assert bench.first_late(OUTAGE_SECONDS) is None
    assert bench.first_late(31) is not None


def test_a_stopped_process_is_found_in_any_phase(tmp_path, monkeypatch, sleeper):
    bench = Bench(tmp_path, monkeypatch, sleeper.pid)
    assert bench.first_late(100) is None
    sleeper.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WNOWAIT)
    assert bench.first_late(29) is None
    assert bench.first_late(5) is not None
    assert re.fullmatch(
        r"rank 0 \(.*\) stood still for \d+ s in 'start' at step 0, stopped by a signal",
        bench.watch.look().describe(),
    )


def test_who_came_there_a_little_later_is_named_too(tmp_path, monkeypatch, sleeper):
    """And if it is stopped, it alone: the other waits for it."""
    bench = Bench(tmp_path, monkeypatch)
    create_file(progress_file(tmp_path, 1))
    limits = deadlines(ComputeConfig())
    bench.watch = Watch(Task(str(tmp_path), "", 0, {0: os.getpid(), 1: sleeper.pid}, limits, 30.0))
    for rank, after in ((0, 0), (1, 5)):
        assert bench.first_late(after) is None
        progress = bench.progress if rank == 0 else Progress(progress_file(tmp_path, rank))
        progress.compiled = True
        progress.step(1)
    assert bench.first_late(24) is None
    assert bench.first_late(2) is not None
    assert re.findall(r"rank \d", bench.watch.look().describe()) == ["rank 0", "rank 1"]
    sleeper.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, sleeper.pid, os.WSTOPPED | os.WNOWAIT)
    assert re.findall(r"rank \d", bench.watch.look().describe()) == ["rank 1"]


def test_who_ended_is_not_late_but_named(tmp_path, monkeypatch, sleeper):
    bench = Bench(tmp_path, monkeypatch)
    create_file(progress_file(tmp_path, 1))
    limits = {**deadlines(ComputeConfig()), "start": 30.0}
    bench.watch = Watch(Task(str(tmp_path), "", 0, {0: os.getpid(), 1: sleeper.pid}, limits, 30.0))
    sleeper.kill()
    sleeper.wait()
    begun = bench.now
    assert bench.first_late(100) == begun + 30
    hang = bench.watch.look()
    assert [one.late for one in hang.ranks] == [True, False]
    assert "rank 1 " in hang.describe()
    assert hang.describe().endswith("ended in 'start' at step 0, and the others wait for it")


def test_compilation_and_traces_take_their_time():
    assert deadlines(ComputeConfig())["evaluate_batch"] == 30
    assert deadlines(ComputeConfig(compile=True))["evaluate_batch"] == LONG_SECONDS
    assert deadlines(ComputeConfig(profile_steps=3))["step"] == PROFILED_SECONDS


def test_nobody_looks_where_nobody_is_to_look(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with watched(ComputeConfig(hang_seconds=0), "", 0, CPU) as progress:
        progress.step(0)
