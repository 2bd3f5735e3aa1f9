"""Writes the data files of this directory with the libraries that people write theirs with:
`python tests/data/files/make.py`, which needs pyarrow, pandas and datasets. They are kept because CI
does not install all of these."""

import datetime
import decimal
import json
from pathlib import Path

import datasets
import pandas
import pyarrow as pa
import pyarrow.parquet

HERE = Path(__file__).parent
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CONVERSATIONS = [
    {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]},
    {
        "messages": [
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
            {"role": "assistant", "content": "2\u2028é"},
        ],
        "tools": [TOOL],
    },
]
FREE = [
    {"messages": [{"role": "user", "content": "a", "arguments": {"q": 1}}], "n": 1},
    {"messages": [{"role": "user", "content": "b", "arguments": {"z": ["s", None]}}], "n": 2},
]
"""Objects without common fields, which `datasets` stores as JSON within Arrow."""
TEXTS = [
    {"instruction": 'Say "hi",\nplease.', "output": ""},
    {"instruction": "Süß; 5\t,", "output": "NA"},
    {"instruction": " x ", "output": "null"},
]


def main() -> None:
    (HERE / "conversations.jsonl").write_text("".join(json.dumps(c) + "\n" for c in CONVERSATIONS))
    (HERE / "free.jsonl").write_text("".join(json.dumps(c) + "\n" for c in FREE))
    (HERE / "texts.jsonl").write_text("".join(json.dumps(c) + "\n" for c in TEXTS))
    columns = {name: [c.get(name) for c in CONVERSATIONS] for name in ("messages", "tools")}
    pa.parquet.write_table(pa.table(columns), HERE / "conversations.parquet")
    frame = pandas.DataFrame(TEXTS)
    frame.to_csv(HERE / "texts.csv", index=False)
    frame.to_csv(HERE / "texts.tsv", index=False, sep="\t")
    frame.to_csv(HERE / "texts.csv.gz", index=False)
    frame.to_parquet(HERE / "texts.parquet")
    frame.to_feather(HERE / "texts.feather")
    with pa.CompressedOutputStream(str(HERE / "texts.jsonl.zst"), "zstd") as file:
        file.write((HERE / "texts.jsonl").read_bytes())
    everything = {
        "instruction": ["a", "b"],
        "ns": pa.array([1, 1_700_000_000_123_456_789], pa.timestamp("ns")),
        "far": pa.array([10**14, None], pa.timestamp("s")),
        "day": [datetime.date(2020, 1, 2), None],
        "span": pa.array([1, 2], pa.duration("ns")),
        "bytes": [b"\xff\x00", None],
        "decimal": [decimal.Decimal("1.10"), None],
        "half": pa.array([1.5, None], pa.float16()),
        "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int32())),
        "kind": pa.array(["x", "y"]).dictionary_encode(),
        "large": pa.array(["l", None], pa.large_string()),
        "fixed": pa.array([[1, 2], [3, 4]], pa.list_(pa.int64(), 2)),
        "a.b": [1, 2],
    }
    pa.parquet.write_table(pa.table(everything), HERE / "everything.parquet")
    kinds = {"messages": datasets.List(datasets.Json()), "n": datasets.Value("int64")}
    saved = datasets.Dataset.from_list(FREE, features=datasets.Features(kinds))
    texts = datasets.Dataset.from_list(TEXTS)
    datasets.DatasetDict(train=texts, test=texts.select([0])).save_to_disk(HERE / "saved")
    saved.save_to_disk(HERE / "saved_free", num_shards=2)
    saved.to_parquet(HERE / "free.parquet")


if __name__ == "__main__":
    main()
