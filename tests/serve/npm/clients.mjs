// What two clients from npm get of a running server, as JSON on standard output: node clients.mjs http://host:port/v1
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embed, generateObject, generateText, jsonSchema, streamText, tool } from "ai";
import OpenAI from "openai";

const baseURL = process.argv[2];
const schema = {
  type: "object",
  properties: { city: { enum: ["Oslo", "Rome"] }, days: { type: "integer", minimum: 1, maximum: 3 } },
  required: ["city", "days"],
  additionalProperties: false,
};
const messages = [{ role: "user", content: "Hello" }];

async function official() {
  const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
  const asked = { model: "tiny", messages, max_tokens: 8, seed: 4 };
  let streamed = "";
  for await (const chunk of await client.chat.completions.create({ ...asked, stream: true }))
    streamed += chunk.choices[0]?.delta.content ?? "";
  const called = await client.chat.completions.create({
    ...asked,
    max_tokens: 300,
    tool_choice: "required",
    tools: [{ type: "function", function: { name: "weather", parameters: schema } }],
  });
  const first = await client.responses.create({ model: "tiny", input: "Hello", max_output_tokens: 8, temperature: 0 });
  const then = { model: "tiny", input: "More", max_output_tokens: 8, temperature: 0, previous_response_id: first.id };
  const second = await client.responses.create(then);
  const wrong = await client.completions.create({ model: "nobody", prompt: "x" }).catch((error) => error);
  return {
    completion: (await client.completions.create({ model: "tiny", prompt: "Once", max_tokens: 8, temperature: 0 })).choices[0].text,
    chat: (await client.chat.completions.create(asked)).choices[0].message.content,
    streamed: streamed.trim(),
    call: JSON.parse(called.choices[0].message.tool_calls[0].function.arguments),
    responses: [first.output_text, second.output_text],
    embedding: (await client.embeddings.create({ model: "tiny", input: "a cat" })).data[0].embedding.length,
    models: (await client.models.list()).data.map((model) => model.id),
    error: [wrong instanceof OpenAI.NotFoundError, wrong.status, wrong.code],
  };
}

async function vercel() {
  const rookery = createOpenAICompatible({ name: "rookery", baseURL, supportsStructuredOutputs: true });
  const asked = { model: rookery("tiny"), messages, maxOutputTokens: 8, seed: 4, maxRetries: 0 };
  const stream = streamText(asked);
  let streamed = "";
  for await (const piece of stream.textStream) streamed += piece;
  const called = await generateText({
    ...asked,
    maxOutputTokens: 300,
    toolChoice: "required",
    tools: { weather: tool({ description: "What the weather is", inputSchema: jsonSchema(schema) }) },
  });
  const object = await generateObject({ ...asked, maxOutputTokens: 300, schema: jsonSchema(schema) });
  const { embedding } = await embed({ model: rookery.embeddingModel("tiny"), value: "a cat", maxRetries: 0 });
  return {
    completion: (await generateText({ model: rookery.completionModel("tiny"), prompt: "Once", maxOutputTokens: 8, seed: 4 })).text,
    chat: (await generateText(asked)).text,
    streamed: streamed.trim(),
    usage: (await stream.usage).outputTokens ?? null,
    call: called.toolCalls[0].input,
    object: object.object,
    embedding: embedding.length,
  };
}

console.log(JSON.stringify({ openai: await official(), vercel: await vercel() }));
