#!/usr/bin/env python3
"""Centrifugo's SDK for Python, unmodified (see requirements.txt), against natter, over JSON and over Protobuf.

    sdk.py NATTER

NATTER is the binary. The script starts `natter up` with a data folder of its own on free ports, and takes it down again.
Prints `N passed, N failed` and exits 0 or 1. Every wait has a deadline.
"""

import asyncio
import json
import os
import re
import secrets
import sys

from centrifuge import Client, ClientState, StreamPosition, SubscriptionState, UnauthorizedError
from support import DEADLINE, ROOT, Relay, Up, jwt, until

CUTS = 5


class Feed:
    """What a subscription said, in order."""

    def __init__(self, client, channel, **options):
        self.client, self.channel = client, channel
        self.publications, self.subscribed, self.unsubscribed, self.joins, self.leaves = [], [], [], [], []
        self.sub = client.sdk.new_subscription(channel, min_resubscribe_delay=0.01, **options)

        def keep(into, pick=lambda context: context):
            async def handler(context):
                into.append(pick(context))

            return handler

        events = self.sub.events
        events.on_publication = keep(self.publications, lambda context: context.pub)
        events.on_subscribed = keep(self.subscribed)
        events.on_unsubscribed = keep(self.unsubscribed)
        events.on_join = keep(self.joins, lambda context: context.info.user)
        events.on_leave = keep(self.leaves, lambda context: context.info.user)

    async def ready(self):
        await self.sub.subscribe()
        await self.sub.ready(DEADLINE)
        return await until(f"the event of {self.channel}", lambda: self.subscribed and self.subscribed[-1])

    async def publish(self, value):
        await self.sub.publish(self.client.pack(value), timeout=DEADLINE)

    def values(self):
        return [self.client.unpack(publication.data) for publication in self.publications]

    def offsets(self):
        return [publication.offset for publication in self.publications]

    async def until(self, count):
        await until(f"{count} publications in {self.channel}", lambda: len(self.publications) >= count)
        return self.values()


class Connection:
    """A client and how to write its payloads."""

    def __init__(self, protobuf, address, token, **options):
        self.protobuf, self.codes = protobuf, []
        self.sdk = Client(
            f"ws://{address}/connection/websocket",
            token=token,
            use_protobuf=protobuf,
            min_reconnect_delay=0.01,
            max_reconnect_delay=0.1,
            # Everything is near; a proxy of the environment must not get in between.
            proxy=None,
            **options,
        )

        async def on_disconnected(context):
            self.codes.append(context.code)

        self.sdk.events.on_disconnected = on_disconnected

    def pack(self, value):
        return json.dumps(value).encode() if self.protobuf else value

    def unpack(self, data):
        return json.loads(data) if self.protobuf else data


class Test:
    """What a check is given; whatever it opens is closed at its end."""

    def __init__(self, up, protobuf):
        self.up, self.protobuf, self.closing = up, protobuf, []

    async def connect(self, user="kim", edge=0, address=None, token=None, ready=True, prepare=None, **options):
        token = jwt({"sub": user, "info": {"name": user.title()}}) if token is None else token
        connection = Connection(self.protobuf, address or self.up.address(edge), token, **options)
        self.closing.append(connection.sdk.disconnect)
        if prepare:
            prepare(connection.sdk.events)
        await connection.sdk.connect()
        if ready:
            await connection.sdk.ready(DEADLINE)
        return connection

    async def close(self):
        for close in reversed(self.closing):
            await close()


def same(what, got, expected):
    assert got == expected, f"{what}: {got!r} instead of {expected!r}"


def new_channel():
    return f"python-{secrets.token_hex(6)}"


# The checks ---------------------------------------------------------------------------------------------------------


async def publications_reach_everybody_in_order(test):
    channel = new_channel()
    one, two = Feed(await test.connect("kim"), channel), Feed(await test.connect("lee", edge=1), channel)
    for feed in (one, two):
        context = await feed.ready()
        same("flags", (context.recoverable, context.positioned, context.recovered), (True, True, False))
        assert context.stream_position.epoch, "no epoch"
    values = ["x" * 60 * 1024, "안녕 👋", 0, 1.5, True, None, [], {"deep": [{"er": None}]}]
    for value in values:
        await one.publish(value)
        await two.publish(value)
    for feed in (one, two):
        same("values", await feed.until(2 * len(values)), [value for value in values for _ in range(2)])
        offsets = feed.offsets()
        assert offsets == sorted(set(offsets)) and offsets[0] > 0, f"offsets: {offsets}"
    same("offsets of both", one.offsets(), two.offsets())
    for publication, user in zip(one.publications, ["kim", "lee"] * len(values), strict=True):
        same("sender", publication.info.user, user)
        assert publication.tags["id"]


async def tokens(test):
    invalid = await test.connect(token="not-a-token", ready=False)
    same("invalid token", await until("the refusal", lambda: invalid.codes), [3500])
    expired = await test.connect(token=jwt({"sub": "kim", "exp": 1}), ready=False)
    same("expired token", await until("the refusal", lambda: expired.codes), [1])
    asked = []

    async def get_token():
        asked.append(1)
        return jwt({"sub": "kim"})

    renewed = await test.connect(token=jwt({"sub": "kim", "exp": 1}), get_token=get_token)
    same("tokens asked for", len(asked), 1)

    async def unauthorized():
        raise UnauthorizedError

    refused = await test.connect(token="", get_token=unauthorized, ready=False)
    same("no token", await until("the end", lambda: refused.codes), [1])
    assert renewed.sdk.state == ClientState.CONNECTED


async def presence_and_history(test):
    channel = new_channel()
    kim, lee = await test.connect("kim"), await test.connect("lee", edge=1)
    same("nobody", (await kim.sdk.presence(channel)).clients, {})
    watcher, other = Feed(kim, channel, join_leave=True), Feed(lee, channel)
    await watcher.ready()
    await other.ready()
    await until("the join of lee", lambda: "lee" in watcher.joins)
    clients = (await kim.sdk.presence(channel)).clients
    same("users", sorted(clients), ["kim", "lee"])
    same("info", kim.unpack(clients["lee"].conn_info), {"name": "Lee"})
    stats = await kim.sdk.presence_stats(channel)
    same("stats", (stats.num_clients, stats.num_users), (2, 2))
    await other.sub.unsubscribe()
    await until("the leave of lee", lambda: "lee" in watcher.leaves)

    for number in range(5):
        await watcher.publish(number)
    await watcher.until(5)
    live = watcher.offsets()

    async def page(**options):
        found = await watcher.sub.history(**options)
        same("position", (found.offset, bool(found.epoch)), (live[4], True))
        return [kim.unpack(publication.data) for publication in found.publications]

    same("only the position", await page(), [])
    same("all", await page(limit=-1), [0, 1, 2, 3, 4])
    same("two", await page(limit=2), [0, 1])
    since = StreamPosition(offset=live[1], epoch=(await watcher.sub.history()).epoch)
    same("after the second", await page(limit=2, since=since), [2, 3])
    same("newest first", await page(limit=2, reverse=True), [4, 3])
    unread = await kim.sdk.rpc("room.unread", kim.pack({"rooms": [f"main:{channel}"]}))
    same("unread", kim.unpack(unread.data)["rooms"][0]["room"], f"main:{channel}")


async def refusals_leave_the_connection(test):
    kim = await test.connect()
    for channel, code in [("nowhere:lobby", 102), ("live:lobby", 103), ("chat:" + "x" * 65, 107)]:
        feed = Feed(kim, channel)
        await feed.sub.subscribe()
        await until(f"the refusal of {channel}", lambda feed=feed: feed.unsubscribed)
        same(channel, (feed.unsubscribed[0].code, feed.sub.state), (code, SubscriptionState.UNSUBSCRIBED))
    await Feed(kim, new_channel()).ready()


async def cut_connections_recover_everything(test):
    channel = new_channel()
    relay = await Relay(test.up.address(0)).start()
    test.closing.append(relay.close)
    reader = Feed(await test.connect("kim", address=relay.address), channel)
    await reader.ready()
    writer, sent = await test.connect("lee", edge=1), 0

    async def publish(count):
        nonlocal sent
        for number in range(sent, sent + count):
            await writer.sdk.publish(channel, writer.pack(number), timeout=DEADLINE)
        sent += count

    for cut in range(1, CUTS + 1):
        await publish(10)
        await reader.until(sent - 5)
        relay.cut()
        await publish(10)
        relay.open(test.up.address(cut % 2))
        again = await until(f"cut {cut}: subscribed again", lambda cut=cut: reader.subscribed[cut:])
        same(f"cut {cut}", (again[0].was_recovering, again[0].recovered), (True, True))
    await publish(1)
    same("publications", await reader.until(sent), list(range(sent)))
    offsets = reader.offsets()
    same("offsets", offsets, sorted(set(offsets)))


async def lost_positions_are_told(test):
    channel = new_channel()
    writer = Feed(await test.connect("lee"), channel)
    await writer.ready()
    await writer.publish(1)
    await writer.until(1)
    states = [StreamPosition(offset=65536, epoch="nonsense")]

    async def get_state(_channel):
        if states:
            return states.pop()
        position = await writer.sub.history()
        return StreamPosition(offset=position.offset, epoch=position.epoch)

    # Asks for error 112 where it can't be recovered, and then for the state again.
    feed = Feed(await test.connect(), channel, get_state=get_state)
    same("recovered", (await feed.ready()).recovered, True)
    await writer.publish(2)
    same("live", await feed.until(1), [2])


async def server_side_subscriptions(test):
    channel = new_channel()
    relay = await Relay(test.up.address(0)).start()
    test.closing.append(relay.close)
    subscribed, unsubscribed, values = [], [], []

    async def on_subscribed(context):
        subscribed.append((context.channel, context.recovered))

    async def on_unsubscribed(context):
        unsubscribed.append(context.channel)

    async def on_publication(context):
        values.append(lee.unpack(context.pub.data))

    def prepare(events):
        events.on_subscribed, events.on_unsubscribed = on_subscribed, on_unsubscribed
        events.on_publication = on_publication

    token = jwt({"sub": "kim", "channels": [channel]})
    await test.connect(token=token, address=relay.address, prepare=prepare)
    await until("subscribed", lambda: subscribed)
    lee = await test.connect("lee", edge=1)
    await lee.sdk.publish(channel, lee.pack(1))
    await until("the first", lambda: values)
    relay.cut()
    await lee.sdk.publish(channel, lee.pack(2))
    relay.open()
    await until("subscribed again", lambda: subscribed[1:])
    await lee.sdk.publish(channel, lee.pack(3))
    await until("all", lambda: len(values) >= 3)
    same("values", values, [1, 2, 3])
    same("events", (subscribed, unsubscribed), ([(channel, False), (channel, True)], []))


async def the_example_of_the_documents_runs(test):
    page = (ROOT / "docs/centrifugal.md").read_text()
    example = re.search(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[1]
    token = jwt({"sub": "kim", "grants": [{"rooms": "chat:*", "can": ["read", "write"]}]})
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        example.replace("127.0.0.1:8080", test.up.address()),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"TOKEN": token, "NO_PROXY": "*"},
    )
    try:
        line = await asyncio.wait_for(process.stdout.readline(), DEADLINE)
        assert re.fullmatch(rb"kim \{'text': 'hello'\} \S+\n", line), line
    finally:
        process.kill()
        await process.wait()


CHECKS = [
    publications_reach_everybody_in_order,
    tokens,
    presence_and_history,
    refusals_leave_the_connection,
    lost_positions_are_told,
    server_side_subscriptions,
    cut_connections_recover_everything,
]
# These are about no protocol.
ONCE = [the_example_of_the_documents_runs]


async def run(up):
    passed = failed = 0
    every = [("json", check) for check in CHECKS] + [("protobuf", check) for check in CHECKS]
    for protocol, check in every + [("json", check) for check in ONCE]:
        name = f"{protocol}: {check.__name__}"
        test = Test(up, protocol == "protobuf")
        try:
            await asyncio.wait_for(check(test), 10 * DEADLINE)
            print(f"ok    {name}", flush=True)
            passed += 1
        # Whatever goes wrong is this check's failure, and must not keep the others from running.
        except Exception as error:  # noqa: BLE001
            print(f"FAIL  {name}: {type(error).__name__}: {error}", flush=True)
            failed += 1
        finally:
            await test.close()
    print(f"{passed} passed, {failed} failed")
    return 1 if failed else 0


def main():
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} NATTER", file=sys.stderr)
        return 64
    with Up(sys.argv[1], edges=2) as up:
        return asyncio.run(run(up))


if __name__ == "__main__":
    sys.exit(main())
