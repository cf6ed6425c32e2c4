// What the tests of clients share: packages, waits, results, `natter up`, tokens, a relay that can be cut, plain connections by
// WebSocket and to NATS, and a load of messages that can be checked.

import assert from "node:assert/strict";
import { spawn, spawnSync } from "node:child_process";
import { createHmac, randomBytes } from "node:crypto";
import { once } from "node:events";
import fs from "node:fs";
import { createRequire } from "node:module";
import net from "node:net";
import os from "node:os";
import path from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";

const HERE = path.dirname(fileURLToPath(import.meta.url));
const ROOT = path.resolve(HERE, "../..");

/** Milliseconds for what should take a few of them. */
export const DEADLINE = 15_000;
/** Milliseconds for a scenario, which waits for several of them. */
const SCENARIO_DEADLINE = 10 * DEADLINE;
/** `natter up` may have to fetch its servers. */
const START_DEADLINE = 180_000;
const STOP_DEADLINE = 40_000;

// Packages ------------------------------------------------------------------------------------------------------------

/** Where the packages of a folder of this one are installed. */
function modulesOf(folder) {
  return path.join(ROOT, ".natter/clients", folder);
}

/** Installs the packages of a folder's package-lock.json, if others are there, and gives a `require` for them. */
export function packages(folder) {
  const modules = modulesOf(folder);
  fs.mkdirSync(modules, { recursive: true });
  const lock = fs.readFileSync(path.join(HERE, folder, "package-lock.json"));
  const installed = path.join(modules, "installed.json");
  if (!fs.existsSync(installed) || !fs.readFileSync(installed).equals(lock)) {
    for (const file of ["package.json", "package-lock.json"]) {
      fs.copyFileSync(path.join(HERE, folder, file), path.join(modules, file));
    }
    const args = ["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"];
    const npm = spawnSync("npm", args, { cwd: modules, stdio: "inherit", timeout: START_DEADLINE });
    if (npm.status !== 0) throw new Error(`npm ci ended with ${npm.status ?? npm.error}`);
    fs.writeFileSync(installed, lock);
  }
  return createRequire(path.join(modules, "package.json"));
}

/** The Chromium of this machine, or null. */
export function findChromium() {
  const folders = (process.env.PATH ?? "").split(":");
  return folders.flatMap((folder) => ["chromium", "chromium-browser"].map((name) => `${folder}/${name}`)).find((file) => fs.existsSync(file)) ?? null;
}

/** The first example in a language of the page docs/FOLDER.md, or of what follows a heading there, as it stands there. */
export function exampleOf(folder, language, heading = "# ") {
  const page = fs.readFileSync(path.join(ROOT, `docs/${folder}.md`), "utf8");
  const [, text] = page.slice(page.indexOf(heading)).match(new RegExp(`^\`\`\`${language}\\n(.*?)^\`\`\`$`, "ms"));
  return text;
}

/** Runs a JavaScript example of docs/FOLDER.md as it stands there, at another address; the process. */
export function runExample(folder, address, token, heading) {
  const file = path.join(modulesOf(folder), "example.mjs"); // beside the packages
  fs.writeFileSync(file, exampleOf(folder, "js", heading).replaceAll("127.0.0.1:8080", address));
  return spawn(process.execPath, [file], { env: { ...process.env, TOKEN: token }, stdio: ["ignore", "pipe", "inherit"] });
}

// Waits ---------------------------------------------------------------------------------------------------------------

/** The value of a promise, or an error that names what was waited for. */
export async function within(promise, what, deadline = DEADLINE) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what}: not within ${deadline} ms`)), deadline);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** Waits until a condition gives something true, and gives it back. `last` may describe the state for the message. */
export async function until(what, condition, { deadline = DEADLINE, last = () => "" } = {}) {
  const end = Date.now() + deadline;
  for (;;) {
    const got = await condition();
    if (got) return got;
    if (Date.now() > end) throw new Error(`${what}: not within ${deadline} ms ${last()}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

// Results -------------------------------------------------------------------------------------------------------------

/** Runs scenarios one by one or at once, prints how each ended, and counts them. */
export class Results {
  constructor() {
    this.passed = 0;
    this.failed = 0;
    // The exception of a handler of an SDK, or a promise of a scenario that failed earlier.
    process.on("unhandledRejection", (error) => this.#fail("an unhandled rejection", error));
  }

  #fail(name, error) {
    console.log(`FAIL  ${name}: ${error?.stack ?? JSON.stringify(error)}`);
    this.failed += 1;
  }

  async run(name, deed, deadline = SCENARIO_DEADLINE) {
    try {
      await within((async () => deed())(), name, deadline);
      console.log(`ok    ${name}`);
      this.passed += 1;
    } catch (error) {
      this.#fail(name, error);
    }
  }

  /** Prints the sum; the exit code. */
  sum() {
    console.log(`${this.passed} passed, ${this.failed} failed`);
    return this.failed ? 1 : 0;
  }
}

// natter --------------------------------------------------------------------------------------------------------------

/** A secret for tokens in Centrifugo's form. */
export const CENTRIFUGAL_SECRET = "a secret of Centrifugo's own tokens, 32 bytes or more";
/** All rights in a room. */
export const ALL = ["read", "write", "presence", "history"];
/** Configuration of a namespace in which everybody may do everything: what a token in Centrifugo's form allows. */
export const MAIN_NAMESPACE = `
[namespaces.main]
durable = true
typing = true
history = true
presence = "users"
everybody = ${JSON.stringify(ALL)}
`;

/** A `natter up` with data of its own on free ports. */
export class Up {
  /** Starts it with a configuration, and waits until it is ready. */
  static async start(binary, { config = "", edges = 1, mongodb = false } = {}) {
    const up = new Up();
    up.binary = path.resolve(binary);
    up.data = fs.mkdtempSync(path.join(os.tmpdir(), "natter-clients-"));
    const file = path.join(up.data, "config.toml");
    fs.writeFileSync(file, config);
    const args = ["up", "--config", file, "--edges", String(edges), "--json"];
    args.push(...(mongodb ? ["--mongodb-port", "0"] : ["--no-mongodb"]));
    args.push("--port", "0", "--nats-port", "0", "--data", path.join(up.data, "up"));
    // Nothing of what a person's machine says to natter.
    const env = Object.fromEntries(Object.entries(process.env).filter(([name]) => !name.startsWith("NATTER__")));
    up.log = path.join(up.data, "up.log");
    up.process = spawn(up.binary, args, {
      cwd: ROOT, // where .natter/bin is
      env,
      detached: true, // a process group of its own, so that all of it can be ended
      stdio: ["ignore", "pipe", fs.openSync(up.log, "w")],
    });
    // Its group gets no signal of this one's terminal.
    for (const signal of ["SIGINT", "SIGTERM"]) process.once(signal, () => up.stop().finally(() => process.exit(130)));
    up.exited = new Promise((resolve) => up.process.once("exit", (code, signal) => resolve(code ?? signal)));
    up.lines = [];
    createInterface({ input: up.process.stdout }).on("line", (line) => up.lines.push(JSON.parse(line)));
    try {
      await up.line(1, START_DEADLINE);
    } catch (error) {
      await up.stop();
      throw error;
    }
    return up;
  }

  /** Waits for the line with this number; `natter up` prints one when it is ready, and one after each restart of a child. */
  async line(number, deadline = 60_000) {
    const ended = this.exited.then((code) => {
      throw new Error(`natter up ended with ${code}: ${fs.readFileSync(this.log, "utf8").slice(-2000)}`);
    });
    ended.catch(() => {}); // it may end later, and then nobody waits for it
    await Promise.race([until(`line ${number} of natter up`, () => this.lines.length >= number, { deadline }), ended]);
  }

  edge(number) {
    return this.lines.at(-1).regions[0].edges[number];
  }

  /** host:port of an edge. */
  address(number) {
    return new URL(this.edge(number).http).host;
  }

  /** Ends an edge, and waits until `natter up` has started it again on its port. With SIGTERM it drains. */
  async killEdge(number, signal = "SIGKILL") {
    const before = this.lines.length;
    process.kill(this.edge(number).pid, signal);
    await this.line(before + 1);
  }

  nats() {
    return this.lines.at(-1).regions[0].nats;
  }

  /** Another natter with these arguments, for example `revoke`. */
  async run(...args) {
    const env = { ...process.env, NATTER__NATS__URL: this.nats() };
    const command = spawn(this.binary, args, { env, stdio: ["ignore", "ignore", "inherit"] });
    const [code] = await within(once(command, "exit"), `natter ${args[0]}`);
    assert.equal(code, 0, `natter ${args.join(" ")}`);
  }

  /** Does something while NATS stands still. What it gives is called when NATS runs again, and awaited. */
  async withFrozenNats(deed) {
    const pid = this.lines.at(-1).regions[0].nats_pid;
    process.kill(pid, "SIGSTOP");
    let after;
    try {
      after = await deed();
    } finally {
      process.kill(pid, "SIGCONT");
    }
    await after();
  }

  secret() {
    return fs.readFileSync(path.join(this.data, "up/dev-secret"), "utf8").trim();
  }

  async stop() {
    if (this.process.exitCode === null && this.process.signalCode === null) {
      this.process.kill("SIGTERM");
      try {
        await within(this.exited, "the end of natter up", STOP_DEADLINE);
      } catch {
        process.kill(-this.process.pid, "SIGKILL");
        await this.exited;
      }
    }
    fs.rmSync(this.data, { recursive: true, force: true });
  }
}

/** A JWT with HS256. */
export function jwt(claims, secret) {
  const part = (value) => Buffer.from(JSON.stringify(value)).toString("base64url");
  const signed = `${part({ alg: "HS256", typ: "JWT" })}.${part(claims)}`;
  return `${signed}.${createHmac("sha256", secret).update(signed).digest("base64url")}`;
}

export function nowSeconds() {
  return Math.floor(Date.now() / 1000);
}

export function newName(prefix = "") {
  return prefix + randomBytes(6).toString("hex");
}

/** The name of the room of a channel or destination: bytes of other characters are written `=XX`. */
export function escapedName(text) {
  const escaped = (byte) => "=" + byte.toString(16).toUpperCase().padStart(2, "0");
  return [...Buffer.from(text)]
    .map((byte) => (/[A-Za-z0-9_-]/.test(String.fromCharCode(byte)) ? String.fromCharCode(byte) : escaped(byte)))
    .join("");
}

// Scenarios -----------------------------------------------------------------------------------------------------------

/** What a scenario is given; whatever it opens is closed at its end. The tests of a protocol add to it. */
export class BaseTest {
  constructor(up, WebSocket) {
    this.up = up;
    this.WebSocket = WebSocket;
    this.closing = [];
  }

  /** A token of natter. */
  token(user, { can = ALL, rooms = "*:*", ttl = 3600, info } = {}) {
    const now = nowSeconds();
    return jwt({ sub: user, iat: now, exp: now + ttl, info, grants: [{ rooms, can }] }, this.up.secret());
  }

  /** A token in Centrifugo's form: what it allows is what the namespace allows to everybody. */
  foreign(user, claims = {}) {
    return jwt({ sub: user, ...claims }, CENTRIFUGAL_SECRET);
  }

  async native({ user = "ann", edge = 1 } = {}) {
    const native = await Native.open(this.WebSocket, this.up.address(edge), this.token(user));
    this.closing.push(() => native.close());
    return native;
  }

  async relay(target = this.up.address(0)) {
    const relay = await Relay.start(target);
    this.closing.push(() => relay.close());
    return relay;
  }

  close() {
    for (const close of this.closing.reverse()) void close();
  }
}

/** The `main` of a script: runs those of its scenarios that the command line names, or all, with one `natter up`. `long` ones
 * run beside the others, `last` ones alone after all. The exit code. */
export async function runScenarios(script, { Test, config, scenarios, long = [], last = [] }) {
  const [binary, ...names] = process.argv.slice(2);
  if (!binary) {
    console.error(`usage: node ${script} NATTER [NAME...]`);
    return 64;
  }
  const wanted = (scenario) => names.length === 0 || names.some((name) => scenario.name.includes(name));
  const results = new Results();
  const up = await Up.start(binary, { config, edges: 2 });
  const run = async (scenario) => {
    const test = new Test(up);
    await results.run(scenario.name, () => scenario(test));
    test.close();
  };
  try {
    const waiting = long.filter(wanted).map(run);
    for (const scenario of scenarios.filter(wanted)) await run(scenario);
    await Promise.all(waiting);
    for (const scenario of last.filter(wanted)) await run(scenario);
  } finally {
    await up.stop();
  }
  return results.sum();
}

// Relay ---------------------------------------------------------------------------------------------------------------

/** Passes connections on to an address. All of them can be cut at once, and new ones refused until it is opened again. */
export class Relay {
  static async start(target) {
    const relay = new Relay();
    relay.target = target;
    relay.refusing = false;
    relay.sockets = new Set();
    relay.server = net.createServer((inner) => relay.#accept(inner)).listen(0, "127.0.0.1");
    await within(once(relay.server, "listening"), "the relay");
    relay.address = `127.0.0.1:${relay.server.address().port}`;
    return relay;
  }

  #accept(inner) {
    if (this.refusing) {
      inner.destroy();
      return;
    }
    const [host, port] = this.target.split(":");
    const outer = net.connect({ host, port: Number(port) });
    for (const [socket, other] of [[inner, outer], [outer, inner]]) {
      this.sockets.add(socket);
      socket.setNoDelay(true);
      socket.on("error", () => other.destroy());
      socket.on("close", () => {
        this.sockets.delete(socket);
        other.destroy();
      });
      socket.pipe(other);
    }
  }

  /** Ends all connections without a close frame. No new ones are accepted until `open`. */
  cut() {
    this.refusing = true;
    for (const socket of this.sockets) socket.destroy();
  }

  open(target = this.target) {
    this.target = target;
    this.refusing = false;
  }

  close() {
    this.cut();
    this.server.close();
  }
}

// Plain WebSocket connections -----------------------------------------------------------------------------------------

/** A connection of the package `ws`, with its frames in order and how it ended. */
export class Raw {
  static async open(WebSocket, url, subprotocols = [], options = {}) {
    const raw = new Raw();
    raw.frames = [];
    raw.closed = null;
    raw.socket = new WebSocket(url, subprotocols, { handshakeTimeout: DEADLINE, ...options });
    raw.socket.on("message", (data, binary) => raw.frames.push(binary ? data : data.toString()));
    raw.socket.on("close", (code, reason) => (raw.closed = { code, reason: reason.toString() }));
    raw.socket.on("error", (error) => (raw.error = error));
    await until(`connection to ${url}`, () => {
      if (raw.error) throw raw.error;
      return raw.socket.readyState === WebSocket.OPEN;
    });
    return raw;
  }

  send(data) {
    this.socket.send(data);
  }

  /** Waits for a frame that `pick` gives something true for, and gives that. */
  async frame(what, pick) {
    let at = 0;
    return until(
      what,
      () => {
        for (; at < this.frames.length; at++) {
          const got = pick(this.frames[at]);
          if (got) return got;
        }
        if (this.closed) throw new Error(`${what}: closed with ${JSON.stringify(this.closed)}`);
        return null;
      },
      { last: () => `(frames: ${this.frames.slice(-5).map(String).join(" ").slice(0, 500)})` },
    );
  }

  async end(what) {
    return until(`the close of ${what}`, () => this.closed, { last: () => `(frames: ${this.frames.slice(-3)})` });
  }

  close() {
    this.socket.terminate();
  }
}

/** The protocol natter.v1: commands with a number, replies matched by it, pushes kept in order. */
export class Native {
  static async open(WebSocket, address, token) {
    const native = new Native();
    const options = { headers: { authorization: `Bearer ${token}` } };
    native.rid = 0;
    native.replies = new Map();
    native.pushes = [];
    native.raw = await Raw.open(WebSocket, `ws://${address}/ws`, ["natter.v1"], options);
    native.raw.socket.on("message", (data) => {
      const frame = JSON.parse(data.toString());
      if (frame.rid === undefined) native.pushes.push(frame);
      else native.replies.set(frame.rid, frame);
    });
    return native;
  }

  async call(op, fields = {}) {
    const rid = ++this.rid;
    this.raw.send(JSON.stringify({ op, rid, ...fields }));
    const reply = await until(`the reply to ${op}`, () => this.replies.get(rid));
    this.replies.delete(rid);
    if (reply.op === "error") throw new Error(`${op}: ${JSON.stringify(reply)}`);
    return reply;
  }

  /** The first push that `pick` gives something true for. */
  push(what, pick) {
    return until(what, () => this.pushes.find(pick), {
      last: () => `(pushes: ${JSON.stringify(this.pushes.slice(-5))})`,
    });
  }

  close() {
    this.raw.close();
  }
}

// Plain NATS ----------------------------------------------------------------------------------------------------------

/** As much of the protocol of NATS as requests need. */
export class Nats {
  static async connect(url) {
    const nats = new Nats();
    const { hostname, port } = new URL(url);
    nats.inbox = newName("_INBOX.");
    nats.count = 0;
    nats.replies = new Map();
    nats.bytes = Buffer.alloc(0);
    nats.socket = net.connect({ host: hostname, port: Number(port) });
    nats.socket.on("error", (error) => (nats.failed = error));
    nats.socket.on("data", (data) => nats.#on(data));
    await within(once(nats.socket, "connect"), `the connection to ${url}`);
    nats.socket.write(`CONNECT {"verbose":false,"pedantic":false}\r\nSUB ${nats.inbox}.* 1\r\n`);
    return nats;
  }

  #on(data) {
    this.bytes = Buffer.concat([this.bytes, data]);
    for (;;) {
      const end = this.bytes.indexOf("\r\n");
      if (end < 0) return;
      const [verb, ...args] = this.bytes.subarray(0, end).toString().split(" ");
      let next = end + 2;
      if (verb === "MSG") {
        next += Number(args.at(-1)) + 2;
        if (this.bytes.length < next) return;
        this.replies.set(args[0], JSON.parse(this.bytes.subarray(end + 2, next - 2).toString()));
      } else if (verb === "PING") {
        this.socket.write("PONG\r\n");
      } else if (verb === "-ERR") {
        this.failed = new Error(`NATS: ${args.join(" ")}`);
      }
      this.bytes = this.bytes.subarray(next);
    }
  }

  /** Sends a request, and gives the value of the JSON in its answer. */
  async request(subject, text = "") {
    const inbox = `${this.inbox}.${++this.count}`;
    this.socket.write(`PUB ${subject} ${inbox} ${Buffer.byteLength(text)}\r\n${text}\r\n`);
    return until(`the answer to ${subject}`, () => {
      if (this.failed) throw this.failed;
      return this.replies.get(inbox);
    });
  }

  /** Publishes, and waits until a stream has stored it. */
  async publish(subject, text) {
    const reply = await this.request(subject, text);
    assert.ok(reply.seq > 0, JSON.stringify(reply));
  }

  close() {
    this.socket.destroy();
  }
}

// Load ----------------------------------------------------------------------------------------------------------------

/** Writers that send without end, each one message after the other. */
export class Load {
  /** `ways` has a function per writer that sends the message with a number, and resolves when it is stored. */
  constructor(ways) {
    this.sent = Object.fromEntries(Object.keys(ways).map((from) => [from, 0]));
    this.running = Object.entries(ways).map(([from, send]) => this.#run(from, send));
  }

  async #run(from, send) {
    while (!this.stopped) {
      await within(send(this.sent[from]), `message ${this.sent[from]} of ${from}`);
      this.sent[from] += 1;
      // The pace of the load, below the limits of a session.
      await new Promise((resolve) => setTimeout(resolve, 4));
    }
  }

  total() {
    return Object.values(this.sent).reduce((sum, count) => sum + count);
  }

  /** Waits until so many more messages were acknowledged. */
  async more(count) {
    const goal = this.total() + count;
    await Promise.race([until(`${count} more messages`, () => this.total() >= goal), ...this.running]);
  }

  async stop() {
    this.stopped = true;
    await Promise.all(this.running);
  }

  /** Waits until all messages were received: each exactly once, those of a writer in its order. `values` are `{from, number}`. */
  async check(values) {
    await until("all messages", () => values().length >= this.total(), {
      last: () => `(${values().length} of ${this.total()})`,
    });
    for (const from of Object.keys(this.sent)) {
      const got = values().filter((value) => value.from === from).map((value) => value.number);
      assert.deepEqual(got, [...Array(this.sent[from]).keys()], `the messages of ${from}`);
    }
  }
}
