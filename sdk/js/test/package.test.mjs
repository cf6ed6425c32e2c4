// The package as it is packed: its types, its size, its files, and the examples of README.md, which run as they stand there.

import assert from "node:assert/strict";
import { execFile, spawn } from "node:child_process";
import { createHmac } from "node:crypto";
import { once } from "node:events";
import fs from "node:fs";
import os from "node:os";
import path from "node:path";
import { after, before, test } from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { gzipSync } from "node:zlib";

import { build } from "esbuild";
import WebSocket from "ws";

import { Up, until, within } from "../../../tests/clients/support.mjs";
import { Natter } from "../natter.js";
import { signToken } from "../server.js";

const HERE = fileURLToPath(new URL("..", import.meta.url));
const run = promisify(execFile);
const binary = process.env.NATTER;
const skip = binary ? false : "no NATTER: set it to the program";
const GRANTS = [{ rooms: "*:*", can: ["read", "write", "presence", "history", "admin"] }];

/** Where the packed package is installed, beside the packages that examples need. */
const project = fs.mkdtempSync(path.join(os.tmpdir(), "natter-sdk-package-"));
const installed = path.join(project, "node_modules/@natter/client");
/** @type {string[]} */ let packed;
/** @type {Up} */ let up;

before(async () => {
  const { stdout } = await run("npm", ["pack", "--json", "--silent", "--pack-destination", project], { cwd: HERE });
  const [{ filename, files }] = JSON.parse(stdout);
  packed = files.map((file) => file.path).sort();
  fs.mkdirSync(installed, { recursive: true });
  await run("tar", ["-xzf", path.join(project, filename), "--strip-components=1", "-C", installed]);
  for (const name of ["react", "react-dom", "scheduler", "ws", "jsdom"]) {
    fs.symlinkSync(path.join(HERE, "node_modules", name), path.join(project, "node_modules", name));
  }
  if (!skip) up = await Up.start(binary, { edges: 1 });
});

after(async () => {
  await up?.stop();
  fs.rmSync(project, { recursive: true, force: true });
});

test("the package has the sources, their types, and nothing else", () => {
  const sources = ["connection", "emitter", "fold", "messages", "natter", "outbox", "protocol", "react", "room", "server", "snapshot", "store", "watch"];
  const expected = [...sources.map((name) => `${name}.js`), ...sources.map((name) => `types/${name}.d.ts`), "CHANGELOG.md", "LICENSE", "README.md", "package.json"];
  assert.deepEqual(packed, expected.sort());
  const { dependencies, sideEffects, license, version } = JSON.parse(fs.readFileSync(path.join(installed, "package.json"), "utf8"));
  assert.deepEqual([dependencies, sideEffects, license], [undefined, false, "Apache-2.0"]);
  assert.match(version, /^\d+\.\d+\.\d+/);
  assert.equal(fs.readFileSync(path.join(installed, "LICENSE"), "utf8"), fs.readFileSync(path.join(HERE, "../../LICENSE"), "utf8"));
});

test("the sources and a use of their types pass tsc --strict", async () => {
  const tsc = path.join(HERE, "node_modules/typescript/bin/tsc");
  for (const config of [".", "test/types"]) {
    await run(process.execPath, [tsc, "-p", config], { cwd: HERE }).catch(({ stdout }) => assert.fail(stdout));
  }
});

test("the lock file names no host", () => {
  assert.doesNotMatch(fs.readFileSync(path.join(HERE, "package-lock.json"), "utf8"), /"resolved"/);
});

for (const [entry, most, external] of [
  ["natter.js", 12_000, []],
  ["store.js", 6_000, []],
  ["react.js", 3_000, ["react", "./natter.js", "./store.js"]],
]) {
  test(`${entry} has at most ${most} bytes, minified and with gzip`, async (t) => {
    const { outputFiles } = await build({ entryPoints: [path.join(HERE, entry)], bundle: true, minify: true, format: "esm", write: false, external });
    const size = gzipSync(outputFiles[0].contents, { level: 9 }).length;
    t.diagnostic(`${size} bytes`);
    assert.ok(size <= most, `${size} bytes`);
  });
}

// README.md -----------------------------------------------------------------------------------------------------------------

/** An example of README.md as it stands there, at another address. */
function example(name) {
  const readme = fs.readFileSync(path.join(HERE, "README.md"), "utf8");
  const [, text] = readme.match(new RegExp(`<!-- run: ${name} -->\\n\`\`\`js\\n(.*?)\`\`\``, "s"));
  assert.ok(text.trim().split("\n").length <= 12, "about ten lines");
  return text.replaceAll("https://chat.example.org", up.edge(0).http);
}

const token = (user) => signToken({ user, grants: GRANTS }, up.secret());

/** What an example takes for granted: what its reader has. */
async function globals(user, more = {}) {
  const given = { token: await token(user), ...more };
  return `import WebSocket from "ws";
const given = ${JSON.stringify(given)};
globalThis.WebSocket ??= WebSocket;
globalThis.getToken = async () => given.token;
const entries = new Map();
globalThis.localStorage = { get length() { return entries.size; }, key: (i) => [...entries.keys()][i] ?? null, getItem: (k) => entries.get(k) ?? null, setItem: (k, v) => void entries.set(k, v), removeItem: (k) => void entries.delete(k) };
Object.assign(globalThis, given.globals);
if (given.hook) globalThis.request = new Request("http://here/", { method: "POST", ...given.hook });
`;
}

/** Runs a module beside the packed package. */
async function runModule(t, name, text, before, env = {}) {
  fs.writeFileSync(path.join(project, `${name}-globals.mjs`), before);
  fs.writeFileSync(path.join(project, `${name}.mjs`), text);
  const child = spawn(process.execPath, ["--import", `./${name}-globals.mjs`, `${name}.mjs`], { cwd: project, env: { ...process.env, ...env }, stdio: ["ignore", "pipe", "inherit"] });
  t.after(() => child.kill());
  const made = { child, out: "" };
  child.stdout.on("data", (data) => (made.out += data));
  return made;
}

function observer(t) {
  const client = new Natter({ url: up.edge(0).http, WebSocket, getToken: () => token("observer") });
  t.after(() => client.close());
  const heard = [];
  client.room("chat:lobby").on("message", (message) => heard.push(message));
  return { client, room: client.room("chat:lobby"), heard };
}

test("README.md: a page", { skip, timeout: 30_000 }, async (t) => {
  const { room, heard } = observer(t);
  await room.join();
  const made = await runModule(t, "page", example("page"), await globals("page"));
  await until("the message", () => heard.some(({ from, body }) => from === "page" && body.text === "hello"));
  await until("what is shown", () => /^page hello sent$/m.test(made.out), { last: () => made.out });
});

test("README.md: React", { skip, timeout: 30_000 }, async (t) => {
  const { room, heard } = observer(t);
  await room.join();
  const show = `import { JSDOM } from "jsdom";
const { window } = new JSDOM("<div id=app></div>", { pretendToBeVisual: true });
Object.assign(globalThis, { window, document: window.document });
globalThis.navigator ??= window.navigator;
const { createRoot } = await import("react-dom/client");
const { createElement, StrictMode } = await import("react");
const { App } = await import("./react-example.mjs");
createRoot(document.querySelector("#app")).render(createElement(StrictMode, null, createElement(App)));
const shown = (pick) => new Promise((resolve) => { const timer = setInterval(() => { const got = pick(); if (got) { clearInterval(timer); resolve(got); } }, 5); });
(await shown(() => document.querySelector("button"))).click();
console.log("shown", (await shown(() => [...document.querySelectorAll("li")].find((item) => item.textContent === "react: hello"))).textContent);
`;
  fs.writeFileSync(path.join(project, "react-example.mjs"), example("react"));
  const made = await runModule(t, "react-page", show, await globals("react"));
  await until("what is shown", () => made.out.includes("shown react: hello"));
  await until("the message", () => heard.some(({ from, body }) => from === "react" && body.text === "hello"));
});

test("README.md: Node", { skip, timeout: 30_000 }, async (t) => {
  const { client, room, heard } = observer(t);
  await room.join({ presence: true });
  await runModule(t, "node", example("node"), await globals("bot"));
  await until("the bot", async () => (await room.presence()).users.some(({ user }) => user === "bot"));
  const { id } = await room.send({ text: "echo" }).done;
  const answer = await until("the answer", () => heard.find(({ reply_to }) => reply_to === `${client.user}/${id}`));
  assert.deepEqual([answer.from, answer.body], ["bot", { text: "you said: echo" }]);
});

test("README.md: a server", { skip, timeout: 30_000 }, async (t) => {
  const [newSecret, oldSecret] = [1, 2].map((byte) => `whsec_${Buffer.alloc(32, byte).toString("base64")}`);
  const [id, at, body] = ["msg_1", String(Math.floor(Date.now() / 1000)), '{"room":"chat:lobby"}'];
  const signature = createHmac("sha256", Buffer.alloc(32, 2)).update(`${id}.${at}.${body}`).digest("base64");
  const headers = { "webhook-id": id, "webhook-timestamp": at, "webhook-signature": `v1,${signature}` };
  const more = { hook: { headers, body }, globals: { newSecret, oldSecret, serviceToken: await token("service") } };
  const text = `${example("server")}\nconsole.log(JSON.stringify({ token, hook }));`;
  const { child, ...made } = await runModule(t, "server", text, await globals("service", more), { NATTER_SECRET: up.secret() });
  let out = "";
  child.stdout.on("data", (data) => (out += data));
  const [code] = await within(once(child, "close"), "the example");
  assert.equal(code, 0);
  const result = JSON.parse(out || made.out);
  assert.deepEqual(result.hook, { room: "chat:lobby" });
  const kim = new Natter({ url: up.edge(0).http, WebSocket, token: result.token });
  t.after(() => kim.close());
  const { messages } = await kim.room("chat:lobby").history();
  const order = messages.find((message) => message.id === "order-7");
  assert.deepEqual([order.from, order.body.text], ["kim", "your order is on its way"]);
});
