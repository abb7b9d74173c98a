"""LongBench (arXiv 2308.14508) and LongBench-E: 21 tasks in English, Chinese and code, a table; 13 of them in three bins of length.

Scores are the official ones. The instructions are our own words around the official slots and cues; for the official wording give the
official file: option `prompts`, the path of LongBench's config/dataset2prompt.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

from longreach.evals.samples import data
from longreach.evals.samples.base import Chat, Parts, Sample, Settings, Task
from longreach.evals.scores import scorers
from longreach.hf.interfaces import Tokenizer

COLUMNS: data.Columns = {"input": str, "context": str, "answers": (list, str), "length": int}
BINS = ((4000, "0-4k"), (8000, "4-8k"))  # of the stored length: words, for Chinese characters
Score = Callable[[str, str, Sequence[str]], float]
SCORES: dict[str, Score] = {
    "f1": lambda answer, gold, classes: scorers.token_f1(answer, gold),
    "f1_zh": lambda answer, gold, classes: scorers.token_f1_zh(answer, gold),
    "rouge_l": lambda answer, gold, classes: scorers.rouge_l_set(answer, gold).f,
    "rouge_l_zh": lambda answer, gold, classes: scorers.rouge_l_zh(answer, gold).f,
    "accuracy": scorers.cls_score,
    "count": lambda answer, gold, classes: scorers.count_score(answer, gold),
    "retrieval": lambda answer, gold, classes: scorers.retrieval_score(answer, gold),
    "code_sim": lambda answer, gold, classes: scorers.code_sim(answer, gold),
}
ROUGE: dict[str, Callable[..., scorers.Rouge]] = {"rouge_l": scorers.rouge_l_set, "rouge_l_zh": scorers.rouge_l_zh}


class LongBench(Task):
    """One data set of LongBench: its prompt, the tokens of an answer, its metric.

    config      its name among the official files.
    template    with the slots {context} and {input}.
    tokens      of an answer.
    first_line  only the first line of an answer counts; the few-shot tasks.
    binned      the form with lengths spread evenly, LongBench-E: settings.samples of each bin.
    """

    group = "longbench"
    version = "2"
    license = "MIT (code); the texts have licences of their own"
    source = "arXiv 2308.14508, THUDM/LongBench"
    needs_data = True
    options: ClassVar[Mapping[str, Any]] = {"prompts": None}

    config: ClassVar[str]
    category: ClassVar[str]
    language: ClassVar[str] = "en"
    template: ClassVar[str]
    tokens: ClassVar[int]
    first_line: ClassVar[bool] = False
    chat: ClassVar[Chat] = "user_turn"
    binned: ClassVar[bool] = False

    def samples(self, tokenizer: Tokenizer, settings: Settings) -> Iterator[Sample]:
        data.refuse_lengths(self, settings)
        prompts = self.option(settings, "prompts")
        template = self.template if prompts is None else official_template(prompts, self.config)
        if self.metric.endswith("_zh"):
            scorers.require_jieba()
        for row in self._picked(settings):
            yield self._sample(row, template)

    def _picked(self, settings: Settings) -> list[data.Row]:
        config = self.config + "_e" * self.binned
        source = data.Source("THUDM/LongBench", (f"{config}.jsonl",), COLUMNS, archive="data.zip")
        found = data.rows(source, settings, "longbench")
        found = [{**row, "_id": row.get("_id", str(index))} for index, row in enumerate(found)]
        if not self.binned:
            return data.pick(found, settings, self.name)
        names = [name for _, name in BINS] + ["8k+"]
        return [row for name in names for row in data.pick([r for r in found if bin_of(r["length"]) == name], settings, f"{self.name}:{name}")]

    def _sample(self, row: data.Row, template: str) -> Sample:
        before, after = (half.replace("{input}", row["input"]) for half in template.split("{context}"))
        meta = {"length": row["length"], "language": self.language, "category": self.category, "all_classes": list(row.get("all_classes") or [])}
        if self.binned:
            meta["bin"] = bin_of(row["length"])
        parts = Parts(prefix=before, document=row["context"], query=after)
        return Sample(f"{self.name}:{row['_id']}", parts, data.strings(row["answers"]), self.tokens, meta, chat=self.chat)

    def score(self, sample: Sample, prediction: str) -> dict[str, float]:
        answer = scorers.first_line(prediction) if self.first_line else prediction
        classes = sample.meta["all_classes"]

        def of(score: Score) -> float:
            return max((score(answer, gold, classes) for gold in sample.references), default=0.0)

        found = {self.metric: of(SCORES[self.metric])}
        if self.metric == "code_sim":
            found["code_sim_indel"] = of(lambda answer, gold, _: scorers.code_sim_indel(answer, gold))
        if self.metric in ROUGE:  # as published, where the longest sentences count as 0
            found[f"{self.metric}_compat"] = of(lambda answer, gold, _: ROUGE[self.metric](answer, gold, compat=True).f)
        return found


def bin_of(length: int) -> str:
    return next((name for bound, name in BINS if length < bound), "8k+")


def official_template(path: Any, config: str) -> str:
    """The wording of one data set from LongBench's own file."""
    file = Path(str(path)).expanduser()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read prompts from {file} ({error}); pass config/dataset2prompt.json of the LongBench repository") from error
    template = found.get(config) if isinstance(found, dict) else None
    if not isinstance(template, str) or template.count("{context}") != 1:
        raise ValueError(f"{file} has no prompt with one {{context}} for {config}; pass config/dataset2prompt.json of the LongBench repository")
    if unknown := set(re.findall(r"{(\w+)}", template)) - {"context", "input"}:
        raise ValueError(f"the prompt for {config} in {file} has slots that the data have not: {', '.join(sorted(unknown))}")
    return template


def averages(scores: Mapping[str, float]) -> dict[str, float]:
    """From the scores of the tasks, by name: `avg_category` is the mean of the means of six categories, as in the paper's tables; `avg_16` the
    mean of the 16 tasks in English and code, as in most later papers. Both need all 16; {} if one is missing.
    """
    tasks = [t for t in TASKS if t.language != "zh" and not t.binned]
    if not all(t.name in scores for t in tasks):
        return {}
    categories: dict[str, list[float]] = {}
    for t in tasks:
        categories.setdefault(t.category, []).append(scores[t.name])
    return {"avg_category": fmean(map(fmean, categories.values())), "avg_16": fmean(scores[t.name] for t in tasks)}


# -- the data sets ----------------------------------------------------------------------------------------------------------------

RULE = (
    'Answer with as few words as you can, one phrase or sentence if possible. If the article does not hold the answer, write "unanswerable". If it '
    'is a question of yes or no, write "yes", "no" or "unanswerable". Explain nothing.'
)
PASSAGES = (
    "Answer the question from the passages. Write the answer and nothing else.\n\nThe passages are:\n{context}\n\nAnswer the question from the "
    "passages above. Write the answer and nothing else.\n\nQuestion: {input}\nAnswer:"
)
CHINESE: dict[str, Any] = {"language": "zh"}
CODE: dict[str, Any] = {"language": "code", "chat": "off"}
FEW_SHOT: dict[str, Any] = {"first_line": True, "chat": "off"}
# name, category, metric, tokens of an answer, what is not as usual, template
SETS: tuple[tuple[str, str, str, int, dict[str, Any], str], ...] = (
    ("narrativeqa", "single-document QA", "f1", 128, {},
        "Here is a story: a novel or the script of a film. A question about it comes after it. Answer with as few words as you can, one phrase if "
        "possible, and explain nothing.\n\nStory: {context}\n\nNow answer the question about the story above with as few words as you can, one "
        "phrase if possible, and explain nothing.\n\nQuestion: {input}\n\nAnswer:"),
    ("qasper", "single-document QA", "f1", 128, {},
        f"Here are a scientific article and a question about it. {RULE}\n\nArticle: {{context}}\n\n {RULE}\n\nQuestion: {{input}}\n\nAnswer:"),
    ("multifieldqa-en", "single-document QA", "f1", 64, {},
        "Read this text. A short question about it follows.\n\n{context}\n\nAnswer the question from the text above. Write the answer and nothing "
        "else.\n\nQuestion: {input}\nAnswer:"),
    ("multifieldqa-zh", "single-document QA", "f1_zh", 64, CHINESE,
        "请先读下面这篇文章，然后简短地回答问题。\n\n文章：{context}\n\n请根据以上文章回答问题，只写答案，不要写别的内容。\n\n问题：{input}\n回答："),
    ("hotpotqa", "multi-document QA", "f1", 32, {}, PASSAGES),
    ("2wikimqa", "multi-document QA", "f1", 32, {}, PASSAGES),
    ("musique", "multi-document QA", "f1", 32, {}, PASSAGES),
    ("dureader", "multi-document QA", "rouge_l_zh", 128, CHINESE,
        "请根据给出的几篇文章回答问题。\n\n文章：{context}\n\n请根据以上几篇文章回答问题。\n\n问题：{input}\n回答："),
    ("gov-report", "summaries", "rouge_l", 512, {},
        "Here is a report of a government agency. Summarise it on one page.\n\nReport:\n{context}\n\nSummarise the report on one page.\n\nSummary:"),
    ("qmsum", "summaries", "rouge_l", 512, {},
        "Here are the transcript of a meeting and a query about it. Answer the query in one or more sentences.\n\nTranscript:\n{context}\n\nAnswer "
        "the query about the meeting above in one or more sentences.\n\nQuery: {input}\nAnswer:"),
    ("multi-news", "summaries", "rouge_l", 512, {},
        "Here are several news articles. Summarise all of them on one page.\n\nNews:\n{context}\n\nSummarise all the news on one page.\n\nSummary:"),
    ("vcsum", "summaries", "rouge_l_zh", 512, CHINESE,
        "下面是一次会议的记录。读完后请写一段总结，概括会议的内容。\n会议记录：\n{context}\n\n会议总结："),
    ("trec", "few-shot", "accuracy", 64, FEW_SHOT, "Say of which type the question is. Examples come first.\n\n{context}\n{input}"),
    ("triviaqa", "few-shot", "f1", 32, FEW_SHOT,
        "Answer the question from the passage. Write the answer and nothing else. Examples come first.\n\n{context}\n\n{input}"),
    ("samsum", "few-shot", "rouge_l", 128, FEW_SHOT, "Summarise the dialogue in a few short sentences. Examples come first.\n\n{context}\n\n{input}"),
    ("lsht", "few-shot", "accuracy", 64, FEW_SHOT | CHINESE, "请判断新闻属于哪个类别，先看几个例子。\n\n{context}\n{input}"),
    ("passage-count", "synthetic", "count", 32, {},
        "Below are paragraphs; some of them may occur more than once. Read them with care and find how many different paragraphs there are when "
        "those that repeat another are left out.\n\n{context}\n\nWrite the number of different paragraphs. Write the number alone, such as 1, 2 or "
        "3, and nothing else.\n\nThe final answer is: "),
    ("passage-retrieval-en", "synthetic", "retrieval", 32, {},
        "Below are 30 paragraphs of Wikipedia, and an abstract. Find the paragraph that the abstract is of.\n\n{context}\n\nThe abstract is:\n\n"
        '{input}\n\nWrite the number of the paragraph that the abstract is of, in the form "Paragraph 1", "Paragraph 2".\n\nThe answer is: '),
    ("passage-retrieval-zh", "synthetic", "retrieval", 32, CHINESE,
        "下面有若干个段落，还有其中一段的摘要。请找出摘要出自哪一段。\n\n{context}\n\n摘要是：\n\n{input}\n\n"
        "请写出摘要所属段落的编号，写成“段落1”、“段落2”这样的形式。\n\n答案是："),
    ("lcc", "code", "code_sim", 64, CODE, "Complete the code below.\n{context}Next line of code:\n"),
    ("repobench-p", "code", "code_sim", 64, CODE, "Complete the code below.\n{context}{input}Next line of code:\n"),
)
EVENLY = (
    "qasper multifieldqa-en hotpotqa 2wikimqa gov-report multi-news trec triviaqa samsum passage-count passage-retrieval-en lcc repobench-p"
).split()  # have the form with bins too


def _kinds() -> Iterator[type[LongBench]]:
    for name, category, metric, tokens, more, template in SETS:
        config = name if name == "repobench-p" else name.replace("-", "_")
        facts = {"config": config, "category": category, "metric": metric, "tokens": tokens, "template": template, **more}
        yield type(name, (LongBench,), {**facts, "name": f"longbench-{name}"})
        if name in EVENLY:
            yield type(name, (LongBench,), {**facts, "name": f"longbench-e-{name}", "group": "longbench-e", "binned": True})


TASKS = tuple(_kinds())
