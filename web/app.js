// A chat client on the SDK: who is here as whom, the connection, and which room is open. Nothing from the network is ever put
// into the page as HTML.

import { Natter, claimsOf } from "./sdk/natter.js";
import { unread } from "./sdk/store.js";
import { Composer } from "./composer.js";
import { Create } from "./create.js";
import { Inbox } from "./inbox.js";
import { Timeline } from "./timeline.js";
import { set, t, translate } from "./words-app.js";

const ENTRY = "natter:app"; // in sessionStorage: the token and the room

const $ = (id) => document.getElementById(id);

translate(document);

/** The storage of the tab, which may be switched off: the page works without it, only without memory. */
function storage() {
  try {
    return window.sessionStorage;
  } catch {
    return undefined;
  }
}

const kept = {
  get() {
    try {
      return JSON.parse(storage()?.getItem(ENTRY)) ?? {};
    } catch {
      return {};
    }
  },
  set(entry) {
    try {
      storage()?.setItem(ENTRY, JSON.stringify(entry));
    } catch {
      // Full: a reload asks for the token.
    }
  },
};

let client = null;
let token = "";
let inbox = null;
let timeline = null;
let composer = null;
let create = null;
let offs = [];

function enter(given, room) {
  stop();
  token = given;
  client = new Natter({ url: new URL(".", document.baseURI).href, token, storage: storage() });
  set($("me"), claimsOf(token).sub ?? "");
  inbox = new Inbox(client, open);
  timeline = new Timeline(client, (mode, view) => composer.write(mode, view));
  composer = new Composer((body, about) => timeline.send(body, about), () => timeline.room?.typing());
  create = new Create(client, token, open);
  offs = [client.on("state", showState), unread(client).subscribe(showTitle)];
  $("door").hidden = true;
  $("app").hidden = $("leave").hidden = false;
  set($("door-problem"), "");
  client.connect();
  showState(client.state);
  open(room);
}

function stop() {
  for (const off of offs) off();
  offs = [];
  inbox?.stop();
  timeline?.stop();
  composer?.stop();
  create?.stop();
  client?.close();
  client = inbox = timeline = composer = create = null;
}

/** Back to the form; `problem` says why, where it is not the user who goes. */
function leave(problem = "") {
  stop();
  $("door").hidden = false;
  $("app").hidden = $("leave").hidden = true;
  set($("door-problem"), problem);
  set($("me"), "");
  document.title = "natter";
  if (!problem) showState({ name: "idle" });
  $("token").focus();
}

function open(room) {
  kept.set({ token, room });
  timeline.open(room || null);
  composer.open(room || null);
  inbox.select(room || null);
  $("app").dataset.view = room ? "room" : "rooms";
  if (room) $("title").focus({ preventScroll: true });
  showTitle();
}

function showState({ name, reason }) {
  $("state").dataset.connection = name;
  set($("state"), t(name, { reason }));
  if (name === "closed" && client && reason !== "closed") leave(t("closed", { reason }));
}

function showTitle() {
  if (!client) return;
  const { total, capped } = unread(client).getSnapshot();
  document.title = `${total ? `(${total}${capped ? "+" : ""}) ` : ""}natter`;
}

$("door").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = $("token").value.trim();
  if (claimsOf(given).sub) enter(given, $("room").value.trim());
  else set($("door-problem"), t("badToken"));
});
$("leave").addEventListener("click", () => {
  kept.set({});
  $("token").value = "";
  leave();
});
$("back").addEventListener("click", () => {
  open("");
  inbox.focus();
});

/**
 * Token and room: from the address (`#token=…&room=…`, which no server sees), else as they were before a reload. Any page can
 * have made such a link: it must not make somebody who is here as one user another one.
 */
function arrive() {
  const given = new URLSearchParams(location.hash.slice(1));
  const before = kept.get();
  const wanted = given.get("token") ?? before.token ?? "";
  const room = given.get("room") ?? before.room ?? "";
  $("token").value = wanted;
  $("room").value = room;
  // The token must not stay in the address bar, the history, or a screenshot.
  if (given.has("token") || given.has("room")) history.replaceState(null, "", location.pathname);
  const me = claimsOf(before.token ?? "").sub;
  const user = claimsOf(wanted).sub;
  if (me && user !== me) leave(t("otherUser", { user: user ?? "?", me }));
  else if (user && $("room").checkValidity()) enter(wanted, room);
  else leave();
}
addEventListener("hashchange", arrive);
arrive();
