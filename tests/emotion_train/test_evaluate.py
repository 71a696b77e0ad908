"""A file of labelled posts is scored honestly: posts that the run was trained on are found, by the
run's filter, the pulled one, or the training posts themselves.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax

from emotion_train import cli as train_cli
from emotion_train.api import evaluate_adapter
from emotion_train.data.index import read_index
from emotion_train.data.text_filter import FILE_NAME, TextFilter, filter_of_split
from emotion_train.evaluation.floors import TFIDF
from emotion_train.evaluation.predictions import predictions_from_parquet
from emotion_train.model.facts import WEIGHTS
from emotion_train.preparation.steps import prepare
from emotion_train.report.schema import Scorecard
from emotion_train.runs.log import final_entry, read_part
from emotion_train.runs.origin import NotInReach, Origin
from emotion_train.runs.published import TRAINING_FILTER, training_filter
from emotion_train.storage.open import open_store
from launch import cli as launch_cli
from tests.helpers.tiny_adapter import write_weights
from tests.helpers.tiny_runs import tiny_config, tiny_words, write_posts

NOT_KNOWN = "Whether these posts were trained on could not be looked up: "


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published run `runs/tiny` of `data`, and its adapter without and with the filter."""
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        tiny_config(folder)
        assert train_cli.main(["train", *tiny_words(folder, "train.epochs=1")]) == 0
    run = str(folder / "runs" / "tiny")
    assert launch_cli.main(["pull", run, "--to", str(folder / "adapter")]) == 0
    words = ["pull", run, "--to", str(folder / "adapter-with"), "--with-training-filter"]
    assert launch_cli.main(words) == 0
    return folder


@pytest.fixture
def moved(home: Path, tmp_path: Path) -> Path:
    """A copy of all, while the adapters' facts name runs and data that are not there any more."""
    shutil.copytree(home, tmp_path / "moved")
    for path in (tmp_path / "moved").glob("adapter*/emotion_train.json"):
        facts = json.loads(path.read_bytes())
        facts |= {"output_url": f"{tmp_path}/gone/runs", "data_url": f"{tmp_path}/gone/data"}
        path.write_text(json.dumps(facts))
    return tmp_path / "moved"


def posts_of(home: Path, split: str) -> list[tuple[str, str]]:
    with (home / "source" / f"{split}.csv").open(newline="", encoding="utf-8") as file:
        return [(row["text"], row["label"]) for row in csv.DictReader(file)]


def written(path: Path, posts: list[tuple[str, str]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label"), *posts])
    return str(path)


def half(home: Path, folder: Path) -> str:
    """20 training posts, typed a little otherwise, and 20 new ones."""
    old = [(f" {text.upper()}", label) for text, label in posts_of(home, "train")[:20]]
    return written(folder / "half.csv", [*old, *posts_of(home, "test")[:20]])


def evaluate(adapter: Path, *words: str) -> Scorecard:
    out = adapter.parent / "scores"
    assert train_cli.main(["evaluate", "--adapter", str(adapter), *words, "--out", str(out)]) == 0
    return Scorecard.model_validate_json((out / "scorecard.json").read_bytes())


def counts(card: Scorecard) -> tuple[int, int, int]:
    """Trained on, looked at, and posts of the quoted figures."""
    assert card.trained_on is not None
    return card.trained_on.posts, card.trained_on.of, card.figures.rows


def refusal(capsys: pytest.CaptureFixture[str], adapter: Path, *words: str) -> str:
    assert train_cli.main(["evaluate", "--adapter", str(adapter), *words]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("emotion-train: ")
    return message


def told_by_report(adapter: Path, report: Path) -> None:
    """Make adapter and report what an earlier version wrote: the report told folders."""
    facts = json.loads((adapter / "emotion_train.json").read_bytes())
    document = json.loads(report.read_bytes())
    document["identity"]["data_url"] = facts.pop("data_url")
    document["identity"]["config"]["run"]["output_url"] = facts.pop("output_url")
    (adapter / "emotion_train.json").write_text(json.dumps(facts))
    report.write_text(json.dumps(document))


def without_filter(runs: Path, adapter: Path) -> None:
    """Make run and adapter what an earlier version wrote."""
    entry = final_entry(open_store(str(runs)), "tiny")
    path = runs / "tiny" / "log" / f"{entry.seq:08d}.json"
    document = json.loads(path.read_bytes())
    document["parts"] = [part for part in document["parts"] if not part["key"].endswith(FILE_NAME)]
    path.write_text(json.dumps(document))
    facts = json.loads((adapter / "emotion_train.json").read_bytes())
    del facts["index_sha256"]
    (adapter / "emotion_train.json").write_text(json.dumps(facts))
    told_by_report(adapter, adapter / "report" / "report.json")


def test_a_run_publishes_the_filter_of_its_training_split_and_pull_leaves_it_out(home: Path) -> None:
    store, data = open_store(str(home / "runs")), open_store(str(home / "data"))
    part = training_filter(final_entry(store, "tiny"))
    assert part is not None
    assert part.key.startswith("data/00000000/")
    content = read_part(store, "tiny", part)
    index = read_index(data)
    assert content == filter_of_split(data, index.split("train"), index.sha256()).to_bytes()
    assert (home / "adapter-with" / TRAINING_FILTER).read_bytes() == content
    files = {path.relative_to(home / "adapter-with") for path in (home / "adapter-with").rglob("*.*")}
    assert {path.relative_to(home / "adapter") for path in (home / "adapter").rglob("*.*")} == files - {
        Path(TRAINING_FILTER)
    }


def test_half_a_file_of_training_posts_is_counted_exactly(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = evaluate(home / "adapter", "--file", half(home, tmp_path))
    out = capsys.readouterr().out
    assert counts(card) == (20, 40, 20)
    assert card.figures_of_all is not None
    assert card.figures_of_all.rows == 40
    assert "20 of 40 posts are in the training split: their score is too good." in out
    assert f"Macro-F1 is {card.figures.macro_f1:.3f} on the 20 others and" in out
    assert "✓" not in out
    assert TFIDF in {floor.name for floor in card.figures.floors}
    alone = evaluate(home / "adapter", "--file", written(tmp_path / "new.csv", posts_of(home, "test")[:20]))
    assert counts(alone) == (0, 20, 20)
    assert alone.figures.macro_f1 == pytest.approx(card.figures.macro_f1)
    assert alone.figures.floors == card.figures.floors


def test_a_file_of_training_posts_alone_repeated_and_without_a_label(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    posts = [post for post in posts_of(home, "train") if post[1] != "awe"][:12]
    other = "rage" if posts[0][1] != "rage" else "calm"
    again = [posts[1], (posts[0][0].title(), other)]
    card = evaluate(home / "adapter", "--file", written(tmp_path / "all.csv", posts + again))
    out = capsys.readouterr().out
    assert counts(card) == (14, 14, 14)
    assert "All 14 posts are in the training split" in out
    assert "! 2 posts have the text of an earlier post, 1 of them with another label; each counts." in out
    assert "! Labels without a file post, which count 0 in macro-F1: awe" in out


def test_the_filter_that_was_pulled_is_enough(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = evaluate(moved / "adapter-with", "--file", half(moved, tmp_path))
    assert counts(card) == (20, 40, 20)
    out = capsys.readouterr().out
    gone = tmp_path / "gone" / "data"
    assert (
        f"There is no TF-IDF floor to compare with: there is no data set at {gone}. Give --training-" in out
    )


def test_a_run_or_a_data_set_out_of_reach_is_one_line_and_may_be_given(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = half(moved, tmp_path)
    card = evaluate(moved / "adapter", "--file", file)
    out = capsys.readouterr().out
    assert card.trained_on is None
    assert card.figures.rows == 40
    assert card.not_looked_up is not None
    assert card.not_looked_up.startswith(f"{NOT_KNOWN}There is no run 'tiny' at {tmp_path / 'gone' / 'runs'}")
    assert card.not_looked_up in out
    assert "Give --run OUTPUT_URL/RUN_ID or --training-data DATA_URL, or an adapter pulled with" in out
    assert "✓" not in out

    assert counts(evaluate(moved / "adapter", "--file", file, "--run", f"{moved}/runs/tiny")) == (20, 40, 20)
    card = evaluate(moved / "adapter", "--file", file, "--training-data", f"{moved}/data")
    assert counts(card) == (20, 40, 20)
    assert TFIDF in {floor.name for floor in card.figures.floors}
    told_by_report(moved / "adapter", moved / "adapter" / "report" / "report.json")
    shutil.rmtree(moved / "adapter" / "report")
    assert f"{NOT_KNOWN}nothing tells where the run" in str(
        evaluate(moved / "adapter", "--file", file).not_looked_up
    )


def test_a_run_of_an_earlier_version_is_looked_up_in_its_training_posts(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, run = half(moved, tmp_path), f"{moved}/runs/tiny"
    without_filter(moved / "runs", moved / "adapter")
    report = moved / "adapter" / "report" / "report.json"
    report.write_text(report.read_text().replace(str(tmp_path / "gone" / "data"), f"{moved}/data"))
    assert counts(evaluate(moved / "adapter", "--file", file)) == (20, 40, 20)
    assert counts(evaluate(moved / "adapter", "--data", f"{moved}/data")) == (0, 54, 54)
    (moved / "data").rename(moved / "elsewhere")
    card = evaluate(moved / "adapter", "--file", file, "--run", run, "--training-data", f"{moved}/data")
    assert f"run {run} was published by a version that kept no filter; there is no data" in str(
        card.not_looked_up
    )
    assert launch_cli.main(["pull", run, "--to", str(tmp_path / "pulled")]) == 0
    words = ["pull", run, "--to", str(tmp_path / "again"), "--with-training-filter"]
    assert launch_cli.main(words) == 2
    assert "has no filter of its training texts" in capsys.readouterr().err


def test_a_filter_that_is_damaged_or_of_another_run_is_refused(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, path = half(moved, tmp_path), moved / "adapter-with" / TRAINING_FILTER
    words = ("--file", file)
    content = path.read_bytes()
    path.write_bytes(content[:60] + b"x" + content[61:])
    message = refusal(capsys, moved / "adapter-with", *words)
    assert f"The training filter {path} is damaged; pull it again, or leave it out." in message
    path.write_bytes(TextFilter(108, "0" * 64).to_bytes())
    message = refusal(capsys, moved / "adapter-with", *words)
    assert "is of another data set than the adapter" in message
    path.write_bytes(content[:12] + b"\xff" * 8 + content[20:])
    with path.open("r+b") as hollow:
        hollow.truncate(1 << 40)  # nothing of it is read
    assert "is damaged" in refusal(capsys, moved / "adapter-with", *words)

    message = refusal(capsys, moved / "adapter", *words, "--run", f"{moved}/runs/other")
    assert "was published by run tiny, and --run names other; give OUTPUT_URL/tiny." in message
    part = training_filter(final_entry(open_store(str(moved / "runs")), "tiny"))
    assert part is not None
    (moved / "runs" / "tiny" / part.key).write_bytes(content[:-1] + b"x")
    message = refusal(capsys, moved / "adapter", *words, "--run", f"{moved}/runs/tiny")
    assert "does not have the sha256 that the log committed" in message


def test_a_split_of_any_data_set_is_looked_up_too(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of its own data set the training split alone; of another one whatever is in it."""
    card = evaluate(home / "adapter", "--data", str(home / "data"), "--split", "train")
    assert counts(card) == (108, 108, 108)
    assert "108 train posts, all of which were trained on," in capsys.readouterr().out
    assert counts(evaluate(home / "adapter", "--data", str(home / "data"))) == (0, 54, 54)

    other = write_posts(tmp_path / "source", seed=5)
    mixed = [*posts_of(tmp_path, "test"), *posts_of(home, "train")[:15]]
    written(other / "test.csv", mixed)
    prepare(str(other), str(tmp_path / "data"))
    assert counts(evaluate(home / "adapter", "--data", str(tmp_path / "data"))) == (15, 69, 54)


def test_folders_are_told_by_the_facts_and_not_by_the_report(moved: Path, tmp_path: Path) -> None:
    assert Origin.of(moved / "adapter").run_url == f"{tmp_path}/gone/runs/tiny"
    report = json.loads((moved / "adapter" / "report" / "report.json").read_bytes())
    assert report["identity"]["config"]["run"]["output_url"] == "runs"
    assert (report["identity"]["data_url"], report["identity"]["base"]) == ("data", "base")


def test_a_report_that_tells_nothing_of_use_is_passed_over(moved: Path, tmp_path: Path) -> None:
    """Of an adapter of an earlier version, whose report told folders too."""
    told_by_report(moved / "adapter", moved / "adapter" / "report" / "report.json")
    (published,) = (moved / "runs" / "tiny" / "final").glob("*/adapter")
    told_by_report(published, published.parent / "report.json")
    assert Origin.of(moved / "adapter").run_url == f"{tmp_path}/gone/runs/tiny"
    assert str(Origin.of(published).run_url).endswith("/runs/tiny")
    report = moved / "adapter" / "report" / "report.json"
    whole = json.loads(report.read_bytes())
    other = whole | {"identity": whole["identity"] | {"run_id": "other"}}
    for content in (b"", b"\xff", b"[" * 10_000, b"[]", b'{"identity": 1}', json.dumps(other).encode()):
        report.write_bytes(content)
        origin = Origin.of(moved / "adapter")
        assert (origin.run_url, origin.data_url) == (None, None)
        with pytest.raises(NotInReach, match="nothing tells where the run of this adapter is"):
            origin.training_filter(100)


def test_a_run_is_evaluated_and_used_by_its_url(
    moved: Path,
    tmp_path: Path,
    bucket_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its filter is found where the run is, not where its facts say that it was."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    facts = next((moved / "runs" / "tiny" / "final").glob("*/adapter/emotion_train.json"))
    assert str(moved) not in facts.read_text()
    capsys.readouterr()
    card = evaluate(moved / "runs" / "tiny", "--file", half(moved, tmp_path))
    assert counts(card) == (20, 40, 20)
    assert f"looking for the training filter of {moved}/runs/tiny\n" in capsys.readouterr().err
    here, there = open_store(f"{moved}/runs"), open_store(f"{bucket_url}/runs")
    for info in here.list("tiny/"):
        there.write(info.key, here.read(info.key))
    capsys.readouterr()
    answers = []
    for place in (moved / "adapter", f"{bucket_url}/runs/tiny", f"{bucket_url}/runs/tiny"):
        words = ["predict", "--adapter", str(place), "tea in the rain", "stop shouting"]
        assert train_cli.main(words) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2]
    assert len(list((tmp_path / "cache").rglob("adapter_model.safetensors"))) == 1


@pytest.fixture(scope="module")
def second(home: Path) -> Path:
    """An adapter beside that of the run, as another seed would have left it."""
    import torch
    from safetensors.torch import load_file

    folder = home / "second"
    shutil.copytree(home / "adapter", folder)
    state = load_file(folder / WEIGHTS)
    draw = torch.Generator().manual_seed(3)
    moved = {name: one + 0.05 * torch.randn(one.shape, generator=draw) for name, one in state.items()}
    write_weights(folder, moved)
    return folder


def test_adapters_answer_together_at_a_temperature_that_validation_posts_chose(
    home: Path, second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters, data = [home / "adapter", second], home / "data"
    for name, folder in zip("ab", adapters, strict=True):
        evaluate_adapter(folder, data, out=tmp_path / name, device="cpu")
    words = [word for folder in adapters for word in ("--adapter", str(folder))]
    assert train_cli.main(["evaluate", *words, "--data", str(data), "--out", str(tmp_path / "both")]) == 0
    assert "2 adapters together: tiny, tiny" in capsys.readouterr().out
    card = Scorecard.model_validate_json((tmp_path / "both" / "scorecard.json").read_bytes())
    assert [one.weights_sha256 for one in card.members] == [
        hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() for folder in adapters
    ]
    assert card.temperature is not None
    assert [gate.precision for gate in card.gates if gate.label is None] == [0.8, 0.9, 0.95, 0.99]
    a, b, both = (
        predictions_from_parquet((tmp_path / name / "predictions_test.parquet").read_bytes())
        for name in ("a", "b", "both")
    )
    assert a.ids == b.ids == both.ids
    divisor = 1.0 if card.temperature.temperature is None else card.temperature.temperature[0]
    mean_NC = (np.log(a.prob_NC.astype(float)) + np.log(b.prob_NC.astype(float))) / 2 / divisor
    np.testing.assert_allclose(both.prob_NC, softmax(mean_NC, axis=1), rtol=1e-4)
    assert np.abs(a.prob_NC - b.prob_NC).max() > 0.01


def test_what_nobody_judged_together_says_so(home: Path, second: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(second, moved)
    facts = json.loads((moved / "emotion_train.json").read_bytes())
    gone = {"index_sha256": "0" * 64, "output_url": f"{tmp_path}/runs", "data_url": f"{tmp_path}/data"}
    (moved / "emotion_train.json").write_text(json.dumps(facts | gone))
    card = evaluate_adapter([home / "adapter", moved], home / "data", device="cpu")
    assert card.temperature is None
    assert not card.gates
    assert card.trained_on is None
    assert any("No validation posts judged these adapters together" in one for one in card.warnings)


def test_a_store_that_does_not_answer_is_told_of_waited_for_once_and_ends_the_judging_of_several(
    home: Path,
    second: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in (("AWS_ENDPOINT_URL", "http://127.0.0.1:9"), ("AWS_REGION", "here")):
        monkeypatch.setenv(name, value)
    gone = {"index_sha256": "0" * 64, "output_url": "s3://gone/runs", "data_url": "s3://gone/data"}
    words = []
    for name, adapter in (("one", home / "adapter"), ("two", second)):
        shutil.copytree(adapter, tmp_path / name, ignore=shutil.ignore_patterns("report"))
        facts = json.loads((adapter / "emotion_train.json").read_bytes())
        (tmp_path / name / "emotion_train.json").write_text(json.dumps(facts | gone))
        words += ["--adapter", str(tmp_path / name)]
    asked = ["evaluate", "--file", half(home, tmp_path), "--device", "cpu"]
    looking = "looking for the data set s3://gone/data that the adapter was trained on\n"
    assert train_cli.main([*asked, *words]) == 1
    told = capsys.readouterr().err
    assert told.count(looking) == 1
    assert "cannot be read: s3://gone/data/index.json cannot be reached" in told
    assert "give --training-data DATA_URL" in told
    assert train_cli.main([*asked, *words, "--training-data", str(home / "data")]) == 0
    capsys.readouterr()
    assert train_cli.main([*asked, *words[:2]]) == 0  # of one adapter no figure hangs on it
    told = capsys.readouterr().err
    assert told.count(looking) == 1


def test_adapters_that_cannot_answer_together_are_refused(
    home: Path, second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def other(name: str, file: str, change: Callable[[dict[str, Any]], object]) -> str:
        shutil.copytree(second, tmp_path / name)
        document = json.loads((tmp_path / name / file).read_bytes())
        change(document)
        (tmp_path / name / file).write_text(json.dumps(document))
        return str(tmp_path / name)

    turned = other("turned", "labels.json", lambda one: one["labels"].reverse())
    stranger = other("stranger", "emotion_train.json", lambda one: one.update(base_weights_sha256="0" * 64))
    wide = other("wide", "emotion_train.json", lambda one: one["lora"].update(r=99))
    shallow = other("shallow", "emotion_train.json", lambda one: one.update(layers=1))
    for place, what in (
        *((turned, "labels"), (stranger, "base"), (wide, "lora.r")),
        (shallow, "model.layers"),
    ):
        told = refusal(capsys, home / "adapter", "--adapter", place, "--data", str(home / "data"))
        assert f"differ in their {what}, so their answers cannot be averaged" in told
    assert "once more; give each --adapter once" in refusal(
        capsys, second, "--adapter", str(second), "--data", str(home / "data")
    )
    run = str(home / "runs" / "tiny")  # whose adapter was pulled into home / "adapter"
    for verb in (
        ["predict", "a post"],
        ["label", str(home / "source" / "test.csv"), str(tmp_path / "labels")],
    ):
        assert train_cli.main([*verb, "--adapter", str(home / "adapter"), "--adapter", run]) == 2
        assert f"{run} is {home / 'adapter'} once more" in capsys.readouterr().err
    words = ["--adapter", str(home / "adapter"), "--adapter", str(second), "a post"]
    assert train_cli.main(["predict", *words, "--accept-precision", "0.9"]) == 2
    assert "is by the gate of one adapter, and several are given" in capsys.readouterr().err
    assert train_cli.main(["predict", *words]) == 0
    assert capsys.readouterr().out.endswith("a post\n")


@pytest.mark.parametrize("taken", ["scorecard.json", "predictions_test.parquet"])
def test_what_cannot_be_written_costs_no_figures_and_leaves_no_scorecard(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], taken: str
) -> None:
    (tmp_path / "out" / taken).mkdir(parents=True)  # no file can be written there
    asked = ["evaluate", "--adapter", str(home / "adapter"), "--data", str(home / "data")]
    assert train_cli.main([*asked, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert "Macro-F1" in told.out
    assert "written:" not in told.out
    assert f"{taken} cannot be written" in told.err
    assert not (tmp_path / "out" / "scorecard.json").is_file()


def test_texts_without_a_place_for_predictions_are_refused(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["evaluate", "--adapter", str(home / "adapter"), "--data", str(home / "data"), "--with-texts"]
    assert train_cli.main(asked) == 2
    assert "type --out FOLDER" in capsys.readouterr().err


def test_labels_that_the_adapter_does_not_know_are_named_with_the_near_ones(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    posts = posts_of(moved, "test")
    known = posts[0][1]
    file = written(tmp_path / "other.csv", [(posts[0][0], known.upper()), (posts[1][0], "xyzzyx")])
    assert train_cli.main(["evaluate", "--adapter", str(moved / "adapter"), "--file", file]) == 2
    told = capsys.readouterr().err
    assert f"{known.upper()!r} 1 time, did you mean {known!r}?" in told
    assert "'xyzzyx' 1 time\n" in told


@pytest.mark.parametrize("what", ["finite weights that overflow", "one label of several"])
def test_probabilities_that_are_no_numbers_are_refused_by_every_verb(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    """NaN has a largest label too: every post was answered, and JSONL held a NaN."""
    import torch
    from safetensors.torch import load_file

    folder = tmp_path / "adapter"
    shutil.copytree(home / "adapter", folder)
    state = load_file(folder / WEIGHTS)
    head = next(name for name in state if name.endswith("score.weight"))
    if what.startswith("finite"):
        state = {name: torch.full_like(one, 3e38) for name, one in state.items()}
    else:
        state[head] = torch.cat([torch.full_like(state[head][:1], 3e38), state[head][1:]])
    write_weights(folder, state)
    source, data = home / "source" / "test.csv", home / "data"
    for verb in (
        ["predict", "a post", "--format", "jsonl"],
        ["evaluate", "--data", str(data)],
        ["evaluate", "--file", str(source)],
        ["label", str(source), str(tmp_path / "labels")],
    ):
        assert train_cli.main([*verb, "--adapter", str(folder)]) == 2
        told = capsys.readouterr()
        assert "posts are no numbers, so the weights" in told.err
        assert told.out == ""
    assert list((tmp_path / "labels").glob("part-*")) == []
