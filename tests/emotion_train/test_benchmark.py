"""A hosted model and an adapter on the same posts: scores against scikit-learn's, every outcome
counted, nothing paid twice, the same bytes again.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score

pytest.importorskip("openai")

from emotion_train import cli
from emotion_train.data.index import read_index
from emotion_train.data.targets import TargetKind, dense
from emotion_train.evaluation.floors import PRIOR, TFIDF, posts, tfidf_predictions
from emotion_train.evaluation.predictions import SetPredictions, predictions_key, predictions_to_parquet
from emotion_train.evaluation.thresholds import macro_f1_of_sets
from emotion_train.hosted.figures import Benchmark
from emotion_train.hosted.own_answers import _price_of
from emotion_train.hosted.rows import stratified
from emotion_train.runs.log import Writer, upload_part
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.open import open_store
from tests.helpers.fake_llm import KEY, MODEL, USD_IN, USD_OUT, FakeLLM
from tests.helpers.other_targets import relabel, tiny_folder
from tests.helpers.published_runs import publish_run, write_data
from tests.helpers.tiny_runs import tiny_words

PRICES = ["--price-in", str(USD_IN), "--price-out", str(USD_OUT)]
LABELS = ("calm", "glee", "rage")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set `data`, and a run `runs/ours` that was published with a price of its machine."""
    folder = tmp_path_factory.mktemp("benchmark")
    write_data(folder)
    publish_run(folder, "ours", skill=1.0, usd_per_hour=3.6)
    return folder


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def post_in(prompt: str) -> str:
    return prompt.rpartition("Post: ")[2]


def knows(skill: float, labels: tuple[str, ...] = LABELS) -> Any:
    """A model that says a post's own label, which stands in it, in so many of all cases."""

    def says(prompt: str) -> str:
        post = post_in(prompt)
        draw = random.Random(post)
        own = next(label for label in labels if f" {label} " in post)
        return json.dumps({"label": own if draw.random() < skill else draw.choice(labels)})

    return says


def words(home: Path, out: Path, *fakes: FakeLLM, data: str = "data", run: str = "ours") -> list[str]:
    models = [word for fake in fakes for word in ("--llm", fake.word)]
    own = ["--run", str(home / "runs" / run), "--data", str(home / data), "--out", str(out)]
    return ["benchmark", *own, *models, *PRICES, "--max-usd", "1", "--yes"]


def read(out: Path) -> Benchmark:
    return Benchmark.model_validate_json((out / "benchmark.json").read_bytes())


def truth_of(home: Path, split: str) -> dict[str, str]:
    store = FolderStore(home / "data")
    index = read_index(store)
    return {text: index.labels[target[0][0]] for _, text, target in posts(store, index.split(split))}


def test_scores_are_those_of_scikit_learn_and_every_outcome_is_counted(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    truth = truth_of(home, "validation")
    plays = ["ok", "refusal", "filter", "length", "error-inside", "cut-body", "no-choices"]
    said: dict[str, str | None] = {}
    good = knows(0.9)

    def says(prompt: str) -> str:
        return "I think it is calm" if " 7 " in post_in(prompt) else str(good(prompt))

    with FakeLLM(says=says, plays=plays) as fake:
        code = cli.main([*words(home, tmp_path / "out", fake), "--concurrency", "1"])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        for number, body in enumerate(fake.requests):
            prompt = body["messages"][0]["content"]
            answer = says(prompt)
            readable = (plays[number] if number < len(plays) else "ok") == "ok" and answer.startswith("{")
            said[post_in(prompt)] = json.loads(answer)["label"] if readable else None
        charged = fake.charged_nano
    assert said.keys() == truth.keys()
    found = read(tmp_path / "out")
    (theirs,) = found.hosted
    true, predicted = list(truth.values()), [said[text] or "none" for text in truth]
    assert theirs.macro_f1 == pytest.approx(
        f1_score(true, predicted, labels=LABELS, average="macro", zero_division=0)
    )
    both = [(t, p) for t, p in zip(true, predicted, strict=True) if p != "none"]
    assert theirs.answered_macro_f1 == pytest.approx(
        f1_score(*zip(*both, strict=True), labels=LABELS, average="macro", zero_division=0)
    )
    unreadable = sum(" 7 " in text for text in truth)
    assert theirs.outcomes == {
        "answered": len(both),
        "refused": 1,
        "filtered": 1,
        "cut": 1,
        "unparseable": unreadable,
        "failed": 3,
    }
    assert theirs.accuracy == pytest.approx(np.mean([t == p for t, p in zip(true, predicted, strict=True)]))
    assert theirs.confusion is not None
    assert [sum(row) for row in theirs.confusion] == [Counter(true)[label] for label in found.labels]
    assert sum(row[-1] for row in theirs.confusion) == len(true) - len(both)
    assert theirs.difference is not None
    assert theirs.difference.value == pytest.approx(theirs.macro_f1 - found.own.macro_f1)
    assert theirs.difference.low <= theirs.difference.value <= theirs.difference.high
    assert theirs.money is not None
    assert theirs.money.usd * 1e9 >= charged
    assert theirs.returned_models == (f"{MODEL}-2026-01-01",)
    assert [one.name for one in found.floors] == ["majority class", "TF-IDF + linear SVM"]
    assert "send 40 posts of validation to 127.0.0.1:" in printed.err
    assert "agreement with these annotators" in printed.out
    for path in (tmp_path / "out").rglob("*.*"):
        assert KEY not in path.read_text()
    assert KEY not in printed.out + printed.err


def test_a_finished_one_makes_no_request_and_gives_the_same_bytes(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with FakeLLM(says=knows(0.8)) as one, FakeLLM(says=knows(0.4)) as other:
        assert cli.main(words(home, out, one, other)) == 0
        held = {path: path.read_bytes() for path in out.rglob("*.*")}
        requests = len(one.requests) + len(other.requests)
        assert cli.main(words(home, out, one, other)) == 0
        assert len(one.requests) + len(other.requests) == requests == 80
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == held
    found = read(out)
    first, second = found.hosted
    assert first.macro_f1 > second.macro_f1
    page = (out / "benchmark.html").read_text()
    assert "<script" not in page
    assert "pays for its training" in page


def test_more_rows_ask_only_for_those_that_were_not_asked(home: Path, tmp_path: Path) -> None:
    with FakeLLM(says=knows(0.8)) as fake:
        assert cli.main([*words(home, tmp_path / "out", fake), "--rows", "10"]) == 0
        assert len(fake.requests) == 10
        assert read(tmp_path / "out").rows == 10
        assert cli.main(words(home, tmp_path / "out", fake)) == 0
        assert len(fake.requests) == 40
        assert max(fake.whole.values()) == 1


def test_the_cap_ends_it_with_1_and_a_larger_one_goes_on(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FakeLLM(says=knows(0.8)) as fake:
        small = [word if word != "1" else "0.005" for word in words(home, tmp_path / "out", fake)]
        assert cli.main(small) == 1
        told = capsys.readouterr().err
        assert "larger --max-usd resumes from there" in told
        assert fake.charged_nano <= 5_000_000
        assert 0 < len(fake.requests) < 40
        assert not (tmp_path / "out" / "benchmark.json").exists()
        assert cli.main(words(home, tmp_path / "out", fake)) == 0
        assert max(fake.whole.values()) == 1


def test_a_dry_run_sends_nothing_and_tells_what_it_would_cost(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with FakeLLM() as fake:
        assert cli.main([*words(home, tmp_path / "out", fake), "--dry-run", "--shots", "1"]) == 0
        told = capsys.readouterr().out
        asked = ["--llm", "unheard-of@https://api.n1n.ai/v1", "--dry-run"]
        own = ["--run", str(home / "runs" / "ours"), "--data", str(home / "data"), "--out", str(tmp_path)]
        assert cli.main(["benchmark", *own, *asked]) == 0
    assert fake.requests == []
    assert len(re.findall(r"--- prompt \d of 40", told)) == 3
    assert "40 requests a model" in told
    assert "at the very most" in told
    assert "price unknown" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"--yes": None}, "type --yes to agree"),
        ({"--max-usd": None}, "give --max-usd, the most that may be spent"),
        ({"--price-in": None}, "Give both --price-in and --price-out"),
        ({"--price-in": None, "--price-out": None}, "is unknown, so no cap on dollars can be held"),
        ({"--llm": "other-1@{url}"}, "has no model 'other-1'; it has fake-1"),
        ({"--llm": f"{MODEL}@http://127.0.0.1:9/v1"}, "cannot be reached"),
        ({"--llm": f"{MODEL}@http://u:p@127.0.0.1:9/v1"}, "holds a user or password"),
        ({"--key-env": "WRONG_KEY"}, "refuses the key"),
        ({"--key-env": "NO_KEY", "--llm": f"{MODEL}@https://llm.invalid/v1"}, "NO_KEY is not set"),
        ({"--split": "nothing"}, "has no posts in split 'nothing'"),
        ({"--rows": "41"}, "--rows is 41, and validation has 40 posts"),
        ({"--shots": "-1"}, "--shots is -1; give 0 to 50"),
        ({"--extra-body": "[1]"}, "--extra-body is no JSON object"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_paid(
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str | None],
    sentence: str,
) -> None:
    monkeypatch.setenv("WRONG_KEY", "sk-wrong-0123456789abcdef")
    with FakeLLM() as fake:
        line = words(home, tmp_path / "out", fake)
        for option, value in changes.items():
            if option in line:
                at = line.index(option)
                del line[at : at + (1 if option == "--yes" else 2)]
            if value is not None:
                line += [option, value.format(url=fake.url)]
        assert cli.main(line) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("Traceback") == 0
    assert "sk-wrong" not in told + KEY[:0]
    assert fake.requests == []


def test_several_labels_are_answered_by_a_set(home: Path, tmp_path: Path) -> None:
    """The adapter's thresholds have answered already; a hosted model names any of the labels."""
    store = FolderStore(tmp_path / "data")
    relabel(FolderStore(home / "data"), store, "several", True)
    index = read_index(store)
    run = _published_sets(tmp_path, index)
    truth = {text: target for _, text, target in posts(store, index.split("validation"))}

    def says(prompt: str) -> str:
        own = [index.labels[label] for label, _ in truth[post_in(prompt)]]
        return json.dumps({"labels": own[:1] if " 3 " in post_in(prompt) else own})

    with FakeLLM(says=says, plays=["refusal"]) as fake:
        line = words(tmp_path, tmp_path / "out", fake, run=run)
        assert cli.main([*line, "--shots", "1"]) == 0
        asked = [body["messages"][0]["content"] for body in fake.requests]
        enum = fake.requests[0]["response_format"]["json_schema"]["schema"]["properties"]["labels"]
    assert enum["items"]["enum"] != []
    found = read(tmp_path / "out")
    texts = list(truth)
    targets_NC = dense([truth[text] for text in texts], len(index.labels)) > 0
    said_NC = np.zeros_like(targets_NC)
    for row, text in enumerate(texts):
        if text != post_in(asked[0]):
            names = json.loads(says(f"Post: {text}"))["labels"]
            said_NC[row, [index.labels.index(name) for name in names]] = True
    (theirs,) = found.hosted
    assert theirs.macro_f1 == pytest.approx(f1_score(targets_NC, said_NC, average="macro", zero_division=0))
    assert theirs.outcomes["refused"] == 1
    assert theirs.confusion is None
    assert found.targets == "several"
    # what labels is measured as such, and paid for at the price of both devices
    assert (found.own_facts["speed"], found.own_facts["posts_per_second"]) == ("labelling", 50.0)
    assert found.own_facts["usd_per_million_posts"] == pytest.approx(1.8 / 3600 / 50 * 1e6)
    told = (
        "50.0 posts/s are those of its labelling on 2 x NVIDIA L4; its dollars are those of that machine"
        " at $1.80"
    )
    assert any(told in sentence for sentence in found.sentences)
    assert not any("faster" in sentence for sentence in found.sentences)
    prior, tfidf = found.floors
    assert (prior.name, tfidf.name) == (PRIOR, TFIDF)
    everything_NC = np.ones_like(targets_NC)
    assert prior.macro_f1 == pytest.approx(f1_score(targets_NC, everything_NC, average="macro"))
    floor = tfidf_predictions(store, index, ["validation"], 1000, found.seed)["validation"]
    assert isinstance(floor, SetPredictions)
    assert tfidf.macro_f1 == pytest.approx(macro_f1_of_sets(floor.counts()))


def _published_sets(folder: Path, index: Any) -> str:
    """A run that published sets of labels for the validation posts; its id."""
    store, output = FolderStore(folder / "data"), open_store(str(folder / "runs"))
    ids, _, targets = zip(*posts(store, index.split("validation")), strict=True)
    truth_NC = dense(targets, len(index.labels)) > 0
    noise_NC = np.random.default_rng(1).random(truth_NC.shape)
    sets = SetPredictions.of(ids, truth_NC, np.clip(0.5 * truth_NC + 0.6 * noise_NC, 0, 1))
    report = {
        "labels": list(index.labels),
        "identity": {"run_id": "sets", "device": "NVIDIA L4", "world_size": 2},
        "speed": {
            "posts_per_second": 9.0,
            "labelling_posts_per_second": 50.0,
            "usd_per_hour": 1.8,
            "usd": 0.5,
        },
    }
    writer = Writer(output, "sets", index.sha256(), "0" * 64)
    writer.claim(0, 0)
    files = {"report.json": json.dumps(report).encode()}
    files[predictions_key("validation")] = predictions_to_parquet(sets, index.labels)
    parts = [upload_part(output, "sets", f"final/{writer.incarnation:08d}/{k}", v) for k, v in files.items()]
    writer.append("final", 1, 10, tuple(parts), {"macro_f1": 0.5})
    return "sets"


def test_rows_are_of_each_label_in_its_share() -> None:
    truth = [(0,)] * 60 + [(1,)] * 30 + [(2,)] * 10
    random.Random(0).shuffle(truth)
    for count in (10, 20, 50, 100):
        rows = stratified(truth, count, seed=3)
        assert rows == sorted(set(rows))
        shares = Counter(truth[row][0] for row in rows)
        for label, share in ((0, 0.6), (1, 0.3), (2, 0.1)):
            assert abs(shares[label] - count * share) <= 1
    assert stratified(truth, 20, seed=3) == stratified(truth, 20, seed=3) != stratified(truth, 20, seed=4)


@pytest.mark.parametrize(
    ("device", "price", "of_one"),
    [("L4", 1.8, 0.9), ("H100", 1.8, None), ("L4", None, None)],
)
def test_an_adapter_labels_at_the_training_s_price_where_it_has_the_same_device(
    device: str, price: float | None, of_one: float | None
) -> None:
    report = {"speed": {"usd_per_hour": price}, "identity": {"device": "L4", "world_size": 2}}
    assert _price_of(report, device) == of_one
    assert _price_of({}, device) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["one", "several"])
def test_an_adapter_is_scored_here_and_its_speed_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: TargetKind
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tiny_folder(tmp_path, kind)
    assert cli.main(["train", *tiny_words(tmp_path, "train.epochs=1", "report.usd_per_hour=7.2")]) == 0
    # of validation posts a run publishes the sets by thresholds that the others chose
    own = [
        "--split",
        "test",
        "--data",
        str(tmp_path / "data"),
        "--price-in",
        "0",
        "--price-out",
        "0",
        "--yes",
    ]
    says = '{"label": "calm"}' if kind == "one" else '{"labels": ["calm"]}'
    with FakeLLM(says=lambda prompt: says) as fake:
        line = [
            "benchmark",
            *own,
            "--llm",
            fake.word,
            "--adapter",
            str(tmp_path / "runs" / "tiny"),
            "--device",
            "cpu",
        ]
        assert cli.main([*line, "--out", str(tmp_path / "out")]) == 0
        held = (tmp_path / "out" / "benchmark.json").read_bytes()
        assert cli.main([*line, "--out", str(tmp_path / "out")]) == 0
        assert (tmp_path / "out" / "benchmark.json").read_bytes() == held
        run = ["benchmark", *own, "--llm", fake.word, "--run", str(tmp_path / "runs" / "tiny")]
        assert cli.main([*run, "--out", str(tmp_path / "out-run")]) == 0
    scored, published = read(tmp_path / "out"), read(tmp_path / "out-run")
    assert scored.own.f1_by_label == pytest.approx(published.own.f1_by_label)
    assert scored.own_facts["speed"] == "labelling"
    assert scored.own_facts["p50_s"] > 0
    assert scored.own_facts["posts_per_second"] > 0
    assert scored.own_facts["usd_per_hour"] == pytest.approx(7.2)  # the same device as the training's
    assert published.own_facts["speed"] == "labelling"
    for found in (scored, published):
        per_second = found.own_facts["posts_per_second"]
        assert found.own_facts["usd_per_million_posts"] == pytest.approx(7.2 / 3600 / per_second * 1e6)
        assert any("posts/s are those of its labelling on" in sentence for sentence in found.sentences)
