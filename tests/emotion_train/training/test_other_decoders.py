"""Decoders beside Llama and Mistral: a published run answers the same from its folder and exported,
and two processes learn what one does, with whole bases and with a sharded one.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from emotion_train import cli
from emotion_train.config import load_config
from emotion_train.evaluation.adapter import AdapterChoice, open_classifier
from emotion_train.exporting.export import export
from emotion_train.model.lora import adapter_state
from emotion_train.preparation.steps import prepare
from emotion_train.runs.published import download
from emotion_train.training.engines import Kind
from tests.helpers.many_processes import Crew, Leg, some_steps
from tests.helpers.tiny_models import causal_checkpoint, multimodal_checkpoint
from tests.helpers.tiny_runs import start_trainer, tiny_words, write_posts

TEXTS = ["tea rain quiet", "party </s> laugh", "stars " * 60]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3_text", "ministral3"])
@pytest.mark.parametrize("layers", ["null", "1"])
def test_the_text_part_of_a_multimodal_base_from_posts_to_a_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, layers: str
) -> None:
    from transformers import pipeline

    prepare(str(write_posts(tmp_path / "source")), str(tmp_path / "data"))
    multimodal_checkpoint(tmp_path / "base", kind=kind)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    words = tiny_words(tmp_path, "run.id=one", "train.epochs=1", f"model.layers={layers}", "lora.dropout=0.1")
    assert cli.main(["train", *words]) == 0
    url = f"{tmp_path}/runs/one"
    download(url, tmp_path / "pulled")
    scored = ["--adapter", url, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "scored")]
    assert cli.main(["evaluate", *scored, "--device", "cpu"]) == 0
    classifier = open_classifier(AdapterChoice(tmp_path / "pulled", device="cpu"))
    ours = [one.probabilities for one in classifier.predict(TEXTS)]
    made = export(url, str(tmp_path / "export"), dtype="fp32", compare=6, device="cpu")
    assert made.change is not None
    assert made.change.largest < 1e-5
    served = pipeline("text-classification", model=str(tmp_path / "export"), dtype=torch.float32)
    answers = served(TEXTS, top_k=None, truncation=True, max_length=128, batch_size=2)
    for probabilities, answer in zip(ours, answers, strict=True):
        assert {one["label"] for one in answer} == set(probabilities)
        for one in answer:
            assert math.isclose(one["score"], probabilities[one["label"]], abs_tol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3_text", "ministral3"])
def test_two_processes_do_what_one_does(tmp_path: Path, kind: str) -> None:
    prepare(str(write_posts(tmp_path / "source")), str(tmp_path / "data"))
    causal_checkpoint(tmp_path / "base", kind)

    def leg(run_id: str, engine: Kind) -> Leg:
        words = [f"run.id={run_id}", "lora.dropout=0.1", "train.tokens_per_microbatch=200"]
        return Leg(engine, tiny_words(tmp_path, *words), 3, str(tmp_path / run_id))

    engines: tuple[Kind, ...] = ("DDP", "FSDP2")
    with Crew(tmp_path, 2) as crew:
        together = [crew.train([leg(engine.lower(), engine)])[0] for engine in engines]
    with ExitStack() as stack:
        trainer = start_trainer(load_config(None, leg("one", "DDP").words), stack)
        _, losses = some_steps(trainer, 3)
        alone = adapter_state(trainer.bare_model)
    for found in together:
        np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
        assert found.adapter.keys() == alone.keys()
        for name, tensor in alone.items():
            torch.testing.assert_close(found.adapter[name], tensor, rtol=0, atol=2e-4, msg=name)
