// OpenAI's own client for JavaScript, as for OpenAI and as for Azure OpenAI; and the AI SDK, which takes /v1/responses.
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, Output } from "ai";
import OpenAI, { AuthenticationError, AzureOpenAI, BadRequestError, NotFoundError } from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const { STRATA_URL: url, STRATA_KEY: apiKey, STRATA_EMBEDDINGS_URL: embeddings } = process.env;
const versions = createRequire(import.meta.url)("./package.json").dependencies;
const model = "smollm2";
const options = { apiKey, maxRetries: 0 };
const client = new OpenAI({ baseURL: `${url}/v1`, ...options });
const azure = new AzureOpenAI({ endpoint: url, apiVersion: "2024-10-21", ...options });
const user = (content) => [{ role: "user", content }];
const ask = { model, messages: user("Name the capital of France."), temperature: 0, max_completion_tokens: 24 };
const weather = { ...ask, messages: user("What is the weather in Paris?"), max_completion_tokens: 200 };
const Capital = z.object({ country: z.string().max(16), city: z.string().max(16) });
const City = z.object({ city: z.string().max(16) });
const usage = { stream: true, stream_options: { include_usage: true } };

const collect = async (stream) => {
	const chunks = [];
	for await (const chunk of stream) chunks.push(chunk);
	return chunks;
};
const text = (chunks) => chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join("");

const checks = {
	"openai: models, chat whole and streamed, usage at the end": async () => {
		assert.ok((await collect(client.models.list())).some(({ id }) => id === model));
		const whole = await client.chat.completions.create(ask);
		const chunks = await collect(await client.chat.completions.create({ ...ask, ...usage }));
		assert.ok(whole.choices[0].message.content);
		assert.equal(text(chunks), whole.choices[0].message.content);
		assert.deepEqual(chunks.at(-1).usage, whole.usage);
	},
	"openai: n, log-probabilities, stop": async () => {
		const several = await client.chat.completions.create({ ...ask, n: 2, logprobs: true, top_logprobs: 2 });
		assert.equal(several.choices.length, 2);
		assert.equal(several.choices[1].logprobs.content[0].top_logprobs.length, 2);
		const whole = several.choices[0].message.content;
		const stop = whole.split(" ")[2];
		const stopped = await client.chat.completions.create({ ...ask, stop });
		assert.equal(stopped.choices[0].message.content, whole.slice(0, whole.indexOf(stop)));
	},
	"openai: chat.completions.parse with a zod model, also streamed": async () => {
		const form = { ...weather, response_format: zodResponseFormat(Capital, "capital") };
		const parsed = (await client.chat.completions.parse(form)).choices[0].message.parsed;
		assert.deepEqual(Capital.parse(parsed), parsed);
		const streamed = await client.chat.completions.stream(form).finalChatCompletion();
		assert.deepEqual(streamed.choices[0].message.parsed, parsed);
	},
	"openai: a tool that must be called, whole and streamed": async () => {
		const tools = [zodFunction({ name: "weather", parameters: City })];
		const form = { ...weather, tools, tool_choice: "required" };
		const [call] = (await client.chat.completions.parse(form)).choices[0].message.tool_calls;
		City.parse(call.function.parsed_arguments);
		const streamed = await client.chat.completions.stream(form).finalChatCompletion();
		assert.equal(streamed.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
	},
	"openai: runTools calls the function, reads its result, and ends": async () => {
		const asked = [];
		const run = ({ city }) => (asked.push(city), `It is sunny in ${city}.`);
		const tool = zodFunction({ name: "weather", parameters: City, function: run });
		const one = { tools: [tool], tool_choice: { type: "function", function: { name: "weather" } } };
		const runner = client.chat.completions.runTools({ ...weather, ...one });
		const calls = [];
		runner.on("functionToolCallResult", (result) => calls.push(result));
		await runner.done();
		assert.ok(asked.length > 0 && calls[0].startsWith("It is sunny in "));
	},
	"openai: completions": async () => {
		const prompt = { model, prompt: "The capital of France is", max_tokens: 8, temperature: 0 };
		const whole = await client.completions.create(prompt);
		const chunks = await collect(await client.completions.create({ ...prompt, stream: true }));
		assert.equal(chunks.map((chunk) => chunk.choices[0]?.text ?? "").join(""), whole.choices[0].text);
	},
	"openai: responses, whole, streamed and parsed": async () => {
		const input = { model, input: "Name the capital of France.", temperature: 0, max_output_tokens: 24 };
		const whole = await client.responses.create(input);
		assert.ok(whole.output_text);
		const streamed = await client.responses.stream(input).finalResponse();
		assert.equal(streamed.output[0].content[0].text, whole.output_text);
		const format = zodTextFormat(Capital, "capital");
		Capital.parse((await client.responses.parse({ ...input, max_output_tokens: 200, text: { format } })).output_parsed);
	},
	"openai: embeddings": async () => {
		const other = new OpenAI({ baseURL: `${embeddings}/v1`, ...options });
		const answer = await other.embeddings.create({ model: "minilm", input: ["one", "two"] });
		assert.deepEqual(answer.data.map(({ embedding }) => embedding.length), [384, 384]);
	},
	"openai: errors are of their classes": async () => {
		const stranger = new OpenAI({ baseURL: `${url}/v1`, apiKey: "another", maxRetries: 0 });
		await assert.rejects(stranger.models.list(), AuthenticationError);
		await assert.rejects(client.chat.completions.create({ ...ask, model: "nobody" }), NotFoundError);
		await assert.rejects(client.chat.completions.create({ ...ask, temperature: 3 }), BadRequestError);
	},
	"openai: AzureOpenAI, whole and streamed": async () => {
		const whole = await client.chat.completions.create(ask);
		assert.equal((await azure.chat.completions.create(ask)).choices[0].message.content, whole.choices[0].message.content);
		const chunks = await collect(await azure.chat.completions.create({ ...ask, ...usage }));
		assert.equal(text(chunks), whole.choices[0].message.content);
		await assert.rejects(azure.chat.completions.create({ ...ask, model: "nobody" }), NotFoundError);
	},
	"ai: firecrawl#4126, an extraction through /v1/responses, which is what the AI SDK takes by itself": async () => {
		const provider = createOpenAI({ baseURL: `${url}/v1`, apiKey });
		const settings = { temperature: 0, maxOutputTokens: 200, maxRetries: 0, prompt: "Name the capital of France." };
		const { output, response } = await generateText({
			model: provider(model),
			output: Output.object({ schema: Capital }),
			...settings,
		});
		assert.deepEqual(Capital.parse(output), output);
		assert.match(response.id, /^resp_/);
	},
};

let failed = 0;
for (const [name, check] of Object.entries(checks)) {
	const began = performance.now();
	const what = name.replace(/^(\w+)/, (used) => `${used} ${versions[used]} (npm)`);
	try {
		await check();
		console.log(`ok  ${what} (${((performance.now() - began) / 1000).toFixed(1)} s)`);
	} catch (error) {
		failed += 1;
		console.error(error);
		console.log(`FAILED  ${what}`);
	}
}
process.exitCode = failed > 0 ? 1 : 0;
