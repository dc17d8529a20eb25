"""A judge of your own: self-play towards what no demonstration shows.

    cd examples && python custom_judge.py        (under a minute on a laptop, nothing is downloaded)

Demonstrations say what to answer. A judge says which of two answers is better: shorter, safer, in
the tone of the house. SPPO draws K answers to each prompt, asks the judge about each pair, and
raises the log-probability of an answer by as much as it wins.
"""

# %% 1. The judge is a function, in a file of its own: `judges.py`, beside this one. A run finds it
# by `module:name`, records the hash of that file, and refuses to go on with an edited one.
from pathlib import Path

from judges import brief

from alphaspin import Config, play
from alphaspin.judges.base import Comparison, Prompt

# %% 2. Try it by hand, before it decides over a training: it has to be right where you are sure.
prompt = Prompt([{"role": "user", "content": "Add 2 and 3."}])
print(f"P(short ≻ long) = {brief(Comparison(prompt, '5', 'The sum of 2 and 3 is 5.')):.2f}")
assert brief(Comparison(prompt, "", "5")) < 0.01, "saying nothing must not win"

# %% 3. The run: `judge.kind` names the function, and its keyword-only arguments are settings.
config = Config.model_validate(
    {
        "name": "brief",
        "method": "sppo",
        "model": "tiny",
        "data": "tiny",
        "heldout": "tiny",
        "output": str(Path("own-judge") / "run"),
        "judge": {"kind": "judges:brief", "scale": 5.0},
        "preference": {"responses": 4, "eta": 10.0},
        "selfplay": {"iterations": 2, "prompts": 48},
        "text": {"max_prompt_tokens": 96, "max_response_tokens": 32},
        "train": {"lr": 2e-3, "batch_size": 16, "epochs": 4},
        "evaluate": {"prompts": 24},
    }
)
run = play(config)

# %% 4. Who wins, and at what price? The judge sees length only, so a policy can please it and
# forget the question: the share of right answers stands beside the win rate for that reason. The
# page lists this and other signs of over-optimisation.
for row in run.table:
    won = "" if row.judged is None else f"   wins against the base {100 * row.judged:3.0f} %"
    print(f"{row.name:<5}{row.length:5.1f} tokens   right answers {100 * row.sampled:3.0f} %{won}")
print(f"open {run.path / 'report.html'}")
