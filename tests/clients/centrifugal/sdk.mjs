// Centrifugo's SDK for JavaScript, unmodified, against natter: over JSON and over Protobuf, beside a client of natter.v1.
//
//     node sdk.mjs NATTER [NAME...]
//
// NATTER is the binary. The script installs the packages of package-lock.json into .natter/clients/centrifugal, starts
// `natter up` with a data folder of its own on free ports, and takes it down again. With names only the scenarios whose
// name contains one of them are run. It prints `N passed, N failed` and exits 0 or 1.
//
// Nothing here sleeps for a guessed time: every wait is for a condition, with a deadline.

import assert from "node:assert/strict";

import {
  CONFIG,
  PRESENCE,
  PROTOCOLS,
  UNSUBSCRIBE,
  Test,
  codeOf,
  command,
  connectFrame,
  newRoom,
  repliesTo,
} from "./clients.mjs";
import { SCENARIOS } from "./scenarios.mjs";
import { Results, Up, runExample, until } from "../support.mjs";

// Frames --------------------------------------------------------------------------------------------------------------

async function bytes_stay_what_they_are(t) {
  const channel = newRoom();
  const client = await t.client().ready();
  const json = await t.raw({ protocol: PROTOCOLS.json });
  // In one frame, as the SDK does it.
  json.send(`${connectFrame(PROTOCOLS.json, t.token("lee"))}\n${JSON.stringify({ id: 2, subscribe: { channel } })}`);
  await json.frame("the reply to subscribe", repliesTo(PROTOCOLS.json, 2));
  const bytes = t.client({ user: "ann", protocol: PROTOCOLS.protobuf }).subscribe(channel);
  await bytes.ready();
  const body = '{ "b" :1.0,"a": [1e2 ,12345678901234567890],  "c":"\\u00e9\\/" }';
  if (t.protocol.name === "json") json.send(`{"id":3,"publish":{"channel":"${channel}","data":${body}}}`);
  else await client.sdk.publish(channel, Buffer.from(body));
  const frame = await json.frame("the message in its own bytes", (text) => text.includes(body) && text);
  await bytes.until(1);
  assert.equal(Buffer.from(bytes.publications[0].bytes).toString(), body);
  const { push } = frame.split("\n").map((line) => JSON.parse(line)).find((reply) => reply.push?.pub);
  assert.equal(push.channel, channel);
  assert.ok(Number.isSafeInteger(push.pub.offset) && push.pub.offset > 0, "no offset");
  assert.ok(push.pub.time > 1_600_000_000_000, "no time in milliseconds");
  assert.ok(push.pub.info.user && push.pub.tags.id, JSON.stringify(push.pub));
}

async function bodies_that_are_no_json_are_refused(t) {
  const channel = newRoom();
  if (t.protocol.name === "protobuf") {
    const client = await t.client().ready();
    for (const bytes of ["", "no json", "{}{}", '"\\ud83d"', Buffer.from([0x22, 0xff, 0x22])]) {
      assert.equal(await codeOf(client.sdk.publish(channel, Buffer.from(bytes)), `publish ${bytes}`), 107);
    }
  } else {
    const raw = await t.raw();
    raw.send(connectFrame(t.protocol, t.token("kim")));
    raw.send(JSON.stringify({ id: 2, publish: { channel } }));
    const text = await raw.frame("the reply", (frame) => repliesTo(t.protocol, 2)(frame) && frame);
    const reply = text.split("\n").map((line) => JSON.parse(line)).find(({ id }) => id === 2);
    assert.equal(reply.error?.code, 107);
    assert.ok(reply.error.message, "an error without a message");
  }
}

async function broken_frames_end_the_connection(t) {
  const { protocol } = t;
  const json = protocol.name === "json";
  const good = connectFrame(protocol, t.token("kim"));
  const unknown = json ? '{"id":2,"nonsense":{}}' : Buffer.from([5, 8, 2, 0xa2, 6, 0]); // a field with the number 100
  for (const [what, connected, bytes] of [
    ["garbage", false, json ? "garbage" : Buffer.from([0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff])],
    ["garbage after the connect", true, json ? "{" : Buffer.from([200, 1, 2])],
    ["a method before the connect", false, command(protocol, 1, PRESENCE, ["channel"], "chat:lobby")],
    ["a second connect", true, connectFrame(protocol, t.token("kim"), 2)],
    ["an id without a method", true, json ? '{"id":2}' : Buffer.from([2, 8, 2])],
    ["an unknown method", true, unknown],
    ["a pong that nobody asked for", true, json ? "{}" : Buffer.from([0])],
  ]) {
    const raw = await t.raw();
    if (connected) {
      raw.send(good);
      await raw.frame("the reply to connect", repliesTo(protocol, 1));
    }
    raw.send(bytes);
    const { code, reason } = await raw.end(what);
    assert.equal(code, 3501, what);
    // The SDK reads the reason: an empty one means "come back", and JSON means an advice in it.
    assert.ok(reason, `${what}: no reason`);
    assert.throws(() => JSON.parse(reason), `${what}: the reason ${reason} is JSON`);
  }
}

async function harmless_commands_are_answered(t) {
  const raw = await t.raw();
  raw.send(connectFrame(t.protocol, t.token("kim")));
  raw.send(command(t.protocol, 2, UNSUBSCRIBE, ["channel"], newRoom())); // is in no room
  await raw.frame("the reply to unsubscribe", repliesTo(t.protocol, 2));
  assert.equal(raw.closed, null);
  if (t.protocol.name !== "json") return;
  const channel = newRoom();
  raw.send(JSON.stringify({ send: { data: {} } })); // has no reply
  for (const id of [3, 4]) raw.send(JSON.stringify({ id, subscribe: { channel, flag: 1, unheard_of: [] } }));
  const text = await raw.frame("the second reply to subscribe", (frame) => repliesTo(t.protocol, 4)(frame) && frame);
  const { error, subscribe } = text.split("\n").map((line) => JSON.parse(line)).find(({ id }) => id === 4);
  assert.equal(error, undefined);
  assert.equal(subscribe.recoverable, true); // It joins again.
  assert.equal(raw.closed, null);
}

// -----------------------------------------------------------------------------------------------------------------------

async function the_example_of_the_documents_runs(t) {
  const example = runExample("centrifugal", t.up.address(0), t.token("kim", { rooms: "chat:*" }));
  t.closing.push(() => example.kill());
  let said = "";
  example.stdout.on("data", (data) => (said += data));
  await until("the line of the example", () => /^kim \{ text: 'hello' \} \S+$/m.test(said), { last: () => said });
}

/** Begun first and awaited last: a ping comes after 25 s. */
async function pings(t) {
  const raw = await t.raw({ edge: 1 }); // the first edge is killed
  raw.send(connectFrame(t.protocol, t.token("kim")));
  await raw.frame("the reply to connect", repliesTo(t.protocol, 1));
  const json = t.protocol.name === "json";
  await until("a ping", () => raw.frames.some((frame) => (json ? frame.trim() === "{}" : frame.equals(Buffer.from([0])))), {
    deadline: 40_000,
    last: () => `(closed: ${JSON.stringify(raw.closed)})`,
  });
  raw.send(json ? "{}" : Buffer.from([0]));
  raw.send(command(t.protocol, 2, UNSUBSCRIBE, ["channel"], newRoom()));
  await raw.frame("a reply after the pong", repliesTo(t.protocol, 2));
}

// -----------------------------------------------------------------------------------------------------------------------

/** These need a WebSocket. */
const FRAMES = [
  bytes_stay_what_they_are,
  bodies_that_are_no_json_are_refused,
  broken_frames_end_the_connection,
  harmless_commands_are_answered,
];
/** These are about no protocol. */
const ONCE = [the_example_of_the_documents_runs];

async function main() {
  const [binary, ...names] = process.argv.slice(2);
  if (!binary) {
    console.error("usage: node sdk.mjs NATTER [NAME...]");
    return 64;
  }
  const wanted = (scenario) => names.length === 0 || names.some((name) => scenario.name.includes(name));
  const results = new Results();
  const run = async (up, protocol, scenario, name = `${protocol.name}: ${scenario.name}`) => {
    const test = new Test(up, protocol);
    await results.run(name, () => scenario(test));
    test.close();
  };
  const up = await Up.start(binary, { config: CONFIG, edges: 2 });
  try {
    const waiting = [];
    for (const protocol of Object.values(PROTOCOLS)) {
      if (!wanted(pings)) continue;
      waiting.push(run(up, protocol, pings));
    }
    for (const protocol of Object.values(PROTOCOLS)) {
      for (const scenario of [...FRAMES, ...SCENARIOS].filter(wanted)) await run(up, protocol, scenario);
    }
    for (const scenario of ONCE.filter(wanted)) await run(up, PROTOCOLS.json, scenario, scenario.name);
    await Promise.all(waiting);
  } finally {
    await up.stop();
  }
  if (wanted(nobody_is_anonymous_by_default)) {
    await results.run(nobody_is_anonymous_by_default.name, () => nobody_is_anonymous_by_default(binary));
  }
  return results.sum();
}

/** With the defaults a connect without a token is refused for good. */
async function nobody_is_anonymous_by_default(binary) {
  const up = await Up.start(binary);
  const test = new Test(up, PROTOCOLS.json);
  try {
    const end = await test.client({ token: "" }).event("disconnected");
    assert.ok(end.code > 100, JSON.stringify(end));
    await test.client().ready();
    await test.client({ token: test.foreign("kim") }).event("disconnected", (event) => event.code === 3500);
  } finally {
    test.close();
    await up.stop();
  }
}

process.exit(await main());
