"""A server in vLLM's manner: /v1/models and /classify of an export, answered by transformers.

It cuts nothing unless asked, refuses a whole request for one post that is too long, and makes the
mistakes that it is told to make.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

MAX_MODEL_LENGTH = 64


class ClassifyServer:
    """A with statement around a server of the checkpoint in `folder`. Its mistakes: `control`
    tokens that a post quotes are taken for tokens, it reads the `first` token, it has no names of
    labels (`nameless`), it cuts at 8 tokens (`short`), it answers `logits`, by a `sigmoid`, or
    `nonsense`, all its answers are of the first post (`twice`), it is `busy`.

    `requests` are the bodies that it was sent, `keys` the headers Authorization.
    """

    def __init__(self, folder: Path, mistake: str | None = None) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(
            folder, split_special_tokens=mistake != "control", trust_remote_code=False
        )
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        )
        self._model = model.eval()
        self.mistake = mistake
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                models = {"object": "list", "data": [{"id": "emotions", "object": "model"}]}
                self._send(200, models) if self.path == "/v1/models" else self._send(404, {})

            def do_POST(self) -> None:
                outer.keys.append(self.headers["Authorization"])
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(asked)
                self._send(*outer.answer(asked))

            def _send(self, code: int, content: Any) -> None:
                data = json.dumps(content).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> ClassifyServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, asked: dict[str, Any]) -> tuple[int, Any]:
        """Code and content of the answer to a request."""
        if self.mistake == "busy":
            return 503, {"error": "overloaded"}
        if self.mistake == "nonsense":
            return 200, {"data": [{"index": 0, "probs": ["a"]}]}
        if asked["model"] != "emotions":
            return 404, {"error": {"message": f"The model `{asked['model']}` does not exist.", "code": 404}}
        most = 8 if self.mistake == "short" else asked.get("truncate_prompt_tokens")
        rows = [
            self._tokenizer(text, truncation=most is not None, max_length=most)["input_ids"]
            for text in asked["input"]
        ]
        if (longest := max(map(len, rows))) > MAX_MODEL_LENGTH:
            said = f"maximum context length is {MAX_MODEL_LENGTH} tokens (parameter=input_tokens, {longest})"
            return 400, {"error": {"message": said, "type": "BadRequestError", "code": 400}}
        return 200, {
            "id": "classify-1",
            "object": "list",
            "model": "emotions",
            "data": [self._of(number, row) for number, row in enumerate(rows)],
        }

    def _of(self, number: int, row: list[int]) -> dict[str, Any]:
        """One post alone, so that no padding is in it."""
        with torch.inference_mode():
            hidden_1TH = self._model.model(input_ids=torch.tensor([row])).last_hidden_state
            token_H = hidden_1TH[0, 0 if self.mistake == "first" else -1]
            rule = {"logits": lambda logit_C: logit_C, "sigmoid": torch.sigmoid}.get(self.mistake or "")
            prob_C = (rule or torch.nn.Softmax(-1))(self._model.score(token_H)).tolist()
        best = max(range(len(prob_C)), key=prob_C.__getitem__)
        label = None if self.mistake == "nameless" else self._model.config.id2label[best]
        number = 0 if self.mistake == "twice" else number
        return {"index": number, "label": label, "probs": prob_C, "num_classes": len(prob_C)}
