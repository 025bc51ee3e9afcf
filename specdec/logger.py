"""Where a run is tracked besides its folder: nowhere (logger=none), or in Weights & Biases (logger=wandb)."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from specdec.files import write_text
from specdec.metrics import steps_of, tokens_per_step
from specdec.records import RequestRecord

if TYPE_CHECKING:
    import wandb

MODES = ("offline", "online", "disabled")
PER_REQUEST = (
    "request",
    "category",
    "arm",
    "repeat",
    "prompt_tokens",
    "tokens",
    "ttft_ms",
    "decode_ms_per_token",
    "tokens_per_step",
)


Read = Callable[[], list[RequestRecord]]


class Silent:
    """logger=none: tracks nothing."""

    def log(self, config: dict, summary: dict, read: Read, folder: str) -> None:
        """Nothing happens."""

    def log_training(self, config: dict, curve: list[dict], folder: str) -> None:
        """Nothing happens."""


class Wandb:
    """logger=wandb: one wandb run for each run, written when it is over.

    mode  offline (files under the run's folder, for `wandb sync`), online, or disabled
    ValueError: an unknown mode; online without credentials. wandb never asks for a key.
    """

    def __init__(
        self,
        mode: str = "offline",
        project: str = "specdec",
        entity: str | None = None,
        group: str | None = None,
        name: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        if mode not in MODES:
            nearest = difflib.get_close_matches(str(mode).lower(), MODES, n=1, cutoff=0)[0]
            known = ", ".join(MODES)
            raise ValueError(
                f"logger.mode={mode}: expected one of {known}; the nearest is logger.mode={nearest}"
            )
        if mode == "online":
            # Here and not in `log`, so that a missing key is found before the run, not after it.
            check_login()
        self.mode = mode
        self.where = {"project": project, "entity": entity, "group": group, "name": name, "tags": list(tags)}

    def log(self, config: dict, summary: dict, read: Read, folder: str) -> None:
        """Write a finished run: config, summary, step histograms, acceptance by depth, a row a request.

        config   plain values (OmegaConf.to_container)
        summary  the content of summary.json
        read     gives the records of all arms and repeats
        folder   exists; offline files go to `folder`/wandb, and `folder`/logged.json says where the run was
                 written to, so that it is written there once
        OSError: wandb can't.
        """
        if self.mode == "disabled":  # wandb's own disabled run would stay behind as wandb.run
            return
        noted, here = Path(folder, "logged.json"), {"mode": self.mode, **self.where}
        logged = json.loads(noted.read_text("utf-8")) if noted.exists() else []
        if here in logged:
            return
        with self._run(config, folder) as run:
            run.log(scalars(summary) | _charts(summary, read()))
        write_text(json.dumps([*logged, here], indent=2), noted)

    def log_training(self, config: dict, curve: list[dict], folder: str) -> None:
        """Write a finished training: config, and its curve over the steps.

        curve  rows {"step", "loss"} or {"step", "tokens_per_step", "acceptance_by_depth"}
        OSError: wandb can't.
        """
        if self.mode == "disabled":
            return
        with self._run(config, folder) as run:
            for row in curve:
                run.log(_by_depth(row), step=row["step"])

    @contextmanager
    def _run(self, config: dict, folder: str) -> Iterator[wandb.Run]:
        import wandb

        # Dotted: the agent of a sweep locks keys such as `proposer`, which would drop the whole group.
        settings = {"config": flat(config), "dir": folder, "mode": self.mode, **self.where}
        quiet = wandb.Settings(console="off", quiet=True)
        try:
            # A run that the caller has open stays open and untouched.
            with wandb.init(**settings, settings=quiet, reinit="create_new") as run:
                yield run
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise OSError(
                f"logger=wandb: not logged: {reason}: {folder} loses nothing, the same command logs it; "
                "or choose logger.mode=offline"
            ) from error


def check_login() -> None:
    """ValueError unless wandb has credentials for its server; asks nobody, and sends nothing."""
    import wandb

    remedy = "set WANDB_API_KEY (and no WANDB_MODE), or choose logger.mode=offline"
    try:
        known = wandb.run is not None or wandb.login(prompt=False, verify=False)
    except wandb.Error as error:
        raise ValueError(f"logger.mode=online: {error}: {remedy}") from error
    if not known:
        raise ValueError(f"logger.mode=online needs a key of wandb, and none is configured: {remedy}")


def scalars(summary: dict) -> dict[str, float | str]:
    """The summary's numbers and words with dotted keys; what is None or a list is left out.

    Besides: `speedup`, the mean decode speedup over plain decoding, and `divergences`, how many there are.
    """
    pairs = flat(summary)
    pairs["speedup"] = pairs.get("speedup.none.decode.mean")
    if (found := pairs.get("lossless.divergences")) is not None:
        pairs["divergences"] = len(found)
    return {key: value for key, value in pairs.items() if isinstance(value, int | float | str)}


def flat(value: dict, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted keys; lists stay whole."""
    return dict(_pairs(value, prefix))


def _pairs(value: dict, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from _pairs(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _by_depth(row: dict) -> dict[str, float]:
    """A row of a training's curve, its list as numbers."""
    depths = enumerate(row.get("acceptance_by_depth", []), start=1)
    numbers = {key: value for key, value in row.items() if isinstance(value, float)}
    return numbers | {f"acceptance_by_depth.{depth}": rate for depth, rate in depths}


def _charts(summary: dict, records: list[RequestRecord]) -> dict[str, Any]:
    import wandb

    charts: dict[str, Any] = {"per_request": wandb.Table(list(PER_REQUEST), [_row(r) for r in records])}
    if depths := summary["acceptance_by_depth"]:
        columns = ["depth", "rate", "survival", "reached"]
        table = wandb.Table(columns, [[row[column] for column in columns] for row in depths])
        charts["acceptance_by_depth"] = wandb.plot.bar(table, "depth", "rate", "Acceptance by depth")
    return charts | _histograms([r for r in records if r.arm == "method"])


def _histograms(method: list[RequestRecord]) -> dict[str, Any]:
    import wandb

    steps = steps_of(method)
    # As in the summary: repeats draft the same tokens, so only times come from all of them.
    first = steps_of(r for r in method if r.repeat == 0)
    if not first:
        return {}
    return {
        "accepted_tokens": wandb.Histogram(np_histogram=_counts([s.accepted for s in first])),
        "nodes": wandb.Histogram(np_histogram=_counts([s.nodes for s in first])),
        "step_ms": wandb.Histogram([1e3 * s.seconds for s in steps]),
    }


def _counts(values: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """A bar a whole number, from 0 on, or the same few numbers a bar where wandb's 512 bars would not do."""
    width = 1 + max(values) // 512
    return np.histogram(values, bins=np.arange(0, max(values) + 2 * width, width))


def _row(r: RequestRecord) -> list[Any]:
    pace = r.decode_seconds_per_token if r.burst_times else None
    return [
        r.request,
        r.category,
        r.arm,
        r.repeat,
        r.prompt_tokens,
        len(r.tokens),
        1e3 * r.ttft if r.burst_times else None,
        None if pace is None else 1e3 * pace,
        tokens_per_step(r.steps),
    ]
