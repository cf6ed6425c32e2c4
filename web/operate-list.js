// The list of conversations: a listbox that has only the rows that are in view, however many there are.

import { ago, element, full, t, titleOf } from "./operate-words.js";

const ROW_REM = 3.75; // as in operate.css
const SPARE = 6; // rows above and below those in view
const STILL_MS = 1_500; // after the pointer has moved over the list, rows stay where they are so long
const TICK_MS = 30_000; // "5 minutes ago" grows older

export class List {
  #box;
  #layer = element("div", "layer");
  #above;
  #open;
  #rooms = []; // summaries, in their order
  #place = new Map(); // room -> its place
  #rows = new Map(); // room -> {node, summary, …} of those in the page
  #number = 0;
  #active = null;
  #current = null;
  #me = "";
  #moved = 0;
  #held = null; // a newer list, that waits until the pointer rests
  #timer = 0;
  #frame = 0;

  /** `box`: the listbox. `above`: a button that is shown when there is news above what is in view. */
  constructor(box, above, open) {
    this.#box = box;
    this.#above = above;
    this.#open = open;
    box.append(this.#layer);
    box.addEventListener("scroll", () => this.#later(), { passive: true });
    box.addEventListener("keydown", (event) => this.#key(event));
    box.addEventListener("pointermove", ({ pointerType }) => pointerType === "mouse" && (this.#moved = performance.now()));
    box.addEventListener("pointerleave", () => this.#release());
    box.addEventListener("click", ({ target }) => {
      const room = target.closest(".row")?.dataset.room;
      if (room == null) return;
      this.#activate(room, false);
      this.#open(room);
    });
    above.addEventListener("click", () => {
      box.scrollTop = 0;
      box.focus({ preventScroll: true });
      this.#later();
    });
    new ResizeObserver(() => this.#later()).observe(box);
    setInterval(() => this.#tick(), TICK_MS);
  }

  get active() {
    return this.#active;
  }

  focus() {
    this.#box.focus({ preventScroll: true });
  }

  /** Shows these rooms. `current` is the open one. */
  show(rooms, current, me) {
    this.#current = current;
    this.#me = me;
    const rest = this.#moved + STILL_MS - performance.now();
    if (rest > 0 && this.#rooms.length > 0) {
      // Nothing moves away below a hand. What a row says is new all the same.
      this.#held = rooms;
      clearTimeout(this.#timer);
      this.#timer = setTimeout(() => this.#release(), rest);
      const known = new Map(rooms.map((one) => [one.room, one]));
      this.#rooms = this.#rooms.map((one) => known.get(one.room) ?? one);
      this.#later();
      return;
    }
    this.#take(rooms);
  }

  #release() {
    clearTimeout(this.#timer);
    this.#moved = 0;
    const held = this.#held;
    this.#held = null;
    if (held) this.#take(held);
  }

  #take(rooms) {
    this.#held = null;
    const box = this.#box, height = this.#height;
    const top = box.scrollTop;
    // Who has scrolled down keeps what is in view: the first row of it stays where it is.
    const first = top > 0 ? this.#rooms[Math.floor(top / height)]?.room : undefined;
    const before = this.#place.get(first);
    this.#rooms = rooms;
    this.#place = new Map(rooms.map(({ room }, at) => [room, at]));
    this.#layer.style.height = `${rooms.length * height}px`;
    const after = this.#place.get(first);
    if (before != null && after != null && after !== before) {
      box.scrollTop = top + (after - before) * height;
      if (after > before) this.#above.hidden = false;
    }
    if (!this.#place.has(this.#active)) this.#active = null;
    this.#later();
  }

  get #height() {
    return parseFloat(getComputedStyle(document.documentElement).fontSize) * ROW_REM;
  }

  #later() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      this.#draw();
    });
  }

  #draw() {
    const box = this.#box, height = this.#height;
    if (box.clientHeight === 0) return; // the conversation is in its place
    if (box.scrollTop < height / 2) this.#above.hidden = true;
    const from = Math.max(0, Math.floor(box.scrollTop / height) - SPARE);
    const to = Math.min(this.#rooms.length, Math.ceil((box.scrollTop + box.clientHeight) / height) + SPARE);
    const wanted = new Map();
    for (let at = from; at < to; at += 1) wanted.set(this.#rooms[at].room, at);
    // The active row is always in the page: a screen reader is at it.
    if (this.#active != null) wanted.set(this.#active, this.#place.get(this.#active));
    for (const [room, { node }] of this.#rows) {
      if (wanted.has(room)) continue;
      node.remove();
      this.#rows.delete(room);
    }
    let next = this.#layer.firstElementChild;
    for (const [room, at] of [...wanted].sort((a, b) => a[1] - b[1])) {
      let row = this.#rows.get(room);
      if (!row) this.#rows.set(room, (row = this.#row(room)));
      this.#fill(row, this.#rooms[at], at, height);
      if (row.node === next) next = next.nextElementSibling;
      else this.#layer.insertBefore(row.node, next);
    }
    const active = this.#rows.get(this.#active);
    if (active) box.setAttribute("aria-activedescendant", active.node.id);
    else box.removeAttribute("aria-activedescendant");
  }

  #row(room) {
    const node = element("div", "row");
    node.id = `row-${(this.#number += 1)}`;
    node.setAttribute("role", "option");
    node.dataset.room = room;
    const parts = {};
    for (const names of [["name", "alerted", "time"], ["last", "assignee", "badge"]]) {
      const line = element("div");
      for (const name of names) line.append((parts[name] = element("span", name)), " ");
      node.append(line);
    }
    return { node, parts, summary: null, at: -1 };
  }

  #fill(row, summary, at, height) {
    const { node, parts } = row;
    if (row.at !== at || row.height !== height) {
      node.style.transform = `translateY(${at * height}px)`;
      node.setAttribute("aria-posinset", at + 1);
      Object.assign(row, { at, height });
    }
    if (row.size !== this.#rooms.length) node.setAttribute("aria-setsize", (row.size = this.#rooms.length));
    const isCurrent = summary.room === this.#current;
    node.setAttribute("aria-selected", String(isCurrent));
    node.classList.toggle("active", summary.room === this.#active);
    if (row.summary === summary) return;
    row.summary = summary;
    const { last, alert, assignee, unread, capped } = summary;
    node.classList.toggle("has-alert", Boolean(alert));
    parts.name.textContent = titleOf(summary);
    node.title = summary.room;
    parts.alerted.textContent = alert ? t("alertMark") : "";
    parts.last.textContent = last ? `${last.from === this.#me ? t("you") : last.from}: ${last.text ?? t("notText")}` : "";
    parts.assignee.textContent = assignee === this.#me && assignee ? t("you") : (assignee ?? "");
    parts.assignee.title = assignee ? t("assignedTo", { user: assignee }) : "";
    parts.badge.textContent = unread ? `${unread}${capped ? "+" : ""}` : "";
    parts.badge.title = unread ? t("unread", { n: unread }) : "";
    this.#time(row);
  }

  #time({ parts, summary }) {
    const ms = summary.last?.ts;
    parts.time.textContent = ms ? ago(ms) : "";
    parts.time.title = ms ? full(ms) : "";
  }

  #tick() {
    for (const row of this.#rows.values()) if (row.summary) this.#time(row);
  }

  #activate(room, scroll = true) {
    this.#active = room;
    const at = this.#place.get(room);
    if (scroll && at != null) {
      const box = this.#box, height = this.#height;
      if (at * height < box.scrollTop) box.scrollTop = at * height;
      else if ((at + 1) * height > box.scrollTop + box.clientHeight) box.scrollTop = (at + 1) * height - box.clientHeight;
    }
    this.#later();
  }

  /** The open room is where the keys go on. */
  resume(room) {
    if (this.#place.has(room)) this.#activate(room);
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || this.#rooms.length === 0) return;
    const at = this.#place.get(this.#active) ?? -1;
    const last = this.#rooms.length - 1;
    const page = Math.max(1, Math.floor(this.#box.clientHeight / this.#height) - 1);
    const moves = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: last, PageDown: at + page, PageUp: at - page };
    if (document.body.dataset.single !== "off") Object.assign(moves, { j: at + 1, k: at - 1 });
    if (event.key in moves) {
      this.#moved = 0;
      this.#activate(this.#rooms[Math.min(last, Math.max(0, moves[event.key]))].room);
    } else if ((event.key === "Enter" || event.key === " ") && this.#active != null) {
      this.#open(this.#active);
    } else {
      return;
    }
    event.preventDefault();
    event.stopPropagation();
  }
}
