"""The checks before money is spent: each finds what it is for, on a real bucket, and all are made
whatever the first one says.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest

from emotion_train.config import load_config
from emotion_train.data.index import Split, read_index
from emotion_train.data.lengths import RECORDED
from emotion_train.data.reader import sample_texts
from emotion_train.errors import WrongRequest
from emotion_train.model.staged_copy import stage
from emotion_train.preparation.steps import prepare
from emotion_train.runs.log import Writer
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store
from emotion_train.train import _look_at_base
from launch.check.checks import Check, _hours, _planned, check_all
from launch.check.credentials import check_credentials
from launch.check.machine import check_memory, processes_on_cpu, target_of
from launch.cli import main
from launch.run.topology import Gpu
from tests.helpers import fake_hub
from tests.helpers.edited_index import sealed
from tests.helpers.fake_hub import FakeHub
from tests.helpers.tiny_models import causal_checkpoint
from tests.helpers.tiny_runs import write_posts

H100 = Gpu("0", "GPU-0", "NVIDIA H100 80GB HBM3", 81_559)
A100 = Gpu("0", "GPU-0", "NVIDIA A100-SXM4-80GB", 81_920)
L4 = Gpu("0", "GPU-0", "NVIDIA L4", 23_034)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checks")
    causal_checkpoint(folder / "base", "llama")
    write_posts(folder / "posts")
    return folder


@pytest.fixture(scope="module")
def data_url(made: Path, _shared_bucket: str) -> str:
    """A prepared data set in a bucket, for tests that leave it as it is."""
    url = f"{_shared_bucket}/checked-data"
    prepare(str(made / "posts"), url)
    return url


@pytest.fixture
def words(made: Path, data_url: str, bucket_url: str) -> list[str]:
    """A run on a bucket with a prepared data set, right in everything."""
    return [
        f"data.url={data_url}",
        f"run.output_url={bucket_url}/runs",
        f"model.base={made / 'base'}",
        "model.precision=fp32",
    ]


@pytest.fixture
def own_words(made: Path, words: list[str], bucket_url: str) -> list[str]:
    """The same on a data set that no other test sees."""
    prepare(str(made / "posts"), f"{bucket_url}/data")
    return [*words[1:], f"data.url={bucket_url}/data"]


def checks(words: list[str], *gpus: Gpu, path: str | None = None, **more: Any) -> dict[str, Check]:
    return {check.name: check for check in check_all(path, words, gpus, "cpu", **more)}


def url_of(words: list[str], name: str) -> str:
    return next(word for word in words if word.startswith(f"{name}=")).partition("=")[2]


def test_a_right_request_passes_every_check(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = checks(words)
    assert [check for check in found.values() if not check.ok] == []
    assert "train 108, validation" in found["data set"].finding
    assert "unchanged by their ETags" in found["objects"].finding
    assert "all 108 training posts" in found["overlap"].finding
    assert found["credentials"].finding == "from env, without an end"
    assert main(["check", "--accelerate-config", "cpu", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok"] * len(found)
    store = open_store(url_of(words, "run.output_url"))
    assert list(store.list()) == []  # the probe is gone


def test_everything_that_is_wrong_is_told_at_once(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [
        f"data.url={made / 'none'}",
        f"run.output_url={made / 'posts' / 'train.csv'}",
        f"model.base={made / 'nowhere'}",
        "train.epoch=1",
    ]
    assert main(["check", "--gpus", "H1000", *wrong]) == 2
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("wrong")] == [
        *("config", "data", "objects", "labels", "overlap", "output", "base", "lengths", "memory"),
    ]
    assert "did you mean train.epochs?" in out
    assert "give NAME or NAME:COUNT with one of L4, A10G" in out


@pytest.mark.parametrize("words", ["H100:²", "H100:0", "H100:", "H100:-1", "H100:1.5"])
def test_a_number_of_gpus_that_is_none_is_refused(words: str) -> None:
    with pytest.raises(WrongRequest, match="give NAME or NAME:COUNT"):
        target_of(words, [])


def test_a_config_that_is_wrong_in_one_key_is_checked_in_the_others(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("train:\n  epochs: 2\n  warmup: 1\ndata:\n  max_length: 64\n")
    found = checks(words, path=str(tmp_path / "run.yaml"))
    assert [name for name, check in found.items() if not check.ok] == ["config"]
    assert "train.warmup: no such key" in found["config"].finding


def test_without_data_and_output_only_the_config_is_checked() -> None:
    found = checks(["train.epochs=2"])
    assert list(found) == ["config"]
    assert "data.url: required" in found["config"].finding
    assert found["config"].finding.count("; ") == 1 + 2  # one between the two, one within each


# --- the data set ---


def test_an_object_that_is_missing_or_cut_short_is_named(own_words: list[str]) -> None:
    store = open_store(url_of(own_words, "data.url"))
    train, test = (only_object(store, split) for split in ("train", "test"))
    whole = store.read(train)
    store.write(train, whole[:-1])
    store.delete(test)
    finding = checks(own_words)["objects"].finding
    assert f"{train} has {len(whole) - 1:,} bytes instead of {len(whole):,}" in finding
    assert f"{test} is missing" in finding
    assert "delete what is damaged and type the `emotion-train prepare` again that made it" in finding


def only_object(store: Store, split: str) -> str:
    (described,) = read_index(store).splits[split].objects
    return described.key


def test_an_object_with_another_etag_is_compared_by_its_bytes(own_words: list[str]) -> None:
    store = open_store(url_of(own_words, "data.url"))
    key = only_object(store, "train")
    whole = store.read(key)
    # the same bytes, as a copying tool may write them
    parts = multipart(url_of(own_words, "data.url"), key, whole)
    assert parts != json.loads(store.read("index.json"))["splits"]["train"]["objects"][0]["etag"]
    found = checks(own_words)["objects"]
    assert found.ok
    assert "1 compared by sha256" in found.finding
    store.write(key, whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    assert "is not what index.json describes" in checks(own_words)["objects"].finding


def multipart(url: str, key: str, content: bytes) -> str:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client, where = boto3.Session().client("s3"), {"Bucket": bucket, "Key": f"{prefix}/{key}"}
    upload = client.create_multipart_upload(**where)["UploadId"]
    etag = client.upload_part(**where, UploadId=upload, PartNumber=1, Body=content)["ETag"]
    parts = {"Parts": [{"PartNumber": 1, "ETag": etag}]}
    done: str = client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload=parts)["ETag"]
    return done.strip('"')


def test_a_copy_on_a_folder_is_compared_by_its_bytes(words: list[str], tmp_path: Path) -> None:
    source = open_store(url_of(words, "data.url"))
    for info in source.list():
        open_store(str(tmp_path / "copy")).write(info.key, source.read(info.key))
    found = checks([*words, f"data.url={tmp_path / 'copy'}"])["objects"]
    assert found.ok
    assert "3 compared by sha256" in found.finding


def edited_labels(folder: Path, split: str) -> None:
    """The first label loses its posts of a split, in index.json alone."""
    path = folder / "index.json"
    index = json.loads(path.read_text())
    part = index["splits"][split]
    counts = part["label_counts"]
    part["label_counts"] = [0, counts[0] + counts[1], *counts[2:]]
    for group in part["row_groups"]:
        counts = group["label_counts"]
        group["label_counts"] = [0, counts[0] + counts[1], *counts[2:]]
    path.write_bytes(sealed(index))


@pytest.mark.parametrize(
    ("split", "words_found"),
    [("train", "No training post has the label"), ("validation", "counts 0 in macro-F1")],
)
def test_a_label_without_posts_is_told(split: str, words_found: str, made: Path, tmp_path: Path) -> None:
    prepare(str(made / "posts"), str(tmp_path / "data"))
    edited_labels(tmp_path / "data", split)
    found = checks(
        [
            f"data.url={tmp_path / 'data'}",
            f"run.output_url={tmp_path / 'runs'}",
            f"model.base={made / 'base'}",
        ]
    )["labels"]
    assert not found.ok
    assert words_found in found.finding


def test_a_text_in_two_splits_is_told(made: Path, tmp_path: Path) -> None:
    """`prepare` keeps them apart, so the validation split is that of another set."""
    with (made / "posts" / "train.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    other = tmp_path / "other"
    write_posts(other)
    with (other / "validation.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        by_label = {row["label"]: row["text"] for row in rows}
        for label, text in by_label.items():
            writer.writerow([f"  {text.upper()}", label])
    (other / "train.csv").write_text(
        "text,label\n" + "\n".join(f"something else {n},{label}" for n, label in enumerate(by_label))
    )
    prepare(str(made / "posts"), str(tmp_path / "data"))
    prepare(str(other), str(tmp_path / "others"))
    ours, theirs = (json.loads((tmp_path / name / "index.json").read_text()) for name in ("data", "others"))
    ours["splits"]["validation"] = theirs["splits"]["validation"]
    (tmp_path / "data" / "index.json").write_bytes(sealed(ours))
    key = ours["splits"]["validation"]["objects"][0]["key"]
    (tmp_path / "others" / key).replace(tmp_path / "data" / key)
    found = checks(
        [
            f"data.url={tmp_path / 'data'}",
            f"run.output_url={tmp_path / 'runs'}",
            f"model.base={made / 'base'}",
        ]
    )["overlap"]
    assert not found.ok
    assert f"{len(by_label)} texts are in train and in validation" in found.finding


# --- output and credentials ---


def test_a_run_that_exists_is_told(words: list[str]) -> None:
    store = open_store(url_of(words, "run.output_url"))
    writer = Writer(store, "mine", "a" * 64, "b" * 64)
    writer.claim(0, 0)
    writer.append("checkpoint", 1, 7)
    found = checks([*words, "run.id=mine"])["output"]
    assert "mine is unfinished at step 7 and would resume from there" in found.finding


def test_a_bucket_that_is_not_there_is_told(words: list[str]) -> None:
    found = checks([*words, "run.output_url=s3://no-such-bucket-here/runs"])
    assert [name for name, check in found.items() if not check.ok] == ["output"]
    assert "no bucket no-such-bucket-here" in found["output"].finding


def test_missing_credentials_are_told(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    found = checks(words)
    assert not found["credentials"].ok
    assert "There are no credentials" in found["credentials"].finding


def test_credentials_that_end_within_the_run_are_told(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `aws configure export-credentials --format env` gives them."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", (datetime.now(UTC) + timedelta(hours=2)).isoformat())
    assert checks(words, hours=1.5)["credentials"].ok
    late = checks(words, hours=2.5)["credentials"]
    assert not late.ok
    assert "end in 2.0 hours and the run takes 2.5 hours" in late.finding


def test_without_hours_the_plan_s_own_count(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(None, words)
    store = open_store(config.data.url)
    planned = _hours(_planned(config, read_index(store), store, target_of("H100", [])))
    assert planned is not None
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    for margin, lasts in ((0.1, True), (-0.1, False)):
        ends = datetime.now(UTC) + timedelta(hours=planned + margin)
        monkeypatch.setenv("AWS_CREDENTIAL_EXPIRATION", ends.isoformat())
        try:
            finding = check_credentials(config, lambda: planned)
        except WrongRequest as error:
            finding = str(error)
        assert ("more hours" in finding) == lasts
        assert f"the run takes {planned:.1f} hours" in finding
    assert _planned(config, read_index(store), store, None) is None


def test_a_session_token_without_an_end_is_mentioned(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    found = checks(words, hours=3)["credentials"]
    assert found.ok
    assert "whose end is not known and the run takes 3.0 hours" in found.finding


# --- lengths ---


def with_long_posts(made: Path, words: list[str], url: str) -> list[str]:
    """The same run on posts of 400 words."""
    source = made / "long"
    if not source.exists():
        source.mkdir()
        with (source / "posts.csv").open("w", newline="") as file:
            rows = [(f"{i} {'rain ' * 400}", ("calm", "glee")[i % 2]) for i in range(120)]
            csv.writer(file).writerows([("text", "label"), *rows])
    prepare(str(source), url)
    return [word for word in words if not word.startswith("data.url=")] + [f"data.url={url}"]


def test_posts_that_are_cut_are_a_warning_and_no_failure(
    words: list[str], made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = with_long_posts(made, words, str(tmp_path / "data"))
    assert main(["check", "--accelerate-config", "cpu", *long, "data.max_length=96"]) == 0
    (line,) = [one for one in capsys.readouterr().out.splitlines() if one.startswith("warn")]
    train = read_index(open_store(str(tmp_path / "data"))).split("train").rows
    sizes = [len(text) + 1 for text in sample_texts(open_store(str(tmp_path / "data")), index_of(long), 500)]
    lost = 1 - 96 * len(sizes) / sum(sizes)  # a token a byte, and BOS
    assert len(sizes) == train == 96
    assert f"data.max_length=96 cuts 100.0 % of the 96 training posts and {100 * lost:.1f} % of their" in line
    assert f"data.max_length={sorted(sizes)[-2]} would cut at most 2 %" in line
    fits = checks([*long, f"data.max_length={max(sizes)}"])["lengths"]
    assert fits.ok
    assert not fits.doubtful
    assert "cuts none of the 96 training posts" in fits.finding


def index_of(words: list[str]) -> Split:
    return read_index(open_store(url_of(words, "data.url"))).split("train")


@pytest.mark.parametrize(("share", "doubtful"), [(5, False), (6, True)])
def test_a_warning_begins_above_5_percent(
    share: int, doubtful: bool, words: list[str], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("train", "validation"):
        with (source / f"{name}.csv").open("w", newline="") as file:
            rows = [
                (f"{name} {i} {'long ' * (100 if i < share else 1)}", ("calm", "glee")[i % 2])
                for i in range(100)
            ]
            csv.writer(file).writerows([("text", "label"), *rows])
    prepare(str(source), str(tmp_path / "data"))
    found = checks([*words, f"data.url={tmp_path / 'data'}"])["lengths"]
    assert found.ok
    assert found.doubtful == doubtful
    assert f"cuts {share}.0 % of the 100 training posts" in found.finding


def test_without_a_tokenizer_lengths_are_estimated_or_said_not_to_be_known(
    words: list[str], made: Path, tmp_path: Path
) -> None:
    nowhere = f"model.base={made / 'nowhere'}"
    long = [*with_long_posts(made, words, str(tmp_path / "data")), nowhere]
    found = checks([*long, "data.max_length=96"])
    assert not found["base model"].ok
    assert (found["lengths"].ok, found["lengths"].doubtful) == (True, True)
    assert found["lengths"].finding.startswith(
        "without the base's tokenizer, data.max_length=96 would cut about 100.0 % of the training posts"
    )
    index = tmp_path / "data" / "index.json"
    document = json.loads(index.read_bytes())
    for key in RECORDED:
        del document["source"][key]
    index.write_bytes(sealed(document))
    found = checks(long)
    assert found["lengths"].finding.endswith("the posts' lengths were not looked at")
    assert found["lengths"].doubtful


# --- base and GPU ---


def test_a_base_with_a_file_missing_is_told(words: list[str], tmp_path: Path) -> None:
    base = causal_checkpoint(tmp_path / "base", "llama")
    (base / "model-00002-of-00002.safetensors").unlink()
    found = checks([*words, f"model.base={base}"])["base model"]
    assert not found.ok
    assert "has no model-00002-of-00002.safetensors" in found.finding


def test_a_staged_base_is_looked_for_object_by_object(words: list[str], made: Path, bucket_url: str) -> None:
    index = stage(str(made / "base"), f"{bucket_url}/base", "nf4", "cpu").index
    in_bucket = [*words, f"model.base={bucket_url}/base"]
    found = checks([*in_bucket, "model.precision=nf4"])["base model"]
    assert found.ok
    assert found.finding.startswith(f"{made / 'base'}, staged at {bucket_url}/base as nf4")
    assert "staged as nf4, which cannot be turned back" in checks(in_bucket)["base model"].finding
    open_store(f"{bucket_url}/base").delete(index.shards[0].key)
    found = checks([*in_bucket, "model.precision=nf4"])["base model"]
    assert not found.ok
    assert f"{bucket_url}/base/{index.shards[0].key} is missing or cut short" in found.finding


@pytest.mark.parametrize("word", ["model.base=s3://team/base", "run.kernels_url=s3://team/kernels"])
def test_a_base_or_kernels_in_a_bucket_need_credentials(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(None, [f"data.url={tmp_path}", f"run.output_url={tmp_path}", word])
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(WrongRequest, match="no credentials for the bucket"):
        check_credentials(config, lambda: None)


REAL = ["model.base=mistralai/Mistral-Small-3.1-24B-Base-2503", "model.precision=nf4"]


def memory_of(words: list[str], *more: str, gpu: Gpu | None = None, wanted: str | None = None) -> Check:
    config = load_config(None, [*words, *REAL, *more])
    return_index = read_index(open_store(config.data.url))
    try:
        return Check(
            "memory",
            True,
            check_memory(config, target_of(wanted, [gpu] if gpu else []), lambda: return_index),
        )
    except WrongRequest as error:
        return Check("memory", False, str(error))


def test_a_micro_batch_that_fits_is_told_with_its_parts(words: list[str]) -> None:
    found = memory_of(words, "train.tokens_per_microbatch=4096", gpu=H100)
    assert found.ok
    assert "11.9 weights" in found.finding
    assert memory_of(words, "train.tokens_per_microbatch=4096", wanted="h100:8").ok


def test_what_does_not_fit_comes_with_settings_that_do(words: list[str]) -> None:
    found = memory_of(words, "train.tokens_per_microbatch=4096", gpu=L4)
    assert not found.ok
    remedy = found.finding.rpartition("; type ")[2].rstrip(".").split()
    assert memory_of(words, "train.tokens_per_microbatch=4096", *remedy, gpu=L4).ok
    large = memory_of(words, "model.precision=bf16", gpu=L4)
    assert "model.precision=nf4" in large.finding


def test_auto_is_checked_with_the_least_that_it_may_come_down_to(words: list[str]) -> None:
    found = memory_of(words, "train.tokens_per_microbatch=auto", gpu=L4)
    assert found.ok
    assert re.match(r"fits NVIDIA L4 with [\d.]+ GiB: needs at least [\d.]+ GiB \(", found.finding)
    large = memory_of(words, "train.tokens_per_microbatch=auto", "model.precision=bf16", gpu=L4)
    assert large.finding.endswith("; type model.precision=nf4.")


def test_a_gpu_on_which_nothing_fits_is_told(words: list[str]) -> None:
    tiny = Gpu("0", "GPU-0", "NVIDIA T4", 8_000)
    assert "; take a smaller model.base, or a larger GPU" in memory_of(words, gpu=tiny).finding


def test_a_base_that_fits_when_several_gpus_share_it_is_right(words: list[str]) -> None:
    """47 GiB in bf16 on cards of 45: `emotion-launch run` takes FSDP2 there."""
    bf16 = ["model.precision=bf16", "train.gradient_checkpointing=true"]
    assert not memory_of(words, *bf16, wanted="L40S").ok
    found = memory_of(words, *bf16, wanted="L40S:4")
    assert found.ok
    assert found.finding.startswith("multi_gpu_fsdp2_qlora: multi_gpu_ddp would need ")
    small = memory_of(words, *bf16, wanted="L4:2")
    assert not small.ok
    assert "does not fit 2 GPUs of 22.5 GiB each" in small.finding
    assert "; type model.precision=nf4" in small.finding


@pytest.mark.parametrize(
    ("more", "gpu", "named"),
    [
        ({"wanted_gpus": "A100-80GB"}, H100, "A100-80GB has no float8 units; take one of L4, L40S, H100"),
        ({"wanted_gpus": "H100"}, None, None),
        ({}, A100, "A100-SXM4-80GB has no float8 units"),
        ({}, H100, None),
        ({}, None, "the CPU has no float8 units"),
        ({"accelerate_config": "cpu"}, H100, "the CPU has no float8 units"),
    ],
)
def test_fp8_is_right_where_there_are_float8_units(
    words: list[str], more: dict[str, Any], gpu: Gpu | None, named: str | None
) -> None:
    asked = {"accelerate_config": None, **more}
    found = {
        check.name: check
        for check in check_all(None, [*words, "model.precision=fp8"], [gpu] if gpu else [], **asked)
    }["precision"]
    assert found.ok == (named is None)
    assert (named or "fp8 on ") in found.finding


@pytest.mark.parametrize("precision", ["nf4", "fp32"])
def test_a_gpu_without_bfloat16_units_is_slow_and_one_without_kernels_is_refused(
    precision: str, words: list[str]
) -> None:
    asked = [*words, f"model.precision={precision}"]
    old, older = (checks(asked, wanted_gpus=name)["precision"] for name in ("T4:1", "V100"))
    assert old.ok
    assert ("no bfloat16 units" in old.finding) == (precision == "nf4")
    assert not older.ok
    assert "from compute capability 7.5 on and V100 has 7.0; take one of L4, A10G" in older.finding


def test_fp8_of_a_base_that_is_not_fused_is_told(words: list[str], tmp_path: Path) -> None:
    base = causal_checkpoint(tmp_path / "base", "qwen2")
    found = checks([*words, f"model.base={base}", "model.precision=fp8"], wanted_gpus="H100")["precision"]
    assert not found.ok
    assert (
        f"needs a Llama or Mistral base and {base} is of another kind; type model.precision=bf16"
        in found.finding
    )


@pytest.mark.parametrize("hours", ["-5", "0", "nan", "inf"])
def test_hours_that_make_no_sense_are_refused(
    hours: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--hours", hours, *words]) == 2
    assert f"--hours is {hours}; give a number above 0." in capsys.readouterr().err


def test_a_file_that_is_no_accelerate_config_is_told_for_any_machine(
    words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text("train:\n  epochs: 2\n")
    for wanted in (None, "H100"):
        found = {
            check.name: check
            for check in check_all(None, words, [], str(tmp_path / "run.yaml"), wanted_gpus=wanted)
        }["machine"]
        assert not found.ok
        assert "is a run config; type --config" in found.finding


# --- the base, as the trainer sees it ---


@pytest.mark.parametrize(
    ("file", "changes", "words_found"),
    [
        ("config.json", {"model_type": "gpt2"}, "has the architecture gpt2; supported are llama"),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "is already quantised (gptq)"),
        ("config.json", {"num_hidden_layers": 3}, "lacks model.layers.2."),
        ("config.json", {"max_position_embeddings": 64}, "texts of up to 64 tokens; type data.max_length=64"),
        ("tokenizer_config.json", {"bos_token": "<bos>"}, "names the bos_token '<bos>'"),
    ],
)
def test_what_the_trainer_would_say_of_a_base_is_said(
    words: list[str], made: Path, tmp_path: Path, file: str, changes: dict[str, Any], words_found: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(made / "base", base)
    (base / file).write_text(json.dumps(json.loads((base / file).read_text()) | changes))
    asked = [*words, f"model.base={base}"]
    found = checks(asked)["base model"]
    assert not found.ok
    assert words_found in found.finding
    with pytest.raises(WrongRequest) as caught:
        _look_at_base(load_config(None, asked))  # the trainer's own look
    assert str(caught.value) == found.finding


def test_a_base_on_the_hub_is_checked_without_downloading_it_and_wants_room(
    words: list[str], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FakeHub({"owner/small": made / "base"}) as server:
        fake_hub.use(monkeypatch, server.endpoint, tmp_path / "cache")
        asked = [*words, "model.base=owner/small"]
        found = checks(asked)
        assert found["base model"].finding.startswith(
            "owner/small, the hub has it: 2 files of weights, 0.0 GB"
        )
        (tmp_path / "cache").mkdir(exist_ok=True)
        assert (
            f"GiB of the base's weights go to the hub's cache {tmp_path / 'cache'}" in found["disk"].finding
        )
        assert not list((tmp_path / "cache").rglob("*.safetensors"))
        real = shutil.disk_usage
        monkeypatch.setattr(
            shutil,
            "disk_usage",
            lambda folder: (
                real(folder)._replace(free=100_000) if folder == tmp_path / "cache" else real(folder)
            ),
        )
        found = checks(asked)
        assert not found["disk"].ok
        assert "GiB are free; free some, set HF_HOME to a folder on a larger disk" in found["disk"].finding
        server.failure = "gated"
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
        assert "is gated: accept its licence at" in checks(asked)["base model"].finding


def test_on_a_cpu_the_base_is_compared_with_this_machine_s_memory(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.check.machine.memory_of_host", lambda: 16 << 30)
    assert re.match(
        r"on the CPU, needs at least 0\.0 GiB .* of the 16\.0 GiB", checks(words)["memory"].finding
    )
    large = [*words, "model.base=mistralai/Mistral-Small-3.1-24B-Base-2503"]
    config = load_config(None, large)
    index = read_index(open_store(config.data.url))
    with pytest.raises(WrongRequest, match=r"in fp32 on a CPU needs at least 8\d\..*this machine has 16\.0"):
        check_memory(config, None, lambda: index, 1)
    with pytest.raises(WrongRequest, match="needs 2 times at least"):
        check_memory(config, None, lambda: index, 2)
    monkeypatch.setattr("launch.check.machine.memory_of_host", lambda: 64 << 30)
    with pytest.raises(WrongRequest, match=r"type model\.precision=bf16, model\.base=smollm2, or train"):
        check_memory(config, None, lambda: index, 1)
    monkeypatch.setattr("launch.check.machine.memory_of_host", lambda: 128 << 30)
    assert "of the 128.0 GiB of this machine" in check_memory(config, None, lambda: index, 1)
    assert [processes_on_cpu(None, [H100], name) for name in ("cpu", None)] == [1, None]
    assert processes_on_cpu("H100", [], "cpu") is None
