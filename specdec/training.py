"""Trains Medusa heads on a target's own answers. The target is frozen; only the heads learn.

The loss is the cross-entropy between the target's law and each head's, both over the draft vocabulary.
Shapes: X positions of a batch, K heads, R ranks, D width, U draft vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .data import Conversation, render
from .onpolicy import Answers, batches, split, write_answers, write_prompts
from .proposers.medusa import MedusaHeads, MedusaInfo, root_embeddings
from .target import HFTarget

RANKS = 10


@dataclass(frozen=True)
class MedusaRecipe:
    """How heads are trained. vocab: the most frequent tokens are drafted; rows: positions a batch."""

    heads: int = 3
    vocab: int = 8192
    epochs: int = 6
    rows: int = 512
    lr: float = 2e-3
    warmup: float = 0.05
    held_out: int = 1

    def __post_init__(self) -> None:
        for name in ("heads", "vocab", "epochs", "rows", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"head.{name} is {getattr(self, name)}, expected 1 or more: head.{name}=1")


@dataclass(frozen=True)
class PromptRecipe:
    """What the target answers. written: messages of its own; beginnings: their first words, in turn."""

    written: int = 1216
    beginnings: tuple[str, ...] = ("",)
    message_tokens: int = 96
    answer_tokens: int = 128
    batch: int = 64
    seed: int = 0


def collect(
    target: HFTarget,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[Conversation],
    recipe: PromptRecipe,
    folder: Path,
    stop_ids: tuple[int, ...],
) -> list[Path]:
    """Prompts, then the target's answers to them, as shards in `folder`; what is there already is kept."""
    own = write_prompts(
        target,
        tokenizer,
        folder,
        recipe.written,
        beginnings=list(recipe.beginnings),
        batch=recipe.batch,
        longest=recipe.message_tokens,
        seed=recipe.seed,
    )
    messages = [c.turns[0] for c in conversations] + own
    if not messages:
        raise ValueError(
            "nothing to train on: give prompts with data=, or let the target write some: prompts.written=1216"
        )
    prompts = [render(tokenizer, [{"role": "user", "content": text}], None) for text in messages]
    return write_answers(
        target, prompts, folder, stop_ids=stop_ids, longest=recipe.answer_tokens, batch=recipe.batch
    )


def train(
    target: HFTarget,
    shards: list[Path],
    recipe: MedusaRecipe,
    out: Path,
    *,
    seed: int = 0,
    report: Callable[[int, int, float], None] = lambda step, total, loss: None,
) -> MedusaInfo:
    """Train heads on the shards, write them to `out` and say how they do on held-out answers.

    Resumes from the .state file beside `out`; stopping and going on gives the same weights on a CPU.
    """
    training_files, held_out_files = split(shards, recipe.held_out)
    if not training_files:
        raise ValueError(
            f"{len(shards)} shards are too few to hold {recipe.held_out} out: head.held_out=1, or more data"
        )
    answers, held_out = Answers.load(training_files), Answers.load(held_out_files)
    heads = _fresh_heads(target, answers, recipe)
    run = _Run(heads, recipe, -(-len(answers.tokens_X) // recipe.rows) * recipe.epochs, seed)
    state = out.with_suffix(".state")
    run.resume(state)
    while run.step < run.total:
        run.epoch(target, answers, report)
        run.save(state)
    accuracy_KR = measure(heads, target, held_out)
    info = MedusaInfo(recipe.heads, target.lm_head.shape[1], target.name, target.fingerprint, accuracy_KR)
    part = out.with_suffix(".part")
    heads.save(part, info)
    part.replace(out)
    state.unlink(missing_ok=True)
    return info


def _fresh_heads(target: HFTarget, answers: Answers, recipe: MedusaRecipe) -> MedusaHeads:
    counts_V = torch.bincount(answers.tokens_X, minlength=target.vocab)
    most = min(recipe.vocab, int((counts_V > 0).sum()))
    tokens_U = counts_V.argsort(descending=True, stable=True)[:most].sort().values
    return MedusaHeads(recipe.heads, target.lm_head[tokens_U.to(target.device)].float(), tokens_U).to(
        target.device
    )


class _Run:
    """Heads, optimiser and schedule, and how far they got."""

    def __init__(self, heads: MedusaHeads, recipe: MedusaRecipe, total: int, seed: int) -> None:
        self.heads, self.recipe, self.total, self.seed, self.step = heads, recipe, total, seed, 0
        self.optimizer = torch.optim.AdamW(heads.parameters(), lr=recipe.lr, weight_decay=0.0)

    def epoch(self, target: HFTarget, answers: Answers, report: Callable[[int, int, float], None]) -> None:
        per_epoch = self.total // self.recipe.epochs
        order = torch.Generator().manual_seed(self.seed * 1000 + self.step // per_epoch)
        for rows_X in batches(answers, self.recipe.rows, order):
            for group in self.optimizer.param_groups:
                group["lr"] = self.recipe.lr * self._schedule()
            loss = loss_of(self.heads, target, answers, rows_X)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.heads.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            report(self.step, self.total, float(loss.detach()))

    def _schedule(self) -> float:
        """Linear warm-up, then a cosine to zero."""
        warm = max(1, int(self.total * self.recipe.warmup))
        if self.step < warm:
            return (self.step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (self.step - warm) / max(1, self.total - warm)))

    def save(self, path: Path) -> None:
        part = path.with_suffix(".state-part")
        weights = {name: p.detach() for name, p in self.heads.named_parameters()}
        state = {
            "step": self.step,
            "recipe": asdict(self.recipe),
            "heads": weights,
            "adam": self.optimizer.state_dict(),
        }
        torch.save(state, part)
        part.replace(path)

    def resume(self, path: Path) -> None:
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(f"{path} was begun with other settings; delete it, or choose another out=FILE")
        self.step = state["step"]
        self.heads.load_state_dict(state["heads"], strict=False)
        self.optimizer.load_state_dict(state["adam"])


def loss_of(heads: MedusaHeads, target: HFTarget, answers: Answers, rows_X: Tensor) -> Tensor:
    """Cross-entropy of the heads over the positions that have a token to predict; later heads weigh less."""
    logits_KXU = _logits(heads, target, answers, rows_X)
    teacher_YU = _teacher(heads, answers, rows_X)
    losses = []
    for k, logits_XU in enumerate(logits_KXU, start=1):
        valid_X = rows_X + k < answers.end_X[rows_X]
        logq_XU = logits_XU[valid_X].log_softmax(-1)
        losses.append(0.8**k * -(teacher_YU[k : k + len(rows_X)][valid_X] * logq_XU).sum(-1).mean())
    return torch.stack([loss for loss in losses if loss.isfinite()]).sum()


def _logits(heads: MedusaHeads, target: HFTarget, answers: Answers, rows_X: Tensor) -> Tensor:
    root_XD = root_embeddings(target, answers.tokens_X[rows_X])
    return heads(_features(heads, answers, rows_X), root_XD.to(heads.lm_head_UD.dtype))


def _features(heads: MedusaHeads, answers: Answers, rows_X: Tensor) -> Tensor:
    return answers.features_XD[rows_X].to(heads.lm_head_UD.device, heads.lm_head_UD.dtype)


@torch.no_grad()
def _teacher(heads: MedusaHeads, answers: Answers, rows_X: Tensor) -> Tensor:
    """The target's laws over the draft vocabulary at the rows and the few behind them."""
    behind = torch.arange(int(rows_X[-1]) + 1, int(rows_X[-1]) + 1 + len(heads.bias_KD))
    rows_Y = torch.cat([rows_X, behind.clamp(max=len(answers.tokens_X) - 1)])
    return (_features(heads, answers, rows_Y) @ heads.lm_head_UD.T).softmax(-1)


@torch.no_grad()
def measure(heads: MedusaHeads, target: HFTarget, answers: Answers) -> list[list[float]]:
    """accuracy[k][r]: how often head k's rank-r token was the target's, over all answers."""
    hits_KR, seen_K = torch.zeros(len(heads.bias_KD), RANKS), torch.zeros(len(heads.bias_KD))
    tokens_U = heads.tokens_U.cpu()
    for rows_X in torch.arange(len(answers.tokens_X)).split(512):
        for k, logits_XU in enumerate(_logits(heads, target, answers, rows_X).cpu(), start=1):
            valid_X = rows_X + k < answers.end_X[rows_X]
            top_XR = tokens_U[logits_XU[valid_X].topk(min(RANKS, len(tokens_U))).indices]
            said_X = answers.tokens_X[(rows_X + k)[valid_X]]
            hits_KR[k - 1, : top_XR.shape[1]] += (top_XR == said_X.unsqueeze(1)).sum(0)
            seen_K[k - 1] += len(said_X)
    return (hits_KR / seen_K.clamp(min=1).unsqueeze(1)).tolist()
