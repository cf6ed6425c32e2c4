// The chosen conversation: history joined to what is live, translations beside the originals, replies, and who looks after it.

import { reaches, NATTER } from "./sdk/natter.js";
import { messages, presence, readers, typing } from "./sdk/store.js";
import {
  ago, button, clock, day, element, full, lang, languageName, names, sentence, t, textOf, titleOf, told,
} from "./operate-words.js";

const NEAR_PX = 40; // so near the end, new messages move the log along
const EARLY_PX = 300; // so near an end of what is loaded, the next page is loaded
const READERS = 20; // readers that are shown, and how many messages back
const READ_BACK = 200;
const BAD_MOOD = -0.5;
const GOOD_MOOD = 0.5;
const DRAFTS = 200; // drafts that are kept

const $ = (id) => document.getElementById(id);

/** Whether a grant's pattern covers a room. */
export function covers(pattern, room) {
  const [namespace, name] = pattern.split(":");
  const [ofRoom] = room.split(":");
  return pattern === room || ((namespace === "*" || namespace === ofRoom) && name === "*");
}

/** Event `change`: title, assignee or alert may be others. */
export class Talk extends EventTarget {
  #client;
  #desk;
  #say;
  #room = null;
  #store = null;
  #offs = [];
  #record = null;
  #asked = 0; // counts questions for the record: an answer to an earlier one is not heard
  #nodes = new Map(); // key -> {node, view, …}
  #days = new Map();
  #drafts = new Map();
  #frame = 0;
  #toEnd = true;
  #found = null; // a message to go to
  #busy = false;
  #isCalm = false; // whether nothing was being loaded at the last drawing
  #said = { key: "", top: [], end: [] }; // the lines around the messages, and what they are about

  /** `say` tells something to screen readers. */
  constructor(client, desk, say) {
    super();
    this.#client = client;
    this.#desk = desk;
    this.#say = say;
    const log = $("log");
    const { signal } = (this.ended = new AbortController());
    log.addEventListener("scroll", () => this.#scrolled(), { passive: true, signal });
    $("say").addEventListener("submit", (event) => { event.preventDefault(); this.#send(); }, { signal });
    $("text").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send();
    }, { signal });
    $("text").addEventListener("input", () => $("text").value && this.#room?.typing(), { signal });
    $("latest").addEventListener("click", () => this.#latest(), { signal });
    $("take").addEventListener("click", () => this.take(), { signal });
    $("alert-seen").addEventListener("click", () => this.seen(), { signal });
    $("alert-show").addEventListener("click", () => this.alert && this.#show(this.alert.message), { signal });
    document.addEventListener("visibilitychange", () => this.#later(), { signal });
    const resized = new ResizeObserver(() => this.#toEnd && this.#later());
    resized.observe(log);
    signal.addEventListener("abort", () => resized.disconnect());
  }

  stop() {
    this.close();
    this.ended.abort();
  }

  // Which room ------------------------------------------------------------------------------------------------------------

  get name() {
    return this.#room?.name ?? null;
  }

  get room() {
    return this.#room;
  }

  get record() {
    return this.#record;
  }

  get summary() {
    return this.#desk.rooms.get(this.name) ?? { room: this.name, ...this.#record };
  }

  get alert() {
    return this.#record ? this.#record.alert : this.summary.alert;
  }

  get assignee() {
    return (this.#record ? this.#record.assignee : this.summary.assignee) || "";
  }

  open(name) {
    if (name === this.name) return;
    this.close();
    const room = (this.#room = this.#client.room(name));
    const store = (this.#store = messages(room));
    this.#toEnd = true;
    this.#found = null;
    this.#isCalm = false;
    this.#said = { key: "", top: [], end: [] };
    const later = () => this.#later();
    this.#offs = [
      room.on("message", ({ kind, from }) => kind === "system" && from === NATTER && this.#look()),
      room.on("joined", () => this.#look()),
      ...[store, presence(room), readers(room), typing(room)].map((one) => one.subscribe(later)),
    ];
    $("text").value = this.#drafts.get(name) ?? "";
    $("nothing").hidden = true;
    $("open").hidden = false;
    this.problem("");
    this.#head();
    this.#draw();
    this.#look();
  }

  close() {
    const room = this.#room;
    if (!room) return;
    const draft = $("text").value;
    this.#drafts.delete(room.name);
    if (draft) this.#drafts.set(room.name, draft);
    if (this.#drafts.size > DRAFTS) this.#drafts.delete(this.#drafts.keys().next().value);
    for (const off of this.#offs) off();
    room.leave();
    this.#asked += 1;
    this.#offs = [];
    this.#room = this.#store = this.#record = null;
    this.#nodes.clear();
    this.#days.clear();
    $("log").replaceChildren();
    $("open").hidden = true;
    $("nothing").hidden = false;
  }

  problem(text) {
    $("talk-problem").textContent = text;
  }

  // The record: who looks after it, who is in it --------------------------------------------------------------------------

  async #look() {
    const asked = (this.#asked += 1);
    try {
      const record = await this.#room.record();
      if (asked === this.#asked) this.#know(record);
    } catch (error) {
      // A room without a record has no members and no settings; without a connection the next join asks again.
      if (asked === this.#asked && error.code === "unknown_room") this.#know(null);
    }
  }

  #know(record) {
    this.#record = record;
    this.#head();
    this.#later();
    this.dispatchEvent(new Event("change"));
  }

  /** The record as an answer to a change has it. */
  learn(record) {
    this.#asked += 1;
    this.#know(record);
  }

  /** What the user may do here, as far as token and record tell. The edge decides. */
  get rights() {
    const grants = this.#client.claims.grants ?? [];
    const has = (right) => grants.some(({ rooms, can }) => can?.includes(right) && covers(rooms, this.name ?? ""));
    const role = this.#record?.members.find(({ user, state }) => user === this.#client.user && state === "in")?.role;
    const owner = has("manage") || role === "owner";
    return { owner, moderator: owner || has("moderate"), write: has("write") };
  }

  /** One change at a time, with a problem in words. Gives whether it succeeded. */
  async #change(act) {
    if (this.#busy) return false;
    this.#busy = true;
    const room = this.#room;
    this.problem("");
    try {
      await act(room);
      return true;
    } catch (error) {
      if (room === this.#room) {
        this.problem(sentence(error));
        this.#look();
      }
      return false;
    } finally {
      this.#busy = false;
    }
  }

  /** Gives the room to a user, `""` to nobody; refused where somebody else has changed the record meanwhile. */
  assign(user) {
    return this.#change(async (room) => {
      const version = this.#record?.version;
      const record = await room.settings({ assignee: user, ...(version && { version }) });
      this.#desk.patch(room.name, { assignee: user || undefined });
      if (room !== this.#room) return;
      this.learn(record);
      this.#say(this.#about());
    });
  }

  /** Takes over, as a member where the room has a list of them; releases what is one's own. */
  async take() {
    const me = this.#client.user;
    if (!this.#room || !this.rights.owner) return;
    if (this.assignee === me) {
      await this.assign("");
      return;
    }
    if (!(await this.assign(me))) return;
    const isIn = this.#record?.members.some(({ user, state }) => user === me && state === "in");
    if (this.#record?.kind === "group" && !isIn) {
      await this.#change(async (room) => this.learn(await room.member(me)));
    }
    // What was refused before may be allowed to a member.
    if (this.#room?.state.name === "out") this.#room.join().catch((error) => this.problem(sentence(error)));
    if (!$("text").disabled) $("text").focus();
  }

  /** Ends the alert that is shown; not one that has come since. */
  async seen() {
    const known = this.alert;
    if (!known || !this.rights.moderator) return;
    const ended = await this.#change(async (room) => {
      const { alert, version } = await room.record();
      if (alert && alert.message !== known.message) {
        if (room === this.#room) this.problem(t("newerAlert"));
        this.#look();
        return;
      }
      const record = await (alert ? room.settings({ alert: false, version }) : room.record());
      this.#desk.patch(room.name, { alert: undefined });
      if (room === this.#room) this.learn(record);
      this.#say(alert ? t("alertEnded") : t("noAlert"));
    });
    // The button has gone, and the focus with it.
    if (ended && document.activeElement === document.body) $("log").focus({ preventScroll: true });
  }

  #about() {
    const { assignee } = this;
    if (!assignee) return t("assignedToNobody");
    return assignee === this.#client.user ? t("assignedToYou") : t("assignedTo", { user: assignee });
  }

  /** What stands above the messages. */
  #head() {
    const { room, ref } = this.summary;
    const me = this.#client.user;
    const title = titleOf({ ...this.summary, ...this.#record });
    set($("title"), title);
    $("title").title = room;
    const { count, users, named } = presence(this.#room).getSnapshot();
    const here = users.map(({ user }) => (user === me ? t("you") : user));
    const present = count == null ? "" : named ? t("hereAre", { users: names(here) }) : t("hereCount", { n: count });
    set($("about"), [room !== title && room, ref !== title && ref, this.#about(), present].filter(Boolean).join(" · "));
    const { owner, moderator } = this.rights;
    const { assignee, alert } = this;
    $("take").hidden = $("assign").hidden = !owner;
    set($("take"), assignee === me ? t("release") : assignee ? t("takeFrom", { user: assignee }) : t("takeOver"));
    $("take").classList.toggle("plain", assignee === me);
    $("alert").hidden = !alert;
    $("alert-seen").hidden = !moderator;
    if (alert) set($("alert-what"), t("alertOf", { worker: alert.worker, ago: ago(alert.at) }));
  }

  /** Summaries of the list have changed. */
  refresh() {
    if (!this.#room) return;
    const told = this.#desk.rooms.get(this.name)?.alert?.message;
    if (this.#record && told && told !== this.#record.alert?.message) this.#look();
    this.#head();
  }

  // The messages ----------------------------------------------------------------------------------------------------------

  #later() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      if (this.#room) this.#draw();
    });
  }

  #draw() {
    const log = $("log");
    const shown = this.#store.getSnapshot();
    const anchor = this.#toEnd ? null : [...log.children].find((node) => node.offsetTop + node.offsetHeight > log.scrollTop);
    const before = anchor?.offsetTop;
    const marks = this.#readMarks(shown.messages);
    const wanted = [];
    const keys = new Set();
    let last = "";
    for (const view of shown.messages) {
      const date = day(view.ts);
      if (date !== last) wanted.push(this.#day((last = date), keys));
      keys.add(view.key);
      wanted.push(this.#node(view, marks.get(view.key)));
    }
    for (const key of this.#nodes.keys()) if (!keys.has(key)) this.#nodes.delete(key);
    for (const key of this.#days.keys()) if (!keys.has(`day ${key}`)) this.#days.delete(key);
    const lines = this.#lines(shown);
    // What is said is read out; a page of history that was loaded is not.
    const isCalm = shown.state === "ready" && shown.loading == null;
    log.setAttribute("aria-live", isCalm && this.#isCalm ? "polite" : "off");
    this.#isCalm = isCalm;
    arrange(log, [...lines.top, ...wanted, ...lines.end]);
    log.setAttribute("aria-busy", String(shown.loading != null || shown.state === "loading"));
    const out = shown.state === "out";
    $("text").disabled = $("send").disabled = out || !this.rights.write;
    const found = this.#found && this.#nodes.get(this.#found)?.node;
    if (found) {
      this.#found = null;
      this.#toEnd = false;
      found.scrollIntoView({ block: "center" });
      found.focus({ preventScroll: true });
    } else if (this.#toEnd && !shown.hasNewer) {
      log.scrollTop = log.scrollHeight;
    } else if (anchor?.isConnected) {
      log.scrollTop += anchor.offsetTop - before;
    }
    const { newer, hasNewer } = shown;
    $("latest").hidden = !hasNewer && this.#toEnd;
    set($("latest"), newer ? t("latestNew", { n: newer }) : t("latest"));
    const typists = typing(this.#room).getSnapshot();
    set($("typing"), typists.length ? t("typing", { users: names(typists, 3) }) : "");
    this.#head();
    this.#pages(shown);
    this.#read(shown);
  }

  #lines({ state, code, messages: list, loading, partial, error, hasOlder }) {
    const key = JSON.stringify([state, code, list.length === 0, loading, partial, error?.code, hasOlder]);
    if (key === this.#said.key) return this.#said;
    const top = [], end = [];
    if (state === "out") end.push(element("p", "line bad", t("cantRead", { why: sentence({ code, ...this.#room.state }) })));
    else if (state === "loading") top.push(element("p", "line", t("loading")));
    else if (list.length === 0) top.push(element("p", "line", t("nothingYet")));
    if (loading === "older") top.push(element("p", "line", t("loading")));
    if (partial) top.push(element("p", "line", t("partial")));
    if (error && state === "ready") {
      const line = element("p", "line bad", sentence(error));
      if (hasOlder) line.append(" ", button("plain", t("again"), () => this.#store.loadOlder()));
      top.push(line);
    }
    this.#said = { key, top, end };
    return this.#said;
  }

  #day(date, keys) {
    keys.add(`day ${date}`);
    let node = this.#days.get(date);
    if (!node) this.#days.set(date, (node = element("p", "line day", date)));
    return node;
  }

  /** Views do not change: where there is another one, its node is made anew. */
  #node(view, mark = "") {
    const known = this.#nodes.get(view.key);
    const isAlert = this.alert?.message === view.key;
    if (known?.view === view && known.mark === mark && known.isAlert === isAlert) return known.node;
    const hadFocus = known?.node === document.activeElement;
    const node = view.kind === "system" ? element("p", "line", told(view.body)) : this.#message(view, mark);
    if (view.kind === "system") node.title = full(view.ts);
    node.classList.toggle("alerted", isAlert);
    if (known) known.node.replaceWith(node);
    if (hadFocus) node.focus({ preventScroll: true });
    this.#nodes.set(view.key, { node, view, mark, isAlert });
    return node;
  }

  #message(view, mark) {
    const { own, from, ts, body, deleted_at, edited_at, annotations, reply_to, reactions } = view;
    const node = element("article", `message${own ? " own" : ""} ${view.status}`);
    node.tabIndex = -1;
    node.dataset.key = view.key;
    const meta = element("div", "meta");
    const time = element("time", "", clock(ts));
    time.dateTime = new Date(ts).toISOString();
    time.title = full(ts);
    meta.append(element("span", "from", own ? t("you") : from), " ", time);
    const score = annotations.sentiment?.score;
    if (typeof score === "number" && (score <= BAD_MOOD || score >= GOOD_MOOD)) {
      const mood = element("span", `mood ${score < 0 ? "is-bad" : "is-good"}`, t(score < 0 ? "badMood" : "goodMood"));
      mood.title = t("moodScore", { score });
      meta.append(" ", mood);
    }
    if (edited_at && !deleted_at) meta.append(" ", element("span", "", t("edited")));
    node.append(meta);
    if (reply_to) {
      const answered = this.#store.find(reply_to);
      const text = answered ? textOf(answered.body).slice(0, 120) : t("anEarlier");
      node.append(element("p", "answered", t("answerTo", { user: reply_to.slice(0, reply_to.lastIndexOf("/")), text })));
    }
    node.append(deleted_at ? element("p", "quiet", t("deleted")) : this.#texts(body, annotations.translation));
    const files = Array.isArray(body?.attachments) ? body.attachments.length : 0;
    if (files && !deleted_at) node.append(element("p", "quiet", files === 1 ? t("oneFile") : t("files", { n: files })));
    if (reactions.length > 0) {
      const line = element("p", "reactions");
      for (const { key, count } of reactions) line.append(element("span", "reaction", `${key} ${count}`), " ");
      node.append(line);
    }
    const status = this.#status(view);
    if (status) node.append(status);
    if (mark) node.append(element("p", "reads", t("readBy", { users: mark })));
    return node;
  }

  /** The original, and beside it what the annotation `translation` says: `{ko: "…"}`, in any languages, or one text. */
  #texts(body, translation) {
    const texts = element("div", "texts");
    const original = element("p", "body", textOf(body));
    original.dir = "auto";
    texts.append(original);
    const given = typeof translation === "string" ? [["", translation]] : Object.entries(translation ?? {});
    const found = given.filter(([, text]) => typeof text === "string" && text);
    found.sort(([a], [b]) => Number(b.startsWith(lang)) - Number(a.startsWith(lang)));
    if (found.length === 0) return texts;
    const beside = element("div", "translations");
    for (const [code, text] of found) {
      const line = element("p", "translation");
      const label = element("span", "tongue", code ? languageName(code) : t("translation", { language: "" }));
      const said = element("span", "", text);
      if (code) said.lang = code;
      said.dir = "auto";
      line.append(label, " ", said);
      beside.append(line);
    }
    texts.append(beside);
    texts.classList.add("two");
    return texts;
  }

  #status({ status, handle, error }) {
    if (status === "sent") return null;
    const line = element("p", `status ${status === "failed" ? "bad" : "quiet"}`);
    if (status === "pending") {
      line.textContent = error ? t("waitingToSend", { why: sentence(error) }) : t("sending");
      return line;
    }
    line.append(t("notSent", { why: error ? sentence(error) : "" }), " ");
    line.append(button("plain", t("again"), () => handle.retry()), " ", button("plain", t("cancel"), () => handle.cancel()));
    return line;
  }

  /** Key of a message -> who has read up to there. */
  #readMarks(list) {
    const marks = new Map();
    const me = this.#client.user;
    const real = list.filter(({ kind, cursor }) => kind == null && cursor != null).slice(-READ_BACK);
    for (const [user, marker] of [...readers(this.#room).getSnapshot()].filter(([one]) => one !== me).slice(0, READERS)) {
      const upTo = real.findLast(({ cursor }) => reaches(marker, cursor));
      if (upTo && upTo.from !== user) marks.set(upTo.key, [...(marks.get(upTo.key) ?? []), user]);
    }
    return new Map([...marks].map(([key, users]) => [key, names(users)]));
  }

  #scrolled() {
    if (!this.#room) return;
    const log = $("log");
    this.#toEnd = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_PX;
    const shown = this.#store.getSnapshot();
    $("latest").hidden = !shown.hasNewer && this.#toEnd;
    this.#pages(shown);
    this.#read(shown);
  }

  #pages({ state, hasOlder, hasNewer, loading, partial, error }) {
    const log = $("log");
    if (state !== "ready" || loading || partial || error || log.clientHeight === 0) return;
    if (hasOlder && log.scrollTop < EARLY_PX) this.#store.loadOlder();
    else if (hasNewer && log.scrollHeight - log.scrollTop - log.clientHeight < EARLY_PX) this.#store.loadNewer();
  }

  /** What is shown at the end of the room, to somebody who looks, is read. */
  #read({ state, hasNewer, messages: list }) {
    if (state !== "ready" || hasNewer || !this.#toEnd || document.visibilityState !== "visible") return;
    if ($("log").clientHeight === 0 || !list.some(({ cursor }) => cursor)) return;
    this.#room.read();
  }

  async #latest() {
    this.#toEnd = true;
    await this.#store.latest();
    this.#later();
    $("log").focus({ preventScroll: true });
  }

  /** Goes to a message, `<user>/<id>`. */
  async #show(key) {
    const store = this.#store;
    this.problem("");
    const isThere = await store.jump(key);
    if (store !== this.#store) return;
    if (!isThere) {
      this.problem(t("notThere"));
      return;
    }
    this.#found = key;
    this.#toEnd = false;
    this.#later();
  }

  #send() {
    const text = $("text").value.trim();
    if (!text || !this.#room || $("text").disabled) return;
    this.#room.send({ text });
    $("text").value = "";
    this.#drafts.delete(this.name);
    this.#latestOf();
  }

  #latestOf() {
    this.#toEnd = true;
    if (this.#store.getSnapshot().hasNewer) this.#store.latest();
    this.#later();
  }

  /** Everybody who is known here: members, who is present, who has written. */
  everybody() {
    const { users } = presence(this.#room).getSnapshot();
    const here = new Set(users.map(({ user }) => user));
    const members = new Map((this.#record?.members ?? []).map((one) => [one.user, one]));
    const wrote = this.#store.getSnapshot().messages.filter(({ kind }) => kind == null).map(({ from }) => from);
    const all = new Set([...members.keys(), ...here, ...wrote]);
    return [...all].map((user) => ({ user, here: here.has(user), member: members.get(user) }));
  }
}

function set(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Makes these the children of a node, and moves only what is not in its place: what has the focus keeps it. */
function arrange(parent, wanted) {
  const keep = new Set(wanted);
  for (const node of [...parent.childNodes]) if (!keep.has(node)) node.remove();
  let next = parent.firstChild;
  for (const node of wanted) {
    if (node === next) next = next.nextSibling;
    else parent.insertBefore(node, next);
  }
}
