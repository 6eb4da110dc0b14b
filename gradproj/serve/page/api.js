// Requests to the server that sent this page.

const SECRET = "gradproj-token";

// The token comes behind the address, #token=..., which no server sees, and is kept for this tab.
export function takeToken() {
  const found = /^#token=(.+)/.exec(location.hash);
  if (!found) return false;
  let token = found[1];
  try { token = decodeURIComponent(token); } catch { /* a per cent sign of its own */ }
  keepToken(token);
  history.replaceState(null, "", location.pathname);
  return true;
}

export function keepToken(token) { sessionStorage.setItem(SECRET, token.trim()); }

function headers(more = {}) {
  const token = sessionStorage.getItem(SECRET);
  return token ? { ...more, authorization: `Bearer ${token}` } : more;
}

// Messages name the flags of `query`; here they are the page's fields.
const FIELDS = { top_k: "Highest", bottom_k: "Lowest", score: "Score", layers: "Layers", domains: "Domains", damping: "Damping",
  tokens: "Tokens that matter", text_matches: "Shared text", text: "Text" };

function inWords(message) {
  return message.replace(/: give one with --chat_template FILE/g, ": ask with a text")
    .replace(/--([a-z_]+)\b/g, (flag, name) => FIELDS[name] ?? flag);
}

async function checked(response) {
  if (response.ok) return response;
  let message = `the server answered ${response.status}`;
  try { message = inWords((await response.json()).message ?? message); } catch { /* no JSON */ }
  throw Object.assign(new Error(message), { status: response.status });
}

async function sent(path, options) {
  try {
    return await checked(await fetch(path, options));
  } catch (error) {
    if (error instanceof TypeError) throw new Error("the server does not answer: it may have ended");
    throw error;
  }
}

export async function get(path) {
  return (await sent(path, { headers: headers() })).json();
}

// Calls `take` with each event of a scan as it comes; returns the last one.
export async function events(path, question, signal, take) {
  const options = { headers: headers(), signal };
  if (question) {
    options.method = "POST";
    options.headers = headers({ "content-type": "application/json" });
    options.body = JSON.stringify(question);
  }
  const response = await sent(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", last = null;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      last = JSON.parse(line);
      if (last.event === "error") throw new Error(inWords(last.message));
      take(last);
    }
  }
  if (last?.event !== "answer") throw new Error("the server ended before its answer did");
  return last;
}
