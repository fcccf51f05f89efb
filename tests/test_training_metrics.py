"""metrics.jsonl, TensorBoard, the progress line and sample grids."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
import yaml
from PIL import Image
from rich.console import Console

from mmalign.training import TrainingSettings, read_rows
from mmalign.training.metrics import MetricsFile, summary
from mmalign.training.preview import grid
from tests.tiny_modality import run, write_pairs

SETTINGS = TrainingSettings(max_steps=6, batch_size=8, learning_rate=1e-2, trackers=())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "shards", bad=[3, 50])


def test_fields_of_a_row(pairs: Path, tmp_path: Path) -> None:
    run(pairs, tmp_path, SETTINGS)
    row = read_rows(tmp_path / "metrics.jsonl")[1]
    assert row.keys() >= {
        "step", "epoch", "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
        "logps/chosen", "logps/rejected", "grad_norm", "learning_rate", "samples_per_second", "data_wait", "length",
    }  # fmt: skip
    assert row["step"] == 1
    assert row["epoch"] == pytest.approx(8 / 96)
    assert 0 <= row["data_wait"] <= 1


def test_rows_every_few_steps_and_the_last(pairs: Path, tmp_path: Path) -> None:
    run(pairs, tmp_path, dataclasses.replace(SETTINGS, log_every=4))
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0, 4, 5]


def test_a_resume_keeps_the_rows_before_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(5)) + '{"step": 5, "lo')
    file = MetricsFile(path, 3)
    file.write({"step": 3, "loss": float("nan")})
    file.close()
    assert read_rows(path) == [{"step": 0}, {"step": 1}, {"step": 2}, {"step": 3, "loss": None}]


def test_the_config_is_saved_with_the_run(pairs: Path, tmp_path: Path) -> None:
    run(pairs, tmp_path, SETTINGS)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["training"]["max_steps"] == 6


def test_tensorboard(pairs: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(pairs, tmp_path, dataclasses.replace(SETTINGS, trackers=("tensorboard",)))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    losses = [event.value for event in events.Scalars("loss")]
    assert losses == pytest.approx([row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")])


def test_wandb_that_is_not_installed_is_an_error(pairs: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from accelerate.utils import is_wandb_available

    if is_wandb_available():
        pytest.skip("wandb is installed")
    with pytest.raises(ValueError, match="training.trackers names wandb"):
        run(pairs, tmp_path, dataclasses.replace(SETTINGS, trackers=("wandb",)))


@pytest.mark.parametrize("terminal", [True, False])
def test_the_display_shows_loss_accuracy_speed_and_skipped_records(pairs: Path, tmp_path: Path, terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=160)
    run(pairs, tmp_path, dataclasses.replace(SETTINGS, max_steps=14), console=console)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    for part in ("14/14", "loss 0.", "accuracy ", "samples/s", "records skipped", "no_feedback 2"):
        assert part in text


def test_a_loss_that_is_not_finite_is_said_so() -> None:
    assert summary({"loss": float("nan"), "samples_per_second": 1.0}, 0) == "loss not finite  1.0 samples/s"


def test_sample_grids_show_the_base_beside_the_policy(pairs: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(
        SETTINGS, sample_every=3, sample_prompts=("1", "2"), sample_seeds=(0, 1), checkpoint_every=3, learning_rate=0.5
    )
    run(pairs, tmp_path, settings)
    base = sorted((tmp_path / "samples" / "base").glob("*.png"))
    assert len(base) == 4
    sheet = Image.open(tmp_path / "samples" / "step-6.png")
    again = grid(
        ("1", "2"), [("", [Image.open(path) for path in base[:2]]), ("", [Image.open(path) for path in base[2:]])]
    )
    assert sheet.width == again.width
    assert sheet.height > again.height
    assert (tmp_path / "samples" / "step-3.png").read_bytes() != (tmp_path / "samples" / "step-6.png").read_bytes()
