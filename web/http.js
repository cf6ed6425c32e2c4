// Requests over HTTP, with the token of the session.

const ANSWER_MS = 15_000; // longer than an edge waits for its database

/**
 * Gives the answer, null where it is empty; rejects with {code, message, retry, retry_after_ms?, status}.
 * @param {string} path relative to the page; parts of it that come from people go through `encodeURIComponent`
 */
export async function request(token, method, path, { body, headers } = {}) {
  let response, answer;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      method,
      headers: { Authorization: `Bearer ${token}`, ...headers },
      body: body === undefined ? undefined : JSON.stringify(body),
      signal: AbortSignal.timeout(ANSWER_MS),
    });
    const text = await response.text();
    answer = text ? JSON.parse(text) : null;
  } catch {
    throw { code: "disconnected", message: "the edge did not answer", retry: true };
  }
  if (response.ok) return answer;
  throw { code: "internal", message: `HTTP status ${response.status}`, ...answer, status: response.status };
}

export const roomPath = (room) => `v1/rooms/${encodeURIComponent(room)}`;
export const memberPath = (room, user) => `${roomPath(room)}/members/${encodeURIComponent(user)}`;
