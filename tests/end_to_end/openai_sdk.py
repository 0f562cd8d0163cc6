"""The official `openai` package against `flowrun serve`: argv is the base URL and the model's id."""

import asyncio
import json
import sys
import time

import openai

base_url, model = sys.argv[1], sys.argv[2]
client = openai.OpenAI(base_url=base_url, api_key="sk-test", max_retries=0)
messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is my card?"}]
greedy = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 10}


def fails(kind, **changes):
    try:
        client.chat.completions.create(**{**greedy, **changes})
    except kind as error:
        assert error.body["message"], error
        return error
    raise AssertionError(f"{changes} was answered")


ids = [m.id for m in client.models.list()]
assert ids == [model, f"{model}:one", f"{model}:two"], ids
assert client.models.retrieve(f"{model}:one").id == f"{model}:one"

whole = client.chat.completions.create(**greedy)
text = whole.choices[0].message.content
assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 10
assert whole.usage.total_tokens == whole.usage.prompt_tokens + 10
other = client.chat.completions.create(**{**greedy, "model": f"{model}:one"})
assert other.choices[0].message.content != text

stream = client.chat.completions.create(**greedy, stream=True, stream_options={"include_usage": True})
chunks = list(stream)
pieces = [c.choices[0].delta.content for c in chunks if c.choices and c.choices[0].delta.content]
assert "".join(pieces) == text and len(pieces) == 10, pieces
assert chunks[-1].usage.completion_tokens == 10 and chunks[-1].choices == []
with client.chat.completions.stream(**greedy) as events:
    assert "".join(e.delta for e in events if e.type == "content.delta") == text

many = client.chat.completions.create(**{**greedy, "temperature": 1, "n": 3, "seed": 5})
again = client.chat.completions.create(**{**greedy, "temperature": 1, "n": 3, "seed": 5})
assert [c.message.content for c in many.choices] == [c.message.content for c in again.choices]
assert len({c.message.content for c in many.choices}) > 1

probs = client.chat.completions.create(**greedy, logprobs=True, top_logprobs=2).choices[0].logprobs.content
assert "".join(p.token for p in probs) == text and all(len(p.top_logprobs) == 2 for p in probs)
assert bytes(probs[0].bytes).decode() == probs[0].token

stopped = client.chat.completions.create(**greedy, stop=text[3:5]).choices[0]
assert stopped.message.content == text[: text.index(text[3:5])] and stopped.finish_reason == "stop"

schema = {"name": "label", "strict": True, "schema": {"type": "string", "enum": ["card_arrival", "change_pin"]}}
chosen = client.chat.completions.create(**greedy, response_format={"type": "json_schema", "json_schema": schema})
assert chosen.choices[0].message.content in ('"card_arrival"', '"change_pin"')
guided = client.chat.completions.create(**greedy, extra_body={"structured_outputs": {"choice": ["a", "b"]}})
assert guided.choices[0].message.content in ("a", "b")

went_on = client.completions.create(model=model, prompt="Once upon a time", max_tokens=6, temperature=0, logprobs=1)
assert went_on.object == "text_completion" and went_on.usage.completion_tokens == 6
assert "".join(went_on.choices[0].logprobs.tokens) == went_on.choices[0].text

missing = fails(openai.NotFoundError, model="another")
assert missing.code == "model_not_found" and missing.param == "model", missing.body
assert fails(openai.BadRequestError, temperature=9).param == "temperature"
assert fails(openai.BadRequestError, tools=[{"type": "function", "function": {"name": "f"}}]).code == "unsupported_parameter"
fails(openai.BadRequestError, messages=[{"role": "user", "content": "card " * 20000}])


async def together():
    async with openai.AsyncOpenAI(base_url=base_url, api_key="sk-test", max_retries=0) as client:
        asked = [client.chat.completions.create(**{**greedy, "model": m}) for m in ids * 4]
        return [a.choices[0].message.content for a in await asyncio.gather(*asked)]


answers = asyncio.run(together())
assert answers[0] == answers[3] == text and answers[1] == other.choices[0].message.content


def request(name, **changes):
    body = {**greedy, **changes}
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body})


def ended(batch):
    deadline = time.monotonic() + 120
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        assert time.monotonic() < deadline, batch
        time.sleep(0.05)
        batch = client.batches.retrieve(batch.id)
    return batch


def lines(file):
    answers = map(json.loads, client.files.content(file).text.splitlines())
    return {answer["custom_id"]: answer["response"] for answer in answers}


requests = [request("base"), request("one", model=ids[1]), request("none", model="another")]
file = client.files.create(file=("requests.jsonl", "\n".join(requests).encode()), purpose="batch")
assert file.purpose == "batch" and client.files.retrieve(file.id).filename == "requests.jsonl"
order = {"input_file_id": file.id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
batch = ended(client.batches.create(**order, metadata={"for": "a test"}))
counts = batch.request_counts
assert batch.status == "completed" and batch.metadata == {"for": "a test"}, batch
assert (counts.total, counts.completed, counts.failed) == (3, 2, 1), batch
answered = lines(batch.output_file_id)
said = {name: answer["body"]["choices"][0]["message"]["content"] for name, answer in answered.items()}
assert said == {"base": text, "one": other.choices[0].message.content}, said
assert lines(batch.error_file_id)["none"]["status_code"] == 404
assert [b.id for b in client.batches.list(limit=1)] == [batch.id]

slow = client.files.create(file=("slow.jsonl", request("slow", max_tokens=20000).encode()), purpose="batch")
cancelled = ended(client.batches.cancel(client.batches.create(**{**order, "input_file_id": slow.id}).id))
assert cancelled.status == "cancelled", cancelled
assert {b.id for b in client.batches.list(limit=1)} == {batch.id, cancelled.id}
assert {f.id for f in client.files.list()} >= {file.id, slow.id, batch.output_file_id}
assert client.files.delete(slow.id).deleted

print("ok", openai.__version__)
