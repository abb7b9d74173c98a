"""Train nano, the small Llama that ships inside Longreach, from scratch.

    python recipes/train_nano.py --corpus DIR --work DIR [--export DIR]    # two CPU cores: an hour and a half
    python recipes/train_nano.py --corpus DIR --work DIR --export DIR --device cuda --scale 16 --matrix-rate 0.01 --steps 10500 --every 750 --workers 12

The second made the model that is shipped, in six minutes on one H200.

DIR holds `train/` and `validation/` with `*.txt.xz` books. The work folder (outside the package) receives the tokenizer,
the token cache, checkpoints and `log.jsonl`; a run that is started again continues from its last checkpoint.

Plain next-token training at true positions inside the window: no grouped, shifted, skipped or randomised positions. What
nano does beyond its window is therefore due to the method that extends it. Every sequence begins with <bos>.

The batch of a step is a function of (seed, step, scale) alone, and the schedule is constant until the final decay, so stopping
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
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from abilities import abilities, copying
from initialisation import initialise
from muon import Muon
from training_rows import BOS, EOS, PAD, Rows

WINDOW = 512
VOCABULARY = 2048
MATRIX_RATE, VECTOR_RATE = 0.005, 3e-3  # Muon for the matrices of the layers, AdamW for embeddings and norms
DECAY_SHARE = 0.45  # the last 45 % of the steps decay linearly to zero
STEPS = 3200


class Stage(NamedTuple):
    """From `first` on: rows of `length` tokens, `tokens` of them a batch; the shares of the kinds of rows, the rest is prose."""

    first: int
    length: int
    tokens: int
    copying: float
    drill: float
    documents: float
    single: float = 0.25  # share of the documents that hide one pass key
    labelled: float = 0.25  # share of those whose keys differ by their label only
    listed: float = 0.15  # share of those with facts that belong together, see listed_text.py
    numbers: float = 0.25  # share of the passages drawn where a book has numbers, and of the documents with numbers that are not asked for


# Short, dense rows teach what a question is; then the gaps grow to the whole window.
STAGES = (
    Stage(0, 64, 4096, 0.2, 0.6, 0.1),
    Stage(200, 128, 4096, 0.15, 0.35, 0.4),
    Stage(500, 256, 4096, 0.1, 0.2, 0.6),
    Stage(900, WINDOW, 4096, 0.08, 0.1, 0.7, single=0.1, labelled=0.3, listed=0.25),
)


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

        temporary = work / "tokens.tmp.npz"
        np.savez(temporary, train=encode(books), validation=encode(read_books(corpus / "validation")))
        os.replace(temporary, cache)
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


def stage(step: int) -> Stage:
    return next(s for s in reversed(STAGES) if step >= s.first)


def rate(step: int, steps: int) -> float:
    """The share of the peak rates that a step takes."""
    decay_from = steps * (1 - DECAY_SHARE)
    return min(1.0, (step + 1) / 100, max(0.0, (steps - step) / (steps - decay_from)))


def batch(rows: Rows, seed: int, step: int, scale: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids and weights of a step."""
    now = stage(step)
    rows.single, rows.labelled, rows.listed, rows.numbers = now.single, now.labelled, now.listed, now.numbers
    return rows.batch(Random(seed * 1_000_003 + step), scale * now.tokens // now.length, now.length, now.copying, now.drill, now.documents)


class Batches(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The batches of all steps, so that a DataLoader can make them beside the training."""

    def __init__(self, rows: Rows, args: argparse.Namespace) -> None:
        self.rows, self.seed, self.scale = rows, args.seed, args.scale

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return batch(self.rows, self.seed, step, self.scale)


def configuration(tokenizer: Tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
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


def fast_in_bf16(device: torch.device) -> bool:
    """Whether the machine multiplies in bf16; one that emulates it is a hundred times slower than in fp32."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported()


def train(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    if device.type == "cuda":  # the same run again gives the same weights on a card too
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    tokenizer, books, validation = prepare(args.corpus, args.work)
    print(f"{len(books):,} training tokens, {len(validation):,} validation tokens", flush=True)
    rows = Rows(tokenizer, books)
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(configuration(tokenizer))
    initialise(model)
    model.to(device)
    model.config._attn_implementation = "sdpa"
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    optimizers = {
        "matrices": Muon(matrices, args.matrix_rate, weight_decay=0.01),
        "others": torch.optim.AdamW(others, lr=VECTOR_RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    }
    checkpoint = args.work / "checkpoint.pt"
    step, before = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state[name])
        step, before = state["step"], state["seconds"]
        print(f"continuing at step {step}", flush=True)
    half = fast_in_bf16(device)
    batches = torch.utils.data.DataLoader(
        Batches(rows, args), batch_size=None, sampler=range(step, args.steps), num_workers=args.workers, pin_memory=device.type == "cuda",
        multiprocessing_context="fork" if args.workers else None,
    )  # fmt: skip
    made = iter(batches)
    started = time.time()
    console = Console()
    columns = (TextColumn("[bold]step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress, (args.work / "log.jsonl").open("a") as log:
        bar = progress.add_task("training", total=args.steps, completed=step, state="")
        while step < args.steps and step != args.stop_after:
            now = stage(step)
            ids, weights = next(made)
            ids, w = ids.to(device, non_blocking=True), weights[:, 1:].flatten().to(device, non_blocking=True)
            share = rate(step, args.steps)
            for optimizer, peak in zip(optimizers.values(), (args.matrix_rate, VECTOR_RATE)):
                for group in optimizer.param_groups:
                    group["lr"] = share * peak
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                logits = model(ids[:, :-1], use_cache=False).logits
            losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            loss = (losses * w).sum() / w.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            if step % 10 == 0 or step == args.steps:  # the loss is on the device; asking for it every time would stop the queue
                progress.update(bar, completed=step, state=f"length {now.length}  loss {loss.item():.3f}")
            if step % args.every == 0 or step in (args.steps, args.stop_after):
                model.eval()
                report = {"step": step, "length": now.length, "train_loss": round(loss.item(), 4), "seconds": round(before + time.time() - started)}
                report["copying"] = round(copying(model, rows, now.length), 4)
                report |= {k: round(v, 4) for k, v in abilities(model, rows, validation, now.length).items()}
                model.train()
                progress.print(json.dumps(report)) if console.is_terminal else print(json.dumps(report), flush=True)
                log.write(json.dumps(report) + "\n")
                log.flush()
                state = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
                state |= {"model": model.state_dict(), "step": step, "seconds": before + time.time() - started}
                for path in (checkpoint, *([args.work / f"checkpoint-{step}.pt"] if step in args.keep else [])):
                    temporary = path.with_suffix(".tmp")
                    torch.save(state, temporary)
                    os.replace(temporary, path)
    if args.export and step == args.steps:
        export(model, tokenizer, args.export)


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the model in bf16 and the tokenizer, in the format of Transformers."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=10**9, clean_up_tokenization_spaces=False
    )
    model.to("cpu", torch.bfloat16).save_pretrained(folder)
    fast.save_pretrained(folder)
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"wrote {folder} ({size / 1e6:.1f} MB)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder with train/ and validation/ books (*.txt.xz)")
    parser.add_argument("--work", type=Path, required=True, help="folder for tokens, checkpoints and the log")
    parser.add_argument("--export", type=Path, help="write the finished model to this folder")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--stop-after", type=int, help="stop at this step with a checkpoint, as if the run had been cut; start it again to go on")
    parser.add_argument("--matrix-rate", type=float, default=MATRIX_RATE, help="peak rate of Muon; batches that are larger bear more")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", type=int, default=1, help="how many times 4096 tokens a step reads")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches beside the training")
    parser.add_argument("--every", type=int, default=100, help="steps between measurements and checkpoints")
    parser.add_argument("--keep", type=int, nargs="*", default=[], help="steps whose checkpoint is kept under its own name")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
