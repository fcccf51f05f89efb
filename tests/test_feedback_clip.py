"""CLIP scores, on a real and very small CLIP built from a config and saved to a file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mmalign.core.types import Sample
from mmalign.feedback import clip_score

SIZES = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def write_clip(folder: Path) -> tuple[Path, str]:
    """(weights, architecture): the paths of a safetensors file, with its twin in torch's format, and a model config."""
    import open_clip

    config = folder / "tiny-clip.json"
    config.write_text(json.dumps(SIZES))
    open_clip.add_model_config(config)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip")
    save_file(model.state_dict(), folder / "weights.safetensors")
    torch.save(model.state_dict(), folder / "weights.pt")
    return folder / "weights.safetensors", str(config)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


def sample(number: int, prompt: Any = "a red circle", image: str = "made") -> Sample:
    picture = Image.new("RGB", (40, 40), (40 * number % 256, 90, 200)) if image == "made" else None
    return Sample(key=f"{number:06d}", prompt=prompt, group=number, draw=number, image=picture)


def test_score_is_a_hundred_times_the_cosine(clip):
    import open_clip

    weights, architecture = clip
    one = sample(3)
    made: Any = open_clip.create_model_and_transforms("tiny-clip", pretrained=str(weights))
    model, _, transform = made
    with torch.no_grad():
        picture = model.eval().encode_image(transform(one.image)[None])
        text = model.encode_text(open_clip.get_tokenizer("tiny-clip")([one.prompt]))
    expected = 100 * torch.cosine_similarity(picture, text).item()
    assert clip_score(weights, architecture)([one])[0] == pytest.approx(expected, abs=1e-4)


def test_batches_and_file_formats_do_not_matter(clip):
    weights, architecture = clip
    samples = [sample(number, f"a picture of {number} squares") for number in range(5)]
    scores = clip_score(weights, architecture)(samples)
    assert len(set(scores)) == 5
    assert clip_score(weights, architecture, batch_size=2)(samples) == pytest.approx(scores, abs=1e-4)
    assert clip_score(weights.with_suffix(".pt"), "tiny-clip")(samples) == pytest.approx(scores, abs=1e-6)


def test_prompts_that_the_text_tower_cuts_are_counted(clip):
    scorer = clip_score(*clip)
    scorer([sample(0), sample(1, "a word " * 30)])
    assert scorer.truncated_prompts == 1


def test_samples_without_image_or_text_are_refused_by_key(clip):
    scorer = clip_score(*clip)
    with pytest.raises(ValueError, match="000007 has no image"):
        scorer([sample(7, image="none")])
    with pytest.raises(ValueError, match="prompt of sample 000008 is a list"):
        scorer([sample(8, prompt=[{"role": "user"}])])


def test_a_score_that_is_not_finite_is_never_handed_on(clip, tmp_path):
    from safetensors.torch import load_file

    broken = load_file(clip[0])
    broken["visual.proj"].fill_(torch.nan)
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="000001 as nan"):
        clip_score(tmp_path / "broken.safetensors", clip[1])([sample(1)])


def test_weights_are_local_files_that_fit(clip, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="nothing is downloaded"):
        clip_score(tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="do not fit the architecture ViT-B-32"):
        clip_score(clip[0], "ViT-B-32")
    longer = {**SIZES, "text_cfg": {**SIZES["text_cfg"], "context_length": 16}}
    (tmp_path / "longer.json").write_text(json.dumps(longer))
    with pytest.raises(ValueError, match=r"positional_embedding is \(12, 16\), expected \(16, 16\)"):
        clip_score(clip[0], str(tmp_path / "longer.json"))
    torch.save({"weight": Image.new("RGB", (1, 1))}, tmp_path / "pickled.pt")
    with pytest.raises(ValueError, match="do not fit"):
        clip_score(tmp_path / "pickled.pt", clip[1])
    # A tag of open_clip ("openai") is a file name like any other here: an error, not a download.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai").write_bytes(b"")
    with pytest.raises(ValueError, match="got openai"):
        clip_score("openai", "ViT-B-32")


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("ViT-B-33", "no architecture 'ViT-B-33'"),
        ("roberta-ViT-B-32", "hf_model_name"),
        ("ViT-B-16-SigLIP", "hf_tokenizer_name"),
        ("hf-hub:someone/something", "no architecture"),
    ],
)
def test_architectures_that_are_unknown_or_need_a_hub_are_refused(clip, architecture, reason):
    with pytest.raises(ValueError, match=reason):
        clip_score(clip[0], architecture)


def test_model_configs_are_checked(clip, tmp_path):
    with pytest.raises(FileNotFoundError, match="no CLIP model config"):
        clip_score(clip[0], str(tmp_path / "absent.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        clip_score(clip[0], str(tmp_path / "broken.json"))
    (tmp_path / "other.json").write_text('{"embed_dim": 4}')
    with pytest.raises(ValueError, match="lacks text_cfg, vision_cfg"):
        clip_score(clip[0], str(tmp_path / "other.json"))
