"""Load a GGUF model with its weights quantized to NF4 on the way, show what that took, and ask the model a question.

`make demo` runs it; it exits with 1 if the answer is wrong.
"""

import sys
import time
from typing import Any

from transformers import AutoTokenizer

import quantdock
from fetch_model import fetch

QUESTION = "What is the capital of France?"
ANSWER = "Paris"
MAX_NEW_TOKENS = 12


def main() -> int:
    """Plan, load, ask; the exit code."""
    path = fetch()

    # Everything is decided, and every byte counted, before the first weight is read.
    plan = quantdock.plan(path, quantize="bnb-nf4")
    print(plan, end="\n\n")

    # What comes back is transformers' own class, so everything that works with transformers works with it.
    model = plan.execute()
    report = quantdock.report(model)
    print(report, end="\n\n")

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    answer, seconds = ask(model, tokenizer, QUESTION)
    print(f"Q: {QUESTION}\nA: {answer}   ({seconds:.1f} s)\n")

    covered = sum(amount for method, amount in report.ledger.coverage.items() if method)
    print(f"memory predicted  {report.predicted_nbytes:>13,} bytes")
    print(f"memory measured   {report.measured_nbytes:>13,} bytes")
    print(f"coverage          {covered / report.ledger.stored_nbytes:>13.1%} of the stored bytes are NF4 now")
    if ANSWER not in answer:
        print(f"expected the answer to name {ANSWER}", file=sys.stderr)
        return 1
    return 0


def ask(model: Any, tokenizer: Any, question: str) -> tuple[str, float]:
    """The likeliest answer, token by token, and the seconds it took."""
    started = time.perf_counter()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(
        **prompt,
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip(), time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(main())
