// Readers of rooms without a WebSocket, by plain fetch: `text/event-stream` and polls. Those that come back do it as a browser
// does: after any end, from where they stand.

import assert from "node:assert/strict";

import { until, within } from "./support.mjs";

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
