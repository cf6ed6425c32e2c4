// The SDK against a real `natter up` with two edges. NATTER is the program.

import assert from "node:assert/strict";
import { once } from "node:events";
import http from "node:http";
import { after, before, test } from "node:test";

import WebSocket from "ws";

import { Relay, Up, until, within } from "../../../tests/clients/support.mjs";
import { Natter, reaches } from "../natter.js";
import { Backend, signToken, verifyHook } from "../server.js";
import { inbox, messages, presence, readers, typing, unread } from "../store.js";

const binary = process.env.NATTER;
const skip = binary ? false : "no NATTER: set it to the program";
const ALL = ["read", "write", "presence", "history", "moderate", "manage", "erase", "admin"];
const HOOK_SECRET = `whsec_${Buffer.alloc(32, 5).toString("base64")}`;

/** @type {Up} */ let up;
let hooks;
let hookServer;
let halfOpen;
let number = 0;

const newRoom = (namespace = "chat") => `${namespace}:sdk-${(number += 1)}`;
const token = (user, { can = ALL, ttl = 3_600, ...more } = {}) => signToken({ user, grants: [{ rooms: "*:*", can }], ttl, ...more }, up.secret());

/** A client of the SDK, which ends with the test. */
function clientOf(t, user, { edges = [0, 1], url = edges.map((edge) => up.edge(edge).http), ...options } = {}) {
  const client = new Natter({ url, WebSocket, getToken: () => token(user), ...options });
  t.after(() => client.close());
  return client;
}

/** A relay that is frozen takes everything and gives nothing, and nobody is told. */
function freeze(relay) {
  for (const socket of relay.sockets) {
    socket.unpipe();
    socket.resume();
  }
}

before(async () => {
  if (skip) return;
  hooks = [];
  hookServer = http.createServer(async (request, response) => {
    const body = Buffer.concat(await request.toArray());
    hooks.push(await verifyHook(request.headers, body, [HOOK_SECRET]).catch((error) => error));
    response.writeHead(204).end();
  });
  await once(hookServer.listen(0, "127.0.0.1"), "listening");
  hookServer.unref();
  const config = `
[auth]
leeway = "0s"
[namespaces.chat]
durable = true
typing = true
history = true
presence = "users"
[namespaces.live]
durable = false
typing = true
history = false
presence = "off"
[[workers]]
name = "check"
rooms = ["chat:hooked"]
url = "http://127.0.0.1:${hookServer.address().port}/"
secret = "${HOOK_SECRET}"
annotation = "check"
allow = ["127.0.0.1/32"]
`;
  up = await Up.start(binary, { config, edges: 2 });
  halfOpen = noticesAHalfOpenSocket();
  halfOpen.catch(() => {}); // its test says so
});

after(async () => {
  hookServer?.close();
  await up?.stop();
});

/** Runs beside the other tests, since it takes as long as it takes. They kill edge 0; this one is on edge 1. */
async function noticesAHalfOpenSocket() {
  const relay = await Relay.start(up.address(1));
  const client = new Natter({ url: [`ws://${relay.address}`, up.edge(1).ws], WebSocket, getToken: () => token("frozen") });
  try {
    const states = [];
    client.on("state", ({ name, reason }) => states.push(reason ? `${name} ${reason}` : name));
    const room = client.room("chat:frozen");
    const heard = [];
    room.on("message", ({ body }) => heard.push(body));
    await room.join();
    const backend = new Backend({ url: up.edge(1).http, token: await token("service") });
    await backend.publish(room.name, "before");
    await until("a message", () => heard.length === 1);
    freeze(relay);
    const frozen = Date.now();
    await backend.publish(room.name, "while frozen");
    await within(room.send("own").done, "the message that was written into the frozen connection", 60_000);
    return { took: Date.now() - frozen, heard, states };
  } finally {
    client.close();
    relay.close();
  }
}

/** The same without a command of one's own: only the heart-beat can notice. */
test("a half-open socket is noticed within 40 s by who only listens", { skip, timeout: 170_000 }, async (t) => {
  const relay = await Relay.start(up.address(1));
  t.after(() => relay.close());
  const client = clientOf(t, "quiet", { url: [`ws://${relay.address}`, up.edge(1).ws] });
  const room = client.room(newRoom());
  const heard = [];
  room.on("message", ({ body }) => heard.push(body));
  await room.join();
  const lost = new Promise((resolve) => client.on("state", ({ name, reason }) => name === "offline" && resolve(reason)));
  freeze(relay);
  const frozen = Date.now();
  const backend = new Backend({ url: up.edge(1).http, token: await token("service") });
  await backend.publish(room.name, "while frozen");
  const rest = sequence(t);
  assert.equal(await within(lost, "the loss of a frozen connection", 60_000), "no_answer");
  const took = Date.now() - frozen;
  assert.ok(took <= 40_000, `${took} ms`);
  await until("what was missed", () => heard.length === 1);
  assert.deepEqual(heard, ["while frozen"]);
  await rest;
});

// What does not need edge 1 for itself runs meanwhile.
async function sequence(t) {
  for (const [name, deed] of scenarios) await t.test(name, { timeout: 40_000 }, deed);
}

/** @type {[string, (t: import("node:test").TestContext) => Promise<void>][]} */
const scenarios = [];
const scenario = (name, deed) => scenarios.push([name, deed]);

test("a half-open socket is noticed at once by who sends, and the message arrives once", { skip, timeout: 120_000 }, async () => {
  const { took, heard, states } = await halfOpen;
  assert.ok(took <= 40_000, `${took} ms`);
  assert.deepEqual(heard, ["before", "while frozen", "own"]);
  assert.deepEqual(states.slice(0, 5), ["connecting", "online", "offline no_answer", "connecting", "online"]);
});

scenario("everything once and in order, while edges are killed and connections cut", async (t) => {
  const relay = await Relay.start(up.address(0));
  t.after(() => relay.close());
  const room = newRoom();
  const reader = clientOf(t, "reader", { url: [`ws://${relay.address}`, up.edge(1).ws] });
  const writers = ["ann", "bob"].map((user) => clientOf(t, user, { edges: user === "ann" ? [0, 1] : [1, 0] }));
  const heard = [];
  let resets = 0;
  reader.room(room).on("message", (message) => heard.push(message));
  reader.room(room).on("reset", () => (resets += 1));
  await reader.room(room).join();
  const store = messages(reader.room(room));
  t.after(store.subscribe(() => {}));
  let stopped = false;
  const handles = { ann: [], bob: [] };
  const writing = writers.map(async (client) => {
    await client.room(room).join();
    while (!stopped) {
      const mine = handles[client.user];
      mine.push(client.room(room).send({ n: mine.length }));
      // The pace of a writer, not a wait for something.
      await new Promise((resolve) => setTimeout(resolve, 3));
    }
  });
  const more = (count) => {
    const goal = heard.length + count;
    return until(`${count} more messages`, () => heard.length >= goal);
  };
  await more(50);
  await up.killEdge(0);
  await more(50);
  relay.cut();
  await more(20);
  relay.open(up.address(0));
  await more(50);
  await up.killEdge(0);
  await more(50);
  await up.killEdge(0, "SIGTERM");
  await more(50);
  stopped = true;
  await Promise.all(writing);
  const all = [...handles.ann, ...handles.bob];
  await within(Promise.all(all.map(({ done }) => done)), "all acknowledgements");
  await until("all messages", () => heard.length >= all.length);
  for (const user of ["ann", "bob"]) {
    const got = heard.filter(({ from }) => from === user);
    assert.deepEqual(got.map(({ body }) => body.n), [...handles[user].keys()], `the messages of ${user}`);
    assert.deepEqual(got.map(({ id }) => id), handles[user].map(({ id }) => id));
  }
  assert.equal(heard.length, all.length);
  assert.equal(resets, 0);
  const order = heard.map(({ cursor }) => Number(cursor.split(".")[2]));
  assert.deepEqual(order, [...order].sort((a, b) => a - b));
  const shown = store.getSnapshot().messages;
  assert.deepEqual(shown.map(({ id }) => id), heard.slice(-shown.length).map(({ id }) => id));
});

scenario("a drain: moved to the other edge, with the reason, and nothing is lost", async (t) => {
  const client = clientOf(t, "kim", { edges: [0, 1] });
  const states = [];
  client.on("state", ({ name, reason }) => states.push(reason ? `${name} ${reason}` : name));
  const room = client.room(newRoom());
  const heard = [];
  room.on("message", ({ body }) => heard.push(body));
  await room.join();
  const drained = up.killEdge(0, "SIGTERM");
  await until("the move", () => states.includes("connecting draining"), { last: () => states.join() });
  for (let i = 0; i < 5; i += 1) await room.send(i).done;
  await drained;
  assert.deepEqual(heard, [0, 1, 2, 3, 4]);
  assert.deepEqual(states, ["connecting", "online", "connecting draining", "online"]);
});

scenario("the outbox over a reload: what was written is sent, once, whatever had arrived", async (t) => {
  const entries = new Map();
  const storage = { get length() { return entries.size; }, key: (i) => [...entries.keys()][i], getItem: (k) => entries.get(k) ?? null, setItem: (k, v) => entries.set(k, v), removeItem: (k) => entries.delete(k) };
  const relay = await Relay.start(up.address(0));
  t.after(() => relay.close());
  const name = newRoom();
  const first = clientOf(t, "kim", { url: `ws://${relay.address}`, storage });
  await first.room(name).join();
  const arrived = first.room(name).send("arrived");
  // The edge has it, and nobody hears of that: cut before the answer.
  relay.cut();
  const written = [arrived, ...["two", "three"].map((body) => first.room(name).send(body))];
  await until("offline", () => first.state.name === "offline");
  first.close(); // the page is loaded anew
  assert.equal(entries.size, 3);
  const second = clientOf(t, "kim", { storage });
  const heard = [];
  second.room(name).on("message", ({ id }) => heard.push(id));
  const store = messages(second.room(name));
  t.after(store.subscribe(() => {}));
  await until("everything sent", () => entries.size === 0 && store.getSnapshot().messages.length === 3 && store.getSnapshot().state === "ready");
  assert.deepEqual(store.getSnapshot().messages.map(({ id, status }) => [id, status]), written.map(({ id }) => [id, "sent"]));
  const page = await second.room(name).history();
  assert.deepEqual(page.messages.map(({ body }) => body), ["arrived", "two", "three"]);
});

scenario("a token is replaced before its end, without a new connection", async (t) => {
  const asked = [];
  let sockets = 0;
  class Counted extends WebSocket {
    constructor(...args) {
      super(...args);
      sockets += 1;
    }
  }
  const getToken = ({ reason }) => (asked.push(reason), token("kim", { ttl: asked.length === 1 ? 20 : 3_600 }));
  const client = clientOf(t, "kim", { getToken, WebSocket: Counted });
  await client.room(newRoom()).join();
  await until("another token", () => asked.length === 2 && client.claims.exp > Date.now() / 1000 + 600);
  await client.request("ping");
  assert.deepEqual(asked, ["first", "expiring"]);
  assert.equal(sockets, 1);
});

scenario("a token that ends is asked for anew, and the room is resumed", async (t) => {
  const asked = [];
  const getToken = ({ reason }) => {
    asked.push(reason);
    if (reason === "expiring") throw new Error("the application's server is away");
    return token("kim", { ttl: asked.length === 1 ? 7 : 3_600 });
  };
  const client = clientOf(t, "kim", { getToken });
  const room = client.room(newRoom());
  const heard = [];
  room.on("message", ({ body }) => heard.push(body));
  await room.join();
  const lost = new Promise((resolve) => client.on("state", ({ name, reason }) => name === "offline" && resolve(reason)));
  assert.equal(await within(lost, "the end of the token"), "token_expired");
  await room.send("still here").done;
  assert.deepEqual(heard, ["still here"]);
  assert.equal(asked.at(-1), "refused");
});

scenario("revoked, ended by a back end, and a bad token: closed, with the reason", async (t) => {
  const closed = (client) => new Promise((resolve) => client.on("state", ({ name, reason }) => name === "closed" && resolve(reason)));
  const revoked = clientOf(t, "mallory", { token: await token("mallory"), getToken: undefined });
  await revoked.request("ping");
  const why = closed(revoked);
  await up.run("revoke", "--user", "mallory", "--for", "1h");
  assert.equal(await within(why, "the revocation"), "revoked");

  const ended = clientOf(t, "ended");
  await ended.request("ping");
  const end = closed(ended);
  const backend = new Backend({ url: up.edge(1).http, token: await token("service") });
  assert.equal((await backend.endSessions("ended")).sessions, 1);
  assert.equal(await within(end, "the end"), "disconnected");

  const bad = clientOf(t, "bad", { getToken: undefined, token: await signToken({ user: "bad", grants: [] }, "another secret") });
  const refused = closed(bad);
  bad.connect();
  assert.equal(await within(refused, "the refusal"), "bad_token");
});

scenario("a reset: of another log; the store shows the newest page", async (t) => {
  const client = clientOf(t, "kim");
  const room = client.room(newRoom());
  const resets = [];
  room.on("reset", (reset) => resets.push(reset));
  await room.send("m0").done;
  const other = (await room.join({ since: null })).cursor.replace(/^(\w+)\.\w+\./, "$1.0000000.");
  const joined = await room.join({ since: other });
  assert.equal(joined.reset, true);
  assert.deepEqual([resets[0].reason, resets[0].since], ["epoch", other]);

  const relay = await Relay.start(up.address(1));
  t.after(() => relay.close());
  const reader = clientOf(t, "lee", { url: `ws://${relay.address}` });
  const theirs = reader.room(room.name);
  const store = messages(theirs);
  t.after(store.subscribe(() => {}));
  const seen = [];
  theirs.on("reset", ({ reason }) => seen.push(reason));
  await until("the first page", () => store.getSnapshot().state === "ready");
  relay.cut();
  for (let i = 1; i <= 80; i += 1) await room.send(`m${i}`).done;
  theirs.join({ since: other }); // its cursor is of no use: the log began anew
  relay.open();
  await until("the reset", () => seen.length === 1);
  await until("the newest page", () => store.getSnapshot().messages.at(-1)?.body === "m80");
  await room.send("m81").done;
  await until("what comes live", () => store.getSnapshot().messages.at(-1)?.body === "m81");
  // Without MongoDB pages are partial, and their beginning is not told.
  await until("all pages", async () => (await store.loadOlder(), store.getSnapshot().messages.length === 82));
  assert.deepEqual(seen, ["epoch"]);
  assert.deepEqual(store.getSnapshot().messages.map(({ body }) => body), Array.from({ length: 82 }, (_, i) => `m${i}`));
});

scenario("two people: edits, reactions, answers, typing, presence, who has read what, in stores", async (t) => {
  const [ann, bob] = [clientOf(t, "ann", { edges: [0], getToken: () => token("ann", { info: { name: "Ann" } }) }), clientOf(t, "bob", { edges: [1] })];
  const name = newRoom();
  const [ra, rb] = [ann.room(name), bob.room(name)];
  for (const store of [messages(ra), messages(rb), presence(rb), typing(rb), readers(ra)]) t.after(store.subscribe(() => {}));
  await Promise.all([ra.join(), rb.join()]);
  const said = await ra.send({ text: "hello" }).done;
  const ref = `ann/${said.id}`;
  await until("the message", () => messages(rb).find(ref));
  rb.read();
  rb.react(ref, "👍");
  await rb.reply(ref, { text: "hi" }).done;
  await ra.edit(ref, { text: "hello, Bob" }).done;
  await ra.annotate(ref, { mood: "good" }).done;
  await until("all of it", () => {
    const one = messages(rb).find(ref);
    return one.body.text === "hello, Bob" && one.reactions[0]?.mine && one.replies?.count === 1 && one.annotations.mood === "good";
  });
  await until("the same at the other side", () => messages(ra).find(ref).reactions[0]?.count === 1 && !messages(ra).find(ref).changing);
  const page = await rb.history();
  const paged = page.messages.find(({ id }) => id === said.id);
  assert.deepEqual([paged.body, paged.reactions, paged.annotations], [{ text: "hello, Bob" }, { "👍": { count: 1, users: ["bob"] } }, { mood: "good" }]);
  ra.typing();
  await until("typing", () => typing(rb).getSnapshot().includes("ann"));
  await until("presence", () => presence(rb).getSnapshot().users.find(({ user }) => user === "ann")?.info?.name === "Ann");
  await until("who has read", () => reaches(readers(ra).getSnapshot().get("bob") ?? "", said.cursor));
  await ra.delete(ref).done;
  await until("the deletion", () => messages(rb).find(ref).deleted_at);
  ann.close();
  await until("who has gone", () => presence(rb).getSnapshot().count === 1);
});

scenario("rooms: made, in the inbox, counted, changed; who is removed is out", async (t) => {
  const [desk, kim] = [clientOf(t, "desk"), clientOf(t, "kim", { getToken: () => token("kim", { can: ["read", "write", "presence", "history"] }) })];
  t.after(inbox(kim).subscribe(() => {}));
  t.after(unread(kim).subscribe(() => {}));
  await until("the inbox", () => inbox(kim).getSnapshot().state === "ready");
  const fields = { namespace: "chat", kind: "group", key: newRoom(), members: ["desk", "kim"], title: "Tea" };
  const made = await desk.createRoom(fields);
  assert.deepEqual([made.created, (await desk.createRoom(fields)).created], [true, false]);
  await desk.room(made.room).send({ text: "for kim" }, { mentions: ["kim"] }).done;
  const summary = () => inbox(kim).getSnapshot().rooms.find(({ room }) => room === made.room);
  await until("what is new", () => summary()?.unread === 1);
  assert.deepEqual([summary().title, summary().last.text, summary().mentions, unread(kim).getSnapshot().rooms[made.room]], ["Tea", "for kim", 1, 1]);
  kim.room(made.room).read(summary().head);
  await until("nothing unread", () => !summary()?.unread);
  await kim.room(made.room).arrange({ muted: true });
  await until("muted", () => summary()?.muted);
  const record = await desk.room(made.room).settings({ title: "Coffee", version: made.version });
  assert.equal(record.title, "Coffee");
  await assert.rejects(desk.room(made.room).settings({ title: "x", version: made.version }), { code: "conflict" });
  const room = kim.room(made.room);
  await room.join();
  await desk.room(made.room).member("kim", { state: "banned" });
  await until("out", () => room.state.name === "out");
  assert.equal(room.state.code, "banned");
  await assert.rejects(room.join(), { code: "forbidden" });
  await assert.rejects(room.send("x").done, { code: "forbidden" });
  assert.deepEqual(await desk.room(made.room).record().then(({ members }) => members.map(({ user, state }) => [user, state])), [["desk", "in"], ["kim", "banned"]]);
});

scenario("an ephemeral room: live, and a gap is told", async (t) => {
  const relay = await Relay.start(up.address(1));
  t.after(() => relay.close());
  const client = clientOf(t, "kim", { url: `ws://${relay.address}` });
  const room = client.room(newRoom("live"));
  const heard = [];
  room.on("message", ({ body }) => heard.push(body));
  room.on("reset", ({ reason }) => heard.push(reason));
  const joined = await room.join({ presence: true });
  assert.equal(joined.cursor, undefined);
  await room.send("one").done;
  await until("one", () => heard.length === 1);
  relay.cut();
  await until("offline", () => client.state.name !== "online");
  relay.open();
  await room.send("two").done;
  await until("all", () => heard.length === 3);
  assert.deepEqual(heard, ["one", "ephemeral", "two"]);
  assert.equal(messages(room).getSnapshot().hasOlder, false);
});

scenario("for await, from a cursor that was kept", async (t) => {
  const client = clientOf(t, "kim");
  const room = client.room(newRoom());
  const { cursor } = await room.join();
  for (let i = 0; i < 5; i += 1) await room.send(i).done;
  const other = clientOf(t, "lee").room(room.name);
  const got = [];
  for await (const { body } of other.listen({ since: cursor })) {
    got.push(body);
    if (got.length === 5) break;
  }
  assert.deepEqual(got, [0, 1, 2, 3, 4]);
});

scenario("a back end: publishes as somebody, many at a time, changes members; its errors have codes", async (t) => {
  const backend = new Backend({ url: up.edge(0).http, token: () => token("service") });
  const room = newRoom();
  const first = await backend.publish(room, { text: "hi" }, { id: "order-7", as: "kim" });
  assert.equal((await backend.publish(room, { text: "again" }, { id: "order-7", as: "kim" })).dup, true);
  const results = await backend.publishAll([{ room, body: 1 }, { room: "nowhere:x", body: 2 }]);
  assert.deepEqual([results[0].room, results[1].error.code], [room, "unknown_namespace"]);
  const page = await clientOf(t, "kim").room(room).history();
  assert.deepEqual(page.messages.map(({ from, body }) => [from, body]), [["kim", { text: "hi" }], ["service", 1]]);
  assert.equal(page.messages[0].cursor, first.cursor);
  const made = await backend.createRoom({ namespace: "chat", kind: "group", members: ["service"] });
  await backend.setMember(made.room, "kim", { role: "moderator" });
  await backend.removeMember(made.room, "kim");
  await assert.rejects(backend.publish("bad", 1), { code: "bad_room", status: 400, retry: false });
});

scenario("the signature of a worker's request is checked", async (t) => {
  await clientOf(t, "kim").room("chat:hooked").send({ text: "check me" }).done;
  const hook = await until("the request", () => hooks[0], { deadline: 30_000 });
  assert.deepEqual([hook.worker, hook.room, hook.message.body], ["check", "chat:hooked", { text: "check me" }]);
});
