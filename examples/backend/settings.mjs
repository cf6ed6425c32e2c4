// What the example is told by its environment, and a clear word where natter is not there.
import fs from "node:fs";

const { env } = process;

/** Ends the program with a sentence, not with a stack. */
export function stop(sentence) {
  console.error(sentence);
  process.exit(1);
}

export const settings = {
  /** Where browsers and this program reach an edge. */
  url: (env.NATTER_URL ?? "http://127.0.0.1:8080").replace(/\/$/, ""),
  port: Number(env.PORT ?? 3000),
  /** For `verifyHook`: the same as in natter.toml. */
  hookSecret: env.HOOK_SECRET ?? "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
  /** Who may see the open conversations. */
  operatorKey: env.OPERATOR_KEY ?? "demo",
};

/** The secret that signs tokens: `auth.hs256_secret` of the edges. `natter up` makes one in its data folder. */
export function secret() {
  if (env.NATTER_SECRET) return env.NATTER_SECRET;
  const file = env.NATTER_SECRET_FILE ?? new URL("../../.natter/dev-secret", import.meta.url);
  try {
    return fs.readFileSync(file, "utf8").trim();
  } catch (error) {
    return stop(`No secret to sign tokens with: ${error.message}\nSet NATTER_SECRET, or NATTER_SECRET_FILE; natter up writes one to .natter/dev-secret.`);
  }
}

/** Waits for an edge that answers; says what to do where there is none. */
export async function reach(url) {
  try {
    const { ok, status } = await fetch(`${url}/readyz`, { signal: AbortSignal.timeout(5_000) });
    if (!ok) stop(`natter at ${url} is not ready (${status}). Is NATS there?`);
  } catch (error) {
    stop(`natter can't be reached at ${url} (${error.cause?.code ?? error.message}).\nStart it in the folder of the repository: cargo run --release -- up --config examples/backend/natter.toml\nor say where it is: NATTER_URL=https://chat.example.org npm start`);
  }
}
