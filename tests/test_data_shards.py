"""Shards and manifests: whole or not there, found wherever they lie, damaged ones read as far as they go."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmalign.data import (
    Columns,
    Manifest,
    Record,
    RecordError,
    ShardRow,
    ShardWriter,
    describe_shard,
    index_shards,
    read_shard,
    write_manifest,
    write_shard,
)
from mmalign.data.cache import ShardCache
from mmalign.data.shard import OpenShard, scan
from tests.data_sets import pair, picture_bytes, write_pairs, write_tar

IMAGE = frozenset({"image"})
# A name that ends in a slash is a folder, whatever its header says.
NAMES = st.text("abcdefgh/.é_-0", min_size=1, max_size=180).filter(lambda name: not name.endswith("/"))


def keys(manifest: Manifest, **arguments) -> list[str]:
    found = []
    for shard in manifest.shards:
        for record in read_shard(shard, IMAGE, **arguments):
            found.append(record.key if isinstance(record, Record) else record.kind)
    return found


def test_what_is_written_is_what_is_read(tmp_path: Path):
    manifest = write_pairs(tmp_path / "set", 17)
    assert [shard.row.records for shard in manifest.shards] == [7, 7, 3]
    assert sorted(os.listdir(tmp_path / "set")) == ["000000.tar", "000001.tar", "000002.tar", "shards.json"]
    assert keys(manifest) == [f"{number:06d}" for number in range(17)]
    for shard in manifest.shards:
        content = Path(shard.location).read_bytes()
        assert (shard.row.bytes, shard.row.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert describe_shard(shard.location) == shard.row


def test_equal_records_make_equal_bytes(tmp_path: Path):
    first, second = write_pairs(tmp_path / "a", 9), write_pairs(tmp_path / "b", 9)
    assert first.digest == second.digest
    assert write_pairs(tmp_path / "c", 10).digest != first.digest


def test_the_encoder_is_on_record(tmp_path: Path):
    with ShardWriter(tmp_path / "set", encoder={"vae": "abc"}) as writer:
        writer.write(pair(0))
    assert writer.manifest == Manifest.read(tmp_path / "set")
    assert Manifest.read(tmp_path / "set" / "000000.tar").encoder == {"vae": "abc"}
    write_pairs(tmp_path / "other", 2)
    with pytest.raises(ValueError, match="different encoders"):
        Manifest.read([tmp_path / "set", tmp_path / "other"])


def test_an_interrupted_writer_leaves_nothing_half_written(tmp_path: Path):
    def write() -> None:
        with ShardWriter(tmp_path / "set", records_per_shard=2) as writer:
            for number in range(3):
                writer.write(pair(number))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert os.listdir(tmp_path / "set") == ["000000.tar"]
    with pytest.raises(FileNotFoundError, match="mmalign index"):
        Manifest.read(tmp_path / "set")


def test_a_full_disk_is_said_plainly(tmp_path: Path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / f".000000.tar.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(ValueError, match="disk is full"):
        write_shard(folder / "000000.tar", [pair(0)])
    (folder / f".shards.json.{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(ValueError, match="disk is full"):
        write_manifest(folder, [ShardRow("000000.tar", 1, 1, None)])
    assert os.listdir(folder) == []


@pytest.mark.parametrize("key", ["a.b", "/a", "", "a/", " a", "..", "dir/."])
def test_keys_that_would_be_split_elsewhere_are_refused(tmp_path: Path, key: str):
    with pytest.raises(ValueError, match="cannot be written"):
        write_shard(tmp_path / "0.tar", [replace(pair(0), key=key)])
    assert os.listdir(tmp_path) == []


def test_a_writer_refuses_what_would_lose_records(tmp_path: Path):
    with pytest.raises(ValueError, match="came twice"):
        write_shard(tmp_path / "0.tar", [pair(0), pair(0)])
    write_pairs(tmp_path / "set", 1)
    with pytest.raises(ValueError, match="already holds"):
        ShardWriter(tmp_path / "set")
    with pytest.raises(ValueError, match="no records"), ShardWriter(tmp_path / "none"):
        pass
    with pytest.raises(ValueError, match="at least 1"):
        ShardWriter(tmp_path / "none", records_per_shard=0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=1200)), max_size=6),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_the_header_scan_agrees_with_tarfile(tmp_path_factory, files: list[tuple[str, bytes]], form: int):
    path = tmp_path_factory.mktemp("tar") / "0.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            try:
                tar.addfile(info, io.BytesIO(content))
            except ValueError:
                continue  # a name that the old format cannot hold
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    with OpenShard(path, "0.tar") as shard, tarfile.open(path) as tar:
        expected = []
        for member in tar.getmembers():
            stem, _, field = member.name.rpartition("/")[2].partition(".")
            opened = tar.extractfile(member) if member.isfile() else None
            if opened is not None and stem and field:
                expected.append((field, opened.read()))
        assert shard.index.problem is None
        found = [
            (field, os.pread(shard._descriptor, length, start))
            for entry in shard.index.entries
            for field, (start, length) in entry.fields.items()
        ]
    assert found == expected


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_tar_never_gives_wrong_records(tmp_path_factory, data: st.DataObject):
    folder = tmp_path_factory.mktemp("damaged")
    whole = write_tar(folder / "w.tar", [(f"{n}.{field}", bytes([n]) * 700) for n in range(4) for field in ("a", "b")])
    content = bytearray(whole.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(1, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, 8 * 1536 - 1))] ^= data.draw(st.integers(1, 255))
    (folder / "0.tar").write_bytes(content)
    with open(folder / "0.tar", "rb") as file:
        index = scan(file.fileno())
    for entry in index.entries:
        for start, length in entry.fields.values():
            assert start + length <= len(content)
            assert length == 700 or index.problem
    assert index.places <= 5


def test_a_broken_rest_is_one_bad_record(tmp_path: Path):
    manifest = write_pairs(tmp_path / "set", 7)
    path = Path(manifest.shards[0].location)
    path.write_bytes(path.read_bytes()[:-20_000])
    found = keys(manifest)
    assert found[-1] == "broken_tar"
    assert found[:-1] == [f"{number:06d}" for number in range(len(found) - 1)]
    (tmp_path / "set" / "shards.json").unlink()
    assert Manifest.read(path).records == len(found)
    with OpenShard(path, "0") as shard, pytest.raises(RecordError, match="broken_tar"):
        shard.read(6, IMAGE, None)


def test_keys_split_at_the_first_dot_after_the_last_slash(tmp_path: Path):
    files = [("a.b/c.jpg_0.jpg", b"1"), ("a.b/c.txt", b"2"), ("a.b/c.txt", b"3"), ("README", b""), ("._d.txt", b"")]
    with open(write_tar(tmp_path / "0.tar", files), "rb") as file:
        entries = scan(file.fileno()).entries
    assert [(entry.key, list(entry.fields)) for entry in entries] == [
        ("a.b/c", ["jpg_0.jpg", "txt"]),
        ("a.b/c", ["txt"]),
    ]


def test_sources_of_every_kind(tmp_path: Path):
    folder = tmp_path / "set"
    manifest = write_pairs(folder, 14)
    tars = [folder / "000000.tar", folder / "000001.tar"]
    for source in (str(folder), folder / "shards.json", f"{folder}/{{000000..000001}}.tar", tars):
        assert Manifest.read(source) == manifest
    (folder / "shards.json").unlink()
    counted = Manifest.read(tars)
    assert [shard.row.records for shard in counted.shards] == [7, 7]
    assert counted.digest != manifest.digest
    assert index_shards([folder]) == manifest == Manifest.read(folder)
    shutil.copytree(folder, tmp_path / "again")
    both = Manifest.read([folder, tmp_path / "again"])
    assert len({shard.row.name for shard in both.shards}) == 4


def test_wrong_sources_are_refused_at_once(tmp_path: Path):
    for source, says in [("nowhere", "no shards at"), (str(tmp_path), "mmalign index")]:
        with pytest.raises(FileNotFoundError, match=says):
            Manifest.read(source)
    with pytest.raises(ValueError, match="data.shards is empty"):
        Manifest.read("")
    with pytest.raises(ValueError, match="no records"):
        Manifest.read([])
    with pytest.raises(ValueError, match="no records"):
        Manifest.read(write_tar(tmp_path / "0.tar", {}))
    with pytest.raises(FileNotFoundError, match="no tar files"):
        index_shards([tmp_path / "."][:0] or [(tmp_path / "empty").mkdir() or tmp_path / "empty"])
    write_pairs(tmp_path / "a", 1)
    write_pairs(tmp_path / "b", 1)
    with pytest.raises(ValueError, match="2 folders"):
        index_shards([tmp_path / "a", tmp_path / "b"])


@pytest.mark.parametrize("name", ["../0.tar", "/etc/passwd", "pipe:touch x", "http://x/0.tar", "a/b.tar", ".0.tar", 3])
def test_a_manifest_can_only_name_files_beside_it(tmp_path: Path, name: object):
    row = {"name": name, "records": 1, "bytes": 1, "sha256": None}
    (tmp_path / "shards.json").write_text(json.dumps({"schema": 1, "shards": [row], "encoder": None}))
    with pytest.raises(ValueError, match="plain files"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 2, "shards": []}', '{"schema": 1, "shards": [{}]}', "3"])
def test_a_broken_manifest_is_named(tmp_path: Path, content: str):
    (tmp_path / "shards.json").write_text(content)
    with pytest.raises(ValueError, match="shards.json is not a manifest"):
        Manifest.read(tmp_path)


def test_a_stale_manifest_is_named(tmp_path: Path):
    folder = tmp_path / "set"
    write_pairs(folder, 3)
    write_shard(folder / "000000.tar", [pair(number) for number in range(5)])
    with pytest.raises(ValueError, match="mmalign index"):
        Manifest.read(folder)
    (folder / "000000.tar").unlink()
    with pytest.raises(FileNotFoundError, match="no such file"):
        Manifest.read(folder)


def test_a_pipe_from_the_user_runs_and_is_counted_once(tmp_path: Path):
    write_pairs(tmp_path / "set", 7)
    source = f"pipe:cat {tmp_path}/set/{{000000..000000}}.tar; echo x >> {tmp_path}/ran"
    for _ in range(2):
        assert Manifest.read(source, tmp_path / "cache").records == 7
    assert (tmp_path / "ran").read_text() == "x\n"
    assert keys(Manifest.read(source, tmp_path / "cache"), cache=tmp_path / "cache") == [f"{n:06d}" for n in range(7)]
    with pytest.raises(FileNotFoundError, match="data.shards"):
        Manifest.read("pipe:false", tmp_path / "cache")
    with pytest.raises(ValueError, match="aws s3 cp"):
        Manifest.read("s3://bucket/0.tar", tmp_path / "cache")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset opens http with curl, which is not installed")
def test_a_folder_on_the_web(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("no_proxy", "*")
    local = write_pairs(tmp_path / "set", 14)
    remote = Manifest.read(f"{server}/set/", tmp_path / "cache")
    assert remote.digest == local.digest
    assert keys(remote, cache=tmp_path / "cache") == keys(local)
    counted = Manifest.read(f"{server}/set/{{000000..000001}}.tar", tmp_path / "cache")
    assert counted.records == 14
    with pytest.raises(FileNotFoundError, match="data.shards"):
        Manifest.read(f"{server}/nothing/", tmp_path / "cache")
    wrong = replace(remote.shards[0], row=replace(remote.shards[0].row, sha256="0" * 64))
    with pytest.raises(OSError, match="sha256"):
        next(read_shard(wrong, IMAGE, cache=tmp_path / "cache"))


def test_copies_are_bounded_and_compressed_shards_are_read(tmp_path: Path):
    files = {"0.txt": b"a dog", "0.jpg": picture_bytes(0, "JPEG")}
    tars = [write_tar(tmp_path / f"{number}.tgz", files, "w:gz") for number in range(5)]
    manifest = Manifest.read(tars, tmp_path / "cache")
    assert manifest.records == 5
    assert keys(manifest, columns=Columns(), cache=tmp_path / "cache") == ["0"] * 5
    cache = ShardCache(tmp_path / "small", limit=2)
    for tar in tars:
        assert cache.path(str(tar)).is_file()
    assert len(list((tmp_path / "small").glob("*.tar"))) == 2
    assert [path.suffix for path in (tmp_path / "small").iterdir() if path.suffix not in (".tar", ".lock")] == []


def test_a_compressed_shard_that_breaks_off(tmp_path: Path):
    plain = write_tar(tmp_path / "plain", [(f"{n}.txt", os.urandom(600)) for n in range(20)]).read_bytes()
    (tmp_path / "0.tgz").write_bytes(gzip.compress(plain)[:-4000])
    manifest = Manifest.read(tmp_path / "0.tgz", tmp_path / "cache")
    errors = [item for item in read_shard(manifest.shards[0], frozenset(), Columns(candidates=()), tmp_path / "cache")]
    assert 1 < len(errors) < 20
    last = errors[-1]
    assert isinstance(last, RecordError)
    assert last.kind == "broken_tar"
