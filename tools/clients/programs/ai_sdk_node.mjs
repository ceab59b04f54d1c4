// The AI SDK with its provider for whatever speaks OpenAI's API.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, streamText, tool } from "ai";

const { EXPERTD_URL: baseURL, EXPERTD_MODEL: name, EXPERTD_QUESTION: prompt } = process.env;
const model = createOpenAICompatible({ name: "expertd", baseURL, includeUsage: true })(name);
const check = (holds) => { if (!holds) throw new Error("not as it should be"); };
const ask = { model, prompt, maxOutputTokens: 16, maxRetries: 0 };

const whole = await generateText(ask);
check(whole.text && whole.usage.outputTokens);
console.log("plain");

let said = "";
const stream = streamText(ask);
for await (const part of stream.textStream) said += part;
check(said && (await stream.usage).outputTokens);
console.log("streamed");

const schema = { type: "object", properties: { city: { enum: ["Oslo", "Rome"] } }, required: ["city"],
                 additionalProperties: false };
const tools = { weather: tool({ description: "The weather in a city.", inputSchema: jsonSchema(schema) }) };
const calling = { ...ask, tools, toolChoice: "required", maxOutputTokens: 96, temperature: 0 };
const called = (await generateText(calling)).toolCalls;
check(called.length && ["Oslo", "Rome"].includes(called[0].input.city));
const streamed = await streamText(calling).toolCalls;
check(streamed.length && ["Oslo", "Rome"].includes(streamed[0].input.city));
console.log("tools");
