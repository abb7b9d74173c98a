"""Tasks that need official data, on small files in the official formats: prompts, references, scores of the right and of no answer."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longreach.evals import tasks as registry
from longreach.evals.samples.base import Sample, Settings
from longreach.evals.tasks import leval, longbench, longbench_v2, loogle

GROUPS = ("longbench", "longbench-e", "leval", "infinitebench", "longbench-v2", "loogle")
TASKS = {name: task for name, task in registry.tasks().items() if task.group in GROUPS and task.needs_data}
DOCUMENT = "Document with {input} and $Q$ and {braces}, and <text> in it.\nSecond line."


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def longbench_rows(config: str) -> list[dict[str, Any]]:
    answers: dict[str, tuple[list[str], list[str] | None]] = {
        "trec": (["City"], ["City", "Country"]), "lsht": (["体育"], ["体育", "军事"]), "passage_count": (["12"], None),
        "passage_retrieval_en": (["Paragraph 7"], None), "passage_retrieval_zh": (["段落7"], None),
        "lcc": (["return[f(x)]"], None), "repobench-p": (["return[f(x)]"], None),
    }  # fmt: skip
    gold, classes = answers.get(config, (["x = 北京 one", "another"], None))
    return [
        {"input": f"question {n}", "context": DOCUMENT, "answers": gold, "length": 3000 * n, "dataset": config, "language": "en", "all_classes": classes,
         "_id": f"id{n}"} for n in range(5)
    ]  # fmt: skip


INFINITE: dict[str, tuple[str, Any, Any]] = {  # input, answer, options
    "passkey": ("What is the pass key?", ["71432"], []),
    "number_string": ("What is the sequence of digits?", ["0011223"], []),
    "kv_retrieval": ('Key: "6ab6ea3e-f288-4f33-ba46-7f42bb75b03f"\nThe value is', ["cb59052b-9128-4979-9c0e-e1de4adcf73b"], []),
    "code_run": ("Please give me the exact number of the return value of func_1(-7). Be concise.", ["-42"], []),
    "code_debug": ("", ["pkg.load"], ["pkg.save", "pkg.load", "pkg.x", "pkg.y"]),
    "math_find": ("You should answer with only one number. The largest number of the list is: ", [93.5], []),
    "longbook_qa_eng": ("Who is it?", ["Ann", "Mrs. Ann Lee"], []),
    "longbook_choice_eng": ("Who is it?", ["Bo"], ["Ann", "Cid", "Bo", "Dee"]),
    "longbook_sum_eng": ("", ["A book about whales.\nIt ends badly."], []),
    "longdialogue_qa_eng": ("", ["ISHMAEL"], []),
    "longbook_qa_chn": ("他是谁？", ["张三"], []),
}
LEVAL: dict[str, tuple[str, str]] = {
    "coursera": ("Which? A. x B. y C. z", "BC"),
    "quality": ("Which?", "(B) the second"),
    "tpo": ("Which?", "C"),
    "gsm100": ("How many are left?", "18 - 5 = 13. The answer is 13"),
    "codeU": ("What does it print?", "['a', 'b']"),
    "sci_fi": ("Do stones fly?", "True [fact: False]"),
    "topic_retrieval_longchat": ("What is the first topic?", "The benefits of reading"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    (root / "longbench").mkdir()
    with zipfile.ZipFile(root / "longbench" / "data.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for task in TASKS.values():
            if isinstance(task, longbench.LongBench):
                rows = longbench_rows(task.config)
                archive.writestr(f"data/{task.config}{'_e' * task.binned}.jsonl", "\n".join(json.dumps(row) for row in rows))
    for split, (given, answer, options) in INFINITE.items():
        jsonl(root / "infinitebench" / f"{split}.jsonl", [{"id": 0, "context": DOCUMENT, "input": given, "answer": answer, "options": options}])
    for file, (question, answer) in LEVAL.items():
        row = {"instructions": [question, question + " Again?"], "outputs": [answer] * 2, "input": DOCUMENT, "source": "s", "evaluation": "exam"}
        jsonl(root / "leval" / "LEval" / "Exam" / f"{file}.jsonl", [row, row])
    choices = {f"choice_{letter}": f"choice {letter} $DOC$" for letter in "ABCD"}
    row = {"_id": "66f", "domain": "Single-Document QA", "sub_domain": "Legal", "difficulty": "hard", "length": "short", "question": "Which $C_A$?",
           **choices, "answer": "C", "context": DOCUMENT}  # fmt: skip
    (root / "longbench-v2").mkdir()
    (root / "longbench-v2" / "data.json").write_text(json.dumps([row]), encoding="utf-8")
    pairs = [{"Q": "Who's there?", "A": "A person named Bob.", "S": ["s"], "type": "comprehension and reasoning"}]
    cloze = [{"Q": "<mask-0> met <mask-1>.", "A": {"<mask-0>": "Ann Lee", "<mask-1>": "Bob"}}]
    for config, value in (("shortdep_qa", str(pairs)), ("longdep_qa", str(pairs)), ("longdep_summarization", "none"), ("shortdep_cloze", str(cloze))):
        jsonl(root / "loogle" / "data" / f"{config}.jsonl", [{"input": DOCUMENT, "title": "t", "qa_pairs": value, "output": "A summary of it."}])
    return root


def made(name: str, folder: Path, **more: Any) -> list[Sample]:
    task = TASKS[name]
    if "zh" in task.metric:
        pytest.importorskip("jieba", reason="jieba is not installed (pip install jieba)")
    return list(task.samples(None, Settings(data=str(folder), samples=0, **more)))


def right(name: str, sample: Sample) -> str:
    if name == "leval-topic-retrieval":
        return f"It was '{sample.references[0]}'."
    if name == "longbench-v2":
        return f"The correct answer is **({sample.references[0]})**"
    if name == "infinitebench-code-debug":
        return f"{sample.references[0]}. it is"
    if name == "loogle-shortdep-cloze":
        return json.dumps(dict(zip(sample.meta["masks"], sample.references)))
    return sample.references[0]


@pytest.mark.parametrize("name", TASKS)
def test_prompts_and_scores(folder, name):
    task, samples = TASKS[name], made(name, folder)
    assert samples and len({sample.id for sample in samples}) == len(samples)
    for sample in samples:
        parts = sample.parts
        assert parts.document == ("" if sample.id.endswith(":world") else DOCUMENT), "the document is as it is in the data"
        assert sample.id.startswith(f"{name}:") and sample.max_new_tokens > 0 and sample.references and parts.prefix
        for slot in ("{context}", "{input}", "$DOC$") if name != "longbench-v2" else ("{context}",):
            assert slot not in parts.prefix + parts.query
        json.dumps(dict(sample.meta))
        best = task.score(sample, right(name, sample))
        assert best[task.metric] == pytest.approx(1), best
        for text in ("", "\n", "\ud800", "., !"):
            scores = task.score(sample, text)
            assert scores[task.metric] == 0 and all(0 <= value <= 1 for value in scores.values()), (text, scores)
    assert [s.id for s in made(name, folder)] == [s.id for s in samples]
    assert samples == made(name, folder), "samples are a function of the data and the settings"


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.random is not None])
def test_guessing_a_letter_scores_the_random_baseline(folder, name):
    say = {"longbench-v2": "The correct answer is ({})", "infinitebench-code-debug": "{}."}.get(name, "{}")
    for sample in made(name, folder):
        assert sum(TASKS[name].score(sample, say.format(letter))[TASKS[name].metric] for letter in "ABCD") / 4 == TASKS[name].random


@pytest.mark.parametrize("name", ["longbench-qasper", "infinitebench-official-passkey", "leval-tpo", "longbench-v2", "loogle-longdep-qa"])
def test_lengths_and_unknown_data_are_refused(folder, name, tmp_path):
    with pytest.raises(ValueError, match="--truncate"):
        made(name, folder, lengths=(4096,))
    with pytest.raises(ValueError, match=r"has no .*pass the folder"):
        made(name, tmp_path)


# -- LongBench ------------------------------------------------------------------------------------------------------------------


def test_longbench_has_the_official_tasks():
    plain = {t.config: t for t in TASKS.values() if isinstance(t, longbench.LongBench) and not t.binned}
    assert len(plain) == 21 and sum(isinstance(t, longbench.LongBench) and t.binned for t in TASKS.values()) == 13
    assert {c for c, t in plain.items() if t.chat == "off"} == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {c for c, t in plain.items() if t.first_line} == {"trec", "triviaqa", "samsum", "lsht"}
    assert {t.tokens for c, t in plain.items() if t.category == "summaries"} == {512}
    assert plain["passage_count"].template.endswith("The final answer is: ") and plain["lcc"].template.endswith("{context}Next line of code:\n")


def test_longbench_slots_are_filled_around_the_document(folder):
    sample = made("longbench-repobench-p", folder)[1]
    assert sample.parts.query == "question 1Next line of code:\n" and sample.chat == "off" and sample.id == "longbench-repobench-p:id1"
    assert made("longbench-qasper", folder)[1].parts.query.endswith("\n\nQuestion: question 1\n\nAnswer:")


def test_longbench_first_lines_and_best_reference(folder):
    task = TASKS["longbench-triviaqa"]
    sample = made("longbench-triviaqa", folder)[0]
    assert task.score(sample, "\n\nanother\nand much more of it")["f1"] == 1
    assert TASKS["longbench-hotpotqa"].score(sample, "another\nand much more of it")["f1"] < 1


def test_longbench_e_has_bins_and_samples_of_each(folder):
    samples = made("longbench-e-qasper", folder)
    assert [s.meta["bin"] for s in samples] == ["0-4k", "0-4k", "4-8k", "8k+", "8k+"]
    task = TASKS["longbench-e-qasper"]
    one = list(task.samples(None, Settings(data=str(folder), samples=1)))
    assert [s.meta["bin"] for s in one] == ["0-4k", "4-8k", "8k+"]


def test_longbench_in_the_official_wording(folder, tmp_path):
    file = tmp_path / "dataset2prompt.json"
    file.write_text(json.dumps({"qasper": "You are given {context}\n\n Q: {input}\n\nAnswer:", "hotpotqa": "{context} {x}"}), encoding="utf-8")
    sample = made("longbench-qasper", folder, options={"prompts": str(file)})[2]
    assert sample.parts.prefix == "You are given " and sample.parts.query == "\n\n Q: question 2\n\nAnswer:"
    for name in ("longbench-hotpotqa", "longbench-musique"):
        with pytest.raises(ValueError, match=r"dataset2prompt|slots"):
            made(name, folder, options={"prompts": str(file)})
    with pytest.raises(ValueError, match="has no option"):
        made("longbench-qasper", folder, options={"prompt": str(file)})


def test_longbench_averages_are_the_published_ones():
    order = "narrativeqa qasper multifieldqa-en hotpotqa 2wikimqa musique gov-report qmsum multi-news trec triviaqa samsum passage-count passage-retrieval-en"
    names = [f"longbench-{name}" for name in (*order.split(), "lcc", "repobench-p")]
    llama = dict(zip(names, map(float, "18.7 19.2 36.8 25.4 32.8 9.4 27.3 20.8 25.8 61.5 77.8 40.7 2.1 9.8 52.4 43.8".split())))
    found = longbench.averages({**llama, "longbench-vcsum": 0.2})
    assert found["avg_category"] == pytest.approx(31.03, abs=0.02) and found["avg_16"] == pytest.approx(sum(llama.values()) / 16)
    assert longbench.averages({name: value for name, value in llama.items() if name != "longbench-lcc"}) == {}


# -- the others -----------------------------------------------------------------------------------------------------------------


def test_infinitebench_questions(folder):
    assert made("infinitebench-math-find", folder)[0].parts.prefix == "What is the largest number in the following list?\n\n"
    assert "func_1(-7)" in made("infinitebench-code-run", folder)[0].parts.query
    choice = made("infinitebench-longbook-choice-eng", folder)[0]
    assert choice.references == ("C", "Bo") and "\nA. Ann\nB. Cid\nC. Bo\nD. Dee\n" in choice.parts.query


@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        ("code-debug", "B. pkg.load", 1), ("code-debug", "The answer is: B", 1), ("code-debug", "pkg.load()", 0), ("code-debug", "it is C", 0),
        ("code-debug", "pkg.load is B", 0), ("code-debug", "B", 0), ("code-debug", "The option is: `pkg.load`", 1), ("code-debug", "it is:`pkg.load`", 1),
        ("code-debug", "answer: pkg.load", 1), ("code-debug", "answer:  pkg", 0), ("code-debug", "answer:\nOption B", 1), ("code-debug", "is:pkg.load", 0),
        ("code-debug", "is:\tB", 1),
        ("longbook-choice-eng", "The answer is C, not A", 1), ("longbook-choice-eng", "A man: C", 0), ("longbook-choice-eng", "Could it be", 1),
        ("longbook-choice-eng", "C. It is A house", 1), ("longbook-choice-eng", "answer is:Cx", 0), ("longbook-choice-eng", "answer is: Cx", 1),
        ("longbook-choice-eng", "Bo", 0), ("longbook-choice-eng", "no. C", 1), ("longbook-choice-eng", "no, CD then C", 0),
        ("official-kv-retrieval", '"cb59052b-9128-4979-9c0e-e1de4adcf73b"}', 1), ("official-kv-retrieval", "xcb59052b-9128-4979-9c0e-e1de4adcf73b", 0),
        ("official-kv-retrieval", "\x00cb59052b-9128-4979-9c0e-e1de4adcf73b", 0), ("code-run", "returns -42", 1), ("code-run", "-42 it is", 0),
        ("code-run", "The return value is -42.", 1), ("code-run", "`-42`", 1), ("code-run", "-42!", 0), ("code-run", "-4_2", 1), ("code-run", "9" * 9999, 0),
        ("math-find", "-93.50 is", 1), ("math-find", "93", 0), ("math-find", "\uff19\uff13.5", 1), ("official-passkey", "It is 71432 or 5", 1),
        ("official-passkey", "071432", 0), ("longdialogue-qa-eng", "It is Ishmael.", 1), ("longdialogue-qa-eng", "Ishmaelite", 0),
        ("longbook-qa-eng", "ann", 1), ("longbook-qa-chn", "张", 2 / 3),
    ],
)  # fmt: skip
def test_infinitebench_answers(folder, name, answer, expected):
    task = TASKS[f"infinitebench-{name}"]
    assert task.score(made(task.name, folder)[0], answer)[task.metric] == pytest.approx(expected)


def test_infinitebench_refuses_an_answer_that_is_no_option(tmp_path):
    jsonl(tmp_path / "code_debug.jsonl", [{"context": "c", "input": "i", "answer": "z", "options": ["a", "b", "c", "d"]}])
    with pytest.raises(ValueError, match="row 1: the answer"):
        made("infinitebench-code-debug", tmp_path)


def test_infinitebench_takes_the_first_name_and_refuses_none(tmp_path):
    jsonl(tmp_path / "longdialogue_qa_eng.jsonl", [{"context": "c", "input": "", "answer": ["ACE", "ROTHSTEIN"], "options": []}])
    task = TASKS["infinitebench-longdialogue-qa-eng"]
    (sample,) = made(task.name, tmp_path)
    assert task.score(sample, "rothstein") == {"accuracy": 0} and task.score(sample, "(V.O.) 'Ace'?") == {"accuracy": 1}
    jsonl(tmp_path / "longdialogue_qa_eng.jsonl", [{"context": "c", "input": "", "answer": [], "options": []}])
    with pytest.raises(ValueError, match="row 1: there is no answer"):
        made(task.name, tmp_path)


def test_infinitebench_summaries_are_not_stemmed(folder):
    task = TASKS["infinitebench-longbook-sum-eng"]
    assert task.score(made(task.name, folder)[0], "book whale")["rouge_lsum"] == pytest.approx(2 * (1 / 2) * (1 / 7) / (1 / 2 + 1 / 7))


@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        ("coursera", "CB", 1), ("coursera", "B", 0.25), ("coursera", "ABC", 0), ("coursera", "", 0), ("tpo", "the answer: C", 1), ("tpo", "AC", 0),
        ("gsm100", "so 3. The answer is: $13.", 1), ("gsm100", "Left are 13\n\nQuestion: 5", 1), ("gsm100", "The answer is 1,300", 0),
        ("gsm100", "13.0", 1), ("gsm100", "$13.75", 1), ("gsm100", "The answer is -13", 1),
        ("codeu", 'It prints [ "a" , "b" ]', 1), ("codeu", "['a', 'b'] " + "word " * 9, 0),
        ("topic-retrieval", "the benefits of  reading!", 1), ("topic-retrieval", "reading", 0), ("topic-retrieval", "benefits of reading", 0),
    ],
)  # fmt: skip
def test_leval_answers(folder, name, answer, expected):
    task = TASKS[f"leval-{name}"]
    assert task.score(made(task.name, folder)[0], answer)[task.metric] == expected


def test_leval_prompts(folder):
    samples = made("leval-sci-fi", folder)
    assert len(samples) == 8 and [s.meta["of"] for s in samples[:2]] == ["story", "world"]
    story, world = samples[:2]
    assert TASKS["leval-sci-fi"].score(world, "false")["accuracy"] == 1 and TASKS["leval-sci-fi"].score(story, "false")["accuracy"] == 0
    exam = made("leval-quality", folder)[0].parts
    assert exam.prefix.endswith("\n\nDocument is as follows.\n") and exam.query == "\n\nQuestion: Which?\nAnswer:"
    assert made("leval-gsm100", folder)[0].parts.query == "\n\nHow many are left?"
    assert leval.first_letter("") == "A"


def test_longbench_v2_slots_are_filled_once_and_the_phrase_is_read(folder, tmp_path):
    sample = made("longbench-v2", folder)[0]
    assert "question: Which $C_A$?\n" in sample.parts.query and "(B) choice B $DOC$\n" in sample.parts.query and sample.meta["difficulty"] == "hard"
    task = TASKS["longbench-v2"]
    assert task.score(sample, "**The correct answer is C**")["accuracy"] == 1 and task.score(sample, "C")["accuracy"] == 0
    assert task.score(sample, "C") == {"accuracy": 0, "compensated": 0.25, "unreadable": 1}
    assert longbench_v2.chosen("The correct answer is (insert)") is None
    file = tmp_path / "0shot.txt"
    file.write_text("Text: $DOC$\nQ: $Q$ (A) $C_A$ (B) $C_B$ (C) $C_C$ (D) $C_D$", encoding="utf-8")
    assert made("longbench-v2", folder, options={"prompt": str(file)})[0].parts.prefix == "Text: "
    file.write_text("Text: $DOC$", encoding="utf-8")
    with pytest.raises(ValueError, match=r"0shot\.txt"):
        made("longbench-v2", folder, options={"prompt": str(file)})


def test_loogle_cloze(folder):
    task, sample = TASKS["loogle-shortdep-cloze"], made("loogle-shortdep-cloze", folder)[0]
    assert task.score(sample, "{'<mask-0>': 'Ann', '<mask-1>': 'bob'}") == {"exact": 0, "partial": 0.5}
    assert task.score(sample, " {'<mask-1>': 'Bob', '<mask-0>': 'Dr. Lee'}\n") == {"exact": 0.5, "partial": 1}
    assert task.score(sample, "{'<mask-1>': 'Bo', '<mask-0>': 'An'}") == {"exact": 0, "partial": 0}, "a word in common, not a string within a string"
    assert task.score(sample, "<mask-1>: Bob\n<mask-0>: Ann Lee") == task.score(sample, "So {'<mask-1>': 'Bob'}") == {"exact": 0, "partial": 0}
    assert task.score(sample, "__import__('os')")["exact"] == 0
    assert loogle.filled_in("{'<mask-0>': 5}") == {"<mask-0>": 5} and loogle.filled_in('{"<mask-0>": null}') == loogle.filled_in("[1]") == {}
    for text in ("{" * 10**6, "{'a': " + "9" * 10**6 + "}", "{[]: 1}", "-" * 10**5 + "1", "{'<mask-1>': 'Bob'}\x00"):
        assert loogle.filled_in(text) == {}
    assert made("loogle-longdep-qa", folder)[0].meta == {"document": 0, "type": "comprehension and reasoning"}


# -- RULER's questions ----------------------------------------------------------------------------------------------------------


class Words:
    """A tokenizer whose tokens are words."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[str]]:
        return {"input_ids": text.split()}


def squad(path: Path) -> None:
    def paragraph(a: int, p: int) -> dict[str, Any]:
        answers = [{"text": f"answer{a}{p}", "answer_start": 0}, {"text": f"answer{a}{p}", "answer_start": 9}]
        question = {"question": f"Q {a} {p}?", "id": "i", "answers": answers, "is_impossible": False}
        impossible = {"question": "no?", "id": "j", "answers": [], "plausible_answers": answers, "is_impossible": True}
        return {"context": f"article{a} paragraph{p} answer{a}{p} " + "word " * 20, "qas": [impossible, question]}

    articles = [{"title": f"t{a}", "paragraphs": [paragraph(a, p) for p in range(4)]} for a in range(10)]
    path.write_text(json.dumps({"version": "v2.0", "data": articles}), encoding="utf-8")


def hotpot(path: Path) -> None:
    rows = [
        {"_id": str(n), "question": f"Which {n}?", "answer": f"gold{n}", "supporting_facts": [], "type": "bridge", "level": "hard",
         "context": [[f"Title {n} {k}", [f"It is gold{n} here.", f" And {k} more."]] for k in range(10)]} for n in range(8)
    ]  # fmt: skip
    path.write_text(json.dumps(rows), encoding="utf-8")


@pytest.mark.parametrize(("name", "write", "file"), [("ruler-qa-1", squad, "dev-v2.0.json"), ("ruler-qa-2", hotpot, "hotpot_dev_distractor_v1.json")])
def test_ruler_questions_fill_a_length_with_documents(tmp_path, name, write, file):
    write(tmp_path / file)
    task = registry.task(name)
    settings = Settings(lengths=(260, 700), samples=6, data=str(tmp_path), seed=3)
    samples = list(task.samples(Words(), settings))
    assert len(samples) == 12 and samples == list(task.samples(Words(), settings))
    for sample in samples:
        length, used = sample.meta["length_target"], len(sample.parts.text.split()) + sample.max_new_tokens
        assert used <= length and (sample.meta["all_documents"] or length - used < 60)
        assert any(answer in sample.parts.document for answer in sample.references) and sample.chat == "prefix"
        assert sample.parts.document.count("Document ") == sample.meta["documents"]
        assert task.score(sample, f"I say {sample.references[0].upper()}.") == {"string_match": 1} and task.score(sample, "") == {"string_match": 0}
        phrase = replace(sample, references=("two words",))
        assert task.score(phrase, "Two words") == {"string_match": 1} and task.score(phrase, "two\x07words") == {"string_match": 0}
    alone = list(task.samples(Words(), Settings(lengths=(700,), samples=2, data=str(tmp_path), seed=3)))
    assert alone == samples[6:8], "a sample does not depend on what is made beside it"
    other = next(iter(task.samples(Words(), Settings(lengths=(260,), samples=1, data=str(tmp_path), seed=4))))
    assert other.parts.document != samples[0].parts.document
    with pytest.raises(ValueError, match="do not fit into 60"):
        next(iter(task.samples(Words(), Settings(lengths=(60,), data=str(tmp_path)))))
    with pytest.raises(ValueError, match="needs lengths"):
        next(iter(task.samples(Words(), Settings(data=str(tmp_path)))))


def test_ruler_questions_prefer_their_own_article(tmp_path):
    squad(tmp_path / "dev-v2.0.json")
    sample = next(iter(registry.task("ruler-qa-1").samples(Words(), Settings(lengths=(260,), samples=1, data=str(tmp_path)))))
    assert sample.references == ("answer00",) and sample.parts.document.count("article0 ") == 4
    (tmp_path / "dev-v2.0.json").write_text('{"data": [{"title": "t"}]}', encoding="utf-8")
    with pytest.raises(ValueError, match="official format"):
        next(iter(registry.task("ruler-qa-1").samples(Words(), Settings(lengths=(260,), data=str(tmp_path)))))


@pytest.mark.parametrize("content", ["{}", '[{"question": "q"}]', "[3]", '[{"question": "q", "answer": "a", "context": [["t"]]}]'])
def test_ruler_refuses_other_formats(tmp_path, content):
    for name, file in (("ruler-qa-1", "dev-v2.0.json"), ("ruler-qa-2", "hotpot_dev_distractor_v1.json")):
        (tmp_path / file).write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="official"):
            next(iter(registry.task(name).samples(Words(), Settings(lengths=(260,), data=str(tmp_path)))))


def test_ruler_takes_the_hubs_tables_too(tmp_path):
    """The Hub's copies of both data sets are tables with the same content in other columns."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed (pip install pyarrow)")
    import pyarrow

    hotpot(tmp_path / "hotpot_dev_distractor_v1.json")
    rows = json.loads((tmp_path / "hotpot_dev_distractor_v1.json").read_text(encoding="utf-8"))
    tables = [{**row, "context": {"title": [t for t, _ in row["context"]], "sentences": [s for _, s in row["context"]]}} for row in rows]
    folder = tmp_path / "hub" / "distractor"
    folder.mkdir(parents=True)
    table = pyarrow.Table.from_pylist([{k: v for k, v in row.items() if k != "supporting_facts"} for row in tables])
    parquet.write_table(table, folder / "validation-0.parquet")
    task = registry.task("ruler-qa-2")
    paths = (tmp_path / "hotpot_dev_distractor_v1.json", tmp_path / "hub")
    both = [list(task.samples(Words(), Settings(lengths=(400,), samples=3, data=str(path)))) for path in paths]
    assert both[0] == both[1]
