from __future__ import annotations

import gc
import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emotion_train.bases.files import BaseFiles
from emotion_train.bases.staged import BASE_KEY, UNFINISHED_KEY, read_staged_index
from emotion_train.cli import main
from emotion_train.config import LoraSection
from emotion_train.data.tokenization import PostTokenizer
from emotion_train.errors import StorageError, WrongRequest
from emotion_train.evaluation.scoring import probabilities_of
from emotion_train.model import staged_weights
from emotion_train.model.card import CardFacts, reload_snippet
from emotion_train.model.facts import AdapterFacts
from emotion_train.model.load import load_base, read_config
from emotion_train.model.lora import build_classifier, load_adapter, save_adapter
from emotion_train.model.precision import Precision
from emotion_train.model.staged_copy import StageResult, stage
from emotion_train.storage.folder import FolderStore
from emotion_train.storage.open import open_store
from emotion_train.storage.store import ObjectInfo, Store
from tests.helpers.patience import PATIENCE_S
from tests.helpers.tiny_models import causal_checkpoint, hidden, multimodal_checkpoint, text_config

PRECISIONS: tuple[Precision, ...] = ("bf16", "nf4")
# several objects, tensors larger and smaller than a piece
SMALL = {"shard_bytes": 60_000, "piece_bytes": 10_000}


def staged(base: Path, url: str, precision: Any = "bf16", device: str = "cpu") -> StageResult:
    return stage(str(base), url, precision, device, **SMALL)


def raw(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().contiguous().view(-1).view(torch.uint8)


def assert_same_bits(one: Any, other: Any) -> None:
    assert_same_parameters(one, other)
    assert torch.equal(hidden(one.model), hidden(other.model))


def assert_same_parameters(one: Any, other: Any) -> None:
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert (parameter.dtype, parameter.device) == (theirs[name].dtype, theirs[name].device)
        assert parameter.shape == theirs[name].shape
        # 4-bit codes read as bfloat16 may be no numbers
        assert torch.equal(raw(parameter), raw(theirs[name])), name
        state, other_state = (getattr(weight, "quant_state", None) for weight in (parameter, theirs[name]))
        if state is not None:
            assert other_state is not None
            assert (state.dtype, state.shape, state.blocksize) == (
                other_state.dtype,
                other_state.shape,
                other_state.blocksize,
            )
            for mine, its in (
                (state.absmax, other_state.absmax),
                (state.code, other_state.code),
                (state.offset, other_state.offset),
                (state.state2.absmax, other_state.state2.absmax),
                (state.state2.code, other_state.state2.code),
            ):
                assert torch.equal(mine, its)
                assert mine.device == its.device


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multimodal checkpoint in the hub's layout, bfloat16 as published."""
    folder, _ = multimodal_checkpoint(tmp_path_factory.mktemp("stage") / "base")
    for path in folder.glob("*.safetensors"):
        from safetensors.torch import load_file, save_file

        save_file(
            {key: tensor.to(torch.bfloat16) for key, tensor in load_file(path).items()},
            path,
            metadata={"format": "pt"},
        )
    return folder


# --- the same model ---


def test_source_and_staged_bases_give_the_same_bits_and_identity(base: Path, store: Store) -> None:
    for precision in PRECISIONS:
        result = staged(base, f"{store.url}/{precision}", precision)
        assert result.created
        assert len(result.index.shards) > 1 or precision == "nf4"
    for precision, places in (("nf4", ("bf16", "nf4")), ("bf16", ("bf16",)), ("fp32", ("bf16",))):
        model, info = load_base(str(base), precision, 3, "cpu")
        for place in places:
            again, its = load_base(f"{store.url}/{place}", precision, 3, "cpu")
            assert_same_bits(model, again)
            assert (its.weights_sha256, its.shape_sha256, its.parameters) == (
                info.weights_sha256,
                info.shape_sha256,
                info.parameters,
            )
            assert its.name == (
                f"{store.url}/{place}"
                if store.url.startswith("s3:")
                else str(Path(store.url, place).resolve())
            )
    assert PostTokenizer.load(f"{store.url}/nf4", 64).sha256() == PostTokenizer.load(str(base), 64).sha256()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3_text", "qwen3_5_text", "ministral3"])
def test_other_architectures_are_staged_with_their_biases_and_norms(tmp_path: Path, kind: str) -> None:
    source = causal_checkpoint(tmp_path / "base", kind, dtype=torch.bfloat16)
    for precision in PRECISIONS:
        staged(source, str(tmp_path / precision), precision)
        assert_same_bits(
            load_base(str(source), "nf4", 2, "cpu")[0],
            load_base(str(tmp_path / precision), "nf4", 2, "cpu")[0],
        )


def test_staged_codes_can_be_stored_as_bfloat16_for_sharding(base: Path, tmp_path: Path) -> None:
    for precision in PRECISIONS:
        staged(base, str(tmp_path / precision), precision)
        for asked in PRECISIONS if precision == "bf16" else (precision,):
            plain, _ = load_base(str(base), asked, 2, "cpu", to_be_sharded=True)
            assert_same_bits(
                plain, load_base(str(tmp_path / precision), asked, 2, "cpu", to_be_sharded=True)[0]
            )


def test_plain_transformers_reads_a_staged_folder(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    for precision in PRECISIONS:
        staged(base, str(tmp_path / precision), precision)
        ours, _ = load_base(str(tmp_path / precision), precision, 2, "cpu")
        theirs, loading = AutoModel.from_pretrained(
            tmp_path / precision, output_loading_info=True, trust_remote_code=False
        )
        assert not any(loading.values()), loading
        assert theirs.dtype == torch.bfloat16
        assert_same_parameters(theirs, ours.model)
    exact = AutoModel.from_pretrained(tmp_path / "bf16", dtype=torch.float32, trust_remote_code=False).eval()
    torch.testing.assert_close(
        hidden(exact), hidden(load_base(str(tmp_path / "bf16"), "fp32", 2, "cpu")[0].model), rtol=0, atol=1e-5
    )
    assert len(AutoTokenizer.from_pretrained(tmp_path / "nf4", trust_remote_code=False)) == 260


def test_text_tensors_alone_are_staged_under_the_text_models_names(base: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    index = staged(base, str(tmp_path / "out")).index
    assert all(tensor.source == f"language_model.{tensor.name}" for tensor in index.tensors)
    found: dict[str, tuple[int, ...]] = {}
    for shard in index.shards:
        raw = (tmp_path / "out" / shard.key).read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (shard.bytes, shard.sha256)
        with safe_open(tmp_path / "out" / shard.key, framework="pt") as file:
            found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    assert found == {tensor.name: tensor.shape for tensor in index.tensors}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["MistralModel"]


def test_a_staged_base_is_staged_again_and_keeps_its_source(base: Path, store: Store, tmp_path: Path) -> None:
    staged(base, f"{store.url}/one")
    again = stage(f"{store.url}/one", str(tmp_path / "two"), "nf4", "cpu", **SMALL).index
    direct = staged(base, str(tmp_path / "three"), "nf4").index
    assert again.source == str(base.resolve())
    assert again.shards == direct.shards


def test_a_base_in_the_hub_cache_is_staged_without_network(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    repo = tmp_path / "models--someone--small"
    shutil.copytree(base, repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert stage("someone/small", str(tmp_path / "out")).index.source == "someone/small"
    shutil.rmtree(repo)
    assert load_base(str(tmp_path / "out"), "bf16", 2, "cpu")[1].name == str((tmp_path / "out").resolve())


# --- once, whole, or not at all ---


def test_staging_twice_gives_the_same_bytes_and_writes_nothing(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in ("one", "two"):
        assert (
            main(["stage-base", str(base), str(tmp_path / place), "--precision", "nf4", "--device", "cpu"])
            == 0
        )
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}
    capsys.readouterr()
    assert (
        main(["stage-base", str(base), str(tmp_path / "one"), "--precision", "nf4", "--device", "cpu"]) == 0
    )
    assert "already there" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}


def test_another_base_or_precision_is_refused_and_changes_nothing(
    base: Path, store: Store, tmp_path: Path
) -> None:
    index = staged(base, store.url).index
    shutil.copytree(base, tmp_path / "same elsewhere")
    assert not staged(tmp_path / "same elsewhere", store.url).created
    with pytest.raises(WrongRequest, match="precision bf16 there, nf4 now"):
        staged(base, store.url, "nf4")
    other = causal_checkpoint(tmp_path / "other", seed=5, dtype=torch.bfloat16)
    with pytest.raises(
        WrongRequest, match=r"holds another staged base, of .* \(weights_sha256 .* it is never overwritten"
    ):
        staged(other, store.url)
    assert read_staged_index(store) == index
    assert BaseFiles.find(store.url).staged.missing() == []  # type: ignore[union-attr]


def test_an_object_lost_after_staging_is_told(base: Path, store: Store) -> None:
    index = staged(base, store.url).index
    store.delete(index.shards[1].key)
    with pytest.raises(WrongRequest, match=r"has lost model-00002\.safetensors"):
        staged(base, store.url)
    with pytest.raises(StorageError, match="no object"):
        load_base(store.url, "bf16", 2, "cpu")


class Killed(BaseException):
    """The process ends here."""


def test_a_staging_killed_at_any_write_is_never_taken_for_whole_and_can_be_repeated(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    limit = 0

    def guarded(real: Any) -> Any:
        def act(self: FolderStore, key: str, *data: Any) -> Any:
            if len(done) >= limit:
                raise Killed
            done.append(key)
            return real(self, key, *data)

        return act

    for name in ("write", "create"):
        monkeypatch.setattr(FolderStore, name, guarded(getattr(FolderStore, name)))
    whole = False
    while not whole:
        done.clear()
        place = tmp_path / f"killed-{limit}"
        try:
            staged(base, str(place), "nf4" if limit % 2 else "bf16")
            whole = True
        except Killed:
            with pytest.raises(WrongRequest, match=r"does not exist|no staged base"):
                read_config(str(place))
            writes, limit = limit, 1000
            done.clear()
            precision, other = PRECISIONS[:: -1 if writes % 2 else 1]
            if writes > 0:
                with pytest.raises(
                    WrongRequest,
                    match=r"its staging was stopped .* repeat that staging, or name another place",
                ):
                    staged(base, str(place), other)
            (
                (place / "model-00099.safetensors").write_bytes(b"of a killed staging with smaller objects")
                if writes > 0
                else None
            )
            assert staged(base, str(place), precision).created
            fresh = {path.name for path in place.iterdir()}
            index = read_staged_index(FolderStore(place))
            assert index is not None
            assert fresh == {one.key for one in (*index.files, *index.shards)} | {BASE_KEY}
            load_base(str(place), precision, 2, "cpu")
            limit = writes + 1
    assert limit > 6


@pytest.mark.slow
def test_a_staging_killed_for_real_is_never_taken_for_whole_and_can_be_repeated(
    tmp_path: Path, bucket_url: str
) -> None:
    from safetensors.torch import save_file

    from emotion_train.bases.packaged import small_model

    model, _ = load_base(str(small_model()), "bf16", 2, "cpu")
    source = tmp_path / "base"
    source.mkdir()
    save_file(
        {name: tensor for name, tensor in model.state_dict().items() if name != "score.weight"},
        source / "model.safetensors",
    )
    (source / "config.json").write_text(model.config.to_json_string(use_diff=False))
    PostTokenizer.load(str(small_model()), 128).save(source)
    for number, delay_s in enumerate((0.0, 0.3, 0.8, 1.3, 2.0)):
        store = open_store(f"{bucket_url}/base-{number}")
        process = subprocess.Popen([sys.executable, "-m", "emotion_train.stage_base", str(source), store.url])
        while not list(store.list()) and process.poll() is None:
            time.sleep(0.02)
        time.sleep(delay_s)
        process.kill()
        if process.wait() != 0:
            with pytest.raises(WrongRequest, match="no staged base"):
                read_config(store.url)
        stage(str(source), store.url)
        assert_same_bits(
            load_base(store.url, "bf16", 2, "cpu")[0], load_base(str(source), "bf16", 2, "cpu")[0]
        )


def test_what_stands_there_already_is_not_written_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged(base, str(tmp_path / "out"))
    (tmp_path / "out" / BASE_KEY).unlink()
    (tmp_path / "out" / UNFINISHED_KEY).write_text(
        json.dumps({"source": str(base), "precision": "bf16"}) + "\n"
    )
    written: list[str] = []
    real = FolderStore.write

    def noting(self: FolderStore, key: str, data: Any) -> ObjectInfo:
        written.append(key)
        return real(self, key, data)

    monkeypatch.setattr(FolderStore, "write", noting)
    staged(base, str(tmp_path / "out"))
    assert written == []


# --- what is read is what was staged ---


@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_a_changed_byte_anywhere_in_a_tensor_is_refused(base: Path, tmp_path: Path, precision: Any) -> None:
    index = staged(base, str(tmp_path / "out"), precision).index
    for tensor in index.tensors[::5]:
        path = tmp_path / "out" / index.shards[tensor.object].key
        raw = path.read_bytes()
        for part in tensor.parts:
            at = part.start + part.bytes // 2
            path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
            with pytest.raises(WrongRequest, match=r"is not what base\.json describes"):
                load_base(str(tmp_path / "out"), precision, 2, "cpu")
        path.write_bytes(raw)
    load_base(str(tmp_path / "out"), precision, 2, "cpu")


def test_an_object_cut_short_is_refused(base: Path, tmp_path: Path) -> None:
    index = staged(base, str(tmp_path / "out")).index
    path = tmp_path / "out" / index.shards[-1].key
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WrongRequest, match=r"is not what base\.json describes"):
        load_base(str(tmp_path / "out"), "bf16", 2, "cpu")


def test_a_changed_small_file_is_refused(base: Path, tmp_path: Path) -> None:
    staged(base, str(tmp_path / "out"))
    path = tmp_path / "out" / "config.json"
    path.write_text(path.read_text().replace("1e-05", "1e-06") + " ")
    with pytest.raises(WrongRequest, match=r"config\.json is not what base\.json describes"):
        read_config(str(tmp_path / "out"))


def test_in_a_bucket_the_same_bytes_written_again_go_on_and_others_are_refused(
    base: Path, bucket_url: str
) -> None:
    store = open_store(f"{bucket_url}/base")
    key = staged(base, store.url).index.shards[0].key
    raw = store.read(key)
    store.write(key, raw)
    model, _ = load_base(store.url, "bf16", 2, "cpu")
    store.write(key, raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(WrongRequest, match=r"is not what base\.json describes"):
        load_base(store.url, "bf16", 2, "cpu")
    copy = open_store(f"{bucket_url}/copy")
    store.write(key, raw)
    for info in store.list():
        copy.write(info.key, store.read(info.key))
    assert_same_bits(model, load_base(copy.url, "bf16", 2, "cpu")[0])


def test_a_base_copied_from_a_bucket_to_a_folder_loads_there(
    base: Path, bucket_url: str, tmp_path: Path
) -> None:
    store = open_store(f"{bucket_url}/base")
    staged(base, store.url, "nf4")
    for info in store.list():
        (tmp_path / info.key).write_bytes(store.read(info.key))
    assert_same_bits(load_base(store.url, "nf4", 2, "cpu")[0], load_base(str(tmp_path), "nf4", 2, "cpu")[0])


def test_each_piece_is_read_once_many_at_a_time_and_never_more(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = staged(base, str(tmp_path / "out")).index
    monkeypatch.setattr(staged_weights, "PIECES_IN_FLIGHT", 3)
    asked: list[tuple[str, int, int]] = []
    buffers: set[int] = set()
    together = threading.Barrier(3, timeout=PATIENCE_S)
    real = FolderStore.read_into

    def noting(
        self: FolderStore, key: str, buffer: memoryview, *, start: int = 0, if_match: str | None = None
    ) -> int:
        if len(asked) < 3:
            asked.append((key, start, len(buffer)))
            together.wait()  # three are under way at once
        else:
            asked.append((key, start, len(buffer)))
        buffers.add(torch.frombuffer(buffer, dtype=torch.uint8).data_ptr())
        return real(self, key, buffer, start=start, if_match=if_match)

    monkeypatch.setattr(FolderStore, "read_into", noting)
    load_base(str(tmp_path / "out"), "bf16", 2, "cpu")
    pieces = [
        (one.key, at, min(index.piece_bytes, one.bytes - at))
        for one in index.shards
        for at in range(0, one.bytes, index.piece_bytes)
    ]
    assert sorted(asked) == sorted(pieces)
    assert len(buffers) == 3


@pytest.mark.parametrize("patience_s", [0.0, 60.0])
def test_a_store_that_is_away_while_weights_are_read_is_asked_again(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience_s: float
) -> None:
    staged(base, str(tmp_path / "out"))
    whole, _ = load_base(str(tmp_path / "out"), "bf16", 2, "cpu")
    failures, real, told = iter(range(3)), FolderStore.read_into, list[int]()

    def away(self: FolderStore, key: str, buffer: memoryview, **where: Any) -> int:
        if next(failures, None) is not None:
            raise StorageError("The network is gone.", transient=True)
        return real(self, key, buffer, **where)

    monkeypatch.setattr(FolderStore, "read_into", away)

    def load() -> Any:
        tell = lambda placed, total: told.append(placed)  # noqa: E731
        return load_base(str(tmp_path / "out"), "bf16", 2, "cpu", patience_s=patience_s, tell=tell)[0]

    if patience_s:
        assert_same_bits(whole, load())
        assert told[0] == 0  # it can be left meanwhile
    else:
        with pytest.raises(StorageError, match=r"The network is gone\."):
            load()


def test_a_load_that_is_left_while_it_waits_ends_soon(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged(base, str(tmp_path / "out"))

    def away(*_: Any, **__: Any) -> int:
        raise StorageError("The network is gone.", transient=True)

    def leave(placed: int, total: int) -> None:
        raise InterruptedError

    monkeypatch.setattr(FolderStore, "read_into", away)
    began = time.monotonic()
    with pytest.raises(InterruptedError):
        load_base(str(tmp_path / "out"), "bf16", 2, "cpu", patience_s=3600, tell=leave)
    assert time.monotonic() - began < PATIENCE_S


def test_names_and_shapes_are_compared_before_a_byte_is_read(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = staged(base, str(tmp_path / "out")).index
    lacking = index.model_copy(update={"tensors": index.tensors[:-1]})
    (tmp_path / "out" / BASE_KEY).write_bytes(lacking.to_bytes())
    monkeypatch.setattr(
        "emotion_train.model.load.staged_tensors", lambda *_: pytest.fail("a tensor was asked for")
    )
    with pytest.raises(WrongRequest, match="lacks"):
        load_base(str(tmp_path / "out"), "bf16", 2, "cpu")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda document: document.update(schema_version="emotion-train/base/9"),
            "has schema 'emotion-train/base/9'",
        ),
        (lambda document: document["shards"].pop(), "outside of the listed objects"),
        (lambda document: document["shards"][0]["pieces"].pop(), "a sum for each piece"),
        (lambda document: document["tensors"].reverse(), "order of their bytes"),
    ],
)
def test_an_edited_index_is_refused(base: Path, tmp_path: Path, edit: Any, words: str) -> None:
    staged(base, str(tmp_path / "out"))
    document = json.loads((tmp_path / "out" / BASE_KEY).read_text())
    edit(document)
    (tmp_path / "out" / BASE_KEY).write_text(json.dumps(document))
    with pytest.raises(WrongRequest, match=words):
        BaseFiles.find(str(tmp_path / "out"))


# --- what says where a base is ---


@pytest.mark.parametrize(
    ("store", "precision"),
    [
        ("folder", "nf4"),
        ("s3", "bf16"),
        *(
            pytest.param(kind, precision, marks=pytest.mark.slow)
            for kind, precision in (("folder", "bf16"), ("s3", "nf4"), ("second", "nf4"))
        ),
    ],
    indirect=["store"],
)
def test_an_adapter_of_any_copy_of_the_base_predicts_the_same_on_every_other(
    base: Path, store: Store, tmp_path: Path, precision: Any
) -> None:
    copies = [str(base), f"{store.url}/bf16", f"{store.url}/nf4"][: 3 if precision == "nf4" else 2]
    staged(base, copies[1])
    staged(base, f"{store.url}/nf4", "nf4")
    tokenizer, texts = PostTokenizer.load(str(base), 64), ["tea and rain", "stop shouting", "!"]
    found: list[Any] = []
    for made_on in copies:
        model, info = build_classifier(
            made_on, precision, 3, LoraSection(r=4, targets="all-linear"), 0, "cpu"
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.05)
        facts = AdapterFacts.of(
            info,
            tokenizer,
            precision=precision,
            lora=LoraSection(r=4, targets="all-linear"),
            labels=("a", "b", "c"),
        )
        folder = tmp_path / f"adapter-{len(found)}"
        save_adapter(model, folder, tokenizer=tokenizer, facts=facts)
        for read_with in (None, *copies):
            loaded = load_adapter(folder, device="cpu", base=read_with)
            found.append(probabilities_of(loaded.model, tokenizer, texts, 256, torch.device("cpu"), 3))
    assert all(np.array_equal(found[0], one) for one in found)
    assert float(np.abs(found[0] - found[0][0]).max()) > 1e-3  # the posts differ


def test_the_card_of_an_adapter_on_a_base_in_a_bucket_says_how_to_copy_it() -> None:
    facts = CardFacts("s3://team/bases/small", "text", "bf16", 128, ["a", "b"], 4, 8, ["q_proj"])
    assert 'base = "small"  # a copy: aws s3 sync s3://team/bases/small small' in reload_snippet(facts)


# --- requests that cannot be met ---


@pytest.mark.parametrize("precision", ["bf16", "fp8", "fp32"])
def test_nf4_serves_nf4_only(base: Path, tmp_path: Path, precision: Any) -> None:
    staged(base, str(tmp_path / "out"), "nf4")
    with pytest.raises(
        WrongRequest,
        match=rf"staged as nf4.* model\.precision is {precision}; type model\.precision=nf4, or stage it",
    ):
        load_base(str(tmp_path / "out"), precision, 2, "cpu")


def test_a_source_that_bfloat16_rounds_cannot_serve_fp32(tmp_path: Path) -> None:
    source = causal_checkpoint(tmp_path / "base")
    assert staged(source, str(tmp_path / "out")).index.rounded
    with pytest.raises(
        WrongRequest, match=r"was rounded to bfloat16 .* type model\.precision=bf16, or model\.base="
    ):
        load_base(str(tmp_path / "out"), "fp32", 2, "cpu")
    assert_same_bits(
        load_base(str(source), "bf16", 2, "cpu")[0], load_base(str(tmp_path / "out"), "bf16", 2, "cpu")[0]
    )


def test_float32_that_bfloat16_holds_exactly_serves_fp32(tmp_path: Path) -> None:
    source = causal_checkpoint(tmp_path / "base", dtype=torch.bfloat16)
    from safetensors.torch import load_file, save_file

    for path in source.glob("*.safetensors"):
        save_file(
            {key: tensor.float() for key, tensor in load_file(path).items()}, path, metadata={"format": "pt"}
        )
    assert not staged(source, str(tmp_path / "out")).index.rounded
    assert_same_bits(
        load_base(str(source), "fp32", 2, "cpu")[0], load_base(str(tmp_path / "out"), "fp32", 2, "cpu")[0]
    )


def test_sources_that_cannot_be_staged_are_refused_before_anything_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    from emotion_train.bases.packaged import small_model

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    (quantised / "config.json").write_text(
        json.dumps({**text_config().to_dict(), "quantization_config": {"quant_method": "bitsandbytes"}})
    )
    staged(base, str(tmp_path / "nf4"), "nf4")
    without = tmp_path / "without"
    shutil.copytree(base, without)
    (without / "tokenizer.json").unlink()
    lacking = tmp_path / "lacking"
    shutil.copytree(base, lacking)
    document = json.loads((lacking / "config.json").read_text())
    document["text_config"]["num_hidden_layers"] = 3
    (lacking / "config.json").write_text(json.dumps(document))
    for source, words in (
        ("someone/some-model", "neither a folder here nor in the local hub cache"),
        (str(small_model()), "is a GGUF file, which is small and used unchanged"),
        (str(quantised), "already quantised"),
        (str(tmp_path / "nf4"), "already quantised to nf4; give the checkpoint that it was made from"),
        (str(without), "has neither tokenizer.json nor tekken.json"),
        (str(tmp_path / "nowhere"), "does not exist"),
        (str(lacking), r"lacks model\.layers\.2\."),
    ):
        with pytest.raises(WrongRequest, match=words):
            stage(source, str(tmp_path / "out"))
        assert not list((tmp_path / "out").rglob("*"))


def test_places_that_cannot_take_a_base_are_refused(base: Path, tmp_path: Path, bucket_url: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for url, words in (
        (str(tmp_path / "full"), r"holds other objects, such as notes\.txt"),
        (str(base), "is inside the base"),
        (str(base / "below"), "is inside the base"),
        ("s3://no-such-bucket-here/base", "There is no bucket no-such-bucket-here"),
        ("gs://team/base", "has scheme gs"),
    ):
        with pytest.raises((WrongRequest, StorageError), match=words) as caught:
            staged(base, url)
        assert caught.value.exit_code == 2
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_a_bucket_without_permission_is_told(
    base: Path, bucket_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for act in (lambda: staged(base, f"{bucket_url}/base"), lambda: read_config(f"{bucket_url}/base")):
        with pytest.raises(StorageError, match=r"was refused|No permission"):
            act()


def test_a_place_without_a_base_says_what_to_type(bucket_url: str) -> None:
    with pytest.raises(
        WrongRequest,
        match=rf"no staged base at {bucket_url}/x: base\.json is missing .* emotion-train stage-base",
    ):
        read_config(f"{bucket_url}/x")


def test_help_says_when_it_pays(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["stage-base", "--help"])
    words = capsys.readouterr().out
    assert "when it pays" in words
    assert "exit codes" in words


# --- on a GPU ---


@pytest.mark.gpu
def test_on_a_gpu_staged_codes_equal_those_made_while_loading(base: Path, tmp_path: Path) -> None:
    for precision in PRECISIONS:
        staged(base, str(tmp_path / precision), precision, "cuda")
        assert_same_bits(
            load_base(str(base), "nf4", 2, "cuda")[0],
            load_base(str(tmp_path / precision), "nf4", 2, "cuda")[0],
        )


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_a_staged_base_arrives_on_the_gpu_without_holding_more_than_it_needs(
    tmp_path: Path, precision: Any
) -> None:
    changes: dict[str, Any] = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "head_dim": 128,
    }
    source = causal_checkpoint(tmp_path / "base", dtype=torch.bfloat16, **changes)
    stage(str(source), str(tmp_path / "out"), precision)
    load_base(str(tmp_path / "out"), "nf4", 2, "cuda")  # bitsandbytes' own tables stay allocated
    gc.collect()  # a 4-bit weight and its layer hold each other
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model, _ = load_base(str(tmp_path / "out"), "nf4", 2, "cuda")
    held = torch.cuda.memory_allocated() - before
    assert torch.cuda.max_memory_allocated() - before < 1.15 * held
    assert_same_bits(model, load_base(str(source), "nf4", 2, "cuda")[0])
