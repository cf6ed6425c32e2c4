// natter's chat page, on top of the client in natter.js. Nothing from the network is ever put into it as HTML.

import { Chosen, fileOf } from "./files.js";
import { Log, isMessage } from "./log.js";
import { Natter, newId, reaches, userOf } from "./natter.js";
import { Notices } from "./notify.js";
import { Panel, makeDialog } from "./panel.js";
import { Past } from "./past.js";
import { Rooms } from "./rooms.js";
import { NATTER, clock, element, sentence, whyOut } from "./words.js";

const TYPING_EVERY_MS = 2_000;
const TYPING_SHOWN_MS = 3_000;
const KEPT_MESSAGES = 200; // shown again after a reload
const SETTLED_MS = 1_000; // an edge stores a read marker within that
const NEWS_MS = 1_000;
const NAMED = 20; // most names in one line

const $ = (id) => document.getElementById(id);

const state = $("state"), list = $("log"), text = $("text"), send = $("send");
const room = $("room"), token = $("token"), user = $("user"), typing = $("typing"), where = $("where");
const here = $("here"), app = $("app"), attach = $("attach");

let client = null;
let entered = ""; // the token that is used, whatever is typed into its field meanwhile
let shown = null; // {room, user, cursor, messages: […]}: what this tab shows, kept over a reload

const log = new Log(list, () => showReaders());
const past = new Past(list, log, { find: $("find"), query: $("query"), hits: $("hits"), now: $("now") }, () => {
  for (const message of shown.messages) log.hear(message);
  showUnsent();
});

const ROOM = "natter:room:";
const storeOf = (roomName) => ROOM + roomName;

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
    const content = JSON.stringify(value);
    for (;;) {
      try {
        sessionStorage.setItem(key, content);
        return;
      } catch {
        // Full: the messages of other rooms go first. History has them, and without the cursor a room starts from now.
        if (!this.spare(key)) break;
      }
    }
    try {
      // Of a room nothing old may stay. Anything else stays as it was: without the entry a reload would be asked for a token.
      if (key.startsWith(ROOM)) sessionStorage.removeItem(key);
    } catch {
      // Switched off.
    }
  },
  /** Drops what is kept of one room, the one that is shown last; false if there is none, except for `key`. */
  spare(key) {
    try {
      const names = Object.keys(sessionStorage).filter((name) => name.startsWith(ROOM) && name !== key);
      const name = names.find((one) => one !== storeOf(shown?.room)) ?? names[0];
      if (name == null) return false;
      sessionStorage.removeItem(name);
      return true;
    } catch {
      return false;
    }
  },
};

const rooms = new Rooms(
  { list: $("rooms"), more: $("more"), aside: $("aside"), problem: $("side-problem") },
  { memory, open: openRoom, tell, changed: showRoom },
);
const panel = new Panel(() => ({ token: entered, user: shown.user, room: shown.room }));
const notices = new Notices($("notify"), { open: openRoom, tell });
const chosen = new Chosen($("chosen"), () => showWriting());
log.showFile = (attachment) => fileOf(attachment, { token: entered, room: shown.room }, () => log.settled());
log.showThread = (message) => past.showThread(message);
log.answer = (message) => answer(message);

function openRoom(name) {
  room.value = name;
  // Another user's token that stands in the form is used by "Join" alone. A new one of the same user is welcome.
  if (userOf(token.value.trim()) !== userOf(entered)) token.value = entered;
  start();
}

function start() {
  client?.stop();
  saveNow();
  keepDraft();
  const roomName = room.value.trim();
  entered = token.value.trim();
  const me = userOf(entered);
  const kept = memory.get(storeOf(roomName));
  // Another user's view is not ours to show.
  shown = kept && kept.user === me ? kept : { room: roomName, user: me, cursor: null, messages: [] };
  memory.set("natter:entry", { token: entered, room: roomName });
  user.value = me;
  log.clear(me);
  rooms.behind = 0;
  for (const name of [...typists.keys()]) stopTyping(name);
  compose(drafts.get(draftOf(shown)));
  panel.close();
  entering = true;
  asked = "";
  app.hidden = false;
  app.dataset.view = roomName ? "room" : "rooms";
  app.dataset.room = roomName;
  $("me").textContent = me && ` · ${me}`;

  let first = true; // the first join of this page load
  const hadMessages = shown.messages.length > 0;
  const url = new URL("ws", document.baseURI);
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  url.hash = "";
  const mine = new Natter({ url: url.href, token: entered, room: roomName, cursor: shown.cursor });
  const switched = client != null;
  client = mine;
  rooms.enter(mine, me, entered, roomName);
  past.enter(mine, roomName, entered);
  // Without an answer there is no button.
  notices.enter(entered).catch(() => {});
  for (const message of shown.messages) log.hear(message);
  sendAgain();
  showPeople();
  mine.addEventListener("state", ({ detail }) => showState(detail));
  mine.addEventListener("joined", ({ detail }) => {
    const missed = `${detail.replay ?? 0} missed`;
    if (detail.reset) {
      // What was here may be in another log than what follows, or erased. What is still true comes with the history.
      shown.messages = [];
      log.clear();
      log.line(`— can't resume (${detail.reason ?? "reset"}): messages may be missing here —`);
      showUnsent();
    } else if (first && hadMessages) {
      log.line(`— resumed, ${missed} —`);
    } else if (!first) {
      log.line(`— reconnected, ${missed} —`);
    }
    past.joined(detail.cursor != null, detail.reset);
    rooms.joined(detail.cursor != null);
    // The room that was left a moment ago may have been read a moment ago.
    rooms.ask(first && switched ? SETTLED_MS : 0);
    first = false;
    keep();
    showWriting();
    markRead();
  });
  mine.addEventListener("msg", ({ detail }) => {
    if (detail.kind === "erase") {
      if (detail.from === NATTER) erase(detail);
      return;
    }
    const message = {
      id: detail.id, from: detail.from, ts: detail.ts, kind: detail.kind, target: detail.target, body: detail.body,
      cursor: detail.cursor, reply_to: detail.reply_to,
    };
    shown.messages.push(message);
    shown.messages.splice(0, shown.messages.length - KEPT_MESSAGES);
    keep();
    stopTyping(detail.from);
    if (detail.from === me) forget(detail.id); // it has arrived, though the answer may be lost
    // What is new is not shown below what is far back.
    if (!past.away || !isMessage(message) && message.kind !== "system") log.hear(message);
    if (isMessage(message) && message.from !== me) rooms.behind += 1;
    if (message.kind === "system" && message.from === NATTER) panel.changed();
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
  mine.addEventListener("refused", ({ detail }) => {
    log.line(sentence(detail, roomName), "error");
    if (!detail.retry) leave();
  });
  mine.addEventListener("kicked", ({ detail }) => {
    if (detail.code === "closed") {
      // What was said there is erased.
      shown.messages = [];
      log.clear();
    }
    log.line(whyOut(detail.code), "error");
    keep();
    leave();
  });
  const leave = () => {
    panel.close();
    past.left();
    rooms.forget(roomName);
  };
  mine.addEventListener("token_expiring", ({ detail }) => {
    log.line(`This token ends at ${clock(detail.exp * 1000)}. Paste a new one and join again.`);
  });
  mine.connect();
}

// Cursor and messages are stored together or not at all: a reload must never ask for what it shows, or skip what it
// does not. In a burst that is done every SAVE_MS, and when the page goes.
const SAVE_MS = 50;
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
  openRoom(shown.room);
});

// State of the connection -----------------------------------------------------------------------------------------------

let countdown = 0;
let entering = false; // whether it was not connected yet
let asked = ""; // what the status line says besides, until a room is entered
const sayState = (content) => { state.textContent = [content, asked].filter(Boolean).join(" · "); };
function showState({ state: name, why, retryMs }) {
  clearInterval(countdown);
  state.dataset.state = name;
  state.title = why ?? "";
  if (name === "reconnecting") {
    const due = performance.now() + retryMs;
    const tick = () => {
      const left = Math.max(0, Math.ceil((due - performance.now()) / 1000));
      sayState(`reconnecting in ${left} s`);
    };
    tick();
    countdown = setInterval(tick, 500);
  } else {
    sayState(name === "closed" ? `closed: ${why}` : name === "out" ? "connected, but not in this room" : name);
  }
  here.classList.toggle("stale", name !== "connected");
  // Once, or it would close on those who type there while the connection comes back.
  if (name === "connected" && entering && !asked) $("door").open = entering = false;
  if (name === "closed") $("door").open = true;
  showWriting();
}

/** Whether one can write. While the connection is lost, too: it is sent when it is back, or the room is entered again. */
function showWriting() {
  const isOver = ["out", "closed", "idle"].includes(state.dataset.state);
  const can = Boolean(shown?.room) && !isOver && (client.joined || !text.disabled);
  text.disabled = !can;
  attach.disabled = !can;
  send.disabled = !can || chosen.isBusy;
  send.title = chosen.isBusy ? "Files are still being uploaded" : "";
  text.placeholder = isOver && shown?.room ? "You can't write here" : "Message";
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

let answering = null; // the message that is answered: {from, id, text}
function answer(message, focus = true) {
  answering = message;
  const bar = $("answering");
  bar.hidden = message == null;
  bar.firstElementChild.textContent = message ? `Answer to ${message.from}: ${message.text}` : "";
  if (message && focus) text.focus();
}
$("answering").lastElementChild.addEventListener("click", () => {
  answer(null);
  text.focus();
});

// What is being written, of each room that was shown: `${room} ${user}` -> {content, attachments, answering}.
const drafts = new Map();
const draftOf = ({ room: name, user: whose }) => `${name} ${whose}`;
const isBlank = () => !text.value && !answering && chosen.isEmpty;
function keepDraft() {
  if (!shown) return;
  if (isBlank()) drafts.delete(draftOf(shown));
  else drafts.set(draftOf(shown), { content: text.value, attachments: chosen.attachments, answering });
}
function compose({ content = "", attachments = [], answering: to = null } = {}) {
  text.value = content;
  answer(to, false);
  chosen.clear();
  chosen.take(attachments);
}

// Messages that no edge has acknowledged yet, of all rooms of this tab: {user, room, id, body, answering}. They outlive a
// change of the room and a reload, and are sent again when their room is entered again. An edge knows a repeat by its id.
const UNSENT = "natter:unsent";
let unsent = memory.get(UNSENT) ?? [];
const unsentHere = () => unsent.filter((one) => one.user === shown.user && one.room === shown.room);
const refTo = (message) => (message ? `${message.from}/${message.id}` : undefined);

function forget(id) {
  const rest = unsent.filter((one) => one.id !== id);
  if (rest.length === unsent.length) return;
  unsent = rest;
  memory.set(UNSENT, unsent);
}

/** Shows those of this room that the log does not show. */
function showUnsent() {
  for (const { id, body, answering: to } of unsentHere()) {
    if (!log.find(shown.user, id)) log.note(log.send(id, body, refTo(to)), "not sent yet");
  }
}

/** A room was entered: what was not acknowledged there goes out with the join. */
function sendAgain() {
  // What came back as a message has arrived.
  for (const { id } of unsentHere()) if (log.find(shown.user, id)) forget(id);
  showUnsent();
  for (const one of unsentHere()) deliver(one);
  const others = unsent.filter((one) => one.user === shown.user && one.room !== shown.room).map((one) => one.room);
  if (others.length > 0) log.line(`— not sent yet in ${[...new Set(others)].join(", ")}: it is sent when you open that room —`);
}

/** Sends a message that the log shows as one that is on its way. */
async function deliver({ id, body, answering: to }) {
  const mine = client;
  // The log may have been drawn anew meanwhile.
  const settle = (how) => {
    const item = log.find(mine.user, id);
    if (item) log.settle(item, how);
  };
  const note = (content) => {
    const item = log.find(mine.user, id);
    if (item) log.note(item, content);
  };
  try {
    const ack = await mine.publish(id, { body, reply_to: refTo(to) }, (error) => note(`${sentence(error, shown.room)} It is sent then.`));
    forget(id);
    // In a durable room the pushed message settles it; ephemeral rooms, too, but a lost push must not leave it grey.
    settle({ ts: ack.ts });
  } catch (error) {
    if (mine !== client) return; // it is still kept, for when the room is entered again
    if (error.code === "closed") {
      note("not sent yet: it is sent when you join again");
      return;
    }
    forget(id);
    settle({ note: "not sent" });
    log.line(`Not sent. ${sentence(error, shown.room)}`, "error");
    // What can be said later, or otherwise, is not lost. But what is being written now comes first.
    if (isBlank()) compose({ content: body.text, attachments: body.attachments, answering: to });
  }
}

$("say").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = text.value;
  const { attachments } = chosen;
  if (!client || chosen.isBusy || (!content.trim() && attachments.length === 0)) return;
  const body = { text: content, ...(attachments.length > 0 && { attachments }) };
  const one = { user: shown.user, room: shown.room, id: newId(), body, answering };
  compose();
  lastTyping = 0;
  if (past.away) past.goToNow();
  log.send(one.id, body, refTo(one.answering));
  unsent.push(one);
  memory.set(UNSENT, unsent);
  deliver(one);
});

// Files -----------------------------------------------------------------------------------------------------------------

function choose(files) {
  if (!attach.disabled && files.length > 0) chosen.add(entered, shown.room, files);
}
attach.addEventListener("click", () => $("files").click());
$("files").addEventListener("change", ({ target }) => {
  choose([...target.files]);
  target.value = ""; // the same file can be chosen again
});
text.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length === 0) return;
  event.preventDefault();
  choose([...event.clipboardData.files]);
});
const talk = $("talk");
const holdsFiles = ({ dataTransfer }) => dataTransfer?.types.includes("Files");
for (const name of ["dragover", "dragleave", "drop"]) {
  addEventListener(name, (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault(); // or a file that misses the place is opened in place of the page
    const isHere = talk.contains(event.target) && !attach.disabled;
    talk.classList.toggle("drop", name === "dragover" && isHere);
    if (name === "drop" && isHere) choose([...event.dataTransfer.files]);
  });
}

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

/** A room is read when its end can be seen. On a phone the list may be in front of it. */
function markRead() {
  if (!client) return;
  if (client.joined && list.offsetParent && log.bottom && !past.away && document.visibilityState === "visible") {
    rooms.behind = 0;
    client.read(client.cursor);
  }
  rooms.drawCurrent();
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

// The room that is shown --------------------------------------------------------------------------------------------------

$("back").addEventListener("click", () => {
  app.dataset.view = "rooms";
  ($("rooms").querySelector("[aria-current]") ?? $("new")).focus();
});
$("about").addEventListener("click", () => panel.open());
const make = makeDialog(
  () => ({ token: entered, user: shown.user, namespace: (shown.room || rooms.namespaces[0] || "chat:").split(":")[0] }),
  openRoom,
);
$("new").addEventListener("click", make);

const OWN = [["pinned", "Pin", "Unpin"], ["muted", "Mute", "Unmute"], ["archived", "Archive", "Take back"]];
for (const [name] of OWN) {
  $(name).addEventListener("click", async () => {
    const { room: current } = shown;
    try {
      await rooms.arrange(current, { [name]: !rooms.summary(current)?.[name] });
    } catch (error) {
      if (current === shown.room) log.line(sentence(error, current), "error");
    }
  });
}

/** Its title, what is unread, and what one has made of it for oneself. */
function showRoom() {
  if (!shown) return;
  const { room: current } = shown;
  where.textContent = rooms.title;
  where.title = current;
  const summary = rooms.summary(current);
  for (const [name, on, off] of OWN) {
    $(name).hidden = !summary;
    $(name).textContent = summary?.[name] ? off : on;
  }
  $("about").hidden = !current || state.dataset.state === "out";
  const { waiting } = rooms;
  const badge = $("back").querySelector(".badge");
  badge.hidden = !waiting;
  badge.firstElementChild.textContent = waiting;
  document.title = `${waiting && `(${waiting}) `}${current && `${rooms.title} · `}natter`;
}

// Entry -----------------------------------------------------------------------------------------------------------------

token.addEventListener("input", () => {
  user.value = userOf(token.value.trim());
});
$("entry").addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});

/**
 * Token and room: from the address (`#token=…&room=…`, which no server sees), else as they were before a reload. Any page
 * can have made such a link: it must not put somebody who is here as one user into a room as another one.
 */
function enter() {
  const given = new URLSearchParams(location.hash.slice(1));
  const kept = memory.get("natter:entry") ?? {};
  const me = userOf(entered || kept.token);
  token.value = given.get("token") ?? kept.token ?? "";
  room.value = given.get("room") ?? kept.room ?? room.value;
  user.value = userOf(token.value.trim());
  // The token must not stay in the address bar, the history, or a screenshot; the room would win over a later one.
  if (given.has("token") || given.has("room")) history.replaceState(null, "", location.pathname);
  if (given.has("token") && me && user.value !== me) {
    asked = `This link is for ${user.value || "another user"}, and this tab is ${me}'s: “Join” changes the user`;
    if (client) sayState(state.dataset.state);
    else sayState("not connected");
    $("door").open = true;
    return;
  }
  if (token.value && room.checkValidity()) start();
  else token.focus();
}
addEventListener("hashchange", enter);
enter();
