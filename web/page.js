// natter's chat page, on top of the client in natter.js. Nothing from the network is ever put into it as HTML.

import { Log, clock, element, isMessage } from "./log.js";
import { Natter, newId, reaches, userOf } from "./natter.js";
import { Past } from "./past.js";

const TYPING_EVERY_MS = 2_000;
const TYPING_SHOWN_MS = 3_000;
const KEPT_MESSAGES = 200; // shown again after a reload
const KEPT_ROOMS = 30;
const UNREAD_EVERY_MS = 5_000;
const SETTLED_MS = 1_000; // an edge stores a read marker within that
const NEWS_MS = 1_000;
const NAMED = 20; // most names in one line

const $ = (id) => document.getElementById(id);
const NATTER = "$natter"; // what natter itself says

const state = $("state"), list = $("log"), text = $("text"), send = $("send");
const room = $("room"), token = $("token"), user = $("user"), typing = $("typing"), where = $("where");
const here = $("here"), nav = $("rooms");

let client = null;
let shown = null; // {room, user, cursor, messages: […]}: what this tab shows, kept over a reload
let behind = 0; // messages that came while nobody was looking

const log = new Log(list, () => showReaders());
const past = new Past(list, log, { find: $("find"), query: $("query"), hits: $("hits"), now: $("now") }, () => {
  for (const message of shown.messages) log.hear(message);
});

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
  log.clear(me);
  behind = 0;
  for (const name of [...typists.keys()]) stopTyping(name);
  enterRoom();

  let first = true; // the first join of this page load
  const hadMessages = shown.messages.length > 0;
  const url = new URL("ws", document.baseURI);
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  url.hash = "";
  const mine = new Natter({ url: url.href, token: token.value.trim(), room: roomName, cursor: shown.cursor });
  const switched = client != null;
  client = mine;
  past.enter(mine, roomName, token.value.trim());
  for (const message of shown.messages) log.hear(message);
  showPeople();
  mine.addEventListener("state", ({ detail }) => showState(detail));
  mine.addEventListener("joined", ({ detail }) => {
    const missed = `${detail.replay ?? 0} missed`;
    if (detail.reset) {
      // What was here may be in another log than what follows, or erased. What is still true comes with the history.
      shown.messages = [];
      log.clear();
      log.line(`— can't resume (${detail.reason ?? "reset"}): messages may be missing here —`);
    } else if (first && hadMessages) {
      log.line(`— resumed, ${missed} —`);
    } else if (!first) {
      log.line(`— reconnected, ${missed} —`);
    }
    past.joined(detail.cursor != null);
    rememberRoom(detail.cursor != null);
    // The room that was left a moment ago may have been read a moment ago.
    askUnread(first && switched ? SETTLED_MS : 0);
    first = false;
    keep();
    text.disabled = false;
    send.disabled = false;
    markRead();
  });
  mine.addEventListener("msg", ({ detail }) => {
    if (detail.kind === "erase") {
      if (detail.from === NATTER) erase(detail);
      return;
    }
    const message = {
      id: detail.id, from: detail.from, ts: detail.ts, kind: detail.kind, target: detail.target, body: detail.body,
      cursor: detail.cursor,
    };
    shown.messages.push(message);
    shown.messages.splice(0, shown.messages.length - KEPT_MESSAGES);
    keep();
    stopTyping(detail.from);
    // What is new is not shown below what is far back.
    if (!past.away || !isMessage(message)) log.hear(message);
    if (isMessage(message) && message.from !== me) behind += 1;
    markRead();
  });
  mine.addEventListener("people", ({ detail }) => {
    showPeople();
    if (detail.counted && here.open && mine.people.size > 0) mine.look();
    if (detail.user != null && detail.user !== me) {
      tell(`${nameOf(detail.user, detail.info)} ${detail.state === "leave" ? "left" : "came"}`);
    }
  });
  mine.addEventListener("readers", showReaders);
  mine.addEventListener("typing", ({ detail }) => detail.user !== me && startTyping(detail.user));
  mine.addEventListener("refused", ({ detail }) => log.line(`${detail.code}: ${detail.message}`, "error"));
  mine.addEventListener("token_expiring", ({ detail }) => {
    log.line(`This token ends at ${clock(detail.exp * 1000)}. Paste a new one and join again.`);
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
addEventListener("pagehide", () => {
  saveNow();
  // A browser may keep a page that was left for the way back, with its connection: its user would be shown as here.
  client?.stop();
});
addEventListener("pageshow", ({ persisted }) => {
  if (!persisted || !shown) return;
  room.value = shown.room;
  start();
});

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
  here.classList.toggle("stale", name !== "connected");
  if (name === "closed") {
    text.disabled = true;
    send.disabled = true;
  }
}
addEventListener("online", () => client?.hurry());
// The timers of a tab that nobody looks at are late, and a laptop that slept has none.
document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && client?.hurry());

// Messages --------------------------------------------------------------------------------------------------------------

/** Messages were erased: of one user, or all there were; up to a time, if that is told. */
function erase({ cursor, body }) {
  const { user: whose, before } = body ?? {};
  const isGone = ({ from, ts }) => (whose == null || from === whose) && (before == null || ts <= before);
  shown.messages = shown.messages.filter((message) => !isGone(message));
  shown.cursor = cursor;
  keep();
  log.erase({ user: whose, before });
  past.erased();
  log.line(whose == null ? "— what was said here was erased —" : `— messages of ${whose} were erased —`);
  markRead();
}

list.addEventListener("scroll", () => markRead());

// Sending ---------------------------------------------------------------------------------------------------------------

$("say").addEventListener("submit", async (event) => {
  event.preventDefault();
  const content = text.value;
  if (!content.trim() || !client) return;
  text.value = "";
  lastTyping = 0;
  const id = newId();
  if (past.away) past.goToNow();
  const item = log.send(id, { text: content });
  const mine = client;
  try {
    const ack = await mine.publish(id, { text: content });
    // In a durable room the pushed message settles it; ephemeral rooms, too, but a lost push must not leave it grey.
    log.settle(item, { ts: ack.ts });
  } catch (error) {
    if (mine !== client && error.code === "closed") return;
    log.settle(item, { note: `not sent: ${error.code}` });
    log.line(`${error.code}: ${error.message}`, "error");
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

// Who is here -----------------------------------------------------------------------------------------------------------

const nameOf = (name, info) => (typeof info?.name === "string" && info.name ? info.name : name);
const knownAs = (name) => (name === shown.user ? "you" : nameOf(name, client.people.get(name)));
const listOf = (names) =>
  names.length > NAMED ? `${names.slice(0, NAMED).join(", ")} and ${names.length - NAMED} more` : names.join(", ");

/** Does it soon, and once for all that ask until then. */
function soon(act, after = 100) {
  let timer = 0;
  return () => {
    timer ||= setTimeout(() => {
      timer = 0;
      act();
    }, after);
  };
}

const showPeople = soon(() => {
  const { here: count, people, named } = client;
  here.hidden = count == null;
  const names = [...people].map(([name, info]) => [nameOf(name, info), name]);
  names.sort((a, b) => a[0].localeCompare(b[0]) || a[1].localeCompare(b[1]));
  $("count").textContent = `${count} here`;
  $("names").textContent = named ? listOf(names.map(([, name]) => knownAs(name))) : "";
  $("people").replaceChildren(...names.map(([shownAs, name]) => {
    const item = element("li");
    item.append(element("span", "name", shownAs));
    if (shownAs !== name) item.append(" ", element("span", "quiet", name));
    if (name === shown.user) item.append(" ", element("span", "quiet", "(you)"));
    return item;
  }));
  if (count > names.length) {
    const rest = names.length > 0 ? `and ${count - names.length} more` : "Here people are only counted.";
    $("people").append(element("li", "quiet", rest));
  }
  showReaders(); // they have names now
});

here.addEventListener("toggle", () => {
  if (here.open) client.look(0);
});

/** What happened beside the messages, for those who listen to the page. */
let news = [];
function tell(what) {
  news.push(what);
  tellNews();
}
const tellNews = soon(() => {
  $("news").textContent = listOf(news);
  news = [];
}, NEWS_MS);

// Read marks ------------------------------------------------------------------------------------------------------------

/** A room is read when its end can be seen. */
function markRead() {
  if (!client) return;
  if (client.joined && log.bottom && !past.away && document.visibilityState === "visible") {
    behind = 0;
    client.read(client.cursor);
  }
  showTitle();
}
document.addEventListener("visibilitychange", markRead);

/** "read by" stands where somebody's marker stands, and counts all who have come that far: the sender is no reader. */
const showReaders = soon(() => {
  const messages = [...list.querySelectorAll(".message[data-cursor]")];
  const ends = messages.map(() => []); // who has read up to there, and not beyond
  for (const [name, marker] of client.readers) {
    let read = 0;
    // Along the log cursors only grow.
    for (let rest = messages.length; read < rest; ) {
      const middle = (read + rest) >> 1;
      if (reaches(marker, messages[middle].dataset.cursor)) read = middle + 1;
      else rest = middle;
    }
    ends[read - 1]?.push(name);
  }
  const readers = [];
  for (let i = messages.length - 1; i >= 0; i -= 1) {
    readers.push(...ends[i]);
    const { from } = messages[i].dataset;
    showReadBy(messages[i], ends[i].length > 0 ? readers.filter((name) => name !== from) : []);
  }
});

function showReadBy(item, readers) {
  const mark = item.querySelector(".read");
  mark.hidden = readers.length === 0;
  mark.title = listOf(readers.map(knownAs).sort());
  const content = `read by ${mark.ariaExpanded === "true" ? mark.title : readers.length}`;
  if (mark.textContent !== content) mark.textContent = content;
}
// The names, for those who have no mouse to point with.
list.addEventListener("click", ({ target }) => {
  if (!target.matches(".read")) return;
  target.ariaExpanded = target.ariaExpanded === "true" ? "false" : "true";
  showReaders();
});

// Rooms of this tab -----------------------------------------------------------------------------------------------------

let tab = null; // {user, rooms: [{room, durable}]}: those joined, in the order in which they came; kept over a reload
let unread = new Map(); // room -> {count, capped?}
const badgeOf = ({ count, capped }) => `${count}${capped ? "+" : ""}`;

function enterRoom() {
  tab ??= memory.get("natter:tab");
  if (tab?.user !== shown.user) {
    tab = { user: shown.user, rooms: [] };
    unread.clear();
  }
  unread.delete(shown.room);
  showRooms();
}

function rememberRoom(durable) {
  const { rooms } = tab;
  const known = rooms.find((one) => one.room === shown.room);
  if (known) known.durable = durable;
  else rooms.push({ room: shown.room, durable });
  rooms.splice(0, rooms.length - KEPT_ROOMS);
  memory.set("natter:tab", tab);
  showRooms();
  nav.querySelector("[aria-current]").scrollIntoView({ block: "nearest", inline: "nearest" });
}

function showRooms() {
  nav.hidden = tab.rooms.length < 2;
  const buttons = new Map([...nav.children].map((button) => [button.dataset.room, button]));
  for (const { room: name } of tab.rooms) {
    const button = buttons.get(name) ?? newRoomButton(name);
    buttons.delete(name);
    if (!button.parentNode) nav.append(button); // one that is there and moved would lose the focus
    button.ariaCurrent = name === shown.room ? "true" : null;
    const waiting = unread.get(name) ?? { count: 0 };
    const badge = button.querySelector(".badge");
    badge.hidden = waiting.count === 0;
    badge.firstElementChild.textContent = badgeOf(waiting);
  }
  for (const button of buttons.values()) button.remove();
  showTitle();
}

function newRoomButton(name) {
  const button = element("button");
  button.type = "button";
  button.dataset.room = name;
  const badge = element("span", "badge");
  badge.append(element("span"), element("span", "hidden", " unread"));
  button.append(element("span", "name", name), " ", badge);
  button.addEventListener("click", () => {
    room.value = name;
    start();
  });
  return button;
}

function showTitle() {
  const counts = [{ count: behind }, ...unread.values()];
  const total = { count: counts.reduce((sum, { count }) => sum + count, 0), capped: counts.some(({ capped }) => capped) };
  document.title = `${total.count > 0 ? `(${badgeOf(total)}) ` : ""}${shown.room} · natter`;
}

// This tab is in one room at a time. What is new in the others it asks for.
let asking = 0; // timer
function askUnread(after) {
  clearTimeout(asking);
  asking = setTimeout(async () => {
    const mine = client;
    const others = tab.rooms.filter((one) => one.durable && one.room !== shown.room).map((one) => one.room);
    if (!mine.joined) return; // the next join begins anew
    try {
      const counts = others.length === 0 ? [] : (await mine.call("unread", { rooms: others })).rooms;
      if (mine !== client) return;
      for (const { room: name, count } of counts) {
        if (count > 0 && !unread.get(name)?.count) tell(`${count} unread in ${name}`);
      }
      unread = new Map(counts.map((one) => [one.room, one]));
    } catch (error) {
      if (mine !== client) return;
      if (!error.retry) {
        unread.clear(); // not to be had here
        showRooms();
        return;
      }
    }
    showRooms();
    askUnread(UNREAD_EVERY_MS);
  }, after);
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
