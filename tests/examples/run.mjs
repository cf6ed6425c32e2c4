// The examples of the folder examples/ as a person runs them, against a `natter up` with their configuration, in headless Chromium.
//
//     node tests/examples/run.mjs NATTER [FOLDER]
//
// With FOLDER it puts pictures there. The last line is `N passed, N failed`; 77 if there is no Chromium.

import assert from "node:assert/strict";
import { spawn, spawnSync } from "node:child_process";
import { createHmac } from "node:crypto";
import fs from "node:fs";
import { createRequire } from "node:module";
import net from "node:net";
import os from "node:os";
import path from "node:path";
import { fileURLToPath } from "node:url";

import { Natter } from "../../sdk/js/natter.js";
import { messages } from "../../sdk/js/store.js";
import { signToken } from "../../sdk/js/server.js";
import { Relay, Results, Up, findChromium, until, within } from "../clients/support.mjs";

const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const BACKEND = path.join(ROOT, "examples/backend");
const WIDGET = path.join(ROOT, "examples/support-widget");
const HOOK_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

const [binary, folder] = process.argv.slice(2);
if (!binary) {
  console.error("usage: node tests/examples/run.mjs NATTER [FOLDER]");
  process.exit(64);
}
const program = findChromium();
if (!program) {
  console.log("skipped: no Chromium");
  process.exit(77);
}

/** Installs the packages of a lock file in its folder, if others are there. */
function install(dir) {
  const lock = fs.readFileSync(path.join(dir, "package-lock.json"));
  const installed = path.join(dir, "node_modules/.natter-lock");
  if (fs.existsSync(installed) && fs.readFileSync(installed).equals(lock)) return;
  const npm = spawnSync("npm", ["ci", "--no-audit", "--no-fund", "--loglevel=error"], { cwd: dir, stdio: "inherit", timeout: 300_000 });
  if (npm.status !== 0) throw new Error(`npm ci in ${dir} ended with ${npm.status ?? npm.error}`);
  fs.writeFileSync(installed, lock);
}

async function freePort() {
  const server = net.createServer().listen(0, "127.0.0.1");
  await new Promise((resolve) => server.once("listening", resolve));
  const { port } = server.address();
  await new Promise((resolve) => server.close(resolve));
  return port;
}

/** `npm start` of an example. What it says is in `said`. */
function start(dir, env) {
  const child = spawn("npm", ["start", "--silent"], { cwd: dir, env: { ...process.env, ...env }, detached: true, stdio: ["ignore", "pipe", "pipe"] });
  const one = { said: "", ended: new Promise((resolve) => child.once("close", resolve)) };
  for (const stream of [child.stdout, child.stderr]) stream.on("data", (data) => (one.said += data));
  one.stop = async () => {
    if (child.exitCode === null && child.signalCode === null) process.kill(-child.pid, "SIGTERM");
    await one.ended;
  };
  return one;
}

install(path.join(ROOT, "sdk/js")); // playwright-core
install(WIDGET);
const { chromium } = createRequire(path.join(ROOT, "sdk/js/package.json"))("playwright-core");

const port = await freePort();
const config = fs.readFileSync(path.join(BACKEND, "natter.toml"), "utf8").replace(":3000/", `:${port}/`);
const results = new Results();
const up = await Up.start(binary, { config });
// The page reaches the edge through it, so that a test can take the network away.
const relay = await Relay.start(up.address(0));
const secretFile = path.join(up.data, "up/dev-secret");
const env = { NATTER_URL: `http://${relay.address}`, NATTER_SECRET_FILE: secretFile, PORT: String(port) };
const shop = `http://127.0.0.1:${port}`;
const operator = new Natter({
  url: up.edge(0).http,
  token: await signToken({ user: "support", grants: [{ rooms: "chat:*", can: ["read", "write", "presence", "history"] }] }, up.secret()),
});
let server = start(WIDGET, env);
const browser = await chromium.launch({ executablePath: program, args: ["--no-sandbox"] });
const context = await browser.newContext({ viewport: { width: 1280, height: 800 } });
const page = await context.newPage();
const problems = [];
page.on("console", (message) => message.type() === "error" && problems.push(message.text()));
page.on("pageerror", (error) => problems.push(String(error)));

const picture = (name) => folder && page.screenshot({ path: path.join(folder, `${name}.png`) });
const log = page.getByRole("log");
/** The texts that are shown, with the state of each. */
const shown = () => log.locator("li[data-id]").evaluateAll((items) => items.map((item) => [item.querySelector("p").textContent, item.dataset.state]));
const shows = (text, state = "sent") =>
  until(`${text}: ${state}`, async () => (await shown()).some(([its, at]) => its === text && at === state), { last: () => server.said });
const write = async (text) => {
  await page.getByLabel("Your message").fill(text);
  await page.getByRole("button", { name: "Send" }).click();
};
const conversations = async (key = "demo") => {
  const response = await fetch(`${shop}/conversations`, { headers: { authorization: `Bearer ${key}` } });
  return [response.status, await response.json()];
};
let room;
let store;

try {
  await results.run("it starts with one command and says where it is", async () => {
    await until("the server", () => /operators: http:\/\/.*\/operate#token=/.test(server.said), { deadline: 60_000, last: () => server.said });
    assert.ok(server.said.includes(`shop: ${shop}/`), server.said);
  });

  await results.run("a visitor writes, is greeted, and the back end hears of it by a hook", async () => {
    await page.goto(shop);
    await page.getByRole("button", { name: "Ask us" }).click();
    await picture("widget-empty");
    await page.getByText("Leave us a message").waitFor();
    await write("is it waterproof?");
    await shows("is it waterproof?");
    // The greeting comes only if the signature of the hook was right.
    await shows("Thank you for your message. We answer as soon as we can.");
    const [status, open] = await until("the conversation", async () => {
      const [code, all] = await conversations();
      return all.length === 1 && [code, all];
    });
    assert.equal(status, 200);
    assert.equal(open[0].text, "is it waterproof?");
    room = operator.room(open[0].room);
  });

  await results.run("somebody of the shop answers, is seen here, and the conversation is no longer open", async () => {
    store = messages(room);
    store.subscribe(() => {});
    await until("the visitor's message", () => store.getSnapshot().messages.some(({ body }) => body.text === "is it waterproof?"));
    await page.getByText("We are here").waitFor();
    room.typing();
    await page.getByText("Somebody is typing…").waitFor();
    await room.send({ text: "yes, IP65" }).done;
    await shows("yes, IP65");
    await until("it is answered", async () => (await conversations())[1].length === 0);
    await picture("widget-answered");
  });

  await results.run("what is unread is counted while the chat is closed, and a reload keeps everything", async () => {
    await page.keyboard.press("Escape");
    await page.getByRole("button", { name: "Ask us" }).waitFor();
    for (const text of ["anything else?", "we ship today"]) await room.send({ text }).done;
    await page.getByText("2 new messages").waitFor();
    await picture("widget-unread");
    await page.reload();
    await page.getByText("2 new messages").waitFor();
    await page.getByRole("button", { name: "Ask us" }).click();
    await shows("we ship today");
    const texts = (await shown()).map(([text]) => text);
    assert.deepEqual(texts, ["is it waterproof?", "Thank you for your message. We answer as soon as we can.", "yes, IP65", "anything else?", "we ship today"]);
    await page.keyboard.press("Escape");
    await until("nothing is unread", async () => !(await page.getByText("new messages").count()));
  });

  await results.run("what is written without a network is sent later, once", async () => {
    await page.getByRole("button", { name: "Ask us" }).click();
    relay.cut();
    await page.getByText("Connecting…").waitFor();
    await write("and in red?");
    await shows("and in red?", "pending");
    await picture("widget-pending");
    relay.open();
    await shows("and in red?");
    await until("the operator has it", () => store.getSnapshot().messages.some(({ body }) => body.text === "and in red?"));
    assert.equal(store.getSnapshot().messages.filter(({ body }) => body.text === "and in red?").length, 1);
  });

  await results.run("another visitor sees nothing of it", async () => {
    const other = await browser.newContext();
    try {
      const theirs = await other.newPage();
      await theirs.goto(shop);
      await theirs.getByRole("button", { name: "Ask us" }).click();
      await theirs.getByText("Leave us a message").waitFor();
      assert.equal(await theirs.getByRole("log").locator("li[data-id]").count(), 0);
    } finally {
      await other.close();
    }
  });

  await results.run("a hook with a wrong signature is refused, and so is who has no key", async () => {
    const body = JSON.stringify({ type: "message.created", at: 1, data: { room: room.name, message: { from: room.name.slice(5), body: { text: "forged" } } } });
    const post = async (secret, at = Math.floor(Date.now() / 1000)) => {
      const key = Buffer.from(secret.slice(6), "base64");
      const signature = createHmac("sha256", key).update(`x.${at}.${body}`).digest("base64");
      const headers = { "webhook-id": "x", "webhook-timestamp": String(at), "webhook-signature": `v1,${signature}` };
      const response = await fetch(`${shop}/hook`, { method: "POST", headers, body });
      return [response.status, (await response.json()).error];
    };
    assert.deepEqual(await post("whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"), [401, "bad_signature"]);
    assert.deepEqual(await post(HOOK_SECRET, 1), [401, "too_old"]);
    assert.equal((await fetch(`${shop}/hook`, { method: "POST", body })).status, 401);
    assert.equal((await conversations("wrong"))[0], 401);
    assert.ok(!JSON.stringify((await conversations())[1]).includes("forged"));
  });

  await results.run("the page says nothing to the console", () => {
    // The socket that was cut is the browser's own word.
    assert.deepEqual(problems.filter((text) => !text.includes("WebSocket connection")), []);
  });

  await results.run("on a phone it fits", async () => {
    await page.setViewportSize({ width: 390, height: 844 });
    await picture("widget-phone");
    const fits = await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth);
    assert.ok(fits, "the page is wider than the screen");
  });

  await results.run("the back end runs alone", async () => {
    await server.stop();
    server = start(BACKEND, env);
    await until("the back end", () => server.said.includes(`back end: ${shop}`), { last: () => server.said });
    const response = await fetch(`${shop}/session`, { method: "POST" });
    assert.equal(response.status, 200);
    assert.match((await response.json()).room, /^chat:visitor-/);
  });

  await results.run("without natter it says so", async () => {
    const alone = start(BACKEND, { ...env, NATTER_URL: `http://127.0.0.1:${await freePort()}`, PORT: String(await freePort()) });
    const code = await within(alone.ended, "its end");
    assert.notEqual(code, 0);
    assert.match(alone.said, /natter can't be reached at .*\(ECONNREFUSED\)/);
    assert.match(alone.said, /cargo run --release -- up --config examples\/backend\/natter.toml/);
  });
} finally {
  await browser.close();
  await server.stop();
  operator.close();
  relay.close();
  await up.stop();
}
process.exit(results.sum());
