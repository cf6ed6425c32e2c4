#!/usr/bin/env python3
"""The edge's chat page in headless Chromium, driven over plain WebDriver (no packages needed).

    page.py NATTER [FOLDER]

NATTER is the binary. The script starts `natter up` with a data folder of its own on a free port, opens the page in two
windows as two users, and takes everything down again. The stories of stories.py have a second browser with two more windows.
With FOLDER they put pictures of the page there. It prints `N passed, N failed` and exits 0 or 1; 77 (with the reason) if
Chromium or chromedriver is missing.

Nothing here sleeps for a guessed time: every wait is for a condition, with a deadline.
"""

import argparse
import base64
import hashlib
import hmac
import inspect
import json
import os
import pathlib
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

SKIPPED = 77
DEADLINE = 20  # seconds, for what should take milliseconds
START_DEADLINE = 180  # `natter up` may have to fetch its servers
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
ENTER = "\ue007"
NAMES = {"kim": "Kim Yuna"}  # what a token says besides the user
# Never through a proxy: everything is on loopback.
HTTP = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Failed(Exception):
    pass


def until(what, condition, deadline=DEADLINE, interval=0.05):
    """Waits for a condition to give something true, and gives it back."""
    end = time.monotonic() + deadline
    last = None
    while time.monotonic() < end:
        try:
            last = condition()
            if last:
                return last
        except WebDriverError as error:
            last = error
        time.sleep(interval)
    raise Failed(f"{what}: not within {deadline} s (last: {last!r})")


# WebDriver ------------------------------------------------------------------------------------------------------------


class WebDriverError(Exception):
    pass


class Browser:
    def __init__(self, chromium, chromedriver, profile):
        self.port = free_port()
        self.session = None
        self.process = subprocess.Popen(
            [chromedriver, f"--port={self.port}", "--silent"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            until("chromedriver", self._ready)
            self._new_session(chromium, profile)
        except BaseException:
            self.quit()
            raise

    def _new_session(self, chromium, profile):
        options = {
            "binary": chromium,
            "args": [
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--no-proxy-server",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--disable-dev-shm-usage",
                # Both windows must run their timers at full speed, whichever is in front.
                "--disable-background-timer-throttling",
                "--disable-backgrounding-occluded-windows",
                "--disable-renderer-backgrounding",
                f"--user-data-dir={profile}",
                "--window-size=760,820",
            ],
        }
        capabilities = {
            "alwaysMatch": {
                "browserName": "chrome",
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL"},
            }
        }
        value = self._http("POST", "/session", {"capabilities": capabilities}, 60)
        self.session = value["sessionId"]

    def _ready(self):
        if self.process.poll() is not None:
            raise Failed(f"chromedriver ended with {self.process.returncode}")
        try:
            return self._http("GET", "/status", None, 5)["ready"]
        except OSError:
            return False

    def _http(self, method, path, body, deadline=30):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=data,
            method=method,
            headers={"Content-Type": "application/json"},
        )
        try:
            with HTTP.open(request, timeout=deadline) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            value = json.load(error)["value"]
            raise WebDriverError(f"{value['error']}: {value['message']}") from None

    def command(self, method, path, body=None):
        if method == "POST" and body is None:
            body = {}
        return self._http(method, f"/session/{self.session}{path}", body)

    def window(self):
        handle = self.command("POST", "/window/new", {"type": "window"})["handle"]
        window = Window(self, handle)
        window.resize(760, 820)
        return window

    def first_window(self):
        return Window(self, self.command("GET", "/window"))

    def quit(self):
        if self.session:
            try:
                self.command("DELETE", "")
            except (WebDriverError, OSError) as error:
                print(f"closing the browser: {error}", file=sys.stderr)
        stop(self.process)


class Window:
    def __init__(self, browser, handle):
        self.browser = browser
        self.handle = handle

    def command(self, method, path, body=None):
        # The handle is cheap to repeat, and a forgotten switch would type into the other user's window.
        self.browser.command("POST", "/window", {"handle": self.handle})
        return self.browser.command(method, path, body)

    def go(self, url):
        self.command("POST", "/url", {"url": url})

    def reload(self):
        self.command("POST", "/refresh")

    def resize(self, width, height):
        """The size of the page. A window of Chromium can't be as narrow as a phone."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.command("POST", "/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": size})

    def run(self, script, *args):
        return self.command("POST", "/execute/sync", {"script": script, "args": list(args)})

    def find(self, css):
        found = self.command("POST", "/element", {"using": "css selector", "value": css})
        return found[ELEMENT]

    def write(self, css, text):
        self.command("POST", f"/element/{self.find(css)}/value", {"text": text})

    def clear(self, css):
        self.command("POST", f"/element/{self.find(css)}/clear")

    def click(self, css):
        self.command("POST", f"/element/{self.find(css)}/click")

    def label(self, css):
        return self.command("GET", f"/element/{self.find(css)}/computedlabel")

    def text(self, css):
        return self.run("return document.querySelector(arguments[0])?.textContent ?? null", css)

    def state(self):
        return self.run("return document.querySelector('#state')?.dataset.state ?? null")

    def messages(self):
        """What the log shows: [sender, text, pending] a message, in order."""
        return self.run(
            "return [...document.querySelectorAll('#log .message')].map((item) => ["
            "item.querySelector('.from').textContent, item.querySelector('.body').textContent,"
            "item.classList.contains('pending')])"
        )

    def lines(self):
        return self.run("return [...document.querySelectorAll('#log .line')].map((line) => line.textContent)")

    def people(self):
        """Who is here, as the list says."""
        return self.run("return [...document.querySelectorAll('#people .name')].map((name) => name.textContent)")

    def read_by(self, text):
        """The read mark beside the newest message with this text, and the names behind it; None where there is none."""
        return self.run(
            "const bodies = [...document.querySelectorAll('#log .message .body')];"
            "const mark = bodies.findLast((body) => body.textContent === arguments[0])?.parentNode.querySelector('.read');"
            "return mark && !mark.hidden ? [mark.textContent, mark.title] : null",
            text,
        )

    def rooms(self):
        """The rooms of the tab and their badges, None where there is none."""
        return self.run(
            "return Object.fromEntries([...document.querySelectorAll('#rooms button')].map((button) => {"
            "const badge = button.querySelector('.badge');"
            "return [button.dataset.room, badge.hidden ? null : badge.firstElementChild.textContent]}))"
        )

    def look_away(self, away):
        """As if another tab were in front, or this one again: headless windows are always visible."""
        self.run(
            "Object.defineProperty(document, 'visibilityState',"
            "{value: arguments[0] ? 'hidden' : 'visible', configurable: true});"
            "document.dispatchEvent(new Event('visibilitychange'))",
            away,
        )

    def say(self, text):
        self.write("#text", text)
        self.click("#send")

    def until_state(self, state):
        until(f"state {state}", lambda: self.state() == state)

    def until_shows(self, sender, text):
        until(f"{text!r} of {sender}", lambda: [sender, text, False] in self.messages())

    def screenshot(self, path):
        picture = self.command("GET", "/screenshot")
        pathlib.Path(path).write_bytes(base64.b64decode(picture))


# natter ---------------------------------------------------------------------------------------------------------------


class Up:
    """`natter up`, its JSON lines, and tokens made with its development secret."""

    def __init__(self, binary, data, flags=()):
        self.data = pathlib.Path(data)
        self.process = subprocess.Popen(
            [binary, "up", "--json", "--data", data, "--port", str(free_port()), *flags],
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        self.lines = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.await_line(START_DEADLINE)
        except BaseException:
            stop(self.process)
            raise

    def _read(self):
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def await_line(self, deadline=60):
        try:
            line = self.lines.get(timeout=deadline)
        except queue.Empty:
            raise Failed(f"no line from natter up within {deadline} s") from None
        if line is None:
            raise Failed(f"natter up ended with {self.process.wait()}")
        self.edges = json.loads(line)["regions"][0]["edges"]
        self.edge = self.edges[0]

    def url(self):
        return self.edge["http"].rstrip("/") + "/"

    def kill_edge(self):
        os.kill(self.edge["pid"], signal.SIGKILL)

    def request(self, method, path, token, fields=None, edge=0):
        """A request over HTTP, and its answer."""
        request = urllib.request.Request(
            f"{self.edges[edge]['http'].rstrip('/')}/{path}",
            method=method,
            data=None if fields is None else json.dumps(fields).encode(),
            headers={"Authorization": f"Bearer {token}"},
        )
        with HTTP.open(request, timeout=30) as response:
            return json.load(response)

    def post(self, room, user, edge=0, **fields):
        """Says something over HTTP."""
        return self.request("POST", f"v1/rooms/{room}/messages", self.token(user), fields, edge)

    def erase(self, path):
        """Erases for good; `running` is repeated until it is done."""
        return self.request("DELETE", path, self.token("mod", can=["erase"]))["state"] == "done"

    def token(self, user, ttl=3600, can=("read", "write", "presence", "history"), more=()):
        def part(value):
            return base64.urlsafe_b64encode(value).rstrip(b"=")

        secret = (self.data / "dev-secret").read_text().rstrip().encode()
        grants = [{"rooms": "*:*", "can": can}, *more]
        now = int(time.time())
        claims = {"sub": user, "iat": now, "exp": now + ttl, "grants": grants}
        if user in NAMES:
            claims["info"] = {"name": NAMES[user]}
        head = part(json.dumps({"alg": "HS256", "typ": "JWT"}).encode())
        signed = head + b"." + part(json.dumps(claims).encode())
        return (signed + b"." + part(hmac.new(secret, signed, hashlib.sha256).digest())).decode()


class Relay:
    """Passes connections on to the edge until it is frozen; those that come later are passed on again."""

    def __init__(self, port):
        self.target = ("127.0.0.1", port)
        self.frozen = threading.Event()
        self.sockets = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                inner, _ = self.listener.accept()
                outer = socket.create_connection(self.target)
            except OSError:
                return
            self.sockets += [inner, outer]
            for source, sink in [(inner, outer), (outer, inner)]:
                threading.Thread(target=self._copy, args=(source, sink, self.frozen), daemon=True).start()

    @staticmethod
    def _copy(source, sink, frozen):
        try:
            while (some := source.recv(65536)) and not frozen.is_set():
                sink.sendall(some)
            if not frozen.is_set():
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # closed by one of its ends

    def freeze(self):
        """From now on nothing moves any more on the connections that are there, and they stay open."""
        self.frozen.set()
        self.frozen = threading.Event()

    def cut(self):
        """Ends all connections. New ones are passed on."""
        sockets, self.sockets = self.sockets, []
        for one in sockets:
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has ended already
            one.close()

    def close(self):
        for one in [self.listener, *self.sockets]:
            one.close()


def stop(process):
    """Ends a process that was started here, and what it has started."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# The checks -----------------------------------------------------------------------------------------------------------


def entry(up, user, room="chat:lobby"):
    return f"{up.url()}#token={up.token(user)}&room={room}"


def come(window, url):
    """Opens the page anew. Where the tab was another user's, the link only fills the form, and the rest is a click."""
    window.go("about:blank")
    window.go(url)
    if window.state() == "idle":
        assert "This link is for " in window.text("#state"), window.text("#state")
        window.click("#join")


def open_door(window):
    """Shows the form for token and room, which is closed while the page is connected."""
    window.run("document.querySelector('#door').open = true")


def go_to_room(window, room):
    open_door(window)
    window.clear("#room")
    window.write("#room", room)
    window.click("#join")
    until(f"{room} joined", lambda: window.run(
        "return document.querySelector('#rooms [aria-current]')?.dataset.room") == room and window.state() == "connected")


def both_connect(up, kim, lee):
    for window, user in [(kim, "kim"), (lee, "lee")]:
        window.go(entry(up, user))
        window.until_state("connected")
    address = kim.run("return location.href")
    assert "token" not in address, f"the token is still in the address: {address}"


def chat_both_ways(up, kim, lee):
    kim.say("hello 안녕하세요")
    lee.until_shows("kim", "hello 안녕하세요")
    kim.until_shows("kim", "hello 안녕하세요")
    lee.say("hi kim")
    kim.until_shows("lee", "hi kim")
    lee.until_shows("lee", "hi kim")
    # The own message came as an answer to `send` and as a push: it is shown once.
    for window in (kim, lee):
        shown = window.messages()
        assert len(shown) == 2, f"expected two messages: {shown}"
    assert kim.text("#text") == "" and kim.run("return document.querySelector('#text').value") == ""


def typing_is_shown_and_goes_away(up, kim, lee):
    kim.write("#text", "thinking")
    until("typing indicator", lambda: lee.text("#typing") == "kim is typing…")
    until("end of typing", lambda: lee.text("#typing") == "", deadline=10)
    assert kim.text("#typing") == "", "one sees oneself typing"
    kim.clear("#text")


def messages_are_text_not_html(up, kim, lee):
    hostile = "<img src=x onerror=\"document.title='owned'\"><script>1</script>"
    lee.say(hostile)
    kim.until_shows("lee", hostile)
    assert kim.run("return document.querySelectorAll('#log img, #log script').length") == 0
    assert kim.run("return document.title") != "owned"


def both_see_who_is_here(up, kim, lee):
    for window in (kim, lee):
        until("both are listed", lambda window=window: window.people() == ["Kim Yuna", "lee"])
        until("both are counted", lambda window=window: window.text("#count") == "2 here")
    assert kim.text("#names") == "you, lee" and lee.text("#names") == "Kim Yuna, you"


def one_leaves_and_comes_back(up, kim, lee):
    lee.go("about:blank")
    until("lee is gone", lambda: kim.people() == ["Kim Yuna"])
    until("it is told to who listens", lambda: "lee left" in kim.text("#news"))
    lee.go(up.url())
    until("lee is back", lambda: kim.people() == ["Kim Yuna", "lee"])
    until("both are listed", lambda: lee.people() == ["Kim Yuna", "lee"])


def read_marks_follow_who_looks(up, kim, lee):
    lee.look_away(True)
    kim.say("have you seen this?")
    lee.until_shows("kim", "have you seen this?")
    until("it waits in the title", lambda: lee.run("return document.title").startswith("(1) "))
    assert kim.read_by("have you seen this?") is None, "read without having been looked at"
    lee.look_away(False)
    until("read mark at the sender", lambda: kim.read_by("have you seen this?") == ["read by 1", "lee"])
    until("read mark at the reader", lambda: lee.read_by("have you seen this?") == ["read by 1", "you"])
    assert lee.run("return document.title").startswith("chat:lobby"), lee.run("return document.title")
    # By keyboard the names come out, too.
    kim.run("[...document.querySelectorAll('.read')].findLast((mark) => !mark.hidden).focus()")
    kim.command("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": [
        {"type": "keyDown", "value": ENTER}, {"type": "keyUp", "value": ENTER}]}]})
    until("names", lambda: kim.read_by("have you seen this?") == ["read by lee", "lee"])
    # A reader who goes on takes the mark along.
    kim.say("and this?")
    until("mark moves on", lambda: kim.read_by("and this?") == ["read by 1", "lee"])
    until("mark is gone", lambda: kim.read_by("have you seen this?") is None)


def what_is_off_screen_is_not_read(up, kim, lee):
    for n in range(25):
        up.post("chat:lobby", "kim", body={"text": f"line {n}"})
    lee.until_shows("kim", "line 24")
    until("all read", lambda: kim.read_by("line 24") == ["read by 1", "lee"])
    lee.run("document.querySelector('#log').scrollTop = 0")
    until("scrolled", lambda: lee.run("return document.querySelector('#log').scrollTop") == 0)
    kim.say("below the edge")
    lee.until_shows("kim", "below the edge")
    until("it waits in the title", lambda: lee.run("return document.title").startswith("(1) "))
    assert kim.read_by("below the edge") is None, "read without having been on the screen"
    lee.run("const log = document.querySelector('#log'); log.scrollTop = log.scrollHeight")
    until("read", lambda: kim.read_by("below the edge") == ["read by 1", "lee"])


def badge_of_another_room(up, kim, lee):
    go_to_room(lee, "chat:annex")
    until("both rooms", lambda: lee.rooms() == {"chat:lobby": None, "chat:annex": None})
    until("lee left the lobby", lambda: kim.people() == ["Kim Yuna"])
    kim.say("anybody?")
    until("badge", lambda: lee.rooms() == {"chat:lobby": "1", "chat:annex": None})
    assert lee.run("return document.title") == "(1) chat:annex · natter"
    label = lee.label("#rooms button")
    assert label == "chat:lobby 1 unread", f"the room with a badge is called {label!r}"
    kim.say("nobody?")
    until("badge grows", lambda: lee.rooms() == {"chat:lobby": "2", "chat:annex": None})
    lee.click("#rooms [data-room='chat:lobby']")
    lee.until_state("connected")
    lee.until_shows("kim", "nobody?")
    assert lee.rooms() == {"chat:lobby": None, "chat:annex": None}, lee.rooms()
    until("read", lambda: kim.read_by("nobody?") == ["read by 1", "lee"])
    assert lee.run("return document.querySelector('#rooms [aria-current]').dataset.room") == "chat:lobby"
    # What was read stays read for those who ask the edge anew.
    lee.click("#rooms [data-room='chat:annex']")
    lee.until_state("connected")
    kim.say("still there?")
    until("badge again", lambda: lee.rooms()["chat:lobby"])
    assert lee.rooms()["chat:lobby"] == "1", lee.rooms()
    lee.click("#rooms [data-room='chat:lobby']")
    lee.until_state("connected")


def counts_where_names_are_not_told(up, kim, lee):
    for window in (kim, lee):
        go_to_room(window, "live:pitch")
    kim.say("goal!")
    lee.until_shows("kim", "goal!")
    for window in (kim, lee):
        until("both are counted", lambda window=window: window.text("#count") == "2 here")
        assert window.people() == [], window.people()
    # Without cursors there is nothing to have read.
    assert lee.read_by("goal!") is None and lee.rooms()["live:pitch"] is None
    for window in (kim, lee):
        window.click("#rooms [data-room='chat:lobby']")
        window.until_state("connected")


def cursors_are_compared_by_component(up, kim, lee):
    reached = kim.run(
        "return import('/natter.js').then(({ reaches }) => arguments[0].map(([marker, cursor]) => reaches(marker, cursor)))",
        [
            ["a.e1.7.ff", "a.e1.7.ff"],
            ["a.e1.10.ff", "a.e1.9.ff"],
            ["a.e1.7.ff_b.e2.3.00", "b.e2.3.00"],
            ["a.e1.7.ff", "a.e1.7.ff_b.e2.0.00"],
            ["a.e1.7.ff", "a.e1.8.ff"],
            ["a.e2.9.ff", "a.e1.8.ff"],
            ["a.e1.9.ff_b.e2.2.00", "a.e1.7.ff_b.e2.3.00"],
            ["", "a.e1.1.ff"],
        ],
    )
    assert reached == [True] * 4 + [False] * 4, reached


def without_the_right_no_presence(up, kim, lee):
    lee.go("about:blank")
    lee.go(f"{up.url()}#token={up.token('lee', can=['read', 'write'])}&room=chat:lobby")
    lee.until_state("connected")
    kim.say("who are you?")
    lee.until_shows("kim", "who are you?")
    assert lee.run("return document.querySelector('#here').hidden"), "who is here is shown"
    assert not any("forbidden" in line for line in lee.lines()), lee.lines()
    until("read marks all the same", lambda: kim.read_by("who are you?") == ["read by 1", "lee"])
    lee.go("about:blank")
    lee.go(entry(up, "lee"))
    lee.until_state("connected")


def reload_resumes_with_what_was_missed(up, kim, lee):
    before = lee.messages()
    lee.go("about:blank")
    missed = [f"missed {n}" for n in (1, 2, 3)]
    for text in missed:
        kim.say(text)
        kim.until_shows("kim", text)
    lee.go(up.url())
    lee.until_state("connected")
    expected = before + [["kim", text, False] for text in missed]
    until("what was missed, once and in order", lambda: lee.messages() == expected)
    assert any("resumed, 3 missed" in line for line in lee.lines()), lee.lines()
    separator_first = lee.run(
        "const line = document.querySelector('#log .line');"
        "return line.nextElementSibling.querySelector('.body').textContent"
    )
    assert separator_first == "missed 1", f"the separator stands before {separator_first!r}"


def reload_without_loss_repeats_nothing(up, kim, lee):
    before = lee.messages()
    lee.reload()
    lee.until_state("connected")
    until("separator", lambda: any("resumed, 0 missed" in line for line in lee.lines()))
    assert lee.messages() == before, f"{lee.messages()} instead of {before}"


def edge_killed_and_restarted(up, kim, lee):
    up.kill_edge()
    for window in (kim, lee):
        window.until_state("reconnecting")
    # The state changes while we look: the countdown was seen, or it is over already.
    until("countdown", lambda: "reconnecting in" in kim.text("#state") or kim.state() == "connected")
    kim.say("said while the edge was down")
    # Pending, or by the time we look stored already.
    until("own message", lambda: kim.messages()[-1][:2] == ["kim", "said while the edge was down"])
    up.await_line()
    for window in (kim, lee):
        until("reconnect", lambda window=window: window.state() == "connected", deadline=40)
        window.until_shows("kim", "said while the edge was down")
        texts = [text for _, text, _ in window.messages()]
        assert texts.count("said while the edge was down") == 1, texts
        assert any("reconnected" in line for line in window.lines()), window.lines()
        until("both are here again", lambda window=window: window.people() == ["Kim Yuna", "lee"])
    until("read", lambda: kim.read_by("said while the edge was down") == ["read by 1", "lee"])


def drafts_stay_and_unsent_messages_go_out_later(up, kim, lee):
    go_to_room(lee, "chat:annex")
    lee.write("#text", "half a sentence")
    go_to_room(lee, "chat:lobby")
    field = "return document.querySelector('#text').value"
    assert lee.run(field) == "", "a draft came along into another room"
    # Nothing answers any more. What is said then outlives another room and a reload, and is sent once.
    lee.run("WebSocket.prototype.send = () => {}")
    lee.say("said into the void")
    until("it is on its way", lambda: lee.messages()[-1] == ["lee", "said into the void", True])
    lee.click("#rooms [data-room='chat:annex']")
    until("the draft", lambda: lee.run(field) == "half a sentence")
    assert any("not sent yet in chat:lobby" in line for line in lee.lines()), lee.lines()
    lee.reload()
    lee.until_state("connected")
    assert any("not sent yet in chat:lobby" in line for line in lee.lines()), lee.lines()
    lee.click("#rooms [data-room='chat:lobby']")
    for window in (kim, lee):
        window.until_shows("lee", "said into the void")
        assert texts(window).count("said into the void") == 1, texts(window)
    until("nothing is unsent", lambda: lee.run("return sessionStorage.getItem('natter:unsent')") == "[]")


def a_link_does_not_change_the_user(up, kim, lee):
    token = up.token("mallory")
    for first in ("about:blank", up.url()):  # as a page that is opened, and in one that is there
        lee.go(first)
        lee.go(f"{up.url()}#token={token}&room=chat:annex")
        until("the question", lambda: "This link is for mallory, and this tab is lee's" in lee.text("#state"))
        assert lee.run("return [document.querySelector('#token').value, location.hash]") == [token, ""]
        assert lee.run("return JSON.parse(sessionStorage.getItem('natter:entry')).token") != token
    lee.click("#rooms [data-room='chat:lobby']")
    lee.until_state("connected")
    assert lee.run("return document.querySelector('#user').value") == "lee", "a click on a room changed the user"
    lee.go(f"{up.url()}#room=chat:annex")
    until("the other room", lambda: lee.run("return document.querySelector('#app').dataset.room") == "chat:annex")
    assert lee.run("return location.hash") == "", "the room is still in the address"
    come(lee, entry(up, "lee"))
    lee.until_state("connected")


class Frozen:
    """A window whose connection is frozen. A page needs half a minute to notice that; other checks run meanwhile."""

    room = "chat:frozen"
    relay = window = None


def frozen_connection_is_left(up, kim, lee):
    relay = Frozen.relay = Relay(int(up.url().rstrip("/").rsplit(":", 1)[1]))
    window = kim.browser.window()
    window.go(f"http://127.0.0.1:{relay.port}/#token={up.token('kim')}&room={Frozen.room}")
    window.until_state("connected")
    window.say("before")
    window.until_shows("kim", "before")
    relay.freeze()
    up.post(Frozen.room, "lee", body={"text": "said meanwhile"})
    window.say("into the void")
    until("what was missed", lambda: "said meanwhile" in texts(window), deadline=40)
    window.until_shows("kim", "into the void")
    # Nothing is sent, so nothing waits for an answer.
    relay.freeze()
    up.post(Frozen.room, "lee", body={"text": "said in the quiet"})
    Frozen.window = window


def frozen_connection_is_left_in_the_quiet(up, kim, lee):
    window = Frozen.window
    assert window, "there is no frozen connection"
    until("what was missed in the quiet", lambda: "said in the quiet" in texts(window), deadline=42)
    window.until_state("connected")
    once = ["before", "said meanwhile", "into the void", "said in the quiet"]
    assert texts(window) == once, texts(window)
    # And stored once.
    come(window, entry(up, "cho", Frozen.room))
    window.until_state("connected")
    until("all of it once", lambda: texts(window) == once)
    Frozen.relay.close()
    window.command("DELETE", "/window")


def texts(window):
    return [text for _, text, _ in window.messages()]


def press(window, key):
    window.command("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": [
        {"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]}]})


def history_is_shown_and_goes_on_above(up, kim, lee):
    room = "chat:past"
    for n in range(130):
        up.post(room, "park", id=f"p{n}", body={"text": f"note {n}"})
    up.post(room, "park", kind="edit", target="p127", body={"text": "note 127, corrected"})
    up.post(room, "park", kind="delete", target="p128", body={})
    for user in ("lee", "kim"):
        up.post(room, user, kind="reaction", target="park/p129", body="👍")
    lee.go("about:blank")
    lee.go(entry(up, "lee", room))
    lee.until_state("connected")
    expected = [f"note {n}" for n in range(80, 127)] + ["note 127, corrected", "", "note 129"]
    until("the newest page", lambda: texts(lee) == expected)
    notes = lee.run("return [...document.querySelectorAll('#log .note')].slice(-3).map((note) => note.textContent)")
    assert notes == ["edited", "deleted", ""], notes
    reactions = lee.text("#log .message:last-child .reactions")
    assert reactions == "👍 2", reactions
    # With the next frame, when something above the list has just been shown.
    above = "const log = document.querySelector('#log'); return log.scrollHeight - log.scrollTop - log.clientHeight"
    until("the list at its end", lambda: lee.run(above) < 5)
    # What comes live is below it, once.
    go_to_room(kim, room)
    kim.say("and now")
    until("live below", lambda: texts(lee) == expected + ["and now"])
    until("and for who joined", lambda: texts(kim)[-2:] == ["note 129", "and now"])
    # Up by scrolling; what one reads stays in its place.
    lee.run("document.querySelector('#log').scrollTop = 0")
    until("more above", lambda: texts(lee)[0] == "note 30")
    assert lee.run("return document.querySelector('#log').scrollTop") > 100, "it jumped to the new top"
    # By keyboard.
    lee.run("document.querySelector('#log .older button').focus()")
    press(lee, ENTER)
    until("all of it", lambda: texts(lee)[0] == "note 0")
    assert texts(lee) == [f"note {n}" for n in range(80)] + expected + ["and now"], texts(lee)
    assert not lee.run("return document.querySelector('#log .older') != null"), "older messages than all are offered"
    lee.reload()
    lee.until_state("connected")
    until("history after a reload", lambda: texts(lee) == expected[1:] + ["and now"])


def search_finds_parts_of_words(up, kim, lee):
    room = "chat:past"
    up.post(room, "park", id="hello", body={"text": "여러분 안녕하세요, 반갑습니다"})
    lee.go("about:blank")
    for n in range(60):
        up.post(room, "park", body={"text": f"later {n}"})
    # A user whose tab has nothing to show from before.
    come(lee, entry(up, "cho", room))
    lee.until_state("connected")
    lee.until_shows("park", "later 59")
    found = "return [...document.querySelectorAll('#hits .hit .body')].map((body) => body.textContent)"

    def search(words):
        lee.clear("#query")
        lee.write("#query", words + ENTER)
        until("an answer", lambda: not lee.run("return document.querySelector('#hits').hidden"))
        return lee.run(found)

    # MongoDB may be a moment behind.
    until("a part of a Korean word", lambda: search("안녕") == ["여러분 안녕하세요, 반갑습니다"], interval=0.5)
    search("?!")
    until("that nothing can be searched for", lambda: "can be searched for" in lee.text("#hits"))
    until("nothing", lambda: search("고양이") == [] and lee.text("#hits") == "No messages found.", interval=0.5)
    until("words of the past", lambda: "note 3" in search("note 3"), interval=0.5)
    lee.run("[...document.querySelectorAll('#hits .hit')]"
            ".find((hit) => hit.querySelector('.body').textContent === 'note 3').click()")
    until("the one that was found", lambda: lee.text("#log .found .body") == "note 3")
    assert "later 59" not in texts(lee) and not lee.run("return document.querySelector('#now').hidden")
    assert lee.run("return document.activeElement.matches('.found')"), "the focus is elsewhere"
    # What is said meanwhile is not put below what is far back.
    up.post(room, "park", body={"text": "meanwhile"})
    until("it waits in the title", lambda: lee.run("return document.title").startswith("("))
    assert "meanwhile" not in texts(lee)
    lee.click("#now")
    lee.until_shows("park", "meanwhile")
    until("the present", lambda: texts(lee)[-2:] == ["later 59", "meanwhile"] and "note 3" not in texts(lee))
    # And back again by reading on: nothing is left out, nothing is there twice.
    lee.run("document.querySelector('#hits .hit').click()")
    until("the one that was found", lambda: (lee.text("#log .found .body") or "").startswith("note 3"))
    down = "const log = document.querySelector('#log'); log.scrollTop = log.scrollHeight; log.dispatchEvent(new Event('scroll'))"
    until("the present by reading on", lambda: lee.run(down) or lee.run("return document.querySelector('#now').hidden"))
    shown = texts(lee)
    first = int(shown[0].removeprefix("note "))
    wanted = [f"note {n}" for n in range(first, 127)] + ["note 127, corrected", "", "note 129", "and now"]
    wanted += ["여러분 안녕하세요, 반갑습니다"] + [f"later {n}" for n in range(60)] + ["meanwhile"]
    assert shown == wanted, shown
    lee.run("document.querySelector('#query').focus()")
    press(lee, "\ue00c")
    until("closed", lambda: lee.run("return document.querySelector('#hits').hidden"))


def erased_messages_go_away(up, kim, lee):
    room = "chat:past"
    kim.say("kim stays")
    lee.until_shows("kim", "kim stays")
    until("park is erased", lambda: up.erase("v1/users/park/messages"))
    for window in (kim, lee):
        until("only kim is left", lambda window=window: {who for who, _, _ in window.messages()} == {"kim"})
        until("it is said", lambda window=window: any("messages of park were erased" in line for line in window.lines()))
    until("the room is erased", lambda: up.erase(f"v1/rooms/{room}"))
    for window in (kim, lee):
        until("nothing is left", lambda window=window: window.messages() == [])
    lee.reload()
    lee.until_state("connected")
    kim.say("a new beginning")
    until("only what is new", lambda: texts(lee) == ["a new beginning"])
    go_to_room(kim, "chat:lobby")
    come(lee, entry(up, "lee"))
    lee.until_state("connected")


def refusals_are_shown(up, kim, lee):
    open_door(lee)
    lee.clear("#room")
    lee.write("#room", "nowhere:lobby")
    lee.click("#join")
    lee.until_state("out")
    assert any(line.startswith("There is no such namespace: ") for line in lee.lines()), lee.lines()
    assert lee.run("return document.querySelector('#text').disabled"), "one can write where one is not"
    come(lee, f"{up.url()}#token=not.a.token&room=chat:lobby")
    lee.until_state("closed")
    assert "4001" in lee.text("#state"), lee.text("#state")


def fits_a_phone(up, kim, lee):
    lee.resize(360, 640)
    come(lee, entry(up, "lee"))
    lee.until_state("connected")

    def assert_fits(what):
        wide, inner = lee.run("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide <= inner, f"{what} makes it {wide} px wide in {inner} px"

    assert_fits("an empty room")
    up.post("chat:lobby", "lee", body={"text": "a" * 300})
    lee.until_shows("lee", "a" * 300)
    assert_fits("a long word")
    last = "chat:" + "r" * 60
    for window, room in [(lee, last), (lee, "chat:lobby"), (kim, last)]:
        go_to_room(window, room)
    kim.say("beyond the edge of the screen")
    until("badge", lambda: lee.rooms().get(last) == "1")
    assert_fits("a badge that is not on the screen")
    go_to_room(kim, "chat:lobby")


def has_names_for_screen_readers(up, kim, lee):
    open_door(kim)
    for css, name in [("#text", "Message"), ("#room", "Room"), ("#token", "Token"), ("#send", "Send")]:
        label = kim.label(css)
        assert label == name, f"{css} is called {label!r}"


def console_is_clean(up, *windows):
    for window in windows:
        entries = window.command("POST", "/se/log", {"type": "browser"})
        # A refused connection is logged by the browser itself while the edge is down.
        faults = [e["message"] for e in entries if "Uncaught" in e["message"] or "Content Security" in e["message"]]
        assert not faults, faults


CHECKS = [
    both_connect,
    chat_both_ways,
    typing_is_shown_and_goes_away,
    messages_are_text_not_html,
    both_see_who_is_here,
    one_leaves_and_comes_back,
    read_marks_follow_who_looks,
    what_is_off_screen_is_not_read,
    badge_of_another_room,
    reload_resumes_with_what_was_missed,
    reload_without_loss_repeats_nothing,
    edge_killed_and_restarted,
    drafts_stay_and_unsent_messages_go_out_later,
    a_link_does_not_change_the_user,
    frozen_connection_is_left,
    counts_where_names_are_not_told,
    without_the_right_no_presence,
    cursors_are_compared_by_component,
    history_is_shown_and_goes_on_above,
    search_finds_parts_of_words,
    erased_messages_go_away,
    has_names_for_screen_readers,
    refusals_are_shown,
    fits_a_phone,
]


def windows_of(check):
    """How many windows a check takes; None for all."""
    code = check.__code__
    return None if code.co_flags & inspect.CO_VARARGS else code.co_argcount - 1


def run(natter, checks, windows=(1,), flags=()):
    """
    Runs checks one after the other, each with a `natter up` and as many windows as it takes; the exit code. `windows` has the
    number of windows of each browser. Each browser has a profile of its own.
    """
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        missing = "chromium" if not chromium else "chromedriver"
        print(f"skipped: {missing} is not installed (Debian: chromium and chromium-driver)")
        return SKIPPED

    passed = failed = 0
    up, browsers = None, []
    with tempfile.TemporaryDirectory(prefix="natter-page-", ignore_cleanup_errors=True) as folder:
        try:
            up = Up(natter, os.path.join(folder, "data"), flags)
            opened = []
            for n, count in enumerate(windows):
                browser = Browser(chromium, chromedriver, os.path.join(folder, f"profile-{n}"))
                browsers.append(browser)
                opened += [browser.first_window(), *(browser.window() for _ in range(1, count))]
                opened[-count].resize(760, 820)
            for check in checks:
                try:
                    check(up, *opened[: windows_of(check)])
                    print(f"ok    {check.__name__}", flush=True)
                    passed += 1
                except (Failed, AssertionError, WebDriverError) as error:
                    print(f"FAIL  {check.__name__}: {error}", flush=True)
                    failed += 1
        except Failed as error:
            print(f"FAIL  start: {error}")
            failed += 1
        finally:
            for browser in browsers:
                browser.quit()
            if up:
                stop(up.process)
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


def main():
    parser = argparse.ArgumentParser(description="The chat page in headless Chromium.")
    parser.add_argument("natter", help="the natter binary")
    parser.add_argument("folder", nargs="?", type=pathlib.Path, help="where to put pictures of the page")
    arguments = parser.parse_args()
    import stories  # which imports this module

    stories.FOLDER = arguments.folder
    checks = [*CHECKS, *stories.STORIES, frozen_connection_is_left_in_the_quiet, console_is_clean]
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as config:
        config.write(stories.CONFIG)
        config.flush()
        return run(arguments.natter, checks, windows=(2, 2), flags=("--config", config.name))


if __name__ == "__main__":
    # As the module that the stories import, so that there is one of everything.
    from page import main as main_of_page

    sys.exit(main_of_page())
