// What all stores have in common.

const LINGER_MS = 1_000; // a store that nobody looks at any more goes on for so long: a page that changes looks again

/**
 * Something that changes, as `useSyncExternalStore` of React wants it; made for no framework in particular. `getSnapshot` gives
 * the same object until something has changed. It does its work while somebody has subscribed.
 * @template Snapshot
 */
export class Store {
  /** @type {Set<() => void>} */ #listeners = new Set();
  /** @type {Snapshot | undefined} */ #snapshot;
  #fresh = false;
  #told = true;
  /** @type {(() => void) | null} */ #stop = null;
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #linger;

  constructor() {
    this.subscribe = this.subscribe.bind(this);
    this.getSnapshot = this.getSnapshot.bind(this);
  }

  /**
   * Calls `listener` after each change; what it gives back ends that.
   * @param {() => void} listener
   * @returns {() => void}
   */
  subscribe(listener) {
    const own = () => listener(); // the same function twice is two listeners
    this.#listeners.add(own);
    clearTimeout(this.#linger);
    this.#stop ??= this._start();
    return () => {
      if (!this.#listeners.delete(own) || this.#listeners.size > 0) return;
      clearTimeout(this.#linger);
      this.#linger = setTimeout(() => {
        this.#stop?.();
        this.#stop = null;
      }, LINGER_MS);
    };
  }

  /** @returns {Snapshot} */
  getSnapshot() {
    if (!this.#fresh) {
      this.#snapshot = Object.freeze(this._build());
      this.#fresh = true;
    }
    return /** @type {Snapshot} */ (this.#snapshot);
  }

  /** Something is different: listeners are told once for all changes of one turn. @internal */
  _change() {
    this.#fresh = false;
    if (!this.#told) return;
    this.#told = false;
    queueMicrotask(() => {
      this.#told = true;
      for (const listener of [...this.#listeners]) listener();
    });
  }

  /**
   * Begins its work; what it gives ends it.
   * @internal
   * @returns {() => void}
   */
  _start() {
    throw new Error("not written");
  }

  /** @internal @returns {Snapshot} */
  _build() {
    throw new Error("not written");
  }
}

/**
 * One store for each thing.
 * @template {WeakKey} Key
 * @template Value
 * @param {(key: Key) => Value} make
 * @returns {(key: Key) => Value}
 */
export function oneFor(make) {
  /** @type {WeakMap<Key, Value>} */
  const made = new WeakMap();
  return (key) => {
    let value = made.get(key);
    if (value === undefined) made.set(key, (value = make(key)));
    return value;
  };
}
