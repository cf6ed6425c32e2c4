"""Room records, the inbox and attachments on the chat page, as two stories for page.py: four windows of two browsers each."""

import pathlib
import struct
import tempfile
import zlib

from page import come, until

CONFIG = """
[uploads]
max_size = "256KiB"

[namespaces.found]
durable = true
typing = true
history = true
access = "members"
create = "members"

[namespaces.lab]
durable = true
typing = true
history = true
access = "members"
"""
POST = "found:post-7"
DESK = (1100, 760)
PHONE = (400, 800)
FOLDER = None  # where to put pictures of the page


def shoot(window, name):
    """Checks that the page is not wider than the window, on a desk and on a phone; with a folder, takes pictures."""
    for what, (width, height) in [("phone", PHONE), ("desk", DESK)]:
        window.resize(width, height)
        until(f"{name} is {width} px wide", lambda: window.run("return innerWidth") == width)
        wide, inner = window.run("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide <= inner, f"{name}: {wide} px wide in {inner} px"
        if FOLDER:
            window.screenshot(FOLDER / f"{name}-{what}.png")


def enter(window, up, token, room=""):
    window.resize(*DESK)
    come(window, f"{up.url()}#token={token}&room={room}")
    window.until_state("connected")


def listed(window):
    """The rooms of the list: [title, number of unread messages or None, marks], in order."""
    return window.run(
        "return [...document.querySelectorAll('#rooms button')].map((button) => {"
        "const badge = button.querySelector('.badge');"
        "return [button.querySelector('.name').textContent, badge.hidden ? null : badge.firstElementChild.textContent,"
        "button.querySelector('.marks').textContent]})"
    )


def until_listed(window, *rooms):
    rooms = [[*room, ""] if len(room) == 2 else list(room) for room in rooms]
    until(f"the list {rooms}", lambda: listed(window) == rooms)


def open_room(window, title):
    window.run(
        "[...document.querySelectorAll('#rooms button')]"
        ".find((button) => button.querySelector('.name').textContent === arguments[0]).click()", title)
    until(f"{title} is open", lambda: window.text("#where") == title and window.state() == "connected"
          and not window.run("return document.querySelector('#text').disabled"))


def until_told(window, text):
    """Waits for an entry about the room: the beginning of a sentence."""
    told = "return [...document.querySelectorAll('#log .system .body')].map((body) => body.textContent)"
    until(f"that {text!r} is told", lambda: any(line.startswith(text) for line in window.run(told)))


def until_line(window, text):
    until(f"the line {text!r}", lambda: any(text in line for line in window.lines()))


def until_out(window, why):
    until_line(window, why)
    assert window.run("return ['#text', '#send', '#attach'].every((css) => document.querySelector(css).disabled)")


def make(window, kind, members, **fields):
    window.click("#new")
    window.click(f"#make [name=kind][value={kind}]")
    for name, text in {"members": members, **fields}.items():
        window.clear(f"#make [name={name}]")
        window.write(f"#make [name={name}]", text)
    window.click("#make form > button")
    until("the room is made", lambda: window.run("return !document.querySelector('#make').open"))
    until("it is open", lambda: window.state() == "connected" and not window.run("return document.querySelector('#text').disabled"))


def details(window):
    """Opens the details of the room, and waits for its record."""
    window.click("#about")
    until("the record", lambda: " · " in window.text("#panel-what"))


def press(window, text, times=1):
    """Clicks a button of the details, by what it is called."""
    found = (
        "return [...document.querySelectorAll('#panel button')].find((button) =>"
        "(button.ariaLabel ?? button.textContent) === arguments[0] && button.checkVisibility())"
    )
    until(f"the button {text!r}", lambda: window.run(found, text))
    window.run(found.replace("return ", "const it = ") + "; for (let n = 0; n < arguments[1]; n += 1) it.click()", text, times)


def close(window):
    window.run("document.querySelector('#panel [data-close]').click()")


def set_field(window, name, value):
    """As if somebody had typed it, or ticked it."""
    window.run(
        "const field = document.querySelector('#settings').elements[arguments[0]];"
        "field[field.type === 'checkbox' ? 'checked' : 'value'] = arguments[1];"
        "field.dispatchEvent(new Event('input', { bubbles: true }))", name, value)


def picture(width=640, height=480):
    """A PNG."""
    rows = b"".join(
        b"\0" + b"".join(bytes((255 * x // width, 255 * y // height, 160)) for x in range(width)) for y in range(height))

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def lost_and_found(up, mia, other_tab, kim, lee):
    up.request("POST", "v1/rooms", up.token("service", can=["manage"]), {
        "namespace": "found", "kind": "open", "name": "post-7", "title": "Found: a grey cat", "ref": "item/7"})
    owns = [{"rooms": POST, "can": ["manage", "erase"]}]
    enter(mia, up, up.token("mia", more=owns), POST)
    until("the title", lambda: mia.text("#where") == "Found: a grey cat")
    mia.say("Found at the station. Whose is it?")
    mia.until_shows("mia", "Found at the station. Whose is it?")
    enter(other_tab, up, up.token("mia", more=owns))
    assert other_tab.run("return document.querySelector('#text').disabled"), "one can write in no room"

    # Two people open a conversation about it each. The one who posted it sees both, without having joined them.
    for window, user in [(kim, "kim"), (lee, "lee")]:
        enter(window, up, up.token(user), POST)
        window.until_shows("mia", "Found at the station. Whose is it?")
        make(window, "dm", "mia", ref="item/7", namespace="found")
        assert window.text("#where") == "mia · item/7", window.text("#where")
        until_told(window, f"{user} made this room")
        window.say(f"I am {user}, it is mine")
    for window in (mia, other_tab):
        until("both conversations", lambda window=window: [room for room in listed(window) if room[0] != "Found: a grey cat"]
              == [["lee · item/7", "1", ""], ["kim · item/7", "1", ""]])
    assert mia.run("return document.title").startswith("(2) "), mia.run("return document.title")

    # What is read in one tab is read in the other one.
    open_room(mia, "kim · item/7")
    mia.until_shows("kim", "I am kim, it is mine")
    until_listed(other_tab, ("lee · item/7", "1"), ("kim · item/7", None))

    # An answer, and the thread of the message.
    kim.say("When can I come?")
    mia.until_shows("kim", "When can I come?")
    mia.run("[...document.querySelectorAll('#log .message .answer')].at(-1).click()")
    assert mia.text("#answering span") == "Answer to kim: When can I come?", mia.text("#answering span")
    mia.say("At five")
    kim.until_shows("mia", "At five")
    until("what it answers", lambda: kim.text("#log .message:last-child .answered") == "to kim: When can I come?")
    for window in (kim, mia):
        until("the number of answers", lambda window=window: window.text("#log .answers button") == "1 answer")
    kim.click("#log .answers button")
    until("the thread", lambda: kim.text("#hits .hit .body") == "At five")
    shoot(kim, "found-thread")
    kim.run("document.querySelector('#hits .plain').click()")

    # One of the two is blocked. The refusal does not say so.
    open_room(mia, "lee · item/7")
    details(mia)
    press(mia, "Block lee")
    until("it is said", lambda: "lee is blocked" in mia.text("#panel-problem"))
    shoot(mia, "found-block")
    close(mia)
    lee.say("Hello?")
    until_line(lee, "Not sent. Not allowed: you can't write in this room.")
    assert "Hello?" not in [text for _, text, _ in mia.messages()]
    shoot(lee, "found-refused")

    # The post's room ends, for all who are in it. The conversations about it go on.
    enter(kim, up, up.token("kim"), POST)
    kim.until_shows("mia", "Found at the station. Whose is it?")
    enter(mia, up, up.token("mia", more=owns), POST)
    details(mia)
    press(mia, "End this room", times=2)
    for window in (mia, kim):
        until_out(window, "This room has ended.")
        assert window.messages() == [], window.messages()
        assert POST not in window.run("return [...document.querySelectorAll('#rooms button')].map((one) => one.dataset.room)")
    assert kim.text("#where") == "Found: a grey cat", kim.text("#where")
    shoot(kim, "found-ended")
    open_room(kim, "mia · item/7")
    kim.say("Thank you!")
    for window in (mia, other_tab):
        until("what is new there", lambda window=window: listed(window)[0] == ["kim · item/7", "1", ""])
    shoot(other_tab, "found-list")


def dental_lab(up, olga, dentist, lab, _):
    enter(olga, up, up.token("olga", more=[{"rooms": "lab:*", "can": ["manage", "moderate"]}]))
    enter(dentist, up, up.token("dr-kim"))
    enter(lab, up, up.token("lab-lee"))
    assert listed(olga) == [], listed(olga)

    # The operator makes a room for each case, and is in them too. What is wrong is said.
    olga.click("#new")
    shoot(olga, "lab-new")
    olga.write("#make [name=namespace]", "oratory")
    olga.click("#make form > button")
    until("why not", lambda: olga.text("#make .problem").startswith("There is no such namespace: "))
    olga.run("document.querySelector('#make').close()")
    for title in ("Case 12: crown", "Case 13: bridge"):
        make(olga, "group", "dr-kim, lab-lee", title=title, namespace="lab")
        assert olga.text("#where") == title, olga.text("#where")
    for window in (dentist, lab):
        until("both cases", lambda window=window: {title for title, _, _ in listed(window)} == {"Case 12: crown", "Case 13: bridge"})
    open_room(dentist, "Case 12: crown")
    until_told(dentist, "olga made this room")

    # A picture, in a message. A file that is too large is refused with a sentence, and does not stop the message.
    with tempfile.TemporaryDirectory() as folder:
        scan, large = pathlib.Path(folder) / "scan <b>.png", pathlib.Path(folder) / "large.bin"
        scan.write_bytes(picture())
        large.write_bytes(bytes(300 * 1024))
        for file in (large, scan):
            dentist.write("#files", str(file))
        until("the refusal", lambda: (dentist.text("#chosen .error") or "").startswith("Too large: "))
        until("the upload", lambda: not dentist.run("return document.querySelector('#send').disabled"))
    shoot(dentist, "lab-upload")
    dentist.say("Is this shade right?")
    open_room(lab, "Case 12: crown")
    for window in (dentist, lab):
        window.until_shows("dr-kim", "Is this shade right?")
        assert window.text("#log .file").startswith("scan <b>.png "), window.text("#log .file")
        until("the picture", lambda window=window: window.run("return document.querySelector('#log .picture img')?.naturalWidth") == 640)
        shown = window.run("const { width, height } = document.querySelector('#log .picture img').getBoundingClientRect(); return [width, height]")
        assert shown == [320, 240], shown
        assert window.run("return document.querySelectorAll('#log .file b').length") == 0, "the name of a file is HTML"
    lab.say("One shade darker")
    shoot(lab, "lab-picture")

    # The operator sees what is unread, and arranges the list.
    until_listed(olga, ("Case 12: crown", "2"), ("Case 13: bridge", None))
    olga.click("#pinned")
    until_listed(olga, ("Case 13: bridge", None, "pinned"), ("Case 12: crown", "2"))
    shoot(olga, "lab-operator")
    open_room(olga, "Case 12: crown")
    until_listed(olga, ("Case 13: bridge", None, "pinned"), ("Case 12: crown", None))
    olga.click("#muted")
    until_listed(olga, ("Case 13: bridge", None, "pinned"), ("Case 12: crown", None, "muted"))
    open_room(olga, "Case 13: bridge")
    olga.click("#archived")
    until_listed(olga, ("Case 12: crown", None, "muted"))
    olga.click("#aside")
    until_listed(olga, ("Case 13: bridge", None, "pinned"))
    olga.click("#aside")
    open_room(olga, "Case 12: crown")

    # Settings, and a member who is muted: all are told, and the one who writes learns why that is not possible.
    details(olga)
    set_field(olga, "slow_mode_s", 600)
    press(olga, "Save")
    until_told(dentist, "olga set 10 min between two messages")
    dentist.say("And the shape?")
    dentist.until_shows("dr-kim", "And the shape?")
    dentist.say("Hello?")
    until_line(dentist, "Not sent. The room is in slow mode. Try again in 10 min.")
    set_field(olga, "slow_mode_s", 0)
    set_field(olga, "frozen", True)
    press(olga, "Save")
    until_told(dentist, "olga froze the room: only moderators write, ended slow mode")
    dentist.say("")  # what was too early is still there
    until_line(dentist, "Not allowed: this room is frozen")
    # Somebody else changes the settings while they are edited.
    set_field(olga, "title", "Case 12")
    up.request("PATCH", f"v1/rooms/{olga.run('return document.querySelector(`#rooms [aria-current]`).dataset.room')}",
               up.token("service", can=["manage"]), {"frozen": False})
    press(olga, "Save")
    until("the conflict", lambda: olga.text("#panel-problem").startswith("Somebody else has changed it meanwhile."))
    until("what is there now", lambda: olga.run("return document.querySelector('#settings').title.value") == "Case 12: crown")
    # A role is made by "Set", and not by looking through the list.
    olga.run("const roles = document.querySelector('#members [data-user=lab-lee] select'); roles.value = 'reader';"
             "roles.dispatchEvent(new Event('change', { bubbles: true }))")
    press(olga, "Set the role of lab-lee")
    until_told(lab, "olga made lab-lee a reader")
    until("it is drawn", lambda: olga.run("return document.querySelector('#members [data-user=lab-lee] select').dataset.role") == "reader")
    up.request("PUT", f"v1/rooms/{olga.run('return document.querySelector(`#rooms [aria-current]`).dataset.room')}/members/lab-lee",
               up.token("service", can=["manage"]), {"role": "member"})
    until("a member again", lambda: olga.run("return document.querySelector('#members [data-user=lab-lee] select').dataset.role") == "member")
    press(olga, "Mute 1 h lab-lee")
    until_told(lab, "olga muted lab-lee until ")
    until("it is shown", lambda: "muted until" in olga.text("#members [data-user=lab-lee]"))
    shoot(olga, "lab-details")
    lab.say("Why?")
    until_line(lab, "Not sent. Not allowed: you are muted in this room until ")
    shoot(lab, "lab-muted")

    # A member who is removed is out at once, and the room is not in the list any more.
    press(olga, "Remove dr-kim")
    until_told(lab, "olga removed dr-kim")
    until_out(dentist, "You are not a member of this room any more.")
    until_listed(dentist, ("Case 13: bridge", None))
    shoot(dentist, "lab-removed")
    # From history it reads the same.
    close(olga)
    lab.run("sessionStorage.clear()")
    enter(lab, up, up.token("lab-lee"))
    open_room(lab, "Case 12: crown")
    for told in ("olga made this room", "olga set 10 min", "olga muted lab-lee until ", "olga removed dr-kim"):
        until_told(lab, told)
    shoot(lab, "lab-told")


STORIES = [lost_and_found, dental_lab]
