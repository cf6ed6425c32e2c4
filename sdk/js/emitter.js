/**
 * Events by name. A listener that throws does not disturb the others: its error is thrown outside, where the page or the
 * process reports it.
 * @template {Record<string, any>} Events
 */
export class Emitter {
  /** @type {Map<keyof Events, Set<(value: any) => void>>} */
  #listeners = new Map();

  /**
   * Calls `fn` with each event of this name; what it gives back ends that.
   * @template {keyof Events} Name
   * @param {Name} name
   * @param {(value: Events[Name]) => void} fn
   * @returns {() => void}
   */
  on(name, fn) {
    const listener = (/** @type {Events[Name]} */ value) => fn(value); // the same function twice is two listeners
    const listeners = this.#listeners.get(name) ?? new Set();
    this.#listeners.set(name, listeners.add(listener));
    return () => void listeners.delete(listener);
  }

  /**
   * @internal
   * @template {keyof Events} Name
   * @param {Name} name
   * @param {Events[Name]} value
   */
  _emit(name, value) {
    for (const listener of [...(this.#listeners.get(name) ?? [])]) {
      try {
        listener(value);
      } catch (error) {
        queueMicrotask(() => {
          throw error;
        });
      }
    }
  }
}
