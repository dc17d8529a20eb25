"""Small models, tokenizers and data that the tests make for themselves."""

import json
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import AutoConfig

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

FAMILIES = ("llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3")


def make_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 300 tokens, chat specials, and eos `<|end|>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer.train_from_iterator(
        ["what is the largest number", "the answer is yes", "add 12 and 34"],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>"
    )
    fast.chat_template = template
    return fast


def make_model(family: str = "llama", *, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random 2-layer model of a family, fp32; weights large enough to be far from uniform."""
    settings: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "initializer_range": 0.15,
        "tie_word_embeddings": family.startswith("gemma"),
    }
    if family in {"mistral", "gemma2", "gemma3_text"}:
        settings["sliding_window"] = 6
    if family in {"qwen2", "qwen3"}:
        settings |= {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    if family.startswith("gemma"):
        settings["query_pre_attn_scalar"] = 8
    config = AutoConfig.for_model(family, **(settings | changes))
    config._attn_implementation = "eager" if family == "gemma2" else "sdpa"
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def save_model(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A model folder with tokenizer."""
    make_model(family, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def arithmetic(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Demonstrations with checkable answers, all prompts different."""
    random = np.random.default_rng(seed)
    pairs = random.permutation(90 * 90)[:count]
    return [
        {"prompt": f"add {p // 90} and {p % 90}", "completion": f"it is {p // 90 + p % 90}"}
        for p in pairs
    ]


def tokens(random: np.random.Generator, low: int, high: int) -> np.ndarray:
    """Random token ids of random length."""
    return random.integers(5, 300, random.integers(low, high + 1)).astype(np.int32)


@contextmanager
def http_servers() -> Generator[Callable[..., tuple[str, list[dict[str, Any]]]]]:
    """`start(respond)` gives a server's address and the list of what it was asked.

    respond(path, body, number of the request) gives status, content and further headers; with
    `serial`, requests wait for one another.
    """
    servers: list[ThreadingHTTPServer] = []

    def start(
        respond: Callable[[str, dict[str, Any], int], tuple[int, bytes, dict[str, str]]],
        serial: bool = False,
    ) -> tuple[str, list[dict[str, Any]]]:
        requests: list[dict[str, Any]] = []
        recording, turn = threading.Lock(), threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with turn if serial else nullcontext():
                    with recording:
                        requests.append({**body, "path": self.path, "headers": dict(self.headers)})
                        number = len(requests)
                    status, content, headers = respond(self.path, body, number)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}/v1", requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def painted(title: str, paint: Callable[[Any], None], *, polar: bool = False) -> Any:
    """In place of `plots.draw`: all of it but the strokes of the SVG, a sixth of a small run."""
    from markupsafe import Markup
    from matplotlib.figure import Figure

    paint(Figure().add_axes((0, 0, 1, 1), polar=polar))
    return Markup('<svg role="img" aria-label="{}"></svg>').format(title)


def overridden(words: Sequence[str], later: Sequence[str]) -> list[str]:
    """Options, without those that are given again later: an option may stand once."""
    again = {word.split("=")[0] for word in later}
    return [*(word for word in words if word.split("=")[0] not in again), *later]


def one_iteration(model: Path, data: Path, output: Path, *, evaluated: int) -> dict[str, Any]:
    """Settings of a run of one step on six prompts, for what is about the files it leaves."""
    return {
        "model": str(model),
        "data": str(data),
        "output": str(output),
        "text": {"max_response_tokens": 10},
        "selfplay": {"iterations": 1, "prompts": 6},
        "lora": {"r": 2},
        "train": {"batch_size": 6, "lr": 1e-2},
        "evaluate": {"prompts": evaluated},
    }
