"""What transformers makes of odd tokenizer folders: tokens and templates in every file.

Needs transformers 5.24.0 and torch 2.11.0; from this folder:

    python make_tokenizers.py ../../../../recipes/nano-llama

Writes beside itself
  tokenizers.json  per folder of small files: those files, and what AutoTokenizer makes of them: the ids of TEXTS, the
                   prefix and switch around a user's message, special tokens; or that transformers refuses
The tests write the same folders (tests/text/folders.rs) from nano-llama's files and from what is in the JSON.
"""
import importlib.metadata, json, os, sys, tempfile
import transformers
from transformers import AutoTokenizer

VERSIONS = {p: importlib.metadata.version(p) for p in ("transformers", "torch")}
assert VERSIONS["transformers"] == "5.24.0" and VERSIONS["torch"].startswith("2.11.0"), VERSIONS
transformers.logging.set_verbosity_error()
nano = sys.argv[1]; out = os.path.dirname(os.path.abspath(__file__))

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
NAMED = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
MARKED = "{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content }}\n{% endgeneration %}{{ eos_token }}\n{% endfor %}"
ADDED = lambda text, special=True, **kw: dict(dict(content=text, lstrip=False, normalized=not special, rstrip=False, single_word=False, special=special), **kw)
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
IM = {"4094": ADDED("<|im_start|>"), "4095": ADDED("<|im_end|>")}
BOS = dict(ADDED("<|begin_of_text|>"), __type="AddedToken")
# Files of a folder beside tokenizer.json, whose last `cut` tokens are taken out.
FOLDERS = {
    "base model": (0, {"tokenizer_config.json": CONFIG}),
    "base model without bos": (0, {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|eot_id|>"}}),
    "base model, bos an object": (0, {"tokenizer_config.json": dict(CONFIG, bos_token=BOS)}),
    "base model, bos in the map": (0, {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}, "special_tokens_map.json": {"bos_token": ADDED("<|begin_of_text|>"), "eos_token": "<|eot_id|>"}}),
    "the map wins": (0, {"tokenizer_config.json": CONFIG, "special_tokens_map.json": {"bos_token": "<|end_of_text|>"}}),
    "a decoder silences the map": (0, {"tokenizer_config.json": dict(CONFIG, added_tokens_decoder={"0": ADDED("<|begin_of_text|>")}), "special_tokens_map.json": {"bos_token": "<|end_of_text|>"}}),
    "decoder": (2, {"tokenizer_config.json": dict(CONFIG, chat_template=CHATML, eos_token="<|im_end|>", added_tokens_decoder=IM)}),
    "decoder, not special": (2, {"tokenizer_config.json": dict(CONFIG, chat_template=CHATML, added_tokens_decoder={"4094": ADDED("<|im_start|>", False), "4095": ADDED("<|im_end|>", False)})}),
    "decoder, ids apart": (2, {"tokenizer_config.json": dict(CONFIG, chat_template=CHATML, added_tokens_decoder={"4095": ADDED("<|im_start|>"), "5000": ADDED("<|im_end|>")})}),
    "decoder, blanks eaten": (2, {"tokenizer_config.json": dict(CONFIG, chat_template=CHATML, added_tokens_decoder={"4094": ADDED("<|im_start|>"), "4095": ADDED("<|im_end|>", rstrip=True)})}),
    "added_tokens.json": (2, {"tokenizer_config.json": dict(CONFIG, chat_template=CHATML), "added_tokens.json": {"<|im_end|>": 4095, "<|im_start|>": 4094}}),
    "a decoder silences added_tokens.json": (2, {"tokenizer_config.json": dict(CONFIG, chat_template=CHATML, added_tokens_decoder={"4094": ADDED("<|im_start|>")}), "added_tokens.json": {"<|im_end|>": 4095}}),
    "additional_special_tokens": (2, {"tokenizer_config.json": dict(CONFIG, chat_template=CHATML, additional_special_tokens=["<|im_start|>", "<|im_end|>"])}),
    "extra_special_tokens": (2, {"tokenizer_config.json": dict(CONFIG, chat_template=CHATML, extra_special_tokens=["<|im_start|>", "<|im_end|>"])}),
    "extra_special_tokens, named": (2, {"tokenizer_config.json": dict(CONFIG, chat_template=CHATML.replace("<|im_start|>", "{{ turn_token }}"), extra_special_tokens={"turn_token": "<|im_start|>"})}),
    "special_tokens_map.json alone": (2, {"special_tokens_map.json": {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"}, "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHATML}}),
    "a named token that only the vocabulary has": (0, {"tokenizer_config.json": dict(CONFIG, pad_token="ing")}),
    "templates with a default": (0, {"tokenizer_config.json": dict(CONFIG, chat_template=[{"name": "tool_use", "template": "{{ raise_exception('no') }}"}, {"name": "default", "template": NAMED}])}),
    "templates without a default": (0, {"tokenizer_config.json": dict(CONFIG, chat_template=[{"name": "rag", "template": NAMED}, {"name": "tool_use", "template": NAMED}])}),
    "an object of templates": (0, {"tokenizer_config.json": dict(CONFIG, chat_template={"default": NAMED})}),
    "a file wins": (0, {"tokenizer_config.json": dict(CONFIG, chat_template=NAMED), "chat_template.jinja": "file:" + NAMED}),
    "a file and named ones": (0, {"tokenizer_config.json": CONFIG, "chat_template.jinja": "file:" + NAMED, "additional_chat_templates/rag.jinja": "rag:" + NAMED}),
    "named files without a default": (0, {"tokenizer_config.json": dict(CONFIG, chat_template=NAMED), "additional_chat_templates/rag.jinja": "rag:" + NAMED}),
    "a named file called default": (0, {"tokenizer_config.json": CONFIG, "chat_template.jinja": "file:" + NAMED, "additional_chat_templates/default.jinja": "named:" + NAMED}),
    "line ends of Windows in a file": (0, {"tokenizer_config.json": CONFIG, "chat_template.jinja": "{% if true %}\r\n{{ bos_token }}\r\na\r\n\r\n{{ messages[0].content }}{{ '\r\n' }}b\rc\r\n{% endif %}\r\n"}),
    "line ends of Windows in JSON": (0, {"tokenizer_config.json": dict(CONFIG, chat_template="{% if true %}\r\n{{ bos_token }}\r\na\r\n\r\n{{ messages[0].content }}{{ '\r\n' }}b\rc\\r\r\n{% endif %}\r\n")}),
    "a byte order mark": (0, {"tokenizer_config.json": CONFIG, "chat_template.jinja": "\ufeff" + NAMED}),
    "generation": (0, {"tokenizer_config.json": dict(CONFIG, chat_template=MARKED)}),
    "generation, blanks cut": (0, {"tokenizer_config.json": dict(CONFIG, chat_template="{%- for m in messages -%}  {%- generation -%}  {{ m.content }} {%- endgeneration %} \n {%- endfor %}|{# {% generation %} #}{% raw %}{% generation %}{% endraw %}{{ '{% generation %}' }}")}),
}
# Features of templates: each is rendered around one user message.
FEATURES = [
    "{{ '%s-%d' % ('a', 3) }}{{ '%s' % m0 }}{{ 7 % 4 }}{{ '%05.1f|%-4s|%%' % (2.25, 'x') }}", "{{ '{}!{:>4}'.format('b', 7) }}",
    "{{ 'ab'.removeprefix('a') }}{{ 'ab'.removesuffix('b') }}{{ 'ab'.removeprefix('x') }}", "{{ 'k=v=w'.partition('=') | join('|') }}{{ 'k=v=w'.rpartition('=')[2] }}{{ 'kv'.partition('=')[0] }}",
    "{{ 'a b  c'.rsplit() }}{{ 'a,b,c'.rsplit(',', 1) }}{{ ' a b  c '.rsplit(none, 1) }}{{ 'a b c'.split(' ', 1) }}", "{{ 'x'.center(4) }}|{{ 'xy'.center(5, '-') }}|{{ 'x'.ljust(3) }}|{{ 'x'.rjust(3, '.') }}|{{ '-7'.zfill(4) }}",
    "{{ [1, 'a', none, true, 1.5] }}{{ {'b': [2], 'a': \"it's\"} }}{% set l = [1, 'y'] %}{{ 'x' ~ l }}", "{{ {'b': 1, 'a': {'d': none, 'c': [true, 'ü<']}} | tojson }}{{ [1, {'z': 2}] | tojson(indent=2) }}{{ dict(b=1, a=2) | tojson }}",
    "{{ ['a', 1] | join(', ') }}{{ ', '.join(['a', 'b']) }}{{ 'abab' | replace('b', 'xx') }}{{ 'ab'.replace('a', '') }}{{ 'a\nb' | indent(2) }}", "{{ 'x' * 3 }}{{ [1, 2] * 2 }}{{ [1] + [2] }}{{ 'a' + 'b' ~ 1 }}",
    "{% set ns = namespace(s='') %}{% for i in range(3) %}{% set ns.s = ns.s ~ i %}{% endfor %}{{ ns.s }}{{ 'Title case'.title() }}{{ 'AbC'.lower() }}{{ 'AbC'.swapcase() if false else 'n' }}",
    "{% macro f(x, y=2) %}<{{ x }}{{ y }}>{% endmacro %}{{ f(1) }}{{ f(1, y=3) }}{% macro g(x) %}{{ x }}{{ caller() }}{% endmacro %}{% call g(4) %}c{% endcall %}{% filter upper %}a{% endfilter %}{% set b %}q{{ 1 }}{% endset %}{{ b }}",
    "{% for k, v in {'b': 1, 'a': 2}.items() %}{{ k }}{{ v }}{% if not loop.last %},{% endif %}{% endfor %}{{ {'z': 1}.get('y', 'd') }}{% for x in [1, 2, 3, 4] if x % 2 == 0 %}{{ loop.index }}{{ x }}{% endfor %}",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='role') | list }}{{ [3, 1, 2] | sort | first }}{{ [1, 2] | sum }}{{ 'abc' | length }}{{ undefined_thing | default('d') }}{{ 'a.b' is string }}{{ none is none }}",
    "{{ 'aXbXc'.index('X') }}{{ 'aXbXc'.rindex('X') }}{{ 'straße'.casefold() if false else '' }}{{ 'a\tb\\n' | tojson }}{{ 2 ** 3 }}{{ 7 // 2 }}{{ 7 / 2 }}{{ -7 // 2 }}",
]
TEXTS = ["<|im_start|>user\nx<|im_end|>\ny", "a<|im_end|>  b <|im_start|>", "<|begin_of_text|>The king said that he is going.", "singing ing <|eot_id|>", "naïve — 北京"]

def write(d, cut, files):
    j = json.load(open(f"{nano}/target/tokenizer.json"))
    gone = {t for t, i in j["model"]["vocab"].items() if i >= 4096 - cut}
    j["model"]["merges"] = [m for m in j["model"]["merges"] if not ({m[0], m[1], m[0] + m[1]} & gone)]
    for g in gone: j["model"]["vocab"].pop(g)
    json.dump(j, open(f"{d}/tokenizer.json", "w"))
    for name, what in files.items():
        os.makedirs(os.path.dirname(f"{d}/{name}"), exist_ok=True)
        open(f"{d}/{name}", "w", newline="").write(what if isinstance(what, str) else json.dumps(what))

MARK = "\x01"
def frame(tok):
    t = tok.apply_chat_template([{"role": "user", "content": MARK}], add_generation_prompt=True, tokenize=False, enable_thinking=False)
    return t.split(MARK)

folders = []
for name, (cut, files) in FOLDERS.items():
    with tempfile.TemporaryDirectory() as d:
        write(d, cut, files); tok = AutoTokenizer.from_pretrained(d)
        assert type(tok).__name__ == "TokenizersBackend", type(tok)
        case = dict(name=name, cut=cut, files=files, ids=[tok.encode(t, add_special_tokens=False) for t in TEXTS], bos=tok.bos_token, eos=tok.eos_token, vocab=len(tok))
        # kvpress' rule for a tokenizer without a template: its bos token, and a line break after the question.
        if tok.chat_template is None: case["frame"] = [tok.bos_token or "", "\n"]
        else:
            try: case["frame"] = frame(tok)
            except ValueError as e: assert "no default specified" in str(e); case["refused"] = str(e)
        if "frame" in case: case["prefix"] = tok.encode(case["frame"][0], add_special_tokens=False); case["switch"] = tok.encode(case["frame"][1], add_special_tokens=False)
        folders.append(case)
features = []
with tempfile.TemporaryDirectory() as d:
    write(d, 0, {"tokenizer_config.json": CONFIG}); tok = AutoTokenizer.from_pretrained(d)
    for text in FEATURES:
        tok.chat_template = "{% set m0 = messages[0].role %}" + text + "{{ messages[0].content }}"
        features.append(dict(template=tok.chat_template, frame=frame(tok)))
json.dump(dict(versions=VERSIONS, texts=TEXTS, folders=folders, features=features), open(f"{out}/tokenizers.json", "w"), indent=None, ensure_ascii=False)
print(len(folders), "folders,", len(features), "templates")
