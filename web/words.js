// What the page says: errors and what natter tells of a room, as sentences for people.

const clockFormat = new Intl.DateTimeFormat(undefined, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const dayFormat = new Intl.DateTimeFormat(undefined, { year: "numeric", month: "short", day: "numeric" });
const today = () => new Date().toDateString();

export const NATTER = "$natter"; // who says what natter itself says

export function clock(ms) {
  const time = new Date(ms);
  const day = time.toDateString() === today() ? "" : `${dayFormat.format(time)}, `;
  return day + clockFormat.format(time);
}

export function duration(ms) {
  const seconds = Math.ceil(ms / 1000);
  if (seconds < 90) return `${seconds} s`;
  return seconds < 5400 ? `${Math.ceil(seconds / 60)} min` : `${Math.ceil(seconds / 3600)} h`;
}

export function size(bytes) {
  if (!Number.isFinite(bytes) || bytes < 0) return "";
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  for (; bytes >= 1024 && unit < units.length - 1; unit += 1) bytes /= 1024;
  return `${unit === 0 || bytes >= 10 ? Math.round(bytes) : bytes.toFixed(1)} ${units[unit]}`;
}

export function element(name, className, content = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.textContent = content;
  return made;
}

export function button(className, content, act) {
  const made = element("button", className, content);
  made.type = "button";
  made.addEventListener("click", act);
  return made;
}

/** An error of the edge, in `room`. Its `message` is for people, but of a developer's kind. */
export function sentence({ code, message = "", retry_after_ms: after }, room) {
  const detail = message
    .replaceAll(room || "\n", "this room")
    .replace(/^this user is/, "you are")
    .replace(/^this user/, "you")
    .replace(/(\d{12,}) \(ms since 1970\)/, (_, ms) => clock(Number(ms)));
  const again = after == null ? "Try again." : `Try again in ${duration(after)}.`;
  switch (code) {
    case "forbidden": return `Not allowed: ${detail}.`;
    case "rate_limited": return /slow mode/.test(message) ? `The room is in slow mode. ${again}` : `Too much at once. ${again}`;
    case "conflict": return "Somebody else has changed it meanwhile. Look at what is there now, and save again.";
    case "too_large": return `Too large: ${detail}.`;
    case "limit": return `A limit is reached: ${detail}.`;
    case "bad_request": case "bad_id": case "bad_room": return `That is not possible: ${detail}.`;
    case "unknown_room": return "Nobody has made this room.";
    case "unknown_namespace": return `There is no such namespace: ${detail}.`;
    case "unauthorized": return "The token is not valid any more. Enter a new one.";
    case "unavailable": case "unknown_outcome": return `It can't be done just now. ${again}`;
    case "disconnected": case "timeout": return "The edge did not answer. Try again.";
    case "out": return "You are not in this room.";
    default: return `It failed: ${detail} (${code}).`;
  }
}

/** Why somebody is not in a room any more: the code of `kicked`. */
export function whyOut(code) {
  switch (code) {
    case "removed": return "You are not a member of this room any more.";
    case "banned": return "You were banned from this room.";
    case "closed": return "This room has ended.";
    case "forbidden": return "Your token does not cover this room any more.";
    default: return `You are not in this room any more (${code}).`;
  }
}

/** What a room is called. */
export function titleOf({ title, kind, peers, ref, room }) {
  if (title) return title;
  if (kind === "dm" && peers?.length > 0) return ref ? `${peers.join(", ")} · ${ref}` : peers.join(", ");
  return ref || room;
}

const ROLES = { owner: "an owner", moderator: "a moderator", member: "a member", reader: "a reader" };

function settingsOf({ by, title, info, archived, frozen, slow_mode_s: slow, assignee, alert }) {
  const said = [];
  if (title != null) said.push(title ? `called the room “${title}”` : "took the title away");
  if (info != null) said.push("changed what is kept with the room");
  if (frozen != null) said.push(frozen ? "froze the room: only moderators write" : "let everybody write again");
  if (slow != null) said.push(slow > 0 ? `set ${duration(slow * 1000)} between two messages` : "ended slow mode");
  if (archived != null) said.push(archived ? "put the room aside" : "took the room up again");
  if (assignee != null) said.push(assignee ? `gave the room to ${assignee}` : "gave the room to nobody");
  if (alert != null) said.push("has seen to the alert");
  return `${by} ${said.join(", ") || "changed the room"}`;
}

/** An entry of kind `system`: what was changed about the room, and by whom. */
export function told(body) {
  const { action, by = "somebody", user = "somebody", role, muted_until: until } = body ?? {};
  switch (action) {
    case "created": return `${by} made this room`;
    case "added":
      if (by === user) return `${user} came back`;
      return `${by} added ${user}${role && role !== "member" && ROLES[role] ? ` as ${ROLES[role]}` : ""}`;
    case "role": return `${by} made ${user} ${ROLES[role] ?? role}`;
    case "muted": return `${by} muted ${user}${until ? ` until ${clock(until)}` : ""}`;
    case "unmuted": return `${by} let ${user} write again`;
    case "banned": return `${by} banned ${user}`;
    case "removed": return `${by} removed ${user}`;
    case "left": return `${user} left`;
    case "settings": return settingsOf(body);
    case "pinned": return `${by} pinned a message`;
    case "unpinned": return `${by} unpinned a message`;
    case "closed": return `${by} ended this room`;
    case "alert": return `${by} raised an alert`;
    default: return `${by} changed the room (${action})`;
  }
}
