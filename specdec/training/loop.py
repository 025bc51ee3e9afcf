"""Trains a head on the target's answers, whatever head it is: the target is frozen, only the head learns.

A recipe says what the head is, what its loss is and how it drafts. Randomness is keyed by (seed, step) and
the state is written every few steps, so a training that was stopped ends as it would have without.
Processes that torchrun started share the batches of a step: two do what one does with accumulate=2.
"""

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import digest
from ..files import atomically
from ..shards import expect_answers_of, read_shard
from ..taps import Tap
from ..target import HFTarget
from ..transfer import in_dtype
from .estimate import Estimate, memory, seconds
from .heldout import HeldOut, acceptance
from .processes import lead, place, sum_in_place, summed
from .recipe import DTYPES, Recipe
from .texts import TextBatch, Texts, split

SAVE_EVERY = 100  # steps


@dataclass
class Progress:
    """What is reported while a head is trained. heldout: the last measurement, None before the first."""

    step: int
    total: int
    loss: float
    heldout: HeldOut | None


Begin = Callable[[Estimate], None]
Report = Callable[[Progress], None]
End = Callable[[list[dict[str, Any]]], None]


def train(
    target: HFTarget,
    shards: list[Path],
    recipe: Recipe,
    out: Path,
    *,
    seed: int = 0,
    stored: bool = True,
    begin: Begin = lambda estimate: None,
    report: Report = lambda progress: None,
    end: End = lambda curve: None,
) -> list[dict[str, Any]]:
    """Train a head on the shards, write the best epoch's to `out`; returns the curve, a row a step or epoch.

    Best is what drafts most tokens per step on held-out prompts, in the real loop. Resumes from the .state
    beside `out`; stopping and going on gives the same curve and the same weights, bit for bit on a CPU.
    stored  read the features that the shards hold; False: have the target compute them in every epoch
    end     is given the curve before the state goes: where that fails, the same call trains no step again
    ValueError: damaged shards, or another target's; a .state that was begun with other settings
    FloatingPointError: the loss is no number any more
    """
    for file in shards:
        expect_answers_of(target, read_shard(file), file)
    training, held_out = _split(shards, recipe, recipe.taps(target), stored)
    torch.manual_seed(seed)
    run = _Run(recipe.fresh(target, training), target, training, recipe, seed)
    state = out.with_suffix(".state")
    run.resume(state)
    begin(run.estimate())
    while not run.over:
        if run.unmeasured:
            run.measure(held_out, out, report)
            run.save(state)
        else:
            run.go_on(state, report)
    lead(lambda: _finish(out, lambda: end(run.curve)))
    return run.curve


def _split(shards: list[Path], recipe: Recipe, taps: tuple[Tap, ...], stored: bool) -> tuple[Texts, Texts]:
    """Texts to train on, and others; no turn of a conversation that is held out is trained on."""
    training, held_out = (Texts.load(files, taps, stored) for files in split(shards, recipe.held_out))
    training = training.apart_from(held_out)
    if not len(training):
        raise ValueError(
            f"{len(shards)} shards are too few to hold {recipe.held_out} out: head.held_out=1, or more data; "
            "smaller shards: collect anew, without shards=, in another out=, with prompts.batch=16"
        )
    return training, held_out


def _finish(out: Path, end: Callable[[], None]) -> None:
    """In this order, a kill in between costs nothing."""
    if (best := out.with_suffix(".best")).exists():
        best.replace(out)
    end()
    for leftover in (".latest", ".state"):
        out.with_suffix(leftover).unlink(missing_ok=True)


class _Run:
    """A head, its optimiser and schedule, and how far they got."""

    def __init__(self, head: nn.Module, target: HFTarget, texts: Texts, recipe: Recipe, seed: int) -> None:
        self.head, self.target, self.texts, self.recipe, self.seed = head, target, texts, recipe, seed
        self.rank, self.world = place()
        self.step, self.curve = 0, []
        self.per_epoch = self._steps_per_epoch()
        self.total = self.per_epoch * recipe.epochs
        self.parameters = [p for p in head.parameters() if p.requires_grad]
        # Where the forward is in 16 bits it runs on a copy, made anew from the weights at every step.
        self.running = in_dtype(copy.deepcopy(head), DTYPES[recipe.dtype])
        self._ran = [p for p in self.running.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.lr, betas=(0.9, 0.95), weight_decay=recipe.weight_decay
        )

    def _steps_per_epoch(self) -> int:
        groups = len(self.texts.groups(self.recipe.rows, torch.Generator()))
        if groups < self.world:
            raise ValueError(
                f"{groups} batches are too few for {self.world} processes: --nproc_per_node {groups}, more "
                f"data, or smaller batches than head.rows={self.recipe.rows}"
            )
        return max(1, groups // self.world // self.recipe.accumulate)

    @property
    def settings(self) -> dict[str, Any]:
        """What must be the same for a training to go on, under the names of its overrides."""
        known = {f"head.{name}": value for name, value in asdict(self.recipe).items()}
        data = {"texts": self.texts.digest, "target": self.target.fingerprint}
        found = {"steps": self.total, "draft vocabulary": digest(self.head.tokens_U.tolist())}
        return known | {"seed": self.seed, "processes": self.world} | data | found

    @property
    def measured(self) -> list[float]:
        """tokens_per_step on held-out prompts after each epoch."""
        return [row["tokens_per_step"] for row in self.curve if "tokens_per_step" in row]

    @property
    def unmeasured(self) -> bool:
        """An epoch ended, and its head was not tried yet."""
        return self.step // self.per_epoch > len(self.measured)

    @property
    def over(self) -> bool:
        if self.unmeasured:
            return False
        worse = len(self.measured) - 1 - _best(self.measured)
        return self.step >= self.total or 0 < self.recipe.patience <= worse

    def estimate(self) -> Estimate:
        """Of memory and time; runs two forwards of the batch with the longest texts, and times the second."""
        texts = self.texts
        groups = texts.groups(self.recipe.rows, torch.Generator())
        longest = max(groups, key=lambda group: max(len(texts.tokens[i]) for i in group))
        read = partial(texts.batch, self.target, longest)
        loss = partial(self.recipe.loss, self.running, self.target)
        held = memory(self.target.model, self.head, self.running, texts.features, lambda: loss(read()))
        step = self.recipe.accumulate * seconds(read, loss)
        trained = sum(p.numel() for p in self.parameters)
        return Estimate(len(texts), texts.said, trained, self.total, self.step, held, step)

    def go_on(self, state: Path, report: Report) -> None:
        """Train up to the end of the epoch."""
        batches = self._rest_of_epoch()
        for _ in range(self.per_epoch - self.step % self.per_epoch):
            loss = self._step(list(islice(batches, self.recipe.accumulate)))
            self.curve.append({"step": self.step, "loss": loss})
            report(Progress(self.step, self.total, loss, None))
            if self.step % SAVE_EVERY == 0:
                self.save(state)

    def _rest_of_epoch(self) -> Iterator[TextBatch]:
        epoch, done = divmod(self.step, self.per_epoch)
        order = torch.Generator().manual_seed(self.seed * 1000 + epoch)
        groups = self.texts.groups(self.recipe.rows, order)[self.rank :: self.world]
        for group in groups[done * self.recipe.accumulate :]:
            yield self.texts.batch(self.target, group)

    def _step(self, batches: list[TextBatch]) -> float:
        """One update. A batch counts by the tokens that the target said in it, whatever process has it."""
        lr = self.recipe.lr * self._schedule()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed((self.seed * 1_000_003 + self.step) * self.world + self.rank)
        for weight, ran in zip(self.parameters, self._ran, strict=True):
            ran.data.copy_(weight.data)
            weight.grad = torch.zeros_like(weight)
        said = [int(batch.said_ST.sum()) for batch in batches]
        all_said = summed(sum(said), self.target.device)
        here = sum(self._backward(batch, n / all_said) for batch, n in zip(batches, said, strict=True))
        sum_in_place([weight.grad for weight in self.parameters])
        loss = self._finite(summed(here, self.target.device), lr)
        nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.optimizer.step()
        self.step += 1
        return loss

    def _backward(self, batch: TextBatch, share: float) -> float:
        loss = self.recipe.loss(self.running, self.target, batch) * share
        loss.backward()
        for weight, ran in zip(self.parameters, self._ran, strict=True):
            if ran.grad is not None:
                weight.grad += ran.grad
                ran.grad = None
        return float(loss.detach())

    def _finite(self, loss: float, lr: float) -> float:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {self.step}, expected a number: lower head.lr, "
                f"which is {lr:g} there, or head.dtype=float32"
            )
        return loss

    def _schedule(self) -> float:
        """Linear warm-up, then a cosine to a twentieth."""
        warm = max(1, int(self.total * self.recipe.warmup))
        if self.step < warm:
            return (self.step + 1) / warm
        return 0.525 + 0.475 * math.cos(math.pi * (self.step - warm) / max(1, self.total - warm))

    def measure(self, held_out: Texts, out: Path, report: Report) -> None:
        """Draft with the head as it is on held-out prompts; the best head so far is beside `out`."""
        result = lead(lambda: self._try(held_out, out.with_suffix(".latest")))
        self.curve.append({"step": self.step, **asdict(result)})
        if _best(self.measured) == len(self.measured) - 1:
            lead(lambda: out.with_suffix(".latest").replace(out.with_suffix(".best")))
        report(Progress(self.step, self.total, self.curve[-2]["loss"], result))

    def _try(self, held_out: Texts, file: Path) -> HeldOut:
        self.head.eval()
        self.recipe.save(self.head, self.target, held_out, file)
        self.head.train()
        return acceptance(self.target, self.recipe.proposer(self.target, file), held_out)

    def save(self, path: Path) -> None:
        state = {
            "settings": self.settings,
            "step": self.step,
            "curve": self.curve,
            "head": {name: p.detach() for name, p in self.head.named_parameters() if p.requires_grad},
            "adam": self.optimizer.state_dict(),
        }
        lead(lambda: atomically(path, lambda part: torch.save(state, part)))

    def resume(self, path: Path) -> None:
        """Take up the state in `path`, if there is one. ValueError: damaged, or begun with other settings."""
        if not path.exists():
            return
        state = _load(path)
        if differing := differences(state["settings"], self.settings):
            raise ValueError(
                f"{path} was begun with other settings: {differing}: go on with those, choose another "
                "out=FOLDER, or delete it"
            )
        self.step, self.curve = state["step"], state["curve"]
        self.head.load_state_dict(state["head"], strict=False)
        self.optimizer.load_state_dict(state["adam"])


def _load(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, weights_only=True)
        return state | {"settings": state["settings"]}
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is no state of a training ({reason}): delete it to begin anew") from error


def differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The first few settings that differ, in words; empty if none does."""
    pairs = {key: (there.get(key, "unset"), here.get(key, "unset")) for key in there | here}
    return "; ".join([f"{key} is {a!r} there, {b!r} here" for key, (a, b) in pairs.items() if a != b][:3])


def best_row(curve: list[dict[str, Any]]) -> dict[str, Any]:
    """What was measured at the epoch whose head is the result."""
    measured = [row for row in curve if "tokens_per_step" in row]
    return max(measured, key=lambda row: row["tokens_per_step"])  # the first of equals


def _best(measured: list[float]) -> int:
    """Index of the best epoch, the first of equals."""
    return max(range(len(measured)), key=measured.__getitem__, default=0)
