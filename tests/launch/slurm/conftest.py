"""A real Slurm of one machine for a test session: munged, slurmctld and one slurmd per pretended node, all private.

Keys, sockets, ports, logs and state live in a temporary folder; a Slurm the machine may already run is not touched.
The installation itself is `make test-slurm`'s.
"""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
CORES_PER_NODE = 2
SLURM_CONF = """\
ClusterName=afd
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# Two nodes are one machine here: it has fewer cores than they claim.
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
KillWait=60
InactiveLimit=0
{nodes}
PartitionName=scavenge Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=60 OverSubscribe=NO
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=60 OverSubscribe=NO
"""


def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _process_titles() -> Iterator[str]:
    """What every process of this machine calls itself."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(FileNotFoundError, ProcessLookupError):
            yield file.read_bytes().replace(b"\0", b" ").decode(errors="replace")


class SlurmCluster:
    """Daemons and the commands to talk to them; `environment` is what a user's shell would have."""

    def __init__(self, folder: Path, num_nodes: int = 2) -> None:
        self.folder, self.num_nodes = folder, num_nodes
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.environment |= {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start everything and wait until the nodes are idle.

        Raises:
            AssertionError: a daemon died or the nodes did not come up; with the end of the logs.
        """
        folder = self.folder
        folder.chmod(0o755)
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        names = [f"node{number}" for number in range(1, self.num_nodes + 1)]
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs={CORES_PER_NODE} "
            f"Sockets=1 CoresPerSocket={CORES_PER_NODE} ThreadsPerCore=1 RealMemory=2000 State=UNKNOWN"
            for name in names
        )
        (folder / "state").mkdir()
        text = SLURM_CONF.format(host=host, folder=folder, controller_port=free_port(), nodes=nodes)
        (folder / "slurm.conf").write_text(text)
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        munge = [f"--{option}={folder}/munge.{end}" for option, end in files.items()]
        self._start(["munged", "--foreground", "--force", *munge])
        self._wait_for((folder / "munge.socket").exists, 10)
        self._start(["slurmctld", "-D"])
        for name in names:
            self._start(["slurmd", "-D", "-N", name])
        self._wait_for(lambda: self._idle_nodes() == self.num_nodes, 30)

    def _start(self, command: list[str]) -> None:
        log = (self.folder / f"{Path(command[0]).name}-{len(self._daemons)}.out").open("wb")
        process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self._daemons.append(process)

    def _idle_nodes(self) -> int:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "urgent", "-o", "%T"], env=self.environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        return done.stdout.split().count("idle")

    def _wait_for(self, is_ready: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_ready():
            dead = [each.args for each in self._daemons if each.poll() is not None]
            assert not dead, f"{dead} ended\n{self.logs()}"
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        files = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')[-1500:]}" for file in files)

    def run(self, *command: str) -> str:
        """A Slurm command's output.

        Raises:
            AssertionError: it failed; with what it said.
        """
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, job_id: str) -> dict[str, str]:
        """What `scontrol show job` says, by field."""
        fields = self.run("scontrol", "show", "-o", "job", job_id).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def start_again(self, job_id: str) -> None:
        """Start a requeued job at once instead of after Slurm's two minutes, when its first start is over on the nodes.

        The end of that start's last step, told late, would be taken for the end of the second start.
        """
        title = f"slurmstepd: [{self.job(job_id)['JobId']}."  # an array task has a number of its own
        self._wait_for(lambda: not any(each.startswith(title) for each in _process_titles()), 60)
        time.sleep(3)  # what it told last may still be on its way to the controller: seen on a loaded machine
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")

    def stop(self) -> None:
        """Cancel every job, then end the daemons this object started, and nothing else."""
        subprocess.run(["scancel", "--partition=scavenge,urgent"], env=self.environment, check=False)
        for process in reversed(self._daemons):
            process.terminate()
        for process in self._daemons:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Two pretended nodes of two cores each, started once."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.fail(f"{', '.join(missing)} not found: run `make test-slurm`, which installs slurm-wlm and munge")
    if os.geteuid() != 0:
        pytest.fail("the Slurm daemons of this test run as root (in a container, say), got another user")
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
