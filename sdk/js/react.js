// Hooks for React 18 and 19. See README.md.

import { createContext, createElement, useCallback, useContext, useEffect, useMemo, useState, useSyncExternalStore } from "react";

import { Natter } from "./natter.js";
import { inbox, messages, presence, typing, unread } from "./store.js";

/** @typedef {import("./room.js").Room} Room */
/** @typedef {import("./room.js").SendOptions} SendOptions */
/** @typedef {import("./outbox.js").SendHandle} SendHandle */

const Context = createContext(/** @type {Natter | null} */ (null));

/** @typedef {{client: Natter}} WithClient */

/**
 * Gives the hooks below it a client: `client`, which stays connected until you `close` it, or one that it makes of the options of
 * `new Natter`, connects while it is mounted, and closes afterwards. Options that change later have no effect, except `getToken`:
 * give another `key` for another user.
 * @param {(WithClient | import("./natter.js").NatterOptions) & {children?: import("react").ReactNode}} props
 */
export function NatterProvider({ children, ...props }) {
  const given = "client" in props ? props.client : null;
  const [own] = useState(() => (given ? null : makeOwn(/** @type {import("./natter.js").NatterOptions} */ (props))));
  useEffect(() => {
    if (own && "getToken" in props) own.latest.getToken = props.getToken;
  });
  useEffect(() => (given ? given.connect() : own?.mount()), [given, own]);
  return createElement(Context.Provider, { value: given ?? own?.client ?? null }, children);
}

/** @param {import("./natter.js").NatterOptions} options */
function makeOwn(options) {
  const latest = { getToken: options.getToken };
  const { getToken } = options;
  const client = new Natter({ ...options, getToken: getToken && ((request) => /** @type {any} */ (latest.getToken)(request)) });
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let ending;
  return {
    client,
    latest,
    mount() {
      clearTimeout(ending);
      client.connect();
      return () => {
        // StrictMode mounts again at once: with the same connection.
        ending = setTimeout(() => client.close(), 0);
      };
    },
  };
}

/** The client of the `NatterProvider`. */
export function useNatter() {
  const client = useContext(Context);
  if (!client) throw new Error("there is no NatterProvider above this component");
  return client;
}

/**
 * @template Snapshot
 * @param {import("./snapshot.js").Store<Snapshot>} store
 */
const useStore = (store) => useSyncExternalStore(store.subscribe, store.getSnapshot, store.getSnapshot);

/** @param {string | Room} room */
function useRoom(room) {
  const client = useNatter();
  return typeof room === "string" ? client.room(room) : room;
}

/** What the client is doing: `{name, reason?, retryAt?}`. */
export function useConnection() {
  const client = useNatter();
  const subscribe = useCallback((/** @type {() => void} */ changed) => client.on("state", changed), [client]);
  const get = () => client.state;
  return useSyncExternalStore(subscribe, get, get);
}

/**
 * The messages of a room, which it joins: the snapshot of the store, and what can be done with it.
 * @param {string | Room} room
 */
export function useMessages(room) {
  const store = messages(useRoom(room));
  const snapshot = useStore(store);
  return useMemo(() => {
    const { loadOlder, loadNewer, jump, latest, find } = store;
    return { ...snapshot, room: store.room, loadOlder, loadNewer, jump, latest, find };
  }, [store, snapshot]);
}

/**
 * Who is in a room, which it joins.
 * @param {string | Room} room
 */
export const usePresence = (room) => useStore(presence(useRoom(room)));

/**
 * Who is typing in a room, without oneself, and a function that tells the others that one is: call it with each key.
 * @param {string | Room} room
 */
export function useTyping(room) {
  const known = useRoom(room);
  const users = useStore(typing(known));
  return useMemo(() => ({ users, typing: () => known.typing() }), [known, users]);
}

/** The rooms of the user with what is new in them. */
export function useInbox() {
  const store = inbox(useNatter());
  const snapshot = useStore(store);
  return useMemo(() => ({ ...snapshot, loadMore: store.loadMore }), [store, snapshot]);
}

/** How much is unread. */
export const useUnread = () => useStore(unread(useNatter()));

/**
 * A function that sends a message to a room: `send(body, options)` gives a handle.
 * @param {string | Room} room
 * @returns {(body: any, options?: SendOptions) => SendHandle}
 */
export function useSend(room) {
  const known = useRoom(room);
  return useCallback((body, options) => known.send(body, options), [known]);
}
