// A WebSocket for the runner itself, in no package: it depends on no client that is tested. Text frames, pings, closes; no
// extensions. It has as much of the interface of the package `ws` as ../support.mjs uses.

import { randomBytes } from "node:crypto";
import { EventEmitter } from "node:events";
import net from "node:net";

const [TEXT, CLOSE, PING, PONG] = [1, 8, 9, 10];
const HEAD = Buffer.from("\r\n\r\n");

export class PlainSocket extends EventEmitter {
  static OPEN = 1;
  #bytes = Buffer.alloc(0);
  /** @type {Buffer[]} */ #parts = [];
  #end = { code: 1006, reason: "" };

  constructor(url, protocols = [], { headers = {} } = {}) {
    super();
    this.readyState = 0;
    const { hostname, port, pathname, host } = new URL(url);
    this.socket = net.connect({ host: hostname, port: Number(port) });
    this.socket.setNoDelay(true);
    this.socket.on("error", (error) => this.emit("error", error));
    this.socket.on("close", () => {
      this.readyState = 3;
      this.emit("close", this.#end.code, Buffer.from(this.#end.reason));
    });
    this.socket.on("data", (data) => {
      this.#bytes = this.#bytes.length ? Buffer.concat([this.#bytes, data]) : data;
      this.#read();
    });
    const lines = [`GET ${pathname} HTTP/1.1`, `Host: ${host}`, "Upgrade: websocket", "Connection: Upgrade"];
    lines.push(`Sec-WebSocket-Key: ${randomBytes(16).toString("base64")}`, "Sec-WebSocket-Version: 13");
    lines.push(`Sec-WebSocket-Protocol: ${protocols.join(", ")}`);
    for (const [name, value] of Object.entries(headers)) lines.push(`${name}: ${value}`);
    this.socket.write(`${lines.join("\r\n")}\r\n\r\n`);
  }

  send(text) {
    this.#write(TEXT, Buffer.from(text));
  }

  terminate() {
    this.socket.destroy();
  }

  #read() {
    if (this.readyState === 0) {
      const end = this.#bytes.indexOf(HEAD);
      if (end < 0) return;
      const head = this.#bytes.subarray(0, end).toString();
      if (!head.startsWith("HTTP/1.1 101")) {
        this.socket.destroy(new Error(`the edge answered ${head.split("\r\n")[0]}`));
        return;
      }
      this.#bytes = this.#bytes.subarray(end + HEAD.length);
      this.readyState = PlainSocket.OPEN;
      this.emit("open");
    }
    let at = 0;
    for (;;) {
      const frame = frameAt(this.#bytes, at);
      if (!frame) break;
      at = frame.end;
      this.#take(frame);
    }
    this.#bytes = this.#bytes.subarray(at);
  }

  #take({ isLast, opcode, payload }) {
    if (opcode === PING) this.#write(PONG, payload);
    else if (opcode === CLOSE) {
      if (payload.length >= 2) this.#end = { code: payload.readUInt16BE(0), reason: payload.subarray(2).toString() };
      else this.#end = { code: 1005, reason: "" };
      this.#write(CLOSE, payload.subarray(0, 2));
      this.socket.end();
    } else if (opcode !== PONG) {
      this.#parts.push(payload);
      if (isLast) this.emit("message", Buffer.concat(this.#parts.splice(0)), false);
    }
  }

  #write(opcode, payload) {
    if (this.socket.destroyed) return;
    const mask = randomBytes(4);
    const size = payload.length;
    const head = Buffer.alloc(size < 126 ? 2 : size < 65_536 ? 4 : 10);
    head[0] = 0x80 | opcode;
    head[1] = 0x80 | (head.length === 2 ? size : head.length === 4 ? 126 : 127);
    if (head.length === 4) head.writeUInt16BE(size, 2);
    if (head.length === 10) head.writeBigUInt64BE(BigInt(size), 2);
    this.socket.write(Buffer.concat([head, mask, payload.map((byte, i) => byte ^ mask[i % 4])]));
  }
}

/** The frame that begins at a place, if all of it is there. */
function frameAt(bytes, at) {
  if (bytes.length < at + 2) return null;
  const length = bytes[at + 1] & 0x7f; // 126 and 127 say that the size is in the following bytes
  const begin = at + 2 + (length === 126 ? 2 : length === 127 ? 8 : 0);
  if (bytes.length < begin) return null;
  const isIn = { 126: () => bytes.readUInt16BE(at + 2), 127: () => Number(bytes.readBigUInt64BE(at + 2)) };
  const end = begin + (isIn[length]?.() ?? length);
  if (bytes.length < end) return null;
  return { isLast: (bytes[at] & 0x80) !== 0, opcode: bytes[at] & 0x0f, payload: bytes.subarray(begin, end), end };
}
