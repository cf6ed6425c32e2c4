// The hooks, in React with StrictMode and jsdom: SIMULATED sockets and an edge of a few lines.

import assert from "node:assert/strict";
import { after, test } from "node:test";

import { JSDOM } from "jsdom";

const dom = new JSDOM("<main></main>", { pretendToBeVisual: true });
globalThis.window = dom.window;
globalThis.document = dom.window.document;
globalThis.navigator ??= dom.window.navigator; // Node 21 and later have one
globalThis.IS_REACT_ACT_ENVIRONMENT = true;
const { act, createElement, StrictMode, Suspense, startTransition, useState } = await import("react");
const { createRoot } = await import("react-dom/client");
const { renderToString } = await import("react-dom/server");
const { NatterProvider, useConnection, useInbox, useMessages, useNatter, usePresence, useSend, useTyping, useUnread } = await import("../react.js");
const { fakeClient, fakeRoom, fakeSockets, tokenOf } = await import("./fake.mjs");

after(() => dom.window.close());

const ROOM = "chat:lobby";
const turn = (ms = 0) => act(() => new Promise((resolve) => setTimeout(resolve, ms)));

/** Renders into a page of its own; ends with the test. */
async function rendered(t, element) {
  const main = document.createElement("main");
  const root = createRoot(main);
  const render = (next) => act(() => root.render(createElement(StrictMode, null, next)));
  const unmount = () => act(() => root.unmount());
  t.after(unmount);
  await render(element);
  return { main, render, unmount };
}

/** Answers of an edge with one room. */
function edgeOf(edge) {
  return {
    join: (frame, socket) => edge.join(frame, socket),
    send: (frame, socket) => edge.send(frame, socket),
    history: () => ({ op: "history", messages: edge.log.map(({ op: _op, room: _room, ...message }) => message) }),
    presence: () => ({ op: "presence", count: 1, users: [{ user: "kim", since: 1 }] }),
    watch: () => ({ op: "watching", watch: 1, rooms: [{ room: ROOM, unread: 2, last: { id: "x", from: "lee", ts: 1 } }] }),
    leave: () => ({ op: "left" }),
  };
}

let latest;
function Chat({ room = ROOM }) {
  const { messages, state } = useMessages(room);
  const { users, typing } = useTyping(room);
  const { count } = usePresence(room);
  latest = { send: useSend(room), typing };
  const { name } = useConnection();
  const texts = messages.map(({ body, status }) => `${body}:${status}`).join(" ");
  return createElement("p", null, `${name} ${state} [${texts}] typing:${users.join()} here:${count} unread:${useUnread().total} rooms:${useInbox().rooms.length}`);
}

test("StrictMode: one socket, one join, and everything is shown", async (t) => {
  const edge = fakeRoom(ROOM);
  edge.say("lee", "a", { body: "hello" });
  const { client, sockets, connected } = fakeClient({}, edgeOf(edge));
  const { main, unmount } = await rendered(t, createElement(NatterProvider, { client }, createElement(Chat)));
  assert.equal(main.textContent, "connecting loading [] typing: here:null unread:0 rooms:0");
  let socket;
  await act(async () => void (socket = await connected()));
  await turn(5);
  assert.equal(main.textContent, "online ready [hello:sent] typing: here:1 unread:2 rooms:1");
  assert.equal(sockets.length, 1);
  assert.equal(socket.commands("join").filter(({ presence }) => !presence).length <= 1, true);
  await act(async () => socket.push({ op: "typing", room: ROOM, user: "lee" }));
  assert.match(main.textContent, /typing:lee /);
  let handle;
  await act(async () => void (handle = latest.send("mine")));
  await act(() => handle.done);
  assert.match(main.textContent, /\[hello:sent mine:sent\]/);
  await unmount();
  await turn(2_200);
  assert.equal(socket.commands("leave").length, 1);
  assert.equal(socket.commands("unwatch").length, 1);
  assert.equal(client.state.name, "online", "a client that was given stays");
  client.close();
});

test("a provider with options: one client over StrictMode and renders, closed after the end", async (t) => {
  const { sockets, WebSocket } = fakeSockets();
  const asked = [];
  const provider = (name) => {
    const options = { url: "ws://edge.test", WebSocket, getToken: () => (asked.push(name), tokenOf({ sub: "kim", name })) };
    return createElement(NatterProvider, options, createElement(Chat));
  };
  const { render, unmount } = await rendered(t, provider("first"));
  await render(provider("second"));
  await turn(20);
  assert.equal(sockets.length, 1);
  await act(async () => {
    sockets[0].open();
    sockets[0].push({ op: "pong", rid: 1 });
    sockets[0].end(4001, "token_expired");
  });
  await turn(400);
  assert.deepEqual(asked, ["first", "second"]);
  assert.equal(sockets.length, 2);
  await unmount();
  await turn(20);
  assert.equal(sockets[1].closedWith, 1000);
  await turn(400);
  assert.equal(sockets.length, 2, "nothing comes back after the end");
});

test("another room, and another client: no message of the one is shown in the other", async (t) => {
  const edges = { "chat:a": fakeRoom("chat:a"), "chat:b": fakeRoom("chat:b") };
  edges["chat:a"].say("lee", "1", { body: "in a" });
  edges["chat:b"].say("lee", "2", { body: "in b" });
  const by = (name) => (frame, socket) => edgeOf(edges[frame.room])[name](frame, socket);
  const { client, connected } = fakeClient({}, { ...edgeOf(edges["chat:a"]), join: by("join"), history: by("history") });
  const show = (room) => createElement(NatterProvider, { client }, createElement(Chat, { room }));
  const { main, render } = await rendered(t, show("chat:a"));
  await act(async () => void (await connected()));
  await turn(5);
  assert.match(main.textContent, /\[in a:sent\]/);
  await render(show("chat:b"));
  assert.doesNotMatch(main.textContent, /in a/);
  await turn(5);
  assert.match(main.textContent, /\[in b:sent\]/);
  client.close();
});

test("concurrent rendering: a transition that is thrown away leaves nothing behind, and no state is torn", async (t) => {
  const edge = fakeRoom(ROOM);
  const { client, connected } = fakeClient({}, edgeOf(edge));
  let go;
  const never = new Promise(() => {});
  const torn = [];
  function Count({ name }) {
    const { messages } = useMessages(ROOM);
    torn.push([name, messages.length]);
    return `${name}${messages.length} `;
  }
  function Suspends({ on }) {
    useMessages("chat:other");
    if (on) throw never;
    return "";
  }
  function App() {
    const [on, set] = useState(false);
    go = () => startTransition(() => set(true));
    return createElement(Suspense, null, createElement(Count, { name: "a" }), createElement(Suspends, { on }), createElement(Count, { name: "b" }));
  }
  const { main } = await rendered(t, createElement(NatterProvider, { client }, createElement(App)));
  let socket;
  await act(async () => void (socket = await connected()));
  await turn(5);
  await act(async () => go());
  for (let i = 0; i < 20; i += 1) {
    await act(async () => socket.push(edge.say("lee", `m${i}`, { body: i })));
    assert.equal(main.textContent, `a${i + 1} b${i + 1} `);
  }
  client.close();
});

test("without a provider it says so; on a server it renders without a connection", () => {
  function Lonely() {
    useNatter();
    return null;
  }
  assert.throws(() => renderToString(createElement(Lonely)), /no NatterProvider/);
  const { client, sockets } = fakeClient();
  assert.match(renderToString(createElement(NatterProvider, { client }, createElement(Chat))), /idle idle \[\]/);
  assert.equal(sockets.length, 0);
});
