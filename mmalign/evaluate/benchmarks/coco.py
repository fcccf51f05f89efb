"""The truth about COCO pictures: the classes that are annotated in a picture, or named by one of its five captions.

From COCO's own files (instances_*.json and captions_*.json; both, for as many splits as wanted), or from one file of
{picture's number: [classes]} that was made of them. Refused: instances without captions, since scores then come out
higher than anything published.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mmalign.evaluate.benchmarks.files import BenchmarkFiles, paths, read
from mmalign.evaluate.benchmarks.scores import some
from mmalign.evaluate.benchmarks.words import ObjectWords

Truth = Mapping[int, frozenset[str]]
EXPECTED = (
    "expected COCO's instances_*.json and captions_*.json (both), or a file of {picture's number: [names of classes]}"
)


def ground_truth(files: BenchmarkFiles, words: ObjectWords, wanted: Collection[int]) -> Truth:
    """Picture's number -> names of the classes that it shows, for the wanted pictures."""
    wanted = frozenset(wanted)
    found: dict[int, set[str]] = {}
    kinds: set[str] = set()
    for path in paths(files.annotations, "annotations"):
        content = read(path, "annotations")
        kind = _kind(content, path)
        kinds.add(kind)
        _READERS[kind](content, words, wanted, found)
    for kind, other in (("instances", "captions"), ("captions", "instances")):
        if kind in kinds and other not in kinds:
            raise ValueError(f"benchmark.annotations has {kind}, but no {other}; {EXPECTED}")
    strange = {name for names in found.values() for name in names} - set(words.object_of.values())
    if strange:
        raise ValueError(f"benchmark.annotations names classes that benchmark.synonyms lacks: {some(sorted(strange))}")
    missing = sorted(wanted - set(found))
    if missing:
        raise ValueError(
            f"benchmark.annotations knows nothing of {len(missing):,} of {len(wanted):,} pictures: {some(missing)}; "
            "are they of another split of COCO?"
        )
    return {number: frozenset(names) for number, names in found.items()}


def _kind(content: Any, path: Path) -> str:
    if isinstance(content, dict):
        rows = content.get("annotations")
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            if "category_id" in rows[0] and "categories" in content:
                return "instances"
            if "caption" in rows[0]:
                return "captions"
        if all(isinstance(names, list) and str(number).isdigit() for number, names in content.items()):
            return "objects"
    raise ValueError(f"benchmark.annotations: cannot use {path}; {EXPECTED}")


def _add_instances(content: Any, words: ObjectWords, wanted: frozenset[int], found: dict[int, set[str]]) -> None:
    names = {row["id"]: row["name"] for row in content["categories"]}
    unknown = sorted(name for name in names.values() if name not in words.object_of)
    if unknown:
        raise ValueError(f"benchmark.synonyms has no word for the classes {some(unknown)} of benchmark.annotations")
    _add_pictures(content, wanted, found)
    for row in content["annotations"]:
        if row["image_id"] in wanted:
            found.setdefault(row["image_id"], set()).add(words.object_of[names[row["category_id"]]])


def _add_captions(content: Any, words: ObjectWords, wanted: frozenset[int], found: dict[int, set[str]]) -> None:
    _add_pictures(content, wanted, found)
    for row in content["annotations"]:
        if row["image_id"] in wanted:
            named = {mention.object for mention in words.mentions(row["caption"])}
            found.setdefault(row["image_id"], set()).update(named)


def _add_pictures(content: Any, wanted: frozenset[int], found: dict[int, set[str]]) -> None:
    """Pictures that show nothing of the 80 classes are known, too."""
    for row in content.get("images", []):
        if row["id"] in wanted:
            found.setdefault(row["id"], set())


def _add_objects(content: Any, words: ObjectWords, wanted: frozenset[int], found: dict[int, set[str]]) -> None:
    for number, names in content.items():
        if int(number) in wanted:
            found.setdefault(int(number), set()).update(names)


_READERS = {"instances": _add_instances, "captions": _add_captions, "objects": _add_objects}
