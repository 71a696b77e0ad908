"""The shipped AWS policies: what a run asks of its bucket is what its role may do, and the role may
do nothing else.

The requests are those on the wire, boto3's and obstore's alike, seen by a proxy before a real S3
server. IAM's rules are simulated as far as the policies use them:
https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_policies_evaluation-logic.html
"""

from __future__ import annotations

import copy
import fnmatch
import json
from collections.abc import Iterable, Iterator
from email.message import Message
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import boto3
import pytest

import launch
from emotion_train import cli as train_cli
from emotion_train.data.index import read_index
from emotion_train.model.staged_copy import stage
from emotion_train.preparation.steps import prepare
from emotion_train.runs.log import Writer
from emotion_train.storage.local_s3 import LocalS3
from emotion_train.storage.open import open_store
from launch import cli as launch_cli
from tests.helpers.fault_proxy import FaultProxy
from tests.helpers.once import once
from tests.helpers.tiny_models import causal_checkpoint
from tests.helpers.tiny_runs import tiny_words, write_posts

POLICIES = Path(launch.__file__).parent / "policies"


class Request(NamedTuple):
    """One request as IAM sees it; `conditions` holds the keys that the policies speak of, where the
    request has them.
    """

    action: str
    resource: str
    conditions: tuple[tuple[str, str], ...] = ()


class RecordingProxy(FaultProxy):
    """A proxy that spoils nothing and remembers everything."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.seen: list[Request] = []

    def passes(self, method: str, path: str, headers: Message) -> None:
        self.seen.append(
            as_iam_sees_it(method, path, {name.lower(): value for name, value in headers.items()})
        )


def as_iam_sees_it(method: str, path: str, headers: dict[str, str]) -> Request:
    """https://docs.aws.amazon.com/AmazonS3/latest/API/API_Operations.html: which right each
    operation takes.
    """
    split = urlsplit(path)
    query = parse_qs(split.query, keep_blank_values=True)
    bucket, _, key = unquote(split.path).lstrip("/").partition("/")
    if not key:
        assert method in ("GET", "HEAD"), (method, path)
        if "uploads" in query:  # which knows no key s3:prefix
            return Request("s3:ListBucketMultipartUploads", f"arn:aws:s3:::{bucket}")
        listed = (("s3:prefix", query["prefix"][0]),) if "prefix" in query else ()
        return Request("s3:ListBucket", f"arn:aws:s3:::{bucket}", listed)
    verb = {"GET": "Get", "HEAD": "Get", "PUT": "Put", "POST": "Put", "DELETE": "Delete"}[method]
    action = f"s3:{verb}Object"
    if method == "DELETE" and "uploadId" in query:
        action = "s3:AbortMultipartUpload"
    condition = (("s3:if-none-match", headers["if-none-match"]),) if "if-none-match" in headers else ()
    return Request(action, f"arn:aws:s3:::{bucket}/{key}", condition)


def allowed(policy: dict[str, Any], request: Request) -> bool:
    return any(
        statement["Effect"] == "Allow" and applies(statement, request) for statement in policy["Statement"]
    )


def denied(policy: dict[str, Any], request: Request) -> bool:
    return any(
        statement["Effect"] == "Deny" and applies(statement, request) for statement in policy["Statement"]
    )


def applies(statement: dict[str, Any], request: Request) -> bool:
    facts = dict(request.conditions)
    return (
        any(fnmatch.fnmatchcase(request.action, pattern) for pattern in as_list(statement["Action"]))
        and any(fnmatch.fnmatchcase(request.resource, pattern) for pattern in as_list(statement["Resource"]))
        and all(
            holds(operator, key, wanted, facts)
            for operator, pairs in statement.get("Condition", {}).items()
            for key, wanted in pairs.items()
        )
    )


def holds(operator: str, key: str, wanted: str | list[str], facts: dict[str, str]) -> bool:
    if operator == "Null":
        return (key not in facts) == (wanted == "true")
    if operator == "Bool":
        return facts.get(key) == wanted
    if operator == "StringLikeIfExists":
        return key not in facts or any(fnmatch.fnmatchcase(facts[key], one) for one in as_list(wanted))
    raise AssertionError(f"the simulation does not know {operator}")


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def read(name: str) -> dict[str, Any]:
    return dict(json.loads((POLICIES / name).read_text()))


@pytest.fixture(scope="module")
def requests(s3: LocalS3, tmp_path_factory: pytest.TempPathFactory) -> list[Request]:
    """What two starts of a run ask of the bucket: data set in s3://team/emotions, staged base in
    s3://team/bases, output in s3://team/runs.
    """
    folder = tmp_path_factory.mktemp("run")
    return list(once(tmp_path_factory, "policy-requests", lambda: _requests_of_a_run(s3, folder)))


def _requests_of_a_run(s3: LocalS3, folder: Path) -> list[Request]:
    s3.create_bucket("team")
    prepare(str(write_posts(folder / "source")), "s3://team/emotions")
    causal_checkpoint(folder / "base", "llama")
    stage(str(folder / "base"), "s3://team/bases/tiny")
    leave_an_upload("s3://team/runs", "tiny", read_index(open_store("s3://team/emotions")).sha256())
    urls = (
        "data.url=s3://team/emotions",
        "model.base=s3://team/bases/tiny",
        "model.precision=bf16",
        "run.output_url=s3://team/runs",
    )
    # checkpoints enough that some are removed
    often = ("train.epochs=1", "evaluation.every_steps=1")
    words = tiny_words(folder, *urls, *often, "preemption.notices=none")
    with RecordingProxy(s3.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        patch.setenv("ACCELERATE_USE_CPU", "true")
        for _ in range(2):
            assert train_cli.main(["train", *words]) == 0
    return proxy.seen


def leave_an_upload(url: str, run_id: str, index_sha256: str) -> None:
    """What a start leaves that is killed while it uploads a large part."""
    store = open_store(url)
    claim = Writer(store, run_id, index_sha256, "0" * 64)
    claim.claim(0, 0)
    key = store.url_of(f"{run_id}/data/{claim.incarnation:08d}/step-00000001/part").removeprefix("s3://")
    bucket, _, name = key.partition("/")
    boto3.Session().client("s3").create_multipart_upload(Bucket=bucket, Key=name)


def test_the_role_may_do_what_a_run_does(requests: list[Request]) -> None:
    policy = read("run_role.json")
    assert {request.action for request in requests} == {
        "s3:ListBucket",
        "s3:GetObject",
        "s3:PutObject",
        "s3:DeleteObject",
        "s3:ListBucketMultipartUploads",
        "s3:AbortMultipartUpload",
    }
    assert [request for request in requests if not allowed(policy, request)] == []


def test_the_role_may_do_nothing_that_a_run_does_not_do(requests: list[Request]) -> None:
    """Without any one action on any one resource, some request of the run would fail; nothing is
    granted on another prefix or bucket.
    """
    policy = read("run_role.json")
    for smaller, left_out in with_one_grant_less(policy):
        assert any(not allowed(smaller, request) for request in requests), (
            f"{left_out} is granted and not needed"
        )
    for resource in ("team/other/key", "team/emotionsX", "other/runs/a/log/00000000.json"):
        for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject"):
            assert not allowed(policy, Request(action, f"arn:aws:s3:::{resource}"))
    for source in ("team/emotions/index.json", "team/bases/tiny/index.json"):
        assert not allowed(policy, Request("s3:PutObject", f"arn:aws:s3:::{source}"))
    assert not allowed(policy, Request("s3:DeleteObject", "arn:aws:s3:::team/runs/a/log/00000000.json"))
    assert not allowed(policy, Request("s3:ListBucket", "arn:aws:s3:::team", (("s3:prefix", "other/"),)))


@pytest.fixture(scope="module")
def label_requests(
    s3: LocalS3, requests: list[Request], tmp_path_factory: pytest.TempPathFactory
) -> list[Request]:
    """What two workers ask of the bucket, one that labels and one that comes too late: posts in
    s3://team/posts, the run of `requests`, labels into s3://team/labels.
    """
    store = open_store("s3://team/posts")
    store.write("posts.csv", (write_posts(tmp_path_factory.mktemp("posts")) / "test.csv").read_bytes())
    words = ["label", "s3://team/posts", "s3://team/labels/first", "--adapter", "s3://team/runs/tiny"]
    with RecordingProxy(s3.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        for _ in range(2):
            assert train_cli.main([*words, "--device", "cpu", "--notices", "none"]) == 0
        assert launch_cli.main(["label-status", "s3://team/labels/first"]) == 0
    return proxy.seen


@pytest.mark.slow  # two workers label with a model
def test_the_label_role_may_do_what_workers_do_and_nothing_else(label_requests: list[Request]) -> None:
    policy = read("label_role.json")
    assert {request.action for request in label_requests} == {"s3:ListBucket", "s3:GetObject", "s3:PutObject"}
    assert [request for request in label_requests if not allowed(policy, request)] == []
    for smaller, left_out in with_one_grant_less(policy):
        assert any(not allowed(smaller, request) for request in label_requests), (
            f"{left_out} is granted and not needed"
        )
    part = "arn:aws:s3:::team/labels/first/part-00000000.parquet"
    assert not allowed(policy, Request("s3:PutObject", part))  # which would rewrite it
    assert allowed(policy, Request("s3:PutObject", part, (("s3:if-none-match", "*"),)))
    assert not allowed(policy, Request("s3:DeleteObject", part))
    for other in ("team/posts/posts.csv", "team/runs/a/log/00000000.json"):
        create = Request("s3:PutObject", f"arn:aws:s3:::{other}", (("s3:if-none-match", "*"),))
        assert not allowed(policy, create)


def with_one_grant_less(policy: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for at, statement in enumerate(policy["Statement"]):
        for field in ("Action", "Resource"):
            for one in as_list(statement[field]):
                smaller = copy.deepcopy(policy)
                smaller["Statement"][at][field] = [
                    other for other in as_list(statement[field]) if other != one
                ]
                yield smaller, f"{statement['Sid']}: {one}"


def test_the_bucket_denies_nothing_that_a_run_does_over_https(requests: list[Request]) -> None:
    policy = read("bucket.json")
    secure = [
        request._replace(conditions=(*request.conditions, ("aws:SecureTransport", "true")))
        for request in requests
    ]
    assert [request for request in secure if denied(policy, request)] == []
    assert any("/log/" in request.resource and request.action == "s3:PutObject" for request in requests)


def test_the_bucket_denies_what_would_rewrite_the_log_and_plain_http() -> None:
    policy = read("bucket.json")
    entry = "arn:aws:s3:::team/runs/a/log/00000000.json"
    assert denied(policy, Request("s3:PutObject", entry))
    assert not denied(policy, Request("s3:PutObject", entry, (("s3:if-none-match", "*"),)))
    assert denied(policy, Request("s3:DeleteObject", entry))
    assert denied(
        policy,
        Request("s3:GetObject", "arn:aws:s3:::team/emotions/index.json", (("aws:SecureTransport", "false"),)),
    )
    assert denied(policy, Request("s3:ListBucket", "arn:aws:s3:::team", (("aws:SecureTransport", "false"),)))


def test_a_server_takes_the_lifecycle_rule(s3: LocalS3, own_bucket_url: str) -> None:
    rule = read("lifecycle.json")
    client, name = boto3.Session().client("s3"), own_bucket_url.removeprefix("s3://")
    client.put_bucket_lifecycle_configuration(Bucket=name, LifecycleConfiguration=rule)
    kept = client.get_bucket_lifecycle_configuration(Bucket=name)["Rules"]
    assert [one["Status"] for one in kept] == ["Enabled"]
    assert rule["Rules"][0]["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] <= 7


def test_policies_hold_no_account_and_are_shipped() -> None:
    assert sorted(path.name for path in POLICIES.iterdir()) == [
        "bucket.json",
        "label_role.json",
        "lifecycle.json",
        "run_role.json",
    ]
    for path in POLICIES.iterdir():
        resources: Iterable[str] = [
            one for found in read(path.name).get("Statement", []) for one in as_list(found["Resource"])
        ]
        assert all(resource.startswith("arn:aws:s3:::team") for resource in resources)
