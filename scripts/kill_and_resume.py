"""Kills a training with SIGKILL at random points, starts it again each time, and compares it with one left alone.

    python scripts/kill_and_resume.py mmalign train configs/world_dpo.yaml training.max_steps=60

The command must take `output=<folder>` and `resume=latest` as further arguments, as `mmalign train` does. metrics.jsonl
must be equal to the bit, timing fields aside, and so must the weights of the last checkpoint. Exit code 1 otherwise.
Every other point is drawn over the whole life of the process (imports and loading too), the rest over its steps and
the writing of checkpoints, which would otherwise be rarely hit.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mmalign.training import TIMING, read_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the random points")
    parser.add_argument("--folder", type=Path, help="where the two runs go (default: a temporary folder)")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if not args.command:
        parser.error("give the training command to kill")
    folder = args.folder or Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    shutil.rmtree(folder, ignore_errors=True)
    whole, killed = folder / "whole", folder / "killed"
    began = time.monotonic()
    run([*args.command, f"output={whole}", "resume=latest"])
    life = time.monotonic() - began
    print(f"uninterrupted: {len(read_rows(whole / 'metrics.jsonl'))} rows in {life:.1f} s", flush=True)
    runs = interrupt(args, whole, killed, life)
    print("equal to the bit: every row of metrics.jsonl, weights and optimizer")
    print(json.dumps({"kills": args.kills, "seed": args.seed, "runs_compared": runs, "equal": True}))


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def interrupt(args: argparse.Namespace, whole: Path, folder: Path, life: float) -> int:
    """`args.kills` kills that hit a living process, then one run to the end. A run that reaches its end before that is
    compared too, and begun anew. Returns how many runs were compared."""
    command = [*args.command, f"output={folder}", "resume=latest"]
    stepping = read_rows(whole / "metrics.jsonl")[-1]["seconds"]
    chance, done, compared = random.Random(args.seed), 0, 0
    while done < args.kills:
        began = time.time()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if done % 2:
            wait_for_a_step(process, folder, began)
        try:
            process.wait(timeout=chance.uniform(0, stepping if done % 2 else life))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            done += 1
            print(f"kill {done}: {len(read_rows(folder / 'metrics.jsonl'))} rows on record", flush=True)
            continue
        if process.returncode:
            sys.exit(f"the run failed by itself after {done} kills; run it by hand: {' '.join(command)}")
        assert_equal(whole, folder)
        compared += 1
        shutil.rmtree(folder)
    run(command)
    assert_equal(whole, folder)
    return compared + 1


def wait_for_a_step(process: subprocess.Popen, folder: Path, began: float) -> None:
    """Until the process, started at `began`, touches metrics.jsonl, or ends."""
    path = folder / "metrics.jsonl"
    while process.poll() is None and not (path.is_file() and path.stat().st_mtime > began):
        time.sleep(0.01)


def assert_equal(whole: Path, killed: Path) -> None:
    differences = compare(whole, killed)
    if differences:
        sys.exit("\n".join(differences))


def compare(whole: Path, killed: Path) -> list[str]:
    one, other = rows(whole), rows(killed)
    differences = [f"{len(one)} rows uninterrupted, {len(other)} killed"] if len(one) != len(other) else []
    for left, right in zip(one, other, strict=False):
        differences += [
            f"step {left['step']}: {key} is {left.get(key)} uninterrupted, {right.get(key)} killed"
            for key in sorted(left.keys() | right.keys())
            if left.get(key) != right.get(key)
        ]
    name = (whole / "latest").read_text().strip()
    for file in ("model.safetensors", "optimizer.safetensors"):
        if (whole / name / file).read_bytes() != (killed / name / file).read_bytes():
            differences.append(f"{name}/{file} differs")
    return differences


def rows(folder: Path) -> list[dict]:
    return [{key: row[key] for key in row if key not in TIMING} for row in read_rows(folder / "metrics.jsonl")]


if __name__ == "__main__":
    main()
