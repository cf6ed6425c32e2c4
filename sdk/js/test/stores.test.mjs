// Stores: SIMULATED sockets and an edge of a few lines, a fake clock.

import assert from "node:assert/strict";
import { test } from "node:test";

import { inbox, messages, presence, readers, typing, unread } from "../store.js";
import { fakeClient, fakeRoom, fakeTime, settle, tick } from "./fake.mjs";

const ROOM = "chat:lobby";
const HELD = Symbol("held");

/** A client in a room, with the store of its messages. `history` answers pages; what it holds back is given by `page`. */
async function shown({ said = 0, history } = {}) {
  const edge = fakeRoom(ROOM);
  for (let i = 0; i < said; i += 1) edge.say("lee", `m${i}`, { body: `m${i}` });
  const held = [];
  const page = ({ before, after, limit = 50 }) => {
    const at = (cursor) => Number(cursor.split(".")[2]);
    let [from, to] = [0, edge.log.length];
    if (before) to = at(before) - 1;
    if (after) from = at(after);
    if (after) to = Math.min(to, from + limit);
    else from = Math.max(from, to - limit);
    const found = edge.log.slice(from, to).filter(({ kind }) => kind == null).map(({ op: _op, room: _room, ...message }) => message);
    return { op: "history", messages: found, prev: from > 0 ? edge.cursor(from + 1) : undefined, next: to < edge.log.length ? edge.cursor(to) : undefined };
  };
  const answers = {
    join: (frame, socket) => edge.join(frame, socket),
    send: (frame, socket) => edge.send(frame, socket),
    history: (frame, socket) => {
      const answer = history?.(frame, page) ?? page(frame);
      if (answer !== HELD) return answer;
      held.push(() => socket.push({ rid: frame.rid, ...page(frame) }));
      return null;
    },
  };
  const made = fakeClient({}, answers);
  const room = made.client.room(ROOM);
  const store = messages(room);
  let told = 0;
  const off = store.subscribe(() => (told += 1));
  const socket = await made.connected();
  await settle();
  const bodies = () => store.getSnapshot().messages.map(({ body }) => body);
  return { ...made, room, store, socket, edge, bodies, held, page, off, told: () => told };
}

const names = (from, to) => Array.from({ length: to - from }, (_, i) => `m${from + i}`);

test("snapshots and the messages in them are the same objects until they change", async (t) => {
  fakeTime(t);
  const { store, socket, edge, told } = await shown({ said: 3 });
  const before = store.getSnapshot();
  assert.equal(store.getSnapshot(), before);
  assert.equal(before.state, "ready");
  const count = told();
  socket.push(edge.say("lee", "new", { body: "new" }));
  socket.push(edge.say("lee", "r", { kind: "reaction", target: "lee/m1", body: "👍" }));
  await settle();
  assert.equal(told(), count + 1, "once for one turn");
  const after = store.getSnapshot();
  assert.notEqual(after, before);
  assert.equal(after.messages[0], before.messages[0]);
  assert.notEqual(after.messages[1], before.messages[1]);
  assert.equal(after.messages[2], before.messages[2]);
  assert.ok(Object.isFrozen(after) && Object.isFrozen(after.messages) && Object.isFrozen(after.messages[0]));
  socket.push({ op: "typing", room: ROOM, user: "lee" });
  assert.equal(store.getSnapshot(), after, "what does not concern it changes nothing");
});

test("pages join without a seam, and the top is reached", async (t) => {
  fakeTime(t);
  const { store, bodies } = await shown({ said: 120 });
  assert.deepEqual(bodies(), names(70, 120));
  assert.equal(store.getSnapshot().hasOlder, true);
  await store.loadOlder();
  await store.loadOlder();
  assert.deepEqual(bodies(), names(0, 120));
  assert.equal(store.getSnapshot().hasOlder, false);
});

test("what comes while the first page is loaded is there once, in its place, with its changes", async (t) => {
  fakeTime(t);
  const { store, socket, edge, bodies, held } = await shown({ said: 3, history: () => HELD });
  assert.equal(store.getSnapshot().state, "loading");
  socket.push(edge.say("lee", "m3", { body: "m3" }));
  assert.deepEqual(bodies(), ["m3"], "live ones are shown meanwhile");
  // Of a message that only the page has; the page may have been read before or after.
  socket.push(edge.say("lee", "e", { kind: "edit", target: "lee/m1", body: "edited" }));
  socket.push(edge.say("ann", "r", { kind: "reaction", target: "lee/m2", body: { key: "👍" } }));
  socket.push(edge.say("lee", "d", { kind: "delete", target: "lee/m0" }));
  held.shift()();
  await settle();
  assert.deepEqual(bodies(), [undefined, "edited", "m2", "m3"]);
  const [gone, , liked] = store.getSnapshot().messages;
  assert.ok(gone.deleted_at);
  assert.deepEqual(liked.reactions, [{ key: "👍", count: 1, users: ["ann"], mine: false }]);
});

test("changes are applied as history does it", async (t) => {
  fakeTime(t);
  const { store, socket, edge } = await shown({ said: 2 });
  const say = (from, id, fields) => socket.push(edge.say(from, id, fields));
  const one = () => store.find("lee/m0");
  say("lee", "e1", { kind: "edit", target: "m0", body: "first", mentions: ["ann"] });
  say("lee", "e2", { kind: "edit", target: "lee/m0", body: "second" });
  assert.deepEqual([one().body, one().mentions, one().edited_at > 0], ["second", ["ann"], true]);
  for (const [id, body] of [["r1", "❤"], ["r2", { key: "❤️" }], ["r3", { key: "👍" }]]) say("ann", id, { kind: "reaction", target: "lee/m0", body });
  say("kim", "r4", { kind: "reaction", target: "lee/m0", body: "❤️" });
  assert.deepEqual(one().reactions.map(({ key, count, mine }) => [key, count, mine]), [["❤", 2, true], ["👍", 1, false]]);
  say("ann", "r5", { kind: "reaction", target: "lee/m0", body: { key: "❤", remove: true } });
  say("ann", "r6", { kind: "reaction", target: "lee/m0", body: { key: "👍", remove: true } });
  assert.deepEqual(one().reactions.map(({ key, count }) => [key, count]), [["❤", 1]]);
  say("$worker.x", "a1", { kind: "annotation", target: "lee/m0", body: { translation: { ko: "하나" }, mood: 1 } });
  say("$worker.x", "a2", { kind: "annotation", target: "lee/m0", body: { mood: 2 } });
  assert.deepEqual(one().annotations, { translation: { ko: "하나" }, mood: 2 });
  say("ann", "answer", { body: "yes", reply_to: "lee/m0" });
  assert.equal(one().replies.count, 1);
  say("lee", "d", { kind: "delete", target: "m0" });
  say("lee", "e3", { kind: "edit", target: "m0", body: "too late" });
  assert.deepEqual([one().body, one().reactions, one().deleted_at > 0], [undefined, [], true]);
  say("$natter", "s", { kind: "system", body: { action: "added", by: "desk", user: "ann" } });
  assert.equal(store.getSnapshot().messages.at(-1).kind, "system");
  say("mallory", "s2", { kind: "system", body: { action: "banned" } });
  assert.equal(store.getSnapshot().messages.at(-1).from, "$natter");
  say("$natter", "x", { kind: "erase", body: { user: "lee", before: 1_001 } });
  assert.deepEqual(store.getSnapshot().messages.map(({ from }) => from), ["ann", "$natter"]);
});

test("one's own message is there at once, keeps its place, and becomes the one that was sent", async (t) => {
  fakeTime(t);
  const { store, room, socket, edge, bodies, answers, connected } = await shown({ said: 1 });
  const { send } = answers;
  answers.send = () => null;
  const [one, two] = [room.send("one"), room.send("two")];
  room.edit(`kim/${two.id}`, "two, edited");
  socket.push(edge.say("lee", "m1", { body: "m1" }));
  assert.deepEqual(bodies(), ["m0", "m1", "one", "two, edited"]);
  let [, , first, second] = store.getSnapshot().messages;
  assert.deepEqual([first.status, first.own, first.handle, first.from], ["pending", true, one, "kim"]);
  assert.equal(second.changing, true);
  answers.send = send;
  socket.end(1006);
  await tick(1_000);
  await connected();
  await tick(1_000);
  assert.deepEqual(bodies(), ["m0", "m1", "one", "two, edited"]);
  [, , first, second] = store.getSnapshot().messages;
  assert.deepEqual([first.status, second.status, second.changing], ["sent", "sent", false]);
});

test("over a reconnect pending messages become sent ones, without a moment in which they are gone", async (t) => {
  fakeTime(t);
  const { store, room, socket, answers, connected, bodies } = await shown({ said: 1 });
  const { send } = answers;
  answers.send = () => null;
  const handles = [room.send("one"), room.send("two")];
  const seen = [];
  store.subscribe(() => seen.push(bodies().join()));
  socket.end(1006);
  await tick(200);
  answers.send = send;
  await connected();
  await tick(500);
  assert.deepEqual(handles.map(({ state }) => state), ["sent", "sent"]);
  assert.ok(seen.length > 1 && seen.every((one) => one === "m0,one,two"), seen.join(" | "));
  assert.deepEqual(store.getSnapshot().messages.map(({ status }) => status), ["sent", "sent", "sent"]);
});

test("an acknowledgement before the message itself does not put it in a wrong place, nor twice", async (t) => {
  fakeTime(t);
  const { store, room, socket, edge, answers, bodies } = await shown({ said: 1 });
  let own;
  answers.send = (frame) => {
    edge.say("lee", "before", { body: "before" });
    own = edge.say("kim", frame.id, { body: frame.body });
    return { op: "ack", room: ROOM, id: frame.id, cursor: own.cursor, ts: own.ts, dup: false };
  };
  await room.send("own").done;
  assert.deepEqual(bodies(), ["m0", "own"]);
  socket.push(edge.log[1]);
  socket.push(own);
  assert.deepEqual(bodies(), ["m0", "before", "own"]);
  assert.equal(store.getSnapshot().messages.at(-1).status, "sent");
});

test("a repeat of what was stored long ago is not shown above what is loaded; after an erasure of all, new ones are shown", async (t) => {
  fakeTime(t);
  const { room, socket, edge, answers, bodies } = await shown({ said: 60 });
  answers.send = (frame) => ({ op: "ack", room: ROOM, id: frame.id, cursor: edge.cursor(2), ts: 1, dup: true });
  await room.send("long ago").done;
  assert.deepEqual(bodies(), names(10, 60));
  socket.push(edge.say("$natter", "x", { kind: "erase", body: { before: 10_000 } }));
  assert.deepEqual(bodies(), []);
  socket.push(edge.say("lee", "new", { body: "new" }));
  assert.deepEqual(bodies(), ["new"]);
});

test("a failed message stays until its writer decides; a failed change is taken back", async (t) => {
  fakeTime(t);
  const { store, room, answers } = await shown({ said: 1 });
  const { send } = answers;
  answers.send = () => ({ op: "error", code: "forbidden", message: "muted" });
  const handle = room.send("x");
  room.react("lee/m0", "👍");
  assert.equal(store.find("lee/m0").reactions.length, 1);
  await settle();
  assert.equal(store.find("lee/m0").reactions.length, 0);
  const failed = store.getSnapshot().messages.at(-1);
  assert.deepEqual([failed.status, failed.error.code], ["failed", "forbidden"]);
  answers.send = send;
  handle.retry();
  await settle();
  assert.equal(store.getSnapshot().messages.at(-1).status, "sent");
});

test("a reset loads the newest page anew, with what came meanwhile", async (t) => {
  fakeTime(t);
  const { store, socket, edge, bodies, answers, connected, held } = await shown({ said: 60 });
  await store.loadOlder();
  assert.equal(bodies().length, 60);
  for (let i = 60; i < 200; i += 1) edge.say("lee", `m${i}`, { body: `m${i}` });
  answers.join = () => ({ op: "joined", room: ROOM, cursor: edge.head(), head: edge.head(), replay: 0, reset: true, reason: "replay_max" });
  answers.history = (frame) => void held.push(frame);
  socket.end(1006);
  await tick(500);
  const next = await connected();
  next.push(edge.say("lee", "m200", { body: "m200" }));
  const [frame] = held;
  const last = edge.log.slice(150, 200).map(({ op: _op, room: _room, ...message }) => message);
  next.push({ rid: frame.rid, op: "history", messages: last, prev: edge.cursor(151) });
  await settle();
  assert.deepEqual(bodies(), names(150, 201));
  assert.equal(store.getSnapshot().hasOlder, true);
});

test("jump: around a message, then forward to the end, without a gap", async (t) => {
  fakeTime(t);
  const { store, socket, edge, bodies } = await shown({
    said: 300,
    history: (frame, pageOf) => {
      if (!frame.around) return pageOf(frame);
      assert.equal(frame.around, "lee/m100");
      return { ...pageOf({ after: "r.e1.75.0", limit: 50 }), prev: "r.e1.76.0", next: "r.e1.125.0" };
    },
  });
  assert.equal(await store.jump("lee/m100"), true);
  assert.deepEqual(bodies(), names(75, 125));
  assert.deepEqual([store.getSnapshot().hasOlder, store.getSnapshot().hasNewer], [true, true]);
  socket.push(edge.say("lee", "m300", { body: "m300" }));
  assert.equal(store.getSnapshot().newer, 1);
  assert.deepEqual(bodies(), names(75, 125), "the end is elsewhere");
  for (let i = 0; i < 10 && store.getSnapshot().hasNewer; i += 1) await store.loadNewer();
  assert.deepEqual(bodies(), names(75, 301));
  socket.push(edge.say("lee", "m301", { body: "m301" }));
  assert.deepEqual([bodies().at(-1), store.getSnapshot().newer], ["m301", 0]);
});

test("what is kept has an end, on both sides, and is loaded again", async (t) => {
  fakeTime(t);
  const { store, socket, edge, bodies } = await shown({ said: 10 });
  for (let i = 10; i < 2_300; i += 1) socket.push(edge.say("lee", `m${i}`, { body: `m${i}` }));
  assert.ok(bodies().length <= 2_200);
  assert.deepEqual(bodies(), names(2_300 - bodies().length, 2_300));
  for (let i = 0; i < 60 && store.getSnapshot().hasOlder; i += 1) await store.loadOlder();
  assert.deepEqual(bodies(), names(0, 2_000));
  assert.equal(store.getSnapshot().hasNewer, true);
  await store.latest();
  assert.deepEqual(bodies(), names(2_250, 2_300));
});

test("without history there is what comes live; while it is away it is asked again", async (t) => {
  fakeTime(t);
  const none = await shown({ said: 2, history: () => ({ op: "error", code: "bad_request", message: "no history here" }) });
  assert.deepEqual([none.store.getSnapshot().state, none.store.getSnapshot().hasOlder, none.bodies()], ["ready", false, []]);
  none.socket.push(none.edge.say("lee", "m2", { body: "m2" }));
  assert.deepEqual(none.bodies(), ["m2"]);

  let away = true;
  const later = await shown({ said: 2, history: (frame, page) => (away ? { op: "error", code: "unavailable", message: "", retry: true } : page(frame)) });
  later.socket.push(later.edge.say("lee", "m2", { body: "m2" }));
  assert.deepEqual([later.store.getSnapshot().state, later.bodies()], ["loading", ["m2"]]);
  away = false;
  await tick(5_000);
  assert.deepEqual([later.store.getSnapshot().state, later.bodies()], ["ready", names(0, 3)]);
});

test("a room that is refused is out, and who looks again a second later does not lose anything", async (t) => {
  fakeTime(t);
  const { store, socket, off, edge, bodies } = await shown({ said: 1 });
  off();
  const again = store.subscribe(() => {});
  socket.push(edge.say("lee", "m1", { body: "m1" }));
  assert.deepEqual(bodies(), names(0, 2));
  again();
  await tick(3_000);
  assert.equal(socket.commands("leave").length, 1);
  edge.say("lee", "m2", { body: "m2" });
  store.subscribe(() => {});
  await tick(100);
  assert.deepEqual(bodies(), names(0, 3));
  socket.push({ op: "kicked", room: ROOM, code: "removed" });
  assert.deepEqual([store.getSnapshot().state, store.getSnapshot().code], ["out", "removed"]);
});

test("presence: the list, pushes that came before it, and counts", async (t) => {
  fakeTime(t);
  const users = [{ user: "kim", since: 1 }, { user: "lee", since: 2 }];
  const made = fakeClient({}, {
    join: () => ({ op: "joined", room: ROOM, cursor: "r.e.1.0", head: "r.e.1.0", replay: 0 }),
    presence: (frame, socket) => {
      socket.push({ op: "presence", room: ROOM, user: "ann", state: "join", at: 3, info: { name: "Ann" } });
      socket.push({ op: "presence", room: ROOM, user: "lee", state: "leave" });
      return { op: "presence", room: ROOM, count: 2, users };
    },
  });
  const store = presence(made.client.room(ROOM));
  store.subscribe(() => {});
  const socket = await made.connected();
  assert.deepEqual(store.getSnapshot(), { count: 2, named: true, users: [users[0], { user: "ann", info: { name: "Ann" }, since: 3 }] });
  socket.push({ op: "presence", room: ROOM, user: "ann", state: "unreachable" });
  assert.equal(store.getSnapshot().users[1].state, "unreachable");
  assert.deepEqual(store.getSnapshot().users[1].info, { name: "Ann" });
  socket.push({ op: "presence", room: ROOM, count: 5_000 });
  assert.deepEqual([store.getSnapshot().count, store.getSnapshot().named], [5_000, false]);
  socket.push({ op: "presence", room: ROOM, user: "bob", state: "join", at: 9 });
  await tick(5_000);
  assert.equal(socket.commands("presence").length, 2, "the list is asked for again");
});

test("typing ends by itself, and with what is said", async (t) => {
  fakeTime(t);
  const { room, socket, edge } = await shown();
  const store = typing(room);
  store.subscribe(() => {});
  for (const user of ["lee", "ann"]) socket.push({ op: "typing", room: ROOM, user });
  assert.deepEqual(store.getSnapshot(), ["lee", "ann"]);
  socket.push(edge.say("lee", "m", { body: "" }));
  assert.deepEqual(store.getSnapshot(), ["ann"]);
  await tick(6_000);
  assert.deepEqual(store.getSnapshot(), []);
});

test("readers only go forward", async (t) => {
  fakeTime(t);
  const { room, socket, edge, answers } = await shown({ said: 5 });
  answers.readers = () => ({ op: "readers", readers: [{ user: "lee", cursor: edge.cursor(2), at: 1 }] });
  const store = readers(room);
  store.subscribe(() => {});
  await settle();
  socket.push({ op: "read", room: ROOM, user: "lee", cursor: edge.cursor(4) });
  socket.push({ op: "read", room: ROOM, user: "lee", cursor: edge.cursor(3) });
  socket.push({ op: "read", room: ROOM, user: "ann", cursor: edge.cursor(1) });
  assert.deepEqual([...store.getSnapshot()], [["lee", edge.cursor(4)], ["ann", edge.cursor(1)]]);
});

test("inbox and unread: pages, pushes, pinned first, archived ones gone, anew after a reconnect", async (t) => {
  fakeTime(t);
  const summary = (room, ts, fields = {}) => ({ room, last: { id: "x", from: "lee", ts }, unread: 1, mentions: 0, ...fields });
  let first = [summary("chat:b", 20), summary("chat:a", 10)];
  const { client, connected } = fakeClient({}, {
    watch: ({ after }) => (after ? { op: "watching", watch: 7, rooms: [summary("chat:c", 5)] } : { op: "watching", watch: 7, rooms: first, next: "n" }),
  });
  const store = inbox(client);
  const counts = unread(client);
  store.subscribe(() => {});
  counts.subscribe(() => {});
  const socket = await connected();
  const rooms = () => store.getSnapshot().rooms.map(({ room }) => room);
  assert.deepEqual([rooms(), store.getSnapshot().hasMore, socket.commands("watch").length], [["chat:b", "chat:a"], true, 1]);
  await store.loadMore();
  assert.deepEqual([rooms(), store.getSnapshot().hasMore], [["chat:b", "chat:a", "chat:c"], false]);
  const same = store.getSnapshot().rooms[0];
  socket.push({ op: "inbox", watch: 7, rooms: [summary("chat:c", 5, { pinned: true }), summary("chat:a", 30, { unread: 4, mentions: 2 })] });
  assert.deepEqual(rooms(), ["chat:c", "chat:a", "chat:b"]);
  assert.equal(store.getSnapshot().rooms[2], same);
  assert.deepEqual(counts.getSnapshot(), { total: 6, mentions: 2, capped: false, rooms: { "chat:a": 4, "chat:b": 1, "chat:c": 1 } });
  socket.push({ op: "inbox", watch: 8, rooms: [summary("chat:z", 99)] });
  socket.push({ op: "inbox", watch: 7, rooms: [summary("chat:a", 30, { archived: true }), summary("chat:b", 20, { muted: true })], gone: ["chat:c"] });
  await settle();
  assert.deepEqual([rooms(), counts.getSnapshot().total], [["chat:b"], 0]);
  first = [summary("chat:new", 1)];
  socket.end(1006);
  await tick(1_000);
  await connected();
  assert.deepEqual(rooms(), ["chat:new"]);
});
