"""`emotion-launch push`: a published adapter to a model repository of the Hugging Face hub, by the
hub's own client.

It uploads the adapter with its card. The report and the predictions, which hold texts of posts,
are not uploaded, and neither is any path of the machine that trained.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from emotion_train.console import counted
from emotion_train.edges import hub
from emotion_train.edges.bounded import Unreadable, object_file, yaml_in
from emotion_train.errors import EmotionTrainError, StorageError, WrongRequest
from emotion_train.model.card import header_yaml
from emotion_train.model.facts import FACTS
from emotion_train.runs.published import download

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_CARD = "README.md"
_REPORT = "report"
_LOCAL = ("output_url", "data_url")  # of the facts: folders of the machine that trained
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
_CREATE_S, _WAIT_S = 30.0, 600.0  # beyond the time of any answer


def run(
    run_url: str,
    hub_id: str,
    *,
    public: bool = False,
    licence: str | None = None,
    dry_run: bool = False,
    environment: Mapping[str, str] = os.environ,
) -> int:
    """Uploads all files in one commit and returns 0. A new repository is private unless `public`;
    `dry_run` only lists the files.

    Raises `WrongRequest` for a name that the hub does not allow, without a token and when the hub
    refuses, and `StorageError` when the hub cannot be reached.
    """
    if not _HUB_ID.fullmatch(hub_id) or "--" in hub_id or ".." in hub_id:
        raise WrongRequest(
            f"{hub_id!r} does not name a repository; give OWNER/NAME, such as my-team/emotions-24b."
        )
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise WrongRequest(
            f"--license is {licence!r}; give the hub's short name of a licence, such as apache-2.0."
        )
    token = next((environment[name] for name in TOKENS if environment.get(name)), None)
    if token is None and not dry_run:
        raise WrongRequest(
            "HF_TOKEN is not set: put a token of https://huggingface.co/settings/tokens that may write to"
            f" {hub_id.partition('/')[0]} into that variable, or list the files with --dry-run."
        )
    with tempfile.TemporaryDirectory(prefix="emotion-launch-push-") as name:
        folder = Path(name) / "adapter"
        download(run_url, folder)
        files = _ready(folder, licence)
        for path in files:
            print(f"{path.stat().st_size:>13,}  {path.relative_to(folder).as_posix()}")
        total = sum(path.stat().st_size for path in files)
        kind = "public" if public else "private"
        size = f"{counted(len(files), 'file')}, {total / 2**20:.1f} MiB"
        if dry_run:
            print(f"{size}, would go to {hub_id} ({kind} if it is new)")
            return 0
        assert token is not None
        url = _upload(
            folder, files, hub_id, token, public=public, message=f"Adapter of {run_url_name(run_url)}"
        )
    print(f"{size}: {url} ({kind} if it was new)")
    return 0


def run_url_name(run_url: str) -> str:
    """The run's id, without where it is stored."""
    return f"run {run_url.rstrip('/').rpartition('/')[2]}"


def _ready(folder: Path, licence: str | None) -> list[Path]:
    """The files to upload, in the order of their names, without local paths and with the
    licence.
    """
    facts = folder / FACTS
    values = object_file(facts)
    facts.write_text(
        json.dumps({name: None if name in _LOCAL else value for name, value in values.items()}, indent=2)
        + "\n",
        encoding="utf-8",
    )
    if licence is not None:
        card = folder / _CARD
        card.write_text(_with_licence(card.read_text(encoding="utf-8"), licence), encoding="utf-8")
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] != _REPORT
    )


def _with_licence(card: str, licence: str) -> str:
    """The card with this licence in its header, in place of an earlier one."""
    _, header, rest = card.split("---\n", 2)
    try:
        fields = yaml_in(header)
    except Unreadable as error:
        raise WrongRequest(f"The card of the adapter has a header that cannot be read: {error}.") from None
    return f"---\n{header_yaml({**fields, 'license': licence})}---\n{rest}"


def _upload(folder: Path, files: list[Path], hub_id: str, token: str, *, public: bool, message: str) -> str:
    """The address of the commit."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined,unused-ignore]

    disable_progress_bars()  # they would repeat what is printed here
    if hub.is_offline():
        raise WrongRequest("HF_HUB_OFFLINE forbids requests to the hub; unset it to push.")
    api = HfApi(endpoint=hub.endpoint(), token=token)
    adds = [CommitOperationAdd(path.relative_to(folder).as_posix(), str(path)) for path in files]

    def create() -> None:
        api.create_repo(hub_id, private=not public, exist_ok=True)

    def commit() -> str:
        made = api.create_commit(hub_id, adds, commit_message=message)
        return str(made.commit_url)

    with _in_a_sentence(hub_id):
        hub.ask(create, _CREATE_S)
        return hub.ask(commit, _WAIT_S + sum(path.stat().st_size for path in files) / 2**20)


@contextmanager
def _in_a_sentence(hub_id: str) -> Iterator[None]:
    """Turns errors of the hub and its client into errors of this program, which never show the
    token.
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except hub.HubAway as away:
        raise StorageError(
            f"The Hugging Face hub at {hub.endpoint()} cannot be reached ({away}); nothing was pushed. Check"
            " the network and HF_ENDPOINT, and type the same command again.",
            transient=True,
        ) from None
    except HFValidationError as error:
        raise WrongRequest(f"{hub_id} does not name a repository ({error}); give OWNER/NAME.") from None
    except HfHubHTTPError as error:
        raise _of_status(hub_id, error) from None
    except RuntimeError as error:  # the upload of a large file failed, with the reason as its cause
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _of_status(hub_id, error.__cause__) from None
        raise StorageError(
            f"The upload to {hub_id} failed ({' '.join(str(error.__cause__ or error).split())[:200]});"
            " nothing was pushed. Type the same command again.",
            transient=True,
        ) from None
    except ValueError as error:  # the hub found the card's header wrong
        raise WrongRequest(f"The hub refused the card: {' '.join(str(error).split())[:300]}") from None


def _of_status(hub_id: str, error: HfHubHTTPError) -> EmotionTrainError:
    """The error of this program for the status that the hub answered."""
    status = int(getattr(error.response, "status_code", 0) or 0)
    if status in (401, 403, 404):
        return WrongRequest(
            f"The Hugging Face hub answered {status} for {hub_id}: the token in HF_TOKEN is not valid or may"
            " not write there; give one with write permission, or another OWNER/NAME."
        )
    reason = " ".join(str(getattr(error, "server_message", None) or error).split())[:200]
    if 400 <= status < 500 and status != 429:
        return WrongRequest(f"The Hugging Face hub refused {hub_id} ({status}: {reason}).")
    return StorageError(
        f"The Hugging Face hub answered {status} for {hub_id} ({reason}); nothing was pushed. Try again"
        " later.",
        transient=True,
    )
