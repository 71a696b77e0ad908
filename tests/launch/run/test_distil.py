"""Teachers of folds and the student that learns from them: no post gets shares from a model that
saw it, and the same command resumes at what is not done.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax

from emotion_train import cli as train_cli
from emotion_train.config import load_config
from emotion_train.data.index import Index, read_index
from emotion_train.data.text_filter import TextFilter, keys_of
from emotion_train.errors import EmotionTrainError, WrongRequest
from emotion_train.evaluation.predictions import Predictions, predictions_from_parquet
from emotion_train.model.facts import read_facts
from emotion_train.preparation.derived import read_split
from emotion_train.preparation.folds import folds_of_texts, require_foldable, softened, write_fold, write_soft
from emotion_train.preparation.steps import prepare
from emotion_train.runs.adapter_cache import find_adapter
from emotion_train.runs.log import final_entry, read_log, read_part
from emotion_train.runs.published import training_filter
from emotion_train.storage.open import open_store
from emotion_train.storage.store import Store
from launch import cli as launch_cli
from launch.run.distil import distil
from launch.run.topology import Topology
from launch.up import commands as commands_page
from launch.up import jobs as jobs_page
from launch.up import runs as runs_page
from launch.up.commands import Commands, Stopped
from tests.helpers.auxiliary_posts import auxiliary_config
from tests.helpers.tiny_runs import tiny_config, tiny_words, write_posts

TEACHERS = ["tiny-fold-0-of-2-seed-5", "tiny-fold-1-of-2-seed-5"]
SOFT = "soft-2-folds-seeds-5-own-0.3"


def asked(folder: Path, *words: str) -> argparse.Namespace:
    values = tiny_words(folder, "train.epochs=1", "run.seed=5")
    line = ["distil", "--folds", "2", "--seeds", "1", "--student", "model.layers=1", *words, *values]
    return launch_cli._parser().parse_args(line)


def call(
    folder: Path, run_once: Callable[[argparse.Namespace], int], *words: str, more: tuple[str, ...] = ()
) -> int:
    arguments = asked(folder, *words)
    arguments.overrides += more
    return distil(arguments, load_config(None, arguments.overrides), Topology(()), run_once)


def train(own: argparse.Namespace) -> int:
    return train_cli.main(["train", *own.overrides])


def never(own: argparse.Namespace) -> int:
    raise AssertionError(f"trained again: {own.overrides}")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it, stopped once after the first teacher, as after a preemption."""
    folder = tmp_path_factory.mktemp("distil")
    tiny_config(folder)
    started: list[str] = []

    def first_only(own: argparse.Namespace) -> int:
        started.append(own.overrides[-2])
        return train(own) if len(started) == 1 else 33

    def rest(own: argparse.Namespace) -> int:
        started.append(own.overrides[-2])
        return train(own)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert call(folder, first_only) == 33
        assert call(folder, rest) == 0
        assert call(folder, never) == 0
    first, second = (f"run.id={one}" for one in TEACHERS)
    assert started == [first, second, second, "run.id=tiny"]
    return folder


def data(home: Path, name: str) -> tuple[Store, Index]:
    store = open_store(str(home / "data-distil" / "tiny" / name))
    return store, read_index(store)


def published(home: Path, run_id: str, name: str) -> bytes:
    store = open_store(str(home / "runs"))
    entry = final_entry(store, run_id)
    part = next(part for part in entry.parts if part.key == f"final/{entry.incarnation:08d}/{name}")
    return read_part(store, run_id, part)


def said_by(home: Path, run_id: str) -> Predictions:
    return predictions_from_parquet(published(home, run_id, "predictions_test.parquet"))


def test_no_post_is_scored_by_a_model_that_saw_it(home: Path) -> None:
    source = open_store(str(home / "data"))
    index = read_index(source)
    rows = read_split(source, index, "train")
    text_of = {post_id: str(text) for post_id, text in zip(rows.ids, rows.texts, strict=True)}
    scored: list[str] = []
    for fold, run_id in enumerate(TEACHERS):
        own = said_by(home, run_id).ids
        store, of_fold = data(home, f"fold-{fold}-of-2")
        seen = set(read_split(store, of_fold, "train").ids)
        assert not seen & set(own)
        assert seen | set(own) == set(rows.ids)
        # by what the run itself published of the texts that it was trained on
        runs = open_store(str(home / "runs"))
        part = training_filter(final_entry(runs, run_id))
        assert part is not None
        trained_on = TextFilter.from_bytes(read_part(runs, run_id, part), run_id)
        assert trained_on.contains(keys_of(text_of[one] for one in seen)).all()
        assert trained_on.contains(keys_of(text_of[one] for one in own)).mean() < 0.05
        scored += own
    assert sorted(scored) == sorted(rows.ids)


def test_shares_are_a_post_s_own_label_and_what_its_fold_s_teacher_says(home: Path) -> None:
    store, index = data(home, SOFT)
    assert (index.targets, index.trained_targets) == ("one", "shares")
    soft = read_split(store, index, "train")
    source = open_store(str(home / "data"))
    own = read_split(source, read_index(source), "train")
    assert soft.ids == own.ids
    assert soft.texts == own.texts
    raw: dict[str, np.ndarray] = {}
    for run_id in TEACHERS:
        told = said_by(home, run_id)
        temperature = json.loads(published(home, run_id, "adapter/decision.json"))["temperature"] or [1.0]
        logits = np.log(told.prob_NC.astype(float)) * temperature[0]
        raw |= dict(zip(told.ids, softmax(logits, axis=1), strict=True))
    for post_id, target, (label, _) in zip(
        soft.ids, soft.targets, ((one or ())[0] for one in own.targets), strict=True
    ):
        shares = np.zeros(4)
        for place, share in target or ():
            shares[place] = share
        expected = 0.3 * np.eye(4)[label] + 0.7 * raw[post_id]
        np.testing.assert_allclose(shares, expected, atol=2e-4)
        assert shares.sum() == pytest.approx(1, abs=1e-9)


def test_held_out_posts_are_the_same_bytes_and_the_student_answers_with_one_label(home: Path) -> None:
    source = open_store(str(home / "data"))
    before = read_index(source)
    for name, splits in ((SOFT, ("validation", "test")), ("fold-0-of-2", ("validation",))):
        store, index = data(home, name)
        for split in splits:
            for old, new in zip(before.split(split).objects, index.split(split).objects, strict=True):
                assert source.read(old.key) == store.read(new.key)
    adapter = find_adapter(str(home / "runs" / "tiny")).folder
    facts = read_facts(adapter)
    assert (facts.targets, facts.layers) == ("one", 1)
    assert read_facts(find_adapter(str(home / "runs" / TEACHERS[0])).folder).layers is None
    assert read_log(open_store(str(home / "runs")), "tiny")[-1].kind == "final"


def test_another_data_set_or_run_at_their_places_is_refused(home: Path, tmp_path: Path) -> None:
    tiny_config(tmp_path)
    place = f"--to={home / 'data-distil' / 'tiny'}"
    (tmp_path / "data").rename(tmp_path / "other")
    prepare(str(write_posts(tmp_path / "source-2", seed=9)), str(tmp_path / "data"))
    with pytest.raises(WrongRequest, match=r"was made from another data set than data\.url names"):
        call(tmp_path, never, place)


def test_teachers_of_another_data_set_teach_nobody(home: Path, tmp_path: Path) -> None:
    """Also where its posts are the same and what is trained on beside them differs."""
    config = auxiliary_config(tmp_path)
    with pytest.raises(WrongRequest, match=rf"{TEACHERS[0]} .* was trained on another data set"):
        call(home, never, f"--to={tmp_path / 'to'}", more=(f"data.url={config.data.url}",))


@pytest.mark.parametrize("change", ["lora.r=2", "train.learning_rate=0.02", "train.epochs=2"])
def test_teachers_of_another_request_teach_nobody(home: Path, tmp_path: Path, change: str) -> None:
    with pytest.raises(
        WrongRequest, match=rf"{TEACHERS[0]} was published with another request.*{change[:6]}"
    ):
        call(home, never, more=(change,))
    assert call(home, never, more=("train.tokens_per_microbatch=256", "report.examples=1")) == 0


@pytest.mark.parametrize(
    ("words", "more", "told"),
    [
        (("--folds", "1"), (), "--folds is 1; give 2 to 20"),
        (("--own", "1"), (), "--own is 1; give a share from 0"),
        ((), ("model.adapter=somewhere",), "may have seen the posts of any fold"),
        ((), ("data.limit=50",), "data.limit drops posts"),
        ((), ("run.id=none",), "give run.id=NAME"),
        (("--student", "model.layers=2"), (), r"tiny was published with another request.*model\.layers"),
        (("--student", "run.seed=3"), (), r"and run\.seed=3 is no such value; give one of model, lora,"),
        (("--student", "model.adapter=somewhere"), (), "may have seen the posts of any fold"),
        (("--spread",), (), "no GPU is used here"),
        (("--seeds", "0"), (), "give 1 to 100"),
    ],
)
def test_what_cannot_be_distilled_is_refused(
    home: Path, words: tuple[str, ...], more: tuple[str, ...], told: str
) -> None:
    with pytest.raises(WrongRequest, match=told):
        call(home, never, *words, more=more)


def test_dry_run_and_lines_for_jobs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in (home / "data-distil" / "tiny").iterdir())
    words = tiny_words(home, "run.id=later")
    assert launch_cli.main(["distil", "--dry-run", "--folds", "4", *words]) == 0
    told = capsys.readouterr().out
    assert "8 teachers: later-fold-0-of-4-seed-42" in told
    assert sorted(path.name for path in (home / "data-distil" / "tiny").iterdir()) == before
    asked = ["distil", "--dry-run", "--as-jobs", "--folds", "2", *tiny_words(home, "data.url=s3://b/data")]
    assert launch_cli.main([*asked, "run.output_url=s3://b/runs"]) == 0
    assert "sky jobs launch sky/train.yaml -n tiny-fold-0-of-2-seed-42" in capsys.readouterr().out


class FakeSky(Commands):
    """A SkyPilot whose jobs publish what `home` published. They end when they are followed, or,
    with `at_once`, by themselves; what is typed as `stops` ends with 130.
    """

    def __init__(self, home: Path, folder: Path) -> None:
        super().__init__({})
        self.home, self.folder = home, folder
        self.living: dict[str, int] = {}
        self.typed: list[str] = []
        self.stops = ""

    def call(self, words: Sequence[str], *, cwd: Path | None = None) -> None:
        line = " ".join(words)
        name = line.split(" --name ")[1].split()[0] if "--name" in words else ""
        self.typed.append(" ".join([*words[1 : 3 if words[1] == "jobs" else 2], name]).strip())
        if self.typed[-1] == self.stops:
            raise Stopped(130)
        if words[1] == "plan" and "--write" in words:
            Path(words[-1]).parent.mkdir(parents=True, exist_ok=True)
            Path(words[-1]).write_text("envs: {OVERRIDES: model.precision=nf4}\n")
        if words[:3] == ["sky", "jobs", "launch"]:
            assert "--detach-run" in words
            assert "model.precision=nf4" in line
            assert f"run.id={name} " in line
            self.living[name] = len(self.typed)
        if words[:3] == ["sky", "jobs", "logs"]:
            name = next(one for one, number in self.living.items() if str(number) == words[-1])
            shutil.copytree(self.home / "runs" / name, self.folder / "runs" / name)
            del self.living[name]

    def answer(self, words: Sequence[str]) -> str:
        price = {"gpus": "L4:1", "hours": 3.0, "hours_on_spot": 3.4, "usd_spot": 1.1, "usd_on_demand": 2.4}
        return json.dumps({"choices": [price]})


@pytest.fixture
def sky(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSky:
    """The data set in a place of its own, which passes for a bucket."""
    fake = FakeSky(home, tmp_path)
    for name in ("base", "data"):
        shutil.copytree(home / name, tmp_path / name)

    @contextmanager
    def here() -> Iterator[Commands]:
        yield fake

    monkeypatch.setattr(commands_page, "commands", here)
    monkeypatch.setattr(runs_page, "require_sky", lambda: "sky")
    monkeypatch.setattr(runs_page, "out_of_reach", lambda url: False)
    for page in (runs_page, jobs_page):
        monkeypatch.setattr(page, "living_jobs", lambda: dict(fake.living))
    return fake


def test_as_jobs_all_teachers_are_started_before_one_is_followed_and_the_student_comes_after_them(
    sky: FakeSky, capsys: pytest.CaptureFixture[str]
) -> None:
    started = [f"jobs launch {one}" for one in TEACHERS]
    asked = ["check", "plan", "check"]
    assert call(sky.folder, never, "--as-jobs", "--yes") == 0
    followed = ["jobs logs", "jobs logs"]
    assert sky.typed == [*asked, *started, *followed, "jobs launch tiny", "jobs logs"]
    told = capsys.readouterr()
    assert "train 3 runs on L4:1, about 3.4 hours, about $1.10 each, at most $3.30 in all" in told.err
    assert f"the student: {sky.folder / 'runs' / 'tiny'}" in told.out
    sky.typed.clear()
    assert call(sky.folder, never, "--as-jobs") == 0  # nothing is left to agree to
    assert sky.typed == []


@pytest.mark.parametrize("stops", ["jobs logs", f"jobs launch {TEACHERS[1]}", "jobs launch tiny"])
def test_stopped_anywhere_the_same_command_follows_what_is_alive_and_starts_what_is_not(
    sky: FakeSky, stops: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sky.stops = stops
    assert call(sky.folder, never, "--as-jobs", "--yes") == 130
    assert "the same command follows them" in capsys.readouterr().err
    sky.stops = ""
    assert call(sky.folder, never, "--as-jobs", "--yes") == 0
    launched = [one for one in sky.typed if one.startswith("jobs launch")]
    assert sorted({*launched}) == [f"jobs launch {one}" for one in ("tiny", *TEACHERS)]
    assert len(launched) - len({*launched}) == int(stops != "jobs logs")  # the one that was stopped, again
    assert "the student: " in capsys.readouterr().out


def test_as_jobs_a_price_that_is_too_high_or_a_job_that_ends_without_its_run_starts_no_student(
    sky: FakeSky, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WrongRequest, match=r"for each of 3 runs, \$3\.30 in all: more than --max-usd 3\. "):
        call(sky.folder, never, "--as-jobs", "--yes", "--max-usd", "3")
    assert not any(one.startswith("jobs") for one in sky.typed)
    monkeypatch.setattr(shutil, "copytree", lambda *words: None)
    with pytest.raises(EmotionTrainError, match=rf"The job {TEACHERS[0]} ended or was left, and "):
        call(sky.folder, never, "--as-jobs", "--yes")
    assert "jobs launch tiny" not in sky.typed


@pytest.mark.parametrize(
    ("words", "more", "told"),
    [
        ((), (), "`sky` is not on the PATH"),
        (("--yes",), (), "--yes is for machines that SkyPilot finds; leave it out, or add --as-jobs"),
        (("--spread",), (), "give one of the two"),
        (("--accelerate-config", "cpu"), (), "--accelerate-config is for trainings on this machine"),
        ((), ("run.id=0nine",), "a letter first"),
        ((), ("run.trackers=[wandb, mlflow]",), "white space"),
        ((), ("data.url=here",), "here is a folder, which a cloud's machine does not reach"),
    ],
)
def test_as_jobs_what_is_missing_is_said_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], more: tuple[str, ...], told: str
) -> None:
    if told.startswith("`sky`"):
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setattr(runs_page, "require_sky", lambda: "sky")
    as_jobs = () if "--yes" in words else ("--as-jobs",)
    own = ("data.url=s3://bucket/posts", "run.output_url=s3://bucket/runs", *more)
    with pytest.raises(WrongRequest, match=told):
        call(tmp_path, never, *as_jobs, *words, more=own)


def test_a_fold_follows_from_the_text_alone() -> None:
    texts = [f"post {number}" for number in range(3000)]
    fold_N = folds_of_texts(texts, 3)
    assert np.array_equal(folds_of_texts(texts[::-1], 3)[::-1], fold_N)
    assert np.array_equal(folds_of_texts([f" {text.upper()}  " for text in texts], 3), fold_N)
    assert (np.bincount(fold_N, minlength=3) > 900).all()


def test_tiny_shares_are_left_out() -> None:
    found = softened(((1, 1.0),), np.array([0.9, 0.09995, 0.00005]), 0.3)
    assert [label for label, _ in found] == [0, 1]
    assert sum(share for _, share in found) == pytest.approx(1, abs=1e-12)


def test_auxiliary_posts_are_food_of_teachers_and_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = auxiliary_config(tmp_path)
    source = open_store(config.data.url)
    index = read_index(source)
    rows = read_split(source, index, "train")
    assert index.auxiliary is not None
    require_foldable(index, rows, 2, config.data.url)
    fold = write_fold(source, index, rows, 0, 2, open_store(str(tmp_path / "fold")), "--to")
    even = dict.fromkeys(rows.ids, np.full(4, 0.25))
    soft = write_soft(source, index, rows, even, 0.3, {}, open_store(str(tmp_path / "soft")), "--to")
    for made, name in ((fold, "fold"), (soft, "soft")):
        assert made.auxiliary is not None
        for old, new in zip(index.auxiliary.split.objects, made.auxiliary.split.objects, strict=True):
            assert source.read(old.key) == open_store(str(tmp_path / name)).read(new.key)
    assert soft.requires == ("auxiliary", "soft")
    assert soft.trained_labels == index.trained_labels
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    asked = tiny_words(tmp_path, f"data.url={tmp_path / 'soft'}", "run.id=soft", "train.max_steps=2")
    assert train_cli.main(["train", *asked, "report.floor_max_rows=0"]) == 0
    assert read_facts(find_adapter(str(tmp_path / "runs" / "soft")).folder).labels == index.labels
