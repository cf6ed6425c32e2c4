// What the scenarios work with: the log, clients behind their drivers, rooms with a witness, and the judgement at the end.

import { spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { createInterface } from "node:readline";

import { ALL, Native, jwt, nowSeconds, until, within } from "../support.mjs";
import { check } from "./checker.mjs";
import { PlainSocket } from "./websocket.mjs";
import { Wire } from "./wire.mjs";

/** The version of the drivers' protocol that this runner speaks. */
export const VERSION = 1;
/** What a driver may declare in `can`. */
export const CAPABILITIES = ["asks_again", "changes", "edges", "heartbeat", "leave", "ordered", "read", "rooms"];

export const DEADLINE = 15_000;
/** For what needs the client to notice something, or to come back after a back-off. */
export const PATIENCE = 30_000;
/** A half-open connection must be noticed within this time. */
export const HALF_OPEN = 45_000;
/** The edge that is never killed: the runner's own connections are there, and most clients. */
export const SAFE = 1;
/** The edge that is killed. */
export const OTHER = 0;
const STDERR = 4_000;

/** The operation log of a scenario. */
export class Log {
  constructor(scenario, sink) {
    this.scenario = scenario;
    this.sink = sink;
    this.began = performance.now();
    this.entries = [];
  }

  add(entry) {
    const at = Math.round(performance.now() - this.began);
    this.entries.push({ at, ...entry });
    this.sink?.write(`${JSON.stringify({ scenario: this.scenario, at, ...entry })}\n`);
  }
}

/** A scenario needs something that the driver does not declare. */
export class Skipped extends Error {}

/** Faults that the checker has found. */
export class Faults extends Error {
  constructor(faults, before) {
    const lines = faults.slice(0, 20).map(({ rule, client, room, text }) => `  ${rule}: ${[client, room, text].filter(Boolean).join(" ")}`);
    if (faults.length > 20) lines.push(`  and ${faults.length - 20} more`);
    super(`${[before?.message, ...(faults.length ? ["the checker found:"] : [])].filter(Boolean).join("; ")}\n${lines.join("\n")}`);
    this.faults = faults;
  }
}

/** Starts a driver; its first line is checked. */
async function start(command) {
  const [file, ...args] = command;
  const driver = spawn(file, args, { stdio: ["pipe", "pipe", "pipe"] });
  driver.said = "";
  driver.stderr.on("data", (data) => (driver.said = (driver.said + data).slice(-STDERR)));
  driver.stdin.on("error", () => {}); // it has ended; who waits for it is told
  driver.exited = new Promise((resolve) => {
    driver.once("error", (error) => resolve(error.message));
    driver.once("exit", (code, signal) => resolve(code ?? signal));
  });
  return driver;
}

/** What a driver declares: `{hello, name, can}`. */
export async function hello(command) {
  const driver = await start(command);
  try {
    const first = new Promise((resolve) => createInterface({ input: driver.stdout }).once("line", resolve));
    const ended = driver.exited.then((code) => {
      throw new Error(`the driver ended with ${code}: ${driver.said}`);
    });
    ended.catch(() => {});
    const line = JSON.parse(await within(Promise.race([first, ended]), "the first line of the driver", PATIENCE));
    if (line.hello !== VERSION) throw new Error(`the driver speaks version ${line.hello}; this runner speaks ${VERSION}`);
    const unknown = (line.can ?? []).filter((name) => !CAPABILITIES.includes(name));
    if (unknown.length) throw new Error(`the driver declares what there is not: ${unknown}; there is ${CAPABILITIES}`);
    return { name: "a client", can: [], ...line };
  } finally {
    driver.kill("SIGKILL");
  }
}

/** A client, behind its driver. */
export class Client {
  constructor(test, { name, user, tokens }) {
    Object.assign(this, { test, name, user, tokens });
    this.asked = 0;
    this.states = [];
    this.events = [];
    this.messages = new Map();
    this.settled = new Map();
    this.number = 0;
  }

  async start(command) {
    this.driver = await start(command);
    createInterface({ input: this.driver.stdout }).on("line", (text) => this.#onLine(text));
    await this.until("the first line of the driver", () => this.isHere, PATIENCE);
  }

  #onLine(text) {
    let line;
    try {
      line = JSON.parse(text);
    } catch {
      line = { event: "no JSON", text };
    }
    if (!this.isHere && line.hello === VERSION) {
      this.isHere = true;
      return;
    }
    this.test.log.add({ who: "client", client: this.name, line });
    this.events.push(line);
    if (line.event === "message") this.messages.set(`${line.room} ${line.from}/${line.id}`, line);
    else if (line.event === "acked" || line.event === "failed") this.settled.set(`${line.room} ${line.id}`, line);
    else if (line.event === "state") this.states.push(line);
    else if (line.event === "token?") void this.#answer(line);
  }

  async #answer({ reason }) {
    this.asked += 1;
    this.op("token", { token: await this.tokens(this.asked, reason) });
  }

  /** Gives an operation to the driver. */
  op(op, fields = {}) {
    const operation = { op, ...fields };
    this.test.log.add({ who: "runner", what: "op", client: this.name, op: operation });
    this.driver.stdin.write(`${JSON.stringify(operation)}\n`);
  }

  get state() {
    return this.states.at(-1)?.name ?? "idle";
  }

  until(what, condition, deadline = DEADLINE) {
    return until(`${this.name}: ${what}`, () => {
      const got = condition();
      if (!got && this.driver.exitCode !== null) throw new Error(`${this.name}: the driver ended with ${this.driver.exitCode}: ${this.driver.said}`);
      return got;
    }, { deadline, last: () => `(last: ${JSON.stringify(this.events.slice(-5))}${this.driver.said ? `; stderr: ${this.driver.said}` : ""})` });
  }

  /** Waits for an event after the first `after` ones that `pick` gives something true for. */
  event(what, pick, { after = 0, deadline } = {}) {
    let at = after;
    return this.until(what, () => {
      for (; at < this.events.length; at += 1) if (pick(this.events[at])) return this.events[at];
      return null;
    }, deadline);
  }

  connect(urls, options = {}) {
    this.op("connect", { urls: [urls].flat(), ...options });
  }

  async join(room, since) {
    const after = this.events.length;
    this.op("join", { room, since });
    const entered = ({ event, room: other }) => event === "joined" && other === room;
    return this.event(`joined ${room}`, entered, { after, deadline: PATIENCE });
  }

  /** Writes a message, and gives its id. */
  send(room, body = { n: this.number }) {
    const id = `${this.name}-${(this.number += 1)}`;
    this.op("send", { room, id, body });
    return id;
  }

  async change(op, room, fields) {
    const id = `${this.name}-${(this.number += 1)}`;
    this.op(op, { room, id, ...fields });
    return this.acked(room, id);
  }

  async acked(room, ...ids) {
    for (const id of ids) {
      await this.until(`the end of ${id}`, () => this.settled.has(`${room} ${id}`), PATIENCE);
      const line = this.settled.get(`${room} ${id}`);
      if (line.event !== "acked") throw new Error(`${this.name}: ${JSON.stringify(line)}`);
    }
    return this.settled.get(`${room} ${ids.at(-1)}`);
  }

  /** Waits until it was told a message, `<user>/<id>`. */
  got(room, ref, deadline = PATIENCE) {
    return this.until(`message ${ref}`, () => this.messages.get(`${room} ${ref}`), deadline);
  }

  async end() {
    if (this.driver.exitCode === null && this.driver.signalCode === null) {
      this.driver.stdin.end();
      const code = await within(this.driver.exited, `${this.name}: the end of the driver after the end of its input`, DEADLINE).catch((error) => error);
      this.driver.kill("SIGKILL");
      if (code instanceof Error) throw code;
    }
  }
}

/** What a scenario is given. */
export class Test {
  constructor({ up, command, can, log, random }) {
    Object.assign(this, { up, command, can, log, random });
    this.clients = [];
    this.wires = [];
    this.watched = new Map(); // room -> {witness, cursor}
    this.numbers = 0;
    this.id = randomBytes(4).toString("hex");
  }

  /** The scenario is skipped where the driver can't do it. */
  needs(...names) {
    const missing = names.filter((name) => !this.can.includes(name));
    if (missing.length) throw new Skipped(missing.join(", "));
  }

  token(user, { ttl = 3_600, rooms = "*:*", can = [...ALL, "moderate", "admin"] } = {}) {
    const now = nowSeconds();
    return jwt({ sub: user, iat: now, exp: now + ttl, grants: [{ rooms, can }] }, this.up.secret());
  }

  /** A name that no other scenario has. */
  name(prefix) {
    return `${prefix}-${this.id}-${(this.numbers += 1)}`;
  }

  /** A room that a witness follows from its beginning. */
  async room(prefix = "chat:room") {
    const room = this.name(prefix);
    this.witness ??= await Native.open(PlainSocket, this.up.address(SAFE), this.token(this.name("witness")));
    const { cursor } = await this.witness.call("join", { room });
    this.watched.set(room, cursor);
    return room;
  }

  /** The network to an edge. */
  async wire(edge = SAFE) {
    const name = `wire ${this.wires.length + 1}`;
    const wire = await Wire.start(this.up.address(edge), (deed, more) => this.log.add({ who: "network", wire: name, deed, ...more }));
    this.wires.push(wire);
    return wire;
  }

  async client({ user = this.name("user"), tokens = () => this.token(user) } = {}) {
    const client = new Client(this, { name: `client ${this.clients.length + 1}`.replace(" ", "-"), user, tokens });
    this.log.add({ who: "runner", what: "client", client: client.name, user, can: this.can });
    this.clients.push(client);
    await client.start(this.command);
    return client;
  }

  /** A client that is in a room, behind a wire of its own. */
  async joined({ edge = SAFE, since, ...options } = {}) {
    const room = await this.room();
    const wire = await this.wire(edge);
    const client = await this.client(options);
    client.connect(wire.url);
    await client.join(room, since);
    return { room, wire, client };
  }

  /** The witness writes so many messages, `window` at once; the reference of the last one, when all are stored. */
  async says(room, count = 1, body = (n) => ({ n }), window = 200) {
    const { witness } = this;
    let id;
    for (let n = 0; n < count; ) {
      const rids = [];
      for (const end = Math.min(n + window, count); n < end; n += 1) {
        id = this.name("w");
        const rid = (witness.rid += 1);
        rids.push(rid);
        witness.raw.send(JSON.stringify({ op: "send", rid, room, id, body: body(n) }));
      }
      await this.#answered(rids);
    }
    const { from } = await this.seen(room, id);
    return `${from}/${id}`;
  }

  async #answered(rids) {
    const { replies, raw } = this.witness;
    await until(`${rids.length} acknowledgements of the witness`, () => {
      if (raw.closed) throw new Error(`the witness was closed: ${JSON.stringify(raw.closed)}`);
      return rids.every((rid) => replies.has(rid));
    }, { deadline: PATIENCE });
    for (const rid of rids) {
      const reply = replies.get(rid);
      if (reply.op !== "ack") throw new Error(`the witness: ${JSON.stringify(reply)}`);
      replies.delete(rid);
    }
  }

  /** Waits until the witness has seen a message with this id. */
  seen(room, id) {
    return this.witness.push(`the message ${id}`, (push) => push.op === "msg" && push.room === room && push.id === id);
  }

  /** Ends an edge, and waits until it is there again. */
  async killEdge(number, signal) {
    this.log.add({ who: "network", deed: `${signal ?? "SIGKILL"} to edge ${number}` });
    await this.up.killEdge(number, signal);
    this.log.add({ who: "network", deed: `edge ${number} is there again` });
  }

  async http(method, path) {
    const authorization = `Bearer ${this.token(this.name("service"))}`;
    const response = await fetch(`http://${this.up.address(SAFE)}/v1/${path}`, { method, headers: { authorization } });
    if (!response.ok) throw new Error(`${method} ${path}: ${response.status} ${await response.text()}`);
  }

  /** All that the stream has of a room since the witness came, read by a new connection. */
  async #logOf(room, cursor) {
    const reader = await Native.open(PlainSocket, this.up.address(SAFE), this.token(this.name("reader")));
    try {
      const joined = await reader.call("join", { room, since: cursor });
      if (joined.reset) throw new Error(`the log of ${room} can't be read: ${joined.reason}`);
      await until(`the log of ${room}`, () => reader.pushes.filter(({ op }) => op === "msg").length >= joined.replay, { deadline: PATIENCE });
      const messages = reader.pushes.filter(({ op }) => op === "msg");
      this.log.add({ who: "runner", what: "log", room, messages });
      return messages;
    } finally {
      reader.close();
    }
  }

  /** Waits until everybody who should be told everything has been, and judges. Throws what was wrong. */
  async judge(error) {
    for (const wire of this.wires) wire.tell = () => {};
    try {
      for (const room of this.watched.keys()) {
        const isPresent = (client) => client.state !== "closed" && isIn(client, room);
        if (!error) {
          for (const client of this.clients) {
            const writes = this.log.entries.filter(({ what, client: name, op }) => what === "op" && name === client.name && op.room === room && op.id);
            for (const { op } of writes) {
              if (client.state !== "closed") await client.until(`the end of ${op.id}`, () => client.settled.has(`${room} ${op.id}`), PATIENCE);
            }
          }
          // The last message of the room: who has it has had the chance to be told all the others.
          const marker = await this.says(room, 1, () => "the end");
          for (const client of this.clients.filter(isPresent)) await client.got(room, marker);
        }
      }
    } catch (late) {
      error ??= late;
    }
    for (const [room, cursor] of this.watched) {
      const messages = await this.#logOf(room, cursor);
      const seen = this.witness.pushes.filter((push) => push.op === "msg" && push.room === room);
      const differs = messages.findIndex((message, at) => seen[at]?.id !== message.id || seen[at]?.from !== message.from);
      if (!error && (differs >= 0 || seen.length !== messages.length)) {
        error = new Error(`the edge shows ${room} in two ways: ${messages.length} messages in the log, ${seen.length} live, first difference at ${differs}`);
      }
    }
    const faults = check(this.log.entries);
    if (error || faults.length) throw Object.assign(new Faults(faults, error), { cause: error });
  }

  async close() {
    this.witness?.close();
    const ends = await Promise.allSettled(this.clients.map((client) => client.end()));
    for (const wire of this.wires) wire.close();
    const bad = ends.find(({ status }) => status === "rejected");
    if (bad) throw bad.reason;
  }
}

/** Whether a client is in a room, as far as it has told. */
function isIn(client, room) {
  const last = client.events.filter((line) => line.room === room && ["joined", "left", "out"].includes(line.event)).at(-1);
  return last?.event === "joined";
}
