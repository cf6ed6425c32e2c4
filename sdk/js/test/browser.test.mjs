// The SDK in a real browser (Chromium, headless) against a real natter: reload, the network, back and forward. NATTER is the
// program. Without Chromium these are skipped.

import assert from "node:assert/strict";
import { once } from "node:events";
import fs from "node:fs";
import http from "node:http";
import path from "node:path";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";

import { chromium } from "playwright-core";
import WebSocket from "ws";

import { Relay, Up, findChromium, until } from "../../../tests/clients/support.mjs";
import { Natter } from "../natter.js";
import { signToken } from "../server.js";

const HERE = fileURLToPath(new URL("..", import.meta.url));
const binary = process.env.NATTER;
const program = findChromium();
const skip = !binary ? "no NATTER: set it to the program" : !program ? "no Chromium" : false;
const GRANTS = [{ rooms: "*:*", can: ["read", "write", "presence", "history"] }];

/** @type {Up} */ let up;
let server, browser, relay, writer;
let base;

/** A page that shows a room, and leaves in `window.t` what a test looks at. */
const PAGE = `<!doctype html><meta charset="utf-8"><title>test</title><script type="module">
import { Natter } from "/sdk/natter.js";
import { messages } from "/sdk/store.js";
const { url, token, name } = JSON.parse(decodeURIComponent(location.hash.slice(1)));
const client = new Natter({ url, token, storage: localStorage });
const room = client.room(name);
const states = [];
client.on("state", (state) => states.push(state.name + (state.reason ? " " + state.reason : "")));
const shown = messages(room);
shown.subscribe(() => {});
window.t = { client, room, shown, states, bodies: () => shown.getSnapshot().messages.map(({ body, status }) => body + ":" + status) };
</script>`;

before(async () => {
  if (skip) return;
  up = await Up.start(binary, { edges: 1 });
  relay = await Relay.start(up.address(0));
  server = http.createServer((request, response) => {
    const file = request.url.match(/^\/sdk\/(\w+\.js)$/)?.[1];
    if (file) response.writeHead(200, { "content-type": "text/javascript" }).end(fs.readFileSync(path.join(HERE, file)));
    else response.writeHead(200, { "content-type": "text/html" }).end(request.url === "/other" ? "<!doctype html><title>other</title>" : PAGE);
  });
  await once(server.listen(0, "127.0.0.1"), "listening");
  base = `http://127.0.0.1:${server.address().port}`;
  writer = new Natter({ url: up.edge(0).http, WebSocket, token: await signToken({ user: "lee", grants: GRANTS }, up.secret()) });
  browser = await chromium.launch({ executablePath: program, args: ["--no-sandbox"], ignoreDefaultArgs: ["--disable-back-forward-cache"] });
});

after(async () => {
  writer?.close();
  await browser?.close();
  server?.close();
  relay?.close();
  await up?.stop();
});

/** A page in a room of its own, connected through the relay. */
async function open(t, name) {
  relay.open();
  const context = await browser.newContext();
  t.after(() => context.close());
  const page = await context.newPage();
  const token = await signToken({ user: "kim", grants: GRANTS }, up.secret());
  const hash = encodeURIComponent(JSON.stringify({ url: `ws://${relay.address}`, token, name }));
  await page.goto(`${base}/#${hash}`);
  await shows(page, "ready", () => window.t?.shown.getSnapshot().state === "ready");
  return { context, page, room: writer.room(name) };
}

const shows = (page, what, pick, arg) => page.waitForFunction(pick, arg, { timeout: 30_000 }).catch((error) => assert.fail(`${what}: ${error.message}`));
const bodies = (page) => page.evaluate(() => window.t.bodies());
const hasBodies = (page, wanted) => shows(page, wanted.join(), (all) => window.t?.bodies().join() === all, wanted.join());

test("a reload: what was written offline is shown, and sent once", { skip, timeout: 90_000 }, async (t) => {
  const { page, room } = await open(t, "chat:reload");
  await room.send("one").done;
  await hasBodies(page, ["one:sent"]);
  relay.cut();
  await page.evaluate(() => void window.t.room.send("two"));
  await hasBodies(page, ["one:sent", "two:pending"]);
  await page.reload();
  await hasBodies(page, ["two:pending"]);
  relay.open();
  await hasBodies(page, ["one:sent", "two:sent"]);
  const { messages } = await room.history();
  assert.deepEqual(messages.map(({ from, body }) => [from, body]), [["lee", "one"], ["kim", "two"]]);
});

test("the network comes back: it tries at once, and resumes", { skip, timeout: 90_000 }, async (t) => {
  const { context, page, room } = await open(t, "chat:offline");
  await room.send("one").done;
  await hasBodies(page, ["one:sent"]);
  relay.cut();
  await context.setOffline(true);
  await shows(page, "offline", () => window.t.client.state.name === "offline");
  await room.send("two").done;
  relay.open();
  await context.setOffline(false);
  await hasBodies(page, ["one:sent", "two:sent"]);
});

test("away and back: the connection is given back, and the room is resumed", { skip, timeout: 90_000 }, async (t) => {
  const { page, room } = await open(t, "chat:back");
  await room.send("one").done;
  await hasBodies(page, ["one:sent"]);
  await page.evaluate(() => {
    window.t.marked = true;
    addEventListener("pageshow", ({ persisted }) => (window.t.persisted = persisted));
  });
  await page.goto(`${base}/other`);
  await until("that it has gone", async () => (await room.presence()).users.every(({ user }) => user !== "kim"));
  await room.send("two").done;
  await page.goBack({ waitUntil: "commit" });
  await hasBodies(page, ["one:sent", "two:sent"]);
  const { marked, persisted, states } = await page.evaluate(() => window.t);
  t.diagnostic(marked ? `the page was kept (persisted: ${persisted}): ${states}` : "the page was not kept: loaded anew");
  if (marked) assert.ok(states.includes("offline page_hidden"), states.join());
  assert.deepEqual(await bodies(page), ["one:sent", "two:sent"]);
});
