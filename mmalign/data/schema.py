"""The record: one prompt, N candidates, whatever feedback exists; and its form as the members of a tar shard.

Only json, txt, jpg, png, webp and safetensors are ever decoded; nothing is unpickled. Images have a pixel limit, are
decoded in full (a truncated file is an error, not a grey lower half) and turned upright by their EXIF orientation.
Refused: unknown schema numbers, NaN scores, preferences between candidates that do not exist. Nothing is repaired.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors
import safetensors.torch
from PIL import Image, ImageOps
from torch import Tensor

from mmalign.data.columns import Columns
from mmalign.data.errors import Defect, RecordError

SCHEMA = 1
# Some 8,000 x 8,000. A picture that unpacks to more is a mistake or a bomb.
MAX_PIXELS = 64_000_000
# What a reader may ask for: decoded images; image bytes as stored (to copy records without re-encoding); tensors.
NEEDS = frozenset({"image", "raw", "latent"})

_IMAGE_NAME = re.compile(r"([\w\-.]+\.)?(jpg|jpeg|png|webp)", re.IGNORECASE)
_MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp"}


@dataclass(frozen=True)
class Candidate:
    """An answer on record. Fields that are unknown, or were not asked for, are None or empty."""

    image: Image.Image | bytes | None = None
    text: str | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    score: float | None = None
    desirable: bool | None = None
    source: str | None = None
    segments: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Record:
    """One prompt (text or chat messages, with or without images), its candidates and the feedback on them.

    `preferred` holds (chosen, rejected) indices into `candidates`. `tensors` belong to the prompt and are named
    `<member>.<tensor>`, e.g. `text.hidden` for the tensor `hidden` of text.safetensors. `shard` is where it was read.
    """

    key: str
    prompt: Any
    candidates: Sequence[Candidate] = ()
    preferred: Sequence[tuple[int, int]] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    prompt_images: Sequence[Image.Image | bytes] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    shard: str = ""

    @property
    def name(self) -> str:
        """The key with its shard: unique in a data set, and what messages call the record."""
        return f"{self.shard}/{self.key}" if self.shard else self.key

    def picture(self, place: int) -> Image.Image:
        """The picture of a candidate, decoded now if the record was read with need={"raw"}. Raises RecordError."""
        image = self.candidates[place].image
        if image is None:
            raise RecordError("missing_member", self.shard, self.key, f"candidate {place} has no picture")
        try:
            return open_image(image, f"candidate {place}") if isinstance(image, bytes) else image
        except Defect as defect:
            raise defect.at(self.shard, self.key) from None


def decode(
    members: Mapping[str, bytes],
    key: str,
    shard: str,
    need: frozenset[str] = frozenset({"image"}),
    columns: Columns | None = None,
) -> Record:
    """The record in `members` (field to content). Decodes what `need` names and nothing else; json always.

    `need`: "image" gives PIL images (RGB), "raw" the image bytes as they are, "latent" the stored tensors. Raises
    RecordError, and ValueError for a need that does not exist.
    """
    if not need <= NEEDS or {"image", "raw"} <= need:
        raise ValueError(f"cannot read {sorted(need)}; expected some of latent and one of image or raw")
    try:
        entry = _entry(members, columns)
        candidates = [_candidate(place, item, members, need) for place, item in enumerate(entry["candidates"])]
        return Record(
            key=key,
            prompt=_prompt(entry.get("prompt")),
            candidates=candidates,
            preferred=_preferred(entry.get("preferred", []), len(candidates)),
            meta=_typed(entry.get("meta", {}), dict, "meta"),
            prompt_images=_prompt_images(members, need),
            tensors=_prompt_tensors(members, need),
            shard=shard,
        )
    except Defect as defect:
        raise defect.at(shard, key) from None


def encode(record: Record, image_format: str = "png") -> dict[str, bytes]:
    """The members of `record`. Image bytes are kept as they are; PIL images become `image_format`: png, or jpg (q95).

    Raises RecordError for a record that `decode` would refuse, so that no shard is written that cannot be read.
    """
    if image_format not in ("png", "jpg"):
        raise ValueError(f"image_format is {image_format!r}; expected png or jpg")
    members: dict[str, bytes] = {}
    entry: dict[str, Any] = {"schema": SCHEMA, "prompt": record.prompt, "candidates": []}
    try:
        _prompt(record.prompt)
        for place, candidate in enumerate(record.candidates):
            entry["candidates"].append(_write_candidate(place, candidate, members, image_format))
        entry["preferred"] = [list(pair) for pair in _preferred(record.preferred, len(record.candidates))]
        for place, image in enumerate(record.prompt_images):
            extension, content = _image_bytes(image, image_format)
            members[f"prompt{place}.{extension}"] = content
        _write_prompt_tensors(record.tensors, members)
    except Defect as defect:
        raise defect.at(record.shard, record.key) from None
    if record.meta:
        entry["meta"] = dict(record.meta)
    members["json"] = json.dumps(entry, ensure_ascii=False, allow_nan=False).encode()
    return members


def open_image(content: bytes, name: str = "image") -> Image.Image:
    """`content` as an upright RGB picture, decoded in full. Transparency is laid on white. Raises Defect."""
    try:
        picture = Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))
        if picture.width * picture.height > MAX_PIXELS:
            raise Defect("image_too_large", f"{name} is {picture.width} x {picture.height}, over {MAX_PIXELS:,} pixels")
        picture.load()
        picture = ImageOps.exif_transpose(picture)
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            return Image.alpha_composite(white, picture).convert("RGB")
        return picture.convert("RGB")
    except Image.DecompressionBombError:
        raise Defect("image_too_large", f"{name} unpacks to more than {MAX_PIXELS:,} pixels") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error) as error:
        raise Defect("broken_image", f"{name} ({len(content)} bytes): {_plain(error)}") from None


def _plain(error: BaseException) -> str:
    # Pillow's message for unknown content shows the address of a buffer, which differs from run to run.
    text = str(error)
    return "not a jpg, png or webp picture" if "cannot identify" in text else text or type(error).__name__


def _entry(members: Mapping[str, bytes], columns: Columns | None) -> dict[str, Any]:
    """The json member, checked as far as the list of candidates; a foreign layout comes through its column map."""
    if columns is not None:
        return columns.entry(members)
    if "json" not in members:
        raise Defect(
            "missing_member", f"no json member among {', '.join(members)}; a foreign layout needs data.columns"
        )
    try:
        entry = json.loads(members["json"])
    except (ValueError, RecursionError) as error:
        raise Defect("invalid_json", str(error)) from None
    entry = _typed(entry, dict, "the record")
    if entry.get("schema") != SCHEMA:
        came = f"schema {entry['schema']!r}" if "schema" in entry else "no schema number"
        raise Defect("unknown_schema", f"{came}, expected {SCHEMA}; a foreign layout needs data.columns")
    _typed(entry.setdefault("candidates", []), list, "candidates")
    return entry


def _typed(value: Any, expected: type, name: str) -> Any:
    if not isinstance(value, expected):
        raise Defect("invalid_record", f"{name} is a {type(value).__name__}; expected a {expected.__name__}")
    return value


def _prompt(prompt: Any) -> Any:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        return prompt
    raise Defect("invalid_record", f"prompt is {prompt!r:.80}; expected text or a list of chat messages")


def _candidate(place: int, item: Any, members: Mapping[str, bytes], need: frozenset[str]) -> Candidate:
    name = f"candidate {place}"
    _typed(item, dict, name)
    return Candidate(
        image=_candidate_image(name, item, members, need),
        text=_optional(item, "text", str, name),
        tensors=_candidate_tensors(place, item, members, need),
        score=_score(item.get("score"), name),
        desirable=_optional(item, "desirable", bool, name),
        source=_optional(item, "source", str, name),
        segments=_typed(item.get("segments", []), list, f"{name}: segments"),
    )


def _optional(item: Mapping[str, Any], entry: str, expected: type, name: str) -> Any:
    value = item.get(entry)
    return None if value is None else _typed(value, expected, f"{name}: {entry}")


def _score(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Defect("invalid_record", f"{name}: score is {value!r}; expected a number")
    if not math.isfinite(value):
        raise Defect("nan_score", f"{name}: score is {value}")
    return float(value)


def _candidate_image(
    name: str, item: Mapping[str, Any], members: Mapping[str, bytes], need: frozenset[str]
) -> Image.Image | bytes | None:
    member = _optional(item, "image", str, name)
    if member is None:
        if "image" in need and item.get("text") is None:
            raise Defect("missing_member", f"{name} has neither an image nor a text")
        return None
    if not _IMAGE_NAME.fullmatch(member):
        raise Defect("invalid_record", f"{name}: image is {member!r}; expected a jpg, png or webp member")
    if not need & {"image", "raw"}:
        return None
    if member not in members:
        raise Defect("missing_member", f"{name}: no member {member} in the shard")
    return members[member] if "raw" in need else open_image(members[member], member)


def _candidate_tensors(
    place: int, item: Mapping[str, Any], members: Mapping[str, bytes], need: frozenset[str]
) -> Mapping[str, Tensor]:
    if "latent" not in need:
        return {}
    member = f"candidate{place}.latent.safetensors"
    if member in members:
        return _tensors(members[member], member)
    if item.get("text") is None:
        raise Defect("missing_member", f"no {member}; make one with `mmalign encode`, or train from images")
    return {}


def _tensors(content: bytes, member: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise Defect("broken_tensors", f"{member}: {error}") from None


def _prompt_images(members: Mapping[str, bytes], need: frozenset[str]) -> list[Image.Image | bytes]:
    if not need & {"image", "raw"}:
        return []
    found = {}
    for member in members:
        match = re.fullmatch(r"prompt(\d+)\.(jpg|jpeg|png|webp)", member)
        if match:
            found[int(match[1])] = member
    names = [found[place] for place in sorted(found)]
    return [members[name] if "raw" in need else open_image(members[name], name) for name in names]


def _prompt_tensors(members: Mapping[str, bytes], need: frozenset[str]) -> dict[str, Tensor]:
    if "latent" not in need:
        return {}
    tensors = {}
    for member in members:
        stem, _, extension = member.partition(".")
        if extension == "safetensors":
            for name, tensor in _tensors(members[member], member).items():
                tensors[f"{stem}.{name}"] = tensor
    return tensors


def _preferred(pairs: Any, candidates: int) -> list[tuple[int, int]]:
    checked = []
    for pair in pairs if isinstance(pairs, (list, tuple)) else [pairs]:
        good = isinstance(pair, (list, tuple)) and len(pair) == 2
        # bool is an int to Python, but [true, false] names no candidate
        good = good and all(type(place) is int and 0 <= place < candidates for place in pair) and pair[0] != pair[1]
        if not good:
            raise Defect("invalid_record", f"preferred holds {pair!r:.80}; expected [chosen, rejected] of {candidates}")
        checked.append((pair[0], pair[1]))
    return checked


def _write_candidate(place: int, candidate: Candidate, members: dict[str, bytes], image_format: str) -> dict[str, Any]:
    item: dict[str, Any] = {}
    if candidate.image is not None:
        extension, content = _image_bytes(candidate.image, image_format)
        item["image"] = f"candidate{place}.{extension}"
        members[item["image"]] = content
    if candidate.tensors:
        members[f"candidate{place}.latent.safetensors"] = _tensor_bytes(candidate.tensors)
    _score(candidate.score, f"candidate {place}")
    for name in ("text", "score", "desirable", "source"):
        if getattr(candidate, name) is not None:
            item[name] = getattr(candidate, name)
    if candidate.segments:
        item["segments"] = [dict(segment) for segment in candidate.segments]
    return item


def _image_bytes(image: Image.Image | bytes, image_format: str) -> tuple[str, bytes]:
    """Extension and content. Bytes must already be a jpg, png or webp file."""
    if isinstance(image, bytes):
        for magic, extension in _MAGIC.items():
            if image.startswith(magic):
                return extension, image
        raise Defect("broken_image", f"{len(image)} bytes that are not a jpg, png or webp file")
    buffer = io.BytesIO()
    if image_format == "png":
        image.save(buffer, "PNG")
    else:
        image.convert("RGB").save(buffer, "JPEG", quality=95, subsampling=0)
    return image_format, buffer.getvalue()


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _write_prompt_tensors(tensors: Mapping[str, Tensor], members: dict[str, bytes]) -> None:
    by_member: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        member, _, rest = name.partition(".")
        if not rest:
            raise Defect("invalid_record", f"tensor {name!r} of the prompt; expected a name like text.{name}")
        by_member.setdefault(member, {})[rest] = tensor
    for member, group in by_member.items():
        members[f"{member}.safetensors"] = _tensor_bytes(group)
