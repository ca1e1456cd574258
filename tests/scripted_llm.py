"""An OpenAI-compatible server on this machine whose answers are a function of the messages, in several moods.

What it does with a request depends on the messages and on how often it has seen them, so that runs can be compared.
"""

import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

Answer = Callable[[list[dict[str, str]]], str]


class Mood(NamedTuple):
    """What becomes of a request.

    Attributes:
        fault (`str`, *optional*): an HTTP status, `"hang"` (no answer until the client gives up) or `"drop"` (the
            connection is closed without one).
        latency (`float`): seconds before anything happens.
        spoil (`str`, *optional*): a key of `SPOILS`.
    """

    fault: str | None = None
    latency: float = 0.0
    spoil: str | None = None


#: Decides by the hash of the messages and the number of requests with it, this one counted.
Personality = Callable[[str, int], Mood]

#: What a careless model makes of a right answer: the text, and its `finish_reason`.
SPOILS: dict[str, Callable[[str], tuple[str, str]]] = {
    "chatter": lambda text: (f"Sure, here it is:\n\n{text}\n\nLet me know if you need anything else!", "stop"),
    "fences": lambda text: (f"```json\n{text}\n```", "stop"),
    "truncated": lambda text: (text[: len(text) // 2], "length"),
    "lost": lambda text: (text[: len(text) // 3] + text[2 * len(text) // 3 :], "stop"),
    "empty": lambda text: ("", "stop"),
}


def good(digest: str, visit: int) -> Mood:
    """Answers at once."""
    return Mood()


def slow(digest: str, visit: int) -> Mood:
    """Answers after up to 50 ms, so that answers arrive in another order than requests."""
    return Mood(latency=0.05 * random.Random(digest).random())


def sloppy(digest: str, visit: int) -> Mood:
    """Spoils every fourth answer, always in the same way for the same messages."""
    return Mood(spoil=random.Random(digest).choice([*SPOILS, *[None] * 3 * len(SPOILS)]))


def failing(digest: str, visit: int) -> Mood:
    """Fails up to twice in one of four ways, then answers."""
    rng = random.Random(digest)
    faults = [rng.choice(["429", "500", "hang", "drop"]) for _ in range(rng.randint(0, 2))]
    return Mood(faults[visit - 1] if visit <= len(faults) else None)


PERSONALITIES: dict[str, Personality] = {"good": good, "slow": slow, "sloppy": sloppy, "failing": failing}


def message_hash(messages: Sequence[Any]) -> str:
    """The name under which the server counts messages."""
    return hashlib.sha256(json.dumps(list(messages), sort_keys=True).encode()).hexdigest()


class ScriptedLLM:
    """The server, running inside a `with` block.

    Args:
        answer (`Callable`): gives the text for messages.
        personality (`Personality`): decides what becomes of each request.
        retry_after (`str`, *optional*): header of every 429.

    Attributes:
        requests (`Counter`): by hash of the messages.
        answered (`Counter`): likewise, those whose answer was sent in full.
        messages (`dict`): by that hash.
        bodies, keys (`list`): of every request: its JSON, and its Authorization header.
        most_open (`int`): the most requests that were open at a time.
    """

    def __init__(self, answer: Answer, personality: Personality = good, retry_after: str | None = "0") -> None:
        self.answer, self.personality, self.retry_after = answer, personality, retry_after
        self.requests: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.messages: dict[str, list[dict[str, str]]] = {}
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.open = self.most_open = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def __enter__(self) -> "ScriptedLLM":
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"llm": self}))
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        """For `base_url`."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def wait_until_idle(self) -> None:
        """Returns once no request is open."""
        while self.open:
            time.sleep(0.005)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body leave in two writes; without it the second waits for the first to be acknowledged.
    disable_nagle_algorithm = True
    llm: ScriptedLLM

    def log_message(self, *arguments: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/chat/completions":
            self._send(404, {"error": {"message": f"no such path: {self.path}"}})
            return
        llm, digest = self.llm, message_hash(body["messages"])
        with llm.lock:
            llm.requests[digest] += 1
            visit = llm.requests[digest]
            llm.messages[digest] = body["messages"]
            llm.bodies.append(body)
            llm.keys.append(self.headers.get("Authorization"))
            llm.open += 1
            llm.most_open = max(llm.most_open, llm.open)
        try:
            self._respond(body, digest, llm.personality(digest, visit))
        finally:
            with llm.lock:
                llm.open -= 1

    def _respond(self, body: dict[str, Any], digest: str, mood: Mood) -> None:
        llm = self.llm
        llm.closing.wait(mood.latency)
        if mood.fault == "hang":
            self._wait_for_client()
        if mood.fault in ("hang", "drop"):
            self.close_connection = True
            return
        if mood.fault is not None:
            headers = {"Retry-After": llm.retry_after} if mood.fault == "429" and llm.retry_after is not None else {}
            # As careless endpoints do, with the key in the error.
            said = f"scripted fault {mood.fault}, asked with {self.headers.get('Authorization')}"
            self._send(int(mood.fault), {"error": {"message": said}}, headers)
            return
        text, reason = llm.answer(body["messages"]), "stop"
        if mood.spoil is not None:
            text, reason = SPOILS[mood.spoil](text)
        prompt = sum(len(message["content"].split()) for message in body["messages"])
        usage = {"prompt_tokens": prompt, "completion_tokens": len(text.split())}
        choice = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}
        content = {
            "id": "scripted",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice],
            "usage": {**usage, "total_tokens": sum(usage.values())},
        }
        self._send(200, content)
        with llm.lock:
            llm.answered[digest] += 1

    def _wait_for_client(self) -> None:
        """Hangs until the client gives up, or the server closes."""
        self.connection.settimeout(0.05)
        while not self.llm.closing.is_set():
            try:
                if not self.connection.recv(1):
                    return
            except TimeoutError:
                continue
            except OSError:
                return

    def _send(self, status: int, content: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
