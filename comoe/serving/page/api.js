"use strict";
// Shows openapi.json; what is sent and answered is told by the schemas of the server itself.

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function kind(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  const several = schema.anyOf || schema.oneOf;
  if (several) return several.map(kind).filter((word) => word !== "null").join(" or ");
  if (schema.type === "array") return "list of " + kind(schema.items || {});
  return schema.type || "any";
}

function table(schema) {
  const made = element("table");
  for (const [name, field] of Object.entries(schema.properties || {})) {
    const row = element("tr");
    const needed = (schema.required || []).includes(name) ? ", required" : "";
    row.append(element("td", "", name), element("td", "", kind(field) + needed), element("td", "", field.description || ""));
    made.append(row);
  }
  return made;
}

function example(path, method, secured) {
  const token = secured ? ' -H "Authorization: Bearer $COMOE_TOKEN"' : "";
  const body = method === "post" ? " -H 'Content-Type: application/json' \\\n  -d '{\"posts\": [\"what a lovely day :)\"]}'" : "";
  return element("pre", "", "curl " + location.origin + path + token + body);
}

function route(path, method, operation, schemas) {
  const made = element("section", "route");
  made.append(element("h2", "", method.toUpperCase() + " " + path), element("p", "", operation.description || ""));
  const asked = operation.requestBody && operation.requestBody.content["application/json"].schema;
  if (asked) made.append(table(schemas[kind(asked)]));
  made.append(example(path, method, Boolean(operation.security)));
  const answers = element("table");
  for (const [status, answer] of Object.entries(operation.responses)) {
    const row = element("tr");
    const content = answer.content && answer.content["application/json"];
    row.append(element("td", "", status), element("td", "", content ? kind(content.schema) : ""), element("td", "", answer.description));
    answers.append(row);
  }
  made.append(answers);
  return made;
}

async function show() {
  const api = await (await fetch("/openapi.json")).json();
  const parts = [];
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(methods)) parts.push(route(path, method, operation, api.components.schemas));
  }
  for (const [name, schema] of Object.entries(api.components.schemas)) {
    const made = element("section", "route");
    made.append(element("h2", "", name), element("p", "", schema.description || ""), table(schema));
    parts.push(made);
  }
  document.getElementById("routes").replaceChildren(...parts);
}

show().catch((error) => { document.getElementById("routes").textContent = error.message; });
