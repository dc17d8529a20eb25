"""The kernels in TRL: the same losses, without the matrix of logits.

    pip install trl && cd examples && python kernels_in_trl.py      (seconds, nothing is downloaded)

TRL takes log-probs from one function, which goes over the logits in chunks and multiplies by the
head three times with a frozen head, four with a trained one. `patch_trl` puts `linear_logprob`
there, which needs two with a frozen one. Nothing else of TRL changes, so it is one line in a script
that you have.
"""

# %% 1. A model and pairs: the embedded model of 870k parameters, and its demonstrations against
# those of other questions. Its vocabulary is small: this shows that the numbers are the same, and
# benchmarks/test_trl.py what it saves where the vocabulary is large. In fp32, so that digits can be
# compared: in bf16, as the model is stored, the two round at other places.
import json
from itertools import pairwise
from typing import Any

import torch
from alphaspin_kernels import patch_trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer

from alphaspin.foundation.paths import packaged

lines = packaged("tiny/train.jsonl").read_text(encoding="utf-8").splitlines()[:33]
rows = [json.loads(line) for line in lines]
pairs = Dataset.from_list(
    [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
        for row, other in pairwise(rows)
    ]
)


def train() -> list[float]:
    """Losses of four steps of DPO, by TRL."""
    set_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(packaged("tiny/model"), dtype=torch.float32)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir="trl",
            max_steps=4,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=1,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(packaged("tiny/model")),
    )
    trainer.train()
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


# %% 2. TRL as it is, and the same with the kernels: `patch_trl()` alone holds for the whole
# process, in a `with` it ends there.
plain = train()
with patch_trl():
    patched = train()
for step, (one, other) in enumerate(zip(plain, patched, strict=True), 1):
    print(f"step {step}: loss {one:.6f} by TRL, {other:.6f} with linear_logprob")
assert max(abs(a - b) for a, b in zip(plain, patched, strict=True)) < 1e-4
