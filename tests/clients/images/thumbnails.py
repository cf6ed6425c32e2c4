#!/usr/bin/env python3
"""The reference worker for files, deploy/examples/image_worker.py, with a `natter up` (Pillow as its requirements.txt says).

    thumbnails.py NATTER

NATTER is the binary. Uploads a PNG, a JPEG, what is no image, and the EICAR test file, and looks at the annotations, the
thumbnails and the downloads. Prints `N passed, N failed` and exits 0 or 1.
"""

import base64
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

from PIL import Image

HERE = pathlib.Path(__file__).resolve()
WORKER = HERE.parents[3] / "deploy" / "examples" / "image_worker.py"
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
EICAR = rb"X5O!P%@AP[4\PZX54(P^)7CC)7}$" + b"EICAR-STANDARD-ANTIVIRUS-TEST-FILE!$H+H*"
ROOM = "/v1/rooms/chat:lobby"
DEADLINE = 120


def picture(kind, size):
    """Noise, which is as hard to make small as a picture gets."""
    out = io.BytesIO()
    Image.effect_noise(size, 90).convert("RGB").save(out, kind)
    return out.getvalue()


def until(what, found):
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        if (value := found()) is not None:
            return value
        time.sleep(0.1)
    raise TimeoutError(what)


class Edge:
    def __init__(self, url, token):
        self.url, self.token = url, token

    def ask(self, method, path, body=None):
        """Status and answer."""
        headers = {"authorization": f"Bearer {self.token}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=DEADLINE) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as refused:
            return refused.code, refused.read()

    def upload(self, name, kind, data):
        """The attachment of a file that is uploaded."""
        about = {"name": name, "type": kind, "size": len(data)}
        status, answer = self.ask("POST", f"{ROOM}/uploads", about)
        assert status == 201, answer
        granted = json.loads(answer)
        put = granted["put"]
        request = urllib.request.Request(self.url + put["url"], data, put["headers"], method="PUT")
        urllib.request.urlopen(request, timeout=DEADLINE).close()
        return {"upload": granted["upload"], **about}

    def say(self, name, attachments):
        status, answer = self.ask("POST", f"{ROOM}/messages", {"id": name, "body": {"attachments": attachments}})
        assert status == 200, answer

    def annotation(self, name, which):
        """The files in an annotation of a message, once it is there."""
        def look():
            page = json.loads(self.ask("GET", f"{ROOM}/messages")[1])
            found = [one for one in page["messages"] if one["id"] == name]
            return found[0].get("annotations", {}).get(which, {}).get("files") if found else None
        return until(f"{which} of {name}", look)

    def download(self, upload):
        """The answer that is not `pending`."""
        def look():
            status, answer = self.ask("GET", f"{ROOM}/uploads/{upload}")
            return None if status == 409 else (status, answer)
        return until("a verdict", look)


def is_like(about, size):
    """Whether width and height are right, and the thumbnail is a WebP with the same ratio."""
    kind, _, data = about.get("thumbnail", "").partition(",")
    if kind != "data:image/webp;base64" or (about["width"], about["height"]) != size:
        return False
    with Image.open(io.BytesIO(base64.b64decode(data)), formats=["WEBP"]) as small:
        small.load()
        # A side is a whole number of pixels.
        exact = small.width * size[1] / size[0]
        return small.format == "WEBP" and abs(small.height - exact) <= 1


def check(edge):
    png, jpeg = picture("PNG", (640, 320)), picture("JPEG", (300, 900))
    files = [
        edge.upload("a.png", "image/png", png),
        edge.upload("b.jpg", "image/jpeg", jpeg),
        edge.upload("c.png", "image/png", b"this is no image"),
    ]
    edge.say("m1", files)
    ids = [one["upload"] for one in files]
    images, verdicts = edge.annotation("m1", "images"), edge.annotation("m1", "scan")
    yield "a PNG has its size and a thumbnail", is_like(images[ids[0]], (640, 320))
    yield "a JPEG has its size and a thumbnail", is_like(images[ids[1]], (300, 900))
    yield "what is no image has none", ids[2] not in images
    yield "all were found clean", verdicts == dict.fromkeys(ids, "clean")
    yield "and can be downloaded", edge.download(ids[1]) == (200, jpeg)

    many = [edge.upload(f"{n}.png", "image/png", png) for n in range(10)]
    edge.say("m2", many)
    images = edge.annotation("m2", "images")
    yield "ten images in one message, too", len(images) == 10 and all(is_like(one, (640, 320)) for one in images.values())

    virus = edge.upload("virus.com", "application/octet-stream", b"x" * 100_000 + EICAR)
    edge.say("m3", [virus])
    status, answer = edge.download(virus["upload"])
    yield "the EICAR test file is held back", (status, json.loads(answer)["code"]) == (410, "infected")


def main(natter):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        config = pathlib.Path(folder, "natter.toml")
        entries = [
            f'[[workers]]\nname = "{name}"\nrooms = ["chat:*"]\nurl = "http://127.0.0.1:{port}/{name}"\nsecret = "{SECRET}"\n'
            f'annotation = "{name}"\nallow = ["127.0.0.1/32"]\nattachments = true\ntimeout = "10s"\n'
            for name in ("images", "scan")
        ]
        config.write_text('[uploads]\nscan = "scan"\n' + "".join(entries))
        worker = [sys.executable, str(WORKER), str(port)]
        command = [natter, "up", "--config", str(config), "--json", "--port", "0", "--nats-port", "0", "--data", folder]
        with (
            subprocess.Popen(worker, env=os.environ | {"NATTER_WORKER_SECRET": SECRET}) as receiver,
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as up,
        ):
            try:
                report = json.loads(up.stdout.readline())
                edge = Edge(report["regions"][0]["edges"][0]["http"], report["token"])
                checks = list(check(edge))
            finally:
                up.send_signal(signal.SIGTERM)
                up.wait(DEADLINE)
                receiver.terminate()
    for name, passed in checks:
        print(f"{'ok' if passed else 'FAILED'}: {name}")
    failed = [passed for _, passed in checks].count(False)
    print(f"{len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(str(pathlib.Path(sys.argv[1]).resolve())))
