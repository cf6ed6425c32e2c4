// Centrifugo's SDK for JavaScript, unmodified, without a WebSocket: over its transports http_stream (JSON and Protobuf) and sse.
//
//     node fallbacks.mjs NATTER [NAME...]
//
// It does what sdk.mjs does over a WebSocket, where that is about no frames, and what only these transports have. NATTER,
// the names, what is installed and what is printed: see sdk.mjs.

import assert from "node:assert/strict";
import { once } from "node:events";
import http from "node:http";
import net from "node:net";

import { CONFIG, FALLBACKS, PROTOCOLS, Test, checkLoad, connectFrame, endpoint, newRoom } from "./clients.mjs";
import { SCENARIOS, comesBack } from "./scenarios.mjs";
import { Load, Results, Up, runExample, until, within } from "../support.mjs";

/** A client is pinged every 25 s, and is dead after 45 s. */
const PING_DEADLINE = 40_000;
const DEAD_DEADLINE = 70_000;
const JSON_STREAM = FALLBACKS[0];

async function commands_may_go_to_any_edge(t) {
  const channel = newRoom();
  const socket = t.client({ user: "lee", protocol: PROTOCOLS[t.protocol.name] }).subscribe(channel);
  await socket.ready();
  for (const [at, edge] of [0, 1].entries()) {
    const feed = t.client({ emulation: t.up.address(edge) }).subscribe(channel);
    await feed.ready();
    assert.equal(feed.client.of("connected")[0].transport, t.protocol.transport);
    await feed.publish(["by emulation", edge]);
    await socket.publish(["by WebSocket", edge]);
    assert.deepEqual(await feed.until(2), [["by emulation", edge], ["by WebSocket", edge]]);
    await socket.until(2 * (at + 1));
    // One's own message is read.
    assert.equal((await feed.client.rpc("room.unread", { rooms: [channel] })).rooms[0].count, 1);
  }
  assert.deepEqual(socket.values().map(([, edge]) => edge), [0, 0, 1, 1]);
}

async function takes_over_where_no_websocket_passes(t) {
  const blocked = await t.relay(t.up.address(0));
  blocked.cut();
  const transports = [
    { transport: "websocket", endpoint: `ws://${blocked.address}/connection/websocket` },
    endpoint(t.protocol.transport, t.up.address(0)),
  ];
  const feed = t.client({ transports }).subscribe(newRoom());
  await feed.ready();
  assert.equal(feed.client.of("connected")[0].transport, t.protocol.transport);
  await feed.publish("here");
  assert.deepEqual(await feed.until(1), ["here"]);
}

async function writes_under_load(t) {
  const channel = newRoom();
  const relay = await t.relay(t.up.address(0));
  const feed = t.client({ address: relay.address }).subscribe(channel);
  await feed.ready();
  const writers = await Promise.all([0, 1].map((edge) => t.client({ user: `writer-${edge}`, edge }).ready()));
  const ways = writers.map((writer, from) => [from, (number) => writer.publish(channel, { from: `${from}`, number })]);
  const load = new Load(Object.fromEntries(ways));
  for (let cut = 1; cut <= 3; cut++) {
    await load.more(20);
    relay.cut();
    await load.more(20);
    relay.open();
    await comesBack(feed, cut, `cut ${cut}`);
  }
  await load.stop();
  await checkLoad(load, feed);
  for (const writer of writers) assert.equal(writer.of("connecting").length, 1, "a writer had to reconnect");
}

async function revoked_tokens_end_it(t) {
  const user = `revoked-${t.protocol.transport}-${t.protocol.name}`;
  const client = await t.client({ user }).ready();
  await t.up.run("revoke", "--user", user);
  assert.equal((await client.event("disconnected")).code, 3503);
}

async function clients_leave_an_edge_that_drains(t) {
  const channel = newRoom();
  const feed = t.client({ edge: 0 }).subscribe(channel);
  await feed.ready();
  const writer = await t.native();
  await t.up.killEdge(0, "SIGTERM");
  await feed.client.event("connecting", ({ code }) => code === 3001);
  await writer.call("send", { room: channel, body: "meanwhile" });
  await comesBack(feed, 1, "after the drain");
  assert.deepEqual(await feed.until(1), ["meanwhile"]);
}

/** A client that reads nothing loses its place, and its connection. */
async function slow_readers_are_closed(t) {
  const channel = newRoom();
  const client = await t.client().ready();
  const [host, port] = t.up.address(0).split(":");
  const socket = net.connect({ host, port: Number(port) });
  t.closing.push(() => socket.destroy());
  await within(once(socket, "connect"), "a connection");
  const commands = [{ connect: { token: t.token("slow") }, id: 1 }, { subscribe: { channel }, id: 2 }];
  const body = commands.map((command) => JSON.stringify(command)).join("\n");
  socket.write(`POST /connection/http_stream HTTP/1.1\r\nHost: natter\r\nContent-Length: ${body.length}\r\n\r\n${body}`);
  const there = async () => Object.keys((await client.sdk.presence(channel)).clients).includes("slow");
  await until("the slow reader in the room", there);
  socket.pause();
  // More than the buffers of both kernels take.
  let sent = 0;
  await until("the end of the slow reader", async () => {
    for (let at = 0; at < 20; at++, sent++) await client.publish(channel, "x".repeat(60 * 1024));
    return !(await there());
  }, { deadline: DEAD_DEADLINE, last: () => `(after ${sent} messages)` });
}

// Long ----------------------------------------------------------------------------------------------------------------

/** A `fetch` that counts what goes to /emulation, and can keep it from going there. */
function counting() {
  const counted = { count: 0, swallow: false };
  counted.fetch = async (url, options) => {
    if (!url.endsWith("/emulation")) return fetch(url, options);
    counted.count += 1;
    return counted.swallow ? new Response(null, { status: 204 }) : fetch(url, options);
  };
  return counted;
}

/** On the second edge, because the first is killed meanwhile. */
async function pings_are_answered(t) {
  const counted = counting();
  const feed = t.client({ edge: 1, emulation: t.up.address(1), fetch: counted.fetch }).subscribe(newRoom());
  await feed.ready();
  const before = counted.count;
  // An idle client sends nothing else.
  await until("a pong", () => counted.count > before, { deadline: PING_DEADLINE });
  await feed.publish("still here");
  await feed.until(1);
  assert.equal(feed.client.of("connecting").length, 1, "it had to reconnect");
}

async function who_does_not_answer_is_closed(t) {
  const counted = counting();
  const client = await t.client({ edge: 1, emulation: t.up.address(1), fetch: counted.fetch }).ready();
  counted.swallow = true;
  await until("the close", () => client.of("connecting").find(({ code }) => code === 3012), {
    deadline: DEAD_DEADLINE,
    last: () => JSON.stringify(client.heard),
  });
}

// Once ----------------------------------------------------------------------------------------------------------------

/** First with a WebSocket, then where none passes. */
async function the_example_of_the_documents_runs(t) {
  const token = t.token("kim", { rooms: "chat:*" });
  for (const [transport, address] of [["websocket", t.up.address(0)], ["http_stream", await withoutUpgrades(t)]]) {
    const example = runExample("centrifugal", address, token, "## Without a WebSocket");
    t.closing.push(() => example.kill());
    let said = "";
    example.stdout.on("data", (data) => (said += data));
    const expected = `connected by ${transport}\nkim { text: 'hello' }\n`;
    await until(`the lines of the example over ${transport}`, () => said === expected, { last: () => said });
  }
}

/** The address of a proxy that knows no upgrade. */
async function withoutUpgrades(t) {
  const target = new URL(`http://${t.up.address(0)}`);
  const proxy = http.createServer((request, response) => {
    const { method, url, headers } = request;
    const passed = http.request({ host: target.hostname, port: target.port, method, path: url, headers }, (answer) => {
      response.writeHead(answer.statusCode, answer.headers);
      response.flushHeaders();
      answer.pipe(response);
    });
    passed.on("error", () => response.destroy());
    response.on("close", () => passed.destroy());
    request.pipe(passed);
  });
  proxy.on("upgrade", (_, socket) => socket.end("HTTP/1.1 403 Forbidden\r\nConnection: close\r\n\r\n"));
  proxy.listen(0, "127.0.0.1");
  t.closing.push(() => proxy.close());
  await within(once(proxy, "listening"), "the proxy");
  return `127.0.0.1:${proxy.address().port}`;
}

async function requests_that_mean_nothing_are_refused(t) {
  const base = `http://${t.up.address(0)}`;
  const ask = async (method, path, body, type) => {
    const headers = type ? { "content-type": type } : {};
    const answer = await within(fetch(`${base}${path}`, { method, body, headers }), `${method} ${path}`);
    const text = await within(answer.text(), `the answer to ${method} ${path}`);
    return [answer.status, answer.status < 300 || method === "HEAD" ? text : JSON.parse(text).code];
  };
  const emulation = (fields) => JSON.stringify({ session: "0".repeat(32), node: "nobody", data: "{}", ...fields });
  for (const [expected, ...request] of [
    [[405, ""], "HEAD", "/connection/sse?cf_connect=x"],
    [[400, "bad_request"], "GET", "/connection/sse"],
    [[400, "bad_request"], "POST", "/connection/http_stream", Buffer.from([0xff])],
    [[400, "bad_json"], "POST", "/emulation", "{"],
    [[400, "bad_request"], "POST", "/emulation", "{}"],
    [[400, "bad_request"], "POST", "/emulation", "{", "application/octet-stream"],
    [[404, "bad_request"], "POST", "/emulation", emulation()],
    [[404, "bad_request"], "POST", "/emulation", emulation({ node: "a b.>" })],
    [[413, "too_large"], "POST", "/emulation", emulation({ data: "x".repeat(2 * 1024 * 1024) })],
  ]) {
    assert.deepEqual(await ask(...request), expected, request.join(" ").slice(0, 100));
  }
  // The session of a client that is gone: its stream has ended, and the client knows.
  const requests = [];
  const listening = async (url, options) => {
    requests.push(options.body);
    return fetch(url, options);
  };
  const client = await t.client({ fetch: listening }).ready();
  await client.publish(newRoom(), 1);
  const last = requests.at(-1);
  client.sdk.disconnect();
  await until("the end of the session", async () => (await ask("POST", "/emulation", last))[0] === 204);
}

async function what_is_no_command_ends_the_stream(t) {
  const url = `http://${t.up.address(0)}/connection/http_stream`;
  const connect = connectFrame(PROTOCOLS.json, t.token("kim"));
  for (const body of ["garbage", '{"id":1,"presence":{"channel":"chat:lobby"}}', `${connect}\n{`]) {
    const answer = await within(fetch(url, { method: "POST", body }), "the head of the answer");
    assert.equal(answer.status, 200);
    const lines = (await within(answer.text(), "the end of the answer")).trimEnd().split("\n");
    const { push } = JSON.parse(lines.at(-1));
    assert.equal(push?.disconnect?.code, 3501, lines.at(-1));
    assert.ok(push.disconnect.reason, "no reason");
  }
}

/** With limits of its own. */
async function too_many_sessions_are_refused(binary) {
  const up = await Up.start(binary, { config: "[limits]\nsessions_per_user = 1\nsessions_per_ip = 2\n" });
  try {
    for (const protocol of FALLBACKS) {
      const test = new Test(up, protocol);
      const client = (user) => test.client({ user, emulation: up.address(0) });
      try {
        const first = await client("kim").ready();
        if (protocol === JSON_STREAM) {
          // Before the SDK tries it again and again, for which this address would have too many sessions.
          const body = connectFrame(protocol, test.token("kim"));
          const answer = await fetch(endpoint("http_stream", up.address(0)).endpoint, { method: "POST", body });
          const refusal = await within(answer.text(), "the refusal");
          assert.equal(JSON.parse(refusal).push?.disconnect?.code, 4005, refusal);
        }
        const again = client("kim"); // close 4005, with which the SDK tries again
        await again.event("error", ({ type }) => type === "connect");
        assert.equal(again.of("connected").length, 0);
        first.sdk.disconnect();
        await again.ready();
        const other = await client("lee").ready();
        const third = client("ann"); // the third of this address: 429
        await third.event("error", ({ type }) => type === "transport");
        assert.equal(third.of("connected").length, 0);
        other.sdk.disconnect();
        await third.ready();
        assert.equal(again.of("disconnected").length, 0);
      } finally {
        test.close();
      }
    }
  } finally {
    await up.stop();
  }
}

// -----------------------------------------------------------------------------------------------------------------------

const OWN = [
  commands_may_go_to_any_edge,
  takes_over_where_no_websocket_passes,
  writes_under_load,
  revoked_tokens_end_it,
];
const LONG = [pings_are_answered, who_does_not_answer_is_closed];
const ONCE = [
  the_example_of_the_documents_runs,
  requests_that_mean_nothing_are_refused,
  what_is_no_command_ends_the_stream,
  slow_readers_are_closed,
  clients_leave_an_edge_that_drains,
];

async function main() {
  const [binary, ...names] = process.argv.slice(2);
  if (!binary) {
    console.error("usage: node fallbacks.mjs NATTER [NAME...]");
    return 64;
  }
  const wanted = (scenario) => names.length === 0 || names.some((name) => scenario.name.includes(name));
  const results = new Results();
  const run = async (up, protocol, scenario) => {
    const test = new Test(up, protocol);
    await results.run(`${protocol.title}: ${scenario.name}`, () => scenario(test));
    test.close();
  };
  const up = await Up.start(binary, { config: CONFIG, edges: 2 });
  try {
    const waiting = FALLBACKS.flatMap((protocol) => LONG.filter(wanted).map((scenario) => run(up, protocol, scenario)));
    for (const protocol of FALLBACKS) {
      for (const scenario of [...OWN, ...SCENARIOS].filter(wanted)) await run(up, protocol, scenario);
    }
    for (const scenario of ONCE.filter(wanted)) await run(up, JSON_STREAM, scenario);
    await Promise.all(waiting);
  } finally {
    await up.stop();
  }
  if (wanted(too_many_sessions_are_refused)) {
    await results.run(too_many_sessions_are_refused.name, () => too_many_sessions_are_refused(binary));
  }
  return results.sum();
}

process.exit(await main());
