"""Judges that are models on this machine: a reward model, and PairRM.

Weights come from a Hugging Face folder or hub id and are all there, or it is an error: a head that
is left random would judge without complaint. Only safetensors are read and no code of the folder is
run. Models run on the GPU in the checkpoint's type, or on the CPU in fp32.
"""

import json
import math
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DebertaV2Model,
    DebertaV2PreTrainedModel,
    PreTrainedTokenizerFast,
)

from alphaspin.data.rows import Messages
from alphaspin.errors import InputError
from alphaspin.foundation.artefacts import folder_hash
from alphaspin.judges.base import Comparison, plain_text


@contextmanager
def _loading(source: str) -> Generator[None]:
    """Turn what transformers raises into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(f"judge {source}: cannot be loaded: {reason}") from error


def _load(source: str, load: Callable[..., Any], tokenizer: Any) -> tuple[Any, Any, str]:
    """Model, tokenizer, and what identifies them.

    Raises:
        InputError: cannot be loaded, or lacks weights.
    """
    transformers.utils.logging.disable_progress_bar()
    with _loading(source):
        model, report = load(
            source,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        if report["missing_keys"]:  # transformers goes on with random numbers in their place
            raise ValueError(f"it has no weights for {min(report['missing_keys'])}")
        tokenizer = tokenizer.from_pretrained(source, trust_remote_code=False)
    if Path(source).is_dir():
        identity = folder_hash(Path(source), ("*.safetensors", "*.json", "*.jinja"))[:32]
    else:
        identity = f"{source}@{getattr(model.config, '_commit_hash', None)}"
    cuda = torch.cuda.is_available()
    model = model.to("cuda") if cuda else model.float()
    return model.eval().requires_grad_(False), tokenizer, identity


def _padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> dict[str, Tensor]:
    """Right-padded ids and mask, [B, L] int64."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


class RewardModelJudge:
    """Bradley-Terry on a sequence classifier with one output: σ(r(x, y) - r(x, y')).

    The conversation goes through the tokenizer's chat template; where there is none, the prompt as
    text and the response are the two segments of a pair. Each response of a prompt is scored once.
    """

    both_orders = False

    def __init__(self, source: str, *, batch_size: int = 16, max_tokens: int = 4096):
        """Load a folder or hub id.

        Args:
            source: for `AutoModelForSequenceClassification`.
            batch_size: texts per pass; fewer than a prompt's responses are rounded up to them.
            max_tokens: longer texts lose their start (with a template: the score is read at the
                end) or the end of their longer segment.

        Raises:
            InputError: cannot be loaded, lacks weights, or has not one output.
        """
        load = cast(Any, AutoModelForSequenceClassification).from_pretrained
        self._model, self._tokenizer, weights = _load(source, load, AutoTokenizer)
        outputs = self._model.config.num_labels
        if outputs != 1:
            raise InputError(f"judge {source}: num_labels = {outputs}; a reward model has 1")
        if self._model.config.pad_token_id is None:  # decoders read the last token before padding
            self._model.config.pad_token_id = self._tokenizer.pad_token_id
        self._pad: int | None = self._model.config.pad_token_id
        self._batch = batch_size
        self._limit = min(max_tokens, int(self._tokenizer.model_max_length))
        self.identity = f"reward-model:{weights}:{self._limit}"

    def compare(self, pairs: Sequence[Comparison]) -> Iterator[Mapping[int, float]]:
        """Groups of whole prompts, which a resumed run forms again in the same way."""
        group: list[int] = []
        texts: dict[tuple[str, str], Comparison] = {}  # by prompt and response, in order
        for i, pair in enumerate(pairs):
            starts = i > 0 and pair.prompt != pairs[i - 1].prompt
            if starts and len(texts) >= self._batch:
                yield self._verdicts(pairs, group, texts)
                group, texts = [], {}
            group.append(i)
            for one in (pair, pair.swapped()):
                texts.setdefault((json.dumps(one.prompt.messages), one.first), one)
        if group:
            yield self._verdicts(pairs, group, texts)

    def _verdicts(
        self,
        pairs: Sequence[Comparison],
        group: list[int],
        texts: dict[tuple[str, str], Comparison],
    ) -> dict[int, float]:
        scores = self._scores([(one.prompt.messages, one.first) for one in texts.values()])
        reward = dict(zip(texts, scores, strict=True))

        def verdict(pair: Comparison) -> float:
            one, other = (
                reward[json.dumps(side.prompt.messages), side.first]
                for side in (pair, pair.swapped())
            )
            return _sigmoid(one - other)

        return {i: verdict(pairs[i]) for i in group}

    @torch.no_grad()
    def _scores(self, texts: Sequence[tuple[Messages, str]]) -> list[float]:
        """r(x, y) of each text."""
        rows = [self._encode(*text) for text in texts]
        size = self._batch if self._pad is not None else 1
        scores: list[float] = []
        for start in range(0, len(rows), size):
            part = [row for row, _ in rows[start : start + size]]
            inputs = _padded(part, self._pad or 0, self._model.device)
            kinds = [kind for _, kind in rows[start : start + size]]
            if kinds[0] is not None:
                kind_ids = _padded(cast("list[list[int]]", kinds), 0, self._model.device)
                inputs["token_type_ids"] = kind_ids["input_ids"]
            scores += self._model(**inputs).logits[:, 0].double().tolist()
        return scores

    def _encode(self, messages: Messages, response: str) -> tuple[list[int], list[int] | None]:
        """Ids, and the segment of each where the model wants to know."""
        if self._tokenizer.chat_template is None:
            limit = {"truncation": "longest_first", "max_length": self._limit}
            found = self._tokenizer(plain_text(messages), response, **limit)
            return found["input_ids"], found.get("token_type_ids")
        whole = [*messages, {"role": "assistant", "content": response}]
        text = self._tokenizer.apply_chat_template(whole, tokenize=False)
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids[-self._limit :], None


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


class PairRM(DebertaV2PreTrainedModel):
    """DeBERTa-v2 with a head on the states of three tokens; names as in the checkpoint.

    h = last hidden states at <|source|>, <|candidate1|>, <|candidate2|>; the logit is
    head(h_s, h_1) - head(h_s, h_2), averaged over the head's tasks (one), where head is
    Linear(2H, H), tanh, Linear(H, tasks). From llm_blender/pair_ranker/pairrm.py of
    github.com/yuchenlin/LLM-Blender (the class that the model card of llm-blender/PairRM-hf uses).
    """

    def __init__(self, config: Any):
        """Build from a config with `n_tasks`, `drop_out` and the ids of the three tokens."""
        super().__init__(config)
        self.pretrained_model = DebertaV2Model(config)
        self.head_layer = nn.Sequential(
            nn.Dropout(config.drop_out),
            nn.Linear(2 * config.hidden_size, config.hidden_size),
            nn.Tanh(),
            nn.Dropout(config.drop_out),
            nn.Linear(config.hidden_size, config.n_tasks),
        )
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Log-odds [B] that candidate 1 is better, for ids and mask [B, L]."""
        outputs = self.pretrained_model(input_ids=input_ids, attention_mask=attention_mask)
        config: Any = self.config

        def state(token: int) -> Tensor:
            return outputs.last_hidden_state[input_ids == token]

        source = state(config.source_prefix_id)
        first, second = (
            self.head_layer(torch.cat([source, state(token)], -1))
            for token in (config.cand1_prefix_id, config.cand2_prefix_id)
        )
        return (first - second).mean(-1)


class PairRMJudge:
    """PairRM (Jiang et al., arXiv 2306.02561) in the layout of llm-blender/PairRM-hf.

    [CLS] <|source|> x [SEP] [CLS] <|candidate1|> y [SEP] [CLS] <|candidate2|> y' [SEP], x cut at
    1,224 tokens and each candidate at half of what then remains of 2,048, [CLS] and [SEP] counted
    (`tokenize_pair` of the model card). Special tokens in the texts become spaces, as the package's
    collator does for [SEP]. Both orders are scored, P = σ((l(y, y') - l(y', y))/2): the head was
    trained with -log σ(l), so each logit is a log-odds and their mean is one. The package's
    `compare` adds instead of averaging, which has the same sign.

    The facts are from the package's source, the model card, config.json and added_tokens.json; the
    weights themselves have not been run here. The tokenizer is `tokenizer.json` as it stands:
    transformers 5 would rebuild its normaliser for the class `DebertaV2Tokenizer`. The config.json
    of the original repository, llm-blender/PairRM, is not a model's: it does not load.
    """

    both_orders = False

    def __init__(
        self,
        source: str = "llm-blender/PairRM-hf",
        *,
        batch_size: int = 16,
        source_tokens: int = 1224,
        max_tokens: int = 2048,
    ):
        """Load a folder or hub id; `batch_size` is in pairs, two rows each.

        Raises:
            InputError: cannot be loaded, lacks weights, or is no PairRM.
        """
        with _loading(source):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        names = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "n_tasks", "drop_out")
        if absent := [name for name in names if not hasattr(config, name)]:
            raise InputError(
                f"judge {source}: config.json lacks {', '.join(absent)}; PairRM in the layout of "
                "llm-blender/PairRM-hf has them"
            )
        load = cast(Any, PairRM).from_pretrained
        self._model, self._tokenizer, weights = _load(source, load, PreTrainedTokenizerFast)
        self._batch = batch_size
        self._source, self._total = source_tokens, max_tokens
        prefixes = cast("list[int]", [getattr(config, name) for name in names[:3]])
        self._prefixes = cast("list[str]", self._tokenizer.convert_ids_to_tokens(prefixes))
        special = {*self._tokenizer.all_special_tokens, *self._tokenizer.get_added_vocab()}
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len)[::-1])))
        self.identity = f"pairrm:{weights}:{source_tokens}:{max_tokens}"

    def compare(self, pairs: Sequence[Comparison]) -> Iterator[Mapping[int, float]]:
        """Batches in order, both orders of a pair in one."""
        for start in range(0, len(pairs), self._batch):
            part = [pair.flat() for pair in pairs[start : start + self._batch]]
            logits = self._logits([one for pair in part for one in (pair, pair.swapped())])
            odds = [(logits[2 * i] - logits[2 * i + 1]) / 2 for i in range(len(part))]
            yield {start + i: _sigmoid(x) for i, x in enumerate(odds)}

    @torch.no_grad()
    def _logits(self, pairs: Sequence[Comparison]) -> list[float]:
        rows = [self._encode(pair) for pair in pairs]
        inputs = _padded(rows, self._model.config.pad_token_id, self._model.device)
        return self._model(**inputs).double().tolist()

    def _encode(self, pair: Comparison) -> list[int]:
        def cut(prefix: str, text: str, length: int) -> list[int]:
            text = prefix + self._special.sub(" ", text)
            return self._tokenizer(text, truncation=True, max_length=length)["input_ids"]

        source = cut(self._prefixes[0], plain_text(pair.prompt.messages), self._source)
        room = (self._total - len(source)) // 2
        first = cut(self._prefixes[1], pair.first, room)
        return source + first + cut(self._prefixes[2], pair.second, room)
