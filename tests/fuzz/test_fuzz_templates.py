"""Chat templates: broken, unending, enormous, failing ones are refused with the messages they failed on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fuzzing import broken_bytes, forms, fuzz, outcome
from hypothesis import strategies as st

from understudy import tokenization
from understudy.config import PromptsConfig
from understudy.prompts import load_prompts
from understudy.rows import read_rows
from understudy.supervised import supervised_examples
from understudy.tokenization import ModelText, load_text
from user import CHATML, bpe_tokenizer, save_model, write_rows

UNENDING = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% for a in range(9999) %}{% for m in messages %}{{ m.content * 999 }}{% endfor %}{% endfor %}",
)
ODD = (
    "{{ 'x' * 3000000 }}",
    "{{ 'xy ' * 100000000 }}",
    "{% for i in range(200000) %}x{% endfor %}",
    "{{ raise_exception('not this role') }}",
    "{{ nobody.knows.this }}",
    "{{ messages[99].content }}",
    "{{ messages[0]['content'] | nofilter }}",
    "{% include 'x' %}",
    "{% import 'os' as os %}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ 1 / 0 }}",
    "{{ messages | map(attribute='content') | join }}{{ 'a' + 1 }}",
    "{{ messages | tojson }}",
    "{{ strftime_now('%d') }}",
    "{% set ns = namespace(x=1) %}{% set ns.x = ns.y %}{{ ns.x }}",
    "{% generation %}x{% endgeneration %}",
    "",
    " ",
    "{{ bos_token }}{{ eos_token }}{{ tools }}{{ documents }}",
    "{{ '%1000000d' | format(1) }}",
    "{{ 'x' | center(2000000) }}",
    "{{ '\\ud800' }}",
    "\x00{{ messages[0].content }}",
    "{{ cycler }}{{ joiner }}{{ lipsum(n=3) }}{{ dict(a=1) }}",
)
PIECES = (
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if m.role == 'user' %}",
    "{% else %}",
    "{% endif %}",
    "{{ m.content }}",
    "{{ m['role'] }}",
    "{% set x = m %}",
    "{{ x }}",
    "{% macro f(a) %}",
    "{% endmacro %}",
    "{{ f(1) }}",
    "{{ loop.index }}",
    "{% if add_generation_prompt %}<|im_start|>{% endif %}",
    "<|im_end|>",
    "{{",
    "}}",
    "{#",
    "{%- -%}",
    "{{ m.content | trim | upper }}",
    "{{ m.content[0] }}",
    "{{ messages[-1].content.split('a')[5] }}",
    "text\n",
)
TEMPLATE = st.one_of(
    st.sampled_from(ODD),
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join),
    st.tuples(st.sampled_from(ODD), st.just(CHATML)).map("".join),
    broken_bytes(st.just(CHATML.encode())).map(lambda data: data[:5000].decode("utf-8", "replace")),
    st.text(max_size=40),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    return load_text(str(save_model(tmp_path_factory.mktemp("m") / "m", bpe_tokenizer(chat=True))), "student")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    talk = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "3."}]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", [{"messages": talk}])


@pytest.mark.filterwarnings("ignore")
@forms(80, 3_000)
def test_templates(cases: int, long: bool, model: ModelText, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenization, "TEMPLATE_SECONDS", 0.3)
    config = PromptsConfig(path=str(rows), over_long="skip")

    def body(case: tuple[str, bool]) -> None:
        template, supervised = case
        monkeypatch.setattr(model.tokenizer, "chat_template", template)

        def work() -> Any:
            if supervised:
                return supervised_examples(read_rows(config), config, model, model.end_ids)
            return load_prompts(config, model, max_completion_tokens=8)

        outcome("chat templates", work)

    fuzz(st.tuples(TEMPLATE, st.booleans()), body, cases, long=long)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("template", UNENDING)
def test_a_template_without_an_end_is_given_up(
    template: str, model: ModelText, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenization, "TEMPLATE_SECONDS", 0.3)
    monkeypatch.setattr(model.tokenizer, "chat_template", template)
    config = PromptsConfig(path=str(rows))
    assert outcome("unending chat templates", lambda: load_prompts(config, model, max_completion_tokens=8)) == "refused"
