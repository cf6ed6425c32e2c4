#!/usr/bin/env python3
"""Two workers for natter that look into the files of messages. They need Pillow (requirements.txt beside this file).

    NATTER_WORKER_SECRET=whsec_… python3 image_worker.py 9001

/images   the width, the height and a small WebP of each image
/scan     an EXAMPLE of a scanner for viruses: it knows nothing but the EICAR test file. Put your own one in its place.

[[workers]] of the configuration then have the URLs http://127.0.0.1:9001/images and http://127.0.0.1:9001/scan, the same
secret, attachments = true, and allow = ["127.0.0.1/32"]; uploads.scan is the name of the second one.
"""

import base64
import io
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image, ImageOps

from worker import is_signed

SEEN = ("image/png", "image/jpeg", "image/gif", "image/webp")
FORMATS = ("PNG", "JPEG", "GIF", "WEBP")  # Pillow has decoders of many more, which strangers need not reach
MOST_BYTES = 20 << 20  # of a file; larger ones have no thumbnail
MOST_PIXELS = 24_000_000  # once decoded: a small file can hold a very large image. About 200 MB at once
MOST_REQUEST = 2 << 20
ALL_WITHIN = 8  # seconds for all files of a message; less than `timeout` of the worker
ANSWER = 7_500  # bytes of all thumbnails; an annotation has at most 8 KiB
SIDES = (160, 128, 96, 64, 48, 32, 16)  # longest side of a thumbnail, in pixels; the largest that fits

EICAR = rb"X5O!P%@AP[4\PZX54(P^)7CC)7}$" + b"EICAR-STANDARD-ANTIVIRUS-TEST-FILE!$H+H*"  # in two parts: this is no virus

Image.MAX_IMAGE_PIXELS = MOST_PIXELS
warnings.simplefilter("error", Image.DecompressionBombWarning)
# Requests at once. Pictures are held in memory and decoded, so they must not hold up verdicts.
AT_ONCE = {"/images": threading.BoundedSemaphore(2), "/scan": threading.BoundedSemaphore(8)}


class Unusable(Exception):
    """There is nothing to say of the file, now or later."""


class Missing(Exception):
    """The file is not there."""


def pieces(upload, until):
    """The bytes of a file, piece by piece. `url` comes from natter: the request was signed."""
    try:
        answer = urllib.request.urlopen(upload["url"], timeout=max(0.1, until - time.monotonic()))
    except urllib.error.HTTPError as refused:
        raise (Missing if refused.code == 404 else OSError)(refused.code) from refused
    with answer:
        while piece := answer.read1(64 << 10):
            yield piece
            if time.monotonic() > until:
                raise TimeoutError("the file takes too long")


def image(upload, until):
    """Width, height, and the picture in a size that is easily made smaller."""
    data = bytearray()
    for piece in pieces(upload, until):
        data += piece
        if len(data) > MOST_BYTES:
            raise Unusable
    if time.monotonic() > until:
        raise TimeoutError("no time is left to decode it")  # decoding itself can't be stopped
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            picture.draft("RGB", (2 * SIDES[0], 2 * SIDES[0]))  # a JPEG is decoded small
            original = Image.open(io.BytesIO(data), formats=FORMATS).size
            turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            mode = "RGBA" if picture.has_transparency_data else "RGB"
            picture.thumbnail((SIDES[0], SIDES[0]))  # first: the rest then has few pixels
            small = ImageOps.exif_transpose(picture).convert(mode)
    except Exception as bad:  # Pillow raises whatever a stranger's bytes lead it to
        raise Unusable from bad
    width, height = reversed(original) if turned else original
    return {"width": width, "height": height}, small


def webp(small, bytes_each):
    """The largest thumbnail that fits, as a URL; None if none does."""
    for side in SIDES:
        copy, out = small.copy(), io.BytesIO()
        copy.thumbnail((side, side))
        try:
            copy.save(out, "WEBP", quality=60, method=4, exif=b"", icc_profile=None)
        except Exception:
            return None
        url = "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
        if len(url) <= bytes_each:
            return url
    return None


def images(uploads, until):
    wanted = [one for one in uploads if one.get("type") in SEEN and (one.get("size") or 0) <= MOST_BYTES]
    found, later = {}, None
    for upload in wanted:
        try:
            found[upload["upload"]] = image(upload, until)
        except (Unusable, Missing):
            pass
        except OSError as away:
            later = away
    if later and not found:
        raise later  # a part of the thumbnails is better than none, but later there may be all
    each = ANSWER // max(1, len(found)) - 140  # the rest of an entry
    files = {upload: about | ({"thumbnail": url} if (url := webp(small, each)) else {}) for upload, (about, small) in found.items()}
    return {"files": files} if files else None


def scan(uploads, until):
    """
    A stand-in: says "infected" where the EICAR test string is in a file. It reads all of each file, of any size. A file
    that is not there is "missing": natter asks some more times. All others must have a verdict.
    """
    files = {}
    for upload in uploads:
        end, verdict = b"", "clean"
        try:
            for piece in pieces(upload, until):
                if EICAR in end + piece:
                    verdict = "infected"
                    break
                end = (end + piece)[-len(EICAR):]
        except Missing:
            verdict = "missing"
        files[upload["upload"]] = verdict
    return {"files": files}


class Worker(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 30

    def answer(self, status, body=None):
        text = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
        self.send_response(status)
        if status != 204:
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self):
        self.answer(200 if self.path == "/healthz" else 404)

    def do_POST(self):
        length = int(self.headers.get("content-length", 0))
        if length > MOST_REQUEST:
            self.close_connection = True
            return self.answer(413)
        body = self.rfile.read(length)
        work = {"/images": images, "/scan": scan}.get(self.path)
        if work is None:
            return self.answer(404)
        if not is_signed(self.headers, body):
            return self.answer(401)
        until, turns = time.monotonic() + ALL_WITHIN, AT_ONCE[self.path]
        if not turns.acquire(timeout=ALL_WITHIN / 2):
            return self.answer(503)
        try:
            result = work(json.loads(body).get("uploads", []), until)
        except (OSError, ValueError):
            # The storage is away, or too slow: natter asks again.
            return self.answer(503)
        finally:
            turns.release()
        return self.answer(204) if result is None else self.answer(200, result)

    def log_message(self, format, *args):
        """Says nothing: what people send does not belong in a log."""


if __name__ == "__main__":
    port = int(sys.argv[1]) if len(sys.argv) > 1 else 9001
    ThreadingHTTPServer(("127.0.0.1", port), Worker).serve_forever()
