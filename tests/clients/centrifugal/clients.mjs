// The SDK's client and its subscriptions with what they said, what a scenario of sdk.mjs is given, frames without the SDK,
// and a load of messages.

import assert from "node:assert/strict";

import {
  BaseTest,
  CENTRIFUGAL_SECRET,
  DEADLINE,
  Load,
  MAIN_NAMESPACE,
  Raw,
  newName,
  packages,
  until,
  within,
} from "../support.mjs";

export const API_KEY = "a-key-of-the-server-api";
export const CONFIG = `
[centrifugal]
hs256_secret = "${CENTRIFUGAL_SECRET}"
api_key = "${API_KEY}"
default_namespace = "main"
anonymous = true
${MAIN_NAMESPACE}`;
const require = packages("centrifugal");
const WebSocket = require("ws");
const { EventSource } = require("eventsource");
export const PROTOCOLS = {
  json: {
    name: "json",
    ...require("centrifuge"),
    subprotocols: [],
    pack: (value) => value,
    unpack: (data) => data,
  },
  protobuf: {
    name: "protobuf",
    ...require("centrifuge/build/protobuf"),
    subprotocols: ["centrifuge-protobuf"],
    pack: (value) => Buffer.from(JSON.stringify(value)),
    unpack: (data) => JSON.parse(Buffer.from(data).toString()),
  },
};

/** The transports that need no WebSocket. `title` is the name for people. */
export const FALLBACKS = [
  { ...PROTOCOLS.json, transport: "http_stream", title: "http_stream with JSON" },
  { ...PROTOCOLS.protobuf, transport: "http_stream", title: "http_stream with Protobuf" },
  { ...PROTOCOLS.json, transport: "sse", title: "sse" },
];

// Clients -------------------------------------------------------------------------------------------------------------

/** What a subscription of the SDK said, in order. */
class Feed {
  constructor(client, channel, options) {
    const { unpack } = client.protocol;
    this.client = client;
    this.channel = channel;
    this.publications = []; // messages
    this.events = []; // typing and read
    this.subscribed = [];
    this.unsubscribed = [];
    this.errors = [];
    this.joins = [];
    this.leaves = [];
    this.sub = client.sdk.newSubscription(channel, { minResubscribeDelay: 10, maxResubscribeDelay: 100, ...options });
    this.sub.on("publication", (publication) => {
      const into = publication.tags?.event ? this.events : this.publications;
      into.push({ ...publication, bytes: publication.data, data: unpack(publication.data) });
    });
    this.sub.on("subscribed", (context) => this.subscribed.push(context));
    this.sub.on("unsubscribed", (context) => this.unsubscribed.push(context));
    this.sub.on("error", (context) => this.errors.push(context));
    this.sub.on("join", (context) => this.joins.push(context.info));
    this.sub.on("leave", (context) => this.leaves.push(context.info));
    this.sub.subscribe();
  }

  async ready() {
    await this.sub.ready(DEADLINE).catch((error) => {
      const said = JSON.stringify([...this.errors, ...this.unsubscribed, ...this.client.heard.slice(-3)]);
      throw new Error(`${this.channel} is not subscribed: ${JSON.stringify(error)} ${said}`);
    });
    return this.subscribed.at(-1);
  }

  publish(value) {
    return this.sub.publish(this.client.protocol.pack(value));
  }

  values() {
    return this.publications.map((publication) => publication.data);
  }

  /** Waits until there are so many publications, and gives their values. */
  async until(count, what = `${count} publications in ${this.channel}`) {
    await until(what, () => this.publications.length >= count, { last: () => `(there are ${this.publications.length})` });
    return this.values();
  }

  /** Waits for the refusal of the subscription, and gives its code. */
  async refused() {
    const context = await until(`the refusal of ${this.channel}`, () => this.unsubscribed[0], {
      last: () => `(state ${this.sub.state}, errors ${JSON.stringify(this.errors)})`,
    });
    return context.code;
  }
}

/** Where an edge takes connections of a transport, for the SDK. */
export function endpoint(transport, address) {
  return { transport, endpoint: `http://${address}/connection/${transport}` };
}

/** A client of the SDK, and what it said. Over a transport without a WebSocket its commands go to the address `emulation`. */
class Client {
  constructor(protocol, address, { emulation = address, transports, ...options }) {
    this.protocol = protocol;
    this.heard = [];
    if (protocol.transport) transports ??= [endpoint(protocol.transport, address)];
    this.sdk = new protocol.Centrifuge(transports ?? `ws://${address}/connection/websocket`, {
      websocket: WebSocket,
      eventsource: EventSource,
      fetch,
      readableStream: ReadableStream,
      emulationEndpoint: `http://${emulation}/emulation`,
      minReconnectDelay: 10,
      maxReconnectDelay: 100,
      ...options,
    });
    const events = ["connecting", "connected", "disconnected", "error", "subscribed", "subscribing", "unsubscribed"];
    for (const event of [...events, "publication", "join", "leave"]) {
      this.sdk.on(event, (context) => this.heard.push({ event, ...context }));
    }
    this.sdk.connect();
  }

  of(event) {
    return this.heard.filter((one) => one.event === event);
  }

  async ready() {
    await this.sdk.ready(DEADLINE).catch((error) => {
      throw new Error(`not connected: ${JSON.stringify(error)} ${JSON.stringify(this.heard.slice(-5))}`);
    });
    return this;
  }

  /** Waits for an event of the client. */
  event(event, pick = () => true) {
    return until(`the event ${event}`, () => this.of(event).find(pick), {
      last: () => `(events: ${JSON.stringify(this.heard.slice(-5))})`,
    });
  }

  subscribe(channel, options) {
    return new Feed(this, channel, options);
  }

  publish(channel, value) {
    return this.sdk.publish(channel, this.protocol.pack(value));
  }

  async rpc(method, data) {
    const { pack, unpack } = this.protocol;
    return unpack((await this.sdk.rpc(method, pack(data))).data);
  }

  async history(channel, options) {
    const page = await this.sdk.history(channel, options);
    page.values = page.publications.map((publication) => this.protocol.unpack(publication.data));
    page.offsets = page.publications.map((publication) => publication.offset);
    return page;
  }
}

/** What a scenario is given; whatever it opens is closed at its end. */
export class Test extends BaseTest {
  constructor(up, protocol) {
    super(up, WebSocket);
    this.protocol = protocol;
    this.other = PROTOCOLS[protocol.name === "json" ? "protobuf" : "json"];
  }

  client({ user = "kim", edge = 0, address = this.up.address(edge), protocol = this.protocol, ...options } = {}) {
    if (!("token" in options) && !options.getToken) options.token = this.token(user);
    // So that its commands pass from one edge to the other.
    if (protocol.transport) options.emulation ??= this.up.address(1 - edge);
    const client = new Client(protocol, address, options);
    this.closing.push(() => client.sdk.disconnect());
    return client;
  }

  async raw({ protocol = this.protocol, edge = 0 } = {}) {
    const url = `ws://${this.up.address(edge)}/connection/websocket`;
    const raw = await Raw.open(WebSocket, url, protocol.subprotocols);
    this.closing.push(() => raw.close());
    return raw;
  }
}

export function newRoom() {
  return newName("chat:centrifugal-");
}

/** The error of a promise that must be rejected by the server. */
export async function codeOf(promise, what) {
  let error;
  try {
    await within(promise, what);
  } catch (caught) {
    error = caught;
  }
  assert.ok(error, `${what}: it was accepted`);
  assert.equal(typeof error.code, "number", `${what}: ${error.stack ?? JSON.stringify(error)}`);
  return error.code;
}

export function increasing(numbers, what) {
  numbers.forEach((number, at) => {
    assert.ok(Number.isSafeInteger(number) && number > 0, `${what}: ${number} is no offset`);
    if (at > 0) assert.ok(number > numbers[at - 1], `${what}: ${number} follows ${numbers[at - 1]}`);
  });
}

export function offsets(feed) {
  return feed.publications.map((publication) => publication.offset);
}

// Frames without the SDK ----------------------------------------------------------------------------------------------

function field(number, ...bytes) {
  const body = Buffer.concat(bytes.map((some) => Buffer.from(some)));
  return Buffer.concat([varint((number << 3) | 2), varint(body.length), body]);
}

function varint(number) {
  const bytes = [];
  for (; number > 127; number >>>= 7) bytes.push((number & 127) | 128);
  return Buffer.from([...bytes, number]);
}

/** The same command for both protocols: its id, its method (name and number), and the texts of its first fields. */
export function command(protocol, id, [method, number], names, ...texts) {
  if (protocol.name === "json") {
    const request = Object.fromEntries(texts.map((text, at) => [names[at], text]));
    return JSON.stringify({ id, [method]: request });
  }
  const request = field(number, ...texts.map((text, at) => field(at + 1, text)));
  const body = Buffer.concat([Buffer.from([8, id]), request]);
  return Buffer.concat([varint(body.length), body]);
}

const CONNECT = ["connect", 4];
export const PRESENCE = ["presence", 8];
export const UNSUBSCRIBE = ["unsubscribe", 6];

export function connectFrame(protocol, token, id = 1) {
  return command(protocol, id, CONNECT, ["token"], token);
}

/** Whether a frame has the reply with this id, which is below 128. */
export function repliesTo(protocol, id) {
  if (protocol.name === "json") return (frame) => frame.split("\n").some((line) => JSON.parse(line).id === id);
  return (frame) => {
    for (let at = 0; at < frame.length; ) {
      let length = 0;
      for (let shift = 0; ; shift += 7) {
        length |= (frame[at] & 127) << shift;
        if (frame[at++] < 128) break;
      }
      if (frame[at] === 8 && frame[at + 1] === id) return true;
      at += length;
    }
    return false;
  };
}

// Load -----------------------------------------------------------------------------------------------------------------

/** Two writers on the second edge, which is not killed: the SDK over a WebSocket, and natter.v1. */
export async function startLoad(t, channel) {
  const sdk = await t.client({ user: "sdk", edge: 1, protocol: PROTOCOLS[t.protocol.name] }).ready();
  const native = await t.native({ user: "native", edge: 1 });
  return new Load({
    sdk: (number) => sdk.publish(channel, { from: "sdk", number }),
    native: (number) => native.call("send", { room: channel, body: { from: "native", number } }),
  });
}

/** Each message exactly once, those of a writer in its order, offsets growing. */
export async function checkLoad(load, feed) {
  await load.check(() => feed.values());
  increasing(offsets(feed), "the offsets");
}
