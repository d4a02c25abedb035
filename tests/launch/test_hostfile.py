"""Several nodes without Slurm: `deepspeed --hostfile` on two nodes that share nothing but a wire and a disk.

Two network namespaces with a virtual cable between them stand for the nodes; part of `make test-slurm`, because
making them needs root.
"""

import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
INTERFACE = "afd0"


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(f"ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def nodes() -> Iterator[tuple[str, str]]:
    """Names of two namespaces that reach each other as ADDRESSES over INTERFACE, and nothing else."""
    if shutil.which("ip") is None:
        pytest.skip("the program `ip` (iproute2) is not there to make network namespaces")
    mark = secrets.token_hex(3)
    names = (f"afd-{mark}-1", f"afd-{mark}-2")
    made = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip(
                "link",
                "add",
                INTERFACE,
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
                INTERFACE,
                "netns",
                names[1],
            )
            for name, address in zip(names, ADDRESSES, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
                for link in ("lo", INTERFACE):
                    ip("-n", name, "link", "set", link, "up")
        except PermissionError as error:
            pytest.skip(f"network namespaces are not permitted here: {error}")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_nodes_of_a_hostfile_train_like_two_ranks_of_one(
    nodes: tuple[str, str], tiny: Any, whole: Path, tmp_path: Path, assert_same_run: Any
) -> None:
    hostfile, output, port = tmp_path / "hostfile", tmp_path / "run", str(free_port())
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    processes = []
    for number, name in enumerate(nodes):
        launcher = ["deepspeed", "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(number)]
        rendezvous = ["--master_addr", ADDRESSES[0], "--master_port", port]
        run = ["launch/train.py", "--ds_config", str(tiny.ds_config), "--output_dir", str(output), *tiny.overrides()]
        log = (tmp_path / f"node{number}.log").open("w")
        processes.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *launcher, *rendezvous, *run],
                cwd=ROOT, env=tiny.environment() | {"GLOO_SOCKET_IFNAME": INTERFACE}, stdout=log, stderr=log,
            )
        )  # fmt: skip
    codes = [process.wait(280) for process in processes]
    logs = [(tmp_path / f"node{number}.log").read_text()[-4000:] for number in range(2)]
    assert codes == [0, 0], "\n".join(logs)
    assert_same_run(output, whole)
