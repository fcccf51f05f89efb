"""Records in tar shards: how they are written, found, ordered and streamed, exactly and without unpickling anything."""

from mmalign.data.collate import ROWS, bare, collate_for, labelled, liked, preference_pair, ranked
from mmalign.data.columns import Columns
from mmalign.data.errors import KINDS, RecordError
from mmalign.data.inspect import Summary, picture_grid, summarise
from mmalign.data.manifest import (
    Manifest,
    Shard,
    ShardRow,
    describe_shard,
    index_shards,
    read_shard,
    write_manifest,
)
from mmalign.data.order import Order, draw_of
from mmalign.data.reader import DataSettings, ErrorLog, Geometry, RecordStream, Step
from mmalign.data.schema import Candidate, Record, decode, encode, open_image
from mmalign.data.writer import ShardWriter, write_shard

__all__ = [
    "KINDS",
    "ROWS",
    "Candidate",
    "Columns",
    "DataSettings",
    "ErrorLog",
    "Geometry",
    "Manifest",
    "Order",
    "Record",
    "RecordError",
    "RecordStream",
    "Shard",
    "ShardRow",
    "ShardWriter",
    "Step",
    "Summary",
    "bare",
    "collate_for",
    "decode",
    "describe_shard",
    "draw_of",
    "encode",
    "index_shards",
    "labelled",
    "liked",
    "open_image",
    "picture_grid",
    "preference_pair",
    "ranked",
    "read_shard",
    "summarise",
    "write_manifest",
    "write_shard",
]
