"""`emotion-launch compare` over published runs, pulled folders and scorecards: what it finds, what
it refuses, and pages that hold nothing of the outside.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from emotion_train.data.index import read_index
from emotion_train.errors import WrongRequest
from emotion_train.evaluation.metrics import confusion
from emotion_train.evaluation.predictions import (
    predictions_from_parquet,
    predictions_key,
    predictions_to_parquet,
)
from emotion_train.report.figures import SplitResult
from emotion_train.report.schema import Report
from emotion_train.report.scorecard import Seen, build_scorecard
from emotion_train.runs.published import download
from emotion_train.storage.local_s3 import LocalS3
from emotion_train.storage.open import open_store
from launch.cli import main
from launch.results.compare import comparison_of
from launch.results.comparison import Comparison
from launch.results.comparison_page import render_html
from launch.results.comparison_words import what_it_takes
from launch.results.differences import _group_name
from tests.emotion_train.report.test_report import parsed
from tests.helpers.published_runs import SHARES, publish_run, write_data

LABELS = tuple(SHARES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two configs of two seeds, and one that is as good as the first."""
    folder = tmp_path_factory.mktemp("compare")
    write_data(folder)
    for seed in (1, 2):
        publish_run(folder, f"low-seed-{seed}", f"run.seed={seed}", skill=1.6, usd_per_hour=2.0)
        publish_run(
            folder, f"high-seed-{seed}", f"run.seed={seed}", "lora.targets=all-linear", skill=2.6, texts=True
        )
    return folder


def urls(folder: Path, *run_ids: str) -> list[str]:
    return [f"{folder}/runs/{run_id}" for run_id in run_ids]


def told(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(["compare", *words])
    answer = capsys.readouterr()
    return code, answer.out, answer.err


# --- what is found ---


def test_a_planted_difference_is_found_with_every_figure_behind_it(folder: Path) -> None:
    found = comparison_of(urls(folder, "low-seed-1", "high-seed-1"))
    (versus,) = found.versus
    assert versus.outcome == "better"
    first, second = (
        predictions_from_parquet((path / "predictions_test.parquet").read_bytes())
        for path in (
            next((folder / "runs" / name / "final").iterdir()) for name in ("low-seed-1", "high-seed-1")
        )
    )
    scores = [f1_score(one.truth_N, one.predicted_N, average="macro") for one in (first, second)]
    assert [group.macro_f1 for group in found.groups] == pytest.approx(scores)
    assert versus.macro_f1.difference == pytest.approx(scores[1] - scores[0])
    assert versus.macro_f1.low > 0
    for label, one in enumerate(versus.labels):
        assert one.second == pytest.approx(f1_score(second.truth_N == label, second.predicted_N == label))
    right = [one.predicted_N == one.truth_N for one in (first, second)]
    lost, won = int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum())
    assert (len(versus.flips.lost), len(versus.flips.won)) == (lost, won)
    judged = stats.binomtest(lost, lost + won, 0.5).pvalue
    assert tuple(versus.mcnemar) == pytest.approx((lost, won, judged))
    assert found.groups[0].usd == pytest.approx(0.02)
    assert found.groups[1].usd is None
    assert found.groups[0].posts_per_second == 20
    changed = {row.name: row.values for row in found.differences["config"]}
    assert changed["lora.targets"] == ("q_proj, k_proj, v_proj, o_proj", "all-linear")
    assert "run.seed" not in changed
    assert found.differences["data"] == found.differences["versions"] == []


def test_a_run_compared_with_itself_shows_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    code, out, err = told(
        [*urls(folder, "low-seed-1", "low-seed-1"), "--page", str(page), "--fail-if-worse"], capsys
    )
    assert (code, err) == (0, "")
    assert "No difference can be shown between low-seed-1 (2) and low-seed-1 (1)" in out
    assert "No difference can be shown between low-seed-1 (2) and low-seed-1 (1)" in page.read_text()
    assert "+0.000 to +0.000" in out
    assert "No post flipped." in out
    assert "✓" not in out + page.read_text()


@pytest.mark.parametrize(("first", "second", "code"), [("low", "high", 0), ("high", "low", 1)])
def test_only_one_that_is_worse_beyond_chance_fails(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], first: str, second: str, code: int
) -> None:
    words = [*urls(folder, f"{first}-seed-1", f"{second}-seed-1"), "--page", str(tmp_path / "page.html")]
    assert told(words, capsys)[0] == 0
    ended, _, err = told([*words, "--fail-if-worse"], capsys)
    assert ended == code
    assert ("worse than high-seed-1: low-seed-1" in err) == bool(code)


@pytest.mark.parametrize(
    ("names", "name"),
    [
        (["first-seed-42", "first-seed-43", "first-seed-44"], "first"),
        (["run-4", "run-42"], "run"),
        (["v2", "v2-b"], "v2"),
        (["1", "12"], "1"),
    ],
)
def test_the_name_of_pooled_seeds_ends_before_the_number_of_the_seed(names: list[str], name: str) -> None:
    assert _group_name(names) == f"{name} ({len(names)} seeds)"


def test_seeds_of_one_config_are_pooled_and_counted(folder: Path) -> None:
    words = urls(folder, "low-seed-1", "high-seed-1", "high-seed-2", "low-seed-2")
    pooled, single = comparison_of(words, group_by_config=True), comparison_of(words[:2])
    assert [group.name for group in pooled.groups] == ["low (2 seeds)", "high (2 seeds)"]
    assert [group.seeds for group in pooled.groups] == [(1, 2), (1, 2)]
    (versus,), (alone,) = pooled.versus, single.versus
    means = [
        np.mean([one.macro_f1 for one in comparison_of([*pair]).groups]) for pair in (words[::3], words[1:3])
    ]
    assert versus.macro_f1.difference == pytest.approx(means[1] - means[0])
    # two seeds say little of seeds: the interval is wider than that of posts alone
    assert versus.macro_f1.high - versus.macro_f1.low > alone.macro_f1.high - alone.macro_f1.low
    assert versus.spread.freedom == 2
    assert re.search(
        r"^\d+ seeds of each config show 0\.\d+ in 8 of 10 repeats; the groups have 2 and 2",
        what_it_takes(pooled, versus),
    )
    assert "One run each" in what_it_takes(single, alone)
    seeds = comparison_of(words[::3])
    assert what_it_takes(seeds, seeds.versus[0]) == "They are one config: the difference comes from the seed."
    assert [round(one.mean, 6) for one in pooled.seeds] == [round(float(mean), 6) for mean in means]


def test_several_comparisons_are_corrected_and_that_is_said(folder: Path) -> None:
    words = urls(folder, "low-seed-1", "low-seed-2", "high-seed-1", "high-seed-2")
    found = comparison_of(words)
    raw = [one.macro_f1.p for one in found.versus]
    assert min(one.p for one in found.versus) == pytest.approx(3 * min(raw))
    assert found.versus[0].p >= raw[0]
    assert "each p is corrected for all of them (Holm)" in render_html(found)
    assert "Holm" not in render_html(comparison_of(words[:2]))


def test_one_config_alone_shows_how_its_seeds_spread(folder: Path) -> None:
    found = comparison_of(urls(folder, "low-seed-1", "low-seed-2"), group_by_config=True)
    assert found.versus == ()
    text = parsed(render_html(found)).text
    assert "nothing to compare it with" in text
    assert "over 2 seeds" in text


# --- pages ---


def test_the_page_shows_texts_of_flips_and_refers_to_nothing_outside(folder: Path) -> None:
    found = comparison_of(urls(folder, "low-seed-1", "high-seed-1"))
    page = render_html(found)
    assert page == render_html(comparison_of(urls(folder, "low-seed-1", "high-seed-1")))
    read = parsed(page)
    flip = found.versus[0].flips.won[0]
    assert flip.text is not None
    assert flip.text in read.text
    assert {flip.truth, flip.first, flip.second} <= set(LABELS)
    assert flip.second_probability > flip.first_probability
    assert not {"script", "link", "img"} & set(read.tags)
    assert "http" not in page.replace("http-equiv", "")
    assert "url(" not in page


def test_hostile_names_labels_and_texts_stay_text(folder: Path, tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    texts = {}
    for name in ("one", "other"):
        pulled = _pulled(folder, "low-seed-1" if name == "one" else "high-seed-1", tmp_path / name)
        document = json.loads((pulled / "report.json").read_text())
        _rename(document, hostile)
        document["identity"]["run_id"] = f"{name}{hostile}"
        (pulled / "report.json").write_text(json.dumps(document))
        raw = (pulled / "predictions_test.parquet").read_bytes()
        own = predictions_from_parquet(raw)
        texts = dict.fromkeys(own.ids, f"{hostile}\x1b[31m")
        (pulled / "predictions_test.parquet").write_bytes(predictions_to_parquet(own, LABELS, texts))
    found = comparison_of([str(tmp_path / "one"), str(tmp_path / "other")])
    page = render_html(found)
    assert "<script" not in page
    assert parsed(page).text.count(hostile) > 5


# --- how runs are named ---


def _rename(document: Any, label: str) -> None:
    """Another name for the first label of a report."""
    document["labels"][0] = label
    for figures in document["splits"].values():
        figures["per_label"][0]["label"] = label


def _pulled(folder: Path, run_id: str, to: Path) -> Path:
    download(f"{folder}/runs/{run_id}", to)
    return to / "report"


def _card(folder: Path, run_id: str, to: Path, trained_on: int = 0) -> Path:
    """What `evaluate --out` writes of the run's own test predictions."""
    pulled = _pulled(folder, run_id, to.parent / f"pulled-{to.name}")
    own = predictions_from_parquet((pulled / "predictions_test.parquet").read_bytes())
    report = Report.model_validate_json((pulled / "report.json").read_bytes())
    result = SplitResult(confusion(own.truth_N, own.predicted_N, len(LABELS)), own)
    card = build_scorecard(
        result,
        name="test",
        labels=report.labels,
        train_counts=None,
        seen=Seen(set(own.ids[:trained_on])),
        remarks=(),
        samples=100,
        seed=1,
        source=report.identity.data_url,
        run_id=run_id,
        base="some/base",
        precision="nf4",
    )
    to.mkdir()
    (to / "scorecard.json").write_bytes(card.to_bytes())
    (to / predictions_key("test")).write_bytes(predictions_to_parquet(own, report.labels))
    return to


def test_ids_folders_reports_and_scorecards_are_one_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = comparison_of(urls(folder, "low-seed-1", "high-seed-1")).versus[0].macro_f1
    pulled = _pulled(folder, "low-seed-1", tmp_path / "adapter")
    card = _card(folder, "low-seed-1", tmp_path / "card")
    monkeypatch.chdir(tmp_path)
    for word in (
        "low-seed-1",
        str(pulled),
        str(pulled.parent),
        str(pulled / "report.json"),
        "adapter",
        str(card),
    ):
        found = comparison_of([word, "high-seed-1"], output_url=f"{folder}/runs")
        assert found.versus[0].macro_f1 == expected, word
        assert found.groups[0].name == "low-seed-1"


def test_a_scorecard_tells_what_it_does_not_know(folder: Path, tmp_path: Path) -> None:
    card = str(_card(folder, "low-seed-1", tmp_path / "card", trained_on=30))
    found = comparison_of([card, *urls(folder, "high-seed-1")])
    assert found.groups[0].posts_per_second is None
    assert any(
        "30 of the 240 posts are in the training split of low-seed-1" in line for line in found.remarks
    )
    with pytest.raises(WrongRequest, match="does not hold its config"):
        comparison_of([card, *urls(folder, "high-seed-1")], group_by_config=True)


def test_runs_in_a_bucket_are_compared_and_the_page_goes_there(
    s3: LocalS3, own_bucket_url: str, tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(own_bucket_url)
    for path in sorted((folder / "runs").rglob("*")):
        if path.is_file():
            store.write(f"runs/{path.relative_to(folder / 'runs').as_posix()}", path.read_bytes())
    words = ["--output-url", f"{own_bucket_url}/runs", "low-seed-1", f"{own_bucket_url}/runs/high-seed-1"]
    code, out, _ = told([*words, "--page", f"{own_bucket_url}/runs/page.html"], capsys)
    assert code == 0
    assert f"written: {own_bucket_url}/runs/page.html" in out
    assert "high-seed-1 is better than low-seed-1" in store.read("runs/page.html").decode()


# --- what is refused ---


def test_another_training_split_is_told_and_other_test_posts_are_refused(folder: Path) -> None:
    write_data(folder, "more", train_seed=1)
    write_data(folder, "twin", test_words="another")
    publish_run(folder, "more", "run.seed=1", skill=2.6, data=str(folder / "more"))
    publish_run(folder, "twin", "run.seed=1", skill=2.6, data=str(folder / "twin"))
    found = comparison_of(urls(folder, "low-seed-1", "more"))
    assert {row.name for row in found.differences["data"]} == {"data set", "training split"}
    assert not found.remarks
    with pytest.raises(WrongRequest, match="240 of 240 posts have another text in twin than in low-seed-1"):
        comparison_of(urls(folder, "low-seed-1", "twin"))
    # a data set that is gone: ids and labels are all that is left, and that is said
    shutil.move(folder / "twin", folder / "gone")
    remarks = comparison_of(urls(folder, "low-seed-1", "twin")).remarks
    assert any("whether their texts are the same is not known" in line for line in remarks)
    twins = [f"{url}-{seed}" for url in urls(folder, "twin") for seed in range(1, 5)]
    for twin in twins:
        shutil.copytree(urls(folder, "twin")[0], twin)
    told = [
        line for line in comparison_of([*urls(folder, "low-seed-1"), *twins]).remarks if "not known" in line
    ]
    assert len(told) == 1
    assert "twin-3, … have the same ids" in told[0]
    assert "twin-4" not in told[0]


def test_posts_in_another_order_are_the_same_posts(folder: Path) -> None:
    """Their objects differ, so that they are read."""
    write_data(folder, "shuffled", seed=7)
    publish_run(folder, "shuffled", "run.seed=1", skill=2.6, data=str(folder / "shuffled"))
    test = [read_index(open_store(f"{folder}/{name}")).split("test") for name in ("data", "shuffled")]
    assert test[0].row_groups[0].sha256 != test[1].row_groups[0].sha256
    found = comparison_of(urls(folder, "high-seed-1", "shuffled"))
    assert found.versus[0].macro_f1 == comparison_of(urls(folder, *["high-seed-1"] * 2)).versus[0].macro_f1
    assert not found.remarks


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("ids", "were scored on different posts: 1 ids are only in the first and 1 only in the second"),
        ("truth", "1 of 240 posts have another true label in high-seed-1 than in low-seed-1"),
        ("labels", "have different labels"),
        ("predictions", "is not what its report counted"),
        ("missing", "There is no predictions_test.parquet"),
        ("schema", "its schema_version is 'emotion-train/other/1'"),
        ("later", "a later version wrote it"),
        ("damaged", "cannot be read"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(
    folder: Path, tmp_path: Path, change: str, says: str
) -> None:
    pulled = _pulled(folder, "high-seed-1", tmp_path / "adapter")
    path, report = pulled / "predictions_test.parquet", pulled / "report.json"
    document, own = json.loads(report.read_text()), predictions_from_parquet(path.read_bytes())
    truth_N, ids, predicted_N = own.truth_N.copy(), list(own.ids), own.predicted_N
    if change == "ids":
        ids[0] = "somewhere.csv:1"
    if change == "truth":
        truth_N[0] = (truth_N[0] + 1) % 3
    if change == "labels":
        _rename(document, "calmer")
    if change == "schema":
        document["schema_version"] = "emotion-train/other/1"
    if change == "later":
        document["invented"] = 1
    counted = confusion(truth_N, predicted_N, 3).tolist()
    if change == "predictions":
        counted[0][0] += 1
    document["splits"]["test"]["confusion"] = counted
    report.write_text("{" if change == "damaged" else json.dumps(document))
    changed = type(own)(tuple(ids), truth_N, predicted_N, own.prob_NC)
    path.write_bytes(predictions_to_parquet(changed, LABELS))
    if change == "missing":
        path.unlink()
    with pytest.raises(WrongRequest, match=re.escape(says)):
        comparison_of([*urls(folder, "low-seed-1"), str(pulled)])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["low-seed-1"], "alone is nothing to compare"),
        (["low-seed-1", "nobody"], "There is no run 'nobody'"),
        (["low-seed-1", "high-seed-1", "--split", "train"], "was not scored on 'train'"),
        (["low-seed-1", "low-seed-1", "--group-by-config"], "one config with one seed (1)"),
        (["low-seed-1", "./"], "holds neither report.json"),
        (
            ["low-seed-1", "high-seed-1", "--page", "here/"],
            "here/, which is no file; give one such as here/comparison.html",
        ),
        (
            ["low-seed-1", "high-seed-1", "--page", "s3://b"],
            "s3://b, which is no file; give one such as s3://b/comparison.html",
        ),
    ],
)
def test_a_wrong_request_ends_with_2(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = told(["--output-url", f"{folder}/runs", *words], capsys)
    assert code == 2
    assert says in err
    assert not list(tmp_path.iterdir())


def test_labels_in_another_order_are_brought_into_one(folder: Path, tmp_path: Path) -> None:
    expected: Comparison = comparison_of(urls(folder, "low-seed-1", "high-seed-1"))
    pulled = _pulled(folder, "high-seed-1", tmp_path / "adapter")
    document = json.loads((pulled / "report.json").read_text())
    own = predictions_from_parquet((pulled / "predictions_test.parquet").read_bytes())
    document["labels"].reverse()
    for figures in document["splits"].values():
        figures["per_label"].reverse()
        figures["confusion"] = [row[::-1] for row in figures["confusion"][::-1]]
    turned = type(own)(own.ids, 2 - own.truth_N, 2 - own.predicted_N, own.prob_NC[:, ::-1])
    (pulled / "report.json").write_text(json.dumps(document))
    (pulled / "predictions_test.parquet").write_bytes(predictions_to_parquet(turned, document["labels"]))
    found = comparison_of([*urls(folder, "low-seed-1"), str(pulled)])
    assert found.versus[0].macro_f1 == expected.versus[0].macro_f1
    assert found.versus[0].labels == expected.versus[0].labels


def test_depths_are_told_apart_and_reports_that_say_none_are_of_whole_bases(
    folder: Path, tmp_path: Path
) -> None:
    publish_run(folder, "half-seed-1", "run.seed=1", "model.layers=0.5", skill=1.6)
    found = comparison_of(urls(folder, "low-seed-1", "half-seed-1"))
    assert ("model.layers", ("–", "0.5")) in found.differences["config"]
    old = _pulled(folder, "low-seed-1", tmp_path / "old")
    report = json.loads((old / "report.json").read_text())
    del report["identity"]["config"]["model"]["layers"]
    (old / "report.json").write_text(json.dumps(report))
    words = [str(old), *urls(folder, "low-seed-2", "half-seed-1")]
    groups = comparison_of(words, group_by_config=True).groups
    assert [len(group.runs) for group in groups] == [2, 1]
