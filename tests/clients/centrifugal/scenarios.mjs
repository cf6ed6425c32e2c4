// What Centrifugo's SDK for JavaScript is to do over each of its transports. A scenario is given a Test of clients.mjs, whose
// clients have the transport.

import assert from "node:assert/strict";

import { API_KEY, PROTOCOLS, checkLoad, codeOf, increasing, newRoom, offsets, startLoad } from "./clients.mjs";
import { escapedName, jwt, newName, nowSeconds, until, within } from "../support.mjs";

const CUTS = 20;
const KILLS = 3;

// Connecting ----------------------------------------------------------------------------------------------------------

async function connects_with_natters_token(t) {
  const client = await t.client().ready();
  assert.ok(client.of("connected")[0].client, "the connect reply has no client");
}

async function connects_with_centrifugos_token(t) {
  for (const claims of [{}, { exp: nowSeconds() + 600, info: { name: "Lee" } }]) {
    const client = t.client({ token: t.foreign("lee", claims) });
    const feed = client.subscribe(newName("foreign-"));
    await feed.ready();
    await feed.publish("with the rights of everybody");
    await feed.until(1);
    assert.equal(feed.publications[0].info.user, "lee");
  }
}

async function expired_token_without_a_new_one_is_final(t) {
  for (const token of [t.token("kim", { ttl: -3600 }), t.foreign("kim", { exp: nowSeconds() - 3600 })]) {
    const client = t.client({ token });
    const feed = client.subscribe(newRoom()); // goes out in the frame of the connect
    const end = await client.event("disconnected");
    assert.equal(client.of("error")[0]?.error.code, 109);
    assert.equal(end.code, 1, "unauthorized, as the SDK calls it");
    assert.equal(feed.subscribed.length, 0);
  }
}

async function expired_token_is_replaced(t) {
  let asked = 0;
  const getToken = async () => {
    asked += 1;
    return t.token("kim");
  };
  const client = t.client({ token: t.token("kim", { ttl: -3600 }), getToken });
  const feed = client.subscribe(newRoom());
  await feed.ready();
  assert.equal(asked, 1);
  assert.equal(client.of("error")[0].error.code, 109);
}

async function invalid_token_is_final(t) {
  for (const token of ["not-a-token", jwt({ sub: "kim" }, "some other secret that nobody here knows about")]) {
    const client = t.client({ token });
    client.subscribe(newRoom());
    const end = await client.event("disconnected");
    assert.equal(end.code, 3500);
    assert.ok(end.reason, "a close without a reason: the SDK would reconnect");
  }
}

async function anonymous_users_get_a_name(t) {
  const channel = newName("anonymous-");
  const reader = t.client().subscribe(channel);
  await reader.ready();
  for (const number of [1, 2]) {
    const feed = t.client({ token: "" }).subscribe(channel);
    await feed.ready();
    await feed.publish(number);
    await reader.until(number);
  }
  const users = reader.publications.map((publication) => publication.info.user);
  for (const user of users) assert.match(user, /^anon-./);
  assert.notEqual(users[0], users[1]);
}

async function token_is_refreshed(t) {
  const exps = [];
  const getToken = async () => {
    exps.push(nowSeconds() + 2);
    return t.foreign("kim", { exp: exps.at(-1) });
  };
  const client = await t.client({ getToken }).ready();
  const feed = client.subscribe(newName("refresh-"));
  await feed.ready();
  await until("the third token", () => exps.length >= 3, { last: () => `(${JSON.stringify(client.heard)})` });
  await feed.publish("still here");
  await feed.until(1);
  assert.equal(client.of("connecting").length, 1, "it had to reconnect");
  assert.equal(feed.subscribed.length, 1);
}

// Messages ------------------------------------------------------------------------------------------------------------

async function everybody_receives_everything_in_one_order(t) {
  const channel = newRoom();
  const feeds = ["kim", "lee"].map((user, edge) => t.client({ user, edge }).subscribe(channel));
  for (const feed of feeds) {
    const { positioned, recoverable, wasRecovering, recovered, streamPosition } = await feed.ready();
    assert.deepEqual({ positioned, recoverable, wasRecovering, recovered },
      { positioned: true, recoverable: true, wasRecovering: false, recovered: false });
    assert.ok(streamPosition.epoch, "no epoch");
  }
  const numbers = [...Array(50).keys()];
  const sent = feeds.flatMap((feed, from) => numbers.map((number) => feed.publish({ from, number })));
  await within(Promise.all(sent), "100 replies to publish");
  const [one, other] = await Promise.all(feeds.map((feed) => feed.until(100)));
  assert.deepEqual(one, other);
  assert.deepEqual(offsets(feeds[0]), offsets(feeds[1]));
  increasing(offsets(feeds[0]), channel);
  for (const from of [0, 1]) {
    const got = one.filter((value) => value.from === from).map((value) => value.number);
    // Without a WebSocket each publish is a request of its own, and requests have no order.
    if (t.protocol.transport) got.sort((one, other) => one - other);
    assert.deepEqual(got, numbers);
  }
  const ids = feeds[0].publications.map((publication) => publication.tags.id);
  assert.equal(new Set(ids).size, 100, "ids that are repeated");
  assert.ok(ids.every(Boolean));
  for (const publication of feeds[0].publications) {
    assert.equal(publication.info.user, ["kim", "lee"][publication.data.from]);
  }
}

async function bodies_stay_what_they_are(t) {
  const channel = newRoom();
  const writer = t.client({ user: "kim" }).subscribe(channel);
  const other = t.client({ user: "lee", edge: 1, protocol: t.other }).subscribe(channel);
  await Promise.all([writer.ready(), other.ready()]);
  const values = [
    "x".repeat(60 * 1024),
    "안녕하세요, 여러분",
    "👩‍👩‍👧‍👦 🏳️‍🌈 \u2028 \u0000 \n \\ \"",
    0,
    -1.5e-7,
    Number.MAX_SAFE_INTEGER,
    true,
    false,
    null,
    "",
    [],
    {},
    [1, [2, [3, []]], null],
    { text: "hello", list: [{ deep: { deeper: [null, false, { "한": "국" }] } }], "": 0 },
  ];
  for (const value of values) await within(writer.publish(value), `publish ${JSON.stringify(value).slice(0, 60)}`);
  for (const feed of [writer, other]) assert.deepEqual(await feed.until(values.length), values);
}

async function newlines_of_a_body_do_not_cut_frames(t) {
  const channel = newRoom();
  const feed = t.client().subscribe(channel);
  await feed.ready();
  const native = await t.native();
  native.raw.send(`{"op":"send","rid":900,"room":"${channel}","body":{\n "a":\r\n [1,\n2] }}`);
  const writer = await t.client({ user: "lee", protocol: PROTOCOLS.protobuf }).ready();
  await until("the native reply", () => native.replies.get(900));
  await writer.sdk.publish(channel, Buffer.from('\n{\n"b"\n:\n2\n}\n'));
  assert.deepEqual(await feed.until(2), [{ a: [1, 2] }, { b: 2 }]);
  assert.equal(feed.client.of("connecting").length, 1, "it had to reconnect");
}

async function unsubscribed_means_silent_until_it_subscribes_again(t) {
  const channel = newRoom();
  const [writer, reader] = ["kim", "lee"].map((user, edge) => t.client({ user, edge }).subscribe(channel));
  await Promise.all([writer.ready(), reader.ready()]);
  await writer.publish(1);
  await reader.until(1);
  reader.sub.unsubscribe();
  // A reply after the one to unsubscribe: it is in effect.
  await within(reader.client.sdk.presenceStats(channel), "presence stats");
  for (const number of [2, 3]) await writer.publish(number);
  assert.deepEqual(reader.values(), [1]);
  reader.sub.subscribe();
  const { recovered, wasRecovering } = await reader.ready();
  assert.deepEqual({ recovered, wasRecovering }, { recovered: true, wasRecovering: true });
  await writer.publish(4);
  assert.deepEqual(await reader.until(4), [1, 2, 3, 4]);
  // Without waiting for replies.
  for (let times = 0; times < 5; times++) {
    reader.sub.unsubscribe();
    reader.sub.subscribe();
  }
  await reader.ready();
  await writer.publish(5);
  assert.deepEqual(await reader.until(5), [1, 2, 3, 4, 5]);
  assert.equal(reader.client.of("connecting").length, 1, "it had to reconnect");
}

async function ephemeral_rooms_have_no_positions(t) {
  const channel = newName("live:centrifugal-");
  const [writer, reader] = ["kim", "lee"].map((user) => t.client({ user }).subscribe(channel));
  for (const feed of [writer, reader]) {
    const { positioned, recoverable, recovered } = await feed.ready();
    assert.deepEqual({ positioned, recoverable, recovered }, { positioned: false, recoverable: false, recovered: false });
  }
  await writer.publish({ x: 1 });
  assert.deepEqual(await reader.until(1), [{ x: 1 }]);
  assert.equal(reader.publications[0].offset, undefined);
  assert.ok(reader.publications[0].tags.id);
}

// Who is here ---------------------------------------------------------------------------------------------------------

async function presence_names_users(t) {
  const channel = newRoom();
  const watcher = await t.client({ user: "ann" }).ready();
  assert.deepEqual((await watcher.sdk.presence(channel)).clients, {});
  const kim = t.client({ token: t.token("kim", { info: { name: "Kim Yuna" } }) }).subscribe(channel);
  const again = t.client({ token: t.token("kim", { info: { name: "Kim Yuna" } }) }).subscribe(channel);
  const lee = t.client({ user: "lee", edge: 1 }).subscribe(channel);
  await Promise.all([kim.ready(), again.ready(), lee.ready()]);
  let clients;
  await until("both users in the presence", async () => {
    ({ clients } = await watcher.sdk.presence(channel));
    return Object.keys(clients).length === 2;
  }, { last: () => JSON.stringify(clients) });
  assert.deepEqual(Object.keys(clients).sort(), ["kim", "lee"]);
  assert.deepEqual([clients.kim.user, clients.kim.client], ["kim", "kim"]);
  assert.deepEqual(t.protocol.unpack(clients.kim.connInfo), { name: "Kim Yuna" });
  assert.deepEqual(await watcher.sdk.presenceStats(channel), { numUsers: 2, numClients: 2 });
  assert.deepEqual(await watcher.sdk.presenceStats(newRoom()), { numUsers: 0, numClients: 0 });
}

async function joins_and_leaves_are_pushed(t) {
  const channel = newRoom();
  const watcher = t.client({ user: "ann" }).subscribe(channel, { joinLeave: true });
  const others = [
    t.client({ user: "bob" }).subscribe(channel), // did not ask
    t.client({ token: t.token("eve", { can: ["read"] }) }).subscribe(channel, { joinLeave: true }), // may not
  ];
  await Promise.all([watcher, ...others].map((feed) => feed.ready()));
  const lee = t.client({ user: "lee", edge: 1 });
  await lee.subscribe(channel).ready();
  const join = await until("the join of lee", () => watcher.joins.find((info) => info.user === "lee"));
  assert.equal(join.client, "lee");
  lee.sdk.disconnect();
  await until("the leave of lee", () => watcher.leaves.find((info) => info.user === "lee"));
  for (const feed of others) assert.deepEqual([feed.joins, feed.leaves], [[], []]);
}

// History -------------------------------------------------------------------------------------------------------------

async function history_has_pages(t) {
  const channel = newRoom();
  const feed = t.client().subscribe(channel);
  await feed.ready();
  for (let number = 0; number < 10; number++) await feed.publish(number);
  await feed.until(10);
  const live = offsets(feed);
  const client = feed.client;
  const top = await client.history(channel);
  assert.deepEqual([top.values, top.offset], [[], live[9]]);
  const { epoch } = top;
  assert.ok(epoch, "no epoch");
  for (const [options, expected] of [
    [{ limit: -1 }, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]],
    [{ limit: 100 }, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]],
    [{ limit: 3 }, [0, 1, 2]],
    [{ limit: 3, reverse: true }, [9, 8, 7]],
    [{ limit: 3, since: { offset: live[4], epoch } }, [5, 6, 7]],
    [{ limit: -1, since: { offset: live[4], epoch } }, [5, 6, 7, 8, 9]],
    [{ limit: -1, since: { offset: live[9], epoch } }, []],
    [{ limit: 2, since: { offset: live[4], epoch }, reverse: true }, [3, 2]],
    [{ limit: 2, since: { offset: live[1], epoch }, reverse: true }, [0]],
  ]) {
    const page = await client.history(channel, options);
    const what = JSON.stringify(options);
    assert.deepEqual(page.values, expected, what);
    assert.deepEqual(page.offsets, expected.map((number) => live[number]), what);
    assert.deepEqual([page.epoch, page.offset], [epoch, live[9]], what);
    assert.ok(page.publications.every((publication) => publication.info.user === "kim" && publication.tags.id), what);
  }
  const foreign = client.history(channel, { limit: 1, since: { offset: live[4], epoch: "nonsense" } });
  assert.equal(await codeOf(foreign, "history of another epoch"), 112);
  const none = await client.history(newRoom(), { limit: -1 });
  assert.deepEqual(none.values, []);
}

// What Centrifugo does not have ---------------------------------------------------------------------------------------

async function rpc_reads_and_counts(t) {
  const room = newRoom();
  const [kim, lee] = await Promise.all(["kim", "lee"].map((user, edge) => t.client({ user, edge }).ready()));
  const watching = lee.subscribe(room, { data: t.protocol.pack({ typing: true, read: true }) });
  const typing = kim.subscribe(room);
  await Promise.all([watching.ready(), typing.ready()]);

  await kim.rpc("room.typing", { room });
  const typed = await until("the typing event", () => watching.events.find((event) => event.tags.event === "typing"));
  assert.deepEqual(typed.data, { user: "kim" });
  assert.equal(typed.offset, undefined);

  const acks = [];
  for (const id of ["m1", "m2", "m3"]) {
    acks.push(await lee.rpc("room.send", { room, id, body: { id } }));
    assert.deepEqual([acks.at(-1).id, acks.at(-1).dup], [id, false]);
  }
  assert.equal((await lee.rpc("room.send", { room, id: "m3", body: 0 })).dup, true);
  await typing.until(3);
  assert.deepEqual(typing.publications.map((publication) => publication.tags.id), ["m1", "m2", "m3"]);

  const unread = async () => (await kim.rpc("room.unread", { rooms: [room] })).rooms[0].count;
  assert.equal(await unread(), 3);
  await kim.rpc("room.read", { room, cursor: acks[1].cursor });
  assert.equal(await unread(), 1);
  const read = await until("the read event", () =>
    watching.events.find((event) => event.tags.event === "read" && event.data.user === "kim"));
  assert.equal(read.data.cursor, acks[1].cursor);
  assert.equal(read.offset, undefined);
  assert.deepEqual(typing.events, [], "events that were not asked for");
  await until("kim among the readers", async () =>
    (await lee.rpc("room.readers", { room })).readers.some((reader) => reader.user === "kim"));
  const page = await kim.rpc("room.history", { room, limit: 2 });
  assert.deepEqual(page.messages.map((message) => message.id), ["m2", "m3"]);
  // Events have not moved the position: nothing is repeated or lost after them.
  watching.sub.unsubscribe();
  watching.sub.subscribe();
  assert.equal((await watching.ready()).recovered, true);
  await lee.rpc("room.send", { room, id: "m4", body: 4 });
  assert.deepEqual((await watching.until(4)).length, 4);

  const { pack } = t.protocol;
  assert.equal(await codeOf(kim.sdk.rpc("room.nonsense", pack({ room })), "an unknown method"), 104);
  assert.equal(await codeOf(kim.sdk.rpc("room.read", pack({ room, cursor: "nonsense" })), "a bad cursor"), 107);
  assert.equal(await codeOf(kim.sdk.rpc("room.send", pack({ room })), "no body"), 107);
}

async function natter_v1_is_in_the_same_room(t) {
  const room = newRoom();
  const native = await t.native({ user: "ann" });
  await native.call("join", { room, presence: true });
  const feed = t.client({ user: "kim" }).subscribe(room);
  await feed.ready();
  await native.push("kim in the room", (push) => push.op === "presence" && push.user === "kim" && push.state === "join");

  const ack = await native.call("send", { room, id: "n1", body: { text: "안녕" }, mentions: ["kim"], reply_to: "kim/m0" });
  assert.equal(ack.id, "n1");
  await native.call("send", { room, id: "n2", kind: "edit", target: "n1", body: { text: "안녕하세요" } });
  await feed.publish({ text: "from the SDK" });
  await feed.until(3);
  const seen = await native.push("the SDK's message", (push) => push.op === "msg" && push.from === "kim");
  assert.deepEqual(seen.body, { text: "from the SDK" });
  const [first, edit, own] = feed.publications;
  assert.deepEqual([first.tags.id, first.info.user, first.data], ["n1", "ann", { text: "안녕" }]);
  assert.equal(first.tags.reply_to, "kim/m0");
  assert.match(first.tags.mentions, /kim/);
  assert.equal(first.tags.kind, undefined);
  assert.deepEqual([edit.tags.id, edit.tags.kind, edit.tags.target], ["n2", "edit", "n1"]);
  assert.equal(own.tags.id, seen.id);
}

async function default_namespace_holds_channels_without_one(t) {
  const name = newName("default-");
  const native = await t.native();
  await native.call("join", { room: `main:${name}` });
  const feed = t.client().subscribe(name);
  await feed.ready();
  await feed.publish(1);
  await native.push("the message", (push) => push.op === "msg" && push.room === `main:${name}` && push.body === 1);
  await native.call("send", { room: `main:${name}`, body: 2 });
  assert.deepEqual(await feed.until(2), [1, 2]);
}

async function channels_of_any_text_are_rooms(t) {
  for (const end of ["안녕", ".a b", ":b", ">*", '"\\\n', "=2E", "#kim,lee"]) {
    const name = `${newName()}${end}`;
    const [channel, room] = [`chat:${name}`, `chat:${escapedName(name)}`];
    const native = await t.native();
    await native.call("join", { room });
    const feed = t.client().subscribe(channel);
    await feed.ready();
    await feed.publish(1);
    await native.push(`the message in ${channel}`, (push) => push.op === "msg" && push.room === room && push.body === 1);
    await native.call("send", { room, body: 2 });
    assert.deepEqual(await feed.until(2), [1, 2], channel);
  }
}

// Refusals ------------------------------------------------------------------------------------------------------------

async function what_is_not_allowed_is_refused(t) {
  const client = await t.client({ token: t.token("kim", { can: ["read"], rooms: "chat:*" }) }).ready();
  for (const [channel, code] of [
    ["nowhere:lobby", 102],
    ["live:lobby", 103],
    ["chat:", 107],
    [":lobby", 107],
    ["a b:c", 107],
    ["채팅:a", 107],
    [`chat:${"안".repeat(8)}`, 107],
    [`chat:${"x".repeat(200)}`, 107],
  ]) {
    assert.equal(await client.subscribe(channel).refused(), code, channel);
    assert.equal(await codeOf(client.publish(channel, 1), `publish to ${channel}`), code, channel);
  }
  const room = newRoom();
  assert.equal(await codeOf(client.publish(room, 1), "publish without the right"), 103);
  assert.equal(await codeOf(client.sdk.presence(room), "presence without the right"), 103);
  assert.equal(await codeOf(client.sdk.presenceStats(room), "presence stats without the right"), 103);
  assert.equal(await codeOf(client.sdk.history(room, { limit: 1 }), "history without the right"), 103);
  await client.subscribe(room).ready();
  assert.equal(client.of("connecting").length, 1, "a refusal ended the connection");
}

// Recovery ------------------------------------------------------------------------------------------------------------

export async function comesBack(feed, times, what) {
  const { recovered, wasRecovering } = await until(`${what}: subscribed again`, () => feed.subscribed[times], {
    last: () => `(${JSON.stringify(feed.client.heard.slice(-4))})`,
  });
  assert.deepEqual({ recovered, wasRecovering }, { recovered: true, wasRecovering: true }, what);
}

async function cut_connections_recover_everything(t) {
  const channel = newRoom();
  const relay = await t.relay(t.up.address(0));
  const feed = t.client({ address: relay.address }).subscribe(channel);
  await feed.ready();
  const load = await startLoad(t, channel);
  for (let cut = 1; cut <= CUTS; cut++) {
    await feed.until(feed.publications.length + 5, `live messages before cut ${cut}`);
    relay.cut();
    await load.more(10);
    relay.open(t.up.address(cut % 2)); // now this edge, now the other
    await comesBack(feed, cut, `cut ${cut}`);
  }
  await load.stop();
  await checkLoad(load, feed);
  assert.equal(feed.subscribed.length, CUTS + 1);
}

async function killed_edges_recover_everything(t) {
  const channel = newRoom();
  const feed = t.client({ edge: 0 }).subscribe(channel);
  await feed.ready();
  const load = await startLoad(t, channel);
  for (let kill = 1; kill <= KILLS; kill++) {
    await feed.until(feed.publications.length + 5, `live messages before kill ${kill}`);
    await t.up.killEdge(0);
    await comesBack(feed, kill, `kill ${kill}`);
  }
  await load.stop();
  await checkLoad(load, feed);
}

async function positions_that_mean_nothing_are_not_recovered(t) {
  const channel = newRoom();
  const writer = t.client({ user: "lee" }).subscribe(channel);
  await writer.ready();
  for (const number of [1, 2, 3]) await writer.publish(number);
  await writer.until(3);
  const [first] = offsets(writer);
  for (const [what, position] of [
    ["another epoch", (newest) => ({ offset: first, epoch: `${newest.epoch}x` })],
    ["an epoch of another form", () => ({ offset: first, epoch: "_" })],
    ["an offset that no message has", ({ epoch }) => ({ offset: first % 2 ? first - 1 : first + 1, epoch })],
    ["an offset after the newest", ({ offset, epoch }) => ({ offset: offset + 65536, epoch })],
  ]) {
    const newest = await writer.client.history(channel);
    const feed = t.client().subscribe(channel, { since: position(newest) });
    const { wasRecovering, recovered, streamPosition } = await feed.ready();
    assert.deepEqual({ wasRecovering, recovered }, { wasRecovering: true, recovered: false }, what);
    assert.deepEqual(streamPosition, { offset: newest.offset, epoch: newest.epoch }, what);
    await writer.publish(what);
    assert.deepEqual(await feed.until(1), [what], "live messages go on");
  }
}

async function rejection_is_error_112(t) {
  const channel = newRoom();
  const writer = t.client({ user: "lee" }).subscribe(channel);
  await writer.ready();
  await writer.publish(1);
  let asked = 0;
  const getState = async () => {
    asked += 1;
    if (asked === 1) return { offset: 65536, epoch: "nonsense" };
    const { offset, epoch } = await writer.client.history(channel);
    return { offset, epoch };
  };
  const feed = t.client().subscribe(channel, { getState });
  assert.equal((await feed.ready()).recovered, true);
  assert.equal(asked, 2, "the SDK asks again after error 112");
  await writer.publish(2);
  assert.deepEqual(await feed.until(1), [2]);
}

async function everything_can_be_recovered_from_the_beginning(t) {
  const channel = newRoom();
  // An empty room: nothing is missing.
  const early = t.client().subscribe(channel, { getState: async () => ({ offset: 0, epoch: "" }) });
  assert.equal((await early.ready()).recovered, true);
  for (const number of [1, 2, 3]) await early.publish(number);
  const late = t.client({ user: "lee", edge: 1 }).subscribe(channel, { since: { offset: 0, epoch: "" } });
  assert.equal((await late.ready()).recovered, true);
  assert.deepEqual(await late.until(3), [1, 2, 3]);
}

async function server_side_subscriptions_recover_too(t) {
  const channels = [newName("server-"), newName("server-")];
  const relay = await t.relay(t.up.address(0));
  const client = t.client({ address: relay.address, token: t.foreign("kim", { channels }) });
  for (const channel of channels) {
    const { recoverable, recovered } = await client.event("subscribed", (event) => event.channel === channel);
    assert.deepEqual({ recoverable, recovered }, { recoverable: true, recovered: false });
  }
  const writer = await t.client({ user: "lee", edge: 1 }).ready();
  let sent = 0;
  const say = async (count) => {
    for (const goal = sent + count; sent < goal; sent++) {
      for (const channel of channels) await writer.publish(channel, sent);
    }
  };
  const got = (channel) =>
    client.of("publication").filter((event) => event.channel === channel).map((event) => t.protocol.unpack(event.data));
  const all = async () => {
    for (const channel of channels) {
      await until(`${sent} publications in ${channel}`, () => got(channel).length >= sent, {
        last: () => JSON.stringify(got(channel)),
      });
      assert.deepEqual(got(channel), [...Array(sent).keys()]);
    }
  };
  await say(5);
  await all();
  for (const cut of [1, 2, 3]) {
    relay.cut();
    await say(5);
    relay.open(t.up.address(cut % 2));
    for (const channel of channels) {
      const of = () => client.of("subscribed").filter((event) => event.channel === channel);
      const { recovered, wasRecovering } = await until(`${channel} is back`, () => of()[cut]);
      assert.deepEqual({ recovered, wasRecovering }, { recovered: true, wasRecovering: true });
    }
    await say(1);
    await all();
  }
  assert.deepEqual(client.of("unsubscribed"), []);
}

// The back end --------------------------------------------------------------------------------------------------------

/** A call of the server API, at the first edge. */
async function api(t, method, body) {
  const response = await fetch(`http://${t.up.address(0)}/api/${method}`, {
    method: "POST",
    headers: { "X-API-Key": API_KEY },
    body: JSON.stringify(body),
  });
  const answer = await response.json();
  assert.ok(response.status === 200 && answer.result, `${method}: ${response.status} ${JSON.stringify(answer)}`);
  return answer.result;
}

async function the_back_end_subscribes_and_unsubscribes(t) {
  const user = newName("user-");
  const [channel, own] = [newRoom(), newRoom()];
  const client = await t.client({ user, edge: 1 }).ready();
  const feed = client.subscribe(own);
  await feed.ready();
  assert.deepEqual(await api(t, "subscribe", { user, channel, data: { why: "because" } }), {});
  const of = (event) => client.event(event, (context) => context.channel === channel);
  const subscribed = await of("subscribed");
  assert.deepEqual([subscribed.positioned, subscribed.recoverable], [true, true], JSON.stringify(subscribed));
  assert.deepEqual(t.protocol.unpack(subscribed.data), { why: "because" });
  const { offset, epoch } = await api(t, "publish", { channel, data: { text: "hello" } });
  const publication = await of("publication");
  assert.deepEqual(t.protocol.unpack(publication.data), { text: "hello" });
  assert.deepEqual([publication.offset, subscribed.streamPosition.epoch], [offset, epoch]);
  await api(t, "unsubscribe", { user, channel });
  await of("unsubscribed");
  // A subscription of the client's own ends with a code that says that it is for good.
  await api(t, "unsubscribe", { user, channel: own });
  assert.equal(await feed.refused(), 2000);
  assert.equal(client.of("connecting").length, 1, "it had to reconnect");
}

async function the_back_end_disconnects(t) {
  const user = newName("user-");
  const client = await t.client({ user, edge: 1 }).ready();
  const feed = client.subscribe(newRoom());
  await feed.ready();
  // With a code that lets it come back, it does.
  await api(t, "disconnect", { user, disconnect: { code: 4200, reason: "come back" } });
  const again = await client.event("connecting", (event) => event.code === 4200);
  assert.equal(again.reason, "come back");
  await until("subscribed again", () => feed.subscribed[1]);
  // With another one, and without one, it does not.
  await api(t, "disconnect", { user, disconnect: { code: 4600, reason: "stay away" } });
  const end = await client.event("disconnected");
  assert.deepEqual([end.code, end.reason], [4600, "stay away"]);
  client.sdk.connect();
  await client.ready();
  await api(t, "disconnect", { user });
  await client.event("disconnected", (event) => event.code === 3503);
}

// -----------------------------------------------------------------------------------------------------------------------

export const SCENARIOS = [
  connects_with_natters_token,
  connects_with_centrifugos_token,
  expired_token_without_a_new_one_is_final,
  expired_token_is_replaced,
  invalid_token_is_final,
  anonymous_users_get_a_name,
  token_is_refreshed,
  everybody_receives_everything_in_one_order,
  bodies_stay_what_they_are,
  newlines_of_a_body_do_not_cut_frames,
  unsubscribed_means_silent_until_it_subscribes_again,
  ephemeral_rooms_have_no_positions,
  presence_names_users,
  joins_and_leaves_are_pushed,
  history_has_pages,
  rpc_reads_and_counts,
  natter_v1_is_in_the_same_room,
  default_namespace_holds_channels_without_one,
  channels_of_any_text_are_rooms,
  what_is_not_allowed_is_refused,
  positions_that_mean_nothing_are_not_recovered,
  rejection_is_error_112,
  everything_can_be_recovered_from_the_beginning,
  server_side_subscriptions_recover_too,
  the_back_end_subscribes_and_unsubscribes,
  the_back_end_disconnects,
  cut_connections_recover_everything,
  killed_edges_recover_everything,
];
