// Rooms and the outbox: SIMULATED sockets and an edge of a few lines, a fake clock.

import assert from "node:assert/strict";
import { test } from "node:test";

import { fakeClient, fakeRoom, fakeTime, settle, tick, tokenOf } from "./fake.mjs";

const ROOM = "chat:lobby";

/** A client in a room of a fake edge. */
async function inRoom(options, edge = fakeRoom(ROOM)) {
  const answers = {
    join: (frame, socket) => edge.join(frame, socket),
    send: (frame, socket) => edge.send(frame, socket),
    leave: () => ({ op: "left", room: ROOM }),
    read: (frame) => ({ op: "ok", cursor: frame.cursor }),
  };
  const made = fakeClient(options, answers);
  const room = made.client.room(ROOM);
  const heard = [];
  const events = [];
  room.on("message", ({ id }) => (heard.push(id), events.push(id)));
  room.on("reset", ({ reason, since, cursor }) => events.push({ reset: reason, since, cursor }));
  const joined = room.join();
  const socket = await made.connected();
  await joined;
  const reconnect = async (code = 1006) => {
    made.sockets.at(-1).end(code);
    await tick(Math.max(0, made.client.state.retryAt - Date.now()) + 50);
    const next = await made.connected();
    await settle();
    return next;
  };
  return { ...made, room, heard, events, edge, socket, reconnect };
}

/** A Storage in memory. */
function fakeStorage() {
  const entries = new Map();
  return {
    entries,
    get length() {
      return entries.size;
    },
    key: (at) => [...entries.keys()][at] ?? null,
    getItem: (key) => entries.get(key) ?? null,
    setItem: (key, value) => void entries.set(key, String(value)),
    removeItem: (key) => void entries.delete(key),
  };
}

test("it resumes after the last message, in order, and hands each out once", async (t) => {
  fakeTime(t);
  const { room, heard, edge, socket, reconnect } = await inRoom();
  socket.push(edge.say("lee", "a"));
  socket.push(edge.say("lee", "b"));
  socket.push(edge.log[1]); // twice, as docs/guarantees.md says it may be
  edge.say("lee", "c");
  edge.say("lee", "d");
  const next = await reconnect();
  assert.equal(next.commands("join")[0].since, edge.cursor(2));
  assert.deepEqual(heard, ["a", "b", "c", "d"]);
  assert.equal(room.cursor, edge.cursor(4));
  assert.equal(room.state.name, "joined");
});

test("messages behind the reply in the same turn find the room joined", async (t) => {
  fakeTime(t);
  const edge = fakeRoom(ROOM);
  const made = fakeClient();
  const room = made.client.room(ROOM);
  const heard = [];
  room.on("message", ({ id }) => heard.push(id));
  room.join({ since: edge.cursor(0) });
  const socket = await made.connected();
  const [{ rid }] = socket.commands("join");
  socket.push({ op: "joined", rid, room: ROOM, cursor: edge.cursor(0), head: edge.cursor(2), replay: 2 });
  socket.push(edge.say("lee", "a"));
  socket.push(edge.say("lee", "b"));
  assert.deepEqual(heard, ["a", "b"]);
});

test("asking for presence later neither loses nor repeats a message", async (t) => {
  fakeTime(t);
  const { room, heard, edge, socket, answers } = await inRoom();
  answers.join = () => null;
  const release = room.hold({ presence: true });
  const again = socket.commands("join")[1];
  assert.equal(again.presence, true);
  socket.push(edge.say("lee", "a")); // still for the membership that there was
  socket.push({ rid: again.rid, ...edge.join(again, socket) });
  socket.push(edge.say("lee", "b"));
  await settle();
  assert.deepEqual(heard.sort(), ["a", "b"]);
  assert.equal(room.state.name, "joined");
  release();
});

test("a namespace without presence is joined without it", async (t) => {
  fakeTime(t);
  const made = fakeClient({}, {
    join: (frame) => (frame.presence ? { op: "error", code: "bad_request", message: "no presence here" } : { op: "joined", room: ROOM, replay: 0 }),
  });
  const joined = made.client.room(ROOM).join({ presence: true });
  await made.connected();
  assert.equal((await joined).room, ROOM);
});

test("a reset is told between what is before and what comes after", async (t) => {
  fakeTime(t);
  const { events, edge, socket, answers, reconnect, room } = await inRoom();
  socket.push(edge.say("lee", "a"));
  answers.join = (frame, to) => {
    queueMicrotask(() => queueMicrotask(() => to.push(edge.say("lee", "z"))));
    return { op: "joined", room: ROOM, cursor: "r.e1.9.0", head: "r.e1.9.0", replay: 0, reset: true, reason: "trimmed" };
  };
  await reconnect();
  await settle();
  assert.deepEqual(events, ["a", { reset: "trimmed", since: edge.cursor(1), cursor: "r.e1.9.0" }, "z"]);
  const iterated = room.listen();
  const first = iterated.next();
  socket.push({}); // of the old socket: not heard
  await reconnect();
  const { value } = await first;
  assert.deepEqual([value.kind, value.from, value.body.reason], ["reset", "$natter", "trimmed"]);
});

test("a cursor that the edge can't read is a reset, and the room is joined at its head", async (t) => {
  fakeTime(t);
  const edge = fakeRoom(ROOM);
  const made = fakeClient({}, {
    join: (frame, socket) => (frame.since === "nonsense" ? { op: "error", code: "bad_cursor", message: "" } : edge.join(frame, socket)),
  });
  const room = made.client.room(ROOM);
  const resets = [];
  room.on("reset", (reset) => resets.push(reset));
  const joined = room.join({ since: "nonsense" });
  await made.connected();
  assert.equal((await joined).cursor, edge.cursor(0));
  assert.deepEqual(resets, [{ reason: "bad_cursor", since: "nonsense" }]);
});

test("kicked: reset joins again from the cursor; all others are out, until somebody joins", async (t) => {
  fakeTime(t);
  const { room, socket, edge, reconnect } = await inRoom();
  socket.push(edge.say("lee", "a"));
  socket.push({ op: "kicked", room: ROOM, code: "reset" });
  assert.equal(socket.commands("join").at(-1).since, edge.cursor(1));
  await settle();
  assert.equal(room.state.name, "joined");
  socket.push({ op: "kicked", room: ROOM, code: "banned" });
  assert.deepEqual([room.state.name, room.state.code], ["out", "banned"]);
  const next = await reconnect();
  assert.equal(next.commands("join").length, 0);
  await room.join();
  assert.equal(room.state.name, "joined");
});

test("a join that is refused for now is repeated, one that is refused for good rejects", async (t) => {
  fakeTime(t);
  let asked = 0;
  const made = fakeClient({}, {
    join: () => (asked++ < 2 ? { op: "error", code: "unavailable", message: "", retry: true } : { op: "error", code: "forbidden", message: "no" }),
  });
  const joined = made.client.room(ROOM).join();
  await made.connected();
  joined.catch(() => {});
  await tick(5_000);
  await assert.rejects(joined, { code: "forbidden" });
  assert.equal(asked, 3);
});

test("leave and hold: the room is left when nobody holds it, a second later", async (t) => {
  fakeTime(t);
  const { room, socket } = await inRoom();
  const one = room.hold();
  room.leave();
  assert.equal(room.state.name, "joined");
  one();
  const two = room.hold(); // a page that changes
  await tick(2_000);
  assert.equal(socket.commands("leave").length, 0);
  two();
  two();
  await tick(2_000);
  assert.equal(socket.commands("leave").length, 1);
  assert.equal(room.state.name, "idle");
});

// The outbox ----------------------------------------------------------------------------------------------------------------

test("messages are stored in the order in which they were written, whatever fails", async (t) => {
  fakeTime(t);
  const { room, edge, answers, reconnect } = await inRoom();
  let turn = 0;
  const send = answers.send;
  answers.send = (frame, socket) => {
    turn += 1;
    if (turn % 3 === 0) return { op: "error", code: "unavailable", message: "", retry: true };
    if (turn % 4 === 0) return (edge.send(frame, socket), null); // stored, and the answer is lost
    return send(frame, socket);
  };
  const handles = Array.from({ length: 12 }, (_, i) => room.send(i));
  for (let i = 0; i < 60 && handles.some(({ state }) => state !== "sent"); i += 1) {
    await tick(500);
    if (i % 5 === 4) await reconnect();
  }
  assert.deepEqual(handles.map(({ state }) => state), Array(12).fill("sent"));
  assert.deepEqual(edge.log.map(({ body }) => body), [...Array(12).keys()]);
  assert.deepEqual(edge.log.map(({ id }) => id), handles.map(({ id }) => id));
});

test("what is written without a connection is sent with it, with the same id on every try", async (t) => {
  fakeTime(t);
  const { room, edge, socket, answers, connected, reconnect } = await inRoom();
  socket.end(1006);
  const handle = room.send("hello", { id: "own-id", reply_to: { from: "lee", id: "m1" }, mentions: ["lee"] });
  assert.equal(handle.state, "pending");
  answers.send = () => null; // never answered
  await tick(200);
  await connected();
  const ids = [];
  for (let i = 0; i < 3; i += 1) ids.push(...(await reconnect()).commands("send").map(({ id }) => id));
  answers.send = (frame, to) => edge.send(frame, to);
  const last = await reconnect();
  ids.push(...last.commands("send").map(({ id }) => id));
  assert.deepEqual(ids, Array(4).fill("own-id"));
  assert.equal((await handle.done).id, "own-id");
  assert.deepEqual(edge.log.map(({ from, id, body, reply_to, mentions }) => ({ from, id, body, reply_to, mentions })), [
    { from: "kim", id: "own-id", body: "hello", reply_to: "lee/m1", mentions: ["lee"] },
  ]);
});

test("a message whose answer was lost is recognised in the backlog, and not sent again", async (t) => {
  fakeTime(t);
  const { room, edge, answers, socket, heard, reconnect } = await inRoom();
  answers.send = (frame) => {
    edge.say("kim", frame.id, { body: frame.body }); // stored; then the edge dies
    return null;
  };
  const handle = room.send("hello");
  await settle();
  assert.equal(socket.commands("send").length, 1);
  const next = await reconnect();
  assert.equal(handle.state, "sent");
  assert.equal(handle.ack.cursor, edge.cursor(1));
  assert.equal(next.commands("send").length, 0);
  assert.deepEqual(heard, [handle.id]);
});

test("a refused message fails, the next one goes on, and retry sends it with its id", async (t) => {
  fakeTime(t);
  const { room, edge, answers, client } = await inRoom();
  const send = answers.send;
  answers.send = (frame, socket) => (frame.body === "bad" ? { op: "error", code: "forbidden", message: "muted" } : send(frame, socket));
  const [bad, good] = [room.send("bad"), room.send("good")];
  const seen = [];
  bad.on("state", ({ state }) => seen.push(state));
  await good.done;
  await assert.rejects(bad.done, { code: "forbidden", message: "muted" });
  assert.deepEqual(client.outbox.of(ROOM), [bad]);
  answers.send = send;
  bad.retry();
  assert.equal((await bad.done).id, bad.id);
  assert.deepEqual(seen, ["failed", "pending", "sent"]);
  assert.deepEqual(edge.log.map(({ id }) => id), [good.id, bad.id]);
  assert.deepEqual(client.outbox.rooms(), []);
});

test("a reaction that is refused is over; a cancelled message is not sent", async (t) => {
  fakeTime(t);
  const { room, client, answers, socket } = await inRoom();
  answers.send = () => ({ op: "error", code: "rate_limited", message: "slow", retry: true, retry_after_ms: 4_000 });
  const waiting = room.send("later");
  const next = room.send("next");
  await settle();
  assert.deepEqual([waiting.state, waiting.error.code], ["pending", "rate_limited"]);
  answers.send = (frame) => (frame.kind ? { op: "error", code: "bad_id", message: "" } : { op: "ack", room: ROOM, id: frame.id, ts: 1, dup: false });
  waiting.cancel();
  await assert.rejects(waiting.done, { code: "canceled" });
  await next.done;
  const reaction = room.react("lee/m1", "👍");
  await assert.rejects(reaction.done, { code: "bad_id" });
  assert.deepEqual(client.outbox.rooms(), []);
  assert.deepEqual(socket.commands("send").map(({ id }) => id), [waiting.id, next.id, reaction.id]);
  assert.deepEqual(socket.commands("send")[2].body, { key: "👍" });
});

test("slow mode: a short wait is waited, a long one fails and says so", async (t) => {
  fakeTime(t);
  const { room, answers } = await inRoom();
  let wait = 3_000;
  let tries = 0;
  answers.send = (frame) => {
    tries += 1;
    return tries === 2 ? { op: "ack", room: ROOM, id: frame.id, ts: 1, dup: false } : { op: "error", code: "rate_limited", message: "", retry: true, retry_after_ms: wait };
  };
  const short = room.send("a");
  await tick(2_900);
  assert.equal(tries, 1);
  await tick(200);
  assert.equal(short.state, "sent");
  wait = 60_000;
  const long = room.send("b");
  await settle();
  assert.deepEqual([long.state, long.error.code, long.error.retryAfterMs], ["failed", "rate_limited", 60_000]);
});

test("the outbox survives a reload: in order, with its ids, and only for its user", async (t) => {
  fakeTime(t);
  const storage = fakeStorage();
  const edge = fakeRoom(ROOM);
  const before = await inRoom({ storage }, edge);
  before.answers.send = (frame) => (frame.body === "one" ? (edge.say("kim", frame.id, { body: "one" }), null) : null);
  const written = ["one", "two", "three"].map((body) => before.room.send(body));
  assert.ok(written.every(({ stored }) => stored));
  await settle();
  before.client.close();
  assert.equal(storage.length, 3);

  const lee = fakeClient({ storage, token: tokenOf({ sub: "lee" }) });
  assert.deepEqual(lee.client.outbox.rooms(), []);

  const after = await inRoom({ storage, token: undefined, getToken: async () => tokenOf({ sub: "kim" }) }, edge);
  await tick(1_000);
  assert.deepEqual(edge.log.map(({ body }) => body), ["one", "two", "three"]);
  assert.deepEqual(edge.log.map(({ id }) => id), written.map(({ id }) => id));
  assert.equal(storage.length, 0);
  assert.deepEqual(after.client.outbox.rooms(), []);
});

test("a failed message is failed after a reload; what can't be read is dropped; a full storage is no obstacle", async (t) => {
  fakeTime(t);
  const storage = fakeStorage();
  const first = await inRoom({ storage });
  first.answers.send = () => ({ op: "error", code: "too_large", message: "large" });
  const handle = first.room.send("x");
  await settle();
  first.client.close();
  storage.setItem("natter.outbox.kim/chat:lobby/cut", "{\"room\":");
  const second = await inRoom({ storage });
  const [restored] = second.client.outbox.of(ROOM);
  assert.deepEqual([restored.id, restored.state, restored.error.code], [handle.id, "failed", "too_large"]);
  assert.equal(storage.getItem("natter.outbox.kim/chat:lobby/cut"), null);
  assert.equal(second.socket.commands("send").length, 0);
  restored.cancel();
  assert.equal(storage.length, 0);
  storage.setItem = () => {
    throw new Error("QuotaExceededError");
  };
  const sent = second.room.send("y");
  assert.equal(sent.stored, false);
  await sent.done;
});

test("a send connects, and needs no join", async (t) => {
  fakeTime(t);
  const edge = fakeRoom(ROOM);
  const { client, connected } = fakeClient({}, { send: (frame, socket) => edge.send(frame, socket) });
  const handle = client.room(ROOM).send("x");
  assert.equal(client.state.name, "connecting");
  const socket = await connected();
  await handle.done;
  assert.equal(socket.commands("join").length, 0);
});

test("the outbox has an end", async (t) => {
  fakeTime(t);
  const { client } = fakeClient();
  const handles = Array.from({ length: 1_001 }, () => client.room(ROOM).send("x"));
  assert.equal(handles[999].state, "pending");
  await assert.rejects(handles[1_000].done, { code: "outbox_full" });
  client.close();
});

// Signs ---------------------------------------------------------------------------------------------------------------------

test("typing is sent every 2.5 s, and not where the namespace has none", async (t) => {
  fakeTime(t);
  const { room, socket, answers } = await inRoom();
  for (let i = 0; i < 50; i += 1) {
    room.typing();
    await tick(100);
  }
  assert.equal(socket.commands("typing").length, 2);
  answers.typing = () => ({ op: "error", code: "bad_request", message: "no typing here" });
  await tick(2_500);
  room.typing();
  await tick(5_000);
  room.typing();
  assert.equal(socket.commands("typing").length, 3);
});

test("read: the furthest place, every 300 ms, and again where an edge lost it", async (t) => {
  fakeTime(t);
  const { room, socket, edge, answers, reconnect } = await inRoom();
  for (let i = 1; i <= 5; i += 1) {
    socket.push(edge.say("lee", `m${i}`));
    room.read();
  }
  room.read(edge.cursor(2));
  await tick(1_000);
  assert.deepEqual(socket.commands("read").map(({ cursor }) => cursor), [edge.cursor(1), edge.cursor(5)]);
  assert.equal(room.marker, edge.cursor(5));
  const { join } = answers;
  answers.join = (frame, to) => ({ ...join(frame, to), marker: edge.cursor(3) });
  const next = await reconnect();
  assert.deepEqual(next.commands("read").map(({ cursor }) => cursor), [edge.cursor(5)]);
  answers.join = (frame, to) => ({ ...join(frame, to), marker: edge.cursor(5) });
  const last = await reconnect();
  assert.equal(last.commands("read").length, 0);
});

test("a reader of the iterator that is too far behind is told", async (t) => {
  fakeTime(t);
  const { room, socket, edge } = await inRoom();
  const iterator = room.listen();
  const first = iterator.next();
  for (let i = 0; i < 10_002; i += 1) socket.push(edge.say("lee", `m${i}`));
  assert.equal((await first).value.id, "m0");
  let count = 0;
  await assert.rejects(async () => {
    for await (const _ of iterator) count += 1;
  }, { code: "too_slow" });
  assert.ok(count >= 9_999);
  const stopped = new AbortController();
  const waiting = room.listen({ signal: stopped.signal }).next();
  stopped.abort();
  assert.deepEqual(await waiting, { done: true, value: undefined });
});

test("a listener that throws does not stop the others, and its error is not swallowed", async (t) => {
  fakeTime(t);
  const { room, socket, edge, heard } = await inRoom();
  const thrown = [];
  const known = process.listeners("uncaughtException");
  process.removeAllListeners("uncaughtException");
  process.once("uncaughtException", (error) => thrown.push(error.message));
  room.on("message", () => {
    throw new Error("of a listener");
  });
  room.on("message", ({ id }) => heard.push(`again ${id}`));
  socket.push(edge.say("lee", "a"));
  await new Promise((resolve) => setImmediate(resolve));
  for (const listener of known) process.on("uncaughtException", listener);
  assert.deepEqual(heard, ["a", "again a"]);
  assert.deepEqual(thrown, ["of a listener"]);
});
