"""`alphaspin export --push` against a hub of our own, by LFS and by xet, and the card it sends."""

import base64
import hashlib
import json
import sys
import threading
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml
from helpers import arithmetic, one_iteration, save_model, write_rows
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import _http

from alphaspin import cli
from alphaspin.api import export
from alphaspin.commands import exporting, hub, job
from alphaspin.commands.played import Played
from alphaspin.config import Config
from alphaspin.errors import InputError

TOKEN = "hf_of-a-test"

# huggingface_hub uploads by LFS with an argument that its HTTP client has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class Hub:
    """What of the hub's API `create_repo` and `upload_folder` use, and what it was sent.

    files: of the repository, by name. commits: their messages. answers: statuses to give, by what
    the path of a request ends with.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.answers: dict[str, int] = {}
        self.blobs: dict[str, bytes] = {}
        self.xorbs: list[bytes] = []
        self.tokens: set[str | None] = set()
        self.public = True
        self.exists = False
        self.address = ""

    def respond(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        path = path.partition("?")[0]
        for end, status in self.answers.items():
            if path.endswith(end):
                return status, {"error": "because of the test"}
        match [method, *path.strip("/").split("/")]:
            case ["POST", "api", "repos", "create"]:
                asked = json.loads(body)
                if not self.exists:
                    self.public = asked.get("visibility") != "private"
                self.created.append(asked)
                return (409 if self.exists else 200), {"url": f"{self.address}/me/{asked['name']}"}
            case ["GET", "api", "models", "me", _]:
                return 200, {"id": "me/mine", "private": not self.public, "sha": "0" * 40}
            case ["GET", "api", "models", "me", _, "tree", "main"]:
                entries = [
                    {"type": "file", "path": name, "size": len(content), "oid": "0" * 40}
                    for name, content in self.files.items()
                ]
                return 200, entries
            case ["POST", "api", "validate-yaml"]:
                sent = json.loads(body)["content"]
                yaml.safe_load(sent.split("---\n")[1])
                return 200, {"errors": [], "warnings": []}
            case ["POST", "api", "models", "me", _, "preupload", "main"]:
                return 200, {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if "safetensors" in file["path"] else "regular",
                            "shouldIgnore": False,
                        }
                        for file in json.loads(body)["files"]
                    ]
                }
            case ["GET", "api", "models", "me", _, "xet-write-token", "main"]:
                return 200, {"casUrl": self.address, "exp": 4102444800, "accessToken": "xet"}
            case ["POST", "v1", "xorbs", *_]:
                self.xorbs.append(body)
                return 200, {"was_inserted": True}
            case ["POST", "v1", "shards", *_]:
                return 200, {"result": 1}
            case ["POST", _, _, "info", "lfs", "objects", "batch"]:
                return 200, {
                    "objects": [
                        {**one, "actions": {"upload": {"href": f"{self.address}/lfs/{one['oid']}"}}}
                        for one in json.loads(body)["objects"]
                    ]
                }
            case ["PUT", "lfs", oid]:
                self.blobs[oid] = body
                return 200, {}
            case ["POST", "api", "models", "me", name, "commit", "main"]:
                for line in map(json.loads, body.splitlines()):
                    self.take(line["key"], line["value"])
                return 200, {
                    "commitUrl": f"{self.address}/me/{name}/commit/1",
                    "commitOid": "1" * 40,
                }
        return 404, {"error": f"no {method} {path} here"}

    def take(self, key: str, value: dict[str, Any]) -> None:
        if key == "header":
            self.commits.append(value["summary"])
        elif key == "file":
            self.files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            self.files[value["path"]] = value["oid"].encode()
        else:
            assert key == "deletedFile"
            del self.files[value["path"]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Generator[Hub]:
    """A hub at an address of this machine, to which `huggingface_hub` turns."""
    it = Hub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path.startswith(("/api/models", "/api/repos", "/me")):
                it.tokens.add(self.headers.get("Authorization"))
            status, content = it.respond(self.command, self.path, body)
            sent = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    it.address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("HF_ENDPOINT", it.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", it.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(_http.time, "sleep", lambda _: None)  # between its tries
    yield it
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("secret-place")
    save_model(folder / "base")
    (folder / "base/README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    write_rows(folder / "rows.jsonl", arithmetic(20))
    settings = one_iteration(folder / "base", folder / "rows.jsonl", folder / "run", evaluated=2)
    job.run(Config.model_validate(settings))
    return folder / "run"


@pytest.fixture
def alphaspin(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str | Path) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["alphaspin", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, (printed.out + printed.err).splitlines()

    return call


@pytest.mark.parametrize("xet", [False, True])
def test_a_policy_is_pushed(
    run: Path, fake: Hub, alphaspin: Any, monkeypatch: pytest.MonkeyPatch, xet: bool
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", not xet)
    code, printed = alphaspin("export", run, "--push=me/mine")
    assert code == 0, printed
    assert f"{fake.address}/me/mine/commit/1" in " ".join(printed)
    assert fake.created == [{"name": "mine", "organization": "me"}], "public, as the hub has it"
    assert fake.tokens == {f"Bearer {TOKEN}"} and fake.commits == ["Iteration 0 of run"]
    adapter = (run / "iterations/0/adapter/adapter_model.safetensors").read_bytes()
    digest = hashlib.sha256(adapter).hexdigest()
    assert fake.files["adapter_model.safetensors"] == digest.encode()
    if xet:
        assert sum(map(len, fake.xorbs)) > len(adapter) // 2 and not fake.blobs
    else:
        assert fake.blobs == {digest: adapter}
    assert {"README.md", "adapter_config.json", "tokenizer.json"} <= set(fake.files)
    for name, content in {**fake.files, **fake.blobs}.items():
        assert b"secret-place" not in content and TOKEN.encode() not in content, name
    card = ModelCard(fake.files["README.md"].decode())
    assert card.data.to_dict() == {
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["alphaspin", "self-play", "spin", "lora"],
    }, "base and data are not on the hub"
    assert "PeftModel.from_pretrained(base, 'me/mine')" in card.text
    assert "--lora-modules mine=me/mine" in card.text


def test_another_push_takes_the_place_of_the_first(run: Path, fake: Hub, tmp_path: Path) -> None:
    """An adapter's configuration beside merged weights would be applied to them once more."""
    fake.files["notes.md"] = b"of the owner"
    assert export(run, push="mine", private=True) is None
    assert fake.created[-1]["visibility"] == "private" and "adapter_config.json" in fake.files
    fake.exists = True
    assert export(run, tmp_path / "out", push="mine", private=True, merge=True, license="mit")
    assert (tmp_path / "out/model.safetensors").is_file()
    names = {name for name in fake.files if "safetensors" in name or name.startswith("adapter")}
    assert names == {"model.safetensors"} and fake.files["notes.md"] == b"of the owner"
    assert len(fake.commits) == 2
    card = ModelCard(fake.files["README.md"].decode())
    assert card.data.license == "mit" and "License: mit." in card.text
    assert "from_pretrained('me/mine')" in card.text and "lora" not in card.data.tags


@pytest.mark.parametrize(
    ("end", "status", "says"),
    [
        ("/create", 401, "the hub answered 401 (because of the test); log in with `hf auth login`"),
        ("/create", 403, "the hub answered 403 (because of the test); this token may not write"),
        ("/create", 500, "the hub answered 500 (because of the test); give the command again"),
        ("/preupload/main", 403, "the hub answered 403"),
        ("/commit/main", 409, "somebody else is changing it"),
        ("/commit/main", 500, "give the command again later"),
        ("/batch", 500, "the hub answered 500"),
        ("/validate-yaml", 400, "Invalid metadata in README.md"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(
    run: Path, fake: Hub, alphaspin: Any, tmp_path: Path, end: str, status: int, says: str
) -> None:
    fake.answers[end] = status
    if end == "/create":
        fake.answers["/me/mine"] = 404
    code, printed = alphaspin("export", run, "--push=me/mine", f"--to={tmp_path / 'out'}")
    (line,) = [line for line in printed if "push = me/mine" in line]
    assert code == 2 and says in line and "Traceback" not in "".join(printed)
    assert TOKEN not in "".join(printed) and not fake.commits
    whole = f"{tmp_path / 'out'} is whole: hf upload me/mine {tmp_path / 'out'}"
    assert (whole in line) is (tmp_path / "out").exists() is (end != "/create")


def test_what_is_refused_before_anything_is_sent(
    run: Path, fake: Hub, alphaspin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, says in {
        ("--push=a/b/c",): "push = 'a/b/c': is no name of a repository",
        ("--push=me/-x-",): "is no name of a repository",
        ("--merge",): "say where to: --to FOLDER, --push NAME, or both",
        ("--to=x", "--private"): "private has no effect without push",
        ("--push=me/mine", "--license=my own"): "license",
    }.items():
        code, printed = alphaspin("export", run, *options)
        assert code == 2 and says in " ".join(printed), printed
    monkeypatch.delenv("HF_TOKEN")
    code, printed = alphaspin("export", run, "--push=me/mine")
    assert code == 2 and "push = me/mine: Token is required" in " ".join(printed), printed
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fake.exists = True
    with pytest.raises(InputError, match="is there already and public"):
        export(run, push="me/mine", private=True)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(InputError, match=r"push = me/mine: .*refused"):
        export(run, push="me/mine")
    assert not fake.files


def test_the_card_of_a_base_and_data_of_the_hub(run: Path) -> None:
    played = Played.open(run)
    changes = {"model": "someone/base-7b", "data": "someone/set:main"}
    played = Played(run, played.config.model_copy(update=changes), played.manifest)
    policy = played.policies()[1]
    card = ModelCard(exporting._card(played, policy, "me/mine", False, "an adapter"))
    assert card.data.base_model == "someone/base-7b"
    assert card.data["base_model_relation"] == "adapter" and card.data.datasets == "someone/set"
    card = ModelCard(exporting._card(played, policy, "me/mine", True, "weights"))
    assert card.data["base_model_relation"] == "finetune"


@pytest.mark.parametrize(
    ("front", "found"),
    [
        ("license: mit", {"license": "mit"}),
        ("license: [mit, gpl]", {}),
        ("language: en", {}),
        ("license: '{{ x }}'", {}),
        (
            "license: other\nlicense_name: own\nlicense_link: https://a.b/c",
            {"license": "other", "license_name": "own", "license_link": "https://a.b/c"},
        ),
        (
            "license: other\nlicense_name: own\nlicense_link: LICENSE",
            {"license": "other", "license_name": "own"},
        ),
        ("model-index: 3", {}),
    ],
)
def test_the_license_of_a_base(tmp_path: Path, front: str, found: dict[str, str]) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A base\n")
    assert hub.license_of(str(tmp_path)) == found
    (tmp_path / "README.md").unlink()
    assert hub.license_of(str(tmp_path)) == {}


def test_the_license_of_a_base_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n"
    monkeypatch.setattr(ModelCard, "load", lambda *_, **__: ModelCard(text))
    link = f"{HfApi().endpoint}/someone/base-7b/blob/main/LICENSE"
    wanted = {"license": "other", "license_name": "own", "license_link": link}
    assert hub.license_of("someone/base-7b") == wanted
