"""`alphaspin export --push`: a folder as a model repository of the Hugging Face Hub.

Endpoint, token and cache are those of `huggingface_hub`: HF_ENDPOINT, HF_TOKEN or `hf auth login`.
"""

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, ModelCard

from alphaspin.errors import InputError

REPLACED = ["*.safetensors", "*.json", "*.jinja"]
"""Files of an earlier push, which would be taken for parts of this one: merged weights beside an
adapter, for instance, which transformers then loads on top of them."""

HINTS = {
    401: "log in with `hf auth login`, or set HF_TOKEN to a token that is valid and may write",
    403: "this token may not write there: take one that may, or a name of your own",
    404: "there is no such repository that this token sees",
    409: "somebody else is changing it: give the command again",
    429: "too many requests: wait, and give the command again",
}


def create(name: str, private: bool) -> str:
    """Make a repository where there is none; returns its id, `user/name`.

    Before anything is computed, so that a token that will not do is told of at once.

    Raises:
        InputError: no token, no right to write; or it is public, and was to be private.
    """
    api = HfApi(token=True)
    with _in_one_line(name):
        # None leaves it to the organisation's own default.
        repository = api.create_repo(name, private=private or None, exist_ok=True).repo_id
        if private and not api.repo_info(repository).private:
            raise InputError(
                f"push = {name}: is there already and public, and `private` does not change that: "
                "take another name, or change it on the hub"
            )
    return repository


def upload(repository: str, folder: Path, message: str) -> str:
    """One commit of a folder (several, where it is very large); returns its address.

    Raises:
        InputError: what the hub, or the way to it, said.
    """
    with _in_one_line(repository):
        done = HfApi(token=True).upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=message,
            delete_patterns=REPLACED,
        )
    return done.commit_url


@contextmanager
def _in_one_line(name: str) -> Generator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of the hub, of httpx, of xet, of threads: they share no class
        raise InputError(f"push = {name}: {_said(error)}") from error


def _said(error: BaseException) -> str:
    """What came back, and what helps."""
    cause = error
    while getattr(cause, "response", None) is None and cause.__cause__:
        cause = cause.__cause__
    if getattr(cause, "response", None) is None:
        return " ".join(str(cause).split()) or repr(cause)
    status = int(getattr(cause, "response").status_code)  # noqa: B009
    server = " ".join(str(getattr(cause, "server_message", None) or "").split())
    hint = HINTS.get(status, "give the command again later" if status >= 500 else "")
    around = "" if cause is error else f"{' '.join(str(error).split())} "
    said = f"{around}the hub answered {status}"
    return said + f" ({server})" * bool(server) + f"; {hint}" * bool(hint)


def license_of(base: str) -> dict[str, str]:
    """`license`, and `license_name` and `license_link` of an own one, from a base's card.

    Nothing where there is no card, it names none, or it cannot be had.

    Args:
        base: a folder or the id of a repository.
    """
    card = Path(base) / "README.md"
    try:
        data = ModelCard.load(card if Path(base).exists() else base, ignore_metadata_errors=True)
        found = data.data.to_dict()
    except Exception:  # as above; a card may be anything
        return {}
    if not re.fullmatch(r"[\w.+-]{1,50}", kind := str(found.get("license") or "")):
        return {}
    own = {key: str(found[key]) for key in ("license_name", "license_link") if found.get(key)}
    link = own.get("license_link", "")
    if link and "://" not in link:  # a file beside the card
        if Path(base).exists():
            del own["license_link"]
        else:
            own["license_link"] = f"{HfApi().endpoint}/{base}/blob/main/{link}"
    return {"license": kind, **own}
