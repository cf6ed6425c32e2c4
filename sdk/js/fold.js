// A message as it is after its edits, reactions, deletes and annotations. The rules are those of docs/history.md.

/** @typedef {import("./protocol.js").Message} Message */

const NAMES = 100; // users of a reaction that a page names

/** @typedef {{key: string, count: number, users: Set<string>}} Reacted */

/**
 * What is known of a message. Is changed in place.
 * @typedef {Omit<Message, "reactions"> & {reactions: Map<string, Reacted>}} Folded
 */

/** Reactions are the same in NFC and without variation selectors. @param {string} key */
const normal = (key) => key.normalize("NFC").replace(/[\uFE0E\uFE0F]/g, "");

/**
 * The reaction that a body means.
 * @param {any} body
 */
function reactionOf(body) {
  const key = typeof body === "string" ? body : body?.key;
  return typeof key === "string" && key ? { key, on: body?.remove !== true } : null;
}

/**
 * From a push, or from a page.
 * @param {Message} message
 * @returns {Folded}
 */
export function folded(message) {
  /** @type {Map<string, Reacted>} */
  const reactions = new Map();
  for (const [key, { count, users }] of Object.entries(message.reactions ?? {})) {
    reactions.set(normal(key), { key, count, users: new Set(users) });
  }
  const { room: _room, ...known } = message;
  return { ...known, kind: message.kind === "message" ? undefined : message.kind, reactions };
}

/**
 * Applies an edit, delete, reaction or annotation. Applying one twice is applying it once.
 * @param {Folded} message
 * @param {Message} change
 */
export function apply(message, { kind, from, ts, body, mentions }) {
  if (kind === "edit") {
    if (message.deleted_at != null || ts < (message.edited_at ?? 0)) return;
    message.body = body;
    message.edited_at = ts;
    if (mentions) message.mentions = mentions;
  } else if (kind === "delete") {
    message.deleted_at ??= ts;
    message.body = undefined;
  } else if (kind === "reaction") {
    const { key, on } = reactionOf(body) ?? {};
    if (key !== undefined) react(message.reactions, key, from, on === true);
  } else if (kind === "annotation" && body && typeof body === "object" && !Array.isArray(body)) {
    message.annotations = { ...message.annotations, ...body };
  }
}

/**
 * @param {Map<string, Reacted>} reactions
 * @param {string} key
 * @param {string} user
 * @param {boolean} on
 */
function react(reactions, key, user, on) {
  const known = reactions.get(normal(key)) ?? { key, count: 0, users: new Set() };
  if (known.users.has(user) === on) return;
  // Of many users only some have names: whether this one is among the others is not known.
  if (known.count > known.users.size && (!on || known.users.size >= NAMES)) return;
  const users = new Set(known.users);
  if (on) users.add(user);
  else users.delete(user);
  const count = known.count + (on ? 1 : -1);
  if (count > 0) reactions.set(normal(key), { key: known.key, count, users });
  else reactions.delete(normal(key));
}

/**
 * Whether an erasure is about a message.
 * @param {{from: string, ts: number}} message
 * @param {any} body of the message of kind `erase`
 */
export function isErased({ from, ts }, body) {
  const { user, before } = body ?? {};
  return (user == null || user === from) && (before == null || ts <= before);
}
