"""What the suite does, the most important first, as tasks of a few seconds each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import product

import torch

from specdec_kernels.listing import OPERATIONS, Case, cases
from specdec_kernels.tree_attention.cases import Shape

from . import attention, checks, timing
from .bars import LONG, MIDDLE, RAGGED, UNIFORM, WIDE
from .record import Record
from .steps import Cell, Steps

PREFIX = 8192
RAGGED_PREFIXES = (1024, 2048, 4096, 6144, 8192, 10240, 14336, 19456)  # as many as 8 of PREFIX
BAR_SHAPES = ("8B 32k T16", "8B 8k T16", *WIDE, *LONG, *MIDDLE)
LOOP_RULES = ("greedy", "match", "recursive")


@dataclass(frozen=True)
class Task:
    """Something to do, and the names that its rows begin with."""

    operation: str
    shape: str
    run: Callable[[], None]


@dataclass(frozen=True)
class Plan:
    """Tasks for one machine. dry: toys only."""

    record: Record
    device: torch.device
    layers: int
    dry: bool

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """What is checked; the first is timed. The interpreter gets bfloat16 silently wrong."""
        wide = (torch.bfloat16, torch.float16)
        return wide if self.device.type == "cuda" else (torch.float32, torch.float16)

    def checks(self) -> Iterator[Task]:
        """Loop and determinism, then every case of the listing, toys in both dtypes first."""
        rules = LOOP_RULES if self.device.type == "cuda" else LOOP_RULES[1:2]
        for rule, graphs in product(rules, ("step", "score", False)):
            run = partial(checks.loop, self.record, rule, graphs, self.device)
            yield Task("check loop", rule, run)
        runs = 1000 if self.device.type == "cuda" else 3
        for case in self._named(("plain",) if self.dry else ("8B 8k T16", "8B ragged T16")):
            given = (self.record, case, runs, self.device, self.dtypes[0])
            yield Task("check determinism", case.name, partial(checks.determinism, *given))
            yield Task("check last block", case.name, partial(attention.check_last_block, *given))
        for dtype in self.dtypes:
            yield from self._checks(dtype, toy=True)
        if not self.dry:
            yield from self._checks(self.dtypes[0], toy=False)

    def late_checks(self) -> Iterator[Task]:
        """Real sizes in the second dtype: half of what there is to compile, and none of it is timed."""
        if not self.dry:
            yield from self._checks(self.dtypes[1], toy=False)

    def _checks(self, dtype: torch.dtype, toy: bool) -> Iterator[Task]:
        for operation in OPERATIONS:
            for case in (c for c in cases(operation) if c.toy == toy):
                if dtype is self.dtypes[0] or checks.takes_dtype(operation, case.call):
                    given = (self.record, operation, case, self.device, dtype)
                    yield Task(f"check {operation}", case.name, partial(checks.against_naive, *given))

    def measurements(self) -> Iterator[Task]:
        """What bars ask for, then the same at other sizes, then the rest of the listing."""
        steps = Steps(self.record, self.device, self.layers, self.dry)
        first, *others = self._cells()
        shapes = [] if self.dry else self._named(tuple(dict.fromkeys(BAR_SHAPES)))
        rest = [c for c in cases(attention.OPERATION) if c.toy == self.dry and c not in shapes]
        yield Task("copy, gemm", "", partial(timing.ceilings, self.record, self.device))
        yield from self._attention(shapes[:3], attention.QUICK)
        yield from self._attention(self._batches(), attention.OURS)
        yield from self._steps(steps, first, "triton", "step", profiled=True)
        yield from self._steps(steps, first, "triton", "score")
        yield from self._steps(steps, first, "triton", False)
        yield from self._attention(shapes[3:], attention.QUICK)
        yield from self._attention(shapes, attention.SLOW)
        for cell in others:
            yield from self._steps(steps, cell, "triton", "step")
        yield from self._attention(rest, tuple(attention.PROVIDERS) if self.dry else attention.QUICK)
        for operation in (o for o in OPERATIONS if o != attention.OPERATION):
            yield from self._operation(operation)
        for cell, graphs in product([first, *others], ("step", False)):
            yield from self._steps(steps, cell, "sdpa", graphs)
        for cell, graphs in product(others, ("score", False)):
            yield from self._steps(steps, cell, "triton", graphs)

    def _named(self, names: tuple[str, ...]) -> list[Case]:
        known = {case.name: case for case in cases(attention.OPERATION)}
        return [known[name] for name in names]

    def _batches(self) -> list[Case]:
        """Eight requests of different lengths, and as many rows of cache in equal parts."""
        prefixes = {RAGGED: RAGGED_PREFIXES, UNIFORM: (PREFIX,) * 8}
        shapes = {name: Shape(8, 4, 128, 16, lengths) for name, lengths in prefixes.items()}
        if self.dry:
            shapes = {"toy ragged": Shape(1, 2, 16, 4, (10, 30)), "toy uniform": Shape(1, 2, 16, 4, (20, 20))}
        return [Case(n, attention.OPERATION, s.inputs, s.bytes, s.flops, self.dry) for n, s in shapes.items()]

    def _attention(self, shapes: list[Case], providers: tuple[str, ...]) -> Iterator[Task]:
        for case in shapes:
            given = (self.record, case, providers, self.device, self.dtypes[0])
            yield Task(attention.OPERATION, case.name, partial(attention.measure, *given))

    def _cells(self) -> list[list[Cell]]:
        """Groups of steps that differ in their nodes only."""
        lengths, batches, nodes = {"2k": 2048, "32k": 32768}, (1, 8, 16), (16, 1, 64)
        if self.dry:
            lengths, batches, nodes = {"24": 24}, (1, 2), (4, 1)
        places = sorted(product(lengths.items(), batches), key=lambda place: place[0][1] * place[1])
        return [[Cell(name, n, batch, count) for count in nodes] for (name, n), batch in places]

    def _steps(
        self, steps: Steps, cells: list[Cell], kernel: str, graphs: bool | str, profiled: bool = False
    ) -> Iterator[Task]:
        for cell in cells:
            run = partial(steps.measure, cell, kernel, graphs, profiled)
            yield Task("step", steps.name(cell), run)

    def _operation(self, operation: str) -> Iterator[Task]:
        for case in (c for c in cases(operation) if c.toy == self.dry):
            yield Task(operation, case.name, partial(self._time_both, operation, case))

    def _time_both(self, operation: str, case: Case) -> None:
        for impl in ("triton", "naive"):
            with self.record.attempt(operation, case.name, impl):
                call = getattr(import_module(f"specdec_kernels.{operation}"), case.call)
                sets = timing.input_sets(case, self.device, self.dtypes[0])
                took = timing.rotated([partial(call, **inputs, impl=impl) for inputs in sets])
                work = {"moved": case.bytes, "flops": case.flops, "note": timing.sizes(case, len(sets))}
                self.record.timed(operation, case.name, impl, took, **work)
