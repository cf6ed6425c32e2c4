// For servers: tokens, signatures of requests, and what a service does for its users. Needs WebCrypto and fetch: Node 20, Deno, Bun,
// workers at the edge. Never put it into a page: whoever has the secret can be anybody.

import { NatterError, errorOf } from "./protocol.js";

export { NatterError } from "./protocol.js";

const subtle = globalThis.crypto.subtle;
const TTL_S = 3_600;
const TOLERANCE_S = 300;
const ANSWER_MS = 15_000;

/** @typedef {import("./protocol.js").Ack} Ack */
/** @typedef {import("./protocol.js").RoomRecord} RoomRecord */
/** @typedef {{rooms: string, can: string[]}} Grant */

/**
 * What a token says. `ttl`: seconds until it ends, by default an hour; or `exp`.
 * @typedef {{user: string, grants: Grant[], ttl?: number, exp?: number, info?: object, jti?: string, nbf?: number, iss?: string, aud?: string | string[]}} TokenClaims
 */

/**
 * Signs a token. `key`: the secret of `auth.hs256_secret`, or a private key (PKCS #8, as PEM) for `alg` `RS256`, `ES256` or
 * `EdDSA`; or a `CryptoKey`.
 * @param {TokenClaims} claims
 * @param {string | Uint8Array | CryptoKey} key
 * @param {{alg?: "HS256" | "RS256" | "ES256" | "EdDSA", kid?: string, now?: number}} [options] `now`: milliseconds since 1970
 * @returns {Promise<string>}
 */
export async function signToken({ user, grants, ttl = TTL_S, exp, ...more }, key, { alg = "HS256", kid, now = Date.now() } = {}) {
  if (typeof user !== "string" || !user || user.startsWith("$")) throw new TypeError(`user: not a name: ${user}`);
  if (!Array.isArray(grants)) throw new TypeError("grants: not a list; without grants a token allows nothing");
  const known = ALGORITHMS[alg];
  if (!known) throw new TypeError(`alg: ${alg} is none of ${Object.keys(ALGORITHMS).join(", ")}`);
  const iat = Math.floor(now / 1000);
  const end = exp ?? iat + ttl;
  if (!Number.isFinite(end) || end > 253_402_300_799) throw new TypeError(`exp: ${end} is not a time in seconds`);
  const claims = { sub: user, iat, exp: Math.floor(end), grants, ...more };
  const signed = `${base64url({ alg, typ: "JWT", kid })}.${base64url(claims)}`;
  const imported = key instanceof CryptoKey ? key : await importKey(alg, known, key);
  const signature = await subtle.sign(known.sign, imported, new TextEncoder().encode(signed));
  return `${signed}.${toBase64url(new Uint8Array(signature))}`;
}

/** @type {Record<string, {key: any, sign: any}>} */
const ALGORITHMS = {
  HS256: { key: { name: "HMAC", hash: "SHA-256" }, sign: "HMAC" },
  RS256: { key: { name: "RSASSA-PKCS1-v1_5", hash: "SHA-256" }, sign: "RSASSA-PKCS1-v1_5" },
  ES256: { key: { name: "ECDSA", namedCurve: "P-256" }, sign: { name: "ECDSA", hash: "SHA-256" } },
  EdDSA: { key: { name: "Ed25519" }, sign: "Ed25519" },
};

/**
 * @param {string} alg
 * @param {{key: any}} known
 * @param {string | Uint8Array} key
 */
async function importKey(alg, known, key) {
  if (alg === "HS256") {
    const bytes = typeof key === "string" ? new TextEncoder().encode(key) : key;
    if (bytes.length === 0) throw new TypeError("key: empty");
    return subtle.importKey("raw", /** @type {BufferSource} */ (bytes), known.key, false, ["sign"]);
  }
  const pem = typeof key === "string" ? key.match(/-----BEGIN PRIVATE KEY-----([^-]+)-----END PRIVATE KEY-----/)?.[1] : undefined;
  if (typeof key === "string" && !pem) throw new TypeError("key: not a private key in PKCS #8, as PEM");
  const der = pem ? bytesOf(pem.replace(/\s/g, "")) : /** @type {Uint8Array} */ (key);
  return subtle.importKey("pkcs8", /** @type {BufferSource} */ (der), known.key, false, ["sign"]);
}

// Requests from natter ----------------------------------------------------------------------------------------------------

/** A request that is not from natter, or not from now. Answer it with 401. */
export class HookError extends Error {
  /**
   * @param {"missing_header" | "bad_timestamp" | "too_old" | "too_new" | "bad_signature" | "bad_json"} code
   * @param {string} message
   */
  constructor(code, message) {
    super(message);
    this.name = "HookError";
    this.code = code;
  }
}

/**
 * Checks the signature of a request (Standard Webhooks), and gives its JSON. Throws a `HookError`.
 * @param {Headers | Record<string, string | string[] | undefined>} headers
 * @param {string | Uint8Array} body exactly as it came
 * @param {string | string[]} secrets `whsec_…`; while one is exchanged, both
 * @param {{tolerance?: number, now?: number}} [options] `tolerance`: seconds that the clocks may differ, 300 by default; `now`:
 *   milliseconds since 1970
 * @returns {Promise<any>}
 */
export async function verifyHook(headers, body, secrets, { tolerance = TOLERANCE_S, now = Date.now() } = {}) {
  const [id, timestamp, signatures] = ["webhook-id", "webhook-timestamp", "webhook-signature"].map((name) => header(headers, name));
  const at = Number(timestamp);
  if (!/^\d{1,12}$/.test(timestamp)) throw new HookError("bad_timestamp", `webhook-timestamp is no time: ${timestamp}`);
  if (at < now / 1000 - tolerance) throw new HookError("too_old", "webhook-timestamp is too old");
  if (at > now / 1000 + tolerance) throw new HookError("too_new", "webhook-timestamp is in the future");
  const bytes = typeof body === "string" ? new TextEncoder().encode(body) : body;
  const signed = new TextEncoder().encode(`${id}.${timestamp}.`);
  const all = new Uint8Array([...signed, ...bytes]);
  const shown = signatures.split(" ").filter((one) => one.startsWith("v1,")).map((one) => one.slice(3));
  for (const secret of [secrets].flat()) {
    const key = await subtle.importKey("raw", secretBytes(secret), ALGORITHMS.HS256.key, false, ["verify"]);
    for (const signature of shown) {
      let given;
      try {
        given = bytesOf(signature);
      } catch {
        continue; // not base64: not one of ours
      }
      if (await subtle.verify("HMAC", key, given, all)) return parsed(bytes);
    }
  }
  throw new HookError("bad_signature", "no signature of these secrets");
}

/** @param {Uint8Array} bytes */
function parsed(bytes) {
  try {
    return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch {
    throw new HookError("bad_json", "the body is not JSON");
  }
}

/**
 * @param {Headers | Record<string, string | string[] | undefined>} headers
 * @param {string} name
 */
function header(headers, name) {
  const found = headers instanceof Headers ? headers.get(name) : Object.entries(headers).find(([key]) => key.toLowerCase() === name)?.[1];
  const value = Array.isArray(found) ? found[0] : found;
  if (!value) throw new HookError("missing_header", `the header ${name} is missing`);
  return value;
}

/** @param {string} secret */
function secretBytes(secret) {
  let bytes;
  try {
    bytes = bytesOf(secret.replace(/^whsec_/, ""));
  } catch {
    throw new TypeError("secret: not whsec_ and base64");
  }
  if (bytes.length < 24 || bytes.length > 64) throw new TypeError(`secret: ${bytes.length} bytes, not 24 to 64`);
  return bytes;
}

// What a service does -----------------------------------------------------------------------------------------------------

/**
 * The requests of a service over HTTP, with a token that has the rights for them.
 */
export class Backend {
  #url;
  #token;
  #fetch;

  /**
   * @param {{url: string, token: string | (() => string | Promise<string>), fetch?: typeof fetch}} options `url` of an edge, or of what
   *   stands before them
   */
  constructor({ url, token, fetch: get = globalThis.fetch }) {
    this.#url = url.replace(/\/$/, "");
    this.#token = token;
    this.#fetch = get;
  }

  /**
   * Publishes a message. With an `id` it may be repeated. `as`: in the name of this user, which needs the right `admin`.
   * @param {string} room
   * @param {any} body
   * @param {{id?: string, as?: string, kind?: string, target?: string, reply_to?: string, mentions?: string[]}} [options]
   * @returns {Promise<Ack>}
   */
  publish(room, body, { as, ...fields } = {}) {
    const query = as === undefined ? "" : `?as=${encodeURIComponent(as)}`;
    return this.request("POST", `rooms/${encodeURIComponent(room)}/messages${query}`, { body, ...fields });
  }

  /**
   * Publishes up to 100 messages; the answers are in their order.
   * @param {{room: string, body: any, id?: string, as?: string, kind?: string, target?: string, reply_to?: string, mentions?: string[]}[]} messages
   * @returns {Promise<(Ack | {error: {code: string, message: string, retry: boolean, retry_after_ms?: number}})[]>}
   */
  async publishAll(messages) {
    const { results } = await this.request("POST", "messages", { messages });
    return results;
  }

  /**
   * Makes a room, or finds it.
   * @param {{namespace: string, kind: "dm" | "group" | "open", ref?: string, key?: string, name?: string, members?: string[], title?: string, info?: any}} fields
   * @returns {Promise<RoomRecord>}
   */
  createRoom(fields) {
    return this.request("POST", "rooms", fields);
  }

  /**
   * Adds a member, or changes one.
   * @param {string} room
   * @param {string} user
   * @param {{role?: string, state?: "in" | "banned", muted_until?: number}} [change]
   * @returns {Promise<RoomRecord>}
   */
  setMember(room, user, change = {}) {
    return this.request("PUT", `rooms/${encodeURIComponent(room)}/members/${encodeURIComponent(user)}`, change);
  }

  /**
   * @param {string} room
   * @param {string} user
   */
  removeMember(room, user) {
    return this.request("DELETE", `rooms/${encodeURIComponent(room)}/members/${encodeURIComponent(user)}`);
  }

  /**
   * Ends all sessions of a user, or those in one room.
   * @param {string} user
   * @param {string} [room]
   * @returns {Promise<{sessions: number, edges: number, missing: number}>}
   */
  endSessions(user, room) {
    const path = room === undefined ? `users/${encodeURIComponent(user)}/sessions` : `rooms/${encodeURIComponent(room)}/sessions/${encodeURIComponent(user)}`;
    return this.request("DELETE", path);
  }

  /**
   * Any request below `/v1/`.
   * @param {string} method
   * @param {string} path what comes from people goes through `encodeURIComponent`
   * @param {any} [body]
   * @returns {Promise<any>}
   */
  async request(method, path, body) {
    const token = typeof this.#token === "function" ? await this.#token() : this.#token;
    let response;
    let answer;
    try {
      response = await this.#fetch(`${this.#url}/v1/${path}`, {
        method,
        headers: { authorization: `Bearer ${token}` },
        body: body === undefined ? undefined : JSON.stringify(body),
        signal: AbortSignal.timeout(ANSWER_MS),
      });
      const text = await response.text();
      answer = text ? JSON.parse(text) : null;
    } catch (cause) {
      throw new NatterError("disconnected", "the edge did not answer", { retry: true, cause, status: response?.status });
    }
    if (response.ok) return answer;
    throw errorOf(answer, response.status);
  }
}

// Bytes -------------------------------------------------------------------------------------------------------------------

/** @param {string} base64 */
const bytesOf = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));

/** @param {Uint8Array} bytes */
const toBase64url = (bytes) =>
  btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""))
    .replaceAll("+", "-")
    .replaceAll("/", "_")
    .replaceAll("=", "");

/** @param {any} value */
const base64url = (value) => toBase64url(new TextEncoder().encode(JSON.stringify(value)));
