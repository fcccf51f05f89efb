"""How tests launch a module on two gloo processes, as a user would with torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def torchrun(*words: str) -> list[str]:
    """The command line that runs a module with its arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    return [*launcher, "-m", *words]


def environment() -> dict[str, str]:
    # A busy machine may take longer over a checkpoint than the 30 seconds that torchrun gives after SIGTERM.
    return {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"}


def run_on_two(*words: str) -> str:
    """What the module prints."""
    done = subprocess.run(torchrun(*words), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
