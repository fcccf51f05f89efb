"""The cluster launchers, with stand-ins for Slurm: what they start, and what they do when time runs out."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
LAUNCHERS = sorted(SCRIPTS.glob("*.sh"))
# srun runs the command; scontrol names two nodes and notes a requeue; scancel signals the trainer, which then saves.
STAND_INS = {
    "srun": 'shift\nexec "$@"\n',
    "scontrol": 'if [[ $1 == show ]]; then printf "node7\\nnode8\\n"; else echo "$*" >>"$NOTES/requeued"; fi\n',
    "scancel": '[[ "$*" == "--signal=TERM 4711" ]] && kill -TERM "$(<"$NOTES/pid")"\n',
    "trainer": 'echo $$ >"$NOTES/pid"\ntrap "echo saved >$NOTES/saved; exit 9" TERM\necho "$*" >"$NOTES/started"\n'
    "for _ in {1..600}; do sleep 0.05; [[ -e $NOTES/enough ]] && exit 0; done\nexit 1\n",
    "printer": 'printf "%s\\n" "$@"\n',
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    for name, body in STAND_INS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}")
        path.chmod(0o755)
    slurm = {"JOB_ID": "4711", "JOB_NODELIST": "node[7-8]", "JOB_NUM_NODES": "2", "GPUS_ON_NODE": "8"}
    array = {"ARRAY_TASK_ID": "12", "ARRAY_TASK_MIN": "10", "ARRAY_TASK_COUNT": "4"}
    return {
        **os.environ,
        **{f"SLURM_{name}": value for name, value in {**slurm, **array}.items()},
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "NOTES": str(tmp_path),
    }


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_launchers_are_sound_shell(path: Path) -> None:
    assert os.access(path, os.X_OK)
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True).stderr == ""
    if shutil.which("shellcheck"):
        found = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("sent", "saves", "comes_back", "status"),
    [(signal.SIGUSR1, True, True, 9), (signal.SIGTERM, True, False, 9), (None, False, False, 0)],
)
def test_training_saves_and_comes_back_when_time_runs_out(
    environment: dict[str, str], tmp_path: Path, sent: signal.Signals | None, saves: bool, comes_back: bool, status: int
) -> None:
    command = [str(SCRIPTS / "slurm_train.sh"), "configs/x.yaml", "output=a b"]
    process = subprocess.Popen(command, env={**environment, "PYTHON": "trainer"})
    while not (tmp_path / "started").is_file():
        assert process.poll() is None
        time.sleep(0.02)
    if sent is None:
        (tmp_path / "enough").touch()
    else:
        process.send_signal(sent)
        if sent == signal.SIGTERM:  # from Slurm, which then signals the step, too
            os.kill(int((tmp_path / "pid").read_text()), sent)
    assert process.wait(timeout=60) == status
    assert (tmp_path / "saved").is_file() == saves
    assert (tmp_path / "requeued").is_file() == comes_back
    if comes_back:
        assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    started = (tmp_path / "started").read_text()
    assert started.startswith("-m torch.distributed.run --nnodes 2 --nproc-per-node 8 ")
    assert "--rdzv-endpoint node7:24711" in started
    assert started.endswith("-m mmalign train configs/x.yaml output=a b --resume latest\n")


def test_an_array_task_takes_its_share(environment: dict[str, str]) -> None:
    command = [str(SCRIPTS / "slurm_shards.sh"), "judge", "shards=a b", "output=c"]
    done = subprocess.run(command, env={**environment, "PYTHON": "printer"}, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["-m", "mmalign", "judge", "shards=a b", "output=c", "share=[2, 4]"]
    refused = subprocess.run([command[0], "train"], env=environment, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "expected generate, judge or encode" in refused.stderr
