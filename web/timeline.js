// The conversation of a room: the store of messages drawn into the log, which stays where somebody reads.

import { reaches } from "./sdk/natter.js";
import { inbox, messages, presence, readers, typing } from "./sdk/store.js";
import { entry, message } from "./message.js";
import { button, day, element, names, sentence, set, t, titleOf } from "./words-app.js";

const NEAR_PX = 40; // so near the end, new messages move the log along
const EARLY_PX = 300; // so near an end of what is loaded, the next page is loaded
const GROUP_MS = 300_000; // messages of one user within that stand together
const READ_BACK = 200; // messages back at which a read receipt is shown

const $ = (id) => document.getElementById(id);

export class Timeline {
  #client;
  #write;
  #room = null;
  #store = null;
  #offs = [];
  #nodes = new Map(); // key -> {node, view, about}
  #frame = 0;
  #toEnd = true;
  #isCalm = false; // whether nothing was being loaded at the last drawing
  #marker; // the read marker when the room was opened: what is behind it is new
  #ended = new AbortController();

  /** `write(mode, view)` is called where a message is to be answered or edited. */
  constructor(client, write) {
    this.#client = client;
    this.#write = write;
    const { signal } = this.#ended;
    $("log").addEventListener("scroll", () => this.#scrolled(), { passive: true, signal });
    $("latest").addEventListener("click", () => this.#latest(), { signal });
    document.addEventListener("visibilitychange", () => this.#later(), { signal });
    const resized = new ResizeObserver(() => this.#toEnd && this.#later());
    resized.observe($("log"));
    signal.addEventListener("abort", () => resized.disconnect());
  }

  get room() {
    return this.#room;
  }

  stop() {
    this.open(null);
    this.#ended.abort();
    cancelAnimationFrame(this.#frame);
  }

  open(name) {
    if (name === (this.#room?.name ?? null)) return;
    for (const off of this.#offs) off();
    this.#offs = [];
    this.#nodes.clear();
    $("log").replaceChildren();
    $("latest").hidden = true;
    set($("typing"), "");
    set($("here"), "");
    this.#room = this.#store = null;
    this.#toEnd = true;
    this.#isCalm = false;
    this.#marker = undefined;
    if (!name) {
      set($("title"), t("choose"));
      return;
    }
    const room = (this.#room = this.#client.room(name));
    this.#store = messages(room);
    const stores = [this.#store, readers(room), typing(room), presence(room), inbox(this.#client)];
    this.#offs = stores.map((store) => store.subscribe(() => this.#later()));
    this.#draw();
  }

  #act = (name, view, key) => {
    if (name === "react") this.#room.react(view, key, !view.reactions.some((one) => one.key === key && one.mine));
    else if (name === "delete") this.#room.delete(view);
    else this.#write(name, view);
  };

  /** `mode`: `answer` or `edit`, with the message `view`. */
  send(body, { mode, view } = {}) {
    if (!this.#room) return;
    if (mode === "edit") {
      this.#room.edit(view, { ...view.body, ...body });
      return;
    }
    if (mode === "answer") this.#room.reply(view, body);
    else this.#room.send(body);
    this.#toEnd = true;
    if (this.#store.getSnapshot().hasNewer) this.#store.latest();
    this.#later();
  }

  #later() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      if (this.#room) this.#draw();
    });
  }

  #draw() {
    const log = $("log");
    const shown = this.#store.getSnapshot();
    const summary = inbox(this.#client).getSnapshot().rooms.find(({ room }) => room === this.#room.name);
    set($("title"), titleOf(summary ?? { room: this.#room.name }));
    if (this.#marker === undefined && shown.state === "ready") this.#marker = this.#room.marker ?? null;
    // The first node that is seen stays where it is.
    const anchor = this.#toEnd ? null : [...log.children].find((node) => node.offsetTop + node.offsetHeight > log.scrollTop);
    const before = anchor?.offsetTop;
    const isCalm = shown.state === "ready" && shown.loading == null;
    // What is said is read out; a page of history that was loaded is not.
    log.setAttribute("aria-live", isCalm && this.#isCalm ? "polite" : "off");
    log.setAttribute("aria-busy", String(!isCalm && shown.state !== "out"));
    this.#isCalm = isCalm;
    arrange(log, this.#wanted(shown));
    if (this.#toEnd && !shown.hasNewer) log.scrollTop = log.scrollHeight;
    else if (anchor?.isConnected) log.scrollTop += anchor.offsetTop - before;
    set($("latest"), shown.newer ? t("latestNew", { n: shown.newer }) : t("latest"));
    const { count, users, named } = presence(this.#room).getSnapshot();
    const here = users.map(({ user, info }) => (user === this.#client.user ? t("you") : info?.name ?? user));
    set($("here"), count == null ? "" : named ? t("here", { users: names(here) }) : t("hereCount", { n: count }));
    const typists = typing(this.#room).getSnapshot();
    set($("typing"), typists.length > 0 ? t("typing", { users: names(typists, 3) }) : "");
    $("say").hidden = shown.state === "out";
    this.#around(shown);
  }

  #wanted({ state, code, messages: list, loading, partial, error, hasOlder }) {
    const wanted = [];
    const keys = new Set();
    const line = (key, className, text, again) => {
      keys.add(key);
      const known = this.#nodes.get(key);
      if (known?.about !== text) {
        const node = element("p", className, text);
        if (again) node.append(" ", button("plain", t("again"), again));
        this.#nodes.set(key, { node, about: text });
      }
      wanted.push(this.#nodes.get(key).node);
    };
    if (state === "loading" || loading === "older") line("=loading", "line", t("loading"));
    else if (state === "ready" && list.length === 0) line("=none", "line", t("nothing"));
    if (partial) line("=partial", "line", t("partial"));
    if (error && state === "ready") line("=error", "line problem", sentence(error), hasOlder && (() => this.#store.loadOlder()));
    const seen = this.#seen(list);
    let date = "", last = null, isNewTold = this.#marker == null;
    for (const view of list) {
      const ofDay = day(view.ts);
      if (ofDay !== date) {
        line(`=day ${ofDay}`, "line day", (date = ofDay));
        last = null;
      }
      if (!isNewTold && !view.own && view.cursor && !reaches(this.#marker, view.cursor)) {
        isNewTold = true;
        last = null;
        line("=new", "line new", t("newHere"));
      }
      const joined = last?.from === view.from && view.kind == null && view.ts - last.ts < GROUP_MS;
      keys.add(view.key);
      wanted.push(this.#node(view, joined, seen.get(view.key) ?? ""));
      last = view.kind == null ? view : null;
    }
    if (state === "out") line("=out", "line problem", t("out", { why: sentence({ code, ...this.#room.state }) }));
    for (const key of this.#nodes.keys()) if (!keys.has(key)) this.#nodes.delete(key);
    return wanted;
  }

  /** Views do not change: where there is another one, its node is made anew. */
  #node(view, joined, seen) {
    const answered = view.reply_to ? this.#store.find(view.reply_to) : null;
    const known = this.#nodes.get(view.key);
    const isSame = known?.view === view && known.joined === joined && known.seen === seen && known.answered === answered;
    if (isSame) return known.node;
    const node = view.kind === "system" ? entry(view) : message(view, { joined, answered, seen, act: this.#act });
    const hadFocus = known && known.node === document.activeElement;
    known?.node.replaceWith(node);
    if (hadFocus) node.focus({ preventScroll: true });
    this.#nodes.set(view.key, { node, view, joined, seen, answered });
    return node;
  }

  /** Key of a message -> who has read up to there. */
  #seen(list) {
    const marks = new Map();
    const real = list.filter(({ kind, cursor }) => kind == null && cursor != null).slice(-READ_BACK);
    for (const [user, marker] of readers(this.#room).getSnapshot()) {
      if (user === this.#client.user) continue;
      const upTo = real.findLast(({ cursor }) => reaches(marker, cursor));
      if (upTo && upTo.from !== user) marks.set(upTo.key, [...(marks.get(upTo.key) ?? []), user]);
    }
    return new Map([...marks].map(([key, users]) => [key, names(users)]));
  }

  #scrolled() {
    if (!this.#room) return;
    const log = $("log");
    this.#toEnd = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_PX;
    this.#around(this.#store.getSnapshot());
  }

  /** Loads what is near, and moves the read marker: what is shown at the end of the room, to somebody who looks, is read. */
  #around({ state, hasOlder, hasNewer, loading, partial, error, messages: list }) {
    const log = $("log");
    $("latest").hidden = !hasNewer && this.#toEnd;
    if (state !== "ready" || log.clientHeight === 0) return;
    const below = log.scrollHeight - log.scrollTop - log.clientHeight;
    if (!loading && !partial && !error) {
      if (hasOlder && log.scrollTop < EARLY_PX) this.#store.loadOlder();
      else if (hasNewer && below < EARLY_PX) this.#store.loadNewer();
    }
    const looks = !hasNewer && this.#toEnd && document.visibilityState === "visible";
    if (looks && list.some(({ cursor }) => cursor)) this.#room.read();
  }

  async #latest() {
    this.#toEnd = true;
    await this.#store.latest();
    this.#later();
    $("log").focus({ preventScroll: true });
  }
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
