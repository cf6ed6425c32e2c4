#!/usr/bin/env python3
"""The browser's own EventSource, and the example of docs/events.md, in headless Chromium: events.py NATTER

NATTER is the binary. The script starts `natter up` with two edges, opens a page of the first one, and takes everything down
again. Messages are written through the second edge, so that they also come while the first one is away. What is printed,
and the exit codes: see page.py.
"""

import pathlib
import re
import sys
import tempfile

from page import Failed, Relay, run, until

ROOT = pathlib.Path(__file__).resolve().parents[2]
TICKET_TTL = 5
CUTS = 5
KILLS = 3
ROOM = "chat:lobby"
CONFIG = f'[auth]\nticket_ttl = "{TICKET_TTL}s"\n'

# Keeps what came in `window.got`, how often a stream was opened, and how often the browser gave it up.
KEEP = """
window.got = []; window.opened = 0; window.gaveUp = 0;
window.EventSource = class extends EventSource {
    constructor(url) {
        super(url);
        this.addEventListener("open", () => window.opened += 1);
        this.addEventListener("error", () => window.gaveUp += this.readyState === EventSource.CLOSED ? 1 : 0);
    }
};
"""

# A stream with nothing around it: it comes back by itself.
PLAIN = """
const [token, room] = arguments;
fetch("/v1/tickets", { method: "POST", headers: { authorization: `Bearer ${token}` } })
    .then((answer) => answer.json())
    .then(({ ticket }) => {
        window.events = new EventSource(`/v1/rooms/${room}/events?ticket=${ticket}`);
        events.addEventListener("msg", ({ data, lastEventId }) => got.push([JSON.parse(data).body, lastEventId]));
    });
"""


def example():
    """The example of the document as it stands there."""
    page = (ROOT / "docs/events.md").read_text()
    return re.search(r"^```js\n(.*?)^```$", page, re.M | re.S)[1]


def open_page(window, url):
    window.go(url + "healthz")  # a page of this origin that does nothing
    window.run(KEEP)


def say(up, count):
    """Writes so many messages; the body of each is its number."""
    for _ in range(count):
        say.count += 1
        up.post(ROOM, "lee", edge=1, body=say.count)


say.count = 0


def until_got(window, first):
    """All messages that were written since `first` have come, once and in order."""
    wanted = list(range(first, say.count + 1))
    try:
        until("all messages", lambda: len(window.run("return got")) >= len(wanted))
    except Failed as error:
        raise Failed(f"{error}; {window.run('return [got.length, opened, gaveUp]')} of {len(wanted)}") from None
    got = window.run("return got")
    assert [body for body, _ in got] == wanted, f"{got} instead of {wanted}"
    return got


def messages_come_with_their_ids(up, window):
    open_page(window, up.url())
    window.run(PLAIN, up.token("kim"), ROOM)
    until("an open stream", lambda: window.run("return opened") == 1)
    say(up, 3)
    got = until_got(window, say.count - 2)
    assert all(re.fullmatch(r"[a-z0-9.]+", last) for _, last in got), got
    assert len({last for _, last in got}) == 3, got
    window.run("events.close()")


def a_lost_connection_is_opened_again(up, window):
    relay = Relay(int(up.url().rstrip("/").rsplit(":", 1)[1]))
    try:
        open_page(window, f"http://127.0.0.1:{relay.port}/")
        window.run(PLAIN, up.token("kim"), ROOM)
        until("an open stream", lambda: window.run("return opened") == 1)
        first = say.count + 1
        say(up, 3)
        until_got(window, first)
        # While the ticket is valid: a browser waits for a second.
        relay.cut()
        say(up, 5)
        until("the stream again", lambda: window.run("return opened") == 2)
        until_got(window, first)
        assert window.run("return gaveUp") == 0
        window.run("events.close()")
    finally:
        relay.close()


def start_example(up, window, url):
    open_page(window, url)
    script = "const [token] = arguments; const show = ({ body, cursor }) => got.push([body, cursor]);\n"
    window.run(script + example(), up.token("kim"))
    until("an open stream", lambda: window.run("return opened") == 1)


def the_example_gets_a_new_ticket(up, window):
    relay = Relay(int(up.url().rstrip("/").rsplit(":", 1)[1]))
    try:
        start_example(up, window, f"http://127.0.0.1:{relay.port}/")
        first = say.count + 1
        for cut in range(1, CUTS + 1):
            say(up, 3)
            until_got(window, first)
            if cut == 1:
                until("the end of the ticket", lambda: window.run(
                    "return performance.now() - performance.getEntriesByName(location.origin + '/v1/tickets')[0].startTime"
                ) > 1000 * TICKET_TTL + 500)
            before = window.run("return opened")
            relay.cut()
            say(up, 3)
            until("the stream again", lambda: window.run("return opened") > before)
        until_got(window, first)
        tickets = window.run("return performance.getEntriesByName(location.origin + '/v1/tickets').length")
        assert tickets > 1 and window.run("return gaveUp") >= 1, f"{tickets} tickets"
    finally:
        window.go("about:blank")
        relay.close()


def the_example_survives_killed_edges(up, window):
    start_example(up, window, up.url())
    first = say.count + 1
    for _ in range(KILLS):
        say(up, 3)
        until_got(window, first)
        before = window.run("return opened")
        up.kill_edge()
        say(up, 3)
        up.await_line()
        until("the stream again", lambda: window.run("return opened") > before)
        say(up, 3)
    until_got(window, first)
    window.go("about:blank")


CHECKS = [
    messages_come_with_their_ids,
    a_lost_connection_is_opened_again,
    the_example_gets_a_new_ticket,
    the_example_survives_killed_edges,
]


def main():
    if len(sys.argv) != 2:
        print("usage: events.py NATTER", file=sys.stderr)
        return 64
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as config:
        config.write(CONFIG)
        config.flush()
        return run(sys.argv[1], CHECKS, flags=("--config", config.name, "--edges", "2", "--no-mongodb"))


if __name__ == "__main__":
    sys.exit(main())
