"use strict";
// Text comes into the page as text nodes alone: nothing of a post or of a model is ever read as HTML.

const $ = (id) => document.getElementById(id);

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function say(text, bad = false) {
  $("message").textContent = text;
  $("message").className = bad ? "bad" : "";
}

async function ask(path, body) {
  const headers = { "Content-Type": "application/json" };
  if ($("token").value) headers.Authorization = "Bearer " + $("token").value;
  const options = body === undefined ? { headers } : { method: "POST", headers, body: JSON.stringify(body) };
  const response = await fetch(path, options);
  const answer = await response.json();
  if (response.status === 401) $("bearer").hidden = false;
  if (!response.ok) throw Object.assign(new Error(answer.error.message), answer.error);
  return answer;
}

async function listModels() {
  const { models } = await ask("/v1/tasks");
  const place = $("model").selectedIndex;
  const named = new Map(models.map((one) => [one.model + " " + one.revision, one]));
  $("model").replaceChildren(...[...named.values()].map((one) => {
    const option = element("option", "", one.model + " (" + one.revision + ")");
    option.value = JSON.stringify({ model: one.model, revision: one.revision });
    return option;
  }));
  $("model").selectedIndex = Math.min(Math.max(place, 0), named.size - 1);
}

function bars(scores, chosen) {
  const grid = element("div", "bars");
  const sorted = Object.entries(scores).sort((a, b) => b[1] - a[1]);
  for (const [label, score] of sorted.slice(0, 12)) {
    const emphasis = chosen.includes(label) ? " chosen" : "";
    const track = element("div", "track");
    const fill = element("div", "fill");
    fill.style.width = (100 * Math.min(1, Math.max(0, score))).toFixed(1) + "%";
    track.append(fill);
    grid.append(element("span", "name" + emphasis, label), track, element("span", "number" + emphasis, score.toFixed(2)));
  }
  return grid;
}

function colored(weights, title) {
  const line = element("p", "words");
  const most = Math.max(...weights.map(([, weight]) => Math.abs(weight))) || 1;
  for (const [word, weight] of weights) {
    const mark = element("mark", "", word);
    const color = weight < 0 ? "rgba(70, 130, 235, " : "rgba(240, 150, 40, ";
    mark.style.backgroundColor = color + (0.7 * Math.abs(weight) / most).toFixed(3) + ")";
    mark.title = title(weight);
    line.append(mark, " ");
  }
  return line;
}

function gradients(entries) {
  return entries.flatMap((entry) => {
    const change = entry.from.toFixed(2) + " without its words, " + entry.to.toFixed(2) + " with them";
    const name = entries.length > 1 ? entry.label + ": " : "";
    return [colored(entry.words, (value) => (value < 0 ? "" : "+") + value.toFixed(3)), element("p", "note", name + change)];
  });
}

function experts(found) {
  const table = element("table");
  const head = element("tr");
  head.append(element("th", "", "word"), ...found.layers.map((layer) => element("th", "", "layer " + layer)));
  table.append(head);
  for (const [word, layers] of found.words) {
    const row = element("tr");
    const cells = layers.map((used) => used.map(([expert, gate]) => expert + ": " + gate.toFixed(2)).join(", "));
    row.append(element("td", "", word), ...cells.map((cell) => element("td", "", cell)));
    table.append(row);
  }
  return table;
}

function spans(found) {
  const line = element("p", "words");
  const begins = new Map(found.spans.map((span) => [span.start, span]));
  for (let place = 0; place < found.words.length;) {
    const span = begins.get(place);
    const end = span ? span.end : place + 1;
    const mark = element("mark", span ? "span" : "", found.words.slice(place, end).join(" "));
    if (span) mark.append(element("small", "", span.type));
    line.append(mark, " ");
    place = end;
  }
  return line;
}

function headline(found) {
  if ("label" in found) return found.label;
  if ("labels" in found) return found.labels.join(", ") || "none";
  if ("value" in found) return found.value.toFixed(2);
  if ("spans" in found) return String(found.spans.length);
  return found.answer;
}

function card(task, found) {
  const made = element("article");
  const title = element("h2", "", task);
  title.append(element("strong", "", headline(found)));
  made.append(title);
  if (found.scores && !Array.isArray(found.scores)) made.append(bars(found.scores, found.labels || [found.label]));
  const share = (weight) => (100 * weight).toFixed(1) + " % of the attention on words";
  if (found.attention) made.append(colored(found.attention, share));
  if (found.gradients) made.append(...gradients(found.gradients));
  if (found.experts) made.append(experts(found.experts));
  if (found.spans) made.append(spans(found));
  return made;
}

async function predict() {
  const post = { text: $("text").value };
  if ($("pair").value) post.pair = $("pair").value;
  const start = performance.now();
  const method = $("method").value || "attention";
  const explain = () => ask("/v1/explain", { posts: [post], method, ...JSON.parse($("model").value) });
  const answer = await explain().catch(async (error) => {
    if (error.code !== "unknown_model") throw error;
    await listModels(); // a new revision has taken over
    return explain();
  });
  const [prediction] = answer.predictions;
  if (prediction.error) throw new Error(prediction.error);
  const tasks = Object.entries(prediction).filter(([, found]) => typeof found === "object");
  $("tasks").replaceChildren(...tasks.map(([task, found]) => card(task, found)));
  const cut = prediction.truncated ? ", the post was cut to the model's length" : "";
  say(answer.model + " " + answer.revision + ", " + Math.round(performance.now() - start) + " ms" + cut);
}

async function attempt(work) {
  const button = document.querySelector("button");
  button.disabled = true;
  try {
    if (!$("model").options.length) await listModels();
    await work();
  } catch (error) {
    say(error.message, true);
  } finally {
    button.disabled = false;
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(predict);
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
attempt(async () => {});
