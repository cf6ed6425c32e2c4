// The package @stomp/stompjs, unmodified, against natter, beside frames without it and a client of natter.v1.
//
//     node stompjs.mjs NATTER [NAME...]
//
// NATTER is the binary. The script installs the packages of package-lock.json into .natter/clients/stomp, starts `natter up`
// with a data folder of its own on free ports, and takes it down again. With names only the scenarios whose name contains
// one of them are run. It prints `N passed, N failed` and exits 0 or 1.
//
// Nothing here sleeps for a guessed time: every wait is for a condition, with a deadline.

import assert from "node:assert/strict";

import {
  CONFIG,
  LOGIN,
  PASSCODE,
  SUBPROTOCOLS,
  Test,
  Versions,
  checkLoad,
  frame,
  newRoom,
  startLoad,
  topic,
  valueOf,
} from "./clients.mjs";
import { escapedName, jwt, newName, nowSeconds, runExample, runScenarios, until, within } from "../support.mjs";

const CUTS = 20;
const KILLS = 3;
const TRANSACTION_FRAMES = 100;
const TRANSACTION_BYTES = 1024 * 1024;
/** Bytes of a WebSocket message, below `limits.frame`. */
const PIECE = 512 * 1024;

// Connecting ----------------------------------------------------------------------------------------------------------

async function connects_with_a_token(t) {
  for (const token of [t.token("kim"), t.foreign("kim"), t.foreign("kim", { exp: nowSeconds() + 600 })]) {
    for (const options of [
      { connectHeaders: { passcode: token } },
      { connectHeaders: { login: "whoever", passcode: token } },
      { connectHeaders: { authorization: `Bearer ${token}` } },
      { connectHeaders: { Authorization: `Bearer ${token}`, login: "", passcode: "" } },
      { connectHeaders: {}, webSocketFactory: t.factory({ authorization: `Bearer ${token}` }) },
    ]) {
      const client = await t.client(options).ready();
      const { version, session, server, ...headers } = client.connects[0];
      assert.equal(version, "1.2");
      assert.equal(headers["user-name"], "kim");
      assert.match(headers["heart-beat"], /^\d+,\d+$/);
      assert.ok(session, "no session");
      assert.match(server, /^natter/);
      const room = `main:${newName("connects-")}`;
      const feed = await client.subscribe(topic(room)).ready();
      await client.send(topic(room), "with the rights of everybody");
      await feed.until(1);
      assert.equal(feed.messages[0].headers.from, "kim");
      await client.sdk.deactivate();
    }
  }
}

async function fixed_login_has_the_rights_of_everybody(t) {
  const connectHeaders = { login: LOGIN, passcode: PASSCODE };
  const client = await t.client({ connectHeaders }).ready();
  assert.equal(client.connects[0]["user-name"], LOGIN);
  const name = newName("login-");
  const feed = await client.subscribe(topic(name)).ready();
  await client.send(topic(name), { text: "hello" });
  assert.deepEqual(await feed.until(1), [{ text: "hello" }]);
  assert.equal(feed.messages[0].headers.from, LOGIN);
  client.subscribe(topic(newRoom())); // where nothing is for everybody
  await client.refused("a room without a right");
}

async function wrong_credentials_are_an_error_frame(t) {
  const expired = t.token("kim", { ttl: -3600 });
  const foreign = jwt({ sub: "kim" }, "some other secret that nobody here knows about");
  for (const [what, connectHeaders] of [
    ["no credentials", {}],
    ["no token", { passcode: "not-a-token" }],
    ["an expired token", { passcode: expired }],
    ["an expired token in a header", { authorization: `Bearer ${expired}` }],
    ["a token of somebody else", { passcode: foreign }],
    ["a wrong passcode", { login: LOGIN, passcode: `${PASSCODE}x` }],
    ["a wrong login", { login: `${LOGIN}x`, passcode: PASSCODE }],
    ["the passcode without its login", { passcode: PASSCODE }],
    ["a login without a passcode", { login: LOGIN }],
  ]) {
    const client = t.client({ connectHeaders });
    const error = await client.refused(what);
    assert.ok(error.headers.message, `${what}: no message header`);
    assert.ok(error.body, `${what}: no body`);
    assert.match(error.headers["content-type"], /^text\/plain/);
    assert.equal(client.connects.length, 0, what);
    const frames = await t.frames();
    frames.send("CONNECT", { "accept-version": "1.2", ...connectHeaders });
    await frames.error(what);
    assert.equal(frames.all.length, 1, what);
  }
}

async function versions_are_negotiated(t) {
  const all = [...SUBPROTOCOLS];
  for (const [offered, accepted, subprotocol, version] of [
    [all, "1.2,1.1,1.0", "v12.stomp", "1.2"],
    [[...all].reverse(), "1.0,1.1,1.2", "v12.stomp", "1.2"],
    [["other", "v11.stomp"], "1.1", "v11.stomp", "1.1"],
    [["v10.stomp"], "1.0", "v10.stomp", "1.0"],
    [all, "1.1", "v12.stomp", "1.1"],
    [all, "1.0", "v12.stomp", "1.0"],
    [[], "1.1,1.2", "", "1.2"], // Spring
    [[], "1.0, 1.1, 3.7", "", "1.1"],
    [[], undefined, "", "1.0"],
  ]) {
    const what = JSON.stringify([offered, accepted]);
    const frames = await t.frames({ subprotocols: offered });
    assert.equal(frames.raw.socket.protocol, subprotocol, what);
    const headers = await frames.connect({ "accept-version": accepted, passcode: t.token("kim"), host: undefined });
    assert.equal(headers.version, version, what);
    frames.raw.close();
  }
  const stomp = await t.frames({ subprotocols: [] });
  stomp.send("STOMP", { "accept-version": "1.2", host: "natter", passcode: t.token("kim") });
  await stomp.first("CONNECTED", ({ command }) => command === "CONNECTED");
  const other = await t.frames();
  other.send("CONNECT", { "accept-version": "2.0,9.9", passcode: t.token("kim") });
  const { headers } = await other.error("versions that nobody has");
  assert.match(headers.version, /1\.2/);
}

// Messages ------------------------------------------------------------------------------------------------------------

async function everybody_receives_everything_in_one_order(t) {
  const destination = topic(newRoom());
  const clients = ["kim", "lee"].map((user, edge) => t.client({ user, edge }));
  const feeds = clients.map((client) => client.subscribe(destination));
  for (const feed of feeds) await feed.ready();
  const numbers = [...Array(50).keys()];
  const sent = clients.flatMap((client, from) => numbers.map((number) => client.send(destination, { from, number })));
  await within(Promise.all(sent), "100 receipts");
  const [one, other] = await Promise.all(feeds.map((feed) => feed.until(100)));
  assert.deepEqual(one, other);
  const [ids, sameIds] = feeds.map((feed) => feed.messages.map(({ headers }) => headers["message-id"]));
  assert.deepEqual(ids, sameIds);
  assert.equal(new Set(ids).size, 100, "ids that are repeated");
  for (const from of [0, 1]) {
    assert.deepEqual(one.filter((value) => value.from === from).map((value) => value.number), numbers);
  }
  for (const message of feeds[0].messages) {
    assert.equal(message.headers.from, ["kim", "lee"][valueOf(message).from]);
  }
}

async function messages_have_their_headers(t) {
  const room = newRoom();
  const client = await t.client({ user: "kim" }).ready();
  const auto = await client.subscribe(topic(room), { id: "the auto one", ack: "auto" }).ready();
  const acked = await client.subscribe(topic(room), { id: "acked", ack: "client" }).ready();
  await client.send(topic(room), { text: "안녕" }, { "idempotency-key": "m1", "reply-to": "lee/m0", transient: "x" });
  await Promise.all([auto.until(1), acked.until(1)]);
  const [first, second] = [auto, acked].map((feed) => feed.messages[0].headers);
  assert.equal(first.subscription, "the auto one");
  assert.equal(second.subscription, "acked");
  // It is the same in every mode.
  assert.ok(first.ack, "no ack header");
  assert.equal(first.ack, second.ack);
  for (const headers of [first, second]) {
    assert.equal(headers["message-id"], "kim/m1");
    assert.equal(headers.destination, topic(room));
    assert.equal(headers["content-type"], "application/json");
    assert.equal(headers["content-length"], String(Buffer.byteLength('{"text":"안녕"}')));
    assert.equal(headers.from, "kim");
    assert.equal(headers["reply-to"], "lee/m0");
    assert.ok(headers.cursor, "no cursor");
    assert.ok(Math.abs(Number(headers.timestamp) - Date.now()) < 60_000, `the time ${headers.timestamp}`);
    for (const absent of ["kind", "target", "mentions", "receipt", "transaction", "event"]) {
      assert.equal(headers[absent], undefined, absent);
    }
  }
}

/** What is sent, its content-type, what natter.v1 gets, what STOMP gets (absent: what was sent), and its content-type. */
const JSON_TYPE = "application/json";
const BODIES = [
  ['{"text":"hello","list":[{"deep":[null,false,{"한":"국"}]}],"":0}', undefined, JSON_TYPE],
  ['{ "b" :1.0,"a": [1e2 ,12345678901234567890],  "c":"\\u00e9\\/" }', JSON_TYPE, JSON_TYPE],
  ["[1,[2,[3,[]]],null]", undefined, JSON_TYPE],
  ["42", undefined, JSON_TYPE],
  ["null", JSON_TYPE, JSON_TYPE],
  ["false", undefined, JSON_TYPE],
  ['"a JSON string: 한국 \\n \\" \\u00e9"', JSON_TYPE, "text/plain", 'a JSON string: 한국 \n " é'],
  ['""', undefined, "text/plain", ""],
  ["plain text", undefined, "text/plain"],
  ["안녕하세요, 여러분", undefined, "text/plain"],
  ['👩‍👩‍👧‍👦 🏳️‍🌈 \u2028 \n\r\n \\ " \t :', undefined, "text/plain"],
  ["a NUL \0 inside, and \u0001", undefined, "text/plain"],
  ['{"text":"said to be text"}', "text/plain", "text/plain"],
  ["42", "text/plain;charset=utf-8", "text/plain"],
  ["<b>42</b>", "text/html", "text/plain"],
  ["{broken", JSON_TYPE, "text/plain"],
  ["", undefined, "text/plain"],
  ["  ", undefined, "text/plain"],
];

async function bodies_stay_what_they_are(t) {
  const room = newRoom();
  const native = await t.native();
  await native.call("join", { room });
  const writers = [t.client({ user: "kim" }), t.client({ user: "lee", edge: 1, forceBinaryWSFrames: true })];
  const feed = await writers[0].subscribe(topic(room)).ready();
  await writers[1].ready();
  const frames = await t.connected({ user: "ann" });
  frames.send("SUBSCRIBE", { id: "0", destination: topic(room), receipt: "subscribed" });
  await frames.receipt("subscribed");
  let count = 0;
  for (const [body, given, type, expected = body] of BODIES) {
    const what = JSON.stringify([body, given]);
    const headers = given === undefined ? {} : { "content-type": given };
    for (const writer of writers) {
      await writer.send(topic(room), body, headers);
      count += 1;
      await feed.until(count);
      const message = feed.messages.at(-1);
      assert.equal(message.body, expected, what);
      assert.match(message.headers["content-type"], new RegExp(`^${type}`), what);
      assert.equal(message.headers["content-length"], String(Buffer.byteLength(expected)), what);
      const { body: seen } = await until(`${what} at natter.v1`, () => native.pushes.filter(({ op }) => op === "msg")[count - 1]);
      assert.deepEqual(seen, type === JSON_TYPE ? JSON.parse(body) : expected, what);
    }
  }
  const raw = await frames.untilMessages(count);
  assert.deepEqual(raw.map(({ body }) => body), feed.messages.map(({ body }) => body));
}

async function large_bodies_arrive_whole(t) {
  const destination = topic(newRoom());
  const [writer, splitter] = await Promise.all([
    t.client({ user: "kim" }).ready(),
    t.client({ user: "lee", splitLargeFrames: true, maxWebSocketChunkSize: 1000 }).ready(),
  ]);
  const feed = await t.client({ user: "ann", edge: 1 }).subscribe(destination).ready();
  const large = "x".repeat(60 * 1024);
  const korean = "한".repeat(20 * 1024);
  const emoji = "🏳️‍🌈".repeat(4 * 1024);
  const json = { text: large.slice(0, 30 * 1024), list: [korean.slice(0, 10 * 1024 - 100)] };
  await writer.send(destination, large);
  await writer.send(destination, korean);
  await writer.send(destination, emoji);
  await writer.send(destination, Buffer.from(korean));
  await writer.send(destination, json, { "content-type": "application/json" });
  // Only characters of one UTF-16 unit: stompjs cuts others apart.
  await splitter.send(destination, large);
  await splitter.send(destination, korean);
  const values = await feed.until(7);
  assert.ok(values[2] === emoji, "the emoji have changed");
  const expected = [large, korean, emoji, korean, json, large, korean];
  values.forEach((value, at) => assert.ok(JSON.stringify(value) === JSON.stringify(expected[at]), `body ${at} has changed`));
}

async function too_large_bodies_are_refused(t) {
  for (const body of ["x".repeat(65 * 1024), "\n".repeat(60 * 1024)]) { // as JSON, each \n is two bytes
    const room = newRoom();
    const client = await t.client().ready();
    await client.send(topic(room), "before");
    client.sdk.publish({ destination: topic(room), body });
    await client.refused("a body that is too large");
    await t.log(room, 1);
  }
}

async function idempotency_key_is_the_id(t) {
  const room = newRoom();
  const client = await t.client({ user: "kim" }).ready();
  const feed = await client.subscribe(topic(room)).ready();
  for (const body of ["first", "again", "and again"]) await client.send(topic(room), body, { "idempotency-key": "k1" });
  await client.send(topic(room), "other", { "idempotency-key": "k2" });
  assert.deepEqual(await feed.until(2), ["first", "other"]);
  assert.deepEqual(feed.messages.map(({ headers }) => headers["message-id"]), ["kim/k1", "kim/k2"]);
  await t.log(room, 2);
}

async function two_subscriptions_get_a_copy_each(t) {
  const room = newRoom();
  const client = await t.client().ready();
  const feeds = [topic(room), topic(room), topic(room.replace(":", "."))].map((name) => client.subscribe(name));
  for (const feed of feeds) await feed.ready();
  for (const number of [1, 2]) await client.send(topic(room), number);
  for (const feed of feeds) assert.deepEqual(await feed.until(2), [1, 2]);
  const receipt = newName("unsubscribed-");
  const unsubscribed = client.receipt(receipt);
  feeds[1].subscription.unsubscribe({ receipt });
  await within(unsubscribed, "the receipt of UNSUBSCRIBE");
  let unhandled = 0;
  client.sdk.onUnhandledMessage = () => (unhandled += 1);
  await client.send(topic(room), 3);
  for (const feed of [feeds[0], feeds[2]]) assert.deepEqual(await feed.until(3), [1, 2, 3]);
  assert.equal(unhandled, 0, "messages of a subscription that is gone");
  // The last one goes, and comes again under its id.
  for (const feed of [feeds[0], feeds[2]]) feed.subscription.unsubscribe();
  await client.send(topic(room), 4);
  const again = await client.subscribe(topic(room), { id: feeds[0].subscription.id }).ready();
  await client.send(topic(room), 5);
  assert.deepEqual(await again.until(1), [5]);
  assert.equal(unhandled, 0);
}

async function natter_v1_is_in_the_same_room(t) {
  const room = newRoom();
  const native = await t.native({ user: "ann" });
  await native.call("join", { room });
  const client = await t.client({ user: "kim" }).ready();
  const feed = await client.subscribe(topic(room)).ready();
  await native.call("send", { room, id: "n1", body: { text: "안녕" }, mentions: ["kim"], reply_to: "kim/m0" });
  await native.call("send", { room, id: "n2", kind: "edit", target: "n1", body: { text: "안녕하세요" } });
  await client.send(topic(room), { emoji: "👍" }, { kind: "reaction", target: "ann/n1", "idempotency-key": "r1" });
  await client.send(topic(room), "an answer", { "reply-to": "ann/n1", "idempotency-key": "s1" });
  await feed.until(4);
  const [first, edit, reaction, answer] = feed.messages.map(({ headers }) => headers);
  assert.deepEqual([first["message-id"], first.from, first["reply-to"]], ["ann/n1", "ann", "kim/m0"]);
  assert.match(first.mentions, /kim/);
  assert.equal(first.kind, undefined);
  // As it was sent: without a user it is the sender's own.
  assert.deepEqual([edit.kind, edit.target], ["edit", "n1"]);
  assert.deepEqual([reaction.kind, reaction.target, reaction["message-id"]], ["reaction", "ann/n1", "kim/r1"]);
  assert.equal(answer["reply-to"], "ann/n1");
  const seen = await native.push("the answer", (push) => push.op === "msg" && push.id === "s1");
  assert.deepEqual([seen.from, seen.body, seen.reply_to], ["kim", "an answer", "ann/n1"]);
  assert.equal(seen.cursor, answer.cursor);
  assert.equal(String(seen.ts), answer.timestamp);
  const reacted = await native.push("the reaction", (push) => push.op === "msg" && push.id === "r1");
  assert.deepEqual([reacted.kind, reacted.target], ["reaction", "ann/n1"]);
}

async function destinations_are_rooms(t) {
  const client = await t.client().ready();
  const native = await t.native();
  const [dots, text] = [newName(), `${newName()} 한 #1/:=.x`];
  for (const [written, room, destination = topic(room)] of [
    [`/topic/chat.${dots}.x`, `chat:${escapedName(`${dots}.x`)}`, `/topic/chat:${dots}.x`],
    [`/topic/chat:${text}`, `chat:${escapedName(text)}`, `/topic/chat:${text}`],
    (([name]) => [`/topic/chat:${name}`, `chat:${name}`])([newName()]),
    (([name]) => [`/topic/chat.${name}`, `chat:${name}`])([newName()]),
    (([name]) => [`/topic/${name}`, `main:${name}`])([newName("d-")]),
    (([name]) => [`/topic/main.${name}`, `main:${name}`])([newName()]),
  ]) {
    await native.call("join", { room });
    const feed = await client.subscribe(written).ready();
    await client.send(written, 1);
    await native.push(`the message to ${written}`, (push) => push.op === "msg" && push.room === room && push.body === 1);
    await native.call("send", { room, body: 2 });
    assert.deepEqual(await feed.until(2), [1, 2]);
    for (const { headers } of feed.messages) assert.equal(headers.destination, destination, written);
  }
}

async function ephemeral_rooms_have_no_cursors(t) {
  const destination = topic(newName("live:stomp-"));
  const client = await t.client().ready();
  const feed = await client.subscribe(destination, { ack: "client" }).ready();
  await client.send(destination, { x: 1 });
  assert.deepEqual(await feed.until(1), [{ x: 1 }]);
  assert.equal(feed.messages[0].headers.cursor, undefined);
  assert.ok(feed.messages[0].headers["message-id"]);
}

async function events_have_destinations_of_their_own(t) {
  const room = newRoom();
  const watcher = await t.client({ user: "kim" }).ready();
  const messages = await watcher.subscribe(topic(room)).ready();
  const typing = await watcher.subscribe(`${topic(room)}.typing`).ready();
  const presence = await watcher.subscribe(`${topic(room.replace(":", "."))}.presence`).ready();
  const seen = (state) => () => presence.values().find((value) => value.user === "ann" && value.state === state);
  const native = await t.native({ user: "ann" });
  await native.call("join", { room });
  await until("the coming of ann", seen("join"), { last: () => JSON.stringify(presence.values()) });
  await native.call("typing", { room });
  const [event] = await typing.until(1);
  assert.equal(event.user, "ann");
  assert.equal(typing.messages[0].headers.destination, `${topic(room)}.typing`);
  assert.equal(typing.messages[0].headers["content-type"], "application/json");
  assert.equal(presence.messages[0].headers.destination, `${topic(room)}.presence`);
  await native.call("leave", { room });
  await until("the leave of ann", seen("leave"), { last: () => JSON.stringify(presence.values()) });
  await watcher.send(topic(room), "a message");
  assert.deepEqual(await messages.until(1), ["a message"]);
  assert.ok(presence.values().every((value) => typeof value === "object"), "messages among the events");
  assert.equal(typing.messages.length, 1);
  // Another user who only asks for events.
  const other = await t.client({ user: "lee", edge: 1 }).ready();
  const only = await other.subscribe(`${topic(room)}.typing`).ready();
  await native.call("join", { room });
  await native.call("typing", { room });
  await only.until(1);
  assert.equal(messages.messages.length, 1);
}

// Frames --------------------------------------------------------------------------------------------------------------

async function every_version_of_stompjs_works(t) {
  for (const version of ["1.2", "1.1", "1.0"]) {
    const room = newRoom();
    const writer = await t.client({ user: "lee" }).ready();
    const reader = await t.client({ user: "kim", stompVersions: new Versions([version]) }).ready();
    assert.equal(reader.sdk.connectedVersion, version);
    const feed = await reader.subscribe(topic(room), { id: "my:id", ack: "client" }).ready();
    for (const body of [{ number: 1 }, "two", "셋"]) await writer.send(topic(room), body);
    await reader.send(topic(newRoom()), "anywhere");
    assert.deepEqual(await feed.until(3), [{ number: 1 }, "two", "셋"]);
    const { headers } = feed.messages[1];
    assert.deepEqual([headers.destination, headers.subscription, headers.from], [topic(room), "my:id", "lee"], version);
    await t.untilUnread("kim", room, 3);
    feed.messages[1].ack();
    await t.untilUnread("kim", room, 1);
    const transaction = reader.sdk.begin();
    reader.sdk.publish({ destination: topic(room), body: "four", headers: { transaction: transaction.id } });
    transaction.commit();
    assert.equal((await feed.until(4))[3], "four");
    assert.deepEqual(reader.errors, []);
    await reader.sdk.deactivate();
  }
}

async function headers_are_escaped(t) {
  const room = newRoom();
  const user = "k:im 김";
  const client = await t.client({ user }).ready();
  assert.equal(client.connects[0]["user-name"], user);
  const id = "a:b\nc\r d";
  const feed = await client.subscribe(topic(room), { id }).ready();
  await client.send(topic(room), "hello", { "x:y": "ignored\n:" });
  await feed.until(1);
  const { headers } = feed.messages[0];
  assert.deepEqual([headers.subscription, headers.from], [id, user]);
  // stompjs takes an escaped backslash before an n, r or c for something else.
  const frames = await t.connected({ user });
  const odd = ` \\n\\:\\\\c\n\r한\\`;
  frames.send("SUBSCRIBE", { id: odd, destination: topic(room), receipt: odd });
  await frames.receipt(odd);
  await client.send(topic(room), "again");
  const [message] = await frames.untilMessages(1);
  assert.equal(message.headers.subscription, odd);
  assert.equal(message.headers.from, user);
}

async function first_of_repeated_headers_counts(t) {
  const room = newRoom();
  const frames = await t.connected();
  frames.raw.send(`SEND\ndestination:${topic(room)}\ndestination:/queue/x\nreceipt:one\nreceipt:two\n\nhello\0`);
  await frames.receipt("one");
  await t.log(room, 1);
  assert.equal(frames.all.length, 2);
}

async function frames_may_be_cut_at_every_byte(t) {
  const room = newRoom();
  const frames = await t.connected();
  frames.send("SUBSCRIBE", { id: "0", destination: topic(room) });
  const body = '안녕 \n\0 👍"';
  const bytes = (at) => frame("SEND", { destination: topic(room), receipt: `r${1000 + at}`, "x-한": "글:" }, body);
  const { length } = bytes(0);
  const whole = (part) => Buffer.from(part.toString()).equals(part);
  for (let at = 0; at <= length; at++) {
    const parts = [bytes(at).subarray(0, at), bytes(at).subarray(at)];
    // Text where the cut is between two characters.
    for (const part of parts) frames.raw.send(parts.every(whole) ? part.toString() : part);
    await frames.receipt(`r${1000 + at}`);
  }
  const messages = await frames.untilMessages(length + 1);
  assert.ok(messages.every((message) => message.body === body), "a body has changed");
  assert.equal(messages.length, length + 1);
}

async function a_session_may_come_byte_by_byte(t) {
  const room = newRoom();
  const frames = await t.frames();
  const bytes = Buffer.concat([
    frame("CONNECT", { "accept-version": "1.2", authorization: `Bearer ${t.foreign("kim")}` }),
    frame("SUBSCRIBE", { id: "0", destination: topic(`main:${room.slice(5)}`) }),
    frame("SEND", { destination: topic(`main:${room.slice(5)}`), receipt: "sent" }, "한 byte"),
  ]);
  for (const byte of bytes) frames.raw.send(Buffer.from([byte]));
  await frames.receipt("sent");
  const [message] = await frames.untilMessages(1);
  assert.equal(message.body, "한 byte");
}

async function one_message_may_hold_several_frames(t) {
  const room = newRoom();
  for (const [eol, between, binary] of [
    ["\n", "", false],
    ["\n", "\n\n", true],
    ["\r\n", "\r\n", false],
  ]) {
    const frames = await t.frames();
    const receipt = newName("last-");
    const destination = topic(room);
    const all = [
      frame("CONNECT", { "accept-version": "1.2", passcode: t.token("kim") }, "", { eol }),
      frame("SUBSCRIBE", { id: "0", destination }, "", { eol }),
      frame("SEND", { destination }, "one", { eol }),
      frame("SEND", { destination, "content-length": null }, "two", { eol }),
      frame("SEND", { destination, "content-length": 5, receipt }, "th\0ee", { eol }),
    ];
    const bytes = Buffer.concat(all.flatMap((one) => [one, Buffer.from(between)]));
    frames.raw.send(binary ? bytes : bytes.toString());
    await frames.receipt(receipt);
    // SUBSCRIBE was in effect before the first SEND.
    const messages = await frames.untilMessages(3);
    assert.deepEqual(messages.map(({ body }) => body), ["one", "two", "th\0ee"]);
    assert.equal(frames.all[0].command, "CONNECTED");
    frames.send("DISCONNECT", { receipt: "bye" });
    await frames.receipt("bye");
    assert.equal((await frames.raw.end("DISCONNECT")).code, 1000);
  }
}

async function what_is_not_stomp_ends_the_session(t) {
  const destination = topic(newRoom());
  const lines = (...some) => Buffer.from(`${some.join("\n")}\0`);
  for (const [what, bytes, fresh = false] of [
    ["a frame before CONNECT", frame("SEND", { destination }, "x"), true],
    ["garbage", lines("garbage", "", ""), true],
    ["a second CONNECT", frame("CONNECT", { "accept-version": "1.2", passcode: t.token("kim") })],
    ["an unknown command", frame("NONSENSE", { destination })],
    ["a command in lower case", frame("send", { destination }, "x")],
    ["a command of servers", frame("MESSAGE", { destination, subscription: "0", "message-id": "1" }, "x")],
    ["a header without a colon", lines("SEND", `destination:${destination}`, "nonsense", "", "x")],
    ["an unknown escape", lines("SEND", `destination:${destination}`, "x:a\\tb", "", "x")],
    ["an escape without its end", lines("SEND", `destination:${destination}`, "x:a\\", "", "x")],
    ["a content-length that is no number", frame("SEND", { destination, "content-length": "many" }, "x")],
    ["a content-length that is too small", frame("SEND", { destination, "content-length": 2 }, "xyz")],
    ["a content-length beyond all limits", frame("SEND", { destination, "content-length": 1e12 }, "x")],
    ["a body that is not UTF-8", frame("SEND", { destination }, Buffer.from([0x22, 0xff, 0xfe, 0x22]))],
    ["a header that is not UTF-8", Buffer.concat([Buffer.from("SEND\nx:"), Buffer.from([0xff]), Buffer.from(`\ndestination:${destination}\n\nx\0`)])],
    ["a SEND without a destination", frame("SEND", {}, "x")],
    ["a SUBSCRIBE without a destination", frame("SUBSCRIBE", { id: "0" })],
    ["a SUBSCRIBE without an id", frame("SUBSCRIBE", { destination })],
    ["an unknown ack mode", frame("SUBSCRIBE", { id: "0", destination, ack: "nonsense" })],
    ["a subscription that is there twice", Buffer.concat([1, 2].map(() => frame("SUBSCRIBE", { id: "0", destination })))],
    ["a broken cursor", frame("SUBSCRIBE", { id: "0", destination, cursor: "nonsense" })],
    ["a broken offset", frame("SUBSCRIBE", { id: "0", destination, "x-stream-offset": "nonsense" })],
    ["a broken id", frame("SEND", { destination, "idempotency-key": "a/b c" }, "x")],
    ["an unknown kind", frame("SEND", { destination, kind: "nonsense", target: "a/b" }, "x")],
    ["an unknown transaction", frame("SEND", { destination, transaction: "t" }, "x")],
    ["a COMMIT without BEGIN", frame("COMMIT", { transaction: "t" })],
    ["an ABORT without BEGIN", frame("ABORT", { transaction: "t" })],
    ["a second BEGIN", Buffer.concat([1, 2].map(() => frame("BEGIN", { transaction: "t" })))],
    ["a header without end", Buffer.concat([Buffer.from("SEND\nx:"), Buffer.alloc(3 * 512 * 1024, 120)])],
  ]) {
    const frames = fresh ? await t.frames() : await t.connected();
    if (!fresh) frames.send("SEND", { destination: topic(newRoom()), receipt: "before" }, "x");
    for (let at = 0; at < bytes.length; at += PIECE) frames.raw.send(bytes.subarray(at, at + PIECE));
    await frames.error(what);
    assert.equal(frames.all.length, fresh ? 1 : 3, `${what}: ${JSON.stringify(frames.all)}`);
    if (!fresh) assert.equal(frames.all[1].headers["receipt-id"], "before", `${what}: what was sent before it is lost`);
  }
}

async function what_is_not_allowed_is_refused(t) {
  const readable = newRoom();
  const passcode = t.token("kim", { can: ["read"], rooms: "chat:*" });
  const refused = [
    "/queue/lobby",
    "/exchange/amq.topic/lobby",
    "/amq/queue/lobby",
    "/temp-queue/lobby",
    "/user/queue/lobby",
    "/app/lobby",
    "/topic",
    "/topic/",
    "chat:lobby",
    "/topic/nowhere:lobby",
    "/topic/live:lobby", // not in the token
    "/topic/chat:",
    "/topic/:lobby",
    "/topic/채팅:a",
    `/topic/chat:${"안".repeat(8)}`,
    "/topic/chat.>",
    "/topic/chat.*",
    "/topic/chat:a.#",
    `/topic/chat:${"x".repeat(200)}`,
  ];
  const cases = [
    ...refused.map((destination) => ["SUBSCRIBE", { id: "0", destination }]),
    ...[...refused, topic(readable), `${topic(readable)}.presence`].map((destination) => ["SEND", { destination }]),
    ["SUBSCRIBE", { id: "0", destination: `${topic(readable)}.presence` }], // without the right
  ];
  for (const [command, headers] of cases) {
    const frames = await t.frames();
    await frames.connect({ passcode });
    frames.send(command, { ...headers, receipt: "r" }, command === "SEND" ? "x" : "");
    const error = await frames.error(`${command} ${headers.destination}`);
    assert.equal(error.headers["receipt-id"], "r");
    assert.equal(frames.all.length, 2, "a RECEIPT of what was refused");
  }
  const reader = await t.client({ connectHeaders: { passcode } }).ready();
  await reader.subscribe(topic(readable)).ready();
}

// Receipts, transactions, acknowledgements ----------------------------------------------------------------------------

async function receipts_come_after_the_deed(t) {
  const room = newRoom();
  const client = await t.client({ user: "kim" }).ready();
  const native = await t.native({ user: "kim" });
  for (let number = 0; number < 10; number++) {
    await client.send(topic(room), number, { "idempotency-key": `k${number}` });
    const { dup } = await native.call("send", { room, id: `k${number}`, body: "later" });
    assert.equal(dup, true, "the message was not stored when its receipt came");
  }
  await t.log(room, 10);
  // While NATS stands still, nothing is stored.
  await t.up.withFrozenNats(async () => {
    const waiting = client.send(topic(room), "while NATS stands still");
    let came = false;
    void waiting.then(() => (came = true), () => {});
    for (let request = 0; request < 20; request++) await fetch(`http://${t.up.address(0)}/healthz`);
    assert.equal(came, false, "a receipt of what can't be stored");
    return () => waiting;
  });
  await t.log(room, 11);
  // Every command may ask for one, and they come in the order of the commands.
  const frames = await t.connected();
  const destination = topic(newRoom());
  const commands = [
    ["SUBSCRIBE", { id: "0", destination, ack: "client" }],
    ["SEND", { destination }],
    ["BEGIN", { transaction: "t" }],
    ["SEND", { destination, transaction: "t" }],
    ["COMMIT", { transaction: "t" }],
    ["BEGIN", { transaction: "t" }],
    ["ABORT", { transaction: "t" }],
    ["ACK", { id: "of nothing" }],
    ["NACK", { id: "of nothing" }],
    ["UNSUBSCRIBE", { id: "0" }],
    ["UNSUBSCRIBE", { id: "of nothing" }],
    ["DISCONNECT", {}],
  ];
  const all = commands.map(([command, headers], at) =>
    frame(command, { ...headers, receipt: `${at}: ${command}` }, command === "SEND" ? "x" : ""));
  frames.raw.send(Buffer.concat(all).toString());
  assert.equal((await frames.raw.end("DISCONNECT")).code, 1000);
  const receipts = frames.all.filter(({ command }) => command === "RECEIPT").map(({ headers }) => headers["receipt-id"]);
  // That of a SEND in a transaction may come at its COMMIT.
  const inOrder = (some) => some.filter((receipt) => !receipt.startsWith("3:"));
  assert.deepEqual(inOrder(receipts), inOrder(commands.map(([command], at) => `${at}: ${command}`)));
  assert.equal(receipts.length, commands.length);
  assert.equal(receipts.at(-1), "11: DISCONNECT");
}

async function transactions_are_all_or_nothing(t) {
  const room = newRoom();
  const client = await t.client().ready();
  const feed = await client.subscribe(topic(room)).ready();
  const publish = (body, transaction) =>
    client.sdk.publish({ destination: topic(room), body, headers: transaction ? { transaction: transaction.id } : {} });
  const [one, other, aborted] = [client.sdk.begin(), client.sdk.begin("my own: name"), client.sdk.begin()];
  publish("1", one);
  publish("2", other);
  publish("3", one);
  publish("never", aborted);
  await client.send(topic(room), "outside");
  assert.deepEqual(await feed.until(1), ["outside"]);
  other.commit();
  assert.deepEqual(await feed.until(2), ["outside", 2]);
  aborted.abort();
  one.commit();
  assert.deepEqual(await feed.until(4), ["outside", 2, 1, 3]);
  const again = client.sdk.begin(aborted.id);
  publish("4", again);
  again.commit();
  assert.deepEqual((await feed.until(5))[4], 4);
  for (const { headers } of feed.messages) assert.equal(headers.transaction, undefined);
  publish("5", client.sdk.begin());
  await client.send(topic(room), 6);
  await client.sdk.deactivate(); // aborts it
  await t.log(room, 6);
}

async function transactions_have_a_cap(t) {
  for (const [what, body, allowed] of [
    ["frames", "x", TRANSACTION_FRAMES],
    ["bytes", "x".repeat(60 * 1024), Math.floor(TRANSACTION_BYTES / (60 * 1024 + 1024))],
  ]) {
    const room = newRoom();
    const client = await t.client().ready();
    const fill = (transactions, count) => {
      for (let number = 0; number < count; number++) {
        const transaction = transactions[number % transactions.length].id;
        client.sdk.publish({ destination: topic(room), body, headers: { transaction } });
      }
    };
    for (const ids of [["a"], ["a", "b"]]) {
      const transactions = ids.map((id) => client.sdk.begin(id));
      fill(transactions, allowed);
      for (const transaction of transactions) transaction.commit();
      await client.send(topic(newRoom()), "after the commits");
    }
    await t.log(room, 2 * allowed);
    const transactions = ["a", "b"].map((id) => client.sdk.begin(id));
    fill(transactions, allowed + 2); // 2: what a frame takes beside its body is not known here
    await client.refused(`too many ${what} in transactions`);
    await t.log(room, 2 * allowed);
  }
}

async function acknowledging_moves_the_read_marker(t) {
  for (const mode of ["client", "client-individual"]) {
    const room = newRoom();
    const writer = await t.client({ user: "lee" }).ready();
    const reader = await t.client({ user: "kim", edge: 1 }).ready();
    const feed = await reader.subscribe(topic(room), { ack: mode }).ready();
    for (const number of [1, 2, 3, 4]) await writer.send(topic(room), number);
    await feed.until(4);
    await t.untilUnread("kim", room, 4);
    const acknowledge = async (how, at) => {
      const receipt = newName("acked-");
      const done = reader.receipt(receipt);
      feed.messages[at][how]({ receipt });
      await within(done, `the receipt of ${how}`);
    };
    await acknowledge("ack", 1);
    await t.untilUnread("kim", room, 2);
    await acknowledge("ack", 0); // never back
    await acknowledge("nack", 2);
    await acknowledge("ack", 3);
    await t.untilUnread("kim", room, 0);
    // As Spring does it: by the id alone; and NACK has no effect.
    const other = await t.connected({ user: "ann" });
    other.send("SUBSCRIBE", { id: "0", destination: topic(room), ack: mode, "x-stream-offset": "first" });
    const messages = await other.untilMessages(4);
    other.send("NACK", { id: messages[3].headers.ack, receipt: "nacked" });
    await other.receipt("nacked");
    other.send("ACK", { id: messages[0].headers.ack, receipt: "acked" });
    await other.receipt("acked");
    await t.untilUnread("ann", room, 3);
  }
}

async function the_end_is_in_order(t) {
  const room = newRoom();
  const frames = await t.connected();
  for (const number of [1, 2, 3]) frames.send("SEND", { destination: topic(room) }, String(number));
  frames.send("DISCONNECT", { receipt: "bye: now" });
  await frames.receipt("bye: now");
  assert.equal((await frames.raw.end("DISCONNECT")).code, 1000);
  assert.equal(frames.all.length, 2);
  await t.log(room, 3);
  // Spring closes at once.
  const hasty = await t.connected();
  for (const number of [4, 5, 6]) hasty.send("SEND", { destination: topic(room) }, String(number));
  hasty.send("DISCONNECT", {});
  hasty.raw.socket.close();
  await hasty.raw.end("the hasty one");
  await until("the messages of the hasty one", () => t.log(room, 6).then(() => true, () => false));
  // stompjs waits for the receipt.
  const client = await t.client().ready();
  await within(client.sdk.deactivate(), "deactivate");
  assert.equal(client.closes.length, 1);
}

// Heart-beats ---------------------------------------------------------------------------------------------------------

/** Begun first and awaited last: they take seconds. All use the second edge, which is not killed. */
async function heart_beats_of_stompjs_go_both_ways(t) {
  const client = await t.client({ edge: 1, heartbeatIncoming: 1000, heartbeatOutgoing: 1000 }).ready();
  assert.match(client.connects[0]["heart-beat"], /^1000,1000$/);
  const quiet = await t.connected({ edge: 1, headers: { "heart-beat": "0,0" } });
  await until("five heart-beats", () => client.beats >= 5);
  assert.equal(client.lost, 0);
  assert.equal(client.closes.length, 0);
  await client.send(topic(newRoom()), "still here");
  assert.equal(quiet.decoder.beats, 0, "heart-beats that nobody asked for");
  assert.equal(quiet.raw.closed, null);
}

async function heart_beats_are_at_most_one_a_second(t) {
  const began = Date.now();
  const frames = await t.connected({ edge: 1, headers: { "heart-beat": "0,1" } });
  await until("four heart-beats", () => frames.decoder.beats >= 4);
  const took = Date.now() - began;
  assert.ok(took > 2_900, `four heart-beats in ${took} ms`);
  assert.ok(took < 8_000, `four heart-beats in ${took} ms`);
}

async function silent_clients_are_cut(t) {
  const silent = await t.connected({ edge: 1, headers: { "heart-beat": "1000,0" } });
  const began = Date.now();
  // Beats as Spring does: one and a half times what was promised.
  const slow = await t.connected({ edge: 1, headers: { "heart-beat": "1000,0" } });
  const beating = setInterval(() => slow.raw.send("\n"), 1_500);
  try {
    await silent.raw.end("the silent one");
    const took = Date.now() - began;
    assert.ok(took > 1_900, `cut after ${took} ms`);
    assert.ok(took < 5_500, `cut after ${took} ms`);
    assert.equal(slow.raw.closed, null, "a client was cut that keeps its promise");
    slow.send("SEND", { destination: topic(newRoom()), receipt: "r" }, "still here");
    await slow.receipt("r");
  } finally {
    clearInterval(beating);
  }
}

// Resuming ------------------------------------------------------------------------------------------------------------

async function subscriptions_begin_where_they_are_told(t) {
  const room = newRoom();
  const client = await t.client().ready();
  const live = await client.subscribe(topic(room)).ready();
  for (const number of [1, 2, 3]) await client.send(topic(room), number);
  await live.until(3);
  const { cursor } = live.messages[0].headers;
  const other = await t.client({ user: "lee", edge: 1 }).ready();
  const feeds = [
    [{}, []],
    [{ "x-stream-offset": "next" }, []],
    [{ "x-stream-offset": "first" }, [1, 2, 3]],
    [{ "x-stream-offset": "last" }, [3]],
    [{ "x-stream-offset": `offset=${cursor.split(".")[2]}` }, [1, 2, 3]],
    [{ "x-stream-offset": "timestamp=0" }, [1, 2, 3]],
    [{ "x-stream-offset": `cursor=${cursor}` }, [2, 3]],
    [{ cursor }, [2, 3]],
    [{ cursor: live.messages[2].headers.cursor }, []],
  ].map(([headers, expected]) => [other.subscribe(topic(room), headers), expected]);
  for (const [feed] of feeds) await feed.ready();
  await client.send(topic(room), 4);
  for (const [feed, expected] of feeds) {
    const what = JSON.stringify(feed.headers);
    assert.deepEqual(await feed.until(expected.length + 1), [...expected, 4], what);
    assert.deepEqual(feed.resets, [], what);
    assert.equal(feed.messages.at(-1).headers.cursor, (await live.until(4), live.messages[3].headers.cursor), what);
  }
  // A room in which nothing was said.
  const empty = await other.subscribe(topic(newRoom()), { "x-stream-offset": "first" }).ready();
  await other.send(empty.destination, 1);
  assert.deepEqual(await empty.until(1), [1]);
}

async function what_can_not_be_resumed_is_reset(t) {
  const room = newRoom();
  const client = await t.client().ready();
  const live = await client.subscribe(topic(room)).ready();
  for (const number of [1, 2, 3]) await client.send(topic(room), number);
  await live.until(3);
  const parts = live.messages[0].headers.cursor.split(".");
  parts[1] = parts[1].replace(/^./, (first) => (first === "a" ? "b" : "a")); // another epoch
  const cursor = parts.join(".");
  const other = await t.client({ user: "lee", edge: 1 }).ready();
  for (const headers of [{ cursor }, { "x-stream-offset": `cursor=${cursor}` }]) {
    const feed = await other.subscribe(topic(room), headers).ready();
    await until("the reset", () => feed.resets.length === 1, { last: () => JSON.stringify(feed.values()) });
    const [reset] = feed.resets;
    assert.ok(JSON.parse(reset.body).reason, reset.body);
    assert.equal(reset.headers.destination, topic(room));
    assert.ok(reset.headers["message-id"], "no message-id");
    await client.send(topic(room), "live");
    assert.deepEqual(await feed.until(1), ["live"], "live messages go on");
  }
}

async function comesBack(feed, times, what) {
  await until(`${what}: subscribed again`, () => feed.subscribed > times, { last: () => feed.client.said() });
  assert.deepEqual(feed.resets.map(({ body }) => body), [], what);
}

async function cut_connections_lose_nothing(t) {
  const room = newRoom();
  const relay = await t.relay(t.up.address(0));
  const client = await t.client({ address: relay.address }).ready();
  const feed = await client.subscribe(topic(room), { resume: true }).ready();
  const load = await startLoad(t, room);
  for (let cut = 1; cut <= CUTS; cut++) {
    await feed.until(feed.messages.length + 5, `live messages before cut ${cut}`);
    relay.cut();
    await load.more(10);
    relay.open(t.up.address(cut % 2)); // now this edge, now the other
    await comesBack(feed, cut, `cut ${cut}`);
  }
  await load.stop();
  await checkLoad(load, feed);
  assert.equal(client.connects.length, CUTS + 1);
}

async function killed_edges_lose_nothing(t) {
  const room = newRoom();
  const client = await t.client({ edge: 0 }).ready();
  const feed = await client.subscribe(topic(room), { resume: true }).ready();
  const load = await startLoad(t, room);
  for (let kill = 1; kill <= KILLS; kill++) {
    await feed.until(feed.messages.length + 5, `live messages before kill ${kill}`);
    await t.up.killEdge(0);
    await comesBack(feed, kill, `kill ${kill}`);
  }
  await load.stop();
  await checkLoad(load, feed);
}

async function the_example_of_the_documents_runs(t) {
  const example = runExample("stomp", t.up.address(0), t.token("kim", { rooms: "chat:*" }));
  t.closing.push(() => example.kill());
  let said = "";
  example.stdout.on("data", (data) => (said += data));
  await until("the line of the example", () => /^kim \{ text: 'hello' \} kim\/\S+$/m.test(said), { last: () => said });
}

// -----------------------------------------------------------------------------------------------------------------------

const LONG = [heart_beats_of_stompjs_go_both_ways, heart_beats_are_at_most_one_a_second, silent_clients_are_cut];
const SCENARIOS = [
  connects_with_a_token,
  fixed_login_has_the_rights_of_everybody,
  wrong_credentials_are_an_error_frame,
  versions_are_negotiated,
  everybody_receives_everything_in_one_order,
  messages_have_their_headers,
  bodies_stay_what_they_are,
  large_bodies_arrive_whole,
  too_large_bodies_are_refused,
  idempotency_key_is_the_id,
  two_subscriptions_get_a_copy_each,
  natter_v1_is_in_the_same_room,
  destinations_are_rooms,
  ephemeral_rooms_have_no_cursors,
  events_have_destinations_of_their_own,
  every_version_of_stompjs_works,
  headers_are_escaped,
  first_of_repeated_headers_counts,
  frames_may_be_cut_at_every_byte,
  a_session_may_come_byte_by_byte,
  one_message_may_hold_several_frames,
  what_is_not_stomp_ends_the_session,
  what_is_not_allowed_is_refused,
  receipts_come_after_the_deed,
  transactions_are_all_or_nothing,
  transactions_have_a_cap,
  acknowledging_moves_the_read_marker,
  the_end_is_in_order,
  subscriptions_begin_where_they_are_told,
  what_can_not_be_resumed_is_reset,
  the_example_of_the_documents_runs,
  cut_connections_lose_nothing,
  killed_edges_lose_nothing,
];

process.exit(await runScenarios("stompjs.mjs", { Test, config: CONFIG, scenarios: SCENARIOS, long: LONG }));
