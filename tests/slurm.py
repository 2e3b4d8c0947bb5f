"""A real SLURM on this machine alone: munged, slurmctld and slurmd, started by hand in a folder, with one node and no accounting.

It needs Debian's `slurm-wlm` and `munge`, and to be root; where they are missing, `missing()` says which. Nothing is written
outside the folder, and `stop` leaves nothing running.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=12
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
JobRequeue=1
SlurmdTimeout=20
BatchStartTimeout=1
MessageTimeout=5
InactiveLimit=0
KillWait=5
MinJobAge=60
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=small Nodes={host} Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes={host} MaxTime=60 State=UP PriorityTier=9 PreemptMode=OFF
"""


def missing() -> str:
    """Why no SLURM can be started here, or nothing."""
    if os.geteuid() != 0:
        return "SLURM's daemons are started as root only"
    gone = [program for program in PROGRAMS if not _where(program)]
    return f"no {', '.join(gone)} on this machine (Debian: slurm-wlm, munge)" if gone else ""


# cred_expire: a requeued job begins that much later, as what ends the job before goes by its number alone.
class Cluster:
    """`with Cluster(folder) as cluster: …`; inside, the environment of this process leads to it."""

    def __init__(self, folder: Path, cpus: int = 2):
        self.folder, self.host = folder, socket.gethostname().split(".")[0]
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        folder.mkdir(parents=True)
        for name in ("state", "spool"):
            (folder / name).mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o400)
        folder.chmod(0o755)
        text = CONFIGURATION.format(
            host=self.host, folder=folder, cpus=cpus, ports=_free_ports(2), memory=psutil.virtual_memory().total >> 20
        )
        (folder / "slurm.conf").write_text(text)
        (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")

    def __enter__(self):
        self._conf = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = str(self.folder / "slurm.conf")
        at = self.folder
        munged = ["--foreground", "--force", "--key-file", at / "munge.key", "--socket", at / "munge.socket"]
        munged += ["--pid-file", at / "munged.pid", "--log-file", at / "munged.log", "--seed-file", at / "munged.seed"]
        try:
            self.start("munged", *munged)
            _until((at / "munge.socket").exists, "munged listens")
            self.start("slurmctld", "-D", "-c")
            self.start("slurmd", "-D")
            _until(lambda: "idle" in self.ask("sinfo", "-h", "-o", "%T"), "the node is idle")
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self, program, *options):
        command = [_where(program), *map(str, options)]
        with (self.folder / f"{program}.out").open("ab") as out:
            self.processes[program] = subprocess.Popen(command, stdout=out, stderr=out, cwd=self.folder)

    def lose_node(self, seconds=8):
        """kill -9 of the node's daemon and of everything that runs in jobs, as when the power goes; after `seconds` it is back.

        All are stopped before any is killed, since a supervisor that outlives its job reports a failure, which no power cut does.
        Each `srun` goes first: the kernel sends SIGHUP and SIGCONT to a stopped process whose group loses its last parent, srun then
        cancels its step, and the controller, which finds no node, says so again a minute later, to the step's next incarnation.
        The controller takes a job that began less than BatchStartTimeout + MessageTimeout = 6 s before for one still to come,
        and asks for it again only minutes later.
        """
        stopped = {}
        os.kill(self.processes["slurmd"].pid, signal.SIGSTOP)
        for _ in range(3):  # what was being started when its parent was stopped appears a moment later
            while new := [process for process in self.of_jobs() if process.pid not in stopped]:
                for process in new:
                    stopped[process.pid] = process
                    with suppress(psutil.NoSuchProcess):
                        process.suspend()
            time.sleep(0.1)
        supervise = {"srun": 0, "slurmstepd": 2}
        for process in sorted(stopped.values(), key=lambda process: supervise.get(process.info["name"][:10], 1)):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.processes["slurmd"].kill()
        self.processes["slurmd"].wait()
        time.sleep(seconds)
        self.start("slurmd", "-D")

    def of_jobs(self):
        """Processes that jobs of this cluster have started; what supervises and would report them comes first."""
        found = []
        for process in psutil.process_iter(["name"]):
            with suppress(psutil.Error):
                if process.info["name"].startswith("slurmstepd"):  # whose environment its title has overwritten
                    ours = process.cwd() == str(self.folder)
                else:
                    env = process.environ()
                    ours = env.get("SLURM_CONF") == str(self.folder / "slurm.conf") and "SLURM_JOB_ID" in env
                if ours:
                    found.append(process)
        return sorted(found, key=lambda process: not process.info["name"].startswith("slurmstepd"))

    def stop(self):
        subprocess.run(["scancel", "--user=root"], capture_output=True, check=False, timeout=20)
        for process in self.of_jobs():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for process in reversed(self.processes.values()):
            process.send_signal(signal.SIGKILL)
            process.wait()
        if self._conf is None:
            os.environ.pop("SLURM_CONF", None)
        else:
            os.environ["SLURM_CONF"] = self._conf

    def ask(self, *command):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        return done.stdout

    def queue(self):
        """{job or element: state} of all that SLURM still knows. A controller that is too busy to answer is asked again: no answer
        is not an empty queue."""
        command = ("squeue", "-h", "-r", "-t", "all", "-o", "%i %T")
        for _ in range(30):
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
            if not done.returncode:
                return dict(line.split() for line in done.stdout.split("\n") if line)
            time.sleep(1)
        raise RuntimeError(f"squeue fails: {done.stderr}")

    def until_idle(self, seconds=900):
        """Waits for the end of all jobs."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL", "NODE_FAIL"}
        self.until(lambda: over.issuperset(self.queue().values()), "no job is left", seconds)

    def until(self, true, what, seconds=240):
        """Waits; what the scheduler did meanwhile is part of the error."""
        try:
            _until(true, what, seconds)
        except TimeoutError as error:
            log = (self.folder / "slurmctld.log").read_text().splitlines()
            raise TimeoutError("\n".join([str(error), str(self.queue()), *log[-60:]])) from None


def _where(program):
    return shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin:/usr/local/sbin")


def _until(true, what, seconds=40):
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s in vain until {what}")
        time.sleep(0.2)


def _free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
