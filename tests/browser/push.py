#!/usr/bin/env python3
"""Notifications of the chat page in headless Chromium: the service worker shows what is pushed, and the button is there.

    push.py NATTER

The push itself is a stand-in: the devtools of Chromium hand it to the service worker, as its push service would. No browser
can subscribe here, since that needs a service on the internet. Otherwise as page.py.
"""

import json
import subprocess
import sys
import tempfile

from page import Failed, come, entry, run, until


def registered(window):
    """Registers the page's service worker, and returns when it is active."""
    window.run(
        "window.worker = null;"
        "navigator.serviceWorker.register('sw.js').then(() => navigator.serviceWorker.ready)"
        ".then((registration) => { window.worker = registration; }, (error) => { window.worker = String(error); });"
    )
    scope = until("the service worker is active", lambda: window.run("return window.worker?.scope ?? window.worker"))
    if not scope.startswith("http"):
        raise Failed(f"the service worker: {scope}")
    return scope


def notes(window):
    """What is shown: title, text and room of each."""
    window.run(
        "window.notes = null; window.worker.getNotifications().then((all) => {"
        " window.notes = all.map((note) => [note.title, note.body, note.data?.room ?? null, note.tag]); });"
    )
    listed = until("notifications are listed", lambda: window.run("return window.notes && [window.notes]"))
    return listed[0]


def deliver(window, scope, data):
    """Gives a message to the service worker. Its registration is the only one of this browser: one of the first numbers."""
    for number in range(4):
        params = {"origin": scope.rstrip("/"), "registrationId": str(number), "data": data}
        window.command("POST", "/goog/cdp/execute", {"cmd": "ServiceWorker.deliverPushMessage", "params": params})


def a_push_is_shown_with_its_room(up, kim):
    come(kim, entry(up, "kim"))
    until("the button is there", lambda: not kim.run("return document.getElementById('notify').hidden"))
    scope = registered(kim)
    grant = {"origin": scope.rstrip("/"), "permissions": ["notifications"]}
    kim.command("POST", "/goog/cdp/execute", {"cmd": "Browser.grantPermissions", "params": grant})
    kim.command("POST", "/goog/cdp/execute", {"cmd": "ServiceWorker.enable", "params": {}})
    note = {"title": "lee in Tea", "text": "hi <b>you</b>", "room": "chat:tea", "message": "lee/1", "badge": 2, "at": 1}
    deliver(kim, scope, json.dumps(note))
    shown = [["lee in Tea", "hi <b>you</b>", "chat:tea", "chat:tea"]]
    until("it is shown", lambda: notes(kim) == shown)
    # A later one of the room takes its place, also one without content.
    deliver(kim, scope, json.dumps({"title": None, "text": None, "room": "chat:tea"}))
    until("another one is in its place", lambda: notes(kim) == [["natter", "There is a new message.", "chat:tea", "chat:tea"]])
    # What is no message of natter is shown all the same.
    deliver(kim, scope, "not JSON")
    until("both are shown", lambda: ["natter", "There is a new message.", None, ""] in notes(kim))


def main():
    natter = sys.argv[1]
    keys = subprocess.run([natter, "notifier", "key"], check=True, capture_output=True, text=True).stdout
    private, public = keys.rstrip().rsplit("\n", 1)
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as config:
        config.write(
            f"[push]\nvapid_private_key = '''\n{private}\n'''\nvapid_public_key = '{public}'\n"
            "subject = 'mailto:ops@example.org'\n"
        )
        config.flush()
        return run(natter, [a_push_is_shown_with_its_room], flags=("--no-mongodb", "--config", config.name))


if __name__ == "__main__":
    sys.exit(main())
