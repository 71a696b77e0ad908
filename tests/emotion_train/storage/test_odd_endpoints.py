"""An endpoint that answers otherwise than S3, and settings that lead to none, end in the sentence
that says what is wrong and what to type.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from emotion_train.config import load_config
from emotion_train.errors import StorageError, WrongRequest
from emotion_train.sources.open import Choices, open_source
from emotion_train.sources.posts import Columns
from emotion_train.storage import s3 as s3_page
from emotion_train.storage.local_s3 import LocalS3
from emotion_train.storage.open import open_store
from launch.check.credentials import check_credentials
from tests.helpers.odd_endpoints import Answer, Certificates, certificates, endpoint, refusing

URL = "s3://my-bucket/x"
ASKED: dict[str, Callable[[], object]] = {
    "stat": lambda: open_store(URL).stat("k"),
    "read": lambda: open_store(URL).read("k"),
    "create": lambda: open_store(URL).create("k", b"x"),
    "write": lambda: open_store(URL).write("k", b"x"),
    "list": lambda: list(open_store(URL).list()),
}
HTML = b"<!doctype html><html><title>Console</title></html>"


# https://github.com/boto/boto3/issues/454: boto3 closes no connection
pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def _login(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if re.match("AWS_(ENDPOINT|.*REGION)", name)]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "AKIAHIDDEN",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)


def sentence(action: Callable[[], object], kind: type[Exception] = StorageError) -> str:
    with pytest.raises(kind) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    assert "hunter2" not in text
    assert "AKIAHIDDEN" not in text
    return text


# a refusal whose reason a HEAD has no body for


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (400, "ExpiredToken", "has expired"),
        (400, "TokenRefreshRequired", "has expired"),
        (403, "RequestTimeTooSkewed", "clock is wrong"),
        (403, "InvalidAccessKeyId", "refused (InvalidAccessKeyId)"),
        (401, "SignatureDoesNotMatch", "refused (SignatureDoesNotMatch)"),
        (403, "AccessDenied", "No permission for"),
        (400, "AuthorizationHeaderMalformed", "another region"),
        (404, "NoSuchBucket", "There is no bucket my-bucket"),
    ],
)
def test_the_first_request_says_why_whichever_it_is(
    status: int, code: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with endpoint(refusing(status, code)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        for name, action in ASKED.items() if code == "ExpiredToken" else [("stat", ASKED["stat"])]:
            assert words in sentence(action), name


def test_a_head_without_a_reason_is_asked_once_more_and_once_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(method: str, path: str) -> Answer:
        if path.startswith("/my-bucket/x"):
            return refusing(403, "RequestTimeTooSkewed")(method, path)
        return Answer(200)

    with endpoint(answer) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        assert "clock" in sentence(ASKED["stat"])
    assert server.seen == ["HEAD /my-bucket", "HEAD /my-bucket/x/k", "GET /my-bucket/x/k"]


# what is no S3


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_an_endpoint_that_redirects_is_named_with_its_target(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = "https://user:hunter2@store.example:9000"
    headers = {"Location": f"{target}/elsewhere", "Content-Type": "text/html"}
    with endpoint(lambda method, path: Answer(status, b"<html>moved</html>", headers)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        for name, action in ASKED.items() if status == 301 else [("stat", ASKED["stat"])]:
            text = sentence(action)
            assert f"{server.url}) redirects to https://store.example:9000" in text, name
            assert "AWS_ENDPOINT_URL=https://store.example:9000" in text


@pytest.mark.parametrize(
    ("body", "put"), [(HTML, 405), (b"<html><body/></html>", 200), (b'{"message": "hello"}', 200)]
)
def test_a_web_server_is_not_taken_for_a_store(
    body: bytes, put: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(method: str, path: str) -> Answer:
        return Answer(put if method == "PUT" else 200, body, {"Content-Type": "text/html"})

    with endpoint(answer) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        for name, action in ASKED.items() if put == 405 else [("list", ASKED["list"])]:
            text = sentence(action)
            assert "AWS_ENDPOINT_URL" in text, name
            assert "does not speak S3" in text or "no S3 server answers like that" in text, name


def test_a_page_that_says_not_found_is_no_missing_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    with endpoint(lambda method, path: Answer(404, HTML, {"Content-Type": "text/html"})) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        assert "does not speak S3" in sentence(ASKED["stat"])
        assert "does not speak S3" in sentence(ASKED["create"])


def test_a_see_other_is_no_answer_of_s3_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a page gives that wants a login."""
    with endpoint(lambda method, path: Answer(303, b"", {"Location": "/login"})) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        text = sentence(ASKED["stat"])
    assert f"AWS_ENDPOINT_URL ({server.url}) does not speak S3" in text


def test_a_server_of_tls_that_is_asked_without_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those in Go answer, MinIO among them."""
    words = b"Client sent an HTTP request to an HTTPS server.\n"
    with endpoint(lambda method, path: Answer(400, words, {"Content-Type": "text/plain"})) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        assert f"set AWS_ENDPOINT_URL to https{server.url[4:]}" in sentence(ASKED["stat"])


def test_a_server_that_fails_for_a_while_is_still_one_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_page, "PATIENT_ATTEMPTS", 1)
    store = open_store(URL)

    def answer(method: str, path: str) -> Answer:
        return Answer(200) if path == "/my-bucket" else Answer(502, HTML, {"Content-Type": "text/html"})

    with endpoint(answer) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        with pytest.raises(StorageError) as caught:
            store.stat("k")
    assert caught.value.transient


def test_a_store_without_a_head_of_buckets_is_used_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = b'<?xml version="1.0"?><ListBucketResult><Name>my-bucket</Name></ListBucketResult>'

    def answer(method: str, path: str) -> Answer:
        if path.startswith("/my-bucket/x"):
            return Answer(200, b"hello", {"ETag": '"a"', "Last-Modified": "Sun, 29 Nov 2026 00:00:00 GMT"})
        return Answer(405) if method == "HEAD" else Answer(200, listing, {"Content-Type": "application/xml"})

    with endpoint(answer) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        assert open_store(URL).stat("k").size == 5


# addressing


def test_an_ip_takes_the_path_style_whatever_is_configured(
    s3: LocalS3,
    bucket_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name, value in s3.env().items():
        monkeypatch.setenv(name, value)
    config = tmp_path / "config"
    config.write_text("[default]\ns3 =\n  addressing_style = virtual\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    store = open_store(bucket_url)
    store.write("a", b"1")
    monkeypatch.setattr(type(store), "_get_by_boto3", None)  # obstore does it alone
    assert store.read("a") == b"1"
    assert "panicked" not in capfd.readouterr().err


def test_a_panic_of_obstore_is_no_end(bucket_url: str, s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.env().items():
        monkeypatch.setenv(name, value)

    class PanicException(BaseException):  # as pyo3 has it
        pass

    def panic(*_: object) -> None:
        asked.append(1)
        raise PanicException("called `Result::unwrap()` on an `Err` value")

    asked: list[int] = []
    monkeypatch.setattr(s3_page, "_get_by_obstore", panic)
    store = open_store(bucket_url)
    store.write("a", b"1")
    assert [store.read("a"), store.read("a"), store.read("a", start=0, length=1)] == [b"1"] * 3
    assert len(asked) == 1  # a fall-back that worked is kept
    monkeypatch.setattr(s3_page, "_obstore_reader", panic)
    assert open_store(bucket_url).read("a") == b"1"


# certificates


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("tls"))


def hello(method: str, path: str) -> Answer:
    return Answer(200, b"hello", {"ETag": '"a"', "Last-Modified": "Sun, 29 Nov 2026 00:00:00 GMT"})


@pytest.mark.parametrize("place", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "ca_bundle"])
@pytest.mark.parametrize("order", ["first", "last"])
def test_both_clients_trust_the_bundle_of_boto3_s_chain(
    pem: Certificates, place: str, order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, config = tmp_path / "bundle.pem", tmp_path / "config"
    parts = [pem.ca, pem.other_ca] if order == "first" else [pem.other_ca, pem.ca]
    bundle.write_bytes(b"".join(part.read_bytes() for part in parts))
    config.write_text(f"[default]\nca_bundle = {bundle}\n" if place == "ca_bundle" else "")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    if place != "ca_bundle":
        monkeypatch.setenv(place, str(bundle))
    with endpoint(hello, context=pem.context()) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        store = open_store(URL)
        assert store.stat("k").size == 5
        failures: list[BaseException] = []  # of obstore, where boto3 had to help
        monkeypatch.setattr(type(store), "_keep_fall_back", lambda self, failure: failures.append(failure))
        assert store.read("k") == b"hello"
        assert failures == []


def test_where_only_boto3_trusts_a_certificate_obstore_is_asked_once(
    pem: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server's own certificate as its CA: OpenSSL takes it, rustls does not."""
    monkeypatch.setenv("AWS_CA_BUNDLE", str(pem.alone))
    asked = []
    by_obstore = s3_page._get_by_obstore

    def counted(*words: object) -> object:
        asked.append(1)
        return by_obstore(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(s3_page, "_get_by_obstore", counted)
    with endpoint(hello, context=pem.context(alone=True)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        store = open_store(URL)
        for _ in range(4):
            assert store.read("k") == b"hello"
        assert store.read_again("k", 2) == b"hello"
    assert len(asked) == 1


@pytest.mark.parametrize("place", ["AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "ca_bundle"])
@pytest.mark.parametrize("content", [None, "no certificate", "a folder"])
def test_a_bundle_that_is_none_is_named_with_its_place(
    place: str, content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, config = tmp_path / "ca.pem", tmp_path / "config"
    if content == "a folder":
        bundle.mkdir()
    elif content is not None:
        bundle.write_text(content)
    config.write_text(f"[default]\nca_bundle = {bundle}\n" if place == "ca_bundle" else "")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    if place != "ca_bundle":
        monkeypatch.setenv(place, str(bundle))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    text = sentence(ASKED["stat"])
    assert place in text
    assert str(bundle) in text
    assert "PEM" in text


def test_a_certificate_that_nobody_vouches_for_and_a_server_without_tls_are_told_apart(
    pem: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_CA_BUNDLE", str(pem.other_ca))
    with endpoint(hello, context=pem.context()) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        assert "not trusted; set AWS_CA_BUNDLE" in sentence(ASKED["stat"])
        monkeypatch.setenv("AWS_CA_BUNDLE", str(pem.ca))
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url.replace("127.0.0.1", "localhost"))
        assert "a certificate for another name" in sentence(ASKED["stat"])
    with endpoint(hello) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url.replace("http:", "https:"))
        assert "type http:// in AWS_ENDPOINT_URL" in sentence(ASKED["stat"])


# settings


@pytest.mark.parametrize(
    "given",
    [
        "http://",
        "ftp://127.0.0.1:9",
        "http://127.0.0.1:port",
        "http://127.0.0.1:99999",
        "http://[::1",
        "http://a..b:9000",
        f"http://{'a' * 64}.example",
        "http://ho st:9000",
        '"http://127.0.0.1:9"',
    ],
)
def test_an_endpoint_that_nothing_can_be_sent_to_is_named(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", given)
    text = sentence(ASKED["stat"])
    assert f"AWS_ENDPOINT_URL is {given!r}, which is no URL" in text


@pytest.mark.parametrize("region", ["eu west 1", "eu-west-1;", "-", "a" * 64])
@pytest.mark.parametrize("name", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_a_region_that_is_none_is_named(name: str, region: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.setenv(name, region)
    text = sentence(ASKED["stat"])
    assert f"the region is {region!r} (from {name})" in text


def test_a_region_that_boto3_does_not_know_and_that_does_not_answer_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Looked up in no network: `.invalid` names resolve nowhere."""
    from botocore.exceptions import EndpointConnectionError

    def nowhere(*_: object) -> None:
        raise EndpointConnectionError(endpoint_url="https://s3.eu-wset-1.amazonaws.com")

    monkeypatch.setattr(s3_page.S3Store, "_headers_of_bucket", nowhere)
    monkeypatch.setenv("AWS_REGION", "eu-wset-1")
    with pytest.raises(StorageError) as caught:
        open_store(URL).stat("k")
    assert "'eu-wset-1', which boto3 does not know (did you mean eu-west-1?)" in str(caught.value)
    assert not caught.value.transient
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    with pytest.raises(StorageError) as caught:
        open_store(URL).stat("k")
    assert caught.value.transient


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[default\nregion = us-east-1\n", "cannot read the file"),
        (b"region = us-east-1\n", "cannot read the file"),
        (b"\xff\xfe[\0default", "cannot read the file"),
        (b"[default]\ns3 =\n  addressing_style = diagonal\n", "diagonal"),
        (b"[default]\nrequest_checksum_calculation = perhaps\n", "perhaps"),
        (b"[default]\ndefaults_mode = bold\n", "bold"),
        (b"[default]\nendpoint_url = nowhere\n", "'nowhere', which is no URL"),
    ],
)
def test_a_config_file_that_boto3_does_not_take_is_named(
    content: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config"
    config.write_bytes(content)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    if b"endpoint" not in content:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    text = sentence(ASKED["stat"])
    assert words in text
    assert str(config) in text or "AWS_ENDPOINT_URL" in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/nonexistent/token"),
        ("AWS_DEFAULTS_MODE", "bold"),
    ],
)
def test_a_variable_that_boto3_does_not_take_is_named(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "IDENTITY" in name:
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/x")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv(name, value)
    text = sentence(ASKED["stat"])
    assert name in text
    assert value in text


def test_check_names_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/x")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/nonexistent/token")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    config = load_config(None, [f"data.url={URL}", f"run.output_url={URL}"])
    assert "/nonexistent/token" in sentence(lambda: check_credentials(config, lambda: None), WrongRequest)


# other schemes


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("gs://bucket/x", "AWS_ENDPOINT_URL=https://storage.googleapis.com.* type s3://bucket/x"),
        ("GS://bucket/x", "HMAC key"),
        ("az://container/x", "Azure Blob Storage has no S3 endpoint"),
        ("abfss://container@account.dfs.core.windows.net/x", "Azure Blob Storage has no S3 endpoint"),
        ("https://account.blob.core.windows.net/container/x", "Azure Blob Storage has no S3 endpoint"),
        ("s3a://bucket/x", "s3://bucket/x"),
        ("r2://bucket/x", "AWS_ENDPOINT_URL"),
    ],
)
def test_another_scheme_is_told_the_way_round(url: str, words: str) -> None:
    assert re.search(words, sentence(lambda: open_store(url), WrongRequest))

    def prepared() -> None:
        with open_source(url, Columns("text", "label", None), Choices()):
            pass

    assert re.search(words, sentence(prepared, WrongRequest))
