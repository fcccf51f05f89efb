"""The smallest real chat server: an OpenAI-compatible endpoint around a tiny vision-language model, in this process.

It answers with what the model generates and with the model's own log-probs, which `transformers serve` does not give;
and it can be told to misbehave the way real services do: full queues, errors, silence, options that it does not take.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from PIL import Image

# what a proxy, a broken server and one that gave up send with status 200
ODDITIES: dict[Any, Any] = {"page": "<html>Welcome</html>", "broken": '{"choices": [', "empty": {"choices": []}}


class TinyModel:
    """Greedy answers of the model in a folder, and the log-probs of every answer's first tokens."""

    def __init__(self, folder: Path):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        self._lock = threading.Lock()

    @torch.no_grad()
    def answer(self, text: str, images: list[Image.Image], longest: int) -> tuple[str, list[dict[str, float]]]:
        """The text, and for each of its tokens the log-probs of all tokens, by name."""
        content = [{"type": "image"} for _ in images] + [{"type": "text", "text": text}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = self.processor(text=prompt, images=images or None, return_tensors="pt")
        with self._lock:
            out = self.model.generate(
                **inputs, max_new_tokens=longest, do_sample=False, output_scores=True, return_dict_in_generate=True
            )
        tokens = out.sequences[0, inputs["input_ids"].shape[1] :]
        names = [self.processor.tokenizer.decode([place]) for place in range(out.scores[0].shape[-1])]
        rows = [dict(zip(names, scores[0].log_softmax(-1).tolist(), strict=True)) for scores in out.scores]
        said = self.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        chosen = [self.processor.tokenizer.decode([token]) for token in tokens]
        return said, [{name: row[name], **row} for name, row in zip(chosen, rows, strict=True)]


class TinyServer:
    """`faults` says what happens to the next requests, one each: a status, "silence" (until `release` is set), a
    key of ODDITIES, or None for an answer.

    `refuses` names fields of a request that are answered with status 400; `key`, where set, is the only one that is
    let in. `requests` holds the bodies that came, `most` how many were under way at a time.
    """

    def __init__(self, model: TinyModel):
        self.model = model
        self.faults: list[int | str | None] = []
        self.refuses: set[str] = set()
        self.key: str | None = None
        self.headers: dict[str, str] = {}
        self.requests: list[dict[str, Any]] = []
        self.under_way, self.most = 0, 0
        self.lock, self.release = threading.Lock(), threading.Event()
        self.url = ""

    def respond(self, body: dict[str, Any], key: str) -> tuple[int, dict[str, Any] | str]:
        with self.lock:
            self.requests.append(body)
            fault = self.faults.pop(0) if self.faults else None
        if self.key is not None and key != f"Bearer {self.key}":
            return 401, _error(f"Incorrect API key provided: {key}")
        if body["model"] != "tiny":
            return 404, _error(f"The model {body['model']} does not exist")
        if fault == "silence":
            self.release.wait(600)
        elif fault in ODDITIES:
            return 200, ODDITIES[fault]
        elif fault is not None:
            return int(fault), _error("asked to fail")
        refused = self.refuses & body.keys()
        if refused:
            return 400, _error(f"Unsupported parameter: '{min(refused)}' is not supported with this model.")
        return 200, self.complete(body)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        content = body["messages"][-1]["content"]
        parts: Any = [{"type": "text", "text": content}] if isinstance(content, str) else content
        pictures = [_picture(part["image_url"]["url"]) for part in parts if part["type"] == "image_url"]
        text = next(part["text"] for part in parts if part["type"] == "text")
        longest = body.get("max_tokens") or body["max_completion_tokens"]
        said, rows = self.model.answer(text, pictures, longest)
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": said},
        }
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [_entry(row, body["top_logprobs"]) for row in rows]}
        return {"id": "1", "object": "chat.completion", "created": 0, "model": "tiny", "choices": [choice]}


def _entry(row: dict[str, float], top: int) -> dict[str, Any]:
    (name, value), *_ = row.items()
    best = sorted(row.items(), key=lambda item: -item[1])[:top]
    return {"token": name, "logprob": value, "top_logprobs": [{"token": word, "logprob": one} for word, one in best]}


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error"}}


def _picture(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")


@contextlib.contextmanager
def serving(model: TinyModel) -> Iterator[TinyServer]:
    """The server, on a port of its own until the block ends."""
    state = TinyServer(model)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                state.under_way += 1
                state.most = max(state.most, state.under_way)
            status, content = state.respond(body, self.headers["Authorization"])
            with state.lock:
                state.under_way -= 1
            with contextlib.suppress(OSError):  # who waited too long has hung up
                self.send_response(status)
                for name, value in state.headers.items():
                    self.send_header(name, value)
                encoded = (content if isinstance(content, str) else json.dumps(content)).encode()
                page = isinstance(content, str) and content.startswith("<")
                self.send_header("Content-Type", "text/html" if page else "application/json")
                self.send_header("Content-Length", str(len(encoded)))
                self.end_headers()
                self.wfile.write(encoded)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield state
    finally:
        state.release.set()
        server.shutdown()
        server.server_close()
        thread.join()
