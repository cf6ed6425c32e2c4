// The network between a client and an edge: a TCP relay that can be cut, frozen, muted, stalled and slowed down.

import { once } from "node:events";
import net from "node:net";

import { within } from "../support.mjs";

export class Wire {
  /** Passes connections on to `host:port`; `tell` hears what is done to it. */
  static async start(target, tell = () => {}) {
    const wire = new Wire();
    wire.target = target;
    wire.tell = tell;
    wire.refusing = false;
    wire.delay = 0;
    wire.accepted = 0; // connections that a client has made, also those that were refused
    wire.links = new Set();
    wire.server = net.createServer({ allowHalfOpen: false }, (inner) => wire.#accept(inner)).listen(0, "127.0.0.1");
    await within(once(wire.server, "listening"), "the relay");
    wire.url = `ws://127.0.0.1:${wire.server.address().port}/ws`;
    return wire;
  }

  #accept(inner) {
    this.accepted += 1;
    if (this.refusing) {
      inner.on("error", () => {});
      inner.destroy();
      return;
    }
    const [host, port] = this.target.split(":");
    const link = { inner, outer: net.connect({ host, port: Number(port) }), isFrozen: false, isMuted: false, isStalled: false, held: [], live: 2 };
    this.links.add(link);
    this.#pass(link, link.inner, link.outer);
    this.#pass(link, link.outer, link.inner);
  }

  #pass(link, from, to) {
    from.setNoDelay(true);
    const waiting = []; // whatever timer fires first, the oldest goes first
    const deed = (act) => {
      const next = () => {
        const oldest = waiting.shift();
        if (link.isFrozen) link.held.push(oldest);
        else oldest();
      };
      waiting.push(act);
      if (this.delay > 0 || waiting.length > 1) setTimeout(next, this.delay);
      else next();
    };
    from.on("data", (data) => {
      if (link.isMuted && from === link.outer) return;
      deed(() => {
        if (to.destroyed || to.write(data)) return;
        from.pause();
        to.once("drain", () => link.isStalled || from.resume());
      });
    });
    from.on("error", () => {});
    from.on("close", () => {
      if ((link.live -= 1) === 0) this.links.delete(link);
      deed(() => to.destroy());
    });
  }

  /** Connections on both sides of which somebody is. */
  get count() {
    return [...this.links].filter(({ live }) => live === 2).length;
  }

  /** Ends all connections without a close frame. New ones are refused until `open`. */
  cut() {
    this.tell("cut");
    this.refusing = true;
    for (const { inner, outer } of this.links) {
      inner.destroy();
      outer.destroy();
    }
  }

  /** Lets connections in again, perhaps to another edge. */
  open(target = this.target) {
    this.tell("open", { target });
    this.target = target;
    this.refusing = false;
  }

  /** From now on the connections that are there take everything and give nothing, and nobody is told: they are half open. */
  freeze() {
    this.tell("freeze");
    for (const link of this.links) link.isFrozen = true;
  }

  /** What was frozen moves on, with all that was held. */
  thaw() {
    this.tell("thaw");
    for (const link of this.links) {
      link.isFrozen = false;
      for (const act of link.held.splice(0)) act();
    }
  }

  /** The connections that are there no longer carry anything from the edge to the client; what the client says arrives. */
  mute() {
    this.tell("mute");
    for (const link of this.links) link.isMuted = true;
  }

  /** Reads nothing more from the edge, as a client that is too slow. */
  stall() {
    this.tell("stall");
    for (const link of this.links) {
      link.isStalled = true;
      link.outer.pause();
    }
  }

  unstall() {
    this.tell("unstall");
    for (const link of this.links) {
      link.isStalled = false;
      link.outer.resume();
    }
  }

  slow(delay) {
    this.tell("slow", { delay });
    this.delay = delay;
  }

  close() {
    this.refusing = true;
    for (const { inner, outer } of this.links) {
      inner.destroy();
      outer.destroy();
    }
    this.server.close();
  }
}
