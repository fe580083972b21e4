"""An HTTP server that speaks the chat protocol of language-model judges, and fails as servers do."""

from __future__ import annotations

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import openai

# Answers that are JSON, and nothing that an endpoint should give.
SHAPES = {
    "empty choice": {"choices": [{}]},
    "null choice": {"choices": [None]},
    "choices no list": {"choices": {"a": 1}},
    "null message": {"choices": [{"index": 0, "message": None}]},
    "message a text": {"choices": [{"index": 0, "message": "Preferred: A"}]},
    "content a list": {"choices": [{"index": 0, "message": {"content": [{"type": "text", "text": "Preferred: A"}]}}]},
    "usage a list": {"choices": [], "usage": [1]},
    "usage of texts": {"choices": [], "usage": {"prompt_tokens": "many", "completion_tokens": None}},
}


def responses(content):
    return [re.search(rf"<response {x} \w+>\n(.*?)\n</response {x}", content, re.DOTALL)[1] for x in "AB"]


def completion(text):
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "judge",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }


class Server:
    """Prefers the longer response, a tie where they are as long; `faults` are answered first, one a request.

    What is asked after `answers` requests is left waiting for minutes.
    """

    def __init__(self, faults=(), says=None, answers=None):
        self.faults, self.says, self.seen = list(faults), says or self.longer, []
        self.answers, self.ending = answers, threading.Event()
        lock, outer = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.seen.append({"path": self.path, "key": self.headers["Authorization"], **body})
                    fault = outer.faults.pop(0) if outer.faults else None
                    held_back = outer.answers is not None and len(outer.seen) > outer.answers
                if held_back:
                    outer.ending.wait(300)
                if fault == "slow":
                    time.sleep(1.5)
                if isinstance(fault, int):
                    self.reply(fault, {"error": {"message": f"fault {fault}"}})
                elif isinstance(fault, tuple):
                    self.reply(fault[0], {"error": {"message": fault[1]}})
                elif fault == "no json":
                    self.reply(200, b"<html>")
                elif fault == "no choices":
                    self.reply(200, completion(None) | {"choices": []})
                elif fault in SHAPES:
                    self.reply(200, json.dumps(completion("") | SHAPES[fault]).encode())
                elif fault == "no preference":
                    self.reply(200, completion("Both are fine."))
                else:
                    self.reply(200, completion(outer.says(body["messages"][-1]["content"])))

            def reply(self, status, body):
                sent = body if isinstance(body, bytes) else json.dumps(body).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(sent)))
                    self.send_header("retry-after-ms", "5")
                    self.end_headers()
                    self.wfile.write(sent)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client has given up waiting

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    @staticmethod
    def longer(content):
        first, second = responses(content)
        name = "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"
        return f"Reasons.\nPreferred: {name}"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args):
        self.ending.set()
        self.http.shutdown()
        self.http.server_close()


def client(url, **options):
    return openai.OpenAI(api_key="secret-key", base_url=url, **{"max_retries": 4, "timeout": 30, **options})
