"""Which tokens of a prompt the user wrote: chat templates, system prompts, turns, tools, padding, packed rows."""

import copy
import os
import re

import pytest
import torch

from elastic.data.packing import collate, pack, tokenise
from elastic.data.prompts import encode, encode_prompt, left_pad, padded_spans
from elastic.data.records import Record, read_records, write_records
from tests.helpers.models import small_bpe

CHATML = (  # as SmolLM2 and Qwen have it: a default system prompt, and tools in it
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% if tools %}<|im_start|>system\nTools: {{ tools | length }} of them.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMING = (  # as Llama 3 has it
    "{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
SHOUTING = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | upper }} {% endfor %}"
QUESTION = "Where does the assistant keep the user's lamp? You are a helpful assistant."
SYSTEMS = {"default": None, "none": "", "short": "Be brief.", "long": "You are a careful clerk of the harbour. " * 30}
TURNS = [("What is a lamp?", "A light."), ("And an assistant?", "Someone who helps.")]


def tokenizer_with(template):
    tokenizer = copy.deepcopy(small_bpe())
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": re.findall(r"<\|\w+\|>", template or "")})
    return tokenizer


def chat(question=QUESTION, system=None, turns=()):
    said = [] if system is None else [("system", system)]
    for user, assistant in turns:
        said += [("user", user), ("assistant", assistant)]
    return [{"role": role, "content": text} for role, text in (*said, ("user", question))]


def users_words(prompt, tokenizer):
    first, last = prompt.user
    return tokenizer.decode(prompt.ids[first:last])


@pytest.mark.parametrize("template", [CHATML, TRIMMING], ids=["chatml", "trimming"])
@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
def test_neither_template_nor_system_prompt_counts(template, system):
    tokenizer = tokenizer_with(template)
    prompt = encode_prompt(chat(system=system), tokenizer)
    assert users_words(prompt, tokenizer).strip() == QUESTION
    assert prompt.user[0] > 0 and prompt.user[1] < len(prompt)


@pytest.mark.parametrize("template", [CHATML, TRIMMING], ids=["chatml", "trimming"])
def test_several_turns_count_from_the_first_question_to_the_last(template):
    tokenizer = tokenizer_with(template)
    words = users_words(encode_prompt(chat(system="Be brief.", turns=TURNS), tokenizer), tokenizer).strip()
    assert words.startswith(TURNS[0][0]) and words.endswith(QUESTION) and TURNS[1][1] in words


def test_white_space_that_the_template_trims_changes_nothing():
    tokenizer = tokenizer_with(TRIMMING)
    bare, padded = (encode_prompt(chat(text), tokenizer) for text in (QUESTION, f"\n  {QUESTION}\n\n"))
    assert padded == bare


def test_tools_stand_in_the_template():
    tokenizer = tokenizer_with(CHATML)
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    with_tools, without = (encode(chat(), tokenizer, True, tools) for tools in ([tool], None))
    assert len(with_tools) > len(without)
    assert users_words(with_tools, tokenizer).strip() == users_words(without, tokenizer).strip() == QUESTION
    with pytest.raises(ValueError, match="leave out chat_template=False"):
        encode(QUESTION, tokenizer, False, [tool])


def test_a_template_that_rewrites_what_users_say_is_pooled_whole_and_said():
    tokenizer = tokenizer_with(SHOUTING)
    with pytest.warns(UserWarning, match="changes what users write"):
        prompt = encode_prompt(chat(), tokenizer)
    assert prompt.user == (0, len(prompt))


def test_a_text_without_template_counts_whole():
    prompt = encode(QUESTION, tokenizer_with(None), chat_template=False)
    assert prompt.user == (0, len(prompt))


@pytest.mark.parametrize(
    "messages", [[{"role": "user", "content": " "}], [{"role": "user"}], [{"content": "x"}], [{"role": "system"}]]
)
def test_messages_without_role_or_content_are_refused(messages):
    with pytest.raises(ValueError, match="has no role or no content"):
        encode(messages, tokenizer_with(CHATML), True)


def test_padding_moves_the_span():
    tokenizer = tokenizer_with(CHATML)
    prompts = [encode_prompt(chat(question), tokenizer) for question in (QUESTION, f"{QUESTION} {QUESTION}")]
    spans = padded_spans(prompts, torch.device("cpu")).tolist()
    shift = len(prompts[1]) - len(prompts[0])
    assert spans == [[place + shift for place in prompts[0].user], list(prompts[1].user)]


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
def test_packed_rows_know_the_same_tokens(system):
    tokenizer = tokenizer_with(CHATML)
    record = Record("single_qa", "The lamp is red.", QUESTION, "Red.", system=system, turns=tuple(TURNS))
    samples = [tokenise(record, tokenizer)] * 3
    prompt = encode_prompt(record.messages, tokenizer)
    assert samples[0].user == prompt.user
    batch = collate(list(pack(samples, 2 * len(samples[0].input_ids))))
    for n, (first, last) in enumerate(batch["user_spans"].tolist()):
        begin = int(batch["cu_seq_lens"][n])
        assert (first - begin, last - begin) == prompt.user
        words = tokenizer.decode(batch["input_ids"][0, first:last])
        assert words.startswith(TURNS[0][0]) and words.strip().endswith(QUESTION)


def test_system_prompt_and_turns_survive_the_disk(tmp_path):
    record = Record("code", "c", "q", "a", system="", turns=tuple(TURNS))
    write_records(tmp_path / "r.jsonl", [record, Record("code", "c", "q", "a")])
    assert list(read_records(tmp_path / "r.jsonl")) == [record, Record("code", "c", "q", "a")]
    plain = (tmp_path / "r.jsonl").read_text().splitlines()[1]
    assert "system" not in plain and "turns" not in plain  # records without them look as they always did


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"system": 3}, "field 'system' is a int"),
        ({"turns": "ab"}, "field 'turns' is 'ab'"),
        ({"turns": [["one"]]}, "expected a list of [user text, assistant text]"),
        ({"turns": [["one", 2]]}, "field 'turns' is a int"),
        ({"turns": [["one", " "]]}, "field 'turns' holds an empty text"),
    ],
)
def test_bad_turns_are_refused(values, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        Record.from_dict({"task": "code", "context": "c", "question": "q", "answer": "a", **values})


@pytest.mark.parametrize("text", ["half \ud83d", os.fsdecode(b"caf\xe9 "), "\udfff"])
def test_what_utf8_cannot_write_is_refused_by_name(text):
    """As a shell hands bytes over that are not UTF-8."""
    tokenizer = tokenizer_with(CHATML)
    place = next(i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff")
    said = f"has half a surrogate pair, or a byte that is not UTF-8, at character {place}; write valid Unicode"
    for item, template in ((text, True), (text, False), (chat(system=text), True), (chat(text), True)):
        with pytest.raises(ValueError, match=said):
            encode(item, tokenizer, template)
    with pytest.raises(ValueError, match="the message of the system has half"):
        encode(chat(system=text), tokenizer, True)


def test_a_template_that_refuses_is_heard():
    """In every use: prompts of users, and records that are packed."""
    tokenizer = tokenizer_with("{{ raise_exception('no system role') if messages[0].role == 'system' }}" + CHATML)
    said = "the chat template of this model refuses the messages: no system role"
    with pytest.raises(ValueError, match=said):
        encode(chat(system="Be brief."), tokenizer, True)
    with pytest.raises(ValueError, match=said):
        tokenise(Record("code", "a", "b", "c", system="Be brief."), tokenizer)


def test_ids_are_whole_numbers_whatever_is_empty():
    ids, mask = left_pad([[], [5, 6]], 0, torch.device("cpu"))
    assert ids.dtype == mask.dtype == torch.int64
    assert (ids.tolist(), mask.tolist()) == ([[0, 0], [5, 6]], [[0, 0], [1, 1]])
