// natter's chat page: a small client of the native protocol (natter.v1), and the page on top of it.
//
// The client keeps one promise: `cursor` is the position of the last message it handed out, so a reconnect or a reload
// asks for exactly what is missing. Nothing from the network is ever put into the page as HTML.

const SUBPROTOCOL = "natter.v1";
const BACKOFF_BASE_MS = 250;
const BACKOFF_CAP_MS = 10_000;
const LATER_MS = 5_000; // at least, where the edge says "later"
const HEALTHY_MS = 5_000; // a connection that lived this long starts the backoff anew
const CALL_MS = 10_000; // an edge answers a publish within 5 s, whatever happens behind it
const JOIN_MS = 15_000;
const TYPING_EVERY_MS = 2_000;
const TYPING_SHOWN_MS = 3_000;
const KEPT_MESSAGES = 200; // shown again after a reload, and kept on the page

// What close codes advise (1006 and unknown ones below 4000: come back).
const NEW_TOKEN = 4001;
const NEVER = new Set([1002, 1003, 1007, 1009, 4002, 4004]);
const LATER = new Set([1011, 4005]);
const REASONS = new Map([
  [4001, "the token is not valid or has expired"],
  [4002, "the token was revoked"],
  [4003, "this tab read too slowly"],
  [4004, "protocol error"],
  [4005, "too many sessions or commands"],
  [4010, "the edge is shutting down"],
]);

/**
 * One session that follows one room through reconnects.
 *
 * Events (CustomEvent, data in `detail`): `state` {state, why?, retryMs?}, `joined` {cursor, replay, reset?, reason?},
 * `msg`, `typing`, `token_expiring`, `kicked`, `refused` {code, message}.
 */
export class Natter extends EventTarget {
  #url; #token; #room;
  #socket = null;
  #opened = 0;
  #attempt = 0;
  #retry = 0; // timer
  #leave = 0; // timer: told to go elsewhere
  #stopped = false;
  #rid = 0;
  #calls = new Map(); // rid -> {resolve, reject, timer}

  /** @param {{url: string, token: string, room: string, cursor?: string}} options */
  constructor({ url, token, room, cursor }) {
    super();
    this.#url = url;
    this.#token = token;
    this.#room = room;
    this.cursor = cursor ?? null;
    this.joined = false;
  }

  connect() {
    clearTimeout(this.#retry);
    this.#emit("state", { state: "connecting" });
    const socket = new WebSocket(this.#url, [SUBPROTOCOL, `bearer.${this.#token}`]);
    this.#socket = socket;
    this.#opened = 0;
    socket.onopen = () => {
      this.#opened = performance.now();
      this.#join();
    };
    socket.onmessage = (event) => {
      if (socket === this.#socket) this.#receive(event.data);
    };
    socket.onclose = (event) => {
      if (socket === this.#socket) this.#lost(event.code, event.reason);
    };
  }

  /** Ends it; no event follows. */
  stop() {
    this.#stopped = true;
    clearTimeout(this.#retry);
    this.#drop(1000);
  }

  /** Connects at once instead of at the end of the wait. */
  hurry() {
    if (!this.#socket && !this.#stopped) this.connect();
  }

  /**
   * Publishes `body` under `id` until the edge acknowledges it; the same id each time, so it is stored once.
   * Rejects with {code, message} when the edge will never take it.
   */
  async publish(id, body) {
    for (let attempt = 0; ; attempt += 1) {
      if (this.#stopped) throw { code: "closed", message: "the session has ended" };
      try {
        if (this.joined) return await this.call("send", { room: this.#room, id, body });
      } catch (error) {
        if (!error.retry) throw error;
      }
      if (this.joined) await sleep(jitter(attempt));
      else await this.#comeback();
    }
  }

  /** Until joined again, or a second has passed: a session that was stopped meanwhile must be noticed. */
  #comeback() {
    return new Promise((resolve) => {
      this.addEventListener("joined", resolve, { once: true });
      setTimeout(resolve, 1_000);
    });
  }

  typing() {
    if (this.joined) this.call("typing", { room: this.#room }).catch(() => {});
  }

  /** Sends a command and gives its reply; rejects with {code, message, retry}. */
  call(op, fields = {}, within = CALL_MS) {
    const socket = this.#socket;
    if (socket?.readyState !== WebSocket.OPEN) {
      return Promise.reject({ code: "disconnected", message: "not connected", retry: true });
    }
    const rid = (this.#rid += 1);
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        this.#calls.delete(rid);
        reject({ code: "timeout", message: `no answer to ${op}`, retry: true });
      }, within);
      this.#calls.set(rid, { resolve, reject, timer });
      socket.send(JSON.stringify({ op, rid, ...fields }));
    });
  }

  // The reply is handled by a callback of `#receive` and not by awaiting: the messages behind it may already be in the
  // browser's queue, and must find the session joined.
  #join() {
    const socket = this.#socket;
    const rid = (this.#rid += 1);
    const again = (attempt) => {
      if (socket === this.#socket) setTimeout(() => socket === this.#socket && this.#join(), jitter(attempt));
    };
    const timer = setTimeout(() => {
      this.#calls.delete(rid);
      if (socket === this.#socket) this.#lost(1006, "no answer to join");
    }, JOIN_MS);
    this.#calls.set(rid, {
      timer,
      resolve: (joined) => {
        this.joined = true;
        if (joined.cursor != null) this.cursor = joined.cursor;
        this.#emit("state", { state: "connected" });
        this.#emit("joined", joined);
      },
      reject: (error) => {
        if (error.code === "disconnected") return; // `#lost` takes care
        this.#emit("refused", error);
        if (error.retry) again(3);
        else this.#end(`${error.code}: ${error.message}`);
      },
    });
    const since = this.cursor == null ? {} : { since: this.cursor };
    socket.send(JSON.stringify({ op: "join", rid, room: this.#room, ...since }));
  }

  #receive(text) {
    let frame;
    try {
      frame = JSON.parse(text);
    } catch {
      return; // not ours; the next one may be
    }
    if (frame.rid != null) {
      const call = this.#calls.get(frame.rid);
      if (!call) return; // late
      this.#calls.delete(frame.rid);
      clearTimeout(call.timer);
      if (frame.op === "error") call.reject(frame);
      else call.resolve(frame);
      return;
    }
    if (frame.room != null && frame.room !== this.#room) return;
    switch (frame.op) {
      case "msg":
        if (frame.cursor != null) this.cursor = frame.cursor;
        this.#emit("msg", frame);
        break;
      case "kicked":
        if (frame.code === "reset") {
          // The room was made anew: our cursor tells the edge so, and it answers with `reset`.
          this.joined = false;
          this.#join();
        } else {
          this.#emit("kicked", frame);
          this.#end(`removed from the room (${frame.code})`);
        }
        break;
      case "reconnect":
        clearTimeout(this.#leave);
        this.#leave = setTimeout(() => {
          this.#attempt = 0;
          this.#drop(1000);
          this.connect();
        }, frame.after_ms ?? 0);
        break;
      case "error":
        this.#emit("refused", frame);
        break;
      default:
        this.#emit(frame.op, frame);
    }
  }

  #lost(code, reason) {
    const lived = this.#opened ? performance.now() - this.#opened : 0;
    this.#drop();
    const why = REASONS.get(code) ?? reason;
    if (code === NEW_TOKEN || NEVER.has(code)) {
      this.#end(`${why || "closed"} (${code})`);
      return;
    }
    if (lived >= HEALTHY_MS) this.#attempt = 0;
    const retryMs = jitter(this.#attempt) + (LATER.has(code) ? LATER_MS : 0);
    this.#attempt += 1;
    this.#emit("state", { state: "reconnecting", why, retryMs });
    this.#retry = setTimeout(() => this.connect(), retryMs);
  }

  #end(why) {
    this.#stopped = true;
    this.#drop(1000);
    this.#emit("state", { state: "closed", why });
  }

  #drop(code) {
    const socket = this.#socket;
    this.#socket = null;
    this.joined = false;
    clearTimeout(this.#leave);
    const calls = [...this.#calls.values()];
    this.#calls.clear();
    for (const call of calls) {
      clearTimeout(call.timer);
      call.reject({ code: "disconnected", message: "the connection was lost", retry: true });
    }
    socket?.close(code);
  }

  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

/** Exponential backoff with full jitter. */
function jitter(attempt) {
  return Math.random() * Math.min(BACKOFF_CAP_MS, BACKOFF_BASE_MS * 2 ** attempt);
}

function sleep(ms) {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** A new message id: 48 bits of time and 80 of chance in Crockford's base 32 (a ULID). */
function newId() {
  const alphabet = "0123456789ABCDEFGHJKMNPQRSTVWXYZ";
  let time = Date.now();
  let head = "";
  for (let i = 0; i < 10; i += 1) {
    head = alphabet[time % 32] + head;
    time = Math.floor(time / 32);
  }
  return head + Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => alphabet[byte % 32]).join("");
}

/** The user a token is for; only for display, the edge is the judge. */
function userOf(token) {
  try {
    const claims = token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/");
    const bytes = Uint8Array.from(atob(claims), (c) => c.charCodeAt(0));
    return JSON.parse(new TextDecoder().decode(bytes)).sub ?? "";
  } catch {
    return "";
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// The page.

const $ = (id) => document.getElementById(id);
const state = $("state"), log = $("log"), text = $("text"), send = $("send");
const room = $("room"), token = $("token"), user = $("user"), typing = $("typing"), where = $("where");

let client = null;
let shown = null; // {room, user, cursor, messages: […]}: what this tab shows, kept over a reload
let items = new Map(); // message key -> its <li>
let bottom = true; // whether the log is scrolled to its end

/** sessionStorage, which may be full or switched off: the page works without it, only without memory. */
const memory = {
  get(key) {
    try {
      return JSON.parse(sessionStorage.getItem(key));
    } catch {
      return null;
    }
  },
  set(key, value) {
    try {
      sessionStorage.setItem(key, JSON.stringify(value));
    } catch {
      // Full: what counts is that nothing wrong is kept. Without the cursor a reload starts from now.
      sessionStorage.removeItem(key);
    }
  },
};

function start() {
  client?.stop();
  saveNow();
  const roomName = room.value.trim();
  const me = userOf(token.value.trim());
  const kept = memory.get(storeOf(roomName));
  // Another user's view is not ours to show.
  shown = kept && kept.user === me ? kept : { room: roomName, user: me, cursor: null, messages: [] };
  memory.set("natter:entry", { token: token.value.trim(), room: roomName });
  user.value = me;
  where.textContent = roomName;
  document.title = `${roomName} · natter`;
  log.replaceChildren();
  items = new Map();
  for (const message of shown.messages) show(message);

  let first = true; // the first join of this page load
  const hadMessages = shown.messages.length > 0;
  const url = new URL("ws", document.baseURI);
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  url.hash = "";
  const mine = new Natter({ url: url.href, token: token.value.trim(), room: roomName, cursor: shown.cursor });
  client = mine;
  mine.addEventListener("state", ({ detail }) => showState(detail));
  mine.addEventListener("joined", ({ detail }) => {
    const missed = `${detail.replay ?? 0} missed`;
    if (detail.reset) {
      shown.messages = [];
      line(`— can't resume (${detail.reason ?? "reset"}): messages may be missing here —`);
    } else if (first && hadMessages) {
      line(`— resumed, ${missed} —`);
    } else if (!first) {
      line(`— reconnected, ${missed} —`);
    }
    first = false;
    keep();
    text.disabled = false;
    send.disabled = false;
  });
  mine.addEventListener("msg", ({ detail }) => {
    const message = {
      id: detail.id, from: detail.from, ts: detail.ts, kind: detail.kind, target: detail.target, body: detail.body,
    };
    shown.messages.push(message);
    shown.messages.splice(0, shown.messages.length - KEPT_MESSAGES);
    keep();
    stopTyping(detail.from);
    show(message);
  });
  mine.addEventListener("typing", ({ detail }) => detail.user !== me && startTyping(detail.user));
  mine.addEventListener("refused", ({ detail }) => line(`${detail.code}: ${detail.message}`, "error"));
  mine.addEventListener("token_expiring", ({ detail }) => {
    line(`This token ends at ${clock(detail.exp * 1000)}. Paste a new one and join again.`);
  });
  mine.connect();
}

// Cursor and messages are stored together or not at all: a reload must never ask for what it shows, or skip what it
// does not. In a burst that is done every SAVE_MS, and when the page goes.
const SAVE_MS = 50;
const storeOf = (roomName) => `natter:room:${roomName}`;
let saving = 0; // timer
function keep() {
  shown.cursor = client.cursor;
  saving ||= setTimeout(saveNow, SAVE_MS);
}
function saveNow() {
  if (!saving) return;
  clearTimeout(saving);
  saving = 0;
  memory.set(storeOf(shown.room), shown);
}
addEventListener("pagehide", saveNow);

// State of the connection -----------------------------------------------------------------------------------------------

let countdown = 0;
function showState({ state: name, why, retryMs }) {
  clearInterval(countdown);
  state.dataset.state = name;
  state.title = why ?? "";
  if (name === "reconnecting") {
    const due = performance.now() + retryMs;
    const tick = () => {
      const left = Math.max(0, Math.ceil((due - performance.now()) / 1000));
      state.textContent = `reconnecting in ${left} s`;
    };
    tick();
    countdown = setInterval(tick, 500);
  } else {
    state.textContent = name === "closed" ? `closed: ${why}` : name;
  }
  if (name === "closed") {
    text.disabled = true;
    send.disabled = true;
  }
}
addEventListener("online", () => client?.hurry());

// Messages --------------------------------------------------------------------------------------------------------------

/** A message is identified by its sender and id: nobody can take another's place. */
const keyOf = (from, id) => `${from}/${id}`;
const refOf = (from, ref) => (ref.includes("/") ? ref : keyOf(from, ref));
const bodyText = (body) => (typeof body?.text === "string" ? body.text : JSON.stringify(body ?? null));

/** Puts a stored message into the log; a pending one of ours with the same id becomes it. */
function show(message) {
  const { id, from, ts, kind, target, body } = message;
  if (target != null && kind != null && kind !== "message") {
    const item = items.get(refOf(from, target));
    if (!item) return; // older than what is shown
    const note = item.querySelector(".note");
    if (kind === "edit") {
      item.querySelector(".body").textContent = bodyText(body);
      note.textContent = "edited";
    } else if (kind === "delete") {
      item.querySelector(".body").textContent = "";
      note.textContent = "deleted";
    } else if (kind === "reaction") {
      note.textContent = `${note.textContent} ${bodyText(body)}`.trim();
    }
    return;
  }
  const key = keyOf(from, id);
  const pending = items.get(key);
  const item = pending ?? newItem(from, id, bodyText(body));
  item.classList.remove("pending", "failed");
  item.querySelector(".body").textContent = bodyText(body);
  item.querySelector(".note").textContent = "";
  item.querySelector("time").textContent = clock(ts);
  item.querySelector("time").dateTime = new Date(ts).toISOString();
  // A pending message moves to its place in the room's order, which is the end.
  add(item);
  items.set(key, item);
}

function newItem(from, id, content) {
  const item = element("li", "message");
  item.dataset.id = id;
  item.dataset.from = from;
  if (from === shown.user) item.classList.add("own");
  const meta = element("div", "meta");
  meta.append(element("span", "from", from), element("time", ""), element("span", "note"));
  item.append(meta, element("div", "body", content));
  return item;
}

function line(content, kind) {
  const item = element("li", "line", content);
  if (kind) item.classList.add(kind);
  add(item);
}

function element(name, className, content = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.textContent = content;
  return made;
}

function add(item) {
  log.append(item);
  while (log.childElementCount > KEPT_MESSAGES * 2) {
    const oldest = log.firstElementChild;
    items.delete(keyOf(oldest.dataset.from, oldest.dataset.id));
    oldest.remove();
  }
  if (bottom) log.scrollTop = log.scrollHeight;
}
log.addEventListener("scroll", () => {
  bottom = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
});

const clockFormat = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const clock = (ms) => clockFormat.format(new Date(ms));

// Sending ---------------------------------------------------------------------------------------------------------------

$("say").addEventListener("submit", async (event) => {
  event.preventDefault();
  const content = text.value;
  if (!content.trim() || !client) return;
  text.value = "";
  lastTyping = 0;
  const id = newId();
  const key = keyOf(shown.user, id);
  const item = newItem(shown.user, id, content);
  item.classList.add("pending");
  item.querySelector(".note").textContent = "sending…";
  items.set(key, item);
  bottom = true;
  add(item);
  const mine = client;
  try {
    const ack = await mine.publish(id, { text: content });
    // In a durable room the pushed message settles it; ephemeral rooms, too, but a lost push must not leave it grey.
    if (item.classList.contains("pending")) {
      item.classList.remove("pending");
      item.querySelector(".note").textContent = "";
      item.querySelector("time").textContent = clock(ack.ts);
    }
  } catch (error) {
    if (mine !== client && error.code === "closed") return;
    item.classList.replace("pending", "failed");
    item.querySelector(".note").textContent = `not sent: ${error.code}`;
    line(`${error.code}: ${error.message}`, "error");
  }
});

// Typing ----------------------------------------------------------------------------------------------------------------

let lastTyping = 0;
text.addEventListener("input", () => {
  const now = performance.now();
  if (!text.value || (lastTyping && now - lastTyping < TYPING_EVERY_MS)) return;
  lastTyping = now;
  client?.typing();
});

const typists = new Map(); // user -> timer
function startTyping(name) {
  clearTimeout(typists.get(name));
  typists.set(name, setTimeout(() => stopTyping(name), TYPING_SHOWN_MS));
  showTyping();
}
function stopTyping(name) {
  clearTimeout(typists.get(name));
  if (typists.delete(name)) showTyping();
}
function showTyping() {
  const names = [...typists.keys()];
  if (names.length === 0) typing.textContent = "";
  else if (names.length === 1) typing.textContent = `${names[0]} is typing…`;
  else if (names.length === 2) typing.textContent = `${names[0]} and ${names[1]} are typing…`;
  else typing.textContent = `${names.length} people are typing…`;
}

// Entry -----------------------------------------------------------------------------------------------------------------

token.addEventListener("input", () => {
  user.value = userOf(token.value.trim());
});
$("entry").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});

/** Token and room: from the address (`#token=…&room=…`, which no server sees), else as they were before a reload. */
function enter() {
  const given = new URLSearchParams(location.hash.slice(1));
  const kept = memory.get("natter:entry") ?? {};
  token.value = given.get("token") ?? kept.token ?? "";
  room.value = given.get("room") ?? kept.room ?? room.value;
  user.value = userOf(token.value);
  // The token must not stay in the address bar, the history, or a screenshot.
  if (given.has("token")) history.replaceState(null, "", location.pathname);
  if (token.value && room.checkValidity()) start();
  else token.focus();
}
addEventListener("hashchange", enter);
enter();
