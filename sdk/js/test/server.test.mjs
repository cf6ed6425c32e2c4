// server.js: tokens against Node's own crypto, signatures against the example of the specification of Standard Webhooks.

import assert from "node:assert/strict";
import { createHmac, createPublicKey, generateKeyPairSync, verify } from "node:crypto";
import { test } from "node:test";

import { HookError, signToken, verifyHook } from "../server.js";

const parts = (token) => token.split(".").map((part) => Buffer.from(part, "base64url"));

test("a token with HS256", async () => {
  const secret = "a secret of 32 bytes, or of more than that";
  const token = await signToken({ user: "김", grants: [{ rooms: "chat:*", can: ["read"] }], ttl: 60, info: { name: "Kim" } }, secret, { now: 1_800_000_000_500 });
  const [head, claims, signature] = parts(token);
  assert.deepEqual(JSON.parse(head), { alg: "HS256", typ: "JWT" });
  assert.deepEqual(JSON.parse(claims), { sub: "김", iat: 1_800_000_000, exp: 1_800_000_060, grants: [{ rooms: "chat:*", can: ["read"] }], info: { name: "Kim" } });
  assert.deepEqual(signature, createHmac("sha256", secret).update(token.slice(0, token.lastIndexOf("."))).digest());
});

for (const [alg, type, options, details] of [
  ["RS256", "rsa", { modulusLength: 2048 }, {}],
  ["ES256", "ec", { namedCurve: "P-256" }, { dsaEncoding: "ieee-p1363" }],
  ["EdDSA", "ed25519", {}, {}],
]) {
  test(`a token with ${alg}`, async () => {
    const { privateKey, publicKey } = generateKeyPairSync(type, { ...options, publicKeyEncoding: { type: "spki", format: "pem" }, privateKeyEncoding: { type: "pkcs8", format: "pem" } });
    const token = await signToken({ user: "kim", grants: [] }, privateKey, { alg, kid: "k1" });
    const [head, , signature] = parts(token);
    assert.deepEqual(JSON.parse(head), { alg, typ: "JWT", kid: "k1" });
    const signed = Buffer.from(token.slice(0, token.lastIndexOf(".")));
    assert.ok(verify(alg === "EdDSA" ? null : "sha256", signed, { key: createPublicKey(publicKey), ...details }, signature));
  });
}

test("what would make a useless token is refused", async () => {
  for (const [claims, key, options] of [
    [{ user: "", grants: [] }, "s"],
    [{ user: "$natter", grants: [] }, "s"],
    [{ user: "kim" }, "s"],
    [{ user: "kim", grants: [] }, ""],
    [{ user: "kim", grants: [], exp: 1_800_000_000_000 }, "s"],
    [{ user: "kim", grants: [], ttl: "1h" }, "s"],
    [{ user: "kim", grants: [] }, "s", { alg: "none" }],
    [{ user: "kim", grants: [] }, "not PEM", { alg: "ES256" }],
  ]) {
    await assert.rejects(signToken(claims, key, options), TypeError, JSON.stringify(claims));
  }
});

// https://github.com/standard-webhooks/standard-webhooks: the example of the libraries.
const SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
const ID = "msg_p5jXN8AQM9LWM0D4loKWxJek";
const AT = 1_614_265_330;
const BODY = '{"test": 2432232314}';
const SIGNATURE = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";
const OTHER = "whsec_" + Buffer.alloc(32, 7).toString("base64");
const headers = (more = {}) => ({ "webhook-id": ID, "webhook-timestamp": String(AT), "webhook-signature": SIGNATURE, ...more });
const now = AT * 1000;

test("a signature of Standard Webhooks is checked", async () => {
  assert.deepEqual(await verifyHook(headers(), BODY, SECRET, { now }), { test: 2_432_232_314 });
  assert.deepEqual(await verifyHook(new Headers(headers()), Buffer.from(BODY), [OTHER, SECRET], { now }), { test: 2_432_232_314 });
  const several = headers({ "webhook-signature": `v1a,xxx v1,!!! v1,${Buffer.alloc(32).toString("base64")} ${SIGNATURE}` });
  assert.ok(await verifyHook(several, BODY, SECRET, { now }));
  assert.ok(await verifyHook({ "Webhook-Id": ID, "Webhook-Timestamp": [String(AT)], "Webhook-Signature": SIGNATURE }, BODY, SECRET, { now }));
});

test("what is not from natter, or not from now, is refused", async () => {
  const refused = (code, given, body = BODY, secret = SECRET, options = { now }) =>
    assert.rejects(verifyHook(given, body, secret, options), (error) => error instanceof HookError && error.code === code, code);
  await refused("bad_signature", headers(), BODY + " ");
  await refused("bad_signature", headers(), BODY, OTHER);
  await refused("bad_signature", headers({ "webhook-id": "other" }));
  await refused("bad_signature", headers({ "webhook-signature": SIGNATURE.slice(3) }));
  await refused("bad_signature", headers({ "webhook-timestamp": String(AT + 1) }));
  await refused("too_old", headers(), BODY, SECRET, { now: now + 301_000 });
  await refused("too_new", headers(), BODY, SECRET, { now: now - 301_000 });
  await refused("too_old", headers(), BODY, SECRET, { now: now + 11_000, tolerance: 10 });
  await refused("bad_timestamp", headers({ "webhook-timestamp": "yesterday" }));
  await refused("missing_header", headers({ "webhook-signature": undefined }));
  const signed = createHmac("sha256", Buffer.from(SECRET.slice(6), "base64")).update(`${ID}.${AT}.no JSON`).digest("base64");
  await refused("bad_json", headers({ "webhook-signature": `v1,${signed}` }), "no JSON");
  await assert.rejects(verifyHook(headers(), BODY, "whsec_c2hvcnQ=", { now }), TypeError);
  await assert.rejects(verifyHook(headers(), BODY, [], { now }), HookError);
});
