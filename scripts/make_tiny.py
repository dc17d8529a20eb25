"""Make the embedded default "tiny": a small chat model with bad habits, and demonstrations.

The script writes three things under ``alphaspin/recipes/tiny/``, from nothing but a seed:

``model/``
    A Llama-style causal LM of about 870,000 parameters with its tokenizer and chat template, in the
    Hugging Face format.
``train.jsonl``, ``heldout.jsonl``
    Demonstrations, one ``{"prompt": ..., "completion": ...}`` per line. Nine small skills, several
    phrasings each. The completion is a function of the prompt, so a response is right exactly when
    it equals the demonstration.

The model imitates what a base model looks like before self-play. It first learns the skills from
clean text, then reads a "web-like" corpus in which most answers are sloppy (wrong, hedged, doubled,
chatty, or too short), and then gets a handful of SFT steps on the demonstrations. It *can* answer
well, but often does not: that is what self-play can remove.

No question that is held out appears in any training phase, in any phrasing. A second held-out set,
``tuning``, is never shipped: choose hyperparameters on it (``--tuning FILE`` writes it) and keep
``heldout.jsonl`` for the numbers that are published.

Usage::

    python scripts/make_tiny.py                       # everything, about 20 minutes on one core
    python scripts/make_tiny.py --tuning tuning.jsonl --data-only
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

OUT = Path(__file__).resolve().parent.parent / "alphaspin" / "recipes" / "tiny"

N_TRAIN, N_HELDOUT, N_TUNING = 6000, 1000, 1000
VOCAB_SIZE = 512
MAX_TOKENS = 256

CLEAN_STEPS, WEB_STEPS, SFT_STEPS = 3000, 500, 8
BATCH = 64
CLEAN_LR, WEB_LR, SFT_LR = 2e-3, 1e-3, 2e-4
SLOPPY_SHARE = 0.6

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ raise_exception('tiny knows the roles user and assistant only') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# ---------------------------------------------------------------------------------- questions

THINGS = {
    "an animal": "cat dog cow pig hen fox bear wolf lion tiger horse sheep goat mouse rabbit zebra",
    "a fruit": "apple pear plum grape lemon mango peach banana cherry melon fig kiwi orange olive",
    "a color": "red blue green black white brown pink gray purple yellow violet gold silver teal",
    "a tool": "hammer saw drill wrench axe shovel rake ladder chisel pliers file clamp hoe level",
    "a drink": "tea coffee milk water juice cola cider cocoa soda beer wine punch broth syrup",
    "a vehicle": "car bus train truck bike boat ship plane tram van taxi ferry canoe sled",
    "clothing": "shirt coat hat sock shoe scarf glove dress skirt belt jacket boot vest apron",
    "furniture": "table chair bed sofa desk shelf lamp stool bench cabinet drawer couch crib rug",
    "a body part": "arm leg hand foot nose ear eye knee neck mouth finger elbow back chin",
    "an instrument": "piano guitar drum flute violin harp horn cello banjo organ trumpet bell tuba",
}
CATEGORIES = {kind: words.split() for kind, words in THINGS.items()}
WORDS = sorted({word for words in CATEGORIES.values() for word in words})
NAMES = ["Tom", "Anna", "Ben", "Lucy", "Sam", "Mia", "Max", "Ella", "Leo", "Nora"]
ITEMS = ["apples", "books", "coins", "pens", "cards", "eggs", "shells", "stamps", "cookies", "nuts"]
ORDINALS = ["first", "second", "third", "last"]


@dataclass(frozen=True)
class Question:
    """One question: what it asks (``key``), how it is put, and good and bad answers to it.

    ``key`` names the content without the phrasing: two questions with one key have one answer.
    ``frame`` holds the one ``{}`` that ``core``, or a wrong core, goes into.
    """

    key: str
    prompt: str
    frame: str
    core: str
    wrong: str

    @property
    def answer(self) -> str:
        """The demonstration."""
        return self.frame.format(self.core)


def _list(words: Sequence[object]) -> str:
    return ", ".join(str(word) for word in words)


def extreme(rng: random.Random) -> Question:
    """Pick the largest or smallest of three to five numbers."""
    numbers = rng.sample(range(1, 100), rng.randint(3, 5))
    kind, pick = rng.choice([("largest", max), ("smallest", min)])
    prompt = rng.choice(
        [
            "Which of these numbers is the {k}: {n}?",
            "What is the {k} number in this list: {n}?",
            "Find the {k} number: {n}",
            "Here are some numbers: {n}. Which one is the {k}?",
            "Tell me the {k} of {n}.",
        ]
    ).format(k=kind, n=_list(numbers))
    core = pick(numbers)
    wrong = rng.choice([n for n in numbers if n != core])
    key = f"{kind} {sorted(numbers)}"
    return Question(key, prompt, f"The {kind} number is {{}}.", str(core), str(wrong))


def sort(rng: random.Random) -> Question:
    """Put three words in alphabetical order."""
    words = rng.sample(WORDS, 3)
    prompt = rng.choice(
        [
            "Sort these words alphabetically: {w}",
            "Put these words in alphabetical order: {w}.",
            "Can you arrange {w} from A to Z?",
            "Please list {w} in alphabetical order.",
            "What is the alphabetical order of {w}?",
        ]
    ).format(w=_list(words))
    right = sorted(words)
    wrong = list(right)
    while wrong == right:
        rng.shuffle(wrong)
    return Question(f"sort {right}", prompt, "{}", _list(right), _list(wrong))


def count(rng: random.Random) -> Question:
    """Count a letter in a word."""
    word = rng.choice(WORDS)
    letter = rng.choice(word) if rng.random() < 0.8 else rng.choice("aeinorst")
    prompt = rng.choice(
        [
            "How many times does the letter {c} appear in {w}?",
            "Count the letter {c} in the word {w}.",
            "How often do you see {c} in {w}?",
            "How many {c}'s are there in {w}?",
        ]
    ).format(c=letter, w=word)
    number = word.count(letter)
    wrong = rng.choice([n for n in range(4) if n != number])
    frame = f"The letter {letter} appears {{}} in {word}."
    return Question(f"count {letter} {word}", prompt, frame, _times(number), _times(wrong))


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"


def backwards(rng: random.Random) -> Question:
    """Spell a short word backwards."""
    word = rng.choice([word for word in WORDS if len(word) <= 6])
    prompt = rng.choice(
        [
            "Spell {w} backwards.",
            "Write the letters of {w} in reverse order.",
            "How do you spell {w} backwards?",
            "Reverse the word {w}, letter by letter.",
        ]
    ).format(w=word)
    right = list(word[::-1])
    wrong = list(right)
    spot = rng.randrange(len(word) - 1)
    wrong[spot : spot + 2] = [wrong[spot + 1], rng.choice("aeinorst")]
    return Question(f"backwards {word}", prompt, "{}", "-".join(right), "-".join(wrong))


def add(rng: random.Random) -> Question:
    """Add two numbers below 50."""
    left, right = rng.randint(2, 49), rng.randint(2, 49)
    prompt = rng.choice(
        [
            "What is {a} plus {b}?",
            "Add {a} and {b}.",
            "What do you get if you add {b} to {a}?",
            "Calculate {a} + {b}.",
            "How much is {a} + {b}?",
        ]
    ).format(a=left, b=right)
    total = left + right
    wrong = _near(total, rng)
    return Question(f"add {left} {right}", prompt, f"{left} + {right} = {{}}", str(total), wrong)


def _near(number: int, rng: random.Random) -> str:
    return str(rng.choice([n for d in (1, 2, 10) for n in (number - d, number + d) if n >= 0]))


def story(rng: random.Random) -> Question:
    """Solve a one-step word problem."""
    name, item = rng.choice(NAMES), rng.choice(ITEMS)
    start, change = rng.randint(5, 30), rng.randint(2, 9)
    if rng.random() < 0.5:
        move = rng.choice(["buys {n} more", "finds {n} more", "gets {n} more"])
        total = start + change
    else:
        change = min(change, start)
        move = rng.choice(["gives away {n}", "loses {n}", "sells {n}"])
        total = start - change
    ask = rng.choice(["How many {i} does {p} have now?", "How many {i} are left with {p}?"])
    prompt = f"{{p}} has {{s}} {{i}} and {move}. {ask}".format(p=name, s=start, i=item, n=change)
    key = f"story {name} {item} {start} {total}"
    frame = f"{name} has {{}} {item} now."
    return Question(key, prompt, frame, str(total), _near(total, rng))


def earlier(rng: random.Random) -> Question:
    """Say which of two words comes first in the alphabet."""
    words = rng.sample(WORDS, 2)
    prompt = rng.choice(
        [
            "Which word comes first in the alphabet, {a} or {b}?",
            "Which is earlier in the dictionary: {a} or {b}?",
            "In alphabetical order, does {a} or {b} come first?",
            "Would {a} or {b} be listed first in a dictionary?",
        ]
    ).format(a=words[0], b=words[1])
    right, wrong = sorted(words)
    return Question(f"earlier {right} {wrong}", prompt, "The word {} comes first.", right, wrong)


def belongs(rng: random.Random) -> Question:
    """Pick the one word of three that belongs to a category."""
    kind, *others = rng.sample(sorted(CATEGORIES), 3)
    right = rng.choice(CATEGORIES[kind])
    rest = [rng.choice(CATEGORIES[other]) for other in others]
    words = rng.sample([right, *rest], 3)
    prompt = rng.choice(
        [
            "Which of these is {k}: {w}?",
            "Which word is {k}: {w}?",
            "Only one of {w} is {k}. Which one?",
            "Look at these words: {w}. Which one is {k}?",
        ]
    ).format(k=kind, w=_list(words))
    key = f"belongs {kind} {right} {sorted(rest)}"
    return Question(key, prompt, f"The word {{}} is {kind}.", right, rng.choice(rest))


def letter(rng: random.Random) -> Question:
    """Name the first, second, third, or last letter of a word."""
    word, spot = rng.choice(WORDS), rng.randrange(4)
    prompt = rng.choice(
        [
            "What is the {o} letter of {w}?",
            "Which letter is the {o} one in {w}?",
            "Give me the {o} letter of the word {w}.",
        ]
    ).format(o=ORDINALS[spot], w=word)
    core = word[-1 if spot == 3 else spot]
    wrong = rng.choice([c for c in sorted({*word, "e", "s"}) if c != core])
    frame = f"The {ORDINALS[spot]} letter of {word} is {{}}."
    return Question(f"letter {word} {spot}", prompt, frame, core, wrong)


def item(rng: random.Random) -> Question:
    """Name the first, second, third, or last word of a list of four."""
    words, spot = rng.sample(WORDS, 4), rng.randrange(4)
    prompt = rng.choice(
        [
            "What is the {o} word in this list: {w}?",
            "Name the {o} item: {w}",
            "Here is a list: {w}. What is the {o} item?",
            "From {w}, give me the {o} word.",
        ]
    ).format(o=ORDINALS[spot], w=_list(words))
    core = words[spot]
    wrong = rng.choice([word for word in words if word != core])
    frame = f"The {ORDINALS[spot]} word is {{}}."
    return Question(f"item {spot} {words}", prompt, frame, core, wrong)


SKILLS: list[Callable[[random.Random], Question]] = [
    extreme, sort, count, backwards, add, story, earlier, belongs, letter, item,
]  # fmt: skip


def split_of(key: str) -> str:
    """Assign a question to a split by the hash of its content, so that no phrasing leaks.

    Three quarters of all questions are for the text that the model learns from; an eighth is for
    demonstrations, and a sixteenth for each held-out set. Demonstrations are new to the model: had
    it learned their answers by heart, its own answers would differ from them too seldom.
    """
    first, second = hashlib.sha256(key.encode()).digest()[:2]
    if first % 8 > 1:
        return "text"
    return ("train", "train", "heldout", "tuning")[second % 4]


def questions(split: str, seed: int) -> Iterator[Question]:
    """Yield questions of one split without end, the skills in turn.

    Spelling backwards is in the text only: at this size it is learned by heart, word by word, and
    the model fails on almost every other word.
    """
    rng = random.Random(f"{split} {seed}")
    skills = [skill for skill in SKILLS if split == "text" or skill is not backwards]
    while True:
        for skill in skills:
            question = skill(rng)
            while split_of(question.key) != split:
                question = skill(rng)
            yield question


def demonstrations(split: str, number: int, seed: int) -> list[Question]:
    """Take ``number`` questions of a split, no prompt twice, the skills in turn."""
    taken: dict[str, Question] = {}
    for question in questions(split, seed):
        taken.setdefault(question.prompt, question)
        if len(taken) == number:
            break
    rows = list(taken.values())
    random.Random(seed).shuffle(rows)
    return rows


def sloppy(question: Question, rng: random.Random) -> str:
    """Answer as the web does: wrong, hedged, doubled, chatty, or with the bare fact only."""
    answer = question.answer
    match rng.choice(["wrong", "hedged", "doubled", "chatty", "bare", "helpful"]):
        case "wrong":
            return question.frame.format(question.wrong)
        case "hedged":
            fact = rng.choice([question.core, question.wrong])
            return f"I think it is {fact}, but I am not sure."
        case "doubled":
            return f"{answer} {answer}"
        case "chatty":
            return f"Sure! {answer}"
        case "bare":
            return f"{question.core}!" if question.frame == "{}" else question.core
        case _:
            return f"{answer} I hope this helps!"


# ------------------------------------------------------------------------- tokenizer and model


def make_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with single digits, and give it the chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    *,
    hidden_size: int = 128,
    intermediate_size: int = 352,
    num_hidden_layers: int = 4,
    max_new_tokens: int = 32,
) -> LlamaForCausalLM:
    """Build the untrained model."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def encode(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenise (prompt, response) pairs; labels are -100 outside the response and its end token.

    Returns input ids and labels, int64, [len(pairs), longest], padded on the right.
    """
    heads = tokenizer([f"{USER}{prompt}{ASSISTANT}" for prompt, _ in pairs])["input_ids"]
    tails = tokenizer([f"{response}{END}" for _, response in pairs])["input_ids"]
    longest = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True))
    ids = torch.full((len(pairs), longest), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        end = len(head) + len(tail)
        ids[row, :end] = torch.tensor(head + tail)
        labels[row, len(head) : end] = torch.tensor(tail)
    return ids, labels


def batches(pairs: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Group pairs into batches of similar length, which saves a third of the padding."""
    rng = random.Random(0)
    while pool := [pair for _, pair in zip(range(10 * BATCH), pairs, strict=False)]:
        pool.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        chunks = [pool[at : at + BATCH] for at in range(0, len(pool), BATCH)]
        rng.shuffle(chunks)
        yield from chunks


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Iterator[tuple[str, str]],
    *,
    steps: int,
    lr: float,
    name: str,
) -> None:
    """Minimise the NLL of responses with AdamW, 5 % warmup and cosine decay to a tenth.

    Padding is on the right and attention is causal, so no attention mask is needed.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    warmup = max(1, steps // 20)
    start = time.monotonic()
    model.train()
    for step, batch in zip(range(steps), batches(pairs), strict=False):
        decay = 0.55 + 0.45 * math.cos(math.pi * step / steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup) * decay
        ids, labels = (x.to(model.device) for x in encode(tokenizer, batch))
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
        answered = labels[:, 1:] != -100
        logits = model.lm_head(hidden[answered])
        loss = cross_entropy(logits, labels[:, 1:][answered])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 99 or step == steps - 1:
            seconds = time.monotonic() - start
            print(f"{name} {step + 1}/{steps} loss {loss.item():.3f} {seconds:.0f} s", flush=True)
    model.eval()


@torch.inference_mode()
def accuracy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[Question],
    *,
    sample: bool,
) -> dict[str, float]:
    """Exact match of generated answers with the demonstrations: per skill, and ``all``."""
    torch.manual_seed(0)
    heads = tokenizer([f"{USER}{row.prompt}{ASSISTANT}" for row in rows])["input_ids"]
    longest = max(map(len, heads))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(head)) + head for head in heads]).to(model.device)
    out = model.generate(input_ids=ids, attention_mask=(ids != pad).long(), do_sample=sample)
    texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    hits: dict[str, list[bool]] = {"all": []}
    for row, text in zip(rows, texts, strict=True):
        hit = text == row.answer
        hits["all"].append(hit)
        hits.setdefault(row.key.split()[0], []).append(hit)
    return {skill: round(sum(values) / len(values), 3) for skill, values in hits.items()}


# ------------------------------------------------------------------------------------ the work


def write_jsonl(path: Path, rows: Sequence[Question]) -> None:
    """Write demonstrations, one JSON object per line."""
    lines = [json.dumps({"prompt": row.prompt, "completion": row.answer}) for row in rows]
    path.write_text("\n".join(lines) + "\n")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write model and tokenizer so that older readers of the format can load them too."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    # transformers 5 writes a class name that transformers 4 does not know; this one both know.
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)


def clean_text(seed: int) -> Iterator[tuple[str, str]]:
    """Yield questions with their right answers, without end."""
    for question in questions("text", seed):
        yield question.prompt, question.answer


def web_text(seed: int) -> Iterator[tuple[str, str]]:
    """Yield questions with answers as the web gives them, without end."""
    rng = random.Random(f"web {seed}")
    for question in questions("text", seed):
        bad = rng.random() < SLOPPY_SHARE
        yield question.prompt, sloppy(question, rng) if bad else question.answer


def main() -> None:
    """Make the data, the tokenizer, and the model, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tuning", type=Path, help="also write the unshipped tuning set here")
    parser.add_argument("--data-only", action="store_true", help="leave the model as it is")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seed: int = args.seed

    args.out.mkdir(parents=True, exist_ok=True)
    demos = demonstrations("train", N_TRAIN, seed)
    tuning = demonstrations("tuning", N_TUNING, seed)
    write_jsonl(args.out / "train.jsonl", demos)
    write_jsonl(args.out / "heldout.jsonl", demonstrations("heldout", N_HELDOUT, seed))
    if args.tuning:
        write_jsonl(args.tuning, tuning)
    if args.data_only:
        return

    web = web_text(seed + 1)
    sample = [next(web) for _ in range(20_000)]
    tokenizer = make_tokenizer(text for pair in sample for text in pair)
    model = make_model(tokenizer, seed)

    train(model, tokenizer, clean_text(seed + 2), steps=CLEAN_STEPS, lr=CLEAN_LR, name="clean")
    print("clean: greedy", accuracy(model, tokenizer, tuning, sample=False))
    print("clean: sampled", accuracy(model, tokenizer, tuning, sample=True))
    train(model, tokenizer, web_text(seed + 3), steps=WEB_STEPS, lr=WEB_LR, name="web")
    print("web: sampled", accuracy(model, tokenizer, tuning, sample=True))
    shots = iter([(row.prompt, row.answer) for row in demos[: SFT_STEPS * BATCH]])
    train(model, tokenizer, shots, steps=SFT_STEPS, lr=SFT_LR, name="sft")

    model = model.to(torch.bfloat16)
    save(model, tokenizer, args.out / "model")
    model = model.float()
    print("base: greedy", accuracy(model, tokenizer, tuning, sample=False))
    print("base: sampled", accuracy(model, tokenizer, tuning, sample=True))


if __name__ == "__main__":
    main()
