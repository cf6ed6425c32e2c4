#!/usr/bin/env python3
"""The native protocol as an independent WebSocket implementation sees it (Python's `websockets`, see requirements.txt).

    independent.py WS_URL_OF_EDGE_1 WS_URL_OF_EDGE_2 TOKEN

The two URLs may be the same. The token needs read and write in `chat:*` and `live:*`. Rooms are new in every run. Prints
`N passed, N failed` and exits 0 or 1. Every wait has a deadline.
"""

import argparse
import asyncio
import base64
import json
import secrets
import sys

import websockets
from websockets.asyncio.client import connect

DEADLINE = 10
SUBPROTOCOL = "natter.v1"


class Session:
    """Commands with a number, replies matched by it, pushes kept in order."""

    def __init__(self, socket):
        self.socket = socket
        self.rid = 0
        self.pushes = []
        self.replies = {}

    @classmethod
    async def open(cls, url, token=None, subprotocols=(SUBPROTOCOL,)):
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        socket = await connect(
            url,
            subprotocols=list(subprotocols),
            additional_headers=headers,
            open_timeout=DEADLINE,
            # Everything is near; a proxy of the environment must not get in between.
            proxy=None,
        )
        return cls(socket)

    async def read(self):
        """Reads one frame and files it."""
        text = await asyncio.wait_for(self.socket.recv(), DEADLINE)
        assert isinstance(text, str), "a binary frame"
        frame = json.loads(text)
        if frame.get("rid") is not None:
            self.replies[frame["rid"]] = frame
        else:
            self.pushes.append(frame)
        return frame

    async def send(self, op, **fields):
        self.rid += 1
        command = json.dumps({"op": op, "rid": self.rid, **fields}, ensure_ascii=False)
        await self.socket.send(command)
        return self.rid

    async def reply(self, rid):
        while rid not in self.replies:
            await self.read()
        return self.replies.pop(rid)

    async def call(self, op, **fields):
        return await self.reply(await self.send(op, **fields))

    async def push(self, op="msg"):
        """The next push of that kind."""
        while True:
            for at, frame in enumerate(self.pushes):
                if frame["op"] == op:
                    return self.pushes.pop(at)
            await self.read()

    async def closed(self):
        """Waits for the end; gives the close code."""
        try:
            while True:
                await self.read()
        except websockets.ConnectionClosed:
            return self.socket.close_code

    async def close(self):
        await asyncio.wait_for(self.socket.close(), DEADLINE)


def same(what, got, expected):
    assert got == expected, f"{what}: {got!r} instead of {expected!r}"


def refused(what, reply, code):
    same(f"{what}: op", reply.get("op"), "error")
    same(what, reply.get("code"), code)
    assert isinstance(reply.get("message"), str) and isinstance(reply.get("retry"), bool), reply


def new_room(namespace="chat"):
    return f"{namespace}:independent-{secrets.token_hex(6)}"


def user_of(token):
    claims = token.split(".")[1]
    return json.loads(base64.urlsafe_b64decode(claims + "=" * (-len(claims) % 4)))["sub"]


# The checks: each takes (url of edge 1, url of edge 2, token) ---------------------------------------------------------


async def token_in_header(one, two, token):
    session = await Session.open(one, token)
    same("subprotocol", session.socket.subprotocol, SUBPROTOCOL)
    same("reply", (await session.call("ping"))["op"], "pong")
    await session.close()


async def token_in_subprotocol(one, two, token):
    session = await Session.open(two, subprotocols=(SUBPROTOCOL, f"bearer.{token}"))
    same("chosen subprotocol", session.socket.subprotocol, SUBPROTOCOL)
    same("reply", (await session.call("ping"))["op"], "pong")
    await session.close()


async def token_in_first_frame(one, two, token):
    session = await Session.open(one)
    authed = await session.call("auth", token=token)
    same("reply", authed["op"], "authed")
    same("user", authed["user"], user_of(token))
    assert authed["exp"] > 0
    same("reply", (await session.call("ping"))["op"], "pong")
    await session.close()


async def bad_tokens(one, two, token):
    bad = "not-a-token"
    try:
        await Session.open(one, bad)
        raise AssertionError("a bad token in the header was accepted")
    except websockets.InvalidStatus as error:
        same("status", error.response.status_code, 401)
    session = await Session.open(one, subprotocols=(SUBPROTOCOL, f"bearer.{bad}"))
    same("close code (subprotocol)", await session.closed(), 4001)
    session = await Session.open(one)
    await session.send("auth", token=bad)
    same("close code (first frame)", await session.closed(), 4001)
    session = await Session.open(one)
    await session.send("ping")
    assert await session.closed() in (4001, 4004), session.socket.close_code


async def refresh(one, two, token):
    session = await Session.open(one, token)
    refreshed = await session.call("refresh", token=token)
    same("reply", refreshed["op"], "refreshed")
    refused("bad token", await session.call("refresh", token="x"), "unauthorized")
    same("still there", (await session.call("ping"))["op"], "pong")
    await session.close()


async def join_send_and_receive_it(one, two, token):
    room = new_room()
    here, there = await Session.open(one, token), await Session.open(two, token)
    for session in (here, there):
        joined = await session.call("join", room=room)
        same("reply", (joined["op"], joined["room"], joined["replay"]), ("joined", room, 0))
        same("cursor is head", joined["cursor"], joined["head"])
    body = {"text": "안녕하세요 👋", "n": [1, 2.5, None, True], "quote": '"\\\u0000\n'}
    ack = await here.call("send", room=room, id="one", body=body, mentions=["kim"])
    same("ack", (ack["op"], ack["room"], ack["id"], ack["dup"]), ("ack", room, "one", False))
    assert ack["ts"] > 1_600_000_000_000, "ts is not in milliseconds"
    for session in (here, there):
        message = await session.push()
        same("message", (message["room"], message["id"], message["from"]), (room, "one", user_of(token)))
        same("body", message["body"], body)
        same("mentions", message["mentions"], ["kim"])
        same("cursor of ack and message", message["cursor"], ack["cursor"])
        same("ts of ack and message", message["ts"], ack["ts"])
    made = await here.call("send", room=room, body=None)
    assert made["id"], "no id was made"
    same("id made by the edge", (await there.push())["id"], made["id"])
    same("typing", (await here.call("typing", room=room))["op"], "ok")
    same("leave", (await here.call("leave", room=room))["op"], "left")
    refused("typing after leave", await here.call("typing", room=room), "not_joined")
    refused("leave after leave", await here.call("leave", room=room), "not_joined")
    sent = await here.call("send", room=room, id="after", body={})
    same("send needs no join", sent["op"], "ack")
    same("who stayed gets it", (await there.push())["id"], "after")
    same("ping", (await here.call("ping"))["op"], "pong")
    same("messages after leave", [p["id"] for p in here.pushes if p.get("id") == "after"], [])
    await here.close()
    await there.close()


async def events_about_messages(one, two, token):
    room, user = new_room(), user_of(token)
    session = await Session.open(one, token)
    await session.call("join", room=room)
    await session.call("send", room=room, id="m", body={"text": "first"})
    await session.push()
    for kind, target, body in [
        ("edit", "m", {"text": "better"}),
        ("reaction", f"{user}/m", {"text": "👍"}),
        ("delete", f"{user}/m", None),
    ]:
        ack = await session.call("send", room=room, id=f"e-{kind}", kind=kind, target=target, body=body)
        same(kind, ack["op"], "ack")
        push = await session.push()
        same(kind, (push["kind"], push["target"], push["cursor"]), (kind, target, ack["cursor"]))
    answer = await session.call("send", room=room, id="a", body={}, reply_to=f"{user}/m")
    push = await session.push()
    same("reply_to", (push["reply_to"], push["cursor"]), (f"{user}/m", answer["cursor"]))
    await session.close()


async def rejoin_on_the_other_edge_gets_what_was_missed(one, two, token):
    room = new_room()
    away, here = await Session.open(one, token), await Session.open(two, token)
    await away.call("join", room=room)
    await here.call("join", room=room)
    await here.call("send", room=room, id="seen", body={})
    cursor = (await away.push())["cursor"]
    await away.close()
    missed = [f"missed-{n}" for n in range(20)]
    cursors = [(await here.call("send", room=room, id=i, body={"i": i}))["cursor"] for i in missed]
    back = await Session.open(two, token)
    joined = await back.call("join", room=room, since=cursor)
    same("joined", (joined["cursor"], joined["replay"], joined["head"]), (cursor, 20, cursors[-1]))
    assert not joined.get("reset"), joined
    got = [await back.push() for _ in missed]
    same("ids", [message["id"] for message in got], missed)
    same("cursors", [message["cursor"] for message in got], cursors)
    # The next one is a new one: nothing was repeated in between.
    await here.call("send", room=room, id="live", body={})
    same("first live message", (await back.push())["id"], "live")
    # From the middle, on the first edge.
    again = await Session.open(one, token)
    joined = await again.call("join", room=room, since=cursors[16])
    same("replay", joined["replay"], 4)
    same("ids", [(await again.push())["id"] for _ in range(4)], [*missed[17:], "live"])
    for session in (here, back, again):
        await session.close()


async def repeated_publish_is_stored_once(one, two, token):
    room = new_room()
    here, there = await Session.open(one, token), await Session.open(two, token)
    await there.call("join", room=room)
    first = await here.call("send", room=room, id="once", body={"n": 1})
    same("first", first["dup"], False)
    for session in (here, there):
        again = await session.call("send", room=room, id="once", body={"n": 2})
        same("again", (again["dup"], again["cursor"]), (True, first["cursor"]))
    await here.call("send", room=room, id="next", body={})
    got = [await there.push() for _ in range(2)]
    same("messages", [(m["id"], m["body"]) for m in got], [("once", {"n": 1}), ("next", {})])
    await here.close()
    await there.close()


async def ephemeral_room(one, two, token):
    room = new_room("live")
    here, there = await Session.open(one, token), await Session.open(two, token)
    await there.call("join", room=room)
    await here.call("join", room=room)
    ack = await here.call("send", room=room, id="e", body={"x": 1})
    same("ack", ack["op"], "ack")
    assert ack.get("cursor") is None, f"a cursor in an ephemeral room: {ack}"
    for session in (here, there):
        message = await session.push()
        same("message", (message["id"], message["body"]), ("e", {"x": 1}))
    await here.close()
    await there.close()


async def bad_commands_are_answered_with_their_code(one, two, token):
    session = await Session.open(one, token)
    room = new_room()
    for code, op, fields in [
        ("unknown_op", "nonsense", {}),
        ("bad_request", "join", {}),
        ("bad_request", "join", {"room": 7}),
        ("bad_room", "join", {"room": "chat:a.b"}),
        ("bad_room", "join", {"room": "chat"}),
        ("bad_room", "send", {"room": "chat:>", "body": {}}),
        ("unknown_namespace", "join", {"room": "nowhere:lobby"}),
        ("bad_cursor", "join", {"room": room, "since": "nonsense"}),
        ("bad_id", "send", {"room": room, "id": "a b", "body": {}}),
        ("bad_request", "send", {"room": room}),
        ("bad_request", "send", {"room": room, "body": {}, "kind": "nonsense"}),
        ("forbidden", "send", {"room": room, "body": {}, "kind": "edit", "target": "someone-else/x"}),
        ("too_large", "send", {"room": room, "body": "x" * 65536}),
        ("not_joined", "typing", {"room": room}),
        ("not_joined", "leave", {"room": room}),
    ]:
        refused(f"{op} {str(fields)[:60]}", await session.call(op, **fields), code)
    for text, code in [("{", "bad_json"), ("", "bad_json"), ("[]", "bad_request"), ('{"op":"ping"}', "bad_request")]:
        await session.socket.send(text)
        refused(repr(text), await session.push("error"), code)
    same("the session goes on", (await session.call("ping"))["op"], "pong")
    await session.close()


async def largest_body_is_accepted(one, two, token):
    session = await Session.open(one, token)
    room = new_room()
    await session.call("join", room=room)
    body = "x" * (65536 - 2)  # with its quotes exactly the limit
    same("ack", (await session.call("send", room=room, body=body))["op"], "ack")
    same("body", (await session.push())["body"], body)
    await session.close()


async def hundred_commands_in_one_segment(one, two, token):
    session = await Session.open(one, token)
    room = new_room()
    await session.call("join", room=room)
    protocol = session.socket.protocol
    rids = range(1000, 1100)
    for rid in rids:
        command = {"op": "ping", "rid": rid}
        if rid % 2:
            command = {"op": "send", "rid": rid, "room": room, "id": f"h{rid}", "body": {"n": rid}}
        protocol.send_text(json.dumps(command).encode())
    # One write, and so one segment on loopback.
    session.socket.transport.write(b"".join(protocol.data_to_send()))
    order = []
    while len(order) < 100:
        frame = await session.read()
        if frame.get("rid") is not None:
            order.append(frame["rid"])
    same("order of the replies", order, list(rids))
    sent = [f"h{rid}" for rid in rids if rid % 2]
    same("order of the messages", [(await session.push())["id"] for _ in sent], sent)
    await session.close()


async def binary_is_refused(one, two, token):
    session = await Session.open(one, token)
    await session.socket.send(b"{}")
    same("close code", await session.closed(), 1003)


CHECKS = [
    token_in_header,
    token_in_subprotocol,
    token_in_first_frame,
    bad_tokens,
    refresh,
    join_send_and_receive_it,
    events_about_messages,
    rejoin_on_the_other_edge_gets_what_was_missed,
    repeated_publish_is_stored_once,
    ephemeral_room,
    bad_commands_are_answered_with_their_code,
    largest_body_is_accepted,
    hundred_commands_in_one_segment,
    binary_is_refused,
]


async def main():
    parser = argparse.ArgumentParser(description="natter.v1 with an independent client.")
    parser.add_argument("one", help="WebSocket URL of an edge")
    parser.add_argument("two", help="WebSocket URL of another edge of the same region")
    parser.add_argument("token")
    arguments = parser.parse_args()
    passed = failed = 0
    for check in CHECKS:
        try:
            await asyncio.wait_for(check(arguments.one, arguments.two, arguments.token), 6 * DEADLINE)
            print(f"ok    {check.__name__}", flush=True)
            passed += 1
        # Whatever goes wrong is this check's failure, and must not keep the others from running.
        except Exception as error:  # noqa: BLE001
            print(f"FAIL  {check.__name__}: {type(error).__name__}: {error}", flush=True)
            failed += 1
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
