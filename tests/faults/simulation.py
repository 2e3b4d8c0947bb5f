"""A cluster in simulated time: real walks on a real lab, one thread at a time, and all that can happen to their jobs.

A job is a thread that runs from one point to the next (before it writes, claims, keeps or waits) and then waits for its
turn, so that dozens of jobs are interleaved as their simulated clock says, and a seed says it all again. Each start of a
job is a process of its own on a node of its own: who it is, who is gone, what time it is and whether it was asked to end
are the simulation's answers; whatever lies on disk is written and read by the code that always does. A kill unwinds the
thread with everything that touches the lab out of order, so that it leaves what `kill -9` leaves.
"""

import heapq
import itertools
import os
import random
import threading
import time
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

from lesion import leases, log, stopping, walk
from lesion.jobs import arrays, tasks
from lesion.store import Store
from lesion.trial import Unfinished
from lesion.walk import Walk

FATES = {  # what may befall a start of a job, and how often
    "killed": 0.01,
    "killed, a line torn": 0.01,
    "node lost, requeued": 0.02,
    "time over": 0.03,
    "preempted, no time left": 0.01,
    "run twice": 0.02,
    "cut off, requeued, awake again": 0.01,
}
BEAT_S, GRACE_S, DOWN_S, NAP_S = 10.0, 60.0, 600.0, 900.0  # simulated


class Killed(BaseException):
    """Unwinds the thread of a job that is no more."""


class Job:
    """One start of a task."""

    def __init__(self, cluster, task, node, number, restart, counts=True):
        self.cluster, self.task, self.node, self.counts = cluster, task, node, counts
        self.number, self.restart, self.pid = number, restart, next(cluster.pids)
        self.asked = self.dead = self.asleep = False
        self.over = self.store = self.writing = None
        self.points, self.wait = 0, 0.0
        self.fate, self.at = cluster.fate()
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        self.go.acquire()
        try:
            self.over = self.work()
        except Killed:
            self.over = "killed"
        except BaseException as error:
            self.over = error
        self.back.release()

    def work(self):
        """As `lesion work` does it."""
        self.point()
        self.store = Store(self.cluster.lab)
        done, seals = Walk(self.store), self.store.index.seals
        try:
            if self.task.makes is not None:
                good = done.make(self.task.makes)
            else:
                done.take(self.task.readings)
                good = all(key in seals for key in (self.task.needed or {r.key for r in self.task.readings}))
            how = "completed" if good else "failed"
        except Unfinished:
            how = "unfinished"
        self.store.close()
        return how

    def point(self, wait=None):
        """The end of a turn. Everything that touches the lab comes through here."""
        if not self.dead:
            self.points, self.wait = self.points + 1, wait or self.cluster.chance.expovariate(1 / 5)
            self.back.release()
            self.go.acquire()
        if self.dead:
            raise Killed

    def turn(self):
        """Lets it run to its next point, or its end."""
        self.cluster.running = self
        self.go.release()
        self.back.acquire()
        self.cluster.running = None
        if isinstance(self.over, BaseException):
            raise self.over

    def kill(self):
        self.dead = True
        self.turn()
        for some in (self.store._segment, self.store._leases) if self.store else ():
            if some._file is not None:
                os.close(some._file)

    def beat(self, now):
        own = self.store._leases if self.store is not None else None
        if own is not None and own._file is not None and not self.asleep:
            os.utime(own._file, ns=(int(now * 1e9),) * 2)


class Cluster:
    """Nodes, a queue, and the clock. `submit` runs a submission until nothing is left to run."""

    def __init__(self, lab, seed, nodes=16, slots=2, fates=FATES):
        self.lab, self.chance, self.fates = lab, random.Random(seed), fates
        self.clock, self.epoch = 0.0, time.time()
        self.free = [f"node{n}" for n in range(nodes) for _ in range(slots)]
        self.pids, self.order, self.numbers = itertools.count(10_000), itertools.count(), itertools.count(1)
        self.running = None
        self.alive, self.events = {}, []
        self.count = Counter()  # what was inflicted, and what became of jobs
        self.started, self.slept = set(), set()  # keys of readings and states; writers that were cut off

    def fate(self):
        throw = self.chance.random()
        for name, share in self.fates.items():
            if (throw := throw - share) < 0:
                return name, self.chance.randrange(1, 8)
        return None, 0

    def now(self):
        return self.epoch + self.clock

    # ------------------------------------------------------------------ the scheduler

    def submit(self, readings, width):
        """Submits what is missing. Returns how many tasks there were."""
        found = tasks(readings, Store(self.lab), width)
        self.queue, self.state, self.after, self.before = [], {}, {}, {}  # by task: state, waits for, is waited for by
        made = arrays(found)
        for array in made:
            for element, task in enumerate(array.tasks):
                waits = array.after if array.follows is None else {made[array.follows].tasks[element].number}
                self.after[task.number], self.state[task.number] = set(waits), "pending"
                for number in waits:
                    self.before.setdefault(number, []).append(task)
                if not waits:
                    self.queue.append((task, next(self.numbers), 0))
        self.at(0, self.start)
        while self.events:
            self.clock, _, act, given = heapq.heappop(self.events)
            act(*given)
        assert not self.alive and not self.queue and "pending" not in self.state.values()
        return len(found)

    def at(self, delay, act, *given):
        heapq.heappush(self.events, (self.clock + delay, next(self.order), act, given))

    def start(self):
        while self.queue and self.free:
            task, number, restart = self.queue.pop(0)
            node = self.free.pop(self.chance.randrange(len(self.free)))
            self.launch(Job(self, task, node, number, restart))

    def launch(self, job):
        self.started |= {job.task.makes.key} if job.task.makes is not None else {r.key for r in job.task.readings}
        self.alive[job.pid] = job
        self.count["starts"] += 1
        self.at(0, self.go_on, job)
        self.at(BEAT_S, self.beat, job)

    def beat(self, job):
        if job.pid in self.alive:
            job.beat(self.now())
            self.at(BEAT_S, self.beat, job)

    def go_on(self, job):
        if job.pid not in self.alive or job.asleep:
            return
        job.turn()
        if job.over is not None:
            self.end(job, job.over)
        elif job.points == job.at and job.fate is not None and job.counts:
            self.count[job.fate] += 1
            self.inflict(job, job.fate)
        else:
            self.at(job.wait, self.go_on, job)

    def end(self, job, how):
        """Frees the node and decides about the task: `how` as the job ended, or "requeue"."""
        if self.alive.pop(job.pid, None) is None:
            return
        self.free.append(job.node)
        job.store = None  # all that it knew of the lab
        if job.counts:
            task = job.task
            if how in ("unfinished", "requeue"):
                self.queue.append((task, job.number, job.restart + 1))
            elif how == "completed":
                self.state[task.number] = how
                for other in self.before.get(task.number, ()):
                    self.after[other.number].discard(task.number)
                    if not self.after[other.number] and self.state[other.number] == "pending":
                        self.queue.append((other, next(self.numbers), 0))
            else:
                self.state[task.number] = how
                self.cancel(task)
        self.at(0, self.start)

    def cancel(self, task):
        for other in self.before.get(task.number, ()):
            if self.state[other.number] == "pending":
                self.state[other.number] = "cancelled"
                self.count["cancelled"] += 1
                self.cancel(other)

    # ------------------------------------------------------------------ what befalls a job

    def inflict(self, job, fate):
        match fate:
            case "killed":
                self.kill(job, "killed")
            case "killed, a line torn":
                if job.writing is not None and job.store._segment._file is not None:
                    text = b"".join(log.line(record) for record in job.writing)
                    os.write(job.store._segment._file, text[: self.chance.randrange(1, len(text))])
                self.kill(job, "killed")
            case "node lost, requeued":
                for other in [other for other in self.alive.values() if other.node == job.node]:
                    self.kill(other, "requeue")
                lost = [node for node in self.free if node == job.node]
                self.free = [node for node in self.free if node != job.node]
                self.at(DOWN_S, self.repair, lost)
            case "time over" | "preempted, no time left":
                job.asked = True
                self.at(job.wait, self.go_on, job)
                self.at(GRACE_S if fate == "time over" else 1.0, self.kill, job, "requeue")
            case "run twice":
                self.at(job.wait, self.go_on, job)
                if self.free:
                    node = self.free.pop(self.chance.randrange(len(self.free)))
                    self.launch(Job(self, job.task, node, next(self.numbers), 0, counts=False))
            case "cut off, requeued, awake again":
                job.asleep, job.counts = True, False
                self.slept |= {job.store.writer} if job.store is not None else set()
                self.queue.append((job.task, job.number, job.restart + 1))
                self.at(NAP_S, self.wake, job)
        self.at(0, self.start)

    def kill(self, job, then):
        if job.pid in self.alive:
            job.kill()
            self.end(job, then)

    def wake(self, job):
        job.asleep = False
        self.at(0, self.go_on, job)

    def repair(self, slots):
        self.free += slots
        self.at(0, self.start)

    # ------------------------------------------------------------------ what a process asks its system

    def whoami(self):
        job = self.running
        if job is None:
            return {"host": "login", "process": [1, 0.0], "start": None, "job": None}
        return {"host": job.node, "process": [job.pid, 0.0], "start": None, "job": [str(job.number), job.restart]}

    def process(self, pid):
        if pid not in self.alive and pid != 1:
            raise leases.psutil.NoSuchProcess
        return SimpleNamespace(status=lambda: "running", create_time=lambda: 0.0)

    def take_over(self, patch):
        """Puts the simulation between the lab's code and its system, by pytest's `monkeypatch`."""
        append, claim, keep, release = log.Segment.append, Store.claim, Store.keep, Store.release

        def pointed(real):
            def act(store, *given):
                if self.running is not None:
                    self.running.point()
                return real(store, *given)

            return act

        def write(segment, records):
            records = list(records)
            if (job := self.running) is not None:
                job.writing = records
                job.point()
                job.writing = None
            append(segment, records)

        def let_go(store, key):
            if self.running is not None and self.running.dead:
                raise Killed
            release(store, key)

        def wait(seconds):
            self.running.point(30.0)

        gone = type("NoSuchProcess", (Exception,), {})
        system = SimpleNamespace(
            Process=self.process, NoSuchProcess=gone, STATUS_ZOMBIE="zombie", pid_exists=lambda pid: pid in self.alive
        )
        clock = SimpleNamespace(monotonic=lambda: self.clock, time=self.now, gmtime=time.gmtime, strftime=time.strftime)
        patch.setattr(log.Segment, "append", write)
        patch.setattr(Store, "claim", pointed(claim))
        patch.setattr(Store, "keep", pointed(keep))
        patch.setattr(Store, "release", let_go)
        patch.setattr(walk, "time", SimpleNamespace(sleep=wait, perf_counter=time.perf_counter))
        patch.setattr(walk, "listening", nullcontext)
        patch.setattr(stopping, "asked", lambda: self.running is not None and self.running.asked)
        patch.setattr(leases.Leases, "_beat", staticmethod(lambda *_: None))
        patch.setattr(leases, "psutil", system)
        for module in (leases, log):
            patch.setattr(module, "whoami", self.whoami)
            patch.setattr(module, "host_word", lambda: self.whoami()["host"])
            patch.setattr(module, "time", clock)
        patch.setattr("lesion.store.time", clock)
        patch.setattr(os, "getpid", lambda: self.whoami()["process"][0])
        patch.setattr(os, "fsync", lambda file: None)  # no power is cut here
