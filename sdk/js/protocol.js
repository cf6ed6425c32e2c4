// What natter.v1 says, as a client needs it: types of frames, errors, ids, references, cursors, the advice of close codes.
// Nothing in here has a state or does I/O.

/**
 * What JSON can say.
 * @typedef {any} Json
 */

/**
 * A message: a push `msg`, or an entry of a page of history. Without `kind` it is a plain message. Pushes also have the kinds
 * `edit`, `delete`, `reaction`, `annotation`, `system`, `erase`, and the client itself makes `reset` (see `Room`).
 * @typedef {object} Message
 * @property {string} [room]
 * @property {string} id
 * @property {string} from
 * @property {number} ts milliseconds since 1970
 * @property {string} [cursor] the place after the message; absent in ephemeral rooms
 * @property {Json} [body]
 * @property {string} [kind]
 * @property {string} [target]
 * @property {string} [reply_to]
 * @property {string[]} [mentions]
 * @property {number} [edited_at]
 * @property {number} [deleted_at]
 * @property {Record<string, Reaction>} [reactions]
 * @property {Record<string, Json>} [annotations]
 * @property {Replies} [replies]
 * @property {boolean} [truncated]
 */

/** @typedef {{count: number, users: string[]}} Reaction */
/** @typedef {{count: number, capped?: boolean, last?: {id: string, from: string, ts: number}}} Replies */

/** @typedef {{messages: Message[], prev?: string, next?: string, partial?: boolean}} Page */

/**
 * The reply to `join`.
 * @typedef {{room: string, cursor?: string, head?: string, replay: number, reset?: boolean, reason?: string, marker?: string}} Joined
 */

/** @typedef {{room: string, id: string, cursor?: string, ts: number, dup: boolean}} Ack */

/**
 * A push `presence`: who came or went, or how many there are.
 * @typedef {{user?: string, state?: "join" | "leave" | "unreachable" | "reachable", info?: Json, at?: number, count?: number}} PresencePush
 */

/** @typedef {{user: string, info?: Json, since?: number, state?: "unreachable"}} PresentUser */

/**
 * A room in the inbox, and what is new in it.
 * @typedef {object} Summary
 * @property {string} room
 * @property {string} [kind]
 * @property {string} [title]
 * @property {string} [ref]
 * @property {Json} [info]
 * @property {string[]} [peers]
 * @property {string} [head]
 * @property {string} [marker]
 * @property {{id: string, from: string, ts: number, text?: string}} [last]
 * @property {number} [unread]
 * @property {boolean} [capped]
 * @property {number} [mentions]
 * @property {boolean} [muted]
 * @property {boolean} [pinned]
 * @property {boolean} [archived]
 * @property {string} [assignee]
 * @property {Json} [alert]
 */

/**
 * The record of a room.
 * @typedef {object} RoomRecord
 * @property {string} room
 * @property {boolean} [created]
 * @property {"dm" | "group" | "open"} kind
 * @property {{user: string, role: string, state: string, muted_until?: number}[]} members
 * @property {string} [title]
 * @property {string} [ref]
 * @property {Json} [info]
 * @property {number} at
 * @property {string} by
 * @property {boolean} [archived]
 * @property {boolean} [frozen]
 * @property {number} [slow_mode_s]
 * @property {string} [assignee]
 * @property {Json} [alert]
 * @property {boolean} [closed]
 * @property {string[]} [pins]
 * @property {string} version
 */

/** What natter, or this client, could not do. `code` is one of docs/errors.md, or one of this client's own (README.md). */
export class NatterError extends Error {
  /**
   * @param {string} code
   * @param {string} message
   * @param {{retry?: boolean, retryAfterMs?: number, status?: number, cause?: unknown}} [more]
   */
  constructor(code, message, { retry = false, retryAfterMs, status, cause } = {}) {
    super(message, cause === undefined ? undefined : { cause });
    this.name = "NatterError";
    this.code = code;
    /** Whether the same may succeed later. */
    this.retry = retry;
    this.retryAfterMs = retryAfterMs;
    /** The HTTP status, where the answer came over HTTP. */
    this.status = status;
  }
}

/**
 * The error in a frame or in the body of an HTTP answer.
 * @param {any} answer
 * @param {number} [status]
 */
export function errorOf(answer, status) {
  const { code = "internal", message, retry = false, retry_after_ms: retryAfterMs } = answer ?? {};
  return new NatterError(code, message ?? `HTTP status ${status}`, { retry, retryAfterMs, status });
}

/** The user that natter itself speaks as. */
export const NATTER = "$natter";

// Ids and references ------------------------------------------------------------------------------------------------------

const ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ";

/** A new message id: 48 bits of time and 80 of chance in Crockford's base 32 (a ULID). */
export function newId() {
  let time = Date.now();
  let head = "";
  for (let i = 0; i < 10; i += 1) {
    head = ALPHABET[time % 32] + head;
    time = Math.floor(time / 32);
  }
  return head + Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => ALPHABET[byte % 32]).join("");
}

/**
 * The reference of a message, `<user>/<id>`; of a text, the text.
 * @param {string | {from: string, id: string}} message
 */
export const refOf = (message) => (typeof message === "string" ? message : `${message.from}/${message.id}`);

/**
 * A reference in its long form: `from` is who wrote it.
 * @param {string} from
 * @param {string} ref
 */
export const longRef = (from, ref) => (ref.includes("/") ? ref : `${from}/${ref}`);

// Cursors -----------------------------------------------------------------------------------------------------------------
//
// To a client cursors are opaque. Their form (`region.epoch.sequence.fingerprint`, several joined with `_`), which
// docs/protocol.md documents, is needed only to compare them.

/**
 * The sequence of each region and epoch.
 * @param {string} cursor
 */
function places(cursor) {
  /** @type {Map<string, number>} */
  const found = new Map();
  for (const place of cursor.split("_")) {
    const [region, epoch, seq] = place.split(".");
    found.set(`${region}.${epoch}`, Number(seq));
  }
  return found;
}

/**
 * Whether a marker is at a cursor or beyond, both of one room.
 * @param {string} marker
 * @param {string} cursor
 */
export function reaches(marker, cursor) {
  const known = places(marker);
  return [...places(cursor)].every(([place, seq]) => (known.get(place) ?? 0) >= seq);
}

/**
 * The order of two cursors of one room: negative, 0, positive; `undefined` where they have none (of different logs, or of
 * two regions that did not know of each other).
 * @param {string} a
 * @param {string} b
 */
export function compareCursors(a, b) {
  if (a === b) return 0;
  const [before, after] = [reaches(b, a), reaches(a, b)];
  if (before && after) return 0;
  if (before) return -1;
  return after ? 1 : undefined;
}

// Tokens ------------------------------------------------------------------------------------------------------------------

/**
 * What a token says, unchecked: the edge is the judge. An empty object where it can't be read.
 * @param {string} token
 * @returns {{sub?: string, exp?: number, info?: any, grants?: {rooms: string, can: string[]}[]}}
 */
export function claimsOf(token) {
  try {
    const claims = token.split(".")[1].replaceAll("-", "+").replaceAll("_", "/");
    const bytes = Uint8Array.from(atob(claims), (c) => c.charCodeAt(0));
    return JSON.parse(new TextDecoder().decode(bytes)) ?? {};
  } catch {
    return {}; // not a JWT: the edge will say so
  }
}

// When to come back -------------------------------------------------------------------------------------------------------

/** What a close code advises: `back`, `later`, `token` (with another one), `never`. */
const ADVICE = new Map(
  /** @type {[number, [string, string]][]} */ ([
    [1000, ["back", "closed"]],
    [1001, ["back", "going_away"]],
    [1002, ["never", "websocket_protocol"]],
    [1003, ["never", "binary_not_supported"]],
    [1005, ["back", "closed"]],
    [1006, ["back", "connection_lost"]],
    [1007, ["never", "invalid_utf8"]],
    [1009, ["never", "frame_too_big"]],
    [1011, ["later", "internal"]],
    [1012, ["back", "going_away"]],
    [1013, ["back", "going_away"]],
    [1014, ["back", "going_away"]],
    [4001, ["token", "bad_token"]],
    [4002, ["never", "revoked"]],
    [4003, ["back", "too_slow"]],
    [4004, ["never", "protocol_error"]],
    [4005, ["later", "too_many"]],
    [4006, ["never", "disconnected"]],
    [4010, ["back", "draining"]],
  ]),
);

/**
 * What to do after a close, and its reason in a word. Codes of a newer edge: later.
 * @param {number} code
 * @param {string} [text] the reason of the close frame
 */
export function adviceOf(code, text) {
  const [advice, reason] = ADVICE.get(code) ?? ["later", `closed_${code}`];
  return { advice, reason: code >= 4000 && text ? text : reason };
}

const BACKOFF_BASE_MS = 250;
const BACKOFF_CAP_MS = 10_000;

/**
 * Exponential back-off with full jitter, so that the many clients of a dead edge do not come back in waves.
 * @param {number} attempt from 0
 */
export const backoff = (attempt) => Math.random() * Math.min(BACKOFF_CAP_MS, BACKOFF_BASE_MS * 2 ** Math.min(attempt, 16));
