"""Make the world "chain": harder than "tiny", and as the papers assume it, for `benchmarks`.

A prompt asks three or four of tiny's questions at once, an answer gives all answers in order, 30 to
60 tokens long, and is right only when each of them is. The model has 1.7 million parameters, twice
tiny's; its base has the same past (clean text, then sloppy text in which a part of an answer may go
wrong by itself) and then **one whole epoch of SFT on the demonstrations**, the setting that SPIN
was proposed for: self-play meets demonstrations that the base was already tuned on. There are
12,288 of them, four times what six iterations of 512 use.

    python scripts/make_chain.py --out FOLDER [--device cuda]     # about an hour on one core

writes `model/`, `train.jsonl`, `heldout.jsonl`. Splits are tiny's: no question of a held-out chain
appears in any training phase.
"""

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import make_tiny as tiny
import torch
from make_tiny import Question

N_TRAIN, N_HELDOUT = 12_288, 1000
SINGLE_STEPS, CHAIN_STEPS, WEB_STEPS = 1500, 700, 200
LR, WEB_LR, SFT_LR = 2e-3, 1e-3, 3e-4
SIZES = {"hidden_size": 160, "intermediate_size": 448, "num_hidden_layers": 5, "max_new_tokens": 64}


def chain(parts: list[Question], answers: list[str]) -> tuple[str, str]:
    """Prompt and response: the parts numbered, the answers numbered alike."""
    prompt = " ".join(f"{i}) {part.prompt}" for i, part in enumerate(parts, 1))
    return prompt, " ".join(f"{i}) {answer}" for i, answer in enumerate(answers, 1))


def groups(split: str, seed: int) -> Iterator[list[Question]]:
    """Three or four questions of a split, in random order of skills, without end."""
    rng = random.Random(f"chain {split} {seed}")
    source = tiny.questions(split, seed)
    while True:
        pool = [next(source) for _ in range(64)]
        rng.shuffle(pool)
        while len(pool) >= 4:
            yield [pool.pop() for _ in range(rng.choice([3, 4]))]


def clean(seed: int) -> Iterator[tuple[str, str]]:
    """Chains of text with right answers."""
    for parts in groups("text", seed):
        yield chain(parts, [part.answer for part in parts])


def web(seed: int) -> Iterator[tuple[str, str]]:
    """Chains of text; each part is sloppy by itself, a quarter of them."""
    rng = random.Random(f"chain web {seed}")
    for parts in groups("text", seed):
        answers = [tiny.sloppy(part, rng) if rng.random() < 0.25 else part.answer for part in parts]
        yield chain(parts, answers)


def demonstrations(split: str, number: int, seed: int) -> list[Question]:
    """Chains with right answers as rows that `make_tiny` can write and score; no prompt twice."""
    rows: dict[str, Question] = {}
    for parts in groups(split, seed):
        prompt, answer = chain(parts, [part.answer for part in parts])
        rows.setdefault(prompt, Question(f"chain{len(parts)} {prompt}", prompt, "{}", answer, ""))
        if len(rows) == number:
            return list(rows.values())
    raise AssertionError("questions have no end")


def main() -> None:
    """Make the data, the tokenizer, and the model, and write them."""
    parser = argparse.ArgumentParser(description='Make the world "chain".')
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seed: int = args.seed

    args.out.mkdir(parents=True, exist_ok=True)
    demos = demonstrations("train", N_TRAIN, seed)
    tuning = demonstrations("tuning", 512, seed)
    tiny.write_jsonl(args.out / "train.jsonl", demos)
    tiny.write_jsonl(args.out / "heldout.jsonl", demonstrations("heldout", N_HELDOUT, seed))

    singles = tiny.web_text(seed + 1)
    sample = [next(singles) for _ in range(20_000)]
    tokenizer = tiny.make_tokenizer(text for pair in sample for text in pair)
    model = tiny.make_model(tokenizer, seed, **SIZES).to(args.device)
    train, single = tiny.train, tiny.clean_text(seed + 2)
    train(model, tokenizer, single, steps=SINGLE_STEPS, lr=LR, name="single")
    train(model, tokenizer, clean(seed + 3), steps=CHAIN_STEPS, lr=LR / 2, name="chain")
    print("chain: greedy", tiny.accuracy(model, tokenizer, tuning, sample=False), flush=True)
    train(model, tokenizer, web(seed + 4), steps=WEB_STEPS, lr=WEB_LR, name="web")
    print("web: sampled", tiny.accuracy(model, tokenizer, tuning, sample=True), flush=True)
    shots = iter([(row.prompt, row.answer) for row in demos])
    train(model, tokenizer, shots, steps=N_TRAIN // tiny.BATCH, lr=SFT_LR, name="sft")
    tiny.save(model, tokenizer, args.out / "model")
    print("base: greedy", tiny.accuracy(model, tokenizer, tuning, sample=False))
    print("base: sampled", tiny.accuracy(model, tokenizer, tuning, sample=True))


if __name__ == "__main__":
    main()
