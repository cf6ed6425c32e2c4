#!/usr/bin/env python3
"""Files that are checked, and thumbnails, on the chat page in headless Chromium.

    files.py NATTER

NATTER is the binary. The receiver of the two workers is a stand-in in this process: it says when a file is clean, and has one
thumbnail for all. Prints `N passed, N failed` and exits 0, 1, or 77 where there is no Chromium.
"""

import json
import pathlib
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import page
from page import come, until
from stories import picture

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
THUMBNAIL = "data:image/webp;base64,UklGRjgAAABXRUJQVlA4ICwAAACwAQCdASoCAAEAAoBCJaACdLoABDAAAP7Xlf/hWs9bo1B//LP/P74u9GAAAA=="  # two pixels wide, one high

may_judge = threading.Event()


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/scan":
            may_judge.wait(60)
            said = {one["upload"]: "infected" if one["name"].startswith("bad") else "clean" for one in asked["uploads"]}
        else:
            # Not the size that the sender says: the frame shows whose it has.
            said = {one["upload"]: {"width": 200, "height": 100, "thumbnail": THUMBNAIL} for one in asked["uploads"]}
        answer = json.dumps({"files": said}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format, *args):
        pass


def files_wait_for_their_verdict(up, kim, lee):
    for window, user in ((kim, "kim"), (lee, "lee")):
        come(window, f"{up.url()}#token={up.token(user)}&room=chat:files")
        window.until_state("connected")
    with tempfile.TemporaryDirectory() as folder:
        for name in ("good.png", "bad.png"):
            file = pathlib.Path(folder) / name
            file.write_bytes(picture())
            kim.write("#files", str(file))
        until("the uploads", lambda: kim.run(
            "return document.querySelectorAll('#chosen li').length === 2 && !document.querySelector('#send').disabled"))
    kim.say("two files")
    for window in (kim, lee):
        window.until_shows("kim", "two files")
        problems = "return [...document.querySelectorAll('#log .files .problem')].map((one) => one.textContent)"
        until("both are being checked", lambda: window.run(problems) == ["This file is being checked."] * 2)
        images = "return [...document.querySelectorAll('#log .picture img')].map((one) => [one.src.slice(0, 16), one.naturalWidth, one.width, one.height])"
        until("thumbnails, as wide as the worker says", lambda: window.run(images) == [["data:image/webp;", 2, 200, 100]] * 2)
    may_judge.set()
    for window in (kim, lee):
        until("one is held back, and one is there", lambda: window.run(problems) == ["", "This file was checked, and is held back."])
        until("the picture itself", lambda: [one[1] for one in window.run(images)] == [640])
    # From history it is the same.
    lee.reload()
    lee.until_shows("kim", "two files")
    until("the picture, and the words", lambda: [one[1] for one in lee.run(images)] == [640]
          and lee.run(problems) == ["", "This file was checked, and is held back."])


def main(natter):
    receiver = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    entries = [
        f'[[workers]]\nname = "{name}"\nrooms = ["chat:*"]\nurl = "http://127.0.0.1:{receiver.server_port}/{name}"\n'
        f'secret = "{SECRET}"\nannotation = "{name}"\nallow = ["127.0.0.1/32"]\nattachments = true\ntimeout = "60s"\n'
        for name in ("images", "scan")
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as config:
        config.write('[uploads]\nscan = "scan"\n' + "".join(entries))
        config.flush()
        return page.run(natter, [files_wait_for_their_verdict], windows=(2,), flags=("--config", config.name))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
