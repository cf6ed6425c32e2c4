#!/usr/bin/env python3
"""A worker for natter: translates between English and Korean with a small list of words, and scores the mood with rules.
It needs no packages.

    NATTER_WORKER_SECRET=whsec_… python3 worker.py 9000

[[workers]] of the configuration then have the URLs http://127.0.0.1:9000/translate and http://127.0.0.1:9000/mood, the
same secret, and allow = ["127.0.0.1/32"]. `natter up --demo-worker` does all of that.
"""

import base64
import hashlib
import hmac
import json
import os
import re
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = base64.b64decode(os.environ["NATTER_WORKER_SECRET"].removeprefix("whsec_"))

KOREAN = {
    "hello": "안녕하세요", "hi": "안녕하세요", "thanks": "감사합니다", "yes": "네", "no": "아니요", "please": "제발",
    "today": "오늘", "tomorrow": "내일", "when": "언제", "late": "늦은", "good": "좋은", "bad": "나쁜", "broken": "부러진",
    "awful": "끔찍한", "terrible": "최악", "friend": "친구", "dentist": "치과의사", "patient": "환자", "lab": "기공소",
    "tooth": "치아", "crown": "크라운", "bridge": "브리지", "shade": "색상", "price": "가격", "refund": "환불",
}
ENGLISH = {korean: english for english, korean in KOREAN.items()}

MOOD = {
    "good": 1, "great": 2, "love": 2, "thanks": 1, "nice": 1, "happy": 2, "perfect": 2, "bad": -1, "late": -1,
    "broken": -1, "angry": -2, "hate": -2, "awful": -2, "terrible": -2, "useless": -2, "refund": -1,
    "감사합니다": 1, "좋은": 1, "좋아요": 2, "나쁜": -1, "늦은": -1, "부러진": -1, "끔찍한": -2, "최악": -2, "엉망": -2,
}

WORD = re.compile(r"\w+")
HANGUL = re.compile("[가-힣]")


def translate(text):
    """Each known word in the other language; nothing to say if none is known."""
    language, words = ("en", ENGLISH) if HANGUL.search(text) else ("ko", KOREAN)
    translated = WORD.sub(lambda found: words.get(found[0].lower(), found[0]), text)
    return None if translated == text else {language: translated}


def mood(text):
    """A score from -1 to 1; nothing to say if no word has a mood. Shouting makes it worse."""
    scores = [MOOD[word] for word in (word.lower() for word in WORD.findall(text)) if word in MOOD]
    if not scores:
        return None
    score = sum(scores) / (2 * len(scores)) - (0.2 if text.isupper() or "!!" in text else 0)
    return {"score": max(-1, round(score, 2)), "words": len(scores)}


def is_signed(headers, body):
    """Checks the signature as https://www.standardwebhooks.com says, and that the request is not an old one."""
    sent = headers.get("webhook-timestamp", "")
    signed = f"{headers.get('webhook-id', '')}.{sent}.".encode() + body
    expected = "v1," + base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    given = headers.get("webhook-signature", "").split(" ")
    fresh = sent.isdigit() and abs(time.time() - int(sent)) < 300
    return fresh and any(hmac.compare_digest(expected, signature) for signature in given)


class Worker(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self, status, body=None):
        text = b"" if body is None else json.dumps(body, ensure_ascii=False).encode()
        self.send_response(status)
        if status != 204:
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        self.answer(200 if self.path == "/healthz" else 404)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        work = {"/translate": translate, "/mood": mood}.get(self.path)
        if work is None:
            return self.answer(404)
        if not is_signed(self.headers, body):
            return self.answer(401)
        said = json.loads(body)["message"].get("body")
        text = said.get("text") if isinstance(said, dict) else said
        result = work(text) if isinstance(text, str) else None
        return self.answer(204) if result is None else self.answer(200, result)

    def log_message(self, format, *args):
        """Says nothing: what people write does not belong in a log."""


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9000
    ThreadingHTTPServer(("127.0.0.1", port), Worker).serve_forever()
