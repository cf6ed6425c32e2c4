// Every protocol to every protocol: natter.v1, HTTP, Centrifugo's SDK over each of its transports, stompjs, and plain NATS
// write into one durable room. All but NATS read it, HTTP as events and by polls, and at the end history over HTTP.
//
//     node matrix.mjs NATTER
//
// NATTER is the binary. The script installs the packages of centrifugal/ and of stomp/ into .natter/clients, starts
// `natter up` with two edges and a data folder of its own on free ports, and takes it down again. It prints
// `N passed, N failed` and exits 0 or 1.
//
// Every sender but NATS, and every receiver, is there twice: once on each edge. What Centrifugo's SDK sends without a WebSocket
// goes to the edge that does not hold its stream. The senders write the same bodies first one
// sender after the other, then all at once. A last message, the marker, ends each of the two rounds.
//
// Nothing here sleeps for a guessed time: every wait is for a condition, with a deadline.

import assert from "node:assert/strict";
import { createHash } from "node:crypto";

import { FALLBACKS, PROTOCOLS, Test as Centrifugal } from "./centrifugal/clients.mjs";
import { Test as Stomp, topic } from "./stomp/clients.mjs";
import { Events, Poller } from "./streams.mjs";
import { Nats, Results, Up, newName, packages, until, within } from "./support.mjs";

const WebSocket = packages("centrifugal")("ws");
const { EventSource } = packages("centrifugal")("eventsource");
const [JSON_STREAM, PROTOBUF_STREAM, JSON_EVENTS] = FALLBACKS;
const EDGES = [0, 1];
/** A round sends some hundred messages. */
const ROUND_DEADLINE = 60_000;
const PAGE = 50;

/** JSON as it is sent; each differs from all others also as JSON.stringify writes its value. */
const BODIES = [
  '{"text":"안녕하세요, 여러분 👩‍👩‍👧‍👦 🏳️‍🌈","한":"국 👍"}',
  `{"text":"${"x".repeat(60 * 1024)}"}`,
  "[1,[2,[3,[]]],null,{}]",
  "42",
  "-1.5e-7",
  "true",
  "false",
  "null",
  '{ "b" :1.0,"a": [1.0e2 ,12345678901234567890,-0],  "deep":{"deeper":[null,{"":0.10}]},"c":"\\u00e9\\/" }',
  '{\n "a":\r\n [1,\n2] }',
  '"a JSON string: \\" \\\\ \\/ \\b\\f\\n\\r\\t \\u0000 \\u00e9 \\ud83d\\udc4d 한국 👍"',
];
/** What is not JSON becomes a JSON string, where a protocol can carry it. */
const PLAIN = 'plain words: "한국" 👍 \\ \n and a second line';

// The text of JSON ----------------------------------------------------------------------------------------------------

const TOKEN = /\s*("[^"\\]*(?:\\.[^"\\]*)*"|[^\s"[\]{},:]+|[[\]{},:])/y;

/** The members of a JSON object by name, or the elements of an array, as the text that stands there. */
function partsOf(json) {
  const isArray = json.trimStart()[0] === "[";
  const parts = isArray ? [] : {};
  let [depth, name, begin, end] = [0, null, 0, 0];
  const finish = () => {
    if (begin === end) return; // empty
    if (isArray) parts.push(json.slice(begin, end));
    else parts[name] = json.slice(begin, end);
  };
  TOKEN.lastIndex = 0;
  do {
    const [, token] = TOKEN.exec(json);
    const at = TOKEN.lastIndex;
    if ("]}".includes(token)) depth -= 1;
    if (depth === 0 && "]}".includes(token)) finish();
    else if (depth === 1 && token === ",") {
      finish();
      begin = end = at;
    } else if (depth === 1 && token === ":") {
      name = JSON.parse(json.slice(begin, end));
      begin = end = at;
    } else if (depth > 0) {
      if (begin === end) begin = at - token.length;
      end = at;
    } else begin = end = at; // after the first brace
    if ("[{".includes(token)) depth += 1;
  } while (depth > 0);
  return parts;
}

/** A text that fits into a message; that of a long one still differs from that of any other. */
function brief(text) {
  if (text.length <= 120) return text;
  const hash = createHash("sha256").update(text).digest("hex").slice(0, 16);
  return `${text.slice(0, 40)}… (${text.length} characters, sha256 ${hash}…)`;
}

// Senders -------------------------------------------------------------------------------------------------------------

/**
 * A way to write into the room:
 *
 * - `from`: whom the receivers see
 * - `send(text, id)`: sends a body; resolves when it is stored
 * - `givesId`: whether the message gets that id; otherwise natter makes one
 * - `plain`: whether a body may be something else than JSON
 * - `inOrder`: whether messages that are sent without waiting keep their order
 * - `stored(text)`: what arrives of a body
 */
class Sender {
  constructor(protocol, from, send, { givesId = false, plain = false, inOrder = true, stored = (text) => text } = {}) {
    Object.assign(this, { protocol, from, send, givesId, plain, inOrder, stored });
  }

  /** The bodies that it sends: what is sent, what arrives, and the id if it is known. */
  messages(round) {
    const messages = BODIES.map((text) => ({ text, stored: this.stored(text) }));
    if (this.plain) messages.push({ text: PLAIN, stored: JSON.stringify(PLAIN) });
    return messages.map((message, at) => ({ ...message, id: this.givesId ? `${round.id}-${at}` : undefined }));
  }
}

function centrifugalSender(way) {
  return async ({ centrifugal, room }, user, edge, protocol) => {
    const client = await centrifugal.client({ user, edge, protocol: way }).ready();
    const isJson = way.name === "json";
    const send = (text) =>
      within(client.sdk.publish(room, isJson ? JSON.parse(text) : Buffer.from(text)), `publish ${brief(text)}`);
    const stored = (text) => (isJson ? JSON.stringify(JSON.parse(text)) : text); // the SDK writes JSON
    // Without a WebSocket each publish is a request of its own.
    return new Sender(protocol, user, send, { stored, inOrder: !way.transport });
  };
}

const SENDERS = {
  "natter.v1": async ({ centrifugal, room }, user, edge, protocol) => {
    const native = await centrifugal.native({ user, edge });
    const send = async (text, id) => {
      // As text: Native.call would write the body anew.
      const rid = ++native.rid;
      native.raw.send(`{"op":"send","rid":${rid},"room":"${room}","id":"${id}","body":${text}}`);
      const reply = await until(`the reply to ${brief(text)}`, () => native.replies.get(rid));
      assert.deepEqual([reply.op, reply.id, reply.dup], ["ack", id, false], JSON.stringify(reply));
    };
    return new Sender(protocol, user, send, { givesId: true });
  },

  HTTP: async ({ centrifugal, up, room }, user, edge, protocol) => {
    const headers = { authorization: `Bearer ${centrifugal.token(user)}` };
    const url = `http://${up.address(edge)}/v1/rooms/${room}/messages`;
    const send = async (text, id) => {
      const answer = await within(fetch(url, { method: "POST", headers, body: `{"id":"${id}","body":${text}}` }), "POST");
      const reply = await within(answer.json(), "the answer to POST");
      assert.deepEqual([answer.status, reply.id, reply.dup], [200, id, false], JSON.stringify(reply));
    };
    return new Sender(protocol, user, send, { givesId: true, inOrder: false });
  },

  "Centrifugo's JSON": centrifugalSender(PROTOCOLS.json),
  "Centrifugo's JSON over http_stream": centrifugalSender(JSON_STREAM),
  "Centrifugo's JSON over sse": centrifugalSender(JSON_EVENTS),
  "Centrifugo's Protobuf": centrifugalSender(PROTOCOLS.protobuf),
  "Centrifugo's Protobuf over http_stream": centrifugalSender(PROTOBUF_STREAM),

  STOMP: async ({ stomp, room }, user, edge, protocol) => {
    const client = await stomp.client({ user, edge }).ready();
    const send = (text, id) => client.send(topic(room), text, { "idempotency-key": id });
    return new Sender(protocol, user, send, { givesId: true, plain: true });
  },
};

async function natsSender({ up, room, closing }) {
  const nats = await Nats.connect(up.nats());
  closing.push(() => nats.close());
  const send = (text) => nats.publish(`natter.pub.${room.replace(":", ".")}`, text);
  return new Sender("NATS", "$nats", send, { plain: true });
}

// Receivers -----------------------------------------------------------------------------------------------------------

/**
 * A reader of the room:
 *
 * - `ids()`: the ids of all messages so far, with little work
 * - `read()`: all messages so far: `from`, `id`, `text` (the body as it came), and where the protocol has them `cursor`,
 *   `offset` and `ts`
 * - `arrives(text)`: as what a body with this text arrives
 */
class Receiver {
  constructor(protocol, edge, ids, read, arrives = (text) => text) {
    Object.assign(this, { protocol, edge, ids, read, arrives });
    this.name = `${protocol} on edge ${edge}`;
  }
}

function assertOneConnection(count) {
  assert.equal(count, 1, "how often a receiver connected");
}

/** A message from the text of a push of natter.v1. */
function messageOf(text) {
  const { from, id, cursor, ts } = JSON.parse(text);
  return { from, id, cursor, ts, text: partsOf(text).body };
}

/** Centrifugo's SDK over JSON. It gives values; their text is in the lines that `recording` records. */
function centrifugalText(way, recording) {
  return async ({ centrifugal, room }, user, edge, protocol) => {
    let lines = "";
    const options = recording((text) => (lines += text));
    const client = centrifugal.client({ user, edge, protocol: way, ...options });
    const feed = client.subscribe(room);
    await feed.ready();
    const read = () => {
      assertOneConnection(client.of("connecting").length);
      const publications = lines
        .split("\n")
        .filter((line) => line && JSON.parse(line).push?.pub)
        .map((line) => partsOf(partsOf(line).push).pub);
      assert.equal(publications.length, feed.publications.length, "publications in the frames, and of the SDK");
      return feed.publications.map(({ data, info, tags, offset }, at) => {
        const publication = JSON.parse(publications[at]);
        assert.deepEqual(data, publication.data, "a value of the SDK");
        return { from: info.user, id: tags.id, offset, ts: publication.time, text: partsOf(publications[at]).data };
      });
    };
    // A line break ends a message there, so those between tokens are replaced.
    const arrives = (text) => text.replaceAll(/[\r\n]/g, " ");
    return new Receiver(protocol, edge, () => feed.publications.map(({ tags }) => tags.id), read, arrives);
  };
}

/** Centrifugo's SDK over Protobuf. */
function centrifugalBytes(way) {
  return async ({ centrifugal, room }, user, edge, protocol) => {
    const client = centrifugal.client({ user, edge, protocol: way });
    const feed = client.subscribe(room);
    await feed.ready();
    const read = () => {
      assertOneConnection(client.of("connecting").length);
      return feed.publications.map(({ bytes, info, tags, offset }) =>
        ({ from: info.user, id: tags.id, offset, text: Buffer.from(bytes).toString() }));
    };
    return new Receiver(protocol, edge, () => feed.publications.map(({ tags }) => tags.id), read);
  };
}

/** `text/event-stream`. */
function eventReceiver(path) {
  return async (all, user, edge, protocol) => {
    const { centrifugal, up, room, closing } = all;
    const events = await Events.open(`http://${up.address(edge)}${path(all)}`, { token: centrifugal.token(user) });
    closing.push(() => events.abort());
    await events.event("joined", (joined) => joined.room === room);
    // A line of an event ends at a carriage return too.
    const arrives = (text) => text.replaceAll("\r", "\n");
    return new Receiver(protocol, edge, () => events.messages().map(({ id }) => id), () => {
      assert.equal(events.end, undefined);
      return events.of("msg").map((event) => messageOf(event.text));
    }, arrives);
  };
}

const RECEIVERS = {
  "natter.v1": async ({ centrifugal, room }, user, edge, protocol) => {
    const native = await centrifugal.native({ user, edge });
    await native.call("join", { room });
    const ids = () => native.pushes.filter(({ op }) => op === "msg").map(({ id }) => id);
    const read = () =>
      native.raw.frames
        .filter((frame) => JSON.parse(frame).op === "msg")
        .map((frame) => messageOf(frame));
    return new Receiver(protocol, edge, ids, read);
  },

  "Centrifugo's JSON": centrifugalText(PROTOCOLS.json, (record) => ({
    websocket: class extends WebSocket {
      constructor(...args) {
        super(...args);
        this.on("message", (data) => record(`${data}\n`));
      }
    },
  })),

  "Centrifugo's JSON over http_stream": centrifugalText(JSON_STREAM, (record) => ({
    fetch: async (url, options) => {
      const answer = await fetch(url, options);
      if (url.endsWith("/emulation")) return answer;
      const decoder = new TextDecoder();
      const recording = new TransformStream({
        transform(bytes, controller) {
          record(decoder.decode(bytes, { stream: true }));
          controller.enqueue(bytes);
        },
      });
      return new Response(answer.body.pipeThrough(recording), answer);
    },
  })),

  "Centrifugo's JSON over sse": centrifugalText(JSON_EVENTS, (record) => ({
    eventsource: class extends EventSource {
      constructor(...args) {
        super(...args);
        this.addEventListener("message", ({ data }) => record(`${data}\n`));
      }
    },
  })),

  "Centrifugo's Protobuf": centrifugalBytes(PROTOCOLS.protobuf),
  "Centrifugo's Protobuf over http_stream": centrifugalBytes(PROTOBUF_STREAM),

  "events of a room": eventReceiver(({ room }) => `/v1/rooms/${room}/events`),
  "events of several rooms": eventReceiver(({ room }) => `/v1/events?room=${newName("chat:matrix-")}&room=${room}`),

  polls: async ({ centrifugal, up, room, closing }, user, edge, protocol) => {
    const base = () => `http://${up.address(edge)}/v1/rooms/${room}/poll`;
    const poller = await Poller.start(base, centrifugal.token(user));
    closing.push(() => poller.close());
    const read = () => {
      assert.equal(poller.failed, 0, "polls that failed");
      const texts = poller.answers.flatMap((answer) => partsOf(partsOf(answer).messages));
      return texts.map((text) => messageOf(text));
    };
    return new Receiver(protocol, edge, () => poller.all.map(({ id }) => id), read);
  },

  STOMP: async ({ stomp, room }, user, edge, protocol) => {
    const client = await stomp.client({ user, edge }).ready();
    const feed = await client.subscribe(topic(room)).ready();
    const read = () => {
      assertOneConnection(client.connects.length);
      assert.deepEqual(feed.resets, []);
      return feed.messages.map(({ headers, body }) => {
        const { from, id, cursor, timestamp } = headers;
        assert.equal(headers["message-id"], `${from}/${id}`);
        return { from, id, cursor, ts: Number(timestamp), text: `${headers["content-type"]}: ${body}` };
      });
    };
    // A JSON string arrives as its text.
    const arrives = (text) => (text[0] === '"' ? `text/plain: ${JSON.parse(text)}` : `application/json: ${text}`);
    return new Receiver(protocol, edge, () => feed.messages.map(({ headers }) => headers.id), read, arrives);
  },
};

// Rounds --------------------------------------------------------------------------------------------------------------

const ROUNDS = [
  {
    name: "one after the other",
    id: "turn",
    async send(senders) {
      for (const sender of senders) {
        for (const { text, id } of sender.messages(this)) await sender.send(text, id);
      }
    },
  },
  {
    name: "all at once",
    id: "once",
    async send(senders) {
      const sent = senders.flatMap((sender) => sender.messages(this).map(({ text, id }) => sender.send(text, id)));
      await Promise.all(sent);
    },
  },
];

function markerOf(round) {
  return `end-of-${round.id}`;
}

/** What a receiver got in a round: after the marker of the one before, up to its own. */
function messagesOf(receiver, round) {
  const all = receiver.read();
  const placeOf = (id) => {
    const places = all.flatMap((message, at) => (message.id === id ? [at] : []));
    assert.equal(places.length, 1, `${receiver.name}: how often the marker ${id} came`);
    return places[0];
  };
  const before = ROUNDS[ROUNDS.indexOf(round) - 1];
  return all.slice(before ? placeOf(markerOf(before)) + 1 : 0, placeOf(markerOf(round)));
}

/** Each message of the senders came once, with its id and its body; in the order of the sender, where there is one. */
function checkPair(round, senders, receivers) {
  for (const receiver of receivers) {
    const messages = messagesOf(receiver, round);
    for (const sender of senders) {
      const line = (id, text) => (sender.givesId ? `${id}: ${brief(text)}` : brief(text));
      const got = messages.filter(({ from }) => from === sender.from).map(({ id, text }) => line(id, text));
      const expected = sender.messages(round).map(({ id, stored }) => line(id, receiver.arrives(stored)));
      const what = `what ${receiver.name} has of ${sender.from}`;
      if (sender.inOrder) assert.deepEqual(got, expected, what);
      else assert.deepEqual(got.sort(), expected.sort(), what);
    }
  }
}

/** All receivers have the same messages in the same order, and nothing from anybody else. */
function checkOrder(round, senders, receivers) {
  const lists = receivers.map((receiver) => messagesOf(receiver, round));
  const [names, ...others] = lists.map((messages) => messages.map(({ from, id }) => `${from}/${id}`));
  assert.ok(lists[0].every(({ from, id }) => from && id), "messages without a sender or an id");
  assert.equal(new Set(names).size, names.length, "an id that is there twice");
  others.forEach((list, at) => assert.deepEqual(list, names, `${receivers[at + 1].name} and ${receivers[0].name}`));
  assert.equal(names.length, senders.reduce((sum, sender) => sum + sender.messages(round).length, 0));
  if (round === ROUNDS[0]) {
    const turns = lists[0].map(({ from }) => from).filter((from, at, all) => from !== all[at - 1]);
    assert.deepEqual(turns, senders.map(({ from }) => from), "the turns of the senders");
  }
}

/** Cursors, offsets and times are the same wherever a protocol shows them. */
function checkPlaces(round, receivers) {
  for (const field of ["cursor", "offset", "ts"]) {
    const lists = receivers.map((receiver) => [receiver, messagesOf(receiver, round).map((message) => message[field])]);
    const [[first, values], ...others] = lists.filter(([, list]) => list.some((value) => value !== undefined));
    assert.ok(values.every(Boolean), `messages without ${field} at ${first.name}`);
    assert.ok(others.length >= 3, `who has ${field}: ${others.length + 1}`);
    for (const [receiver, list] of others) assert.deepEqual(list, values, `${field} of ${receiver.name} and ${first.name}`);
    if (field === "ts") continue; // two messages may have the same
    assert.equal(new Set(values).size, values.length, `a ${field} that is there twice`);
    if (field === "offset") assert.deepEqual(values, [...values].sort((one, other) => one - other), "offsets that do not grow");
  }
}

/** The pages of history from the first to the last, over HTTP, have what natter.v1 received. */
async function checkHistory({ centrifugal, up, room }, receiver) {
  const headers = { authorization: `Bearer ${centrifugal.token("historian")}` };
  const got = [];
  for (let after = ""; after !== undefined; ) {
    const edge = got.length % EDGES.length; // now this one, now the other
    const url = `http://${up.address(edge)}/v1/rooms/${room}/messages?limit=${PAGE}&after=${encodeURIComponent(after)}`;
    const answer = await within(fetch(url, { headers }), "a page");
    const page = await within(answer.text(), "the text of a page");
    assert.equal(answer.status, 200, page.slice(0, 500));
    const { messages, next } = JSON.parse(page);
    assert.ok(messages.length > 0 || next === undefined, "an empty page, and one after it");
    const texts = partsOf(partsOf(page).messages).map((message) => partsOf(message).body);
    got.push(...messages.map(({ from, id, cursor, ts }, at) => ({ from, id, cursor, ts, text: brief(texts[at]) })));
    after = next;
  }
  assert.deepEqual(got, receiver.read().map((message) => ({ ...message, text: brief(message.text) })));
}

// -----------------------------------------------------------------------------------------------------------------------

async function main() {
  const [binary] = process.argv.slice(2);
  if (!binary) {
    console.error("usage: node matrix.mjs NATTER");
    return 64;
  }
  const results = new Results();
  const check = (name, deed) => results.run(name, deed, ROUND_DEADLINE);
  const up = await Up.start(binary, { edges: EDGES.length });
  const room = newName("chat:matrix-");
  const [centrifugal, stomp] = [new Centrifugal(up, PROTOCOLS.json), new Stomp(up)];
  const all = { up, room, centrifugal, stomp, closing: [] };
  const [senders, receivers] = [[], []];
  try {
    await check("all are connected", async () => {
      const each = async (makers, role, into) => {
        for (const edge of EDGES) {
          for (const [protocol, make] of Object.entries(makers)) {
            const user = `${role}-${protocol.replaceAll(/[^A-Za-z0-9]/g, "")}-${edge}`;
            into.push(await make(all, user, edge, protocol));
          }
        }
      };
      await each(RECEIVERS, "reader", receivers);
      await each(SENDERS, "writer", senders);
      senders.push(await natsSender(all));
    });
    if (results.failed === 0) {
      for (const round of ROUNDS) {
        await check(`${round.name}: all is sent and has come`, async () => {
          await round.send(senders);
          await senders[0].send('"the marker"', markerOf(round));
          for (const receiver of receivers) {
            await until(`the marker at ${receiver.name}`, () => receiver.ids().includes(markerOf(round)), {
              last: () => `(${receiver.ids().length} messages)`,
            });
          }
        });
        for (const from of new Set(senders.map(({ protocol }) => protocol))) {
          for (const to of Object.keys(RECEIVERS)) {
            const those = (list, protocol) => list.filter((one) => one.protocol === protocol);
            await check(`${round.name}: ${from} to ${to}`, () => checkPair(round, those(senders, from), those(receivers, to)));
          }
        }
        await check(`${round.name}: the same order everywhere`, () => checkOrder(round, senders, receivers));
        await check(`${round.name}: the same cursors, offsets and times`, () => checkPlaces(round, receivers));
      }
      await check("history over HTTP has it all", () => checkHistory(all, receivers[0]));
      await check("nothing came after the end", () => {
        const last = markerOf(ROUNDS.at(-1));
        for (const receiver of receivers) assert.equal(receiver.ids().at(-1), last, receiver.name);
      });
    }
  } finally {
    for (const close of all.closing) close();
    centrifugal.close();
    stomp.close();
    await up.stop();
  }
  return results.sum();
}

process.exit(await main());
