// Messages without a WebSocket, as docs/events.md describes them: `text/event-stream`, polls and tickets, by plain fetch.
//
//     node events.mjs NATTER [NAME...]
//
// NATTER is the binary. The script starts `natter up` with two edges and a data folder of its own on free ports, and takes
// it down again. With names only the scenarios whose name contains one of them are run. It prints `N passed, N failed` and
// exits 0 or 1.
//
// Nothing here sleeps for a guessed time: every wait is for a condition, with a deadline.

import assert from "node:assert/strict";
import { once } from "node:events";

import {
  READERS,
  Test,
  bodies,
  checkLoad,
  manyRooms,
  more,
  newRoom,
  poll,
  refusal,
  returns,
  startLoad,
} from "./streams.mjs";
import { Nats, newName, nowSeconds, runScenarios, until, within } from "./support.mjs";

const CUTS = 20;
const KILLS = 3;
const TICKET_TTL = 3;
const SESSIONS = 6;
const MAX_ROOMS = 32;
const API_KEY = "a-key-of-the-server-api";
const CONFIG = `
[centrifugal]
api_key = "${API_KEY}"

[auth]
ticket_ttl = "${TICKET_TTL}s"
leeway = "1s"

[limits]
sessions_per_user = ${SESSIONS}

[namespaces.full]
durable = true
typing = true
presence = "users"
`;
/** A comment comes every 25 s. */
const COMMENT_DEADLINE = 40_000;
const SLOW_DEADLINE = 70_000;

// Events --------------------------------------------------------------------------------------------------------------

async function a_room_is_followed(t) {
  const room = newRoom();
  const native = await t.native();
  const events = await t.events(`/v1/rooms/${encodeURIComponent(room)}/events`);
  const joined = await events.event("joined");
  assert.deepEqual([joined.room, joined.replay, joined.cursor], [room, 0, joined.head]);
  assert.equal(events.retry, 1000);
  for (const [name, value] of [
    ["cache-control", "no-cache, no-transform"],
    ["x-accel-buffering", "no"],
    ["connection", "close"],
  ]) {
    assert.equal(events.headers.get(name), value);
  }
  await native.call("join", { room });
  await native.call("send", { room, id: "m1", body: { text: "안녕" }, mentions: ["kim"], reply_to: "kim/m0" });
  await native.call("send", { room, id: "m2", kind: "edit", target: "m1", body: [1, "\n"] });
  await events.untilMessages(2);
  await native.push("both messages", ({ id }) => id === "m2");
  const pushes = native.raw.frames.filter((frame) => JSON.parse(frame).op === "msg");
  assert.deepEqual(events.of("msg").map(({ text }) => text), pushes, "the same as with natter.v1, byte for byte");
  assert.deepEqual(events.all.map(({ id }) => id), [joined, ...events.messages()].map(({ cursor }) => cursor));
}

async function line_breaks_between_tokens_become_line_feeds(t) {
  const room = newRoom();
  const native = await t.native();
  const events = await t.events(`/v1/rooms/${room}/events`);
  await events.event("joined");
  native.raw.send(`{"op":"send","rid":900,"room":"${room}","body":{\n "a":\r\n [1,\r2]}}`);
  await events.untilMessages(1);
  assert.ok(events.of("msg")[0].text.includes('"body":{\n "a":\n\n [1,\n2]}'), events.of("msg")[0].text);
}

async function events_are_those_that_were_asked_for(t) {
  const room = newName("full:events-");
  const plain = await t.events(`/v1/rooms/${room}/events`);
  const all = await t.events(`/v1/rooms/${room}/events?presence=true&read=1`);
  for (const events of [plain, all]) await events.event("joined");
  const native = await t.native();
  await native.call("join", { room });
  await all.event("presence", ({ user, state }) => user === "ann" && state === "join");
  await native.call("typing", { room });
  const { cursor } = await native.call("send", { room, body: 1 });
  await (await t.native({ user: "lee" })).call("read", { room, cursor }); // the sender has read it already
  for (const events of [plain, all]) {
    await events.event("typing", ({ user }) => user === "ann");
    await events.untilMessages(1);
  }
  assert.equal((await all.event("read", ({ user }) => user === "lee")).cursor, cursor);
  await native.call("leave", { room });
  await all.event("presence", ({ user, state }) => user === "ann" && state === "leave");
  assert.deepEqual([...plain.of("presence"), ...plain.of("read")], []);
  for (const { id, name } of all.all) assert.equal(Boolean(id), ["joined", "msg"].includes(name), `the id of ${name}`);
}

async function several_rooms_are_one_stream(t) {
  const rooms = [newRoom(), newRoom(), newName("live:events-")];
  const native = await t.native();
  const events = await t.events(manyRooms([...rooms, rooms[0]]));
  await until("all rooms are joined", () => events.of("joined").length === 3);
  const say = async (body) => {
    for (const room of rooms) await native.call("send", { room, body });
  };
  for (const body of [1, 2]) await say(body);
  const heard = (messages, room) => bodies(messages.filter((message) => message.room === room));
  await events.untilMessages(6);
  for (const room of rooms) assert.deepEqual(heard(events.messages(), room), [1, 2]);
  const last = events.all.findLast(({ id }) => id).id;
  assert.match(last, /^[!-~]+$/, "an id that a header can't have");
  events.abort();
  await say(3);
  // On the other edge, in another order of rooms: by the header, in the URL, and by the header where both are there.
  const path = manyRooms([...rooms].reverse());
  for (const again of [
    await t.events(path, { edge: 1, last }),
    await t.events(`${path}&since=${encodeURIComponent(last)}`, { edge: 1 }),
    await t.events(`${path}&since=nonsense`, { edge: 1, last }),
  ]) {
    await until("all rooms are joined", () => again.of("joined").length === 3);
    for (const room of rooms.slice(0, 2)) {
      await until(`the message of ${room}`, () => heard(again.messages(), room).length > 0);
      assert.deepEqual(heard(again.messages(), room), [3]);
    }
    assert.deepEqual(heard(again.messages(), rooms[2]), [], "the ephemeral room has no past");
    assert.ok(again.of("joined").every(({ data }) => !data.reset));
  }
}

async function an_id_resumes_on_the_other_edge(t) {
  const room = newRoom();
  const native = await t.native();
  const first = await t.events(`/v1/rooms/${room}/events`);
  await first.event("joined");
  for (const body of [1, 2, 3]) await native.call("send", { room, body });
  await first.untilMessages(3);
  first.abort();
  for (const body of [4, 5]) await native.call("send", { room, body });
  const [joined, one, , three] = first.all.map(({ id }) => id);
  for (const [last, path, expected] of [
    [three, "", [4, 5]],
    [one, "", [2, 3, 4, 5]],
    [joined, "", [1, 2, 3, 4, 5]],
    [undefined, `?since=${three}`, [4, 5]],
    [three, "?since=nonsense", [4, 5]], // the header goes before
  ]) {
    const again = await t.events(`/v1/rooms/${room}/events${path}`, { edge: 1, last });
    const { replay, reset } = await again.event("joined");
    assert.deepEqual([replay, reset], [expected.length, undefined]);
    assert.deepEqual(bodies(await again.untilMessages(expected.length)), expected);
    again.abort();
  }
}

async function what_can_not_be_resumed_is_reset(t) {
  const room = newRoom();
  const native = await t.native();
  const { cursor } = await native.call("send", { room, body: 1 });
  const [region, epoch, ...rest] = cursor.split(".");
  const other = [region, `${epoch.slice(0, -1)}${epoch.endsWith("a") ? "b" : "a"}`, ...rest].join(".");
  const events = await t.events(`/v1/rooms/${room}/events`, { last: other });
  const joined = await events.event("joined");
  assert.deepEqual([joined.reset, joined.reason, joined.replay], [true, "epoch", 0]);
  const polled = await t.poll(room, other);
  assert.deepEqual([polled.reset, polled.reason, polled.messages, polled.cursor], [true, "epoch", [], joined.cursor]);
}

// Polls ---------------------------------------------------------------------------------------------------------------

async function polls_wait_for_messages(t) {
  const room = newRoom();
  const native = await t.native();
  const { cursor } = await t.poll(room);
  assert.deepEqual(await t.poll(room, cursor, { more: "&wait=1ms" }), { cursor, messages: [] });
  const waiting = t.poll(room, cursor);
  await native.call("join", { room });
  await native.call("send", { room, id: "m1", body: { a: 1 } });
  const answer = await waiting;
  await native.push("the message", ({ id }) => id === "m1");
  const push = native.raw.frames.find((frame) => JSON.parse(frame).id === "m1");
  assert.ok(answer.text.includes(push), "the same as with natter.v1, byte for byte");
  assert.deepEqual([answer.room, answer.messages.length, answer.cursor], [room, 1, answer.messages[0].cursor]);
  // What is already there is answered at once, on the other edge too.
  for (const body of [2, 3]) await native.call("send", { room, body });
  const more = await t.poll(room, answer.cursor, { edge: 1 });
  assert.deepEqual(bodies(more.messages), [2, 3]);
  assert.deepEqual(bodies((await t.poll(room, cursor, { edge: 1 })).messages), [{ a: 1 }, 2, 3]);
}

async function a_large_backlog_takes_several_polls(t) {
  const room = newRoom();
  const native = await t.native();
  let { cursor } = await t.poll(room);
  const count = 40;
  for (let number = 0; number < count; number++) await native.call("send", { room, body: [number, "x".repeat(60_000)] });
  const got = [];
  let polls = 0;
  for (; got.length < count; polls++) {
    const answer = await t.poll(room, cursor, { edge: polls % 2 });
    assert.ok(answer.messages.length > 0, "an answer without messages");
    got.push(...answer.messages.map(({ body: [number] }) => number));
    ({ cursor } = answer);
  }
  assert.deepEqual(got, [...Array(count).keys()]);
  assert.ok(polls > 1, "2.4 MB in one answer");
}

// Tickets -------------------------------------------------------------------------------------------------------------

async function a_ticket_stands_for_the_token(t) {
  const room = newRoom();
  const native = await t.native();
  const token = t.token("kim", { rooms: "chat:*" });
  const { ticket, expires_in } = await t.ticket({ token });
  assert.equal(expires_in, TICKET_TTL);
  const began = Date.now();
  const query = `?ticket=${encodeURIComponent(ticket)}`;
  const streams = [];
  for (const edge of [0, 1]) {
    streams.push(await t.events(`/v1/rooms/${room}/events${query}`, { edge, token: null }));
    const { cursor } = await poll(t.url(`/v1/rooms/${room}/poll${query}`, edge));
    assert.ok(cursor);
    assert.deepEqual(await refusal(t.url(`/v1/rooms/live:x/events${query}`, edge)), [403, "forbidden"]);
  }
  // It ends; the streams go on.
  for (const edge of [0, 1]) {
    const url = t.url(`/v1/rooms/${room}/poll${query}`, edge);
    await until("the end of the ticket", async () => (await fetch(url)).status === 401);
    assert.deepEqual(await refusal(url), [401, "unauthorized"]);
    assert.deepEqual(await refusal(t.url(`/v1/rooms/${room}/events${query}`, edge)), [401, "unauthorized"]);
  }
  assert.ok(Date.now() - began >= TICKET_TTL * 1000 - 500, "it ended too early");
  await native.call("send", { room, body: "still here" });
  for (const stream of streams) assert.deepEqual(bodies(await stream.untilMessages(1)), ["still here"]);
}

// Refusals ------------------------------------------------------------------------------------------------------------

async function what_is_not_allowed_is_refused(t) {
  const token = t.token("kim", { rooms: "chat:*", can: ["read"] });
  const many = (count) => manyRooms([...Array(count).keys()].map((number) => `chat:room-${number}`));
  const last = (id) => ({ headers: { authorization: `Bearer ${token}`, "last-event-id": id } });
  const [events, polls] = ["/v1/rooms/chat:a/events", "/v1/rooms/chat:a/poll"];
  for (const [expected, path, options] of [
    [[400, "bad_cursor"], `${events}?since=nonsense`],
    [[400, "bad_cursor"], events, last("nonsense")],
    [[400, "bad_cursor"], events, last("\u00e9")],
    [[400, "bad_cursor"], `${manyRooms(["chat:a", "chat:b"])}&since=nonsense`],
    [[400, "bad_cursor"], `${manyRooms(["chat:a", "chat:b"])}&since=chat:a~nonsense`],
    [[400, "bad_cursor"], `${polls}?since=nonsense`],
    [[400, "bad_room"], "/v1/rooms/chat:a%20b/events"],
    [[400, "bad_room"], "/v1/rooms/nonsense/poll"],
    [[400, "bad_room"], manyRooms(["chat:a", "nonsense"])],
    [[400, "bad_request"], "/v1/events"],
    [[429, "limit"], many(MAX_ROOMS + 1)],
    [[400, "bad_request"], `${events}?presence=maybe`],
    [[400, "bad_request"], `${polls}?wait=soon`],
    [[400, "bad_request"], `${polls}?wait=25`],
    [[401, "unauthorized"], events, { headers: {} }],
    [[401, "unauthorized"], polls, { headers: {} }],
    [[401, "unauthorized"], events, { headers: { authorization: "Bearer nonsense" } }],
    [[401, "unauthorized"], `${events}?ticket=nonsense`, { headers: {} }],
    [[401, "unauthorized"], `${events}?ticket=a%20b.${"0".repeat(32)}`, { headers: {} }],
    [[401, "unauthorized"], `${polls}?ticket=${t.up.edge(0).id}.${"0".repeat(32)}`, { headers: {} }],
    [[401, "unauthorized"], "/v1/tickets", { method: "POST", headers: {} }],
    [[403, "forbidden"], "/v1/rooms/live:a/events"],
    [[403, "forbidden"], manyRooms(["chat:a", "live:a"])],
    [[403, "forbidden"], `${events}?presence=true`],
    [[404, "unknown_namespace"], "/v1/rooms/nowhere:a/events"],
    [[404, "unknown_namespace"], "/v1/rooms/nowhere:a/poll"],
    [[405, ""], events, { method: "HEAD" }],
    [[405, ""], polls, { method: "HEAD" }],
    [[405, ""], manyRooms(["chat:a"]), { method: "HEAD" }],
    [[405, ""], events, { method: "POST" }],
  ]) {
    const got = await refusal(t.url(path), token, options);
    const what = `${options?.method ?? "GET"} ${path} ${JSON.stringify(options?.headers ?? {})}`.slice(0, 200);
    if (expected[1] === "") assert.equal(got[0], expected[0], what);
    else assert.deepEqual(got, expected, what);
  }
  const ephemeral = await refusal(t.url("/v1/rooms/live:a/poll"), t.token("kim"));
  assert.deepEqual(ephemeral, [400, "bad_request"]);
  const most = await t.events(many(MAX_ROOMS), { token });
  await until("all rooms are joined", () => most.of("joined").length === MAX_ROOMS);
}

async function a_user_has_so_many_sessions(t) {
  const room = newRoom();
  const user = newName("user-");
  const token = t.token(user);
  const streams = [];
  for (let number = 0; number < SESSIONS; number++) streams.push(await t.events(`/v1/rooms/${room}/events`, { token }));
  for (const path of ["events", "poll"]) {
    assert.deepEqual(await refusal(t.url(`/v1/rooms/${room}/${path}`), token), [429, "limit"]);
  }
  streams[0].abort();
  await until("a place that is free again", async () => (await fetch(t.url(`/v1/rooms/${room}/poll`), {
    headers: { authorization: `Bearer ${token}` },
  })).status === 204);
}

/** All places of a user but one are taken by streams, the last one by a poll; resolves when that waits. */
async function waitingPoll(t, user, room, paths, { wait, signal }) {
  const streams = [];
  for (let number = 1; number < SESSIONS; number++) streams.push(await t.events(paths[number % paths.length], { user }));
  for (const stream of streams) await stream.event("joined");
  const { cursor } = await t.poll(room, undefined, { user });
  const url = t.url(`/v1/rooms/${room}/poll`);
  const headers = { authorization: `Bearer ${t.token(user)}` };
  // It may find its place taken by one of those that look whether it waits.
  const answer = until("the answer of the waiting poll", async () => {
    const got = await fetch(`${url}?since=${cursor}&wait=${wait}`, { headers, signal });
    return got.status !== 429 && got;
  });
  answer.catch(() => {}); // awaited later
  const isFree = async () => (await fetch(url, { headers })).status !== 429;
  await until("the waiting poll", async () => !(await isFree()));
  return { streams, cursor, answer, isFree };
}

/** At the latest when its time is over. */
async function a_poll_that_is_given_up_leaves_its_place(t) {
  const room = newRoom();
  const given = new AbortController();
  const paths = [`/v1/rooms/${room}/events`];
  const { answer, isFree } = await waitingPoll(t, newName("user-"), room, paths, { wait: "8s", signal: given.signal });
  given.abort();
  await assert.rejects(answer, { name: "AbortError" });
  await until("a free place", isFree);
}

async function a_room_that_can_not_be_joined_is_refused(t) {
  const room = newRoom();
  await t.up.withFrozenNats(async () => {
    const streams = [
      await t.events(`/v1/rooms/${room}/events`),
      await t.events(manyRooms([room, newRoom()])),
    ];
    for (const stream of streams) {
      const { code, retry } = await stream.event("refused");
      assert.deepEqual([code, retry], ["unavailable", true]);
      assert.equal((await stream.over()).name, "close");
    }
    // A room that is not known here: it can't be joined either.
    assert.deepEqual(await refusal(t.url(`/v1/rooms/${newRoom()}/poll`), t.token("kim")), [503, "unavailable"]);
    return () => {};
  });
  await until("NATS is back", async () => (await fetch(t.url("/readyz"))).status === 200);
}

// The end of a stream --------------------------------------------------------------------------------------------------

async function revoked_tokens_end_it(t) {
  const room = newRoom();
  const user = newName("user-");
  const token = t.token(user);
  const streams = [
    await t.events(`/v1/rooms/${room}/events`, { token }),
    await t.events(manyRooms([room, newRoom()]), { token, edge: 1 }),
  ];
  const { cursor } = await t.poll(room);
  const waiting = refusal(t.url(`/v1/rooms/${room}/poll?since=${cursor}&wait=5s`), token);
  await t.up.run("revoke", "--user", user);
  for (const stream of streams) {
    assert.deepEqual((await stream.over()).data, { op: "close", code: 4002, reason: "revoked" });
  }
  assert.deepEqual(await waiting, [401, "unauthorized"]);
  assert.deepEqual(await refusal(t.url(`/v1/rooms/${room}/events`), token), [401, "unauthorized"]);
}

async function a_back_end_ends_it(t) {
  const user = newName("user-");
  const api = async (method, fields) => {
    const options = { method: "POST", headers: { "X-API-Key": API_KEY }, body: JSON.stringify({ user, ...fields }) };
    const answer = await within(fetch(t.url(`/api/${method}`), options), method);
    assert.deepEqual(await answer.json(), { result: {} });
  };
  const [room, other] = [newRoom(), newRoom()];
  const native = await t.native();
  const stream = await t.events(manyRooms([other, room]), { user });
  for (const name of [other, room]) await stream.event("joined", (joined) => joined.room === name);
  await api("unsubscribe", { channel: room });
  assert.deepEqual(await stream.event("kicked"), { op: "kicked", room, code: "removed" });
  for (const name of [room, other]) await native.call("send", { room: name, body: 1 });
  assert.deepEqual((await stream.untilMessages(1)).map((message) => message.room), [other], "without that room");
  await api("disconnect");
  assert.deepEqual((await stream.over()).data, { op: "close", code: 4006, reason: "disconnected" });
}

async function expired_tokens_end_it(t) {
  const stream = await t.events(`/v1/rooms/${newRoom()}/events`, { token: t.token("kim", { ttl: 2 }) });
  const { exp } = await stream.event("token_expiring");
  assert.ok(Math.abs(exp - nowSeconds()) < 5, `exp ${exp}`);
  assert.deepEqual((await stream.over()).data, { op: "close", code: 4001, reason: "token_expired" });
}

/** A request may come right after another one, and nothing comes after it. */
async function a_stream_is_the_last_answer_of_its_connection(t) {
  const head = `Host: natter\r\nAuthorization: Bearer ${t.token("kim")}\r\n\r\n`;
  const request = `GET /v1/rooms/${newRoom()}/events HTTP/1.1\r\n${head}`;
  for (const [deed, code, reason] of [
    [(socket) => socket.write(request), 4004, "protocol_error"],
    [(socket) => socket.end(), 1000, "closed"],
  ]) {
    const socket = await t.socket();
    let said = "";
    socket.on("data", (data) => (said += data));
    socket.write(`GET /healthz HTTP/1.1\r\n${head}${request}`);
    await until("the first event", () => said.includes("event: joined\n"), { last: () => said });
    assert.match(said, /^HTTP\/1.1 200 OK\r\n.*ok\nHTTP\/1.1 200 OK\r\n.*text\/event-stream/s);
    deed(socket);
    await within(once(socket, "end"), "the end");
    const last = `event: close\ndata: {"op":"close","code":${code},"reason":"${reason}"}\n\n`;
    assert.ok(said.endsWith(last), said);
  }
}

async function a_stream_outlives_a_pause_of_nats(t) {
  const room = newRoom();
  const native = await t.native();
  const events = await t.events(`/v1/rooms/${room}/events`);
  await events.event("joined");
  const { cursor } = await t.poll(room);
  const waiting = t.poll(room, cursor);
  await t.up.withFrozenNats(async () => {
    const sent = native.call("send", { room, body: "late" });
    return async () => sent;
  });
  assert.deepEqual(bodies(await events.untilMessages(1)), ["late"]);
  assert.deepEqual(bodies((await waiting).messages), ["late"]);
}

async function slow_readers_are_closed(t) {
  const room = newRoom();
  const user = newName("slow-");
  const native = await t.native();
  const socket = await t.socket();
  socket.write(`GET /v1/rooms/${room}/events HTTP/1.1\r\nHost: natter\r\nAuthorization: Bearer ${t.token(user)}\r\n\r\n`);
  const there = async () => (await native.call("presence", { room })).users.some((one) => one.user === user);
  await until("the slow reader in the room", there);
  socket.pause();
  let sent = 0;
  await until("the end of the slow reader", async () => {
    for (let at = 0; at < 20; at++, sent++) await native.call("send", { room, body: "x".repeat(60 * 1024) });
    return !(await there());
  }, { deadline: SLOW_DEADLINE, last: () => `(after ${sent} messages)` });
}

async function an_edge_that_drains_says_so(t) {
  const room = newRoom();
  const paths = [`/v1/rooms/${room}/events`, manyRooms([room, newRoom()])];
  const { streams, cursor, answer } = await waitingPoll(t, newName("user-"), room, paths, { wait: "60s" });
  await t.up.killEdge(0, "SIGTERM");
  for (const stream of streams) {
    const reconnect = await stream.event("reconnect");
    assert.ok(Number.isInteger(reconnect.after_ms), JSON.stringify(reconnect));
    assert.deepEqual((await stream.over()).data, { op: "close", code: 4010, reason: "draining" });
  }
  const { status, headers } = await answer;
  assert.deepEqual([status, headers.get("cursor")], [204, cursor]);
}

/** The streams of NATS are lost, and made again. */
async function a_log_that_begins_anew_ends_it(t) {
  const rooms = [newRoom(), newRoom()];
  const native = await t.native();
  const streams = [await t.events(`/v1/rooms/${rooms[0]}/events`), await t.events(manyRooms(rooms))];
  for (const [at, stream] of streams.entries()) await until("all rooms are joined", () => stream.of("joined").length > at);
  for (const room of rooms) await native.call("send", { room, body: 1 });
  await streams[0].untilMessages(1);
  await streams[1].untilMessages(2);
  const [{ id: last }, { id: lastOfAll }] = streams.map((stream) => stream.all.at(-1));
  const nats = await Nats.connect(t.up.nats());
  t.closing.push(() => nats.close());
  const { streams: names } = await nats.request("$JS.API.STREAM.NAMES");
  for (const name of names.filter((one) => one.startsWith("ROOMS_"))) await nats.request(`$JS.API.STREAM.DELETE.${name}`);
  await t.up.run("provision");
  for (const room of rooms) await native.call("send", { room, body: 2 });
  for (const stream of streams) {
    const kicked = await stream.event("kicked");
    assert.deepEqual([rooms.includes(kicked.room), kicked.code], [true, "reset"]);
    assert.deepEqual((await stream.over()).data, { op: "close", code: 1001, reason: "going_away" });
  }
  const again = await t.events(`/v1/rooms/${rooms[0]}/events`, { last });
  const joined = await again.event("joined");
  assert.deepEqual([joined.reset, joined.reason], [true, "epoch"]);
  const all = await t.events(manyRooms(rooms), { last: lastOfAll });
  await until("all rooms are joined", () => all.of("joined").length === 2);
  for (const { data } of all.of("joined")) assert.deepEqual([data.reset, data.reason], [true, "epoch"]);
  assert.deepEqual([(await t.poll(rooms[0], last)).reason], ["epoch"]);
}

// Nothing is lost -----------------------------------------------------------------------------------------------------

function cut_connections_lose_nothing(way) {
  return async (t) => {
    const rooms = [...Array(way.rooms)].map(newRoom);
    const relay = await t.relay();
    const reader = await way.start(t, () => relay.address, rooms);
    t.closing.push(() => reader.close());
    const load = await startLoad(t, rooms);
    for (let cut = 1; cut <= CUTS; cut++) {
      await more(reader, 5, `live messages before cut ${cut}`);
      const before = returns(reader);
      relay.cut();
      await load.more(10);
      if (reader.failed !== undefined) await until(`poll ${cut} that is cut`, () => returns(reader) > before);
      relay.open(t.up.address(cut % 2)); // now this edge, now the other
      await more(reader, 1, `messages after cut ${cut}`);
    }
    await load.stop();
    await checkLoad(load, reader);
    assert.ok(returns(reader) >= CUTS, `it came back ${returns(reader)} times`);
  };
}

function killed_edges_lose_nothing(way) {
  return async (t) => {
    const rooms = [...Array(way.rooms)].map(newRoom);
    const reader = await way.start(t, () => t.up.address(0), rooms);
    t.closing.push(() => reader.close());
    const load = await startLoad(t, rooms);
    for (let kill = 1; kill <= KILLS; kill++) {
      await more(reader, 5, `live messages before kill ${kill}`);
      await t.up.killEdge(0);
      await more(reader, 1, `messages after kill ${kill}`);
    }
    await load.stop();
    await checkLoad(load, reader);
    assert.ok(returns(reader) >= KILLS, `it came back ${returns(reader)} times`);
  };
}

// -----------------------------------------------------------------------------------------------------------------------

/** Begun first and awaited last. On the second edge, because the first is killed meanwhile. */
async function an_idle_stream_has_comments(t) {
  const room = newRoom();
  const stream = await t.events(`/v1/rooms/${room}/events`, { edge: 1 });
  await until("a comment", () => stream.comments > 0, { deadline: COMMENT_DEADLINE });
  await until("a second comment", () => stream.comments > 1, { deadline: COMMENT_DEADLINE }); // it asks for no answer
  assert.equal(stream.end, undefined);
}

const SCENARIOS = [
  a_room_is_followed,
  line_breaks_between_tokens_become_line_feeds,
  events_are_those_that_were_asked_for,
  several_rooms_are_one_stream,
  an_id_resumes_on_the_other_edge,
  what_can_not_be_resumed_is_reset,
  polls_wait_for_messages,
  a_large_backlog_takes_several_polls,
  a_ticket_stands_for_the_token,
  what_is_not_allowed_is_refused,
  a_user_has_so_many_sessions,
  a_poll_that_is_given_up_leaves_its_place,
  a_room_that_can_not_be_joined_is_refused,
  a_stream_outlives_a_pause_of_nats,
  a_stream_is_the_last_answer_of_its_connection,
  revoked_tokens_end_it,
  a_back_end_ends_it,
  expired_tokens_end_it,
  slow_readers_are_closed,
  ...[cut_connections_lose_nothing, killed_edges_lose_nothing].flatMap((test) =>
    Object.entries(READERS).map(([name, way]) => named(`${test.name}: ${name}`, test(way)))),
  an_edge_that_drains_says_so,
];
const LONG = [an_idle_stream_has_comments];
const LAST = [a_log_that_begins_anew_ends_it];

function named(name, scenario) {
  return Object.defineProperty(scenario, "name", { value: name });
}

process.exit(await runScenarios("events.mjs", { Test, config: CONFIG, scenarios: SCENARIOS, long: LONG, last: LAST }));
