// The AI SDK with OpenAI's own provider: responses, and what it refers to of earlier ones by id.
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, jsonSchema, streamText, tool } from "ai";

const { EXPERTD_URL: baseURL, EXPERTD_MODEL: name, EXPERTD_QUESTION: content } = process.env;
let referred = 0;
const counted = (url, options) => {
  referred += JSON.parse(options.body).input.filter((item) => item.type === "item_reference").length;
  return fetch(url, options);
};
const model = createOpenAI({ baseURL, apiKey: "none", fetch: counted })(name);
const check = (holds) => { if (!holds) throw new Error("not as it should be"); };
const ask = { model, maxOutputTokens: 16, maxRetries: 0 };
const again = { role: "user", content: "Again." };

let messages = [{ role: "user", content }];
const whole = await generateText({ ...ask, messages });
check(whole.text && whole.usage.outputTokens);
messages = [...messages, ...whole.response.messages, again];
check((await generateText({ ...ask, messages })).text && referred);
console.log("plain");

let said = "";
const stream = streamText({ ...ask, messages });
for await (const part of stream.textStream) said += part;
check(said && (await stream.usage).outputTokens);
console.log("streamed");

const schema = { type: "object", properties: { city: { enum: ["Oslo", "Rome"] } }, required: ["city"],
                 additionalProperties: false };
const weather = tool({ description: "The weather in a city.", inputSchema: jsonSchema(schema),
                       execute: async ({ city }) => `9 degrees in ${city}` });
const calling = { ...ask, tools: { weather }, toolChoice: "required", maxOutputTokens: 96, temperature: 0,
                  providerOptions: { openai: { parallelToolCalls: false } } };
const called = await generateText({ ...calling, messages });
check(called.toolCalls.length && ["Oslo", "Rome"].includes(called.toolCalls[0].input.city));
const before = referred;
messages = [...messages, ...called.response.messages];
check((await generateText({ ...ask, tools: { weather }, messages })).usage.outputTokens && referred > before);
console.log("tools");
