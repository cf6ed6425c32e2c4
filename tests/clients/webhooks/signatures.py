#!/usr/bin/env python3
"""The signatures of workers' requests, checked by the library of Standard Webhooks (see requirements.txt).

    signatures.py NATTER

NATTER is the binary. Starts `natter up` with a worker that has two secrets, publishes a message, and verifies the request
with each of them. Prints `N passed, N failed` and exits 0 or 1.
"""

import json
import pathlib
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from standardwebhooks.webhooks import Webhook, WebhookVerificationError

OLD = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
NEW = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oDd5wb8Po+4Lk="
OTHER = "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
DEADLINE = 120

requests = queue.Queue()


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        requests.put((dict(self.headers), body))
        self.send_response(204)
        self.end_headers()

    def log_message(self, format, *args):
        pass


def accepts(secret, headers, body):
    try:
        Webhook(secret).verify(body, headers)
        return True
    except WebhookVerificationError:
        return False


def main(natter):
    receiver = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        config = pathlib.Path(folder, "natter.toml")
        url = f"http://127.0.0.1:{receiver.server_port}/"
        config.write_text(
            f'[[workers]]\nname = "signed"\nrooms = ["chat:*"]\nurl = "{url}"\nsecret = ["{NEW}", "{OLD}"]\n'
            'annotation = "x"\nallow = ["127.0.0.1/32"]\n'
        )
        command = [natter, "up", "--config", str(config), "--json", "--no-mongodb", "--port", "0", "--nats-port", "0"]
        with subprocess.Popen([*command, "--data", folder], stdout=subprocess.PIPE, text=True) as up:
            try:
                report = json.loads(up.stdout.readline())
                edge = report["regions"][0]["edges"][0]["http"]
                message = json.dumps({"id": "m1", "body": {"text": "안녕, \u0000 \"quoted\""}}).encode()
                headers = {"authorization": f"Bearer {report['token']}"}
                publish = urllib.request.Request(f"{edge}/v1/rooms/chat:lobby/messages", message, headers)
                urllib.request.urlopen(publish, timeout=DEADLINE).close()
                headers, body = requests.get(timeout=DEADLINE)
            finally:
                up.send_signal(signal.SIGTERM)
                up.wait(DEADLINE)
    changed = body.replace(b'"id":"m1"', b'"id":"m2"')
    checks = {
        "the new secret": accepts(NEW, headers, body),
        "the old secret": accepts(OLD, headers, body),
        "not another secret": not accepts(OTHER, headers, body),
        "not another body": changed != body and not accepts(NEW, headers, changed),
    }
    for name, passed in checks.items():
        print(f"{'ok' if passed else 'FAILED'}: {name}")
    failed = list(checks.values()).count(False)
    print(f"{len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(str(pathlib.Path(sys.argv[1]).resolve())))
