"""Your own data, in ten minutes: from rows in a file to a model that transformers loads.

    cd examples && python own_data.py        (under a minute on a laptop, nothing is downloaded)

The cells (`# %%`) run in Jupyter, VS Code or as a script; no outputs are stored, so that what you
see is what this version computes. The model is the embedded one of 870k parameters. For yours, put
a folder or a hub id in place of `tiny`, and your file in place of the one written here.
"""

# %% 1. Rows. One JSON object a line, in any of the usual shapes: here `question` and `answer`.
import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from alphaspin import Config, export, play
from alphaspin.commands import plan

THINGS = ("apple", "bear", "canoe", "chair", "cow", "drum", "flute", "goat", "lamp", "leg", "pear")
KINDS = ("red", "blue", "green", "old", "new", "small", "big", "round", "grey", "long")
rows = [
    {"question": f"Make {kind} {thing} plural.", "answer": f"{kind} {thing}s"}
    for thing in THINGS
    for kind in KINDS
]
here = Path("own-data")
here.mkdir(exist_ok=True)
data = here / "plurals.jsonl"
data.write_text("".join(json.dumps(row) + "\n" for row in rows))

# %% 2. Settings: what is not said has a default (`alphaspin-train --help`). SPIN lets the model
# play against its last iterate: the rows win, what that iterate answers loses. `control: sft`
# trains as many steps on the rows alone, beside it: without that, nobody can say what self-play was
# good for.
config = Config.model_validate(
    {
        "name": "plurals",
        "model": "tiny",
        "data": str(data),
        "output": str(here / "run"),
        "control": "sft",
        "text": {"max_prompt_tokens": 64, "max_response_tokens": 32},
        "selfplay": {"iterations": 2, "prompts": 64},
        "train": {"lr": 2e-3, "batch_size": 16},
        "loss": {"beta": 1.0},
        "evaluate": {"prompts": 16},
    }
)

# %% 3. Before a long run: what it will do, in steps, tokens and gigabytes.
plan.show(config)

# %% 4. Play. Interrupt it whenever you like: the same cell goes on where it stopped.
run = play(config)

# %% 5. Did it help? Held-out prompts, that is rows that were set aside. Sixteen are far too few to
# be sure of anything: `report.html` says so in words, with intervals, and says what to try next.
for row in run.table:
    print(f"{row.name:<6} NLL of the rows {row.nll:6.2f}   exact answers {100 * row.greedy:3.0f} %")
print(f"open {run.path / 'report.html'}")

# %% 6. Use it. `merge=True` gives weights that load with transformers alone; without it you get the
# adapter, for PEFT and vLLM, and with `push="you/plurals"` a repository on the hub.
if not (merged := here / "merged").exists():
    export(run.path, merged, merge=True, license="apache-2.0")
tokenizer = AutoTokenizer.from_pretrained(merged)
model = AutoModelForCausalLM.from_pretrained(merged)
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "Make old drum plural."}],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)
answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
