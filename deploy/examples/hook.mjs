// A receiver of natter's event hooks: prints each event that is signed. `NATTER_HOOK_SECRET=whsec_… node hook.mjs 9000`
import { createHmac, timingSafeEqual } from "node:crypto";
import { createServer } from "node:http";

const key = Buffer.from(process.env.NATTER_HOOK_SECRET.replace("whsec_", ""), "base64");

// As https://www.standardwebhooks.com says; and not an old request.
function isSigned(headers, body) {
  const sent = headers["webhook-timestamp"] ?? "";
  const expected = createHmac("sha256", key).update(`${headers["webhook-id"]}.${sent}.`).update(body).digest();
  const isIt = (given) => given.length === expected.length && timingSafeEqual(given, expected);
  const given = (headers["webhook-signature"] ?? "").split(" ").map((one) => Buffer.from(one.replace("v1,", ""), "base64"));
  return Math.abs(Date.now() / 1000 - Number(sent)) < 300 && given.some(isIt);
}

createServer(async (request, response) => {
  const body = Buffer.concat(await request.toArray());
  const signed = isSigned(request.headers, body);
  if (signed) console.log(body.toString()); // An event may come again, with the same webhook-id.
  response.writeHead(signed ? 204 : 401).end();
}).listen(Number(process.argv[2]), "127.0.0.1");
