"""The record: what is written is what is read, what is not asked for is not decoded, what is wrong is named."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from PIL import Image

from mmalign.data import KINDS, Candidate, Columns, Record, RecordError, decode, encode
from tests.data_sets import members, native, pair, picture, picture_bytes

IMAGE, LATENT, RAW = frozenset({"image"}), frozenset({"latent"}), frozenset({"raw"})


def refused(files: Mapping[str, bytes], need: frozenset[str] = IMAGE, columns: Columns | None = None) -> RecordError:
    with pytest.raises(RecordError) as caught:
        decode(files, "000007", "000001.tar", need, columns)
    assert (caught.value.shard, caught.value.key) == ("000001.tar", "000007")
    assert caught.value.kind in KINDS
    return caught.value


def test_everything_survives_a_round_trip():
    segments = [{"start": 0, "end": 4, "object": 0}]
    record = Record(
        key="a",
        prompt=[{"role": "user", "content": "What is it? é"}],
        candidates=[
            Candidate(image=picture(1), score=0.5, desirable=True, source="human", tensors={"mean": torch.ones(2, 3)}),
            Candidate(text="a cat", segments=segments, score=-1.0),
        ],
        preferred=[(1, 0)],
        meta={"model": "base"},
        prompt_images=[picture(3), picture_bytes(4, "JPEG")],
        tensors={"text.hidden": torch.arange(3), "reference.log_prob": torch.zeros(1)},
    )
    read = decode(encode(record), "a", "s.tar", IMAGE | LATENT)
    first, second = read.candidates
    assert (read.prompt, read.preferred, read.meta, read.shard) == (record.prompt, [(1, 0)], record.meta, "s.tar")
    assert (first.score, first.desirable, first.source) == (0.5, True, "human")
    assert isinstance(first.image, Image.Image)
    assert first.image.tobytes() == picture(1).tobytes()
    assert torch.equal(first.tensors["mean"], torch.ones(2, 3))
    assert (second.text, second.segments, second.image) == ("a cat", segments, None)
    assert [image.size for image in read.prompt_images if isinstance(image, Image.Image)] == [(8, 8), (8, 8)]
    assert sorted(read.tensors) == ["reference.log_prob", "text.hidden"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_image_bytes_are_written_as_they_came(kind: str):
    content = picture_bytes(5, kind)
    record = Record("a", "p", [Candidate(image=content)])
    assert content in encode(record).values()
    again = decode(encode(record), "a", "s", RAW)
    assert again.candidates[0].image == content
    assert again.picture(0).mode == "RGB"


def test_pictures_become_png_or_jpg_by_choice():
    record = Record("a", "p", [Candidate(image=picture(5))])
    assert sorted(encode(record)) == ["candidate0.png", "json"]
    assert sorted(encode(record, "jpg")) == ["candidate0.jpg", "json"]
    with pytest.raises(ValueError, match="expected png or jpg"):
        encode(record, "bmp")


class _Watched(Mapping[str, bytes]):
    """Members that remember which of them were read."""

    def __init__(self, files: Mapping[str, bytes]):
        self.files, self.read = files, set()

    def __getitem__(self, name: str) -> bytes:
        self.read.add(name)
        return self.files[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def test_only_what_is_needed_is_read():
    # json first: the type checker of the tests looks at the first item of a mapping.
    files = _Watched({"json": b"", **encode(pair(3)), "extra.pth": b"never", "text.safetensors": encode_tensor()})
    decode(files, "a", "s", LATENT)
    assert files.read == {"json", "candidate0.latent.safetensors", "candidate1.latent.safetensors", "text.safetensors"}
    files.read.clear()
    decode(files, "a", "s", IMAGE)
    assert files.read == {"json", "candidate0.png", "candidate1.png"}
    files.read.clear()
    decode(files, "a", "s", frozenset())
    assert files.read == {"json"}


def encode_tensor() -> bytes:
    record = Record("a", "p", [], tensors={"text.hidden": torch.ones(1)})
    return encode(record)["text.safetensors"]


def test_an_unknown_need_is_refused():
    with pytest.raises(ValueError, match="cannot read"):
        decode(members(), "a", "s", frozenset({"pictures"}))


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("name", ["candidate0.pkl", "candidate0.pth", "candidate0.npy", "candidate0.tiff"])
def test_nothing_else_is_ever_decoded(name: str):
    files = {**members(candidates=[{"image": name}], preferred=[]), name: pickle.dumps(_Bomb())}
    assert refused(files).kind == "invalid_record"
    latent = {**members(), "candidate0.latent.safetensors": pickle.dumps(_Bomb())}
    assert refused(latent, LATENT).kind == "broken_tensors"
    disguised = {**members(), "candidate0.png": pickle.dumps(_Bomb())}
    assert refused(disguised).kind == "broken_image"


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes that claims to be huge."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (picture_bytes(1, "PNG", 64)[:-40], "broken_image"),
        (picture_bytes(1, "JPEG", 64)[:-40], "broken_image"),
        (b"", "broken_image"),
        (b"GIF89a" + bytes(20), "broken_image"),
        (bomb(8_001, 8_000), "image_too_large"),
        (bomb(60_000, 60_000), "image_too_large"),
    ],
)
def test_bad_pictures_are_named(content: bytes, kind: str):
    error = refused({**members(), "candidate1.png": content})
    assert error.kind == kind
    assert "candidate1.png" in error.message


def test_pictures_are_upright_rgb():
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(buffer, "JPEG", exif=exif)
    palette = io.BytesIO()
    Image.new("RGBA", (3, 3), (255, 0, 0, 0)).save(palette, "PNG")
    files = {**members(), "candidate0.png": buffer.getvalue(), "candidate1.png": palette.getvalue()}
    record = decode(files, "a", "s")
    assert record.picture(0).size == (4, 8)
    assert record.picture(1).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("content", "kind", "says"),
    [
        (b"{", "invalid_json", "line 1"),
        (b"\xff\xfe{}", "invalid_json", ""),
        (b"[" * 100_000, "invalid_json", "recursion"),
        (b"[]", "invalid_record", "list"),
        (b"{}", "unknown_schema", "data.columns"),
        (native(schema=2), "unknown_schema", "expected 1"),
        (native(schema="1"), "unknown_schema", "'1'"),
        (native(prompt=3), "invalid_record", "prompt"),
        (native(prompt=["hello"]), "invalid_record", "prompt"),
        (native(candidates={}), "invalid_record", "candidates"),
        (native(candidates=[1]), "invalid_record", "candidate 0"),
        (native(candidates=[{"image": "../candidate0.png"}], preferred=[]), "invalid_record", "image"),
        (native(candidates=[{"image": "c.png"}], preferred=[]), "missing_member", "c.png"),
        (native(candidates=[{}], preferred=[]), "missing_member", "neither"),
        (native(preferred=[[0, 2]]), "invalid_record", "[0, 2]"),
        (native(preferred=[[1, 1]]), "invalid_record", "[1, 1]"),
        (native(preferred=[[True, False]]), "invalid_record", "preferred"),
        (native(preferred=3), "invalid_record", "preferred"),
        (native(meta=[]), "invalid_record", "meta"),
        (native(candidates=[{"text": "a", "score": "0.5"}], preferred=[]), "invalid_record", "score"),
        (native(candidates=[{"text": "a", "score": float("nan")}], preferred=[]), "nan_score", "nan"),
        (native(candidates=[{"text": "a", "score": float("inf")}], preferred=[]), "nan_score", "inf"),
        (native(candidates=[{"text": "a", "desirable": "yes"}], preferred=[]), "invalid_record", "desirable"),
    ],
)
def test_bad_json_is_named(content: bytes, kind: str, says: str):
    error = refused({**members(), "json": content})
    assert error.kind == kind
    assert says in error.message


def test_missing_members_say_what_to_do():
    assert "data.columns" in refused({"jpg": b""}).message
    assert "mmalign encode" in refused(members(), LATENT).message


def test_errors_survive_pickling_and_name_the_record():
    error = pickle.loads(pickle.dumps(RecordError("tie", "000001.tar", "000007", "equal")))
    assert str(error) == "tie: 000001.tar, record 000007: equal"
    with pytest.raises(ValueError, match="unknown kind"):
        RecordError("odd", "s", "k", "m")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"preferred": [(0, 5)]}, "invalid_record"),
        ({"candidates": [Candidate(text="a", score=float("nan"))], "preferred": []}, "nan_score"),
        ({"candidates": [Candidate(image=b"BM123")], "preferred": []}, "broken_image"),
        ({"prompt": None}, "invalid_record"),
        ({"tensors": {"hidden": torch.ones(1)}}, "invalid_record"),
    ],
)
def test_nothing_is_written_that_cannot_be_read(change: dict, kind: str):
    with pytest.raises(RecordError) as caught:
        encode(replace(pair(0), **change))
    assert caught.value.kind == kind


ORPO = Columns("original_prompt.txt", ("jpg_0.jpg", "jpg_1.jpg"), "label_0.txt")


def orpo(label: bytes) -> dict[str, bytes]:
    return {
        "original_prompt.txt": b"a fox\n",
        "jpg_0.jpg": picture_bytes(0, "JPEG"),
        "jpg_1.jpg": picture_bytes(1, "JPEG"),
        "label_0.txt": label,
        "label_1.txt": b"not read",
    }


@pytest.mark.parametrize(
    ("label", "preferred", "scores"),
    [
        (b"1.0", [(0, 1)], [1, 0]),
        (b"1", [(0, 1)], [1, 0]),
        (b"0.0", [(1, 0)], [0, 1]),
        (b" 0\n", [(1, 0)], [0, 1]),
        (b"0.5", [], [0.5, 0.5]),
    ],
)
def test_labels_are_numbers_not_truthy_text(label: bytes, preferred: list, scores: list):
    record = decode(orpo(label), "a", "s", IMAGE, ORPO)
    assert record.prompt == "a fox"
    assert record.preferred == preferred
    assert [candidate.score for candidate in record.candidates] == scores
    assert record.picture(1).size == (8, 8)


@pytest.mark.parametrize(
    ("label", "kind"), [(b"nan", "nan_score"), (b"yes", "invalid_record"), (b"0.7", "invalid_record")]
)
def test_other_labels_are_refused(label: bytes, kind: str):
    assert refused(orpo(label), IMAGE, ORPO).kind == kind


def test_img2dataset_and_json_columns():
    files = {"jpg": picture_bytes(0, "JPEG"), "txt": b"a dog", "json": json.dumps({"similarity": 0.3}).encode()}
    assert decode(files, "a", "s", IMAGE, Columns()).prompt == "a dog"
    scored = decode(files, "a", "s", IMAGE, Columns("txt", ("png;jpg",), scores=("json:similarity",)))
    assert scored.candidates[0].score == 0.3
    assert refused(files, IMAGE, Columns("json:caption")).kind == "missing_member"
    assert refused({**files, "json": b"{"}, IMAGE, Columns("json:caption")).kind == "invalid_json"
    assert refused(files, IMAGE, Columns("caption.txt")).kind == "missing_member"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"label": "cls"}, "two candidates"),
        ({"scores": ("a", "b")}, "one score per candidate"),
        ({"candidates": ("a", "b"), "label": "l", "scores": ("a", "b")}, "both"),
    ],
)
def test_impossible_column_maps_are_refused_at_once(arguments: dict, says: str):
    with pytest.raises(ValueError, match=says):
        Columns(**arguments)
