"""Train nano, the small Llama that ships inside Longreach, from scratch on a CPU.

    python recipes/train_nano.py --corpus DIR --work DIR [--export src/longreach/nano]

DIR holds `train/` and `validation/` with `*.txt.xz` books. The work folder (outside the package) receives the tokenizer,
the token cache, checkpoints and `log.jsonl`; a run that is started again continues from its last checkpoint.

Plain next-token training at true positions inside the window: no grouped, shifted, skipped or randomised positions. What
nano does beyond its window is therefore due to the method that extends it. Every sequence begins with <bos>.

The batch of a step is a function of (seed, step) alone, and the schedule is constant until the final decay, so stopping
earlier with `--steps` is the same run with an earlier decay.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import time
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import retrieval_text as rt

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
WINDOW = 512
VOCABULARY = 2048
BATCH_TOKENS = 8192
PEAK_RATE = 3e-3
DECAY_SHARE = 0.45  # the last 45 % of the steps decay linearly to zero
# (first step, sequence length, share of rows with retrieval text, more wordings). Recall appears on short dense rows, then the gaps grow.
STAGES = ((0, 64, 0.85, False), (700, 128, 0.7, False), (1100, 256, 0.6, False), (1700, WINDOW, 0.55, True))


def read_books(folder: Path) -> list[str]:
    return [lzma.open(path, "rt", encoding="utf-8", newline="\n").read() for path in sorted(folder.glob("*.txt.xz"))]


def train_tokenizer(books: list[str]) -> Tokenizer:
    """Byte-level BPE in which every digit is a token, trained on every eighth paragraph."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[PAD, BOS, EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    paragraphs = (p for book in books for p in book.split("\n\n")[::8])
    tokenizer.train_from_iterator(paragraphs, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))])
    return tokenizer


def prepare(corpus: Path, work: Path) -> tuple[Tokenizer, np.ndarray, np.ndarray]:
    """The tokenizer and both splits as one long array of tokens, cached in the work folder."""
    tokenizer_file, cache = work / "tokenizer.json", work / "tokens.npz"
    if not cache.exists():
        books = read_books(corpus / "train")
        if not books:
            raise SystemExit(f"no *.txt.xz books in {corpus / 'train'}; pass the folder that holds train/ and validation/ as --corpus")
        tokenizer = train_tokenizer(books)
        tokenizer.save(str(tokenizer_file))

        def encode(texts: list[str]) -> np.ndarray:
            rows = [e.ids for text in texts for e in tokenizer.encode_batch(_split(text), add_special_tokens=False)]
            return np.concatenate([np.asarray(r, dtype=np.uint16) for r in rows])

        np.savez(cache, train=encode(books), validation=encode(read_books(corpus / "validation")))
    arrays = np.load(cache)
    return Tokenizer.from_file(str(tokenizer_file)), arrays["train"], arrays["validation"]


def _split(text: str, size: int = 200_000) -> list[str]:
    """Cut a book at paragraph ends into pieces that the tokenizer can work on in parallel."""
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n\n", start + size)
        end = len(text) if end < 0 else end
        pieces.append(text[start:end])
        start = end
    return pieces


class Rows:
    """Training rows of a given length: book text, half of them with facts hidden in it and questions after it."""

    def __init__(self, tokenizer: Tokenizer, books: np.ndarray, answer_weight: float = 3.0) -> None:
        self.books, self.answer_weight, self.wide = books, answer_weight, False
        self.encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        self.bos, self.eos, self.pad = (tokenizer.token_to_id(t) for t in (BOS, EOS, PAD))
        self.stops = {tokenizer.token_to_id(t) for t in (".", "?", "!", '."')} - {None}

    def batch(self, rng: Random, count: int, length: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
        """-> ids [count, length + 1] int64 and weights [count, length + 1] of the loss at each token."""
        rows = [self.retrieval(rng, length + 1) if rng.random() < share else self.prose(rng, length + 1) for _ in range(count)]
        ids, weights = zip(*rows)
        return torch.tensor(ids), torch.tensor(weights)

    def prose(self, rng: Random, size: int) -> tuple[list[int], list[float]]:
        return [self.bos, *self._passage(rng, size - 1)], [1.0] * size

    def _passage(self, rng: Random, size: int) -> list[int]:
        if size > 40 and rng.random() < 0.04:
            grass = self.encode(" " + rt.GRASS)
            return (grass * (size // len(grass) + 1))[:size]
        start = rng.randrange(len(self.books) - size)
        return self.books[start : start + size].tolist()

    def retrieval(self, rng: Random, size: int) -> tuple[list[int], list[float]]:
        """<bos> text with facts in it, then questions, each answer closed by <eos>."""
        kind = rng.random()
        if kind < 0.12:
            return self._copying(rng, size)
        if size < 100 or kind < 0.2:
            return self._drill(rng, size)
        if kind < 0.4:
            asked = rt.pass_key_or_labelled(rng, self.wide)
        else:
            asked = rt.facts(rng, rng.randint(2, max(2, size // 45)), self.wide)
        hidden = [self.encode(" " + fact.statement) for fact in asked]
        questions = asked * (1 if len(asked) > 1 else rng.choice((1, 1, 2)))
        rng.shuffle(questions)
        opening = self.encode(rng.choice(rt.OPENINGS)) if size > 200 and rng.random() < 0.15 else []
        tail, weights = self._questions(rng, questions, size - 1 - sum(map(len, hidden)) - len(opening))
        room = size - 1 - sum(map(len, hidden)) - len(tail) - len(opening)
        if room < 0 or not tail:
            return self._drill(rng, size)
        passage = self._passage(rng, room)
        body = list(passage)
        for position, tokens in sorted(((self._gap(rng, passage), h) for h in hidden), key=lambda p: p[0], reverse=True):
            body[position:position] = tokens
        ids = [self.bos, *opening, *body, *tail]
        return ids, [1.0] * (size - len(tail)) + weights

    def _drill(self, rng: Random, size: int) -> tuple[list[int], list[float]]:
        """Short and dense: a few facts or pairs, then questions about them until the row is full."""
        if rng.random() < 0.5:
            listing, asked = rt.pairs(rng, rng.randint(2, max(2, min(10, size // 20))))
            statements = [listing]
        else:
            asked = rt.facts(rng, rng.randint(1, max(1, min(8, size // 40))), self.wide)
            statements = [fact.statement for fact in asked]
            rng.shuffle(statements)
        head = [self.bos, *self._passage(rng, rng.randint(0, size // 6)), *(t for s in statements for t in self.encode(" " + s))]
        questions: list[rt.Fact] = []
        while len(questions) < size // 6:
            questions += rng.sample(asked, len(asked))
        tail, weights = self._questions(rng, questions, size - len(head)) if len(head) < size else ([], [])
        rest = size - len(head) - len(tail)
        if rest < 0:
            return self.prose(rng, size)
        return [*head, *tail, *self._passage(rng, rest)], [1.0] * len(head) + weights + [1.0] * rest

    def _questions(self, rng: Random, asked: list[rt.Fact], room: int) -> tuple[list[int], list[float]]:
        """As many questions with their answers as fit into `room` tokens."""
        ids: list[int] = []
        weights: list[float] = []
        separator = rng.choice(("\n\n", "\n\n", "\n", " "))
        for fact in asked:
            question = self.encode(separator + fact.question)
            answer = [*self.encode(fact.answer), self.eos]
            if len(ids) + len(question) + len(answer) > room:
                break
            ids += question + answer
            weights += [1.0] * len(question) + [self.answer_weight] * len(answer)
        return ids, weights

    def _gap(self, rng: Random, passage: list[int]) -> int:
        """A position at the end of a sentence near a uniformly drawn depth."""
        position = rng.randint(0, len(passage))
        for shift in range(min(24, position)):
            if passage[position - shift - 1] in self.stops:
                return position - shift
        return position

    def _copying(self, rng: Random, size: int) -> tuple[list[int], list[float]]:
        """A span of the text quoted again after its first words; random tokens half of the time."""
        span_size = rng.randint(6, max(8, min(40, size // 4)))
        if (kind := rng.random()) < 0.3:
            span = [rng.randrange(3, VOCABULARY) for _ in range(span_size)]
        elif kind < 0.6:
            span = self.encode("".join(f" {rt.number(rng)}" for _ in range(span_size)))[:span_size]
        else:
            span = self._passage(rng, span_size)
        weights = [1.0] * size
        body = self._passage(rng, size - 1)
        first = rng.randrange(0, max(1, size - 1 - 2 * span_size))
        second = rng.randrange(first + span_size, max(first + span_size + 1, size - span_size))
        for start in (first, second):
            body[start : start + span_size] = span
        body = body[: size - 1]
        for i in range(second + 3, min(second + span_size, size - 1)):
            weights[1 + i] = self.answer_weight
        return [self.bos, *body], weights


def stage(step: int) -> tuple[int, float, bool]:
    return next((length, share, wide) for first, length, share, wide in reversed(STAGES) if step >= first)


def rate(step: int, steps: int) -> float:
    decay_from = steps * (1 - DECAY_SHARE)
    return PEAK_RATE * min(1.0, (step + 1) / 200, max(0.0, (steps - step) / (steps - decay_from)))


def configuration(tokenizer: Tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=WINDOW,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.02,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=tokenizer.token_to_id(PAD),
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
    )


@torch.no_grad()
def abilities(model: LlamaForCausalLM, rows: Rows, books: np.ndarray, length: int, trials: int = 40) -> dict[str, float]:
    """Loss on unseen books, and the share of answers that greedy decoding gives, by kind of question, at this length."""
    rng = Random(1234)
    held = Rows.__new__(Rows)
    held.__dict__.update(rows.__dict__, books=books)
    ids, _ = held.batch(rng, max(8, 16384 // length), length, 0.0)
    logits = model(ids[:, :-1]).logits
    result = {"loss": F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()}
    kinds = {
        "pass key": lambda: [rt.pass_key(rng)],
        "held-out wording": lambda: [_held_out(rng)],
        "one of three": lambda: rt.labelled_keys(rng, 3),
        "needle": lambda: [rt.needle(rng)],
    }
    for kind, make in kinds.items():
        right = 0
        for _ in range(trials):
            facts = make()
            hidden = [rows.encode(" " + f.statement) for f in facts]
            question, answer = rows.encode("\n\n" + facts[0].question), rows.encode(facts[0].answer)
            room = length - 1 - sum(map(len, hidden)) - len(question) - len(answer)
            passage = held.books[(start := rng.randrange(len(books) - room)) : start + room].tolist() if room > 0 else []
            for tokens in hidden:
                gap = held._gap(rng, passage)
                passage[gap:gap] = tokens
            row = torch.tensor([[rows.bos, *passage, *question, *answer]])
            guess = model(row).logits[0, -len(answer) - 1 : -1].argmax(-1)
            right += guess.tolist() == answer
        result[kind] = right / trials
    return result


def _held_out(rng: Random) -> rt.Fact:
    value = rt.number(rng, 5)
    question, answer = rt.HELD_OUT_QUESTION
    name = rt.HELD_OUT_NAME
    return rt.Fact(rt.HELD_OUT_STATEMENT.format(name=name, value=value), question.format(name=name), answer.format(name=name, value=value))


def train(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    tokenizer, books, validation = prepare(args.corpus, args.work)
    print(f"{len(books):,} training tokens, {len(validation):,} validation tokens", flush=True)
    rows = Rows(tokenizer, books)
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(configuration(tokenizer))
    model.config._attn_implementation = "sdpa"
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=PEAK_RATE, betas=(0.9, 0.95), fused=True
    )
    checkpoint = args.work / "checkpoint.pt"
    step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
        print(f"continuing at step {step}", flush=True)
    forward = torch.compile(model) if args.compile else model
    log = (args.work / "log.jsonl").open("a")
    started, tokens = time.time(), 0
    while step < args.steps:
        length, share, rows.wide = stage(step)
        ids, weights = rows.batch(Random(args.seed * 1_000_003 + step), BATCH_TOKENS // length, length, share)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args.steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(ids[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        w = weights[:, 1:].flatten()
        loss = (losses * w).sum() / w.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        tokens += ids.numel()
        if step % 25 == 0:
            print(f"step {step:5d}/{args.steps} length {length:4d} loss {loss.item():.3f} {tokens / (time.time() - started):,.0f} tokens/s", flush=True)
        if step % args.every == 0 or step == args.steps:
            model.eval()
            report = {"step": step, "length": length, "train_loss": round(loss.item(), 4), "seconds": round(time.time() - started)}
            report |= {k: round(v, 4) for k, v in abilities(model, rows, validation, length).items()}
            model.train()
            print(json.dumps(report), flush=True)
            log.write(json.dumps(report) + "\n")
            log.flush()
            temporary = checkpoint.with_suffix(".tmp")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, temporary)
            os.replace(temporary, checkpoint)
            if step in args.keep:
                torch.save(torch.load(checkpoint, weights_only=True), args.work / f"checkpoint-{step}.pt")
    if args.export:
        export(model, tokenizer, args.export)


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model in bf16 (what its training computed in) and the tokenizer, in the format of Transformers."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=10**9, clean_up_tokenization_spaces=False
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    fast.save_pretrained(folder)
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"wrote {folder} ({size / 1e6:.1f} MB)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder with train/ and validation/ books (*.txt.xz)")
    parser.add_argument("--work", type=Path, required=True, help="folder for tokens, checkpoints and the log")
    parser.add_argument("--export", type=Path, help="write the finished model to this folder")
    parser.add_argument("--steps", type=int, default=3800)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=int, default=200, help="steps between measurements and checkpoints")
    parser.add_argument("--keep", type=int, nargs="*", default=[], help="steps whose checkpoint is kept under its own name")
    parser.add_argument("--compile", action="store_true", help="compile the model (needs a C++ compiler)")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
