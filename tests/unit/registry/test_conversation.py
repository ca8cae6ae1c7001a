"""Conversations with children that behave, and with children that do not."""

import asyncio
import sys

import pytest

from appliance.child import ChildFailed
from appliance.conversation import Conversation, NoAnswerInTime

_ECHO = """
import json, sys
for line in sys.stdin:
    question = json.loads(line)
    if question.get("parts"):
        for number in range(question["parts"]):
            print(json.dumps({"id": question["id"], "part": {"number": number}}))
    if question.get("die"):
        sys.exit(3)
    if not question.get("silent"):
        print(json.dumps({"id": question["id"], "said": question.get("word")}), flush=True)
"""


def converse(program, scenario):
    async def whole():
        conversation = await Conversation.start([sys.executable, "-c", program])
        try:
            return await scenario(conversation)
        finally:
            await conversation.end(10)

    return asyncio.run(whole())


def test_many_questions_at_once_get_each_their_own_answer():
    async def scenario(conversation):
        answers = await asyncio.gather(*(conversation.ask({"word": word}, 30) for word in range(500)))
        assert [answer["said"] for answer in answers] == list(range(500))

    converse(_ECHO, scenario)


def test_parts_come_before_the_answer_and_in_order():
    async def scenario(conversation):
        parts = []
        await conversation.ask({"parts": 3}, 30, parts.append)
        assert parts == [{"number": 0}, {"number": 1}, {"number": 2}]
        assert (await conversation.ask({"parts": 3, "word": "parts nobody wants"}, 30))["said"]

    converse(_ECHO, scenario)


def test_everybody_who_waits_learns_that_the_child_ended():
    async def scenario(conversation):
        first = asyncio.ensure_future(conversation.ask({"silent": True}, 30))
        with pytest.raises(ChildFailed, match="ended with status 3"):
            await conversation.ask({"die": True}, 30)
        with pytest.raises(ChildFailed, match="ended with status 3"):
            await first
        with pytest.raises(ChildFailed, match="ended with status 3"):
            await conversation.ask({}, 30)

    converse(_ECHO, scenario)


def test_silence_is_told_from_death_and_a_late_answer_harms_nobody():
    async def scenario(conversation):
        with pytest.raises(NoAnswerInTime, match=r"within 0\.01 s"):
            await conversation.ask({"silent": True}, 0.01)
        assert (await conversation.ask({"word": "again"}, 30))["said"] == "again"

    converse(_ECHO, scenario)


@pytest.mark.parametrize("said", ["'no json'", "'[]'", "'{}'", "'x' * (1 << 21)"])
def test_a_child_that_says_nonsense_is_ended(said):
    async def scenario(conversation):
        with pytest.raises(ChildFailed, match="no answer"):
            await conversation.ask({}, 30)

    converse(f"import time; print({said}, flush=True); time.sleep(100)", scenario)


def test_a_child_that_does_not_end_is_killed():
    async def whole():
        conversation = await Conversation.start([sys.executable, "-c", "import time; time.sleep(100)"])
        await conversation.end(0.01)
        with pytest.raises(ChildFailed, match="killed by SIGKILL"):
            await conversation.ask({}, 1)

    asyncio.run(whole())


def test_a_program_that_is_not_there_is_a_failure():
    with pytest.raises(ChildFailed, match="No such file"):
        asyncio.run(Conversation.start(["/no/such/program"]))
