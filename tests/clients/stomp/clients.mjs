// stompjs's client and its subscriptions with what they said, what a scenario of stompjs.mjs is given, STOMP frames without
// stompjs, and a load of messages.

import assert from "node:assert/strict";

import {
  BaseTest,
  CENTRIFUGAL_SECRET,
  Load,
  MAIN_NAMESPACE,
  Raw,
  newName,
  packages,
  until,
  within,
} from "../support.mjs";

export const LOGIN = "guest";
export const PASSCODE = "a passcode: with \\ and a colon";
export const CONFIG = `
[centrifugal]
hs256_secret = "${CENTRIFUGAL_SECRET}"

[stomp]
login = "${LOGIN}"
passcode = '${PASSCODE}'
default_namespace = "main"
${MAIN_NAMESPACE}`;
const require = packages("stomp");
const WebSocket = require("ws");
const stompjs = require("@stomp/stompjs");
Object.assign(globalThis, { WebSocket }); // what stompjs uses
export const { Versions } = stompjs;
export const SUBPROTOCOLS = Versions.default.protocolVersions();

export function newRoom() {
  return newName("chat:stomp-");
}

export function topic(room) {
  return `/topic/${room}`;
}

// Frames without stompjs ----------------------------------------------------------------------------------------------

const ESCAPES = { "\\": "\\\\", "\r": "\\r", "\n": "\\n", ":": "\\c" };
const UNESCAPES = Object.fromEntries(Object.entries(ESCAPES).map(([character, escape]) => [escape, character]));

function escaped(text) {
  return text.replace(/[\\\r\n:]/g, (character) => ESCAPES[character]);
}

function unescaped(text) {
  return text.replace(/\\.?/g, (escape) => {
    assert.ok(escape in UNESCAPES, `${escape} is no escape of STOMP`);
    return UNESCAPES[escape];
  });
}

/** A frame of STOMP 1.2 as bytes. A body gets a content-length, unless `headers` has it as null. */
export function frame(command, headers = {}, body = "", { eol = "\n" } = {}) {
  const bytes = Buffer.from(body);
  const all = bytes.length > 0 ? { "content-length": bytes.length, ...headers } : headers;
  const escape = command === "CONNECT" || command === "STOMP" ? (text) => text : escaped;
  const lines = Object.entries(all)
    .filter(([, value]) => value !== undefined && value !== null)
    .map(([name, value]) => `${escape(name)}:${escape(String(value))}`);
  return Buffer.concat([Buffer.from([command, ...lines, "", ""].join(eol)), bytes, Buffer.from([0])]);
}

/** Takes a server's bytes apart. It forgives nothing that STOMP 1.2 does not allow. */
class Decoder {
  constructor() {
    this.bytes = Buffer.alloc(0);
    this.beats = 0;
  }

  /** The frames that are complete with these bytes. */
  frames(chunk) {
    this.bytes = Buffer.concat([this.bytes, chunk]);
    const frames = [];
    for (;;) {
      while (this.bytes[0] === 10) {
        this.beats += 1;
        this.bytes = this.bytes.subarray(1);
      }
      const head = this.bytes.indexOf("\n\n");
      if (head < 0) return frames;
      const [command, ...lines] = this.bytes.subarray(0, head).toString().split("\n");
      assert.match(command, /^(CONNECTED|MESSAGE|RECEIPT|ERROR)$/);
      const unescape = command === "CONNECTED" ? (text) => text : unescaped;
      const headers = {};
      for (const line of lines) {
        const colon = line.indexOf(":");
        assert.ok(colon > 0, `${line} is no header`);
        assert.ok(!line.includes("\r"), `a carriage return in ${line}`);
        if (command !== "CONNECTED") assert.ok(!line.includes(":", colon + 1), `a colon that is not escaped: ${line}`);
        const name = unescape(line.slice(0, colon));
        assert.ok(!(name in headers), `${name} is there twice`);
        headers[name] = unescape(line.slice(colon + 1));
      }
      const begin = head + 2;
      const given = headers["content-length"];
      if (given !== undefined) assert.match(given, /^\d+$/);
      const end = given === undefined ? this.bytes.indexOf(0, begin) : begin + Number(given);
      if (end < 0 || end >= this.bytes.length) return frames;
      assert.equal(this.bytes[end], 0, "no NUL after the body");
      frames.push({ command, headers, body: this.bytes.subarray(begin, end).toString() });
      if (command !== "MESSAGE" && command !== "ERROR") assert.equal(frames.at(-1).body, "", `a body of ${command}`);
      this.bytes = this.bytes.subarray(end + 1);
    }
  }
}

/** A connection without stompjs, and the frames that came. */
export class Frames {
  static async open(url, subprotocols = SUBPROTOCOLS, options = {}) {
    const frames = new Frames();
    frames.all = [];
    frames.decoder = new Decoder();
    frames.raw = await Raw.open(WebSocket, url, subprotocols, options);
    frames.raw.socket.on("message", (data, binary) => {
      try {
        assert.equal(binary, false, "a binary message");
        frames.all.push(...frames.decoder.frames(data));
      } catch (error) {
        frames.broken ??= error;
      }
    });
    return frames;
  }

  send(command, headers, body) {
    this.raw.send(frame(command, headers, body).toString());
  }

  /** Waits for the first frame that `pick` is true for. */
  first(what, pick) {
    return until(what, () => {
      if (this.broken) throw this.broken;
      const found = this.all.find(pick);
      if (!found && this.raw.closed) {
        throw new Error(`${what}: closed with ${JSON.stringify(this.raw.closed)} after ${JSON.stringify(this.all.slice(-3))}`);
      }
      return found;
    }, { last: () => `(frames: ${JSON.stringify(this.all.slice(-3)).slice(0, 500)})` });
  }

  async connect(headers) {
    this.send("CONNECT", { "accept-version": "1.2", host: "natter", ...headers });
    return (await this.first("CONNECTED", ({ command }) => command === "CONNECTED")).headers;
  }

  receipt(id) {
    return this.first(`the receipt ${id}`, ({ command, headers }) => command === "RECEIPT" && headers["receipt-id"] === id);
  }

  messages() {
    return this.all.filter(({ command }) => command === "MESSAGE");
  }

  async untilMessages(count) {
    await until(`${count} messages`, () => {
      if (this.broken) throw this.broken;
      return this.messages().length >= count;
    }, { last: () => `(${this.messages().length}; ${JSON.stringify(this.all.slice(-2)).slice(0, 500)})` });
    return this.messages();
  }

  /** Waits for an ERROR and for the close after it, and gives the ERROR. */
  async error(what) {
    const error = await this.first(`${what}: ERROR`, ({ command }) => command === "ERROR");
    assert.ok(error.headers.message, `${what}: no message header`);
    assert.ok(error.body, `${what}: no body`);
    assert.match(error.headers["content-type"], /^text\/plain/);
    await this.raw.end(what);
    assert.equal(this.all.at(-1), error, `${what}: frames after the ERROR`);
    return error;
  }
}

// stompjs -------------------------------------------------------------------------------------------------------------

/** A subscription that is made again at each connect, and what came. With `resume` it continues after the last cursor. */
class Feed {
  constructor(client, destination, { resume = false, ...headers } = {}) {
    this.client = client;
    this.destination = destination;
    this.resume = resume;
    this.headers = headers;
    this.messages = [];
    this.resets = [];
    this.subscribed = 0;
    client.feeds.push(this);
    if (client.sdk.connected) this.subscribe();
  }

  subscribe() {
    const receipt = newName("subscribed-");
    const headers = { ...this.headers, receipt };
    if (this.resume && this.cursor) {
      delete headers["x-stream-offset"];
      headers.cursor = this.cursor;
    }
    this.client.sdk.watchForReceipt(receipt, () => (this.subscribed += 1));
    this.subscription = this.client.sdk.subscribe(this.destination, (message) => this.#on(message), headers);
  }

  #on(message) {
    this.cursor = message.headers.cursor ?? this.cursor;
    (message.headers.event === "reset" ? this.resets : this.messages).push(message);
  }

  /** Waits until it has been subscribed so often. */
  async ready(times = 1) {
    await until(`${this.destination} is subscribed`, () => this.subscribed >= times, { last: () => this.client.said() });
    return this;
  }

  /** Bodies: the values of JSON ones, and the texts of others. */
  values() {
    return this.messages.map(valueOf);
  }

  async until(count, what = `${count} messages of ${this.destination}`) {
    await until(what, () => this.messages.length >= count, {
      last: () => `(there are ${this.messages.length}; ${this.client.said()})`,
    });
    return this.values();
  }
}

export function valueOf(message) {
  return message.headers["content-type"] === "application/json" ? JSON.parse(message.body) : message.body;
}

/** A client of stompjs, and what it said. */
class Client {
  constructor(address, { connectHeaders, ...options }) {
    this.connects = [];
    this.errors = [];
    this.closes = [];
    this.beats = 0;
    this.lost = 0;
    this.feeds = [];
    this.waiting = new Set();
    this.sdk = new stompjs.Client({
      brokerURL: `ws://${address}/stomp`,
      connectHeaders,
      reconnectDelay: 20,
      heartbeatIncoming: 0,
      heartbeatOutgoing: 0,
      onConnect: (frame) => {
        this.connects.push(frame.headers);
        for (const feed of this.feeds) feed.subscribe();
      },
      onStompError: (frame) => {
        this.errors.push(frame);
        void this.sdk.deactivate();
      },
      onWebSocketClose: (event) => {
        this.closes.push(event);
        for (const reject of this.waiting) reject(new Error(`closed before the receipt: ${this.said()}`));
        this.waiting.clear();
      },
      onHeartbeatReceived: () => (this.beats += 1),
      onHeartbeatLost: () => (this.lost += 1),
      ...options,
    });
    this.sdk.activate();
  }

  said() {
    const errors = this.errors.map(({ headers, body }) => ({ headers, body }));
    return JSON.stringify({ connects: this.connects.length, closes: this.closes.length, errors });
  }

  async ready() {
    await until("CONNECTED", () => this.sdk.connected, { last: () => this.said() });
    return this;
  }

  subscribe(destination, headers) {
    return new Feed(this, destination, headers);
  }

  /** A promise of a receipt. It fails when the connection ends. */
  receipt(id) {
    return new Promise((resolve, reject) => {
      this.waiting.add(reject);
      this.sdk.watchForReceipt(id, (frame) => {
        this.waiting.delete(reject);
        resolve(frame);
      });
    });
  }

  /** Sends a message, and waits for its receipt. A value that is not a text or bytes is sent as JSON. */
  async send(destination, value, headers = {}) {
    const receipt = newName("sent-");
    const body = typeof value === "string" ? { body: value } : Buffer.isBuffer(value) ? { binaryBody: value } : null;
    const arrived = this.receipt(receipt);
    this.sdk.publish({ destination, headers: { ...headers, receipt }, ...(body ?? { body: JSON.stringify(value) }) });
    return within(arrived, `the receipt of a message to ${destination}`);
  }

  /** Waits for the ERROR and the close after it. */
  async refused(what) {
    await until(`${what}: ERROR`, () => this.errors[0], { last: () => this.said() });
    await until(`${what}: the close`, () => this.closes[0]);
    return this.errors[0];
  }
}

// What a scenario is given --------------------------------------------------------------------------------------------

/** With stompjs and without it. */
export class Test extends BaseTest {
  constructor(up) {
    super(up, WebSocket);
  }

  client({ user = "kim", edge = 0, address = this.up.address(edge), ...options } = {}) {
    const connectHeaders = { passcode: this.token(user) };
    const client = new Client(address, { connectHeaders, ...options });
    this.closing.push(() => client.sdk.deactivate({ force: true }));
    return client;
  }

  /** A connection without stompjs. */
  async frames({ edge = 0, subprotocols = SUBPROTOCOLS, ...options } = {}) {
    const frames = await Frames.open(`ws://${this.up.address(edge)}/stomp`, subprotocols, options);
    this.closing.push(() => frames.raw.close());
    return frames;
  }

  /** The same, connected. */
  async connected({ user = "kim", headers = {}, ...options } = {}) {
    const frames = await this.frames(options);
    await frames.connect({ passcode: this.token(user), ...headers });
    return frames;
  }

  /** For stompjs: a connection with headers of its own in the handshake. */
  factory(headers, edge = 0) {
    return () => new WebSocket(`ws://${this.up.address(edge)}/stomp`, { headers });
  }

  /** How many messages of a room a user has not read. */
  async unread(user, room) {
    const answer = await fetch(`http://${this.up.address(1)}/v1/unread`, {
      method: "POST",
      headers: { authorization: `Bearer ${this.token(user)}` },
      body: JSON.stringify({ rooms: [room] }),
    });
    assert.equal(answer.status, 200, "the status of /v1/unread");
    return (await answer.json()).rooms[0].count;
  }

  async untilUnread(user, room, count) {
    let last;
    await until(`${count} unread of ${user}`, async () => (last = await this.unread(user, room)) === count, {
      last: () => `(${last})`,
    });
  }

  /** What the log of a room has, from its beginning: `count` messages of other users than `reader`. */
  async log(room, count) {
    const marker = newName("marker-");
    const reader = await this.client({ user: "reader", edge: 1 }).ready();
    const feed = await reader.subscribe(topic(room), { "x-stream-offset": "first" }).ready();
    await reader.send(topic(room), marker);
    await until("the end of the log", () => feed.values().includes(marker), { last: () => `(${feed.messages.length})` });
    const messages = feed.messages.filter(({ headers }) => headers.from !== "reader");
    assert.equal(messages.length, count, `messages in the log of ${room}`);
    return messages;
  }
}

// Load ----------------------------------------------------------------------------------------------------------------

/** Two writers on the second edge: stompjs, which waits for receipts, and natter.v1. */
export async function startLoad(t, room) {
  const stomp = await t.client({ user: "stomp", edge: 1 }).ready();
  const native = await t.native({ user: "native", edge: 1 });
  return new Load({
    stomp: (number) => stomp.send(topic(room), { from: "stomp", number }),
    native: (number) => native.call("send", { room, body: { from: "native", number } }),
  });
}

/** Each message exactly once, those of a writer in its order, no cursor twice, and no reset. */
export async function checkLoad(load, feed) {
  await load.check(() => feed.values());
  assert.deepEqual(feed.resets.map(({ body }) => body), []);
  for (const header of ["cursor", "message-id"]) {
    const given = feed.messages.map(({ headers }) => headers[header]);
    assert.ok(given.every(Boolean), `messages without ${header}`);
    assert.equal(new Set(given).size, given.length, `a ${header} that is there twice`);
  }
}
