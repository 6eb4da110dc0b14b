"""A private Slurm cluster on this machine's loopback, as child processes of the test run."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
SLOW_S = 60
"""Time that a step of Slurm may take on a busy machine before it counts as stuck."""

CONFIG = """\
ClusterName=gradproj
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/sock,cred_expire=5
MailProg=/bin/true
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=100000,batch_sched_delay=0
KillWait=15
MinJobAge=600
GresTypes=gpu
{nodes}\
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 State=UP
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=whole Nodes=n[1-4] State=UP
"""
"""cred_expire=5: a requeued job starts again after 5 s, not 120."""
NODE = """\
NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} \
CPUs=128 RealMemory=64000 Gres=gpu:h100:8
"""
NODES = ("n1", "n2", "n3", "n4")
"""Nodes with the resources that the batch files request; empty files stand in for GPUs. Jobs run on
the first two."""


def find_daemons() -> dict[str, str] | None:
    """Return the paths of Slurm's daemons; None if one is not installed."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"])
    found = {name: shutil.which(name, path=path) for name in DAEMONS}
    return {k: v for k, v in found.items() if v} if all(found.values()) else None


def wait_until(
    what: str,
    holds: Callable[[], object],
    timeout_s: float = SLOW_S,
    instead: Callable[[], str] = str,
) -> None:
    """Return when ``holds()`` is true; fails the test when that takes too long."""
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until, f"waited {timeout_s:.0f} s in vain for {what}\n{instead()}"
        time.sleep(0.1)


def free_ports(n: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Cluster:
    """The running cluster, as its user sees it."""

    def __init__(self, root: Path) -> None:
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}

    def __call__(
        self,
        *words: object,
        check: bool = True,
        cwd: Path | None = None,
        secret: dict[str, str] | None = None,
    ) -> str:
        """Run one of Slurm's commands and return both its output streams.

        ``secret``: variables of its environment.
        """
        done = subprocess.run(
            [str(w) for w in words],
            env={**self.environment, **(secret or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SLOW_S,
            cwd=cwd,
        )
        assert not check or done.returncode == 0, f"{words} gave {done.returncode}: {done.stdout}"
        return done.stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """Return the fields that Slurm shows for a job or an array's element (``12_3``)."""
        fields = dict(
            word.partition("=")[::2] for word in self("scontrol", "show", "job", job).split()
        )
        return {name: value for name, value in fields.items() if value}

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def restarts(self, job: str) -> int:
        return int(self.show(job)["Restarts"])

    def cancel_all(self) -> None:
        self("scancel", "--user", getpass.getuser())
        wait_until("an empty queue", lambda: not self("squeue", "-h"))


@contextmanager
def running_cluster(root: Path, daemons: dict[str, str]) -> Iterator[Cluster]:
    """Start the daemons, give the cluster, and leave no process of it."""
    for name in ("state", "run", "log", "munge", *(f"spool.{node}" for node in NODES)):
        (root / name).mkdir(parents=True)
    (root / "munge").chmod(0o711)
    with open(root / "munge" / "key", "wb", opener=lambda p, f: os.open(p, f, 0o600)) as key:
        key.write(os.urandom(32))
    host, user = socket.gethostname().split(".")[0], getpass.getuser()
    port, *ports = free_ports(1 + len(NODES))
    nodes = "".join(
        NODE.format(name=name, port=port) for name, port in zip(NODES, ports, strict=True)
    )
    (root / "slurm.conf").write_text(
        CONFIG.format(root=root, host=host, user=user, port=port, nodes=nodes)
    )
    (root / "gres.conf").write_text(f"NodeName=n[1-4] Name=gpu Type=h100 File={root}/gpu[0-7]\n")
    for n in range(8):
        (root / f"gpu{n}").touch()
    cluster = Cluster(root)
    munge = {f"--{name}-file={root}/munge/{name}" for name in ("key", "pid", "log", "seed")}
    # --force: munged refuses to run in folders that are closed to other users, as those of tests.
    munge |= {"--foreground", "--force", f"--socket={root}/munge/sock"}
    children: list[subprocess.Popen] = []

    def start(name: str, *words: str) -> None:
        with open(root / "log" / f"{name}{''.join(words[-1:])[:3]}.out", "wb") as out:
            command = [daemons[name], *words]
            children.append(
                subprocess.Popen(command, env=cluster.environment, stdout=out, stderr=out)
            )

    try:
        start("munged", *sorted(munge))
        wait_until("munged's socket", (root / "munge" / "sock").exists)
        start("slurmctld", "-D")
        for node in NODES:
            start("slurmd", "-D", "-N", node)
        idle = ("sinfo", "-h", "-N", "-p", "whole", "-o", "%t")
        wait_until(
            "idle nodes", lambda: cluster(*idle, check=False).split() == ["idle"] * len(NODES)
        )
        yield cluster
        cluster.cancel_all()
    finally:
        for child in reversed(children):
            child.send_signal(signal.SIGTERM)
        for child in children:
            try:
                child.wait(timeout=20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def processes_with(text: str) -> list[str]:
    """Return pid and command line of processes whose arguments or environment hold ``text``."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            if (
                int(folder.name) != os.getpid()
                and text.encode() in command + (folder / "environ").read_bytes()
            ):
                found.append(
                    f"{folder.name} {command.replace(bytes(1), b' ').decode(errors='replace')}"
                )
        except OSError:  # it has just ended, or is another user's
            continue
    return found  # a zombie has neither arguments nor an environment
