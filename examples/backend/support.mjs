// The support desk of a shop, as one function from request to answer: it makes tokens and rooms for visitors, and hears of what they
// say by natter's event hooks. No framework, so that it reads the same beside yours.
import { randomUUID } from "node:crypto";

import { Backend, HookError, signToken, verifyHook } from "../../sdk/js/server.js";

const DESK = "support"; // who speaks for the shop
const MAX_BODY = 1024 * 1024; // bytes
const VISITOR = /^visitor-[0-9a-f-]{36}$/;
const EVERYTHING = ["read", "write", "presence", "history", "manage", "moderate", "follow"];

const roomOf = (visitor) => `chat:${visitor}`;

/** The visitor of this browser: a cookie that scripts of the page can't read. */
function visitorOf(request) {
  const cookie = /(?:^|;\s*)visitor=([^;]+)/.exec(request.headers.cookie ?? "")?.[1];
  return VISITOR.test(cookie ?? "") ? cookie : null;
}

async function bodyOf(request) {
  const parts = [];
  let size = 0;
  for await (const part of request) {
    size += part.length;
    if (size > MAX_BODY) throw new RangeError("the body is too large");
    parts.push(part);
  }
  return Buffer.concat(parts);
}

function answer(response, status, content, headers = {}) {
  response.writeHead(status, { "content-type": "application/json", "cache-control": "no-store", ...headers });
  response.end(content === undefined ? undefined : JSON.stringify(content));
}

/** `settings`: see settings.mjs. Gives a handler for `node:http`, which says whether it has answered. */
export function support({ url, hookSecret, operatorKey, secret }) {
  const token = (user, grants, info) => signToken({ user, grants, ttl: 900, info }, secret);
  // What this program may do itself. A token is cheap, so each request has its own.
  const backend = new Backend({ url, token: () => token(DESK, [{ rooms: "chat:*", can: EVERYTHING }]) });
  /** What waits for an answer: room -> {room, visitor, text, at}. A real desk keeps it in its database. */
  const open = new Map();
  /** `webhook-id` of the last events: each comes at least once, so it may come twice. */
  const seen = new Set();

  /** A token for the visitor's own room, which is made if it is not there. */
  async function session(request, response) {
    const visitor = visitorOf(request) ?? `visitor-${randomUUID()}`;
    const room = roomOf(visitor);
    // Making it again finds it.
    await backend.createRoom({ namespace: "chat", kind: "group", name: visitor, members: [visitor, DESK], title: "Support" });
    const grants = [{ rooms: room, can: ["read", "write", "presence", "history"] }];
    const cookie = `visitor=${visitor}; HttpOnly; SameSite=Lax; Path=/; Max-Age=31536000`;
    answer(response, 200, { url, room, token: await token(visitor, grants, { name: "Visitor" }) }, { "set-cookie": cookie });
  }

  /** An event of natter. What is done for it must not hurt when it is done twice. */
  async function hook(request, response) {
    const event = await verifyHook(request.headers, await bodyOf(request), hookSecret);
    const id = request.headers["webhook-id"];
    if (!seen.has(id)) {
      await heard(event);
      seen.add(id);
      if (seen.size > 10_000) seen.delete(seen.values().next().value);
    }
    // Without it natter would ask again, which is what it should do if `heard` has failed.
    answer(response, 204);
  }

  async function heard({ type, at, data: { room, message } }) {
    if (type !== "message.created") return;
    if (!VISITOR.test(message.from)) {
      // Somebody of the shop has answered. The greeting is no answer.
      if (message.body?.greeting !== true) open.delete(room);
      return;
    }
    open.set(room, { room, visitor: message.from, text: message.body?.text ?? "", at });
    // With an id of its own it is stored once, however often this runs.
    await backend.publish(room, { text: "Thank you for your message. We answer as soon as we can.", greeting: true }, { id: "greeting" });
  }

  const routes = {
    "POST /session": session,
    "POST /hook": hook,
    "GET /conversations": (request, response) => {
      if (request.headers.authorization !== `Bearer ${operatorKey}`) return answer(response, 401, { error: "Authorization: Bearer OPERATOR_KEY is needed" });
      return answer(response, 200, [...open.values()]);
    },
  };

  return {
    /** A link to the operators' page of the edge, for the desk. */
    operatorLink: async () => `${url}/operate#token=${await token(DESK, [{ rooms: "chat:*", can: EVERYTHING }], { name: "Support" })}&rooms=chat:*`,
    async handle(request, response) {
      const route = routes[`${request.method} ${request.url.split("?")[0]}`];
      if (!route) return false;
      try {
        await route(request, response);
      } catch (error) {
        if (error instanceof HookError) answer(response, 401, { error: error.code, message: error.message });
        else if (error instanceof RangeError) answer(response, 413, { error: "too_large", message: error.message });
        else {
          console.error(`${request.method} ${request.url}: ${error.message}`);
          answer(response, 502, { error: error.code ?? "failed", message: error.message });
        }
      }
      return true;
    },
  };
}
