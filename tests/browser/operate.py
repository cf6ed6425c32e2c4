#!/usr/bin/env python3
"""The operators' page in headless Chromium, driven over plain WebDriver; what it shares with the chat page's test is in page.py.

    operate.py NATTER [FOLDER]

NATTER is the binary. The script starts `natter up --demo-worker`, lets users write over HTTP, and opens `/operate` as somebody of the
staff. With FOLDER it puts pictures of the page there. With npm it also looks for faults of accessibility with axe-core. It prints
`N passed, N failed` and exits 0 or 1; 77 (with the reason) if Chromium or chromedriver is missing.
"""

import argparse
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from page import console_is_clean, press, run, until

STAFF = ["follow", "read", "write", "presence", "history", "moderate", "manage"]
DESK = (1280, 800)
PHONE = (390, 844)
ENTER, ESCAPE, DOWN, UP, HOME = "\ue007", "\ue00c", "\ue015", "\ue013", "\ue011"
ANGRY = "hello my friend, the crown is awful"
KOREAN = "안녕하세요 my 친구, the 크라운 is 끔찍한"
MANY = 1_000
AXE = None  # the text of axe-core, if npm is there
FOLDER = None  # where to put pictures of the page


def entry(up, user="desk", can=STAFF, rooms="chat:*", **more):
    return f"{up.url()}operate#token={up.token(user, can=can, **more)}&rooms={rooms}"


def come(window, address):
    window.go("about:blank")
    window.go(address)


def come_anew(window, address):
    """As somebody who was not here before."""
    window.run("sessionStorage.clear(); localStorage.clear()")
    come(window, address)
    window.until_state("online")


def rows(window):
    """The rows that are in the page: [title, what was said last, whether there is an alert, who looks after it], in order."""
    return window.run(
        "return [...document.querySelectorAll('#rooms .row')].map((row) => ["
        "...['name', 'last'].map((name) => row.querySelector('.' + name).textContent),"
        "row.querySelector('.alerted').textContent !== '', row.querySelector('.assignee').textContent])"
    )


def names(window):
    return [name for name, *_ in rows(window)]


def until_listed(window, *wanted):
    until(f"the list {wanted}", lambda: names(window) == list(wanted))


def shown(window):
    """The messages of the conversation: [who, text]."""
    return window.run(
        "return [...document.querySelectorAll('#log .message')].map((one) => "
        "[one.querySelector('.from').textContent, one.querySelector('.body')?.textContent ?? ''])"
    )


def is_shown(window, css):
    return window.run("return document.querySelector(arguments[0]).checkVisibility()", css)


def pressed(window, name):
    return window.run("return document.querySelector(`[data-filter=${arguments[0]}]`).ariaPressed === 'true'", name)


def toggle(window, name):
    window.run("document.querySelector(`[data-filter=${arguments[0]}]`).click()", name)


def fill(window, name, text):
    """As if somebody had typed it into a field of the filters."""
    window.run(
        "const field = document.querySelector('#filters').elements[arguments[0]]; field.value = arguments[1];"
        "field.dispatchEvent(new Event('input', { bubbles: true }))", name, text)


def until_told(window, text):
    told = "return [...document.querySelectorAll('#log .line')].map((line) => line.textContent)"
    until(f"that {text!r} is told", lambda: text in window.run(told))


def record(up, room):
    return up.request("GET", f"v1/rooms/{room}", up.token("service", can=["read", "manage"]))


def focused(window):
    return window.run("return document.activeElement.id")


# The checks -----------------------------------------------------------------------------------------------------------


def an_operator_comes_in(up, desk):
    desk.resize(*DESK)
    come(desk, entry(up))
    desk.until_state("online")
    address = desk.run("return location.href")
    assert "token" not in address, f"the token is still in the address: {address}"
    until("an empty list", lambda: desk.text("#count") == "No conversations.")
    assert focused(desk) == "rooms" and is_shown(desk, "#nothing")


def conversations_come_newest_first(up, desk):
    up.request("POST", "v1/rooms", up.token("service", can=["manage"]), {
        "namespace": "chat", "kind": "group", "name": "order-2", "title": "Order 2", "members": ["lee"]})
    up.post("chat:order-1", "kim", body={"text": "is anybody there?"})
    until_listed(desk, "chat:order-1", "Order 2")
    up.post("chat:order-2", "lee", id="l1", body={"text": "when does it come?"})
    until_listed(desk, "Order 2", "chat:order-1")
    assert rows(desk)[0][1] == "lee: when does it come?", rows(desk)
    until("they are counted", lambda: desk.text("#count") == "2 conversations")


def a_bad_mood_is_an_alert(up, desk):
    up.post("chat:order-1", "kim", id="k2", body={"text": ANGRY})
    until("the alert", lambda: [row[0] for row in rows(desk) if row[2]] == ["chat:order-1"])
    assert names(desk)[0] == "chat:order-1"
    until("it is above the list", lambda: desk.text("#alerts-what").startswith("1 alert: chat:order-1"))
    until("it is told to who listens", lambda: desk.text("#news") == "Alert in chat:order-1")
    assert desk.run("return document.querySelector('#news').ariaLive") == "polite"
    assert desk.run("return document.title").startswith("(1) ")


def filters_narrow_the_list_down(up, desk):
    everything = ("chat:order-1", "Order 2")
    up.post("chat:order-3", "desk", body={"text": "we are closed today"})
    until_listed(desk, "chat:order-3", *everything)
    toggle(desk, "alerts")
    until_listed(desk, "chat:order-1")
    toggle(desk, "alerts")
    # What waits for the staff, whose own messages are answers.
    fill(desk, "age", "1s")
    toggle(desk, "unanswered")
    until_listed(desk, *everything)
    toggle(desk, "unanswered")
    desk.write("#find", "COME")
    until_listed(desk, "Order 2")
    desk.clear("#find")
    desk.run("document.querySelector('#filters').requestSubmit()")
    until_listed(desk, "chat:order-3", *everything)
    # What is only known here: nobody's. And the edge's: mine.
    up.request("PATCH", "v1/rooms/chat:order-3", up.token("service", can=["manage"]), {"assignee": "desk"})
    toggle(desk, "nobody")
    until_listed(desk, *everything)
    toggle(desk, "mine")
    assert not pressed(desk, "nobody"), "mine and nobody's at once"
    until_listed(desk, "chat:order-3")
    # Two at once.
    toggle(desk, "unanswered")
    until("none", lambda: names(desk) == [] and desk.text("#count") == "No conversations.")
    assert is_shown(desk, "#alerts"), "an alert that the filters hide is not told any more"
    toggle(desk, "unanswered")
    toggle(desk, "mine")
    until_listed(desk, "chat:order-3", *everything)


def the_mood_is_a_condition(up, desk):
    """It is heard from now on: the entry of an alert hides the annotation before it from a later watch (docs/rooms.md)."""
    toggle(desk, "condition")
    until("none", lambda: desk.text("#count") == "No conversations.")
    up.post("chat:order-1", "kim", id="k4", body={"text": "terrible"})
    until_listed(desk, "chat:order-1")
    up.post("chat:order-1", "kim", body={"text": "good, thanks"})
    until("it is better", lambda: names(desk) == [])
    toggle(desk, "condition")
    until_listed(desk, "chat:order-1", "chat:order-3", "Order 2")


def a_bad_filter_is_told_in_words(up, desk):
    fill(desk, "condition", "sentiment.score is bad")
    toggle(desk, "condition")
    until("why", lambda: "filter.annotation" in desk.text("#filter-problem"))
    fill(desk, "condition", "sentiment.score < -0.5")
    until("none", lambda: desk.text("#filter-problem") == "" and desk.text("#count") == "No conversations.")
    toggle(desk, "condition")
    until("all", lambda: len(names(desk)) == 3)


def the_keyboard_is_enough(up, desk):
    """From the list into a conversation, taking it over, an answer, the end of the alert, and back."""
    desk.run("document.querySelector('#rooms').focus()")
    for key in [HOME, DOWN, "j", UP, "k"]:
        press(desk, key)
    active = ("const box = document.querySelector('#rooms');"
              "return document.getElementById(box.getAttribute('aria-activedescendant'))?.querySelector('.name').textContent")
    until("the first row", lambda: desk.run(active) == "chat:order-1")
    press(desk, ENTER)
    until("it is open", lambda: desk.text("#title") == "chat:order-1" and ["kim", ANGRY] in shown(desk))
    assert focused(desk) == "title", desk.run("return document.activeElement.outerHTML")[:300]
    until("who looks after it", lambda: "looked after by nobody" in desk.text("#about"))
    press(desk, "t")
    until("it is taken over", lambda: record(up, "chat:order-1").get("assignee") == "desk")
    until("it is shown", lambda: "looked after by you" in desk.text("#about") and desk.text("#take") == "Release")
    until("it is in the list", lambda: [row[3] for row in rows(desk) if row[0] == "chat:order-1"] == ["you"])
    until_told(desk, "desk took over")
    until("the field", lambda: focused(desk) == "text")
    desk.write("#text", "I am sorry. We send a new one tomorrow." + ENTER)
    until("the answer", lambda: ["you", "I am sorry. We send a new one tomorrow."] in shown(desk))
    kim = up.token("kim")
    until("kim has it", lambda: any(
        one["from"] == "desk" and one.get("body") == {"text": "I am sorry. We send a new one tomorrow."}
        for one in up.request("GET", "v1/rooms/chat:order-1/messages?limit=10&order=desc", kim)["messages"]))
    # In the field, letters are letters.
    desk.write("#text", "ate")
    typed = desk.run("return document.querySelector('#text').value")
    assert typed == "ate" and is_shown(desk, "#alert"), (typed, is_shown(desk, "#alert"))
    desk.clear("#text")
    press(desk, ESCAPE)
    assert focused(desk) == "rooms", focused(desk)
    press(desk, "e")
    until("the alert has ended", lambda: "alert" not in record(up, "chat:order-1"))
    until("it is not shown any more", lambda: not is_shown(desk, "#alerts") and not is_shown(desk, "#alert"))
    until_told(desk, "desk has seen to the alert")
    assert not desk.run("return document.title").startswith("("), desk.run("return document.title")
    press(desk, "?")
    until("the keys", lambda: desk.run("return document.querySelector('#keys').open"))
    press(desk, ESCAPE)
    until("it is closed", lambda: not desk.run("return document.querySelector('#keys').open"))


def the_translation_stands_beside_the_original(up, desk):
    found = (
        "const one = document.querySelector('#log [data-key=\"kim/k2\"]'); const beside = one.querySelector('.translation [lang]');"
        "const [a, b] = [one.querySelector('.body'), beside].map((node) => node.getBoundingClientRect());"
        "return [beside.lang, beside.textContent, one.querySelector('.tongue').textContent, one.querySelector('.mood').textContent,"
        "b.left > a.right - 1, b.top >= a.bottom - 1]"
    )
    assert desk.run(found) == ["ko", KOREAN, "Korean", "bad mood", True, False], desk.run(found)
    desk.resize(*PHONE)
    desk.run("document.querySelector('#app').dataset.view = 'room'")
    until("below it", lambda: desk.run(found)[4:] == [False, True])
    desk.resize(*DESK)
    # It comes live, too, and with any language.
    up.post("chat:order-1", "kim", id="k3", body={"text": "merci"})
    until("the message", lambda: ["kim", "merci"] in shown(desk))
    up.post("chat:order-1", "robot", kind="annotation", target="kim/k3", body={"translation": {"en": "thanks", "ko": "고마워요"}})
    texts = ("return [...document.querySelectorAll('#log [data-key=\"kim/k3\"] .translation [lang]')]"
             ".map((one) => [one.lang, one.textContent])")
    until("translations, one's own language first", lambda: desk.run(texts) == [["en", "thanks"], ["ko", "고마워요"]])


def what_is_written_is_text(up, desk):
    hostile = "<img src=x onerror=\"document.title='owned'\"><script>1</script>"
    up.request("PATCH", "v1/rooms/chat:order-3", up.token("service", can=["manage"]), {"title": hostile})
    up.post("chat:order-1", "kim", body={"text": hostile})
    until("the message", lambda: ["kim", hostile] in shown(desk))
    until("the title", lambda: hostile in names(desk))
    assert desk.run("return document.querySelectorAll('#log img, #log script, #rooms img, #rooms script').length") == 0
    up.request("PATCH", "v1/rooms/chat:order-3", up.token("service", can=["manage"]), {"title": "Order 3"})
    until("another title", lambda: "Order 3" in names(desk))


def open_by_click(window, title):
    window.run(
        "[...document.querySelectorAll('#rooms .row')].find((row) => row.querySelector('.name').textContent === arguments[0]).click()",
        title)
    until(f"{title} is open", lambda: window.text("#title") == title)


def a_group_is_taken_over_as_a_member(up, desk):
    open_by_click(desk, "Order 2")
    until("one can write", lambda: not desk.run("return document.querySelector('#text').disabled"))
    up.request("PATCH", "v1/rooms/chat:order-2", up.token("service", can=["manage"]), {"assignee": "ann"})
    until("ann has it", lambda: desk.text("#take") == "Take over from ann")
    desk.click("#take")
    until("desk has it", lambda: record(up, "chat:order-2").get("assignee") == "desk")
    until("as a member", lambda: any(one["user"] == "desk" for one in record(up, "chat:order-2")["members"]))
    desk.click("#take")
    until("nobody has it", lambda: "assignee" not in record(up, "chat:order-2"))
    until("it is told", lambda: "looked after by nobody" in desk.text("#about"))
    desk.click("#assign")
    desk.clear("#assigning [name=user]")
    desk.write("#assigning [name=user]", "ann" + ENTER)
    until("ann has it", lambda: record(up, "chat:order-2").get("assignee") == "ann")
    until_told(desk, "desk gave the room to ann")


def people_are_muted_and_removed(up, desk):
    def act(what):
        find = "return [...document.querySelectorAll('#members [data-act]')].find((one) => one.ariaLabel === arguments[0])"
        until(what, lambda: desk.run(find, what))
        desk.run(find.replace("return ", "const it = ") + "; it.click()", what)

    def lee():
        return next((one for one in record(up, "chat:order-2")["members"] if one["user"] == "lee"), None)

    desk.click("#people")
    act("Mute for an hour: lee")
    until("lee is muted", lambda: lee().get("muted_until"))
    act("Let write again: lee")
    until("lee may write", lambda: not lee().get("muted_until"))
    act("Remove: lee")
    assert lee(), "removed without a question"
    act("Remove for good? lee")
    until("lee is out", lambda: lee() is None)
    until("it is drawn", lambda: desk.run("return ![...document.querySelectorAll('#member-list [data-act]')]"
                                          ".some((one) => one.dataset.act === 'remove lee')"))
    press(desk, ESCAPE)
    until("it is closed", lambda: not desk.run("return document.querySelector('#members').open"))


def what_is_read_is_marked(up, desk):
    cursor = up.post("chat:order-1", "desk", body={"text": "have you seen this?"})["cursor"]
    up.request("PUT", "v1/rooms/chat:order-1/read", up.token("kim"), {"cursor": cursor})
    open_by_click(desk, "chat:order-1")
    until("who has read it", lambda: desk.text("#log .message:last-of-type .reads") == "read by kim")
    # What the operator has looked at is read; what comes in another room is not.
    readers = lambda: {one["user"]: one["cursor"] for one in up.request(
        "GET", "v1/rooms/chat:order-1/readers", up.token("kim"))["readers"]}
    until("desk has read it", lambda: readers().get("desk", "").split(".")[2:3] == cursor.split(".")[2:3])
    up.post("chat:order-2", "mia", body={"text": "and mine?"})
    unread = ("return [...document.querySelectorAll('#rooms .row')].find((row) => row.querySelector('.name').textContent === 'Order 2')"
              ".querySelector('.badge').textContent")
    until("one is unread", lambda: desk.run(unread) == "1")


def a_reload_and_a_dead_edge_change_nothing(up, desk):
    before = names(desk)
    desk.reload()
    desk.until_state("online")
    until("the list", lambda: names(desk) == before)
    open_by_click(desk, "chat:order-1")
    up.kill_edge()
    until("it is offline", lambda: desk.state() != "online")
    desk.write("#text", "written offline" + ENTER)
    until("it waits", lambda: ["you", "written offline"] in shown(desk))
    up.await_line()
    desk.until_state("online")
    until("it was sent", lambda: desk.run("return document.querySelectorAll('#log .message.pending').length") == 0)
    up.post("chat:order-2", "mia", body={"text": "after the restart"})
    until("the list goes on", lambda: rows(desk)[0][:2] == ["Order 2", "mia: after the restart"])
    assert sorted(names(desk)) == sorted(before)


def a_link_does_not_change_the_user(up, desk):
    come(desk, entry(up, "ann"))
    until("it says so", lambda: desk.text("#door-problem").startswith("This link is for ann, and this tab is desk's"))
    assert "token" not in desk.run("return location.href")
    desk.click("#enter")
    desk.until_state("online")
    desk.click("#leave")
    until("the form", lambda: is_shown(desk, "#door"))
    desk.reload()
    until("nothing is kept", lambda: desk.run("return document.querySelector('#token').value") == "" and desk.state() == "idle")


def refusals_are_told_in_words(up, desk):
    desk.run("sessionStorage.clear()")
    come(desk, entry(up, "kim", ["read", "write"]))
    until("the reason", lambda: desk.text("#door-problem").startswith("This token does not let its user follow chat:*"))
    come(desk, entry(up, "kim", ["read", "write"]))
    desk.run("sessionStorage.clear()")
    come(desk, f"{up.url()}operate#token=not.a.token&rooms=chat:*")
    until("a bad token", lambda: desk.text("#door-problem") == "The token is not valid any more.")
    # Who may only look sees no buttons that would be refused.
    come_anew(desk, entry(up, "visitor", ["follow", "read", "history"]))
    until("the list", lambda: len(names(desk)) == 3)
    open_by_click(desk, "chat:order-1")
    until("the messages", lambda: ["kim", ANGRY] in shown(desk))
    for css in ["#take", "#assign", "#alert-seen"]:
        assert not is_shown(desk, css), f"{css} is shown"
    assert desk.run("return document.querySelector('#text').disabled")


def looks(up, desk):
    """Narrow and wide, light and dark, English and Korean: nothing is wider than the page, and axe-core finds nothing serious."""
    up.request("POST", "v1/rooms", up.token("service", can=["manage"]), {
        "namespace": "chat", "kind": "group", "name": "order-4", "title": "Crown for Mr. Han", "members": ["kim", "lee", "mia"]})
    up.post("chat:order-4", "kim", body={"text": "hello, when is the crown ready?"})
    up.post("chat:order-4", "lee", body={"text": "안녕하세요, 내일 좋은 크라운"})
    up.post("chat:order-4", "kim", id="late", body={"text": "the price is terrible, I hate it!!"})
    up.post("chat:order-1", "mia", body={"text": "thanks, the dentist is happy"})
    agent = desk.run("return navigator.userAgent")
    for language in ["en", "ko"]:
        for scheme in ["light", "dark"]:
            cdp(desk, "Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=language)
            cdp(desk, "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            desk.resize(*DESK)
            come_anew(desk, entry(up))
            assert desk.run("return document.documentElement.lang") == language
            until("the alert", lambda: is_shown(desk, "#alerts"))
            look(desk, f"{language}-{scheme}-list", PHONE)
            desk.resize(*PHONE)
            assert not is_shown(desk, "#talk") or desk.run("return document.querySelector('#app').dataset.view") == "room"
            open_by_click(desk, "Crown for Mr. Han")
            until("all of it", lambda: desk.run("return document.querySelectorAll('#log .translation').length") == 3)
            assert not is_shown(desk, "#side"), "the list is beside the conversation on a phone"
            look(desk, f"{language}-{scheme}", PHONE, DESK)
            desk.click("#people")
            look(desk, f"{language}-{scheme}-people", DESK)
            press(desk, ESCAPE)
            desk.resize(*PHONE)
            desk.click("#back")
            until("the list again", lambda: is_shown(desk, "#side") and not is_shown(desk, "#talk") and focused(desk) == "rooms")
    come_anew(desk, entry(up))
    desk.click("#help")
    look(desk, "ko-dark-keys", PHONE)
    press(desk, ESCAPE)
    desk.click("#leave")
    look(desk, "ko-dark-door", PHONE, DESK)
    cdp(desk, "Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage="en")
    cdp(desk, "Emulation.setEmulatedMedia", features=[])
    desk.resize(*DESK)


def cdp(window, command, **parameters):
    window.command("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})


def look(window, name, *sizes):
    for width, height in sizes:
        window.resize(width, height)
        until(f"{name} is {width} px wide", lambda: window.run("return innerWidth") == width)
        wide, inner = window.run("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide <= inner, f"{name}: {wide} px wide in {inner} px"
        if FOLDER:
            window.screenshot(FOLDER / f"{name}-{width}.png")
        if AXE:
            window.run(AXE)
            found = window.command("POST", "/execute/async", {"args": [], "script": """
                const done = arguments[arguments.length - 1];
                axe.run({ resultTypes: ["violations"] }).then(({ violations }) => done(violations
                    .filter(({ impact }) => impact === "serious" || impact === "critical")
                    .map(({ id, nodes }) => `${id}: ${nodes.slice(0, 3).map(({ html }) => html.slice(0, 200)).join(" | ")}`)),
                    (error) => done([String(error)]));"""})
            assert not found, f"{name} at {width} px: {found}"


def a_thousand_rooms_are_calm(up, desk):
    come_anew(desk, entry(up))
    until("the list", lambda: names(desk))
    others = int(desk.text("#count").split()[0])
    # A back end's way of writing: many at once, and again where that was too much.
    token = up.token("service", can=["write", "admin"])
    todo = [{"room": f"chat:many-{n:04}", "as": f"user-{n}", "body": {"text": f"message {n}"}} for n in range(MANY)]
    deadline = time.monotonic() + 60
    while todo:
        assert time.monotonic() < deadline, f"{len(todo)} messages are still to be written"
        batch, todo = todo[:100], todo[100:]
        results = up.request("POST", "v1/messages", token, {"messages": batch})["results"]
        todo += [one for one, result in zip(batch, results) if "error" in result]
    cdp(desk, "Page.enable")
    cdp(desk, "Page.addScriptToEvaluateOnNewDocument", source=(
        "window.longTasks = []; new PerformanceObserver((list) => longTasks.push(...list.getEntries().map(({ duration }) => duration)))"
        ".observe({ type: 'longtask', buffered: true });"))
    come_anew(desk, entry(up))
    until("as many as are loaded at once", lambda: desk.text("#count").startswith(f"{MANY} conversations · there are more"))
    desk.click("#more")
    # The edge also tells again what was new a moment ago, a second's worth at a time, and how much of it is left.
    until("all rooms, and no more news", lambda: desk.text("#count") == f"{MANY + others} conversations", deadline=60)
    assert not is_shown(desk, "#more")
    in_page = "return document.querySelectorAll('#rooms .row').length"
    assert 5 < desk.run(in_page) < 50, f"{desk.run(in_page)} rows are in the page"
    loading = desk.run("return longTasks.splice(0)")
    # Through the whole list by scrolling, then to its end and back by keyboard.
    desk.run("""
        const box = document.querySelector('#rooms'); window.scrolled = 0;
        const step = () => { box.scrollTop += 600; window.scrolled += 1;
            if (box.scrollTop + box.clientHeight < box.scrollHeight - 1) requestAnimationFrame(step); else window.scrolled = -1; };
        requestAnimationFrame(step);""")
    until("the end", lambda: desk.run("return window.scrolled === -1"))
    last = "return [...document.querySelectorAll('#rooms .row')].at(-1).ariaPosInSet"
    until("the last row", lambda: desk.run(last) == str(MANY + others))
    assert desk.run(in_page) < 50, f"{desk.run(in_page)} rows are in the page"
    # What comes above leaves what is in view where it is.
    view = ("const box = document.querySelector('#rooms').getBoundingClientRect();"
            "return [...document.querySelectorAll('#rooms .row')].filter((row) => { const at = row.getBoundingClientRect();"
            "return at.top >= box.top && at.bottom <= box.bottom; }).map((row) => row.querySelector('.name').textContent)")
    desk.run("const box = document.querySelector('#rooms'); box.scrollTop = box.scrollHeight / 2")
    until("rows in view", lambda: len(desk.run(view)) > 3)
    before = desk.run(view)
    up.post("chat:many-new", "kim", body={"text": "me, too"})
    until("it is counted", lambda: desk.text("#count") == f"{MANY + others + 1} conversations")
    until("there is news above", lambda: is_shown(desk, "#news-above"))
    until("the same rows in view", lambda: desk.run(view) == before)
    desk.click("#news-above")
    until("the newest", lambda: names(desk)[0] == "chat:many-new")
    # A busy minute: each push is one second's news.
    for n in range(40):
        up.post(f"chat:many-{n:04}", f"user-{n}", body={"text": f"again {n}"})
    until("the last of them", lambda: names(desk)[0] == "chat:many-0039")
    using = desk.run("return longTasks.splice(0)")
    for what, tasks in [("loading", loading), ("scrolling and 40 messages", using)]:
        print(f"      {MANY} rooms, {what}: {len(tasks)} tasks over 50 ms, the longest {max(tasks, default=0):.0f} ms")


CHECKS = [
    an_operator_comes_in,
    conversations_come_newest_first,
    a_bad_mood_is_an_alert,
    filters_narrow_the_list_down,
    the_mood_is_a_condition,
    a_bad_filter_is_told_in_words,
    the_keyboard_is_enough,
    the_translation_stands_beside_the_original,
    what_is_written_is_text,
    a_group_is_taken_over_as_a_member,
    people_are_muted_and_removed,
    what_is_read_is_marked,
    a_reload_and_a_dead_edge_change_nothing,
    a_link_does_not_change_the_user,
    refusals_are_told_in_words,
    looks,
    a_thousand_rooms_are_calm,
    console_is_clean,
]


def fetch_axe(folder):
    """axe-core from npm; None, with the reason, where that is not possible."""
    if not shutil.which("npm"):
        print("without axe-core: no npm")
        return None
    got = subprocess.run(
        ["npm", "install", "--prefix", folder, "--no-save", "--no-audit", "--no-fund", "axe-core@4.14.1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=120)
    if got.returncode != 0:
        print(f"without axe-core: {got.stderr.strip().splitlines()[-1:]}")
        return None
    return (pathlib.Path(folder) / "node_modules/axe-core/axe.min.js").read_text()


def main():
    parser = argparse.ArgumentParser(description="The operators' page in headless Chromium.")
    parser.add_argument("natter", help="the natter binary")
    parser.add_argument("folder", nargs="?", type=pathlib.Path, help="where to put pictures of the page")
    arguments = parser.parse_args()
    global AXE, FOLDER
    FOLDER = arguments.folder
    with tempfile.TemporaryDirectory(prefix="natter-axe-") as folder:
        AXE = fetch_axe(folder)
    return run(arguments.natter, CHECKS, flags=("--demo-worker",))


if __name__ == "__main__":
    sys.exit(main())
