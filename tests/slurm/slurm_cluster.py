"""A private Slurm for tests: the real munged, slurmctld and slurmd on this machine, as root, without systemd.

Each virtual node has its own network namespace, host name, loopback and address on a bridge that reaches nothing outside, so a
rendezvous on localhost really fails, and a node whose link goes down is gone for the others. GPUs are names of /dev/null.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "nsenter", "unshare", "gcc")
HERE = Path(__file__).parent
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "DEADLINE", "OUT_OF_MEMORY"}

_CONF = """\
ClusterName=test
SlurmctldHost={host}({subnet}.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
PlugStackConfig={folder}/plugstack.conf
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
EnforcePartLimits=ALL
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
KillWait=5
MinJobAge=3600
ReturnToService=2
SlurmdTimeout=15
TreeWidth=65533
GresTypes=gpu
NodeName=DEFAULT Port={slurmd_port} Sockets=2 CoresPerSocket=32 RealMemory=2000000 Gres=gpu:h100:8
{nodes}
PartitionName=batch Nodes=ALL Default=YES DefaultTime=1:00:00 MaxTime=7-0 PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL DefaultTime=1:00:00 MaxTime=7-0 PriorityTier=10
"""


def why_not() -> str | None:
    """The reason why a cluster can't be started here, None if it can."""
    if os.geteuid() != 0:
        return "needs root (network namespaces, slurmd)"
    missing = [program for program in NEEDED if shutil.which(program) is None]
    if missing:
        return f"needs {', '.join(missing)}; run tests/slurm/install.sh"
    probe = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True)
    return f"needs namespaces: {probe.stderr.strip()}" if probe.returncode else None


class Cluster:
    """`with Cluster(nodes=3) as cluster:` starts it; at the end every process and interface of it is gone."""

    def __init__(self, *, nodes: int):
        # Not below pytest's folder: munge wants directories that others may enter.
        self.folder = Path(tempfile.mkdtemp(prefix="opd-slurm-"))
        self.folder.chmod(0o755)
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "OPD", "PYTEST"))} | {
            "SLURM_CONF": f"{self.folder}/slurm.conf"
        }
        self._tag = f"opd{os.getpid() % 100000}"
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for node in self.nodes:  # whatever still runs in the namespace of a node is ours: slurmd, its steps and their tasks
            pids = subprocess.run(["ip", "netns", "pids", self._namespace(node)], capture_output=True, text=True).stdout.split()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", self._namespace(node)], capture_output=True)
        subprocess.run(["ip", "link", "del", self._tag], capture_output=True)
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        folder, subnet = self.folder, f"10.{100 + os.getpid() % 100}.{os.getpid() // 100 % 250}"
        for name in ("state", *(f"spool.{node}" for node in self.nodes)):
            (folder / name).mkdir()
        for number in range(8):  # gres.conf wants character devices
            (folder / f"nvidia{number}").symlink_to("/dev/null")
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        addresses = {node: f"{subnet}.{number}" for number, node in enumerate(self.nodes, start=11)}
        (folder / "hosts").write_text(
            Path("/etc/hosts").read_text() + "".join(f"{address} {node}\n" for node, address in addresses.items())
        )
        port = 20000 + os.getpid() % 10000
        nodes = "\n".join(f"NodeName={node} NodeHostname={node} NodeAddr={address}" for node, address in addresses.items())
        (folder / "slurm.conf").write_text(
            _CONF.format(folder=folder, host=os.uname().nodename, subnet=subnet, port=port, slurmd_port=port + 1, nodes=nodes)
        )
        (folder / "gres.conf").write_text(f"NodeName=node[1-{len(self.nodes)}] Name=gpu Type=h100 File={folder}/nvidia[0-7]\n")
        plugin = folder / "containers.so"
        subprocess.run(["gcc", "-std=gnu11", "-shared", "-fPIC", "-o", str(plugin), str(HERE / "container_plugin.c")], check=True)
        (folder / "plugstack.conf").write_text(f"required {plugin} {folder}/containers.log\n")

        for words in (f"link add {self._tag} type bridge", f"addr add {subnet}.1/24 dev {self._tag}", f"link set {self._tag} up"):
            _ip(words)
        for number, (node, address) in enumerate(addresses.items()):
            space, link = self._namespace(node), f"{self._tag}v{number}"
            _ip(f"netns add {space}")
            _ip(f"link add {link} type veth peer name eth0 netns {space}")
            _ip(f"link set {link} master {self._tag} up")
            _ip(f"-n {space} addr add {address}/24 dev eth0")
            _ip(f"-n {space} link set eth0 up")
            _ip(f"-n {space} link set lo up")

        munged = ["munged", "--foreground", f"--key-file={key}", f"--socket={folder}/munge.sock", f"--pid-file={folder}/munged.pid"]
        self._spawn("munged", [*munged, f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"])
        wait_for(lambda: (folder / "munge.sock").exists(), 20, "munged")
        self._spawn("slurmctld", ["slurmctld", "-D", "-c", "-f", f"{folder}/slurm.conf"])
        for node in self.nodes:
            start = f"hostname {node}; mount --bind {folder}/hosts /etc/hosts; exec slurmd -D -c -f {folder}/slurm.conf -N {node}"
            enter = ["nsenter", f"--net=/run/netns/{self._namespace(node)}", "unshare", "--uts", "--mount", "--propagation", "slave"]
            self._spawn(f"slurmd.{node}", [*enter, "sh", "-ec", start])
        wait_for(lambda: self.node_states().count("idle") == len(self.nodes), 60, "all nodes to be idle", self.daemon_logs)

    def _spawn(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("wb") as log:
            self._daemons.append(
                subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, env=self.environment, cwd=self.folder, start_new_session=True
                )
            )

    def _namespace(self, node: str) -> str:
        return f"{self._tag}-{node}"

    def daemon_logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in self.folder.glob("*.out"))

    def run(self, *command: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command of Slurm, or a script that uses them."""
        return subprocess.run(
            list(map(str, command)), env=self.environment | environment, cwd=cwd, capture_output=True, text=True, timeout=60
        )

    def ask(self, *command: str | Path) -> str:
        """Output of a command that must succeed."""
        result = self.run(*command)
        assert result.returncode == 0, f"{command}: {result.stderr}"
        return result.stdout

    def node_states(self) -> list[str]:
        return self.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%T").stdout.split()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`; of an array's task by its name ARRAY_TASK."""
        match = re.search(rf"\b{name}=(\S+)", self.ask("scontrol", "-o", "show", "job", job))
        assert match is not None, f"no {name} of job {job}"
        return match[1]

    def wait(self, job: str, *, seconds: float, show: Callable[[], str] = str) -> str:
        """Wait for the end of a job (of every task of an array); returns its last state. `show` explains a time-out."""

        def ended() -> bool:
            return all(state in FINAL for state in re.findall(r"\bJobState=(\S+)", self.ask("scontrol", "-o", "show", "job", job)))

        wait_for(ended, seconds, f"job {job}", lambda: self.ask("scontrol", "show", "job", job) + show())
        return self.field(job, "JobState")

    def kill(self, node: str, words: str) -> None:
        """kill -9 to the one process of a node in whose command line `words` stand."""
        pids = subprocess.run(["ip", "netns", "pids", self._namespace(node)], capture_output=True, text=True, check=True).stdout.split()
        found = []
        for pid in map(int, pids):
            with contextlib.suppress(OSError):
                if words in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode():
                    found.append(pid)
        assert len(found) == 1, f"{len(found)} processes with {words!r} on {node}"
        os.kill(found[0], signal.SIGKILL)

    def cut_off(self, node: str) -> None:
        """What a power failure looks like for the others: the node answers nobody, and closes no connection."""
        _ip(f"-n {self._namespace(node)} link set eth0 down")

    def bring_back(self, node: str) -> None:
        """Give the node its link again; Slurm takes it up when it hears of it, up to minutes later."""
        _ip(f"-n {self._namespace(node)} link set eth0 up")


def wait_for(condition: Callable[[], bool], seconds: float, what: str, show: Callable[[], str] = str) -> None:
    """Raises AssertionError with what `show` says when the condition does not come true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}\n{show()}"
        time.sleep(0.2)


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)
