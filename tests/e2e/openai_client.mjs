// OpenAI's client for Node against a running server: openai_client.mjs BASE_URL MODEL PATH_OF_THE_CLIENT
import assert from "node:assert/strict";
import { pathToFileURL } from "node:url";

const [baseURL, model, path] = process.argv.slice(2);
const { default: OpenAI } = await import(pathToFileURL(path));
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "What is the capital of France?" }];
const options = { model, messages, max_tokens: 12, temperature: 0 };

const whole = await client.chat.completions.create(options);
let text = "";
let usage = null;
const stream = await client.chat.completions.create({ ...options, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, whole.choices[0].message.content);
assert.equal(usage.total_tokens, whole.usage.total_tokens);

const parameters = { type: "object", properties: { city: { type: "string", enum: ["Paris", "Rome"] } }, required: ["city"], additionalProperties: false };
const called = await client.chat.completions.create({
  ...options,
  model: "base",
  max_tokens: 60,
  tools: [{ type: "function", function: { name: "get_weather", strict: true, parameters } }],
  tool_choice: { type: "function", function: { name: "get_weather" } },
});
assert.ok("city" in JSON.parse(called.choices[0].message.tool_calls[0].function.arguments));

const shaped = await client.chat.completions.create({
  ...options,
  max_tokens: 60,
  response_format: { type: "json_schema", json_schema: { name: "place", strict: true, schema: parameters } },
});
assert.ok("city" in JSON.parse(shaped.choices[0].message.content));

const answer = await client.responses.create({ model: "base", input: messages[0].content, max_output_tokens: 12, temperature: 0 });
assert.equal(answer.output_text, "The capital of France is Paris.");

await assert.rejects(client.chat.completions.create({ ...options, model: "acme/nope" }), OpenAI.NotFoundError);
console.log(JSON.stringify({ model: whole.model }));
