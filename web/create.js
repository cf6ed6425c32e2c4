// The dialog that makes a room: a direct one with the people that are named, or a group with a title.

import { claimsOf } from "./sdk/natter.js";
import { sentence, set } from "./words-app.js";

const $ = (id) => document.getElementById(id);

/** The namespace that a token is for: the one of its first grant that names one. */
function namespaceOf(token) {
  const patterns = (claimsOf(token).grants ?? []).map(({ rooms = "" }) => rooms.split(":")[0]);
  return patterns.find((one) => one && one !== "*") ?? "chat";
}

export class Create {
  #client;
  #open;
  #ended = new AbortController();

  /** `open(room)` is called with the room that was made or found. */
  constructor(client, token, open) {
    this.#client = client;
    this.#open = open;
    const { signal } = this.#ended;
    const { elements } = $("make-form");
    const kinds = () => { $("make-title").hidden = elements.kind.value === "dm"; };
    $("new").addEventListener("click", () => {
      $("make-form").reset();
      elements.namespace.value = namespaceOf(token);
      set($("make-problem"), "");
      kinds();
      $("make").showModal();
    }, { signal });
    $("make-form").addEventListener("change", kinds, { signal });
    $("make-close").addEventListener("click", () => $("make").close(), { signal });
    $("make-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#make(elements);
    }, { signal });
  }

  stop() {
    this.#ended.abort();
    $("make").close();
  }

  async #make({ kind, members, title, namespace, make }) {
    if (make.disabled) return;
    make.disabled = true;
    set($("make-problem"), "");
    const users = new Set(members.value.split(",").map((one) => one.trim()).filter(Boolean));
    users.add(this.#client.user);
    const fields = { namespace: namespace.value.trim(), kind: kind.value, members: [...users] };
    if (kind.value === "group" && title.value.trim()) fields.title = title.value.trim();
    try {
      const { room } = await this.#client.createRoom(fields);
      if (this.#ended.signal.aborted) return;
      $("make").close();
      this.#open(room);
    } catch (error) {
      set($("make-problem"), sentence(error));
    } finally {
      make.disabled = false;
    }
  }
}
