"""The folder of a run: one file a finished group while it runs, two tables and a summary at the end.

Every file appears whole or not at all, so a killed run resumes without its finished prompts being run again.
"""

import errno
import json
import os
import shutil
import tempfile
from collections import defaultdict
from dataclasses import asdict, fields
from pathlib import Path
from typing import get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from specdec.metrics import jsonable
from specdec.records import RequestRecord, StepRecord

IGNORED = ("ui", "out", "logger", "hydra")
OF_THE_COMMAND = ("date", "argv", "overrides", "resumed")  # what env.json says of more than the environment
UNSET = "unset"
KEY = ("group", "request", "arm", "repeat")
STEP_OWNER = ("request", "conversation", "category", "arm", "repeat", "group")
STEP_FIELDS = tuple(field.name for field in fields(StepRecord))
FULL = (errno.ENOSPC, errno.EDQUOT)
ARROW = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    float | None: pa.float64(),
    list[int]: pa.list_(pa.int64()),
    list[float]: pa.list_(pa.float64()),
}


class RunFolder:
    """config.yaml, env.json, partial/group-*.json while the run lasts; requests.parquet, steps.parquet and
    summary.json once it is finished. A folder that holds a summary.json is a finished run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.partial = self.path / "partial"

    def open(self, config: dict, env: dict) -> None:
        """Make the folder, or take up the run in it.

        ValueError: it holds a run with other settings (IGNORED keys aside), is a file, or can't be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_up(yaml.safe_load(yaml.safe_dump(config, sort_keys=False)), env)
        except OSError as error:
            if error.errno in FULL:
                raise
            in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
            reason = "a file is in the way" if in_the_way else f"can't be written ({error.strerror})"
            remedy = "expected a folder to write in: choose another out=DIR"
            raise ValueError(f"out={self.path}: {reason}, {remedy}") from error

    def finished(self) -> set[int]:
        """The groups already on disk."""
        if self.summary() is not None:
            return set(pq.read_table(self.path / "requests.parquet", columns=["group"])["group"].to_pylist())
        return {int(path.stem.removeprefix("group-")) for path in self.partial.glob("group-[0-9]*.json")}

    def save_group(self, group: int, records: list[RequestRecord]) -> None:
        """Write all records of one group. OSError when the disk is full; nothing half-written stays."""
        _check_group(group, records)
        rows = [asdict(record) for record in records]
        self._write(self._group_file(group), json.dumps(rows).encode())

    def load(self) -> list[RequestRecord]:
        """All records of the finished groups in group order, equal to the saved ones to the last bit."""
        if self.summary() is not None:
            return self._load_tables()
        groups = [_read_group(self._group_file(group)) for group in sorted(self.finished())]
        return [record for records in groups for record in records]

    def finish(self, summary: dict) -> None:
        """Write the tables, then summary.json, then drop partial/: in this order a kill costs nothing."""
        requests = [asdict(record) for record in self.load()]
        steps = [_owner(row) | step for row in requests for step in row.pop("steps")]
        self._write(self.path / "requests.parquet", _parquet(requests, _request_schema()))
        self._write(self.path / "steps.parquet", _parquet(steps, _step_schema()))
        self._write(self.path / "summary.json", json_text(summary, indent=2).encode())
        shutil.rmtree(self.partial, ignore_errors=True)

    def summary(self) -> dict | None:
        """The summary if the run is finished."""
        path = self.path / "summary.json"
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    def _take_up(self, config: dict, env: dict) -> None:
        written = self.path / "config.yaml"
        if written.exists():
            self._same_run(yaml.safe_load(written.read_text("utf-8")), config)
        elif self.finished():
            raise ValueError(f"out={self.path} holds results but no config.yaml: choose another out=DIR")
        if self.summary() is not None:
            shutil.rmtree(self.partial, ignore_errors=True)
            return
        self._note_environment(env, resumed=written.exists())
        if not written.exists():
            self._write(written, yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())
        self.partial.mkdir(exist_ok=True)
        # A resumed run writes nothing until its first group ends: find out before the model loads.
        with tempfile.TemporaryFile(dir=self.partial):
            pass

    def _note_environment(self, env: dict, resumed: bool) -> None:
        """Write env.json; where the run goes on in another environment than before, add it as `resumed`."""
        path = self.path / "env.json"
        # Without settings there is no run to go on with: env.json is of one that failed.
        if resumed and path.exists():
            first = json.loads(path.read_text("utf-8"))
            later = first.get("resumed", [])
            if _lasting(env) == _lasting([first, *later][-1]):
                return
            env = {**first, "resumed": [*later, env]}
        self._write(path, json_text(env, indent=2).encode())

    def _same_run(self, there: object, here: object) -> None:
        old, new = _dotted(there), _dotted(here)
        pairs = {key: (old.get(key, UNSET), new.get(key, UNSET)) for key in old | new if not _ignored(key)}
        differing = [f"{key} is {a!r} there, {b!r} here" for key, (a, b) in pairs.items() if a != b]
        if differing:
            shown = "; ".join(differing[:3])
            more = f"; and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise ValueError(
                f"out={self.path} holds a run with other settings: {shown}{more}: "
                "choose another out=DIR or repeat the same settings"
            )

    def _group_file(self, group: int) -> Path:
        return self.partial / f"group-{group:05d}.json"

    def _load_tables(self) -> list[RequestRecord]:
        steps = defaultdict(list)
        for row in pq.read_table(self.path / "steps.parquet").to_pylist():
            steps[_key(row)].append(StepRecord(**{name: row[name] for name in STEP_FIELDS}))
        rows = pq.read_table(self.path / "requests.parquet").to_pylist()
        return [RequestRecord(**row, steps=steps[_key(row)]) for row in rows]

    def _write(self, path: Path, data: bytes) -> None:
        draft = path.with_name(path.name + ".tmp")
        try:
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException as error:
            draft.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in FULL:
                again = f"free space, then run the same command again with out={self.path}"
                text = f"no space left for {path.name}: {again}: finished prompts are kept"
                raise OSError(error.errno, text) from error
            raise


def json_text(value: dict, indent: int | None = None) -> str:
    """Strict JSON: numbers that JSON lacks (nan, infinities) become null."""
    return json.dumps(jsonable(value), indent=indent, allow_nan=False)


def _lasting(env: dict) -> dict:
    return jsonable({key: value for key, value in env.items() if key not in OF_THE_COMMAND})


def _dotted(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    pairs = [_dotted(item, f"{prefix}.{key}" if prefix else str(key)) for key, item in value.items()]
    return {key: item for pair in pairs for key, item in pair.items()}


def _ignored(key: str) -> bool:
    return key.split(".")[0] in IGNORED


def _key(row: dict) -> tuple:
    return tuple(row[name] for name in KEY)


def _owner(row: dict) -> dict:
    return {name: row[name] for name in STEP_OWNER}


def _check_group(group: int, records: list[RequestRecord]) -> None:
    seen = set()
    for record in records:
        if record.group != group:
            raise ValueError(f"request {record.request!r} is of group {record.group}, expected group {group}")
        key = (record.request, record.arm, record.repeat)
        if key in seen:
            raise ValueError(
                f"request {record.request!r} appears twice in group {group} (arm {record.arm}, repeat "
                f"{record.repeat}), expected once: give every prompt of data.path=FILE its own id"
            )
        seen.add(key)


def _read_group(path: Path) -> list[RequestRecord]:
    try:
        return [_record(row) for row in json.loads(path.read_text("utf-8"))]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} can't be read ({error}): delete it, its prompts are run again") from error


def _record(row: dict) -> RequestRecord:
    steps = [StepRecord(**step) for step in row.pop("steps")]
    return RequestRecord(**row, steps=steps)


def _request_schema() -> pa.Schema:
    kinds = get_type_hints(RequestRecord)
    return pa.schema([(name, ARROW[kind]) for name, kind in kinds.items() if name != "steps"])


def _step_schema() -> pa.Schema:
    kinds = get_type_hints(RequestRecord)
    owner = [(name, ARROW[kinds[name]]) for name in STEP_OWNER]
    return pa.schema(owner + [(name, ARROW[kind]) for name, kind in get_type_hints(StepRecord).items()])


def _parquet(rows: list[dict], schema: pa.Schema) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), sink)
    return sink.getvalue().to_pybytes()
