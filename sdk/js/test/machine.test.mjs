// The state machine: SIMULATED sockets, a fake clock.

import assert from "node:assert/strict";
import { mock, test } from "node:test";

import { TRANSITIONS } from "../natter.js";
import { backoff } from "../protocol.js";
import { fakeClient, fakeTime, settle, tick, tokenOf } from "./fake.mjs";

/** Checks at the end that each state followed the one before as the table says. */
function checked(t, made) {
  t.after(() => {
    let before = "idle";
    for (const { name } of made.states) {
      assert.ok(TRANSITIONS[before].includes(name), `${before} -> ${name}`);
      before = name;
    }
  });
  return made;
}

test("it does nothing before it is asked to, and is online with the first frame", async (t) => {
  fakeTime(t);
  const { client, sockets, connected, names } = checked(t, fakeClient());
  await settle();
  assert.equal(client.state.name, "idle");
  assert.equal(sockets.length, 0);
  client.connect();
  client.connect();
  const socket = await connected();
  assert.equal(sockets.length, 1);
  assert.equal(socket.url, "ws://edge.test/ws");
  assert.deepEqual(socket.protocols, ["natter.v1", `bearer.${tokenOf({ sub: "kim" })}`]);
  assert.deepEqual(names(), ["connecting", "online"]);
  assert.equal(client.user, "kim");
});

test("an open socket is not online: a bad token ends it before", async (t) => {
  fakeTime(t);
  const { client, sockets, names } = checked(t, fakeClient());
  client.connect();
  await settle();
  sockets[0].open();
  sockets[0].end(4001, "bad_token");
  assert.deepEqual(names(), ["connecting", "closed"]);
  assert.deepEqual(client.state, { name: "closed", reason: "bad_token" });
});

test("the back-off doubles up to its cap, has jitter, and begins anew after a connection that lived", async (t) => {
  fakeTime(t);
  const { client, sockets, states, connected } = checked(t, fakeClient());
  client.connect();
  const waits = [];
  for (let i = 0; i < 9; i += 1) {
    await settle();
    sockets.at(-1).end(1006);
    waits.push(states.at(-1).retryAt - Date.now());
    await tick(waits.at(-1), 1_000);
  }
  assert.deepEqual(waits, [125, 250, 500, 1_000, 2_000, 4_000, 5_000, 5_000, 5_000]);
  const socket = await connected();
  await tick(5_000, 1_000);
  socket.end(1006);
  assert.equal(states.at(-1).retryAt - Date.now(), 125);
  mock.restoreAll();
  const some = Array.from({ length: 500 }, () => backoff(3));
  assert.ok(Math.min(...some) < 400 && Math.max(...some) > 1_600 && Math.max(...some) <= 2_000, "uniform up to 2 s");
});

test("close codes are heeded", async (t) => {
  fakeTime(t);
  const never = { 1002: "websocket_protocol", 1003: "binary_not_supported", 1007: "invalid_utf8", 1009: "frame_too_big", 4002: "revoked", 4004: "protocol_error", 4006: "disconnected" };
  for (const [code, reason] of Object.entries(never)) {
    const { client, connected, sockets } = fakeClient();
    client.connect();
    (await connected()).end(Number(code), "");
    assert.deepEqual(client.state, { name: "closed", reason }, code);
    await tick(60_000, 10_000);
    assert.equal(sockets.length, 1, `${code}: does not come back`);
  }
  for (const code of [1000, 1001, 1005, 1006, 1012, 4003, 4010, 1011, 4005, 4999]) {
    const { client, connected } = fakeClient();
    client.connect();
    (await connected()).end(code, "");
    assert.equal(client.state.name, "offline", code);
    const wait = client.state.retryAt - Date.now();
    assert.equal(wait >= 5_000, [1011, 4005, 4999].includes(code), `${code}: after ${wait} ms`);
    client.hurry();
    await settle();
    assert.equal(client.state.name, "offline", `${code}: nobody may hurry at once`);
    client.close();
  }
});

test("a half-open socket is noticed within 40 s, also while commands are sent", async (t) => {
  fakeTime(t);
  for (const busy of [false, true]) {
    const { client, connected, answers } = checked(t, fakeClient());
    client.connect();
    await connected();
    answers.ping = () => null; // frozen
    const began = Date.now();
    if (busy) client.request("history", { room: "chat:a" }).catch(() => {});
    while (client.state.name === "online" && Date.now() - began < 60_000) await tick(500, 500);
    const took = Date.now() - began;
    assert.deepEqual([client.state.name, client.state.reason], ["offline", "no_answer"]);
    assert.ok(took <= (busy ? 10_500 : 36_000), `${took} ms`);
    client.close();
  }
});

test("while frames come nothing is asked", async (t) => {
  fakeTime(t);
  const { client, connected } = checked(t, fakeClient());
  client.connect();
  const socket = await connected();
  for (let i = 0; i < 20; i += 1) {
    socket.push({ op: "typing", room: "chat:a", user: "lee" });
    await tick(10_000, 1_000);
  }
  assert.equal(socket.commands("ping").length, 1, "the one of the beginning");
  assert.equal(client.state.name, "online");
});

test("after a sleep of the computer it does not wait for an answer", async (t) => {
  fakeTime(t);
  const { client, connected } = checked(t, fakeClient());
  client.connect();
  await connected();
  mock.timers.setTime(Date.now() + 3_600_000);
  await tick(1); // what was due meanwhile runs, late
  assert.deepEqual([client.state.name, client.state.reason], ["offline", "asleep"]);
});

test("a connection that does not come is given up after 10 s", async (t) => {
  fakeTime(t);
  const { client, sockets } = checked(t, fakeClient());
  client.connect();
  await settle();
  await tick(10_000, 1_000);
  assert.equal(client.state.name, "offline");
  assert.equal(sockets[0].closedWith, 1000);
  sockets[0].open(); // too late: not heard
  assert.equal(client.state.name, "offline");
});

test("of several edges the next one is tried, and a drain moves to it at once", async (t) => {
  fakeTime(t);
  const { client, sockets, connected, names } = checked(t, fakeClient({ url: ["http://one.test", "https://two.test/natter/", "wss://three.test/ws"] }));
  client.connect();
  await settle();
  sockets[0].end(1006);
  await tick(200);
  const second = await connected();
  await tick(5_000, 1_000);
  second.push({ op: "reconnect", after_ms: 500 });
  await tick(450);
  assert.equal(sockets.length, 2);
  await tick(100);
  await connected();
  assert.deepEqual(sockets.map(({ url }) => url), ["ws://one.test/ws", "wss://two.test/natter/ws", "wss://three.test/ws"]);
  assert.equal(second.closedWith, 1000);
  assert.deepEqual(names(), ["connecting", "offline", "connecting", "online", "connecting", "online"]);
  assert.equal(client.address("/v1/uploads/x"), "https://three.test/v1/uploads/x");
});

test("a draining edge that closes early is left at once, too", async (t) => {
  fakeTime(t);
  const { client, sockets, connected } = checked(t, fakeClient({ url: ["ws://one.test", "ws://two.test"] }));
  client.connect();
  const socket = await connected();
  socket.push({ op: "reconnect", after_ms: 500 });
  socket.end(4010, "draining");
  assert.deepEqual(client.state, { name: "connecting", reason: "draining" });
  await connected();
  await tick(1_000);
  assert.deepEqual(sockets.map(({ url }) => url), ["ws://one.test/ws", "ws://two.test/ws"]);
  assert.equal(client.state.name, "online");
});

test("commands wait for a connection, at most 10 s, and are not repeated", async (t) => {
  fakeTime(t);
  const { client, connected } = checked(t, fakeClient({}, { unread: () => ({ op: "unread", rooms: [] }) }));
  const answer = client.request("unread", { rooms: [] });
  await connected();
  assert.deepEqual(await answer, { rooms: [] });
  const lost = client.request("never answered");
  await settle();
  client.close();
  await assert.rejects(lost, { code: "disconnected", retry: true });
  await assert.rejects(client.request("unread"), { code: "closed", retry: false });
  client.connect();
  const late = client.request("unread");
  late.catch(() => {});
  await tick(10_000, 1_000);
  await assert.rejects(late, { code: "disconnected" });
});

// Tokens --------------------------------------------------------------------------------------------------------------------

const inSeconds = (s) => Math.floor(Date.now() / 1000) + s;

test("one token is asked for at a time, and kept for the next connection", async (t) => {
  fakeTime(t);
  const asked = [];
  let give;
  const getToken = ({ reason, signal }) => {
    assert.equal(signal.aborted, false);
    asked.push(reason);
    return new Promise((resolve) => (give = resolve));
  };
  const { client, connected, sockets } = checked(t, fakeClient({ token: undefined, getToken, fetch: async () => new Response("null") }));
  client.connect();
  const other = client.http("GET", "inbox");
  await settle();
  assert.deepEqual(asked, ["first"]);
  give(tokenOf({ sub: "kim", exp: inSeconds(600) }));
  await other;
  (await connected()).end(1006);
  await tick(1_000);
  assert.equal(sockets.length, 2);
  assert.deepEqual(asked, ["first"]);
});

test("token_expiring: a new one is asked for once, and replaces it without a reconnect", async (t) => {
  fakeTime(t);
  const asked = [];
  let number = 0;
  const getToken = async ({ reason }) => {
    asked.push(reason);
    if (asked.length === 2) throw new Error("the application's server is away");
    return tokenOf({ sub: "kim", number: (number += 1), exp: inSeconds(3_600) });
  };
  const { client, connected, sockets } = checked(t, fakeClient({ token: undefined, getToken }, { refresh: () => ({ op: "refreshed", exp: 0 }) }));
  client.connect();
  const socket = await connected();
  socket.push({ op: "token_expiring", exp: inSeconds(60) });
  socket.push({ op: "token_expiring", exp: inSeconds(60) });
  await settle();
  await tick(20_000, 500);
  assert.deepEqual(asked, ["first", "expiring", "expiring"]);
  assert.equal(socket.commands("refresh").length, 1);
  assert.equal(sockets.length, 1);
  assert.equal(client.state.name, "online");
});

test("4001: another token is asked for, and the same one again closes the client", async (t) => {
  fakeTime(t);
  const asked = [];
  const given = [{ number: 1 }, { number: 2 }, { number: 2 }];
  const getToken = ({ reason }) => (asked.push(reason), tokenOf({ sub: "kim", ...given.shift() }));
  const { client, connected, sockets } = checked(t, fakeClient({ token: undefined, getToken }));
  client.connect();
  await settle();
  sockets[0].open();
  sockets[0].end(4001, "token_expired");
  assert.deepEqual([client.state.name, client.state.reason], ["offline", "token_expired"]);
  await tick(1_000);
  const second = await connected();
  assert.equal(client.state.name, "online");
  second.end(4001, "token_expired");
  await tick(1_000);
  assert.deepEqual(asked, ["first", "refused", "refused"]);
  assert.deepEqual(client.state, { name: "closed", reason: "bad_token" });
});

test("no token closes; an error is tried again; a token of somebody else closes", async (t) => {
  fakeTime(t);
  const none = fakeClient({ token: undefined, getToken: () => null });
  none.client.connect();
  await settle();
  assert.deepEqual(none.client.state, { name: "closed", reason: "no_token" });

  let calls = 0;
  const flaky = fakeClient({ token: undefined, getToken: () => (calls++ ? tokenOf({ sub: "kim" }) : Promise.reject(new Error("down"))) });
  flaky.client.connect();
  await settle();
  assert.deepEqual([flaky.client.state.name, flaky.client.state.reason], ["offline", "no_token"]);
  await tick(1_000);
  await flaky.connected();
  assert.equal(flaky.client.state.name, "online");

  const users = ["kim", "lee"];
  const other = fakeClient({ token: undefined, getToken: () => tokenOf({ sub: users.shift() }) });
  other.client.connect();
  (await other.connected()).end(4001, "token_expired");
  await tick(1_000);
  assert.deepEqual(other.client.state, { name: "closed", reason: "another_user" });
  assert.equal(other.client.user, "kim");
});

test("a getToken that never answers is given up after 30 s", async (t) => {
  fakeTime(t);
  let aborted;
  const getToken = ({ signal }) => new Promise(() => signal.addEventListener("abort", () => (aborted = true)));
  const { client } = checked(t, fakeClient({ token: undefined, getToken }));
  client.connect();
  await tick(30_000, 1_000);
  assert.equal(client.state.name, "offline");
  assert.equal(aborted, true);
});

test("close while a token is asked for: no socket is opened afterwards", async (t) => {
  fakeTime(t);
  let give;
  const { client, sockets } = checked(t, fakeClient({ token: undefined, getToken: () => new Promise((resolve) => (give = resolve)) }));
  client.connect();
  client.close();
  give(tokenOf({ sub: "kim" }));
  await tick(1_000);
  assert.equal(sockets.length, 0);
  assert.deepEqual(client.state, { name: "closed", reason: "closed" });
});

// A page --------------------------------------------------------------------------------------------------------------------

/** SIMULATED: as much of a page as the client looks at. */
function fakePage(t) {
  globalThis.window = new EventTarget();
  globalThis.document = Object.assign(new EventTarget(), { visibilityState: "visible" });
  t.after(() => {
    delete globalThis.window;
    delete globalThis.document;
  });
  return (target, name) => globalThis[target].dispatchEvent(new Event(name));
}

test("online, visibilitychange and pageshow try at once; what is there is asked for a sign of life", async (t) => {
  fakeTime(t);
  const fire = fakePage(t);
  const { client, sockets, connected, answers } = checked(t, fakeClient());
  client.connect();
  for (const [target, name] of [["window", "online"], ["document", "visibilitychange"], ["window", "pageshow"], ["document", "resume"]]) {
    for (let i = 0; i < 7; i += 1) {
      await settle();
      sockets.at(-1).end(1006);
      await tick(Math.min(client.state.retryAt - Date.now(), i < 6 ? 20_000 : 500), 500);
    }
    assert.equal(client.state.name, "offline");
    const count = sockets.length;
    fire(target, name);
    await settle();
    assert.equal(sockets.length, count + 1, name);
    const socket = await connected();
    fire(target, name);
    assert.equal(socket.commands("ping").length, 2, `${name}: asked`);
    await settle();
    await tick(10_000, 1_000);
  }
  answers.ping = () => null;
  await connected().catch(() => {});
  fire("document", "visibilitychange");
  await tick(5_000, 500);
  assert.equal(client.state.name, "offline", "a doubt is settled within 5 s");
});

test("pagehide gives the connection back, pageshow takes a new one; close forgets the page", async (t) => {
  fakeTime(t);
  const fire = fakePage(t);
  const { client, sockets, connected } = checked(t, fakeClient());
  client.connect();
  const socket = await connected();
  fire("window", "pagehide");
  assert.equal(socket.closedWith, 1000);
  assert.deepEqual(client.state, { name: "offline", reason: "page_hidden" });
  await tick(60_000, 10_000);
  assert.equal(sockets.length, 1);
  fire("window", "pageshow");
  await connected();
  assert.equal(client.state.name, "online");
  client.close();
  fire("window", "online");
  fire("window", "pageshow");
  await tick(1_000);
  assert.equal(sockets.length, 2);
});
