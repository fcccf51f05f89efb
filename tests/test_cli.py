"""The command line as a user meets it: help that teaches, errors in one message, exit codes."""

import json
import subprocess
import sys

import pytest

from mmalign.cli import VERBS, main
from mmalign.data import Candidate, Record, ShardWriter
from mmalign.world import Object, Scene, render


@pytest.fixture
def candidates(tmp_path):
    """Four prompts with a right and a wrong picture each."""
    right = render(Scene((Object("circle", "red", "small", "top left"),)))
    wrong = render(Scene((Object("square", "blue", "large", "top left"),)))
    folder = tmp_path / "candidates"
    with ShardWriter(folder, records_per_shard=2) as writer:
        for index in range(4):
            writer.write(Record(f"{index:04d}", "a red circle", [Candidate(image=wrong), Candidate(image=right)]))
    return folder


def failing(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_help_is_fast_and_names_every_verb():
    code = "import sys\nfrom mmalign.cli import main\ntry:\n main(['--help'])\nexcept SystemExit:\n"
    code += " assert not {'torch', 'diffusers', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(verb in result.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", list(VERBS))
def test_help_of_a_verb_lists_its_keys(verb, capsys):
    main([verb, "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: mmalign {verb}")
    assert "keys, with their defaults:" in shown
    assert "# " in shown


def test_judge_writes_preferences_and_skips_what_is_done(candidates, tmp_path, capsys):
    folder = tmp_path / "pairs"
    main(["judge", f"shards={candidates}", f"output={folder}"])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {"000000.tar", "000001.tar", "shards.json"}
    (folder / "000001.tar").unlink()
    (folder / "shards.json").unlink()
    stamp = (folder / "000000.tar").stat().st_mtime_ns
    main(["judge", f"shards={candidates}", f"output={folder}"])
    assert (folder / "000000.tar").stat().st_mtime_ns == stamp
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    main(["inspect", str(folder), f"grid={tmp_path / 'grid.png'}"])
    assert "preferred x 4" in capsys.readouterr().out
    assert (tmp_path / "grid.png").stat().st_size > 0


def test_index_makes_the_manifest_again(candidates):
    manifest = json.loads((candidates / "shards.json").read_text())
    (candidates / "shards.json").unlink()
    main(["index", str(candidates)])
    assert json.loads((candidates / "shards.json").read_text()) == manifest


def test_a_tie_is_dropped_and_a_scorer_without_weights_refused(tmp_path, candidates, capsys):
    assert "scorer.weights" in failing(capsys, "judge", f"shards={candidates}", "output=x", "scorer.name=clip")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "data.shards=/nowhere", "output=x"], "no shards at /nowhere"),
        (["train", "data.shrads=x"], "did you mean data.shards?"),
        (["train", "objective={name: dpoo}", "data.shards=x"], "did you mean dpo?"),
        (["train", "training.max_steps=soon"], "training.max_steps is 'soon'"),
        (["train", "missing.yaml"], "no config file at missing.yaml"),
        (["train", "reference=none", "data.shards=x"], "objective dpo needs one"),
        (["train", "reference=adapter_off", "data.shards=x"], "set model.lora"),
        (["generate", "output=x", "count=1", "model.path=/nowhere"], "model.path /nowhere"),
        (["generate", "output=x", "prompts=/nowhere.txt"], "/nowhere.txt"),
        (["generate", "output=x"], "set count"),
        (["evaluate", "output=x", "models=[{name: mine, path: world}]"], "one must be called base"),
        (["train", "reference=cached", "data.shards=x"], "draws timestep and noise anew"),
        (["train", "reference.kind=ema", "reference.decay=2", "data.shards=x"], "reference.decay is 2"),
        (["merge", "output=x", "models=[/nowhere]"], "/nowhere is neither a folder nor a hub name"),
        (["merge", "output=x", "models=[world]", "method=add"], "set base"),
        (["judge", "shards=/nowhere", "output=x"], "no shards at /nowhere"),
        (["demo", "diffusion", "--quick", "--full"], "exclude each other"),
        (["index", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = failing(capsys, *words)
    assert message in shown
    assert "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_verb_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["trian"])
    assert "invalid choice" in capsys.readouterr().err


def test_doctor_describes_the_machine(capsys):
    main(["doctor"])
    shown = capsys.readouterr().out
    assert "torch" in shown
    assert "attention" in shown
