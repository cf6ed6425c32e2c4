#!/usr/bin/env python3
"""A receiver of natter's event hooks: prints each event that is signed. `NATTER_HOOK_SECRET=whsec_… python3 hook.py 9000`"""

import base64, hashlib, hmac, os, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = base64.b64decode(os.environ["NATTER_HOOK_SECRET"].removeprefix("whsec_"))


def is_signed(headers, body):
    """As https://www.standardwebhooks.com says; and not an old request."""
    sent = headers.get("webhook-timestamp", "")
    signed = f"{headers.get('webhook-id')}.{sent}.".encode() + body
    expected = "v1," + base64.b64encode(hmac.new(KEY, signed, hashlib.sha256).digest()).decode()
    given = headers.get("webhook-signature", "").split(" ")
    return sent.isdigit() and abs(time.time() - int(sent)) < 300 and any(hmac.compare_digest(expected, one) for one in given)


class Hook(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        signed = is_signed(self.headers, body)
        if signed:  # An event may come again, with the same webhook-id.
            print(body.decode(), flush=True)
        self.send_response(204 if signed else 401)
        self.end_headers()

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Hook).serve_forever()
