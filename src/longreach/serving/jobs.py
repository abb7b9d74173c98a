"""What is asked of a scheduler, and what it says: a job, its events, and the state of all. Plain data; knows no model, text or connection."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from longreach.running.sampling import GREEDY, Sampling

Finish = Literal["stop", "length", "error", "held"]


@dataclass(frozen=True, eq=False)
class Job:
    """A prompt, and how its answer is drawn and ends.

    ids             tokens of the prompt; with a document, those that follow the document.
    max_new_tokens  at most so many are decoded.
    sampling        greedy, or a temperature; `sampling.seed` is of this job alone: it gets the same tokens whoever else is served.
    ends            tokens that end the answer; None: those of the checkpoint's generation settings.
    logprobs        for each token its own log-probability and so many of the best; 0: its own alone; None: none.
    stop            gets all new tokens after each of them; the answer ends where it says so.
    document        the name of a document that the scheduler holds: the prompt begins with it.
    shared          so many of the first ids are likely to come again, such as a document or the turns before the last one. See `prefixes`.
    """

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    ends: Collection[int] | None = None
    logprobs: int | None = None
    stop: Callable[[Sequence[int]], bool] = lambda new: False
    document: str | None = None
    shared: int = 0


@dataclass(frozen=True)
class Event:
    """What one forward did for a job: it has read more of its prompt, or it got a token, or it has ended, or two of these.

    read     tokens of the prompt that are read so far, those of the document among them.
    cached   how many of these had been read before this job came. The first event of a job says it, and every other too.
    token    the new token, None while the prompt is read.
    logprob  its log-probability by the model's own logits, before temperature and top-p, where the job asks for it.
    best     the most likely tokens and their log-probabilities, the first the best, as many as the job asks for.
    finish   how the job ended; None: it goes on. With "error" `problem` says why, and there is no token. "held": a document is there.
    refused  the job cannot be as it was asked for, and `problem` has the fix; else something failed that it was no part of.
    """

    job: Job
    read: int
    cached: int
    token: int | None = None
    logprob: float | None = None
    best: tuple[tuple[int, float], ...] = ()
    finish: Finish | None = None
    problem: str | None = None
    refused: bool = False


@dataclass(frozen=True)
class Stats:
    """The state of a scheduler.

    running, waiting    jobs that have a place, and those that have none yet.
    held, budget        bytes of keys and values, and how many they may be; None: there is no limit.
    read, decoded       tokens of prompts that were read, and tokens that were drawn, since the beginning.
    cached              tokens of prompts that needed no reading.
    hits, prefixes      jobs that began with what was there, and how many prefixes are held now, documents not among them.
    preempted           how often a job lost its place to others.
    failed              forwards that failed.
    documents           names of the documents that are there, and their tokens.
    """

    running: int
    waiting: int
    held: int
    budget: int | None
    read: int = 0
    decoded: int = 0
    cached: int = 0
    hits: int = 0
    prefixes: int = 0
    preempted: int = 0
    failed: int = 0
    documents: tuple[tuple[str, int], ...] = ()
