// The details of a room: members, settings, leaving, blocking, its end. And making rooms.

import { memberPath, request, roomPath } from "./http.js";
import { grantsOf } from "./natter.js";
import { button, clock, element, sentence, titleOf } from "./words.js";

const MUTE_MS = 3_600_000;
const SURE_MS = 4_000; // how long a button that asked back waits for the answer
const ROLES = ["reader", "member", "moderator", "owner"];
const KINDS = { dm: "A direct room", group: "A group", open: "An open room" };

const $ = (id) => document.getElementById(id);
const users = (text) => text.split(",").map((name) => name.trim()).filter(Boolean);

/** Whether a token grants a right in a room; the edge is the judge. */
function grants(token, user, right, room) {
  const [namespace] = room.split(":");
  return grantsOf(token).some(({ rooms, can }) => {
    const pattern = typeof rooms === "string" ? rooms.replaceAll("{sub}", user) : "";
    return Array.isArray(can) && can.includes(right) && ["*:*", `${namespace}:*`, room].includes(pattern);
  });
}

function options(select, values, chosen) {
  select.replaceChildren(...values.map((value) => new Option(value, value, false, value === chosen)));
}

/** Dialogs close by their button and by Escape. */
function closable(dialog) {
  dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
}

/** A dialog that makes rooms. `where()` gives {token, user, namespace}; `made(room)` shows one. */
export function makeDialog(where, made) {
  const dialog = $("make");
  const form = dialog.querySelector("form");
  const problem = form.querySelector(".problem");
  closable(dialog);
  form.addEventListener("change", () => {
    $("make-title").hidden = form.kind.value !== "group";
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const { token, user } = where();
    const kind = form.kind.value;
    const body = {
      namespace: form.namespace.value.trim(), kind, ref: form.ref.value.trim() || undefined,
      members: [user, ...users(form.members.value)], title: (kind === "group" && form.title.value.trim()) || undefined,
    };
    problem.textContent = "";
    try {
      const { room } = await request(token, "POST", "v1/rooms", { body });
      dialog.close();
      form.reset();
      made(room);
    } catch (error) {
      problem.textContent = sentence(error);
    }
  });
  return () => {
    problem.textContent = "";
    form.namespace.value = where().namespace;
    $("make-title").hidden = form.kind.value !== "group";
    dialog.showModal();
    form.members.focus();
  };
}

export class Panel {
  #where;
  #dialog = $("panel"); #settings = $("settings"); #add = $("add");
  #record = null; // null where nobody has made the room
  #level = 0; // what the user may do: 0 nothing, 1 as a moderator, 2 as an owner
  #edited = false; // whether the settings are other than those of the record

  /** `where()` gives {token, user, room}. */
  constructor(where) {
    this.#where = where;
    closable(this.#dialog);
    this.#settings.addEventListener("input", () => { this.#edited = true; });
    this.#settings.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#save();
    });
    this.#add.addEventListener("submit", (event) => {
      event.preventDefault();
      const { user, as } = this.#add;
      const what = as.value === "banned" ? { state: "banned" } : { role: as.value, state: "in" };
      this.#member("PUT", user.value.trim(), what).then((done) => done && this.#add.reset());
    });
  }

  async open() {
    this.#edited = false;
    this.#record = null;
    this.#level = 0;
    this.#say("");
    this.#draw();
    this.#dialog.showModal();
    await this.#load();
  }

  close() {
    this.#dialog.close();
  }

  /** The record may be another than the one that is shown. */
  changed() {
    if (this.#dialog.open) this.#load();
  }

  #say(text, isProblem = true) {
    $("panel-problem").className = isProblem ? "problem" : "";
    $("panel-problem").textContent = text;
  }

  async #load() {
    const { token, room } = this.#where();
    try {
      const record = await request(token, "GET", roomPath(room));
      if (room === this.#where().room) this.#show(record);
    } catch (error) {
      if (room !== this.#where().room) return;
      if (error.code === "unknown_room") this.#show(null);
      else this.#say(sentence(error, room));
    }
  }

  #show(record) {
    const { token, user, room } = this.#where();
    // What is being edited stays, and is for the version that it was made from.
    const version = this.#edited ? this.#record?.version : record?.version;
    this.#record = record && { ...record, version };
    const role = record?.members.find((one) => one.user === user && one.state === "in")?.role;
    if (grants(token, user, "manage", room)) this.#level = 2;
    else if (grants(token, user, "moderate", room)) this.#level = role === "owner" ? 2 : 1;
    else this.#level = 0;
    this.#draw();
  }

  /** Makes a change; true if it was made. */
  async #change(method, path, body, headers) {
    const { token, room } = this.#where();
    this.#say("");
    try {
      const answer = await request(token, method, path, { body, headers });
      if (room === this.#where().room && answer?.members) this.#show(answer);
      return true;
    } catch (error) {
      if (room === this.#where().room) this.#say(sentence(error, room));
      return false;
    }
  }

  #member(method, user, what) {
    return this.#change(method, memberPath(this.#where().room, user), what);
  }

  async #save() {
    const { title, assignee, slow_mode_s: slow, frozen, archived } = this.#settings;
    const was = this.#record ?? {};
    const wanted = {
      ...(this.#level > 1 && { title: title.value.trim(), assignee: assignee.value.trim() }),
      slow_mode_s: Number(slow.value), frozen: frozen.checked, archived: archived.checked,
    };
    const none = { title: "", assignee: "", slow_mode_s: 0, frozen: false, archived: false };
    // Only what is other than before: the room is told of all that is named.
    const body = Object.fromEntries(Object.entries(wanted).filter(([name, value]) => value !== (was[name] ?? none[name])));
    if (Object.keys(body).length === 0) {
      this.#say("Nothing was changed.", false);
      return;
    }
    const { room } = this.#where();
    const version = was.version;
    const edited = this.#edited;
    this.#edited = false; // the answer is shown
    const done = await this.#change("PATCH", roomPath(room), body, version && { "If-Match": `"${version}"` });
    if (done) return;
    // After a conflict the form shows what is there now; otherwise it keeps what was typed.
    if ($("panel-problem").textContent === sentence({ code: "conflict" })) await this.#load();
    else this.#edited = edited;
  }

  // On the page ------------------------------------------------------------------------------------------------------------

  #draw() {
    const { room } = this.#where();
    const record = this.#record;
    const named = record ? titleOf({ ...record, peers: this.#others() }) : room;
    $("panel-name").textContent = named;
    const parts = [record ? KINDS[record.kind] : "", record?.ref && `about ${record.ref}`, record?.by && `made by ${record.by}`, room];
    $("panel-what").textContent = parts.filter(Boolean).join(" · ");
    this.#drawSettings();
    this.#drawMembers();
    this.#drawEnds();
  }

  #others() {
    const { user } = this.#where();
    return (this.#record?.members ?? []).filter((one) => one.state === "in" && one.user !== user).map((one) => one.user);
  }

  #drawSettings() {
    const form = this.#settings;
    form.hidden = this.#level === 0;
    for (const field of form.querySelectorAll("[data-owner]")) field.hidden = this.#level < 2;
    if (this.#edited) return;
    const { title = "", assignee = "", slow_mode_s: slow = 0, frozen = false, archived = false } = this.#record ?? {};
    [form.title.value, form.assignee.value, form.slow_mode_s.value] = [title, assignee, slow];
    [form.frozen.checked, form.archived.checked] = [frozen, archived];
  }

  #drawMembers() {
    const focused = this.#dialog.contains(document.activeElement) ? document.activeElement.dataset.focus : null;
    const members = this.#record?.members ?? [];
    const selects = () => [...$("members").querySelectorAll("select")];
    const picked = new Map(selects().filter((one) => one.value !== one.dataset.role).map((one) => [one.dataset.focus, one.value]));
    $("members").replaceChildren(...members.map((member) => this.#memberRow(member)));
    // A role that was chosen, but not set yet, stays chosen.
    for (const one of selects()) {
      const value = picked.get(one.dataset.focus);
      if ([...one.options].some((option) => option.value === value)) one.value = value;
    }
    if (members.length === 0) {
      const nobody = this.#record ? "No members are named." : "Nobody has made this room: whoever has a grant is in it.";
      $("members").append(element("li", "quiet", nobody));
    }
    this.#add.hidden = this.#level === 0 || this.#record?.kind === "dm";
    if (this.#add.as.options.length !== this.#roles.length + 1) options(this.#add.as, [...this.#roles, "banned"], "member");
    // The row was drawn anew.
    if (focused) (this.#dialog.querySelector(`[data-focus="${CSS.escape(focused)}"]`) ?? $("members")).focus();
  }

  get #roles() {
    return this.#level > 1 ? ROLES : ROLES.slice(0, 2);
  }

  #memberRow({ user, role, state, muted_until: until }) {
    const me = this.#where().user;
    const isMuted = until > Date.now();
    const row = element("li");
    row.dataset.user = user;
    const name = element("span", "name", user);
    const standing = [user === me && "you", state === "banned" ? "banned" : role, isMuted && `muted until ${clock(until)}`];
    name.append(" ", element("span", "quiet", standing.filter(Boolean).join(", ")));
    row.append(name);
    const outranks = this.#level === 2 || ROLES.indexOf(role) < 2 || state !== "in";
    if (this.#level === 0 || !outranks || user === me) return row;
    const act = (content, method, what, bad) => {
      const made = button(bad ? "plain bad" : "plain", content, () => this.#member(method, user, what));
      made.ariaLabel = `${content} ${user}`;
      made.dataset.focus = `${content} ${user}`;
      row.append(made);
    };
    if (state === "banned") {
      act("End the ban of", "PUT", { state: "in" });
      act("Remove", "DELETE");
      return row;
    }
    const roles = element("select");
    options(roles, this.#roles.includes(role) ? this.#roles : [...this.#roles, role], role);
    roles.ariaLabel = `Role of ${user}`;
    roles.dataset.focus = `role ${user}`;
    roles.dataset.role = role;
    // Not when another one is chosen: the arrow keys choose each role on the way.
    const set = button("plain", "Set", async () => {
      if (roles.value !== role && !await this.#member("PUT", user, { role: roles.value })) roles.value = role;
    });
    set.ariaLabel = `Set the role of ${user}`;
    set.dataset.focus = `set ${user}`;
    row.append(roles, set);
    if (isMuted) act("Unmute", "PUT", { muted_until: 0 });
    else act("Mute 1 h", "PUT", { muted_until: Date.now() + MUTE_MS });
    act("Remove", "DELETE");
    act("Ban", "PUT", { state: "banned" }, true);
    return row;
  }

  #drawEnds() {
    const { user, token, room } = this.#where();
    const ends = [];
    const isIn = this.#record?.members.some((one) => one.user === user && one.state === "in");
    if (isIn) {
      ends.push(this.#twice("Leave this room", "Leave: sure?", async () => {
        if (await this.#member("DELETE", user)) this.close();
      }));
    }
    const others = this.#others();
    if (this.#record?.kind === "dm" && isIn && others.length === 1) {
      const path = `v1/users/${encodeURIComponent(user)}/blocks/${encodeURIComponent(others[0])}`;
      // Whether one is blocked is not told: both are possible.
      const block = (content, method, said) => button("plain", `${content} ${others[0]}`, async () => {
        if (await this.#change(method, path)) this.#say(said, false);
      });
      ends.push(block("Block", "PUT", `${others[0]} is blocked: nothing is written here until you end that.`));
      ends.push(block("Unblock", "DELETE", `${others[0]} is not blocked by you.`));
    }
    if (this.#record && this.#level === 2 && grants(token, user, "erase", room)) {
      ends.push(this.#twice("End this room", "End it for all, for good: sure?", () => this.#change("DELETE", roomPath(room))));
    }
    $("ends").replaceChildren(...ends);
    $("ends").hidden = ends.length === 0;
  }

  /** A button that asks back. */
  #twice(content, question, act) {
    let timer = 0;
    const calm = () => {
      clearTimeout(timer);
      made.textContent = content;
    };
    const made = button("plain bad", content, () => {
      if (made.textContent === question) {
        calm();
        act();
      } else {
        made.textContent = question;
        timer = setTimeout(calm, SURE_MS);
      }
    });
    // Where a click does not focus a button, it never loses the focus: then the time ends it.
    made.addEventListener("blur", calm);
    return made;
  }
}
