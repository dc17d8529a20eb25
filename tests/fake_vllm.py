"""A vLLM that is none, for tests: `install` makes a package of it, which a run then starts.

It answers as vLLM's server does, at a socket, and has the troubles that the file FAULTS beside it
lists, each once: `die N` (before the Nth answer), `hang N`, `exit` (at its start). With adapters it
needs the folder; answers are a function of the request; log-probs are told as 0 a token where
FAULTS has a line `tell`. What happens is written, a word a line, to EVENTS.
"""

import json
import os
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

HERE = Path(os.environ.get("FAKE_VLLM", "."))
ANSWERS, COUNTING = [0], threading.Lock()


def happened(word: str) -> None:
    with (HERE / "EVENTS").open("a") as file:
        file.write(f"{word} {os.getpid()}\n")


def fault(line: str) -> bool:
    """Whether a fault is due; it then is no more."""
    file = HERE / "FAULTS"
    lines = file.read_text().splitlines() if file.exists() else []
    if line in lines and line != "tell":
        lines.remove(line)
        file.write_text("\n".join(lines))
        return True
    return line in lines


class Handler(BaseHTTPRequestHandler):
    def reply(self, status: int, content: object) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        self.reply(200, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        if self.path.endswith("/load_lora_adapter"):
            happened(body["lora_name"])
            there = (Path(body["lora_path"]) / "adapter_config.json").is_file()
            return self.reply(200 if there else 404, {})
        if not self.path.endswith("/completions"):
            happened(self.path)
            return self.reply(200, {})
        if self.path.endswith("/chat/completions"):
            question = body["messages"][-1]["content"]
            first, second = (question.split(f"<answer_{x}>")[1].split("<")[0] for x in "AB")
            return self.reply(
                200, {"choices": [{"message": {"content": "[[A]]" if first < second else "[[B]]"}}]}
            )
        with COUNTING:
            ANSWERS[0] += 1
            number = ANSWERS[0]
        if fault(f"die {number}"):
            print("RuntimeError: the fake broke", flush=True)
            os._exit(7)
        if fault(f"hang {number}"):
            time.sleep(1000)
        seed = body["seed"] + len(body["model"])
        ids = [5 + (seed + k) % 290 for k in range(1 + seed % body["max_tokens"])]
        if len(ids) < body["max_tokens"]:
            ids.append(body["stop_token_ids"][0])
        whole = ids[-1] in body["stop_token_ids"]
        choice = {"token_ids": ids, "finish_reason": "stop" if whole else "length"}
        if "logprobs" in body and fault("tell"):
            choice["logprobs"] = {"token_logprobs": [0.0] * len(ids)}
        self.reply(200, {"choices": [choice]})

    def log_message(self, format: str, *args: object) -> None:
        pass

    def address_string(self) -> str:
        return ""


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128


def install(folder: Path) -> Path:
    """A folder for PYTHONPATH, with a package `vllm` whose server is this file."""
    package = folder / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for parent in (package, package.parent, package.parent.parent):
        (parent / "__init__.py").touch()
    (package / "api_server.py").write_text(Path(__file__).read_text())
    registry = folder / "vllm" / "model_executor" / "models"
    registry.mkdir(parents=True)
    (registry / "registry.py").write_text('"LlamaForCausalLM": ("llama", "LlamaForCausalLM"),\n')
    return folder


if __name__ == "__main__":
    happened("start " + " ".join(sys.argv[1:]))
    if fault("exit"):
        sys.exit("ValueError: no memory for the fake")
    # What vLLM is made of: a child that would outlive it.
    if os.fork() == 0:
        os.setsid()
        happened("child")
        time.sleep(1000)
    with Server(sys.argv[sys.argv.index("--uds") + 1], Handler) as server:
        server.serve_forever()
