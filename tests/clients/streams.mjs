// Readers of rooms without a WebSocket, by plain fetch: `text/event-stream` and polls. Those that come back do it as a browser
// does: after any end, from where they stand. And what a scenario of events.mjs is given, with a load of messages.

import assert from "node:assert/strict";
import { once } from "node:events";
import net from "node:net";

import { BaseTest, Load, newName, packages, until, within } from "./support.mjs";

const WebSocket = packages("centrifugal")("ws");

const RETRY = 20;

function pause() {
  return new Promise((resolve) => setTimeout(resolve, RETRY));
}

/** The headers of a request, and a way to give it up. */
function request(token, headers = {}) {
  const given = new AbortController();
  if (token) headers.authorization = `Bearer ${token}`;
  return { headers, signal: given.signal, abort: () => given.abort() };
}

/** The answer to a request that is refused: its status, and the code of the error. */
export async function refusal(url, token, options = {}) {
  const answer = await within(fetch(url, { ...request(token), ...options }), `the answer to ${url}`);
  const text = await within(answer.text(), `the refusal of ${url}`);
  assert.ok(answer.status >= 400, `${url}: it was accepted`);
  return [answer.status, text && JSON.parse(text).code];
}

/** A response of `text/event-stream`: its events in order, with their ids and their data as text, and how it ended. */
export class Events {
  /** Opens it. `last` is the id of the last event of an earlier one. `into` takes the events. */
  static async open(url, { token, last, into = [] } = {}) {
    const events = new Events();
    const { abort, ...options } = request(token, last ? { "last-event-id": last } : {});
    Object.assign(events, { all: into, comments: 0, retry: null, abort });
    const answer = await within(fetch(url, options), `the answer to ${url}`);
    if (answer.status !== 200) throw new Error(`${url}: ${answer.status} ${await answer.text()}`);
    assert.equal(answer.headers.get("content-type"), "text/event-stream");
    events.headers = answer.headers;
    events.ended = events.#read(answer.body).catch((error) => error);
    void events.ended.then((error) => (events.end = { error }));
    return events;
  }

  async #read(body) {
    const decoder = new TextDecoder();
    let text = "";
    for await (const bytes of body) {
      text += decoder.decode(bytes, { stream: true });
      const blocks = text.split("\n\n");
      text = blocks.pop();
      for (const block of blocks) this.#take(block);
    }
    assert.equal(text, "", "an event that was cut");
  }

  #take(block) {
    if (block === ":") {
      this.comments += 1;
      return;
    }
    const event = { name: null, id: null, data: [] };
    for (const line of block.split("\n")) {
      const [, field, value] = line.match(/^(\w+): (.*)$/);
      if (field === "data") event.data.push(value);
      else if (field === "event") event.name = value;
      else if (field === "id") event.id = value;
      else if (field === "retry") this.retry = Number(value);
      else assert.fail(`the line ${line}`);
    }
    if (event.data.length === 0) return;
    event.text = event.data.join("\n");
    event.data = JSON.parse(event.text);
    assert.equal(event.data.op, event.name === "refused" ? "error" : event.name);
    this.all.push(event);
  }

  of(name) {
    return this.all.filter((event) => event.name === name);
  }

  messages() {
    return this.of("msg").map(({ data }) => data);
  }

  /** Waits for an event, and gives its data. */
  async event(name, pick = () => true) {
    const event = await until(`the event ${name}`, () => {
      const found = this.of(name).find(({ data }) => pick(data));
      if (!found && this.end) throw new Error(`${name}: ended with ${this.end.error} after ${this.last()}`);
      return found;
    }, { last: () => this.last() });
    return event.data;
  }

  last() {
    return JSON.stringify(this.all.slice(-3)).slice(0, 500);
  }

  async untilMessages(count) {
    await until(`${count} messages`, () => this.messages().length >= count, { last: () => this.last() });
    return this.messages();
  }

  /** Waits for the end that the server makes, and gives the last event. */
  async over(deadline) {
    const error = await within(this.ended, "the end of the stream", deadline);
    assert.equal(error, undefined, `${error?.stack} ${error?.cause}`);
    return this.all.at(-1);
  }
}

/** Follows `url()`, which may change, until it is closed. */
export class Follower {
  constructor(url, token) {
    Object.assign(this, { url, token, all: [], opened: 0, closed: false });
    this.running = this.#run();
  }

  async #run() {
    while (!this.closed) {
      try {
        this.stream = await Events.open(this.url(), { token: this.token, last: this.position(), into: this.all });
        this.opened += 1;
        if (this.closed) this.stream.abort();
        await this.stream.ended;
      } catch (error) {
        // Not there, or not yet ready: it tries again. Other answers are failures.
        if (/: 4\d\d /.test(error.message)) throw error;
      }
      await pause();
    }
  }

  position() {
    return this.all.findLast(({ id }) => id)?.id;
  }

  messages() {
    return this.all.filter(({ name }) => name === "msg").map(({ data }) => data);
  }

  joins() {
    return this.all.filter(({ name }) => name === "joined").map(({ data }) => data);
  }

  close() {
    this.closed = true;
    this.stream?.abort();
  }
}

/** One poll: the answer as text, or the cursor of an answer without messages. */
export async function poll(url, token, signal) {
  const { abort: _, ...options } = request(token);
  const answer = await fetch(url, { ...options, signal: signal ?? options.signal });
  const text = await answer.text();
  if (answer.status === 204) return { cursor: answer.headers.get("cursor"), messages: [] };
  if (answer.status !== 200) throw new Error(`${url}: ${answer.status} ${text}`);
  return { ...JSON.parse(text), text };
}

/** Polls `base()`, which may change, until it is closed. */
export class Poller {
  /** Stands at the head of the room. */
  static async start(base, token) {
    const poller = new Poller();
    Object.assign(poller, { base, token, all: [], answers: [], failed: 0, given: new AbortController() });
    ({ cursor: poller.cursor } = await within(poll(base(), token), "the first poll"));
    assert.ok(poller.cursor, "a poll without a cursor");
    poller.running = poller.#run();
    return poller;
  }

  async #run() {
    while (!this.closed) {
      const url = `${this.base()}?since=${encodeURIComponent(this.cursor)}&wait=10s`;
      try {
        const answer = await poll(url, this.token, this.given.signal);
        assert.ok(answer.cursor, "a poll without a cursor");
        assert.equal(answer.reset, undefined, answer.text);
        this.cursor = answer.cursor;
        this.all.push(...answer.messages);
        if (answer.text) this.answers.push(answer.text);
      } catch (error) {
        if (/: 4\d\d /.test(error.message) || error instanceof assert.AssertionError) throw error;
        this.failed += 1;
        await pause();
      }
    }
  }

  messages() {
    return this.all;
  }

  close() {
    this.closed = true;
    this.given.abort();
  }
}

// What a scenario is given --------------------------------------------------------------------------------------------

/** What a scenario is given. */
export class Test extends BaseTest {
  constructor(up) {
    super(up, WebSocket);
  }

  url(path, edge = 0) {
    return `http://${this.up.address(edge)}${path}`;
  }

  async events(path, { edge = 0, user = "kim", token = this.token(user), last } = {}) {
    const events = await Events.open(this.url(path, edge), { token, last });
    this.closing.push(() => events.abort());
    return events;
  }

  async ticket({ edge = 0, token = this.token("kim") } = {}) {
    const headers = { authorization: `Bearer ${token}` };
    const answer = await within(fetch(this.url("/v1/tickets", edge), { method: "POST", headers }), "a ticket");
    const text = await within(answer.text(), "the text of a ticket");
    assert.equal(answer.status, 200, text);
    return JSON.parse(text);
  }

  /** A connection to the first edge. */
  async socket() {
    const [host, port] = this.up.address(0).split(":");
    const socket = net.connect({ host, port: Number(port) });
    this.closing.push(() => socket.destroy());
    await within(once(socket, "connect"), "a connection");
    return socket;
  }

  /** A poll over this edge. */
  poll(room, since, { edge = 0, user = "kim", more = "" } = {}) {
    const query = since === undefined ? "" : `?since=${encodeURIComponent(since)}${more}`;
    return within(poll(this.url(`/v1/rooms/${room}/poll${query}`, edge), this.token(user)), "the answer to a poll");
  }
}

export function newRoom() {
  return newName("chat:events-");
}

export function bodies(messages) {
  return messages.map(({ body }) => body);
}

export function manyRooms(rooms) {
  return `/v1/events?${rooms.map((room) => `room=${room}`).join("&")}`;
}

// Load ----------------------------------------------------------------------------------------------------------------

/** Writers on the second edge: two for each room. `from` names the writer and the room. */
export async function startLoad(t, rooms) {
  const ways = {};
  for (const [at, room] of rooms.entries()) {
    for (const user of ["native-1", "native-2"]) {
      const from = `${user} in ${at}`;
      const native = await t.native({ user: `${user}-${at}` });
      ways[from] = (number) => native.call("send", { room, body: { from, number } });
    }
  }
  return new Load(ways);
}

/** Each message exactly once, those of a writer in its order. */
export async function checkLoad(load, reader) {
  await load.check(() => bodies(reader.messages()));
  const cursors = reader.messages().map(({ room, cursor }) => `${room} ${cursor}`);
  assert.equal(new Set(cursors).size, cursors.length, "a cursor that is there twice");
  for (const joined of reader.joins?.() ?? []) assert.equal(joined.reset, undefined, JSON.stringify(joined));
}

/** The three ways to read without a WebSocket; `start` begins one, at an address that may change. */
export const READERS = {
  "events of a room": {
    rooms: 1,
    start: async (t, address, [room]) =>
      ready(new Follower(() => `http://${address()}/v1/rooms/${room}/events`, t.token("kim")), 1),
  },
  "events of several rooms": {
    rooms: 3,
    start: async (t, address, rooms) => ready(new Follower(() => `http://${address()}${manyRooms(rooms)}`, t.token("kim")), 3),
  },
  polls: {
    rooms: 1,
    start: (t, address, [room]) => Poller.start(() => `http://${address()}/v1/rooms/${room}/poll`, t.token("kim")),
  },
};

async function ready(follower, rooms) {
  await until("all rooms are joined", () => follower.joins().length >= rooms);
  return follower;
}

/** How often a reader had to come back. */
export function returns(reader) {
  return reader.opened ? reader.opened - 1 : reader.failed;
}

export async function more(reader, count, what) {
  const goal = reader.messages().length + count;
  await until(what, () => reader.messages().length >= goal, { last: () => `(${reader.messages().length} of ${goal})` });
}
