// openai for Node: chat completions, responses, tools.
import OpenAI from "openai";

const { EXPERTD_URL: baseURL, EXPERTD_MODEL: model, EXPERTD_QUESTION: content } = process.env;
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const check = (holds) => { if (!holds) throw new Error("not as it should be"); };
const ask = { model, max_tokens: 16, messages: [{ role: "user", content }] };

check((await client.chat.completions.create(ask)).choices[0].message.content);
check((await client.responses.create({ model, input: content, max_output_tokens: 16 })).output_text);
console.log("plain");

let said = "", used = 0;
const options = { stream: true, stream_options: { include_usage: true } };
for await (const part of await client.chat.completions.create({ ...ask, ...options })) {
  said += part.choices[0]?.delta?.content ?? "";
  used = part.usage?.completion_tokens ?? used;
}
check(said && used);
console.log("streamed");

const parameters = { type: "object", properties: { city: { enum: ["Oslo", "Rome"] } }, required: ["city"],
                     additionalProperties: false };
const tools = { tools: [{ type: "function", function: { name: "weather", parameters } }], tool_choice: "required",
                parallel_tool_calls: false, max_tokens: 96, temperature: 0 };
const city = (call) => JSON.parse(call.function.arguments).city;
const whole = await client.chat.completions.create({ ...ask, ...tools });
check(["Oslo", "Rome"].includes(city(whole.choices[0].message.tool_calls[0])));
const final = await client.chat.completions.stream({ ...ask, ...tools }).finalChatCompletion();
check(["Oslo", "Rome"].includes(city(final.choices[0].message.tool_calls[0])));
console.log("tools");
