// The operators' page, on the SDK: conversations of a pattern, their alerts, and the one that is open. Nothing from the network is
// ever put into it as HTML.

import { Natter, claimsOf } from "./sdk/natter.js";
import { List } from "./operate-list.js";
import { Desk } from "./operate-model.js";
import { Assigning, People, setUpDialogs } from "./operate-people.js";
import { Talk } from "./operate-talk.js";
import { ago, clock, element, sentence, t, titleOf, translate } from "./operate-words.js";

const TYPED_MS = 400; // after the last key in a field, the filter is used
const ENTRY = "natter:operate"; // in sessionStorage: the token and the pattern
const LIKED = "natter:operate:settings"; // in localStorage: how somebody likes the page

const $ = (id) => document.getElementById(id);
const filters = $("filters");
const fields = filters.elements;

translate(document);

/** A storage may be full or switched off: the page works without it, only without memory. */
const memory = {
  get(storage, key) {
    try {
      return JSON.parse(window[storage].getItem(key)) ?? {};
    } catch {
      return {};
    }
  },
  set(storage, key, value) {
    try {
      if (value == null) window[storage].removeItem(key);
      else window[storage].setItem(key, JSON.stringify(value));
    } catch {
      // Full, or switched off.
    }
  },
};

let client = null;
let desk = null;
let talk = null;
let known = new Set(); // alerts that were told: room and message
let told = false; // whether the first of them were there

const list = new List($("rooms"), $("news-above"), (room) => openRoom(room));
const people = new People(() => talk);
new Assigning(() => talk, () => [...new Set([client.user, ...staff().filter((one) => !one.endsWith("*")), ...desk.assignees()])]);
setUpDialogs();

function say(text) {
  $("news").textContent = text;
}

// Entering --------------------------------------------------------------------------------------------------------------

const patternOf = (token) => claimsOf(token).grants?.find(({ can, rooms }) => can?.includes("follow") && rooms?.endsWith(":*"))?.rooms;

function enter(token, pattern) {
  stop();
  memory.set("sessionStorage", ENTRY, { token, pattern });
  $("door-problem").textContent = "";
  client = new Natter({ url: new URL(".", document.baseURI).href, token, storage: sessionStorageOrNone() });
  const liked = memory.get("localStorage", LIKED);
  fields.staff.value = liked.staff || [client.user].filter(Boolean).join();
  client.on("state", showState);
  client.on("push", ({ op, exp }) => {
    if (op === "token_expiring") $("filter-problem").textContent = t("expiring", { time: clock(exp * 1_000) });
  });
  desk = new Desk(client, pattern);
  desk.addEventListener("change", show);
  talk = new Talk(client, desk, say);
  talk.addEventListener("change", () => people.refresh());
  known = new Set();
  told = false;
  $("door").hidden = true;
  $("app").hidden = $("leave").hidden = false;
  view("rooms");
  narrow();
  showState(client.state);
  list.focus();
}

function sessionStorageOrNone() {
  try {
    return window.sessionStorage;
  } catch {
    return undefined;
  }
}

function stop() {
  if (!client) return;
  people.close();
  talk.stop();
  desk.removeEventListener("change", show);
  desk.stop();
  client.close();
  client = desk = talk = null;
  list.show([], null, "");
}

/** Back to the form; `problem` says why, where it is not the user who goes. */
function leave(problem = "") {
  stop();
  $("door").hidden = false;
  $("app").hidden = $("leave").hidden = true;
  $("door-problem").textContent = problem;
  document.title = "natter";
  state("idle", t("notConnected"));
  $("token").focus();
}

$("door").addEventListener("submit", (event) => {
  event.preventDefault();
  enter($("token").value.trim(), $("pattern").value.trim());
});
$("token").addEventListener("input", () => {
  $("pattern").value = patternOf($("token").value.trim()) ?? $("pattern").value;
});
$("leave").addEventListener("click", () => {
  memory.set("sessionStorage", ENTRY, null);
  $("token").value = "";
  leave();
});

/**
 * Token and pattern: from the address (`#token=…&rooms=chat:*`, which no server sees), else as they were before a reload. Any
 * page can have made such a link: it must not make somebody who is here as one user another one.
 */
function arrive() {
  const given = new URLSearchParams(location.hash.slice(1));
  const kept = memory.get("sessionStorage", ENTRY);
  const token = given.get("token") ?? kept.token ?? "";
  $("token").value = token;
  $("pattern").value = given.get("rooms") ?? (given.has("token") ? patternOf(token) : kept.pattern) ?? patternOf(token) ?? "chat:*";
  // The token must not stay in the address bar, the history, or a screenshot.
  if (given.has("token") || given.has("rooms")) history.replaceState(null, "", location.pathname);
  const me = claimsOf(kept.token ?? "").sub;
  const user = claimsOf(token).sub;
  if (me && user !== me) leave(t("otherUser", { user: user ?? "?", me }));
  else if (token && $("pattern").checkValidity()) enter(token, $("pattern").value);
  else leave();
}
addEventListener("hashchange", arrive);

// The connection --------------------------------------------------------------------------------------------------------

function state(name, text) {
  $("state").dataset.state = name;
  if ($("state").textContent !== text) $("state").textContent = text;
}

function showState({ name, reason }) {
  if (name === "closed" && reason !== "closed") {
    const why = /token/.test(reason) ? t("unauthorized") : t("closed", { reason });
    leave(why);
    state("closed", t("closed", { reason }));
  } else if (client) {
    state(name, t({ online: "online", offline: "offline", closed: "notConnected", idle: "notConnected" }[name] ?? "connecting"));
  }
}

// The list --------------------------------------------------------------------------------------------------------------

const chip = (name) => filters.querySelector(`[data-filter=${name}]`);
const isOn = (name) => chip(name).ariaPressed === "true";
const staff = () => fields.staff.value.split(",").map((one) => one.trim()).filter(Boolean);

/** Hands the edge what it has filters for. */
function narrow() {
  if (!desk) return;
  const filter = {};
  const text = $("find").value.trim();
  $("filter-problem").textContent = "";
  if (text) filter.text = text;
  if (isOn("unanswered")) Object.assign(filter, { unanswered_for: fields.age.value.trim(), staff: staff() });
  if (isOn("mine")) filter.assignee = client.user;
  if (isOn("condition")) filter.annotation = fields.condition.value.trim();
  desk.narrow(Object.keys(filter).length > 0 ? filter : null);
  show();
}

function show() {
  if (!desk) return;
  const rooms = desk.shown({ alerts: isOn("alerts"), nobody: isOn("nobody") });
  list.show(rooms, talk.name, client.user);
  const { loading, hasMore, waiting, partial, dropped, refused, bad } = desk.state;
  if (refused) {
    leave(refused.code === "forbidden" ? t("noFollow", { pattern: $("pattern").value }) : sentence(refused));
    return;
  }
  if (bad) $("filter-problem").textContent = sentence(bad);
  const said = [
    rooms.length === 0 && !loading ? t("none") : rooms.length === 1 ? t("countedOne") : t("counted", { n: rooms.length }),
    loading && t("loadingMore"),
    !loading && hasMore && t("thereIsMore"),
    waiting > 0 && t("waiting", { n: waiting }),
    partial && t("incomplete"),
    dropped && t("dropped"),
  ].filter(Boolean).join(" · ");
  if ($("count").textContent !== said) $("count").textContent = said;
  $("more").hidden = loading || !hasMore;
  showAlerts();
  talk.refresh();
}

/** A count and the newest one. A new one is told once, and takes nothing away from what somebody does. */
function showAlerts() {
  const alerts = desk.alerts();
  const [newest] = alerts;
  $("alerts").hidden = !newest;
  chip("alerts").textContent = alerts.length > 0 ? `${t("alerts")} (${alerts.length})` : t("alerts");
  document.title = `${alerts.length > 0 ? `(${alerts.length}) ` : ""}${talk.name ? `${$("title").textContent} · ` : ""}natter`;
  const keys = new Map(alerts.map((one) => [`${one.room} ${one.alert.message}`, one]));
  const fresh = [...keys].filter(([key]) => !known.has(key));
  known = new Set(keys.keys());
  if (newest) {
    const values = { n: alerts.length, title: titleOf(newest), ago: ago(newest.alert.at) };
    $("alerts-what").textContent = t(alerts.length === 1 ? "oneAlert" : "someAlerts", values);
    if (told && fresh.length > 0) say(t("newAlert", { title: titleOf(fresh[0][1]) }));
  }
  told ||= !desk.state.loading;
}

for (const one of filters.querySelectorAll("[data-filter]")) {
  one.addEventListener("click", () => {
    one.ariaPressed = String(one.ariaPressed !== "true");
    if (one.dataset.filter === "mine" && isOn("mine")) chip("nobody").ariaPressed = "false";
    if (one.dataset.filter === "nobody" && isOn("nobody")) chip("mine").ariaPressed = "false";
    narrow();
  });
}
let typed = 0;
filters.addEventListener("input", () => {
  clearTimeout(typed);
  typed = setTimeout(() => {
    memory.set("localStorage", LIKED, { ...memory.get("localStorage", LIKED), staff: fields.staff.value, age: fields.age.value, condition: fields.condition.value });
    narrow();
  }, TYPED_MS);
});
filters.addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(typed);
  narrow();
});
$("more").addEventListener("click", () => desk.more());

// The conversation ------------------------------------------------------------------------------------------------------

/** On a narrow screen there is either the list or the conversation. */
function view(name) {
  $("app").dataset.view = name;
}

function openRoom(room, focus = true) {
  people.close();
  talk.open(room);
  view("room");
  show();
  if (focus) ($("text").disabled || $("take").hidden === false ? $("title") : $("text")).focus({ preventScroll: true });
}

function back() {
  const { name } = talk;
  view("rooms");
  if (name != null && matchMedia("(max-width: 43.9rem)").matches) talk.close(); // what nobody sees is not read
  show();
  if (name != null) list.resume(name);
  list.focus();
}

function openNewestAlert() {
  const [newest] = desk?.alerts() ?? [];
  if (newest) openRoom(newest.room);
}

$("back").addEventListener("click", back);
$("alerts-open").addEventListener("click", openNewestAlert);

// The keyboard ----------------------------------------------------------------------------------------------------------

const KEYS = [
  [["↑", "↓", "j", "k"], "keyMove"], [["Enter"], "keyOpen"], [["Esc"], "keyBack"], [["/"], "keyFind"], [["r"], "keyReply"],
  [["t"], "keyTake"], [["a"], "keyAlert"], [["e"], "keySeen"], [["?"], "keyHelp"],
];

function showKeys() {
  $("key-list").replaceChildren(...KEYS.flatMap(([keys, what]) => {
    const term = element("dt");
    for (const key of keys) term.append(element("kbd", "", key), " ");
    return [term, element("dd", "", t(what))];
  }));
  $("keys").showModal();
}
$("help").addEventListener("click", showKeys);

const single = $("single");
single.checked = memory.get("localStorage", LIKED).single !== false;
const useSingle = () => { document.body.dataset.single = single.checked ? "on" : "off"; };
useSingle();
single.addEventListener("change", () => {
  memory.set("localStorage", LIKED, { ...memory.get("localStorage", LIKED), single: single.checked });
  useSingle();
});

const ACTS = {
  "/": () => $("find").focus(),
  "?": showKeys,
  r: () => talk.name != null && $("text").focus(),
  t: () => talk.take(),
  a: openNewestAlert,
  e: () => talk.seen(),
};

document.addEventListener("keydown", (event) => {
  if (!client || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Escape") {
    if (filters.contains(event.target)) list.focus();
    else if (talk.name != null) back();
    return;
  }
  const act = ACTS[event.key];
  if (!act || !single.checked || event.target.matches("input, textarea, select")) return;
  event.preventDefault();
  act();
});

const liked = memory.get("localStorage", LIKED);
for (const name of ["age", "condition"]) if (liked[name]) fields[name].value = liked[name];
arrive();
