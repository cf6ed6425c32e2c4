// The list of rooms: what was said last in each, and what is unread.

import { inbox } from "./sdk/store.js";
import { clock, element, sentence, set, t, textOf, titleOf } from "./words-app.js";

const $ = (id) => document.getElementById(id);

export class Inbox {
  #client;
  #store;
  #open;
  #off;
  #room = null;
  #nodes = new Map(); // room -> {node, summary}
  #ended = new AbortController();

  /** `open(room)` is called with the room that was chosen. */
  constructor(client, open) {
    this.#client = client;
    this.#open = open;
    this.#store = inbox(client);
    this.#off = this.#store.subscribe(() => this.#show());
    const { signal } = this.#ended;
    $("find").addEventListener("input", () => this.#show(), { signal });
    $("more").addEventListener("click", () => this.#store.loadMore(), { signal });
    this.#show();
  }

  stop() {
    this.#off();
    this.#ended.abort();
    $("rooms").replaceChildren();
  }

  select(room) {
    this.#room = room;
    for (const [name, { node }] of this.#nodes) this.#mark(node, name);
  }

  focus() {
    ($("rooms").querySelector("button") ?? $("find")).focus();
  }

  #mark(node, name) {
    if (name === this.#room) node.firstChild.setAttribute("aria-current", "true");
    else node.firstChild.removeAttribute("aria-current");
  }

  #show() {
    const { state, rooms, hasMore, error } = this.#store.getSnapshot();
    const text = $("find").value.trim().toLocaleLowerCase();
    const shown = text ? rooms.filter((one) => `${titleOf(one)} ${one.room}`.toLocaleLowerCase().includes(text)) : rooms;
    const list = $("rooms");
    const focused = list.contains(document.activeElement) ? document.activeElement.parentNode.dataset.room : null;
    const nodes = shown.map((summary) => this.#node(summary));
    list.replaceChildren(...nodes);
    if (focused) nodes.find((node) => node.dataset.room === focused)?.firstChild.focus({ preventScroll: true });
    const names = new Set(rooms.map(({ room }) => room));
    for (const name of this.#nodes.keys()) if (!names.has(name)) this.#nodes.delete(name);
    $("more").hidden = !hasMore;
    const none = shown.length > 0 ? "" : state === "loading" ? t("loading") : t(text ? "noneFound" : "noRooms");
    set($("side-line"), error ? sentence(error) : none);
  }

  #node(summary) {
    const known = this.#nodes.get(summary.room);
    if (known?.summary === summary) return known.node;
    const { room, last, unread = 0, mentions = 0, capped, muted } = summary;
    const node = element("li");
    node.dataset.room = room;
    node.dataset.unread = unread;
    const row = element("button", "row");
    row.type = "button";
    row.append(element("span", "name", titleOf(summary)));
    if (last) {
      row.append(element("span", "when", clock(last.ts)));
      const by = last.from === this.#client.user ? `${t("you")}: ` : "";
      row.append(element("span", "last", last.body === undefined ? "" : by + textOf(last.body)));
    }
    if (unread > 0) {
      const badge = element("span", `badge${muted ? " muted" : ""}`, `${unread}${capped ? "+" : ""}`);
      badge.setAttribute("aria-hidden", "true");
      const said = [t("unread", { n: unread }), mentions > 0 && t("mentioned"), muted && t("muted")].filter(Boolean);
      row.append(badge, element("span", "hidden", said.join(", ")));
      if (mentions > 0) badge.prepend("@ ");
    }
    row.addEventListener("click", () => this.#open(room));
    node.append(row);
    this.#mark(node, room);
    this.#nodes.set(room, { node, summary });
    return node;
  }
}
