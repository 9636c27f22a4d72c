"""STUB"""
from dataclasses import dataclass
from qlora_nb import sources
import json, datasets
from pathlib import Path
@dataclass
class Table:
    columns: list
    found: list
    def rows(self, columns):
        return ({c: row.get(c) for c in columns} for row in self.found)
    def __len__(self): return len(self.found)
def read_table(name):
    path = sources.local_path(name)
    if path.suffix == ".csv":
        import csv
        rows = list(csv.DictReader(open(path)))
    elif path.suffix == ".parquet":
        import pandas
        rows = pandas.read_parquet(path).to_dict("records")
    else:
        text = path.read_text(encoding="utf-8-sig")
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(l) for l in text.split("\n") if l.strip()]
    cols = list(dict.fromkeys(k for r in rows for k in r))
    return Table(cols, rows)
