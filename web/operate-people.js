// The dialogs of a conversation: who is in it, and to whom it is given.

import { button, clock, element, sentence, t } from "./operate-words.js";

const MUTE_MS = 3_600_000;

const $ = (id) => document.getElementById(id);

export function setUpDialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", ({ target }) => target === dialog && dialog.close());
  }
}

/** Asks for a user and gives the room to them. `talk()` is the conversation, `known()` users to choose from. */
export class Assigning {
  #dialog = $("assigning");

  constructor(talk, known) {
    const form = this.#dialog.querySelector("form");
    $("assign").addEventListener("click", () => {
      const users = [...new Set([...known(), ...(talk().record?.members ?? []).map(({ user }) => user)])];
      $("known").replaceChildren(...users.map((user) => Object.assign(element("option"), { value: user })));
      form.elements.user.value = talk().assignee;
      this.#dialog.showModal();
      form.elements.user.select();
    });
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      this.#dialog.close();
      await talk().assign(form.elements.user.value.trim());
    });
  }
}

export class People {
  #dialog = $("members");
  #list = $("member-list");
  #talk;

  constructor(talk) {
    this.#talk = talk;
    $("people").addEventListener("click", () => {
      this.#problem("");
      this.#draw();
      this.#dialog.showModal();
    });
  }

  close() {
    if (this.#dialog.open) this.#dialog.close();
  }

  /** The record has changed. */
  refresh() {
    if (this.#dialog.open) this.#draw();
  }

  #problem(text) {
    this.#dialog.querySelector(".problem").textContent = text;
  }

  #draw() {
    const talk = this.#talk();
    const focused = document.activeElement?.dataset?.act;
    const people = talk.everybody().sort((a, b) => Number(Boolean(b.member)) - Number(Boolean(a.member)) || (a.user < b.user ? -1 : 1));
    const items = people.map((one) => this.#person(talk, one));
    this.#list.replaceChildren(...(items.length ? items : [element("li", "quiet", t("noPeople"))]));
    if (focused) ([...this.#list.querySelectorAll("[data-act]")].find((one) => one.dataset.act === focused) ?? this.#dialog.querySelector("button")).focus();
  }

  #person(talk, { user, here, member }) {
    const item = element("li");
    const isMuted = (member?.muted_until ?? 0) > Date.now();
    const is = [
      here && t("isHere"),
      member && (member.state === "banned" ? t("banned") : member.role in ROLES ? t(member.role) : member.role),
      isMuted && t("mutedUntil", { time: clock(member.muted_until) }),
    ];
    item.append(element("span", "name", user), " ", element("span", "quiet", is.filter(Boolean).join(" · ")));
    const { owner, moderator } = talk.rights;
    const { kind } = talk.record ?? {};
    const isSelf = user === talk.room.client.user;
    const act = (name, text, change) => {
      const made = button("plain", text, () => this.#change(talk, user, change));
      made.dataset.act = `${name} ${user}`;
      made.setAttribute("aria-label", `${text}: ${user}`);
      item.append(" ", made);
      return made;
    };
    if (moderator && !isSelf && member?.state !== "banned") {
      if (isMuted) act("mute", t("unmute"), { muted_until: 0 });
      else act("mute", t("mute"), () => ({ muted_until: Date.now() + MUTE_MS }));
    }
    if (member?.state === "in" && (isSelf ? kind === "group" : moderator)) this.#removal(act, user);
    if (!member && kind === "group" && (owner || moderator)) act("add", t("addMember"), {});
    return item;
  }

  /** Asks once more. */
  #removal(act, user) {
    const made = act("remove", t("remove"), { state: "out" });
    made.classList.add("bad");
    made.addEventListener("click", (event) => {
      if (made.dataset.sure) return;
      event.stopImmediatePropagation();
      made.dataset.sure = "yes";
      made.textContent = t("reallyRemove");
      made.setAttribute("aria-label", `${t("reallyRemove")} ${user}`);
    }, { capture: true });
  }

  async #change(talk, user, change) {
    const { room } = talk;
    this.#problem("");
    try {
      const record = await room.member(user, typeof change === "function" ? change() : change);
      if (room === talk.room) talk.learn(record);
    } catch (error) {
      this.#problem(sentence(error));
    }
    this.refresh();
  }
}

const ROLES = { owner: 1, moderator: 1, member: 1, reader: 1 };
