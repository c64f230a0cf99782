"""Writes metrics.json: answers scored by the benchmarks' own code.

Needs checkouts of NVIDIA/RULER (c3f5e3b), THUDM/LongBench (2e00731) and microsoft/MInference (fb56c91), and
rouge 1.0.1, fuzzywuzzy 0.18.0 (without python-Levenshtein), jieba 0.42.1, rouge-score 0.1.2, nltk:

    python make_metrics.py RULER LONGBENCH MINFERENCE
"""

import importlib.metadata
import importlib.util
import json
import pathlib
import sys
import types

for package, version in [("rouge", "1.0.1"), ("fuzzywuzzy", "0.18.0"), ("jieba", "0.42.1"), ("rouge_score", "0.1.2")]:
    assert importlib.metadata.version(package) == version, package
assert importlib.util.find_spec("Levenshtein") is None, "fuzzywuzzy would take another ratio"


def module(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class Rouge:
    """What `evaluate.load("rouge")` computes, without the hub."""

    def compute(self, predictions, references, use_aggregator):
        from rouge_score import rouge_scorer

        scorer = rouge_scorer.RougeScorer(["rougeLsum"], use_stemmer=False)
        scores = [scorer.score(r, p)["rougeLsum"].fmeasure for r, p in zip(references, predictions)]
        return {"rougeLsum": scores}


ruler, longbench, minference = map(pathlib.Path, sys.argv[1:])
# What the modules import and these functions do not use.
for name, values in {
    "args": {"parse_args": None},
    "evaluate": {"load": lambda _: Rouge()},
    "tempdir": {},
    "tree_sitter_languages": {"get_language": None, "get_parser": None},
    "rich": {},
    "rich.console": {"Console": None},
    "rich.progress": dict.fromkeys(
        ["BarColumn", "MofNCompleteColumn", "Progress", "TextColumn", "TimeElapsedColumn"]
    ),
    "rich.table": {"Table": None},
    "transformers": {"AutoConfig": None},
}.items():
    stub = types.ModuleType(name)
    stub.__dict__.update(values)
    sys.modules[name] = stub
sys.path.insert(0, str(minference / "scbench"))
R = module(ruler / "scripts/eval/synthetic/constants.py", "ruler_constants")
L = module(longbench / "LongBench/metrics.py", "longbench_metrics")
S = module(minference / "scbench/compute_scores.py", "scbench_scores")
Q = module(minference / "scbench/repo_qa_utils.py", "repo_qa")

cases = []


def case(metric, answer, wanted, score, others=()):
    cases.append({"metric": metric, "answer": answer, "wanted": list(wanted), "others": list(others), "score": float(score)})


ENGLISH = [
    "The cat sat on the mat. It was a warm day, and the cat was happy.",
    "A cat was sitting on a mat! The day was warm; it's a happy cat",
    "Warm day. Warm day. Warm day.",
    "In 1987 the committee (which met twice) approved $3.5 million for the U.S. program.\nIt ended in 1991.",
    "The committee approved 3.5 million dollars in 1987 for the program. The program ended in 1991.\n\nIt met twice.",
    "yes",
    "Yes, the Theory of an hour.",
    "",
    "   ",
    "...",
    "café naïve résumé — “quoted” text_with_underscore a_b the",
]
CHINESE = [
    "会议讨论了明年的预算，并决定增加研发投入。",
    "会议决定增加明年的研发预算，投入更多资源。",
    "北京大学的学生参加了在上海举行的人工智能大会。",
    "在上海举行的人工智能大会上，北京大学学生获奖。",
    "答案是：不知道！",
    "OpenAI 发布了 GPT-4 模型，共有1.8万亿参数",
    "段落12",
    "",
]
for i, answer in enumerate(ENGLISH):
    for wanted in ENGLISH[i % 3 :: 2]:
        case("qa-f1", answer, [wanted], L.qa_f1_score(answer, wanted))
        case("rouge-l", answer, [wanted], L.rouge_score(answer, wanted))
        case("rouge-lsum", answer, [wanted], S.get_score_one_longbook_sum_eng(answer, wanted, ""))
for answer in CHINESE:
    for wanted in CHINESE:
        case("qa-f1-zh", answer, [wanted], L.qa_f1_zh_score(answer, wanted))
        case("rouge-l-zh", answer, [wanted], L.rouge_zh_score(answer, wanted))
        case("qa-f1-zh-characters", answer, [wanted], S.get_score_one_longbook_qa_chn(answer, [wanted], ""))
case("qa-f1", ENGLISH[0], ENGLISH[1:4], max(L.qa_f1_score(ENGLISH[0], w) for w in ENGLISH[1:4]))

classes = ["Food", "Sport", "Other sport", "Number of something", "Number", "Date", "Invention, book and other creative piece", "other"]
for answer in ["Food", "Other sport", "Sport and Food", "It is a Number of something.", "Number", "other", "none", "Date Number Food Sport"]:
    for wanted in ["Food", "Sport", "Other sport", "Number of something", "Number"]:
        case("classification", answer, [wanted], L.classification_score(answer, wanted, all_classes=classes), classes)
for answer in ["Paragraph 12", "12", "Paragraph 1 or Paragraph 12, that is 12", "the 3rd", "", "段落12，不是段落3"]:
    case("retrieval", answer, ["Paragraph 12"], L.retrieval_score(answer, "Paragraph 12"))
    case("retrieval-zh", answer, ["段落12"], L.retrieval_zh_score(answer, "段落12"))
    case("count", answer, ["12"], L.count_score(answer, "12"))
CODE = [
    "    return self.items[index]",
    "\n\n    return self.items[idx]\n    # done",
    "```python\n# comment\n// other\nfor i in range(10): print(i)\n```",
    "",
    "`",
    "x",
    "public static void main(String[] args) { System.out.println(\"Hello, world\"); } " * 3,
    "private static int main(String[] argv) { System.err.println(\"Hello world!\"); } " * 3,
    "if (a == b && c != d || e) { return foo(bar, baz, qux); } else { throw new IllegalStateException(\"never here\"); }" * 2,
]
for answer in CODE:
    for wanted in CODE:
        wanted = wanted.replace("\n", " ")
        case("code-similarity", answer, [wanted], L.code_sim_score(answer, wanted))

for answer in ["The numbers are 123 and 456.", "123", "", "ABC def", "  abc\x01DEF 456 "]:
    for wanted in [["123"], ["123", "456"], ["abc", "def", "456"], ["ABC\nDEF"]]:
        cleaned = L.re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip()
        case("string-match-all", answer, wanted, R.string_match_all([cleaned], [wanted]) / 100)
        case("string-match-part", answer, wanted, R.string_match_part([cleaned], [wanted]) / 100)
        case("string-match-all-rounded", answer, wanted, S.string_match_all(answer, wanted))
        case("contains-any-case", answer, wanted, S.get_score_one_longdialogue_qa_eng(answer, wanted, ""))
        case("contains", answer, wanted[:1], S.get_score_one_kv_retrieval(answer, wanted[0], ""))
for answer in ["The pass key is 71432.", "71432", "1 71432", "none", "7.5 then 8", "-3", "7.", ".5"]:
    case("first-number", answer, ["71432"], S.get_score_one_passkey(answer, "71432", ""))
    for label in [7, 7.5, 71432, 3, 5, 0.5]:
        case("math-find", answer, [json.dumps(label)], S.get_score_one_math_find(answer, label, ""))
for answer in ["B", "B. Bo", "  b", "Bo", "The answer is: B", "answer: Bo, of course", "The right option is B.", "I think C or B", "AB", "answer is", "", "\"(B)\""]:
    case("choice", answer, ["Bo", "B"], S.get_score_one_longbook_choice_eng(answer, ["Bo", "B"], ""))
FUNCTIONS = [
    "def add(a, b):\n    c = a + b\n    return c",
    "def add(a, b):\n    total = a + b\n    return total",
    "fn main() {}",
    "x",
    "",
    "def add(a, b): return a + b if a and b else 0 # a much longer function with many more words in it",
]
similarities = [
    {"answer": a, "wanted": w, "bleu": float(Q.compute_function_similarity(a, w))} for a in FUNCTIONS for w in FUNCTIONS
]
path = pathlib.Path(__file__).with_name("metrics.json")
lines = lambda rows: ",\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
path.write_text(f'{{"cases": [\n{lines(cases)}\n],\n"similarities": [\n{lines(similarities)}\n]}}\n')
print(len(cases), "cases,", len(similarities), "similarities")
